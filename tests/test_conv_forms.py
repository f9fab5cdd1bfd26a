"""Low-rank forms of convolutions: exact at their true rank, at the optimum, and what they say they lose is lost."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import cast

import numpy as np
import onnx_ir as ir
import pytest
from cuts import named
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, check, normal, ops, run

from onnxcompress import model as models
from onnxcompress.base import Skip
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.errors import PassError
from onnxcompress.passes._conv_forms import conv_forms
from onnxcompress.passes._conv_layer import conv_layer
from onnxcompress.passes._forms import Factors, Form, Ranks, Settings
from onnxcompress.passes._ridge import trusted_ridge
from onnxcompress.rewrite import Rewriter
from onnxcompress.sketch import draw
from onnxcompress.statistics import Evidence
from onnxcompress.view import GraphView

PLAIN = Settings(aware=False)
EXACT = Settings(ridge=0.0)
NOTHING = Evidence()


def convolution(
    weight: Array, size: tuple[int, ...], attributes: str = "", bias: Array | None = None, channels: int | None = None
) -> ir.Model:
    """One Conv, called like the y it makes, reading x of two samples."""
    read = channels or weight.shape[1]
    dims = ",".join(map(str, (2, read, *size)))
    made = ",".join(["n", *(f"d{i}" for i in range(1 + len(size)))])
    parts = {"w": weight} if bias is None else {"w": weight, "b": bias}
    body = f"g (float[{dims}] x) => (float[{made}] y) {{ y = Conv {attributes} (x, {', '.join(parts)}) }}"
    return named(body, parts)


def forms_of(model: ir.Model) -> dict[str, Form]:
    view = GraphView(model)
    return {form.name: form for form in conv_forms(view.node("y"), view)}


def written(model: ir.Model, form: Form, factors: Factors, ranks: Ranks) -> ir.Model:
    """A clone with the form in the place of the layer."""
    clone = model.clone()
    rewriter = Rewriter(clone)
    node = rewriter.node(form.nodes[0])
    made = draw(rewriter, form.drawing(ranks), factors.weights, after=node, prefix="y")
    rewriter.replace_node(node, made["y"])
    rewriter.drop_unused_weights()
    check(models.infer_types(clone))
    assert set(ops(clone)) == {"Conv"}
    return clone


def images(seed: int, channels: int, size: tuple[int, ...], count: int = 4) -> list[dict[str, Array]]:
    """Samples whose channels depend on one another, differ in size and in mean, and are smooth."""
    mix = normal(seed, channels, channels) * np.exp(normal(seed + 1, channels))[:, None]
    feeds = []
    for i in range(count):
        noise = normal(seed + 10 + i, 2, channels, *size)
        for axis in range(2, noise.ndim):
            noise = noise + np.roll(noise, 1, axis) * np.float32(0.7)
        x = np.einsum("ij,bj...->bi...", mix, noise) + normal(seed + 2, channels).reshape(-1, *(1,) * len(size))
        feeds.append({"x": x.astype(np.float32)})
    return feeds


def learned(model: ir.Model, form: Form, feeds: list[dict[str, Array]]) -> Evidence:
    return calibrate(model, form.needs(), open_data(feeds, model))


def outputs(model: ir.Model, feeds: list[dict[str, Array]]) -> Array:
    """(samples, outputs, positions) in float64."""
    found = np.concatenate([run(model, f)["y"] for f in feeds]).astype(np.float64)
    return found.reshape(*found.shape[:2], -1)


def share(model: ir.Model, new: ir.Model, feeds: list[dict[str, Array]], centred: bool) -> float:
    """The part of the output's energy that is not there any more."""
    old, now = outputs(model, feeds), outputs(new, feeds)
    about = old.mean((0, 2), keepdims=True) if centred else 0.0
    return float(np.square(old - now).sum() / np.square(old - about).sum())


# --- weights of a true rank ------------------------------------------------------------------------

GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "plain": ((3, 3), (9, 8), ""),
    "pads": ((3, 3), (9, 8), "<pads = [1,1,1,1]>"),
    "asymmetric pads, strides": ((3, 2), (9, 8), "<pads = [0,1,2,0], strides = [2,3]>"),
    "dilations": ((3, 3), (9, 11), "<dilations = [1,2], pads = [1,2,1,2]>"),
    "all of them": ((2, 3), (9, 11), "<dilations = [3,2], pads = [1,0,2,3], strides = [2,1]>"),
    "valid": ((3, 3), (9, 8), '<auto_pad = "VALID", strides = [2,2]>'),
    "same": ((4, 3), (9, 8), '<auto_pad = "SAME_UPPER">'),
    "same, lower, strides": ((4, 3), (9, 8), '<auto_pad = "SAME_LOWER", strides = [2,3]>'),
    "one row": ((1, 5), (9, 8), "<pads = [1,2,0,2], strides = [2,1]>"),
    "one column": ((5, 1), (9, 8), "<pads = [2,1,2,0], strides = [2,3]>"),
    "one dimension": ((7,), (30,), "<pads = [2,4], strides = [2], dilations = [2]>"),
    "three dimensions": ((2, 3, 2), (5, 6, 4), "<pads = [1,0,1,0,2,0], strides = [1,2,1]>"),
}
OUT, IN = 12, 10


def weight_of(name: str, kernel: tuple[int, ...], seed: int = 3) -> tuple[Array, Ranks]:
    """A weight (OUT, IN, *kernel) that a form can write exactly, and the ranks."""
    taps = int(np.prod(kernel))
    if name == "channel":
        return np.tensordot(normal(seed, OUT, 3), normal(seed + 1, 3, IN, *kernel), 1), (3,)
    if name == "input":
        return np.einsum("ort,rc->oct", normal(seed, OUT, 3, taps), normal(seed + 1, 3, IN)).reshape(
            OUT, IN, *kernel
        ), (3,)
    if name == "spatial":
        rows, columns = kernel
        return np.einsum("orw,rch->ochw", normal(seed, OUT, 3, columns), normal(seed + 1, 3, IN, rows)), (3,)
    if name == "tucker":
        left, core, right = normal(seed, OUT, 4), normal(seed + 1, 4, 3, taps), normal(seed + 2, 3, IN)
        return np.einsum("oq,qrt,rc->oct", left, core, right).reshape(OUT, IN, *kernel), (3, 4)
    parts = (np.linalg.qr(normal(seed + i, n, 2))[0] for i, n in enumerate((OUT, IN, taps)))
    return np.einsum("or,cr,tr->oct", *parts).reshape(OUT, IN, *kernel), (2,)


CASES = [
    (name, geometry)
    for name, geometry in itertools.product(("channel", "input", "spatial", "tucker", "cp"), GEOMETRIES)
    if name != "spatial" or (len(GEOMETRIES[geometry][0]) == 2 and min(GEOMETRIES[geometry][0]) > 1)
]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(("name", "geometry"), CASES)
def test_a_weight_of_true_rank_comes_back(name: str, geometry: str, aware: bool) -> None:
    kernel, size, attributes = GEOMETRIES[geometry]
    weight, ranks = weight_of(name, kernel)
    model = convolution(weight.astype(np.float32), size, attributes, normal(9, OUT))
    form, feeds = forms_of(model)[name], images(20, IN, size)
    factors = form.factors(ranks, learned(model, form, feeds) if aware else NOTHING, Settings())
    assert factors.lost < 1e-9
    assert share(model, written(model, form, factors, ranks), feeds, centred=False) < 1e-9
    less = tuple(r - 1 for r in ranks)
    worse = form.factors(less, NOTHING, Settings())
    assert share(model, written(model, form, worse, less), feeds, centred=False) > 1e-4, "the check can fail"


@pytest.mark.parametrize("name", ["channel", "input"])
@pytest.mark.parametrize("aware", [False, True])
def test_groups(name: str, aware: bool) -> None:
    parts = []
    for group in range(3):
        seed = 40 + 5 * group
        if name == "channel":
            parts.append(np.tensordot(normal(seed, 8, 2), normal(seed + 1, 2, 6, 3, 3), 1))
        else:
            parts.append(np.einsum("orhw,rc->ochw", normal(seed, 8, 2, 3, 3), normal(seed + 1, 2, 6)))
    weight = np.concatenate(parts).astype(np.float32)
    model = convolution(weight, (7, 8), "<group = 3, pads = [1,1,1,1], strides = [1,2]>", normal(9, 24), channels=18)
    form, feeds = forms_of(model)[name], images(20, 18, (7, 8))
    assert set(forms_of(model)) == {"channel", "input"}
    factors = form.factors((2,), learned(model, form, feeds) if aware else NOTHING, Settings())
    after = written(model, form, factors, (2,))
    assert share(model, after, feeds, centred=False) < 1e-9
    assert all(node.attributes.get_int("group", 1) == 3 for node in after.graph)


