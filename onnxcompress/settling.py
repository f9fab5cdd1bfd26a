"""Making a rewritten model up for what it does to values far behind the rewrite, by what is seen of both models."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.base import Pass
from onnxcompress.errors import DataError
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need, Pair
from onnxcompress.view import GraphView

__all__ = ["settled"]

logger = logging.getLogger(__name__)


def settled(
    model: ir.Model,
    pass_: Pass,
    before: Callable[[Collection[Need]], Evidence],
    after: Callable[[ir.Model, Collection[Need | Pair]], Evidence],
    quality: Callable[[ir.Model], float],
) -> ir.Model:
    """A rewritten model, settled by its pass; as it is where that brings nothing.

    Args:
        model: the rewritten model; not changed.
        pass_: who rewrote it.
        before: observes the model before the pass.
        after: observes a rewritten model, and pairs of it and the model before.
        quality: of a model's outputs, in dB; higher is better.

    Raises:
        ModelRunError: the rewritten model does not run.
    """
    asked = (sorted(set(round_), key=lambda n: (isinstance(n, Pair), n)) for round_ in pass_.settling(GraphView(model)))
    rounds = [r for r in asked if r]
    if not rounds:
        return model
    unsettled = quality(model)
    if not math.isfinite(unsettled):  # exact, or beyond help
        return model
    known = before({n for needs in rounds for n in needs if isinstance(n, Need)})
    copy = models.clone(model)
    for needs in rounds:
        try:
            seen = after(copy, needs)
        except DataError as error:  # the sample is right for the model before: it is the rewrite that makes NaN of it
            logger.info("%s: what it made is not settled: %s", pass_.name, error.message)
            return model
        rewriter = Rewriter(copy)
        pass_.settle(rewriter, known, seen)
        rewriter.drop_unused_weights()
    found = quality(copy)
    logger.info("%s: settling what it made: %.2f dB, %.2f dB before", pass_.name, found, unsettled)
    return copy if found > unsettled else model
