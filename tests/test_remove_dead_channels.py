"""Dead, constant and doubled channels: which go, which stay and why, and that outputs stay what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxcompress
from onnxcompress import model as models
from onnxcompress.base import Site, Skip, Skipped
from onnxcompress.coupling import Coupling, Group
from onnxcompress.errors import PassOptionError
from onnxcompress.evaluate import compare, is_lossless, rounding_noise
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.passes import remove_dead_channels as module
from onnxcompress.passes._channel_states import by_position
from onnxcompress.passes._channel_values import ChannelValues
from onnxcompress.passes._dead_look import suspects
from onnxcompress.passes.remove_dead_channels import RemoveDeadChannels
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import tidy
from onnxcompress.view import GraphView
from tests.models import TARGET, Array, Feeds, check, normal, run, text
from tests.random_graphs import PICTURE_STEPS, SEQUENCE_STEPS, picture_graph, programs, sequence_graph
from tests.removals import shapes_in

ALL = RemoveDeadChannels(multiple=1)


def tidied(model: ir.Model, pass_: RemoveDeadChannels = ALL, target: Target = TARGET) -> ir.Model:
    return tidy(model, pass_, target, lambda view, choices: Evidence()).model


def reasons(model: ir.Model, pass_: RemoveDeadChannels = ALL, target: Target = TARGET) -> dict[str, str]:
    found = tidy(model, pass_, target, lambda view, choices: Evidence()).skipped
    return {s.key: s.reason for s in found}


def equal(before: ir.Model, after: ir.Model, feeds: Feeds) -> bool:
    check(after)
    found = compare(before, after, feeds)
    return is_lossless(found, len(GraphView(before).nodes()), rounding_noise(before, feeds))


# --- convolutions ----------------------------------------------------------------------------------

TWO = """g (float[1, 3, 8, 8] x) => (float[1, 4, H, W] y) {
    a = Conv(x, w, b)
    r = Relu(a)
    y = Conv<pads = [PADS]>(r, v, c)
}"""


def two(pads: int = 0) -> tuple[ir.Model, dict[str, Array]]:
    """Eight channels between two convolutions, and the weights as they may be changed."""
    body = TWO.replace("PADS", ", ".join([str(pads)] * 4)).replace("H, W", f"{6 + 2 * pads - 2}, {6 + 2 * pads - 2}")
    weights: dict[str, Array] = {
        "w": normal(1, 8, 3, 3, 3),
        "b": normal(2, 8),
        "v": normal(3, 4, 8, 3, 3),
        "c": normal(4, 4),
    }
    return text(body, weights), weights


def with_weights(model: ir.Model, weights: Mapping[str, Array]) -> ir.Model:
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    for name, array in weights.items():
        rewriter.replace_weight(rewriter.value(name), array.copy())
    return copy


X = {"x": normal(9, 1, 3, 8, 8)}


def test_channels_nobody_reads() -> None:
    model, weights = two(pads=1)
    weights["v"][:, [2, 5]] = 0
    model = with_weights(model, weights)
    after = tidied(model)
    sizes = shapes_in(after)
    assert sizes["w"] == (6, 3, 3, 3)
    assert sizes["b"] == (6,)
    assert sizes["v"] == (4, 6, 3, 3)
    kept = [0, 1, 3, 4, 6, 7]
    np.testing.assert_array_equal(after.graph.initializers["w"].const_value.numpy(), weights["w"][kept])  # type: ignore[union-attr]
    assert equal(model, after, [X])


def test_channels_that_are_always_zero() -> None:
    """No weights, and a bias that Relu cuts off."""
    model, weights = two(pads=1)
    weights["w"][[0, 7]] = 0
    weights["b"][[0, 7]] = [-1, 0]
    model = with_weights(model, weights)
    after = tidied(model)
    assert shapes_in(after)["v"] == (4, 6, 3, 3)
    assert equal(model, after, [X])


def test_constants_go_into_the_bias() -> None:
    model, weights = two()
    weights["w"][3] = 0
    weights["b"][3] = 0.5
    model = with_weights(model, weights)
    after = tidied(model)
    assert shapes_in(after)["v"] == (4, 7, 3, 3)
    wanted = weights["c"] + 0.5 * weights["v"][:, 3].sum(axis=(1, 2))
    np.testing.assert_allclose(after.graph.initializers["c"].const_value.numpy(), wanted, rtol=1e-6)  # type: ignore[union-attr]
    assert equal(model, after, [X])


def test_padded_borders_do_not_see_a_constant() -> None:
    model, weights = two(pads=1)
    weights["w"][3] = 0
    weights["b"][3] = 0.5
    model = with_weights(model, weights)
    assert tidied(model) is model
    assert "padded border" in next(iter(reasons(model).values()))


def test_twins_become_one_with_the_sum_of_their_weights() -> None:
    model, weights = two(pads=1)
    weights["w"][6], weights["b"][6] = weights["w"][1], weights["b"][1]
    model = with_weights(model, weights)
    after = tidied(model)
    sums = after.graph.initializers["v"].const_value.numpy()  # type: ignore[union-attr]
    assert sums.shape == (4, 7, 3, 3)
    np.testing.assert_array_equal(sums[:, 1], weights["v"][:, 1] + weights["v"][:, 6])
    assert equal(model, after, [X])


@pytest.mark.parametrize("what", ["bias", "scale"])
def test_twins_have_to_agree_in_everything(what: str) -> None:
    model, weights = two()
    weights["w"][6] = weights["w"][1]
    if what == "scale":  # a scaled copy is no twin
        weights["w"][6] *= 2
        weights["b"][6] = weights["b"][1] * 2
    model = with_weights(model, weights)
    assert tidied(model) is model


def test_a_chain_goes_from_its_end() -> None:
    """What only dead channels read is dead, over two layers; what only they make, too."""
    body = """g (float[1, 3, 5, 5] x) => (float[1, 4, 5, 5] y) {
        a = Conv(x, w0)
        b = Relu(a)
        c = Conv(b, w1)
        d = Relu(c)
        y = Conv(d, w2)
    }"""
    weights = {"w0": normal(1, 6, 3, 1, 1), "w1": normal(2, 8, 6, 1, 1), "w2": normal(3, 4, 8, 1, 1)}
    weights["w2"][:, :2] = 0  # nobody reads two of the second layer,
    weights["w1"][2:, 5] = 0  # which alone read one of the first
    weights["w0"][0] = 0  # one of the first is zero,
    weights["w1"][7, 1:] = 0  # and alone makes one of the second
    model = text(body, weights)
    after = tidied(model)
    sizes = shapes_in(after)
    assert (sizes["w0"][0], sizes["w1"][0]) == (4, 5)
    assert equal(model, after, [{"x": normal(5, 1, 3, 5, 5)}])


def test_depthwise_filters_and_normalization_without_weight() -> None:
    body = """g (float[1, 3, 6, 6] x) => (float[1, 4, 6, 6] y) {
        a = Conv(x, w)
        n = BatchNormalization(a, s, t, m, u)
        h = HardSwish(n)
        d = Conv<group = 8, pads = [1, 1, 1, 1]>(h, k)
        y = Conv(d, v)
    }"""
    weights: dict[str, Array] = {
        "w": normal(1, 8, 3, 1, 1), "k": normal(2, 8, 1, 3, 3), "v": normal(3, 4, 8, 1, 1),
        "s": normal(4, 8), "t": normal(5, 8), "m": normal(6, 8), "u": np.abs(normal(7, 8)) + 1,
    }  # fmt: skip
    weights["k"][4] = 0  # the filter says nothing
    weights["s"][2], weights["t"][2] = 0, -4  # a normalization without scale, and HardSwish of -4 is 0
    weights["s"][1] = 0  # a constant at padded borders stays
    model = text(body, weights)
    after = tidied(model)
    assert shapes_in(after)["k"] == (6, 1, 3, 3)
    assert after.graph[3].attributes.get_int("group") == 6
    assert equal(model, after, [{"x": normal(8, 1, 3, 6, 6)}])


# --- other operators -------------------------------------------------------------------------------


def test_neurons() -> None:
    body = """g (float[2, 5] x) => (float[2, 3] y) {
        a = MatMul(x, w)
        b = Add(a, p)
        c = Sigmoid(b)
        d = MatMul(c, v)
        y = Add(d, q)
    }"""
    weights = {"w": normal(1, 5, 8), "p": normal(2, 8), "v": normal(3, 8, 3), "q": normal(4, 3)}
    weights["v"][1] = 0  # not read
    weights["w"][:, 4] = 0  # sigmoid(p) whatever the input
    weights["w"][:, 7], weights["p"][7] = weights["w"][:, 0], weights["p"][0]  # a twin
    model = text(body, weights)
    after = tidied(model)
    assert shapes_in(after)["v"] == (5, 3)
    wanted = weights["q"] + weights["v"][4] / (1 + np.exp(-weights["p"][4]))
    np.testing.assert_allclose(after.graph.initializers["q"].const_value.numpy(), wanted, rtol=1e-5)  # type: ignore[union-attr]
    assert equal(model, after, [{"x": normal(5, 2, 5)}])


LSTM = """g (float[4, 2, 3] x) => (float[4, 2, 2] y) {
    h, n, s = LSTM<hidden_size = 6>(x, w, r, b)
    z = Squeeze(h, one)
    y = MatMul(z, v)
}"""


@pytest.mark.parametrize("what", ["cell", "unread", "twin"])
def test_hidden_units(what: str) -> None:
    weights: dict[str, Array] = {
        "w": normal(1, 1, 24, 3), "r": normal(2, 1, 24, 6), "b": normal(3, 1, 48),
        "v": normal(4, 6, 2), "one": np.array([1], np.int64),
    }  # fmt: skip
    rows = np.arange(4) * 6
    if what == "cell":  # nothing gets into the cell of unit 2, whatever its other gates say
        for name in ("w", "r"):
            weights[name][0, 18 + 2] = 0
        weights["b"][0, [18 + 2, 42 + 2]] = 0
    elif what == "unread":  # but by itself
        weights["v"][5] = 0
        weights["r"][0, [k for k in range(24) if k % 6 != 5], 5] = 0
    else:
        for name in ("w", "r"):
            weights[name][0, rows + 4] = weights[name][0, rows + 1]
        weights["b"][0, np.r_[rows, rows + 24] + 4] = weights["b"][0, np.r_[rows, rows + 24] + 1]
    model = text(LSTM, weights)
    after = tidied(model)
    assert shapes_in(after)["r"] == (1, 20, 5)
    assert after.graph[0].attributes.get_int("hidden_size") == 5
    assert equal(model, after, [{"x": normal(5, 4, 2, 3)}])


RESIDUAL = """g (float[1, 3, 6, 6] x) => (float[1, 2, 6, 6] y) {
    a = Conv(x, w0)
    b = Conv<pads = [1, 1, 1, 1]>(a, w1)
    s = Add(a, b)
    y = Conv(s, v)
}"""


def test_all_makers_of_a_sum_have_to_agree() -> None:
    weights = {"w0": normal(1, 8, 3, 1, 1), "w1": normal(2, 8, 8, 3, 3), "v": normal(3, 2, 8, 1, 1)}
    weights["w0"][[1, 2]] = 0
    weights["w1"][[1, 3]] = 0
    model = text(RESIDUAL, weights)
    after = tidied(model)
    assert shapes_in(after)["w1"] == (7, 7, 3, 3)
    assert equal(model, after, [{"x": normal(4, 1, 3, 6, 6)}])
    weights["w1"][1] = normal(5, 8, 3, 3)
    model = text(RESIDUAL, weights)
    assert tidied(model) is model


CONCAT = """g (float[1, 3, 4, 4] x) => (float[1, 2, 4, 4] y) {
    a = Conv(x, w0)
    b = Conv(x, w1)
    c = Concat<axis = 1>(a, b)
    y = Conv(c, v)
}"""


def test_branches_of_a_concat() -> None:
    weights = {"w0": normal(1, 16, 3, 1, 1), "w1": normal(2, 32, 3, 1, 1), "v": normal(3, 2, 48, 1, 1)}
    weights["w0"][:5] = 0
    weights["v"][:, 40:] = 0
    model = text(CONCAT, weights)
    after = tidied(model)
    assert {k: v[:2] for k, v in shapes_in(after).items()} == {"w0": (11, 3), "w1": (24, 3), "v": (2, 35)}
    feeds = [{"x": normal(4, 1, 3, 4, 4)}]
    assert equal(model, after, feeds)
    narrow = tidied(model, RemoveDeadChannels(), Target("t", channel_multiple=4))  # 4 of 5 go: no width falls off
    assert {k: v[:2] for k, v in shapes_in(narrow).items()} == {"w0": (12, 3), "w1": (24, 3), "v": (2, 36)}
    assert equal(model, narrow, feeds)


def test_equal_channels_of_two_branches_stay() -> None:
    """They are in different tensors, so that no slice of the concatenation's inputs would do."""
    weights = {"w0": normal(1, 16, 3, 1, 1), "w1": normal(2, 32, 3, 1, 1), "v": normal(3, 2, 48, 1, 1)}
    weights["w1"][0] = weights["w0"][0]
    weights["w1"][5] = weights["w1"][9]
    after = tidied(text(CONCAT, weights))
    assert {k: v[:2] for k, v in shapes_in(after).items()} == {"w0": (16, 3), "w1": (31, 3), "v": (2, 47)}


