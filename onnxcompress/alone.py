"""Choices that only making them can tell about: what each does alone, on a clone of its own.

A pass that cannot simulate its distortions, or whose rewrites change the work of the graph (fewer
channels, a lower rank), declares neither terms nor costs. Then the choice is made on a clone: the
cost of the clone on the profile is its gain, and its outputs against the model's are its price.
One clone and one session a choice, so passes with many sites do better to implement ``simulate``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.base import Choice, Pass, Term
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel, ModelCost
from onnxcompress.data import Feed
from onnxcompress.errors import ModelRunError
from onnxcompress.evaluate import Reference
from onnxcompress.sensitivity import Prices
from onnxcompress.statistics import Evidence
from onnxcompress.trial import build
from onnxcompress.view import GraphView

__all__ = ["ALONE", "Effect", "effect", "measure_alone", "with_terms"]

ALONE = "alone"
"""Kind of the term that stands for a whole choice."""


@dataclass(frozen=True)
class Effect:
    """What a choice changes by itself.

    Attributes:
        seconds: more (or, negative, less) time on the profile.
        bytes_saved: weight bytes off the file.
        joules: more (or less) energy; 0 where the profile knows none.
    """

    seconds: float
    bytes_saved: int
    joules: float = 0.0


def with_terms(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """The choices, each with a term: one of its own where the pass named none."""
    return tuple(c if c.terms else replace(c, terms=(Term(ALONE, f"{c.site.key}:{c.name}"),)) for c in choices)


def effect(
    model: ir.Model, pass_: Pass, choice: Choice, evidence: Evidence, cost: CostModel, feed: Feed, before: ModelCost
) -> Effect | None:
    """Makes one choice and prices the clone; None if it cannot be made or does not run.

    Args:
        before: of the model on the profile.
    """
    built = build(model, pass_, [choice], evidence)
    if not built.made:
        return None
    try:
        shapes = value_shapes(built.model, feed)
    except ModelRunError:
        return None
    after = cost.model(GraphView(built.model), shapes)
    return Effect(
        after.seconds - before.seconds,
        models.weight_bytes(model) - models.weight_bytes(built.model),
        (after.energy_joule or 0.0) - (before.energy_joule or 0.0),
    )


def measure_alone(
    model: ir.Model,
    pass_: Pass,
    choices: Mapping[Term, Choice],
    evidence: Evidence,
    feeds: Sequence[Feed],
    names: Sequence[str],
) -> Prices:
    """Noise power over signal power at the worst output of each choice made alone."""
    prices: dict[Term, float] = {}
    impossible: dict[Term, str] = {}
    reference = Reference(model, feeds, names)
    for term, choice in choices.items():
        built = build(model, pass_, [choice], evidence)
        if not built.made:
            impossible[term] = built.refused[0].reason if built.refused else "nothing was changed"
            continue
        try:
            sqnr = reference.compare(built.model).min_sqnr_db
        except ModelRunError as error:
            impossible[term] = f"the result does not run: {error.message}"
            continue
        prices[term] = 10 ** (-sqnr / 10)
    return Prices(prices, (), impossible)
