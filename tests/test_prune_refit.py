"""Refitting what reads a pruned group: exact where what goes is a linear function of what stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from cuts import choices_of, cut, family, named, shape, weights, within
from models import TARGET, Array, learn, normal, run

import onnxcompress
from onnxcompress.base import Choice
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.passes.prune_channels import Criterion, PruneChannels
from onnxcompress.sensitivity import measure_prices
from onnxcompress.statistics import Evidence
from onnxcompress.trial import build

EXACT = PruneChannels(ratio=0.5, multiple=1, ridge=0.0, criterion=Criterion.RECONSTRUCTION)
BARE = PruneChannels(ratio=0.5, multiple=1, recover=False, criterion=Criterion.RECONSTRUCTION)
"""The same atoms go, and nothing makes up for them."""


def mixed(seed: int, many: int, few: int, *rest: int) -> Array:
    """``many`` rows, each a combination of the first ``few``: half of what they make is no news."""
    rows = normal(seed, few, *rest)
    more = np.einsum("ij,j...->i...", normal(seed + 1, many - few, few), rows)
    return np.concatenate([rows, more]).astype(np.float32)


def images(count: int = 4, channels: int = 3, side: int = 9) -> list[dict[str, Array]]:
    return [{"x": normal(50 + i, 2, channels, side, side)} for i in range(count)]


def rows(count: int = 4, *tail: int) -> list[dict[str, Array]]:
    return [{"x": normal(70 + i, 5, *(tail or (6,)))} for i in range(count)]


# Every case: a body, its weights, data, the node that reads the group. Eight atoms are made of four.
CONV = {"w": mixed(1, 8, 4, 3, 3, 3), "b": mixed(3, 8, 4)}
CASES: dict[str, tuple[str, dict[str, Array], list[dict[str, Array]], str]] = {
    "Conv 1x1": (
        "g (float[2,3,9,9] x) => (float[2,5,7,7] y) { a = Conv (x, w)  y = Conv (a, v) }",
        {"w": CONV["w"], "v": normal(5, 5, 8, 1, 1)}, images(), "y",
    ),
    "Conv 1x1, every other position": (
        "g (float[2,3,9,9] x) => (float[2,5,4,4] y) { a = Conv (x, w)  y = Conv <strides = [2,2]> (a, v) }",
        {"w": CONV["w"], "v": normal(5, 5, 8, 1, 1)}, images(), "y",
    ),
    "Conv 3x3 with pads and strides": (
        """g (float[2,3,9,9] x) => (float[2,5,4,4] y) {
          a = Conv (x, w)  y = Conv <pads = [1,0,1,2], strides = [2,2]> (a, v, c) }""",
        {"w": CONV["w"], "v": normal(5, 5, 8, 3, 3), "c": normal(6, 5)}, images(), "y",
    ),
    "Conv 3x3, dilated": (
        "g (float[2,3,9,9] x) => (float[2,5,3,3] y) { a = Conv (x, w)  y = Conv <dilations = [2,2]> (a, v) }",
        {"w": CONV["w"], "v": normal(5, 5, 8, 3, 3)}, images(), "y",
    ),
    "Conv 3x3, padded by name": (
        """g (float[2,3,9,9] x) => (float[2,5,7,7] y) {
          a = Conv (x, w)  y = Conv <auto_pad = "SAME_UPPER"> (a, v) }""",
        {"w": CONV["w"], "v": normal(5, 5, 8, 3, 3)}, images(), "y",
    ),
    "Conv in one dimension": (
        "g (float[2,3,81] x) => (float[2,5,77] y) { a = Conv (x, w)  y = Conv (a, v) }",
        {"w": mixed(1, 8, 4, 3, 3), "v": normal(5, 5, 8, 3)},
        [{"x": f["x"].reshape(2, 3, 81)} for f in images()], "y",
    ),
    "ConvTranspose": (
        """g (float[2,3,9,9] x) => (float[2,5,15,15] y) {
          a = Conv (x, w)  y = ConvTranspose <strides = [2,2]> (a, v, c) }""",
        {"w": CONV["w"], "v": normal(5, 8, 5, 3, 3), "c": normal(6, 5)}, images(), "y",
    ),
    "MatMul": (
        "g (float[5,6] x) => (float[5,7] y) { a = MatMul (x, w)  y = MatMul (a, v) }",
        {"w": mixed(1, 8, 4, 6).T.copy(), "v": normal(5, 8, 7)}, rows(), "y",
    ),
    "MatMul with Add": (
        "g (float[5,6] x) => (float[5,7] y) { a = MatMul (x, w)  m = MatMul (a, v)  y = Add (m, c) }",
        {"w": mixed(1, 8, 4, 6).T.copy(), "v": normal(5, 8, 7), "c": normal(6, 7)}, rows(), "m",
    ),
    "MatMul in a batch": (
        "g (float[5,3,6] x) => (float[5,3,7] y) { a = MatMul (x, w)  y = MatMul (a, v) }",
        {"w": mixed(1, 8, 4, 6).T.copy(), "v": normal(5, 8, 7)}, rows(4, 3, 6), "y",
    ),
    "MatMul with the constant on the left": (
        "g (float[5,6,3] x) => (float[5,7,3] y) { a = MatMul (w, x)  y = MatMul (v, a) }",
        {"w": mixed(1, 8, 4, 6), "v": normal(5, 7, 8)}, rows(4, 6, 3), "y",
    ),
    "Gemm": (
        "g (float[5,6] x) => (float[5,7] y) { a = Gemm (x, w)  y = Gemm (a, v, c) }",
        {"w": mixed(1, 8, 4, 6).T.copy(), "v": normal(5, 8, 7), "c": normal(6, 7)}, rows(), "y",
    ),
    "Gemm, transB, alpha, beta": (
        """g (float[5,6] x) => (float[5,7] y) {
          a = Gemm <transB = 1> (x, w)  y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (a, v, c) }""",
        {"w": mixed(1, 8, 4, 6), "v": normal(5, 7, 8), "c": normal(6, 7)}, rows(), "y",
    ),
    "Gemm, beta": (
        """g (float[5,6] x) => (float[5,7] y) {
          a = Gemm (x, w)  y = Gemm <beta = 2.0> (a, v, c) }""",
        {"w": mixed(1, 8, 4, 6).T.copy(), "v": normal(5, 8, 7), "c": normal(6, 1, 7)}, rows(), "y",
    ),
    "Gemm, transA": (
        """g (float[5,6] x) => (float[5,7] y) {
          t = Transpose <perm = [1,0]> (x)  a = MatMul (w, t)  y = Gemm <transA = 1> (a, v) }""",
        {"w": mixed(1, 8, 4, 6), "v": normal(5, 8, 7)}, rows(), "y",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_where_nothing_new_goes(name: str) -> None:
    body, parts, data, reader = CASES[name]
    model = named(body, parts)
    after = cut(EXACT, model, data)
    index = 0 if "left" in name else 1
    assert sorted(shape(after, reader, index)) != sorted(shape(model, reader, index))
    assert shape(after, "a", 0 if "a = MatMul (w" in body else 1).count(4) == 1
    within(model, after, data, ulps=512)  # the solve is in float64; its condition is that of 4 random features
    bare = cut(BARE, model, data)
    lost = max(np.abs(run(bare, f)["y"] - run(model, f)["y"]).max() for f in data)
    assert lost > 0.1, "the check can fail"


@pytest.mark.parametrize("tail", ["m = MatMul (a, v)  s = Add (m, c)", "s = Gemm (a, v, c)"])
def test_groups_that_meet_in_one_weight_are_refitted_once(tail: str) -> None:
    """V reads one group and makes another; both are half as wide, and nothing is lost."""
    v = mixed(5, 8, 4, 8).T.copy()
    parts = {"w": mixed(1, 8, 4, 6).T.copy(), "v": v, "c": normal(6, 8), "u": normal(7, 8, 3), "e": normal(8, 3)}
    body = f"g (float[5,6] x) => (float[5,3] y) {{ a = MatMul (x, w)  {tail}  t = MatMul (s, u)  y = Add (t, e) }}"
    model, data = named(body, parts), rows(8)
    after = cut(EXACT, model, data)
    assert {weights(after)[n].shape for n in ("v", "u")} == {(4, 4), (4, 3)}
    within(model, after, data, ulps=2048)


LSTM = """g (float[6,2,3] x) => (float[6,1,2,4] y) {
  t = Transpose <perm = [0,2,1]> (x)
  m = MatMul (w0, t)  a = Transpose <perm = [0,2,1]> (m)
  y, h, c = LSTM <hidden_size = 4> (a, W, R, B)
}"""


def test_what_an_lstm_reads() -> None:
    parts = {
        "w0": mixed(1, 8, 4, 3), "W": normal(3, 1, 16, 8), "R": normal(4, 1, 16, 4), "B": normal(5, 1, 32),
    }  # fmt: skip
    model = named(LSTM.replace("y, h, c = LSTM", "y = LSTM"), parts)
    data = [{"x": normal(20 + i, 6, 2, 3)} for i in range(4)]
    after = cut(EXACT, model, data, only=["m"])
    assert shape(after, "y") == (1, 16, 4)
    within(model, after, data, ulps=512)


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_states_that_are_copies_of_others_go_without_a_loss(kind: str, gates: int) -> None:
    """Units 4 to 7 do what 0 to 3 do: R and the reader are refitted, and outputs stay."""
    half = normal(3, 1, gates, 4, 3)
    states = normal(4, 1, gates, 4, 8)
    bias = normal(5, 1, 2, gates, 4)
    parts = {
        "W": np.concatenate([half, half], 2).reshape(1, 8 * gates, 3),
        "R": np.concatenate([states, states], 2).reshape(1, 8 * gates, 8) * np.float32(0.5),
        "B": np.concatenate([bias, bias], 3).reshape(1, 16 * gates),
        "v": normal(6, 8, 5),
    }
    body = f"""g (float[6,2,3] x) => (float[6,1,2,5] y) {{
  a = {kind} <hidden_size = 8{", linear_before_reset = 1" if kind == "GRU" else ""}> (x, W, R, B)
  y = MatMul (a, v)
}}"""
    model = named(body, parts)
    data = [{"x": normal(20 + i, 6, 2, 3)} for i in range(8)]
    after = cut(EXACT, model, data)
    assert (shape(after, "a", 1), shape(after, "a", 2)) == ((1, 4 * gates, 3), (1, 4 * gates, 4))
    assert shape(after, "a", 3) == (1, 8 * gates) and shape(after, "y") == (4, 5)
    assert after.graph.node("a").attributes["hidden_size"].value == 4
    within(model, after, data, ulps=4096)  # rounding goes round six steps of a state
    assert np.abs(run(cut(BARE, model, data), data[0])["y"] - run(model, data[0])["y"]).max() > 0.01


# --- biases ----------------------------------------------------------------------------------------

MEANS = {
    "Conv": (
        """g (float[2,3,9,9] x) => (float[2,5,5,5] y) {
          a = Conv (x, w, b)  r = Relu (a)  y = Conv (r, v) }""",
        {"w": normal(1, 8, 3, 3, 3), "b": normal(2, 8), "v": normal(5, 5, 8, 3, 3)}, images(), (0, 2, 3),
    ),
    "Conv, padded": (
        """g (float[2,3,9,9] x) => (float[2,5,4,4] y) {
          a = Conv (x, w, b)  r = Relu (a)  y = Conv <pads = [1,1,1,1], strides = [2,2]> (r, v, c) }""",
        {"w": normal(1, 8, 3, 3, 3), "b": normal(2, 8), "v": normal(5, 5, 8, 3, 3), "c": normal(6, 5)},
        images(), (0, 2, 3),
    ),
    "ConvTranspose": (
        """g (float[2,3,9,9] x) => (float[2,5,14,14] y) {
          a = Conv (x, w, b)  r = Relu (a)  y = ConvTranspose <strides = [2,2]> (r, v) }""",
        {"w": normal(1, 8, 3, 3, 3), "b": normal(2, 8), "v": normal(5, 8, 5, 2, 2)}, images(), (0, 2, 3),
    ),
    "MatMul with Add": (
        """g (float[5,6] x) => (float[5,7] y) {
          a = MatMul (x, w)  r = Relu (a)  m = MatMul (r, v)  y = Add (c, m) }""",
        {"w": normal(1, 6, 8), "v": normal(5, 8, 7), "c": normal(6, 1)}, rows(), (0,),
    ),
    "Gemm": (
        """g (float[5,6] x) => (float[5,7] y) {
          a = MatMul (x, w)  r = Relu (a)  y = Gemm <transB = 1, beta = 0.5> (r, v, c) }""",
        {"w": normal(1, 6, 8), "v": normal(5, 7, 8), "c": normal(6, 5, 1)}, rows(), (0,),
    ),
}  # fmt: skip


def _mean(model: ir.Model, data: list[dict[str, Array]], axes: tuple[int, ...]) -> Array:
    return np.asarray(np.mean([run(model, f)["y"].astype(np.float64).mean(axes) for f in data], axis=0))


@pytest.mark.parametrize("name", MEANS)
def test_the_mean_of_each_output_stays(name: str) -> None:
    body, parts, data, axes = MEANS[name]
    model = named(body, parts)
    wanted = _mean(model, data, axes)
    after = cut(PruneChannels(ratio=0.5, multiple=1), model, data)
    np.testing.assert_allclose(_mean(after, data, axes), wanted, atol=1e-5 * np.abs(wanted).max())
    bare = cut(PruneChannels(ratio=0.5, multiple=1, recover=False), model, data)
    assert np.abs(_mean(bare, data, axes) - wanted).max() > 0.01


def test_without_recovery_what_stays_is_what_it_was() -> None:
    body, parts, data, _ = CASES["Conv 3x3 with pads and strides"]
    model = named(body, parts)
    after = weights(cut(BARE, model, data))
    kept = [int(np.flatnonzero((parts["w"] == row).all(axis=(1, 2, 3)))[0]) for row in after["w"]]
    np.testing.assert_array_equal(after["w"], parts["w"][kept])
    np.testing.assert_array_equal(after["v"], parts["v"][:, kept])
    np.testing.assert_array_equal(after["c"], parts["c"])


def test_made_up_inputs_are_no_ground_to_refit() -> None:
    body, parts, _, _ = CASES["Conv 3x3 with pads and strides"]
    model = named(body, parts)
    done = onnxcompress.optimize(
        model,
        profile="host-x86-vnni",
        passes=[PruneChannels(ratio=0.5, multiple=1)],
        budget=onnxcompress.Budget(min_sqnr_db=-1000),
        timing=False,
    )
    after = weights(done.model)
    assert after["w"].shape == (4, 3, 3, 3)
    for row in after["w"]:
        assert (parts["w"] == row).all(axis=(1, 2, 3)).any()
    np.testing.assert_array_equal(after["c"], parts["c"])


# --- weights that several read ---------------------------------------------------------------------

TIED = """g (float[5,6] x) => (float[5,300] y, float[5,300] z) {
  a = MatMul (x, w)  r = Relu (a)  s = Sigmoid (a)
  p = MatMul (r, v)  q = MatMul (s, v)
  y = Add (p, c)  z = Add (q, c)
}"""


@pytest.mark.parametrize("large", [True, False])
def test_a_weight_that_two_nodes_read(large: bool) -> None:
    """A large one stays shared and as it is, with a bias for each; a small one is copied and refitted for each."""
    many = 300 if large else 20
    body = TIED.replace("300", str(many))
    model = named(body, {"w": normal(1, 6, 240), "v": normal(2, 240, many), "c": normal(3, many)})
    data = rows(24)
    pass_ = PruneChannels(ratio=0.5, multiple=1, criterion=Criterion.MAGNITUDE)
    after = cut(pass_, model, data)
    nodes = [after.graph.node(n).inputs[1] for n in ("p", "q")]
    assert (nodes[0] is nodes[1]) == large
    for name in ("p", "q"):
        assert shape(after, name) == (120, many)
    bare = cut(PruneChannels(ratio=0.5, multiple=1, criterion=Criterion.MAGNITUDE, recover=False), model, data)
    for out in ("y", "z"):
        wanted = np.concatenate([run(model, f)[out] for f in data])
        good, bad = (np.concatenate([run(m, f)[out] for f in data]) for m in (after, bare))
        assert np.square(good - wanted).sum() < np.square(bad - wanted).sum()
        np.testing.assert_allclose(good.mean(0), wanted.mean(0), atol=1e-3)
    if large:
        kept = {tuple(row) for row in weights(after)["v"]}
        assert kept < {tuple(row) for row in weights(model)["v"]}


def test_an_embedding_that_the_last_layer_reads_too() -> None:
    """Gather makes what the transposed table reads: one large weight, cut once."""
    body = """g (int64[n,5] i) => (float[n,5,800] y) {
  a = Gather (table, i)  b = Add (a, e0)  t = Transpose <perm = [1,0]> (table)  y = MatMul (b, t)
}"""
    model = named(body, {"table": normal(1, 800, 96), "e0": normal(2, 96)})
    data = [{"i": np.random.default_rng(i).integers(0, 800, (2, 5))} for i in range(4)]
    after = cut(PruneChannels(ratio=0.5, multiple=1), model, data)
    assert weights(after)["table"].shape == (800, 48) and run(after, data[0])["y"].shape == (2, 5, 800)


# --- prices ----------------------------------------------------------------------------------------

PRICED = {**CASES, **{f"{k} with Relu": v for k, v in MEANS.items()}}


@pytest.mark.parametrize("name", [*PRICED, "tied"])
def test_what_is_simulated_is_what_is_made(name: str) -> None:
    """One switch on is the model with that group cut: the same error, up to rounding."""
    if name == "tied":
        body, data = TIED, rows(24)
        parts = {"w": normal(1, 6, 240), "v": normal(2, 240, 300), "c": normal(3, 300)}
    else:
        body, parts, data = PRICED[name][:3]
    model = named(body, parts)
    pass_ = PruneChannels(ratio=0.75, multiple=1)
    choices, evidence = choices_of(pass_, model, data), learn(pass_, model, data)
    terms = [t for c in choices for t in c.terms]
    assert len(terms) == len(choices) > 0
    _check_prices(pass_, model, choices, evidence, data)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_simulated_is_what_is_made_of_every_family(name: str) -> None:
    model, data = family(name), [*family_feeds(name, 2)]
    pass_ = PruneChannels(ratio=0.6, multiple=1)
    choices = [c for c in choices_of(pass_, model, data) if c.terms][::3]
    assert choices
    _check_prices(pass_, model, choices, learn(pass_, model, data), data)


def _check_prices(
    pass_: PruneChannels, model: ir.Model, choices: list[Choice], evidence: Evidence, data: list[dict[str, Array]]
) -> None:
    outputs = [str(o.name) for o in model.graph.outputs]
    terms = [c.terms[0] for c in choices]
    prices = measure_prices(pass_, model, terms, evidence, TARGET, data, outputs, budget=1e-9)
    assert not prices.impossible
    for choice, term in zip(choices, terms, strict=True):
        after = build(model, pass_, [choice], evidence).model
        ratios = []
        for out in outputs:
            wanted, found = ([run(m, f)[out].astype(np.float64) for f in data] for m in (model, after))
            noise = sum(np.square(a - b).sum() for a, b in zip(wanted, found, strict=True))
            ratios.append(noise / sum(np.square(a).sum() for a in wanted))
        assert prices.terms[term] == pytest.approx(max(ratios), rel=1e-3, abs=1e-10), choice.site.key
    assert max(prices.terms.values()) > 1e-9, "the check can fail"
