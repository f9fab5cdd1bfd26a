"""The package's own names: loaded on demand, all there, and light where little is asked for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import onnxcompress


def declared() -> set[tuple[str, str]]:
    """(module, name) of what type checkers are told."""
    tree = ast.parse(Path(onnxcompress.__file__).read_text(encoding="utf-8"))
    return {
        (str(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("onnxcompress.")
        for alias in node.names
    }


def test_what_is_loaded_is_what_type_checkers_see() -> None:
    homes = {(f"onnxcompress.{home}", name) for home, names in onnxcompress._HOMES.items() for name in names}
    assert homes == declared()
    assert sorted(name for _, name in homes) == sorted(onnxcompress.__all__)


@pytest.mark.parametrize("name", onnxcompress.__all__)
def test_every_name_is_there_and_listed(name: str) -> None:
    assert getattr(onnxcompress, name).__name__ == name
    assert name in dir(onnxcompress)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        _ = onnxcompress.optimise  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from onnxcompress import optimise  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["profiles", "list"]])
def test_small_commands_import_none_of_the_large_libraries(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from onnxcompress.cli import main\n"
        f"status = main({arguments!r})\n"
        "large = {'onnx', 'onnx_ir', 'onnxruntime', 'scipy', 'networkx'} & set(sys.modules)\n"
        "sys.exit(status or ' '.join(sorted(large)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_planner_does_not_import_the_solver() -> None:
    script = "import sys, onnxcompress.planner\nsys.exit('scipy.optimize' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("wanted", [None, "0"])
def test_onnxruntime_reports_to_nobody_unless_the_user_says_so(wanted: str | None, tmp_path: Path) -> None:
    """Its telemetry leaves files where it is on; what it does on CI is its own affair, so that is hidden."""
    script = (
        "import os, onnxcompress.session\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "import onnx_ir as ir\n"
        'model = ir.from_onnx_text(\'<ir_version: 8, opset_import: ["": 17]> '
        "net (float[2] x) => (float[2] y) { y = Relu (x) }')\n"
        "onnxcompress.session.Runner(model)\n"
    )
    hidden = {"CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {name: str(tmp_path) for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")}
    if wanted is not None:
        script = script.partition("import onnx_ir")[
            0
        ]  # only that it is left as it was: nothing must be sent from a test
        script = script.replace("onnxcompress.session", "onnxcompress")
        environment["ORT_DISABLE_TELEMETRY"] = wanted
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (wanted or "1")
    assert list(tmp_path.rglob("*")) == []
