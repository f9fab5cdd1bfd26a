"""Weights many of which are zero: a bit for each says whether it is, and a palette holds the others.

    m = bits of the mask             place = CumSum(m) * m            w = Gather([0, values], place)

A zero takes one bit instead of a whole index, and the codebook none of its entries for it. As all other codes these are
standard nodes that read constants, of opset 11; see :mod:`~onnxcompress.passes._codes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.passes._codes import Chain, Code, Layout, Palette, packed
from onnxcompress.rewrite import Rewriter

__all__ = ["MASK_NODES", "Sparse", "pays", "smallest"]

_NODES = 7
"""More than a palette has."""
MASK_NODES = 90 * _NODES
"""Bytes they take in a file."""
_ONCE = 700
"""Bytes of the table of the mask's digits, that all weights of a model share."""
_LEAST = MASK_NODES + _ONCE + 324
"""Bytes that a mask has to save."""


@dataclass(frozen=True, eq=False)
class Sparse(Code):
    """A mask and what it lets through, times scales.

    Attributes:
        mask: a bit for each weight in the order of ``layout.stored``, most significant first: it is not zero.
        values: those weights, one after the other, without scales.
        scales: float16, broadcasts to the stored shape; None for none.
        layout: from here to the tensor.
    """

    mask: npt.NDArray[np.uint8]
    values: Palette
    scales: npt.NDArray[np.float16] | None
    layout: Layout

    def decoded(self) -> npt.NDArray[np.generic]:
        kept = np.unpackbits(self.mask, count=math.prod(self.layout.stored)).astype(bool)
        found = np.zeros(kept.shape, self.values.table.dtype)
        found[kept] = self.values.decoded()
        placed = found.reshape(self.layout.stored)
        return self.layout.tensor(placed if self.scales is None else placed * self.scales.astype(np.float32))

    def arrays(self) -> Iterator[npt.NDArray[np.generic]]:
        yield self.mask
        yield from self.values.arrays()
        if self.scales is not None:
            yield self.scales

    @property
    def nodes(self) -> int:
        after = (2 if self.scales is not None else 0) + (2 if self.layout.order else 0)
        return self.values.nodes + _NODES + after

    def write(self, name: str, like: ir.Node, rewriter: Rewriter) -> ir.Value:
        values = self.values.write(f"{name}_values", like, rewriter)
        chain = Chain(name, like, rewriter)
        dtype = ir.DataType.FLOAT if self.values.table.dtype == np.float32 else ir.DataType.INT8
        whole = ir.DataType.INT32
        mask = chain.add("Cast", [chain.constant(self.mask, "mask")], to=int(whole), type=whole)
        mask = chain.add("Gather", [chain.digits(1, 0), mask], type=whole)
        mask = chain.add("Reshape", [mask, chain.sizes(-1)], type=whole)
        place = chain.add("CumSum", [mask, chain.known(np.array(0, np.int64), "onnxcompress_axis")], type=whole)
        place = chain.add("Mul", [place, mask], type=whole)
        zero = chain.known(np.zeros(1, self.values.table.dtype), f"onnxcompress_zero_{dtype.name.lower()}")
        made = chain.add("Concat", [zero, values], axis=0, type=dtype)
        made = chain.add("Gather", [made, place], type=dtype)
        return chain.finished(made, 8 * len(self.mask), self.scales, self.layout, dtype)


def pays(size: int, zeros: float, bits: float) -> bool:
    """Whether a mask takes less than indices of zeros do.

    Args:
        size: weights.
        zeros: share of them.
        bits: of an index.
    """
    return zeros < 1 and size * (zeros * bits - 1) / 8 > _LEAST


def smallest(
    indices: npt.NDArray[np.int64],
    codebook: npt.NDArray[np.generic],
    scales: npt.NDArray[np.float16] | None,
    layout: Layout,
) -> Code:
    """The smaller one of a palette of all weights, and of a mask with a palette of those that are not zero.

    Args:
        indices: into the codebook, in the order of ``layout.stored``; of vectors, one for each.
        codebook: shape (entries,) or (entries, weights a vector).
        scales: broadcasts to ``layout.stored``, or None.
        layout: from there to the tensor.

    Raises:
        PassError: more than 256 entries.
    """
    dense = packed(indices, codebook, scales, layout)
    flat, other = indices.ravel(), codebook != 0
    if codebook.ndim > 1 or other.all():
        return dense
    kept = other[flat]
    count = int(kept.sum())
    if not count:
        return dense
    renumbered = (np.cumsum(other) - 1)[flat[kept]]
    values = packed(renumbered, codebook[other], None, Layout((count,), (count,)))
    sparse = Sparse(np.packbits(kept), values, scales, layout)
    return sparse if sparse.bytes + _ONCE < dense.bytes else dense
