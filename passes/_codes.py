"""How a weight lies in the file in few bits, and the nodes that make it a tensor again when the model is loaded.

Everything is standard ONNX of opset 10 and constant from end to end, so a runtime that folds constants computes it
once, at load, and runs on as with the plain weight. No type below 8 bits is needed: a byte looks up several weights at
once, which loads faster than unpacking uint4 does, and in any opset.

    table    Gather(table [<=256, d], bytes)          d weights a byte: 2 of 16 values each, 5 of 3, or learned vectors
    planes   Gather(codebook, sum of Gather(digits, bytes))     3, 5, 6 bits: as 2 + 1, 4 + 1, 4 + 2
    sparse   a mask, and a palette of what is not zero          (:mod:`~onnxcompress.passes._sparse_code`)
    scaled   Cast(int8) * scale
    half     Cast(float16)

Behind ``table`` and ``planes`` stand a Slice where the last byte is not full, a Reshape, a product with scales (float16
in the file), and a Transpose where neighbours in a vector are not neighbours in the tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import PassError
from onnxcompress.rewrite import Rewriter

__all__ = ["Chain", "Code", "Half", "Layout", "Palette", "Scaled", "packed"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_NODE_BYTES = 90
"""About what a node with its names takes in a file."""
_DIGITS = "onnxcompress_digits"
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths of the parts of an index, most significant first, that no byte holds a whole number of."""


