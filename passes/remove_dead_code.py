"""Dead code: nodes, weights and operator sets that no output of the model depends on.

A node is dead if every reader of every output of it is dead and none is an output of its graph; the
body of a dead If, Loop or Scan is dead with it. Bodies are looked into, and an outer value that only a
dead body reads is dead too. Nothing live changes, so outputs are equal bit for bit. A node that only
draws random numbers is as dead as any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from onnxcompress.base import Choice, Pass, Site, Skipped, Stage
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView, body_nodes

__all__ = ["RemoveDeadCode"]

_WEIGHTS, _OPSETS = "weights: unused", "operator sets: unused"


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Removes nodes, weights and operator sets that no output depends on."""

    name: ClassVar[str] = "remove_dead_code"
    stage: ClassVar[Stage] = Stage.NORMALISE
    place: ClassVar[int] = 5
    lossless: ClassVar[bool] = True

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        dead: set[ir.Node] = set()
        for node in reversed(view.nodes()):
            if all(not v.is_graph_output() and all(user in dead for user, _ in v.uses()) for v in node.outputs):
                dead |= {node, *body_nodes(node)}
        inner = {n for node in dead for n in body_nodes(node)}
        yield from (Site.of(n, *body_nodes(n)) for n in reversed(view.nodes()) if n in dead and n not in inner)
        weights = [v for v in view.weights() if not v.is_graph_output() and all(u in dead for u, _ in v.uses())]
        if weights:
            yield Site(_WEIGHTS, tuple(str(v.name) for v in weights))
        unused = set(view.model.graph.opset_imports) - set(view.domains()) - {""}
        if unused:
            yield Site(_OPSETS, tuple(sorted(unused)))

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return [Choice(site, "remove", effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        if choice.site.key == _WEIGHTS:
            rewriter.drop_unused_weights()
        elif choice.site.key == _OPSETS:
            rewriter.run_library_pass(RemoveUnusedOpsetsPass(), "remove unused operator sets")
        else:
            rewriter.remove(rewriter.node(choice.site.key))
