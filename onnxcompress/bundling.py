"""Several models whose weights lie in one file: what they have in common is stored once.

    bundle/a.onnx  bundle/b.onnx  bundle/weights.bin

Each .onnx refers to its tensors in ``weights.bin`` by offset and length, as the standard's external data; none needs
this library, or the other models. Tensors with equal bytes (by SHA-256; their types and shapes may differ) are one
extent. A process that maps the file shares its pages with every other that does.

On request, float32 tensors that are nearly equal become one, too: that of the first model. Each model is run against
its original; :mod:`~onnxcompress.packing` has how.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from onnxcompress import model as models
from onnxcompress.errors import ModelReadError, OutputError, UsageError, suggest
from onnxcompress.judge import DEFAULT_MIN_SQNR_DB
from onnxcompress.packing import WEIGHTS, BundledModel, Data, Merge, Packer
from onnxcompress.sizes import FileSize, file_size

__all__ = ["WEIGHTS", "Bundle", "BundledModel", "Merge", "multiplex"]

Progress = Callable[[str, int, int | None], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """What :func:`multiplex` made.

    Attributes:
        folder: of the bundle.
        files: of the bundle, that with the weights last.
        models: in the order they were given.
        weights_bytes: size of ``weights.bin``.
        gap_bytes: of these that only align others.
        before: sizes of all input files, each compressed by itself.
        after: sizes of all files of the bundle.
    """

    folder: Path
    files: tuple[Path, ...]
    models: tuple[BundledModel, ...]
    weights_bytes: int
    gap_bytes: int
    before: FileSize
    after: FileSize


def multiplex(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    near: float | None = None,
    calibration: Mapping[str, object] | None = None,
    preprocess: Mapping[str, str] | None = None,
    min_sqnr: float | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bundle:
    """Writes models into one folder, with one file for all their weights.

    Args:
        sources: two or more model files. They are only read.
        output: the folder to make. One that is there is replaced if it holds nothing but an earlier bundle of models
            of these names.
        near: float32 tensors of one shape at most this far apart, as an SQNR in dB, become one; None for none.
        calibration: data to check a model on, by the name of its file (``"a.onnx"`` or ``"a"``), of any kind that
            :func:`~onnxcompress.optimize` takes; made up for others.
        preprocess: how images become inputs, by name.
        min_sqnr: what outputs keep where tensors were merged that are not equal, in dB; that of ``optimize`` if None.
        samples: check on at most so many.
        seed: for made-up inputs.
        progress: called as the work goes on.

    Raises:
        UsageError: fewer than two models, one of them twice, two of one name, or data for none of them.
        ModelError: one of them cannot be read or run, or some of its weights are missing.
        OutputError: the folder cannot be written, has something else in it, or an input.
    """
    paths = [Path(p) for p in sources]
    _check_models(paths)
    if near is not None and not near > 0:
        raise UsageError(f"near is {near} dB", hint="40 is a difference of a hundredth, 60 of a thousandth")
    names = [p.name for p in paths]
    given, how = _by_file(calibration or {}, names, "data"), _by_file(preprocess or {}, names, "preprocessing")
    tell = progress or (lambda stage, done, total: None)
    inputs: list[tuple[Path, ...]] = []
    for path in paths:  # what is wrong with the last should not come up after an hour on the first
        inputs.append(models.source_files(models.load(path)))
        gc.collect()  # a graph is one large cycle of references, and its weights would wait with it
    target = _check_output(Path(output), {f for files in inputs for f in files}, [*names, WEIGHTS])
    with _staged(target) as folder:
        work = Packer(folder, near, DEFAULT_MIN_SQNR_DB if min_sqnr is None else min_sqnr)
        try:
            made: list[BundledModel] = []
            for path, files in zip(paths, inputs, strict=True):
                tell(path.name, len(made), len(paths))
                data = Data(given.get(path.name), how.get(path.name), samples, seed)
                made.append(replace(work.add(path, data), before=file_size(*files)))
                gc.collect()
            made = [replace(m, shared_bytes=work.shared(m.name)) for m in made]
        finally:
            work.close()
        tell("compressing", 0, None)
        after = file_size(*(folder / n for n in (*names, WEIGHTS)))
        whole = (folder / WEIGHTS).stat().st_size
        gaps = whole - sum(e.length for e in work.extents)
    before = file_size(*dict.fromkeys(f for files in inputs for f in files))
    written = tuple(target / n for n in (*names, WEIGHTS))
    return Bundle(target, written, tuple(made), whole, gaps, before, after)


# --- what is asked for -------------------------------------------------------------------------


def _check_models(paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        raise UsageError(f"{len(paths)} models cannot share", hint="name two or more")
    seen: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise ModelReadError("there is no such file", path=path)
        name = path.name.casefold()  # some file systems take no notice of case
        if name == WEIGHTS:
            raise UsageError(f"{path} has the name of the file for the weights", hint="rename it")
        if name in seen and seen[name].resolve() == path.resolve():
            raise UsageError(f"{path} is given twice", hint="name each model once")
        if name in seen:
            raise UsageError(f"{seen[name]} and {path} would have the same name in the bundle", hint="rename one")
        same = next((p for p in seen.values() if p.resolve() == path.resolve()), None)
        if same is not None:
            raise UsageError(f"{same} and {path} are the same file", hint="name each model once")
        seen[name] = path


def _by_file(given: Mapping[str, T], names: Sequence[str], what: str) -> dict[str, T]:
    """The same with full file names.

    Raises:
        UsageError: a key is no model, or two keys are one.
    """
    known = {Path(n).stem: n for n in names} | {n: n for n in names}
    found: dict[str, T] = {}
    for key, value in given.items():
        if key not in known:
            raise UsageError(f"{what} for {key!r}, which is no model of the bundle", hint=suggest(key, names))
        if known[key] in found:
            raise UsageError(f"{what} for {known[key]!r} twice", hint="give it once")
        found[known[key]] = value
    return found


def _check_output(output: Path, inputs: set[Path], names: Sequence[str]) -> Path:
    """Where the bundle goes.

    Raises:
        OutputError: not there.
    """
    target = output.resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(f"{output} is a file", hint="name a folder")
    for file in sorted(inputs):
        if file.parent == target:
            raise OutputError(f"{file} is an input and lies in {output}", hint="choose another folder; inputs stay")
    if target == Path.cwd():
        raise OutputError(f"{output} is the current folder", hint="name a folder in it, or elsewhere")
    if not target.parent.is_dir():
        raise OutputError(f"there is no folder {target.parent}", hint="make it first")
    try:
        others = sorted(p.name for p in target.iterdir() if p.name not in names) if target.is_dir() else []
    except OSError as error:
        raise OutputError(f"cannot look into {output}: {error.strerror}", hint="choose another folder") from error
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise OutputError(
            f"{output} holds {others[0]!r}{more}, which this bundle would not have",
            hint="choose another folder; only an earlier bundle of the same models is replaced",
        )
    return target


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside the target, which takes its name when all went well and is gone when not."""
    try:
        around = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write in {target.parent}: {error.strerror}", hint="choose a folder that is writable"
        ) from error
    new, old = around / "new", around / "old"
    try:
        new.mkdir()  # nobody else may read what mkdtemp makes; this one has the usual rights
        yield new
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except OSError as error:
        raise OutputError(f"writing {target} failed: {error}", hint="is the disk full?") from error
    finally:
        if old.exists() and not target.exists():  # stopped between the two
            os.replace(old, target)
        shutil.rmtree(around, ignore_errors=True)