def test_a_weight_two_layers_share() -> None:
    body = """g (float[2, 5] x) => (float[2, 3] y, float[2, 3] z) {
        a = MatMul(x, w)
        b = Relu(a)
        c = Tanh(a)
        y = MatMul(b, v)
        z = MatMul(c, v)
    }"""
    weights = {"w": normal(1, 5, 300), "v": normal(2, 300, 3)}
    weights["w"][:, 7] = weights["w"][:, 100]
    weights["v"][20] = 0
    weights["w"][:, 250] = 0
    for size in (300, 30000):  # copied for each, or too large for that
        wide = {"w": np.resize(normal(3, 5 * size), (5, size)), "v": normal(4, size, 3)}
        wide["w"][:, :300], wide["v"][:300] = weights["w"], weights["v"]
        model = text(body, wide)
        after = tidied(model)
        assert shapes_in(after)["w"] == (5, size - 3)
        assert equal(model, after, [{"x": normal(5, 2, 5)}])


# --- left alone ------------------------------------------------------------------------------------


def test_pinned_groups_stay() -> None:
    """Outputs of the model, and what is normalized over."""
    body = """g (float[2, 5] x) => (float[2, 6] y, float[2, 3] z) {
        y = MatMul(x, w)
        r = Relu(y)
        z = MatMul(r, v)
    }"""
    weights = {"w": normal(1, 5, 6), "v": normal(2, 6, 3)}
    weights["v"][2] = 0
    model = text(body, weights)
    assert tidied(model) is model
    (reason,) = reasons(model).values()
    assert "output of the model" in reason


