"""`profile validate`: measured times against a profile, and files of measurements that are wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from models import text

from onnxcompress import model as models
from onnxcompress.cli import main
from onnxcompress.errors import MeasurementError, ProfileError
from onnxcompress.inspection import inspect
from onnxcompress.instructions import CLASSES, seconds, total
from onnxcompress.measurements import read_measurements
from onnxcompress.profile import INSTRUCTION_CLASSES, load_profile
from onnxcompress.validation import best_scalar, validate

CORE = load_profile("cortex-a53")
Row = Mapping[str, object]


def counts(scale: float = 1.0) -> dict[str, float]:
    return {name: scale * (i + 1) * 1e6 for i, name in enumerate(CLASSES)}


def row(device: str, model: str, ms: object, scale: float = 1.0, **more: object) -> Row:
    return {"device": device, "model": model, "measured_ms": ms, **counts(scale), **more}


def csv(tmp_path: Path, rows: Sequence[Row], name: str = "rows.csv") -> Path:
    path = tmp_path / name
    lines = [",".join(rows[0]), *(",".join(str(v) for v in r.values()) for r in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- prices of instructions --------------------------------------------------------------------


def test_classes_are_those_of_profiles() -> None:
    assert tuple(CLASSES) == INSTRUCTION_CLASSES


def test_seconds_are_cycles_over_the_clock() -> None:
    prices = CORE.instructions
    assert prices is not None
    expected = sum(prices.cycles[name] * n for name, n in counts().items()) + prices.cycles_per_run
    assert seconds(CORE, counts(), ghz=2.0) == pytest.approx(expected / 2e9)
    assert seconds(CORE, counts()) == pytest.approx(expected / (1e9 * CORE.device.frequency_ghz))


def test_bytes_are_no_instructions() -> None:
    assert total({"fma_f32": 3, "int": 4, "bytes_ld": 100}) == 7


def test_a_profile_without_prices_says_so() -> None:
    with pytest.raises(ProfileError, match=r"host-x86-vnni has no \[instructions\] table"):
        seconds(load_profile("host-x86-vnni"), counts())


# --- the scalar --------------------------------------------------------------------------------


def test_no_scalar_is_better_than_the_best() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 30):
        predicted, measured = rng.uniform(1, 9, n), rng.uniform(1, 9, n)

        def error(s: float, p: np.ndarray = predicted, m: np.ndarray = measured) -> float:
            return float(np.abs(s * p / m - 1).mean())

        found = best_scalar(predicted.tolist(), measured.tolist())
        assert error(found) <= min(map(error, np.linspace(0.05, 9, 2000))) + 1e-12


# --- counts of instructions --------------------------------------------------------------------


def test_a_board_that_is_only_slower_has_no_error_after_the_scalar(tmp_path: Path) -> None:
    ms = {s: 1e3 * seconds(CORE, counts(s)) for s in (1, 2, 5)}
    rows = [
        row(board, f"m{s}", factor * ms[s], s)
        for (board, factor), s in itertools.product({"fast": 1, "slow": 1.5}.items(), ms)
    ]
    found = validate(CORE, csv(tmp_path, rows))
    assert (found.kind, found.n) == ("instructions", 6)
    assert found.mape == pytest.approx(0, abs=1e-9)
    assert found.mape_raw == pytest.approx((0 + 1 / 3) / 2)  # slow is predicted at 1 / 1.5 of its time
    fast, slow = found.devices
    assert (fast.device, fast.n, slow.device) == ("fast", 3, "slow")
    assert (fast.scalar, slow.scalar) == pytest.approx((1, 1.5))


def test_the_worst_model_is_named(tmp_path: Path) -> None:
    rows = [row("b", f"m{s}", 1e3 * seconds(CORE, counts(s)), s) for s in (1, 2, 3)]
    rows.append(row("b", "odd", 2e3 * seconds(CORE, counts(7)), 7))
    (device,) = validate(CORE, csv(tmp_path, rows)).devices
    assert (device.worst, device.worst_error) == ("odd", pytest.approx(-0.5))
    assert device.mape == pytest.approx(0.5 / 4)


def test_clock_and_core_of_a_row_count(tmp_path: Path) -> None:
    ms = 1e3 * seconds(CORE, counts(), ghz=2.0)
    rows = [row("b", "m", ms, core="a53", ghz=2.0), row("b", "other", 1, core="zz", ghz="")]
    found = validate(CORE, csv(tmp_path, rows))
    assert (found.n, found.other_cores) == (1, 1)
    assert found.mape_raw == pytest.approx(0, abs=1e-9)


def test_columns_that_are_not_used_are_told(tmp_path: Path) -> None:
    assert validate(CORE, csv(tmp_path, [row("b", "m", 1.0, insn=3)])).ignored_columns == ("insn",)


def test_rows_of_other_cores_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"no row of core a53.*only of zz"):
        validate(CORE, csv(tmp_path, [row("b", "m", 1.0, core="zz")]))


def test_a_model_without_instructions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"rows.csv:2: .*no instruction"):
        validate(CORE, csv(tmp_path, [row("b", "m", 1.0, 0.0)]))


# --- models ------------------------------------------------------------------------------------


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    models.save(text("agraph (float[1, N] x) => (float[1, N] y) { y = Relu(x) }"), path)
    return path


def test_models_are_predicted_by_their_nodes(tmp_path: Path, net: Path) -> None:
    small, large = (1e3 * inspect(net, profile=CORE, shapes={"x": (1, n)}).seconds for n in (100, 100000))
    rows = [
        {"model": "net.onnx", "measured_ms": 2 * small, "shapes": "x=1x100"},
        {"model": "net.onnx", "measured_ms": 2 * large, "shapes": "x=1x100000"},
    ]
    found = validate(CORE, csv(tmp_path, rows))
    assert (found.kind, found.n, found.devices[0].device) == ("models", 2, "")
    assert found.mape == pytest.approx(0, abs=1e-9)
    assert found.mape_raw == pytest.approx(0.5)
    assert large > 2 * small


def test_a_model_that_is_missing_is_told_with_its_line(tmp_path: Path, net: Path) -> None:
    rows = [{"model": "net.onnx", "measured_ms": 1}, {"model": "gone.onnx", "measured_ms": 1}]
    with pytest.raises(MeasurementError, match=r"rows.csv:3: .*gone.onnx"):
        validate(CORE, csv(tmp_path, rows))


# --- files that are wrong ----------------------------------------------------------------------


def without(*names: str) -> Row:
    return {k: v for k, v in row("b", "m", 1.0).items() if k not in names}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("b", "m", "fast")], r":2: measured_ms is 'fast', not a number above 0"),
        ([row("b", "m", 1), row("b", "m", -1)], r":3: measured_ms is '-1'"),
        ([row("b", "m", 0)], r":2: measured_ms is '0'"),
        ([row("b", "m", "nan")], r":2: measured_ms is 'nan'"),
        ([row("b", "m", "inf")], r":2: measured_ms is 'inf'"),
        ([row("b", "m", "")], r":2: measured_ms is ''"),
        ([{**row("b", "m", 1), "dot": "-3"}], r":2: dot is '-3', not 0 or a number above"),
        ([row("b", "m", 1, ghz="0")], r":2: ghz is '0'"),
        ([row("", "m", 1)], r":2: device is empty"),
        ([without("device")], r":1: lacks column device"),
        ([without("measured_ms")], r":1: lacks column measured_ms"),
        ([without("dot")], r":1: lacks column dot \(write 0"),
        ([{**without("dot"), "dott": 0}], r":1: lacks column dot \(column 'dott'"),
        ([{"layer": "conv", "watts": 3}], r":1: columns layer, watts are of no kind that is known here"),
        ([{"model": "m.onnx", "seconds": 3}], r":1: lacks column measured_ms \(columns that are not known: seconds"),
        ([{"model": "resnet", "measured_ms": 3}], r":2: model 'resnet' is no .onnx file, and there are no counts"),
        ([{"model": "m.onnx", "measured_ms": 1, "shapes": "x:3"}], r":2: shapes: 'x:3'"),
    ],
)
def test_wrong_rows_are_told_with_their_line(tmp_path: Path, rows: Sequence[Row], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        read_measurements(csv(tmp_path, rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"model,measured_ms\n", r":1: has no rows"),
        (b"model,measured_ms\na.onnx,1,2\n", r":2: has 3 cells for 2 columns"),
        (b"model,model,measured_ms\na.onnx,a.onnx,1\n", r":1: column 'model' is there twice"),
        (b'model,measured_ms\n"a.onnx,1\n', r"not CSV"),
        (b"\xff\xfe\x00model", "is not UTF-8"),
    ],
)
def test_wrong_files_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(MeasurementError, match=message):
        read_measurements(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot be read"):
        read_measurements(tmp_path / "none.csv")


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["profile", "profiles"])
def test_command(group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("board 1", f"m{s}", 2e3 * seconds(CORE, counts(s)), s) for s in (1, 3)]
    words = [group, "validate", CORE.name, "--against", str(csv(tmp_path, rows))]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mape"] == pytest.approx(0, abs=1e-9)
    assert answer["mape_raw"] == pytest.approx(0.5)
    assert answer["devices"][0]["scalar"] == pytest.approx(2)
    assert {"device", "n", "scalar", "mape", "mape_raw", "worst"} <= set(answer["devices"][0])
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "mean error 0.0% after one scalar a device, 50.0% without" in out
    assert "board 1" in out


def test_command_fails_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(tmp_path, [row("b", "m", "x")])
    assert main(["profile", "validate", CORE.name, "--against", str(path)]) == 5
    assert f"{path}:2: measured_ms is 'x'" in capsys.readouterr().err


def test_the_former_name_of_the_group_still_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "list"]) == 0
    former = capsys.readouterr().out
    assert main(["profile", "list"]) == 0
    assert former == capsys.readouterr().out
    assert CORE.name in former


def test_shapes_that_had_to_be_made_up_are_told(tmp_path: Path) -> None:
    model = text("agraph (float[n, 8] x) => (float[n, 8] y) { y = Relu(x) }")
    models.save(model, tmp_path / "open.onnx")
    table = tmp_path / "models.csv"
    for more, guessed in (("", ("open.onnx",)), ("x=4x8", ())):
        table.write_text(f"model,measured_ms,shapes\nopen.onnx,0.01,{more}\n")
        assert validate(load_profile("host-x86-vnni"), table).guessed_shapes == guessed
