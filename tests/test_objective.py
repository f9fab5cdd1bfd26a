"""What a run aims at: words, prices, plans, and which result is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from models import normal, text

import onnxcompress
from onnxcompress import Budget, Objective, Result, cli, footprint, registry
from onnxcompress import model as models
from onnxcompress.base import KEEP, Choice, Pass, Precision, Site, Skip, Stage, Term
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.errors import UsageError
from onnxcompress.evaluate import compare
from onnxcompress.objective import BYTES_WORTH, DEFAULT, TARGETS, Spent
from onnxcompress.planner import Option, Plan, Question, ValueCost, solve
from onnxcompress.profile import load_profile
from onnxcompress.questions import Offer, ask, explain, offers
from onnxcompress.rewrite import Rewriter
from onnxcompress.search import Checked, Search
from onnxcompress.sensitivity import Prices
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

PROFILE, POWERED = "host-x86-vnni", "cortex-a76"
SPENT = Spent(seconds=2.0, file_bytes=1000, download_bytes=800, memory_bytes=5000, joules=4.0)
"""A model: 2 s, 1 kB of weights that pack to 800, 5 kB in memory, 2 W."""


# --- words ---------------------------------------------------------------------------------------


def test_the_default_is_latency_with_a_little_for_bytes() -> None:
    assert DEFAULT == Objective.parse("latency") == Objective(latency=1, size=0.5)
    assert not DEFAULT.for_files and not DEFAULT.by_bytes and DEFAULT.bytes_aimed_at == ""


@pytest.mark.parametrize("name", TARGETS)
def test_a_name_weighs_what_it_says_most(name: str) -> None:
    found = Objective.parse(f" {name} ")
    assert found.weights[name] == 1
    assert all(w < 1 for other, w in found.weights.items() if other != name)
    assert found.for_files == (name in ("size", "download"))
    assert found.bytes_aimed_at == (name if name in ("size", "download", "memory") else "")


@pytest.mark.parametrize(
    ("spec", "weights", "for_files"),
    [
        ("latency=1,size=0.5", {"latency": 1, "size": 0.5}, False),
        (" latency = 2 , size = 1.01 ", {"latency": 2, "size": 1.01}, True),
        ("energy=1,size=0.5", {"energy": 1, "size": 0.5}, False),
        ("latency=1,download=0.001", {"latency": 1, "download": 0.001}, True),
        ("memory=3", {"memory": 3}, False),
        ("size=1e-3", {"size": 1e-3}, True),
        ("latency=1,size=0", {"latency": 1}, False),
    ],
)
def test_a_mix(spec: str, weights: Mapping[str, float], for_files: bool) -> None:
    found = Objective.parse(spec)
    assert {k: v for k, v in found.weights.items() if v} == weights
    assert found.for_files == for_files


WRONG = {
    "sizes": "did you mean 'size'",
    "quick": "known: download, energy, latency, memory, size",
    "": "no target is called ''",
    "latency,size": "latency has no weight",
    "latency=1,sise=1": "did you mean 'size'",
    "latency=1,": "there is no ''",
    "latency=1,latency=2": "latency has two weights",
    "size=much": "'much' is no number",
    "size=": "'' is no number",
    "size=-1": "no weight is negative",
    "size=nan": "weight of size is nan",
    "size=inf": "weight of size is inf",
    "size=0": "weighs nothing",
    "latency=0,size=0": "weighs nothing",
}


@pytest.mark.parametrize("spec", WRONG)
def test_what_is_no_target_is_said(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        Objective.parse(spec)
    assert WRONG[spec] in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "1"])
def test_weights_are_checked_in_python_too(value: Any) -> None:
    with pytest.raises(UsageError, match="size"):
        Objective(latency=1, size=value)


# --- prices --------------------------------------------------------------------------------------


def choice(key: str, name: str = "it", saved: int = 0, **more: Any) -> Choice:
    return Choice(Site(key, (key,)), name, bytes_saved=saved, **more)


def test_default_rates_are_seconds_and_half_of_the_sites_time_for_all_bytes() -> None:
    rates = DEFAULT.rates(SPENT, 1.5)
    assert rates.file_byte == BYTES_WORTH * 1.5 / 1000
    assert rates.running(0.3, 99.0) == 0.3 and rates.joules(99.0, 0.3) == 0
    assert rates.worth(choice("a", saved=100)) == pytest.approx(0.075)
    assert rates.counted(choice("a", saved=100)) == 0, "bytes choose between options, and rank no plans"
    assert rates.total == 2.0


@pytest.mark.parametrize(
    ("weights", "option", "worth"),
    [
        ("size=1", choice("a", saved=100), 0.1),
        ("download=1", choice("a", saved=100), 0.1),  # packs like the rest
        ("download=1", choice("a", saved=100, download_saved=40), 40 / 800),
        ("memory=1", choice("a", saved=100), 100 / 5000),
        ("memory=1", choice("a", saved=100, resident_saved=0), 0.0),
        ("size=1,download=2,memory=5", choice("a", saved=100, download_saved=80), 0.1 + 0.2 + 0.1),
    ],
)
def test_bytes_are_worth_their_share_of_the_model(weights: str, option: Choice, worth: float) -> None:
    rates = Objective.parse(weights).rates(SPENT, 0.7)
    assert rates.worth(option) / SPENT.seconds == pytest.approx(worth)
    assert rates.counted(option) == rates.worth(option)


def test_energy_is_priced_as_a_share_and_unknown_energy_at_mean_power() -> None:
    rates = Objective.parse("energy=1").rates(SPENT, 2.0)
    assert rates.running(1.0, 4.0) == pytest.approx(2.0), "all of the energy is worth as much as all of the time"
    assert rates.joules(None, 0.5) == 1.0 and rates.joules(0.25, 0.5) == 0.25


def test_the_parts_of_a_whole_add_up() -> None:
    objective = Objective(latency=1, size=2, download=3, memory=4, energy=5)
    assert objective.value(SPENT, SPENT) == 15
    half = Spent(1.0, 500, 400, 2500, 2.0)
    assert objective.value(half, SPENT) == 7.5
    assert objective.rates(SPENT, 2.0).total / SPENT.seconds == pytest.approx(15)
    assert DEFAULT.value(replace(SPENT, file_bytes=1), SPENT) == 1, "by default whole results are compared by time"


# --- plans ---------------------------------------------------------------------------------------


def plan(
    target: str, *options: tuple[str, float, int, float], budget: float | None = None, **more: Any
) -> tuple[str, Plan]:
    """What is chosen at one site that takes 1 s and 2 J; options are (name, seconds, bytes saved, price)."""
    made = tuple(
        Option(choice("a", name, saved, terms=(Term("t", name),), **more), seconds, 2 * seconds)
        for name, seconds, saved, _ in options
    )
    question = Question(Site("a", ("a",)), 1.0, made, joules=2.0)
    prices = {Term("t", name): price for name, _, _, price in options}
    rates = Objective.parse(target).rates(SPENT, 1.0)
    found = solve([question], {}, prices, budget=budget, rates=rates)
    assert found is not None
    return (found.choices["a"].name if found.choices else KEEP), found


FAST, SMALL, BOTH = ("fast", 0.2, 0, 1.0), ("small", 1.2, 900, 1.0), ("some of both", 0.6, 500, 1.0)


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        ("latency", "fast"),
        ("size", "small"),
        ("download", "small"),
        ("memory", "small"),
        ("energy", "fast"),
        ("latency=1,size=1", "small"),
        ("latency=2,size=1.2", "some of both"),
        ("latency=10,size=6", "some of both"),
        ("latency=100,size=1", "fast"),
    ],
)
def test_the_target_decides(target: str, taken: str) -> None:
    assert plan(target, FAST, SMALL, BOTH)[0] == taken


def test_of_plans_that_hold_the_fewest_bytes_win() -> None:
    ladder = (("8", 1.0, 700, 1.0), ("6", 1.0, 780, 2.0), ("4", 1.0, 860, 4.0), ("2", 1.0, 930, 16.0))
    assert [plan("size", *ladder, budget=b)[0] for b in (None, 15.0, 3.9, 1.0, 0.5)] == ["2", "4", "6", "8", KEEP]
    name, found = plan("size", *ladder, budget=5.0)
    assert name == "4"
    assert found.seconds == found.seconds_before == 1.0, "what bytes are worth is no time"
    assert found.value < found.value_before


def test_at_equal_size_the_faster_wins() -> None:
    """All weigh the same, and even the slowest is worth its bytes."""
    options = (("slow", 1.5, 700, 1.0), ("fast", 0.3, 700, 1.0), ("as before", 1.0, 700, 1.0))
    assert plan("size", *options)[0] == plan("download", *options)[0] == plan("memory", *options)[0] == "fast"


@pytest.mark.parametrize("target", TARGETS)
def test_noise_without_return_is_not_worth_having(target: str) -> None:
    assert plan(target, ("idle", 1.0, 0, 1.0))[0] == KEEP
    assert plan("size", ("next to nothing", 1.0, 0, 1.0), ("little", 1.0, 1, 1.0))[0] == "little"
    assert plan("memory=1", ("unpacked at load", 1.0, 750, 1.0), resident_saved=0)[0] == KEEP
    assert plan("size", ("unpacked at load", 1.0, 750, 1.0), resident_saved=0)[0] == "unpacked at load"


def test_bytes_of_a_thousandth_of_a_per_cent_are_not_worth_noise() -> None:
    spent = replace(SPENT, file_bytes=10**8)
    question = Question(Site("a", ("a",)), 1.0, (Option(choice("a", saved=1000), 1.0),))
    rates = TARGETS["size"].rates(spent, 1.0)
    found = solve([question], {}, {}, budget=None, rates=rates)
    assert found is not None and not found.choices


def test_joules_and_not_seconds_count_where_energy_does() -> None:
    """A kernel that takes as long and draws less."""
    cool, hot = Option(choice("a", "cool"), 1.0, 0.5), Option(choice("a", "hot"), 0.9, 2.5)
    question = Question(Site("a", ("a",)), 1.0, (cool, hot), joules=2.0)
    taken = {}
    for target in ("latency", "energy"):
        found = solve([question], {}, {}, budget=None, rates=Objective.parse(target).rates(SPENT, 1.0))
        assert found is not None
        taken[target] = found.choices["a"].name
    assert taken == {"latency": "hot", "energy": "cool"}


def test_conversions_take_energy_at_mean_power() -> None:
    made = choice("a", reads=("x",))
    question = Question(Site("a", ("a",)), 1.0, (Option(made, 0.5, 1.0),), joules=2.0)
    rates = Objective.parse("energy=1").rates(SPENT, 1.0)
    for seconds, taken in ((0.45, True), (0.55, False)):
        values = {"x": ValueCost(seconds, seconds, 0, ("a",))}
        found = solve([question], values, {}, budget=None, rates=rates)
        assert found is not None and bool(found.choices) == taken


# --- which plan a search keeps ---------------------------------------------------------------------


@dataclass(frozen=True)
class Mark(Pass):
    """Leaves a mark on a node."""

    name: ClassVar[str] = "mark"

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return []

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        rewriter.set_attribute(rewriter.node(choice.site.key), "mark", choice.name)


@pytest.mark.parametrize("target", ["size", "latency"])
def test_the_search_keeps_the_plan_that_is_best_by_the_target(target: str) -> None:
    """Bytes do not change the time, so only a search that looks at them moves its limit up again."""
    model = text("g (float[2] v0) => (float[2] v4) { v1 = Relu (v0) v2 = Relu (v1) v3 = Relu (v2) v4 = Relu (v3) }")
    harm = {f"n{i} {name}": h * f for i, h in enumerate((0.05, 0.004, 0.004, 0.004)) for name, f in
            (("half", 0.1), ("all", 1.0))}  # fmt: skip
    questions = []
    for i, node in enumerate(model.graph):
        node.name = key = f"n{i}"
        options = [choice(key, "half", 100, terms=(Term("t", f"{key} half"),)),
                   choice(key, "all", 200, terms=(Term("t", f"{key} all"),))]  # fmt: skip
        questions.append(Question(Site(key, (key,)), 0.5, tuple(Option(o, 0.5) for o in options)))

    def check(candidate: ir.Model) -> Checked:
        marks = {str(n.name): n.attributes.get_string("mark", "") for n in candidate.graph if "mark" in n.attributes}
        noise = sum(harm[f"{k} {v}"] for k, v in marks.items())
        decibels = -10 * math.log10(noise) if noise else math.inf
        return Checked(decibels, None, "" if noise <= 0.01 else "too loud")

    def price(terms: Sequence[Term], evidence: Evidence, samples: int) -> Prices:
        return Prices({t: harm[t.subject] * (0.5 if t.subject.startswith("n0") else 1) for t in terms}, (), {})

    rates = Objective.parse(target).rates(SPENT, 2.0)
    search = Search(model, Mark(), questions, {}, 0.01, rates, lambda c: Evidence(), price, check)
    search.weighed = lambda choices: 1000 - sum(c.bytes_saved for c in choices)
    found = search.run()
    accepted = [a.predicted_bytes for a in search.attempts if a.verdict == "accepted"]
    saved = sum(c.bytes_saved for c in found.plan.choices.values())
    assert found.built is not None and None not in accepted
    if target == "size":
        assert len(accepted) > 1 and 1000 - saved == min(a for a in accepted if a is not None) < (accepted[0] or 0)
    else:
        assert len(accepted) == 1, "every plan takes the same time"


# --- what is offered -------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "offered"), [("latency", False), ("size", True), ("download", True)])
def test_a_width_that_saves_bytes_and_no_time_is_an_option_where_bytes_count(target: str, offered: bool) -> None:
    """15 of 16 channels: the kernel works on sixteen at once."""
    weights = {"w": normal(0, 16, 16, 3, 3), "r": normal(1, 16, 16, 3, 3)}
    body = "h = Conv <pads=[1,1,1,1]> (x, w) y = Conv <pads=[1,1,1,1]> (h, r)"
    model = text(f"g (float[1,16,8,8] x) => (float[1,16,8,8] y) {{ {body} }}", weights)
    shapes, cost = value_shapes(model, {"x": normal(2, 1, 16, 8, 8)}), CostModel(load_profile(PROFILE))
    view = GraphView(model)
    site = Site.of(view.nodes("Conv")[0])
    narrower = choice(site.key, "15", 4 * 2 * 16 * 9, resizes=(("w", 0, 15), ("r", 1, 15), ("h", 1, 15)))
    offer = Offer({site: (replace(narrower, site=site),)}, ())
    total = cost.model(view, shapes, compressed=True)
    spent = Spent(total.seconds, total.weight_bytes, total.zstd_bytes, None, None)
    rates = Objective.parse(target).rates(spent, total.seconds)
    (question,), _, missing = ask(offer, view, cost, shapes, lambda c: None, rates=rates)
    assert bool(question.options) == offered
    assert offered or missing == {site.key: "no smaller width is predicted faster here"}
    (question,), _, _ = ask(offer, view, cost, shapes, lambda c: None, rates=rates, gains_only=False)
    assert question.options, "by hand it is the user's word"


def test_a_site_that_stays_says_what_its_bytes_were() -> None:
    question = Question(Site("n", ("n",)), 1.0, (Option(choice("n", "4 bits", 90, terms=(Term("t", "n"),)), 1.0),))
    view = GraphView(text("g (float[2] x) => (float[2] y) { [n] y = Relu (x) }"))
    empty = Plan({}, 1.0, 1.0, 0.0)
    rates = TARGETS["size"].rates(replace(SPENT, file_bytes=10**6), 1.0)
    (row,) = explain(Mark(), Offer({}, ()), [question], empty, empty, {}, {}, {}, view, (), "", rates=rates)
    assert row.decision == KEEP and row.reason.startswith("4 bits would save 90 bytes: too little")


# --- whole runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store(Pass):
    """Weights as float16 or int8 in the file, float32 in memory."""

    name: ClassVar[str] = "store"
    stage: ClassVar[Stage] = Stage.STORE
    for_size: ClassVar[bool] = True
    runs: ClassVar[list[int]] = []

    def sites(self, view: GraphView) -> Iterable[Site]:
        for value in view.weights():
            tensor, readers = view.weight(value), [n for n, _ in view.consumers(value)]
            if tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size > 99 and readers:
                yield Site(str(value.name), tuple(dict.fromkeys(str(n.name) for n in readers)))

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        size = next(v.const_value.size for v in view.weights() if v.name == site.key and v.const_value is not None)
        return [
            Choice(site, name, bytes_saved=saved * size, resident_saved=0, stored=True, effects=False)
            for name, saved in (("half", 2), ("int8", 3))
        ]

    def apply_all(
        self, choices: Sequence[Choice], rewriter: Rewriter, evidence: Evidence
    ) -> Mapping[Choice, str | Choice]:
        self.runs.append(len(choices))
        return super().apply_all(choices, rewriter, evidence)

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        value = rewriter.value(choice.site.key)
        assert value.const_value is not None
        array = value.const_value.numpy()
        readers = [(rewriter.node(name), i) for name in choice.site.nodes for i, v in
                   enumerate(rewriter.node(name).inputs) if v is value]  # fmt: skip
        scale = 1.0 if choice.name == "half" else float(np.abs(array).max() / 127)
        packed = array.astype(np.float16) if choice.name == "half" else np.round(array / scale).astype(np.int8)
        stored = rewriter.constant(packed, f"{choice.site.key}_{choice.name}")
        first = rewriter.model.graph[0]
        (wide,) = rewriter.insert("Cast", [stored], {"to": 1}, before=first, dtype=ir.DataType.FLOAT)
        factor = rewriter.constant(np.asarray(scale, np.float32), f"{choice.site.key}_scale")
        (back,) = rewriter.insert("Mul", [wide, factor], after=wide, dtype=ir.DataType.FLOAT)
        for node, index in readers:
            rewriter.set_input(node, index, back)


@dataclass(frozen=True)
class Int8(Pass):
    """Stands for what makes kernels faster: rounds the weights, and says how fast that is."""

    name: ClassVar[str] = "int8"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    ops: ClassVar[tuple[str, ...]] = ("MatMul",)
    digits: int = 2

    def match(self, node: ir.Node, view: GraphView) -> Site:
        if not view.is_float_weight(node.inputs[1]):
            raise Skip("its second input is not a constant")
        return Site.of(node)

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        kept = Choice(site, "weights", bytes_saved=100, resident_saved=0, stored=True, effects=False)
        return [kept, Choice(site, "dynamic", Precision.DYNAMIC, bytes_saved=100, effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        tensor = rewriter.own_weight(node, 1).const_value
        assert tensor is not None
        rewriter.set_weight(node, 1, np.round(tensor.numpy(), self.digits).astype(np.float32))


@dataclass(frozen=True)
class Thin(Pass):
    """Writes a matrix as the product of a column and a row; exact where its rank is one."""

    name: ClassVar[str] = "thin"
    stage: ClassVar[Stage] = Stage.FACTORIZE
    ops: ClassVar[tuple[str, ...]] = ("MatMul",)

    def match(self, node: ir.Node, view: GraphView) -> Site:
        if not view.is_float_weight(node.inputs[1]):
            raise Skip("its second input is not a constant")
        return Site.of(node)

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return [Choice(site, "rank 1")]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
        assert tensor is not None
        u, s, v = np.linalg.svd(tensor.numpy())
        column = rewriter.constant(np.asarray(u[:, :1] * s[0], np.float32), "column")
        (thin,) = rewriter.insert("MatMul", [node.inputs[0], column], before=node, dtype=ir.DataType.FLOAT)
        row = rewriter.constant(np.asarray(v[:1], np.float32), "row")
        (result,) = rewriter.insert("MatMul", [thin, row], before=node, dtype=ir.DataType.FLOAT)
        rewriter.replace_node(node, result)


SIZE = 96
FEEDS = [{"x": normal(10 + i, 8, SIZE)} for i in range(8)]


def network(*kinds: str) -> ir.Model:
    """Products with matrices of full rank, or of rank one."""
    weights = {}
    for i, kind in enumerate(kinds):
        full = normal(i, SIZE, SIZE) / 10
        weights[f"w{i}"] = np.outer(full[0], full[1]).astype(np.float32) * 10 if kind == "thin" else full
    count = len(kinds)
    body = "  ".join(f"v{i + 1} = MatMul ({'x' if i == 0 else f'v{i}'}, w{i})" for i in range(count))
    body = body.replace(f"v{count} =", "y =")
    return text(f"g (float[8,{SIZE}] x) => (float[8,{SIZE}] y) {{ {body} }}", weights)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes passes the only ones that are installed."""
    Store.runs.clear()

    def install(*passes: type[Pass]) -> None:
        monkeypatch.setattr(registry, "available", lambda: {p.name: p for p in passes})

    return install


