"""The plan is the cheapest one inside the budget: known answers, brute force over all plans, and real graphs."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, made, normal, text

from onnxcompress import planner
from onnxcompress.base import Choice, Site, Term
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.objective import Rates
from onnxcompress.passes.quantize import Quantize
from onnxcompress.planner import Option, Plan, Question, ValueCost, solve
from onnxcompress.profile import load_profile
from onnxcompress.questions import ask, offers
from onnxcompress.view import GraphView

LEAST = 2e-4
"""Share of the model's time a rewrite must save: the planner's own figure, restated."""


def site(key: str) -> Site:
    return Site(key, (key,))


def choice(
    key: str,
    name: str = "int8",
    *,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    terms: Sequence[str] = (),
    saved: int = 0,
) -> Choice:
    return Choice(
        site(key),
        name,
        reads=tuple(reads),
        writes=tuple(writes),
        terms=tuple(Term("t", t) for t in terms),
        bytes_saved=saved,
    )


def plan(
    questions: Sequence[Question],
    values: Mapping[str, ValueCost] | None = None,
    prices: Mapping[str, float] | None = None,
    budget: float | None = None,
    rate: float = 0.0,
) -> Plan:
    priced = {Term("t", name): price for name, price in (prices or {}).items()}
    found = solve(questions, values or {}, priced, budget=budget, rates=Rates(file_byte=rate))
    assert found is not None
    return found


def chosen(found: Plan) -> dict[str, str]:
    return {key: c.name for key, c in found.choices.items()}


def chain(length: int, *, saves: float = 3.0) -> tuple[list[Question], dict[str, ValueCost]]:
    """A row x -> 0 -> v0 -> 1 -> v1 ...; each node takes 10 s, as integers ``saves`` less; conversions take 4 s."""
    questions, values = [], {"x": ValueCost(4.0, 4.0, False, ("0",))}
    for i in range(length):
        before = "x" if i == 0 else f"v{i - 1}"
        made = choice(str(i), reads=[before], writes=[f"v{i}"])
        questions.append(Question(site(str(i)), 10.0, (Option(made, 10.0 - saves),)))
        last = i == length - 1
        values[f"v{i}"] = ValueCost(4.0, 4.0, last, () if last else (str(i + 1),))
    return questions, values


# --- regions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "pays"), [(1, False), (2, False), (3, True), (5, True)])
def test_a_chain_of_integers_pays_where_a_lone_one_does_not(length: int, pays: bool) -> None:
    """Both ends cost 8 s together, each node saves 3 s."""
    found = plan(*chain(length))
    assert len(found.choices) == (length if pays else 0)
    assert found.seconds_before == 10 * length
    assert found.seconds == pytest.approx(7 * length + 8 if pays else 10 * length)
    assert found.gains == (dict.fromkeys(map(str, range(length)), pytest.approx(3.0)) if pays else {})


@pytest.mark.parametrize(("seconds", "taken"), [(15.0, True), (16.9, True), (17.1, False), (30.0, False)])
def test_a_node_that_loses_is_taken_along_where_leaving_it_out_costs_more(seconds: float, taken: bool) -> None:
    """Node 3 of seven is slow as integers. Left float it takes 10 s, and two conversions between: 18 s."""
    questions, values = chain(7)
    questions[3] = Question(questions[3].site, 10.0, (Option(questions[3].options[0].choice, seconds + 1),))
    found = plan(questions, values)
    assert len(found.choices) == (7 if taken else 6)
    assert ("3" in found.choices) == taken


def test_integers_from_the_producer_or_not_at_all() -> None:
    """Node 1 wants v0 as integers from node 0 only: alone, and where node 0 stays float, it is not chosen."""
    questions, values = chain(2, saves=9.0)
    native = replace(questions[1].options[0].choice, native=("v0",))
    questions[1] = Question(questions[1].site, 10.0, (Option(native, 1.0),))
    assert set(plan(questions, values).choices) == {"0", "1"}
    questions[0] = Question(questions[0].site, 10.0, ())
    assert plan(questions, values).choices == {}
    questions[1] = Question(questions[1].site, 10.0, (Option(replace(native, native=()), 1.0),))
    assert set(plan(questions, values).choices) == {"1"}


def test_each_float_reader_pays_a_conversion_and_integer_readers_share_one() -> None:
    """Every float reader has a DequantizeLinear of its own; two integer readers of x share one QuantizeLinear."""
    questions = [Question(site(k), 20.0, (Option(choice(k, reads=["x"], writes=[f"v{k}"]), 5.0),)) for k in ("a", "b")]
    questions.append(Question(site("c"), 10.0, ()))
    questions.append(Question(site("d"), 10.0, ()))
    values = {
        "x": ValueCost(3.0, 3.0, False, ("a", "b")),
        "va": ValueCost(3.0, 3.0, False, ("c", "d")),
        "vb": ValueCost(3.0, 3.0, True, ("c",)),
    }
    found = plan(questions, values)
    assert set(found.choices) == {"a", "b"}
    assert found.seconds == pytest.approx(5 + 5 + 10 + 10 + 3 + 2 * 3 + 2 * 3)


def test_a_float_reader_outside_all_sites_costs_a_conversion() -> None:
    for outside, seconds in ((False, 3 * 7 + 4), (True, 3 * 7 + 8)):
        questions, values = chain(3)
        values["v2"] = ValueCost(4.0, 4.0, outside, ())
        assert plan(questions, values).seconds == pytest.approx(seconds)


# --- budgets -----------------------------------------------------------------------------------


def independent(prices: Sequence[float], saves: Sequence[float]) -> tuple[list[Question], dict[str, float]]:
    questions = [
        Question(site(str(i)), 10.0, (Option(choice(str(i), terms=[str(i)]), 10.0 - s),)) for i, s in enumerate(saves)
    ]
    return questions, {str(i): p for i, p in enumerate(prices)}


@pytest.mark.parametrize(
    ("budget", "left"),
    [(None, {0, 1, 2}), (11.0, {0, 1, 2}), (10.9, {0, 2}), (3.0, {0, 2}), (2.9, {2}), (1.0, {0}), (0.5, set())],
)
def test_the_most_harmful_goes_first(budget: float | None, left: set[int]) -> None:
    questions, prices = independent([1.0, 8.0, 2.0], [5.0, 4.9, 5.1])
    found = plan(questions, prices=prices, budget=budget)
    assert set(map(int, found.choices)) == left
    assert found.price == sum([1.0, 8.0, 2.0][i] for i in left)


def test_a_budget_of_nothing_leaves_what_costs_nothing() -> None:
    questions, prices = independent([1e-300, 0.0], [5.0, 5.0])
    assert set(plan(questions, prices=prices, budget=0.0).choices) == {"1"}


def test_gain_for_price_and_not_price_alone() -> None:
    questions, prices = independent([3.0, 2.0, 2.0], [9.0, 4.0, 4.0])
    assert set(plan(questions, prices=prices, budget=4.0).choices) == {"0"}
    assert plan(questions, prices=prices, budget=5.0).price == 5.0


def test_a_distortion_two_choices_cause_counts_once() -> None:
    questions = [Question(site(k), 10.0, (Option(choice(k, terms=["shared", k]), 5.0),)) for k in ("a", "b")]
    prices = {"shared": 6.0, "a": 1.0, "b": 1.0}
    found = plan(questions, prices=prices, budget=8.0)
    assert set(found.choices) == {"a", "b"}
    assert found.price == 8.0
    assert len(plan(questions, prices=prices, budget=7.9).choices) == 1


def test_a_weaker_choice_where_the_stronger_does_not_fit() -> None:
    options = (
        Option(choice("a", "weak", terms=["weak"]), 8.0),
        Option(choice("a", "strong", terms=["strong"]), 5.0),
    )
    questions = [Question(site("a"), 10.0, options)]
    prices = {"weak": 1.0, "strong": 5.0}
    assert [chosen(plan(questions, prices=prices, budget=b)) for b in (5.0, 4.0, 0.9)] == [
        {"a": "strong"},
        {"a": "weak"},
        {},
    ]


@pytest.mark.parametrize("price", [math.inf, math.nan, 1e300])
def test_a_price_beyond_all_bounds_is_never_paid(price: float) -> None:
    """An output that was all zeros has no signal to compare noise with: its price is infinite."""
    questions, prices = independent([price, 1.0], [9.0, 1.0])
    assert set(plan(questions, prices=prices, budget=2.0).choices) == {"1"}
    assert set(plan(questions, prices=prices, budget=0.0).choices) == set()


def test_prices_of_many_magnitudes() -> None:
    """SQNR prices run from 1e-12 to 1; a sum of small ones fits where one large does not."""
    questions, prices = independent([1e-12, 1e-9, 1e-6, 1e-3, 1.0], [1.0] * 5)
    for budget, count in ((2e-12, 1), (2e-9, 2), (2e-6, 3), (2e-3, 4), (2.0, 5)):
        found = plan(questions, prices=prices, budget=budget)
        assert len(found.choices) == count
        assert found.price <= budget


# --- what is worth it --------------------------------------------------------------------------


def test_ties_keep() -> None:
    """Noise without return is not worth having."""
    for saved, taken in ((0.0, False), (0.5 * LEAST, False), (2 * LEAST, True), (-1.0, False)):
        questions = [Question(site("a"), 1.0, (Option(choice("a"), 1.0 - saved),))]
        assert bool(plan(questions).choices) == taken


def test_bytes_are_worth_time() -> None:
    """A store of 100 bytes that costs 1 s, at 0.02 s a byte and at 0.005."""
    questions = [Question(site("a"), 10.0, (Option(choice("a", saved=100), 11.0),))]
    assert plan(questions, rate=0.02).choices
    assert not plan(questions, rate=0.005).choices
    assert plan(questions, rate=0.02).seconds == 11.0, "what bytes are worth is no time"


def test_nothing_to_choose() -> None:
    assert plan([]) == Plan({}, 0, 0, 0.0)
    assert plan([Question(site("a"), 3.0, ())]) == Plan({}, 3.0, 3.0, 0.0)


# --- brute force -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    questions: tuple[Question, ...]
    values: Mapping[str, ValueCost]
    prices: Mapping[str, float]
    budget: float | None
    rate: float


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to seven nodes that read earlier values, with up to two choices each."""
    count = draw(st.integers(1, 7))
    small = st.integers(0, 9)
    reads = [
        draw(st.lists(st.sampled_from(["x", *(f"v{j}" for j in range(i))]), min_size=1, max_size=2, unique=True))
        for i in range(count)
    ]
    questions = []
    for i in range(count):
        options = []
        if draw(st.booleans()):
            terms = draw(st.lists(st.sampled_from("pqrst"), max_size=2, unique=True))
            stored = choice(str(i), "store", terms=terms, saved=draw(small))
            options.append(Option(stored, float(draw(st.integers(5, 12)))))
        if draw(st.integers(0, 3)):
            terms = draw(st.lists(st.sampled_from("pqrst"), max_size=3, unique=True))
            made = choice(str(i), "int8", reads=reads[i], writes=[f"v{i}"], terms=terms, saved=draw(small))
            made = replace(made, native=tuple(reads[i][: draw(st.sampled_from([0, 0, 1]))]))
            options.append(Option(made, float(draw(st.integers(2, 12)))))
        questions.append(Question(site(str(i)), 10.0, tuple(options)))
    values = {}
    for name in ["x", *(f"v{i}" for i in range(count))]:
        readers = tuple(str(i) for i in range(count) if name in reads[i])
        values[name] = ValueCost(float(draw(small)), float(draw(small)), draw(st.booleans()), readers)
    prices = {t: float(draw(small)) for t in "pqrst"}
    budget = draw(st.one_of(st.none(), st.integers(0, 25).map(float)))
    return Problem(tuple(questions), values, prices, budget, draw(st.sampled_from([0.0, 0.25])))


