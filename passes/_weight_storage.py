"""Int8 weights in the file, float32 in memory: w = Cast(q) * s, folded when the model is loaded.

onnxruntime folds Cast and Mul of constants at its default level, so latency is that of the float
model; it never folds DequantizeLinear, which would run on every call (3-8 times slower, measured).
A table read by Gather is not folded: its rows are multiplied out after the lookup, so memory stays small.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import PassError
from onnxcompress.passes._int8 import WeightOptions, channel_axes, quantize_tensor, weight_indices
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
    """Gates the rounding error of a weight; of a looked-up table, after the lookup."""
    if value.const_value is None:
        raise PassError(f"{value.name!r} is not a weight")
    array = value.const_value.numpy()
    for use in tuple(value.uses()):
        node = use.node
        if use.idx not in weight_indices(node):
            continue
        axes = channel_axes(node, use.idx, array.ndim)
        quantized, scales = quantize_tensor(value.const_value, axes, options)
        error = rewriter.constant(np.asarray(quantized * scales - array, np.float32), f"{value.name}_error", like=node)
        if node.op_type == "Gather":
            output = node.outputs[0]
            (rows,) = rewriter.insert(
                "Gather", [error, node.inputs[1]], {"axis": node.attributes.get_int("axis", 0)}, after=node
            )
            (scaled,) = rewriter.insert("Mul", [rows, switch], after=rows.producer())
            (mixed,) = rewriter.insert("Add", [output, scaled], after=scaled.producer())
            rewriter.replace_uses(output, mixed, keep=[n for n in [mixed.producer()] if n is not None])
        else:
            (scaled,) = rewriter.insert("Mul", [error, switch], before=node)
            (mixed,) = rewriter.insert("Add", [value, scaled], before=node)
            rewriter.set_input(node, use.idx, mixed)
