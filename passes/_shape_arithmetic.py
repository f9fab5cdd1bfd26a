"""Integer values as far as static shapes determine them: an array per value, NaN where unknown.

Only operators that move or add extents are known; what has no unknown is computed by the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.view import GraphView

__all__ = ["SMALL", "Partial", "shape_arithmetic"]

SMALL = 64
"""Elements a value may have to count as shape arithmetic."""

Partial = npt.NDArray[np.float64]
_LIMIT = 2.0**31
_ELEMENTWISE = frozenset({"Add", "Concat", "Mul", "Sub"})
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


def shape_arithmetic(
    node: ir.Node, view: GraphView, known: Mapping[ir.Value, Partial], trusted: Set[ir.Graph]
) -> Partial | None:
    """Value of an integer node as far as it can be told, NaN elsewhere; None if it is no shape arithmetic."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type in ("Shape", "Size"):
        shape = view.shape(source) if source is not None and source.graph in trusted else None
        if shape is None:
            return None
        extents = np.array([d if isinstance(d, int) else np.nan for d in shape], np.float64)
        if node.op_type == "Size":
            return np.asarray(extents.prod())
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        return extents[start:end]
    if any(v is not None and v not in known for v in node.inputs) or source is None:
        return None
    inputs = [None if v is None else known[v] for v in node.inputs]
    if any(a is not None and np.isnan(a).any() for a in inputs[1:]) and node.op_type not in _ELEMENTWISE:
        return None  # which elements are taken is itself unknown
    try:
        value = _move(node, inputs)
    except (IndexError, ValueError, TypeError):  # an invalid model; onnxruntime will say what is wrong with it
        return None
    return value if value is not None and value.size <= SMALL and np.all(~(np.abs(value) >= _LIMIT)) else None


def _move(node: ir.Node, inputs: list[Partial | None]) -> Partial | None:
    data = inputs[0]
    rest = [] if node.op_type in _ELEMENTWISE else [None if a is None else a.astype(np.int64) for a in inputs[1:]]
    if data is None:
        return None
    match node.op_type:
        case "Identity":
            return data
        case "Cast" if node.attributes.get_int("to", 0) in _INTEGERS:
            return data
        case "Gather" if rest[0] is not None:
            return np.take(data, rest[0], axis=node.attributes.get_int("axis", 0))
        case "Concat" if all(a is not None for a in inputs):
            return np.concatenate([a for a in inputs if a is not None], axis=node.attributes.get_int("axis", 0))
        case "Transpose":
            return np.transpose(data, node.attributes.get_ints("perm", None))
        case "Reshape" if rest[0] is not None and (rest[0] != 0).all():
            return data.reshape(rest[0])
        case "Squeeze" | "Unsqueeze":
            axes = node.attributes.get_ints("axes", None) if not rest or rest[0] is None else rest[0].tolist()
            if node.op_type == "Squeeze":
                return np.squeeze(data, None if axes is None else tuple(axes))
            return None if axes is None else np.expand_dims(data, tuple(axes))
        case "Slice" if (given := [a for a in rest if a is not None]) and len(given) == len(rest):
            starts, ends = given[0].tolist(), given[1].tolist()
            axes = given[2].tolist() if len(given) > 2 else list(range(len(starts)))
            steps = given[3].tolist() if len(given) > 3 else [1] * len(starts)
            index: list[slice] = [slice(None)] * data.ndim
            for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
                index[axis] = slice(start, None if step < 0 and end < -data.shape[axis] else end, step)
            return data[tuple(index)]
        case "ConstantOfShape" if not np.isnan(data).any() and data.prod() <= SMALL and "value" in node.attributes:
            fill = node.attributes["value"].as_tensor()
            if fill.dtype in _INTEGERS:
                return np.full(data.astype(np.int64), float(fill.numpy().item()))
            return None
        case "Add" | "Sub" | "Mul" if inputs[1] is not None:
            operation = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}[node.op_type]
            return np.asarray(operation(data, inputs[1]))
        case _:
            return None