def test_one_tap_is_a_matrix() -> None:
    weight = (normal(1, 12, 3) @ normal(2, 3, 10)).reshape(12, 10, 1, 1)
    model = convolution(weight, (6, 5), "<strides = [2,1], pads = [1,0,0,0]>")
    forms = forms_of(model)
    assert list(forms) == ["svd"] and forms["svd"].most == (10,)
    factors = forms["svd"].factors((3,), NOTHING, Settings())
    assert share(model, written(model, forms["svd"], factors, (3,)), images(3, 10, (6, 5)), centred=False) < 1e-9


# --- what is said to be lost is lost ---------------------------------------------------------------

ALL = ["channel", "input", "spatial", "tucker", "cp"]
SOME: dict[str, Ranks] = {"channel": (4,), "input": (4,), "spatial": (5,), "tucker": (5, 6), "cp": (14,)}


def layer(bias: bool = True) -> tuple[ir.Model, list[dict[str, Array]]]:
    weight = normal(5, OUT, IN, 3, 3)
    model = convolution(weight, (11, 10), "<pads = [1,0,1,2], strides = [1,2]>", normal(9, OUT) if bias else None)
    return model, images(30, IN, (11, 10))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_what_is_lost_is_measured(name: str, bias: bool) -> None:
    model, feeds = layer(bias)
    form, ranks = forms_of(model)[name], SOME[name]
    factors = form.factors(ranks, learned(model, form, feeds), Settings())
    after = written(model, form, factors, ranks)
    assert share(model, after, feeds, centred=True) == pytest.approx(factors.lost, rel=1e-3)
    wanted = outputs(model, feeds).mean((0, 2))
    np.testing.assert_allclose(outputs(after, feeds).mean((0, 2)), wanted, atol=1e-5 * np.abs(wanted).max())
    plain = form.factors(ranks, NOTHING, Settings())
    assert np.abs(outputs(written(model, form, plain, ranks), feeds).mean((0, 2)) - wanted).max() > 1e-2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ALL)
def test_to_know_what_is_read_never_loses_more(name: str, seed: int) -> None:
    model = convolution(normal(seed, OUT, IN, 3, 3), (9, 9), "<pads = [1,1,1,1]>", normal(9, OUT))
    feeds = images(60 + 20 * seed, IN, (9, 9))
    form, ranks = forms_of(model)[name], SOME[name]
    evidence = learned(model, form, feeds)
    aware, plain = (form.factors(ranks, evidence, s) for s in (Settings(), PLAIN))
    lost = [share(model, written(model, form, f, ranks), feeds, centred=True) for f in (aware, plain)]
    assert lost[0] < lost[1]


@pytest.mark.parametrize("taps", [1, 3])
def test_the_channel_form_is_at_the_optimum(taps: int) -> None:
    """Singular values of W L, L L' = S, that are left out: no weight of that rank loses less."""
    model = convolution(normal(5, OUT, IN, taps, taps), (31, 31), "", normal(9, OUT))
    feeds = images(30, IN, (31, 31))  # twenty rows a feature and more: the ridge is the one asked for
    form = next(iter(forms_of(model).values()))
    evidence = learned(model, form, feeds)
    seen = evidence.second_moments(form.needs()[0])
    rows = normal(5, OUT, IN, taps, taps).reshape(OUT, -1).astype(np.float64)
    values, vectors = np.linalg.eigh(seen.covariance)
    sizes = np.linalg.svd((rows @ vectors) * np.sqrt(np.maximum(values, 0)), compute_uv=False)
    for rank in range(1, form.most[0] + 1):
        optimum = np.square(sizes[rank:]).sum() / np.square(sizes).sum()
        assert form.factors((rank,), evidence, EXACT).lost == pytest.approx(optimum, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["input", "spatial"])