def optimize(model: ir.Model, target: str | Objective = "latency", profile: str = PROFILE, **options: Any) -> Result:
    return onnxcompress.optimize(model, profile=profile, calibration=FEEDS, timing=False, target=target, **options)


def decisions(result: Result, name: str) -> dict[str, str]:
    return {s.key: s.decision for s in result.report.sites if s.pass_name == name}


def reasons(result: Result, name: str) -> set[str]:
    return {s.reason for s in result.report.sites if s.pass_name == name and s.decision == KEEP}


def outcome(result: Result, name: str) -> tuple[str, str]:
    (found,) = (p for p in result.report.passes if p.name == name)
    return found.outcome, found.reason


@pytest.mark.parametrize(
    ("target", "stores"),
    [
        ("latency", False),
        ("latency=1,size=0.5", False),
        ("memory", False),
        ("latency=1,size=0.6", True),
        ("size", True),
        ("download", True),
    ],
)
def test_what_only_makes_files_smaller_runs_where_files_are_aimed_at(
    use: Callable[..., None], target: str, stores: bool
) -> None:
    use(Store)
    result = optimize(network("full", "full"), target)
    assert decisions(result, "store") == (dict.fromkeys(("w0", "w1"), "int8") if stores else {})
    before, after = result.report.totals.file_bytes
    assert (before > 3 * after) == stores


