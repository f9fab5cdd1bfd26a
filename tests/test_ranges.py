"""Clipping ranges and weight scales against brute force."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.calibrate import HistogramAccumulator
from onnxcompress.errors import UsageError
from onnxcompress.ranges import clip_range, weight_scales
from onnxcompress.statistics import Histogram, RangeMethod

Floats = npt.NDArray[np.float32]
COUNT = 100_000


def histogram_of(array: Floats) -> Histogram:
    accumulator = HistogramAccumulator(max_elements=array.size)
    accumulator.add(array)
    histogram = accumulator.result()
    assert histogram is not None
    return histogram


def squared_error(array: Floats, low: float, high: float, levels: int = 256) -> float:
    """Of quantizing as onnx does: zero exactly representable, round to nearest even, clip."""
    scale = (high - low) / (levels - 1)
    zero = round(-low / scale)
    q = np.clip(np.rint(array / scale) + zero, 0, levels - 1)
    return float(np.mean((array - (q - zero) * scale) ** 2))


def samples(kind: str) -> Floats:
    rng = np.random.default_rng(0)
    array = {
        "normal": lambda: rng.standard_normal(COUNT),
        "laplace": lambda: rng.laplace(size=COUNT),
        "relu": lambda: np.maximum(rng.standard_normal(COUNT), 0),
        "relu6": lambda: np.clip(rng.standard_normal(COUNT) * 4, 0, 6),
        "heavy": lambda: rng.standard_t(3, COUNT),
        "uniform": lambda: rng.uniform(-1, 1, COUNT),
        "skewed": lambda: rng.gamma(0.5, size=COUNT) - 0.2,
        "negative": lambda: -np.abs(rng.standard_normal(COUNT)) - 1,
        "outlier": lambda: np.append(rng.standard_normal(COUNT), 60.0),
    }[kind]()
    return np.asarray(array, np.float32)


KINDS = ("normal", "laplace", "relu", "relu6", "heavy", "uniform", "skewed", "negative", "outlier")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", list(RangeMethod))
def test_a_range_holds_zero_and_stays_inside_what_was_seen(kind: str, method: RangeMethod) -> None:
    array = samples(kind)
    low, high = clip_range(histogram_of(array), method)
    assert min(array.min(), 0) <= low <= 0 <= high <= max(array.max(), 0)
    assert low < high


@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_those_of_numpy_within_a_bin(kind: str) -> None:
    array = samples(kind)
    histogram = histogram_of(array)
    for kept in (100.0, 99.99, 99.0, 90.0):
        low, high = clip_range(histogram, RangeMethod.PERCENTILE, percentile=kept)
        tail = (100 - kept) / 200
        wanted = (
            np.quantile(array, [tail, 1 - tail], method="lower"),
            np.quantile(array, [tail, 1 - tail], method="higher"),
        )
        slack = 1.5 * histogram.bin_width
        assert min(wanted[0][0], 0) - slack <= low <= min(wanted[1][0], 0) + slack
        assert max(wanted[0][1], 0) - slack <= high <= max(wanted[1][1], 0) + slack


@pytest.mark.parametrize("levels", [256, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_close_to_the_best_there_is(kind: str, levels: int) -> None:
    """Within 0.5 dB of trying 60 x 60 ranges on the data; a bin is not a point, a level not a slope."""
    array = samples(kind)[::10]
    low, high = clip_range(histogram_of(array), RangeMethod.MSE, levels=levels)
    grid = np.linspace(0.02, 1, 60)
    lows = grid * min(array.min(), 0) if array.min() < 0 else [0.0]
    highs = grid * max(array.max(), 0) if array.max() > 0 else [0.0]
    coarse = array[::7]
    ranges = sorted((squared_error(coarse, a, b, levels), a, b) for a in lows for b in highs)[:5]
    best = min(squared_error(array, a, b, levels) for _, a, b in ranges)
    assert squared_error(array, low, high, levels) <= best * 10**0.05


@pytest.mark.parametrize("kind", KINDS)
def test_mse_beats_minmax(kind: str) -> None:
    array = samples(kind)
    histogram = histogram_of(array)
    mse, minmax = (clip_range(histogram, m) for m in (RangeMethod.MSE, RangeMethod.MINMAX))
    assert squared_error(array, *mse) <= 1.02 * squared_error(array, *minmax)


def test_entropy_is_not_minmax_in_disguise() -> None:
    """The failure of the usual implementation, 128 bins for 128 levels: clipping never pays there."""
    array = samples("outlier")
    low, high = clip_range(histogram_of(array), RangeMethod.ENTROPY)
    assert high < 20
    assert low <= -3
    assert squared_error(array[:-1], low, high) < squared_error(array[:-1], float(array.min()), 60.0) / 10


@pytest.mark.parametrize("kind", ["relu", "relu6", "uniform", "normal"])
def test_entropy_does_not_clip_what_has_no_tail(kind: str) -> None:
    """A spike of zeros must not pull the range in."""
    array = samples(kind)
    low, high = clip_range(histogram_of(array), RangeMethod.ENTROPY)
    assert np.mean((array < low) | (array > high)) < 1e-3


def test_constants_keep_their_range() -> None:
    for value in (0.0, 3.0, -2.0):
        histogram = histogram_of(np.full(10, value, np.float32))
        for method in RangeMethod:
            assert clip_range(histogram, method) == (min(value, 0.0), max(value, 0.0))


def test_a_percentile_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"percentile is 0\.9999"):
        clip_range(histogram_of(samples("normal")), RangeMethod.PERCENTILE, percentile=0.9999)


# --- weights -------------------------------------------------------------------------------------


def weight_error(array: Floats, scales: Floats, axis: int, bits: int = 8) -> npt.NDArray[np.float64]:
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    scale = scales.astype(np.float64)[:, None]
    top = 2 ** (bits - 1) - 1
    error: npt.NDArray[np.float64] = ((rows - np.clip(np.rint(rows / scale), -top, top) * scale) ** 2).sum(1)
    return error


@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=8), elements=st.floats(-1e3, 1e3, width=32)
    ),
    st.integers(0, 3),
    st.sampled_from([4, 8]),
)
@settings(deadline=None, max_examples=40)
def test_mse_scales_are_never_worse_than_minmax(array: Floats, axis: int, bits: int) -> None:
    axis %= array.ndim
    mse = weight_scales(array, axis, bits=bits)
    minmax = weight_scales(array, axis, bits=bits, method=RangeMethod.MINMAX)
    assert mse.shape == minmax.shape == (array.shape[axis],)
    assert (mse > 0).all()
    slack = 1e-4 * weight_error(array, minmax, axis, bits) + 1e-9 * np.abs(array).max() ** 2
    assert (weight_error(array, mse, axis, bits) <= weight_error(array, minmax, axis, bits) + slack).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_scales_are_close_to_the_best_of_a_fine_grid(bits: int) -> None:
    array = np.random.default_rng(0).laplace(size=(12, 400)).astype(np.float32)
    scales = weight_scales(array, 0, bits=bits)
    top = 2 ** (bits - 1) - 1
    candidates = np.linspace(0.05, 1, 400)[:, None] * np.abs(array).max(1) / top
    best = np.min([weight_error(array, c.astype(np.float32), 0, bits) for c in candidates], axis=0)
    within = {2: 1.6, 3: 1.1, 4: 1.1, 8: 1.1}[bits]  # the search stops at 0.3 of the largest weight
    assert (weight_error(array, scales, 0, bits) <= within * best).all()


def test_minmax_scales_by_axis() -> None:
    array = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    for axis, over in ((0, (1, 2)), (1, (0, 2)), (-1, (0, 1)), ((0, 2), (1,)), (None, (0, 1, 2))):
        scales = weight_scales(array, axis, method=RangeMethod.MINMAX)
        np.testing.assert_allclose(scales, np.abs(array).max(over) / 127, rtol=1e-6)
        assert scales.dtype == np.float32


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32)
    whole = weight_scales(array, 0)
    monkeypatch.setattr("onnxcompress.ranges._WEIGHT_CHUNK", 100)
    np.testing.assert_array_equal(weight_scales(array, 0), whole)


def test_a_channel_of_zeros_gets_a_usable_scale() -> None:
    array = np.zeros((3, 4), np.float32)
    array[1] = 254
    np.testing.assert_allclose(weight_scales(array, 0, method=RangeMethod.MINMAX), [2, 2, 2])
    assert (weight_scales(np.zeros((2, 2), np.float32), 0) == 1).all()


def test_the_smallest_numbers_there_are() -> None:
    array = np.full((2, 3), 1e-45, np.float32)
    scales = weight_scales(array, 0)
    assert (scales > 0).all()
    assert np.isfinite(array / scales[:, None]).all()


def test_weights_have_minmax_and_mse_only() -> None:
    with pytest.raises(UsageError, match="no entropy range"):
        weight_scales(np.ones((2, 2), np.float32), 0, method=RangeMethod.ENTROPY)
    with pytest.raises(UsageError, match="bits is 1"):
        weight_scales(np.ones((2, 2), np.float32), 0, bits=1)
