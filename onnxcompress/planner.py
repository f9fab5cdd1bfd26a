"""One choice per site, the least cost, the distortion within the budget.

A mixed-integer program, solved by HiGHS (``scipy.optimize.milp``). Sites are not independent: a
value that lives as integers costs a QuantizeLinear where its producer is float and a
DequantizeLinear where a reader is float, so regions of integer nodes pay and lone ones may not.

    minimise    sum_sc (cost_sc - worth_sc) x_sc + sum_v (quantize_v a_v + dequantize_v sum_r b_vr)
    subject to  sum_c x_sc = 1                      one choice per site, "keep" among them unless it must change
                a_v >= reads_vs - writes_v          some reader wants integers, producer is float
                b_vr >= writes_v - reads_vr         producer leaves integers, reader r is float
                x_sc <= writes_v                    where c wants v as integers from its producer only
                x_sc + x_td <= 1                    where c removes the node that site t is about
                u_t >= x_sc                         choice c causes distortion t
                sum_t price_t u_t <= budget         each distortion counted once

Costs are time and energy, worth are the bytes that go, each at the rate the objective gives it
(:class:`~onnxcompress.objective.Rates`).

For fixed x all other variables take integral values at the optimum, so only x is declared integer.
Exact prices being unknown beforehand, the pipeline checks the plan on the real thing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcompress.base import Choice, Site, Term
from onnxcompress.errors import OnnxCompressError
from onnxcompress.objective import Rates

__all__ = ["Option", "Plan", "Question", "ValueCost", "solve", "tally"]

_GAP = 1e-4
_NODES = 20_000
_INFEASIBLE = 2
"""What ``scipy.optimize.milp`` returns as its status then."""
_LEAST_GAIN = 2e-4
"""A rewrite must save this share of what the model takes: noise without return is not worth having."""


@dataclass(frozen=True)
class Option:
    """A choice with its cost: seconds the covered nodes take after it, and joules where energy is aimed at."""

    choice: Choice
    seconds: float
    joules: float = 0.0


@dataclass(frozen=True)
class Question:
    """A site, the seconds its nodes take now, and what could be done.

    Attributes:
        site: where.
        seconds: of its nodes now.
        options: what could be done.
        must: one of the options has to be taken, for the device cannot run the nodes as they are.
        joules: of its nodes now, where energy is aimed at.
    """

    site: Site
    seconds: float
    options: tuple[Option, ...]
    must: bool = False
    joules: float = 0.0


@dataclass(frozen=True)
class ValueCost:
    """What a value costs where its representation changes.

    Attributes:
        quantize: seconds of a QuantizeLinear on it.
        dequantize: seconds of a DequantizeLinear on it. Each reader of floats pays one of its own: onnxruntime
            duplicates them.
        float_readers: how many outside all sites read it as float (the model's output, a node no pass
            offers a choice for).
        readers: keys of the sites that read it.
    """

    quantize: float
    dequantize: float
    float_readers: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The chosen choices and what they are predicted to do.

    Attributes:
        choices: by site key; sites that stay as they are have no entry.
        seconds: predicted cost of all sites and conversions after the plan.
        seconds_before: the same with nothing done.
        price: summed price of the distortions caused.
        gains: seconds saved by each chosen site alone, conversions left out; none where it had to change.
        value: what plans are compared by: the cost after the plan at the rates of the objective, less what the bytes
            are worth that go.
        value_before: the same with nothing done.
    """

    choices: Mapping[str, Choice]
    seconds: float
    seconds_before: float
    price: float
    gains: Mapping[str, float] = field(default_factory=dict)
    value: float = field(default=0.0, compare=False)
    value_before: float = field(default=0.0, compare=False)


