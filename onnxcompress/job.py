"""One run of the optimizer: what stays the same while models come and go.

Every rewrite is made on a clone and compared with the input model before it is kept. A plan that
turns out over budget is tightened and solved again; if nothing pays, the result is the normalised
model and the records say why for every site.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.alone import ALONE, Effect, effect, measure_alone
from onnxcompress.base import KEEP, Choice, Pass, Stage, Term
from onnxcompress.calibrate import calibrate, value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.data import Feed, Source
from onnxcompress.errors import DataError, ModelRunError, UsageError
from onnxcompress.evaluate import Reference, measure, observed, rounding_noise
from onnxcompress.paired import cross_moments
from onnxcompress.planner import Plan
from onnxcompress.profile import Profile
from onnxcompress.questions import ask, explain, offers
from onnxcompress.report import Attempt, Budget, Comparison, Latency, OnDevice, PassReport, Report, SiteReport, Totals
from onnxcompress.search import Checked, Search
from onnxcompress.sensitivity import Prices, measure_prices
from onnxcompress.settling import settled
from onnxcompress.sizes import file_size, model_size
from onnxcompress.statistics import Evidence, Need, Pair, Statistic
from onnxcompress.suitability import on_device, remarks, stranded
from onnxcompress.target import Target
from onnxcompress.trial import LOSSLESS_SAMPLES, Tidied, difference, pass_options, tidy
from onnxcompress.view import GraphView

__all__ = ["DEFAULT_MIN_SQNR_DB", "IN_MEMORY", "Job", "Metric", "Progress"]

logger = logging.getLogger(__name__)

Metric = Callable[[str], float]
"""Scores an ONNX file; higher is better."""

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, steps done, steps in all or None)."""

DEFAULT_MIN_SQNR_DB = 20.0
"""Worst output keeps a tenth of its amplitude as error at most; see docs/decisions.md for how it was set."""

BYTES_WORTH = 0.5
"""All weight bytes together are worth this share of the model's time."""

_SLOW_SECONDS = 0.01
"""Models predicted slower than this have their terms priced on one sample, faster ones on two."""

_MORE_SAMPLES = 4
"""Noise of what is removed differs more from sample to sample than that of rounding."""

_WORTH_TRYING = 0.25
"""Least share of the budget that pruning is tried with."""
_CAUTION = 0.25
"""Share of what is left that pruning may use: noise of what was fitted to samples says less of other data."""
_WORTH_KEEPING = 0.97
"""It is kept where the whole then takes less than this part of the time."""

_HOLDOUT_LIMIT = 16
_FEW = 8
_TIMING_SECONDS = 0.25
_FILE_ALLOWANCE_DB = 1.0
IN_MEMORY = "model in memory"
_SLOWER = 0.97
"""Measured speed-up below which a result counts as slower; timing of equal models scatters by 3 %."""