def cost(problem: Problem, picks: Sequence[Option | None]) -> tuple[float, float]:
    """Objective and summed price of a plan, straight from the definition."""
    total = sum(q.seconds for q in problem.questions)
    objective = 0.0
    written: set[str] = set()
    read: dict[str, set[str]] = {}
    terms: set[str] = set()
    for question, option in zip(problem.questions, picks, strict=True):
        if option is None:
            objective += question.seconds
            continue
        objective += option.seconds - problem.rate * option.choice.bytes_saved + LEAST * total
        written |= set(option.choice.writes)
        terms |= {t.subject for t in option.choice.terms}
        for value in option.choice.reads:
            read.setdefault(value, set()).add(question.site.key)
    for name, value in problem.values.items():
        if read.get(name) and name not in written:
            objective += value.quantize
        if name in written:
            objective += value.dequantize * (value.float_readers + len(set(value.readers) - read.get(name, set())))
    for option in picks:
        if option is not None and not set(option.choice.native) <= written:
            return math.inf, 0.0
    return objective, sum(problem.prices[t] for t in terms)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_no_plan_is_better(problem: Problem) -> None:
    """All figures are whole or quarters, so plans that differ differ by more than the solver's gap."""
    best = min(
        objective
        for picks in itertools.product(*((None, *q.options) for q in problem.questions))
        for objective, price in [cost(problem, picks)]
        if problem.budget is None or price <= problem.budget
    )
    found = plan(problem.questions, problem.values, problem.prices, problem.budget, problem.rate)
    picks = [next((o for o in q.options if o.choice is found.choices.get(q.site.key)), None) for q in problem.questions]
    objective, price = cost(problem, picks)
    assert objective <= best + 2e-4 * abs(best) + 1e-6
    assert found.price == pytest.approx(price)
    assert problem.budget is None or price <= problem.budget
    saved = sum(o.choice.bytes_saved for o in picks if o is not None)
    made = sum(o is not None for o in picks)
    total = sum(q.seconds for q in problem.questions)
    assert found.seconds == pytest.approx(objective + problem.rate * saved - LEAST * total * made)
    assert found == plan(problem.questions, problem.values, problem.prices, problem.budget, problem.rate)


