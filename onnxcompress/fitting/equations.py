"""Measurements as equations: what was run, in the terms a profile prices.

What a link or a network multiplies the coefficients of a profile with, :meth:`CostModel.usage` tells; its seconds
are known. Links give one equation each: what a long chain has more than a short one. Networks give one for each
of their nodes, as onnxruntime's profiler shares out the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel, Use
from onnxcompress.execution import Execution
from onnxcompress.fitting.links import Link
from onnxcompress.fitting.measuring import LONG, SHORT, feeds
from onnxcompress.fitting.samples import NetTime
from onnxcompress.profile_schema import Profile
from onnxcompress.view import GraphView

__all__ = ["Row", "link_row", "net_rows", "seen", "usage"]

_LINK_FLOOR, _NODE_FLOOR = 3e-6, 20e-6  # seconds below which a measurement counts less


@dataclass(frozen=True)
class Row:
    """An equation: the uses, each times its factor, take that long.

    Attributes:
        name: of what was measured.
        seconds: how long it takes.
        uses: draws on the coefficients.
        weight: how much it counts.
    """

    name: str
    seconds: float
    uses: tuple[tuple[float, Use], ...]
    weight: float = 1.0


def usage(profile: Profile, proto: onnx.ModelProto, feed: Mapping[str, Any]) -> tuple[Use, ...]:
    """What a run of a model draws on, as :meth:`CostModel.usage` says."""
    view, shapes = seen(proto, feed)
    return CostModel(profile).usage(view, shapes)


def seen(proto: onnx.ModelProto, feed: Mapping[str, Any]) -> tuple[GraphView, dict[str, tuple[int, ...]]]:
    """A model with the types of its values, and their shapes."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, np.shape(feed[value.name]), strict=True):
            dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(fixed)
    model = ir.from_proto(inferred)
    models.canonicalize(model)
    if any(node.domain for node in proto.graph.node):  # shape inference knows nothing of those
        return GraphView(model), value_shapes(model, dict(feed))
    shapes = {w.name: tuple(w.dims) for w in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return GraphView(model), shapes


def link_row(link: Link, seconds: float, profile: Profile) -> Row:
    """The equation of a link: what a long chain has more than a short one, less what the link stands on."""
    found = list(_link_uses(link, profile))
    base = link.baseline
    while base is not None:
        found += [(-factor, use) for factor, use in _link_uses(base, profile)]
        base = base.baseline
    return Row(link.name, seconds, tuple(found), min(1.0, seconds / _LINK_FLOOR) ** 0.5)


def _link_uses(link: Link, profile: Profile) -> Iterator[tuple[float, Use]]:
    each = 1.0 / (LONG - SHORT)
    for count, factor in ((LONG, each), (SHORT, -each)):
        proto = link.build(count, drawn=False)
        yield from ((factor, use) for use in usage(profile, proto, feeds(proto)))


def net_rows(proto: onnx.ModelProto, feed: Mapping[str, Any], time: NetTime, profile: Profile) -> list[Row]:
    """Equations of a network's nodes, as far as onnxruntime's names tell which nodes of the model they are.

    The profiler makes every node longer by about the same; that is taken off so that all of them together take
    as long as the network does without it.
    """
    view, shapes = seen(proto, feed)
    execution = Execution(profile, view, shapes)
    homes: dict[str, str] = {}
    for node in view.nodes():
        host = node
        while host in execution.inside:
            host = execution.inside[host]
        for name in (node.name, *(v.name for v in node.outputs)):
            homes.setdefault(str(name), str(host.name))
    uses: dict[str, list[Use]] = {}
    for use in CostModel(profile).usage(view, shapes):
        if use.key[0] != "reorder":
            uses.setdefault(homes[use.name], []).append(use)
    beyond = max(sum(n.seconds for n in time.nodes) - time.seconds, 0.0) / max(len(time.nodes), 1)
    spent: dict[str, float] = {}
    found: list[Row] = []
    for node_time in time.nodes:
        seconds = max(node_time.seconds - beyond, 0.15 * node_time.seconds)
        if node_time.op_type in ("ReorderInput", "ReorderOutput"):
            found.append(_reorder_row(time.name, node_time.elements, seconds, profile))
            continue
        home = next((homes[n] for n in _names(node_time.node) if n in homes), None)
        if home is not None:
            spent[home] = spent.get(home, 0.0) + seconds
    for home, seconds in spent.items():
        if home in uses and seconds > 0:
            weight = min(1.0, seconds / _NODE_FLOOR)
            found.append(Row(f"{time.name}: {home}", seconds, tuple((1.0, u) for u in uses[home]), weight))
    return [row for row in found if row.uses]


def _names(node: str) -> Iterator[str]:
    """Names of the model's own that a node of the optimized graph may stand for."""
    bare = node.removesuffix("_nchwc").removeprefix("fused ")
    yield from (node, bare, re.sub(r"_token_\d+$", "", bare), node.split("/")[0])


def _reorder_row(net: str, size: int, seconds: float, profile: Profile) -> Row:
    uses = tuple((1.0, use) for use in CostModel(profile).reorder(size))
    return Row(f"{net}: reorder {size}", seconds, uses, min(1.0, seconds / _NODE_FLOOR))
