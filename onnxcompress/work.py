"""Device-independent work of a node: what kind it is, how many multiply-accumulates, how much data.

Kinds are the rows a profile prices. Most operators belong to one family for good (``FAMILY``); those
whose speed depends on their shape are told apart here: a depthwise convolution from a dense one, a
product with one row from one with many.

MACs of a convolution: output elements x input channels per group x taps; of a matrix product:
output elements x inner dimension; of a recurrent layer: steps x weight elements of all gates. Bias,
activation and pooling sums are not MACs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from onnxcompress.pieces import pieces

if TYPE_CHECKING:  # profiles need the kinds, and not onnx-ir, which takes half a second to import
    import onnx_ir as ir

    from onnxcompress.view import GraphView

__all__ = ["FAMILY", "KINDS", "NodeWork", "Shapes", "is_constant", "kinds_of", "shape_of", "text_of", "work_of"]

Shapes = Mapping[str, tuple[int, ...]]
"""Concrete shapes by value name, as seen in a run."""

_CONV = ("conv", "conv_pointwise", "conv_depthwise", "conv_grouped", "conv_stem")
_MATMUL = ("matmul", "matmul_rows1", "matmul_dynamic")

_OPS_OF_FAMILY = {
    "free": (
        "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant", "Dropout",
        "ConstantOfShape", "Range", "OptionalHasElement", "OptionalGetElement", "Optional",
    ),
    "move": (
        "Concat", "Slice", "Split", "Resize", "Upsample", "Pad", "Transpose", "Expand", "Tile", "DepthToSpace",
        "SpaceToDepth", "ReverseSequence", "SequenceConstruct", "SequenceAt", "SplitToSequence", "ConcatFromSequence",
        "Scatter", "ScatterElements", "ScatterND", "Compress", "CenterCropPad", "Col2Im",
    ),
    "pool": ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "MaxUnpool"),
    "reduce": (
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin", "CumSum", "TopK",
    ),
    "normalization": (
        "LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization",
        "LpNormalization", "MeanVarianceNormalization", "LRN", "SkipLayerNormalization", "SimplifiedLayerNormalization",
    ),
    "softmax": ("Softmax", "LogSoftmax", "Hardmax"),
    "transcendental": (
        "Exp", "Log", "Tanh", "Erf", "Gelu", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "Asinh",
        "Acosh", "Atanh", "Pow", "Sigmoid", "Softplus", "Mish", "Swish", "Elu", "Selu", "Celu", "FastGelu", "QuickGelu",
    ),
    "gather": ("Gather", "GatherElements", "GatherND", "GatherBlockQuantized"),
    "quantize": ("QuantizeLinear", "DynamicQuantizeLinear"),
    "dequantize": ("DequantizeLinear",),
    "lstm": ("LSTM", "DynamicQuantizeLSTM"),
    "gru": ("GRU", "RNN"),
    "conv_transpose": ("ConvTranspose",),
    "elementwise": (
        "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Clip", "HardSigmoid", "HardSwish", "Shrink", "Add", "Sub",
        "Mul", "Div", "Mod", "Min", "Max", "Mean", "Sum", "Abs", "Neg", "Sign", "Sqrt", "Reciprocal", "Floor", "Ceil",
        "Round", "Cast", "Where", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not",
        "Xor", "IsNaN", "IsInf", "Trilu",
    ),
}  # fmt: skip

FAMILY: dict[str, str] = {op: family for family, ops in _OPS_OF_FAMILY.items() for op in ops}
"""Kernel kind that prices an operator the profile has no entry of its own for; "elementwise" if not here."""

KINDS = frozenset({*_CONV, *_MATMUL, *_OPS_OF_FAMILY, "resize_linear", "reorder"})
"""Every kind a profile may price, besides single operator types."""

_CONV_OPS = ("Conv", "ConvInteger", "QLinearConv")
_MATMUL_OPS = ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "MatMulNBits")
_GATES = {"LSTM": 4, "DynamicQuantizeLSTM": 4, "GRU": 3, "RNN": 1}
_SHAPED = ("Reshape", "Slice", "Expand", "Tile", "Resize", "Unsqueeze", "Squeeze", "Pad", "Split")
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
_FEW = 4  # channels that a first layer reads
_CONTROL_FLOW = ("If", "Loop", "Scan")


def kinds_of(op_type: str) -> tuple[str, ...]:
    """Kinds the nodes of an operator type may be.

    >>> kinds_of("MatMul")
    ('matmul', 'matmul_rows1', 'matmul_dynamic')
    >>> kinds_of("HardSwish")
    ('elementwise',)
    """
    if op_type in _CONV_OPS:
        return _CONV
    if op_type in _MATMUL_OPS:
        return _MATMUL
    return (FAMILY.get(op_type, "elementwise"),)


@dataclass(frozen=True)
class NodeWork:
    """What a node has to do, whatever runs it.

    Attributes:
        name: node name.
        op_type: operator type.
        kind: kernel kind.
        maps: it works on feature maps (4-D and more), where runtimes keep layouts of their own.
        macs: multiply-accumulates.
        in_channels: channels a MAC kernel reads, per group; 0 if it has none.
        out_channels: channels it writes, per group; 0 if it has none.
        elements_in: activation elements read (constants are not activations).
        elements_out: activation elements written.
        weights: constant elements read in a run; of a table that is gathered from, only the rows fetched.
        params: constant elements the node owns.
        patches: input elements one output channel reads, counted once per use: the unfolded input. Of
            pooling, elements looked at.
        segments: contiguous pieces the data is worked through in: windows of a convolution, rows of a
            softmax, spans of a broadcast, copies of a Concat, steps of a recurrent layer.
        segments_nhwc: the same where feature maps are kept with channels last, as integer kernels do.
        known: all shapes were known; if not, the unknown ones count as nothing.
        blocked: it works in the blocked layout; only who knows the runtime can say so.
    """

    name: str
    op_type: str
    kind: str
    maps: bool = False
    macs: int = 0
    in_channels: int = 0
    out_channels: int = 0
    elements_in: int = 0
    elements_out: int = 0
    weights: int = 0
    params: int = 0
    patches: int = 0
    segments: int = 0
    segments_nhwc: int = 0
    known: bool = True
    blocked: bool = False

    @property
    def elements(self) -> int:
        """Activation elements read and written."""
        return self.elements_in + self.elements_out


def work_of(view: GraphView, node: ir.Node, shapes: Shapes) -> NodeWork:
    """Counts the work of a node.

    Constants behind a DequantizeLinear count as constants, so a node of a quantized model has the work
    of its float self. Shapes are looked up in ``shapes``, then in the model.

    Args:
        view: the model.
        node: one of its nodes, of any domain; control flow has no work of its own, its body has.
        shapes: concrete shapes by value name.
    """
    look = _Look(view, shapes)
    name, op = str(node.name), node.op_type
    if op in _CONTROL_FLOW:
        return NodeWork(name, op, "free")
    inputs = [v for v in node.inputs if v is not None]
    constants = [v for v in inputs if look.constant(v)]
    activations = [look.shape(v) for v in inputs if not look.constant(v)]
    outputs = [look.shape(v) for v in node.outputs if v.name and (v.uses() or v.is_graph_output())]
    params = sum(math.prod(look.shape(v) or ()) for v in constants if not _is_shape_data(op, node, v))
    first = (activations or outputs or [None])[0]
    common = _Common(
        name=name,
        op_type=op,
        maps=max((len(s) for s in (*activations, *outputs) if s), default=0) >= 4,
        elements_in=_count(activations),
        elements_out=_count(outputs),
        params=params,
        known=None not in activations and None not in outputs,
    )
    if op in _CONV_OPS or op == "ConvTranspose":
        return _convolution(node, look, common)
    if op in _MATMUL_OPS:
        return _product(node, look, common)
    if op in _GATES:
        return _recurrent(node, look, common)
    kind = kinds_of(op)[0]
    if kind == "gather":
        fetched = common.elements_out if constants else 0
        rows = pieces(node, [look.shape(v) for v in inputs], outputs, kind, look.integers)[0]
        return common.work(kind, weights=fetched, segments=rows, segments_nhwc=rows)
    if kind == "dequantize" and constants:  # of a weight: all of it is read and written like an activation
        rows = pieces(node, [look.shape(v) for v in inputs], outputs, kind, look.integers)[0]
        return replace(common, elements_in=common.elements_out).work(kind, segments=rows)
    if op in ("Resize", "Upsample") and text_of(node, "mode", "nearest") != "nearest":
        kind = "resize_linear"
    channels = first[1] if kind == "pool" and first is not None and len(first) > 1 else 0
    segments, nhwc = pieces(node, [look.shape(v) for v in inputs], outputs, kind, look.integers)
    return common.work(
        kind, weights=params, in_channels=channels, out_channels=channels, segments=segments, segments_nhwc=nhwc,
        patches=_pooled(node, first, outputs) if kind == "pool" else 0,
    )  # fmt: skip


def shape_of(view: GraphView, shapes: Shapes, value: ir.Value) -> tuple[int, ...] | None:
    """Shape of a value, looked up in ``shapes``, then in the model; None if unknown."""
    return _Look(view, shapes).shape(value)


@dataclass(frozen=True)
class _Common:
    name: str
    op_type: str
    maps: bool
    elements_in: int
    elements_out: int
    params: int
    known: bool

    def work(
        self, kind: str, *, macs: int = 0, in_channels: int = 0, out_channels: int = 0,
        weights: int = 0, patches: int = 0, segments: int = 0, segments_nhwc: int | None = None, known: bool = True,
    ) -> NodeWork:  # fmt: skip
        return NodeWork(
            self.name, self.op_type, kind, self.maps, macs, in_channels, out_channels, self.elements_in,
            self.elements_out, weights, self.params, patches, segments,
            segments if segments_nhwc is None else segments_nhwc, self.known and known,
        )  # fmt: skip


class _Look:
    """Shapes and constants, seen through the DequantizeLinear of a weight."""

    def __init__(self, view: GraphView, shapes: Shapes) -> None:
        self.view, self.shapes = view, shapes

    def constant(self, value: ir.Value | None) -> bool:
        return value is not None and is_constant(self.view, value)

    def integers(self, value: ir.Value | None) -> tuple[int, ...]:
        """What a small constant says; nothing if it is not one."""
        tensor = None if value is None else self.view.weight(value)
        if tensor is None or tensor.size > 64:
            return ()
        return tuple(int(n) for n in tensor.numpy().ravel())

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if value.name in self.shapes:
            return tuple(self.shapes[str(value.name)])
        tensor = self.view.weight(value)
        shape = value.shape if tensor is None else tensor.shape
        if shape is None:
            return self._shape_of_stored(self.view.producer(value))
        dims = [d for d in shape if isinstance(d, int)]
        return tuple(dims) if len(dims) == len(shape) else None

    def _shape_of_stored(self, producer: ir.Node | None) -> tuple[int, ...] | None:
        """Shape of a weight that is kept in another form: scaled, cast, or looked up in a codebook."""
        if producer is None or not is_constant(self.view, producer.outputs[0]):
            return None
        shapes = [self.shape(v) for v in producer.inputs if v is not None]
        if None in shapes or not shapes:
            return None
        if producer.op_type in ("DequantizeLinear", "Cast", "Identity"):
            return shapes[0]
        if producer.op_type == "Gather" and len(shapes[0] or ()) == 1:
            return shapes[1]
        return np.broadcast_shapes(*[s for s in shapes if s is not None]) if producer.op_type == "Mul" else None


def is_constant(view: GraphView, value: ir.Value) -> bool:
    """Whether a value is the same in every run: a weight, or made of weights alone.

    A weight behind a DequantizeLinear is constant, though onnxruntime computes it anew in every run.
    """
    known = _constants.get(view)
    if known is None:
        known = _constants[view] = _constant_values(view)
    return value in known or view.weight(value) is not None


_constants: WeakKeyDictionary[GraphView, frozenset[ir.Value]] = WeakKeyDictionary()


def _constant_values(view: GraphView) -> frozenset[ir.Value]:
    found: set[ir.Value] = set()
    for node in view.nodes():
        if node.op_type in (*_CONTROL_FLOW, *_RANDOM):
            continue
        if all(v is None or v in found or view.weight(v) is not None for v in node.inputs):
            found.update(node.outputs)
    return frozenset(found)


def _convolution(node: ir.Node, look: _Look, common: _Common) -> NodeWork:
    transposed = node.op_type == "ConvTranspose"
    index = 3 if node.op_type == "QLinearConv" else 1
    weight = look.shape(node.inputs[index]) if len(node.inputs) > index else None
    data, out = look.shape(node.inputs[0]), look.shape(node.outputs[0])
    kind = "conv_transpose" if transposed else "conv"
    if weight is None or len(weight) < 3:
        return common.work(kind, known=False)
    group = groups_of(node, data, out, weight)
    taps = math.prod(weight[2:])
    inner, outer = (weight[0] // group, weight[1]) if transposed else (weight[1], weight[0] // group)
    if not transposed:
        kind = _convolution_kind(inner, outer, group, taps)
    pixels = None if (data if transposed else out) is None else _pixels(data if transposed else out)
    macs = 0 if pixels is None else pixels * inner * outer * group * taps
    # In depthwise kernels channels run side by side, as one axis.
    channels = (1, outer * group) if kind == "conv_depthwise" else (inner, outer)
    return common.work(
        kind, macs=macs, in_channels=channels[0], out_channels=channels[1], weights=common.params,
        patches=0 if pixels is None else pixels * inner * taps, known=pixels is not None,
        # Blocked kernels pass along a row of outputs for each tap; with channels last the channels under a tap are
        # copied, and of few channels those under a row of taps.
        segments=(pixels or 0) * taps * group // max(out[-1] if out else 1, 1),
        segments_nhwc=(pixels or 0) * group * (taps if inner > _FEW else weight[2] if len(weight) > 3 else 1),
    )  # fmt: skip


def groups_of(node: ir.Node, data: tuple[int, ...] | None, out: tuple[int, ...] | None, weight: tuple[int, ...]) -> int:
    """Groups of a convolution of these shapes; where channels were taken away, the attribute still tells the old."""
    attribute = node.attributes.get("group")
    group = 1 if attribute is None else attribute.as_int()
    channels = out if node.op_type == "ConvTranspose" else data
    if group == 1 or channels is None or len(channels) < 2 or channels[1] % max(weight[1], 1):
        return group
    return max(channels[1] // max(weight[1], 1), 1)


def _convolution_kind(inner: int, outer: int, group: int, taps: int) -> str:
    if inner == outer == 1:  # each channel by itself; a single one, too
        return "conv_depthwise"
    if group > 1:
        return "conv_depthwise" if inner == 1 else "conv_grouped"
    if inner <= _FEW:
        return "conv_stem"
    return "conv_pointwise" if taps == 1 else "conv"


def _blocks(node: ir.Node, look: _Look, common: _Common) -> NodeWork:
    """A product with weights of few bits, of which the attributes tell the size."""
    inner, columns, out = _flag(node, "K"), _flag(node, "N"), look.shape(node.outputs[0])
    if out is None or not columns:
        return common.work("matmul", known=False)
    rows = math.prod(out) // columns
    bias = look.shape(node.inputs[5]) if len(node.inputs) > 5 else None
    params = inner * columns + (0 if bias is None else math.prod(bias))
    return replace(common, params=params).work(
        "matmul_rows1" if rows <= 4 else "matmul", macs=rows * inner * columns, in_channels=inner,
        out_channels=columns, weights=params, patches=rows * inner,
    )  # fmt: skip


def _product(node: ir.Node, look: _Look, common: _Common) -> NodeWork:
    if node.op_type == "MatMulNBits":
        return _blocks(node, look, common)
    second = 3 if node.op_type == "QLinearMatMul" else 1
    left, right = look.shape(node.inputs[0]), look.shape(node.inputs[second])
    out = look.shape(node.outputs[0])
    # A product with the constant on the left is the same work seen from the other side.
    constant = [look.constant(node.inputs[i]) for i in (0, second)]
    inner = 0
    if left:
        inner = left[0 if _flag(node, "transA") else -1]
    elif right:
        inner = right[-1 if _flag(node, "transB") or len(right) == 1 else -2]
    if not inner or out is None or not out:
        return common.work("matmul", weights=common.params, known=False)
    if not any(constant):
        products = math.prod(out[:-2]) if len(out) > 2 else 1
        return common.work("matmul_dynamic", macs=math.prod(out) * inner, segments=products)
    columns = out[-1] if constant[1] else (out[-2] if len(out) > 1 else 1)
    rows = math.prod(out) // columns if columns else 0
    return common.work(
        "matmul_rows1" if rows <= 4 else "matmul", macs=math.prod(out) * inner, in_channels=inner,
        out_channels=columns, weights=common.params, patches=rows * inner,
    )  # fmt: skip


def _recurrent(node: ir.Node, look: _Look, common: _Common) -> NodeWork:
    data = look.shape(node.inputs[0])
    weights = [look.shape(node.inputs[i]) for i in (1, 2)]
    kind = "lstm" if _GATES[node.op_type] == 4 else "gru"
    if data is None or len(data) != 3 or None in weights:
        return common.work(kind, weights=common.params, known=False)
    steps, batch = (data[1], data[0]) if _flag(node, "layout") else (data[0], data[1])
    directions = (weights[0] or (1,))[0]
    return common.work(kind, macs=steps * batch * _count(weights), weights=common.params, segments=steps * directions)


def _pooled(node: ir.Node, data: Sequence[int] | None, outputs: Sequence[tuple[int, ...] | None]) -> int:
    """Elements a pooling looks at, once per use."""
    if node.op_type.startswith("Global"):
        return math.prod(data or ())
    window = node.attributes.get("kernel_shape")
    return _count(outputs[:1]) * (math.prod(window.as_ints()) if window is not None else 1)


def _pixels(shape: Sequence[int] | None) -> int | None:
    return None if shape is None or len(shape) < 3 else shape[0] * math.prod(shape[2:])


def _count(shapes: Sequence[tuple[int, ...] | None]) -> int:
    return sum(math.prod(s) for s in shapes if s is not None)


def _flag(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def text_of(node: ir.Node, name: str, default: str) -> str:
    """A string attribute of a node."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _is_shape_data(op: str, node: ir.Node, value: ir.Value) -> bool:
    """Sizes, axes and the like: constants, but nobody's parameters."""
    return (op in _SHAPED or op.startswith("Reduce")) and value is not node.inputs[0]
