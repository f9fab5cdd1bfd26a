"""Per-channel affine maps go into the weights of the linear operator before or after them.

With ``conv(x) = W * x + B`` and a map ``f(y) = a y + b``, constant along every axis but the channels:

    f(conv(x)) = (a W) * x + (a B + b)           always; a scales output channels
    conv(f(x)) = (W a) * x + (B + sum W b)       where nothing is padded, or b = 0; a scales input channels

BatchNormalization in inference is such a map with ``a = gamma / sqrt(var + eps)``, ``b = beta - a mean``;
Mul, Div, Add and Sub with per-channel constants are, too. Computed in float64 and rounded once, so each
weight is off by at most half a unit in the last place. The linear operator is a Conv, ConvTranspose
(maps after it only) or Gemm, and the value in between has no other reader and is no output.

    conv(pad(x)) = conv with larger pads         where pad adds zeros to spatial axes

onnxscript's rules compute in float32, refuse shared weights, and write the new weights under the old
names, so they are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["FuseBatchNorm"]

Array = npt.NDArray[np.float64]

_LINEAR = ("Conv", "ConvTranspose", "Gemm")
_AFFINE = ("BatchNormalization", "Mul", "Div", "Add", "Sub")


class _Map(NamedTuple):
    """y = scale * x + shift, x being input ``operand`` of the node; float64, one number per channel."""

    operand: int
    scale: Array
    shift: Array


@dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """Folds BatchNormalization and other per-channel affine maps into Conv, ConvTranspose and Gemm."""

    name: ClassVar[str] = "fuse_batchnorm"
    stage: ClassVar[Stage] = Stage.NORMALISE
    ops: ClassVar[tuple[str, ...]] = (*_AFFINE, "Pad")
    lossless: ClassVar[bool] = True

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        reasons: dict[ir.Node, str] = {}
        into: dict[ir.Value, ir.Node] = {}  # what a linear operator computes once the sites so far are made
        for node in view.nodes(*_AFFINE):
            linear = next((n for v in node.inputs if v is not None and (n := into.get(v, v.producer()))), None)
            if linear is None or linear.op_type not in _LINEAR or linear.domain or not _has_constant(node, view):
                continue
            try:
                _after(node, linear, view)
            except Skip as skip:
                reasons[node] = skip.reason
            else:
                into[node.outputs[0]] = linear
                yield Site.of(node, linear)
        towards: dict[ir.Node, ir.Node] = {}
        for node in reversed(view.nodes(*_AFFINE, "Pad")):
            reader = _reader(node)
            linear = towards.get(reader, reader) if reader is not None else None
            if node.outputs[0] in into or linear is None or linear.op_type not in ("Conv", "Gemm") or linear.domain:
                continue
            if not _has_constant(node, view):
                continue
            try:
                _pads(node, linear, view) if node.op_type == "Pad" else _before(node, linear, view)
            except Skip as skip:
                reasons[node] = skip.reason
            else:
                towards[node] = linear
                reasons.pop(node, None)
                yield Site.of(node, linear)
        for node in view.nodes("BatchNormalization"):
            if node.outputs[0] not in into and node not in towards:
                reasons.setdefault(node, "no Conv, ConvTranspose or Gemm with constant weights is next to it")
        yield from (Skipped(str(node.name), reason) for node, reason in reasons.items())

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return [Choice(site, "fuse", effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node, linear = (rewriter.node(name) for name in choice.site.nodes)
        view = rewriter.view()
        if node.op_type == "Pad" and _reader(node) is linear:
            pads = _pads(node, linear, view)
            source = node.inputs[0]
            rewriter.set_attribute(linear, "pads", pads)
        elif any(v is not None and v.producer() is linear for v in node.inputs):
            weight, bias = _after(node, linear, view)
            source = linear.outputs[0]
            _set(linear, weight, bias, rewriter)
        elif _reader(node) is linear:
            weight, bias = _before(node, linear, view)
            source = node.inputs[_affine(node, view, linear, inputs=True).operand]
            _set(linear, weight, bias, rewriter)
        else:
            raise Skip("it is not next to the linear operator any more")
        if source is not None:
            rewriter.replace_uses(node.outputs[0], source)
        rewriter.remove_unused(node)


def _has_constant(node: ir.Node, view: GraphView) -> bool:
    return any(view.weight(v) is not None for v in node.inputs) or node.op_type in ("BatchNormalization", "Pad")


def _set(linear: ir.Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any], rewriter: Rewriter) -> None:
    rewriter.set_weight(linear, 1, weight)
    rewriter.set_weight(linear, 2, bias)
    if linear.op_type == "Gemm":
        rewriter.set_attribute(linear, "beta", 1.0)


def _after(node: ir.Node, linear: ir.Node, view: GraphView) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Weight and bias of the linear operator followed by the map."""
    weight, bias = _weights(linear, view)
    axis, groups = _channels(linear)
    affine = _affine(node, view, linear)
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


def _before(node: ir.Node, linear: ir.Node, view: GraphView) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Weight and bias of the map followed by the linear operator."""
    weight, bias = _weights(linear, view)
    if linear.op_type == "Gemm" and linear.attributes.get_int("transA", 0) != 0:
        raise Skip(f"{linear.name!r} transposes its input")
    affine = _affine(node, view, linear, inputs=True)
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


def _affine(node: ir.Node, view: GraphView, linear: ir.Node, *, inputs: bool = False) -> _Map:
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
            return _Map(index, constant, zero)
        case "Div":
            with np.errstate(divide="ignore"):
                return _Map(index, 1.0 / constant, zero)
        case "Add":
            return _Map(index, one, constant)
        case _:
            return _Map(index, one, -constant) if index == 0 else _Map(index, -one, constant)


def _batch_norm(node: ir.Node, view: GraphView, channels: int) -> _Map:
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
    return _Map(0, scale, beta - mean * scale)


def _reader(node: ir.Node) -> ir.Node | None:
    """The node that reads the output as its first input, if nobody else does."""
    value = node.outputs[0]
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader, index = next(iter(uses))
    return reader if reader.graph is node.graph and (index == 0 or reader.op_type in _AFFINE) else None


def _pads(pad: ir.Node, conv: ir.Node, view: GraphView) -> list[int]:
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
    own = np.array(conv.attributes.get_ints("pads", (0,) * (2 * (rank - 2))), np.int64)
    return [int(p) for p in pads[:, 2:].reshape(-1) + own]
