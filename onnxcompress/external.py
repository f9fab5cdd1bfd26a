"""Model files whose weights lie in a file of their own, at the level of the file format.

Only where the bytes of a weight are is changed: nodes, names, types, order and what a caller may override stay as they
were, so that onnxruntime computes the same bits. (:func:`onnxcompress.model.load` changes more than that.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from onnxcompress.errors import OutputError, UnsupportedModelError
from onnxcompress.likeness import BLOCK_BYTES
from onnxcompress.model import check_external_data, proto_graphs, read_proto

__all__ = ["LEAST_BYTES", "Extent", "ModelFile", "Weight", "WeightsFile", "flaw"]

LEAST_BYTES = 256
"""Smaller tensors stay in the .onnx file, as in :func:`onnxcompress.model.save`. Shapes, axes and limits are among
them, which a reader wants while it looks at the graph; and to say where a tensor lies takes 60 bytes."""

_ALIGNMENTS = ((1 << 20, 1 << 16), (1 << 16, 1 << 12), (0, 64))
"""From so many bytes on, the offset of a tensor is a multiple of: 64 KiB, the unit in which Windows maps files; a
page; a cache line. No more than a sixteenth of the tensor where that is a page or more, so that gaps stay small."""

_EXTERNAL = onnx.TensorProto.EXTERNAL
_UNTYPED = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
_PAYLOADS = (
    "raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data",
)  # fmt: skip


@dataclass(frozen=True)
class Extent:
    """A place in a file, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class Weight:
    """A tensor of a model file that can lie elsewhere.

    Attributes:
        number: of the tensor in its file.
        name: of the tensor.
        dtype: of its elements.
        shape: of it.
        nbytes: it takes.
    """

    number: int
    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    nbytes: int


