"""Int8 weights in the file, float32 in memory: w = Cast(q) * s, folded when the model is loaded.

onnxruntime folds Cast and Mul of constants at its default level, so latency is that of the float
model; it never folds DequantizeLinear, which would run on every call (3-8 times slower, measured).
A table read by Gather is not folded: its rows are multiplied out after the lookup, so memory stays small.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import PassError
from onnxcompress.passes._int8 import WeightOptions, channel_axes, gate, quantize_tensor, weight_indices
from onnxcompress.rewrite import Rewriter

__all__ = ["apply", "simulate"]


def apply(node: ir.Node, rewriter: Rewriter, options: WeightOptions) -> None:
    """Stores every constant float32 weight of the node as int8 and scales."""
    for index in weight_indices(node):
        value = node.inputs[index]
        if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        if node.op_type == "Gather":
            _table(node, value, rewriter, options)
        else:
            rewriter.set_input(node, index, _restored(node, index, value, rewriter, options))


def _restored(node: ir.Node, index: int, value: ir.Value, rewriter: Rewriter, options: WeightOptions) -> ir.Value:
    tensor = value.const_value
    if tensor is None:
        raise PassError(f"{value.name!r} is not a weight")
    axes = channel_axes(node, index, len(tensor.shape))
    made = f"{value.name}_restored_{'_'.join(map(str, axes))}"
    if node.graph is rewriter.model.graph and (found := rewriter.find(made)) is not None:
        return found
    quantized, scales = quantize_tensor(tensor, axes, options)
    q = rewriter.constant(quantized, f"{value.name}_int8", like=node)
    s = rewriter.constant(scales, f"{value.name}_scale", like=node)
    first = rewriter.model.graph[0] if node.graph is rewriter.model.graph else node
    (cast,) = rewriter.insert("Cast", [q], {"to": int(ir.DataType.FLOAT)}, before=first, dtype=ir.DataType.FLOAT)
    (restored,) = rewriter.insert(
        "Mul", [cast, s], after=cast.producer(), dtype=ir.DataType.FLOAT, shape=ir.Shape(quantized.shape)
    )
    if node.graph is rewriter.model.graph:
        rewriter.rename(restored, made)
    return restored


def _table(node: ir.Node, value: ir.Value, rewriter: Rewriter, options: WeightOptions) -> None:
    if value.const_value is None:
        raise PassError(f"{value.name!r} is not a weight")
    axes = channel_axes(node, 0, len(value.const_value.shape))
    quantized, scales = quantize_tensor(value.const_value, axes, options)
    q = rewriter.constant(quantized, f"{value.name}_int8", like=node)
    s = rewriter.constant(scales, f"{value.name}_scale", like=node)
    indices, axis = node.inputs[1], {"axis": node.attributes.get_int("axis", 0)}
    (rows,) = rewriter.insert("Gather", [q, indices], axis, before=node)
    (cast,) = rewriter.insert("Cast", [rows], {"to": int(ir.DataType.FLOAT)}, before=node, dtype=ir.DataType.FLOAT)
    row_scales = s
    if scales.size > 1:
        (row_scales,) = rewriter.insert("Gather", [s, indices], axis, before=node)
    else:
        row_scales = rewriter.constant(scales.reshape(()), f"{value.name}_scale", like=node)
    (result,) = rewriter.insert("Mul", [cast, row_scales], before=node, dtype=ir.DataType.FLOAT)
    rewriter.replace_node(node, result)


def simulate(value: ir.Value, rewriter: Rewriter, options: WeightOptions, switch: ir.Value) -> None:
    """Gates the rounding error of a weight: where the switch is on, its readers run on the rounded one."""
    tensor = value.const_value
    if tensor is None:
        raise PassError(f"{value.name!r} is not a weight")
    for use in tuple(value.uses()):
        node, index = use.node, use.idx
        if index not in weight_indices(node):
            continue
        quantized, scales = quantize_tensor(tensor, channel_axes(node, index, len(tensor.shape)), options)
        rounded = np.asarray(quantized * scales, np.float32)
        restored = rewriter.constant(rounded, f"{value.name}_rounded", like=node)
        edits = len(rewriter.log)
        if len(node.outputs) == 1:  # a second node beside the first: the weights need no copy in each run
            inputs = [restored if i == index else v for i, v in enumerate(node.inputs)]
            (output,) = rewriter.insert(node.op_type, inputs, attributes=node.attributes, after=node)
            gate(rewriter, node.outputs[0], output, switch, edits)
        else:
            (same,) = rewriter.insert("Identity", [restored], before=node)
            mixed = rewriter.only_if(switch, same, rewriter.nodes_since(edits), value)
            rewriter.set_input(node, index, mixed)
