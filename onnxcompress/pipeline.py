"""The way through the house: load, normalise, calibrate, price, plan, build, verify, save, report.

Every rewrite is made on a clone and compared with the input model before it is kept. A plan that
turns out over budget is tightened and solved again; if nothing pays, the result is the normalised
model and the report says why for every site.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.base import Pass, Skipped, Stage, Term
from onnxcompress.calibrate import calibrate, value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.data import Feed, Source, open_data
from onnxcompress.errors import DataError, ModelRunError, UsageError
from onnxcompress.evaluate import Reference, measure, observed, rounding_noise
from onnxcompress.planner import Plan
from onnxcompress.profile import Profile, load_profile
from onnxcompress.questions import ask, explain, offers
from onnxcompress.report import Attempt, Budget, Comparison, Latency, PassReport, Report, SiteReport, Totals
from onnxcompress.search import Checked, Search
from onnxcompress.sensitivity import Prices, measure_prices
from onnxcompress.sizes import model_size
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import LOSSLESS_SAMPLES, commit_lossless, pass_options
from onnxcompress.view import GraphView

__all__ = ["DEFAULT_MIN_SQNR_DB", "Metric", "Progress", "Result", "optimize"]

logger = logging.getLogger(__name__)

Metric = Callable[[str], float]
"""Scores an ONNX file; higher is better."""

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, steps done, steps in all or None)."""

DEFAULT_MIN_SQNR_DB = 20.0
"""Worst output keeps a tenth of its amplitude as error at most; see docs/decisions.md for how it was set."""

BYTES_WORTH = 0.25
"""All weight bytes together are worth this share of the model's time."""

_SLOW_SECONDS = 0.01
"""Models predicted slower than this have their terms priced on one sample, faster ones on two."""

_HOLDOUT_LIMIT = 32
_SEARCH_SAMPLES = 8
_SLOWER = 0.97
"""Measured speed-up below which a result counts as slower; timing of equal models scatters by 3 %."""


@dataclass(frozen=True)
class Result:
    """What :func:`optimize` returns.

    Attributes:
        model: the optimized model.
        report: what was done and why.
        files: what was written, if an output was asked for.
    """

    model: ir.Model
    report: Report
    files: tuple[Path, ...] = ()


