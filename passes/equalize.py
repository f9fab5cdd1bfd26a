"""Equalization: channels of a value get similar ranges, so that one integer scale suits them all.

    W2 f(W1 x) = (W2 S) f(S^-1 W1 x)        S diagonal and positive, f positively homogeneous

``W1`` makes the value: a Conv, Gemm, MatMul, the gain and bias of a normalization or a constant
factor. ``W2`` are the weights of all its readers. f may be nothing, Relu, PRelu, LeakyRelu, pooling or
a product with another value, but not Clip or HardSwish. Two closed forms of S are tried and the one
with less predicted noise is taken:

    s_j = sqrt(r1_j / r2_j)                             Nagel et al. 2019, arXiv 1906.04721
    s_j = max|X_j|^alpha / max|W2_j|^(1 - alpha)        SmoothQuant, Xiao et al. 2022, arXiv 2211.10438

r1_j and r2_j are the largest absolute weights of channel j in W1 and W2. S is rounded to powers of two:
then every product and sum in floating point is scaled exactly, and the model's outputs do not change
by a bit. What it is for is the predicted rounding noise of the readers in int8,

    step_x^2 / 12 * sum W2^2  +  sum_o step_o^2 / 12 * E[x^2]

with one step for the value and one per output channel of the weights; a value is left alone where it
falls by less than ``min_gain_db``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.errors import PassOptionError
from onnxcompress.passes._channel_scaling import Part, Scaling, scaling_of
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import ChannelMoments, Evidence, Need, Statistic
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["Equalize", "cross_layer_scales", "rounding_noise", "smoothing_scales"]

Array = npt.NDArray[np.float64]

_LINEAR = ("Conv", "Gemm", "MatMul")
_LIMIT = 12.0  # powers of two: beyond, a channel is dead rather than small


@dataclass(frozen=True)
class Equalize(Pass):
    """Balances channel ranges between layers (cross-layer equalization, SmoothQuant), exactly."""

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = Stage.EQUALIZE
    ops: ClassVar[tuple[str, ...]] = _LINEAR
    lossless: ClassVar[bool] = True
    alpha: float = 0.5
    """How much of the range of activations moves into the weights: 0 nothing, 1 all."""
    min_gain_db: float = 3.0
    """Predicted fall of int8 rounding noise below which a value is left alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PassOptionError(f"alpha is {self.alpha}", hint="choose it between 0 and 1")

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        if view.quantized_nodes:
            return
        seen: set[str] = set()
        for node in view.nodes(*_LINEAR, subgraphs=False):
            value = node.inputs[0]
            producer = None if value is None else value.producer()
            if value is None or producer is None or view.weight(node.inputs[1]) is None or str(producer.name) in seen:
                continue
            seen.add(str(producer.name))
            try:
                scaling = scaling_of(value, view)
            except Skip as skip:
                yield Skipped(str(producer.name), skip.reason)
            else:
                parts = (*scaling.makers, *scaling.readers)
                yield Site(str(producer.name), tuple(dict.fromkeys((str(producer.name), *(p.node for p in parts)))))

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        scaling = scaling_of(view.node(choice.site.key).outputs[0], view)
        return (Need(scaling.value, Statistic.CHANNELS, scaling.axis),)

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return [Choice(site, f"alpha {self.alpha:g}", calibrated=True, effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        scaling = scaling_of(rewriter.node(choice.site.key).outputs[0], rewriter.view())
        if evidence.synthetic or not evidence.has(Need(scaling.value, Statistic.CHANNELS, scaling.axis)):
            raise Skip(f"{scaling.value!r} was not observed on real data")
        moments = evidence.channels(scaling.value, scaling.axis)
        if len(moments.absmax) != scaling.channels:
            raise Skip(f"{scaling.value!r} has {len(moments.absmax)} channels where {scaling.channels} are read")
        weights = [(part, _array(rewriter, part)) for part in scaling.readers]
        read = np.max([_ranges(array, part, scaling.channels) for part, array in weights], axis=0)
        made = _made(rewriter, scaling)
        before = rounding_noise(np.ones(scaling.channels), weights, moments, rectified=scaling.rectified)
        best, gain = None, -np.inf
        for wanted in (cross_layer_scales(made, read), smoothing_scales(moments.absmax, read, self.alpha)):
            scales = _powers_of_two(wanted)
            after = rounding_noise(scales, weights, moments, rectified=scaling.rectified)
            change = 10 * np.log10(before / after) if before > 0 and after > 0 else 0.0
            if change > gain:
                best, gain = scales, change
        if best is None or gain < self.min_gain_db:
            raise Skip(f"predicted gain {max(gain, 0.0):.1f} dB is below {self.min_gain_db:g} dB")
        for part in scaling.makers:
            part.scale(rewriter, 1 / best)
        for part in scaling.readers:
            part.scale(rewriter, best)


def cross_layer_scales(made: Array, read: Array) -> Array:
    """Scales after which the weights that make and read a channel have equal ranges (Nagel et al. 2019)."""
    return np.sqrt(_ratio(made, read))


def smoothing_scales(activations: Array, read: Array, alpha: float) -> Array:
    """Scales that move a share ``alpha`` of the activations' ranges into the weights (Xiao et al. 2022)."""
    return _ratio(activations**alpha, read ** (1 - alpha))


def rounding_noise(
    scales: Array, readers: Iterable[tuple[Part, npt.NDArray[np.float32]]], moments: ChannelMoments, *, rectified: bool
) -> float:
    """Variance that int8 rounding adds to all outputs of the readers, summed over output channels.

    Args:
        scales: what the value is divided by and the weights are multiplied by, per channel.
        readers: weights and where their channels are.
        moments: of the value before scaling.
        rectified: the value uses half of a symmetric range.
    """
    span = float((moments.absmax / scales).max()) * (1 if rectified else 2)
    step, power = span / 255, moments.mean_square / scales**2
    total = 0.0
    for part, array in readers:
        weight = array.astype(np.float64) * part.spread(scales, array.shape)
        outputs = 1 if weight.ndim == 2 and part.axis == -2 else 0
        rows = np.moveaxis(weight, outputs, 0)
        energies = np.broadcast_to(np.moveaxis(part.spread(power, array.shape) + 0 * weight, outputs, 0), rows.shape)
        axes = tuple(range(1, rows.ndim))
        steps = 2 * np.abs(rows).max(axis=axes) / 254
        total += float(step**2 * (rows**2).sum() + (steps**2 * energies.sum(axis=axes)).sum()) / 12
    return total


def _array(rewriter: Rewriter, part: Part) -> npt.NDArray[np.float32]:
    value = rewriter.node(part.node).inputs[part.index]
    if value is None or value.const_value is None:
        raise Skip(f"input {part.index} of {part.node!r} is not constant any more")
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array


def _made(rewriter: Rewriter, scaling: Scaling) -> Array:
    """Largest absolute weight that makes each channel; biases do not count."""
    part = scaling.makers[0]
    return _ranges(_array(rewriter, part), part, scaling.channels)


def _ranges(array: npt.NDArray[np.float32], part: Part, channels: int) -> Array:
    """Largest absolute value of the constant per channel."""
    if part.groups > 1:  # (outputs, inputs / groups, ...): channels of group g are read by its block of outputs
        blocks = np.abs(array).reshape(part.groups, -1, *array.shape[1:])
        largest = blocks.max(axis=(1, *range(3, blocks.ndim))).reshape(channels)
    else:
        axis = array.ndim + part.axis
        largest = np.abs(array).max(axis=tuple(i for i in range(array.ndim) if i != axis))
    return np.asarray(largest, np.float64)


def _ratio(above: Array, below: Array) -> Array:
    """Quotient per channel; 1 where a channel is dead on either side."""
    alive = (above > 0) & (below > 0)
    return np.where(alive, np.divide(above, below, where=alive, out=np.ones_like(above)), 1.0)


def _powers_of_two(scales: Array) -> Array:
    """The nearest powers of two, around 1: a common factor changes nothing in int8."""
    exponents = np.log2(scales)
    return np.asarray(np.exp2(np.clip(np.round(exponents - np.median(exponents)), -_LIMIT, _LIMIT)))
