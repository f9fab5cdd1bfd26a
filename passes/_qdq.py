"""Static int8: QuantizeLinear/DequantizeLinear pairs that onnxruntime fuses into integer kernels.

A node runs on integers when each data input comes from a DequantizeLinear, its weight too, and its
output goes into a QuantizeLinear. So each value that lives as u8 gets exactly one pair, right after
its producer, whoever asks first: x -> Q -> DQ -> consumers.

    s = (hi - lo) / 255, z = round(-lo / s), lo <= 0 <= hi, so that 0 is exact (padding, Relu);
    s8: z - 128; symmetric: s = max(-lo, hi) / 127, z in the middle (128, or 0 for s8).

Operators that only move values keep the scale of what they move; onnxruntime then drops both ends
and moves bytes. Bias: int32 in units of s_x s_w; s_w is raised where b / (s_x s_w) would overflow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Precision, Skip
from onnxcompress.passes._int8 import (
    ActivationOptions,
    WeightOptions,
    activation_inputs,
    calibrated_name,
    channel_axes,
    gate,
    keep_calibrated_name,
    quantize_tensor,
    quantize_weight,
    weight_indices,
)
from onnxcompress.ranges import clip_range
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, RangeMethod
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["SILENT_OPS", "STATIC_OPS", "Static", "native_inputs", "no_kernel", "obstacle", "range_owners"]

_PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
_ARITHMETIC = frozenset({"Add", "Mul", "Sub", "Concat"})
_OWN_RANGE = frozenset({"AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax"})
_MOVES = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "MaxPool",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_ELSEWHERE = frozenset(
    {
        "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "Pad", "ReduceMax", "ReduceMean", "ReduceSum", "Relu",
        "SpaceToDepth", "Sub", "Tanh",
    }
)  # fmt: skip
"""Operators that other runtimes run on integers between Q and DQ; onnxruntime computes them in float there."""

STATIC_OPS = _PRODUCTS | _ARITHMETIC | _OWN_RANGE | _MOVES | _ELSEWHERE
"""Operators that have an integer form; all but ``_ELSEWHERE`` onnxruntime runs so (measured on 1.32)."""

SILENT_OPS = frozenset(
    {"Cast", "Constant", "ConstantOfShape", "Identity", "NonZero", "Range", "Shape", "Size", "Where"}
)
"""Operators about which "stays float" needs no word: they hold no float work."""

_INT32_ROOM = 2.0**30
_U8 = ActivationOptions()


def obstacle(node: ir.Node, view: GraphView) -> str | None:
    """Why the node cannot run on integers with scales known beforehand, on any device; None if it can."""
    if node.op_type not in STATIC_OPS:
        return f"onnxruntime has no int8 kernel for {node.op_type}"
    inputs = activation_inputs(node, view)
    if not inputs:
        return "all its inputs are constants"
    for value in inputs:
        if value.dtype != ir.DataType.FLOAT:
            kind = "of unknown type" if value.dtype is None else value.dtype.name.lower()
            return f"input {value.name!r} is {kind}, not float32"
    attributes = node.attributes
    if node.op_type in _PRODUCTS:
        if not all(view.is_float_weight(node.inputs[i]) for i in weight_indices(node)):
            return "its weight is not a float32 constant"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not view.is_float_weight(bias):
            return "its bias is not a constant"
    if node.op_type == "MatMul" and len(_shape(view, node.inputs[1])) != 2:
        return "its weight is not a matrix"
    if node.op_type == "Gemm":
        if attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
            return "alpha or beta is not 1"
        if attributes.get_int("transA", 0):
            return "its data input is transposed"
        if len(node.inputs) > 2 and node.inputs[2] is not None and len(_shape(view, node.inputs[2])) != 1:
            return "its bias is not a vector"
    if node.op_type == "Concat" and len(inputs) != len(node.inputs):
        return "it joins constants"
    if node.op_type in ("Add", "Mul", "Sub") and any(v is not None and v.is_initializer() for v in node.inputs):
        constant = next(v for v in node.inputs if v is not None and v.is_initializer())
        if not view.is_float_weight(constant):
            return "its constant operand is not float32"
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return "it also returns indices"
    return None


def no_kernel(node: ir.Node, target: Target) -> str | None:
    """Why the device does not run the node's integer form; None if it does, as far as passes know."""
    if node.op_type in _ELSEWHERE and not target.has(node.op_type, Precision.STATIC):
        return f"onnxruntime has no int8 kernel for {node.op_type}"
    mixes = node.op_type == "Resize" and not _only_moves(node)
    if mixes and not target.has("resize_linear", Precision.STATIC):
        return "only nearest-neighbour Resize runs on integers"
    return None


