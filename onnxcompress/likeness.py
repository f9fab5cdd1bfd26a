"""Which large tensors are nearly equal, without comparing all with all.

**How near.** SQNR = 10 log10(sum x**2 / sum (x - y)**2), x the tensor that gives way, y the one that stays.

**Who is asked.** A sketch z of x has 32 numbers: elements get random signs and are summed up in 32 groups (a
CountSketch: Charikar, Chen, Farach-Colton 2002). It is linear, so z(x) - z(y) = z(x - y), and |z(d)|**2 has the mean
|d|**2 and a standard deviation of at most a quarter of that (sqrt(2 / 32)). Pairs whose sketches are more than twice as
far apart as allowed, 12 standard deviations, are never compared; tensors that have nothing to do with each other are 40
times too far apart at 40 dB. The norm alone would not do: those of unrelated tensors of 10**6 normal numbers differ by
0.07 %, and 40 dB is 1 %.

Tensors are read in blocks of 1 MiB, so memory does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK_BYTES", "Gallery", "Sketch", "floats", "sketch", "sqnr_db"]

BLOCK_BYTES = 1 << 20
"""Bytes of a tensor looked at together; blocks of a sketch are of this size, but for the last."""

_GROUPS = 32
_MARGIN = 4.0
_SEED = 0x5EED

Floats = npt.NDArray[np.float32]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Sketch:
    """What is kept of a tensor.

    Attributes:
        energy: sum of its squares.
        groups: 32 sums of elements with random signs.
    """

    energy: float
    groups: npt.NDArray[np.float64]


def sketch(blocks: Iterable[Floats]) -> Sketch | None:
    """The sketch of a tensor, given as blocks of ``BLOCK_BYTES``; None if it holds NaN or infinity."""
    groups, energy = np.zeros(_GROUPS), 0.0
    for number, block in enumerate(blocks):
        part = float(np.einsum("i,i->", block, block, dtype=np.float64))
        if not math.isfinite(part):
            return None
        energy += part
        padded = np.zeros(-(-block.size // _GROUPS) * _GROUPS, np.float32)
        bits = np.random.default_rng([_SEED, number]).bytes(padded.size // 8)
        signs = np.unpackbits(np.frombuffer(bits, np.uint8))[: block.size]
        padded[: block.size] = np.where(signs, block, -block)
        groups += padded.reshape(-1, _GROUPS).sum(0, dtype=np.float64)
    return Sketch(energy, groups)


def sqnr_db(tensor: Iterable[Floats], stand_in: Iterable[Floats]) -> float:
    """SQNR in dB of a tensor that another takes the place of, both given as equal blocks; inf if they are equal."""
    signal = noise = 0.0
    for x, y in zip(tensor, stand_in, strict=True):
        difference = x.astype(np.float64) - y
        signal += float(np.einsum("i,i->", x, x, dtype=np.float64))
        noise += float(np.einsum("i,i->", difference, difference))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def floats(array: npt.NDArray[np.float32]) -> Iterator[Floats]:
    """An array as blocks."""
    flat = np.ascontiguousarray(array).reshape(-1)
    step = BLOCK_BYTES // 4
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


class Gallery(Generic[Key]):
    """Tensors seen so far, and which of them a new one may be near to."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, list[tuple[Key, Sketch]]] = {}

    def add(self, key: Key, kind: Hashable, seen: Sketch) -> None:
        """Keeps a tensor; only those of one ``kind`` (type and shape) are ever near each other."""
        self._seen.setdefault(kind, []).append((key, seen))

    def near(self, kind: Hashable, new: Sketch, least_db: float) -> list[Key]:
        """Tensors that may be within ``least_db`` of a new one, the nearest by their sketches first."""
        known = self._seen.get(kind)
        if not known:
            return []
        distances = np.square(np.stack([s.groups for _, s in known]) - new.groups).sum(1)
        allowed = _MARGIN * new.energy * 10 ** (-least_db / 10)
        order = np.argsort(distances, kind="stable")
        return [known[i][0] for i in order if distances[i] <= allowed]
