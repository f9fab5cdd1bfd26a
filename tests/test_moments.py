"""Second moments against numpy on all rows at once; windows against loops over every tap."""

from __future__ import annotations

import itertools
import math
import pickle
import tracemalloc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController

from onnxcompress import moments
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.errors import DataError, PassError
from onnxcompress.model import canonicalize
from onnxcompress.moments import GramAccumulator, HalvedGram, _spread
from onnxcompress.session import Runner
from onnxcompress.statistics import Evidence, Need, Patches, SecondMoments, Statistic

Floats = npt.NDArray[np.float32]

SAME = Patches((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))


def gram(axis: int = 1, axes: tuple[int, ...] = (), patches: Patches | None = None, value: str = "v") -> Need:
    return Need(value, Statistic.GRAM, axis, axes, patches)


def moments_of(need: Need, *arrays: Floats, samples: int = 1) -> SecondMoments:
    accumulator = GramAccumulator(need, samples)
    for array in arrays:
        accumulator.add(array)
    assert not accumulator.nan
    result = accumulator.result()
    assert result is not None
    return result


def assert_moments(found: SecondMoments, rows: npt.NDArray[np.floating]) -> None:
    """Equal to those of float64 rows.

    The bound: sums in float32 of up to 2048 products are off by well under 1e-5 of the sum of their sizes, which is at
    most the root of the product of the two features' second moments.
    """
    wide = rows.astype(np.float64)
    expected = np.einsum("ri,rj->ij", wide, wide) / len(wide)
    scale = np.sqrt(np.diag(expected))
    assert found.count == len(wide)
    assert found.matrix.dtype == found.mean.dtype == np.float64
    assert np.all(np.abs(found.matrix - expected) <= 1e-5 * np.outer(scale, scale))
    assert np.all(np.abs(found.mean - wide.mean(0)) <= 1e-6 * scale)
    np.testing.assert_array_equal(found.matrix, found.matrix.T)


def normal(*shape: int, seed: int = 0, mean: float = 0.3) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) + mean).astype(np.float32)


# --- what is asked for -----------------------------------------------------------------------------


def test_needs_sort_whatever_their_fields() -> None:
    other = Patches((3,), (1,), (1,), (0,), (2,))
    needs = [
        Need("b"),
        gram(patches=SAME, value="b"),
        gram(value="b"),
        gram(patches=other, value="b"),
        gram(axes=(1, 3), value="b"),
        Need("b", Statistic.CHANNELS, -1),
        Need("a", Statistic.CHANNELS),
    ]
    for order in itertools.islice(itertools.permutations(needs), 0, None, 97):
        assert sorted({*order, *order}) == sorted(needs)
    assert sorted(needs)[0].value == "a"
    assert Need("a") < Need("b") <= Need("b")
    assert pickle.loads(pickle.dumps(needs)) == needs
    assert Need("a", Statistic.CHANNELS, -1) == Need(value="a", statistic=Statistic.CHANNELS, axis=-1)


@pytest.mark.parametrize(
    "fields",
    [
        ((3, 3), (1,), (1, 1), (0, 0), (0, 0)),
        ((), (), (), (), ()),
        ((1,) * 4, (1,) * 4, (1,) * 4, (0,) * 4, (0,) * 4),
        ((0,), (1,), (1,), (0,), (0,)),
        ((3,), (0,), (1,), (0,), (0,)),
        ((3,), (1,), (1,), (-1,), (0,)),
    ],
)
def test_windows_that_do_not_exist_are_refused(fields: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(PassError, match="describes no windows"):
        Patches(*fields)


def test_axes_and_patches_contradict_each_other() -> None:
    with pytest.raises(PassError, match="both axes"):
        gram(axes=(1,), patches=SAME)


def test_evidence_gives_what_was_asked_for_and_nothing_else() -> None:
    need, found = gram(), SecondMoments(np.eye(2) * 2, np.ones(2), 4)
    one, other = Evidence(grams={need: found}), Evidence(grams={gram(2): found})
    assert one.has(need)
    assert one.second_moments(need) is found
    np.testing.assert_array_equal(found.covariance, [[1, -1], [-1, 1]])
    for missing in (gram(0), gram(axes=(1,)), gram(patches=SAME), gram(value="w")):
        assert not one.has(missing)
        with pytest.raises(PassError, match="needs"):
            one.second_moments(missing)
    both = one.joined(other)
    assert both.has(need)
    assert both.has(gram(2))
    assert not both.has(Need("v", Statistic.CHANNELS))


# --- channels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "shapes"),
    [
        (1, [(2, 5, 7, 9), (1, 5, 3, 4), (4, 5, 1, 1)]),
        (-1, [(3, 11, 6), (1, 2, 6)]),
        (0, [(4, 3), (4, 2100)]),
        (2, [(3, 2, 8, 30)]),
        (0, [(6,), (6,)]),
        (1, [(1, 300, 40)]),
    ],
)
def test_moments_are_those_of_numpy(axis: int, shapes: list[tuple[int, ...]]) -> None:
    arrays = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    channels = shapes[0][axis]
    assert_moments(moments_of(gram(axis), *arrays), np.concatenate([_by_hand(a, (axis,), channels) for a in arrays]))