def test_by_hand_it_runs_whatever_the_target_is_and_bytes_rank_its_plans(use: Callable[..., None]) -> None:
    use(Store)
    result = optimize(network("full"), passes=[Store()])
    assert decisions(result, "store") == {"w0": "int8"}
    assert result.report.attempts[0].predicted_bytes == SIZE * SIZE


def test_the_budget_decides_how_small(use: Callable[..., None]) -> None:
    """Int8 is at some 40 dB here, float16 beyond 60."""
    use(Store)
    names = [
        set(decisions(optimize(network("full"), "size", budget=Budget(min_sqnr_db=d)), "store").values())
        for d in (20, 50, 100)
    ]
    assert names == [{"int8"}, {"half"}, {KEEP}]


def test_storing_is_left_to_the_pass_that_stores_smaller(use: Callable[..., None]) -> None:
    use(Int8, Store)
    stored = Target("t", kernels=frozenset({("MatMul", "dynamic")}))
    view = GraphView(network("full"))
    here = offers(Int8(), view, stored, synthetic=False, stored_by="store")
    assert [c.name for choices in here.choices.values() for c in choices] == ["dynamic"]
    nothing = offers(Store(), view, stored, synthetic=False, stored_by="other")
    assert not nothing.choices and {s.reason for s in nothing.skipped} == {"stored smaller by a later pass: other"}
    by_hand = optimize(network("full"), passes=[Int8(), Store()])
    assert decisions(by_hand, "int8") == {view.nodes("MatMul")[0].name: "dynamic"}


