"""What a low-rank form of a layer is: fewer weights in more nodes, and how these weights are worked out.

A layer y = W x is given by its weight as maps (outputs, features); what it reads, x, may be windows of a feature map.
A form writes W as a product through ``rank`` numbers:

    y = U (V x) + b      V (rank, features), U (outputs, rank)

Forms differ in which features V may mix (all of a window; the channels at one tap; the taps along one axis) and so in
what nodes come out. Their weights are those that lose least of y on what calibration saw of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxcompress.sketch import Drawn, Slot, slots
from onnxcompress.statistics import Evidence, Need

__all__ = ["Factors", "Form", "Ranks", "Settings"]

Array = npt.NDArray[np.float64]

Ranks = tuple[int, ...]
"""Extents of the new inner axes of a form: one, or two for Tucker-2 (inner channels read, inner channels made)."""


@dataclass(frozen=True)
class Settings:
    """How factors are worked out.

    Attributes:
        aware: weigh errors by what calibration saw; if not, all features count alike (plain SVD).
        ridge: share of an even weight for all features, so that what was not seen counts a little.
    """

    aware: bool = True
    ridge: float = 1e-4


@dataclass(frozen=True, eq=False)
class Factors:
    """Weights of a form.

    Attributes:
        weights: one array for every slot of the drawing.
        lost: E|y - y'|^2 / E|y|^2 on what was seen (about the mean where a bias makes up for it); by the weights
            alone where nothing was seen.
        shift: what is to be added to the layer's output (outputs,) to keep its mean; None for nothing, or where the
            slots hold it already.
    """

    weights: Mapping[Slot, npt.NDArray[np.float32]]
    lost: float
    shift: Array | None = None


@dataclass(eq=False)
class Form(ABC):
    """One way to write one layer with fewer weights.

    Attributes:
        name: of the form, short: "svd", "spatial", "tucker".
        nodes: names of the nodes it takes the place of; the first is the layer's.
        old_weights: how many weights the layer has.
    """

    name: str
    nodes: tuple[str, ...]
    old_weights: int
    _last: tuple[object, Ranks, Factors] | None = field(default=None, init=False, repr=False)

    @property
    @abstractmethod
    def most(self) -> Ranks:
        """The ranks at which it is exact: those of min(m, n)."""

    @abstractmethod
    def drawing(self, ranks: Ranks) -> tuple[Drawn, ...]:
        """The nodes at these ranks; the last outputs have the names of those that are replaced."""

    @abstractmethod
    def needs(self) -> tuple[Need, ...]:
        """What has to be observed to weigh errors; empty where it cannot be."""

    @abstractmethod
    def factors(self, ranks: Ranks, evidence: Evidence, settings: Settings) -> Factors:
        """Weights that lose least at these ranks.

        Without evidence (``evidence.has(need)`` is False, or ``evidence.synthetic``) all features count alike.
        """

    def weights(self, ranks: Ranks) -> int:
        """How many weights it has at these ranks."""
        return sum(int(np.prod(slot.shape)) for slot in slots(self.drawing(ranks)))

    def at_share(self, share: float, step: int) -> Ranks | None:
        """The largest ranks in whole steps with at most this share of the layer's weights; None if there are none.

        Args:
            share: of :attr:`old_weights`.
            step: ranks are multiples of it.
        """
        best: Ranks | None = None
        for ranks in self.ladder(step):
            if self.weights(ranks) <= share * self.old_weights:
                best = ranks
        return best

    def ladder(self, step: int) -> Sequence[Ranks]:
        """All ranks in whole steps below the exact ones, ascending; ranks that come in pairs grow in proportion."""
        most = self.most
        longest = max(most)
        found: list[Ranks] = []
        for top in range(step, longest, step):
            ranks = tuple(max(step, min(m, round(top * m / longest / step) * step)) for m in most)
            if ranks != most and all(r <= m for r, m in zip(ranks, most, strict=True)) and ranks not in found:
                found.append(ranks)
        return found