def _by_hand(array: Floats, axes: Sequence[int], features: int) -> Floats:
    return np.moveaxis(array, axes, range(-len(axes), 0)).reshape(-1, features)


@pytest.mark.parametrize("axes", [(1, 3), (3, 1), (-1, 0), (2, 1, 3), (0, 1, 2, 3)])
def test_joined_axes_run_in_the_order_given(axes: tuple[int, ...]) -> None:
    arrays = [normal(7, 2, 3, 5, seed=i) for i in range(3)]
    features = math.prod(arrays[0].shape[axis] for axis in axes)
    assert_moments(moments_of(gram(axes=axes), *arrays), np.concatenate([_by_hand(a, axes, features) for a in arrays]))


def test_features_of_an_lstm_are_directions_times_hidden() -> None:
    array = np.zeros((4, 2, 1, 3), np.float32)
    array[:, 1, :, 2] = 7
    found = moments_of(gram(axes=(1, 3)), array)
    assert np.flatnonzero(found.mean).tolist() == [1 * 3 + 2]
    assert found.matrix[5, 5] == 49


def test_a_view_that_is_not_contiguous_counts_as_what_it_shows() -> None:
    array = normal(9, 6, 8)[::2, :, ::-1]
    assert_moments(moments_of(gram(1), array), _by_hand(array, (1,), 6))


def test_the_block_ends_wherever_samples_end() -> None:
    """Blocks of 2048 rows, filled by samples of 1, of 700, of just what is missing, and of more than a block."""
    sizes = (1, 700, 1347, 5000, 2048, 3)
    arrays = [normal(size, 4, seed=i) for i, size in enumerate(sizes)]
    assert_moments(moments_of(gram(1), *arrays), np.concatenate(arrays))


@pytest.mark.parametrize("scale", [1e-25, 1e-13, 1, 1e14, 1e18, 1e38])
def test_sizes_that_float32_products_cannot_hold(scale: float) -> None:
    rows = np.clip(normal(500, 3), -3, 3) * np.float32(scale)
    assert_moments(moments_of(gram(1), rows), rows)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    rows = normal(6000, 8, mean=0) + np.array([0, 1, 30, 300, -300, 3000, 0, 0], np.float32)
    rows[:, 6], rows[:, 7] = 123.456, 0
    covariance = moments_of(gram(1), rows).covariance
    expected = np.cov(rows.astype(np.float64), rowvar=False, bias=True)
    # plain float32 sums are off by 1e-7 x 3000^2, that is by about the variance itself; rows are rounded by 1e-4 here
    np.testing.assert_allclose(covariance, expected, atol=1e-4)
    np.testing.assert_array_equal(moments_of(gram(1), rows).matrix[7], 0)
    assert np.linalg.eigvalsh(covariance).min() > -1e-6


def test_what_has_no_such_channels_is_not_given() -> None:
    def result(need: Need, *shapes: tuple[int, ...]) -> SecondMoments | None:
        accumulator = GramAccumulator(need)
        for shape in shapes:
            accumulator.add(np.ones(shape, np.float32))
        return accumulator.result()

    assert result(gram(1), (1, 4), (1, 5)) is None, "as many channels in each sample"
    assert result(gram(axes=(0, 1)), (2, 6), (3, 4)) is None, "as many along each axis"
    assert result(gram(3), (1, 4)) is None, "no such axis"
    assert result(gram(axes=(1, -1)), (1, 4)) is None, "one axis twice"
    assert result(gram(patches=SAME), (1, 4, 9)) is None, "windows of an image in a sequence"
    assert result(gram(patches=Patches((3,), (1,), (1,), (0,), (0,))), (1, 4, 2)) is None, "no window fits"
    assert result(gram(1), (0, 4)) is None, "nothing was added"
    assert result(gram(1)) is None


