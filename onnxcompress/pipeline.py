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
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.base import Choice, Pass, Skipped, Stage, Term
from onnxcompress.calibrate import calibrate
from onnxcompress.cost import CostModel
from onnxcompress.data import Source, open_data
from onnxcompress.errors import DataError, ModelRunError, UsageError
from onnxcompress.evaluate import Feed, Reference, Runner, measure, observed
from onnxcompress.planner import Plan, Question, ValueCost, solve
from onnxcompress.profile import Profile, load_profile
from onnxcompress.questions import ask, explain, offers
from onnxcompress.report import Attempt, Budget, Comparison, Latency, PassReport, Report, SiteReport, Totals
from onnxcompress.sensitivity import Prices, measure_prices
from onnxcompress.sizes import model_size
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import Built, build, commit_lossless, pass_options
from onnxcompress.view import GraphView

__all__ = ["DEFAULT_MIN_SQNR_DB", "Metric", "Progress", "Result", "optimize"]

logger = logging.getLogger(__name__)

Metric = Callable[[str], float]
"""Scores an ONNX file; higher is better."""

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, steps done, steps in all or None)."""

DEFAULT_MIN_SQNR_DB = 20.0
"""Worst output keeps a tenth of its amplitude as error at most; see docs/decisions.md for how it was set."""

BYTES_WORTH = 0.05
"""All weight bytes together are worth this share of the model's time."""

