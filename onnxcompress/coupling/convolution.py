"""Conv, ConvTranspose and what slides windows over maps."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler, Operand
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import mends, rule

_SLIDES = "a window slides over it"


def pin_space(node: ir.Node, at: Coupler, *operands: Operand) -> None:
    """Pins every axis behind batch and channels."""
    for operand in operands:
        for axis in operand.axes[2:]:
            at.pin(axis, node, _SLIDES)


@rule("Conv")
@rule("FusedConv", domain="com.microsoft")
def conv(node: ir.Node, at: Coupler) -> None:
    """[N, C, ...] x [M, C / groups, ...] -> [N, M, ...]."""
    y = at.output(node)
    convolve(node, at, at.data(node), at.data(node, 1), at.input(node, 2), y, 1)
    residual = at.input(node, 3)  # FusedConv adds it
    if residual is not None:
        at.elementwise(node, [residual], y)


def convolve(
    node: ir.Node, at: Coupler, x: Operand, w: Operand, bias: Operand | None, y: Operand, index: int | None
) -> None:
    """What any convolution says.

    Args:
        node: the convolution.
        at: is told.
        x: data.
        w: filters.
        bias: may be missing.
        y: result.
        index: of the weight among the inputs; None if it cannot make up for anything.
    """
    groups = node.attributes.get_int("group", 1)
    at.same(x[0], y[0], node)
    pin_space(node, at, x, y)
    for axis in w.axes[2:]:
        at.ignore(axis)
    if bias is not None:
        at.same(bias[0], w[0], node)
    at.same(w[0], y[1], node)
    if groups == 1:
        at.same(x[1], w[1], node)
        if w.constant and index is not None:
            at.sums(node, index, w[1], x[1], 0)
        elif not w.constant or index is None:
            at.sums_data(node, w[1])
    else:
        many = at.virtual(node, "groups", groups)
        each = at.virtual(node, "outputs of a group", w.shape[0] // groups)
        at.product([x[1]], [many, w[1]], node)
        at.product([w[0]], [many, each], node)
        if w.constant and index is not None and w.shape[1] > 1:
            at.sums(node, index, w[1], None, 0, many)
        elif not w.constant or index is None:
            at.sums_data(node, w[1])


@rule("ConvTranspose")
def conv_transpose(node: ir.Node, at: Coupler) -> None:
    """[N, C, ...] x [C, M / groups, ...] -> [N, M, ...]."""
    x, w, y = at.data(node), at.data(node, 1), at.output(node)
    bias, groups = at.input(node, 2), node.attributes.get_int("group", 1)
    at.same(x[0], y[0], node)
    pin_space(node, at, x, y)
    for axis in w.axes[2:]:
        at.ignore(axis)
    if bias is not None:
        at.same(bias[0], y[1], node)
    at.same(x[1], w[0], node)
    if groups == 1:
        at.same(w[1], y[1], node)
        if w.constant:
            at.sums(node, 1, w[0], x[1], 1)
    else:
        many = at.virtual(node, "groups", groups)
        each = at.virtual(node, "inputs of a group", w.shape[0] // groups)
        at.product([w[0]], [many, each], node)
        at.product([y[1]], [many, w[1]], node)
        if w.constant and w.shape[0] > groups:
            at.sums(node, 1, w[0], None, 1, many)


@mends("Conv", "ConvTranspose")
@mends("FusedConv", domain="com.microsoft")
def regroup_channels(node: ir.Node, mender: Mender) -> None:
    """As many groups as are left."""
    kept = mender.virtual(node, "groups")
    if kept is not None:
        mender.rewriter.set_attribute(node, "group", len(kept))


@rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pool(node: ir.Node, at: Coupler) -> None:
    """Channels are pooled one by one."""
    x = at.data(node)
    for y in at.outputs(node):
        at.same(x[0], y[0], node)
        at.same(x[1], y[1], node)
        pin_space(node, at, x, y)
    if len(node.outputs) > 1 and any(reader.op_type != "MaxUnpool" for reader, _ in at.view.consumers(node.outputs[1])):
        at.pin(x[1], node, "MaxPool counts positions over all channels")


@rule("MaxUnpool")
def unpool(node: ir.Node, at: Coupler) -> None:
    """Values go back to where MaxPool found them."""
    x, indices, y = at.data(node), at.data(node, 1), at.output(node)
    for k in (0, 1):
        at.same(x[k], indices[k], node)
        at.same(x[k], y[k], node)
    pin_space(node, at, x, indices, y)


@mends("MaxUnpool")
def unpooled_sizes(node: ir.Node, mender: Mender) -> None:
    """A written shape follows."""
    if len(node.inputs) > 2 and node.inputs[2] is not None and (kept := mender.output(node, 1)) is not None:
        mender.set_extents(node, 2, {1: len(kept)})


@rule("GridSample")
def grid_sample(node: ir.Node, at: Coupler) -> None:
    """[N, C, ...] is read at places of a grid [N, ..., 2 or 3]."""
    x, grid, y = at.data(node), at.data(node, 1), at.output(node)
    at.same(x[1], y[1], node)
    at.same(x[0], y[0], node)
    at.same(x[0], grid[0], node)
    pin_space(node, at, x, y)
    for axis in grid.axes[1:]:
        at.pin(axis, node, "it is a place to look at")


@rule("RoiAlign", "MaxRoiPool")
def regions(node: ir.Node, at: Coupler) -> None:
    """[N, C, H, W] is read in regions [R, 4 or 5]: [R, C, h, w]."""
    x, rois, y = at.data(node), at.data(node, 1), at.output(node)
    at.same(x[1], y[1], node)
    at.same(rois[0], y[0], node)
    at.pin(x[0], node, "regions say which of the batch")
    at.pin(rois[1], node, "it is a place to look at")
    if (batch := at.input(node, 2)) is not None:
        at.same(batch[0], y[0], node)
    pin_space(node, at, x, y)


@rule("Col2Im")
def col2im(node: ir.Node, at: Coupler) -> None:
    """[N, C x block, L] -> [N, C, ...]."""
    x, y = at.data(node), at.output(node)
    at.same(x[0], y[0], node)
    block = at.virtual(node, "block", x.shape[1] // y.shape[1])
    at.pin(block, node, "it is the places of a block")
    at.product([x[1]], [y[1], block], node)
    pin_space(node, at, x, y)


@rule("DeformConv")
def deform_conv(node: ir.Node, at: Coupler) -> None:
    """Like Conv, at places that are computed."""
    convolve(node, at, at.data(node), at.data(node, 1), at.input(node, 3), at.output(node), 1)
    for index in (2, 4):
        if (places := at.input(node, index)) is not None:
            for axis in places.axes:
                at.pin(axis, node, "it is a place to look at")
    if node.attributes.get_int("offset_group", 1) > 1:
        at.pin(at.data(node)[1], node, "groups of it are looked at in places of their own")


@rule("Resize", "Upsample")
def resize(node: ir.Node, at: Coupler) -> None:
    """Axes that keep their size are kept as they are."""
    x, y = at.data(node), at.output(node)
    for k in range(len(x)):
        if x.shape[k] != y.shape[k] or k >= 2:
            at.pin(x[k], node, "it is resized")
            at.pin(y[k], node, "it is resized")
        else:
            at.same(x[k], y[k], node)


@mends("Resize")
def resize_sizes(node: ir.Node, mender: Mender) -> None:
    """Sizes follow the channels."""
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = list(node.attributes.get_ints("axes", ()) or range(len(mender.shape(node.outputs[0]))))
        kept = {place: mender.output(node, k) for place, k in enumerate(axes)}
        mender.set_extents(node, 3, {place: len(p) for place, p in kept.items() if p is not None})


@rule("DepthToSpace", "SpaceToDepth")
def depth_to_space(node: ir.Node, at: Coupler) -> None:
    """Channels hold blocks of positions."""
    x, y = at.data(node), at.output(node)
    block = node.attributes.get_int("blocksize", 1)
    rows, columns = at.virtual(node, "block rows", block), at.virtual(node, "block columns", block)
    deep, flat = (x, y) if node.op_type == "DepthToSpace" else (y, x)
    depth_first = node.op_type == "SpaceToDepth" or node.attributes.get_string("mode", "DCR") == "DCR"
    parts = [rows, columns, flat[1]] if depth_first else [flat[1], rows, columns]
    at.product([deep[1]], parts, node)
    at.same(x[0], y[0], node)
    for axis in (rows, columns):
        at.pin(axis, node, "positions are moved into channels")
    pin_space(node, at, x, y)


@rule("LRN")
def lrn(node: ir.Node, at: Coupler) -> None:
    """Neighbouring channels are summed."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    at.pin(x[1], node, "LRN sums over neighbouring channels")
