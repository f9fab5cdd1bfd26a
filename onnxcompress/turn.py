"""One pass that changes outputs takes its turn: its sites are priced, a plan is searched, built and kept or dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import ref

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.alone import ALONE, Effect, effect, measure_alone
from onnxcompress.base import Choice, Pass, Term
from onnxcompress.calibrate import calibrate
from onnxcompress.cost import CostModel
from onnxcompress.data import Source
from onnxcompress.footprint import resident_bytes
from onnxcompress.judge import Judge
from onnxcompress.objective import DEFAULT, Objective, Rates, Spent, memory_saved
from onnxcompress.paired import cross_moments
from onnxcompress.planner import Plan
from onnxcompress.questions import Offer, ask, explain, offers, option_of
from onnxcompress.report import Added, Attempt, PassReport, SiteReport
from onnxcompress.search import Checked, Found, Search
from onnxcompress.sensitivity import Prices, measure_prices
from onnxcompress.settling import settled
from onnxcompress.statistics import Evidence, Need, Pair, Statistic
from onnxcompress.target import Target
from onnxcompress.trial import pass_options
from onnxcompress.view import GraphView

__all__ = ["FEW", "Calibrator", "Conditions", "Progress", "Turn", "take_turn"]

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, steps done, steps in all or None)."""

_SLOW_SECONDS = 0.01
"""Models predicted slower than this have their terms priced on one sample, faster ones on two."""

_MORE_SAMPLES = 4
"""Noise of what is removed differs more from sample to sample than that of rounding."""

FEW = 8


class Calibrator:
    """Runs models on the calibration data.

    Args:
        source: the data.
        progress: told of every sample.
    """

    def __init__(self, source: Source, progress: Progress) -> None:
        self.source, self._progress = source, progress
        self._kept: tuple[ref[ir.Model], Evidence] | None = None

    @cached_property
    def apart(self) -> tuple[Source, Source]:
        """Samples that choices are priced on, and others that weights are fitted to: on those they look better."""
        return self.source.apart(FEW)

    def fitting(self, model: ir.Model, needs: Collection[Need]) -> Evidence:
        """What was asked for, of the samples that weights are fitted to; remembered for one model until told to forget.

        Passes that are tried on the same model ask for much the same, and a sweep for second moments takes long.
        """
        known = Evidence(synthetic=self.synthetic)
        if self._kept is not None and self._kept[0]() is model:
            known = self._kept[1]
        missing = [n for n in needs if not known.has(n)]
        if missing:
            known = known.joined(self.observe(model, missing, source=self.apart[1]))
            self._kept = ref(model), known
        return known

    def forget(self) -> None:
        """Lets go of what was remembered."""
        self._kept = None

    @property
    def synthetic(self) -> bool:
        """The data are made up."""
        return self.source.synthetic

    def observe(
        self, model: ir.Model, needs: Collection[Need], *, first: int | None = None, source: Source | None = None
    ) -> Evidence:
        """What was asked for.

        Args:
            model: to run.
            needs: statistics wanted; none costs nothing.
            first: only so many samples.
            source: other data.
        """
        if not needs:
            return Evidence(synthetic=self.synthetic)
        source = self.source if source is None else source
        source = source if first is None else source.take(first)

        def tick(done: int, total: int) -> None:
            self._progress("calibrating", done, total)

        return calibrate(model, sorted(needs), source, progress=tick, shapes=False)

    def pair(self, now: ir.Model, then: ir.Model, pairs: Collection[Pair]) -> Evidence:
        """Two models on the same data; nothing of made-up inputs, which are no ground to fit weights on."""
        if not pairs or self.synthetic:
            return Evidence(synthetic=self.synthetic)

        def tick(done: int, total: int) -> None:
            self._progress("comparing with the model before", done, total)

        return Evidence(crosses=cross_moments(now, then, pairs, self.source, progress=tick))


@dataclass(frozen=True)
class Conditions:
    """What does not change from turn to turn.

    Attributes:
        target: the device.
        cost: its prices.
        judge: holds candidates against the input model.
        data: calibration.
        progress: told what is being done.
        objective: what the run aims at.
    """

    target: Target
    cost: CostModel
    judge: Judge
    data: Calibrator
    progress: Progress
    objective: Objective = DEFAULT


@dataclass(frozen=True)
class Turn:
    """What came of a turn.

    Attributes:
        model: the result; the model that was given where nothing was changed.
        report: of the pass.
        sites: of its sites.
        attempts: every plan that was built.
        saved: seconds the plan saves on the profile.
    """

    model: ir.Model
    report: PassReport
    sites: tuple[SiteReport, ...]
    attempts: tuple[Attempt, ...] = ()
    saved: float = 0.0


