"""Clipping ranges from histograms, and weight scales: all closed form or one small grid.

Rounding to ``levels`` equal steps over ``[a, b]`` costs ``d**2 / 12`` per value with
``d = (b - a) / (levels - 1)``; clipping costs the squared distance to the range. Their sum is the
expected squared error whose minimum :attr:`RangeMethod.MSE` looks for. It holds where the density is
flat over one step; values at zero cost nothing, because zero is always exactly representable. Where
it does not hold (spikes, as a Clip leaves them, or few levels), the ranges around the minimum are
tried on the histogram with real rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import UsageError
from onnxcompress.statistics import Histogram, RangeMethod

__all__ = ["clip_range", "weight_scales"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_GRID = 128
_BINS_PER_LEVEL = 2
_AROUND = (0.8, 0.9, 1.0, 1.12, 1.25)


def clip_range(
    histogram: Histogram,
    method: RangeMethod,
    *,
    percentile: float = 99.99,
    levels: int = 256,
) -> tuple[float, float]:
    """The range to quantize, read off a histogram.

    Args:
        histogram: of all values seen.
        method: how.
        percentile: per cent of the values kept by PERCENTILE; half of the rest goes at each end.
        levels: integers there are (256 for 8 bits); for MSE and ENTROPY.

    Returns:
        ``(low, high)`` with ``low <= 0 <= high``, inside the exact range seen (widened to zero).
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    total = int(histogram.counts.sum())
    if method is RangeMethod.MINMAX or total == 0 or histogram.low == histogram.high:
        return low, high
    if method is RangeMethod.PERCENTILE:
        if not 50 <= percentile <= 100:
            raise UsageError(f"percentile is {percentile}; it must be between 50 and 100")
        found = _percentile(histogram, percentile)
    elif method is RangeMethod.MSE:
        found = _least_squares(histogram, low, high, levels)
    else:
        found = _least_divergence(histogram, low, high, levels)
    return min(max(found[0], low), 0.0), max(min(found[1], high), 0.0)


def _edges(histogram: Histogram) -> Floats:
    return histogram.edges_low + histogram.bin_width * np.arange(histogram.counts.size + 1, dtype=np.float64)


def _centers(histogram: Histogram) -> Floats:
    edges = np.clip(_edges(histogram), histogram.low, histogram.high)
    return np.asarray((edges[:-1] + edges[1:]) / 2)


def _percentile(histogram: Histogram, percentile: float) -> tuple[float, float]:
    share = np.concatenate([[0.0], np.cumsum(histogram.counts) / histogram.counts.sum()])
    tail = (1 - percentile / 100) / 2
    # a flat stretch has no inverse: keep the inner end of it for each tail
    edges = np.clip(_edges(histogram), histogram.low, histogram.high)
    inside = np.flatnonzero(np.diff(share))
    first, last = inside[0], inside[-1] + 1
    share, edges = share[first : last + 1], edges[first : last + 1]
    left = np.searchsorted(share, tail, side="right") - 1
    right = np.searchsorted(share, 1 - tail, side="left")
    return _between(share, edges, int(left), tail), _between(share, edges, int(right) - 1, 1 - tail)


def _between(share: Floats, edges: Floats, index: int, wanted: float) -> float:
    index = int(np.clip(index, 0, share.size - 2))
    step = share[index + 1] - share[index]
    part = 0.0 if step == 0 else (wanted - share[index]) / step
    return float(edges[index] + np.clip(part, 0, 1) * (edges[index + 1] - edges[index]))


def _least_squares(histogram: Histogram, low: float, high: float, levels: int) -> tuple[float, float]:
    """Minimum over a grid of ends of ``d**2 / 12 * inside + clipped_low + clipped_high``."""
    some = histogram.counts > 0
    centers, counts = _centers(histogram)[some], histogram.counts[some].astype(np.float64)
    at_zero = np.abs(centers) <= histogram.bin_width
    flat = np.where(at_zero, 0.0, counts)  # what rounding costs d**2 / 12
    grid = np.linspace(1 / _GRID, 1, _GRID)
    ends_low = low * grid if low < 0 else np.zeros(1)
    ends_high = high * grid if high > 0 else np.zeros(1)
    for _ in range(2):
        clip_low, in_low = _tail(centers, counts, flat, -ends_low, -1)
        clip_high, in_high = _tail(centers, counts, flat, ends_high, 1)
        step = (ends_high[None, :] - ends_low[:, None]) / (levels - 1)
        inside = np.maximum(flat.sum() - in_low[:, None] - in_high[None, :], 0)
        error = step**2 / 12 * inside + clip_low[:, None] + clip_high[None, :]
        i, j = np.unravel_index(int(np.argmin(error)), error.shape)
        best = float(ends_low[i]), float(ends_high[j])
        fine = np.linspace(-1 / _GRID, 1 / _GRID, 33)
        ends_low = np.clip(best[0] + low * fine, low, 0.0) if low < 0 else np.zeros(1)
        ends_high = np.clip(best[1] + high * fine, 0.0, high) if high > 0 else np.zeros(1)
    around = [(max(best[0] * a, low), min(best[1] * b, high)) for a in _AROUND for b in _AROUND]
    return min([best, *around, (low, high)], key=lambda ends: _rounding_cost(centers, counts, ends, levels))


