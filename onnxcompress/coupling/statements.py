"""Two kinds of statement about axes, and how each carries a split into factors along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.coupling.axes import Axis, Strides, joined, merged

__all__ = ["Pick", "Same", "split_pick", "split_same"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Same:
    """Axes read row-major are the same positions as others read row-major."""

    node: str
    left: tuple[Axis, ...]
    right: tuple[Axis, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.left, *self.right)


@dataclass(frozen=True, eq=False)
class Pick:
    """Position i of one axis is position ``indices[i]`` of another."""

    node: str
    part: Axis
    whole: Axis
    indices: Indices

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.part, self.whole)


def split_same(
    statement: Same, sizes: Mapping[Axis, int], chains: Mapping[Axis, Strides]
) -> dict[Axis, Strides] | None:
    """Strides both sides need so that each factor on the left is one on the right; None if there are none."""
    left, right = statement.left, statement.right
    if len(left) == len(right) == 1:
        a, b = chains.get(left[0], ()), chains.get(right[0], ())
        if a == b:
            return {}
        both = merged(a, b)
        return None if both is None else {left[0]: both, right[0]: both}
    both = merged(*(joined([sizes[a] for a in side], [chains.get(a, ()) for a in side]) for side in (left, right)))
    if both is None:
        return None
    found: dict[Axis, Strides] = {}
    for side in (left, right):
        base = 1
        for axis in reversed(side):
            top = base * sizes[axis]
            inner = [s for s in both if base < s < top]
            if any(s % base for s in inner):
                return None
            strides = tuple(s // base for s in inner)
            if found.setdefault(axis, strides) != strides:  # the same axis twice: a diagonal
                return None
            base = top
    return found


def split_pick(
    statement: Pick, sizes: Mapping[Axis, int], chains: Mapping[Axis, Strides]
) -> dict[Axis, Strides] | None:
    """Strides both axes need so that just one factor is picked from; None if there are none."""
    part, whole, indices = statement.part, statement.whole, statement.indices
    inner, outer = chains.get(part, ()), chains.get(whole, ())
    size, total = sizes[part], sizes[whole]
    if not inner and not outer:
        return {}
    down = [s for s in outer if s < size and not _constant(indices // s)]
    both = merged(inner, down)
    if both is None or any(size % s or total % s or not _in_blocks(indices, s) for s in both):
        return None
    if any(not _constant(indices // s) for s in outer if s not in both):
        return None
    up = merged(outer, both)
    return None if up is None else {part: both, whole: up}


def _constant(values: Indices) -> bool:
    return bool((values == values[0]).all()) if values.size else True


def _in_blocks(indices: Indices, size: int) -> bool:
    blocks = indices.reshape(-1, size)
    return bool((blocks == blocks[:, :1] + np.arange(size)).all() and (blocks[:, 0] % size == 0).all())
