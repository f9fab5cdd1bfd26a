"""Comparing and timing models: the numbers, the values looked at, and what fails clearly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxcompress.errors import ModelReadError, ModelRunError, UsageError
from onnxcompress.evaluate import (
    Reference,
    Runner,
    compare,
    is_lossless,
    lossless_floor_db,
    measure,
    rounding_noise,
)
from onnxcompress.model import canonicalize, save
from onnxcompress.report import Comparison, OutputDifference
from onnxcompress.rewrite import Rewriter

Array = npt.NDArray[Any]


def from_text(text: str, *weights: str) -> ir.Model:
    """A model; the inputs named become standard normal weights."""
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    for value in [v for v in model.graph.inputs if v.name in weights]:
        assert value.shape is not None
        value.const_value = ir.tensor(rng.standard_normal(value.shape.numpy()).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    canonicalize(model)
    return model


def scaled(by: float, add: float = 0.0) -> ir.Model:
    """Y = by * x + add, with m = by * x inside."""
    return from_text(
        "net (float[N] x) => (float[N] y)"
        f"<float by = {{{by}}}, float add = {{{add}}}> {{ m = Mul (x, by)  y = Add (m, add) }}"
    )


def feeds(count: int = 3, size: int = 100_000) -> list[dict[str, Array]]:
    """Large enough to take several chunks."""
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(size + i).astype(np.float32)} for i in range(count)]


def only(comparison: Comparison) -> OutputDifference:
    (output,) = comparison.outputs
    return output


# --- comparing -----------------------------------------------------------------------------------


def test_sqnr_is_that_of_the_definition() -> None:
    output = only(compare(scaled(2.0), scaled(2.0, 0.01), feeds()))
    signal = np.concatenate([f["x"] for f in feeds()]) * np.float32(2)
    error = (signal + np.float32(0.01)).astype(np.float64) - signal
    wanted = 10 * math.log10(np.sum(signal.astype(np.float64) ** 2) / np.sum(error**2))
    assert output.sqnr_db == pytest.approx(wanted, rel=1e-9)
    assert output.max_abs == pytest.approx(np.abs(error).max(), rel=1e-9)
    assert output.name == "y"


def test_equal_models_are_infinitely_close() -> None:
    comparison = compare(scaled(2.0), scaled(2.0), feeds())
    assert only(comparison) == OutputDifference("y", math.inf, 0.0, 1.0)
    assert comparison.samples == 3
    assert comparison.min_sqnr_db == math.inf


def test_zeros_are_not_fives() -> None:
    """The check can fail: nothing is left of the signal, and all of it is error."""
    output = only(compare(scaled(5.0), scaled(0.0), feeds()))
    assert output.sqnr_db == 0
    assert output.agreement == 0
    assert only(compare(scaled(0.0), scaled(5.0), feeds())).sqnr_db == -math.inf


def test_infinities_and_nans_in_the_same_place_are_equal() -> None:
    model = from_text("net (float[N] x) => (float[N] y) { y = Log (x) }")
    other = from_text("net (float[N] x) => (float[N] y) <float z = {3.0}> { l = Log (x)  y = Min (l, z) }")
    data = [{"x": np.array([1, 2, 0, -1], np.float32)}]
    assert only(compare(model, model, data)).sqnr_db == math.inf
    assert only(compare(model, other, data)).sqnr_db == math.inf
    off = from_text("net (float[N] x) => (float[N] y) { a = Abs (x)  y = Log (a) }")
    assert only(compare(model, off, data)).sqnr_db == -math.inf


def test_outputs_that_are_not_floats_are_counted() -> None:
    text = (
        "net (float[N] x) => (int64 i, bool[N] b, int32[N] n) <float t = {%s}> { m = Mul (x, t)"
        "  i = ArgMax <keepdims = 0, axis = 0> (m)  b = Greater (m, t)  n = Cast <to = 6> (m) }"
    )
    data = [{"x": np.array([1, 2, 3, -4], np.float32)}]
    same = compare(from_text(text % "2.0"), from_text(text % "2.0"), data)
    assert [(o.sqnr_db, o.max_abs, o.agreement) for o in same.outputs] == [(None, 0, 1)] * 3
    assert same.min_sqnr_db == math.inf
    other = {o.name: o for o in compare(from_text(text % "1.0"), from_text(text % "-1.0"), data).outputs}
    assert (other["i"].max_abs, other["i"].agreement) == (1, 0)
    assert other["n"].max_abs == 8
    assert other["b"].agreement == 0.25


def test_text_outputs() -> None:
    text = "net (string[N] x) => (string[N] y) { y = Identity (x) }"
    data = [{"x": np.array(["a", "b"], object)}]
    assert only(compare(from_text(text), from_text(text), data)) == OutputDifference("y", None, 0, 1)


def test_other_shapes_agree_on_nothing() -> None:
    keep = from_text("net (float[N] x) => (int64[M, K] y) { y = NonZero (x) }")
    half = from_text("net (float[N] x) => (int64[M, K] y) { r = Relu (x)  y = NonZero (r) }")
    output = only(compare(keep, half, [{"x": np.array([1, -1], np.float32)}, {"x": np.ones(4, np.float32)}]))
    assert output.sqnr_db is None
    assert output.agreement == 4 / 6
    cut = from_text("net (float[N] x) => (float[K] y) <int64[1] a = {0}, int64[1] b = {2}> { y = Slice (x, a, b) }")
    full = from_text("net (float[N] x) => (float[K] y) { y = Identity (x) }")
    output = only(compare(full, cut, [{"x": np.ones(4, np.float32)}]))
    assert (output.sqnr_db, output.agreement) == (0, 0)


def test_values_inside_are_compared_by_name_and_outputs_where_one_is_missing() -> None:
    before, after = scaled(2.0), scaled(2.0, 0.5)
    assert only(compare(before, after, feeds(), ["m"])).sqnr_db == math.inf
    rewriter = Rewriter(after)
    rewriter.value("m").name = "gone"
    assert only(compare(before, after, feeds(), ["m"])).name == "y"
    assert only(Reference(before, feeds(), ["m"]).compare(after)).name == "y"


def test_no_feeds_and_no_common_output() -> None:
    with pytest.raises(UsageError, match="no samples"):
        compare(scaled(1.0), scaled(1.0), [])
    with pytest.raises(UsageError, match="no samples"):
        Reference(scaled(1.0), [])
    other = from_text("net (float[N] x) => (float[N] z) { z = Neg (x) }")
    with pytest.raises(UsageError, match="no output in common"):
        compare(scaled(1.0), other, feeds())


# --- kept references -----------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 1 << 26])
def test_a_reference_compares_like_compare(memory: int) -> None:
    before = scaled(2.0)
    reference = Reference(before, iter(feeds()), ["m", "y"], memory=memory)
    assert len(reference) == 3
    for after in (scaled(2.0), scaled(2.1), scaled(2.0, 1.0)):
        for _ in range(2):
            assert reference.compare(after) == compare(before, after, feeds(), ["m", "y"])
            assert reference.compare(Runner(after)) == reference.compare(after)
    assert reference.compare(scaled(2.1), limit=1) == compare(before, scaled(2.1), feeds()[:1], ["m", "y"])
    if not memory:
        assert reference._outputs.memory_bytes == 0


def test_a_file_is_run_as_it_is(tmp_path: Path) -> None:
    save(scaled(2.0, 0.1), tmp_path / "a.onnx")
    reference = Reference(scaled(2.0), feeds(), ["m", "y"])
    assert reference.compare(tmp_path / "a.onnx") == reference.compare(scaled(2.0, 0.1))
    assert only(compare(tmp_path / "a.onnx", tmp_path / "a.onnx", feeds())).sqnr_db == math.inf


# --- lossless ------------------------------------------------------------------------------------


def test_another_order_of_additions_is_lossless() -> None:
    text = "net (float[N, 2048] x, float[2048, 64] w, float[64, 64] v) => (float[N, 64] y) { %s }"
    left = from_text(text % "a = MatMul (x, w)  y = MatMul (a, v)", "w", "v")
    right = from_text(text % "b = MatMul (w, v)  y = MatMul (x, b)", "w", "v")
    data = [{"x": np.random.default_rng(0).standard_normal((8, 2048)).astype(np.float32)}]
    assert is_lossless(compare(left, right, data), 2)


def test_a_change_of_a_hundred_thousandth_is_not_lossless() -> None:
    assert not is_lossless(compare(scaled(2.0), scaled(2.0, 1e-4), feeds()), 2)
    assert not is_lossless(compare(scaled(2.0), scaled(2.0002), feeds()), 100)


def test_bounds_of_lossless() -> None:
    assert lossless_floor_db(1) == pytest.approx(103.6, abs=0.1)
    assert lossless_floor_db(100) == pytest.approx(83.6, abs=0.1)

    def comparison(sqnr: float | None, agreement: float = 0.5) -> Comparison:
        return Comparison((OutputDifference("y", sqnr, 1.0, agreement),), 1)

    assert is_lossless(comparison(84), 100)
    assert not is_lossless(comparison(83), 100)
    assert not is_lossless(comparison(math.nan), 100)
    assert is_lossless(comparison(60), 100, noise=comparison(65))
    assert not is_lossless(comparison(50), 100, noise=comparison(65))
    assert not is_lossless(comparison(83), 100, noise=comparison(130)), "a quiet model keeps the derived floor"
    assert is_lossless(comparison(None, 1.0), 100)
    assert not is_lossless(comparison(None, 0.9), 100)


def test_a_model_against_itself_is_lossless() -> None:
    noise = rounding_noise(scaled(2.0), feeds(1))
    assert only(noise).sqnr_db == math.inf


# --- running -------------------------------------------------------------------------------------


def test_a_runner_returns_what_it_was_asked_for() -> None:
    runner = Runner(scaled(3.0), outputs=("m", "y"), threads=1)
    found = runner.run({"x": np.ones(2, np.float32)})
    assert list(found) == ["m", "y"]
    assert runner.types["m"] == "tensor(float)"
    assert list(runner.run({"x": np.ones(2, np.float32)}, ["y"])) == ["y"]
    assert runner.run({"x": np.ones(2, np.float32)}, []) == {}
    assert runner.available() == {"m", "y"}
    assert runner.showing(["m"]).outputs == ("m",)
    with pytest.raises(ModelRunError, match="'nothing': there is no such value"):
        Runner(scaled(3.0), outputs=("nothing",))


def test_a_runner_leaves_the_model_alone() -> None:
    model = scaled(3.0)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    Runner(model, outputs=("m",))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_models_that_do_not_load_or_run(tmp_path: Path) -> None:
    with pytest.raises(ModelRunError, match=r"cannot load it: .*NoSuchOp"):
        Runner(from_text("net (float[N] x) => (float[N] y) { y = NoSuchOp (x) }"))
    with pytest.raises(ModelReadError, match="no such file"):
        Runner(tmp_path / "missing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelRunError, match=r"bad\.onnx: onnxruntime cannot load it") as caught:
        Runner(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelRunError, match="cannot run it"):
        Runner(scaled(1.0)).run({"wrong": np.ones(2, np.float32)})


def test_large_models_go_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.session._IN_MEMORY", 0)
    assert only(compare(scaled(2.0), scaled(2.0), feeds(), ["m"])).sqnr_db == math.inf


# --- timing --------------------------------------------------------------------------------------


def test_measuring_is_interleaved_and_bounded() -> None:
    """Bounds on counts only: no statement about speed."""
    order: list[str] = []

    class Spy(Runner):
        def run(self, feed: Any, names: Any = None) -> dict[str, Any]:
            order.append(self.outputs[0])
            return super().run(feed, names)

    a, b = Spy(scaled(1.0), outputs=("m",), threads=1), Spy(scaled(1.0), outputs=("y",), threads=1)
    latency = measure(a, b, feeds(1, 10)[0], seconds=0, min_rounds=4)
    assert latency.rounds >= 1
    timed = order[4:]
    assert len(timed) == 2 * latency.rounds
    assert all(set(timed[i : i + 2]) == {"m", "y"} for i in range(0, len(timed), 2))
    assert timed[:2] != timed[2:4] or latency.rounds == 1
    assert latency.before_ms > 0
    assert latency.after_ms > 0
    assert latency.threads == 1
    assert measure(scaled(1.0), scaled(1.0), feeds(1, 10)[0], seconds=60, max_rounds=3).rounds == 3