class _Program:
    """Rows and columns of a sparse program, filled one by one."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.integer: list[int] = []
        self._rows: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def variable(self, cost: float, *, integer: bool = False) -> int:
        self.cost.append(cost)
        self.integer.append(int(integer))
        return len(self.cost) - 1

    def constraint(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        row = len(self._low)
        self._rows += [(row, column, value) for column, value in terms]
        self._low.append(low)
        self._high.append(high)

    def solve(self) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
        """The best values; None if none satisfy the constraints."""
        # here, for scipy.optimize takes a third of a second to import and only a plan needs it
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        cost = np.asarray(self.cost)
        scale = float(np.abs(cost).max(initial=0.0)) or 1.0
        rows, columns, values = zip(*self._rows, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self._low), len(cost)))
        with _stdout_kept_clean():
            result = milp(
                cost / scale,
                integrality=np.asarray(self.integer),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, self._low, self._high),
                options={"mip_rel_gap": _GAP, "node_limit": _NODES},
            )
        if result.status == _INFEASIBLE:
            return None
        if result.x is None:
            raise OnnxCompressError(f"the planner found no plan: {result.message}", hint="this is a bug; please report")
        return np.asarray(result.x, np.float64)


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Sends what C code prints to stdout nowhere: HiGHS has lines that no option turns off.

    A user of ``--json`` would find them in the middle of the document.
    """
    try:
        kept = os.dup(1)
    except OSError:  # no stdout to keep clean
        yield
        return
    sys.stdout.flush()
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a path
            os.dup2(nowhere.fileno(), 1)
            yield
            if os.name == "posix":  # what C still buffers belongs there, too
                ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def solve(
    questions: Sequence[Question],
    values: Mapping[str, ValueCost],
    prices: Mapping[Term, float],
    *,
    budget: float | None,
    rates: Rates,
) -> Plan | None:
    """The cheapest plan within the budget.

    Args:
        questions: sites with their options.
        values: conversion costs of every value some option reads or writes as integers.
        prices: distortion of each term: noise power over signal power at the worst output.
        budget: most the prices may sum to; None for no limit.
        rates: what seconds, joules and bytes are worth.

    Returns:
        The plan; empty if nothing pays. None if sites that must change cannot within the budget.
    """
    if not any(q.options for q in questions):
        return tally(questions, {}, rates)
    program = _Program()
    now = rates.running(sum(q.seconds for q in questions), sum(q.joules for q in questions))
    least = _LEAST_GAIN * (now + rates.bytes_total)
    picks: list[tuple[int, Question, Option | None]] = []
    causes: dict[Term, list[int]] = {}
    reads: dict[str, dict[str, list[int]]] = {}
    writes: dict[str, list[int]] = {}
    native: list[tuple[int, str]] = []
    for question in questions:
        columns = []
        if not (question.must and question.options):
            columns.append(program.variable(rates.running(question.seconds, question.joules), integer=True))
            picks.append((columns[0], question, None))
        for option in question.options:
            choice = option.choice
            cost = rates.running(option.seconds, option.joules) - rates.worth(choice)
            column = program.variable(cost + least, integer=True)
            columns.append(column)
            picks.append((column, question, option))
            for term in choice.terms:
                causes.setdefault(term, []).append(column)
            for value in choice.reads:
                reads.setdefault(value, {}).setdefault(question.site.key, []).append(column)
            native += [(column, value) for value in choice.native]
            for value in choice.writes:
                writes.setdefault(value, []).append(column)
        program.constraint([(c, 1.0) for c in columns], 1.0, 1.0)
    _removals(program, picks)
    _conversions(program, values, reads, writes, rates)
    for column, value in native:  # x <= writes
        program.constraint([(column, -1.0), *((c, 1.0) for c in writes.get(value, ()))], 0.0, np.inf)
    _distortion(program, causes, prices, budget)
    x = program.solve()
    if x is None:
        return None
    chosen = [(question, option) for column, question, option in picks if option is not None and x[column] > 0.5]
    return _plan(questions, values, prices, {q.site.key: o for q, o in chosen}, rates)


def _removals(program: _Program, picks: Sequence[tuple[int, Question, Option | None]]) -> None:
    """What a choice removes, no other changes."""
    columns: dict[str, dict[int, None]] = {}
    for column, question, option in picks:
        for name in () if option is None else {question.site.key, *question.site.nodes}:
            columns.setdefault(name, {})[column] = None
    own = {column: question.site.key for column, question, _ in picks}
    for column, question, option in picks:
        removed = () if option is None else option.choice.removes
        others = {other for name in removed for other in columns.get(name, ())}
        for other in sorted(o for o in others if own[o] != question.site.key):
            program.constraint([(column, 1.0), (other, 1.0)], -np.inf, 1.0)


