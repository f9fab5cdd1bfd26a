"""Streaming statistics against numpy on all the data at once."""

from __future__ import annotations

import gc
import math
import tracemalloc
import weakref
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.calibrate import ChannelAccumulator, HistogramAccumulator, _stride, calibrate, value_shapes
from onnxcompress.data import open_data
from onnxcompress.errors import DataError
from onnxcompress.model import canonicalize
from onnxcompress.session import Runner
from onnxcompress.statistics import Evidence, Histogram, Need, Statistic

Floats = npt.NDArray[np.float32]

CONV = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] x, float[4, 3, 3, 3] w, float[4, 10] v) => (float[N, 10] y)
{
   c = Conv <pads = [1, 1, 1, 1]> (x, w)
   r = Relu (c)
   g = GlobalAveragePool (r)
   f = Flatten (g)
   y = MatMul (f, v)
   s = Shape (c)
}
"""


def from_text(text: str, *weights: str) -> ir.Model:
    """A model; the inputs named become standard normal weights."""
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(0)
    for value in [v for v in model.graph.inputs if v.name in weights]:
        assert value.shape is not None
        value.const_value = ir.tensor(rng.standard_normal(value.shape.numpy()).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    canonicalize(model)
    return model


def images(count: int, seed: int = 1) -> list[dict[str, Floats]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1 + i % 3, 3, 8, 8)).astype(np.float32) * (1 + i)} for i in range(count)]


@pytest.fixture
def model() -> ir.Model:
    return from_text(CONV, "w", "v")


# --- histograms ----------------------------------------------------------------------------------


def histogram_of(*arrays: Floats, **options: int) -> Histogram:
    accumulator = HistogramAccumulator(**{"max_elements": 1 << 30, **options})
    for array in arrays:
        accumulator.add(array)
    result = accumulator.result()
    assert result is not None
    return result


def assert_same(a: Histogram, b: Histogram) -> None:
    assert (a.low, a.high, a.edges_low, a.bin_width) == (b.low, b.high, b.edges_low, b.bin_width)
    np.testing.assert_array_equal(a.counts, b.counts)


finite = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=2, max_side=40),
    elements=st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6),
)


@given(st.lists(finite, min_size=1, max_size=6), st.randoms(use_true_random=False), st.sampled_from([16, 64, 4096]))
@settings(deadline=None, max_examples=60)
def test_histogram_does_not_depend_on_order_or_on_how_the_data_is_cut(
    arrays: list[Floats], random: object, bins: int
) -> None:
    in_order = histogram_of(*arrays, bins=bins)
    shuffled = list(arrays)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert_same(in_order, histogram_of(*shuffled, bins=bins))
    assert_same(in_order, histogram_of(np.concatenate([a.ravel() for a in arrays]), bins=bins))


@given(finite)
@settings(deadline=None, max_examples=60)
def test_histogram_counts_what_numpy_counts(array: Floats) -> None:
    histogram = histogram_of(array, bins=64)
    index = np.floor(array.astype(np.float64).ravel() / histogram.bin_width) - histogram.edges_low / histogram.bin_width
    np.testing.assert_array_equal(histogram.counts, np.bincount(index.astype(int), minlength=64))
    assert (histogram.low, histogram.high) == (array.min(), array.max())
    assert math.frexp(histogram.bin_width)[0] == 0.5, "a power of two"


def test_at_least_half_of_the_bins_span_the_range() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-20, 1e-3, 1, 300, 1e20):
        histogram = histogram_of((rng.uniform(-1, 2, 5000) * scale).astype(np.float32), bins=256)
        span = (histogram.high - histogram.low) / histogram.bin_width
        assert 256 / 2 - 2 <= span <= 256


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e30, -1e-30])
def test_histogram_of_a_constant(value: float) -> None:
    histogram = histogram_of(np.full(7, value, np.float32))
    assert histogram.counts.sum() == 7
    assert np.count_nonzero(histogram.counts) == 1
    assert histogram.low == histogram.high == np.float32(value)


def test_extremes_are_exact_where_counts_are_sampled() -> None:
    array = np.zeros(100_003, np.float32)
    array[77_777], array[12_345] = 9, -4
    histogram = histogram_of(array, max_elements=1000)
    assert (histogram.low, histogram.high) == (-4, 9)
    assert 900 <= histogram.counts.sum() <= 1000


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_the_sampling_stride_favours_no_axis(size: int, most: int) -> None:
    stride = _stride(size, most)
    assert math.gcd(stride, size) == 1 or stride == size
    assert -(-size // stride) <= most


def test_every_channel_is_sampled() -> None:
    array = np.broadcast_to(np.arange(384, dtype=np.float32), (4096, 384))
    histogram = histogram_of(np.ascontiguousarray(array), max_elements=4000, bins=1024)
    seen = np.add.reduceat(histogram.counts, np.arange(0, 1024, 2))[:384]
    assert seen.min() >= 1, "a stride of 384 would have seen one channel only"


def test_the_size_of_a_histogram_does_not_grow() -> None:
    rng = np.random.default_rng(0)
    accumulator = HistogramAccumulator()
    sizes = []
    tracemalloc.start()
    for i in range(60):
        accumulator.add(rng.standard_normal(5000).astype(np.float32) * (1 + i))
        if i in (5, 59):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 4096


# --- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "shapes"),
    [
        (1, [(2, 5, 7, 9), (1, 5, 3, 4), (4, 5, 1, 1)]),
        (-1, [(3, 11, 6), (1, 2, 6)]),
        (0, [(4, 3), (4, 70_000)]),
        (2, [(3, 2, 8, 30)]),
        (0, [(6,), (6,)]),
    ],
)
def test_moments_are_those_of_numpy(axis: int, shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    arrays = [(rng.standard_normal(s) + 0.3).astype(np.float32) for s in shapes]
    accumulator = ChannelAccumulator(axis)
    for array in arrays:
        accumulator.add(array)
    channels = arrays[0].shape[axis]
    together = np.concatenate([np.moveaxis(a.astype(np.float64), axis, 0).reshape(channels, -1) for a in arrays], 1)
    moments = accumulator.result()
    assert moments is not None
    # float32 sums of at most 65536 terms of size about 1, pairwise or in vectors: well under 1e-5
    np.testing.assert_allclose(moments.mean, together.mean(1), atol=1e-5)
    np.testing.assert_allclose(moments.mean_square, (together**2).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(moments.absmax, np.abs(together).max(1))


def test_moments_of_varying_channels_or_of_no_such_axis_are_not_given() -> None:
    varying, missing = ChannelAccumulator(1), ChannelAccumulator(3)
    for shape in ((1, 4), (1, 5)):
        varying.add(np.ones(shape, np.float32))
        missing.add(np.ones(shape, np.float32))
    assert varying.result() is None
    assert missing.result() is None


# --- a whole sweep -------------------------------------------------------------------------------


def test_evidence_is_that_of_the_values_themselves(model: ir.Model) -> None:
    feeds = images(6)
    needs = [
        Need("x"),
        Need("c"),
        Need("r"),
        Need("y"),
        Need("r", Statistic.CHANNELS, 1),
        Need("y", Statistic.CHANNELS, -1),
    ]
    evidence = calibrate(model, needs, open_data(feeds, model))
    runner = Runner(model, outputs=("c", "r", "y"))
    found = [{**runner.run(feed), **feed} for feed in feeds]
    for name in ("x", "c", "r", "y"):
        values = np.concatenate([f[name].ravel() for f in found])
        histogram = evidence.histogram(name)
        assert (histogram.low, histogram.high) == (values.min(), values.max())
        assert histogram.counts.sum() == values.size
    for name, axis in (("r", 1), ("y", -1)):
        values = np.concatenate([np.moveaxis(f[name], axis, 0).reshape(f[name].shape[axis], -1) for f in found], 1)
        moments = evidence.channels(name, axis)
        np.testing.assert_allclose(moments.mean, values.mean(1, dtype=np.float64), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(moments.absmax, np.abs(values).max(1))
    assert evidence.samples == 6
    assert not evidence.synthetic


def test_the_order_of_samples_changes_no_histogram(model: ir.Model) -> None:
    feeds, needs = images(5), [Need("c"), Need("y")]
    one, other = (calibrate(model, needs, open_data(f, model), threads=1) for f in (feeds, feeds[::-1]))
    for need in needs:
        assert_same(one.histogram(need.value), other.histogram(need.value))


def test_what_cannot_be_observed_is_left_out(model: ir.Model) -> None:
    evidence = calibrate(model, [Need("s"), Need("nothing"), Need("w")], open_data(images(1), model))
    assert not any(evidence.has(Need(name)) for name in ("s", "nothing", "w"))


def test_values_inside_a_branch_are_not_observed() -> None:
    model = from_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[4] x, bool flag) => (float[4] y) {
           y = If (flag) <
              then_branch = a () => (float[4] t) { t = Relu (x) },
              else_branch = b () => (float[4] e) { e = Neg (x) }
           >
        }""")
    feeds = [{"x": np.ones(4, np.float32), "flag": np.array(True)}]
    evidence = calibrate(model, [Need("t"), Need("y")], open_data(feeds, model))
    assert not evidence.has(Need("t"))
    assert evidence.has(Need("y"))


