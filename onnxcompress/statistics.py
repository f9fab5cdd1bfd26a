"""What a pass may ask calibration to learn about a value, and what it gets.

All statistics are streaming: their size depends on the model and not on the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import total_ordering
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import PassError

__all__ = [
    "ChannelMoments",
    "CrossMoments",
    "Evidence",
    "Histogram",
    "Need",
    "Pair",
    "Patches",
    "RangeMethod",
    "SecondMoments",
    "Statistic",
]

Array = npt.NDArray[Any]


class Statistic(StrEnum):
    """Kinds of evidence."""

    HISTOGRAM = "histogram"
    """Exact minimum and maximum, and a histogram of the values."""
    CHANNELS = "channels"
    """Per channel: mean, mean square, absolute maximum."""
    GRAM = "gram"
    """Second moments between all pairs of channels."""


class RangeMethod(StrEnum):
    """How a clipping range is read off a histogram."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


@dataclass(frozen=True, order=True)
class Patches:
    """The windows a Conv sees of a value [batch, channels, *spatial]; each tuple has one entry per spatial axis.

    The features of a window are channels x taps, in the order of a weight's ``[C, *kernel]`` flattened; there is one
    row for each output position. Outside the value there are zeros.

    Attributes:
        kernel: taps along each axis.
        strides: steps between windows.
        dilations: steps between taps.
        pads_begin: zeros before.
        pads_end: zeros after.

    Raises:
        PassError: the tuples do not fit together.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: tuple[int, ...]
    pads_end: tuple[int, ...]

    def __post_init__(self) -> None:
        each = (self.kernel, self.strides, self.dilations, self.pads_begin, self.pads_end)
        fits = 1 <= len(self.kernel) <= 3 and all(len(part) == len(self.kernel) for part in each)
        positive = all(n >= 1 for part in each[:3] for n in part) and all(n >= 0 for part in each[3:] for n in part)
        if not (fits and positive):
            raise PassError(
                f"{self} describes no windows",
                hint="give one to three entries in each field: kernel, strides and dilations >= 1, pads >= 0",
            )

    @property
    def spans(self) -> tuple[int, ...]:
        """Elements from a window's first tap to its last, both counted, along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


@total_ordering
@dataclass(frozen=True)
class Need:
    """One statistic of one value.

    Attributes:
        value: name of the value in the main graph.
        statistic: which.
        axis: channel axis for CHANNELS and GRAM (may be negative); ignored for HISTOGRAM.
        axes: for GRAM: channel axes joined in the order given, the last running fastest; ``(1, 3)`` makes
            directions x hidden features of an LSTM's [steps, directions, batch, hidden]. Empty: ``(axis,)``.
        patches: for GRAM: the features are those of a convolution's windows, and there are no axes to name.

    Raises:
        PassError: both axes and patches are given.
    """

    value: str
    statistic: Statistic = Statistic.HISTOGRAM
    axis: int = 1
    axes: tuple[int, ...] = ()
    patches: Patches | None = None

    def __post_init__(self) -> None:
        if self.axes and self.patches is not None:
            raise PassError(
                f"second moments of {self.value!r} are asked for over both axes {self.axes} and patches",
                hint="a window's features are fixed; leave axes out",
            )

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Need):
            return NotImplemented
        return self._order() < other._order()

    def _order(self) -> tuple[object, ...]:
        """Fields to sort by; whether there are patches comes first, as None and patches do not compare."""
        return self.value, self.statistic, self.axis, self.axes, self.patches is not None, self.patches

    @property
    def joined_axes(self) -> tuple[int, ...]:
        """The axes whose elements are the features of GRAM; empty where those are of patches."""
        return () if self.patches is not None else self.axes or (self.axis,)


@dataclass(frozen=True, order=True)
class Pair:
    """What a rewritten model reads somewhere, against how far off a value is behind it, row by row of the same feeds.

    Attributes:
        reads: GRAM of a value of the rewritten model.
        makes: GRAM of a value that both models have. It has to have as many rows, in the same order: the windows a
            Conv reads go with the positions of what it makes.

    Raises:
        PassError: one of them is another statistic.
    """

    reads: Need
    makes: Need

    def __post_init__(self) -> None:
        for need in (self.reads, self.makes):
            if need.statistic is not Statistic.GRAM:
                raise PassError(
                    f"{need.value!r} is paired by its {need.statistic}", hint="pairs are of second moments: GRAM"
                )


