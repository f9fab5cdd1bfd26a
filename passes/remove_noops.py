"""Nodes that hand on what they get, and chains that one node can do.

    f(x) = x                  Identity, Dropout in inference, Cast to the same type, Transpose by the
                              identity, Reshape / Expand / Tile / Slice / Pad that change nothing,
                              x * 1, x / 1, x + 0, x - 0, Concat / Sum / Max / Min / Mean of one
    T_q(T_p(x)) = T_pq(x)     Transpose; nothing is left where p and q undo each other
    R(S(x)) = R(x)            Reshape to a constant shape after anything that keeps the order of elements
    clip(clip(x, a, b), c, d) = clip(x, clip(a, c, d), clip(b, c, d))      a <= b, c <= d; Relu is clip(., 0, inf)
    x * clip(x / 6 + 1/2, 0, 1) = HardSwish(x)      where the opset has it (14)
    outputs nobody reads      a node is asked for fewer (Dropout mask, Indices of MaxPool, states of LSTM)

Shapes count only as far as graph inputs and weights determine them; a Reshape is a no-op if all extents
but one are known to be equal, since the number of elements is. A constant operand must not broadcast
the other one. Values are equal bit for bit, but for x + 0 (the sign of a zero) and HardSwish (rounding).

onnxscript's rules turn Relu(Clip(x, -5, -1)) into Clip(x, 0, -1) and add Identity nodes, so they are
not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.passes._hard_swish import hard_swish_of
from onnxcompress.rewrite import Rewriter, can_be_output
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["RemoveNoOps"]

_KEEP_ORDER = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_OPTIONAL_OUTPUTS = ("BatchNormalization", "Dropout", "GRU", "LSTM", "LayerNormalization", "MaxPool", "RNN")
_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}
_END = 2**31 - 1  # exporters write "to the end" as the largest int32 or int64


@dataclass(frozen=True)
class _Forward:
    """The first output equals this value: output ``index`` of a node, or a value with no producer (-1)."""

    name: str
    index: int


@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Removes nodes that change nothing and merges chains of Transpose, Reshape, Clip and Relu."""

    name: ClassVar[str] = "remove_noops"
    stage: ClassVar[Stage] = Stage.NORMALISE
    lossless: ClassVar[bool] = True

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        for node, found in self._plan(view).items():
            yield Skipped(str(node.name), found) if isinstance(found, str) else Site.of(node)

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        found = self._plan(view)[view.node(site.key)]
        if isinstance(found, _Forward):
            return [Choice(site, "bypass", detail=found, effects=False)]
        return [Choice(site, found.__name__.strip("_").replace("_", " "), effects=False)] if callable(found) else []

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        if isinstance(choice.detail, _Forward):
            where = choice.detail
            source = rewriter.value(where.name) if where.index < 0 else rewriter.node(where.name).outputs[where.index]
            rewriter.replace_uses(node.outputs[0], source)
            rewriter.remove_unused(node)
            return
        for edit in (_drop_unread_outputs, _merge_transposes, _skip_reshapes, _merge_clips, _to_hard_swish):
            if edit.__name__.strip("_").replace("_", " ") == choice.name:
                edit(node, rewriter)

    def _plan(self, view: GraphView) -> dict[ir.Node, _Forward | _Edit | str]:
        return view.derive(self, lambda: _plan(view))


_Edit = Callable[[ir.Node, Rewriter], None]


def _plan(view: GraphView) -> dict[ir.Node, _Forward | _Edit | str]:
    """What to do at each node, or why nothing can be done; only nodes where there is something to say."""
    plan: dict[ir.Node, _Forward | _Edit | str] = {}
    same: dict[ir.Value, ir.Value] = {}  # what is removed -> what takes its place
    outputs: set[ir.Value] = set()  # values that become outputs of a graph
    for node in view.nodes():
        if node.domain != "" or not node.outputs:
            continue
        output = node.outputs[0]
        source = _unchanged(node, view, same)
        if source is None:
            edit = _edit(node, view, same)
            if edit is not None:
                plan[node] = edit
            continue
        source = same.get(source, source)
        if output.is_graph_output():
            if source in outputs or not can_be_output(source, node.graph):
                plan[node] = f"it joins {source.name!r} to an output of the graph"
                continue
            outputs.add(source)
        same[output] = source
        producer = source.producer()
        plan[node] = (
            _Forward(str(source.name), -1) if producer is None else _Forward(str(producer.name), source.index() or 0)
        )
    return plan


def _unchanged(node: ir.Node, view: GraphView, same: dict[ir.Value, ir.Value]) -> ir.Value | None:
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
            source = _through(first, same)
            origin = view.shape(source)
            known = origin is not None and after is not None and len(origin) == len(after)
            if not known or origin is None or after is None:
                return None
            different = [a for a, b in zip(origin, after, strict=True) if not (isinstance(a, int) and a == b)]
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


def _edit(node: ir.Node, view: GraphView, same: dict[ir.Value, ir.Value]) -> _Edit | None:
    """The edit that makes a chain or a node simpler, if there is one."""
    first = node.inputs[0] if node.inputs else None
    producer = None if first is None else same.get(first, first).producer()
    if node.op_type in _OPTIONAL_OUTPUTS and _read(node) < len(node.outputs):
        training = node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", 0) != 0
        return None if training else _drop_unread_outputs
    if view.opset >= 14 and view.dtype(node.outputs[0]) == ir.DataType.FLOAT and hard_swish_of(node, view, same):
        return _to_hard_swish
    if producer is None or producer.domain != "" or producer.graph is not node.graph:
        return None
    alone = len(producer.outputs[0].uses()) == 1 and not producer.outputs[0].is_graph_output()
    if node.op_type == producer.op_type == "Transpose" and (alone or _composed(node, producer) is None):
        return _merge_transposes
    if node.op_type == "Reshape" and producer.op_type in _KEEP_ORDER and alone and _absolute(node, view):
        return _skip_reshapes
    if alone and view.dtype(first) == ir.DataType.FLOAT and _clip(node, view) and _clip(producer, view):
        return _merge_clips
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


def _through(value: ir.Value | None, same: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """Where the elements of a value come from, in the same order."""
    while value is not None:
        value = same.get(value, value)
        producer = value.producer()
        if producer is None or producer.op_type not in _KEEP_ORDER or producer.domain != "":
            return value
        value = producer.inputs[0]
    return None


def _absolute(node: ir.Node, view: GraphView) -> bool:
    """Whether a Reshape names its extents without copying any of its input's."""
    shape = view.array(node.inputs[1])
    return shape is not None and (bool((shape != 0).all()) or node.attributes.get_int("allowzero", 0) != 0)


def _skip_reshapes(node: ir.Node, rewriter: Rewriter) -> None:
    before = _producer(node, _KEEP_ORDER)
    source = None if before is None else _through(before.inputs[0], {})
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