def take_turn(
    model: ir.Model,
    shapes: Mapping[str, tuple[int, ...]],
    pass_: Pass,
    share: float,
    conditions: Conditions,
    *,
    by_hand: bool,
    float_only: bool,
    stored_by: str = "",
) -> Turn:
    """One pass on one model.

    Args:
        model: not changed.
        shapes: concrete shapes of its values.
        pass_: the pass.
        share: of the budget that it may use.
        conditions: of the run.
        by_hand: the user named the pass.
        float_only: only choices that leave the kernels float.
        stored_by: a later pass to which choices that only store weights smaller are left.
    """
    view = GraphView(model, shapes)
    synthetic = conditions.data.synthetic
    offer = offers(pass_, view, conditions.target, synthetic=synthetic, float_only=float_only, stored_by=stored_by)
    if not offer.choices:
        nothing = Plan({}, 0, 0, 0)
        sites = explain(pass_, offer, (), nothing, nothing, {}, {}, {}, view, (), "")
        return Turn(model, PassReport(pass_.name, pass_options(pass_), 0, "nothing to do", ""), sites)
    turn = _Turn(model, shapes, view, pass_, offer, share, conditions)
    return turn.run(by_hand=by_hand)


class _Turn:
    def __init__(
        self,
        model: ir.Model,
        shapes: Mapping[str, tuple[int, ...]],
        view: GraphView,
        pass_: Pass,
        offer: Offer,
        share: float,
        conditions: Conditions,
    ) -> None:
        self._model, self._shapes, self._view, self._pass, self._offer = model, shapes, view, pass_, offer
        self._share, self._conditions, self._judge = share, conditions, conditions.judge
        self._data = conditions.data
        self._cost = conditions.cost.model(view, shapes, compressed=conditions.objective.download > 0)
        self._before = self._cost.seconds
        self._noise = share * 10 ** (-self._judge.floor / 10)
        self._known = Evidence(synthetic=self._data.synthetic)
        self._swept: set[Need] = set()
        self._plans: set[Choice] = set()
        observed = {n.statistic for choices in offer.choices.values() for n in pass_.needs(choices[0], view)}
        self._apart = Statistic.GRAM in observed  # it fits weights

    def run(self, *, by_hand: bool) -> Turn:
        """Prices, searches, builds."""
        pass_, model = self._pass, self._model
        self._questions, values, missing = ask(
            self._offer,
            self._view,
            self._conditions.cost,
            self._shapes,
            self._alone,
            integers_only=self._conditions.target.required,
            gains_only=pass_.planned or not by_hand,
            rates=self._rates(self._before),
        )
        options = [o.choice for q in self._questions for o in q.options]
        self._whole = {t: choice for choice in options for t in choice.terms if t.kind == ALONE}
        seconds = min(sum(q.seconds for q in self._questions), self._before)  # sites may share nodes
        rates = self._rates(seconds)
        samples = 1 if self._before > _SLOW_SECONDS else 2
        if any(choice.resizes or choice.becomes for choice in options):
            samples *= _MORE_SAMPLES
        search = Search(
            model, pass_, self._questions, values, self._noise, rates, self._gather, self._price, self._check, samples
        )
        search.whole = self._before
        search.by_noise = self._judge.by_noise
        search.settle = self._settler()
        search.relative = pass_.relative
        search.reprice = lambda choice, question: option_of(
            choice, question, self._view, self._conditions.cost, self._shapes, rates
        )
        search.weighed = lambda choices: self._weighed(choices, rates)
        found = search.by_hand() if by_hand and not pass_.planned else search.run()
        sites = explain(
            pass_,
            self._offer,
            search.questions,
            found.plan,
            search.free,
            search.prices,
            search.impossible,
            missing,
            self._view,
            found.built.refused if found.built is not None else (),
            found.problem if found.built is None else "",
            found.built.told if found.built is not None else {},
            rates,
        )
        saved = found.plan.seconds_before - found.plan.seconds
        result = found.built.model if found.built is not None else model
        return Turn(result, self._report(found, saved), sites, tuple(search.attempts), saved)

    def _report(self, found: Found, saved: float) -> PassReport:
        changed = len(found.built.made) if found.built is not None else 0
        outcome = "applied" if changed else "dropped" if found.problem else "nothing to do"
        remark = self._pass.remark if changed else found.problem
        added = None
        if changed and found.built is not None:
            after = models.weight_bytes(found.built.model)
            added = Added(1e3 * saved, models.weight_bytes(self._model) - after, found.min_sqnr_db)
        return PassReport(self._pass.name, pass_options(self._pass), changed, outcome, remark, added)

    def _rates(self, seconds: float) -> Rates:
        """Prices of choices whose sites take so many seconds."""
        return self._conditions.objective.rates(self._spent, seconds, for_files=self._pass.for_size)

    @cached_property
    def _spent(self) -> Spent:
        """What the model takes, the weights for its files."""
        cost, memory = self._cost, None
        if self._conditions.objective.memory:
            resident = resident_bytes(self._conditions.cost.profile, self._view, self._shapes)
            memory = resident + cost.peak_activation_bytes
        return Spent(cost.seconds, models.weight_bytes(self._model), cost.zstd_bytes, memory, cost.energy_joule)

    def _weighed(self, choices: Iterable[Choice], rates: Rates) -> int | None:
        """Bytes of weights after choices, of the kind that is aimed at."""
        kind, spent = self._conditions.objective.bytes_aimed_at, self._spent
        kind = kind or ("size" if self._pass.for_size else "")
        if kind == "size":
            return spent.file_bytes - sum(c.bytes_saved for c in choices)
        if kind == "download":
            return (spent.download_bytes or 0) - round(sum(map(rates.download_saved, choices)))
        if kind == "memory":
            return (spent.memory_bytes or 0) - sum(map(memory_saved, choices))
        return None

    # --- evidence ------------------------------------------------------------------------------

    def _alone(self, choice: Choice) -> Effect | None:
        evidence = self._data.observe(self._model, set(self._pass.needs(choice, self._view)), first=FEW)
        cost, feed = self._conditions.cost, self._data.source.first()
        return effect(self._model, self._pass, choice, evidence, cost, feed, self._cost)

    def _gather(self, choices: Sequence[Choice]) -> Evidence:
        """One sweep for the first plan, one for whatever else its sites may turn to."""
        pass_, view = self._pass, self._view
        self._plans.update(choices)
        missing = {n for c in choices for n in pass_.needs(c, view) if not self._known.has(n)}
        if missing - self._swept:
            if len(self._plans) > len(choices):  # later plans: all a site may turn to, so there is no third sweep
                keys = {c.site.key for c in choices}
                others = (o.choice for q in self._questions if q.site.key in keys for o in q.options)
                missing |= {n for c in others for n in pass_.needs(c, view)} - self._swept
            self._swept.update(missing)
            self._known = self._known.joined(self._observe(missing))
        return self._known

    def _observe(self, needs: Collection[Need]) -> Evidence:
        return self._data.fitting(self._model, needs) if self._apart else self._data.observe(self._model, needs)

    def _price(self, terms: Sequence[Term], evidence: Evidence, samples: int) -> Prices:
        feeds = list((self._data.apart[0] if self._apart else self._data.source).take(samples))
        whole = {t: self._whole[t] for t in terms if t in self._whole}

        def tick(done: int, total: int) -> None:
            self._conditions.progress("measuring sensitivity", done, total)

        prices = measure_prices(
            self._pass, self._model, [t for t in terms if t not in whole], evidence, self._conditions.target, feeds,
            self._judge.names, budget=self._noise, progress=tick,
        )  # fmt: skip
        if not whole:
            return prices
        return prices.joined(measure_alone(self._model, self._pass, whole, evidence, feeds, self._judge.names))

    def _check(self, candidate: ir.Model) -> Checked:
        self._conditions.progress("building and checking a plan", 0, None)
        return self._judge.check(candidate, self._share)

    def _settler(self) -> Callable[[ir.Model, bool], ir.Model]:
        """Makes candidates up for what the pass did to this model, which is observed once.

        Where both models have to be run side by side, round after round, only the candidate that is kept is settled.
        """
        known = Evidence(synthetic=self._data.synthetic)
        swept: set[Need] = set()

        def before(needs: Collection[Need]) -> Evidence:
            nonlocal known
            missing = set(needs) - swept
            swept.update(missing)
            known = known.joined(self._data.observe(self._model, missing))
            return known

        def after(candidate: ir.Model, wanted: Collection[Need | Pair]) -> Evidence:
            found = self._data.observe(candidate, [n for n in wanted if isinstance(n, Need)])
            return found.joined(self._data.pair(candidate, self._model, [n for n in wanted if isinstance(n, Pair)]))

        def quality(candidate: ir.Model) -> float:
            return self._judge.compare(candidate).min_sqnr_db

        def settle(candidate: ir.Model, last: bool) -> ir.Model:
            wanted = (n for needs in self._pass.settling(GraphView(candidate)) for n in needs)
            if last is not any(isinstance(n, Pair) for n in wanted):
                return candidate
            return settled(candidate, self._pass, before, after, quality)

        return settle
