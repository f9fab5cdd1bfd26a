"""Streaming moments of channels: each by itself, between all pairs, and between two models.

**Each by itself.** Sums in float32 over blocks of at most 4096 terms, added up in float64.

**All pairs.** A value becomes rows of n features: its channel axes are moved last (or a convolution's windows are
laid out by ``sliding_window_view``), and the rows chosen are copied into a block of a fixed size. A full block X is
added as ``X^T X``, which numpy hands to BLAS as ssyrk, in float32; blocks are added up in float64. What is kept is
one float64 matrix, one block and one float32 product, whatever the number of samples.

Before that the mean s of the first block is taken off, and put back at the end: with ``z = x - s``,

    E[x x^T] = E[z z^T] + s E[z]^T + E[z] s^T + s s^T

so that the float32 products do not drown the variance of a channel whose mean is far larger.

**Rows left out.** The cost is rows x n^2. So all samples together contribute about ``max(32 n, 16384)`` rows, an equal
share of them each, and a sample with no more rows than its share contributes them all. The rows of a larger one are
``0, p, 2p, ...`` modulo their number, p being the number next above the golden section of it that shares no factor
with it: no row comes twice, they lie evenly, and no column of an image is favoured. They depend on the number of rows
and on nothing else.

**Two models.** Rows of features x and of errors y between the models, chosen and shifted alike, give the products
``X^T X`` and ``Y^T X``; there are none between features of y. Rows are as many as for x alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.statistics import ChannelMoments, CrossMoments, Need, Pair, Patches, SecondMoments

__all__ = ["ChannelAccumulator", "GramAccumulator", "HalvedCross", "HalvedGram"]

Array = npt.NDArray[Any]

_ROWS = 1024
_COLUMNS = 4096

_ROWS_PER_FEATURE = 32
_LEAST_ROWS = 1 << 14
_BLOCK_ROWS = 2048
"""Longer blocks are hardly faster (5 % at 4096), shorter ones pay for adding n^2 numbers in float64 more often."""
_BLOCK_ELEMENTS = 1 << 21
_SHORTEST_BLOCK = 256
_SQUARES_FIT = (1e-12, 1e15)
"""Absolute maximum of a block whose products neither overflow nor vanish in float32; others are taken in float64."""
_GOLDEN = (math.sqrt(5) - 1) / 2


# --- each by itself ----------------------------------------------------------------------------


class ChannelAccumulator:
    """Mean, mean square and absolute maximum per channel.

    Args:
        axis: the channel axis; may be negative.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._count = 0
        self._sum: npt.NDArray[np.float64] | None = None
        self._square: npt.NDArray[np.float64] = np.zeros(0)
        self._absmax: npt.NDArray[np.float64] = np.zeros(0)
        self._unusable = False
        self.nan = False

    def add(self, array: Array) -> None:
        """Adds a float32 array."""
        if array.size == 0 or self._unusable or self.nan:
            return
        if not -array.ndim <= self._axis < array.ndim:
            self._unusable = True
            return
        axis = self._axis % array.ndim
        channels = array.shape[axis]
        if self._sum is None:
            self._sum, self._square, self._absmax = np.zeros(channels), np.zeros(channels), np.zeros(channels)
        if self._sum.size != channels:
            self._unusable = True
            return
        inner = math.prod(array.shape[axis + 1 :])
        blocks = array.reshape(-1, channels, inner)
        for sums, squares, absmax in _moments(blocks):
            self._sum += sums
            self._square += squares
            np.maximum(self._absmax, absmax, out=self._absmax)
        self._count += blocks.shape[0] * inner
        if not np.isfinite(self._absmax).all():
            self.nan = bool(np.isnan(self._absmax).any())
            self._unusable = True

    def result(self) -> ChannelMoments | None:
        """The moments so far; None if nothing usable was added."""
        if self._sum is None or self._unusable or self._count == 0:
            return None
        return ChannelMoments(self._sum / self._count, self._square / self._count, self._absmax)


