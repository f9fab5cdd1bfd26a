"""Lists of extents that a Where cannot change.

    Where(x == k, y, x) = x      if k < 0 and every element of x is an extent or made of extents: never negative

Exporters write it for ``expand(-1, ...)``, whatever the list is. What is behind such a Where cannot be told by
shape inference.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.view import GraphView

__all__ = ["kept_extents"]

_MOVES = frozenset({"Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"})
"""Operators whose first input alone gives the elements."""

_COMBINES = frozenset({"Add", "Concat", "Max", "Min", "Mul", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"})
"""Operators that make nothing negative of what is not negative."""

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def kept_extents(node: ir.Node, view: GraphView) -> ir.Value | None:
    """What a Where gives in any case; None if it may choose."""
    condition, _, kept = node.inputs
    equal = None if condition is None else condition.producer()
    if kept is None or equal is None or equal.op_type != "Equal" or equal.domain != "":
        return None
    if kept not in equal.inputs or view.dtype(kept) not in _INTEGERS:
        return None
    other = equal.inputs[1 - equal.inputs.index(kept)]
    refused = view.array(other)
    shape = view.shape(kept)
    if refused is None or not refused.size or not (refused < 0).all():
        return None
    same = shape is not None and all(isinstance(d, int) for d in shape) and shape == view.shape(node.outputs[0])
    return kept if same and _never_negative(kept, view) else None


def _never_negative(value: ir.Value, view: GraphView) -> bool:
    """Whether all elements are extents, or made of extents and constants that are not negative."""
    seen: set[ir.Value] = set()
    waiting: list[ir.Value | None] = [value]
    while waiting:
        part = waiting.pop()
        if part is None or part in seen:
            continue
        seen.add(part)
        array, producer = view.array(part), part.producer()
        if array is not None:
            if array.dtype.kind != "i" or (array < 0).any():
                return False
        elif producer is None or producer.domain != "":
            return False
        elif producer.op_type in _MOVES or (producer.op_type == "Cast" and view.dtype(part) in _INTEGERS):
            waiting.append(producer.inputs[0])
        elif producer.op_type in _COMBINES:
            waiting += producer.inputs[:1] if producer.op_type.startswith("Reduce") else producer.inputs
        elif producer.op_type not in ("Shape", "Size"):
            return False
    return True
