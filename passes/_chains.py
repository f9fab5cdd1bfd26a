"""Edits that make a chain of nodes, or a node, simpler; the algebra is in ``remove_noops``."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.passes._hard_swish import hard_swish_of
from onnxcompress.passes._unchanged import KEEP_ORDER, origin
from onnxcompress.rewrite import Rewriter, can_be_output
from onnxcompress.view import GraphView

__all__ = ["EDITS", "edit_of"]

_OPTIONAL_OUTPUTS = ("BatchNormalization", "Dropout", "GRU", "LSTM", "LayerNormalization", "MaxPool", "RNN")


def edit_of(node: ir.Node, view: GraphView, same: dict[ir.Value, ir.Value]) -> str | None:
    """Name of the edit (a key of ``EDITS``) that makes a chain or a node simpler, if there is one."""
    first = node.inputs[0] if node.inputs else None
    producer = None if first is None else same.get(first, first).producer()
    if node.op_type in _OPTIONAL_OUTPUTS and _read(node) < len(node.outputs):
        training = node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", 0) != 0
        return None if training else "drop unread outputs"
    if view.opset >= 14 and view.dtype(node.outputs[0]) == ir.DataType.FLOAT and hard_swish_of(node, view, same):
        return "to hard swish"
    if producer is None or producer.domain != "" or producer.graph is not node.graph:
        return None
    alone = len(producer.outputs[0].uses()) == 1 and not producer.outputs[0].is_graph_output()
    if node.op_type == producer.op_type == "Transpose" and (alone or _composed(node, producer) is None):
        return "merge transposes"
    if node.op_type == "Reshape" and producer.op_type in KEEP_ORDER and alone and _absolute(node, view):
        return "skip reshapes"
    if alone and view.dtype(first) == ir.DataType.FLOAT and _clip(node, view) and _clip(producer, view):
        return "merge clips"
    return None


def _read(node: ir.Node) -> int:
    """How many outputs a node must have: up to the last one somebody reads, at least one."""
    return max((i + 1 for i, v in enumerate(node.outputs) if v.uses() or v.is_graph_output()), default=1)


def _drop_unread_outputs(node: ir.Node, rewriter: Rewriter) -> None:
    rewriter.drop_outputs(node, _read(node))


def _composed(node: ir.Node, before: ir.Node) -> tuple[int, ...] | None:
    """Permutation of ``before`` and then ``node``; None if that is the identity."""
    second = node.attributes.get_ints("perm", None)
    first = before.attributes.get_ints("perm", None)
    if first is None and second is None:
        return None  # both reverse the axes
    rank = len(first or second or ())
    first, second = first or range(rank)[::-1], second or range(rank)[::-1]
    composed = tuple(first[i] for i in second)
    return None if composed == tuple(range(rank)) else composed


def _merge_transposes(node: ir.Node, rewriter: Rewriter) -> None:
    while (before := _producer(node, ("Transpose",))) is not None and before.inputs[0] is not None:
        composed = _composed(node, before)
        if composed is None:
            source = before.inputs[0]
            if node.outputs[0].is_graph_output() and not can_be_output(source, node.graph):
                raise Skip(f"it joins {source.name!r} to an output of the graph")
            rewriter.replace_uses(node.outputs[0], source)
            rewriter.remove_unused(node)
            return
        if len(before.outputs[0].uses()) > 1:
            return
        rewriter.set_attribute(node, "perm", composed)
        rewriter.set_input(node, 0, before.inputs[0])
        rewriter.remove_unused(before)


def _absolute(node: ir.Node, view: GraphView) -> bool:
    """Whether a Reshape names its extents without copying any of its input's."""
    shape = view.array(node.inputs[1])
    return shape is not None and (bool((shape != 0).all()) or node.attributes.get_int("allowzero", 0) != 0)


def _skip_reshapes(node: ir.Node, rewriter: Rewriter) -> None:
    before = _producer(node, KEEP_ORDER)
    source = None if before is None else origin(before.inputs[0], {})
    if before is None or source is None:
        raise Skip("what was before it is gone")
    rewriter.set_input(node, 0, source)
    rewriter.remove_unused(before)


def _clip(node: ir.Node, view: GraphView) -> tuple[float, float] | None:
    """Bounds of a Relu or Clip, if they are constant and in order."""
    if node.domain != "" or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, math.inf
    low, high = node.attributes.get_float("min", -math.inf), node.attributes.get_float("max", math.inf)
    for index, value in enumerate(node.inputs[1:3]):
        array = None if value is None else view.array(value)
        if value is not None and (array is None or array.dtype != np.float32 or array.size != 1):
            return None
        if array is not None:
            low, high = (array.item(), high) if index == 0 else (low, array.item())
    return (low, high) if low <= high else None


def _merge_clips(node: ir.Node, rewriter: Rewriter) -> None:
    view = rewriter.view()
    own = bounds = _clip(node, view)
    first = node
    while bounds is not None and (before := _producer(first, ("Relu", "Clip"))) is not None:
        inner = _clip(before, view)
        if inner is None or len(before.outputs[0].uses()) > 1 or before.outputs[0].is_graph_output():
            break
        bounds = min(max(inner[0], bounds[0]), bounds[1]), min(max(inner[1], bounds[0]), bounds[1])
        first = before
    source, obsolete = first.inputs[0], _producer(node, ("Relu", "Clip"))
    if first is node or source is None or bounds is None or obsolete is None:
        raise Skip("what was before it is gone")
    if bounds == own:
        rewriter.set_input(node, 0, source)
        rewriter.remove_unused(obsolete)
        return
    limits = [None if math.isinf(b) else np.array(b, np.float32) for b in bounds]
    if view.opset >= 11:
        names = (f"{node.name}_min", f"{node.name}_max")
        inputs = [None if b is None else rewriter.constant(b, n, like=node) for b, n in zip(limits, names, strict=True)]
        (clip,) = rewriter.insert("Clip", [source, *inputs], before=node, dtype=ir.DataType.FLOAT)
    else:
        attributes = {n: b.item() for n, b in zip(("min", "max"), limits, strict=True) if b is not None}
        (clip,) = rewriter.insert("Clip", [source], attributes, before=node, dtype=ir.DataType.FLOAT)
    rewriter.replace_uses(node.outputs[0], clip)
    rewriter.remove_unused(node)


def _to_hard_swish(node: ir.Node, rewriter: Rewriter) -> None:
    source = hard_swish_of(node, rewriter.view(), {})
    if source is None:
        raise Skip("it is no HardSwish any more")
    (value,) = rewriter.insert("HardSwish", [source], before=node, dtype=ir.DataType.FLOAT)
    rewriter.replace_uses(node.outputs[0], value)
    rewriter.remove_unused(node)


def _producer(node: ir.Node, ops: tuple[str, ...]) -> ir.Node | None:
    """The node before the first input, if it is one of these operators in the same graph."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type not in ops or producer.domain != "" or producer.graph is not node.graph:
        return None
    return producer


EDITS: dict[str, Callable[[ir.Node, Rewriter], None]] = {
    "drop unread outputs": _drop_unread_outputs,
    "merge transposes": _merge_transposes,
    "skip reshapes": _skip_reshapes,
    "merge clips": _merge_clips,
    "to hard swish": _to_hard_swish,
}