@dataclass(frozen=True)
class Histogram:
    """Counts over equal bins, with the exact extremes.

    Attributes:
        low: exact smallest value seen.
        high: exact largest value seen.
        edges_low: left edge of the first bin.
        bin_width: width of a bin, a power of two.
        counts: int64, shape (bins,).
    """

    low: float
    high: float
    edges_low: float
    bin_width: float
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChannelMoments:
    """Per-channel moments, each float64 of shape (channels,).

    Attributes:
        mean: mean over samples and positions.
        mean_square: mean of squares.
        absmax: largest absolute value.
    """

    mean: npt.NDArray[np.float64]
    mean_square: npt.NDArray[np.float64]
    absmax: npt.NDArray[np.float64]


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of n features, over rows of them.

    Attributes:
        matrix: float64, shape (n, n): mean of ``x x^T``, about zero and not about the mean; exactly symmetric.
        mean: float64, shape (n,), of the same rows.
        count: rows seen.
        first: the same of every second sample only; None where there was one sample.
    """

    matrix: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    count: int
    first: SecondMoments | None = None

    @property
    def halves(self) -> tuple[SecondMoments, SecondMoments] | None:
        """Of every second sample and of the others, to fit on one and to look at the other; None for one sample."""
        a = self.first
        if a is None:
            return None
        rest, whole = self.count - a.count, self.count
        matrix = (whole * self.matrix - a.count * a.matrix) / rest
        return a, SecondMoments(matrix, (whole * self.mean - a.count * a.mean) / rest, rest)

    def part(self, own: slice) -> SecondMoments:
        """Of some of the features."""
        first = None if self.first is None else self.first.part(own)
        return SecondMoments(self.matrix[own, own], self.mean[own], self.count, first)

    @property
    def covariance(self) -> npt.NDArray[np.float64]:
        """Second moments about the mean, shape (n, n); divided by the count and not by one less."""
        return self.matrix - np.outer(self.mean, self.mean)


@dataclass(frozen=True)
class CrossMoments:
    """Moments of n features x of a rewritten model and errors e of m others, over rows of both.

    An error is what the model before makes less what the rewritten one makes.

    Attributes:
        matrix: float64, shape (n, n): mean of ``x x^T``, about zero; exactly symmetric.
        cross: float64, shape (m, n): mean of ``e x^T``, about zero.
        mean: float64, shape (n,), of x.
        error: float64, shape (m,): mean of e.
        count: rows seen.
        first: the same of every second sample only; None where there was one sample.
    """

    matrix: npt.NDArray[np.float64]
    cross: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    count: int
    first: CrossMoments | None = None

    @property
    def halves(self) -> tuple[CrossMoments, CrossMoments] | None:
        """Of every second sample and of the others, to fit on one and to look at the other; None for one sample."""
        a = self.first
        if a is None:
            return None
        rest, whole = self.count - a.count, self.count

        def other(both: Array, half: Array) -> Array:
            return np.asarray((whole * both - a.count * half) / rest)

        return a, CrossMoments(
            other(self.matrix, a.matrix),
            other(self.cross, a.cross),
            other(self.mean, a.mean),
            other(self.error, a.error),
            rest,
        )


class Evidence:
    """What calibration learned; read-only.

    Args:
        histograms: by value name.
        channels: by (value name, axis).
        shapes: concrete shape of every value of the main graph in the first sample.
        samples: how many feeds were seen.
        synthetic: the feeds were made up, so ranges are not evidence of anything real.
        grams: by the need that asked for them.
        crosses: by the pair that asked for them.
    """

    def __init__(
        self,
        histograms: Mapping[str, Histogram] | None = None,
        channels: Mapping[tuple[str, int], ChannelMoments] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        samples: int = 0,
        synthetic: bool = False,
        grams: Mapping[Need, SecondMoments] | None = None,
        crosses: Mapping[Pair, CrossMoments] | None = None,
    ) -> None:
        self.histograms: Mapping[str, Histogram] = dict(histograms or {})
        self._channels = dict(channels or {})
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes or {})
        self.samples = samples
        self.synthetic = synthetic
        self._grams = dict(grams or {})
        self._crosses = dict(crosses or {})

    def joined(self, other: Evidence) -> Evidence:
        """Everything both know; ``other`` has the last word."""
        return Evidence(
            {**self.histograms, **other.histograms},
            {**self._channels, **other._channels},
            {**self.shapes, **other.shapes},
            max(self.samples, other.samples),
            self.synthetic or other.synthetic,
            {**self._grams, **other._grams},
            {**self._crosses, **other._crosses},
        )

    def has(self, need: Need | Pair) -> bool:
        """Whether the value was observed (a value inside a Loop body is not)."""
        if isinstance(need, Pair):
            return need in self._crosses
        if need.statistic is Statistic.HISTOGRAM:
            return need.value in self.histograms
        if need.statistic is Statistic.GRAM:
            return need in self._grams
        return (need.value, need.axis) in self._channels

    def histogram(self, value: str) -> Histogram:
        """Raises PassError if the pass did not ask for it in ``needs``."""
        if value not in self.histograms:
            raise PassError(f"no histogram of {value!r} was collected", hint="name it in the pass's needs()")
        return self.histograms[value]

    def channels(self, value: str, axis: int = 1) -> ChannelMoments:
        """Raises PassError if the pass did not ask for it in ``needs``."""
        if (value, axis) not in self._channels:
            raise PassError(
                f"no channel moments of {value!r} along axis {axis} were collected",
                hint="name them in the pass's needs()",
            )
        return self._channels[value, axis]

    def second_moments(self, need: Need) -> SecondMoments:
        """Raises PassError if the pass did not ask for exactly this in ``needs``."""
        if need not in self._grams:
            features = need.patches if need.patches is not None else f"axes {need.joined_axes}"
            raise PassError(
                f"no second moments of {need.value!r} over {features} were collected",
                hint="name them in the pass's needs(), and ask has() first: some values have none",
            )
        return self._grams[need]

    def cross_moments(self, pair: Pair) -> CrossMoments:
        """Raises PassError if the pass did not ask for exactly this in ``settling``."""
        if pair not in self._crosses:
            raise PassError(
                f"no moments of {pair.reads.value!r} against errors of {pair.makes.value!r} were collected",
                hint="name them in the pass's settling(), and ask has() first: some values have none",
            )
        return self._crosses[pair]
