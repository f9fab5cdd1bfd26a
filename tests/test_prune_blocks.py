"""Layer pruning: which branches are blocks, what is left when they go, and what it loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from models import TARGET, Array, check, learn, made, normal, ops, run, text, wiring

import onnxcompress
from onnxcompress.base import Choice, Site, Skipped, Term
from onnxcompress.errors import PassOptionError
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.objective import Rates
from onnxcompress.passes.prune_blocks import PruneBlocks
from onnxcompress.planner import Option, Question, solve
from onnxcompress.questions import ask, offers
from onnxcompress.registry import parse
from onnxcompress.report import Budget
from onnxcompress.rewrite import Rewriter
from onnxcompress.sensitivity import measure_prices
from onnxcompress.trial import build
from onnxcompress.view import GraphView

EVERYTHING = PruneBlocks()
CONV = {"w0": normal(0, 4, 3, 3, 3), "b0": normal(1, 4), "w1": normal(2, 4, 4, 3, 3), "b1": normal(3, 4) + 3}
CONV_NET = """g (float[1,3,6,6] x) => (float[1,4,6,6] y) {
  stem = Conv <pads = [1,1,1,1]> (x, w0, b0)
  r = Relu (stem)
  f = Conv <pads = [1,1,1,1]> (r, w1, b1)
  sum = Add (stem, f)
  y = Relu (sum)
}"""


def feeds(count: int = 4, *shape: int, seed: int = 7) -> list[dict[str, Array]]:
    return [{"x": normal(seed + i, *(shape or (1, 3, 6, 6)))} for i in range(count)]


def blocks(model: ir.Model) -> dict[str, tuple[str, ...]]:
    view = GraphView(model)
    return {s.key: s.nodes for s in EVERYTHING.sites(view) if isinstance(s, Site)}


def reasons(model: ir.Model) -> list[str]:
    return [s.reason for s in EVERYTHING.sites(GraphView(model)) if isinstance(s, Skipped)]


def named(body: str, weights: dict[str, Array]) -> ir.Model:
    """A model whose nodes are called like what they make."""
    model = text(body, weights)
    for node in model.graph.all_nodes():
        node.name = node.outputs[0].name
    return model


def mean_of(model: ir.Model, value: str, samples: Sequence[dict[str, Array]], axes: tuple[int, ...]) -> Array:
    copy = onnxcompress.model.clone(model)
    copy.graph.outputs.append(Rewriter(copy).value(value))
    return np.asarray(np.mean([run(copy, f)[value].astype(np.float64).mean(axes) for f in samples], axis=0))


# --- what goes -------------------------------------------------------------------------------------


def test_a_convolution_block_leaves_its_mean_in_the_bias_before_it() -> None:
    model, data = named(CONV_NET, CONV), feeds()
    assert blocks(model) == {"sum": ("sum", "r", "f")}
    after = made(EVERYTHING, model, "remove", data)
    assert wiring(after) == wiring(
        text(
            """g (float[1,3,6,6] x, float[4,3,3,3] W, float[4] B) => (float[1,4,6,6] y) {
  stem = Conv <pads = [1,1,1,1]> (x, W, B)
  y = Relu (stem)
}"""
        )
    )
    mean = mean_of(model, "f", data, (0, 2, 3))
    stem = run(
        named(CONV_NET.replace("y = Relu (sum)", "y = Relu (stem)"), CONV | {"b0": np.float32(CONV["b0"] + mean)}),
        data[0],
    )
    # the mean is of float32 sums, up to 4096 terms each, of values of about 10
    np.testing.assert_allclose(run(after, data[0])["y"], np.maximum(stem["y"], 0), atol=1e-4)


def test_the_mean_of_the_sum_stays() -> None:
    model, data = named(CONV_NET, CONV), feeds(16)
    after = made(EVERYTHING, model, "remove", data)
    before = mean_of(model, "sum", data, (0, 2, 3))
    np.testing.assert_allclose(mean_of(after, "stem", data, (0, 2, 3)), before, atol=1e-4)
    bare = made(PruneBlocks(bias=False), model, "remove", data)
    assert np.abs(mean_of(bare, "stem", data, (0, 2, 3)) - before).max() > 1, "the check can fail"


def test_where_others_read_x_the_add_stays_and_adds_the_mean() -> None:
    body = CONV_NET.replace("y = Relu (sum)", "t = Relu (stem)  y = Sub (sum, t)")
    model = named(body, CONV)
    after = made(EVERYTHING, model, "remove", feeds())
    assert ops(after) == ["Conv", "Add", "Relu", "Sub"]
    constant = after.graph.node("sum").inputs[1]
    assert constant is not None and constant.const_value is not None
    assert constant.const_value.numpy().shape == (4, 1, 1)


def test_a_mean_that_says_nothing_is_no_add_worth() -> None:
    weights = CONV | {"w1": 1e3 * CONV["w1"], "b1": np.zeros(4, np.float32)}
    body = CONV_NET.replace("y = Relu (sum)", "t = Relu (stem)  y = Sub (sum, t)").replace(
        "r = Relu (stem)", "r = Neg (stem)"
    )
    weights["b0"] = np.zeros(4, np.float32)
    after = made(EVERYTHING, named(body, weights), "remove", feeds(64))
    assert ops(after) == ["Conv", "Relu", "Sub"]


ATTENTION = {
    "s0": normal(10, 8) + 1, "c0": normal(11, 8), "q": normal(12, 8, 8), "k": normal(13, 8, 8), "v": normal(14, 8, 8),
    "o": normal(15, 8, 8), "ob": normal(16, 8), "s1": normal(17, 8) + 1, "c1": normal(18, 8), "up": normal(19, 8, 16),
    "down": normal(20, 16, 8), "db": normal(21, 8), "s2": normal(22, 8) + 1, "c2": normal(23, 8),
}  # fmt: skip
POST_NORM = """g (float[n,5,8] x, float[1,1,5] mask) => (float[n,5,8] y) {
  h0 = LayerNormalization <axis = -1> (x, s0, c0)
  hq = MatMul (h0, q)  hk = MatMul (h0, k)  hv = MatMul (h0, v)
  kt = Transpose <perm = [0,2,1]> (hk)
  scores = MatMul (hq, kt)  masked = Add (scores, mask)
  p = Softmax <axis = -1> (masked)
  c = MatMul (p, hv)  m = MatMul (c, o)  a = Add (m, ob)
  sum1 = Add (a, h0)
  h1 = LayerNormalization <axis = -1> (sum1, s1, c1)
  u = MatMul (h1, up)  r = Relu (u)  d = MatMul (r, down)  e = Add (d, db)
  sum2 = Add (e, h1)
  y = LayerNormalization <axis = -1> (sum2, s2, c2)
}"""
MASKED = [{"x": normal(30 + i, 2, 5, 8), "mask": np.zeros((1, 1, 5), np.float32)} for i in range(4)]


def test_a_transformer_layer_is_two_blocks_and_what_is_behind_the_sum_stays() -> None:
    model = named(POST_NORM, ATTENTION)
    assert set(blocks(model)) == {"sum1", "sum2"}
    assert reasons(model) == ["neither of its inputs is made from the other: no residual block"]  # the mask
    after = made(EVERYTHING, model, "remove", MASKED)
    assert ops(after) == ["LayerNormalization"] * 3
    check(after)
    data = MASKED[0]
    np.testing.assert_array_equal(run(made(EVERYTHING, model, {"sum2": "remove"}, MASKED), data)["y"].shape, (2, 5, 8))


def test_means_go_into_the_bias_of_a_normalization() -> None:
    model = named(POST_NORM, ATTENTION)
    after = made(EVERYTHING, model, {"sum2": "remove"}, MASKED)
    bias = after.graph.node("h1").inputs[2]
    assert bias is not None and bias.const_value is not None
    mean = mean_of(model, "e", MASKED, (0, 1))
    np.testing.assert_allclose(bias.const_value.numpy(), ATTENTION["c1"] + mean, atol=1e-5)


def test_a_gate_is_part_of_its_branch() -> None:
    body = """g (float[2,4] x) => (float[2,4] y) {
  g0 = MatMul (x, w)  gate = Sigmoid (g0)
  v = MatMul (x, u)  f = Mul (gate, v)
  s = Add (x, f)
  y = Relu (s)
}"""
    model = named(body, {"w": normal(1, 4, 4), "u": normal(2, 4, 4)})
    assert set(blocks(model)["s"]) == {"s", "g0", "gate", "v", "f"}
    assert ops(made(EVERYTHING, model, "remove", feeds(4, 2, 4))) == ["Add", "Relu"]


def test_attention_and_mlp_side_by_side_are_two_blocks() -> None:
    body = """g (float[2,4] x) => (float[2,4] y) {
  n = LayerNormalization <axis = -1> (x, s)
  a = MatMul (n, w)
  s1 = Add (x, a)
  b = MatMul (n, u)
  s2 = Add (s1, b)
  y = Relu (s2)
}"""
    model = named(body, {"w": normal(1, 4, 4), "u": normal(2, 4, 4), "s": normal(3, 4)})
    assert blocks(model) == {"s1": ("s1", "a"), "s2": ("s2", "b")}
    assert ops(made(PruneBlocks(bias=False), model, "remove")) == ["Relu"]


def test_a_model_output_keeps_its_name_and_its_shape() -> None:
    body = CONV_NET.replace("y = Relu (sum)", "").replace("sum = Add", "y = Add")
    after = made(EVERYTHING, named(body, CONV), "remove", feeds())
    assert ops(after) == ["Conv"] and after.graph.outputs[0].name == "y"
    straight = """g (float[2,4] x) => (float[2,4] y) { f = MatMul (x, w)  y = Add (x, f) }"""
    kept = made(PruneBlocks(blocks=("y",), bias=False), named(straight, {"w": normal(1, 4, 4)}), "remove")
    assert ops(kept) == ["Add"], "an input cannot be an output"
    np.testing.assert_array_equal(run(kept, {"x": CONV["w1"][:2, :4, 0, 0]})["y"], CONV["w1"][:2, :4, 0, 0])


def test_what_a_subgraph_reads_stays() -> None:
    body = """g (float[2,4] x, bool c) => (float[2,4] y, float[2,4] z) {
  f = MatMul (x, w)  h = Relu (f)
  s = Add (x, h)
  y = Neg (s)
  z = If (c) <then_branch = t () => (float[2,4] p) { p = Neg (f) },
              else_branch = e () => (float[2,4] q) { q = Abs (x) }>
}"""
    assert "no layer" in reasons(named(body, {"w": normal(1, 4, 4)}))[0]
    inside = body.replace("p = Neg (f)", "p = Neg (s)")
    after = made(
        EVERYTHING, named(inside, {"w": normal(1, 4, 4)}), "remove", [{"x": normal(4, 2, 4), "c": np.array(True)}]
    )
    assert "MatMul" not in ops(after)


NESTED = """g (float[2,4] x) => (float[2,4] y) {
  a = MatMul (x, w)
  b = MatMul (a, u)
  inner = Add (a, b)
  c = Relu (inner)
  outer = Add (x, c)
  y = Neg (outer)
}"""
NESTED_WEIGHTS = {"w": normal(1, 4, 4), "u": normal(2, 4, 4)}


def test_of_nested_blocks_the_outer_goes_or_the_inner() -> None:
    model = named(NESTED, NESTED_WEIGHTS)
    view = GraphView(model)
    assert set(blocks(model)) == {"inner", "outer"}
    questions = [
        Question(site, 1.0, (Option(EVERYTHING.choices(site, view, TARGET)[0], 0.0),))
        for site in EVERYTHING.sites(view)
        if isinstance(site, Site)
    ]
    plan = solve(questions, {}, {}, budget=None, rates=Rates())
    assert plan is not None and len(plan.choices) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_both_by_hand_is_the_outer(order: int) -> None:
    model = named(NESTED, NESTED_WEIGHTS)
    view, data = GraphView(model), feeds(4, 2, 4)
    sites = [s for s in EVERYTHING.sites(view) if isinstance(s, Site)]
    choices = [EVERYTHING.choices(s, view, TARGET)[0] for s in sites][::order]
    built = build(model, EVERYTHING, choices, learn(EVERYTHING, model, data))
    assert ops(built.model) == ["Add", "Neg"]
    assert [s.reason for s in built.refused] == ([] if order == 1 else ["it went with the block around it"])


# --- what is no block ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signature", "body", "why"),
    [
        ("(float[2,4] x) => (float[2,4] y)", "a = MatMul (x, w)  b = MatMul (x, w)  y = Add (a, b)", "neither"),
        ("(float[2,4] x) => (float[2,4] y)", "a = Relu (x)  y = Add (a, x)", "no layer"),
        ("(float[2,4] x) => (float[2,4] y, float[2,4] a)", "a = MatMul (x, w)  y = Add (a, x)", "read elsewhere"),
        ("(float[1,4] x) => (float[3,4] y)", "e = Expand (x, s)  a = MatMul (e, w)  y = Add (a, x)", "broadcast"),
        ("(float[n,4] x) => (float[m,4] y)", "e = Tile (x, t)  a = MatMul (e, w)  y = Add (a, x)", "in a run only"),
        (
            "(float[n,4] x) => (float[n,4] y)",
            "q, z, c = DynamicQuantizeLinear (x)  d = DequantizeLinear (q, z, c)  y = Add (x, d)",
            "already quantized",
        ),
    ],
)
def test_others_say_why_not(signature: str, body: str, why: str) -> None:
    constants = {"w": normal(1, 4, 4), "s": np.array([3, 1]), "t": np.array([2, 1])}
    used = {k: v for k, v in constants.items() if f" {k})" in body}
    assert [why in r for r in reasons(named(f"g {signature} {{ {body} }}", used))] == [True]


def test_an_add_in_a_subgraph_is_not_observed() -> None:
    body = """g (float[2,4] x, bool c) => (float[2,4] z) {
  z = If (c) <then_branch = t () => (float[2,4] p) { f = MatMul (x, w)  p = Add (x, f) },
              else_branch = e () => (float[2,4] q) { q = Abs (x) }>
}"""
    (reason,) = reasons(named(body, {"w": normal(1, 4, 4)}))
    assert "subgraph" in reason


def test_without_data_nothing_is_offered() -> None:
    view = GraphView(named(CONV_NET, CONV))
    offer = offers(EVERYTHING, view, TARGET, synthetic=True)
    assert not offer.choices and "calibration" in offer.skipped[0].reason
    assert offers(PruneBlocks(("sum",), bias=False), view, TARGET, synthetic=True).choices, "the user's word"


@pytest.mark.parametrize(
    ("names", "message"),
    [(("f",), "names 'f', which is no block"), (("masked",), "cannot go: neither of its inputs")],
)
def test_a_name_that_is_no_block(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(PassOptionError, match=message):
        list(PruneBlocks(names).sites(GraphView(named(POST_NORM, ATTENTION))))


def test_options_from_the_command_line() -> None:
    assert parse("prune_blocks{blocks=[sum1, sum2], bias=false}") == PruneBlocks(("sum1", "sum2"), bias=False)
    with pytest.raises(PassOptionError, match="has no option 'block'"):
        parse("prune_blocks{block=sum1}")


# --- prices ----------------------------------------------------------------------------------------


def test_what_is_simulated_is_what_is_made() -> None:
    """One switch on is the model with that block removed: the same error, up to rounding."""
    model = named(POST_NORM, ATTENTION)
    view, evidence = GraphView(model), learn(EVERYTHING, model, MASKED)
    choices = [EVERYTHING.choices(s, view, TARGET)[0] for s in EVERYTHING.sites(view) if isinstance(s, Site)]
    terms = [c.terms[0] for c in choices]
    prices = measure_prices(EVERYTHING, model, terms, evidence, TARGET, MASKED, ["y"], budget=1e-9)
    assert not prices.impossible
    for choice, term in zip(choices, terms, strict=True):
        after = build(model, EVERYTHING, [choice], evidence).model
        wanted = [run(model, f)["y"].astype(np.float64) for f in MASKED]
        found = [run(after, f)["y"] for f in MASKED]
        noise = sum(np.square(a - b).sum() for a, b in zip(wanted, found, strict=True))
        signal = sum(np.square(a).sum() for a in wanted)
        assert prices.terms[term] == pytest.approx(noise / signal, rel=1e-3)
        assert prices.terms[term] > 0.01, "the check can fail"


def test_a_simulation_without_a_mean() -> None:
    model, bare = named(CONV_NET, CONV), PruneBlocks(bias=False)
    prices = measure_prices(
        bare, model, [Term("block", "sum[1]")], learn(bare, model, feeds()), TARGET, feeds(), ["y"], budget=1e-9
    )
    after = made(bare, model, "remove")
    wanted, found = run(model, feeds()[0])["y"], run(after, feeds()[0])["y"]
    assert prices.terms[Term("block", "sum[1]")] == pytest.approx(
        np.square(wanted - found).sum() / np.square(wanted).sum(), rel=0.5
    )


def test_the_gain_is_what_the_nodes_that_go_cost() -> None:
    from onnxcompress.calibrate import value_shapes
    from onnxcompress.cost import CostModel
    from onnxcompress.profile import load_profile

    model = named(CONV_NET, CONV)
    view, cost = GraphView(model), CostModel(load_profile("host-x86-vnni"))
    shapes = value_shapes(model, feeds()[0])

    def never(choice: Choice) -> None:
        raise AssertionError("no clone is needed")

    (question,), _, _ = ask(offers(EVERYTHING, view, TARGET, synthetic=False), view, cost, shapes, never)
    seconds = {n.name: n.seconds for n in cost.model(view, shapes).nodes}
    assert question.seconds == pytest.approx(sum(seconds[n] for n in ("sum", "r", "f")))
    assert question.options[0].seconds == pytest.approx(0.0, abs=1e-12)
    assert question.options[0].choice.bytes_saved == 4 * (4 * 4 * 9 + 4)


# --- the whole way ---------------------------------------------------------------------------------


def test_it_does_not_run_by_itself_and_named_it_keeps_to_the_budget() -> None:
    weights = CONV | {"w1": 1e-4 * CONV["w1"], "w2": 3 * normal(5, 4, 4, 3, 3)}
    body = CONV_NET.replace(
        "y = Relu (sum)", "t = Conv <pads = [1,1,1,1]> (sum, w2)  last = Add (sum, t)  y = Relu (last)"
    )
    model, data = named(body, weights), feeds(16)
    alone = onnxcompress.optimize(model, profile="host-x86-vnni", calibration=data, timing=False)
    assert "prune_blocks" not in {p.name for p in alone.report.passes}
    result = onnxcompress.optimize(
        model,
        profile="host-x86-vnni",
        calibration=data,
        passes=[EVERYTHING],
        budget=Budget(min_sqnr_db=40),
        timing=False,
    )
    decisions = {s.key: s.decision for s in result.report.sites if s.pass_name == "prune_blocks"}
    assert decisions == {"sum": "remove", "last": "keep"}
    again = onnxcompress.optimize(
        model,
        profile="host-x86-vnni",
        calibration=data,
        passes=[EVERYTHING],
        budget=Budget(min_sqnr_db=40),
        timing=False,
    )
    assert onnxcompress.model.serialize(result.model) == onnxcompress.model.serialize(again.model)


# --- many networks ---------------------------------------------------------------------------------

BLOCKS = {"bert": 4, "gpt_gqa": 4, "mobilenet_v2": 1, "resnet": 1, "vit": 4}
"""Blocks of generated families, at least."""


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_without_its_blocks(name: str) -> None:
    model = ir.from_proto(FAMILIES[name]())
    onnxcompress.model.canonicalize(model)
    model = onnxcompress.model.infer_types(model)
    data = [*family_feeds(name, 3, batch=2)]
    view = GraphView(model)
    sites = [s for s in EVERYTHING.sites(view) if isinstance(s, Site)]
    assert len(sites) >= BLOCKS.get(name, 0)
    if not sites:
        return
    choices = [EVERYTHING.choices(s, view, TARGET)[0] for s in sites]
    evidence, wanted = learn(EVERYTHING, model, data), run(model, data[0])
    terms = [c.terms[0] for c in choices]
    outputs = [k for k, v in wanted.items() if v.dtype == np.float32]
    prices = measure_prices(EVERYTHING, model, terms, evidence, TARGET, data, outputs, budget=0.0)
    assert not prices.impossible
    for chosen in (*([c] for c in choices), choices):
        built = build(model, EVERYTHING, chosen, evidence)
        check(built.model)
        found = run(built.model, data[0])
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in wanted.items()}
        left = {str(n.name) for n in built.model.graph.all_nodes()}
        assert not left & {n for c in built.made for n in c.site.nodes if n != c.site.key}