def test_operators_not_known_are_not_looked_through() -> None:
    body = """g (float[2, 5] x) => (float[2, 3] y) {
        a = MatMul(x, w)
        y = Einsum<equation = "bk,kn->bn">(a, v)
    }"""
    weights = {"w": normal(1, 5, 6), "v": normal(2, 6, 3)}
    weights["w"][:, 2] = 0
    model = text(body, weights)
    assert tidied(model) is model
    (reason,) = reasons(model).values()
    assert reason.startswith("a weight makes with zeros, but Einsum")


def wide(dead: int, size: int = 64) -> ir.Model:
    body = """g (float[1, 3, 4, 4] x) => (float[1, 2, 4, 4] y) {
        a = Conv(x, w)
        y = Conv(a, v)
    }"""
    weights = {"w": normal(1, size, 3, 1, 1), "v": normal(2, 2, size, 1, 1)}
    weights["v"][:, 3 : 3 + dead] = 0
    return text(body, weights)


@pytest.mark.parametrize(
    ("size", "dead", "multiple", "left"),
    [
        (64, 17, 16, 48),
        (64, 16, 16, 48),
        (64, 31, 16, 48),
        (50, 3, 16, 48),
        (24, 9, 16, 16),
        (8, 5, 16, 4),
        (7, 2, 1, 5),
    ],
)
def test_widths_keep_to_what_the_device_likes(size: int, dead: int, multiple: int, left: int) -> None:
    model = wide(dead, size)
    after = tidied(model, RemoveDeadChannels(), Target("t", channel_multiple=multiple))
    assert shapes_in(after)["w"][0] == left
    assert equal(model, after, [{"x": normal(4, 1, 3, 4, 4)}])


