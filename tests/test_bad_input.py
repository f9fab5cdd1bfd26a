"""What goes in wrong comes out as one clear error: the right class, the place by name, and nothing left behind.

Each case is a call of the library with something off. Every one asks for an output file, so a partial
one would be seen; every file there was is compared to the byte afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, normal, proto_of, text

import onnxcompress
from onnxcompress import Budget
from onnxcompress import model as models
from onnxcompress.errors import (
    DataError,
    ModelReadError,
    ModelRunError,
    OnnxCompressError,
    OutputError,
    ProfileError,
    UnknownProfileError,
    UsageError,
)
from onnxcompress.passes.quantize import Quantize

PROFILES = Path(onnxcompress.__file__).parent / "hardware_profiles"


def network() -> ir.Model:
    return text("g (float[N, 8] x) => (float[N, 8] y) { m = MatMul (x, w)  y = Relu (m) }", {"w": normal(0, 8, 8)})


def samples(**changed: Array) -> list[dict[str, Array]]:
    """Six good ones, but for what is given."""
    made: list[dict[str, Array]] = [{"x": normal(i, 4, 8)} for i in range(6)]
    if changed:
        made[4] = dict(changed)
    return made


class Case:
    """A folder with a good model in it, and what the call is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = self.write("good.onnx", models.serialize(network()))
        self.options: dict[str, Any] = {"calibration": samples(), "output": folder / "out.onnx"}

    def samples(self, **changed: Array) -> None:
        """Six samples; the arrays given take the place of those in the fifth, which is for calibration."""
        self.given(calibration=samples(**changed), passes=[Quantize(modes=("static",))])

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def given(self, model: object = None, **options: Any) -> None:
        self.model = self.model if model is None else model  # type: ignore[assignment]
        self.options |= options

    def profile(self, old: str, new: str) -> None:
        """A shipped profile with one change."""
        source = (PROFILES / "cortex-a53.toml").read_text(encoding="utf-8")
        assert old in source
        self.given(profile=str(self.write("board.toml", source.replace(old, new, 1))))


@dataclass(frozen=True)
class Expected:
    """Class and message (a pattern) of the error a change must lead to."""

    error: type[OnnxCompressError]
    message: str
    change: Callable[[Case], None]


