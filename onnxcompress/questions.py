"""From what passes offer to what the planner decides: sites priced on a profile, and reasons after."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from onnxcompress.alone import Effect, with_terms
from onnxcompress.base import KEEP, Choice, Pass, Precision, Site, Skip, Skipped, Term
from onnxcompress.cost import Costing, CostModel
from onnxcompress.planner import Option, Plan, Question, ValueCost
from onnxcompress.report import SiteReport
from onnxcompress.sketch import Drawn, drawn_model, redrawn
from onnxcompress.target import Target
from onnxcompress.view import GraphView
from onnxcompress.work import NodeWork, kinds_of, work_of

__all__ = ["Offer", "ask", "explain", "offers", "option_of"]


_HARDLY_FASTER = 0.8
_LEAST_STEP = 2e-4
"""Share of the model's time that a smaller width has to save."""
_LARGE = 1000
"""Nodes of a graph above which a width is priced as if what runs inside what stayed the same."""
_SMALLER_MAY_COST = 5e-3
"""Share of the model's time that nodes may take more where they make the file smaller."""
_NO_DATA = "it needs ranges from real data, and there is no calibration data"


@dataclass(frozen=True)
class Offer:
    """What one pass offers on one model.

    Attributes:
        choices: by site, weak to strong.
        skipped: places looked at and left alone.
    """

    choices: Mapping[Site, tuple[Choice, ...]]
    skipped: tuple[Skipped, ...]


def offers(pass_: Pass, view: GraphView, target: Target, *, synthetic: bool, float_only: bool = False) -> Offer:
    """Sites and choices of a pass.

    Args:
        synthetic: there is no real data, so only choices that need none are offered.
        float_only: only choices that leave the kernels float are.
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
        usable = tuple(c for c in real if not float_only or c.precision == Precision.FLOAT)
        if usable:
            choices[site] = usable
        else:
            why = "int8 kernels measured slower than the input on this machine" if real else _NO_DATA
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
) -> tuple[list[Question], dict[str, ValueCost], dict[str, str]]:
    """Prices every choice in seconds.

    Args:
        effect: makes a choice on a clone, for those whose gain nothing else tells.
        integers_only: the device runs nothing else, so a node with an integer form must take one.
        gains_only: a width that is not faster than the wider ones is left out.

    Returns:
        Questions for the planner; conversion costs by value; by site key, why a choice was left
        out because the profile has no kernel for it.
    """
    total = cost.model(view, shapes)
    now, whole = {row.name: row.seconds for row in total.nodes}, total.seconds
    resized = _Resizing(view, cost, shapes)
    here = cost.for_model(view, shapes)
    redrawing = _Redrawing(view, here, shapes)
    questions: list[Question] = []
    missing: dict[str, str] = {}
    for site, choices in offer.choices.items():
        seconds = sum(now.get(name, 0.0) for name in site.nodes)
        options: list[Option] = []
        for choice in choices:
            after: float | None = seconds
            if choice.resizes:
                after = seconds + resized(choice.resizes) - whole
                least = min([seconds, *(o.seconds for o in options)])
                if gains_only and after > least - _LEAST_STEP * whole:  # 52 of 64 channels that cost as much as 64
                    missing.setdefault(site.key, "no smaller width is predicted faster here")
                else:
                    options.append(Option(choice, after))
                continue
            if choice.becomes:
                after = seconds + redrawing(site, choice)
                more = _SMALLER_MAY_COST * whole if choice.bytes_saved > 0 else -_LEAST_STEP * whole
                if gains_only and after > seconds + more:
                    missing.setdefault(site.key, f"{choice.name} is predicted slower here, and no other choice faster")
                else:
                    options.append(Option(choice, after))
                continue
            if choice.effects and choice.precision == Precision.FLOAT:
                change = effect(choice)
                if change is None:
                    missing[site.key] = f"{choice.name} cannot be made, or the result does not run"
                    continue
                options.append(Option(replace(choice, bytes_saved=change.bytes_saved), seconds + change.seconds))
                continue
            node = view.node(site.nodes[0] if site.key not in site.nodes else site.key)
            if choice.precision != Precision.FLOAT:
                after = here.node(work_of(view, node, shapes), choice.precision)
            if after is None:
                missing[site.key] = f"the profile has no {choice.precision} kernel for this {node.op_type}"
            else:
                extra = sum(_elementwise(op, shapes.get(name, ()), here) for op, name in choice.adds)
                gone = sum(now.get(name, 0.0) for name in choice.removes)
                options.append(Option(choice, after + extra - gone))
        if integers_only and any(o.choice.precision != Precision.FLOAT for o in options):
            questions.append(Question(site, seconds, _integer(options), must=True))
            continue
        questions.append(Question(site, seconds, _undominated(options)))
    return questions, _value_costs(questions, view, here, shapes), missing


class _Resizing:
    """Seconds of the whole model with some axes of other sizes."""

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

    def __call__(self, resizes: Iterable[tuple[str, int, int]]) -> float:
        changes: dict[str, list[int]] = {}
        for name, axis, size in resizes:
            if name in self._known:
                changes.setdefault(name, list(self._known[name]))[axis] = size
        large = len(self._view.nodes()) > _LARGE
        shapes = {name: tuple(shape) for name, shape in changes.items()}
        return self._costing.reshaped(shapes, same_structure=large).cost().seconds


def option_of(
    choice: Choice, question: Question, view: GraphView, cost: CostModel, shapes: Mapping[str, tuple[int, ...]]
) -> Option:
    """A choice that nobody asked about and that was made all the same, priced like the others of its site."""
    redrawing = _Redrawing(view, cost.for_model(view, shapes), shapes)
    return Option(choice, question.seconds + (redrawing(question.site, choice) if choice.becomes else 0.0))


class _Redrawing:
    """Seconds that nodes of a site take more, or less, when others take their place."""

    def __init__(self, view: GraphView, here: CostModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._view, self._here, self._shapes = view, here, shapes
        self._before: dict[Site, float] = {}

    def __call__(self, site: Site, choice: Choice) -> float:
        if site not in self._before:
            self._before[site] = self._seconds([redrawn(self._view.node(name)) for name in site.nodes])
        return self._seconds(choice.becomes) - self._before[site]

    def _seconds(self, drawing: Sequence[Drawn]) -> float:
        model, shapes = drawn_model(drawing, self._view, self._shapes)
        return self._here.part(GraphView(model), shapes)


def _integer(options: Sequence[Option]) -> tuple[Option, ...]:
    """Options of a node that must be integer. Whether a QuantizeLinear in front of it is slow is no question then."""
    return tuple(
        replace(o, choice=replace(o.choice, native=())) for o in options if o.choice.precision != Precision.FLOAT
    )


def _undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Leaves out what needs calibrated ranges and integer neighbours, yet is hardly faster than what needs neither."""
    free = [o.seconds for o in options if not o.choice.calibrated and o.choice.precision != Precision.FLOAT]
    if not free:
        return tuple(options)
    limit = _HARDLY_FASTER * min(free)
    return tuple(o for o in options if not (o.choice.reads and o.choice.calibrated and o.seconds >= limit))


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
) -> tuple[SiteReport, ...]:
    """One line a site: what was done, or what speaks against it.

    Args:
        plan: the plan that was built.
        free_plan: what would have been chosen had distortion been free.
        verdict: why the pass as a whole was dropped; empty if it was not.
        told: what the pass had to say of what it made.
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
        reason = reason or _why_kept(question, free_plan, prices, impossible, missing)
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
    best = min(question.options, key=lambda o: o.seconds)
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