def test_too_few_to_pay() -> None:
    target = Target("t", channel_multiple=16)
    model = wide(5)
    assert tidied(model, RemoveDeadChannels(), target) is model
    (reason,) = reasons(model, RemoveDeadChannels(), target).values()
    assert reason == "5 of 64 channels add nothing or are there twice, but keep the width to 16s"


def test_one_stays_where_all_are_dead() -> None:
    model = wide(61)
    weights = {"v": np.zeros((2, 64, 1, 1), np.float32)}
    after = tidied(with_weights(model, weights))
    assert shapes_in(after)["v"] == (2, 1, 1, 1)
    assert not run(after, {"x": normal(4, 1, 3, 4, 4)})["y"].any()


def test_models_without_any_are_not_analysed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Coupling:
        raise AssertionError("the analysis was run")

    monkeypatch.setattr(module, "Coupling", never)
    model, _ = two()
    assert tidied(model) is model


def test_options() -> None:
    with pytest.raises(PassOptionError):
        RemoveDeadChannels(multiple=0)
    (foreign,) = ALL.choices(*_first_site(wide(3)))
    with pytest.raises(PassOptionError):
        ALL.apply(replace(foreign, detail=None), Rewriter(wide(3)), Evidence())


def _first_site(model: ir.Model) -> tuple[Site, GraphView, Target]:
    view = GraphView(model)
    return next(s for s in ALL.sites(view) if isinstance(s, Site)), view, TARGET


