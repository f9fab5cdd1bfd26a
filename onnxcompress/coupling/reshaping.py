"""Operators that keep every element and change the shape, and those that make a shape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.coupling.axes import regroup
from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import mends, rule


@rule("Reshape")
def reshape(node: ir.Node, at: Coupler) -> None:
    """Axes split into factors and join; an extent that is computed cannot follow."""
    x, y = at.data(node), at.output(node)
    at.reshaped(x, y, node)
    runs = list(regroup(x.shape, y.shape))
    alone = {right[0]: left[0] for left, right in runs if len(left) == len(right) == 1}
    covered = {j for _, right in runs for j in right}
    for operand, places in ((x, {i for left, _ in runs for i in left}), (y, covered)):
        for k in range(len(operand)):
            if k not in places:
                at.pin(operand[k], node, "Reshape mixes it with others")
    for k in range(len(y)):
        extent = at.extent(node, 1, k)
        if extent == 0 and not node.attributes.get_int("allowzero", 0):
            if alone.get(k) != k:
                at.pin(y[k], node, "its extent is copied from another axis")
        elif extent is None:
            at.pin(y[k], node, "its extent is computed")


@mends("Reshape")
def reshape_target(node: ir.Node, mender: Mender) -> None:
    """Written extents follow."""
    shape = mender.shape(node.outputs[0])
    changes = {k: p for k in range(len(shape)) if (p := mender.output(node, k)) is not None}
    mender.set_extents(node, 1, changes, keep=(0, -1))


@rule("Flatten")
def flatten(node: ir.Node, at: Coupler) -> None:
    """Two axes are left."""
    at.reshaped(at.data(node), at.output(node), node)


@rule("Squeeze", "Unsqueeze")
def ones(node: ir.Node, at: Coupler) -> None:
    """Axes of size 1 come or go."""
    x, y = at.data(node), at.output(node)
    left = [a for a in x.axes if at.size(a) != 1]
    right = [a for a in y.axes if at.size(a) != 1]
    for a, b in zip(left, right, strict=True):
        at.same(a, b, node)


@rule("Transpose")
def transpose(node: ir.Node, at: Coupler) -> None:
    """Axes change places."""
    x, y = at.data(node), at.output(node)
    order = node.attributes.get_ints("perm", None) or tuple(range(len(x)))[::-1]
    for k, source in enumerate(order):
        at.same(x[source], y[k], node)


@rule("Shape", "Size")
def shape(node: ir.Node, at: Coupler) -> None:
    """Extents somebody picks out of a shape must stay; a shape-only reader of others minds nothing."""
    x = at.data(node)
    start = node.attributes.get_int("start", 0) % (len(x) + 1) if len(x) else 0
    end = node.attributes.get_int("end", len(x))
    read = set(range(len(x))[slice(start, end)]) if node.op_type == "Shape" else set(range(len(x)))
    if node.op_type == "Shape" and not at.view.is_output(node.outputs[0]):
        picked: set[int] = set()
        for reader, index in at.view.consumers(node.outputs[0]):
            chosen = _picked(reader, index, at, sorted(read))
            if chosen is None:
                picked = read
                break
            picked |= chosen
        read = picked
    for k in read:
        at.pin(x[k], node, "its extent is read by Shape")


def _picked(reader: ir.Node, index: int, at: Coupler, read: list[int]) -> set[int] | None:
    """Which extents a reader takes; None if that is not clear."""
    if index != 0 or reader.op_type not in ("Gather", "Slice"):
        return None
    if reader.op_type == "Gather":
        chosen = at.array(reader, 1)
        return None if chosen is None else {read[int(i)] for i in np.asarray(chosen).reshape(-1)}
    starts, ends, steps = (at.array(reader, i) for i in (1, 2, 4))
    if starts is None or ends is None or (steps is None and len(reader.inputs) > 4 and reader.inputs[4] is not None):
        return None
    step = 1 if steps is None else int(np.asarray(steps).reshape(-1)[0])
    bounds = slice(int(np.asarray(starts).reshape(-1)[0]), int(np.asarray(ends).reshape(-1)[0]), step)
    return set(read[bounds])


@rule("ConstantOfShape")
def constant_of_shape(node: ir.Node, at: Coupler) -> None:
    """All elements are equal, so positions go wherever the extent is written down."""
    y = at.output(node)
    for k in range(len(y)):
        if at.extent(node, 0, k) is None:
            at.pin(y[k], node, "its extent is computed")


@mends("ConstantOfShape")
def constant_of_fewer(node: ir.Node, mender: Mender) -> None:
    """Written extents follow."""
    rank = len(mender.shape(node.outputs[0]))
    mender.set_extents(node, 0, {k: p for k in range(rank) if (p := mender.output(node, k)) is not None})


@rule("Expand")
def expand(node: ir.Node, at: Coupler) -> None:
    """Axes are the same from the right; one of size 1 is repeated as often as is written."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    length = at.length(node, 1)
    for k in range(1, len(y) + 1):
        inside = length is not None and k <= length
        extent = at.extent(node, 1, length - k) if length is not None and inside else None
        if length is None or (inside and extent is None):
            at.pin(y[-k], node, "its extent is computed")


@mends("Expand")
def expand_less(node: ir.Node, mender: Mender) -> None:
    """Written extents follow."""
    rank, length = len(mender.shape(node.outputs[0])), mender.length(node, 1)
    changes = {k - (rank - length): p for k in range(rank) if (p := mender.output(node, k)) is not None}
    mender.set_extents(node, 1, {k: p for k, p in changes.items() if k >= 0}, keep=(1,))


@rule("Tile")
def tile(node: ir.Node, at: Coupler) -> None:
    """A repeated axis is an outer factor of its own."""
    x, y = at.data(node), at.output(node)
    for k in range(len(x)):
        if x.shape[k] == y.shape[k]:
            at.same(x[k], y[k], node)
            continue
        times = at.virtual(node, f"times {k}", y.shape[k] // max(1, x.shape[k]))
        at.pin(times, node, "the number of repeats stays")
        at.product([y[k]], [times, x[k]], node)


@rule("EyeLike")
def eye(node: ir.Node, at: Coupler) -> None:
    """Positions matter."""
    at.pin_all(node, "positions matter to EyeLike")
