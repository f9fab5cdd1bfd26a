"""Questions about finished models: what a model costs, how two models differ."""

from __future__ import annotations

import os
from collections.abc import Mapping

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel, ModelCost
from onnxcompress.data import open_data
from onnxcompress.errors import DataError, suggest
from onnxcompress.evaluate import Reference, measure, observed
from onnxcompress.profile import Profile, load_profile
from onnxcompress.report import Comparison, Latency
from onnxcompress.sizes import FileSize, model_size
from onnxcompress.view import GraphView

__all__ = ["ModelLike", "compare", "inspect", "verify", "with_shapes"]

ModelLike = ir.Model | str | os.PathLike[str]


def inspect(
    model: ModelLike,
    *,
    profile: str | os.PathLike[str] | Profile = "host-x86-vnni",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    compressed: bool = False,
) -> ModelCost:
    """Cost of every node of a model on a device.

    Args:
        model: a file or an ``ir.Model``.
        profile: the device.
        shapes: concrete shapes of inputs by name; dynamic dimensions get defaults without them.
        compressed: also what the weights take with zstd, each by itself; a second for 200 MB.

    Raises:
        DataError: ``shapes`` names an input the model does not have.
    """
    device = profile if isinstance(profile, Profile) else load_profile(os.fspath(profile))
    bound = with_shapes(model, shapes or {})
    seen = value_shapes(bound, open_data(None, bound).first(), bodies=True)
    return CostModel(device).model(GraphView(bound), seen, compressed=compressed)


def with_shapes(model: ModelLike, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """A copy of a model, or of a file, with these shapes of its inputs.

    Raises:
        DataError: the model has no such input, or one of another rank.
    """
    copy = models.clone(_load(model))
    inputs = {str(v.name): v for v in copy.graph.inputs}
    for name, shape in shapes.items():
        if name not in inputs:
            raise DataError("the model has no such input", input=name, hint=suggest(name, inputs))
        declared = inputs[name].shape
        if declared is not None and len(declared) != len(shape):
            raise DataError(f"has rank {len(declared)}, not {len(shape)}", input=name)
        inputs[name].shape = ir.Shape(shape)
    return copy


def compare(
    first: ModelLike, second: ModelLike, *, calibration: object = None, preprocess: str | None = None
) -> tuple[Comparison, Latency, tuple[FileSize, FileSize]]:
    """Outputs, interleaved latency on this machine (one thread), and sizes of two models."""
    a, b = _load(first), _load(second)
    source = open_data(calibration, a, preprocess=preprocess)
    feeds = list(source.take(32))
    comparison = Reference(a, feeds, observed(GraphView(a))).compare(b)
    return comparison, measure(a, b, feeds[0]), (model_size(a), model_size(b))


def verify(
    original: ModelLike, optimized: ModelLike, calibration: object = None, *, preprocess: str | None = None
) -> Comparison:
    """How far an optimized model is from its original, on all feeds."""
    a, b = _load(original), _load(optimized)
    source = open_data(calibration, a, preprocess=preprocess)
    return Reference(a, source, observed(GraphView(a))).compare(b)


def _load(model: ModelLike) -> ir.Model:
    return models.load(model) if isinstance(model, (str, os.PathLike)) else model