def test_without_windows_the_others_are_at_their_optimum_too(name: str) -> None:
    """With S = I each is the singular value decomposition of its own unfolding."""
    model, _ = layer()
    form = forms_of(model)[name]
    weight = normal(5, OUT, IN, 3, 3).astype(np.float64)
    unfolded = weight.transpose(0, 2, 3, 1).reshape(-1, IN)
    if name == "spatial":
        unfolded = weight.transpose(0, 3, 1, 2).reshape(-1, 3 * IN)
    sizes = np.square(np.linalg.svd(unfolded, compute_uv=False))
    for rank in (1, 4, form.most[0]):
        expected = sizes[rank:].sum() / sizes.sum()
        assert form.factors((rank,), NOTHING, Settings()).lost == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_more_rank_loses_less_and_all_of_it_nothing(name: str) -> None:
    model, feeds = layer()
    form = forms_of(model)[name]
    for evidence in (NOTHING, learned(model, form, feeds)):
        most = form.most
        some = [tuple(max(1, m * part // 4) for m in most) for part in (1, 2, 3, 4)]
        lost = [form.factors(ranks, evidence, Settings()).lost for ranks in some]
        assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-12 and lost[0] > 1e-3


def test_wide_windows_are_seen_by_channel() -> None:
    """100 x 25 features are too many; taps then count as if they knew nothing of one another."""
    channels = 100
    model = convolution(normal(5, 8, channels, 5, 5), (12, 12), "", normal(9, 8))
    feeds = images(30, channels, (12, 12), count=2)
    for form in forms_of(model).values():
        (need,) = form.needs()
        assert need.patches is None and need.axis == 1
        ranks = form.at_share(0.4, 1)
        assert ranks is not None
        evidence = learned(model, form, feeds)
        lost = [
            share(model, written(model, form, form.factors(ranks, evidence, s), ranks), feeds, centred=True)
            for s in (Settings(), PLAIN)
        ]
        assert lost[0] < lost[1], form.name


# --- biases, fallbacks, refusals -------------------------------------------------------------------


def test_a_bias_that_is_worked_out_stays_where_it_is() -> None:
    weight = normal(1, OUT, IN, 3, 3)
    body = """g (float[2,10,31,31] x, float[12] c) => (float[2,12,29,29] y) {
      b = Relu (c)  y = Conv (x, w, b) }"""
    model = named(body, {"w": weight})
    form = forms_of(model)["channel"]
    assert form.drawing((3,))[-1].inputs[2] == "b"
    feeds = [{**f, "c": normal(i, OUT)} for i, f in enumerate(images(30, IN, (31, 31)))]
    evidence = learned(model, form, feeds)
    factors = form.factors((3,), evidence, EXACT)
    assert "bias" not in {slot.name for slot in factors.weights}
    seen = evidence.second_moments(form.needs()[0])
    rows = weight.reshape(OUT, -1).astype(np.float64)
    sizes = np.linalg.eigvalsh(rows @ seen.matrix @ rows.T)[::-1]
    assert factors.lost == pytest.approx(sizes[3:].sum() / sizes.sum(), rel=1e-6)
    clone = model.clone()
    rewriter = Rewriter(clone)
    made = draw(rewriter, form.drawing((3,)), factors.weights, after=rewriter.node("y"), prefix="y")
    rewriter.replace_node(rewriter.node("y"), made["y"])
    check(clone)
    change = np.concatenate([run(model, f)["y"] - run(clone, f)["y"] for f in feeds])
    assert np.square(change, dtype=np.float64).sum(1).mean() / (sizes.sum()) == pytest.approx(factors.lost, rel=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_known_changes_nothing(name: str) -> None:
    model, feeds = layer()
    form, ranks = forms_of(model)[name], SOME[name]
    evidence = learned(model, form, feeds)
    grams = {need: evidence.second_moments(need) for need in form.needs()}
    plain = form.factors(ranks, NOTHING, Settings())
    for same in (
        form.factors(ranks, evidence, PLAIN),
        form.factors(ranks, Evidence(grams=grams, synthetic=True), Settings()),
    ):
        assert same.lost == plain.lost
        for slot, array in plain.weights.items():
            np.testing.assert_array_equal(array, same.weights[slot])
    bias = next(array for slot, array in plain.weights.items() if slot.name == "bias")
    np.testing.assert_array_equal(bias, normal(9, OUT))


@pytest.mark.parametrize("name", ALL)
def test_the_same_again(name: str) -> None:
    model, feeds = layer()
    evidence = learned(model, forms_of(model)[name], feeds)
    one, two = (forms_of(model)[name].factors(SOME[name], evidence, Settings()) for _ in range(2))
    assert one.lost == two.lost and list(one.weights) == list(two.weights)
    for slot, array in one.weights.items():
        np.testing.assert_array_equal(array, two.weights[slot])


@pytest.mark.parametrize("name", ALL)
def test_links_carry_even_sizes(name: str) -> None:
    """No link is far larger than the next, direction by direction: both are to become int8."""
    model, feeds = layer()
    form = forms_of(model)[name]
    for evidence in (NOTHING, learned(model, form, feeds)):
        factors = form.factors(SOME[name], evidence, Settings())
        norms = [float(np.linalg.norm(a)) for s, a in factors.weights.items() if s.name != "bias"]
        assert max(norms) < 30 * min(norms)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_an_error(bad: float) -> None:
    weight = normal(5, OUT, IN, 3, 3)
    weight[1, 2, 0, 1] = bad
    for form in forms_of(convolution(weight, (9, 9))).values():
        with pytest.raises(PassError, match="node 'y' is NaN or infinite"):
            form.factors((1,) * len(form.most), NOTHING, Settings())


def test_ranks_out_of_bounds_are_an_error() -> None:
    model, _ = layer()
    for form in forms_of(model).values():
        for ranks in (tuple(m + 1 for m in form.most), (0,) * len(form.most), (1, 1, 1)):
            with pytest.raises(PassError, match=f"has no {form.name} form"):
                form.factors(ranks, NOTHING, Settings())


@pytest.mark.parametrize(
    ("body", "parts", "reason"),
    [
        ("y = Conv <group = 8> (x, w)", {"w": normal(1, 8, 1, 3, 3)}, "depthwise"),
        ("v = Relu (w)  y = Conv (x, v)", {"w": normal(1, 8, 8, 3, 3)}, "no float32 constant"),
        ("y = Conv (x, w)", {"w": normal(1, 1, 8, 1, 1)}, "too small"),
        ('y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w)', {"w": normal(1, 8, 8, 3, 3)}, "size"),
    ],
)
def test_what_is_left_alone_has_a_reason(body: str, parts: dict[str, Array], reason: str) -> None:
    model = named(f"g (float[n,8,h,w] x) => (float[n,c,i,j] y) {{ {body} }}", parts)
    view = GraphView(model)
    with pytest.raises(Skip, match=reason):
        conv_forms(view.node("y"), view)


def test_inside_a_branch_nothing_can_be_observed() -> None:
    body = """g (bool p, float[2,10,9,9] x) => (float[2,12,7,7] z) {
      z = If (p) <then_branch = t () => (float[2,12,7,7] y) { y = Conv (x, w) },
                  else_branch = e () => (float[2,12,7,7] u) { u = Conv (x, v) }> }"""
    model = named(body, {"w": normal(1, OUT, IN, 3, 3), "v": normal(2, OUT, IN, 3, 3)})
    view = GraphView(model)
    for form in conv_forms(view.node("y"), view):
        assert form.needs() == ()
        assert len(form.drawing(form.most)[-1].inputs) == 2, "no bias where no mean is known"


def test_nothing_but_zeros() -> None:
    model = convolution(np.zeros((OUT, IN, 3, 3), np.float32), (9, 9), "", normal(9, OUT))
    feeds = images(30, IN, (9, 9))
    for form in forms_of(model).values():
        for evidence in (NOTHING, learned(model, form, feeds)):
            factors = form.factors(SOME[form.name], evidence, Settings())
            assert factors.lost == 0
            assert share(model, written(model, form, factors, SOME[form.name]), feeds, centred=False) == 0


@pytest.mark.parametrize("name", ALL)
def test_fewer_rows_than_features_are_regularized(name: str) -> None:
    """One window a sample of 90 features, and channels that are never anything but zero."""
    model = convolution(normal(5, OUT, IN, 3, 3), (3, 3), "", normal(9, OUT))
    feeds = images(30, IN, (3, 3), count=3)
    for feed in feeds:
        feed["x"][:, :2] = 0
    form = forms_of(model)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors = form.factors(SOME[name], learned(model, form, feeds), Settings())
    assert all(np.isfinite(a).all() and np.abs(a).max() < 1e3 for a in factors.weights.values())
    assert share(model, written(model, form, factors, SOME[name]), feeds, centred=True) < 0.2


@pytest.mark.parametrize("few", [True, False])
def test_few_rows_are_trusted_less(few: bool) -> None:
    """Where rows are few, the ridge is one that loses less on others; where they are many, the one asked for."""
    channels, size = (40, (3, 4)) if few else (10, (20, 20))
    weight = normal(5, 48, channels, 1, 1)
    model = convolution(weight, size, "", normal(9, 48))
    form = forms_of(model)["svd"]
    feeds = [{"x": normal(30 + i, 2, channels, *size)} for i in range(8)]  # all directions count alike, in truth
    seen, fresh = (learned(model, form, part) for part in (feeds[:4], feeds[4:]))
    rows = weight.reshape(48, -1).astype(np.float64)
    found = trusted_ridge(rows, seen.second_moments(form.needs()[0]), 1e-4, centred=True, layer="y")
    assert (found > 1e-4) == few
    if few:
        rank, unseen = (10,), fresh.second_moments(form.needs()[0]).covariance

        def lost(factors: Factors) -> float:
            first, last = (a for slot, a in factors.weights.items() if slot.name != "bias")
            change = rows - last.reshape(48, -1).astype(np.float64) @ first.reshape(10, -1)
            return float(np.vdot(change @ unseen, change))

        moments = seen.second_moments(form.needs()[0])
        blind = Evidence(
            grams={form.needs()[0]: replace(moments, matrix=moments.matrix.copy(), first=None)}
        )  # no halves: nothing to check on
        trusting, careful = (form.factors(rank, e, Settings()) for e in (blind, seen))
        assert lost(careful) < lost(trusting)


# --- any shape -------------------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Array, tuple[int, ...], str, int]:
    dims = draw(st.integers(1, 2))
    groups = draw(st.sampled_from((1, 1, 2)))
    channels, outputs = draw(st.integers(3, 6)), draw(st.integers(3, 7))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    strides, dilations = ([draw(st.integers(1, 2)) for _ in range(dims)] for _ in range(2))
    pads = [draw(st.integers(0, 2)) for _ in range(2 * dims)]
    text = f"<group = {groups}, strides = {strides}, dilations = {dilations}, pads = {pads}>"
    size = tuple(draw(st.integers(6, 8)) for _ in range(dims))
    return normal(draw(st.integers(0, 99)), groups * outputs, channels, *kernel), size, text, groups * channels


@settings(max_examples=40, deadline=None, derandomize=True)
@given(geometry=geometries(), aware=st.booleans(), bias=st.booleans(), part=st.integers(1, 4))
def test_any_convolution(geometry: tuple[Array, tuple[int, ...], str, int], aware: bool, bias: bool, part: int) -> None:
    weight, size, attributes, channels = geometry
    model = convolution(weight, size, attributes, normal(9, len(weight)) if bias else None, channels)
    try:
        forms = forms_of(model)
    except Skip:
        return
    feeds = images(30, channels, size)
    for form in forms.values():
        ranks = tuple(max(1, m * part // 4) for m in form.most)
        evidence = learned(model, form, feeds) if aware else NOTHING
        factors = form.factors(ranks, evidence, Settings())
        after = written(model, form, factors, ranks)
        assert run(after, feeds[0])["y"].shape == run(model, feeds[0])["y"].shape
        if part == 4:
            assert share(model, after, feeds, centred=False) < 1e-9
        elif aware:
            assert share(model, after, feeds, centred=True) == pytest.approx(factors.lost, rel=1e-3, abs=1e-9)


def test_the_layer_says_what_it_is() -> None:
    model = convolution(normal(5, OUT, IN, 3, 2), (9, 9), "<strides = [1,2]>", normal(9, OUT))
    view = GraphView(model)
    found = conv_layer(view.node("y"), view)
    assert (found.outputs, found.channels, found.taps, found.old_weights) == (OUT, IN, 6, OUT * IN * 6 + OUT)
    for form in forms_of(model).values():
        weights = cast(int, form.weights(form.most))
        assert form.weights((1,) * len(form.most)) < form.old_weights < weights + 1_000_000
        for small, large in itertools.pairwise(form.ladder(1)):
            assert form.weights(small) < form.weights(large)
