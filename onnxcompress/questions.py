"""From what passes offer to what the planner decides: sites priced on a profile, and reasons after."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from onnxcompress.alone import Effect, with_terms
from onnxcompress.base import KEEP, Choice, Pass, Precision, Site, Skip, Skipped, Term
from onnxcompress.cost import Costing, CostModel, ModelCost
from onnxcompress.objective import Rates
from onnxcompress.planner import Option, Plan, Question, ValueCost
from onnxcompress.report import SiteReport
from onnxcompress.sketch import Drawn, drawn_model, redrawn
from onnxcompress.target import Target
from onnxcompress.view import GraphView
from onnxcompress.work import NodeWork, kinds_of, work_of

__all__ = ["Offer", "ask", "explain", "offers", "option_of"]


_HARDLY_FASTER = 0.8
_LEAST_STEP = 2e-4
"""Share of what the model takes that a smaller width has to save."""
_LARGE = 1000
"""Nodes of a graph above which a width is priced as if what runs inside what stayed the same."""
_SMALLER_MAY_COST = 5e-3
"""Share of the model's time that nodes may take more where they make the file smaller, if files are no aim."""
_LEAST_BY_FOUR_BITS = 0.02
"""Share of what the model takes that weights of 4 bits have to save over finer forms, all of them together."""
_MEASURED_SLOWER = "int8 kernels measured slower than the input on this machine"
_NO_FASTER_WIDTH = "no smaller width is predicted faster here"
_NO_WIDTH = "no smaller width is predicted to gain anything here"
_SLOWER = "{} is predicted slower here, and no other choice faster"
_NO_GAIN = "{} is predicted to gain nothing here, nor does any other choice"
_NO_DATA = "it needs ranges from real data, and there is no calibration data"
_BY_TIME = Rates()


@dataclass(frozen=True)
class Offer:
    """What one pass offers on one model.

    Attributes:
        choices: by site, weak to strong.
        skipped: places looked at and left alone.
    """

    choices: Mapping[Site, tuple[Choice, ...]]
    skipped: tuple[Skipped, ...]


def offers(
    pass_: Pass,
    view: GraphView,
    target: Target,
    *,
    synthetic: bool,
    float_only: bool = False,
    stored_by: str = "",
) -> Offer:
    """Sites and choices of a pass.

    Args:
        synthetic: there is no real data, so only choices that need none are offered.
        float_only: only choices that leave the kernels float are.
        stored_by: a later pass that stores weights in fewer bits, to which choices that only do that are left.
    """
    choices: dict[Site, tuple[Choice, ...]] = {}
    skipped: list[Skipped] = []
    for site in pass_.sites(view):
        if isinstance(site, Skipped):
            skipped.append(site)
            continue
        try:
            found = with_terms(pass_.choices(site, view, target))
        except Skip as skip:
            skipped.append(Skipped(site.key, skip.reason))
            continue
        real = tuple(c for c in found if not (synthetic and c.calibrated))
        fast = tuple(c for c in real if not float_only or c.precision == Precision.FLOAT)
        usable = tuple(c for c in fast if not (stored_by and c.stored))
        if usable:
            choices[site] = usable
        else:
            why = f"stored smaller by a later pass: {stored_by}" if fast else _MEASURED_SLOWER if real else _NO_DATA
            why = why if found else "nothing to choose"
            skipped.append(Skipped(site.key, why))
    return Offer(choices, tuple(skipped))


