"""Axes of tensors, and how they split into factors.

An axis of 768 that a Reshape turns into (12, 64) is a product: removing head 3 takes its positions
192..255 away, removing width 5 of every head takes 5, 69, 133, ... Both are possible at once, and what is
kept is always a product of what is kept of the factors. So the thing that shrinks is not an axis but a
factor of one. Factors are held as strides: 768 = 12 x 64 has the inner stride 64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["Axis", "Factor", "Strides", "factors", "joined", "merged", "regroup"]

Strides = tuple[int, ...]
"""Positions an inner factor covers, ascending, without 1 and the whole: (64,) for 768 = 12 x 64."""


class Axis(NamedTuple):
    """An axis of a tensor.

    Attributes:
        value: name of the tensor; of none, for sizes that only an attribute has ("conv1:groups").
        dim: which, from 0; -1 where there is no tensor.
        use: "node:input" where each reader of a small weight gets a copy of its own; else empty.
    """

    value: str
    dim: int
    use: str = ""

    def __str__(self) -> str:
        return f"{self.value}[{self.dim}]" if self.dim >= 0 else self.value


class Factor(NamedTuple):
    """A factor of an axis, the outermost first."""

    axis: Axis
    place: int


def factors(size: int, strides: Strides) -> tuple[int, ...]:
    """Sizes of the factors, outermost first.

    >>> factors(768, (64,)), factors(768, (8, 64)), factors(5, ())
    ((12, 64), (12, 8, 8), (5,))
    """
    chain = (1, *strides, size)
    return tuple(b // a for a, b in reversed(list(itertools.pairwise(chain))))


def merged(*chains: Iterable[int]) -> Strides | None:
    """Strides of all chains together; None if they do not nest.

    >>> merged((64,), (8,)), merged((64,), (48,))
    ((8, 64), None)
    """
    union = sorted({s for chain in chains for s in chain})
    nested = all(b % a == 0 for a, b in itertools.pairwise(union))
    return tuple(union) if nested else None


def joined(sizes: Sequence[int], chains: Sequence[Strides]) -> Strides:
    """Strides of axes read as one, row-major.

    >>> joined((12, 64), ((), (8,)))
    (8, 64)
    """
    found: list[int] = []
    base, total = 1, math.prod(sizes)
    for size, chain in zip(reversed(sizes), reversed(chains), strict=True):
        found += [base * s for s in chain]
        base *= size
        if base < total:
            found.append(base)
    return tuple(sorted(set(found)))


def regroup(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Which axes of a reshaped tensor come of which: the finest runs of equal products.

    Example:
        >>> [tuple(map(list, pair)) for pair in regroup((2, 7, 768), (2, 7, 12, 64))]
        [([0], [0]), ([1], [1]), ([2], [2, 3])]
        >>> [tuple(map(list, pair)) for pair in regroup((2, 6, 5), (3, 4, 5))]
        [([0, 1], [0, 1]), ([2], [2])]
    """
    i = j = 0
    while i < len(before) and j < len(after):
        a, b = i + 1, j + 1
        left, right = before[i], after[j]
        while left != right:
            if left < right and a < len(before):
                left *= before[a]
                a += 1
            elif right < left and b < len(after):
                right *= after[b]
                b += 1
            else:
                return
        yield range(i, a), range(j, b)
        i, j = a, b