_ATTEMPTS = 6
_PRICE_SAMPLES = 2
_HOLDOUT_LIMIT = 32
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
        self.holdout: list[Feed] = _first(holdout, _HOLDOUT_LIMIT)
        if not self.holdout:
            raise DataError("the calibration data holds no sample")
        self.reference = Reference(original, self.holdout, self.names)
        self.metric_before = self._score(original)
        self.attempts: list[Attempt] = []
        self.pass_reports: list[PassReport] = []
        self.sites: list[SiteReport] = []

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
        shapes = calibrate(normalised, (), self.calibration).shapes
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
            model, done, skipped = commit_lossless(model, pass_, evidence, self.target, self.reference)
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
        comparison = self.reference.compare(Runner(raised))
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

        def tick(done: int, total: int | None) -> None:
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
        terms = sorted({t for q in questions for o in q.options for t in o.choice.terms})
        noise = 10 ** (-(self.budget.min_sqnr_db or DEFAULT_MIN_SQNR_DB) / 10)
        prices = self._prices(pass_, model, terms, evidence, noise)
        questions = [_possible(q, prices.impossible) for q in questions]
        search = _Search(self, model, pass_, evidence, questions, values, prices, noise, by_hand)
        built, plan = search.run()
        verdict = "" if built is not None else search.verdict
        self.sites += explain(
            pass_,
            offer,
            questions,
            plan,
            search.free,
            prices.terms,
            prices.impossible,
            missing,
            view,
            built.refused if built else (),
            verdict,
        )
        changed = len(built.made) if built is not None else 0
        outcome = "applied" if changed else "dropped" if verdict else "nothing to do"
        self.pass_reports.append(PassReport(pass_.name, pass_options(pass_), changed, outcome, verdict))
        return built.model if built is not None else model

    def _prices(self, pass_: Pass, model: ir.Model, terms: Sequence[Term], evidence: Evidence, noise: float) -> Prices:
        def tick(done: int, total: int) -> None:
            self.progress("measuring sensitivity", done, total)

        feeds = _first(self.calibration, _PRICE_SAMPLES)
        return measure_prices(
            pass_, model, terms, evidence, self.target, feeds, self.names, budget=noise, progress=tick
        )

    # --- verifying -----------------------------------------------------------------------------

    def verify(self, model: ir.Model) -> tuple[Comparison, float | None, str]:
        """Runs a candidate on held-out data; the last item is why it fails, or empty."""
        comparison = self.reference.compare(Runner(model))
        metric = None
        if self.metric is not None and self.budget.max_drop is not None and self.metric_before is not None:
            metric = self._score(model)
            least = self.metric_before - self.budget.max_drop * abs(self.metric_before)
            if metric is None or metric < least:
                return comparison, metric, f"metric {metric:.6g} is below {least:.6g}"
        floor = self.budget.min_sqnr_db
        if floor is None and self.budget.max_drop is None:
            floor = DEFAULT_MIN_SQNR_DB
        if floor is not None and comparison.min_sqnr_db < floor:
            return comparison, metric, f"worst output at {comparison.min_sqnr_db:.1f} dB, {floor:.1f} dB asked for"
        return comparison, metric, ""

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
        comparison = self.reference.compare(Runner(path))
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
                latency = measure(self.original, candidate, feed, min_seconds=3.0)
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
        comparison = self.reference.compare(Runner(model))
        self._final_sqnr = comparison.min_sqnr_db
        before, after = model_size(self.original), model_size(model)
        seconds = [self.cost.model(GraphView(m), self._shapes(m)).seconds for m in (self.original, model)]
        totals = Totals(
            (before.raw, after.raw),
            (before.zstd, after.zstd),
            (1e3 * seconds[0], 1e3 * seconds[1]),
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

    def _shapes(self, model: ir.Model) -> dict[str, tuple[int, ...]]:
        return dict(calibrate(model, (), self.calibration).shapes)


class _Search:
    """Looks for the cheapest plan of one pass whose real distortion fits the budget."""

    def __init__(
        self,
        job: _Job,
        model: ir.Model,
        pass_: Pass,
        evidence: Evidence,
        questions: Sequence[Question],
        values: dict[str, ValueCost],
        prices: Prices,
        noise: float,
        by_hand: bool,
    ) -> None:
        self.job, self.model, self.pass_, self.evidence = job, model, pass_, evidence
        self.questions, self.values, self.prices, self.noise, self.by_hand = questions, values, prices, noise, by_hand
        seconds = sum(q.seconds for q in questions)
        self._rate = BYTES_WORTH * seconds / max(1, models.weight_bytes(model))
        self.free = self._solve(None)
        self.verdict = ""

    def run(self) -> tuple[Built | None, Plan]:
        """The built plan, or None and an empty plan if none is good enough."""
        if self.by_hand:
            return self._by_hand()
        best: tuple[Built, Plan] | None = None
        low, high = 0.0, math.inf  # budgets known to hold, known to fail
        limit: float | None = None
        seen: set[frozenset[Choice]] = set()
        for _ in range(_ATTEMPTS):
            plan = self._solve(limit)
            key = frozenset(plan.choices.values())
            if not key or key in seen:
                break
            seen.add(key)
            built, noise, problem = self._try(plan)
            if not problem:
                if best is None or plan.seconds < best[1].seconds:
                    best = (built, plan)
                if limit is None or high / limit < 1.5:
                    break
                low = limit
            else:
                self.verdict = problem
                high = min(high, plan.price if limit is None else limit)
            limit = self._next(limit, low, high, noise, plan)
        if best is None:
            return None, Plan({}, 0.0, 0.0, 0.0)
        return best

    def _next(self, limit: float | None, low: float, high: float, noise: float, plan: Plan) -> float:
        """A budget for the prices such that the real noise should fit: they are off by a factor."""
        if low > 0:
            return math.sqrt(low * high)
        factor = self.noise / noise if 0 < noise < math.inf else 0.1
        return min(high * 0.5, 0.9 * factor * plan.price)

    def _solve(self, limit: float | None) -> Plan:
        return solve(self.questions, self.values, self.prices.terms, budget=limit, seconds_per_byte=self._rate)

    def _try(self, plan: Plan) -> tuple[Built, float, str]:
        self.job.progress("building and checking a plan", len(self.job.attempts), None)
        built = build(self.model, self.pass_, plan.choices.values(), self.evidence)
        try:
            comparison, metric, problem = self.job.verify(built.model)
            sqnr: float | None = comparison.min_sqnr_db
        except ModelRunError as error:
            sqnr, metric, problem = None, None, f"it does not run: {error.message}"
        self.job.attempts.append(
            Attempt(self.pass_.name, len(built.made), 1e3 * plan.seconds, sqnr, metric, None, problem or "accepted")
        )
        return built, 10 ** (-sqnr / 10) if sqnr is not None else math.inf, problem

    def _by_hand(self) -> tuple[Built | None, Plan]:
        """The user's word: the strongest possible choice at every site; verified all the same."""
        strongest = {q.site.key: q.options[-1] for q in self.questions if q.options}
        plan = Plan(
            {k: o.choice for k, o in strongest.items()},
            sum(strongest[q.site.key].seconds if q.site.key in strongest else q.seconds for q in self.questions),
            sum(q.seconds for q in self.questions),
            sum(self.prices.terms.get(t, 0.0) for t in {t for o in strongest.values() for t in o.choice.terms}),
            dict.fromkeys(strongest, 0.0),
        )
        built, _, problem = self._try(plan)
        if problem:
            self.verdict = problem
            return None, Plan({}, 0.0, 0.0, 0.0)
        return built, plan


def _possible(question: Question, impossible: dict[Term, str]) -> Question:
    options = tuple(o for o in question.options if not any(t in impossible for t in o.choice.terms))
    return replace(question, options=options)


def _first(source: Iterable[Feed], count: int) -> list[Feed]:
    feeds: list[Feed] = []
    for feed in source:
        feeds.append(feed)
        if len(feeds) >= count:
            break
    return feeds


def _canonical_copy(model: ir.Model) -> ir.Model:
    copy = models.clone(model)
    models.canonicalize(copy)
    return copy


def _name_of(model: object) -> str:
    return str(model) if isinstance(model, (str, os.PathLike)) else "model in memory"


def _protected(model: object) -> tuple[Path, ...]:
    return (Path(model),) if isinstance(model, (str, os.PathLike)) else ()
