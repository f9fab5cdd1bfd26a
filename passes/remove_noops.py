"""Nodes that hand on what they get, and chains that one node can do.

    f(x) = x                  Identity, Dropout in inference, Cast to the same type, Transpose by the
                              identity, Reshape / Expand / Tile / Slice / Pad that change nothing,
                              x * 1, x / 1, x + 0, x - 0, Concat / Sum / Max / Min / Mean of one
    T_q(T_p(x)) = T_pq(x)     Transpose; nothing is left where p and q undo each other
    R(S(x)) = R(x)            Reshape to a constant shape after anything that keeps the order of elements
    clip(clip(x, a, b), c, d) = clip(x, clip(a, c, d), clip(b, c, d))      a <= b, c <= d; Relu is clip(., 0, inf)
    x * clip(x / 6 + 1/2, 0, 1) = HardSwish(x)      where the opset has it (14)
    Where(x == k, y, x) = x   k < 0 and x a list of extents, which are never negative (``_extents``)
    outputs nobody reads      a node is asked for fewer (Dropout mask, Indices of MaxPool, states of LSTM)

Shapes count only as far as graph inputs and weights determine them; a Reshape is a no-op if all extents
but one are known to be equal, since the number of elements is. A constant operand must not broadcast
the other one. Values are equal bit for bit, but for x + 0 (the sign of a zero) and HardSwish (rounding).

onnxscript's rules turn Relu(Clip(x, -5, -1)) into Clip(x, 0, -1) and add Identity nodes, so they are
not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.passes._chains import EDITS, edit_of
from onnxcompress.passes._unchanged import unchanged
from onnxcompress.rewrite import Rewriter, can_be_output
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["RemoveNoOps"]


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
    place: ClassVar[int] = 1
    lossless: ClassVar[bool] = True

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        for node, found in self._plan(view).items():
            yield found if isinstance(found, Skipped) else Site.of(node)

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        found = self._plan(view)[view.node(site.key)]
        if isinstance(found, Skipped):
            raise Skip(found.reason)
        name, detail = (found, None) if isinstance(found, str) else ("bypass", found)
        return [Choice(site, name, detail=detail, effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        if isinstance(choice.detail, _Forward):
            where = choice.detail
            source = rewriter.value(where.name) if where.index < 0 else rewriter.node(where.name).outputs[where.index]
            rewriter.replace_uses(node.outputs[0], source)
            rewriter.remove_unused(node)
            return
        EDITS[choice.name](node, rewriter)

    def _plan(self, view: GraphView) -> dict[ir.Node, _Forward | str | Skipped]:
        return view.derive(self, lambda: _plan(view))


def _plan(view: GraphView) -> dict[ir.Node, _Forward | str | Skipped]:
    """What to do at each node (a key of ``EDITS``, or whom to read instead), or why nothing can be done."""
    plan: dict[ir.Node, _Forward | str | Skipped] = {}
    same: dict[ir.Value, ir.Value] = {}  # what is removed -> what takes its place
    outputs: set[ir.Value] = set()  # values that become outputs of a graph
    for node in view.nodes():
        if node.domain != "" or not node.outputs:
            continue
        output = node.outputs[0]
        source = unchanged(node, view, same)
        if source is None:
            edit = edit_of(node, view, same)
            if edit is not None:
                plan[node] = edit
            continue
        source = same.get(source, source)
        if output.is_graph_output():
            if source in outputs or not can_be_output(source, node.graph):
                plan[node] = Skipped(str(node.name), f"it joins {source.name!r} to an output of the graph")
                continue
            outputs.add(source)
        same[output] = source
        producer = source.producer()
        plan[node] = (
            _Forward(str(source.name), -1) if producer is None else _Forward(str(producer.name), source.index() or 0)
        )
    return plan
