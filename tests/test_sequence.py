"""Last factors refitted in sequence: the least squares of it, which layers and when, and what it gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from cuts import named, weights
from models import Array, Feeds, check, normal, run

from onnxcompress import model as models
from onnxcompress.base import Choice, Pass, Site
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.notes import noted
from onnxcompress.paired import cross_moments
from onnxcompress.passes import _sequence as sequence
from onnxcompress.passes._constant_sum import absorb
from onnxcompress.passes._low_rank import basis, metric
from onnxcompress.passes._readers import bias_place
from onnxcompress.rewrite import Rewriter
from onnxcompress.settling import settled
from onnxcompress.statistics import CrossMoments, Evidence, Need, Pair, Patches, Statistic
from onnxcompress.target import Target
from onnxcompress.trial import build
from onnxcompress.view import GraphView

MLP = """g (float[N,24] x) => (float[N,8] y) {
  a = Gemm (x, w1, b1)
  p = Relu (a)
  m = MatMul (p, w2)
  b = Add (m, b2)
  q = Relu (b)
  c = Gemm <transB = 1, beta = 0.5> (q, w3, b3)
  r = Tanh (c)
  s = Add (r, p)
  d = MatMul (s, w4)
  t = Relu (d)
  y = Gemm (t, w5, b5)
}"""
MLP_PARTS: dict[str, Array] = {
    "w1": normal(1, 24, 32) / 4, "b1": normal(2, 32) / 4, "w2": normal(3, 32, 32) / 4, "b2": normal(4, 32) / 4,
    "w3": normal(5, 32, 32) / 4, "b3": normal(6, 1, 32) / 4, "w4": normal(7, 32, 32) / 4, "w5": normal(8, 32, 8) / 4,
    "b5": normal(9, 8) / 4,
}  # fmt: skip
CNN = """g (float[N,6,10,9] x) => (float[N,8,5,5] y) {
  a = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (x, w1, b1)
  p = Relu (a)
  b = Conv <kernel_shape = [3,2], pads = [1,0,1,1], strides = [2,2]> (p, w2, b2)
  q = Relu (b)
  c = Conv <kernel_shape = [1,1]> (q, w3, b3)
  r = Relu (c)
  s = Add (r, q)
  y = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (s, w4)
}"""
CNN_PARTS: dict[str, Array] = {
    "w1": normal(1, 16, 6, 3, 3) / 6, "b1": normal(2, 16) / 4, "w2": normal(3, 16, 16, 3, 2) / 8,
    "b2": normal(4, 16) / 4, "w3": normal(5, 16, 16, 1, 1) / 4, "b3": normal(6, 16) / 4,
    "w4": normal(7, 8, 16, 3, 3) / 8,
}  # fmt: skip
_MIX = normal(50, 24, 24) * np.linspace(2, 0.2, 24, dtype=np.float32)
MLP_FEEDS: Feeds = [{"x": normal(100 + i, 64, 24) @ _MIX / 4} for i in range(40)]
CNN_FEEDS: Feeds = [{"x": normal(100 + i, 2, 6, 10, 9) + normal(200 + i, 1, 6, 1, 1)} for i in range(40)]
HELD_OUT = 10


@dataclass(frozen=True)
class Refits(Pass):
    """Refits what is noted."""

    name: ClassVar[str] = "refits"

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return []

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        raise NotImplementedError

    def settling(self, view: GraphView) -> Iterable[Collection[Need | Pair]]:
        return sequence.rounds(view)

    def settle(self, rewriter: Rewriter, before: Evidence, after: Evidence) -> None:
        sequence.settle(rewriter, after)


def level(model: ir.Model, wanted: ir.Model, feeds: Feeds) -> float:
    """Decibels of the output against another model's."""
    pairs = [(run(model, f)["y"].astype(float), run(wanted, f)["y"].astype(float)) for f in feeds]
    noise = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return 10 * math.log10(sum(float(np.square(b).sum()) for _, b in pairs) / noise) if noise else math.inf


