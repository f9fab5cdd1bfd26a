"""The cheapest plan of one pass whose real distortion fits the budget.

First the plan that is cheapest with distortion free. Only if that fails on held-out data are the
terms it causes priced, the plan solved again under a limit, built and checked; where prices turn
out wrong as a sum, the limit moves, in both directions. The most sensitive sites fall out first,
because they are what the limit buys back at the least cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Term
from onnxcompress.errors import ModelRunError
from onnxcompress.objective import Rates
from onnxcompress.planner import Option, Plan, Question, ValueCost, solve, tally
from onnxcompress.report import Attempt
from onnxcompress.sensitivity import Prices
from onnxcompress.statistics import Evidence
from onnxcompress.trial import Built, build

__all__ = ["Checked", "Found", "Search"]

_ATTEMPTS = 6
_ENDLESS = "it puts noise on an output that is otherwise all zeros, or changes its shape"
_MANY = 8
_NO_PLAN = Plan({}, 0.0, 0.0, 0.0)
_FAR_OFF = 3.0
"""Real noise this many times the summed prices means the prices were taken on too few samples."""
_FAR = 4.0
"""Plans this many times as noisy as would do where only noise counts are far from it."""
_LEAST_SLOPE = 0.3
_AIM, _USED_UP = 0.95, 0.85
"""Share of the budget that the next plan aims at, and that counts as used up."""
_CLOSE = 1.03
"""A plan that takes this much more than the one that took most and failed is close enough."""


@dataclass(frozen=True)
class Checked:
    """What a candidate did on held-out data.

    Attributes:
        min_sqnr_db: worst output.
        metric: the user's metric, where there is one.
        problem: why it is not good enough; empty if it is.
    """

    min_sqnr_db: float
    metric: float | None
    problem: str


@dataclass(frozen=True)
class Found:
    """The outcome.

    Attributes:
        built: None if no plan was good enough.
        plan: that was built.
        problem: why none was good enough.
        min_sqnr_db: worst output on held-out data.
    """

    built: Built | None
    plan: Plan
    problem: str
    min_sqnr_db: float = math.inf


@dataclass
class Search:
    """One pass on one model.

    Attributes:
        model: the model before the pass.
        pass_: the pass.
        questions: its sites, priced in seconds.
        values: conversion costs.
        noise: noise power the budget allows at the worst output.
        rates: what seconds, joules and bytes are worth; plans are compared by that.
        gather: collects the evidence choices need.
        price: measures terms on so many samples.
        check: runs a candidate on held-out data.
        samples: to price terms on, at first.
        by_noise: ``check`` holds plans against ``noise``; if not, against a metric, and noise only ranks plans.
        reprice: what a choice costs that no question offered.
        relative: how large a term is among others of its kind, see :meth:`Pass.relative`.
        whole: seconds of the whole model before; sites may share nodes, so theirs do not add up to it.
        weighed: bytes that the model would come to with a plan, of the kind that is aimed at; for the record.
        settle: makes a candidate up for what the pass did to it; returns it, or a better one. Asked of every
            candidate, and, with True, once more of the one that is kept: what takes long can wait until then.
        prices: what has been measured.
        impossible: terms that cannot be simulated.
        attempts: every plan that was built.
    """

    model: ir.Model
    pass_: Pass
    questions: list[Question]
    values: Mapping[str, ValueCost]
    noise: float
    rates: Rates
    gather: Callable[[Sequence[Choice]], Evidence]
    price: Callable[[Sequence[Term], Evidence, int], Prices]
    check: Callable[[ir.Model], Checked]
    samples: int = 1
    by_noise: bool = True
    settle: Callable[[ir.Model, bool], ir.Model] = lambda model, last: model
    reprice: Callable[[Choice, Question], Option] | None = None
    weighed: Callable[[Iterable[Choice]], int | None] = lambda choices: None
    relative: Callable[[Term, Evidence], tuple[Hashable, float] | None] = lambda term, evidence: None
    whole: float = 0.0

    def __post_init__(self) -> None:
        self.prices: dict[Term, float] = {}
        self.impossible: dict[Term, str] = {}
        self.attempts: list[Attempt] = []
        self._measured: dict[Hashable, tuple[float, float]] = {}  # size and price of the one term of each kind
        self.failed: list[tuple[float, float]] = []  # summed prices and real noise of plans that failed
        self.held: list[tuple[float, float]] = []  # and of those that did not
        self.free = self._solve(None) or _NO_PLAN  # noise is no limit here, so there is one

    def run(self) -> Found:
        """Searches; deterministic for the same inputs."""
        best: tuple[Built, Plan, float] | None = None
        problem = ""
        plan: Plan | None
        plan, limit = self.free, math.inf
        holds, fails = 0.0, math.inf  # limits known to hold and to fail
        out_of_reach = 0.0  # of plans known to fail, the highest value
        tried: set[frozenset[Choice]] = set()
        for _ in range(_ATTEMPTS):
            if plan is None:  # what must change cannot within the budget
                break
            key = frozenset(plan.choices.values())
            if not key or key in tried:
                break
            tried.add(key)
            built, checked, plan = self._try(plan)
            if not checked.problem:
                if best is None or self._value(plan) < self._value(best[1]):
                    best = built, plan, checked.min_sqnr_db
                holds, real = limit, _power(checked)
                if limit is math.inf or self._value(best[1]) <= _CLOSE * out_of_reach:
                    break
                if self.by_noise and real >= _USED_UP * self.noise:
                    break
                self.held.append((plan.price, real))
                limit = self._between(holds, fails)
            else:
                problem = checked.problem
                if not self._could_differ(plan):
                    break
                if limit is math.inf:
                    plan = self._priced(plan, checked)
                    if self.impossible.keys() & _terms(plan):
                        plan = self._solve(math.inf)  # what it turns to may be impossible, too: told before it is built
                        continue
                out_of_reach = max(out_of_reach, self._value(plan))
                fails = min(limit, plan.price)
                limit = self._lower(holds, fails, plan, checked)
            plan = self._solve(limit)
        if best is None:
            return Found(None, _NO_PLAN, problem)
        built, sqnr = self._settled(best[0], best[2])
        return Found(built, replace(best[1], price=self._price(best[1])), "", sqnr)

    def by_hand(self) -> Found:
        """The user's word: the strongest possible choice at every site; checked all the same."""
        strongest = {q.site.key: q.options[-1] for q in self.questions if q.options}
        built, checked, plan = self._try(tally(self.questions, strongest, self.rates))
        if checked.problem:
            return Found(None, _NO_PLAN, checked.problem)
        built, sqnr = self._settled(built, checked.min_sqnr_db)
        return Found(built, plan, "", sqnr)

    def _as_made(self, plan: Plan, built: Built) -> Plan:
        """A plan some choices of which turned into others when it was built."""
        planned = set(plan.choices.values())
        if self.reprice is None or all(choice in planned for choice in built.made):
            return plan
        by_key = {q.site.key: q for q in self.questions}
        known = {o.choice: o for q in self.questions for o in q.options}
        made = {c.site.key: known.get(c) or self.reprice(c, by_key[c.site.key]) for c in built.made}
        return tally(self.questions, made, self.rates, price=plan.price)

    def _settled(self, built: Built, sqnr: float) -> tuple[Built, float]:
        """The candidate that is kept, settled for good where it then still holds."""
        model = self.settle(built.model, True)
        if model is built.model:
            return built, sqnr
        checked = self.check(model)
        return (built, sqnr) if checked.problem else (replace(built, model=model), checked.min_sqnr_db)

    def _could_differ(self, plan: Plan) -> bool:
        """Whether any site of a plan could stay as it is or take another option, so that prices are of use."""
        free = (q for q in self.questions if not q.must or len(q.options) > 1)
        return any(q.site.key in plan.choices for q in free)

    def _lower(self, holds: float, fails: float, plan: Plan, checked: Checked) -> float:
        """A smaller limit: prices are off by a common factor, which the last try tells."""
        real = _power(checked)
        self.failed.append((plan.price, real))
        if holds > 0:
            return self._between(holds, fails)
        if not self.by_noise:  # what a metric stands is not known: first what noise would, then by large steps
            return self.noise if fails > _FAR * self.noise else fails / 4
        factor = self.noise / real if 0 < real < math.inf else 0.1
        return min(0.5 * fails, 0.9 * plan.price * math.pow(factor, 1 / self._slope()))

    def _seconds(self, plan: Plan) -> float:
        """Predicted seconds of the whole model; of the sites where the whole is not known."""
        return plan.seconds + (self.whole - plan.seconds_before if self.whole else 0.0)

    def _value(self, plan: Plan) -> float:
        """What plans are compared by, of the whole model; of the sites where the whole is not known."""
        return plan.value + (self.rates.total - plan.value_before if self.rates.total else 0.0)

    def _between(self, holds: float, fails: float) -> float:
        """A limit between one that holds and one that fails: where noise, read off both, would just fit."""
        middle = math.sqrt(holds * fails)
        if not (self.by_noise and self.held and self.failed):
            return middle
        (price, real), (higher, more) = max(self.held), min(self.failed)
        aim = _AIM * self.noise
        if not (0 < price < higher and 0 < real < aim < more < math.inf):
            return middle
        share = math.log(aim / real) / math.log(more / real)
        return price * math.pow(higher / price, min(0.9, max(0.1, share)))

    def _slope(self) -> float:
        """How fast real noise falls with the price, on logarithmic scales: 1 where prices are right."""
        if len(self.failed) < 2:
            return 1.0
        (price, real), (lower, less) = self.failed[-2:]
        if not (0 < lower < price and 0 < less < real < math.inf):
            return 1.0
        slope = math.log(less / real) / math.log(lower / price)
        return min(1.0, max(_LEAST_SLOPE, slope))

    def _solve(self, limit: float | None) -> Plan | None:
        """The best plan under a limit, all of whose terms have been measured; None if there is none.

        Terms not measured yet count as free, so the solver is drawn to them; then they are measured
        and it solves again. What no good plan would cause is never tried.
        """
        while True:
            plan = solve(self.questions, self.values, self.prices, budget=limit, rates=self.rates)
            if limit is None or plan is None or not self._measure(plan):
                return plan

    def _measure(self, plan: Plan) -> bool:
        known = self.prices.keys() | self.impossible.keys()
        new = sorted(_terms(plan) - known, key=lambda t: (t.kind, t.subject))
        if not new:
            return False
        evidence = self.gather(tuple(plan.choices.values()))
        sizes = {t: found for t in new if (found := self.relative(t, evidence)) is not None}
        self._measure_kinds(sizes, evidence)
        self._price_all([t for t in new if t not in sizes], evidence)
        for term, (key, size) in sizes.items():
            if key in self._measured:
                known_size, price = self._measured[key]
                self.prices[term] = price * size / known_size
            elif term not in self.prices and term not in self.impossible:
                self._price_all([term], evidence)
        self.questions = [
            replace(q, options=tuple(o for o in q.options if not self.impossible.keys() & set(o.choice.terms)))
            for q in self.questions
        ]
        return True

    def _price_all(self, terms: Sequence[Term], evidence: Evidence) -> None:
        if not terms:
            return
        found = self.price(terms, evidence, self.samples)
        self.prices.update({t: p for t, p in found.terms.items() if math.isfinite(p)})
        self.impossible.update({t: _ENDLESS for t, p in found.terms.items() if not math.isfinite(p)})
        self.impossible.update(found.impossible)

    def _measure_kinds(self, sizes: Mapping[Term, tuple[Hashable, float]], evidence: Evidence) -> None:
        """Measures one term of every kind that none was measured of: where there is a ladder, from its middle.

        A weak one is lost in rounding, and a strong one leaves so little of the output that it cannot grow.
        """
        chosen: dict[Hashable, tuple[Term, float]] = {}
        for term, (key, size) in sizes.items():
            if key in self._measured or key in chosen:
                continue
            ladder = next((q.options for q in self.questions if any(term in o.choice.terms for o in q.options)), ())
            middle = ladder[len(ladder) // 2].choice.terms[0] if ladder else term
            other = self.relative(middle, evidence)
            chosen[key] = (middle, other[1]) if other is not None and other[0] == key else (term, size)
        self._price_all([term for term, _ in chosen.values()], evidence)
        for key, (term, size) in chosen.items():
            price = self.prices.get(term, 0.0)
            if size > 0 and price > 0:
                self._measured[key] = size, price

    def _priced(self, plan: Plan, checked: Checked) -> Plan:
        """A plan that failed, with its price; on more samples where few did not show what it does.

        One sample may hide what another shows: an output that flips between two classes is quiet
        until it flips.
        """
        self._measure(plan)
        if 10 ** (-checked.min_sqnr_db / 10) > _FAR_OFF * self._price(plan) and self.samples < _MANY:
            self.samples = _MANY
            self.prices.clear()
            self._measured.clear()
            self._measure(plan)
        return replace(plan, price=self._price(plan))

    def _price(self, plan: Plan) -> float:
        return sum(self.prices.get(t, 0.0) for t in _terms(plan))

    def _try(self, plan: Plan) -> tuple[Built, Checked, Plan]:
        choices = tuple(plan.choices.values())
        built = build(self.model, self.pass_, choices, self.gather(choices))
        plan = self._as_made(plan, built)
        try:
            built = replace(built, model=self.settle(built.model, False))
            checked = self.check(built.model)
        except ModelRunError as error:
            checked = Checked(-math.inf, None, f"it does not run: {error.message}")
        self.attempts.append(
            Attempt(
                kind=self.pass_.name,
                sites=len(built.made),
                predicted_ms=1e3 * self._seconds(plan),
                min_sqnr_db=checked.min_sqnr_db,
                metric=checked.metric,
                speed_up=None,
                verdict=checked.problem or "accepted",
                predicted_bytes=self.weighed(plan.choices.values()),
            )
        )
        return built, checked, plan


def _power(checked: Checked) -> float:
    """Noise power over signal power at the worst output."""
    return float(10 ** (-checked.min_sqnr_db / 10))


def _terms(plan: Plan) -> set[Term]:
    return {t for c in plan.choices.values() for t in c.terms}