class Job:
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
        for done, _ in enumerate(source):  # every sample is checked before any work is done on some
            self.progress("reading the data", done + 1, len(source))
        self.calibration, holdout = source.split()
        self.names = observed(GraphView(original))
        self.holdout: list[Feed] = list(holdout.take(_HOLDOUT_LIMIT))
        if not self.holdout:
            raise DataError("the calibration data holds no sample")
        self.reference = Reference(original, self.holdout, self.names)
        self._scores: WeakKeyDictionary[ir.Model, float] = WeakKeyDictionary()
        self.metric_before = self._score(original)
        self.attempts: list[Attempt] = []
        self.tidied: list[PassReport] = []  # lossless passes
        self.left_alone: list[SiteReport] = []  # their sites
        self.rewrites: list[PassReport] = []  # passes that change outputs
        self.sites: list[SiteReport] = []  # their sites
        self.normalised = self.result = original
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.predicted = 0.0  # seconds of the normalised model on the profile
        self.saved = 0.0  # seconds the plans save on the profile
        self.latency: Latency | None = None

    @cached_property
    def noise(self) -> Comparison:
        """What float rounding alone does to the input model."""
        return rounding_noise(self.original, self.holdout[:LOSSLESS_SAMPLES], self.names)

    # --- the whole way -------------------------------------------------------------------------

    def run(self, passes: Sequence[Pass] | None) -> None:
        """Goes all the way; what came of it is in ``result`` and the records."""
        by_hand = passes is not None
        chosen = list(passes) if passes is not None else _automatic()
        chosen.sort(key=lambda p: (p.stage, p.place))
        tidying = [p for p in chosen if p.lossless and p.stage is Stage.NORMALISE]
        if by_hand and not tidying:  # rewrites by hand still start from a tidy graph
            tidying = [p() for p in registry.available().values() if p.lossless and p.stage is Stage.NORMALISE]
            if any(p.counts_positions for p in chosen):
                tidying = [p for p in tidying if not p.resizes]
        lossy = [p for p in chosen if not p.lossless]
        model = self._raise_opset(self._lossless(self.original, tidying), lossy)
        model = models.infer_types(model)
        model = self._lossless(model, [p for p in chosen if p.lossless and p.stage is not Stage.NORMALISE])
        self.normalised = self.result = model
        self.shapes = value_shapes(model, self.calibration.first(), bodies=True)
        self.predicted = self.cost.model(GraphView(model), self.shapes).seconds
        self._rewrite(lossy, by_hand=by_hand)
        if self.timing:
            self._not_slower(lossy, by_hand=by_hand)

    def _rewrite(self, passes: Sequence[Pass], *, by_hand: bool, float_only: bool = False) -> None:
        """All passes that change outputs, on the normalised model.

        Pruning comes first in the graph but last in the plan: noise buys more elsewhere, so it is tried with what
        the others leave of the budget, and kept where the whole is then faster on the profile.
        """
        early = [] if by_hand else [p for p in passes if p.stage is Stage.PRUNE]
        late = [p for p in passes if p not in early]
        self._in_turn(late, 1.0, by_hand=by_hand, float_only=float_only)
        share = self._budget_left() if early else 0.0
        if not early or share < _WORTH_TRYING:
            for pass_ in early:
                self._not_tried(pass_, share)
            return
        seconds = self._cost_of_result()
        before = (self.result, self.saved, self.rewrites, self.sites)
        self._in_turn(early, _CAUTION * share, by_hand=False, float_only=float_only)
        if self.result is not self.normalised:
            self._in_turn(late, 1.0, by_hand=False, float_only=float_only, afresh=False)
            if self._cost_of_result() < _WORTH_KEEPING * seconds and not self._problem(self.result):
                return
        tried = self.rewrites, self.sites
        self.result, self.saved, self.rewrites, self.sites = before
        names = {p.name for p in early}
        slower = f"with it the whole is predicted to take {1e3 * seconds:.3g} ms or more, as without it"
        for report in (r for r in tried[0] if r.name in names):
            dropped = replace(report, changed=0, outcome="dropped", reason=slower) if report.changed else report
            self.rewrites = [*self.rewrites, dropped]
        self.sites = [
            *self.sites,
            *(
                s if s.decision == KEEP else replace(s, decision=KEEP, reason=slower)
                for s in tried[1]
                if s.pass_name in names
            ),
        ]

    def _problem(self, model: ir.Model) -> str:
        return "" if model is self.normalised else self.check(model).problem

    def _budget_left(self) -> float:
        """Share of the budget that the present result leaves."""
        if self.result is self.normalised:
            return 1.0
        if self.budget.min_sqnr_db is None and self.budget.max_drop is not None:
            before, now = self.metric_before, self._score(self.result)
            if before is None or now is None or not self.budget.max_drop:
                return 0.0
            return min(1.0, max(0.0, 1 - (before - now) / (self.budget.max_drop * abs(before) or 1.0)))
        floor = DEFAULT_MIN_SQNR_DB if self.budget.min_sqnr_db is None else self.budget.min_sqnr_db
        return max(0.0, 1 - 10 ** ((floor - self.reference.compare(self.result).min_sqnr_db) / 10))

    def _not_tried(self, pass_: Pass, share: float) -> None:
        """Says of every site of a pass that the others left nothing for it."""
        view = GraphView(self.normalised, self.shapes)
        offer = offers(pass_, view, self.target, synthetic=self.source.synthetic)
        reason = f"other rewrites pay more and leave {share:.0%} of the accuracy budget: too little to prune with"
        ops = {str(n.name): n.op_type for n in view.nodes()}
        self.sites += [SiteReport(pass_.name, s.key, ops.get(s.key, ""), KEEP, s.reason) for s in offer.skipped]
        self.sites += [SiteReport(pass_.name, s.key, ops.get(s.key, ""), KEEP, reason) for s in offer.choices]
        why = reason if offer.choices else ""
        self.rewrites.append(PassReport(pass_.name, pass_options(pass_), 0, "nothing to do", why))

    def _in_turn(
        self, passes: Sequence[Pass], share: float, *, by_hand: bool, float_only: bool, afresh: bool = True
    ) -> None:
        """Passes one after the other; those that prune may use this share of the budget.

        Args:
            passes: in the order they run.
            share: of the budget.
            by_hand: the user named them.
            float_only: only choices that leave the kernels float.
            afresh: start from the normalised model; if not, from what an earlier turn left.
        """
        if afresh:
            self.result, self.saved, self.rewrites, self.sites = self.normalised, 0.0, [], []
        for pass_ in passes:
            ways = [pass_, *(pass_.gentler() if self.target.required and not by_hand else ())]
            part = share if pass_.stage is Stage.PRUNE and not by_hand else 1.0
            while ways:
                sites, way = len(self.sites), ways.pop(0)
                self.result = self._lossy(self.result, way, part, by_hand=by_hand, float_only=float_only)
                if not ways or self.rewrites[-1].outcome != "dropped":
                    break
                del self.sites[sites:], self.rewrites[-1]  # the attempts still tell of it

    def _lossless(self, model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
        """Lossless passes one after another, checked once; one by one only if the whole does not hold."""
        results: list[Tidied] = []
        current = model
        for pass_ in passes:
            results.append(self._tidied(current, pass_))
            current = results[-1].model
        if current is not model and (problem := self._difference(current)):
            logger.info("together, the lossless passes do not hold (%s): trying them one by one", problem)
            results, current = [], model
            for pass_ in passes:
                done = self._tidied(current, pass_)
                if done.model is not current and (problem := self._difference(done.model)):
                    report = replace(done.report, changed=0, outcome="dropped", reason=problem)
                    done = Tidied(current, report, done.skipped)
                results.append(done)
                current = done.model
        ops = {str(n.name): n.op_type for m in (model, current) for n in GraphView(m).nodes()}
        self.tidied += [r.report for r in results]
        self.left_alone += [
            SiteReport(r.report.name, s.key, ops.get(s.key, ""), KEEP, s.reason) for r in results for s in r.skipped
        ]
        return current

    def _tidied(self, model: ir.Model, pass_: Pass) -> Tidied:
        self.progress(pass_.name, 0, None)

        def gather(view: GraphView, choices: Sequence[Choice]) -> Evidence:
            return self._calibrate(model, {n for c in choices for n in pass_.needs(c, view)}, first=_FEW)

        return tidy(model, pass_, self.target, gather)

    def _difference(self, model: ir.Model) -> str:
        return difference(model, self.reference, len(GraphView(model).nodes()), lambda: self.noise)

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
        self.tidied.append(PassReport("raise_opset", {}, 1, "applied", f"{current} -> {wanted}"))
        return raised

    def _calibrate(
        self, model: ir.Model, needs: Collection[Need], *, first: int | None = None, source: Source | None = None
    ) -> Evidence:
        if not needs:
            return Evidence(synthetic=self.source.synthetic)
        source = self.calibration if source is None else source
        source = source if first is None else source.take(first)

        def tick(done: int, total: int) -> None:
            self.progress("calibrating", done, total)

        return calibrate(model, sorted(needs), source, progress=tick, shapes=False)

    # --- one pass that changes outputs ---------------------------------------------------------

    def _lossy(self, model: ir.Model, pass_: Pass, share: float, *, by_hand: bool, float_only: bool) -> ir.Model:
        shapes = self._shapes_of(model)
        view = GraphView(model, shapes)
        offer = offers(pass_, view, self.target, synthetic=self.source.synthetic, float_only=float_only)
        if not offer.choices:
            self.rewrites.append(PassReport(pass_.name, pass_options(pass_), 0, "nothing to do", ""))
            self.sites += explain(pass_, offer, (), Plan({}, 0, 0, 0), Plan({}, 0, 0, 0), {}, {}, {}, view, (), "")
            return model
        before, feed = self.cost.model(view, shapes).seconds, self.calibration.first()

        def alone(choice: Choice) -> Effect | None:
            needs = set(pass_.needs(choice, view))
            evidence = self._calibrate(model, needs, first=_FEW)
            return effect(model, pass_, choice, evidence, self.cost, feed, before)

        required, gains_only = self.target.required, pass_.planned or not by_hand
        questions, values, missing = ask(
            offer, view, self.cost, shapes, alone, integers_only=required, gains_only=gains_only
        )
        by_term = {t: o.choice for q in questions for o in q.options for t in o.choice.terms if t.kind == ALONE}
        floor = self.budget.min_sqnr_db
        noise = share * 10 ** (-(DEFAULT_MIN_SQNR_DB if floor is None else floor) / 10)

        observed = {n.statistic for choices in offer.choices.values() for n in pass_.needs(choices[0], view)}
        # What is fitted to samples looks better on them than it is.
        pricing, fitting = self.calibration, self.calibration
        if Statistic.GRAM in observed:
            pricing, fitting = self.calibration.apart(_FEW)

        known = Evidence(synthetic=self.source.synthetic)
        swept: set[Need] = set()
        plans: set[Choice] = set()

        def gather(choices: Sequence[Choice]) -> Evidence:
            """One sweep for the first plan, one for whatever else its sites may turn to."""
            nonlocal known
            plans.update(choices)
            missing = {n for c in choices for n in pass_.needs(c, view) if not known.has(n)}
            if missing - swept:
                if len(plans) > len(choices):  # later plans: all a site may turn to, so there is no third sweep
                    keys = {c.site.key for c in choices}
                    others = (o.choice for q in questions if q.site.key in keys for o in q.options)
                    missing |= {n for c in others for n in pass_.needs(c, view)} - swept
                swept.update(missing)
                known = known.joined(self._calibrate(model, missing, source=fitting))
            return known

        def price(terms: Sequence[Term], evidence: Evidence, samples: int) -> Prices:
            feeds = list(pricing.take(samples))
            whole = {t: by_term[t] for t in terms if t in by_term}
            prices = self._prices(pass_, model, [t for t in terms if t not in whole], evidence, noise, feeds)
            return prices.joined(measure_alone(model, pass_, whole, evidence, feeds, self.names)) if whole else prices

        rate = BYTES_WORTH * sum(q.seconds for q in questions) / max(1, models.weight_bytes(model))
        samples = 1 if self.predicted > _SLOW_SECONDS else 2
        if any(o.choice.resizes for q in questions for o in q.options):
            samples *= _MORE_SAMPLES

        def check(candidate: ir.Model) -> Checked:
            return self.check(candidate, share)

        search = Search(model, pass_, questions, values, noise, rate, gather, price, check, samples)
        search.whole = before
        search.by_noise = floor is not None or self.budget.max_drop is None
        search.settle = self._settle(model, pass_)
        search.relative = pass_.relative
        found = search.by_hand() if by_hand and not pass_.planned else search.run()
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
        remark = pass_.remark if changed else found.problem
        self.rewrites.append(PassReport(pass_.name, pass_options(pass_), changed, outcome, remark))
        return found.built.model if found.built is not None else model

    def _settle(self, model: ir.Model, pass_: Pass) -> Callable[[ir.Model], ir.Model]:
        """Makes candidates of a pass up for what it did to this model, which is observed once."""
        known = Evidence(synthetic=self.source.synthetic)
        swept: set[Need] = set()

        def before(needs: Collection[Need]) -> Evidence:
            nonlocal known
            missing = set(needs) - swept
            swept.update(missing)
            known = known.joined(self._calibrate(model, missing))
            return known

        def after(candidate: ir.Model, wanted: Collection[Need | Pair]) -> Evidence:
            found = self._calibrate(candidate, [n for n in wanted if isinstance(n, Need)])
            return found.joined(self._pair(candidate, model, [n for n in wanted if isinstance(n, Pair)]))

        def quality(candidate: ir.Model) -> float:
            return self.reference.compare(candidate).min_sqnr_db

        return lambda candidate: settled(candidate, pass_, before, after, quality)

    def _pair(self, now: ir.Model, then: ir.Model, pairs: Collection[Pair]) -> Evidence:
        """Two models on the calibration data; nothing of made-up inputs, which are no ground to fit weights on."""
        synthetic = self.source.synthetic
        if not pairs or synthetic:
            return Evidence(synthetic=synthetic)

        def tick(done: int, total: int) -> None:
            self.progress("comparing with the model before", done, total)

        return Evidence(crosses=cross_moments(now, then, pairs, self.calibration, progress=tick))

    def _shapes_of(self, model: ir.Model) -> Mapping[str, tuple[int, ...]]:
        """Measured shapes of a model; earlier passes may have changed those of the normalised one."""
        if model is self.normalised:
            return self.shapes
        return value_shapes(model, self.calibration.first(), bodies=True)

    def _prices(
        self,
        pass_: Pass,
        model: ir.Model,
        terms: Sequence[Term],
        evidence: Evidence,
        noise: float,
        feeds: Sequence[Feed],
    ) -> Prices:
        def tick(done: int, total: int) -> None:
            self.progress("measuring sensitivity", done, total)

        return measure_prices(
            pass_, model, terms, evidence, self.target, feeds, self.names, budget=noise, progress=tick
        )

    # --- verifying -----------------------------------------------------------------------------

    def check(self, model: ir.Model, share: float = 1.0) -> Checked:
        """Runs a candidate on held-out data.

        Args:
            model: the candidate.
            share: of the budget that it may use.
        """
        self.progress("building and checking a plan", len(self.attempts), None)
        sqnr = self.reference.compare(model).min_sqnr_db
        floor = self.budget.min_sqnr_db
        if floor is None and self.budget.max_drop is None:
            floor = DEFAULT_MIN_SQNR_DB
        floor = None if floor is None else floor - 10 * math.log10(share)
        if floor is not None and sqnr < floor:
            return Checked(sqnr, None, f"worst output at {sqnr:.1f} dB, {floor:.1f} dB asked for")
        if self.budget.max_drop is None or self.metric_before is None:
            return Checked(sqnr, None, "")
        metric = self._score(model)
        least = self.metric_before - share * self.budget.max_drop * abs(self.metric_before)
        problem = "" if metric is not None and metric >= least else f"metric {metric:.6g} is below {least:.6g}"
        return Checked(sqnr, metric, problem)

    def _score(self, model: ir.Model) -> float | None:
        """The user's metric; asked once a model, for it may take minutes."""
        if self.metric is None:
            return None
        if model in self._scores:
            return self._scores[model]
        with models.temporary_file(model) as path:
            answer = self.metric(str(path))
        try:
            score = float(answer)
        except (TypeError, ValueError):
            raise UsageError(f"the metric returned {answer!r}", hint="it must return a number") from None
        if not math.isfinite(score):
            raise UsageError(f"the metric returned {score}", hint="it must return a finite number, higher is better")
        self._scores[model] = score
        return score

    def final(self, result: ir.Model | Path) -> None:
        """The last look: the result, or the file it was written to, against the input model."""
        self.comparison = self.reference.compare(result)
        promised = [a.min_sqnr_db for a in self.attempts if a.verdict == "accepted" and a.min_sqnr_db is not None]
        if self.sites and promised and self.comparison.min_sqnr_db < min(promised) - _FILE_ALLOWANCE_DB:
            raise ModelRunError(
                f"the written file is at {self.comparison.min_sqnr_db:.1f} dB, the model in memory was not",
                path=result if isinstance(result, Path) else None,
                hint="this is a bug; please report it",
            )

    def _not_slower(self, lossy: Sequence[Pass], *, by_hand: bool) -> None:
        """What measures slower than the input on this machine is not kept.

        Falls back to rewrites that leave the kernels float, then to the normalised model, then to
        the input.
        """
        self.progress("timing", 0, None)
        if self._keeps_up("result"):
            return
        if self.result is not self.normalised and not by_hand:
            self._rewrite(lossy, by_hand=False, float_only=True)
            if self.result is not self.normalised and self._keeps_up("float kernels only"):
                return
        slower = "the result measured slower than the input on this machine"
        self.sites = [replace(s, decision=KEEP, reason=slower) if s.decision != KEEP else s for s in self.sites]
        self.rewrites = [replace(r, changed=0, outcome="dropped", reason=slower) for r in self.rewrites]
        self.result, self.saved = self.normalised, 0.0
        if not self._keeps_up("normalised model"):
            self.result = self.original
            self.tidied = [replace(r, changed=0, outcome="dropped", reason=slower) for r in self.tidied]

    def _keeps_up(self, name: str) -> bool:
        feed = self.holdout[0]
        latency = measure(self.original, self.result, feed, seconds=_TIMING_SECONDS)
        if latency.speed_up < _SLOWER:  # once more and longer: a busy machine is no reason
            latency = measure(self.original, self.result, feed, seconds=4 * _TIMING_SECONDS)
        if latency.speed_up >= _SLOWER:
            self.latency = latency
            return True
        verdict = "slower than the input on this machine"
        seconds = 1e3 * (self.predicted - self.saved)
        self.attempts.append(Attempt(name, 0, seconds, None, None, latency.speed_up, verdict))
        return False

    # --- reporting -----------------------------------------------------------------------------

    def report(self, name: str, seed: int, files: Sequence[Path]) -> Report:
        """Everything about the run; after :meth:`final`."""
        origin = models.source_files(self.original) if name != IN_MEMORY else ()
        before = file_size(*origin) if origin else model_size(self.original)
        after = file_size(*files) if files else model_size(self.result)
        reasons = {s.key: s.reason for s in self.sites if s.decision == KEEP}
        device = on_device(self.result, self.profile, self.calibration.first(), after.raw, reasons)
        failed = [a for a in self.attempts if a.verdict != "accepted"]
        nearest = max(failed, key=lambda a: -math.inf if a.min_sqnr_db is None else a.min_sqnr_db, default=None)
        dropped = nearest.verdict if nearest and any(r.outcome == "dropped" for r in self.rewrites) else ""
        notes, warnings = remarks(device, self.profile, dropped=dropped, synthetic=self.source.synthetic)
        totals = Totals(
            (before.raw, after.raw),
            (before.zstd, after.zstd),
            self._predictions(device),
            self.latency,
            self.comparison,
            self.metric_before,
            self._score(self.result),
        )
        changed = sum(s.decision != KEEP for s in self.sites)
        outcome = "the input model is kept" if self.result is self.original else "the model is normalised only"
        why = "nothing could be made integer" if self.target.required else "no rewrite pays"
        return Report(
            input=name,
            profile=self.profile.name,
            calibration=self.source.description,
            budget=self.budget,
            seed=seed,
            outcome=f"{changed} sites rewritten" if changed else f"{why}; {outcome}",
            totals=totals,
            passes=(*self.tidied, *self.rewrites),
            sites=(*self.sites, *self.left_alone),
            attempts=tuple(self.attempts),
            notes=(*models.notes(self.original), *self.source.notes, *notes),
            warnings=(*((self.source.warning,) if self.source.warning else ()), *warnings),
            versions={p: importlib.metadata.version(p) for p in ("onnxruntime", "onnx", "onnx-ir", "numpy")},
            on_device=device,
        )

    def _cost_of_result(self) -> float:
        """Seconds of what was built; the plan only knew what it would be, conversions and layouts aside."""
        if self.result is self.normalised or self.result is self.original:
            return self.predicted
        shapes = value_shapes(self.result, self.calibration.first(), bodies=True)
        return self.cost.model(GraphView(self.result), shapes).seconds

    def _predictions(self, device: OnDevice | None) -> tuple[float | None, float | None]:
        """Milliseconds before and after; None of a model that a device of integers only does not run."""
        before, after = 1e3 * self.predicted, 1e3 * self._cost_of_result()
        if device is None or not self.target.required:
            return before, after
        idle = stranded(GraphView(self.normalised), self.profile, self.shapes)
        return None if idle else before, after if device.runs else None


def _automatic() -> list[Pass]:
    """The passes that run where none are named."""
    return [cls.by_default() for cls in registry.available().values() if cls.automatic]