@dataclass(frozen=True)
class Layout:
    """From the order in which weights are stored to the tensor.

    Attributes:
        shape: of the tensor.
        stored: shape in which they are stored; scales broadcast to it.
        order: permutation of the axes of ``stored`` that leads to the tensor's, before it gets its shape; empty if they
            are in order.
    """

    shape: tuple[int, ...]
    stored: tuple[int, ...]
    order: tuple[int, ...] = ()

    def tensor(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """What is stored, as the tensor."""
        found = array.reshape(self.stored)
        found = found.transpose(self.order) if self.order else found
        return np.ascontiguousarray(found.reshape(self.shape))

    def storing(self, tensor: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """A tensor in the order in which it is stored, of shape ``stored``."""
        if not self.order:
            return tensor.reshape(self.stored)
        permuted = tuple(self.stored[i] for i in self.order)
        return np.ascontiguousarray(tensor.reshape(permuted).transpose(np.argsort(self.order)))


class Code(ABC):
    """One tensor as it is to lie in the file."""

    @abstractmethod
    def decoded(self) -> npt.NDArray[np.generic]:
        """The tensor that the nodes make, to the last bit."""

    @abstractmethod
    def arrays(self) -> Iterator[npt.NDArray[np.generic]]:
        """What is stored."""

    @abstractmethod
    def write(self, name: str, like: ir.Node, rewriter: Rewriter) -> ir.Value:
        """Adds weights and nodes that make the tensor; the nodes may have to be sorted afterwards.

        Args:
            name: of the tensor; new names start with it.
            like: a node in whose graph they are put, at the start.
            rewriter: of the model.
        """

    @property
    @abstractmethod
    def nodes(self) -> int:
        """How many nodes it takes."""

    @property
    def bytes(self) -> int:
        """What it takes in the file, nodes included."""
        return sum(a.nbytes for a in self.arrays()) + _NODE_BYTES * self.nodes


@dataclass(frozen=True, eq=False)
class Half(Code):
    """Float16."""

    array: npt.NDArray[np.float16]

    def decoded(self) -> Floats:
        return self.array.astype(np.float32)

    def arrays(self) -> Iterator[npt.NDArray[np.generic]]:
        yield self.array

    @property
    def nodes(self) -> int:
        return 1

    def write(self, name: str, like: ir.Node, rewriter: Rewriter) -> ir.Value:
        chain = Chain(name, like, rewriter)
        return chain.add("Cast", [chain.constant(self.array, "half")], to=int(ir.DataType.FLOAT))


@dataclass(frozen=True, eq=False)
class Scaled(Code):
    """Integers of 8 bits times scales that broadcast to them."""

    integers: npt.NDArray[np.int8]
    scales: Floats
    layout: Layout

    def decoded(self) -> Floats:
        found = self.integers.reshape(self.layout.stored).astype(np.float32) * self.scales
        return np.asarray(self.layout.tensor(found), np.float32)

    def arrays(self) -> Iterator[npt.NDArray[np.generic]]:
        yield self.integers
        yield self.scales

    @property
    def nodes(self) -> int:
        return 2

    def write(self, name: str, like: ir.Node, rewriter: Rewriter) -> ir.Value:
        chain = Chain(name, like, rewriter)
        stored = chain.constant(self.integers.reshape(self.layout.stored), "int8")
        floats = chain.add("Cast", [stored], to=int(ir.DataType.FLOAT))
        made = chain.add("Mul", [floats, chain.constant(self.scales, "scale")])
        return chain.laid_out(made, self.layout)


@dataclass(frozen=True, eq=False)
class Palette(Code):
    """Indices into a codebook, packed into bytes, times scales.

    Attributes:
        planes: parts of the indices with the bits of a digit, most significant first; a single one of 0 bits is
            the row of a table that has several weights in a row.
        table: float32 or int8, shape (entries, weights a row).
        scales: float16, broadcasts to the stored shape; None for none.
        layout: from here to the tensor.
    """

    planes: tuple[tuple[Bytes, int], ...]
    table: npt.NDArray[np.generic]
    scales: npt.NDArray[np.float16] | None
    layout: Layout

    @property
    def _size(self) -> int:
        return math.prod(self.layout.stored)

    def decoded(self) -> npt.NDArray[np.generic]:
        index = np.zeros(0, np.int64)
        for part, bits in self.planes:
            digits = part.astype(np.int64) if bits == 0 else _digits(bits)[part].ravel().astype(np.int64)
            index = digits if not len(index) else (index << bits) + digits
        found = self.table[index].ravel()[: self._size].reshape(self.layout.stored)
        if self.scales is not None:
            found = found * self.scales.astype(np.float32)
        return self.layout.tensor(found)

    def arrays(self) -> Iterator[npt.NDArray[np.generic]]:
        yield from (part for part, _ in self.planes)
        yield self.table
        if self.scales is not None:
            yield self.scales

    @property
    def nodes(self) -> int:
        unpacking = 2 * len(self.planes) + 2 if self.planes[0][1] else 1
        return unpacking + 2 + (2 if self.scales is not None else 0) + (2 if self.layout.order else 0)

    def write(self, name: str, like: ir.Node, rewriter: Rewriter) -> ir.Value:
        chain = Chain(name, like, rewriter)
        dtype = ir.DataType.FLOAT if self.table.dtype == np.float32 else ir.DataType.INT8
        index: ir.Value | None = None
        shift = sum(bits for _, bits in self.planes)
        total = shift
        padded = 0
        for number, (part, bits) in enumerate(self.planes):
            codes = chain.constant(part, f"codes{number or ''}")
            digits = chain.add("Cast", [codes], to=int(ir.DataType.INT32), type=ir.DataType.INT32)
            if bits:
                shift -= bits
                digits = chain.add("Gather", [chain.digits(bits, shift), digits], type=ir.DataType.INT32)
                if len(self.planes) > 1:
                    digits = chain.add("Reshape", [digits, chain.sizes(-1)], type=ir.DataType.INT32)
                padded = len(part) * (8 // bits)
            else:
                padded = len(part) * self.table.shape[1]
            index = digits if index is None else chain.add("Add", [index, digits], type=ir.DataType.INT32)
        table = self.table if not total else self.table.ravel()
        made = chain.add("Gather", [chain.constant(table, "codebook"), index], type=dtype)
        return chain.finished(made, padded, self.scales, self.layout, dtype)


def packed(
    indices: Indices, codebook: npt.NDArray[np.generic], scales: npt.NDArray[np.float16] | None, layout: Layout
) -> Palette:
    """The smallest palette; of two that are about as small, the one that loads faster.

    Args:
        indices: into the codebook, in the order of ``layout.stored``; of vectors, one for each.
        codebook: shape (entries,) or (entries, weights a vector).
        scales: broadcasts to ``layout.stored``, or None.
        layout: from there to the tensor.

    Raises:
        PassError: more than 256 entries.
    """
    flat, entries = indices.ravel(), len(codebook)
    if entries > 256:
        raise PassError(f"a codebook of {entries} entries does not fit a byte")
    bits = max(1, math.ceil(math.log2(entries)))
    if codebook.ndim > 1:
        return Palette(((flat.astype(np.uint8), 0),), codebook, scales, layout)
    if bits in _PLANES and entries > 6:  # of 5 and 6 values a byte holds three
        return Palette(_planes(flat, _PLANES[bits]), codebook[:, None], scales, layout)
    many = int(math.log(256) / math.log(max(entries, 2)) + 1e-9)
    digits = _padded(flat, many).reshape(-1, many)
    powers = entries ** np.arange(many - 1, -1, -1)
    table = codebook[np.arange(entries**many)[:, None] // powers % entries]
    palette = Palette((((digits @ powers).astype(np.uint8), 0),), table, scales, layout)
    if bits in (1, 2, 4) and table.nbytes > len(flat) // 16:
        return Palette(_planes(flat, (bits,)), codebook[:, None], scales, layout)
    return palette


def _planes(indices: Indices, widths: tuple[int, ...]) -> tuple[tuple[Bytes, int], ...]:
    padded = _padded(indices, 8)
    found, shift = [], sum(widths)
    for bits in widths:
        shift -= bits
        digits = (padded >> shift) & ((1 << bits) - 1)
        powers = 1 << (bits * np.arange(8 // bits - 1, -1, -1))
        found.append(((digits.reshape(-1, 8 // bits) @ powers).astype(np.uint8), bits))
    return tuple(found)


def _padded(indices: Indices, multiple: int) -> Indices:
    return np.pad(indices, (0, -len(indices) % multiple))


def _digits(bits: int) -> Bytes:
    """The digits of every byte, shape (256, 8 / bits), most significant first."""
    shifts = bits * np.arange(8 // bits - 1, -1, -1)
    return ((np.arange(256)[:, None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8)


class Chain:
    """Constant nodes one after the other, at the start of a graph."""

    def __init__(self, name: str, like: ir.Node, rewriter: Rewriter) -> None:
        graph = like.graph
        if not isinstance(graph, ir.Graph):
            raise PassError(f"{like.name!r} is in no graph")
        self._name, self._rewriter, self._first = name, rewriter, graph[0]
        self._shared = graph is rewriter.model.graph  # names inside bodies may not tell one from the other

    def constant(self, array: npt.NDArray[np.generic], suffix: str) -> ir.Value:
        return self._rewriter.constant(array, f"{self._name}_{suffix}", like=self._first)

    def add(
        self, op: str, inputs: list[ir.Value | None], *, type: ir.DataType = ir.DataType.FLOAT, **attributes: int
    ) -> ir.Value:
        made = self._rewriter.insert(op, inputs, attributes, before=self._first, name=f"{self._name}_{op}", dtype=type)
        return made[0]

    def sizes(self, *numbers: int) -> ir.Value:
        """A vector of integers; one for all that want the same."""
        return self.known(np.array(numbers, np.int64), f"onnxcompress_sizes_{'_'.join(map(str, numbers))}")

    def known(self, array: npt.NDArray[np.generic], name: str) -> ir.Value:
        """A constant; one for all that ask for this name."""
        found = self._rewriter.find(name) if self._shared else None
        return found or self._rewriter.constant(array, name, like=self._first)

    def digits(self, bits: int, shift: int) -> ir.Value:
        """The table of digits, each times 2^shift; one for all that want the same."""
        name = f"{_DIGITS}_{bits}_{shift}"
        known = self._rewriter.find(name) if self._shared else None
        if known is not None:
            return known
        whole = ir.DataType.INT32
        if bits > 2:
            stored = self._rewriter.constant(_digits(bits) << shift, f"{name}_bytes", like=self._first)
            made = self._plain("Cast", [stored], {"to": int(whole)})
        else:  # a table of 2 KiB would be much of a small file
            stored = self.known(np.arange(256, dtype=np.uint8)[:, None], f"{_DIGITS}_of")
            made = self._plain("Cast", [stored], {"to": int(whole)})
            powers = (1 << (bits * np.arange(8 // bits - 1, -1, -1))).astype(np.int32)
            made = self._plain("Div", [made, self.known(powers, f"{_DIGITS}_{bits}_powers")])
            made = self._plain("Mod", [made, self.known(np.array(1 << bits, np.int32), f"{_DIGITS}_{bits}_many")])
            if shift:
                made = self._plain(
                    "Mul", [made, self.known(np.array(1 << shift, np.int32), f"{_DIGITS}_times_{1 << shift}")]
                )
        if self._shared:
            self._rewriter.rename(made, name)
        return made

    def _plain(self, op: str, inputs: list[ir.Value | None], attributes: dict[str, int] | None = None) -> ir.Value:
        """A node that belongs to no weight in particular."""
        return self._rewriter.insert(op, inputs, attributes, before=self._first, dtype=ir.DataType.INT32)[0]

    def finished(
        self,
        value: ir.Value,
        length: int,
        scales: npt.NDArray[np.float16] | None,
        layout: Layout,
        dtype: ir.DataType,
    ) -> ir.Value:
        """Cuts what fills up the last byte, scales what is left, and lays it out.

        Args:
            value: the weights as they are stored, of any shape.
            length: how many there are.
            scales: broadcasts to ``layout.stored``, or None.
            layout: from there to the tensor.
            dtype: of the weights.
        """
        size = math.prod(layout.stored)
        if length != size:
            value = self.add("Reshape", [value, self.sizes(-1)], type=dtype)
            value = self.add("Slice", [value, self.sizes(0), self.sizes(size)], type=dtype)
        value = self.add("Reshape", [value, self.sizes(*layout.stored)], type=dtype)
        if scales is not None:
            floats = self.add("Cast", [self.constant(scales, "scale")], to=int(ir.DataType.FLOAT))
            value = self.add("Mul", [value, floats])
        return self.laid_out(value, layout, dtype)

    def laid_out(self, value: ir.Value, layout: Layout, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        if layout.order:
            made = self._rewriter.insert(
                "Transpose", [value], {"perm": layout.order}, before=self._first, name=f"{self._name}_Transpose",
                dtype=dtype,
            )  # fmt: skip
            value = made[0]
        if layout.order or layout.stored != layout.shape:
            value = self.add("Reshape", [value, self.sizes(*layout.shape)], type=dtype)
        return value
