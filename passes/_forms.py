"""What a low-rank form of a layer is: fewer weights in more nodes, and how these weights are worked out.

A layer y = W x is given by its weight as maps (outputs, features); what it reads, x, may be windows of a feature map.
A form writes W as a product through ``rank`` numbers:

    y = U (V x) + b      V (rank, features), U (outputs, rank)

Forms differ in which features V may mix (all of a window; the channels at one tap; the taps along one axis) and so in
what nodes come out. Their weights are those that lose least of y on what calibration saw of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast
from weakref import ref

import numpy as np
import numpy.typing as npt

from onnxcompress.sketch import Drawn, Slot, slots
from onnxcompress.statistics import Evidence, Need, SecondMoments

__all__ = ["Factors", "Form", "Ranks", "Settings"]

T = TypeVar("T")

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
        shifts: by name of a MatMul's output, what is to be added to it (outputs,) to keep its mean; nodes with a bias
            have it in a slot.
    """

    weights: Mapping[Slot, npt.NDArray[np.float32]]
    lost: float
    shifts: Mapping[str, Array] = field(default_factory=dict)


@dataclass(eq=False)
class Form(ABC):
    """One way to write one layer with fewer weights.

    Attributes:
        name: of the form, short: "svd", "spatial", "tucker".
        nodes: names of the nodes it takes the place of; the first is the layer's.
        old_weights: how many weights the layer has.
        stored: only the file has the factors: they are multiplied when the model is loaded.
    """

    stored: ClassVar[bool] = False

    name: str
    nodes: tuple[str, ...]
    old_weights: int

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

    def losses(self, rungs: Sequence[Ranks], evidence: Evidence, settings: Settings) -> dict[Ranks, float]:
        """What is lost at each of several ranks; by working out their factors, where a form knows no quicker way."""
        return {ranks: self.factors(ranks, evidence, settings).lost for ranks in rungs}

    def remembered(self, moments: SecondMoments | None, settings: Settings, make: Callable[[], T]) -> T:
        """What serves all ranks, made once; that of the form asked last is kept, so memory does not grow."""
        return _latest.get(self, moments, settings, make)

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


class _Latest:
    """One result, of the form, the moments and the settings asked for last."""

    def __init__(self) -> None:
        self._form: ref[Form] | None = None
        self._matrix: ref[Array] | None = None
        self._settings: Settings | None = None
        self._result: Any = None

    def get(self, form: Form, moments: SecondMoments | None, settings: Settings, make: Callable[[], T]) -> T:
        matrix = None if moments is None else moments.matrix
        same = self._form is not None and self._form() is form and self._settings == settings
        if matrix is None or self._matrix is None:  # moments that are gone by now are not the same as none
            same = same and matrix is None and self._matrix is None
        else:
            same = same and self._matrix() is matrix
        if not same:
            self._result = None
            self._result = make()
            self._form, self._settings = ref(form), settings
            self._matrix = None if matrix is None else ref(matrix)
        return cast(T, self._result)


_latest = _Latest()
