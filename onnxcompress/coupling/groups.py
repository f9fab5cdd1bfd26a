"""Groups: positions of tensors that can only go together.

part    a factor of one axis, and for each of its positions the atom it belongs to
atom    the least that can be removed: one channel with all its weights, one head, ...
group   a connected component of the graph over (tensor, axis, factor)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.coupling.axes import Axis, Factor

__all__ = ["Group", "Part", "Pin", "Reader"]


@dataclass(frozen=True)
class Pin:
    """Why positions have to stay.

    Attributes:
        axis: of which tensor.
        node: name of the node that says so; empty for inputs and outputs of the model.
        reason: in words.
    """

    axis: Axis
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.axis})" if not self.node else f"{self.reason} ({self.axis}, node {self.node!r})"


@dataclass(frozen=True)
class Reader:
    """A linear operator that sums over an axis, so that its weights can make up for what is removed.

    Attributes:
        node: its name.
        index: which of its inputs is the weight.
        weight: the axis of the weight that is summed over.
        data: the axis of the data it is multiplied with; None if that is no value of the graph (a state).
        outputs: axis of the weight that is not summed over first; the rest are taps.
    """

    node: str
    index: int
    weight: Axis
    data: Axis | None
    outputs: int


@dataclass(frozen=True, eq=False)
class Part:
    """A factor of one axis in a group.

    Attributes:
        factor: which.
        atoms: atom of each position, shape (size of the factor,).
    """

    factor: Factor
    atoms: npt.NDArray[np.int64]

    def along(self, factors: Sequence[int]) -> npt.NDArray[np.int64]:
        """Atom of each position of the whole axis.

        Args:
            factors: sizes of the factors of the axis, outermost first.
        """
        inner = math.prod(factors[self.factor.place + 1 :])
        return self.atoms[np.arange(math.prod(factors)) // inner % factors[self.factor.place]]


@dataclass(frozen=True, eq=False)
class Group:
    """Positions that go together.

    Attributes:
        key: name of the node that makes it; unique among groups, with the unit behind it ("attn:heads") in the
            rare case that more groups than nodes meet in one place.
        unit: what an atom is, in the plural ("channels", "heads", "neurons", "hidden units", ...).
        size: how many atoms.
        parts: every axis concerned.
        fixed: atoms that have to stay, bool, shape (size,).
        pins: why, the most telling first.
        nodes: names of the nodes concerned, in execution order.
        readers: linear operators that sum over it.
        makers: axes of weights and other constants that are not summed over.
        unweighted: names of the nodes that sum over it without a weight (queries times keys).
    """

    key: str
    unit: str
    size: int
    parts: tuple[Part, ...]
    fixed: npt.NDArray[np.bool_]
    pins: tuple[Pin, ...]
    nodes: tuple[str, ...]
    readers: tuple[Reader, ...]
    makers: tuple[Axis, ...]
    unweighted: tuple[str, ...] = ()

    @property
    def free(self) -> int:
        """How many atoms may be removed."""
        return int(self.size - self.fixed.sum())

    @property
    def pinned(self) -> bool:
        """Whether nothing may be removed."""
        return not self.free

    def why_fixed(self) -> str:
        """The first reasons, in words; the same one of another node is not said again."""
        reasons = list({pin.reason: pin for pin in reversed(self.pins)}.values())[::-1]
        reasons.sort(key=self.pins.index)
        more = len(reasons) - 2
        return "; ".join(map(str, reasons[:2])) + (f"; and {more} more" if more > 0 else "")