# --- questions from a graph --------------------------------------------------------------------

NET = """g (float[1, 32, 28, 28] x) => (float[1, 32, 28, 28] y, float[1, 32, 28, 28] z) {
  c = Conv <pads = [1, 1, 1, 1]> (x, w)  a = Relu (c)
  z = Sin (a)
  y = Conv <pads = [1, 1, 1, 1]> (a, v)
}"""
SHAPE = (1, 32, 28, 28)


def asked(body: str, weights: Mapping[str, Array]) -> tuple[GraphView, list[Question], dict[str, ValueCost], CostModel]:
    view = GraphView(text(body, weights))
    profile = load_profile("host-x86-vnni")
    cost = CostModel(profile)
    offer = offers(Quantize(), view, profile.target(), synthetic=False)
    questions, values, missing = ask(offer, view, cost, shapes_of(view), lambda choice: None)
    assert not missing
    return view, questions, values, cost


def shapes_of(view: GraphView) -> dict[str, tuple[int, ...]]:
    return value_shapes(view.model, {"x": normal(0, *SHAPE)})


CONVOLUTIONS = {"w": normal(0, 32, 32, 3, 3), "v": normal(1, 32, 32, 3, 3)}


def test_who_reads_a_value_as_float() -> None:
    """Sin and the end of the model do, whatever is chosen; a convolution only if it stays float."""
    _, questions, values, _ = asked(NET, CONVOLUTIONS)
    assert [(q.site.key, q.site.nodes) for q in questions] == [("node", ("node", "node_1")), ("node_3", ("node_3",))]
    assert {n: (v.float_readers, v.readers) for n, v in values.items()} == {
        "x": (0, ("node",)),
        "a": (1, ("node_3",)),
        "y": (1, ()),
    }
    assert all(v.quantize > 0 and v.dequantize > 0 for v in values.values())