def test_files_alone_leave_nothing_to_what_runs_faster(use: Callable[..., None]) -> None:
    use(Int8, Store)
    result = optimize(network("full", "full"), "size")
    assert outcome(result, "int8")[0] == "nothing to do"
    assert reasons(result, "int8") == {"the target leaves nearly all of the accuracy budget to store"}
    assert set(decisions(result, "store").values()) == {"int8"}


@dataclass(frozen=True)
class Coarse(Int8):
    """One digit: the outputs are at some 11 dB."""

    name: ClassVar[str] = "coarse"
    digits: int = 1


@pytest.mark.parametrize(("target", "outcome_of_coarse"), [("latency", "applied"), ("latency=1,size=1", "dropped")])
@pytest.mark.parametrize("by_metric", [False, True])
def test_a_mix_divides_the_budget(
    use: Callable[..., None], by_metric: bool, target: str, outcome_of_coarse: str
) -> None:
    """Noise of .083, within a budget of .12, and not within half of it."""
    use(Coarse, Store)
    model = network("full")

    def metric(path: str) -> float:
        return 1 - 10 ** (-compare(model, path, FEEDS).min_sqnr_db / 10)

    options: dict[str, Any] = {"budget": Budget(min_sqnr_db=-10 * math.log10(0.12))}
    if by_metric:
        options = {"budget": Budget(max_drop=0.12), "metric": metric}
    result = optimize(model, target, **options)
    assert outcome(result, "coarse")[0] == outcome_of_coarse
    if target != "latency":
        assert "12.2 dB asked for" in outcome(result, "coarse")[1] or "below 0.94" in outcome(result, "coarse")[1]
        assert set(decisions(result, "store").values()) == {"int8"}, "what is left is for storing"
    by_hand = optimize(model, target, passes=[Coarse(), Store()], **options)
    assert outcome(by_hand, "coarse")[0] == "applied", "who names passes has divided nothing"


