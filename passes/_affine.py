"""Per-channel affine maps and the weights that take them in; the algebra is in ``fuse_batchnorm``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.view import GraphView

__all__ = ["AFFINE", "LINEAR", "affine_of", "pads_of", "reader_of", "weights_after", "weights_before"]

_MANY_PADS = 8
"""Zeros along one axis from which a Pad stays. Windows that lie partly in a convolution's own pads take a slow path of
onnxruntime 1.32: 128 channels to 16 over 128 positions, ms with the pads in the convolution and with a Pad before it:

    taps                  3         16         64
    kernel k x 1    .026 .019  .181 .052  .863 .191        (64 channels for 3 taps)
    kernel 1 x k    .017 .019  .059 .052  .440 .190

CREPE, with six such kernels of 64 and 512 taps, took 2.2 times as long with them folded.
"""

Array = npt.NDArray[np.float64]

LINEAR = ("Conv", "ConvTranspose", "Gemm")
AFFINE = ("BatchNormalization", "Mul", "Div", "Add", "Sub")


class Map(NamedTuple):
    """y = scale * x + shift, x being input ``operand`` of the node; float64, one number per channel."""

    operand: int
    scale: Array
    shift: Array


def weights_after(node: ir.Node, linear: ir.Node, view: GraphView) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Weight and bias of the linear operator followed by the map."""
    weight, bias = _weights(linear, view)
    axis, groups = _channels(linear)
    affine = affine_of(node, view, linear)
    between = node.inputs[affine.operand]
    if between is None or len(between.uses()) != 1 or between.is_graph_output() or node.graph is not linear.graph:
        raise Skip(f"the output of {linear.name!r} has other readers")
    shape = [1] * weight.ndim
    shape[axis] = -1
    if linear.op_type == "ConvTranspose":  # (in, out / groups, ...): input channels of group g make outputs of group g
        scale = np.repeat(affine.scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        scaled = weight * scale.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    else:
        scaled = weight * affine.scale.reshape(shape)
    return _rounded(linear, view, scaled, bias * affine.scale + affine.shift)


def weights_before(node: ir.Node, linear: ir.Node, view: GraphView) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Weight and bias of the map followed by the linear operator."""
    weight, bias = _weights(linear, view)
    if linear.op_type == "Gemm" and linear.attributes.get_int("transA", 0) != 0:
        raise Skip(f"{linear.name!r} transposes its input")
    affine = affine_of(node, view, linear, inputs=True)
    _, groups = _channels(linear)
    padded = any(linear.attributes.get_ints("pads", ())) or linear.attributes.get_string("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    )
    if padded and affine.shift.any():
        raise Skip(f"{linear.name!r} pads with zeros, which the map would have shifted")
    if linear.op_type == "Gemm":
        alpha = linear.attributes.get_float("alpha", 1.0)
        rows = weight.T if linear.attributes.get_int("transB", 0) else weight
        scaled, more = rows * affine.scale[:, None], alpha * (affine.shift @ rows)
        return _rounded(linear, view, scaled.T if linear.attributes.get_int("transB", 0) else scaled, bias + more)
    per_output = np.repeat(affine.scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    shifts = np.repeat(affine.shift.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
    scaled = weight * per_output.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    return _rounded(linear, view, scaled, bias + (taps * shifts).sum(axis=1))


def _rounded(linear: ir.Node, view: GraphView, weight: Array, bias: Array) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    dtype = np.float64 if _weight(linear, view).dtype == ir.DataType.DOUBLE else np.float32
    with np.errstate(over="ignore"):
        rounded = weight.astype(dtype), bias.astype(dtype)
    if not all(np.isfinite(a).all() for a in rounded):
        raise Skip("the fused weights would not be finite")
    return rounded


def _weight(linear: ir.Node, view: GraphView) -> ir.TensorProtocol:
    tensor = view.weight(linear.inputs[1])
    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        raise Skip(f"{linear.name!r} has no constant float32 weight")
    return tensor


def _weights(linear: ir.Node, view: GraphView) -> tuple[Array, Array]:
    """Weight and bias in float64; the bias has one number per output channel."""
    weight = _weight(linear, view).numpy()
    axis, groups = _channels(linear)
    channels = weight.shape[axis] * (groups if linear.op_type == "ConvTranspose" else 1)
    given = linear.inputs[2] if len(linear.inputs) > 2 else None
    if given is None:
        return weight.astype(np.float64), np.zeros(channels)
    bias = view.array(given)
    if bias is None or (bias.size not in (1, channels)) or bias.shape[-1:] not in ((), (1,), (channels,)):
        raise Skip(f"the bias of {linear.name!r} is not one constant per channel")
    beta = linear.attributes.get_float("beta", 1.0) if linear.op_type == "Gemm" else 1.0
    return weight.astype(np.float64), np.broadcast_to(beta * bias.astype(np.float64).reshape(-1), channels)


def _channels(linear: ir.Node) -> tuple[int, int]:
    """Axis of the weight that holds the output channels (of one group), and groups."""
    if linear.op_type == "Gemm":
        return (0 if linear.attributes.get_int("transB", 0) else 1), 1
    return (1 if linear.op_type == "ConvTranspose" else 0), linear.attributes.get_int("group", 1)


def affine_of(node: ir.Node, view: GraphView, linear: ir.Node, *, inputs: bool = False) -> Map:
    """The map a node computes on the output (or input) channels of a linear operator."""
    sizes = _weight(linear, view).shape.numpy()
    axis, groups = _channels(linear)
    if not inputs:
        channels = sizes[axis] * (groups if linear.op_type == "ConvTranspose" else 1)
    else:
        channels = sizes[1 - axis] * groups
    if node.op_type == "BatchNormalization":
        return _batch_norm(node, view, channels)
    constants = [i for i, v in enumerate(node.inputs) if view.weight(v) is not None]
    if len(constants) != 1 or (node.op_type == "Div" and constants == [0]):
        raise Skip("it does not combine a value with a constant")
    array = view.array(node.inputs[constants[0]])
    rank = len(sizes)
    if array is None or array.dtype not in (np.float32, np.float64):
        raise Skip("its constant is not of type float32")
    if array.ndim > rank or (1,) * (rank - array.ndim) + array.shape not in (
        (1,) * rank,
        (1, channels, *(1,) * (rank - 2)),
    ):
        raise Skip(f"its constant of shape {list(array.shape)} is not one number per channel")
    constant = np.broadcast_to(array.astype(np.float64).reshape(-1), channels)
    one, zero, index = np.ones(channels), np.zeros(channels), 1 - constants[0]
    match node.op_type:
        case "Mul":
            return Map(index, constant, zero)
        case "Div":
            with np.errstate(divide="ignore"):
                return Map(index, 1.0 / constant, zero)
        case "Add":
            return Map(index, one, constant)
        case _:
            return Map(index, one, -constant) if index == 0 else Map(index, -one, constant)


def _batch_norm(node: ir.Node, view: GraphView, channels: int) -> Map:
    if node.attributes.get_int("training_mode", 0) or (view.opset < 7 and not node.attributes.get_int("is_test", 0)):
        raise Skip("it is in training mode")
    if not node.attributes.get_int("spatial", 1):
        raise Skip("it has statistics per position")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Skip("its running statistics are read")
    arrays = [a.astype(np.float64) for v in node.inputs[1:5] if (a := view.array(v)) is not None]
    if len(arrays) != 4:
        raise Skip("its parameters are not constant")
    if any(a.shape != (channels,) for a in arrays):
        raise Skip("its parameters are not one number per channel")
    gamma, beta, mean, variance = arrays
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return Map(0, scale, beta - mean * scale)


def reader_of(node: ir.Node) -> ir.Node | None:
    """The node that reads the output as its first input, if nobody else does."""
    value = node.outputs[0]
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader, index = next(iter(uses))
    return reader if reader.graph is node.graph and (index == 0 or reader.op_type in AFFINE) else None


def pads_of(pad: ir.Node, conv: ir.Node, view: GraphView) -> list[int]:
    """Pads of the Conv that does the work of a Pad before it."""
    if conv.op_type != "Conv":
        raise Skip(f"{conv.op_type} does not pad")
    if pad.attributes.get_string("mode", "constant") != "constant":
        raise Skip("it pads with something else than a constant")
    inputs = [*pad.inputs, None, None, None][:4]
    fill = view.array(inputs[2]) if inputs[2] is not None else np.float64(pad.attributes.get_float("value", 0.0))
    given = view.array(inputs[1]) if inputs[1] is not None else pad.attributes.get_ints("pads", None)
    axes = view.array(inputs[3]) if inputs[3] is not None else None
    if fill is None or given is None or (inputs[3] is not None and axes is None):
        raise Skip("how it pads is not constant")
    if np.any(fill):
        raise Skip("it pads with something else than zero")
    if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise Skip(f"{conv.name!r} pads by itself")
    rank, half = len(_weight(conv, view).shape), len(given) // 2
    where = [int(a) % rank for a in axes] if axes is not None else list(range(half))
    if axes is None and half != rank:
        raise Skip("how it pads is not constant")
    pads = np.zeros((2, rank), np.int64)
    for i, axis in enumerate(where):
        pads[:, axis] = int(given[i]), int(given[i + half])
    if pads[:, :2].any() or (pads < 0).any():
        raise Skip("it pads or crops other than spatial axes")
    if (pads[:, 2:].sum(0) >= _MANY_PADS).any():
        raise Skip("long kernels are slower with pads of their own")
    own = np.array(conv.attributes.get_ints("pads", (0,) * (2 * (rank - 2))), np.int64)
    return [int(p) for p in pads[:, 2:].reshape(-1) + own]
