"""Operators that fold an axis, or order it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.rules import rule

_REDUCE = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


def _axes(node: ir.Node, at: Coupler, rank: int) -> list[int] | None:
    """Reduced axes, from 0; None if they are computed."""
    given = node.attributes.get_ints("axes", None)
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        constant = at.array(node, 1)
        if constant is None:
            return None
        given = [int(a) for a in constant.reshape(-1)]
    if not given:
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in given)


@rule(*(f"Reduce{name}" for name in _REDUCE))
def reduce(node: ir.Node, at: Coupler) -> None:
    """Reduced axes stay: what is removed would be missing in the sum."""
    x = at.data(node)
    axes = _axes(node, at, len(x))
    if axes is None:
        at.pin_all(node, "the axes it reduces are computed")
        return
    _fold(node, at, axes, node.attributes.get_int("keepdims", 1) != 0, f"{node.op_type} reduces it")


@rule("ArgMax", "ArgMin")
def arg(node: ir.Node, at: Coupler) -> None:
    """Positions are counted."""
    axis = node.attributes.get_int("axis", 0) % len(at.data(node))
    _fold(node, at, [axis], node.attributes.get_int("keepdims", 1) != 0, f"{node.op_type} counts its positions")


def _fold(node: ir.Node, at: Coupler, axes: list[int], keep: bool, reason: str) -> None:
    x, y = at.data(node), at.output(node)
    left = [k for k in range(len(x)) if k not in axes]
    for place, k in enumerate(left):
        at.same(x[k], y[k if keep else place], node)
    for k in axes:
        at.pin(x[k], node, reason)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: ir.Node, at: Coupler) -> None:
    """What is normalized over stays."""
    x = at.data(node)
    at.elementwise(node, [x], at.output(node))
    axis = node.attributes.get_int("axis", -1 if at.opset >= 13 else 1) % len(x)
    for k in range(axis, len(x) if at.opset < 13 else axis + 1):
        at.pin(x[k], node, f"{node.op_type} normalizes over it")


@rule("LpNormalization", "CumSum", "CumProd")
def along(node: ir.Node, at: Coupler) -> None:
    """One axis is worked along."""
    x = at.data(node)
    at.elementwise(node, [x], at.output(node))
    axis: int | None = node.attributes.get_int("axis", -1)
    if node.op_type.startswith("Cum"):
        given = at.array(node, 1)
        axis = None if given is None else int(np.asarray(given).reshape(-1)[0])
    for k in range(len(x)) if axis is None else (axis,):
        at.pin(x[k], node, f"{node.op_type} works along it")


@rule("TopK")
def top_k(node: ir.Node, at: Coupler) -> None:
    """One axis is ordered."""
    x = at.data(node)
    axis = node.attributes.get_int("axis", -1) % len(x)
    for y in at.outputs(node):
        for k in range(len(x)):
            if k != axis:
                at.same(x[k], y[k], node)
        at.pin(y[axis], node, "TopK orders it")
    at.pin(x[axis], node, "TopK orders it")
