"""Emulated verification: what is handed to the emulator and back, with one that is not an emulator; and a real one."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from models import normal, text

from onnxcompress import model as models
from onnxcompress.cli import main
from onnxcompress.emulated import verify
from onnxcompress.emulation import ENVIRONMENT, Emulator, Job
from onnxcompress.errors import EmulatorError, ProfileError
from onnxcompress.instructions import CLASSES, seconds
from onnxcompress.profile import load_profile

CORE = load_profile("cortex-a53")

FAKE = """\
#!{python}
# Runs the guest on this machine and claims that a run executes 1000 instructions of each class for each node.
import json, pathlib, runpy, shutil, sys
cpu, tree, counts, script, folder = sys.argv[1:]
here = pathlib.Path(__file__).parent
for name in ("proc/cpuinfo", "sys/devices/system/cpu/cpu0/regs/identification/midr_el1", "usr/here"):
    shutil.copy(pathlib.Path(tree, name), here / pathlib.Path(name).name)
(here / "cpu").write_text(cpu)
if (here / "fail").exists():
    sys.exit("illegal instruction")
import onnx
with open(counts, "w") as out:
    for i, job in enumerate(json.loads(pathlib.Path(folder, "jobs.json").read_text())):
        nodes = len(onnx.load(job["model"]).graph.node)
        if job["runs"] and not (here / "uncounted").exists():
            line = dict.fromkeys({classes}, 1000 * nodes * job["runs"])
            print(json.dumps({{"tag": 2 * i, **line}}), file=out)
            print(json.dumps({{"tag": 2 * i + 1, **line}}), file=out)
sys.argv = [script, folder]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like an emulator, and is named as one."""
    made = tmp_path / "emulator"
    (made / "root" / "usr").mkdir(parents=True)
    (made / "root" / "usr" / "here").write_text("a file of the root")
    (made / "root" / "proc").mkdir()
    run = made / "run"
    run.write_text(FAKE.format(python=sys.executable, classes=tuple(CLASSES)))
    run.chmod(run.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(ENVIRONMENT, str(made))
    return made


def saved(path: Path, body: str, **weights: np.ndarray) -> Path:
    models.save(text(f"agraph (float[2, 4] x) => (float[2, 4] y) {{ {body} }}", weights), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model of two nodes, and one of a node that is off by a hundredth."""
    w = normal(0, 4, 4)
    first = saved(tmp_path / "first.onnx", "t = MatMul(x, w)\ny = Relu(t)", w=w)
    return first, saved(tmp_path / "second.onnx", "y = MatMul(x, w)", w=np.float32(1.01) * w)


def test_outputs_and_counts_come_back(folder: Path, pair: tuple[Path, Path]) -> None:
    feeds = [{"x": normal(i, 2, 4)} for i in (1, 2)]
    done = Emulator().run(CORE, [Job(pair[0], feeds, runs=3), Job(pair[1], feeds, outputs=("y",))])
    w = models.load(pair[0]).graph.initializers["w"].const_value
    assert w is not None
    assert [len(one.outputs) for one in done] == [2, 2]
    np.testing.assert_allclose(done[0].outputs[1]["y"], np.maximum(feeds[1]["x"] @ w.numpy(), 0), rtol=1e-5)
    assert done[0].counts == dict.fromkeys(CLASSES, 2000.0)  # of one run
    assert done[1].counts == {}
    assert all(one.onnxruntime and not one.error for one in done)


def test_the_core_is_that_of_the_profile(folder: Path, pair: tuple[Path, Path]) -> None:
    Emulator().run(CORE, [Job(pair[0], [{"x": normal(0, 2, 4)}])])
    assert CORE.emulation is not None
    assert (folder / "cpu").read_text() == CORE.emulation.cpu
    assert int((folder / "midr_el1").read_text(), 16) == int(CORE.emulation.midr, 16)
    told = (folder / "cpuinfo").read_text()
    assert told.count("processor") == CORE.device.cores
    assert "CPU implementer\t: 0x41\n" in told
    assert f"CPU part\t: 0x{CORE.emulation.midr[-4:-1]}\n" in told
    assert " ".join(CORE.emulation.features) in told
    assert (folder / "here").read_text() == "a file of the root"  # the rest of the tree is the root's


def test_a_model_that_does_not_run_gives_its_reason(folder: Path, pair: tuple[Path, Path]) -> None:
    done = Emulator().run(CORE, [Job(pair[0], [{"x": normal(0, 3, 3)}]), Job(pair[0], [{"x": normal(0, 2, 4)}])])
    assert "x" in done[0].error
    assert not done[1].error
    assert done[1].outputs