def crossed(now: ir.Model, then: ir.Model, wanted: Collection[Need | Pair], feeds: Feeds) -> Evidence:
    data = open_data([dict(f) for f in feeds], then)
    return Evidence(crosses=cross_moments(now, then, [p for p in wanted if isinstance(p, Pair)], data))


def refitted(now: ir.Model, then: ir.Model, feeds: Feeds) -> ir.Model:
    """All rounds, whatever comes of it."""
    copy = models.clone(now)
    for pairs in sequence.rounds(GraphView(copy)):
        rewriter = Rewriter(copy)
        sequence.settle(rewriter, crossed(copy, then, pairs, feeds))
        rewriter.drop_unused_weights()
    check(copy)
    return copy


def need_of(node: ir.Node) -> Need:
    if node.op_type != "Conv":
        return Need(str(node.inputs[0].name), Statistic.GRAM, -1)
    kernel = tuple(node.attributes.get_ints("kernel_shape", ()))
    pads = tuple(node.attributes.get_ints("pads", (0,) * 4))
    steps = tuple(node.attributes.get_ints("strides", (1, 1)))
    return Need(str(node.inputs[0].name), Statistic.GRAM, patches=Patches(kernel, steps, (1, 1), pads[:2], pads[2:]))


def matrix_of(node: ir.Node) -> npt.NDArray[np.float64]:
    array = np.asarray(node.inputs[1].const_value.numpy(), np.float64)
    if node.op_type == "Conv":
        return array.reshape(len(array), -1)
    return array if node.attributes.get_int("transB", 0) else array.T


def factored(model: ir.Model, feeds: Feeds, rank: Callable[[int], int]) -> ir.Model:
    """A copy with every layer as two, each the best for what the model itself reads, and noted."""
    nodes = list(GraphView(model).nodes("MatMul", "Gemm", "Conv"))
    evidence = calibrate(model, {need_of(n) for n in nodes}, open_data([dict(f) for f in feeds], model))
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    for old in nodes:
        node, weight = rewriter.node(str(old.name)), matrix_of(old)
        seen, place = evidence.second_moments(need_of(old)), bias_place(old)
        second = metric(seen.covariance if place else seen.matrix, weight.shape[1], 1e-6)
        left, right = basis(weight, second).cut(rank(min(weight.shape)))
        shift = (weight - left @ right) @ seen.mean
        u, v = left.astype(np.float32), right.astype(np.float32)
        attributes = dict(node.attributes)
        if node.op_type == "Conv":
            shape = np.asarray(old.inputs[1].const_value.numpy()).shape
            first = rewriter.constant(v.reshape(-1, *shape[1:]), f"{old.name}_v")
            (inner,) = rewriter.insert("Conv", [node.inputs[0], first], attributes, before=node)
            last = rewriter.constant(u[:, :, None, None], f"{old.name}_u")
            extra = [*node.inputs[2:]]
            (made,) = rewriter.insert("Conv", [inner, last, *extra], {"kernel_shape": (1, 1)}, after=node)
        else:
            (inner,) = rewriter.insert("MatMul", [node.inputs[0], rewriter.constant(v.T, f"{old.name}_v")], before=node)
            stored = u if node.attributes.get_int("transB", 0) else u.T
            last = rewriter.constant(stored, f"{old.name}_u")
            (made,) = rewriter.insert(node.op_type, [inner, last, *node.inputs[2:]], attributes, after=node)
        rewriter.replace_node(node, made)
        producer = made.producer()
        assert producer is not None
        if place is not None:
            there = bias_place(producer)
            assert there is not None
            absorb(rewriter, there, shift, 1 if producer.op_type == "Conv" else -1)
        sequence.note_factored(producer, str(made.name))
    rewriter.drop_unused_weights()
    check(copy)
    return copy


