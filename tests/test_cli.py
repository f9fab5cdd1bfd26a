"""The command line: what it prints where, exit codes, and a clear error for each kind of bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.cli import cli, main
from onnxcompress.models_zoo import get_model, sample_feeds

PROFILE = "host-x86-vnni"


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def shell(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "onnxcompress", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and samples for it."""
    folder = tmp_path_factory.mktemp("zoo")
    get_model("gen-cnn", folder)
    (folder / "samples").mkdir()
    for number, feed in enumerate(sample_feeds("gen-cnn", 6)):
        np.savez(folder / "samples" / f"{number}.npz", **feed)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def optimized(zoo: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The result of the main command, run once by all tests that look at it."""
    out = zoo / "out.onnx"
    arguments = ["optimize", "gen-cnn.onnx", "--profile", PROFILE, "--calibration", "samples", "-o", out]
    done = shell(*arguments, "--report", "report.json", "--json", cwd=zoo)
    assert done.returncode == 0, done.stderr
    return out, done


# --- what works --------------------------------------------------------------------------------


def test_optimize_writes_a_smaller_model_and_both_reports(
    zoo: Path, optimized: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    out, done = optimized
    document = json.loads(done.stdout)
    assert Path(document["output"]) == out
    assert document["report"] == json.loads((zoo / "report.json").read_text(encoding="utf-8"))
    before, after = document["report"]["totals"]["file_bytes"]
    assert before == pytest.approx((zoo / "gen-cnn.onnx").stat().st_size, rel=0.01)
    assert after == out.stat().st_size < before / 2
    assert done.stderr == ""  # quiet when piped


def test_the_same_command_writes_the_same_bytes(call: Call, zoo: Path, tmp_path: Path) -> None:
    before = (zoo / "gen-cnn.onnx").read_bytes()
    arguments = ["optimize", zoo / "gen-cnn.onnx", "--profile", "cortex-a53", "--calibration", zoo / "samples"]
    for name in ("a.onnx", "b.onnx"):
        assert call(*arguments, "-o", tmp_path / name).status == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (zoo / "gen-cnn.onnx").read_bytes() == before


def test_optimize_answers_in_prose(call: Call, zoo: Path, tmp_path: Path) -> None:
    arguments = ["optimize", zoo / "gen-cnn.onnx", "--profile", PROFILE, "--calibration", zoo / "samples"]
    done = call(*arguments, "-o", tmp_path / "o.onnx")
    assert done.status == 0
    for word in ("Totals", "file", "predicted", PROFILE, "Changed"):
        assert word in done.out
    assert not re.search(r"\x1b\[", done.out)


def test_the_default_output_lies_beside_the_input(call: Call, tmp_path: Path) -> None:
    model = get_model("gen-if", tmp_path)
    done = call("optimize", model, "--profile", PROFILE, "--json")
    assert done.status == 0
    assert Path(done.document["output"]) == tmp_path / "gen-if.optimized.onnx"
    assert (tmp_path / "gen-if.optimized.onnx").is_file()


def test_no_calibration_is_said_loudly(call: Call, tmp_path: Path) -> None:
    model = get_model("gen-if", tmp_path)
    done = call("optimize", model, "--profile", PROFILE, "--json")
    assert "WARNING" in done.err and "made up" in done.err
    assert any("MADE UP" in w for w in done.document["report"]["warnings"])


def test_exactly_the_passes_named_are_run(call: Call, zoo: Path, tmp_path: Path) -> None:
    arguments = ["optimize", zoo / "gen-cnn.onnx", "--profile", PROFILE, "--calibration", zoo / "samples"]
    done = call(*arguments, "-o", tmp_path / "o.onnx", "--pass", "fuse_batchnorm", "--json")
    assert done.status == 0
    assert [p["name"] for p in done.document["report"]["passes"]] == ["fuse_batchnorm"]
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node}


def test_a_metric_holds_the_budget(call: Call, zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(
        "import os\n"
        "def small(path):\n"
        "    print('scoring')\n"  # user code may print; --json must stay pure
        "    return 1.0 if os.path.getsize(path) > 200_000 else 0.5\n"
    )
    arguments = ["optimize", zoo / "gen-cnn.onnx", "--profile", PROFILE, "--calibration", zoo / "samples"]
    arguments += ["-o", tmp_path / "o.onnx", "--max-drop", "1%", "--metric", f"{tmp_path / 'score.py'}:small"]
    done = call(*arguments, "--json")
    assert done.status == 0
    totals = done.document["report"]["totals"]
    assert totals["metric_before"] == totals["metric_after"] == 1.0
    assert "scoring" in done.err


def test_inspect(call: Call, zoo: Path) -> None:
    done = call("inspect", zoo / "gen-cnn.onnx", "--profile", "cortex-a53", "--shape", "image=2x3x64x64", "--json")
    assert done.status == 0
    convolutions = [n for n in done.document["nodes"] if n["op_type"] == "Conv"]
    assert len(convolutions) == 10
    single = call("inspect", zoo / "gen-cnn.onnx", "--profile", "cortex-a53", "--shape", "image=1x3x64x64", "--json")
    assert done.document["macs"] == 2 * single.document["macs"] > 0
    prose = call("inspect", zoo / "gen-cnn.onnx")
    assert prose.status == 0 and "Conv" in prose.out and "MACs" in prose.out


def test_compare(call: Call, zoo: Path, optimized: tuple[Path, Any]) -> None:
    done = call("compare", zoo / "gen-cnn.onnx", optimized[0], "--calibration", zoo / "samples", "--json")
    assert done.status == 0
    assert done.document["comparison"]["samples"] == 6
    assert done.document["latency"]["speed_up"] > 0
    assert done.document["sizes"]["first"]["raw"] > done.document["sizes"]["second"]["raw"]
    prose = call("compare", zoo / "gen-cnn.onnx", zoo / "gen-cnn.onnx")
    assert prose.status == 0 and "exact" in prose.out and "made-up" in prose.err


def test_verify_fails_below_the_limit(call: Call, zoo: Path, optimized: tuple[Path, Any]) -> None:
    pair = ["verify", zoo / "gen-cnn.onnx", optimized[0], "--calibration", zoo / "samples"]
    passed = call(*pair, "--min-sqnr", "10", "--json")
    assert passed.status == 0 and passed.document["passed"] is True
    failed = call(*pair, "--min-sqnr", "150", "--json")
    assert failed.status == 1 and failed.document["passed"] is False
    assert "FAILED" in call(*pair, "--min-sqnr", "150").out
    same = call("verify", zoo / "gen-cnn.onnx", zoo / "gen-cnn.onnx", "--calibration", zoo / "samples", "--json")
    assert same.document["comparison"]["outputs"][0]["sqnr_db"] == "inf"


def test_profiles(call: Call) -> None:
    names = {p["name"] for p in call("profiles", "list", "--json").document}
    assert {"host-x86-vnni", "x86-avx2", "cortex-a53", "cortex-a72", "cortex-a76"} <= names
    assert call("profiles", "show", "cortex-a53", "--json").document["name"] == "cortex-a53"
    prose = call("profiles", "show", "cortex-a53")
    assert prose.status == 0 and "in ns" in prose.out and "source" in prose.out
    assert "cortex-a76" in call("profiles", "list").out


def test_passes(call: Call) -> None:
    found = {p["name"]: p for p in call("passes", "list", "--json").document}
    assert found["quantize"]["lossless"] is False and found["fuse_batchnorm"]["lossless"] is True
    assert all(p["summary"] for p in found.values())
    assert {"name", "type", "default"} == set(found["quantize"]["options"][0])
    assert "quantize" in call("passes", "list").out


def test_zoo(call: Call, tmp_path: Path) -> None:
    assert {"ppocr-v4-det", "gen-lstm"} <= {m["name"] for m in call("zoo", "list", "--json").document}
    done = call("zoo", "get", "gen-lstm", "--samples", "3", "-o", tmp_path / "new", "--json")
    assert done.status == 0
    assert Path(done.document["model"]).is_file()
    assert len(list(Path(done.document["samples"]).glob("*.npz"))) == 3
    assert "ppocr-v4-det" in call("zoo", "list").out


LEAVES = [
    (*path, name)
    for path, group in (
        ((), cli),
        (("profiles",), cli.commands["profiles"]),
        (("passes",), cli.commands["passes"]),
        (("zoo",), cli.commands["zoo"]),
    )
    for name, command in group.commands.items()  # type: ignore[attr-defined]
    if not hasattr(command, "commands")
]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_help_and_the_common_options(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*path, "--help"])
    assert done.exit_code == 0
    assert "--json" in done.output and "--verbose" in done.output
    assert "\b" not in done.output


def test_without_a_command_there_is_help(call: Call) -> None:
    assert "optimize" in call().out
    assert re.fullmatch(r"onnxcompress, version \d+\.\d+\S*\n", call("--version").out)


# --- bad input ---------------------------------------------------------------------------------


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def small(*, elem_type: int = TensorProto.FLOAT, op: str = "MatMul", domain: str = "", weights: bool = True) -> Any:
    """X @ w, or x op x."""
    initializers = []
    if weights:
        array = np.eye(4, dtype=helper.tensor_dtype_to_np_dtype(elem_type))
        initializers.append(numpy_helper.from_array(array, "w"))
    node = helper.make_node(op, ["x", "w" if weights else "x"], ["y"], domain=domain)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", elem_type, [2, 4])],
        [helper.make_tensor_value_info("y", elem_type, [2, 4])],
        initializers,
    )
    imports = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


class Bad:
    """Builds the files of each case; a method returns the arguments after ``optimize``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save(small(), folder / "good.onnx")

    def feeds(self, **arrays: Any) -> Path:
        path = self.folder / "feeds.npz"
        np.savez(path, **arrays)
        return path

    def missing_model(self) -> list[Any]:
        return [self.folder / "nowhere.onnx"]

    def not_onnx(self) -> list[Any]:
        (self.folder / "text.onnx").write_text("this is no model")
        return [self.folder / "text.onnx"]

    def truncated(self) -> list[Any]:
        data = self.model.read_bytes()
        (self.folder / "cut.onnx").write_bytes(data[: len(data) // 2])
        return [self.folder / "cut.onnx"]

    def missing_external_data(self) -> list[Any]:
        path = self.folder / "external.onnx"
        onnx.save(small(), path, save_as_external_data=True, location="external.bin", size_threshold=0)
        (self.folder / "external.bin").unlink()
        return [path]

    def not_runnable(self) -> list[Any]:
        return [save(small(op="Unheard", domain="com.example"), self.folder / "custom.onnx")]

    def unknown_profile(self) -> list[Any]:
        return [self.model, "--profile", "cortex-a35"]

    def broken_profile(self) -> list[Any]:
        path = self.folder / "board.toml"
        path.write_text('schema = 1\nname = "board"\ndescription = unquoted\n')
        return [self.model, "--profile", path]

    def wrong_profile(self) -> list[Any]:
        path = self.folder / "board.toml"
        path.write_text('schema = 1\nname = "board"\ndescription = "b"\ncolour = "red"\n')
        return [self.model, "--profile", path]

    def wrong_input_name(self) -> list[Any]:
        return [self.model, "--calibration", self.feeds(image=np.zeros((3, 2, 4), np.float32), y=np.zeros((3, 2)))]

    def wrong_shape(self) -> list[Any]:
        return [self.model, "--calibration", self.feeds(x=np.zeros((3, 2, 5), np.float32))]

    def wrong_dtype(self) -> list[Any]:
        return [self.model, "--calibration", self.feeds(x=np.full((3, 2, 4), "a"))]

    def nan(self) -> list[Any]:
        return [self.model, "--calibration", self.feeds(x=np.full((3, 2, 4), np.nan, np.float32))]

    def empty_calibration(self) -> list[Any]:
        return [self.model, "--calibration", self.feeds(x=np.zeros((0, 2, 4), np.float32))]

    def empty_folder(self) -> list[Any]:
        (self.folder / "empty").mkdir()
        return [self.model, "--calibration", self.folder / "empty"]

    def no_such_data(self) -> list[Any]:
        return [self.model, "--calibration", self.folder / "nothing.npz"]

    def unknown_pass(self) -> list[Any]:
        return [self.model, "--pass", "quantise"]

    def unknown_option(self) -> list[Any]:
        return [self.model, "--pass", "quantize{colour=red}"]

    def unreadable_pass(self) -> list[Any]:
        return [self.model, "--pass", "quantize{"]

    def no_folder_for_output(self) -> list[Any]:
        return [self.model, "-o", self.folder / "none" / "out.onnx"]

    def output_is_a_folder(self) -> list[Any]:
        return [self.model, "-o", self.folder]

    def output_is_the_input(self) -> list[Any]:
        (self.folder / "same.onnx").symlink_to(self.model)
        return [self.model, "-o", self.folder / "same.onnx"]

    def report_is_the_input(self) -> list[Any]:
        return [self.model, "--report", self.model]

    def drop_without_metric(self) -> list[Any]:
        return [self.model, "--max-drop", "1%"]

    def metric_does_not_import(self) -> list[Any]:
        return [self.model, "--max-drop", "1%", "--metric", "no_such_module:f"]

    def metric_is_not_there(self) -> list[Any]:
        (self.folder / "score.py").write_text("def accuracy(path): return 1.0\n")
        return [self.model, "--max-drop", "1%", "--metric", f"{self.folder / 'score.py'}:acuracy"]

    def metric_raises(self) -> list[Any]:
        (self.folder / "score.py").write_text("def accuracy(path): raise KeyError('label')\n")
        return [self.model, "--max-drop", "1%", "--metric", f"{self.folder / 'score.py'}:accuracy"]

    def drop_is_no_share(self) -> list[Any]:
        return [self.model, "--max-drop", "150%"]

    def unknown_flag(self) -> list[Any]:
        return [self.model, "--fast"]


CASES = {
    "missing_model": (3, "ModelReadError", "nowhere.onnx.*no such file"),
    "not_onnx": (3, "ModelReadError", "text.onnx"),
    "truncated": (3, "ModelReadError", "cut.onnx"),
    "missing_external_data": (3, "ModelReadError", "external.bin"),
    "not_runnable": (3, "ModelRunError", "Unheard|custom.onnx"),
    "unknown_profile": (5, "UnknownProfileError", "cortex-a35.*cortex-a53"),
    "broken_profile": (5, "ProfileError", r"board.toml:3:"),
    "wrong_profile": (5, "ProfileError", r"board.toml.*(colour|missing)"),
    "wrong_input_name": (4, "DataError", "image|y"),
    "wrong_shape": (4, "DataError", r"'x'.*\(?2.*5"),
    "wrong_dtype": (4, "DataError", "'x'"),
    "nan": (4, "DataError", "'x'.*(?i:nan)"),
    "empty_calibration": (4, "DataError", "no sample"),
    "empty_folder": (4, "DataError", "empty"),
    "no_such_data": (4, "DataError", "nothing.npz"),
    "unknown_pass": (6, "UnknownPassError", "quantise.*quantize"),
    "unknown_option": (6, "PassOptionError", "colour"),
    "unreadable_pass": (6, "PassOptionError", "NAME"),
    "no_folder_for_output": (7, "OutputError", "none"),
    "output_is_a_folder": (7, "OutputError", "folder"),
    "output_is_the_input": (7, "OutputError", "never overwritten"),
    "report_is_the_input": (7, "OutputError", "--report"),
    "drop_without_metric": (2, "UsageError", "--metric"),
    "metric_does_not_import": (2, "UsageError", "no_such_module"),
    "metric_is_not_there": (2, "UsageError", "acuracy.*accuracy"),
    "metric_raises": (2, "UsageError", "KeyError: 'label'"),
    "drop_is_no_share": (2, "UsageError", "150%"),
    "unknown_flag": (2, "UsageError", "--fast"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_error(call: Call, tmp_path: Path, case: str) -> None:
    status, kind, pattern = CASES[case]
    bad = Bad(tmp_path)
    arguments = getattr(bad, case)()
    if "--profile" not in arguments:
        arguments += ["--profile", PROFILE]
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    prose = call("optimize", *arguments)
    assert prose.status == status
    assert prose.out == ""
    assert "error:" in prose.err and "Traceback" not in prose.err
    assert re.search(pattern, prose.err, re.DOTALL)

    machine = call("optimize", *arguments, "--json")
    assert machine.status == status
    assert machine.document["error"]["type"] == kind
    assert re.search(pattern, machine.document["error"]["message"] + machine.document["error"]["hint"], re.DOTALL)

    left = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert left == files  # no partial output, no input changed


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody may write in, not even root")
@pytest.mark.parametrize("option", ["-o", "--report"])
def test_an_unwritable_folder_is_said_before_the_work(call: Call, tmp_path: Path, option: str) -> None:
    bad = Bad(tmp_path)
    done = call("optimize", bad.model, "--profile", PROFILE, option, "/proc/file")
    assert done.status == 7 and "cannot write in /proc" in done.err
    assert "WARNING" not in done.err  # which comes when the work begins


def quantized() -> onnx.ModelProto:
    """Somebody has quantized this one already."""
    return onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 4] x) => (float[2, 4] y)
        <float s = {0.1}, uint8 z = {128}, float w = {0.5}>
        {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            y = Mul (d, w)
        }
    """)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("int8", quantized()),
        ("no-weights", small(op="Add", weights=False)),
        ("float16", small(elem_type=TensorProto.FLOAT16)),
        ("double", small(elem_type=TensorProto.DOUBLE)),
    ],
)
def test_what_cannot_be_improved_passes_through_with_reasons(
    call: Call, tmp_path: Path, name: str, model: onnx.ModelProto
) -> None:
    path = save(model, tmp_path / f"{name}.onnx")
    done = call("optimize", path, "--profile", PROFILE, "-o", tmp_path / "out.onnx", "--json")
    assert done.status == 0
    report = done.document["report"]
    assert all(s["decision"] == "keep" and s["reason"] for s in report["sites"])
    assert report["totals"]["comparison"]["outputs"][0]["max_abs"] == 0
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node] == [n.op_type for n in model.graph.node]


def test_what_onnxruntime_cannot_run_is_refused(call: Call, tmp_path: Path) -> None:
    path = save(small(elem_type=TensorProto.BFLOAT16), tmp_path / "bfloat16.onnx")
    done = call("optimize", path, "--profile", PROFILE)
    assert done.status in (3, 4)  # nothing can be fed, or nothing runs: which comes first is no promise
    assert "error:" in done.err and "this is a bug" not in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["bfloat16.onnx"]


@pytest.mark.parametrize("command", ["inspect", "compare", "verify"])
def test_the_other_commands_report_a_bad_model_too(call: Call, tmp_path: Path, command: str) -> None:
    bad = Bad(tmp_path)
    (broken,) = bad.truncated()
    arguments = [broken] if command == "inspect" else [bad.model, broken]
    done = call(command, *arguments, "--json")
    assert done.status == 3 and done.document["error"]["type"] == "ModelReadError"


def test_inspect_names_an_unknown_input(call: Call, zoo: Path) -> None:
    assert "'image'" in call("inspect", zoo / "gen-cnn.onnx", "--shape", "imge=1x3x8x8").err
    assert call("inspect", zoo / "gen-cnn.onnx", "--shape", "image=ax3").status == 2


def test_profiles_show_and_zoo_get_suggest_names(call: Call, tmp_path: Path) -> None:
    done = call("profiles", "show", "cortex-a5")
    assert done.status == 5 and "cortex-a53" in done.err
    done = call("zoo", "get", "gen-lst", "-o", tmp_path)
    assert done.status == 8 and "gen-lstm" in done.err


# --- the process -------------------------------------------------------------------------------


def test_exit_codes_and_pure_json_in_a_real_process(tmp_path: Path) -> None:
    done = shell("inspect", "nowhere.onnx", "--json", cwd=tmp_path)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["type"] == "ModelReadError"
    assert shell("optimise", cwd=tmp_path).returncode == 2


def test_a_bug_says_so_and_shows_its_traceback_only_when_asked(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("onnxcompress.profile.load_profile", broken)
    done = call("profiles", "show", "x")
    assert done.status == 70 and "this is a bug: RuntimeError: unforeseen" in done.err
    assert "Traceback" not in done.err
    assert "Traceback" in call("profiles", "show", "x", "-v").err
    assert call("profiles", "show", "x", "--json").document["error"]["type"] == "Bug"


SLOW_METRIC = """
import pathlib, time
def slow(path):
    pathlib.Path("started").touch()
    time.sleep(60)
    return 1.0
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_behind(zoo: Path, tmp_path: Path, number: int, status: int) -> None:
    (tmp_path / "slow.py").write_text(SLOW_METRIC)
    arguments = ["optimize", zoo / "gen-cnn.onnx", "--profile", PROFILE, "--calibration", zoo / "samples"]
    arguments += ["-o", "out.onnx", "--max-drop", "1%", "--metric", "slow.py:slow"]
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxcompress", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} <= {"slow.py", "started", "tmp", "__pycache__"}
    assert not list((tmp_path / "tmp").glob("*onnxcompress*"))


def test_a_reader_that_goes_away_is_no_failure_of_ours(tmp_path: Path) -> None:
    script = f"{sys.executable} -m onnxcompress profiles show {PROFILE} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""


def test_inspect_compresses_weights_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = get_model("gen-cnn", tmp_path)
    found = []
    for more in ([], ["--zstd"]):
        assert main(["inspect", str(path), "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["zstd_bytes"] is None
    assert 0 < found[1]["zstd_bytes"] <= found[1]["weight_bytes"] + 1000
    assert sum(n["zstd_bytes"] for n in found[1]["nodes"]) >= found[1]["zstd_bytes"]
