"""Operators that move positions along an axis: Concat, Split, Slice, Gather, Pad."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler, Operand
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import mends, rule


@rule("Concat")
def concat(node: ir.Node, at: Coupler) -> None:
    """Positions are put one after another."""
    y = at.output(node)
    axis = node.attributes.get_int("axis", 0) % len(y)
    start = 0
    for index in range(len(node.inputs)):
        x = at.data(node, index)
        _piece(node, at, x, y, axis, start, "Concat puts a single position there")
        start += x.shape[axis]


def _piece(node: ir.Node, at: Coupler, part: Operand, whole: Operand, axis: int, start: int, single: str) -> None:
    """A tensor is a run of positions of another along an axis; the other axes are the same."""
    for k in range(len(whole)):
        if k != axis:
            at.same(part[k], whole[k], node)
    if part.shape[axis] == 1 and whole.shape[axis] > 1:
        at.pick_fixed(whole[axis], start, node, single)
    elif part.shape[axis]:
        at.block(part[axis], whole[axis], start, node)


@rule("Split")
def split(node: ir.Node, at: Coupler) -> None:
    """Positions are dealt out."""
    x = at.data(node)
    axis = node.attributes.get_int("axis", 0) % len(x)
    start = 0
    for value in node.outputs:
        y = at.operand(value)
        _piece(node, at, y, x, axis, start, "Split takes a single position")
        start += y.shape[axis]
    if len(node.inputs) > 1 and node.inputs[1] is not None and at.array(node, 1) is None:
        at.pin(x[axis], node, "the sizes of its parts are computed")


@mends("Split")
def split_sizes(node: ir.Node, mender: Mender) -> None:
    """The parts have other sizes."""
    shapes = [mender.shape(v) for v in node.outputs]
    axis = node.attributes.get_int("axis", 0) % len(shapes[0])
    kept = [mender.output(node, axis, i) for i in range(len(node.outputs))]
    if all(p is None for p in kept):
        return
    sizes = [shape[axis] if p is None else len(p) for shape, p in zip(shapes, kept, strict=True)]
    if mender.rewriter.model.graph.opset_imports.get("", 1) < 13:
        mender.rewriter.set_attribute(node, "split", sizes)
        return
    if node.attributes.get("num_outputs") is not None:
        node.attributes.pop("num_outputs")
    mender.rewriter.set_weight(node, 1, np.array(sizes, np.int64))


def _bounds(node: ir.Node, at: Coupler, rank: int) -> dict[int, tuple[int, int, int]] | None:
    """Start, end and step by axis of a Slice; None where they are computed."""
    if at.opset < 10:
        starts: npt.ArrayLike | None = node.attributes.get_ints("starts", None)
        ends: npt.ArrayLike | None = node.attributes.get_ints("ends", None)
        axes: npt.ArrayLike | None = node.attributes.get_ints("axes", None)
        steps: npt.ArrayLike | None = None
    else:
        starts, ends, axes, steps = (at.array(node, i) for i in (1, 2, 3, 4))
        if axes is None and len(node.inputs) > 3 and node.inputs[3] is not None:
            return None
        if steps is None and len(node.inputs) > 4 and node.inputs[4] is not None:
            return None
    if starts is None or ends is None:
        return None
    first = np.asarray(starts).reshape(-1)
    places = np.arange(len(first)) if axes is None else np.asarray(axes).reshape(-1)
    stride = np.ones(len(first), np.int64) if steps is None else np.asarray(steps).reshape(-1)
    last = np.asarray(ends).reshape(-1)
    return {int(a) % rank: (int(s), int(e), int(t)) for a, s, e, t in zip(places, first, last, stride, strict=True)}


@rule("Slice")
def slice_(node: ir.Node, at: Coupler) -> None:
    """A run of positions is taken."""
    x, y = at.data(node), at.output(node)
    bounds = _bounds(node, at, len(x))
    axes = None if len(node.inputs) <= 3 or at.opset < 10 else at.array(node, 3)
    for k in range(len(x)):
        if bounds is None:
            known = axes is not None and k not in {int(a) % len(x) for a in np.asarray(axes).reshape(-1)}
            if known:
                at.same(x[k], y[k], node)
            else:
                at.pin(x[k], node, "Slice takes a part that is computed")
                at.pin(y[k], node, "Slice takes a part that is computed")
            continue
        start, end, step = bounds.get(k, (0, x.shape[k], 1))
        positions = range(x.shape[k])[slice(start, end, step)]
        if step == 1 and y.shape[k] == x.shape[k]:
            at.same(x[k], y[k], node)
        elif step == 1 and y.shape[k] > 1:
            at.block(y[k], x[k], positions.start, node)
        elif step > 1 and x.shape[k] == step * y.shape[k]:
            turn = at.virtual(node, f"step {k}", step)
            at.pin(turn, node, "Slice takes one of each few")
            at.product([x[k]], [y[k], turn], node)
        else:
            at.pin(x[k], node, "Slice takes single positions, or steps")
            at.pin(y[k], node, "Slice takes single positions, or steps")


@mends("Slice")
def slice_bounds(node: ir.Node, mender: Mender) -> None:
    """Starts and ends are those among what is kept."""
    rank = len(mender.shape(node.inputs[0]))
    changed = {k: p for k in range(rank) if (p := mender.input(node, 0, k)) is not None}
    if not changed:
        return
    if mender.rewriter.model.graph.opset_imports.get("", 1) < 10:
        starts, ends = (list(node.attributes.get_ints(n, ())) for n in ("starts", "ends"))
        axes = list(node.attributes.get_ints("axes", ()) or range(len(starts)))
    else:
        starts, ends = (mender.ints(node, i) or [] for i in (1, 2))
        axes = mender.ints(node, 3) or list(range(len(starts)))
    for place, axis in enumerate(axes):
        kept = changed.get(axis % rank)
        if kept is None:
            continue
        size = mender.shape(node.inputs[0])[axis % rank]
        if mender.has(node, f"step {axis % rank}"):
            ends[place] = len(kept)
            starts[place] %= size  # it was before the first step already
            continue
        run = range(size)[slice(starts[place], ends[place])]
        starts[place] = int((kept < run.start).sum())
        ends[place] = int((kept < run.stop).sum())
    if mender.rewriter.model.graph.opset_imports.get("", 1) < 10:
        mender.rewriter.set_attribute(node, "starts", starts)
        mender.rewriter.set_attribute(node, "ends", ends)
    elif any(a % rank in changed for a in axes):
        mender.set_ints(node, 1, starts)
        mender.set_ints(node, 2, ends)


@rule("Gather")
def gather(node: ir.Node, at: Coupler) -> None:
    """Positions are looked up; where they are constant, the rest may go with them."""
    x, indices, y = at.data(node), at.data(node, 1), at.output(node)
    axis = node.attributes.get_int("axis", 0) % len(x)
    more = len(indices) - 1
    for k in range(len(x)):
        if k != axis:
            at.same(x[k], y[k if k < axis else k + more], node)
    chosen = at.array(node, 1)
    if chosen is None:
        at.pin(x[axis], node, "positions are looked up that the data say")
        if x.constant:
            at.units[x[axis]] = "entries"
        for k, a in enumerate(indices.axes):
            at.same(a, y[axis + k], node)
    elif chosen.ndim == 1 and chosen.size > 1:
        at.pick(y[axis], x[axis], chosen % x.shape[axis], node)
    else:
        at.pin(x[axis], node, "a single position is looked up")
        for k in range(len(indices)):
            at.pin(y[axis + k], node, "constant positions are looked up")


@mends("Gather")
def gather_indices(node: ir.Node, mender: Mender) -> None:
    """Indices count what is kept."""
    rank = len(mender.shape(node.inputs[0]))
    axis = node.attributes.get_int("axis", 0) % rank
    kept, out = mender.input(node, 0, axis), mender.output(node, axis)
    old = mender.array(node, 1)
    if kept is None or old is None:
        return
    size = mender.shape(node.inputs[0])[axis]
    chosen = old.reshape(-1) % size
    chosen = chosen if out is None else chosen[out]
    mender.rewriter.set_weight(node, 1, np.searchsorted(kept, chosen).astype(old.dtype))


@rule("Pad")
def pad(node: ir.Node, at: Coupler) -> None:
    """An axis that is padded stays."""
    x, y = at.data(node), at.output(node)
    for k in range(len(x)):
        if (x.shape[k] == y.shape[k] and at.array(node, 1) is not None) or (x.shape[k] == y.shape[k] and at.opset < 11):
            at.same(x[k], y[k], node)
        else:
            at.pin(x[k], node, "it is padded")
            at.pin(y[k], node, "it is padded")


@rule("If")
def if_(node: ir.Node, at: Coupler) -> None:
    """What a branch hands out is what the node hands out."""
    for name in ("then_branch", "else_branch"):
        body = node.attributes[name].as_graph()
        for inner, outer in zip(body.outputs, node.outputs, strict=True):
            if not at.hand_on(inner, outer, node):
                for value in (inner, outer):
                    for axis in at.operand(value).axes if value.name and at.shape(value) is not None else ():
                        at.pin(axis, node, "the branches of If disagree on its shape")


@rule("Loop", "Scan")
def loop(node: ir.Node, at: Coupler) -> None:
    """What goes round stays."""
    at.pin_all(node, f"it goes through {node.op_type}")
