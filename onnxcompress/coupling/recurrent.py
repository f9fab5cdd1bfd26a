"""LSTM, GRU and RNN: hidden units."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import mends, rule

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule(*_GATES)
def recurrent(node: ir.Node, at: Coupler) -> None:
    """X [T, B, I], W [D, gates H, I], R [D, gates H, H], B [D, 2 gates H] -> Y [T, D, B, H], states [D, B, H].

    A unit goes from all gates, from both directions and from the states.
    """
    x, w, r = at.data(node), at.data(node, 1), at.data(node, 2)
    gates = _GATES[node.op_type]
    units = at.virtual(node, "hidden units", r.shape[2], "hidden units")
    batch_first = node.attributes.get_int("layout", 0) == 1
    at.same(x[2], w[2], node)
    at.same(r[2], units, node)
    for operand, count, what in ((w, gates, "gates of W"), (r, gates, "gates of R")):
        many = at.virtual(node, what, count, "gates")
        at.pin(many, node, "gates stay")
        at.product([operand[1]], [many, units], node)
        at.pin(operand[0], node, "both directions stay")
    for index, count, what in ((3, 2 * gates, "gates of B"), (7, 3, "peepholes")):
        constant = at.input(node, index)
        if constant is not None:
            many = at.virtual(node, what, count, "gates")
            at.pin(many, node, "gates stay")
            at.product([constant[1]], [many, units], node)
            at.pin(constant[0], node, "both directions stay")
    if (lengths := at.input(node, 4)) is not None:
        at.pin(lengths[0], node, "sequence lengths stay")
    for state in (at.input(node, 5), at.input(node, 6)):
        if state is not None:
            at.same(state[2], units, node)
            at.pin(state[0], node, "both directions stay")
            at.pin(state[1], node, "the batch stays")
    for axis in x.axes[:2]:
        at.pin(axis, node, "steps and batch stay")
    for y in at.outputs(node):
        at.same(y[-1], units, node)
        for axis in y.axes[:-1]:
            at.pin(axis, node, "steps, batch and directions stay")
    if w.constant:
        at.sums(node, 1, w[2], x[2], 1)
    if r.constant:
        first = node.outputs[0]
        states = at.output(node)[-1] if first.name and not batch_first else None
        at.sums(node, 2, r[2], states, 1)


@mends(*_GATES)
def hidden_size(node: ir.Node, mender: Mender) -> None:
    """As many units as are left."""
    kept = mender.virtual(node, "hidden units")
    if kept is not None:
        mender.rewriter.set_attribute(node, "hidden_size", len(kept))
