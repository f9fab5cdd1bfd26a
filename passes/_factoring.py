"""Writing a low-rank form into a model: for good, or behind a switch that prices it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.passes import _sequence as sequence
from onnxcompress.passes._constant_sum import absorb
from onnxcompress.passes._forms import Factors, Form, Ranks
from onnxcompress.passes._int8 import calibrated_name, gate_on_top
from onnxcompress.passes._readers import bias_place
from onnxcompress.rewrite import Rewriter
from onnxcompress.sketch import Drawn, Slot, draw, what_makes

__all__ = ["behind_switch", "write"]


def write(form: Form, ranks: Ranks, factors: Factors, rewriter: Rewriter) -> None:
    """Puts a form in the place of its nodes.

    Args:
        form: the form.
        ranks: at which.
        factors: its weights there.
        rewriter: of the model.
    """
    nodes = [rewriter.node(name) for name in form.nodes]
    values = {calibrated_name(v): v for node in nodes for v in node.inputs if v is not None}
    read = [p for v in values.values() if (p := v.producer()) is not None]
    drawing = form.drawing(ranks)
    made = draw(rewriter, drawing, factors.weights, after=nodes[0], prefix=str(nodes[0].name), values=values)
    for node in nodes:
        results = [made[str(v.name)] for v in node.outputs if v.name]
        rewriter.replace_node(node, *(made.get(str(v.name), v) for v in node.outputs))
        for value in results:
            _shift(value, factors, rewriter)
            sequence.note_factored(_producer(value), str(value.name))
    rewriter.remove_unused(*read)
    if len(nodes) > 1:
        rewriter.sort()


def behind_switch(form: Form, ranks: Ranks, factors: Factors, rewriter: Rewriter, switch: ir.Value) -> None:
    """Where the switch is on, what reads the outputs of a form's nodes sees those of the form.

    Args:
        form: the form.
        ranks: at which.
        factors: its weights there.
        rewriter: of the model.
        switch: boolean scalar.
    """
    drawing = form.drawing(ranks)
    constants: dict[Slot, ir.Value] = {}
    for name in form.nodes:
        node = rewriter.node(name)
        values = {calibrated_name(v): v for v in node.inputs if v is not None}
        low = partial(_low, rewriter, node, drawing, factors, values, constants)
        for output in node.outputs:
            if output.name and (output.uses() or output.is_graph_output()):
                gate_on_top(rewriter, output, switch, low)


def _shift(value: ir.Value, factors: Factors, rewriter: Rewriter) -> None:
    """Adds to the bias behind a MatMul what keeps its mean."""
    shift = factors.shifts.get(str(value.name))
    place = None if shift is None else bias_place(_producer(value))
    if shift is not None and place is not None:
        absorb(rewriter, place, shift, -1)


def _low(
    rewriter: Rewriter,
    node: ir.Node,
    drawing: Sequence[Drawn],
    factors: Factors,
    values: Mapping[str, ir.Value],
    constants: dict[Slot, ir.Value],
    top: ir.Value,
    wanted: str,
) -> ir.Value:
    """What factors make of one output of a node, behind ``top``."""
    prefix = f"{node.name}_low"
    made = draw(
        rewriter, what_makes(drawing, wanted), factors.weights, after=_producer(top), prefix=prefix, values=values,
        constants=constants,
    )  # fmt: skip
    shift = factors.shifts.get(wanted)
    if shift is None or not shift.any():
        return made[wanted]
    added = rewriter.constant(np.asarray(shift, np.float32), f"{prefix}_shift", like=node)
    return rewriter.insert("Add", [made[wanted], added], after=_producer(made[wanted]), dtype=top.dtype)[0]


def _producer(value: ir.Value) -> ir.Node:
    producer = value.producer()
    if producer is None:
        raise Skip(f"{value.name!r} is made by no node")
    return producer
