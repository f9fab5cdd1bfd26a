"""States of channels: the constant all their elements have, and a label.

Channels of one tensor with the same label hold the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.coupling import Coupling, Part

__all__ = ["End", "State", "by_position", "common", "whole"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class State:
    """Of the channels of a tensor, by atom of one group.

    Attributes:
        constant: what all elements are; NaN where that is not known. float64, shape (atoms,).
        label: equal where the elements are. int64, shape (atoms,).
    """

    constant: npt.NDArray[np.float64]
    label: Indices

    @property
    def zero(self) -> Mask:
        """Atoms whose elements are all zero."""
        return np.asarray(self.constant == 0)


@dataclass(frozen=True, eq=False)
class End:
    """Where atoms of a group are summed over.

    Attributes:
        node: the operator.
        state: of what is multiplied.
        zero: atoms that add nothing, whatever the weight.
        index: which input is the weight; -1 where two computed values are multiplied.
        part: of the group, on the weight; None without a weight.
        makes: axis of the weight that makes the output.
    """

    node: str
    state: State
    zero: Mask
    index: int = -1
    part: Part | None = None
    makes: int = -1


def by_position(array: Array, dim: int, part: Part, coupling: Coupling) -> Array:
    """The array with the positions of a part first: (positions, rest ...)."""
    sizes = coupling.factors(part.factor.axis)
    shape = (*array.shape[:dim], *sizes, *array.shape[dim + 1 :])
    return np.moveaxis(array.reshape(shape), dim + part.factor.place, 0)


def whole(mask: Mask, part: Part, coupling: Coupling) -> Mask:
    """A mask over a factor, over the whole axis."""
    sizes = coupling.factors(part.factor.axis)
    shape = [size if k == part.factor.place else 1 for k, size in enumerate(sizes)]
    return np.broadcast_to(mask.reshape(shape), sizes).reshape(-1)


def common(found: Iterable[tuple[Array, Part]], count: int) -> npt.NDArray[np.float64]:
    """By atom, the number that all its positions have; NaN where they differ or there is none."""
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    for numbers, part in found:
        known = np.isfinite(numbers)
        np.minimum.at(low, part.atoms, np.where(known, numbers, -np.inf))
        np.maximum.at(high, part.atoms, np.where(known, numbers, np.inf))
    return np.where(low == high, low, np.nan)
