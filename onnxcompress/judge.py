"""Holding candidates against the input model: outputs on held-out data, the user's metric, the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.data import Feed
from onnxcompress.errors import UsageError
from onnxcompress.evaluate import Reference, observed, rounding_noise
from onnxcompress.report import Budget, Comparison
from onnxcompress.search import Checked
from onnxcompress.trial import LOSSLESS_SAMPLES, difference
from onnxcompress.view import GraphView

__all__ = ["DEFAULT_MIN_SQNR_DB", "Judge", "Metric"]

Metric = Callable[[str], float]
"""Scores an ONNX file; higher is better."""

DEFAULT_MIN_SQNR_DB = 20.0
"""Worst output keeps a tenth of its amplitude as error at most; see docs/decisions.md for how it was set."""


class Judge:
    """What candidates are held against.

    Args:
        original: the input model.
        holdout: feeds that no candidate was fitted to.
        budget: what may be given up.
        metric: the user's, where there is one.

    Attributes:
        names: values that are compared.
        metric_before: the metric of the input model.
    """

    def __init__(self, original: ir.Model, holdout: list[Feed], budget: Budget, metric: Metric | None) -> None:
        self._original, self._holdout, self._metric = original, holdout, metric
        self.budget = budget
        self.names = observed(GraphView(original))
        self.reference = Reference(original, holdout, self.names)
        self._scores: WeakKeyDictionary[ir.Model, float] = WeakKeyDictionary()
        self.metric_before = self.score(original)

    @cached_property
    def noise(self) -> Comparison:
        """What float rounding alone does to the input model."""
        return rounding_noise(self._original, self._holdout[:LOSSLESS_SAMPLES], self.names)

    @property
    def by_noise(self) -> bool:
        """Whether candidates are held against an SQNR; if not, against a metric alone."""
        return self.budget.min_sqnr_db is not None or self.budget.max_drop is None

    @property
    def floor(self) -> float:
        """Least SQNR in dB; where only a metric counts, the default, to rank plans by."""
        return DEFAULT_MIN_SQNR_DB if self.budget.min_sqnr_db is None else self.budget.min_sqnr_db

    def compare(self, candidate: ir.Model | Path) -> Comparison:
        """All held-out feeds."""
        return self.reference.compare(candidate)

    def difference(self, model: ir.Model) -> str:
        """How a model that should be equal differs; empty if only in float rounding."""
        return difference(model, self.reference, len(GraphView(model).nodes()), lambda: self.noise)

    def check(self, model: ir.Model, share: float = 1.0) -> Checked:
        """Runs a candidate on held-out data.

        Args:
            model: the candidate.
            share: of the budget that it may use.
        """
        sqnr = self.compare(model).min_sqnr_db
        floor = self.floor - 10 * math.log10(share)
        if self.by_noise and sqnr < floor:
            return Checked(sqnr, None, f"worst output at {sqnr:.1f} dB, {floor:.1f} dB asked for")
        if self.budget.max_drop is None or self.metric_before is None:
            return Checked(sqnr, None, "")
        metric = self.score(model)
        least = self.metric_before - share * self.budget.max_drop * abs(self.metric_before)
        problem = "" if metric is not None and metric >= least else f"metric {metric:.6g} is below {least:.6g}"
        return Checked(sqnr, metric, problem)

    def left(self, model: ir.Model) -> float:
        """Share of the budget that a candidate leaves."""
        if not self.by_noise and self.budget.max_drop is not None:
            before, now = self.metric_before, self.score(model)
            if before is None or now is None or not self.budget.max_drop:
                return 0.0
            return min(1.0, max(0.0, 1 - (before - now) / (self.budget.max_drop * abs(before) or 1.0)))
        return max(0.0, 1 - 10 ** ((self.floor - self.compare(model).min_sqnr_db) / 10))

    def score(self, model: ir.Model) -> float | None:
        """The user's metric; asked once a model, for it may take minutes.

        Raises:
            UsageError: it returned no finite number.
        """
        if self._metric is None:
            return None
        if model in self._scores:
            return self._scores[model]
        with models.temporary_file(model) as path:
            answer = self._metric(str(path))
        try:
            score = float(answer)
        except (TypeError, ValueError):
            raise UsageError(f"the metric returned {answer!r}", hint="it must return a number") from None
        if not math.isfinite(score):
            raise UsageError(f"the metric returned {score}", hint="it must return a finite number, higher is better")
        self._scores[model] = score
        return score