def _moments(blocks: Array) -> Iterable[tuple[Array, Array, Array]]:
    """Sum, sum of squares and absolute maximum by channel, block by block of (outer, channels, inner).

    Measured: einsum sums rows four times as fast as ``sum(1)``, whose pairwise order short blocks do not need.
    """
    outer, channels, inner = blocks.shape
    if inner >= 16:
        for block in blocks:
            for start in range(0, inner, _COLUMNS):
                part = block[:, start : start + _COLUMNS]
                yield np.einsum("ci->c", part), np.vecdot(part, part), np.maximum(part.max(1), -part.min(1))
        return
    rows = blocks.reshape(outer, channels * inner)
    for start in range(0, outer, _ROWS):
        part = rows[start : start + _ROWS]
        sums, squares = part.sum(0), np.einsum("oc,oc->c", part, part)
        absmax = np.maximum(part.max(0), -part.min(0))
        by_channel = (a.reshape(channels, inner) for a in (sums, squares))
        yield (*(a.sum(1) for a in by_channel), absmax.reshape(channels, inner).max(1))


# --- between all pairs -------------------------------------------------------------------------


class GramAccumulator:
    """Second moments between all features of one value.

    Args:
        need: says what the features are.
        samples: how many arrays will come; more than one means that each contributes a share of the rows.
    """

    def __init__(self, need: Need, samples: int = 1) -> None:
        self._need, self._samples = need, max(1, samples)
        self._features: tuple[int, ...] = ()
        self._matrix: npt.NDArray[np.float64] | None = None
        """Sum of ``z z^T``; None before the first array."""
        self._sum: npt.NDArray[np.float64] = np.zeros(0)
        self._shift: npt.NDArray[np.float64] = np.zeros(0)
        self._block: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._filled = 0
        self._absmax = 0.0
        """Of the values of arrays that are in the block."""
        self._count = 0
        self._unusable = False
        self.nan = False

    def add(self, array: Array) -> None:
        """Adds a float32 array."""
        if array.size == 0 or self._unusable or self.nan:
            return
        low, high = float(array.min()), float(array.max())  # of all elements: rows left out may be NaN, too
        if not (math.isfinite(low) and math.isfinite(high)):
            self.nan = math.isnan(low) or math.isnan(high)
            self._unusable = True
            return
        laid_out = _rows(array, self._need)
        if laid_out is None or (self._matrix is not None and laid_out[1] != self._features):
            self._unusable = True
            return
        view, self._features = laid_out
        features = math.prod(self._features)
        if self._matrix is None:
            self._matrix, self._sum = np.zeros((features, features)), np.zeros(features)
            rows = max(_SHORTEST_BLOCK, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // features))
            self._block = np.empty((rows, features), np.float32)
        outer = view.shape[: view.ndim - len(self._features)]
        chosen = _spread(math.prod(outer), _share(features, self._samples))
        while chosen.size:
            part, chosen = np.split(chosen, [len(self._block) - self._filled])
            end = self._filled + part.size
            self._block[self._filled : end] = view[np.unravel_index(part, outer)].reshape(part.size, features)
            self._filled, self._absmax = end, max(self._absmax, -low, high)
            if end == len(self._block):
                self._flush(self._matrix)

    def result(self) -> SecondMoments | None:
        """The moments; None if nothing usable was added. It hands the matrix over: nothing can be added after."""
        if self._matrix is None or self._unusable or self._filled + self._count == 0:
            return None
        matrix = self._flush(self._matrix)
        self._matrix, self._block, self._unusable = None, np.zeros((0, 0), np.float32), True
        rest = self._sum / self._count
        back = np.outer(self._shift, rest + self._shift / 2)
        back += back.T
        matrix /= self._count
        matrix += back
        return SecondMoments(matrix, rest + self._shift, self._count)

    def _flush(self, matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Adds the block to ``matrix``, which it returns, and empties it."""
        block = self._block[: self._filled]
        if self._filled:
            if self._count == 0:  # rounded to float32, so that a constant channel becomes exactly zero
                self._shift = block.mean(0, dtype=np.float64).astype(np.float32).astype(np.float64)
            least, most = _SQUARES_FIT
            rows: Array = block if least < self._absmax < most else block.astype(np.float64)
            rows -= self._shift.astype(rows.dtype)
            matrix += rows.T @ rows  # one array by its own transpose: BLAS works out half and mirrors it
            self._sum += rows.sum(0, dtype=np.float64)
        self._count += self._filled
        self._filled, self._absmax = 0, 0.0
        return matrix


class HalvedGram:
    """Second moments of all samples and of every second one.

    Args:
        need: says what the features are.
        samples: how many arrays will come.
    """

    def __init__(self, need: Need, samples: int = 1) -> None:
        self._halves = (GramAccumulator(need, samples), GramAccumulator(need, samples))
        self._added = 0

    @property
    def nan(self) -> bool:
        """NaN was added."""
        return any(half.nan for half in self._halves)

    def add(self, array: Array) -> None:
        """Adds a float32 array."""
        self._halves[self._added % 2].add(array)
        self._added += 1

    def result(self) -> SecondMoments | None:
        """The moments; None if nothing usable was added. It hands the matrices over: nothing can be added after."""
        found = [half.result() for half in self._halves[: self._added]]
        if not found or any(half is None for half in found):
            return None
        a, b = found[0], found[-1]
        if a is None or b is None or len(found) < 2 or a.matrix.shape != b.matrix.shape:
            return a if len(found) < 2 else None
        count = a.count + b.count
        matrix = b.matrix
        matrix *= b.count / count
        matrix += a.matrix * (a.count / count)
        return SecondMoments(matrix, (a.count * a.mean + b.count * b.mean) / count, count, a)


# --- between two models ------------------------------------------------------------------------


class _Cross:
    """Products of features and errors.

    Args:
        pair: says what the features are.
        samples: how many pairs of arrays will come; each contributes a share of the rows.
    """

    def __init__(self, pair: Pair, samples: int) -> None:
        self._pair, self._samples = pair, max(1, samples)
        self._matrix: npt.NDArray[np.float64] | None = None
        self._cross: npt.NDArray[np.float64] = np.zeros((0, 0))
        self._shifts = self._sums = (np.zeros(0), np.zeros(0))
        self._count = 0
        self._unusable = False
        self.nan = False

    def add(self, reads: Array, error: Array) -> None:
        """Adds float32 arrays of one sample."""
        if reads.size == 0 or error.size == 0 or self._unusable or self.nan:
            return
        ends = [float(end) for array in (reads, error) for end in (array.min(), array.max())]
        if not all(math.isfinite(end) for end in ends):
            self.nan = any(math.isnan(end) for end in ends)
            self._unusable = True
            return
        x_rows, y_rows = _rows(reads, self._pair.reads), _rows(error, self._pair.makes)
        if x_rows is None or y_rows is None:
            self._unusable = True
            return
        views, widths = (x_rows[0], y_rows[0]), (math.prod(x_rows[1]), math.prod(y_rows[1]))
        outer = [view.shape[: view.ndim - len(features)] for view, features in (x_rows, y_rows)]
        if self._matrix is None:
            self._matrix, self._cross = np.zeros((widths[0],) * 2), np.zeros(widths[::-1])
            self._sums = np.zeros(widths[0]), np.zeros(widths[1])
        if self._cross.shape != (widths[1], widths[0]) or _long(outer[0]) != _long(outer[1]):
            self._unusable = True
            return
        chosen = _spread(math.prod(outer[0]), _share(widths[0], self._samples))
        narrow = _SQUARES_FIT[0] < max(map(abs, ends)) < _SQUARES_FIT[1]
        for start in range(0, chosen.size, _BLOCK_ROWS):
            part = chosen[start : start + _BLOCK_ROWS]
            x, y = (
                view[np.unravel_index(part, rows)].reshape(part.size, width).astype(np.float32 if narrow else float)
                for view, rows, width in zip(views, outer, widths, strict=True)
            )
            if self._count == 0:
                self._shifts = _middle(x), _middle(y)
            for block, shift, total in zip((x, y), self._shifts, self._sums, strict=True):
                block -= shift.astype(block.dtype)
                total += block.sum(0, dtype=np.float64)
            self._matrix += x.T @ x
            self._cross += y.T @ x
            self._count += part.size

    def result(self) -> CrossMoments | None:
        """The moments; None if nothing usable was added."""
        if self._matrix is None or self._unusable or self._count == 0:
            return None
        (x, y), (rest_x, rest_y) = self._shifts, (total / self._count for total in self._sums)
        back = np.outer(x, rest_x + x / 2)
        matrix = self._matrix / self._count + (back + back.T)
        cross = self._cross / self._count + np.outer(y, rest_x + x) + np.outer(rest_y, x)
        return CrossMoments(matrix, cross, rest_x + x, rest_y + y, self._count)


class HalvedCross:
    """Moments of features and errors, of all samples and of every second one.

    Args:
        pair: says what the features are.
        samples: how many pairs of arrays will come.
    """

    def __init__(self, pair: Pair, samples: int = 1) -> None:
        self._halves = (_Cross(pair, samples), _Cross(pair, samples))
        self._added = 0

    @property
    def nan(self) -> bool:
        """NaN was added."""
        return any(half.nan for half in self._halves)

    def add(self, reads: Array, error: Array) -> None:
        """Adds float32 arrays of one sample: what is read, and how far off is what is made."""
        self._halves[self._added % 2].add(reads, error)
        self._added += 1

    def result(self) -> CrossMoments | None:
        """The moments; None if nothing usable was added."""
        found = [half.result() for half in self._halves[: self._added]]
        if not found or any(half is None for half in found):
            return None
        a, b = found[0], found[-1]
        if a is None or b is None or len(found) < 2 or a.cross.shape != b.cross.shape:
            return a if len(found) < 2 else None
        count = a.count + b.count
        u, v = a.count / count, b.count / count
        return CrossMoments(
            u * a.matrix + v * b.matrix,
            u * a.cross + v * b.cross,
            u * a.mean + v * b.mean,
            u * a.error + v * b.error,
            count,
            a,
        )


def _middle(block: Array) -> npt.NDArray[np.float64]:
    """Mean of rows, rounded to float32 so that a constant feature becomes exactly zero."""
    return np.asarray(block.mean(0, dtype=np.float64), np.float32).astype(np.float64)


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of length 1."""
    return tuple(length for length in shape if length != 1)


# --- rows --------------------------------------------------------------------------------------


def _share(features: int, samples: int) -> int:
    """Rows a sample contributes at most."""
    return -(-max(_ROWS_PER_FEATURE * features, _LEAST_ROWS) // samples)


def _rows(array: Array, need: Need) -> tuple[Array, tuple[int, ...]] | None:
    """A view of an array with the feature axes last, and their lengths; None if it has no such axes."""
    if need.patches is not None:
        return _windows(array, need.patches)
    axes = [axis % array.ndim for axis in need.joined_axes if -array.ndim <= axis < array.ndim]
    if len(axes) < len(need.joined_axes) or len(set(axes)) < len(axes):
        return None
    order = [axis for axis in range(array.ndim) if axis not in axes] + axes
    return array.transpose(order)[np.newaxis], tuple(array.shape[axis] for axis in axes)  # a row even of a vector


def _windows(array: Array, patches: Patches) -> tuple[Array, tuple[int, ...]] | None:
    """[batch, *positions, channels, *kernel], a view of the array with zeros around it."""
    dims = len(patches.kernel)
    if array.ndim != dims + 2:
        return None
    pads = [(0, 0), (0, 0), *zip(patches.pads_begin, patches.pads_end, strict=True)]
    if any(before or after for before, after in pads):
        array = np.pad(array, pads)
    features = (array.shape[1], *patches.kernel)
    if any(size < span for size, span in zip(array.shape[2:], patches.spans, strict=True)):
        return np.zeros((0, *features), array.dtype), features  # no window fits: no rows
    windows = np.lib.stride_tricks.sliding_window_view(array, patches.spans, axis=tuple(range(2, 2 + dims)))
    taken: tuple[Any, ...] = (..., *(slice(None, None, step) for step in (*patches.strides, *patches.dilations)))
    return np.moveaxis(windows[taken], 1, 1 + dims), features


def _spread(rows: int, most: int) -> npt.NDArray[np.intp]:
    """Indices of at most ``most`` of so many rows, in order and spread evenly; all of them where there are no more."""
    if rows <= most:
        return np.arange(rows)
    step = round(rows * _GOLDEN)
    while math.gcd(step, rows) != 1:
        step += 1
    return np.sort(np.arange(most) * step % rows)
