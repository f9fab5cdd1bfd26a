"""Weights rounded to 4 or 8 bits in blocks, and the bytes that MatMulNBits reads.

    w_nk ~ s_nB q_nk for k in block B        q in [-2^(b-1), 2^(b-1) - 1], a scale for each block of a column

A block's scale is looked for: its largest weight, sign and all, is put on -d for some d around 2^(b-1); the rounded
q that points closest to w, that is with the greatest <w, q>^2 / <q, q>, wins, and s = <w, q> / <q, q> is then the best.
With scales fixed, :class:`Feedback` rounds to what the product loses least by (:mod:`~onnxcompress.passes._feedback`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from onnxcompress.base import Precision
from onnxcompress.passes import _feedback
from onnxcompress.statistics import SecondMoments

__all__ = ["BITS", "BLOCKS", "Blocks", "Feedback", "Floats", "Form", "Rounded", "Rounding", "pack", "rounded"]

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of blocks there are kernels for."""

_PRECISION = {4: Precision.BLOCKED4, 8: Precision.BLOCKED8}
_ENDS = {4: (7.0, 7.5, 8.0, 8.5, 9.0, 10.0, 11.0), 8: (127.0, 128.0)}
"""Where the largest weight of a block is put; beyond 2^(bits-1) it is clipped."""
_PIECE = 2_000_000
_ROWS = 8192
"""Outputs rounded with feedback at a time: a head of 50,000 would take gigabytes."""
_TRIED = 128
"""Outputs by which it is seen whether feedback helps."""

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, order=True)
class Form:
    """Bits of a weight, and how many weights share a scale."""

    bits: int
    block: int

    @property
    def name(self) -> str:
        """Of choices and terms."""
        return f"w{self.bits}/{self.block}"

    @property
    def precision(self) -> str:
        """What profiles call the kernel."""
        return _PRECISION[self.bits]


@dataclass(frozen=True)
class Rounded:
    """A matrix in blocks.

    Attributes:
        integers: shape (outputs, inputs), within [-2^(bits-1), 2^(bits-1) - 1].
        scales: shape (outputs, blocks).
    """

    integers: npt.NDArray[np.int8]
    scales: Floats


@dataclass(frozen=True)
class Blocks:
    """A matrix as MatMulNBits reads it.

    Attributes:
        packed: shape (outputs, blocks, bytes of a block); of two weights in a byte the first is the low half.
        scales: shape (outputs * blocks,).
        inputs: length of a column.
    """

    packed: npt.NDArray[np.uint8]
    scales: Floats
    inputs: int


Rounding = Callable[[Floats, Form], Rounded]
"""How a matrix (outputs, inputs) becomes integers; :func:`rounded` by default."""


def rounded(matrix: Floats, form: Form) -> Rounded:
    """Rounds to the nearest, with the best scale of a few for each block.

    Args:
        matrix: shape (outputs, inputs).
        form: bits and block.
    """
    outputs, inputs = matrix.shape
    count = -(-inputs // form.block)
    scales = np.empty((outputs, count), np.float32)
    integers = np.empty((outputs, inputs), np.int8)
    step = max(1, _PIECE // (count * form.block))
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        rows = np.zeros((len(matrix[part]), count * form.block), np.float32)
        rows[:, :inputs] = matrix[part]
        found, scales[part] = _best(rows.reshape(-1, count, form.block), form.bits)
        integers[part] = found.reshape(len(rows), -1)[:, :inputs]
    return Rounded(integers, scales)


@dataclass(frozen=True, eq=False)
class Feedback:
    """Rounds column by column, in the scales of blocks, so that later columns make up for what earlier ones lose.

    Fitted to few samples, weights lose little on these and more on all others. So some outputs are fitted to half of
    the samples first: if on the other half they lose more than rounded to the nearest, that is what the matrix is.

    Attributes:
        moments: of what the product reads.
    """

    moments: SecondMoments

    def __call__(self, matrix: Floats, form: Form) -> Rounded:
        """The matrix, shape (outputs, inputs), in the scales that :func:`rounded` finds for it."""
        plain = rounded(matrix, form)
        if not self._helps(matrix, plain, form):
            return plain
        integers = np.empty_like(plain.integers)
        for start in range(0, len(matrix), _ROWS):
            part = slice(start, start + _ROWS)
            integers[part], _ = _fed_back(matrix[part], plain.scales[part], self.moments.matrix, form)
        return Rounded(integers, plain.scales)

    def _helps(self, matrix: Floats, plain: Rounded, form: Form) -> bool:
        if self.moments.halves is None:
            return False
        fit, look = self.moments.halves
        some = slice(None, None, -(-len(matrix) // _TRIED))
        weights, scales = matrix[some].astype(np.float64), plain.scales[some]
        _, values = _fed_back(matrix[some], scales, fit.matrix, form)
        steps = np.repeat(scales, form.block, axis=1)[:, : matrix.shape[1]]
        nearest = np.multiply(plain.integers[some], steps, dtype=np.float64)
        return _feedback.lost(weights, values, look.matrix) < _feedback.lost(weights, nearest, look.matrix)


def _fed_back(matrix: Floats, scales: Floats, moments: Array, form: Form) -> tuple[_feedback.Indices, Array]:
    """Integers, and the values they stand for."""
    low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1

    def nearest(weights: Array, features: _feedback.Indices) -> tuple[_feedback.Indices, Array]:
        steps = scales[:, features // form.block].astype(np.float64)
        found = np.clip(np.rint(weights / steps), low, high)
        return found.astype(np.int64), found * steps

    with threadpool_limits(1, "blas"):  # many small products, which threads only slow down
        return _feedback.rounded(matrix.astype(np.float64), moments, nearest)


def _best(blocks: Floats, bits: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Integers and scales of blocks, shape (outputs, blocks, block)."""
    high, low = blocks.max(-1), blocks.min(-1)
    largest = np.where(high > -low, high, low)
    usable = np.abs(largest) > 2.0**bits * np.finfo(np.float32).tiny
    inverse = np.divide(-1.0, largest, out=np.zeros_like(largest), where=usable)
    best = np.full(largest.shape, -1.0, np.float32)
    scales = np.ones_like(largest)
    integers = np.zeros(blocks.shape, np.int8)
    for end in _ENDS[bits]:
        tried = np.rint(blocks * (end * inverse)[..., None])
        np.clip(tried, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, out=tried)
        product, square = np.einsum("nbk,nbk->nb", blocks, tried), np.einsum("nbk,nbk->nb", tried, tried)
        scale = np.divide(product, square, out=np.ones_like(product), where=square > 0)
        better = product * scale > best
        best[better], scales[better] = (product * scale)[better], scale[better]
        integers[better] = tried[better]
    return integers, scales


def pack(matrix: Rounded, form: Form) -> Blocks:
    """The bytes that MatMulNBits reads; blocks that are not full are filled with zeros."""
    outputs, inputs = matrix.integers.shape
    count = matrix.scales.shape[1]
    middle = 2 ** (form.bits - 1)
    codes = np.full((outputs, count * form.block), middle, np.uint8)
    codes[:, :inputs] = matrix.integers.astype(np.int16) + middle
    codes = codes.reshape(outputs, count, form.block)
    if form.bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return Blocks(np.ascontiguousarray(codes), matrix.scales.reshape(-1), inputs)