def test_factors_are_kept_where_the_whole_gets_smaller_and_storing_runs_again_only_then(
    use: Callable[..., None],
) -> None:
    use(Thin, Store)
    result = optimize(network("thin", "full"), "size")
    assert list(decisions(result, "thin").values()) == ["rank 1", KEEP]
    assert "w1" in decisions(result, "store") and "w0" not in decisions(result, "store")
    assert len(Store.runs) == 2
    without = optimize(network("thin", "full"), "size", passes=[Store()])
    assert result.report.totals.file_bytes[1] < 0.6 * without.report.totals.file_bytes[1]
    Store.runs.clear()
    result = optimize(network("full", "full"), "size")
    assert set(decisions(result, "thin").values()) == {KEEP}
    assert len(Store.runs) == 1


@dataclass(frozen=True)
class Wide(Thin):
    """Writes a matrix as a product with the identity: exact, and larger."""

    name: ClassVar[str] = "wide"

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return [Choice(site, "wide", bytes_saved=SIZE * SIZE, effects=False)]  # so it says

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        eye = rewriter.constant(np.eye(SIZE, dtype=np.float32), "eye")
        (same,) = rewriter.insert("MatMul", [node.inputs[0], eye], before=node, dtype=ir.DataType.FLOAT)
        rewriter.set_input(node, 0, same)