def _conversions(
    program: _Program,
    values: Mapping[str, ValueCost],
    reads: Mapping[str, Mapping[str, Sequence[int]]],
    writes: Mapping[str, Sequence[int]],
    rates: Rates,
) -> None:
    def cost(seconds: float) -> float:
        return rates.running(seconds, rates.watts * seconds)

    for name, value in values.items():
        written = [(c, 1.0) for c in writes.get(name, ())]
        readers = reads.get(name, {})
        quantize = program.variable(cost(value.quantize))
        for columns in readers.values():  # a >= reads - writes
            program.constraint([(quantize, 1.0), *written, *((c, -1.0) for c in columns)], 0.0, np.inf)
        if not written:
            continue
        minus = [(c, -1.0) for c, _ in written]
        if value.float_readers:  # b >= writes
            dequantize = program.variable(cost(value.dequantize * value.float_readers))
            program.constraint([(dequantize, 1.0), *minus], 0.0, np.inf)
        for key in value.readers:  # b >= writes - reads
            dequantize = program.variable(cost(value.dequantize))
            program.constraint([(dequantize, 1.0), *minus, *((c, 1.0) for c in readers.get(key, ()))], 0.0, np.inf)


def _distortion(
    program: _Program, causes: Mapping[Term, Sequence[int]], prices: Mapping[Term, float], budget: float | None
) -> None:
    if budget is None:
        return
    limited = []
    for term, columns in causes.items():
        price = prices.get(term, 0.0)
        if not price <= budget:  # too much by itself, or not a number
            for column in columns:
                program.constraint([(column, 1.0)], 0.0, 0.0)
        elif price > 0.0:
            used = program.variable(0.0)
            limited.append((used, price / budget))
            for column in columns:
                program.constraint([(used, 1.0), (column, -1.0)], 0.0, np.inf)
    if limited:
        program.constraint(limited, -np.inf, 1.0)


def _plan(
    questions: Sequence[Question],
    values: Mapping[str, ValueCost],
    prices: Mapping[Term, float],
    chosen: Mapping[str, Option],
    rates: Rates,
) -> Plan:
    """Prices a set of choices exactly as the program does."""
    conversions: list[float] = []
    read_by: dict[str, set[str]] = {}
    written: set[str] = set()
    for key, option in chosen.items():
        written |= set(option.choice.writes)
        for value in option.choice.reads:
            read_by.setdefault(value, set()).add(key)
    for name, cost in values.items():
        readers = read_by.get(name, set())
        if name not in written and readers:
            conversions.append(cost.quantize)
        if name in written:
            conversions.append(cost.dequantize * (cost.float_readers + len(set(cost.readers) - readers)))
    terms = {t for option in chosen.values() for t in option.choice.terms}
    return tally(questions, chosen, rates, conversions, sum(prices.get(t, 0.0) for t in terms))


def tally(
    questions: Sequence[Question],
    chosen: Mapping[str, Option],
    rates: Rates,
    conversions: Sequence[float] = (),
    price: float = 0.0,
) -> Plan:
    """The plan that some options make up, whatever they cause.

    Args:
        questions: all sites.
        chosen: by site key; the others stay as they are.
        rates: what seconds, joules and bytes are worth.
        conversions: seconds of conversions between them.
        price: summed price of the distortions.
    """
    before = sum(q.seconds for q in questions)
    after = sum(chosen[q.site.key].seconds if q.site.key in chosen else q.seconds for q in questions)
    joules = sum(chosen[q.site.key].joules if q.site.key in chosen else q.joules for q in questions)
    for seconds in conversions:
        after += seconds
        joules += rates.watts * seconds
    counted = sum(rates.counted(option.choice) for option in chosen.values())
    return Plan(
        choices={key: option.choice for key, option in chosen.items()},
        seconds=after,
        seconds_before=before,
        price=price,
        gains={
            q.site.key: q.seconds - chosen[q.site.key].seconds for q in questions if q.site.key in chosen and not q.must
        },
        value=rates.running(after, joules) - counted,
        value_before=rates.running(before, sum(q.joules for q in questions)),
    )
