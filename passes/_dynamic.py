"""Dynamic int8: the scale of the data is taken from the data of each call.

    x ~ s_x (q_x - z_x)   by DynamicQuantizeLinear, one scale a tensor
    x W ~ s_x s_w (MatMulInteger(q_x, q_w, z_x))

onnxruntime fuses DynamicQuantizeLinear, MatMulInteger, Cast, Mul and the bias Add behind them into
one DynamicQuantizeMatMul. LSTM becomes com.microsoft.DynamicQuantizeLSTM where the target runs
contrib operators. No ranges are needed, so it is safe without calibration data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.passes._int8 import WeightOptions, channel_axes, gate, quantize_tensor, quantize_weight
from onnxcompress.rewrite import Rewriter
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["apply", "obstacle", "product_obstacle", "simulate", "simulate_smooth", "smooth"]

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_KERNELS = _PRODUCTS | {"LSTM"}


def obstacle(node: ir.Node, view: GraphView, target: Target) -> str | None:
    """Why the node cannot be quantized dynamically; None if it can."""
    if node.op_type not in _KERNELS:
        return f"there is no fast dynamic int8 kernel for {node.op_type}"
    weight = view.weight(node.inputs[1])
    if weight is None or weight.dtype != ir.DataType.FLOAT:
        return "its weight is not a float32 constant"
    attributes = node.attributes
    if (problem := product_obstacle(node)) is not None:
        return problem
    if node.op_type == "LSTM":
        if not target.contrib_ops:
            return "the target runs standard operators only, and a dynamic LSTM is com.microsoft"
        peepholes = node.inputs[7] if len(node.inputs) > 7 else None
        if peepholes is not None or not view.is_float_weight(node.inputs[2]):
            return "it has peepholes, or its recurrent weight is not a constant"
        if any(name in attributes for name in ("activations", "clip")):
            return "it has its own activations or clips"
        if attributes.get_int("layout", 0) != 0 or attributes.get_int("input_forget", 0) != 0:
            return "layout or input_forget is set"
    elif len(weight.shape) != 2:
        return "its weight is not a matrix"
    return None


def product_obstacle(node: ir.Node) -> str | None:
    """Why data that is read and a plain product are not what the node is about; None if they are."""
    if node.inputs[0] is None or node.inputs[0].is_initializer():
        return "its data input is a constant"
    if node.inputs[0].dtype not in (ir.DataType.FLOAT, None):
        return "its data input is not float32"
    attributes = node.attributes
    if node.op_type == "Gemm" and (
        attributes.get_float("alpha", 1.0) != 1.0
        or attributes.get_float("beta", 1.0) != 1.0
        or attributes.get_int("transA", 0) != 0
    ):
        return "alpha or beta is not 1, or its data input is transposed"
    return None


def apply(node: ir.Node, rewriter: Rewriter, options: WeightOptions) -> None:
    """Makes one MatMul, Gemm or LSTM dynamic; nodes that read the same value share its quantization."""
    if node.op_type == "LSTM":
        _lstm(node, rewriter, options)
    else:
        _product(node, rewriter, options)


def smooth(node: ir.Node, rewriter: Rewriter, options: WeightOptions, absmax: npt.NDArray[np.float64]) -> None:
    """Makes a MatMul or Gemm dynamic on x / s and rows of W times s.

    s_j = sqrt(absmax(x_j) / absmax(W_j)): SmoothQuant with alpha = 1/2 (Xiao et al. 2022,
    arXiv 2211.10438), with the division as a Mul of its own, since where x comes from a Gelu there
    is nothing to fold it into.
    """
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.const_value is None:
        raise Skip("its weight is not a constant")
    factors, scaled = _smoothed(node, weight.const_value.numpy(), absmax)
    inverse = rewriter.constant((1 / factors).astype(np.float32), f"{node.name}_smooth", like=node)
    (shrunk,) = rewriter.insert("Mul", [x, inverse], before=node, dtype=ir.DataType.FLOAT)
    rewriter.set_input(node, 0, shrunk)
    rewriter.set_weight(node, 1, scaled)
    _product(node, rewriter, options)


def simulate_smooth(
    node: ir.Node, rewriter: Rewriter, options: WeightOptions, absmax: npt.NDArray[np.float64], switch: ir.Value
) -> None:
    """Gates what :func:`smooth` does to the output of a node."""
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.const_value is None:
        raise Skip("its weight is not a constant")
    factors, scaled = _smoothed(node, weight.const_value.numpy(), absmax)
    quantized, scales = quantize_weight(scaled, channel_axes(node, 1, 2), options)
    inverse = rewriter.constant((1 / factors).astype(np.float32), f"{node.name}_smooth", like=node)
    restored = rewriter.constant(np.asarray(quantized * scales, np.float32), f"{node.name}_smoothed", like=node)
    edits = len(rewriter.log)
    (shrunk,) = rewriter.insert("Mul", [x, inverse], after=node)
    q, scale, zero = rewriter.insert("DynamicQuantizeLinear", [shrunk], outputs=3, after=shrunk)
    (rounded,) = rewriter.insert("DequantizeLinear", [q, scale, zero], after=q)
    bias = [v for v in node.inputs[2:] if v is not None]
    attributes = {"transB": node.attributes.get_int("transB", 0)} if node.op_type == "Gemm" else {}
    (output,) = rewriter.insert(node.op_type, [rounded, restored, *bias], attributes, after=rounded)
    gate(rewriter, node.outputs[0], output, switch, edits)


def _smoothed(
    node: ir.Node, array: npt.NDArray[np.float32], absmax: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Factors by input channel, and the weight with its rows multiplied by them."""
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    rows = np.abs(array).max(axis=0 if transposed else 1).astype(np.float64)
    factors = np.sqrt(np.maximum(absmax, 1e-8) / np.maximum(rows, 1e-8))
    factors = np.where((absmax > 0) & (rows > 0), factors, 1.0)
    scaled = array * (factors[None, :] if transposed else factors[:, None])
    return factors, np.asarray(scaled, np.float32)