@pytest.mark.parametrize("left_out", [(), ("node",), ("node_3",)])
def test_a_plan_costs_what_its_graph_costs(left_out: tuple[str, ...]) -> None:
    """Predicted from questions, and counted on the rewritten graph.

    Not to the last nanosecond: beforehand every conversion of a map counts as changing its layout, on the graph only
    those do that stand beside a convolution; and reorders of float maps that come or go are nobody's.
    """
    view, questions, values, cost = asked(NET, CONVOLUTIONS)
    only = [
        Question(
            q.site,
            q.seconds,
            ()
            if q.site.key in left_out
            else tuple(Option(o.choice, o.seconds - 1) for o in q.options if o.choice.name == "static"),
        )
        for q in questions
    ]  # a second cheaper, so that it is chosen
    found = plan(only, values)
    assert len(found.choices) == 2 - len(left_out)
    made_up = [{"x": normal(i, *SHAPE)} for i in range(2)]
    after = made(Quantize(), view.model, dict.fromkeys(found.choices, "static"), made_up)
    before, real = (cost.model(v, shapes_of(v)).seconds for v in (view, GraphView(after)))
    predicted = found.seconds_before - found.seconds - len(found.choices)
    assert 0.9 * predicted <= before - real <= 1.15 * predicted


def test_without_real_data_only_what_needs_none_is_offered() -> None:
    view = GraphView(text(NET, CONVOLUTIONS))
    target = load_profile("host-x86-vnni").target()
    real, made_up, plain = (
        offers(Quantize(), view, target, synthetic=s, float_only=f)
        for s, f in ((False, False), (True, False), (False, True))
    )
    assert {c.name for cs in real.choices.values() for c in cs} == {"weights", "static"}
    assert {c.name for cs in made_up.choices.values() for c in cs} == {"weights"}
    assert {c.name for cs in plain.choices.values() for c in cs} == {"weights"}
    ranges = offers(Quantize(modes=("static",)), view, target, synthetic=True)
    assert not ranges.choices
    assert {s.reason for s in ranges.skipped if s.key != "node_2"} == {
        "it needs ranges from real data, and there is no calibration data"
    }


def test_what_c_code_prints_while_solving_stays_off_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints a line of its own now and then; --json promises one document and nothing else."""
    libc = ctypes.CDLL(None)
    with planner._stdout_kept_clean():
        libc.puts(b"from a solver")
    libc.puts(b"from elsewhere")
    libc.fflush(None)
    assert capfd.readouterr().out == "from elsewhere\n"