@pytest.mark.parametrize("target", ["size", "download", "memory", "latency=1,size=1"])
def test_what_makes_the_whole_larger_is_not_kept_and_nothing_is_stored_for_it(
    use: Callable[..., None], target: str
) -> None:
    use(Wide, Store)
    result = optimize(network("full", "full"), target)
    assert outcome(result, "wide")[0] == "dropped"
    assert "as much of what is aimed at, or more" in outcome(result, "wide")[1]
    assert Store.runs == ([] if target == "memory" else [2])


def test_two_runs_give_the_same_bytes_and_the_same_report(use: Callable[..., None], tmp_path: Path) -> None:
    use(Thin, Int8, Store)
    found = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.onnx"
        result = optimize(network("thin", "full", "full"), "latency=1,size=1,download=1", output=path)
        found.append((path.read_bytes(), result.report.to_json()))
    assert found[0] == found[1]


def test_the_target_may_be_a_text_or_an_objective(use: Callable[..., None]) -> None:
    use(Store)
    results = [optimize(network("full"), t) for t in ("size", TARGETS["size"])]
    assert models.serialize(results[0].model) == models.serialize(results[1].model)
    with pytest.raises(UsageError, match="target is 3"):
        optimize(network("full"), 3)  # type: ignore[arg-type]