def test_verification_compares_and_prices(folder: Path, pair: tuple[Path, Path]) -> None:
    found = verify(*pair, CORE, samples=2)
    assert found.comparison.samples == 2
    assert found.comparison.min_sqnr_db < 60  # they do differ
    assert found.before.host.min_sqnr_db > 100  # and each is itself
    assert found.after.host.min_sqnr_db > 100
    assert (found.before.instructions, found.after.instructions) == (28000, 14000)  # 14 classes, 2 and 1 nodes
    assert found.before.seconds == pytest.approx(seconds(CORE, dict.fromkeys(CLASSES, 2000.0)))


def test_command(folder: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(pair[0]), str(pair[0]), "--emulate", CORE.name]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"]
    assert answer["emulated"]["before"]["instructions"] == answer["emulated"]["after"]["instructions"] == 28000
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"On the emulated core of {CORE.name}" in out
    assert "28 k" in out
    assert main(["verify", *map(str, pair), "--emulate", CORE.name, "--min-sqnr", "60"]) == 1


@pytest.mark.parametrize("gone", ["run", "root"])
def test_without_an_emulator_it_says_how_to_get_one(
    gone: str, folder: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / gone).rename(folder / "elsewhere")
    assert main(["verify", *map(str, pair), "--emulate", CORE.name]) == 9
    told = capsys.readouterr().err
    assert f"no emulator in {folder}" in told
    assert "setup.sh" in told
    assert ENVIRONMENT in told


def test_the_default_folder_is_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(EmulatorError, match=r"no emulator in .*emulator: it has no 'run'"):
        Emulator()


def test_a_profile_of_another_kind_of_device(folder: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(ProfileError, match=r"host-x86-vnni has no \[emulation\] table"):
        verify(*pair, "host-x86-vnni")


def test_an_emulator_that_fails_is_told(folder: Path, pair: tuple[Path, Path]) -> None:
    (folder / "fail").touch()
    with pytest.raises(EmulatorError, match=r"first.onnx: the emulator ended with status 1: illegal instruction"):
        Emulator().run(CORE, [Job(pair[0], [{"x": normal(0, 2, 4)}])])


def test_an_emulator_without_its_plugin_is_told(folder: Path, pair: tuple[Path, Path]) -> None:
    (folder / "uncounted").touch()
    with pytest.raises(EmulatorError, match="counted nothing"):
        Emulator().run(CORE, [Job(pair[0], [{"x": normal(0, 2, 4)}], runs=1)])


def test_an_emulator_that_hangs_is_stopped(folder: Path, pair: tuple[Path, Path]) -> None:
    (folder / "run").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(EmulatorError, match=r"first.onnx: not done after 0.2 s"):
        Emulator().run(CORE, [Job(pair[0], [{"x": normal(0, 2, 4)}])], timeout=0.2)


def test_text_is_not_emulated(folder: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(EmulatorError, match="input 'x' is no tensor of numbers"):
        Emulator().run(CORE, [Job(pair[0], [{"x": np.array(["a"])}])])


# --- a real one --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dots"), [("cortex-a53", False), ("cortex-a76", True)])
def test_a_real_core(name: str, dots: bool, tmp_path: Path) -> None:
    """Integers are equal to the bit, floats up to rounding; dot products run where the core has them."""
    try:
        emulator = Emulator()
    except EmulatorError as error:
        pytest.skip(str(error))
    integers = """xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear(w, ws, wz)
        t = MatMul(xd, wd)
        tq = QuantizeLinear(t, s, z)
        y = DequantizeLinear(tq, s, z)"""
    grid = {"s": np.float32(0.05), "z": np.uint8(128), "ws": np.float32(0.02), "wz": np.int8(0)}
    w = np.random.default_rng(0).integers(-127, 127, (4, 4)).astype(np.int8)
    quantized = saved(tmp_path / "integers.onnx", integers, w=w, **{k: np.asarray(v) for k, v in grid.items()})
    floats = saved(tmp_path / "floats.onnx", "y = MatMul(x, w)", w=w * np.float32(0.02))
    found = verify(floats, quantized, name, emulator=emulator)
    assert found.after.host.min_sqnr_db == np.inf
    assert found.before.host.min_sqnr_db > 100
    assert (found.after.counts["dot"] > 0) is dots
    assert found.before.counts["dot"] == 0
    assert found.before.counts["fma_f32"] > 0
