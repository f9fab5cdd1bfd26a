"""Where a factor per channel of a value can be taken from, and who must give it back.

The value is divided by ``s`` where it is made (:attr:`Scaling.makers`) and every reader multiplies the
matching input channels of its weight (:attr:`Scaling.readers`). Between the makers and the value stand
only maps with ``f(x / s) = f(x) / s`` for ``s > 0``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.rewrite import Rewriter
from onnxcompress.view import GraphView

__all__ = ["Part", "Scaling", "scaling_of"]

Array = npt.NDArray[np.float64]

_HOMOGENEOUS = frozenset({"Abs", "Dropout", "Identity", "LeakyRelu", "PRelu", "Relu"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
_BLIND = frozenset({"Shape", "Size"})  # they read a value but not what is in it
_MAX_HOPS = 16


@dataclass(frozen=True)
class Part:
    """A constant with one slice per channel.

    Attributes:
        node: name of the node that reads it.
        index: which input.
        axis: of the constant, from the right (negative), that holds the channels.
        groups: of a Conv whose input channels these are; its axis holds the channels of one group.
    """

    node: str
    index: int
    axis: int
    groups: int = 1

    def spread(self, factor: Array, shape: tuple[int, ...]) -> Array:
        """One factor per channel in a form that broadcasts with the constant."""
        if self.groups > 1:  # (outputs, inputs / groups, ...): each block of outputs reads its own inputs
            blocks = np.repeat(factor.reshape(self.groups, -1), shape[0] // self.groups, axis=0)
            return blocks.reshape(*blocks.shape, *[1] * (len(shape) - 2))
        return factor.reshape(-1, *[1] * (-self.axis - 1))

    def scale(self, rewriter: Rewriter, factor: Array) -> None:
        """Multiplies the constant."""
        node = rewriter.node(self.node)
        tensor = node.inputs[self.index]
        if tensor is None or tensor.const_value is None:
            raise Skip(f"input {self.index} of {self.node!r} is not constant any more")
        array = tensor.const_value.numpy()
        if self.groups == 1 and array.ndim < -self.axis:  # one number for all channels
            array = array.reshape(*[1] * (-self.axis - array.ndim), *array.shape)
        factors = self.spread(factor, array.shape)
        rewriter.set_weight(node, self.index, (array * factors).astype(np.float32))


@dataclass(frozen=True)
class Scaling:
    """All that changes when one value is scaled.

    Attributes:
        value: its name.
        axis: of the value, that holds the channels: 1 after a convolution, else -1.
        channels: how many.
        makers: constants to divide.
        readers: constants to multiply.
        rectified: the value is never negative.
    """

    value: str
    axis: int
    channels: int
    makers: tuple[Part, ...]
    readers: tuple[Part, ...]
    rectified: bool


def scaling_of(value: ir.Value, view: GraphView) -> Scaling:
    """How the channels of a value can be scaled.

    Raises:
        Skip: they cannot, and why.
    """
    users = [use for use in view.consumers(value) if use[0].op_type not in _BLIND]
    readers = [_reader(node, index, view) for node, index in users]
    if view.is_output(value):
        raise Skip(f"{value.name!r} is an output of the graph")
    if not readers:
        raise Skip(f"nobody reads {value.name!r}")
    axis, channels = readers[0][1:]
    if any(r[1:] != (axis, channels) for r in readers):
        raise Skip(f"the readers of {value.name!r} see its channels on different axes")
    producer = value.producer()
    rank = len(_weight(view.node(readers[0][0].node), 1, view).shape)
    makers = _makers(value, view, axis if axis == -1 else axis - rank, channels, 0)
    rectified = producer is not None and producer.op_type == "Relu"
    return Scaling(str(value.name), axis, channels, makers, tuple(r[0] for r in readers), rectified)


def _reader(node: ir.Node, index: int, view: GraphView) -> tuple[Part, int, int]:
    """The weight of a linear reader, the channel axis of what it reads, and the number of channels."""
    if index != 0 or node.domain or node.op_type not in _LINEAR:
        raise Skip(f"{node.op_type} {node.name!r} reads the value too, and the factors would reach it")
    name, weight = str(node.name), _weight(node, 1, view)
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        return Part(name, 1, 1 - len(weight.shape), groups), 1, weight.shape.numpy()[1] * groups
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0:
        raise Skip(f"{name!r} transposes its input")
    axis = -1 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0 else -2
    if len(weight.shape) != 2:
        raise Skip(f"the weight of {name!r} has {len(weight.shape)} axes")
    return Part(name, 1, axis), -1, weight.shape.numpy()[axis]


def _makers(value: ir.Value, view: GraphView, axis: int, channels: int, hops: int) -> tuple[Part, ...]:
    """Constants whose channels make the channels of the value; ``axis`` counts from the right."""
    node = value.producer()
    if node is None or node.domain or value.index() != 0 or hops > _MAX_HOPS:
        raise Skip(f"{value.name!r} is not made by a linear operator")
    name, constants = str(node.name), [i for i, v in enumerate(node.inputs) if view.weight(v) is not None]
    match node.op_type:
        case "Conv" if axis < -1:
            rank = len(_weight(node, 1, view).shape)
            return _checked([Part(name, 1, -rank), *_bias(node, view)], view, node, channels)
        case "Gemm" if axis == -1:
            transposed = node.attributes.get_int("transB", 0) != 0
            return _checked([Part(name, 1, -2 if transposed else -1), *_bias(node, view)], view, node, channels)
        case "MatMul" if axis == -1:
            return _checked([Part(name, 1, -1)], view, node, channels)
        case "LayerNormalization" if axis == -1:
            return _checked([Part(name, 1, -1), *_bias(node, view)], view, node, channels)
        case "BatchNormalization" if axis < -1:
            return _checked([Part(name, 1, -1), Part(name, 2, -1)], view, node, channels)
        case "Mul" if len(constants) == 1 and _size(node, constants[0], view, axis) == channels:
            return _checked([Part(name, constants[0], axis)], view, node, channels)
        case "Add" if len(constants) == 1:
            before = _makers(_alone(node, 1 - constants[0]), view, axis, channels, hops + 1)
            return (*before, *_checked([Part(name, constants[0], axis)], view, node, channels))
        case "Mul" | "Div" if len(constants) == 1 and (node.op_type, constants[0]) != ("Div", 0):
            return _makers(_alone(node, 1 - constants[0]), view, axis, channels, hops + 1)
        case "Mul" | "Div" if not constants:
            reasons = []
            for index in range(2 if node.op_type == "Mul" else 1):
                try:
                    return _makers(_alone(node, index), view, axis, channels, hops + 1)
                except Skip as skip:
                    reasons.append(skip.reason)
            raise Skip("; ".join(reasons))
        case op if op in _HOMOGENEOUS or (op in _POOLS and axis < -1):
            return _makers(_alone(node, 0), view, axis, channels, hops + 1)
        case op:
            raise Skip(f"{op} {name!r} does not hand a factor per channel on")


def _alone(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None or value.is_graph_output() or sum(n.op_type not in _BLIND for n, _ in value.uses()) != 1:
        raise Skip(f"input {index} of {node.op_type} {node.name!r} has other readers")
    return value


def _size(node: ir.Node, index: int, view: GraphView, axis: int) -> int:
    shape = _weight(node, index, view, alone=False).shape.numpy()
    return shape[axis] if len(shape) >= -axis else 1


def _bias(node: ir.Node, view: GraphView) -> list[Part]:
    if len(node.inputs) <= 2 or node.inputs[2] is None:
        return []
    if view.weight(node.inputs[2]) is None:
        raise Skip(f"the bias of {node.name!r} is not constant")
    return [Part(str(node.name), 2, -1)]


def _checked(parts: list[Part], view: GraphView, node: ir.Node, channels: int) -> tuple[Part, ...]:
    """The parts, if each has one slice per channel (or, for what is added, one for all)."""
    for part in parts:
        size = _size(node, part.index, view, part.axis)
        added = node.op_type == "Add" or part.index == 2
        if size != channels and not (size == 1 and added):
            raise Skip(f"{node.op_type} {node.name!r} has {size} channels where {channels} are read")
        shape = _weight(node, part.index, view, alone=node.op_type in _LINEAR and part.index == 1).shape.numpy()
        if (added or node.op_type not in _LINEAR) and int(np.prod(shape)) != size:
            raise Skip(f"input {part.index} of {node.op_type} {node.name!r} is not one number per channel")
    return tuple(parts)


def _weight(node: ir.Node, index: int, view: GraphView, *, alone: bool = True) -> ir.TensorProtocol:
    value = node.inputs[index]
    tensor = view.weight(value)
    if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT:
        raise Skip(f"input {index} of {node.op_type} {node.name!r} is not a constant of type float32")
    if alone and len(value.uses()) > 1 and tensor.size > 4096:
        raise Skip(f"the weight {value.name!r} has other readers")
    return tensor
