"""A chain of convolutions in the place of one: drawn, worked out group by group, and measured.

What a chain loses is measured by the weight it amounts to: |(W - W') x|^2 over |W x|^2 in the second moments of x,
about the mean where the bias of the last link makes up for that.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import PassError
from onnxcompress.passes._conv_layer import ConvLayer, Seen
from onnxcompress.passes._forms import Factors, Form, Ranks, Settings
from onnxcompress.sketch import Drawn, Slot
from onnxcompress.statistics import Evidence, Need, SecondMoments

__all__ = ["ConvForm", "Link", "balanced", "pointwise", "root"]

Array = npt.NDArray[np.float64]

P = TypeVar("P")
"""What a form works out once for all ranks."""

_ORDINALS = ("first", "second", "third")


@dataclass(frozen=True)
class Link:
    """One convolution of a chain.

    Attributes:
        shape: of its weight.
        axes: the spatial axes whose strides, dilations and pads it has.
        groups: of channels.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    groups: int


@dataclass(eq=False)
class ConvForm(Form, Generic[P]):
    """A chain of convolutions in the place of one.

    Attributes:
        layer: the one.
    """

    layer: ConvLayer

    @abstractmethod
    def links(self, ranks: Ranks) -> tuple[Link, ...]:
        """The chain, in the order it runs."""

    @abstractmethod
    def prepared(self, weight: Array, seen: Seen) -> P:
        """What serves all ranks of one group; ``weight`` is (outputs, channels, *kernel)."""

    @abstractmethod
    def group_factors(self, weight: Array, ranks: Ranks, seen: Seen, prepared: P) -> tuple[Array, ...]:
        """Weights of the links for one group: (outputs, channels, *kernel) each."""

    @abstractmethod
    def composed(self, factors: tuple[Array, ...]) -> Array:
        """The weight that a chain amounts to, (outputs, channels, *kernel)."""

    def needs(self) -> tuple[Need, ...]:
        """Second moments of windows, or of channels."""
        return () if self.layer.need is None else (self.layer.need,)

    def drawing(self, ranks: Ranks) -> tuple[Drawn, ...]:
        """The chain; only its last link has a bias."""
        links, drawn, read = self.links(ranks), [], self.layer.read
        for index, (link, weight) in enumerate(zip(links, self._slots(ranks), strict=True)):
            last = index == len(links) - 1
            made = self.layer.made if last else f"{self.layer.made}//{weight.name}"
            bias = self.layer.last_bias() if last else None
            drawn.append(self.layer.link(weight, read, made, link.axes, link.groups, bias))
            read = made
        return tuple(drawn)

    def factors(self, ranks: Ranks, evidence: Evidence, settings: Settings) -> Factors:
        """Weights of the chain, and the bias that keeps the mean.

        Raises:
            PassError: ranks are out of bounds, or a weight is not finite.
        """
        if len(ranks) != len(self.most) or not all(1 <= r <= m for r, m in zip(ranks, self.most, strict=True)):
            raise PassError(
                f"node {self.layer.name!r} has no {self.name} form of rank {ranks}",
                hint=f"give {len(self.most)} of 1 to {self.most}",
            )
        found = self.layer.moments(evidence, settings)
        groups = self.remembered(found, settings, lambda: self._groups(found, settings))
        old, seen = [weight for weight, _, _ in groups], [of for _, of, _ in groups]
        parts = [self.group_factors(weight, ranks, of, prepared) for weight, of, prepared in groups]
        change = [weight - self.composed(part) for weight, part in zip(old, parts, strict=True)]
        energy = sum(of.energy(weight) for weight, of in zip(old, seen, strict=True))
        error = sum(of.energy(weight) for weight, of in zip(change, seen, strict=True))
        weights = {
            slot: np.concatenate(same).reshape(slot.shape).astype(np.float32)
            for slot, same in zip(self._slots(ranks), zip(*parts, strict=True), strict=True)
        }
        bias = self.layer.last_bias()
        if isinstance(bias, Slot):
            constant = self.layer.bias
            begin = np.zeros(bias.shape) if not isinstance(constant, ir.TensorProtocol) else constant.numpy()
            shifts = [
                np.zeros(len(weight)) if of.mean is None else weight.reshape(len(weight), -1) @ of.mean
                for weight, of in zip(change, seen, strict=True)
            ]
            weights[bias] = (begin + np.concatenate(shifts)).astype(np.float32)
        return Factors(weights, error / energy if energy > 0 else (0.0 if error == 0 else float("inf")))

    def _groups(self, found: SecondMoments | None, settings: Settings) -> list[tuple[Array, Seen, P]]:
        seen = self.layer.seen(found, settings)
        return [(w, of, self.prepared(w, of)) for w, of in zip(self.layer.weight(), seen, strict=True)]

    def _slots(self, ranks: Ranks) -> tuple[Slot, ...]:
        links = self.links(ranks)
        names = (*_ORDINALS[: len(links) - 1], "last")
        return tuple(Slot(link.shape, name) for link, name in zip(links, names, strict=True))


def root(second: Array) -> tuple[Array, Array]:
    """Symmetric square root of a metric, and its inverse."""
    values, vectors = np.linalg.eigh(second)
    size = np.sqrt(np.maximum(values, float(values[-1]) * np.finfo(np.float64).eps))
    return (vectors * size) @ vectors.T, (vectors / size) @ vectors.T


def balanced(left: Array, right: Array, size: Array) -> tuple[Array, Array]:
    """The same product with the size of each direction split evenly.

    Args:
        left: (..., rank).
        right: (rank, ...).
        size: root mean square of what ``right`` makes, (rank,).
    """
    own = np.sqrt(np.square(left).reshape(-1, left.shape[-1]).sum(axis=0))
    fit = (own > 0) & (size > 0)
    scale = np.where(fit, np.sqrt(own / np.where(fit, size, 1.0)), 1.0)
    return left / scale, right * scale.reshape(-1, *(1,) * (right.ndim - 1))


def pointwise(matrix: Array, axes: int) -> Array:
    """A matrix as the weight of a convolution of one tap in so many dimensions."""
    return matrix.reshape(*matrix.shape, *(1,) * axes)