def test_infinite_values_are_legal_and_not_observed() -> None:
    model = from_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[4] x) => (float[4] y) { l = Log (x)  y = Softmax (l) }""")
    feeds = [{"x": np.array([1, 0, 2, 3], np.float32)}]
    evidence = calibrate(model, [Need("l"), Need("l", Statistic.CHANNELS, 0), Need("y")], open_data(feeds, model))
    assert not evidence.has(Need("l"))
    assert not evidence.has(Need("l", Statistic.CHANNELS, 0))
    assert evidence.has(Need("y"))


@pytest.mark.parametrize("statistic", list(Statistic))
def test_nan_names_the_node_and_the_sample(statistic: Statistic) -> None:
    model = from_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2] x) => (float[2] y) { l = Log (x)  y = Neg (l) }""")
    feeds = [{"x": np.array([1, 2], np.float32)}, {"x": np.array([1, -2], np.float32)}]
    with pytest.raises(DataError, match=r"sample 1: node '\w+' \(Log\) makes NaN in 'l'"):
        calibrate(model, [Need("l", statistic, 0)], open_data(feeds, model))


def test_calibration_leaves_the_model_alone(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    calibrate(model, [Need("c"), Need("r", Statistic.CHANNELS)], open_data(images(2), model))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_progress_counts_the_samples(model: ir.Model) -> None:
    seen: list[tuple[int, int]] = []
    calibrate(model, [Need("y")], open_data(images(3), model), progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_without_needs_nothing_is_run_but_the_shapes(model: ir.Model) -> None:
    evidence = calibrate(model, [], open_data(images(3), model), progress=lambda done, of: pytest.fail("a sweep"))
    assert evidence.shapes["c"] == (1, 4, 8, 8)
    assert not calibrate(model, [], open_data(images(3), model), shapes=False).shapes


def test_memory_does_not_depend_on_the_number_of_samples(model: ir.Model) -> None:
    """Peak of all Python and numpy allocations, the samples themselves made one at a time.

    A sample is over half a megabyte, so that a leak of one in ninety, or of a histogram each, is seen, and the
    tens of kilobytes by which it matters how two threads meet are not.
    """
    needs = [Need("c"), Need("r"), Need("y"), Need("r", Statistic.CHANNELS)]

    def peak(count: int) -> int:
        class Stream:
            def __len__(self) -> int:
                return count

            def __iter__(self) -> Iterator[dict[str, Floats]]:
                rng = np.random.default_rng(0)
                for _ in range(count):
                    yield {"x": rng.standard_normal((800, 3, 8, 8)).astype(np.float32)}

            synthetic = False

            def first(self) -> dict[str, Floats]:
                return next(iter(self))

        gc.collect()
        tracemalloc.start()
        calibrate(model, needs, Stream(), max_elements=2048)  # type: ignore[arg-type]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(96) <= 1.1 * peak(6)


def test_at_most_two_samples_are_in_memory(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs and one that is counted; what onnxruntime allocates is not seen by tracemalloc."""
    seen: list[weakref.ref[Floats]] = []
    alive: list[int] = []
    add = HistogramAccumulator.add

    def watched(self: HistogramAccumulator, array: Floats) -> None:
        seen.append(weakref.ref(array))
        alive.append(sum(reference() is not None for reference in seen))
        add(self, array)

    monkeypatch.setattr(HistogramAccumulator, "add", watched)
    calibrate(model, [Need("c"), Need("r"), Need("y")], open_data(images(20), model), shapes=False)
    assert len(seen) == 60
    assert max(alive) <= 2 * 3


@pytest.mark.parametrize("ahead", [0, 1 << 29])
def test_evidence_does_not_depend_on_threads(model: ir.Model, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = images(30)
    needs = [Need("c"), Need("r"), Need("y"), Need("r", Statistic.CHANNELS), Need("x")]

    def swept() -> Evidence:
        return calibrate(model, needs, open_data(feeds, model), shapes=False, threads=1)

    expected = swept()
    monkeypatch.setattr("onnxcompress.calibrate._AHEAD", ahead)
    for counters in (1, 2, 5):
        monkeypatch.setattr("onnxcompress.calibrate._COUNTERS", counters)
        found = swept()
        for name in ("c", "r", "y", "x"):
            assert_same(found.histogram(name), expected.histogram(name))
        for moment in ("mean", "mean_square", "absmax"):
            a, b = (getattr(e.channels("r"), moment) for e in (found, expected))
            np.testing.assert_array_equal(a, b)


def test_the_first_bad_sample_is_named_whatever_comes_after() -> None:
    model = from_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2] x) => (float[2] y) { l = Log (x)  y = Neg (l) }""")
    bad = {"x": np.array([1, -2], np.float32)}
    good = {"x": np.array([1, 2], np.float32)}
    unreadable = {"x": np.array([1, 2, 3], np.float32)}
    for feeds in ([good, bad], [good, bad, bad], [good, bad, unreadable]):
        with pytest.raises(DataError, match="sample 1: node"):
            calibrate(model, [Need("l"), Need("y")], open_data(feeds, model))


# --- shapes --------------------------------------------------------------------------------------


def test_shapes_of_every_tensor(model: ir.Model) -> None:
    shapes = value_shapes(model, {"x": np.zeros((2, 3, 8, 8), np.float32)})
    assert shapes == {
        "x": (2, 3, 8, 8),
        "w": (4, 3, 3, 3),
        "v": (4, 10),
        "c": (2, 4, 8, 8),
        "r": (2, 4, 8, 8),
        "g": (2, 4, 1, 1),
        "f": (2, 4),
        "y": (2, 10),
        "s": (4,),
    }


def test_shapes_leave_sequences_out_whether_declared_or_not() -> None:
    model = from_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[6, 2] x) => (float[2, 2] y)
        <int64 size = {2}, int64 first = {0}>
        { parts = SplitToSequence (x, size)  same = Identity (parts)  y = SequenceAt (same, first) }""")
    shapes = value_shapes(model, {"x": np.zeros((6, 2), np.float32)})
    assert shapes["y"] == (2, 2)
    assert "parts" not in shapes
    assert "same" not in shapes