def _rounding_cost(centers: Floats, counts: Floats, ends: tuple[float, float], levels: int) -> float:
    low, high = ends
    if high <= low:
        return np.inf
    step = (high - low) / (levels - 1)
    zero = np.rint(-low / step)
    error = centers - (np.clip(np.rint(centers / step) + zero, 0, levels - 1) - zero) * step
    return float(np.einsum("i,i,i->", error, error, counts))


def _tail(centers: Floats, counts: Floats, flat: Floats, ends: Floats, sign: int) -> tuple[Floats, Floats]:
    """For each end: squared error of what lies beyond it, and how much of ``flat`` does."""
    x = centers * sign
    order = np.argsort(x)
    x, counts, flat = x[order], counts[order], flat[order]

    def beyond(weight: Floats) -> Floats:
        return np.concatenate([np.cumsum(weight[::-1])[::-1], [0.0]])

    n, nx, nxx, nflat = beyond(counts), beyond(counts * x), beyond(counts * x * x), beyond(flat)
    at = np.searchsorted(x, ends, side="right")
    return np.maximum(nxx[at] - 2 * ends * nx[at] + ends**2 * n[at], 0.0), nflat[at]


def _least_divergence(histogram: Histogram, low: float, high: float, levels: int) -> tuple[float, float]:
    """Smallest Kullback-Leibler divergence of the clipped distribution from its quantized form.

    Migacz, "8-bit inference with TensorRT", GTC 2017, for two ends in turn. A level must span
    several bins: with one bin a level, quantizing changes nothing, the divergence only sees the
    clipping, and the full range always wins. A spike at zero (Relu) is levelled to its neighbours
    first: zero is exactly representable, so spreading it over a level would be a cost that is not
    there, and one that only ever favours clipping.
    """
    edges, counts = _edges(histogram), histogram.counts.astype(np.float64)
    used = np.flatnonzero(counts)
    left = int(min(used[0], np.searchsorted(edges, min(low, 0.0), side="right") - 1))
    right = int(max(used[-1] + 1, np.searchsorted(edges, max(high, 0.0), side="left")))
    left, right = max(left, 0), min(right, counts.size)
    _level_spike(counts, round(-histogram.edges_low / histogram.bin_width))
    zero = int(np.clip(np.searchsorted(edges, 0.0, side="left"), left, right))
    fewest = min(levels * _BINS_PER_LEVEL, right - left)
    if high > 0:
        ends = _candidates(max(left + fewest, zero), right)
        right = min(ends, key=lambda end: (_divergence(counts, left, end, levels), -end))
    if low < 0:
        starts = _candidates(left, min(right - min(fewest, right - left), zero))
        left = min(starts, key=lambda start: (_divergence(counts, start, right, levels), start))
    return float(edges[left]), float(edges[right])


def _level_spike(counts: Floats, zero: int) -> None:
    if 0 <= zero < counts.size:
        beside = counts[max(zero - 1, 0) : zero + 2].copy()
        beside[min(zero, 1)] = 0
        counts[zero] = min(counts[zero], max(beside.max(), 1.0))


def _candidates(first: int, last: int) -> list[int]:
    if last <= first:
        return [max(first, last)]
    return sorted({int(v) for v in np.linspace(first, last, _GRID).round()})