def native_inputs(node: ir.Node, view: GraphView) -> tuple[str, ...]:
    """Inputs worth reading as integers only if their producer leaves them so: those around a MaxPool.

    onnxruntime moves a QuantizeLinear behind a MaxPool before it, and away from integer
    convolutions it pools u8 in the plain layout: 3.1 ms where float took 0.1 (1.32, 32 channels at
    64 x 608).
    """
    values = activation_inputs(node, view)
    if node.op_type == "MaxPool":
        return tuple(str(v.name) for v in values)
    makers = ((v, view.producer(v)) for v in values)
    return tuple(str(v.name) for v, maker in makers if maker is not None and maker.op_type == "MaxPool")


def range_owners(node: ir.Node, last: ir.Node, view: GraphView) -> tuple[str, ...]:
    """Values whose ranges set the scales of the inputs and outputs of a site, each once."""
    values = [*activation_inputs(node, view), *(v for v in last.outputs if v.name)]
    return tuple(dict.fromkeys(str(_origin(v).name) for v in values))


def _origin(value: ir.Value) -> ir.Value:
    """Walks up through operators that only move values, and through Q/DQ pairs, to who sets the scale."""
    while (producer := value.producer()) is not None:
        upstream = producer.inputs[0] if producer.inputs else None
        if upstream is None or not _only_moves(producer) or upstream.is_initializer():
            return value
        value = upstream
    return value


def _only_moves(node: ir.Node) -> bool:
    """Whether every element of the output is one of the input, so that both share a scale."""
    if node.op_type == "Resize":  # linear mixes neighbours, cubic overshoots them
        return node.attributes.get_string("mode", "nearest") == "nearest"
    return node.op_type in _MOVES


def _shape(view: GraphView, value: ir.Value | None) -> tuple[int, ...]:
    tensor = view.weight(value)
    return () if tensor is None else tuple(tensor.shape.numpy())


