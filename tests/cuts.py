"""Pruning by hand, short: models whose nodes are called like what they make, and what a cut makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from models import TARGET, Array, Feeds, check, learn, run, text

import onnxcompress
from onnxcompress.base import Choice, Site, Skip, Skipped
from onnxcompress.calibrate import value_shapes
from onnxcompress.coupling import Coupling
from onnxcompress.models_zoo.families import FAMILIES
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import build
from onnxcompress.view import GraphView

__all__ = ["choices_of", "cut", "family", "groups_of", "named", "offered", "reasons_of", "shape", "weights", "within"]


def named(body: str, parts: Mapping[str, Array] | None = None, *, opset: int = 17) -> ir.Model:
    """A model whose nodes are called like what they make."""
    model = text(body, parts, opset=opset)
    for node in model.graph.all_nodes():
        node.name = next(str(v.name) for v in node.outputs if v.name)
    return model


def family(name: str) -> ir.Model:
    """A generated model as the pipeline hands it to passes."""
    model = ir.from_proto(FAMILIES[name]())
    onnxcompress.model.canonicalize(model)
    return onnxcompress.model.infer_types(model)


def groups_of(model: ir.Model, feed: Mapping[str, Array] | None = None) -> dict[str, tuple[str, int]]:
    """Unit and size of every group that can shrink, by key."""
    shapes = None if feed is None else value_shapes(model, dict(feed), bodies=True)
    return {g.key: (g.unit, g.size) for g in Coupling(GraphView(model), shapes).groups if not g.pinned}


def seen(model: ir.Model, data: Feeds) -> GraphView:
    return GraphView(model, value_shapes(model, dict(data[0]), bodies=True) if data else None)


def offered(pass_: PruneChannels, model: ir.Model, data: Feeds = (), target: Target = TARGET) -> dict[str, list[str]]:
    """Names of the choices at every site; none where the pass refuses."""
    view = seen(model, data)
    found: dict[str, list[str]] = {}
    for site in pass_.sites(view):
        if isinstance(site, Site):
            try:
                found[site.key] = [c.name for c in pass_.choices(site, view, target)]
            except Skip:
                found[site.key] = []
    return found


def reasons_of(pass_: PruneChannels, model: ir.Model, target: Target = TARGET) -> dict[str, str]:
    """Why what is left alone is left alone."""
    view, found = GraphView(model), dict[str, str]()
    for site in pass_.sites(view):
        if isinstance(site, Skipped):
            found[site.key] = site.reason
            continue
        try:
            pass_.choices(site, view, target)
        except Skip as skip:
            found[site.key] = skip.reason
    return found


def choices_of(pass_: PruneChannels, model: ir.Model, data: Feeds = (), target: Target = TARGET) -> list[Choice]:
    """The strongest choice at every site."""
    view = seen(model, data)
    found = []
    for site in pass_.sites(view):
        if isinstance(site, Site):
            try:
                found.append(pass_.choices(site, view, target)[-1])
            except Skip:
                continue
    return found


def cut(
    pass_: PruneChannels,
    model: ir.Model,
    data: Feeds = (),
    *,
    only: Sequence[str] | None = None,
    target: Target = TARGET,
) -> ir.Model:
    """A clone with the strongest choice made at every site, or at these."""
    choices = [c for c in choices_of(pass_, model, data, target) if only is None or c.site.key in only]
    assert choices, "nothing to cut"
    built = build(model, pass_, choices, learn(pass_, model, data, target) if data else Evidence())
    assert not built.refused
    check(built.model)
    return built.model


def weights(model: ir.Model) -> dict[str, Array]:
    """Every initializer by name."""
    found = ((str(v.name), v.const_value) for v in GraphView(model).weights())
    return {name: tensor.numpy() for name, tensor in found if tensor is not None}


def shape(model: ir.Model, node: str, index: int = 1) -> tuple[int, ...]:
    """Shape of the weight at an input of a node."""
    value = model.graph.node(node).inputs[index]
    assert value is not None and value.const_value is not None
    return tuple(int(d) for d in value.const_value.shape.numpy())


def within(model: ir.Model, after: ir.Model, data: Feeds, *, ulps: float = 64) -> None:
    """The same outputs up to float32 rounding of sums of values as large as the outputs' largest."""
    for feed in data:
        wanted, found = run(model, feed), run(after, feed)
        for name, array in wanted.items():
            scale = float(np.abs(array).max())
            np.testing.assert_allclose(found[name], array, rtol=0, atol=ulps * np.finfo(np.float32).eps * scale)
