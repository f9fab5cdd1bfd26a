"""The kit: what is written, the script that runs it alone, and what it says of a machine."""

from __future__ import annotations

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcompress.errors import OutputError
from onnxcompress.fitting import kit_run, machine
from onnxcompress.fitting.kit import emit
from onnxcompress.fitting.links import Link, after_conv, conv, gather, matmul, recurrent, unary
from onnxcompress.fitting.measuring import feeds, forms
from onnxcompress.fitting.nets import FITTED, Net, residual
from onnxcompress.fitting.samples import Measurements

LINKS = (
    conv("conv", "f32", 16, 32, 8, 3),
    conv("conv", "u8s8", 256, 256, 4, 3),  # 256 scales a weight: the size from which they could be left out
    matmul("dynamic", 4, 64, 128),
    recurrent("lstm", "f32", 2, 16),
    gather("f32", 4000, 8, 64),
    unary("Sigmoid", "f32", "Sigmoid", (4, 64)),
    after_conv("Add", "f32", (1, 32, 8, 8), lambda g, both: g.op("Add", both.split(",")), 3 * 2048, skip=True),
)
NET = Net("little", (1, 3, 32, 32), lambda b: residual(b, 16, False))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "kit"
    emit(folder, selected=LINKS, nets=[NET])
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every look takes a millisecond, so that no test waits."""
    ticks = itertools.count()
    monkeypatch.setattr(kit_run, "clock", lambda: lambda: next(ticks) * 1e-3)
    monkeypatch.setattr(kit_run, "rounds", lambda watches, budget, repeats: [w.run(1) for w in watches * 3])


def device(kit: Path, results: Path, said: list[str] | None = None) -> kit_run.Device:
    return kit_run.Device(kit, results, 0.001, said.append if said is not None else lambda line: None)


# --- the folder ---------------------------------------------------------------------------------------------


def test_a_kit_is_five_files_without_weights(kit: Path) -> None:
    assert sorted(p.name for p in kit.iterdir()) == [
        "README.txt", "machine.py", "manifest.json", "models.zip", "run.py",
    ]  # fmt: skip
    manifest = json.loads((kit / "manifest.json").read_text())
    assert [c["name"] for c in manifest["chains"]] == [link.name for link in LINKS]
    assert [n["name"] for n in manifest["nets"]] == ["little f32", "little wholly", "little partly"]
    assert (kit / "models.zip").stat().st_size < 200_000 < max(m["bytes"] for m in manifest["models"].values())


def test_the_same_base_is_stored_once(kit: Path) -> None:
    manifest = json.loads((kit / "manifest.json").read_text())
    bases = [base for chain in manifest["chains"] for base in chain["bases"]]
    assert bases and set(bases) == set(manifest["bases"])


def test_a_kit_goes_nowhere_where_something_is(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there already"):
        emit(kit, selected=LINKS[:1], nets=())
    with pytest.raises(OutputError, match="cannot write"):
        emit(tmp_path / "no" / "such", selected=LINKS[:1], nets=())
    (tmp_path / "empty").mkdir()
    assert emit(tmp_path / "empty", selected=LINKS[-2:-1], nets=()).chains == 1


def test_nothing_is_left_of_a_kit_that_was_interrupted(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emit(tmp_path / "kit", selected=LINKS, nets=(), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_the_script_needs_only_numpy_and_onnxruntime_and_an_old_python(kit: Path) -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime", "machine"}
    for name in ("run.py", "machine.py"):
        tree = ast.parse((kit / name).read_text(encoding="utf-8"), feature_version=(3, 8))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):  # annotations are never looked at, but this would be
                values = {n.value.id for n in ast.walk(node.value) if isinstance(n, ast.Subscript)
                          and isinstance(n.value, ast.Name)}  # fmt: skip
                assert not values & {"Callable", "Iterable", "dict", "list", "tuple"}
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.module != "onnxcompress.fitting.machine":
                assert str(node.module).split(".")[0] in allowed  # the one exception is for use as a module


# --- weights ------------------------------------------------------------------------------------------------


def models(kit: Path) -> Iterator[tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Any]]]:
    """Models as they are and as the kit makes them, and its inputs."""
    made = device(kit, kit.parent / "none.json")
    spreads = made.manifest["spreads"]
    entries = [(link.build(n), chain["files"][i]) for link, chain in zip(LINKS, made.manifest["chains"], strict=True)
               for i, n in enumerate((2, 10))]  # fmt: skip
    entries += [(model, net["file"]) for model, net in zip(forms(NET).values(), made.manifest["nets"], strict=True)]
    for real, name in entries:
        about = made.manifest["models"][name]
        data = kit_run.with_weights(made.models.read(name), about["weights"], spreads)
        inputs = {n: kit_run.sample(n, dims, dtype, spreads[s]) for n, dims, dtype, s in about["inputs"]}
        yield real, onnx.load_from_string(data), inputs
    made.close()


def test_models_of_the_kit_are_those_measured_here_but_for_the_numbers_in_weights(kit: Path) -> None:
    for real, mine, inputs in models(kit):
        assert list(mine.graph.node) == list(real.graph.node)
        assert {(w.name, *w.dims, w.data_type) for w in mine.graph.initializer} == {
            (w.name, *w.dims, w.data_type) for w in real.graph.initializer
        }
        theirs = {w.name: onnx.numpy_helper.to_array(w) for w in real.graph.initializer}
        for weight in mine.graph.initializer:
            array, other = onnx.numpy_helper.to_array(weight), theirs[weight.name]
            # Spreads within a tenth of each other are one; quantiles miss the far ends and a part of the variance.
            assert array.std() == pytest.approx(other.std(), rel=0.25), weight.name
            assert abs(array.mean() - other.mean()) <= 0.2 * other.std() + 1e-6
        expected = feeds(real) if "k" in inputs or len(inputs) > 1 else None
        assert expected is None or {n: a.shape for n, a in inputs.items()} == {n: a.shape for n, a in expected.items()}


def test_onnxruntime_runs_them_as_the_real_ones_and_values_stay_sound(kit: Path, tmp_path: Path) -> None:
    def optimized(model: onnx.ModelProto) -> tuple[list[str], ort.InferenceSession]:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node], session

    for real, mine, inputs in models(kit):
        ops, session = optimized(mine)
        assert ops == optimized(real)[0]
        for output in session.run(None, inputs):
            assert np.isfinite(output).all()
            if output.dtype == np.float32:
                assert 1e-6 < np.abs(output).max() < 1e6


def test_two_weights_share_no_memory(kit: Path) -> None:
    """A chain of ten tables is ten tables: its file is as large as the real one."""
    for real, mine, _ in models(kit):
        assert mine.ByteSize() == pytest.approx(real.ByteSize(), rel=0.02)


# --- running ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_results_are_measurements(kit: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run = device(kit, tmp_path / "results.json", said)
    run.run()
    run.close()
    found = Measurements.from_json((tmp_path / "results.json").read_text())
    assert found.onnxruntime == ort.__version__ and found.machine["complete"]
    assert {link.name for link in found.links} | set(found.left_out) == {link.name for link in LINKS}
    assert [net.name for net in found.nets] == ["little f32", "little wholly", "little partly"]
    for net in found.nets:
        assert len(net.nodes) > 8 and all(node.seconds > 0 and node.elements > 0 for node in net.nodes)
    assert said[0].startswith("[1/10]") and "left" in said[-1]
    assert not (tmp_path / "results.json.running").exists()


def constant_pairs(
    monkeypatch: pytest.MonkeyPatch, *, stop_at: int = 10**6, error: BaseException | None = None
) -> list[str]:
    """Chains of made-up times; the list gets the model of each that is timed."""
    timed: list[str] = []

    def pair(self: kit_run.Device, chain: dict[str, Any]) -> tuple[float, float]:
        timed.append(chain["files"][1])
        if len(timed) >= stop_at and error is not None:
            raise error
        return 1e-5, 0.02

    monkeypatch.setattr(kit_run.Device, "pair", pair)
    monkeypatch.setattr(
        kit_run.Device, "net", lambda self, n: {"name": n["name"], "seconds": 1e-3, "spread": 0.0, "nodes": []}
    )
    monkeypatch.setattr(kit_run.Device, "overheads", lambda self: (1e-6, 1e-7))
    return timed


def test_an_interrupted_run_goes_on(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.json"
    with monkeypatch.context() as patched:
        constant_pairs(patched, stop_at=4, error=KeyboardInterrupt())
        run = device(kit, results)
        with pytest.raises(KeyboardInterrupt):
            run.run()
        run.close()
    half = Measurements.from_json(results.read_text())
    assert [link.name for link in half.links] == [link.name for link in LINKS[:3]] and not half.machine["complete"]
    timed = constant_pairs(monkeypatch)
    run = device(kit, results)
    run.run()
    run.close()
    assert len(timed) == len(LINKS) - 3 + 1  # and the chain that one of them stands on
    whole = Measurements.from_json(results.read_text())
    assert [link.name for link in whole.links] + list(whole.left_out) == [link.name for link in LINKS]
    assert whole.left_out == {LINKS[-1].name: "lost in noise"}  # as long as what it stands on


def test_what_fails_is_left_out_with_its_reason(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusedError(Exception):
        pass

    for error, reason in ((RefusedError("no such kernel\nat line 3"), "RefusedError: no such kernel"),
                          (MemoryError(), "does not fit into memory")):  # fmt: skip
        with monkeypatch.context() as patched:
            constant_pairs(patched, stop_at=len(LINKS), error=error)
            run = device(kit, tmp_path / f"{type(error).__name__}.json")
            run.run()
            run.close()
        assert run.data["left_out"] == {LINKS[-1].name: reason}
        assert len(run.data["links"]) == len(LINKS) - 1


def test_a_model_larger_than_the_memory_is_not_tried(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit_run, "available", lambda: 1000)
    run = device(kit, tmp_path / "results.json")
    with pytest.raises(kit_run.LeftOutError, match="does not fit into memory: 2 MB of weights, 0 MB free"):
        run.pair(run.manifest["chains"][4])
    run.close()


def test_a_model_that_killed_the_process_is_not_tried_again(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant_pairs(monkeypatch)
    run = device(kit, tmp_path / "results.json")
    run.save()
    run.close()
    (tmp_path / "results.json.running").write_text(LINKS[0].name)
    run = device(kit, tmp_path / "results.json")
    run.run()
    run.close()
    assert "out of memory" in run.data["left_out"][LINKS[0].name]


def test_a_link_the_runtime_does_not_run_as_meant_is_left_out(kit: Path, tmp_path: Path) -> None:
    run = device(kit, tmp_path / "results.json")
    check = run.manifest["chains"][1]["check"]
    ran = ["QuantizeLinear", *["QLinearConv"] * 4, "DequantizeLinear"]
    run.fused(check, ran, [*ran, *["QLinearConv"] * 16])
    with pytest.raises(kit_run.LeftOutError, match="runs as"):
        run.fused(check, ["Conv"] * 4, ["Conv"] * 20)
    with pytest.raises(kit_run.LeftOutError, match="stays float"):
        run.fused(check, ran, [*ran, *["QLinearConv", "QuantizeLinear", "DequantizeLinear"] * 16])
    with pytest.raises(kit_run.LeftOutError, match="float32"):
        run.fused({**check, "expect": [], "integer": False, "half": True}, ["Cast", "Conv"], ["Cast", "Conv"])
    run.close()


def test_results_of_something_else_are_not_gone_on_with(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    for text, reason in (
        ("{}", "no file of results"),
        ('{"machine": {"kit": "other"}, "onnxruntime": "1"}', "another kit"),
    ):
        results.write_text(text)
        with pytest.raises(SystemExit, match=reason):
            kit_run.main(["--kit", str(kit), "--results", str(results)])
        assert results.read_text() == text
    with pytest.raises(SystemExit, match="is not whole"):
        kit_run.main(["--kit", str(tmp_path), "--results", str(tmp_path / "new.json")])
    with pytest.raises(SystemExit):
        kit_run.main(["--kit", str(kit), "--budget", "0"])
    assert "number of seconds" in capsys.readouterr().err


def test_another_onnxruntime_than_the_kit_is_for(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "__version__", "1.9.0")
    constant_pairs(monkeypatch)
    arguments = ["--kit", str(kit), "--results", str(tmp_path / "results.json")]
    assert kit_run.main(arguments) == 2
    assert "here is 1.9.0" in capsys.readouterr().err and not (tmp_path / "results.json").exists()
    assert kit_run.main([*arguments, "--any-version"]) == 0
    found = Measurements.from_json((tmp_path / "results.json").read_text())
    assert (found.onnxruntime, found.machine["kit_onnxruntime"] != "1.9.0") == ("1.9.0", True)


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT from outside")
def test_ctrl_c_in_the_script_leaves_whole_results(kit: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(kit / "run.py"), "--results", str(tmp_path / "results.json"), "--budget", "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Run again to go on" in errors
    assert not Measurements.from_json((tmp_path / "results.json").read_text()).machine["complete"]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


# --- the machine --------------------------------------------------------------------------------------------


def linux(root: Path, files: dict[str, str]) -> dict[str, Any]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return machine.describe(str(root))


CPU = "sys/devices/system/cpu"


def test_a_server(tmp_path: Path) -> None:
    about = linux(tmp_path, {
        "proc/cpuinfo": "model name\t: Some CPU\ncpu MHz\t\t: 2600.5\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\n" * 2,
        "proc/meminfo": "MemTotal:   1024 kB\n",
        **{f"{CPU}/cpu{i}/topology/thread_siblings_list": "0-1" if i < 2 else "2-3" for i in range(4)},
        **{f"{CPU}/cpu0/cache/index{i}/{k}": v for i, (level, kind, size, shared) in enumerate((
            ("1", "Data", "32K", "0-1"), ("1", "Instruction", "32K", "0-1"), ("2", "Unified", "2M", "0-1"),
            ("3", "Unified", "32768K", "0-3")))
           for k, v in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared))},
    })  # fmt: skip
    assert (about["cpu"], about["cores"], about["frequency_ghz"]) == ("Some CPU", 2, 2.6)
    assert about["isa"] == ["avx2", "avx512f", "avx512_vnni"] and about["memory_bytes"] == 1 << 20
    assert about["caches"] == [
        {"name": "L1", "bytes": 32 << 10, "shared": False},
        {"name": "L2", "bytes": 2 << 20, "shared": False},
        {"name": "L3", "bytes": 32 << 20, "shared": True},
    ]


def test_a_board(tmp_path: Path) -> None:
    about = linux(tmp_path, {
        "proc/cpuinfo": "processor : 0\nFeatures : fp asimd asimddp crc32\nCPU part\t: 0xd0b\n",
        "proc/device-tree/model": "Some Board Rev 1.0\0",
        f"{CPU}/cpu0/cpufreq/cpuinfo_max_freq": "2400000", f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "1500000",
    })  # fmt: skip
    assert about["cpu"] == "Cortex-A76 of Some Board Rev 1.0" and about["isa"] == ["asimd", "asimddp"]
    assert (about["frequency_ghz"], about["current_ghz"]) == (2.4, 1.5)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    about = linux(tmp_path, {})
    assert about["cores"] >= 1 and about["isa"] == [] and about["caches"] == [] and "frequency_ghz" not in about


def test_macos() -> None:
    about = machine.from_sysctl(
        "hw.physicalcpu: 8\nhw.memsize: 8589934592\nhw.l1dcachesize: 65536\nhw.perflevel0.l1dcachesize: 131072\n"
        "hw.perflevel0.l2cachesize: 12582912\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_BF16: 0\n"
        "machdep.cpu.brand_string: Apple M1\n"
    )
    assert (about["cpu"], about["cores"], about["isa"]) == ("Apple M1", 8, ["asimddp"])
    assert [(c["name"], c["bytes"], c["shared"]) for c in about["caches"]] == [
        ("L1", 131072, False),
        ("L2", 12582912, True),
    ]


def test_this_machine() -> None:
    about = machine.describe()
    assert about["cpu"] and about["usable"] >= 1 and json.loads(json.dumps(about)) == about


def test_links_of_the_test_are_links(kit: Path) -> None:
    assert len({link.name for link in LINKS}) == len(LINKS) and all(isinstance(link, Link) for link in LINKS)
    assert NET.name not in {net.name for net in FITTED}