def test_energy_needs_a_profile_that_knows_it(use: Callable[..., None]) -> None:
    use(Int8)
    for target in ("energy", "latency=1,energy=0.1"):
        with pytest.raises(UsageError, match="has no prices for it"):
            optimize(network("full"), target)
    result = optimize(network("full"), "energy", profile=POWERED)
    assert set(decisions(result, "int8").values()) == {"dynamic"}


def test_what_takes_less_energy_is_kept(use: Callable[..., None]) -> None:
    use(Thin)
    result = optimize(network("thin", "full"), "energy", profile=POWERED)
    assert list(decisions(result, "thin").values()) == ["rank 1", KEEP]
    assert result.report.totals.energy_mj is not None
    before, after = result.report.totals.energy_mj
    assert before > 1.2 * after > 0


# --- what is said of it --------------------------------------------------------------------------


def test_the_report_has_the_target_memory_and_energy(use: Callable[..., None]) -> None:
    use(Store)
    model = network("full")
    report = optimize(model, "size", profile=POWERED).report
    document = json.loads(report.to_json())
    assert document["target"] == {"latency": 0.01, "size": 1.0, "download": 0.0, "memory": 0.0, "energy": 0.0}
    assert report.totals.memory_bytes is not None
    weights, maps = 4 * SIZE * SIZE, 2 * 4 * 8 * SIZE
    assert report.totals.memory_bytes == (weights + maps, weights + maps), "multiplied out at load"
    assert [a.predicted_bytes for a in report.attempts] == [SIZE * SIZE]
    assert optimize(model).report.totals.energy_mj is None
    default = json.loads(optimize(model).report.to_json())
    assert default["target"] == {"latency": 1.0, "size": 0.5, "download": 0.0, "memory": 0.0, "energy": 0.0}


