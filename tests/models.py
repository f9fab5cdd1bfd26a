"""Small models written as ONNX text, and what onnxruntime makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from onnxcompress import model as models
from onnxcompress.base import Choice, Pass, Site, Skip
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import build
from onnxcompress.view import GraphView

__all__ = [
    "TARGET",
    "Array",
    "Feeds",
    "Wanted",
    "check",
    "fused",
    "learn",
    "made",
    "normal",
    "ops",
    "proto_of",
    "run",
    "text",
    "wiring",
]

Array = npt.NDArray[Any]
Feeds = Sequence[Mapping[str, Array]]
Wanted = str | Callable[[Choice], bool]
"""Which choice to make at a site: its name, or whatever the function accepts."""

TARGET = Target("any")


def normal(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def text(
    body: str, weights: Mapping[str, Array] | None = None, *, opset: int = 17, imports: Sequence[str] = ()
) -> ir.Model:
    """A model from ONNX text as the pipeline hands it to passes: canonical, types inferred.

    Args:
        body: the graph.
        weights: become initializers of the main graph.
        opset: of the standard operators.
        imports: other domains it uses, at version 1.
    """
    domains = ", ".join(f'"{d}" : {v}' for d, v in (("", opset), *((d, 1) for d in imports)))
    proto = onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{domains}]>\n{body}")
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    models.canonicalize(model)
    return models.infer_types(model)


def proto_of(model: ir.Model) -> onnx.ModelProto:
    return onnx.load_from_string(models.serialize(model))


def check(model: ir.Model) -> None:
    onnx.checker.check_model(proto_of(model))


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph.all_nodes()]


def run(model: ir.Model, feed: Mapping[str, Array], *, fuse: bool = False) -> dict[str, Array]:
    """Outputs by name; node by node unless ``fuse``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(models.serialize(model), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return {n: np.asarray(a) for n, a in zip(names, session.run(names, dict(feed)), strict=True)}


def fused(model: ir.Model) -> onnx.ModelProto:
    """The graph onnxruntime really runs, optimized at its default level."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(models.serialize(model), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def _offered(pass_: Pass, site: Site, view: GraphView, target: Target) -> list[Choice]:
    """The choices at a site; none where the pass refuses."""
    try:
        return list(pass_.choices(site, view, target))
    except Skip:
        return []


def learn(pass_: Pass, model: ir.Model, feeds: Feeds, target: Target = TARGET) -> Evidence:
    """Everything the pass asks for."""
    view = GraphView(model)
    sites = [s for s in pass_.sites(view) if isinstance(s, Site)]
    needs = {n for s in sites for c in _offered(pass_, s, view, target) for n in pass_.needs(c, view)}
    return calibrate(model, sorted(needs), open_data([dict(f) for f in feeds], model)) if needs else Evidence()


def made(
    pass_: Pass, model: ir.Model, wanted: Mapping[str, Wanted] | Wanted, feeds: Feeds = (), target: Target = TARGET
) -> ir.Model:
    """A clone on which one choice is made at each site.

    Args:
        pass_: whose sites.
        model: what to rewrite.
        wanted: the choice at every site that has it, or by site key.
        feeds: to calibrate on.
        target: the device.
    """
    view = GraphView(model)
    choices = []
    for site in pass_.sites(view):
        if not isinstance(site, Site):
            continue
        want = wanted.get(site.key) if isinstance(wanted, Mapping) else wanted
        for choice in _offered(pass_, site, view, target):
            if want is not None and (choice.name == want if isinstance(want, str) else want(choice)):
                choices.append(choice)
                break
    assert choices, "no site has such a choice"
    built = build(model, pass_, choices, learn(pass_, model, feeds, target) if feeds else Evidence())
    assert not built.refused, built.refused
    check(built.model)
    return built.model


def wiring(model: ir.Model) -> list[tuple[Any, ...]]:
    """Nodes of the main graph with what they read, whatever they and their weights are called.

    A weight counts by type, shape and order of first use, so a shared one differs from two equal
    ones. In an expected graph the weights may be written as inputs with names in capitals.
    """
    names: dict[ir.Value | None, Any] = {None: None}
    names.update({v: v.name for v in model.graph.inputs if not str(v.name).isupper()})
    rows: list[tuple[Any, ...]] = []
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in names:
                shape = () if value.shape is None else tuple(value.shape.numpy())
                names[value] = f"{value.dtype}{list(shape)} #{len(names)}"
        attributes = {k: a.value for k, a in sorted(node.attributes.items())}
        if node.op_type == "DequantizeLinear":
            attributes.setdefault("axis", 1)
        rows.append((node.op_type, attributes, [names[v] for v in node.inputs]))
        names.update({v: f"{len(rows)}:{i}" for i, v in enumerate(node.outputs)})
    rows.append(tuple((names[v], v.name, str(v.dtype)) for v in model.graph.outputs))
    return rows
