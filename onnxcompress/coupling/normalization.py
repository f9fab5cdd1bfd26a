"""Normalizations: what they normalize over has to stay, the rest goes with their input."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import mends, rule


@rule("BatchNormalization", "InstanceNormalization")
def by_channel(node: ir.Node, at: Coupler) -> None:
    """Every channel has statistics of its own."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    if node.attributes.get_int("training_mode", 0):
        at.pin_all(node, "BatchNormalization is in training mode")
    for index in range(1, len(node.inputs)):
        if (constant := at.input(node, index)) is not None:
            at.same(constant[0], x[1], node)
    if node.op_type == "InstanceNormalization":
        for axis in x.axes[2:]:
            at.pin(axis, node, "InstanceNormalization normalizes over it")


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
@rule("SimplifiedLayerNormalization", domain="com.microsoft")
def by_layer(node: ir.Node, at: Coupler) -> None:
    """Everything from an axis on is normalized together."""
    x = at.data(node)
    at.elementwise(node, [x, at.input(node, 1), at.input(node, 2)], at.output(node))
    for statistic in at.outputs(node)[1:]:
        at.elementwise(node, [x], statistic)
    axis = node.attributes.get_int("axis", -1)
    for k in range(axis % len(x), len(x)):
        at.pin(x[k], node, f"{node.op_type} normalizes over it")


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain="com.microsoft")
def with_skip(node: ir.Node, at: Coupler) -> None:
    """X + skip + bias, normalized over the last axis."""
    x = at.data(node)
    for y in at.outputs(node):
        if len(y) == len(x):
            at.elementwise(node, [at.input(node, i) for i in range(len(node.inputs))], y)
    at.pin(x[-1], node, f"{node.op_type} normalizes over it")


@rule("GroupNormalization")
def by_group(node: ir.Node, at: Coupler) -> None:
    """Groups of channels are normalized together: whole groups may go."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    count = node.attributes.get_int("num_groups", 1)
    groups, each = at.virtual(node, "groups", count), at.virtual(node, "channels of a group", x.shape[1] // count)
    at.product([x[1]], [groups, each], node)
    at.pin(each, node, "GroupNormalization normalizes over it")
    for axis in x.axes[2:]:
        at.pin(axis, node, "GroupNormalization normalizes over it")
    for index in (1, 2):
        if (constant := at.input(node, index)) is not None:
            at.same(constant[0], x[1] if constant.shape[0] == x.shape[1] else groups, node)


@mends("GroupNormalization")
def fewer_groups(node: ir.Node, mender: Mender) -> None:
    """As many groups as are left."""
    kept = mender.virtual(node, "groups")
    if kept is not None:
        mender.rewriter.set_attribute(node, "num_groups", len(kept))


@rule("MeanVarianceNormalization")
def mean_variance(node: ir.Node, at: Coupler) -> None:
    """Normalized over the axes named."""
    x = at.data(node)
    at.elementwise(node, [x], at.output(node))
    for axis in node.attributes.get_ints("axes", None) or (0, 2, 3):
        at.pin(x[axis], node, "MeanVarianceNormalization normalizes over it")
