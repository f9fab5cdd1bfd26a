"""What a model takes as a whole: time, file, download, memory and energy."""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.data import Feed
from onnxcompress.execution import REMOVED, Execution
from onnxcompress.objective import Objective, Spent
from onnxcompress.profile import Profile
from onnxcompress.sizes import model_size
from onnxcompress.view import GraphView
from onnxcompress.work import Shapes

__all__ = ["Footprints", "resident_bytes"]

_UNKNOWN = 4.0
"""Bytes of an element whose type nobody declared."""


class Footprints:
    """Measures models; each once.

    Args:
        cost: of the device.
        feed: an input, for the shapes.
        objective: what is aimed at. Only what it weighs is measured of files, for that means to write and pack them.
    """

    def __init__(self, cost: CostModel, feed: Feed, objective: Objective) -> None:
        self._cost, self._feed, self._objective = cost, feed, objective
        self._known: WeakKeyDictionary[ir.Model, Spent] = WeakKeyDictionary()

    def of(self, model: ir.Model, shapes: Shapes | None = None) -> Spent:
        """What a model takes.

        Args:
            model: to look at.
            shapes: concrete shapes of its values, where they are known already.

        Raises:
            ModelRunError: it does not run.
        """
        if model not in self._known:
            self._known[model] = self._measured(model, shapes)
        return self._known[model]

    def _measured(self, model: ir.Model, shapes: Shapes | None) -> Spent:
        shapes = value_shapes(model, self._feed, bodies=True) if shapes is None else shapes
        view = GraphView(model)
        cost = self._cost.model(view, shapes)
        packs, counts = self._objective.download > 0, self._objective.for_files
        size = model_size(model) if packs else None
        return Spent(
            seconds=cost.seconds,
            file_bytes=size.raw if size is not None else _file_bytes(model) if counts else models.weight_bytes(model),
            download_bytes=None if size is None else size.zstd,
            memory_bytes=resident_bytes(self._cost.profile, view, shapes) + cost.peak_activation_bytes,
            joules=cost.energy_joule,
        )


def _file_bytes(model: ir.Model) -> int:
    with models.temporary_file(model) as path:
        return sum(file.stat().st_size for file in path.parent.iterdir())


def resident_bytes(profile: Profile, view: GraphView, shapes: Shapes) -> int:
    """Bytes of weights in memory while a model runs: what is computed at load counts as it then is.

    A weight behind a DequantizeLinear stays as it is in the file, for that runs in every call.

    Args:
        profile: of the device.
        view: the model.
        shapes: concrete shapes by value name.
    """
    execution = Execution(profile, view, shapes)
    folds = profile.runtime.folds_constants
    folded = {
        node
        for node in view.nodes()
        if folds and node not in execution.inside and node.op_type not in REMOVED and not execution.runs(node)
    }
    kept: dict[int, int] = {}
    for node in view.nodes():
        if node in folded:
            continue
        for value in node.inputs:
            if value is None:
                continue
            if (tensor := view.weight(value)) is not None:
                kept[id(tensor)] = tensor.nbytes
            elif view.producer(value) in folded:
                kept[id(value)] = _bytes(value, shapes)
    return sum(kept.values())


def _bytes(value: ir.Value, shapes: Shapes) -> int:
    shape = shapes.get(str(value.name))
    if shape is None:
        shape = tuple(d for d in (value.shape or ()) if isinstance(d, int))
    itemsize = _UNKNOWN if value.dtype is None or value.dtype == ir.DataType.STRING else value.dtype.itemsize
    return math.ceil(math.prod(shape) * itemsize)
