"""Which groups of channels, heads, neurons and hidden units of a model can be pruned, and what keeps the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.base import Choice, Pass, Stage
from onnxcompress.calibrate import calibrate, value_shapes
from onnxcompress.coupling import Coupling, Group
from onnxcompress.data import Source, open_data
from onnxcompress.inspection import ModelLike, with_shapes
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import tidy
from onnxcompress.view import GraphView

__all__ = ["GroupFound", "groups"]

_FEW = 8


@dataclass(frozen=True)
class GroupFound:
    """One group.

    Attributes:
        name: of the node that makes it; what keep-lists and ``groups`` of ``prune_channels`` call it.
        unit: what an atom is, in the plural.
        size: atoms.
        free: how many of them may go.
        weights: names of what makes it; keep-lists may use them, too.
        readers: nodes that sum over it, and are refitted.
        unfitted: nodes that sum over it without a weight, so that nothing can be refitted there.
        nodes: how many nodes it goes through.
        pinned: why what has to stay has to stay; empty where all is free.
    """

    name: str
    unit: str
    size: int
    free: int
    weights: tuple[str, ...]
    readers: tuple[str, ...]
    unfitted: tuple[str, ...]
    nodes: int
    pinned: str


def groups(
    model: ModelLike,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    calibration: object = None,
    preprocess: str | None = None,
) -> tuple[GroupFound, ...]:
    """Every group with weights, in execution order.

    As ``prune_channels`` with a keep-list sees them: after the lossless rewrites that leave sizes as they are, with
    shapes as in a run of the first sample.

    Args:
        model: a file or an ``ir.Model``.
        shapes: concrete shapes of inputs by name; dynamic dimensions get defaults without them.
        calibration: data as for ``optimize``; inputs are made up without.
        preprocess: how images become inputs.

    Raises:
        DataError: ``shapes`` names an input the model does not have, or the data does not fit the model.
    """
    tidied = models.infer_types(with_shapes(model, shapes or {}))
    source = open_data(calibration, tidied, preprocess=preprocess).take(_FEW)
    tidying = (p for p in registry.available().values() if p.lossless and p.stage is Stage.NORMALISE)
    passes = [p() for p in tidying if not p.resizes]  # sizes are those that keep-lists have to have
    for pass_ in sorted(passes, key=lambda p: (p.stage, p.place)):
        tidied = _tidied(tidied, pass_, source)
    coupling = Coupling(GraphView(tidied), value_shapes(tidied, source.first(), bodies=True))
    return tuple(map(_found, coupling.groups))


def _tidied(model: ir.Model, pass_: Pass, source: Source) -> ir.Model:
    def gather(view: GraphView, choices: Sequence[Choice]) -> Evidence:
        needs = {n for c in choices for n in pass_.needs(c, view)}
        return calibrate(model, sorted(needs), source, shapes=False) if needs else Evidence(synthetic=source.synthetic)

    return tidy(model, pass_, Target("any"), gather).model


def _found(group: Group) -> GroupFound:
    return GroupFound(
        name=group.key,
        unit=group.unit,
        size=group.size,
        free=group.free,
        weights=tuple(dict.fromkeys(m.value for m in group.makers)),
        readers=tuple(dict.fromkeys(r.node for r in group.readers)),
        unfitted=group.unweighted,
        nodes=len(group.nodes),
        pinned=group.why_fixed() if group.fixed.any() else "",
    )
