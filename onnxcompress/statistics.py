"""What a pass may ask calibration to learn about a value, and what it gets.

All statistics are streaming: their size depends on the model and not on the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import PassError

__all__ = ["ChannelMoments", "Evidence", "Histogram", "Need", "RangeMethod", "Statistic"]

Array = npt.NDArray[Any]


class Statistic(StrEnum):
    """Kinds of evidence."""

    HISTOGRAM = "histogram"
    """Exact minimum and maximum, and a histogram of the values."""
    CHANNELS = "channels"
    """Per channel: mean, mean square, absolute maximum."""


class RangeMethod(StrEnum):
    """How a clipping range is read off a histogram."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


@dataclass(frozen=True, order=True)
class Need:
    """One statistic of one value.

    Attributes:
        value: name of the value in the main graph.
        statistic: which.
        axis: channel axis for CHANNELS (may be negative); ignored for HISTOGRAM.
    """

    value: str
    statistic: Statistic = Statistic.HISTOGRAM
    axis: int = 1


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


class Evidence:
    """What calibration learned; read-only.

    Args:
        histograms: by value name.
        channels: by (value name, axis).
        shapes: concrete shape of every value of the main graph in the first sample.
        samples: how many feeds were seen.
        synthetic: the feeds were made up, so ranges are not evidence of anything real.
    """

    def __init__(
        self,
        histograms: Mapping[str, Histogram] | None = None,
        channels: Mapping[tuple[str, int], ChannelMoments] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        samples: int = 0,
        synthetic: bool = False,
    ) -> None:
        self.histograms: Mapping[str, Histogram] = dict(histograms or {})
        self._channels = dict(channels or {})
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes or {})
        self.samples = samples
        self.synthetic = synthetic

    def joined(self, other: Evidence) -> Evidence:
        """Everything both know; ``other`` has the last word."""
        return Evidence(
            {**self.histograms, **other.histograms},
            {**self._channels, **other._channels},
            {**self.shapes, **other.shapes},
            max(self.samples, other.samples),
            self.synthetic or other.synthetic,
        )

    def has(self, need: Need) -> bool:
        """Whether the value was observed (a value inside a Loop body is not)."""
        if need.statistic is Statistic.HISTOGRAM:
            return need.value in self.histograms
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