def truncated(case: Case) -> None:
    whole = case.model.read_bytes()
    case.given(case.write("cut.onnx", whole[: len(whole) // 2]))


def missing_weights(case: Case) -> None:
    path = case.folder / "apart.onnx"
    proto = proto_of(network())
    onnx.save(proto, path, save_as_external_data=True, location="apart.bin", size_threshold=0)
    (case.folder / "apart.bin").unlink()
    case.given(path)


def short_weights(case: Case) -> None:
    missing_weights(case)
    case.write("apart.bin", bytes(100))


def unrunnable(case: Case) -> None:
    model = text("g (float[N, 8] x) => (float[N, 8] y) { y = com.example.Unheard (x) }", imports=["com.example"])
    case.given(case.write("custom.onnx", models.serialize(model)))


def wrong_inside(case: Case) -> None:
    """A valid file whose numbers do not fit together: only a run tells."""
    model = text("g (float[N, M] x) => (float[N, K] y) { y = MatMul (x, w) }", {"w": normal(0, 9, 8)})
    case.given(case.write("mismatch.onnx", models.serialize(model)))


def bfloat16(case: Case) -> None:
    model = text("g (bfloat16[N, 8] x) => (bfloat16[N, 8] y) { y = Exp (x) }")
    case.given(case.write("bfloat16.onnx", models.serialize(model)))


def makes_nan(case: Case) -> None:
    model = text(
        "g (float[N, 8] x) => (float[N, 8] y) { l = Log (x)  m = MatMul (l, w)  y = Relu (m) }", {"w": normal(0, 8, 8)}
    )
    good = [{"x": normal(i, 4, 8) ** 2 + 1} for i in range(6)]
    good[5]["x"] = -good[5]["x"]
    case.given(
        case.write("log.onnx", models.serialize(model)),
        calibration=good,
        passes=[Quantize(modes=("static",))],
    )


CASES: dict[str, Expected] = {
    "no such model": Expected(ModelReadError, r"nowhere\.onnx.*no such file", lambda c: c.given("nowhere.onnx")),
    "a folder": Expected(ModelReadError, r"no such file", lambda c: c.given(c.folder)),
    "an empty file": Expected(ModelReadError, r"empty\.onnx", lambda c: c.given(c.write("empty.onnx", b""))),
    "text": Expected(ModelReadError, r"text\.onnx", lambda c: c.given(c.write("text.onnx", "hello " * 99))),
    "a truncated file": Expected(ModelReadError, r"cut\.onnx.*cut off", truncated),
    "weights missing": Expected(ModelReadError, r"apart\.onnx.*tensor 'w'.*apart\.bin", missing_weights),
    "weights too short": Expected(ModelReadError, r"tensor 'w'.*apart\.bin' has 100 bytes", short_weights),
    "a proto": Expected(UsageError, r"ModelProto.*from_proto", lambda c: c.given(proto_of(network()))),
    "an operator nobody knows": Expected(ModelRunError, r"custom\.onnx.*Unheard", unrunnable),
    "shapes that do not fit inside": Expected(ModelRunError, r"mismatch\.onnx.*MatMul", wrong_inside),
    "a type onnxruntime lacks": Expected(ModelRunError, r"bfloat16\.onnx", bfloat16),
    "an input nobody has": Expected(
        DataError, r"sample 4, input 'xx'.*mean.*'x'", lambda c: c.samples(xx=normal(0, 4, 8))
    ),
    "an input missing": Expected(
        DataError, r"sample 0, input 'x': is missing", lambda c: c.given(calibration=[{}, {}])
    ),
    "another extent": Expected(
        DataError, r"sample 4, input 'x': is 4x9.*axis 1 must be 8", lambda c: c.samples(x=normal(0, 4, 9))
    ),
    "another rank": Expected(DataError, r"sample 4, input 'x': is 8.*\?x8", lambda c: c.samples(x=normal(0, 8))),
    "another type": Expected(
        DataError, r"sample 4, input 'x': is int64", lambda c: c.samples(x=np.ones((4, 8), np.int64))
    ),
    "NaN": Expected(DataError, r"sample 4, input 'x': holds NaN", lambda c: c.samples(x=normal(0, 4, 8) * np.nan)),
    "infinity": Expected(
        DataError,
        r"sample 4, input 'x': holds infinity",
        lambda c: c.samples(x=np.full((4, 8), np.inf, np.float32)),
    ),
    "NaN made by a node": Expected(DataError, r"sample \d: node 'node' \(Log\) makes NaN in 'l'", makes_nan),
    "no samples": Expected(DataError, r"no sample", lambda c: c.given(calibration=[])),
    "a generator of nothing": Expected(DataError, r"no sample", lambda c: c.given(calibration=iter([]))),
    "samples of no kind": Expected(
        DataError, r"sample 0: is a ndarray", lambda c: c.given(calibration=[normal(0, 4, 8)])
    ),
    "no such data": Expected(DataError, r"data\.npz", lambda c: c.given(calibration=str(c.folder / "data.npz"))),
    "a damaged archive": Expected(
        DataError, r"data\.npz", lambda c: c.given(calibration=str(c.write("data.npz", b"PK\x03\x04 and no more")))
    ),
    "no samples wanted": Expected(UsageError, r"limit is 0", lambda c: c.given(samples=0)),
    "an unknown profile": Expected(
        UnknownProfileError, r"'cortex-a35'.*did you mean.*'cortex-a53'", lambda c: c.given(profile="cortex-a35")
    ),
    "a profile that is no TOML": Expected(
        ProfileError, r"board\.toml:2: ", lambda c: c.profile('name = "cortex-a53"', "name = cortex a53")
    ),
    "a profile with a word too many": Expected(
        ProfileError, r"board\.toml:2: .*colour", lambda c: c.profile('name = "', 'colour = "red"\nname = "')
    ),
    "a profile with a number too small": Expected(
        ProfileError, r"board\.toml:\d+: .*threads", lambda c: c.profile("threads = 1", "threads = -1")
    ),
    "no such profile file": Expected(ProfileError, r"none\.toml", lambda c: c.given(profile=c.folder / "none.toml")),
    "a folder that is not there": Expected(
        OutputError, r"cannot write in .*none", lambda c: c.given(output=c.folder / "none" / "out.onnx")
    ),
    "a folder as output": Expected(OutputError, r"is a folder", lambda c: c.given(output=c.folder)),
    "the input as output": Expected(OutputError, r"good\.onnx is the input model", lambda c: c.given(output=c.model)),
    "a floor that is no number": Expected(
        UsageError, r"min_sqnr_db is not a number", lambda c: c.given(budget=Budget(min_sqnr_db=math.nan))
    ),
    "a drop of more than everything": Expected(
        UsageError, r"max_drop is 1\.5", lambda c: c.given(budget=Budget(max_drop=1.5), metric=lambda file: 1.0)
    ),
    "a metric that gives no number": Expected(
        UsageError,
        r"the metric returned 'good'",
        lambda c: c.given(budget=Budget(max_drop=0.1), metric=lambda file: "good"),
    ),
    "the name of a pass for a pass": Expected(
        UsageError, r"'quantize', which is no pass.*registry\.parse", lambda c: c.given(passes=["quantize"])
    ),
    "a pass class for a pass": Expected(UsageError, r"which is no pass", lambda c: c.given(passes=[Quantize])),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_call_is_one_clear_error(name: str, tmp_path: Path) -> None:
    expected, case = CASES[name], Case(tmp_path)
    expected.change(case)
    options = {"profile": "host-x86-vnni", "timing": False} | case.options
    before = contents(tmp_path)
    with pytest.raises(OnnxCompressError) as caught:
        onnxcompress.optimize(case.model, **options)
    assert type(caught.value) is expected.error
    assert re.search(expected.message, str(caught.value), re.DOTALL)
    assert contents(tmp_path) == before
    assert not [p for p in tmp_path.iterdir() if p.is_dir()], "no working folder is left either"


def test_the_same_call_without_anything_wrong_works(tmp_path: Path) -> None:
    """So each case fails for its own reason."""
    case = Case(tmp_path)
    before = case.model.read_bytes()
    case.samples()
    onnxcompress.optimize(case.model, profile="host-x86-vnni", timing=False, **case.options)
    assert case.model.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.onnx", "out.onnx"]


def test_a_profile_may_be_a_path(tmp_path: Path) -> None:
    result = onnxcompress.optimize(network(), profile=PROFILES / "cortex-a53.toml", calibration=samples(), timing=False)
    assert result.report.profile == "cortex-a53"
    assert onnxcompress.inspect(network(), profile=PROFILES / "cortex-a53.toml").profile == "cortex-a53"


@pytest.mark.parametrize("kept", [*range(0, 100, 7), 99])
def test_a_file_cut_off_anywhere(kept: int, tmp_path: Path) -> None:
    """At any percentage: an error about the file, or about running what is left of it; never a crash."""
    whole = models.serialize(network())
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: len(whole) * kept // 100])
    with pytest.raises((ModelReadError, ModelRunError), match=r"cut\.onnx"):
        onnxcompress.optimize(path, profile="host-x86-vnni", calibration=samples(), output=tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.onnx"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody may write in, not even root")
def test_an_unwritable_folder() -> None:
    with pytest.raises(OutputError, match="cannot write in /proc"):
        onnxcompress.optimize(
            network(), profile="host-x86-vnni", calibration=samples(), timing=False, output="/proc/out.onnx"
        )


def test_a_result_that_does_not_hold_in_the_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk bites: what was written is not what was in memory, and never gets the name asked for."""
    model = text(
        "g (float[N, 128] x) => (float[N, 64] y) { m = MatMul (x, w)  r = Relu (m)  y = MatMul (r, v) }",
        {"w": normal(0, 128, 256) / 10, "v": normal(1, 256, 64) / 16},
    )
    write = models._write

    def bitten(written: ir.Model, path: Path, *, external: bool) -> None:
        copy = models.clone(written)
        for value in copy.graph.initializers.values():
            if value.dtype == ir.DataType.INT8 and value.const_value is not None:
                value.const_value = ir.tensor(np.roll(value.const_value.numpy(), 1), name=value.name)
        write(copy, path, external=external)

    monkeypatch.setattr(models, "_write", bitten)
    with pytest.raises(ModelRunError, match="the written file is at"):
        onnxcompress.optimize(
            model,
            profile="host-x86-vnni",
            calibration=[{"x": normal(i, 32, 128)} for i in range(8)],
            timing=False,
            output=tmp_path / "out.onnx",
        )
    assert not list(tmp_path.iterdir())
