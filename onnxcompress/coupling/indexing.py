"""Operators that read or write at positions the data say: those axes stay, the others go along."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler, Operand
from onnxcompress.coupling.rules import rule

_LOOKED_UP = "positions are looked up that the data say"
_WRITTEN = "positions are written that the data say"

_WHOLE = {
    "NonZero": "NonZero lists its positions",
    "Unique": "Unique compares its positions",
    "NonMaxSuppression": "NonMaxSuppression lists its positions",
    "Range": "Range counts its positions",
    "EyeLike": "EyeLike tells rows and columns apart",
    "DFT": "DFT mixes its positions",
    "STFT": "STFT mixes its positions",
    "Multinomial": "Multinomial draws one of its positions",
}
"""Operators that no position can leave, and what to say of them."""


@rule(*_WHOLE)
def whole(node: ir.Node, at: Coupler) -> None:
    """Nothing goes."""
    at.pin_all(node, _WHOLE[node.op_type])


def _like(operand: Operand, y: Operand, besides: set[int], node: ir.Node, at: Coupler, reason: str) -> None:
    """Axes of the same number are the same where as long; others are pinned."""
    for k, axis in enumerate(operand.axes):
        if k not in besides and operand.shape[k] == y.shape[k]:
            at.same(axis, y[k], node)
        else:
            at.pin(axis, node, reason)
            if k not in besides:
                at.pin(y[k], node, reason)


@rule("ScatterElements", "Scatter")
def scatter_elements(node: ir.Node, at: Coupler) -> None:
    """y[i][indices[i][j]] = updates[i][j] along axis 1, and so on."""
    x, y = at.data(node), at.output(node)
    axis = node.attributes.get_int("axis", 0) % len(x)
    at.elementwise(node, [x], y)
    at.pin(y[axis], node, _WRITTEN)
    for index in (1, 2):
        _like(at.data(node, index), y, {axis}, node, at, _WRITTEN)


@rule("GatherElements")
def gather_elements(node: ir.Node, at: Coupler) -> None:
    """y[i][j] = x[i][indices[i][j]] along axis 1, and so on."""
    x, indices, y = at.data(node), at.data(node, 1), at.output(node)
    axis = node.attributes.get_int("axis", 0) % len(x)
    at.elementwise(node, [indices], y)
    _like(x, y, {axis}, node, at, _LOOKED_UP)


@rule("ScatterND", "TensorScatter")
def scatter_nd(node: ir.Node, at: Coupler) -> None:
    """Slices of x are written; the first axes say which."""
    if node.op_type == "TensorScatter":
        at.pin_all(node, _WRITTEN)
        return
    x, indices, updates, y = at.data(node), at.data(node, 1), at.data(node, 2), at.output(node)
    at.elementwise(node, [x], y)
    many, chosen = len(indices) - 1, indices.shape[-1]
    for k in range(chosen):
        at.pin(y[k], node, _WRITTEN)
    at.pin(indices[-1], node, "each row is a position")
    for k in range(many):
        at.same(indices[k], updates[k], node)
    for k in range(chosen, len(x)):
        at.same(updates[many + k - chosen], y[k], node)


@rule("GatherND")
def gather_nd(node: ir.Node, at: Coupler) -> None:
    """Slices of x are read; the axes behind the batch say which."""
    x, indices, y = at.data(node), at.data(node, 1), at.output(node)
    batch, chosen = node.attributes.get_int("batch_dims", 0), indices.shape[-1]
    at.pin(indices[-1], node, "each row is a position")
    for k in range(batch):
        at.same(x[k], indices[k], node)
    for k in range(chosen):
        at.pin(x[batch + k], node, _LOOKED_UP)
    for k in range(len(indices) - 1):
        at.same(indices[k], y[k], node)
    for k in range(batch + chosen, len(x)):
        at.same(x[k], y[len(indices) - 1 + k - batch - chosen], node)


@rule("OneHot")
def one_hot(node: ir.Node, at: Coupler) -> None:
    """A new axis with one position for each value there may be."""
    indices, y = at.data(node), at.output(node)
    axis = node.attributes.get_int("axis", -1) % len(y)
    at.pin(y[axis], node, "OneHot has a position for each value there may be")
    for k, a in enumerate(indices.axes):
        at.same(a, y[k if k < axis else k + 1], node)
    for a in at.data(node, 2).axes:
        at.pin(a, node, "the values for off and on stay")


@rule("Compress")
def compress(node: ir.Node, at: Coupler) -> None:
    """Positions of one axis are taken or left."""
    x, y = at.data(node), at.output(node)
    if node.attributes.get("axis") is None:
        at.pin_all(node, _LOOKED_UP)
        return
    axis = node.attributes.get_int("axis") % len(x)
    for operand, k in ((x, axis), (y, axis), (at.data(node, 1), 0)):
        at.pin(operand[k], node, _LOOKED_UP)
    for k in range(len(x)):
        if k != axis:
            at.same(x[k], y[k], node)


@rule("Trilu")
def trilu(node: ir.Node, at: Coupler) -> None:
    """The last two axes are rows and columns of a triangle."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    for axis in x.axes[-2:]:
        at.pin(axis, node, "Trilu tells rows and columns apart")


@rule("ReverseSequence")
def reverse_sequence(node: ir.Node, at: Coupler) -> None:
    """Steps turn round, as many as each sequence has."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    at.pin(x[node.attributes.get_int("time_axis", 0)], node, "ReverseSequence turns it round")
    at.same(at.data(node, 1)[0], x[node.attributes.get_int("batch_axis", 1)], node)


@rule("CenterCropPad")
def center_crop_pad(node: ir.Node, at: Coupler) -> None:
    """Axes it names are cut or padded."""
    x, y = at.data(node), at.output(node)
    named = {a % len(x) for a in node.attributes.get_ints("axes", None) or range(len(x))}
    for k in range(len(x)):
        if k in named:
            at.pin(x[k], node, "CenterCropPad cuts or pads it")
            at.pin(y[k], node, "CenterCropPad cuts or pads it")
        else:
            at.same(x[k], y[k], node)