def simulate(value: ir.Value, rewriter: Rewriter, switch: ir.Value) -> None:
    """Gates the run-time rounding of a value for the matrix products and LSTMs that read it."""
    only = [use.node for use in value.uses() if use.node.op_type in _KERNELS and use.idx == 0]
    if not only:
        raise Skip(f"no matrix product reads {value.name!r}")
    edits = len(rewriter.log)
    q, scale, zero = rewriter.insert("DynamicQuantizeLinear", [value], outputs=3, after=value)
    (dq,) = rewriter.insert("DequantizeLinear", [q, scale, zero], after=q.producer())
    gate(rewriter, value, dq, switch, edits, only=only)


def _product(node: ir.Node, rewriter: Rewriter, options: WeightOptions) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.const_value is None:
        raise Skip("its weight is not a constant")
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    quantized, scales = quantize_tensor(weight.const_value, (0,) if transposed else (1,), options)
    if transposed:
        quantized = np.ascontiguousarray(quantized.T)
    q, x_scale, x_zero = _quantized(x, node, rewriter)
    w = rewriter.constant(quantized, f"{weight.name}_quantized", like=node)
    flat = scales.reshape(-1)
    s = rewriter.constant(flat if flat.size > 1 else flat.reshape(()), f"{weight.name}_scale", like=node)
    (integers,) = rewriter.insert("MatMulInteger", [q, w, x_zero], before=node)
    (product,) = rewriter.insert("Cast", [integers], {"to": int(ir.DataType.FLOAT)}, before=node)
    (scale,) = rewriter.insert("Mul", [x_scale, s], before=node)
    (result,) = rewriter.insert("Mul", [product, scale], before=node, dtype=ir.DataType.FLOAT)
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        (result,) = rewriter.insert("Add", [result, bias], before=node, dtype=ir.DataType.FLOAT)
    rewriter.replace_node(node, result)


def _quantized(x: ir.Value, node: ir.Node, rewriter: Rewriter) -> tuple[ir.Value, ...]:
    for use in x.uses():
        if use.node.op_type == "DynamicQuantizeLinear" and use.node.graph is node.graph:
            return tuple(use.node.outputs)
    producer = x.producer()
    if producer is not None and producer.graph is node.graph:
        return rewriter.insert("DynamicQuantizeLinear", [x], outputs=3, after=producer)
    first = node.graph[0] if isinstance(node.graph, ir.Graph) else node
    return rewriter.insert("DynamicQuantizeLinear", [x], outputs=3, before=first)


def _lstm(node: ir.Node, rewriter: Rewriter, options: WeightOptions) -> None:
    matrices: list[ir.Value] = []
    scales: list[ir.Value] = []
    for index in (1, 2):
        weight = node.inputs[index]
        if weight is None or weight.const_value is None:
            raise Skip("its weight is not a constant")
        quantized, scale = quantize_tensor(weight.const_value, (0, 1), options)  # (directions, 4 hidden, inputs)
        if scale.size == 1:  # the kernel wants a scale per direction at least
            scale = np.broadcast_to(scale, (quantized.shape[0], 1, 1))
        rows = scale.reshape(quantized.shape[0], -1)
        flat = np.asarray(rows if rows.shape[1] > 1 else rows.reshape(-1))
        transposed = np.ascontiguousarray(quantized.transpose(0, 2, 1))
        matrices.append(rewriter.constant(transposed, f"{weight.name}_quantized", like=node))
        scales.append(rewriter.constant(flat, f"{weight.name}_scale", like=node))
        scales.append(rewriter.constant(np.zeros(flat.shape, np.int8), f"{weight.name}_zero_point", like=node))
    optional = [node.inputs[i] if i < len(node.inputs) else None for i in range(3, 8)]
    attributes: dict[str, int | str] = {"hidden_size": node.attributes.get_int("hidden_size", 0)}
    if "direction" in node.attributes:
        attributes["direction"] = node.attributes.get_string("direction", "forward")
    outputs = rewriter.insert(
        "DynamicQuantizeLSTM",
        [node.inputs[0], *matrices, *optional, *scales],
        attributes,
        before=node,
        domain="com.microsoft",
        outputs=len(node.outputs),
    )
    rewriter.replace_node(node, *outputs)