class Static:
    """Makes static sites in one model.

    Args:
        rewriter: of the model.
        evidence: with a histogram for every :func:`range_owners`.
        method: how ranges are read off.
        percentile: for the percentile method.
        bias_correction: compensate the mean error of rounded Conv weights.
        activations: integers activations become.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        evidence: Evidence,
        method: RangeMethod,
        percentile: float,
        bias_correction: bool,
        activations: ActivationOptions,
    ) -> None:
        self._activations = activations
        self._rewriter, self._evidence = rewriter, evidence
        self._method, self._percentile, self._correct = method, percentile, bias_correction

    def apply(self, node: ir.Node, last: ir.Node, options: WeightOptions) -> None:
        """Makes a node (and the activation ``last`` that runs with it) run on integers.

        Raises:
            Skip: a value it needs was not observed in calibration.
        """
        inputs = activation_inputs(node)
        for needed in (*inputs, *(v for v in last.outputs if v.name)):
            if not self._known(needed):
                raise Skip(f"{needed.name!r} was not observed in calibration")
        source = calibrated_name(inputs[0])
        for index, value in enumerate(node.inputs):
            if value is not None and any(value is v for v in inputs):
                self._rewriter.set_input(node, index, self._pair(value))
            elif value is not None and node.op_type in _ARITHMETIC:
                self._rewriter.set_input(node, index, self._constant(value, node))
        if node.op_type in _PRODUCTS:
            self._weight(node, source, options)
        for value in last.outputs:
            if value.name and (value.uses() or value.is_graph_output()):
                self._live_as_integers(value)

    def simulate(self, value: ir.Value, switch: ir.Value) -> None:
        """Gates the rounding of a value, for everyone who reads it."""
        if not self._known(value):
            raise Skip(f"{value.name!r} was not observed in calibration")
        scale, zero = self._parameters(value)
        edits = len(self._rewriter.log)
        (q,) = self._rewriter.insert("QuantizeLinear", [value, scale, zero], after=value)
        (dq,) = self._rewriter.insert("DequantizeLinear", [q, scale, zero], after=q.producer())
        gate(self._rewriter, value, dq, switch, edits)

    # --- values --------------------------------------------------------------------------------

    def _known(self, value: ir.Value) -> bool:
        origin = _origin(value)
        return _is_dequantized(origin) or str(origin.name) in self._evidence.histograms

    def _parameters(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of a value, shared by everything that has the same origin."""
        origin = _origin(value)
        producer = origin.producer()
        if producer is not None and _is_dequantized(origin):
            scale, zero = producer.inputs[1], producer.inputs[2]
            if scale is not None and zero is not None:
                return scale, zero
        name = f"{origin.name}_scale"
        found = self._rewriter.find(name)
        zero = self._rewriter.find(f"{origin.name}_zero_point")
        if found is not None and zero is not None:
            return found, zero
        low, high = clip_range(self._evidence.histogram(str(origin.name)), self._method, percentile=self._percentile)
        s, z = affine(low, high, self._activations)
        return self._rewriter.constant(s, name), self._rewriter.constant(z, f"{origin.name}_zero_point")

    def _pair(self, value: ir.Value) -> ir.Value:
        """The dequantized form of a value, made if it is not there yet."""
        if _is_dequantized(value):
            return value
        for use in value.uses():
            if use.node.op_type == "QuantizeLinear" and use.idx == 0:
                return next(iter(use.node.outputs[0].uses())).node.outputs[0]
        scale, zero = self._parameters(value)
        (q,) = self._rewriter.insert(
            "QuantizeLinear",
            [value, scale, zero],
            name=f"{value.name}_quantize",
            dtype=self._activations.dtype,
            shape=value.shape,
            after=value,
        )
        (dq,) = self._rewriter.insert(
            "DequantizeLinear",
            [q, scale, zero],
            after=q.producer(),
            name=f"{value.name}_dequantize",
            dtype=ir.DataType.FLOAT,
            shape=value.shape,
        )
        keep_calibrated_name(dq, value)
        return dq

    def _live_as_integers(self, value: ir.Value) -> None:
        """Everyone who reads the value, the model's output too, reads it from its pair."""
        if _is_dequantized(value):
            return
        dq = self._pair(value)
        inner = [use.node for use in value.uses() if use.node.op_type == "QuantizeLinear" and use.idx == 0]
        self._rewriter.replace_uses(value, dq, keep=inner)

    # --- constants -----------------------------------------------------------------------------

    def _constant(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """A constant operand of Add or Mul in the integers of activations, one scale."""
        if value.const_value is None:
            return value
        array = value.const_value.numpy()
        scale, zero = affine(float(array.min(initial=0.0)), float(array.max(initial=0.0)), self._activations)
        least = self._activations.least
        quantized = np.clip(np.rint(array / scale) + zero, least, least + 255).astype(zero.dtype)
        return self._dequantized_constant(quantized, scale, zero, str(value.name), node, None)

    def _weight(self, node: ir.Node, source: str, options: WeightOptions) -> None:
        rewriter, weight = self._rewriter, node.inputs[1]
        dq_input = node.inputs[0]
        producer = None if dq_input is None else dq_input.producer()
        scale_value = None if producer is None else producer.inputs[1]
        if weight is None or weight.const_value is None or scale_value is None or scale_value.const_value is None:
            raise Skip("its weight is not a constant")
        array = weight.const_value.numpy()
        input_scale = float(scale_value.const_value.numpy())
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        offset = None if bias is None or bias.const_value is None else bias.const_value.numpy().astype(np.float64)
        axes = channel_axes(node, 1, array.ndim)
        if offset is not None and offset.size == 1:  # Gemm adds one number to all outputs
            offset = np.broadcast_to(offset, [array.shape[a] for a in axes])
        floor = None if offset is None else (np.abs(offset) / (_INT32_ROOM * input_scale)).astype(np.float32)
        quantized, scales = quantize_tensor(weight.const_value, axes, options)
        if floor is not None and np.any(floor > scales.reshape(-1)):
            quantized, scales = quantize_weight(array, axes, options, floor)
        if self._correct and node.op_type == "Conv":
            correction = self._mean_error(node, source, array, quantized * scales)
            offset = correction if offset is None else offset + correction
        spelled_out = node.op_type == "Gemm"  # onnxruntime fuses Conv and MatMul without zero points, Gemm not
        flat = scales.reshape(-1)
        axis = axes[0] if flat.size > 1 else None
        rewriter.set_input(
            node,
            1,
            self._dequantized_constant(
                quantized,
                flat if axis is not None else flat.reshape(()),
                np.zeros(flat.shape if axis is not None else (), np.int8) if spelled_out else None,
                str(weight.name),
                node,
                axis,
            ),
        )
        if offset is not None:
            unit = np.broadcast_to(flat.astype(np.float64) * input_scale, offset.shape).astype(np.float32)
            integers = np.clip(np.rint(offset / unit), -(2**31) + 1, 2**31 - 1).astype(np.int32)
            name = f"{node.name}_bias" if bias is None else str(bias.name)
            zeros = np.zeros(unit.shape, np.int32) if spelled_out else None
            rewriter.set_input(node, 2, self._dequantized_constant(integers, unit, zeros, name, node, 0))

    def _mean_error(
        self, node: ir.Node, source: str, array: npt.NDArray[np.float32], restored: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        """E[(W - Q(W)) x] per output channel, from the mean of each input channel."""
        mean = self._evidence.channels(source, 1).mean
        error = (array - restored).astype(np.float64).reshape(*array.shape[:2], -1).sum(2)  # (out, in / groups)
        groups = node.attributes.get_int("group", 1)
        per_group = mean.reshape(groups, 1, -1)
        corrected: npt.NDArray[np.float64] = (error.reshape(groups, -1, error.shape[1]) * per_group).sum(2).reshape(-1)
        return corrected

    def _dequantized_constant(
        self,
        array: npt.NDArray[np.generic],
        scale: npt.NDArray[np.float32] | np.float32,
        zero: npt.NDArray[np.generic] | None,
        name: str,
        node: ir.Node,
        axis: int | None,
    ) -> ir.Value:
        constants = [
            self._rewriter.constant(np.asarray(part), f"{name}_{suffix}")
            for part, suffix in ((array, "quantized"), (scale, "scale"), (zero, "zero_point"))
            if part is not None  # symmetric ones need no zero point
        ]
        attributes = {} if axis is None else {"axis": axis}
        (dq,) = self._rewriter.insert(
            "DequantizeLinear",
            constants,
            attributes,
            before=node,
            name=f"{name}_dequantize",
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(array.shape),
        )
        return dq


def affine(
    low: float, high: float, form: ActivationOptions = _U8
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.generic]]:
    """Scale and zero point over [low, high], widened to hold 0; scalars, as onnxruntime wants."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(-low, high) / 127.0 if form.symmetric else (high - low) / 255.0)
    if not scale > np.finfo(np.float32).tiny:
        scale, steps = np.float32(1.0), 0
    else:
        steps = int(np.clip(np.rint(-low / float(scale)), 0, 255))
    zero = form.least + (128 if form.symmetric else steps)
    return np.asarray(scale, np.float32), np.asarray(zero, form.dtype.numpy())


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