def _divergence(counts: Floats, left: int, right: int, levels: int) -> float:
    inner = counts[left:right]
    clipped = inner.copy()
    clipped[0] += counts[:left].sum()
    clipped[-1] += counts[right:].sum()
    filled = inner > 0
    starts = np.unique(np.linspace(0, inner.size, min(levels, inner.size) + 1)[:-1].astype(np.int64))
    sums, cells = np.add.reduceat(inner, starts), np.add.reduceat(filled.astype(np.float64), starts)
    mean = np.divide(sums, cells, out=np.zeros_like(sums), where=cells > 0)
    quantized = np.where(filled, np.repeat(mean, np.diff(np.append(starts, inner.size))), 0.0)
    if quantized.sum() == 0:
        return np.inf
    p, q = clipped / clipped.sum(), quantized / quantized.sum()
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))))


# --- weights -----------------------------------------------------------------------------------

_WEIGHT_BINS = 2048
_WEIGHT_CHUNK = 1 << 20
_SHRINK = np.concatenate([[1.0], np.linspace(0.98, 0.3, 35)])


def weight_scales(
    array: Array, axis: int | tuple[int, ...] | None, *, bits: int = 8, method: RangeMethod = RangeMethod.MSE
) -> npt.NDArray[np.float32]:
    """Symmetric scales of a weight: ``q = clip(round(w / scale), -m, m)``, ``m = 2**(bits-1) - 1``.

    MSE tries 36 shrink factors of the channel's largest absolute value on the channel's histogram
    (one error table serves all channels, each divided by its largest value) and takes the best if
    it also wins on the weights themselves, so it is never worse than MINMAX.

    Args:
        array: float weights of any shape.
        axis: axes that keep a scale of their own; None for one scale in all.
        bits: 2 to 16.
        method: MINMAX or MSE.

    Returns:
        float32, shape ``[array.shape[a] for a in axis]``; () for None. A channel of zeros gets the
        largest scale of the others (1 if there is none), so that a bias scaled with it stays fine.
    """
    if method not in (RangeMethod.MINMAX, RangeMethod.MSE):
        raise UsageError(f"weights have no {method} range", hint="use minmax or mse")
    if not 2 <= bits <= 16:
        raise UsageError(f"bits is {bits}; it must be 2 to 16")
    axes = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(a % array.ndim for a in axes)
    kept = tuple(array.shape[a] for a in axes)
    rows = np.moveaxis(array, axes, range(len(axes))).reshape(int(np.prod(kept, dtype=np.int64)), -1)
    top = 2 ** (bits - 1) - 1
    scales = np.empty(rows.shape[0], np.float32)
    per_chunk = max(1, _WEIGHT_CHUNK // max(rows.shape[1], 1))
    for start in range(0, rows.shape[0], per_chunk):
        block = np.asarray(rows[start : start + per_chunk], np.float32)
        absmax = np.maximum(block.max(1, initial=0), -block.min(1, initial=0))
        factor = np.ones_like(absmax)
        if method is RangeMethod.MSE:
            factor = _best_shrink(block, absmax, top)
        scales[start : start + per_chunk] = absmax * factor / np.float32(top)
    empty = scales == 0
    scales[empty] = scales[~empty].max(initial=0) or 1.0
    np.maximum(scales, np.finfo(np.float32).tiny, out=scales)
    return scales.reshape(kept)


def _best_shrink(block: npt.NDArray[np.float32], absmax: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.float32]:
    safe = np.maximum(absmax, np.float32(1e-30))  # below that nothing can be gained, and dividing overflows
    points = (np.arange(_WEIGHT_BINS) + 0.5) / _WEIGHT_BINS
    step = _SHRINK[:, None] / top
    table = (points - np.minimum(np.rint(points / step), top) * step) ** 2  # (factors, bins)
    factor = np.empty_like(absmax)
    for row in range(block.shape[0]):
        values = np.abs(block[row]) * np.float32(_WEIGHT_BINS / safe[row])
        bins = np.minimum(values.astype(np.int64), _WEIGHT_BINS - 1)
        counts = np.bincount(bins, minlength=_WEIGHT_BINS)
        factor[row] = _SHRINK[np.argmin(np.einsum("fb,b->f", table, counts))]
    worse = _rounding_error(block, safe * factor / top, top) > _rounding_error(block, safe / top, top)
    factor[worse] = 1
    return factor


def _rounding_error(block: npt.NDArray[np.float32], scale: npt.NDArray[Any], top: int) -> Floats:
    scale = scale.astype(np.float32)[:, None]
    error = block - np.clip(np.rint(block / scale), -top, top) * scale
    return np.asarray(np.einsum("ci,ci->c", error, error), np.float64)