class ModelFile:
    """A model file that is about to get its weights from elsewhere.

    Weights in external files are read in blocks, when they are asked for; those in the model file itself are in memory
    until they are released.

    Args:
        path: the file; it is only read.

    Raises:
        ModelReadError: it cannot be read, or some of its weights are missing.
        UnsupportedModelError: a tensor that cannot be moved lies in an external file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        proto = read_proto(path)
        graphs = list(proto_graphs(proto.graph))
        self.lifted = sum(_lift(graph, proto.ir_version) for graph in graphs)
        """Constant nodes that became initializers, for nothing else can share."""
        _refuse(proto, path)
        check_external_data(proto.graph, path)
        self._kept: dict[int, bytes] = {}
        self._places: dict[int, tuple[Path, Extent]] = {}
        weights: list[Weight] = []
        for tensor in (t for graph in graphs for t in graph.initializer):
            weight = _weight(tensor, len(weights))
            place = _place(tensor, path.parent)
            if weight is not None and place is not None:
                self._places[weight.number] = place
            elif weight is not None:
                self._kept[weight.number] = _content(tensor)
            elif place is not None:  # too small to lie elsewhere
                raw = b"".join(_read(*place))
                _clear(tensor)
                tensor.raw_data = raw
            if weight is not None:
                _clear(tensor)
                tensor.data_location = _EXTERNAL
                weights.append(weight)
        self.weights: tuple[Weight, ...] = tuple(sorted(weights, key=lambda w: -_alignment(w.nbytes)))
        """Those that are aligned most come first, so that there is one gap between kinds and not one a tensor."""
        self._proto = onnx.ModelProto.FromString(proto.SerializeToString())  # the first still holds the weights

    def blocks(self, weight: Weight) -> Iterator[bytes | memoryview]:
        """The bytes of a weight, 1 MiB at a time."""
        if weight.number in self._places:
            yield from _read(*self._places[weight.number])
            return
        data = memoryview(self._kept[weight.number])
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]

    def digest(self, weight: Weight) -> bytes:
        """SHA-256 of the bytes of a weight."""
        digest = hashlib.sha256()
        for block in self.blocks(weight):
            digest.update(block)
        return digest.digest()

    def release(self, weight: Weight) -> None:
        """Forgets the bytes of a weight; it is not asked for again."""
        self._kept.pop(weight.number, None)

    def write(self, path: Path, location: str, extents: Mapping[int, Extent]) -> None:
        """Writes the model without its weights.

        Args:
            path: where to.
            location: name of the file beside it that they are in.
            extents: where in that file, by number of the weight, for all of :attr:`weights`.
        """
        outside = (
            t for g in proto_graphs(self._proto.graph) for t in g.initializer if t.data_location == _EXTERNAL
        )  # in the order of the weights
        for number, tensor in enumerate(outside):
            extent = extents[number]
            del tensor.external_data[:]
            for key, value in (("location", location), ("offset", extent.offset), ("length", extent.length)):
                tensor.external_data.add(key=key, value=str(value))
        path.write_bytes(self._proto.SerializeToString(deterministic=True))


class WeightsFile:
    """A file that is written once, tensor after tensor.

    Args:
        path: made, or emptied.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("w+b")
        self._end = 0

    def add(self, blocks: Iterator[bytes | memoryview], length: int) -> Extent:
        """Appends a tensor of so many bytes.

        Raises:
            OutputError: the tensor came to another length: its file was changed meanwhile.
        """
        alignment = _alignment(length)
        offset = -(-self._end // alignment) * alignment
        self._file.seek(self._end)
        self._file.write(bytes(offset - self._end))
        written = sum(self._file.write(block) for block in blocks)
        if written != length:
            raise OutputError("a weight changed while it was read", hint="run it again with inputs that stay")
        self._end = offset + length
        return Extent(offset, length)

    def blocks(self, extent: Extent) -> Iterator[bytes]:
        """A tensor that was written, 1 MiB at a time."""
        self._file.flush()
        yield from _read(self.path, extent)

    @property
    def end(self) -> int:
        """Bytes written."""
        return self._end

    def cut(self, end: int) -> None:
        """Forgets what was written beyond this."""
        self._file.truncate(end)
        self._end = end

    def flush(self) -> None:
        """Makes the file readable for others."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _alignment(length: int) -> int:
    return next(a for least, a in _ALIGNMENTS if length >= least)


def flaw(path: Path) -> str:
    """What onnx.checker has against a model file; empty if nothing."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""


# --- tensors -----------------------------------------------------------------------------------


def _weight(tensor: onnx.TensorProto, number: int) -> Weight | None:
    """What there is to know of a tensor; None of one that stays in the model file."""
    if tensor.data_type in _UNTYPED:
        return None
    dtype = ir.DataType(tensor.data_type)
    length = -(-math.prod(tensor.dims) * dtype.bitwidth // 8)
    return Weight(number, tensor.name, dtype, tuple(tensor.dims), length) if length >= LEAST_BYTES else None


def _place(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, Extent] | None:
    if tensor.data_location != _EXTERNAL:
        return None
    entries = {e.key: e.value for e in tensor.external_data}
    length = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
    return folder / entries["location"], Extent(int(entries.get("offset") or 0), length)


def _content(tensor: onnx.TensorProto) -> bytes:
    return tensor.raw_data or ir.serde.TensorProtoTensor(tensor).tobytes()


def _clear(tensor: onnx.TensorProto) -> None:
    for field in (*_PAYLOADS, "data_location"):
        tensor.ClearField(field)


def _read(path: Path, extent: Extent) -> Iterator[bytes]:
    """Plain reads: mapped pages would count as memory in use."""
    with path.open("rb") as file:
        file.seek(extent.offset)
        for start in range(0, extent.length, BLOCK_BYTES):
            yield file.read(min(BLOCK_BYTES, extent.length - start))


def _lift(graph: onnx.GraphProto, ir_version: int) -> int:
    """Makes initializers of large Constant nodes; onnxruntime does the same when it loads them."""
    outputs = {v.name for v in graph.output}
    lifted = []
    for index, node in enumerate(graph.node):
        large = (
            node.op_type == "Constant"
            and node.domain in ("", "ai.onnx")
            and [a.name for a in node.attribute] == ["value"]
            and node.output[0] not in outputs
            and _weight(node.attribute[0].t, 0) is not None
        )
        if large and ir_version >= 4:  # before, an initializer had to be an input, too
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            lifted.append(index)
    for index in reversed(lifted):
        del graph.node[index]
    return len(lifted)


def _refuse(proto: onnx.ModelProto, path: Path) -> None:
    """Raises where a tensor that is no initializer lies in a file that the bundle would not have.

    Raises:
        UnsupportedModelError: it does.
    """
    graphs = list(proto_graphs(proto.graph))
    nodes = [n for g in graphs for n in g.node] + [n for f in proto.functions for n in f.node]
    tensors = [t for n in nodes for a in n.attribute for t in (a.t, *a.tensors)]
    sparse = [s for g in graphs for s in g.sparse_initializer]
    sparse += [s for n in nodes for a in n.attribute for s in (a.sparse_tensor, *a.sparse_tensors)]
    tensors += [t for s in sparse for t in (s.values, s.indices)]
    for tensor in tensors:
        if tensor.data_location == _EXTERNAL:
            raise UnsupportedModelError(
                "is no initializer and lies in an external file",
                path=path,
                tensor=tensor.name,
                hint="save the model with that tensor inside",
            )