def test_memory_is_what_is_there_once_it_is_loaded() -> None:
    """Int8 weights of an integer kernel stay; those that are multiplied out at load are float then."""
    weights = {"q": normal(0, 64, 32).astype(np.int8), "s": np.float32([0.5]), "w": normal(1, 32, 8)}
    product = "f = Cast<to=1> (q) m = Mul (f, s) h = MatMul (x, m) y = MatMul (h, w)"
    model = text(f"g (float[4,64] x) => (float[4,8] y) {{ {product} }}", weights)
    view, shapes = GraphView(model), value_shapes(model, {"x": normal(2, 4, 64)})
    profile = load_profile(PROFILE)
    assert footprint.resident_bytes(profile, view, shapes) == 4 * 64 * 32 + 4 * 32 * 8
    runtime = profile.runtime.model_copy(update={"folds_constants": False})
    slow = profile.model_copy(update={"runtime": runtime})
    assert footprint.resident_bytes(slow, view, shapes) == 64 * 32 + 4 + 4 * 32 * 8
    zero = {"z": np.int8([0])}
    body = "m = DequantizeLinear (q, s, z) h = MatMul (x, m) y = MatMul (h, w)"
    model = text(f"g (float[4,64] x) => (float[4,8] y) {{ {body} }}", {**weights, **zero})
    assert footprint.resident_bytes(profile, GraphView(model), shapes) == 64 * 32 + 4 + 1 + 4 * 32 * 8


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["optimize", str(tmp_path / "m.onnx"), "--profile", PROFILE, *arguments])
        found = capsys.readouterr()
        return status, found.out, found.err

    models.save(network("full"), tmp_path / "m.onnx")
    np.savez(tmp_path / "f.npz", x=np.stack([f["x"] for f in FEEDS]))
    return run


@pytest.mark.parametrize("spec", [s for s in WRONG if s])
def test_a_wrong_target_is_one_clear_error(call: Call, tmp_path: Path, spec: str) -> None:
    status, _, err = call("--target", spec)
    assert status == 2 and WRONG[spec] in " ".join(err.split()) and "Traceback" not in err
    assert not list(tmp_path.glob("*optimized*"))


def test_energy_that_nobody_knows_is_one_clear_error(call: Call) -> None:
    status, _, err = call("--target", "energy")
    assert status == 2 and "has no prices for it" in " ".join(err.split())


def test_the_command_line_aims(call: Call, tmp_path: Path, use: Callable[..., None]) -> None:
    use(Store)
    status, out, _ = call("--target", "size", "--calibration", str(tmp_path / "f.npz"))
    assert status == 0
    assert "target: latency=0.01,size=1" in out and "memory, predicted" in out
    assert "weights" in out.partition("Attempts")[2].splitlines()[1]
    status, out, _ = call("--calibration", str(tmp_path / "f.npz"))
    assert status == 0 and "target: latency=1,size=0.5" in out