def spoiled(model: ir.Model, layer: str, scale: float = 0.3) -> ir.Model:
    """A copy whose layer has another weight and is noted; the rest is what it was."""
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    node = rewriter.node(layer)
    index = 1 if GraphView(copy).is_float_weight(node.inputs[1]) else 0
    array = np.asarray(node.inputs[index].const_value.numpy())
    rewriter.set_weight(node, index, array + scale * normal(77, *array.shape))
    sequence.note_factored(node, layer)
    return copy


NETS = {"mlp": (MLP, MLP_PARTS, MLP_FEEDS), "cnn": (CNN, CNN_PARTS, CNN_FEEDS)}


# --- what it gains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_outputs_gain_where_every_layer_was_the_best_for_itself(name: str, share: float) -> None:
    body, parts, feeds = NETS[name]
    model = named(body, parts)
    fitted, held_out = feeds[HELD_OUT:], feeds[:HELD_OUT]
    layerwise = factored(model, fitted, lambda most: max(1, round(share * most)))
    after = refitted(layerwise, model, fitted)
    assert level(after, model, held_out) > level(layerwise, model, held_out)


class Sweeps:
    """What settling asks for."""

    def __init__(self, model: ir.Model, feeds: Feeds) -> None:
        self.model, self.feeds, self.rounds = model, feeds, 0

    def before(self, needs: Collection[Need]) -> Evidence:
        assert not needs
        return Evidence()

    def after(self, model: ir.Model, wanted: Collection[Need | Pair]) -> Evidence:
        self.rounds += 1
        return crossed(model, self.model, wanted, self.feeds)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("samples", [1, 2, 30])