def ask(
    offer: Offer,
    view: GraphView,
    cost: CostModel,
    shapes: Mapping[str, tuple[int, ...]],
    effect: Callable[[Choice], Effect | None],
    *,
    integers_only: bool = False,
    gains_only: bool = True,
    rates: Rates = _BY_TIME,
) -> tuple[list[Question], dict[str, ValueCost], dict[str, str]]:
    """Prices every choice in seconds, and in joules where energy is aimed at.

    Args:
        effect: makes a choice on a clone, for those whose gain nothing else tells.
        integers_only: the device runs nothing else, so a node with an integer form must take one.
        gains_only: a width that gains no more than the wider ones is left out.
        rates: what seconds, joules and bytes are worth, which tells what a gain is.

    Returns:
        Questions for the planner; conversion costs by value; by site key, why a choice was left
        out because the profile has no kernel for it.
    """
    total = cost.model(view, shapes)
    now, whole = {row.name: row.seconds for row in total.nodes}, total.seconds
    power = {row.name: rates.joules(row.energy_joule, row.seconds) for row in total.nodes}
    everything = rates.total or rates.running(whole, rates.joules(total.energy_joule, whole))
    resized = _Resizing(view, cost, shapes)
    here = cost.for_model(view, shapes)
    redrawing = _Redrawing(view, here, shapes, rates)
    questions: list[Question] = []
    missing: dict[str, str] = {}
    for site, choices in offer.choices.items():
        seconds = sum(now.get(name, 0.0) for name in site.nodes)
        joules = sum(power.get(name, 0.0) for name in site.nodes)
        options: list[Option] = []
        for choice in choices:
            if choice.resizes:
                other = resized(choice.resizes)
                change = rates.joules(other.energy_joule, other.seconds) - rates.joules(total.energy_joule, whole)
                option = Option(choice, seconds + other.seconds - whole, joules + change)
                least = min([rates.running(seconds, joules), *(_taken(o, rates) for o in options)])
                if gains_only and _taken(option, rates) > least - _LEAST_STEP * everything:
                    missing.setdefault(site.key, _NO_WIDTH if rates.by_bytes else _NO_FASTER_WIDTH)
                else:  # not 52 of 64 channels that cost as much as 64
                    options.append(option)
                continue
            if choice.becomes:
                more_seconds, more_joules = redrawing(site, choice)
                option = Option(choice, seconds + more_seconds, joules + more_joules)
                smaller = choice.bytes_saved > 0 and not rates.by_bytes
                more = everything * (_SMALLER_MAY_COST if smaller else -_LEAST_STEP)
                if gains_only and _taken(option, rates) > rates.running(seconds, joules) + more:
                    missing.setdefault(site.key, (_NO_GAIN if rates.by_bytes else _SLOWER).format(choice.name))
                else:
                    options.append(option)
                continue
            if choice.effects and choice.precision == Precision.FLOAT:
                found = effect(choice)
                if found is None:
                    missing[site.key] = f"{choice.name} cannot be made, or the result does not run"
                    continue
                choice = replace(choice, bytes_saved=found.bytes_saved)
                options.append(Option(choice, seconds + found.seconds, joules + rates.joules(found.joules, 0.0)))
                continue
            node = view.node(site.nodes[0] if site.key not in site.nodes else site.key)
            after: float | None = seconds
            energy = joules
            if choice.precision != Precision.FLOAT:
                work = work_of(view, node, shapes)
                after = here.node(work, choice.precision)
                energy = rates.joules(here.joules(work, choice.precision, after or 0.0), after or 0.0)
            if after is None:
                missing[site.key] = f"the profile has no {choice.precision} kernel for this {node.op_type}"
            else:
                extra = sum(_elementwise(op, shapes.get(name, ()), here) for op, name in choice.adds)
                gone = sum(now.get(name, 0.0) for name in choice.removes)
                energy += rates.joules(None, extra) - sum(power.get(name, 0.0) for name in choice.removes)
                options.append(Option(choice, after + extra - gone, energy))
        if integers_only and any(o.choice.precision != Precision.FLOAT for o in options):
            questions.append(Question(site, seconds, _integer(options), must=True, joules=joules))
            continue
        questions.append(Question(site, seconds, _undominated(options), joules=joules))
    if gains_only:
        questions = _worth_their_noise(questions, rates, everything)
    return questions, _value_costs(questions, view, here, shapes), missing


def _taken(option: Option, rates: Rates) -> float:
    """What plans with an option are compared by."""
    return rates.running(option.seconds, option.joules) - rates.counted(option.choice)


