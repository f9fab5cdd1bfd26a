"""Low-rank forms written into a copy of a model, as factorize does it."""

from __future__ import annotations

import onnx_ir as ir
from models import Feeds, check

from onnxcompress import model as models
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.passes._forms import Form, Ranks, Settings
from onnxcompress.rewrite import Rewriter
from onnxcompress.sketch import draw
from onnxcompress.statistics import Evidence

__all__ = ["seen_by", "written"]


def seen_by(form: Form, model: ir.Model, feeds: Feeds) -> Evidence:
    """What a form asks for, observed on all rows."""
    return calibrate(model, form.needs(), open_data([dict(f) for f in feeds], model))


def written(
    model: ir.Model, form: Form, ranks: Ranks, evidence: Evidence | None = None, settings: Settings | None = None
) -> ir.Model:
    """A copy of the model with the form in place of its nodes."""
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    factors = form.factors(ranks, evidence or Evidence(), settings or Settings())
    nodes = [rewriter.node(name) for name in form.nodes]
    before = [p for n in nodes for v in n.inputs if v is not None and (p := v.producer()) is not None]
    made = draw(rewriter, form.drawing(ranks), factors.weights, after=nodes[0], prefix=str(nodes[0].name))
    for node in nodes:
        rewriter.replace_node(node, *(made.get(str(v.name), v) for v in node.outputs))
    rewriter.remove_unused(*before)
    rewriter.drop_unused_weights()
    copy.graph.sort()
    check(copy)
    return copy
