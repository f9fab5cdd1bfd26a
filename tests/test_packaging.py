"""What is installed is what is meant: wheel and sdist hold the passes and profiles, nothing twice."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from onnxcompress.cli import cli
from onnxcompress.errors import OnnxCompressError
from onnxcompress.pipeline import DEFAULT_MIN_SQNR_DB

ROOT = Path(__file__).parent.parent
PROFILES = [p.stem for p in (ROOT / "hardware_profiles").glob("*.toml")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def copy_of_the_sources(folder: Path) -> Path:
    """A copy, for building leaves files behind; links stay links, as in a checkout."""
    unwanted = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks", "*.onnx"
    )
    return Path(shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=unwanted))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from that sdist; needs no network."""
    folder = tmp_path_factory.mktemp("build")
    source = copy_of_the_sources(folder)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def committed(folder: str, pattern: str) -> set[str]:
    return {f"onnxcompress/{folder}/{p.name}" for p in (ROOT / folder).glob(pattern)}


def test_the_wheel_holds_every_module_profile_and_zoo_file(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[1]).namelist()
    assert len(names) == len(set(names))
    for folder in ("passes", "models_zoo"):
        assert committed(folder, "*.py") <= set(names)
    assert committed("hardware_profiles", "*.toml") <= set(names)
    assert {"onnxcompress/py.typed", "onnxcompress/cli.py", "onnxcompress/passes/quantize.py"} <= set(names)
    assert "onnxcompress/hardware_profiles/host-x86-vnni.toml" in names
    assert {n.partition("/")[0] for n in names if "dist-info" not in n} == {"onnxcompress"}


def test_the_sdist_holds_code_once_and_no_weights(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers()]
    assert {"passes/quantize.py", "hardware_profiles/host-x86-vnni.toml", "README.md"} <= set(names)
    assert not [n for n in names if n.endswith((".onnx", ".npz"))]


def test_an_installed_wheel_works_away_from_the_checkout(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(distributions[1]).extractall(tmp_path / "site")
    script = (
        "import onnxcompress.passes.quantize as q, onnxcompress.profile as p, onnxcompress\n"
        "print(q.__file__, onnxcompress.__file__, *p.list_profiles(), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    quantize, package, *profiles = done.stdout.splitlines()
    assert Path(quantize).is_relative_to(tmp_path) and Path(package).is_relative_to(tmp_path)
    assert "host-x86-vnni" in profiles


@pytest.mark.parametrize("folder", ["passes", "models_zoo"])
def test_no_second_import_under_another_name(folder: str) -> None:
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"import onnxcompress.{folder}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_links_in_the_package_are_relative_and_lead_to_the_folders() -> None:
    for folder in ("passes", "models_zoo", "hardware_profiles"):
        link = ROOT / "onnxcompress" / folder
        assert link.is_symlink() and link.readlink() == Path("..") / folder


def test_the_installed_entry_points_are_those_of_pyproject() -> None:
    declared = PROJECT["project"]["entry-points"]["onnxcompress.passes"]
    installed = {e.name: e.value for e in entry_points(group="onnxcompress.passes")}
    assert declared.items() <= installed.items(), "install again: pip install -e ."


def test_ci_runs_the_second_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert any(line.startswith(commands[1]) for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines())


def test_every_dependency_has_its_reason_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["test"]
    for requirement in wanted:
        name = re.split(r"[<>=!~\[ ;]", requirement)[0]
        assert f"| `{name}` |" in readme, f"{name} is not explained"


@pytest.mark.parametrize("document", ["README.md", "docs/decisions.md"])
def test_documents_name_the_default_budget_as_it_is(document: str) -> None:
    assert f"{DEFAULT_MIN_SQNR_DB:g} dB" in (ROOT / document).read_text(encoding="utf-8")


def test_the_readme_lists_every_exit_code_command_and_profile() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    kinds = [OnnxCompressError]
    for kind in kinds:  # grows as it goes: the whole tree
        kinds += kind.__subclasses__()
        assert f"| {kind.exit_code} |" in readme
    assert all(f"`{name}" in readme for name in cli.commands)
    assert all(f"`{name}`" in readme for name in PROFILES)