class _Resizing:
    """The cost of the whole model with some axes of other sizes."""

    def __init__(self, view: GraphView, cost: CostModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._view, self._cost, self._shapes = view, cost, shapes

    @cached_property
    def _costing(self) -> Costing:
        costing = Costing(self._cost, self._view, self._shapes)
        costing.cost()  # prices every node once; what is not touched later is not priced again
        return costing

    @cached_property
    def _known(self) -> dict[str, tuple[int, ...]]:
        weights = {str(v.name): v.const_value.shape.numpy() for v in self._view.weights() if v.const_value is not None}
        return {**{name: tuple(int(d) for d in shape) for name, shape in weights.items()}, **self._shapes}

    def __call__(self, resizes: Iterable[tuple[str, int, int]]) -> ModelCost:
        changes: dict[str, list[int]] = {}
        for name, axis, size in resizes:
            if name in self._known:
                changes.setdefault(name, list(self._known[name]))[axis] = size
        large = len(self._view.nodes()) > _LARGE
        shapes = {name: tuple(shape) for name, shape in changes.items()}
        return self._costing.reshaped(shapes, same_structure=large).cost()


def option_of(
    choice: Choice,
    question: Question,
    view: GraphView,
    cost: CostModel,
    shapes: Mapping[str, tuple[int, ...]],
    rates: Rates = _BY_TIME,
) -> Option:
    """A choice that nobody asked about and that was made all the same, priced like the others of its site."""
    redrawing = _Redrawing(view, cost.for_model(view, shapes), shapes, rates)
    seconds, joules = redrawing(question.site, choice) if choice.becomes else (0.0, 0.0)
    return Option(choice, question.seconds + seconds, question.joules + joules)


class _Redrawing:
    """Seconds and joules that nodes of a site take more, or less, when others take their place."""

    def __init__(self, view: GraphView, here: CostModel, shapes: Mapping[str, tuple[int, ...]], rates: Rates) -> None:
        self._view, self._here, self._shapes, self._rates = view, here, shapes, rates
        self._before: dict[Site, tuple[float, float]] = {}

    def __call__(self, site: Site, choice: Choice) -> tuple[float, float]:
        if site not in self._before:
            self._before[site] = self._cost([redrawn(self._view.node(name)) for name in site.nodes])
        before, after = self._before[site], self._cost(choice.becomes)
        return after[0] - before[0], after[1] - before[1]

    def _cost(self, drawing: Sequence[Drawn]) -> tuple[float, float]:
        model, shapes = drawn_model(drawing, self._view, self._shapes)
        cost = self._here.part(GraphView(model), shapes)
        return cost.seconds, sum(self._rates.joules(row.energy_joule, row.seconds) for row in cost.nodes)


def _integer(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options of a node that must be integer. Whether a QuantizeLinear in front of it is slow is no question then."""
    return tuple(
        replace(o, choice=replace(o.choice, native=())) for o in options if o.choice.precision != Precision.FLOAT
    )


def _undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Leaves out what needs calibrated ranges and integer neighbours, yet is hardly faster than what needs neither."""
    free = [o.seconds for o in options if not o.choice.calibrated and o.choice.precision == Precision.DYNAMIC]
    if not free:
        return tuple(options)
    limit = _HARDLY_FASTER * min(free)
    return tuple(o for o in options if not (o.choice.reads and o.choice.calibrated and o.seconds >= limit))


def _worth_their_noise(questions: Sequence[Question], rates: Rates, everything: float) -> list[Question]:
    """Leaves out weights of 4 bits where the whole model would hardly gain by them: they are 20 dB noisier than 8."""

    def taken(option: Option) -> float:
        return rates.running(option.seconds, option.joules) - rates.worth(option.choice)

    gain = 0.0
    finer: list[Question] = []
    for question in questions:
        fine = tuple(o for o in question.options if o.choice.precision != Precision.BLOCKED4)
        least = min([rates.running(question.seconds, question.joules), *map(taken, fine)])
        gain += max(0.0, *(least - taken(o) for o in question.options if o not in fine), 0.0)
        finer.append(replace(question, options=fine))
    return finer if gain < _LEAST_BY_FOUR_BITS * everything else list(questions)


def _elementwise(op: str, shape: tuple[int, ...], cost: CostModel) -> float:
    """Seconds of an operator that maps a tensor to one of its size."""
    size = math.prod(shape)
    work = NodeWork("", op, kinds_of(op)[0], len(shape) >= 4, elements_in=size, elements_out=size)
    return cost.node(work) or 0.0


def _value_costs(
    questions: Sequence[Question], view: GraphView, cost: CostModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ValueCost]:
    site_of = {node: q.site.key for q in questions for node in q.site.nodes}
    names = {n for q in questions for o in q.options for n in (*o.choice.reads, *o.choice.writes)}
    costs: dict[str, ValueCost] = {}
    for value in [*view.model.graph.inputs, *view.values()]:
        name = str(value.name)
        if name not in names:
            continue
        shape = shapes.get(name, (1,))
        readers: list[str] = []
        outside = int(view.is_output(value))
        for node, _ in view.consumers(value):
            key = site_of.get(str(node.name))
            if key is None:
                outside += 1
            elif key not in readers:
                readers.append(key)
        costs[name] = ValueCost(
            cost.convert(math.prod(shape), "quantize", maps=len(shape) >= 4),
            cost.convert(math.prod(shape), "dequantize", maps=len(shape) >= 4),
            outside,
            tuple(readers),
        )
    return costs


def explain(
    pass_: Pass,
    offer: Offer,
    questions: Sequence[Question],
    plan: Plan,
    free_plan: Plan,
    prices: Mapping[Term, float],
    impossible: Mapping[Term, str],
    missing: Mapping[str, str],
    view: GraphView,
    refused: Collection[Skipped],
    verdict: str,
    told: Mapping[str, str] | None = None,
    rates: Rates = _BY_TIME,
) -> tuple[SiteReport, ...]:
    """One line a site: what was done, or what speaks against it.

    Args:
        plan: the plan that was built.
        free_plan: what would have been chosen had distortion been free.
        verdict: why the pass as a whole was dropped; empty if it was not.
        told: what the pass had to say of what it made.
        rates: what seconds, joules and bytes are worth.
    """
    ops = {str(n.name): n.op_type for n in view.nodes()}
    for question in questions:  # a key may be more than the name of a node
        ops.setdefault(question.site.key, ops[question.site.nodes[0]])
    refusals = {s.key: s.reason for s in refused}
    rows = [SiteReport(pass_.name, s.key, ops.get(s.key, ""), KEEP, s.reason) for s in offer.skipped]
    for question in questions:
        key = question.site.key
        choice = plan.choices.get(key)
        if choice is not None and key not in refusals and not verdict:
            rows.append(
                SiteReport(
                    pass_.name,
                    key,
                    ops[key],
                    choice.name,
                    (told or {}).get(key, ""),
                    1e3 * plan.gains.get(key, 0.0),
                    choice.bytes_saved,
                    _decibels(sum(prices.get(t, 0.0) for t in choice.terms)),
                )
            )
            continue
        reason = refusals.get(key) or _dropped(verdict, key, free_plan, prices)
        reason = reason or _why_kept(question, free_plan, prices, impossible, missing, rates)
        rows.append(SiteReport(pass_.name, key, ops[key], KEEP, reason))
    return tuple(rows)


def _dropped(verdict: str, key: str, free_plan: Plan, prices: Mapping[Term, float]) -> str:
    """Why the pass as a whole was dropped, and what the site does alone where that was measured."""
    wanted = free_plan.choices.get(key)
    known = verdict and wanted is not None and all(t in prices for t in wanted.terms)
    alone = _decibels(sum(prices[t] for t in wanted.terms)) if known and wanted is not None else None
    return verdict if alone is None else f"{verdict}; {alone:.1f} dB of noise from this alone"


def _why_kept(
    question: Question,
    free_plan: Plan,
    prices: Mapping[Term, float],
    impossible: Mapping[Term, str],
    missing: Mapping[str, str],
    rates: Rates,
) -> str:
    key = question.site.key
    if not question.options:
        return missing.get(key, "no choice is possible")
    for option in question.options:
        for term in option.choice.terms:
            if term in impossible:
                return impossible[term]
    wanted = free_plan.choices.get(key)
    if wanted is not None:
        decibels = _decibels(sum(prices.get(t, 0.0) for t in wanted.terms))
        noise = "its noise" if decibels is None else f"its noise ({decibels:.1f} dB at the worst output)"
        return f"{wanted.name} would pay, but {noise} does not fit into the budget"
    best = min(question.options, key=lambda o: _taken(o, rates))
    if rates.by_bytes and rates.counted(best.choice) > 0:
        return f"{best.choice.name} would save {best.choice.bytes_saved} bytes: too little, or less than what it costs"
    if best.seconds >= question.seconds and best.choice.precision != Precision.FLOAT:
        return f"{best.choice.name} is predicted slower here: {_ms(best.seconds)} instead of {_ms(question.seconds)}"
    if best.seconds >= question.seconds:
        return "too few weights to be worth storing differently"
    saved = _ms(question.seconds - best.seconds)
    return f"{best.choice.name} would save {saved} alone: too little, or less than conversions to its neighbours cost"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _decibels(power: float) -> float | None:
    return 10 * math.log10(power) if power > 0 else None