def test_the_check_can_fail() -> None:
    """A model with a channel less that was alive is not equal."""
    model, weights = two()
    weights["v"][:, 2] = 1e-3
    live = with_weights(model, weights)
    weights["v"][:, 2] = 0
    assert not equal(live, tidied(with_weights(model, weights)), [X])


# --- the whole way, and graphs nobody wrote --------------------------------------------------------


def test_through_the_pipeline() -> None:
    model, weights = two(pads=1)
    weights["v"][:, [2, 5, 6, 7]] = 0
    result = onnxcompress.optimize(with_weights(model, weights), calibration=[X, X], passes=[ALL], timing=False)
    assert shapes_in(result.model)["v"] == (4, 4, 3, 3)
    (report,) = [p for p in result.report.passes if p.name == "remove_dead_channels"]
    assert (report.changed, report.outcome) == (1, "applied")


def spoiled(model: ir.Model, how: str, seed: int, share: float) -> tuple[ir.Model, dict[Group, int]]:
    """A clone in which a share of each group is not read, made with zeros, or equal to others; and how many of each."""
    view, rng = GraphView(model), np.random.default_rng(seed)
    coupling = Coupling(view)
    values = ChannelValues(view, coupling)
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    chosen: dict[Group, int] = {}
    for group in coupling.groups:
        ends, free = values.ends[group], np.flatnonzero(~group.fixed)
        if group in values.refused or group.size < 2 or not ends or any(e.part is None for e in ends) or not free.size:
            continue
        atoms = rng.permutation(free)[: max(1, round(share * (free.size - 1)))]
        others = np.setdiff1d(np.arange(group.size), atoms)
        equal_to = rng.choice(others, len(atoms))
        chosen[group] = len(atoms)
        for part in group.parts:
            axis, read = part.factor.axis, any(e.part is part for e in ends)
            node, _, index = axis.use.rpartition(":")
            value = rewriter.node(node).inputs[int(index)] if axis.use else rewriter.find(axis.value)
            if read != (how == "unread") or value is None or not view.is_float_weight(value):
                continue
            array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
            moved = by_position(array, axis.dim, part, coupling)
            for atom, other in zip(atoms, equal_to, strict=True):
                to, of = np.flatnonzero(part.atoms == atom), np.flatnonzero(part.atoms == other)
                moved[to] = moved[of] if how == "twin" and len(to) == len(of) else 0
            if axis.use:
                rewriter.set_weight(rewriter.node(node), int(index), array)
            else:
                rewriter.replace_weight(value, array)
    return copy, chosen


