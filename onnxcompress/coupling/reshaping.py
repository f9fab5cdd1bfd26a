"""Operators that keep every element and change the shape, and those that make a shape."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.axes import regroup
from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import mends, rule


@rule("Reshape")
def reshape(node: ir.Node, at: Coupler) -> None:
    """Axes split into factors and join."""
    x, y = at.data(node), at.output(node)
    at.reshaped(x, y, node)
    runs = list(regroup(x.shape, y.shape))
    for operand, places in ((x, {i for left, _ in runs for i in left}), (y, {j for _, right in runs for j in right})):
        for k in range(len(operand)):
            if k not in places:
                at.pin(operand[k], node, "Reshape mixes it with others")


@mends("Reshape")
def reshape_target(node: ir.Node, mender: Mender) -> None:
    """Extents follow; one that is copied from an axis with other positions is written down."""
    before, after = mender.shape(node.inputs[0]), mender.shape(node.outputs[0])
    sizes = {k: len(p) for k in range(len(after)) if (p := mender.output(node, k)) is not None}
    old = mender.ints(node, 1)
    for k, extent in enumerate(old or ()):
        if extent == -1 or (extent == 0 and k not in sizes and mender.input(node, 0, k) is None):
            sizes.pop(k, None)
        elif extent == 0 and not node.attributes.get_int("allowzero", 0) and k < len(before):
            kept = mender.input(node, 0, k)
            left = before[k] if kept is None else len(kept)
            if sizes.setdefault(k, after[k]) == left:
                del sizes[k]
    mender.set_extents(node, 1, sizes)


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


@rule("Shape")
def shape(node: ir.Node, at: Coupler) -> None:
    """Says nothing: what shrinks is tied to a weight, so its old extent is a constant that can stand in."""
    at.data(node)
    at.output(node)


@mends("Shape")
def old_shape(node: ir.Node, mender: Mender) -> None:
    """Readers still see the old extents; those that mean the new ones are mended themselves."""
    before = mender.shape(node.inputs[0])
    places = list(range(len(before)))[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(before))]
    sizes = {place: before[k] for place, k in enumerate(places) if mender.input(node, 0, k) is not None}
    if sizes:
        mender.freeze(node, sizes)


@rule("Size")
def size(node: ir.Node, at: Coupler) -> None:
    """The number of elements depends on all extents."""
    for axis in at.data(node).axes:
        at.pin(axis, node, "Size counts its positions")


@rule("ConstantOfShape")
def constant_of_shape(node: ir.Node, at: Coupler) -> None:
    """All elements are equal, so any positions may go."""
    at.output(node)


@mends("ConstantOfShape")
def constant_of_fewer(node: ir.Node, mender: Mender) -> None:
    """Extents follow."""
    rank = len(mender.shape(node.outputs[0]))
    mender.set_extents(node, 0, {k: len(p) for k in range(rank) if (p := mender.output(node, k)) is not None})


@rule("Expand")
def expand(node: ir.Node, at: Coupler) -> None:
    """Axes are the same from the right; one of size 1 is repeated as often as the list says."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    if at.length(node, 1) is None:
        at.pin_all(node, "the length of the shape it is expanded to is not known")


@mends("Expand")
def expand_less(node: ir.Node, mender: Mender) -> None:
    """Extents follow, but for 1, which repeats nothing."""
    rank, length = len(mender.shape(node.outputs[0])), mender.shape(node.inputs[1])[0]
    changes = {k - (rank - length): p for k in range(rank) if (p := mender.output(node, k)) is not None}
    old = mender.ints(node, 1)
    mender.set_extents(node, 1, {k: len(p) for k, p in changes.items() if k >= 0 and (old is None or old[k] != 1)})


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