def optimize(
    model: ir.Model | str | os.PathLike[str],
    *,
    profile: str | Profile = "host-x86-vnni",
    calibration: object = None,
    preprocess: str | None = None,
    budget: Budget | None = None,
    metric: Metric | None = None,
    passes: Sequence[Pass] | None = None,
    output: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    timing: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Makes a model smaller and faster on a device, inside an accuracy budget.

    Args:
        model: a file, or an ``ir.Model`` (not changed).
        profile: name or path of a hardware profile, or one that is loaded.
        calibration: feeds: a .npz file, a folder of arrays or images, ``module:function``, or any
            iterable of dicts from input name to array. Without it inputs are made up, loudly, and
            only rewrites that need no ranges are made.
        preprocess: how image files become inputs.
        budget: the accuracy that may be given up; by default every output keeps 20 dB of SQNR.
        metric: scores an ONNX file given its path, higher is better; needed for ``max_drop``.
        passes: exactly these, with their options, at every site they can change, still verified;
            by default all installed ones, each where it pays.
        output: where to write the result.
        samples: use at most this many feeds.
        seed: of everything random.
        timing: measure latency where the profile is of this machine.
        progress: called as the work goes on.

    Raises:
        OnnxCompressError: the branch of the tree in ``errors.py`` says what is wrong.
    """
    budget = budget or Budget()
    if budget.max_drop is not None and metric is None:
        raise UsageError("a largest drop needs a metric", hint="pass metric=, or use min_sqnr_db")
    loaded = load_profile(profile) if isinstance(profile, str) else profile
    original = models.load(model) if isinstance(model, (str, os.PathLike)) else _canonical_copy(model)
    report_progress = progress or (lambda stage, done, total: None)
    report_progress("checking the model", 0, None)
    source = open_data(calibration, original, preprocess=preprocess, limit=samples, seed=seed)
    job = _Job(original, loaded, source, budget, metric, timing, report_progress)
    result, report = job.run(passes)
    report = replace(report, input=_name_of(model), seed=seed)
    if output is None:
        return Result(result, report)
    files = models.save(result, output, protect=_protected(model), check=job.check_file)
    return Result(result, report, files)


class _Job:
    """One run: what stays the same while models come and go."""

    def __init__(
        self,
        original: ir.Model,
        profile: Profile,
        source: Source,
        budget: Budget,
        metric: Metric | None,
        timing: bool,
        progress: Progress,
    ) -> None:
        self.original, self.profile, self.source = original, profile, source
        self.target: Target = profile.target()
        self.cost = CostModel(profile)
        self.budget, self.metric, self.progress = budget, metric, progress
        self.timing = timing and profile.device.is_here()
        self.calibration, holdout = source.split()
        self.names = observed(GraphView(original))
        self.holdout: list[Feed] = list(holdout.take(_HOLDOUT_LIMIT))
        if not self.holdout:
            raise DataError("the calibration data holds no sample")
        self.reference = Reference(original, self.holdout, self.names)
        self.metric_before = self._score(original)
        self.attempts: list[Attempt] = []
        self.pass_reports: list[PassReport] = []
        self.sites: list[SiteReport] = []
        self.predicted = 0.0  # seconds of the normalised model on the profile
        self.saved = 0.0  # seconds the plans save on the profile

    @cached_property
    def noise(self) -> Comparison:
        """What float rounding alone does to the input model."""
        return rounding_noise(self.original, self.holdout[:LOSSLESS_SAMPLES], self.names)

    # --- the whole way -------------------------------------------------------------------------

    def run(self, passes: Sequence[Pass] | None) -> tuple[ir.Model, Report]:
        by_hand = passes is not None
        chosen = list(passes) if passes is not None else [cls() for cls in registry.available().values()]
        chosen.sort(key=lambda p: p.stage)
        current = self.original
        lossless = [p for p in chosen if p.lossless and p.stage is Stage.NORMALISE]
        if by_hand and not lossless:  # rewrites by hand still start from a tidy graph
            lossless = [p() for p in registry.available().values() if p.stage is Stage.NORMALISE]
        current = self._lossless(current, lossless)
        lossy = [p for p in chosen if not p.lossless]
        current = self._raise_opset(current, lossy)
        current = models.infer_types(current)
        current = self._lossless(current, [p for p in chosen if p.lossless and p.stage is not Stage.NORMALISE])
        normalised = current
        shapes = value_shapes(normalised, self.calibration.first())
        self.predicted = self.cost.model(GraphView(normalised), shapes).seconds
        for pass_ in lossy:
            current = self._lossy(current, pass_, by_hand=by_hand, shapes=shapes)
        latency = None
        if self.timing:
            current, latency = self._not_slower(current, normalised)
        return current, self._report(current, normalised, latency, shapes)

    def _lossless(self, model: ir.Model, passes: Iterable[Pass]) -> ir.Model:
        for pass_ in passes:
            self.progress(f"{pass_.name}", 0, None)
            evidence = self._evidence(model, pass_, first=8)
            model, done, skipped = commit_lossless(
                model, pass_, evidence, self.target, self.reference, lambda: self.noise
            )
            self.pass_reports.append(done)
            ops = {str(n.name): n.op_type for n in GraphView(model).nodes()}
            self.sites += [SiteReport(pass_.name, s.key, ops.get(s.key, ""), "keep", s.reason) for s in skipped]
        return model

    def _raise_opset(self, model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
        wanted = max((p.min_opset for p in passes), default=1)
        if GraphView(model).quantized_nodes:
            return model
        current = GraphView(model).opset
        raised = models.raise_opset(model, wanted)
        if raised is model:
            return model
        comparison = self.reference.compare(raised, limit=LOSSLESS_SAMPLES)
        if comparison.min_sqnr_db < 60:
            raise ModelRunError(
                f"raising the opset from {current} to {wanted} changed the outputs ({comparison.min_sqnr_db:.0f} dB)",
                hint="re-export the model with a newer opset",
            )
        self.pass_reports.append(PassReport("raise_opset", {}, 1, "applied", f"{current} -> {wanted}"))
        return raised

    def _evidence(self, model: ir.Model, pass_: Pass, *, first: int | None = None) -> Evidence:
        view = GraphView(model)
        needs = {n for site in pass_.sites(view) if not isinstance(site, Skipped) for n in pass_.needs(site, view)}
        if not needs:
            return Evidence(synthetic=self.source.synthetic)
        source = self.calibration if first is None else self.calibration.take(first)

        def tick(done: int, total: int) -> None:
            self.progress("calibrating", done, total)

        return calibrate(model, sorted(needs), source, progress=tick)

    # --- one pass that changes outputs ---------------------------------------------------------

    def _lossy(self, model: ir.Model, pass_: Pass, *, by_hand: bool, shapes: dict[str, tuple[int, ...]]) -> ir.Model:
        view = GraphView(model)
        offer = offers(pass_, view, self.target, synthetic=self.source.synthetic)
        if not offer.choices:
            self.pass_reports.append(PassReport(pass_.name, pass_options(pass_), 0, "nothing to do", ""))
            self.sites += explain(pass_, offer, (), Plan({}, 0, 0, 0), Plan({}, 0, 0, 0), {}, {}, {}, view, (), "")
            return model
        evidence = self._evidence(model, pass_)
        questions, values, missing = ask(offer, view, self.cost, shapes)
        noise = 10 ** (-(self.budget.min_sqnr_db or DEFAULT_MIN_SQNR_DB) / 10)

        def price(terms: Sequence[Term]) -> Prices:
            return self._prices(pass_, model, terms, evidence, noise)

        rate = BYTES_WORTH * sum(q.seconds for q in questions) / max(1, models.weight_bytes(model))
        search = Search(model, pass_, evidence, questions, values, noise, rate, price, self.check)
        found = search.by_hand() if by_hand else search.run()
        self.attempts += search.attempts
        self.saved += found.plan.seconds_before - found.plan.seconds
        refused = found.built.refused if found.built is not None else ()
        self.sites += explain(
            pass_,
            offer,
            search.questions,
            found.plan,
            search.free,
            search.prices,
            search.impossible,
            missing,
            view,
            refused,
            found.problem if found.built is None else "",
        )
        changed = len(found.built.made) if found.built is not None else 0
        outcome = "applied" if changed else "dropped" if found.problem else "nothing to do"
        self.pass_reports.append(PassReport(pass_.name, pass_options(pass_), changed, outcome, found.problem))
        return found.built.model if found.built is not None else model

    def _prices(self, pass_: Pass, model: ir.Model, terms: Sequence[Term], evidence: Evidence, noise: float) -> Prices:
        def tick(done: int, total: int) -> None:
            self.progress("measuring sensitivity", done, total)

        feeds = list(self.calibration.take(1 if self.predicted > _SLOW_SECONDS else 2))
        return measure_prices(
            pass_, model, terms, evidence, self.target, feeds, self.names, budget=noise, progress=tick
        )

    # --- verifying -----------------------------------------------------------------------------

    def check(self, model: ir.Model) -> Checked:
        """Runs a candidate on held-out data."""
        self.progress("building and checking a plan", len(self.attempts), None)
        sqnr = self.reference.compare(model, limit=_SEARCH_SAMPLES).min_sqnr_db
        floor = self.budget.min_sqnr_db
        if floor is None and self.budget.max_drop is None:
            floor = DEFAULT_MIN_SQNR_DB
        if floor is not None and sqnr < floor:
            return Checked(sqnr, None, f"worst output at {sqnr:.1f} dB, {floor:.1f} dB asked for")
        if self.budget.max_drop is None or self.metric_before is None:
            return Checked(sqnr, None, "")
        metric = self._score(model)
        least = self.metric_before - self.budget.max_drop * abs(self.metric_before)
        problem = "" if metric is not None and metric >= least else f"metric {metric:.6g} is below {least:.6g}"
        return Checked(sqnr, metric, problem)

    def _score(self, model: ir.Model) -> float | None:
        if self.metric is None:
            return None
        with models.temporary_file(model) as path:
            score = float(self.metric(str(path)))
        if not math.isfinite(score):
            raise UsageError(f"the metric returned {score}", hint="it must return a finite number, higher is better")
        return score

    def check_file(self, path: Path) -> None:
        """Loads and runs the written file before it gets its name."""
        comparison = self.reference.compare(path)
        if comparison.min_sqnr_db < (self._final_sqnr - 0.5):
            raise ModelRunError("the written file does not behave like the model in memory", path=path)

    def _not_slower(self, model: ir.Model, normalised: ir.Model) -> tuple[ir.Model, Latency | None]:
        """Falls back to the normalised model, then to the input, where this machine says it is slower."""
        self.progress("timing", 0, None)
        feed = self.holdout[0]
        candidates = [(model, "result"), (normalised, "normalised model"), (self.original, "input model")]
        for candidate, name in candidates:
            if candidate is self.original:
                break
            latency = measure(self.original, candidate, feed)
            if latency.speed_up < _SLOWER:  # once more: a busy machine is no reason
                latency = measure(self.original, candidate, feed, seconds=3.0)
            if latency.speed_up >= _SLOWER:
                return candidate, latency
            self.attempts.append(
                Attempt(name, 0, 0.0, None, None, latency.speed_up, "slower than the input on this machine")
            )
        return self.original, None

    # --- reporting -----------------------------------------------------------------------------

    def _report(
        self,
        model: ir.Model,
        normalised: ir.Model,
        latency: Latency | None,
        shapes: dict[str, tuple[int, ...]],
    ) -> Report:
        comparison = self.reference.compare(model)
        self._final_sqnr = comparison.min_sqnr_db
        before, after = model_size(self.original), model_size(model)
        first = self.cost.model(GraphView(self.original), value_shapes(self.original, self.holdout[0])).seconds
        totals = Totals(
            (before.raw, after.raw),
            (before.zstd, after.zstd),
            (1e3 * first, 1e3 * (self.predicted - (self.saved if model is not normalised else 0.0))),
            latency,
            comparison,
            self.metric_before,
            self._score(model),
        )
        warnings = [self.source.warning] if self.source.warning else []
        lossy = sum(s.decision != "keep" for s in self.sites)
        outcome = f"{lossy} sites rewritten" if lossy and model is not normalised else "nothing lossy pays"
        return Report(
            input="",
            profile=self.profile.name,
            calibration=self.source.description,
            budget=self.budget,
            seed=0,
            outcome=outcome,
            totals=totals,
            passes=tuple(self.pass_reports),
            sites=tuple(self.sites),
            attempts=tuple(self.attempts),
            notes=(*models.notes(self.original), *self.source.notes),
            warnings=tuple(warnings),
            versions={p: importlib.metadata.version(p) for p in ("onnxruntime", "onnx", "onnx-ir", "numpy")},
        )


def _canonical_copy(model: ir.Model) -> ir.Model:
    copy = models.clone(model)
    models.canonicalize(copy)
    return copy


def _name_of(model: object) -> str:
    return str(model) if isinstance(model, (str, os.PathLike)) else "model in memory"


def _protected(model: object) -> tuple[Path, ...]:
    return (Path(model),) if isinstance(model, (str, os.PathLike)) else ()