# --- windows ---------------------------------------------------------------------------------------


def unfolded(array: Floats, patches: Patches) -> Floats:
    """One row for each window, tap by tap."""
    batch, channels, *spatial = array.shape
    ends = zip(spatial, patches.pads_begin, patches.pads_end, patches.spans, patches.strides, strict=True)
    positions = [range((size + before + after - span) // step + 1) for size, before, after, span, step in ends]
    rows = []
    for item in range(batch):
        for position in itertools.product(*positions):
            row = np.zeros((channels, *patches.kernel), np.float32)
            for tap in itertools.product(*map(range, patches.kernel)):
                parts = zip(position, patches.strides, tap, patches.dilations, patches.pads_begin, strict=True)
                at = tuple(p * s + t * d - b for p, s, t, d, b in parts)
                if all(0 <= i < size for i, size in zip(at, spatial, strict=True)):
                    row.reshape(channels, -1)[:, np.ravel_multi_index(tap, patches.kernel)] = array[item][:, *at]
            rows.append(row.ravel())
    return np.array(rows)


WINDOWS = [
    (SAME, (2, 3, 6, 5)),
    (Patches((3, 2), (2, 1), (1, 2), (0, 2), (3, 1)), (2, 3, 8, 7)),
    (Patches((1, 1), (2, 2), (1, 1), (0, 0), (0, 0)), (1, 4, 5, 6)),
    (Patches((5,), (2,), (3,), (4,), (1,)), (3, 2, 19)),
    (Patches((4,), (4,), (1,), (0,), (0,)), (2, 3, 18)),
    (Patches((2, 3, 2), (1, 2, 3), (2, 1, 1), (1, 0, 2), (0, 2, 1)), (2, 2, 5, 6, 7)),
]


@pytest.mark.parametrize(("patches", "shape"), WINDOWS)
def test_windows_are_those_found_tap_by_tap(patches: Patches, shape: tuple[int, ...]) -> None:
    arrays = [normal(*shape, seed=i) for i in range(2)]
    rows = np.concatenate([unfolded(array, patches) for array in arrays])
    assert_moments(moments_of(gram(patches=patches), *arrays), rows)


@pytest.mark.parametrize(("patches", "shape"), WINDOWS)
def test_windows_predict_the_energy_of_a_convolution(patches: Patches, shape: tuple[int, ...]) -> None:
    """E of (w x)^2 is w M w^T with a Conv's own weight flattened: the order of features is that of the weight."""
    dims = ", ".join(f"d{i}" for i in range(len(shape)))
    model = ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[{dims}] x, float[{", ".join(map(str, (4, shape[1], *patches.kernel)))}] w) => (float[{dims}] y) {{
           y = Conv <strides = {list(patches.strides)}, dilations = {list(patches.dilations)},
                     pads = {[*patches.pads_begin, *patches.pads_end]}> (x, w)
        }}""")
    (weight,) = (v for v in model.graph.inputs if v.name == "w")
    kernels = normal(4, shape[1], *patches.kernel, seed=9)
    weight.const_value = ir.tensor(kernels, name="w")
    model.graph.register_initializer(weight)
    canonicalize(model)
    x = normal(*shape)
    y = Runner(model, outputs=("y",)).run({"x": x})["y"]
    need = gram(patches=patches, value="x")
    found = calibrate(model, [need], open_data([{"x": x}], model), shapes=False).second_moments(need)
    flat = kernels.reshape(4, -1).astype(np.float64)
    wide = np.moveaxis(y, 1, 0).reshape(4, -1).astype(np.float64)
    assert found.count == wide.shape[1]
    np.testing.assert_allclose(np.diag(flat @ found.matrix @ flat.T), (wide**2).mean(1), rtol=1e-4)
    np.testing.assert_allclose(flat @ found.mean, wide.mean(1), atol=1e-5)


# --- rows left out ---------------------------------------------------------------------------------


@given(st.integers(1, 200_000), st.integers(1, 3000))
def test_rows_are_spread_evenly_and_none_comes_twice(rows: int, most: int) -> None:
    chosen = _spread(rows, most)
    assert chosen.size == min(rows, most)
    assert np.all(np.diff(chosen) > 0)
    assert chosen[0] >= 0
    assert chosen[-1] < rows


@pytest.mark.parametrize(("height", "width"), [(56, 56), (112, 112), (97, 101), (60, 60), (1, 4096), (13, 360)])
def test_no_row_and_no_column_of_an_image_is_favoured(height: int, width: int) -> None:
    chosen = _spread(height * width, 360)
    y, x = np.divmod(chosen, width)
    for counts, size in ((np.bincount(y, minlength=height), height), (np.bincount(x, minlength=width), width)):
        quarters = np.add.reduceat(counts, np.arange(4) * size // 4) if size >= 8 else np.array([90])
        assert np.all(np.abs(quarters - 90) <= 25), "a quarter of each side has about a quarter of the rows"


@pytest.mark.parametrize("patches", [None, SAME])
def test_large_samples_give_their_share_of_rows(patches: Patches | None) -> None:
    arrays = [normal(1, 3, 100, 100, seed=i) for i in range(8)]
    accumulated = moments_of(gram(1, patches=patches), *arrays, samples=8)
    chosen = _spread(100 * 100, moments._LEAST_ROWS // 8)
    assert accumulated.count == moments._LEAST_ROWS
    every = [unfolded(a, patches) if patches is not None else _by_hand(a, (1,), 3) for a in arrays]
    assert_moments(accumulated, np.concatenate([rows[chosen] for rows in every]))


def test_the_share_grows_with_the_features() -> None:
    n, samples = 640, 5
    arrays = [normal(6000, n, seed=i) for i in range(samples)]
    assert moments_of(gram(1), *arrays, samples=samples).count == moments._ROWS_PER_FEATURE * n >= 20 * n
    assert moments_of(gram(1), arrays[0][:7], *arrays[1:], samples=samples).count == 7 + 4 * (32 * n // 5)


def test_rows_left_out_are_still_looked_at() -> None:
    array = normal(50_000, 2)
    left_out = sorted(set(range(50_000)) - set(_spread(50_000, moments._LEAST_ROWS).tolist()))[100]
    for bad, is_nan in ((np.nan, True), (np.inf, False), (-np.inf, False)):
        array[left_out, 1] = bad
        accumulator = GramAccumulator(gram(1))
        accumulator.add(array)
        assert accumulator.nan is is_nan
        assert accumulator.result() is None


# --- a whole sweep ---------------------------------------------------------------------------------

NET = """
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
NEEDS = [
    gram(value="x"),
    gram(patches=SAME, value="x"),
    gram(value="r"),
    gram(patches=SAME, value="r"),
    gram(axes=(1, 2), value="r"),
    gram(-1, value="y"),
]


@pytest.fixture
def model() -> ir.Model:
    model = ir.from_onnx_text(NET)
    rng = np.random.default_rng(0)
    for value in [v for v in model.graph.inputs if v.name != "x"]:
        assert value.shape is not None
        value.const_value = ir.tensor(rng.standard_normal(value.shape.numpy()).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    canonicalize(model)
    return model


def images(count: int) -> list[dict[str, Floats]]:
    return [{"x": normal(1 + i % 3, 3, 8, 8, seed=i) * np.float32(1 + i)} for i in range(count)]


def test_evidence_is_that_of_the_values_themselves(model: ir.Model) -> None:
    feeds = images(7)
    evidence = calibrate(model, [*NEEDS, Need("r", Statistic.CHANNELS), Need("r")], open_data(feeds, model))
    runner = Runner(model, outputs=("r", "y"))
    found = [{**runner.run(feed), **feed} for feed in feeds]
    for need in NEEDS:
        arrays = [f[need.value] for f in found]
        if need.patches is not None:
            rows = np.concatenate([unfolded(a, need.patches) for a in arrays])
        else:
            features = math.prod(arrays[0].shape[axis] for axis in need.joined_axes)
            rows = np.concatenate([_by_hand(a, need.joined_axes, features) for a in arrays])
        assert_moments(evidence.second_moments(need), rows)
    channels = evidence.channels("r")
    np.testing.assert_allclose(
        np.diag(evidence.second_moments(gram(value="r")).matrix), channels.mean_square, rtol=1e-5
    )
    assert evidence.has(Need("r"))


def test_the_order_of_samples_matters_for_rounding_only(model: ir.Model) -> None:
    feeds = images(9)
    one, other = (calibrate(model, NEEDS, open_data(f, model), threads=1) for f in (feeds, feeds[::-1]))
    for need in NEEDS:
        a, b = one.second_moments(need), other.second_moments(need)
        assert a.count == b.count
        scale = np.sqrt(np.diag(a.matrix))
        assert np.all(np.abs(a.matrix - b.matrix) <= 1e-5 * np.outer(scale, scale))


def test_the_same_feeds_give_the_same_bytes(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def swept() -> list[bytes]:
        evidence = calibrate(model, NEEDS, open_data(images(30), model), shapes=False, threads=1)
        found = [evidence.second_moments(need) for need in NEEDS]
        return [m.matrix.tobytes() + m.mean.tobytes() for m in found]

    expected = swept()
    for counters in (1, 2, 5):
        monkeypatch.setattr("onnxcompress.calibrate._COUNTERS", counters)
        assert swept() == expected


def test_counters_share_the_threads_of_blas(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]

    seen: list[int] = []
    add = GramAccumulator.add

    def watched(self: GramAccumulator, array: Floats) -> None:
        seen.extend(threads())
        add(self, array)

    monkeypatch.setattr(GramAccumulator, "add", watched)
    with ThreadpoolController().limit(limits=4, user_api="blas"):
        before = threads()
        calibrate(model, NEEDS, open_data(images(2), model), shapes=False)
        assert set(seen) == {max(1, min(before) // 2)}
        with pytest.raises(DataError):
            bad = {"x": np.full((1, 3, 8, 8), np.nan, np.float32)}
            calibrate(model, NEEDS, open_data([bad], model), shapes=False)
        assert threads() == before, "given back, after an error too"


def test_what_cannot_be_observed_is_left_out(model: ir.Model) -> None:
    needs = [gram(0, value="s"), gram(value="nothing"), gram(value="w"), gram(2, value="y")]
    evidence = calibrate(model, needs, open_data(images(2), model))
    assert not any(evidence.has(need) for need in needs)


def test_nan_names_the_node_and_the_sample_and_infinity_is_legal() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1, 2] x) => (float[1, 2] y) { l = Log (x)  y = Neg (l) }""")
    canonicalize(model)
    need = gram(value="l")
    good, infinite, bad = ({"x": np.array([[1, v]], np.float32)} for v in (2, 0, -2))
    evidence = calibrate(model, [need, gram(value="x")], open_data([good, infinite], model))
    assert not evidence.has(need)
    assert evidence.has(gram(value="x"))
    with pytest.raises(DataError, match=r"sample 1: node '\w+' \(Log\) makes NaN in 'l'"):
        calibrate(model, [need], open_data([good, bad], model))


def test_memory_does_not_grow_with_rows_or_samples() -> None:
    """A matrix, a block and a product of two, however much is added; a large sample is not copied."""
    n = 128

    def peak(count: int, rows: int) -> int:
        accumulator = GramAccumulator(gram(1), count)
        array = normal(1, n, rows)
        tracemalloc.start()
        for _ in range(count):
            accumulator.add(array)
        accumulator.result()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few = peak(2, 5000)
    assert peak(40, 5000) <= 1.1 * few
    assert peak(2, 100_000) <= 1.1 * few + 8 * 100_000, "indices of rows may grow, not the rows"
    assert few < 8 * n * n * 6 + 4 * 2048 * n * 3


def test_halves_are_of_every_second_sample_and_join_to_the_whole() -> None:
    rng = np.random.default_rng(5)
    samples = [rng.normal(size=(7, 4)).astype(np.float32) for _ in range(5)]
    need = Need("x", Statistic.GRAM, axis=-1)
    whole = HalvedGram(need, len(samples))
    for sample in samples:
        whole.add(sample)
    found = whole.result()
    assert found is not None
    assert found.halves is not None
    for half, members in zip(found.halves, (samples[::2], samples[1::2]), strict=True):
        rows = np.concatenate(members).astype(np.float64)
        np.testing.assert_allclose(half.matrix, rows.T @ rows / len(rows), atol=1e-6)
        np.testing.assert_allclose(half.mean, rows.mean(0), atol=1e-6)
        assert half.count == len(rows)
    rows = np.concatenate(samples).astype(np.float64)
    np.testing.assert_allclose(found.matrix, rows.T @ rows / len(rows), atol=1e-6)
    single = HalvedGram(need)
    single.add(samples[0])
    alone = single.result()
    assert alone is not None
    assert alone.halves is None