def test_never_worse_on_what_it_is_judged_by(name: str, samples: int) -> None:
    body, parts, feeds = NETS[name]
    model = named(body, parts)
    fitted, held_out = [{"x": f["x"][:2]} for f in feeds[HELD_OUT : HELD_OUT + samples]], feeds[:HELD_OUT]
    before = factored(model, fitted, lambda most: max(1, most // 2))
    sweeps = Sweeps(model, fitted)
    data = models.serialize(before)
    after = settled(before, Refits(), sweeps.before, sweeps.after, lambda m: level(m, model, held_out))
    assert sweeps.rounds == len(list(sequence.rounds(GraphView(before))))
    assert after is before or level(after, model, held_out) > level(before, model, held_out)
    assert models.serialize(before) == data


def test_what_gains_nothing_is_dropped() -> None:
    model = named(MLP, MLP_PARTS)
    before, sweeps = factored(model, MLP_FEEDS, lambda most: most // 2), Sweeps(model, MLP_FEEDS)
    assert settled(before, Refits(), sweeps.before, sweeps.after, lambda m: 5.0) is before


@pytest.mark.parametrize("name", NETS)
def test_where_nothing_is_lost_weights_stay(name: str) -> None:
    body, parts, feeds = NETS[name]
    model = named(body, parts)
    whole = factored(model, feeds, lambda most: most)
    after = refitted(whole, model, feeds)
    assert level(after, model, feeds[:4]) > 100
    for key, array in weights(whole).items():
        np.testing.assert_allclose(weights(after)[key], array, atol=1e-6 + 2e-4 * np.abs(array).max())


@pytest.mark.parametrize("name", NETS)
def test_the_same_bytes_twice(name: str) -> None:
    body, parts, feeds = NETS[name]
    model = named(body, parts)
    before = factored(model, feeds, lambda most: most // 2)
    assert models.serialize(refitted(before, model, feeds)) == models.serialize(refitted(before, model, feeds))


# --- the numbers -----------------------------------------------------------------------------------


def moments_of(z: Array, e: Array) -> CrossMoments:
    def one(z: Array, e: Array, first: CrossMoments | None) -> CrossMoments:
        return CrossMoments(z.T @ z / len(z), e.T @ z / len(z), z.mean(0), e.mean(0), len(z), first)

    return one(z, e, one(z[::2], e[::2], None))


@pytest.mark.parametrize("centred", [True, False])
def test_it_is_ridge_regression(centred: bool) -> None:
    rng = np.random.default_rng(0)
    z, e = rng.normal(1, 1, (400, 6)), rng.normal(2, 1, (400, 4))
    change, shift = sequence._solved(moments_of(z, e), 0.1, centred=centred)
    a, b = (z - z.mean(0), e - e.mean(0)) if centred else (z, e)
    weight = 0.1 * np.square(a).mean(0).mean() * len(a)
    rows = np.concatenate([a, np.sqrt(weight) * np.eye(6)])
    wanted = np.concatenate([b, np.zeros((6, 4))])
    np.testing.assert_allclose(change, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, atol=1e-10)
    np.testing.assert_allclose(shift, e.mean(0) - change @ z.mean(0) if centred else np.zeros(4))


def test_the_error_it_is_judged_by() -> None:
    rng = np.random.default_rng(0)
    z, e, change, shift = rng.normal(1, 1, (50, 6)), rng.normal(2, 1, (50, 4)), rng.normal(0, 1, (4, 6)), np.arange(4.0)
    wanted = np.square(e - z @ change.T - shift).sum(1).mean() - np.square(e).sum(1).mean()
    assert sequence._error(change, shift, moments_of(z, e)) == pytest.approx(wanted)


def test_noise_in_few_rows_is_hardly_fitted() -> None:
    """With twice as many rows as features plain least squares fits much of the noise."""
    rng = np.random.default_rng(0)
    z, e = rng.normal(0, 1, (40, 20)), rng.normal(0, 5, (40, 8))
    found = sequence._fitted(moments_of(z, e), centred=True)[0]
    plain = sequence._solved(moments_of(z, e), sequence.RIDGE, centred=True)[0]
    assert np.square(found).mean() < 0.25 * np.square(plain).mean()


def test_what_many_rows_say_is_believed() -> None:
    rng = np.random.default_rng(0)
    z, change = rng.normal(0, 1, (2000, 20)), rng.normal(0, 1, (8, 20))
    found, shift = sequence._fitted(moments_of(z, z @ change.T + 3), centred=True)
    np.testing.assert_allclose(found, change, atol=0.05)
    np.testing.assert_allclose(shift, 3, atol=0.05)


LAYOUTS: dict[str, tuple[str, str, tuple[int, ...], dict[str, Array]]] = {
    "MatMul": ("[N,5,6] x) => (float[N,5,4]", "MatMul (x, w)", (5, 6), {"w": normal(1, 6, 4)}),
    "MatMul and Add": (
        "[N,5,6] x) => (float[N,5,4]",
        "MatMul (x, w)\n  z = Add (b, m)",
        (5, 6),
        {"w": normal(1, 6, 4), "b": normal(2, 4)},
    ),
    "weight on the left": ("[N,6,5] x) => (float[N,4,5]", "MatMul (w, x)", (6, 5), {"w": normal(1, 4, 6)}),
    "Gemm": ("[N,6] x) => (float[N,4]", "Gemm (x, w, b)", (6,), {"w": normal(1, 6, 4), "b": normal(2, 1)}),
    "Gemm without bias": ("[N,6] x) => (float[N,4]", "Gemm (x, w)", (6,), {"w": normal(1, 6, 4)}),
    "Gemm transB": (
        "[N,6] x) => (float[N,4]",
        "Gemm <transB = 1, beta = 2.0> (x, w, b)",
        (6,),
        {"w": normal(1, 4, 6), "b": normal(2, 1, 4)},
    ),
    "Gemm with another scale": (
        "[N,6] x) => (float[N,4]",
        "Gemm <alpha = 0.5> (x, w, b)",
        (6,),
        {"w": normal(1, 6, 4), "b": normal(2, 4)},
    ),
    "MatMul and Add of rows": (
        "[N,5,6] x) => (float[N,5,4]",
        "MatMul (x, w)\n  z = Add (m, b)",
        (5, 6),
        {"w": normal(1, 6, 4), "b": normal(2, 5, 1)},
    ),
    "MatMul and a residual": (
        "[N,5,6] x) => (float[N,5,6]",
        "MatMul (x, w)\n  z = Add (m, x)",
        (5, 6),
        {"w": normal(1, 6, 6)},
    ),
    "Conv 1 x 1": (
        "[N,6,5,5] x) => (float[N,4,5,5]",
        "Conv <kernel_shape = [1,1]> (x, w, b)",
        (6, 5, 5),
        {"w": normal(1, 4, 6, 1, 1), "b": normal(2, 4)},
    ),
    "Conv without bias": (
        "[N,6,5,5] x) => (float[N,4,3,3]",
        "Conv <kernel_shape = [1,1], strides = [2,2]> (x, w)",
        (6, 5, 5),
        {"w": normal(1, 4, 6, 1, 1)},
    ),
    "Conv 3 x 2": (
        "[N,3,7,6] x) => (float[N,4,4,5]",
        "Conv <kernel_shape = [3,2], strides = [2,1], pads = [1,0,1,1], dilations = [1,2]> (x, w, b)",
        (3, 7, 6),
        {"w": normal(1, 4, 3, 3, 2), "b": normal(2, 4)},
    ),
    "Conv in groups": (
        "[N,6,5,5] x) => (float[N,4,3,3]",
        "Conv <kernel_shape = [3,3], group = 2> (x, w, b)",
        (6, 5, 5),
        {"w": normal(1, 4, 3, 3, 3), "b": normal(2, 4)},
    ),
    "Conv 1-D": (
        "[N,6,9] x) => (float[N,4,7]",
        "Conv <kernel_shape = [3]> (x, w, b)",
        (6, 9),
        {"w": normal(1, 4, 6, 3), "b": normal(2, 4)},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spoiled_layer_is_repaired_whatever_its_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "RIDGE", 1e-7)
    ends, nodes, shape, parts = LAYOUTS[layout]
    last = "z" if "z =" in nodes else "m"
    model = named(f"g (float{ends} y) {{\n  m = {nodes}\n  y = Tanh ({last})\n}}", parts)
    feeds = [{"x": normal(10 + i, 40, *shape)} for i in range(4)]
    wrong = spoiled(model, "m")
    assert level(wrong, model, feeds) < 25
    assert level(refitted(wrong, model, feeds), model, feeds) > 80
    assert len(weights(refitted(wrong, model, feeds))) == len(weights(wrong)) + ("without bias" in layout)


def test_means_become_those_of_the_original() -> None:
    model = named(MLP, MLP_PARTS)
    after = refitted(factored(model, MLP_FEEDS, lambda most: most // 4), model, MLP_FEEDS)
    found, wanted = (np.concatenate([run(m, f)["y"] for f in MLP_FEEDS]).mean(0) for m in (after, model))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_made_up_inputs_are_no_ground() -> None:
    model = named(MLP, MLP_PARTS)
    wrong = spoiled(model, "m")
    data = models.serialize(wrong)
    sequence.settle(Rewriter(wrong), Evidence(synthetic=True))
    sequence.settle(Rewriter(wrong), Evidence())
    assert models.serialize(wrong) == data


# --- which, and when -------------------------------------------------------------------------------


def asked(model: ir.Model) -> list[list[str]]:
    return [[p.makes.value for p in pairs] for pairs in sequence.rounds(GraphView(model))]


def test_layers_are_refitted_in_the_order_they_run() -> None:
    model = named(MLP, MLP_PARTS)
    assert asked(model) == []
    noted_ = factored(model, MLP_FEEDS, lambda most: most // 2)
    assert asked(noted_) == [["a"], ["b"], ["c"], ["d"], ["y"]]  # b is behind the bias of m


def test_where_a_layer_is_added_to_what_is_settled_the_sum_counts() -> None:
    body = """g (float[N,8] x) => (float[N,8] y, float[N,8] z) {
      a = MatMul (x, wa)
      r = Relu (a)
      b = Gemm (r, wb)
      s = Add (b, a)
      c = MatMul (s, wc)
      d = MatMul (s, wd)
      y = Add (c, d)
      e = MatMul (s, we)
      f = Relu (e)
      g = MatMul (f, wg)
      z = Add (e, g)
      i = Neg (e)
    }"""
    model = named(body, {f"w{n}": normal(ord(n), 8, 8) for n in "abcdeg"})
    for name in "abcdeg":
        sequence.note_factored(Rewriter(model).node(name), name)
    assert asked(model) == [["a"], ["s"], ["c", "d", "e"], ["z"]]  # c and d would both make up for the same


def test_layers_of_which_none_reads_another_share_a_round() -> None:
    body = """g (float[N,4,8] x) => (float[N,4,8] y) {
      q = MatMul (x, wq)
      k = MatMul (x, wk)
      v = MatMul (x, wv)
      t = Transpose <perm = [0,2,1]> (k)
      s = MatMul (q, t)
      p = Softmax <axis = -1> (s)
      c = MatMul (p, v)
      o = MatMul (c, wo)
      y = Add (o, x)
    }"""
    model = named(body, {n: normal(i, 8, 8) for i, n in enumerate(("wq", "wk", "wv", "wo"))})
    for name in "qkvo":
        sequence.note_factored(Rewriter(model).node(name), name)
    assert asked(model) == [["q", "k", "v"], ["y"]]


def test_of_many_layers_neighbours_share_a_round() -> None:
    many = 60
    lines = [f"  v{i} = MatMul (v{i - 1}, w{i})" if i else "  v0 = Neg (x)" for i in range(many)]
    body = "g (float[N,4] x) => (float[N,4] y) {\n" + "\n".join(lines) + f"\n  y = Neg (v{many - 1})\n}}"
    model = named(body, {f"w{i}": normal(i, 4, 4) for i in range(1, many)})
    for i in range(1, many):
        sequence.note_factored(Rewriter(model).node(f"v{i}"), f"v{i}")
    found = asked(model)
    assert len(found) == 24 and {len(part) for part in found} == {2, 3}
    assert [name for part in found for name in part] == [f"v{i}" for i in range(1, many)]


def test_what_cannot_be_refitted_is_left_alone() -> None:
    body = """g (float[N,8] x) => (float[N,8] y, float[8,8] shared) {
      a = MatMul (x, w1)
      b = MatMul (a, w1)
      c = Gemm (b, w2)
      u = Relu (w5)
      f = MatMul (c, u)
      h = MatMul (w6, w7)
      g = MatMul (f, h)
      y = MatMul (g, w8)
      shared = Identity (w2)
    }"""
    model = named(body, {f"w{i}": normal(i, *((1, 8, 8) if i == 8 else (8, 8))) for i in range(1, 9)})
    for node in model.graph:
        sequence.note_factored(node, str(node.outputs[0].name))
    assert asked(model) == []


def test_values_the_original_does_not_have_are_left_alone() -> None:
    model = named(MLP, MLP_PARTS)
    wrong = spoiled(model, "d")
    sequence.note_factored(Rewriter(wrong).node("d"), "gone")
    data = models.serialize(wrong)
    assert models.serialize(refitted(wrong, model, MLP_FEEDS)) == data


def test_notes_go_with_clones_are_not_in_the_file_and_are_forgotten_by_the_next_pass() -> None:
    model = named(MLP, MLP_PARTS)
    data = models.serialize(model)
    sequence.note_factored(Rewriter(model).node("d"), "d")
    assert models.serialize(model) == data
    assert asked(models.clone(model)) == [["d"]]
    assert asked(build(model, Refits(), [], Evidence()).model) == []
    assert noted(Rewriter(model).node("d"), "factored") == "d"