@pytest.mark.parametrize("how", ["unread", "zero", "twin"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_lose_just_what_is_dead(name: str, how: str) -> None:
    model = ir.from_proto(FAMILIES[name]())
    models.canonicalize(model)
    model = models.infer_types(model)
    assert tidied(model) is model
    dead, chosen = spoiled(model, how, 1, 0.25)
    assert chosen
    view = GraphView(dead)
    gone: dict[str, int] = {}
    for site in ALL.sites(view):
        if isinstance(site, Skipped):
            continue
        (choice,) = ALL.choices(site, view, TARGET)
        before, _, after = choice.name.partition(" of ")
        gone[site.key] = int(after.split()[0]) - int(before)
    wanted = {group.key: count for group, count in chosen.items()}
    if how == "twin":  # equal atoms that take part in different tensors, or have several positions, stay
        assert gone and all(gone[key] <= wanted[key] for key in gone)
    else:
        assert gone == wanted
    after_all = tidied(dead)
    assert models.weight_bytes(after_all) < models.weight_bytes(dead)
    assert equal(dead, after_all, list(family_feeds(name, 2, batch=2)))


HOW = st.sampled_from(["unread", "zero", "twin"])


@settings(max_examples=20, deadline=None)
@given(programs(PICTURE_STEPS), HOW, st.integers(0, 9))
def test_random_graphs_of_pictures(program: list[tuple[str, int, int]], how: str, seed: int) -> None:
    dead, _ = spoiled(models.infer_types(picture_graph(program)), how, seed, 0.5)
    assert equal(dead, tidied(dead), [{"x": normal(1, 2, 3, 6, 6)}])


@settings(max_examples=20, deadline=None)
@given(programs(SEQUENCE_STEPS), HOW, st.integers(0, 9))
def test_random_graphs_of_sequences(program: list[tuple[str, int, int]], how: str, seed: int) -> None:
    dead, _ = spoiled(models.infer_types(sequence_graph(program)), how, seed, 0.5)
    assert equal(dead, tidied(dead), [{"x": normal(1, 2, 5, 5)}])


@given(st.integers(2, 40), st.integers(2, 30), st.data())
def test_the_quick_look_misses_nothing(rows: int, columns: int, data: st.DataObject) -> None:
    weight = normal(rows * 50 + columns, rows, columns, 3, 3)
    bias = normal(columns, rows)
    body = f"g (float[1, {columns}, 5, 5] x) => (float[1, {rows}, 3, 3] y) {{ a = Conv(x, w, b)  y = Relu(a) }}"
    i, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    other = (i + data.draw(st.integers(1, rows - 1))) % rows
    for what in ("nothing", "row", "column", "almost", "twin"):
        array, shift = weight.copy(), bias.copy()
        if what == "row":
            array[i] = 0
        elif what == "column":
            array[:, j] = 0
        elif what == "almost":
            array[i] = 0
            array[i, j, 2, 1] = 1e-30
        elif what == "twin":
            array[i], shift[i] = array[other], shift[other]
        found = suspects(GraphView(text(body, {"w": array, "b": shift})))
        assert set(found) == {"row": {("w", 0)}, "column": {("w", 1)}, "twin": {("w", 0)}}.get(what, set())


def test_skip_is_an_answer() -> None:
    view = GraphView(wide(1))
    site = next(s for s in ALL.sites(view) if isinstance(s, Site))
    with pytest.raises(Skip):
        RemoveDeadChannels(multiple=64).choices(site, view, TARGET)
