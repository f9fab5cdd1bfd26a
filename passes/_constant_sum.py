"""Adding a constant to a value where that costs nothing: in the bias of what makes it.

    (W x + b) + c = W x + (b + c)        Conv, ConvTranspose, Gemm, normalizations, Add of a weight
    (u + v) + c = (u + c) + v            then it goes into what makes u, or v

Holds where every reader of the value is to see the sum.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.rewrite import Rewriter

__all__ = ["Place", "absorb", "bias_of", "is_free", "spread"]

_CHANNELS_FIRST = ("Conv", "ConvTranspose", "BatchNormalization")
_CHANNELS_LAST = ("Gemm", "LayerNormalization")
_DEPTH = 64

Place = tuple[ir.Node, int]
"""A node, and the input that holds its bias."""


def spread(constant: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float32]:
    """A constant per channel, so that it broadcasts along ``axis`` (negative: counted from the end)."""
    return np.asarray(constant, np.float32).reshape(-1, *(1,) * (-axis - 1))


def bias_of(value: ir.Value, axis: int, readers: Collection[ir.Node], depth: int = _DEPTH) -> Place | None:
    """Where a constant per channel can be added to a value; None if there is no such place.

    Args:
        value: an activation.
        axis: its channel axis, counted from the end; anything but -1 is axis 1.
        readers: who sees the sum; if others read the value, too, there is no place.
        depth: how many sums to look through.
    """
    node = value.producer()
    if node is None or depth == 0 or value.is_graph_output() or any(u.node not in readers for u in value.uses()):
        return None
    if node.op_type in (_CHANNELS_LAST if axis == -1 else _CHANNELS_FIRST):
        return (node, 2) if is_free(node, 2) and value is node.outputs[0] else None
    if node.op_type != "Add":
        return None
    constants = [i for i, v in enumerate(node.inputs) if v is not None and v.is_initializer()]
    if constants:
        return node, constants[0]
    found = (bias_of(v, axis, (node,), depth - 1) for v in node.inputs if v is not None)
    return next((place for place in found if place is not None), None)


def is_free(node: ir.Node, index: int) -> bool:
    """Whether the bias of a node is missing or a weight."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is None or (value.is_initializer() and value.const_value is not None)


def absorb(rewriter: Rewriter, place: Place, constant: npt.NDArray[np.float64], axis: int) -> None:
    """Adds a constant per channel at a place that :func:`bias_of` found."""
    node, index = place
    value = node.inputs[index] if index < len(node.inputs) else None
    old = np.zeros(1) if value is None or value.const_value is None else value.const_value.numpy().astype(np.float64)
    if node.op_type == "Gemm":
        old = old * node.attributes.get_float("beta", 1.0)
        if "beta" in node.attributes:
            rewriter.set_attribute(node, "beta", 1.0)
    added = spread(constant, axis).astype(np.float64) if node.op_type == "Add" else constant
    rewriter.set_weight(node, index, np.asarray(old + added, np.float32))
