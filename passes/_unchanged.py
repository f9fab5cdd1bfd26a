"""Which nodes hand on one of their inputs; see ``remove_noops``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.passes._extents import kept_extents
from onnxcompress.view import GraphView

__all__ = ["KEEP_ORDER", "origin", "unchanged"]

KEEP_ORDER = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}
_END = 2**31 - 1  # exporters write "to the end" as the largest int32 or int64


def unchanged(node: ir.Node, view: GraphView, same: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """The value the first output of a node equals, if it is one."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]) or not node.inputs:
        return None
    first = node.inputs[0]
    before, after = view.shape(first), view.shape(node.outputs[0])
    constants = [view.array(v) if v is not None and _small(v) else None for v in node.inputs]
    static = before is not None and before == after and all(isinstance(d, int) for d in before)
    match node.op_type:
        case "Identity":
            return first
        case "Concat" | "Sum" | "Max" | "Min" | "Mean" if len(node.inputs) == 1:
            return first
        case "Dropout" if _inference(node, view):
            return first
        case "Cast" | "CastLike" if view.dtype(first) is not None and view.dtype(first) == view.dtype(node.outputs[0]):
            return first
        case "Transpose":
            permutation = node.attributes.get_ints("perm", None)
            return first if permutation is not None and list(permutation) == sorted(permutation) else None
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
            source = origin(first, same)
            given = view.shape(source)
            known = given is not None and after is not None and len(given) == len(after)
            if not known or given is None or after is None:
                return None
            different = [a for a, b in zip(given, after, strict=True) if not (isinstance(a, int) and a == b)]
            return source if len(different) <= 1 and not any(isinstance(d, int) for d in different) else None
        case "Expand":
            target = constants[1]
            ones = (
                target is not None and bool((target == 1).all()) and before is not None and target.size <= len(before)
            )
            return first if static or ones else None
        case "Tile" if constants[1] is not None and (constants[1] == 1).all():
            return first
        case "Slice":
            return first if _whole(node, view, static) else None
        case "Pad":
            pads = constants[1] if len(constants) > 1 else node.attributes.get_ints("pads", None)
            return first if pads is not None and not np.any(pads) else None
        case "Mul" | "Div" | "Add" | "Sub":
            return _neutral(node, view)
        case "Where":
            return kept_extents(node, view)
        case _:
            return None


def _small(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size <= 4096


def _inference(node: ir.Node, view: GraphView) -> bool:
    if view.opset < 7:
        return node.attributes.get_int("is_test", 0) != 0
    training = view.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.False_
    return training is not None and not np.any(training)


def _whole(node: ir.Node, view: GraphView, static: bool) -> bool:
    if view.opset < 10:
        given = [np.array(node.attributes.get_ints(k, ()), np.int64) for k in ("starts", "ends")]
        starts, ends, steps = given[0], given[1], np.ones(1)
    else:
        rest = [None if v is None else view.array(v) for v in (*node.inputs, None, None)[1:5]]
        steps_input = node.inputs[4] if len(node.inputs) > 4 else None
        steps = np.ones(1) if steps_input is None else rest[3] if rest[3] is not None else np.zeros(1)
        if static and (steps == 1).all():
            return True
        if rest[0] is None or rest[1] is None:
            return False
        starts, ends = rest[0], rest[1]
    return bool((steps == 1).all() and (static or ((starts == 0).all() and (ends >= _END).all())))


def _neutral(node: ir.Node, view: GraphView) -> ir.Value | None:
    for index in (1, 0) if node.op_type in ("Mul", "Add") else (1,):
        operand, other = node.inputs[index], node.inputs[1 - index]
        array = view.array(operand) if operand is not None and _small(operand) else None
        if (
            array is None
            or other is None
            or array.dtype.kind not in "fiu"
            or not (array == _NEUTRAL[node.op_type]).all()
        ):
            continue
        shape = view.shape(other)
        if array.ndim == 0 or (shape is not None and array.ndim <= len(shape) and array.size == 1):
            return other
        if shape is not None and all(isinstance(d, int) for d in shape) and shape == view.shape(node.outputs[0]):
            return other
    return None


def origin(value: ir.Value | None, same: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """Where the elements of a value come from, in the same order."""
    while value is not None:
        value = same.get(value, value)
        producer = value.producer()
        if producer is None or producer.op_type not in KEEP_ORDER or producer.domain != "":
            return value
        value = producer.inputs[0]
    return None
