"""A quick look at weights for channels that may be dead or doubled.

Of every weight a few numbers of each row and column are read; only where these are all zero, or the same as those of
another row, the whole is. So nothing is missed, and a model without such channels costs a look at few of its bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.view import GraphView

__all__ = ["RECURRENT", "TWICE", "linear_axes", "suspects"]

RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Recurrent operators and their gates."""

TWICE = "makes the same twice"
_SAMPLE = 8
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93] * 2, np.uint64) | 1

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


def linear_axes(node: ir.Node, view: GraphView) -> tuple[int, int, int, int] | None:
    """How an operator multiplies its data with a constant matrix or filter; None if it does not.

    Returns:
        Inputs that are the data and the weight, and the weight's axes that are summed over and that make the output.
    """
    if node.domain or len(node.inputs) < 2:
        return None
    ranks = [0 if (t := view.weight(v)) is None else len(t.shape) for v in node.inputs[:2]]
    match node.op_type:
        case "Conv" if ranks[1] > 2:
            return 0, 1, 1, 0
        case "ConvTranspose" if ranks[1] > 2:
            return 0, 1, 0, 1
        case "Gemm" if ranks == [0, 2]:
            turned = int(node.attributes.get_int("transB", 0) != 0)
            return 0, 1, turned, 1 - turned
        case "MatMul" if ranks == [0, 2]:
            return 0, 1, 0, 1
        case "MatMul" if ranks == [2, 0]:
            return 1, 0, 1, 0
    return None


def suspects(view: GraphView) -> dict[tuple[str, int], str]:
    """What looks dead or doubled: name and axis of the weight, and in words why."""
    found: dict[tuple[str, int], str] = {}
    for node in view.nodes():
        for index, axis, text in _suspects(node, view):
            value = node.inputs[index]
            if value is not None:
                key = (str(value.name), axis)
                found[key] = text if text in found.get(key, text) else f"{found[key]} and {text}"
    return found


def _suspects(node: ir.Node, view: GraphView) -> Iterator[tuple[int, int, str]]:
    axes = linear_axes(node, view)
    if axes is not None:
        _, index, summed, makes = axes
        array = view.array(node.inputs[index])
        if array is None or array.dtype.kind != "f":
            return
        turned = np.moveaxis(array, (makes, summed), (0, 1))
        alone = node.attributes.get_int("group", 1) == 1
        if _silent(np.swapaxes(turned, 0, 1)) and (alone or summed == 1):
            yield index, summed, "reads with zeros"
        if node.outputs[0].is_graph_output():
            return
        if _silent(turned):
            yield index, makes, "makes with zeros"
        if alone and _doubled(turned, _bias(node, view, len(turned))):
            yield index, makes, TWICE
    elif node.op_type in RECURRENT and not node.domain:
        array = view.array(node.inputs[1])
        if array is None or array.dtype.kind != "f":
            return
        if _silent(np.moveaxis(array, 2, 0)):
            yield 1, 2, "reads with zeros"
        gates = RECURRENT[node.op_type]
        units = np.moveaxis(array.reshape(array.shape[0], gates, -1, array.shape[2]), 2, 0)
        if _silent(units[:, :, gates - 1]):  # what gets into the cell comes last
            yield 1, 1, "makes with zeros"
        if _doubled(units, None):
            yield 1, 1, TWICE
    elif node.op_type in ("BatchNormalization", "Mul") and not node.domain:
        for index in (1,) if node.op_type == "BatchNormalization" else (0, 1):
            array = view.array(node.inputs[index])
            if array is None or array.dtype.kind != "f" or max(array.shape, default=1) != array.size > 1:
                continue
            if not array.all():
                yield index, int(np.argmax(array.shape)), "scales with zeros"


def _bias(node: ir.Node, view: GraphView, count: int) -> Array | None:
    array = view.array(node.inputs[2]) if len(node.inputs) > 2 else None
    return array.reshape(-1) if array is not None and array.size == count else None


def _silent(rows: Array) -> bool:
    """Whether some row is all zeros; rows are along the first axis."""
    zero = ~_sample(rows).any(axis=1)
    return any(not rows[i].any() for i in np.flatnonzero(zero))


def _doubled(rows: Array, bias: Array | None) -> bool:
    """Whether two rows are equal, and their biases."""
    bits = np.ascontiguousarray(_sample(rows), np.float32).view(np.uint32).astype(np.uint64)
    keys = (bits * _MIX[: bits.shape[1]]).sum(axis=1, dtype=np.uint64)
    if bias is not None:
        keys += np.ascontiguousarray(bias, np.float32).view(np.uint32)
    _, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    same: dict[int, list[int]] = defaultdict(list)
    for i in np.flatnonzero(counts[place] > 1):
        same[int(place[i])].append(int(i))
    return any(_some_equal(rows, bias, members) for members in same.values())


def _some_equal(rows: Array, bias: Array | None, members: list[int]) -> bool:
    seen: set[bytes] = set()
    for i in members:
        content = rows[i].tobytes() + (b"" if bias is None else bias[i].tobytes())
        if content in seen:
            return True
        seen.add(content)
    return False


def _sample(rows: Array) -> Array:
    """The first few numbers of each row."""
    while rows.ndim > 2:
        if rows.shape[1] > 1 and rows[0, 0].size >= _SAMPLE:
            rows = rows[:, 0]
        else:
            rows = rows[:, :_SAMPLE].reshape(len(rows), -1)[:, :_SAMPLE]
    return rows.reshape(len(rows), -1)[:, :_SAMPLE]
