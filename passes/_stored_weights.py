"""Weights of a model as they lie in the file: which can be stored otherwise, and how their readers use them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import zstandard

from onnxcompress.passes._linear_maps import MOST_FEATURES, LinearMap, linear_map
from onnxcompress.sizes import ZSTD_LEVEL
from onnxcompress.statistics import Need, Statistic
from onnxcompress.view import GraphView

__all__ = ["Weight", "stored_weights"]

_TYPES = (ir.DataType.FLOAT, ir.DataType.INT8)
_PRODUCTS = ("MatMulInteger", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class Weight:
    """A constant tensor.

    Attributes:
        name: of its value.
        readers: names of the nodes that read it.
        linear: as what kind of map they use it; rows are slices along the first axis where nobody multiplies by it.
        bytes: in the file.
        integers: it is int8.
        behind: name of what a DequantizeLinear makes of it; "" if there is none.
        zeros: share of its elements that are zero.
        looked_up: rows of it are read by Gather.
    """

    name: str
    readers: tuple[str, ...]
    linear: LinearMap
    bytes: int
    integers: bool = False
    behind: str = ""
    zeros: float = 0.0
    looked_up: bool = False

    def scale_of(self, value: ir.Value) -> npt.NDArray[np.float32]:
        """What int8 weights are multiplied with, broadcast to them; 1 where that is not known."""
        found = self._dequantized_by(value, 1)
        return np.ones((1,) * len(self.linear.shape), np.float32) if found is None else found

    def zero_of(self, value: ir.Value) -> npt.NDArray[np.float32]:
        """What is taken off int8 weights first, broadcast to them; 0 where that is not known."""
        found = self._dequantized_by(value, 2)
        return np.zeros((1,) * len(self.linear.shape), np.float32) if found is None else found

    def _dequantized_by(self, value: ir.Value, index: int) -> npt.NDArray[np.float32] | None:
        """An input of the DequantizeLinear behind a weight, broadcast to that."""
        shape = self.linear.shape
        for use in value.uses():
            if use.node.op_type != "DequantizeLinear" or use.idx != 0 or index >= len(use.node.inputs):
                continue
            read = use.node.inputs[index]
            if read is None or read.const_value is None:
                continue
            found = np.asarray(read.const_value.numpy(), np.float32)
            if found.ndim == 0 or found.size == 1:
                return np.full((1,) * len(shape), found.reshape(()), np.float32)
            axis = use.node.attributes.get_int("axis", 1) % len(shape)
            if found.ndim == 1 and found.size == shape[axis]:
                return found.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return None

    def compressed(self, view: GraphView) -> int:
        """What it takes in a compressed file."""
        array = view.array(next(v for v in view.weights() if v.name == self.name))
        return 0 if array is None else len(zstandard.ZstdCompressor(ZSTD_LEVEL).compress(array.tobytes()))


def stored_weights(view: GraphView, least: int) -> tuple[Mapping[str, Weight], Mapping[str, str]]:
    """Weights that can be stored otherwise, and why others cannot, by name.

    Args:
        view: of the model.
        least: elements below which a weight is left alone.
    """
    found: dict[str, Weight] = {}
    refused: dict[str, str] = {}
    for value in view.weights():
        tensor = view.weight(value)
        if tensor is None or len(tensor.shape) < 2 or not value.uses():
            continue
        name = str(value.name)
        shape = tuple(int(d) for d in tensor.shape if isinstance(d, int))
        if tensor.dtype not in _TYPES:
            if tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
                refused[name] = f"it is {tensor.dtype.name.lower()}; float32 and int8 can be stored in fewer bits"
            continue
        size = math.prod(shape)
        if size < least:
            refused[name] = f"it has {size} elements, fewer than min_weights={least}"
        elif value.is_graph_output():
            refused[name] = "it is an output of the model"
        elif tensor.dtype == ir.DataType.FLOAT and not np.isfinite(tensor.numpy()).all():
            refused[name] = "it holds NaN or infinity"
        else:
            found[name] = _weight(value, shape, view)
    return found, refused


def _weight(value: ir.Value, shape: tuple[int, ...], view: GraphView) -> Weight:
    tensor = view.weight(value)
    integers = tensor is not None and tensor.dtype == ir.DataType.INT8
    uses = view.consumers(value)
    behind = ""
    maps: list[LinearMap] = []
    for node, index in uses:
        read = [(node, index)]
        if node.op_type == "DequantizeLinear" and index == 0:
            behind = str(node.outputs[0].name)
            read = list(view.consumers(node.outputs[0]))
        for reader, at in read:
            made = _map(reader, at, shape, view)
            if made is not None:
                maps.append(made)
    maps.sort(key=lambda m: m.gram is None)
    rows = (1, shape[0], math.prod(shape[1:]), 1)
    linear = maps[0] if maps else LinearMap(0, shape, rows, (0, 1, 3, 2))
    names = tuple(dict.fromkeys(str(node.name) for node, _ in uses))
    size = math.prod(shape) * (1 if integers else 4)
    zeros = 0.0 if tensor is None else float(np.mean(tensor.numpy() == 0))
    looked_up = any(node.op_type == "Gather" and index == 0 for node, index in uses)
    return Weight(str(value.name), names, linear, size, integers, behind, zeros, looked_up)


def _map(node: ir.Node, index: int, shape: tuple[int, ...], view: GraphView) -> LinearMap | None:
    if node.op_type == "Transpose" and len(shape) == 2 and index == 0:  # a table that is the head of the model, too
        for reader, at in view.consumers(node.outputs[0]):
            if reader.op_type == "MatMul" and at == 1:
                return LinearMap(0, shape, (1, *shape, 1), (0, 1, 3, 2), gram=_gram(reader.inputs[0], shape[1], view))
        return None
    if node.op_type in _PRODUCTS and index == 1 and len(shape) == 2:
        read = node.inputs[0]
        producer = None if read is None else read.producer()
        if node.op_type == "MatMulInteger" and producer is not None and producer.op_type == "DynamicQuantizeLinear":
            read = producer.inputs[0]
        gram = None if node.op_type == "MatMulInteger" and read is node.inputs[0] else _gram(read, shape[0], view)
        return LinearMap(index, shape, (1, *shape, 1), (0, 2, 3, 1), gram=gram)
    return linear_map(node, index, shape, view)


def _gram(value: ir.Value | None, features: int, view: GraphView) -> Need | None:
    known = value is not None and value.name and not value.is_initializer() and features <= MOST_FEATURES
    inside = value is not None and (p := value.producer()) is not None and view.in_subgraph(p)
    return Need(str(value.name), Statistic.GRAM, -1) if known and not inside and value is not None else None
