"""share_weights as a pass: what it takes and refuses, what it writes, and what onnxruntime makes of that."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from models import TARGET, Array, Feeds, check, fused, learn, made, normal, run, text

import onnxcompress
from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Term
from onnxcompress.errors import PassOptionError
from onnxcompress.model import serialize, weight_bytes
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.share_weights import Method, ShareWeights
from onnxcompress.profile import load_profile
from onnxcompress.registry import parse
from onnxcompress.report import Budget
from onnxcompress.sensitivity import measure_prices
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import build
from onnxcompress.view import GraphView

CONTRIB = Target("contrib", contrib_ops=True)
FOUR = ShareWeights(bits=4)


def mixed(seed: int, *shape: int) -> Array:
    """Data whose last axis is correlated and not about zero."""
    width = shape[-1]
    mix = normal(99, width, width) * np.geomspace(1, 0.05, width).astype(np.float32)[:, None]
    return np.asarray(normal(seed, *shape) @ mix + 0.5, np.float32)


def conv_net() -> tuple[ir.Model, Feeds]:
    body = """g (float[1,16,8,8] x) => (float[1,32,8,8] y) {
      c = Conv <pads = [1,1,1,1]> (x, w, b)  r = Relu (c)  y = Conv <group = 4> (r, v) }"""
    weights = {"w": normal(1, 32, 16, 3, 3), "b": normal(2, 32), "v": normal(3, 32, 8, 3, 3)}
    body = body.replace("float[1,32,8,8] y", "float[1,32,6,6] y")
    return text(body, weights), [{"x": normal(i, 1, 16, 8, 8) + 0.5} for i in range(4)]


def matrix_net(body: str, weights: dict[str, Array], width: int = 64, rows: int = 50) -> tuple[ir.Model, Feeds]:
    return text(body, weights), [{"x": mixed(i, rows, width)} for i in range(4)]


def gemm() -> tuple[ir.Model, Feeds]:
    body = "g (float[N,64] x) => (float[N,48] y) { y = Gemm <transB = 1> (x, w, b) }"
    return matrix_net(body, {"w": normal(1, 48, 64), "b": normal(2, 48)})


def matmul() -> tuple[ir.Model, Feeds]:
    body = "g (float[N,64] x) => (float[N,48] y) { m = MatMul (x, w)  y = Add (m, b) }"
    return matrix_net(body, {"w": normal(1, 64, 48), "b": normal(2, 48)})


def batched() -> tuple[ir.Model, Feeds]:
    body = "g (float[3,N,64] x) => (float[3,N,24] y) { y = MatMul (x, w) }"
    return text(body, {"w": normal(1, 3, 64, 24)}), [{"x": mixed(i, 3, 10, 64)} for i in range(3)]


def recurrent(op: str) -> tuple[ir.Model, Feeds]:
    gates = {"LSTM": 4, "GRU": 3}[op]
    body = f"g (float[S,B,24] x) => (float[S,2,B,32] y) {{ y = {op} <hidden_size = 32, direction = "
    body += '"bidirectional"> (x, w, r, b) }'
    weights = {"w": normal(1, 2, gates * 32, 24), "r": normal(2, 2, gates * 32, 32), "b": normal(3, 2, gates * 64)}
    return text(body, {n: a * np.float32(0.2) for n, a in weights.items()}), [
        {"x": normal(i, 7, 2, 24)} for i in range(4)
    ]


def table() -> tuple[ir.Model, Feeds]:
    body = "g (int64[N] x) => (float[N,40] y) { y = Gather (w, x) }"
    return text(body, {"w": normal(1, 100, 40)}), [{"x": np.arange(i, 100, 3)} for i in range(3)]


def tied() -> tuple[ir.Model, Feeds]:
    body = """g (int64[N] x) => (float[N,100] y) {
      e = Gather (w, x)  t = Tanh (e)  h = Transpose <perm = [1, 0]> (w)  y = MatMul (t, h) }"""
    return text(body, {"w": normal(1, 100, 40)}), [{"x": np.arange(i, 100, 3)} for i in range(3)]


def deconv() -> tuple[ir.Model, Feeds]:
    body = "g (float[1,16,5,5] x) => (float[1,12,H,W] y) { y = ConvTranspose <strides = [2,2]> (x, w) }"
    return text(body, {"w": normal(1, 16, 12, 3, 3)}), [{"x": normal(i, 1, 16, 5, 5)} for i in range(3)]


def branches(inside: bool) -> tuple[ir.Model, Feeds]:
    own = "<float[32,40] w>" if inside else ""
    body = f"""g (bool c, float[N,32] x) => (float[N,40] y) {{
      y = If (c) <
        then_branch = a () => (float[N,40] p) {own} {{ p = MatMul (x, w) }},
        else_branch = b () => (float[N,40] q) {{ q = MatMul (x, v) }}> }}"""
    weights = {"w": normal(1, 32, 40), "v": normal(2, 32, 40)}
    if inside:
        numbers = ", ".join(f"{v:.6f}" for v in normal(1, 32, 40).ravel())
        body = body.replace(own, f"<float[32,40] w = {{{numbers}}}>")
        del weights["w"]
    feeds = [{"c": np.array(i % 2 == 0), "x": normal(i, 6, 32)} for i in range(4)]
    return text(body, weights), feeds


NETS = {
    "conv": conv_net, "gemm": gemm, "matmul": matmul, "batched": batched, "lstm": lambda: recurrent("LSTM"),
    "gru": lambda: recurrent("GRU"), "table": table, "tied": tied, "deconv": deconv,
    "captured": lambda: branches(False), "in a branch": lambda: branches(True),
}  # fmt: skip


def noise(before: ir.Model, after: ir.Model, feeds: Feeds) -> float:
    """Energy of the difference over energy of the output."""
    pairs = [(run(before, f)["y"].astype(np.float64), run(after, f)["y"]) for f in feeds]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs))


def by_hand(pass_: ShareWeights, model: ir.Model, feeds: Feeds = (), target: Target = TARGET) -> ir.Model:
    return made(pass_, model, lambda choice: True, feeds, target)


def kernels(model: ir.Model) -> list[str]:
    """What onnxruntime runs, bodies included."""
    found = ir.from_proto(fused(model))
    return [n.op_type for n in found.graph.all_nodes()]


def offered(pass_: Pass, model: ir.Model, target: Target = TARGET) -> dict[str, list[Choice]]:
    view = GraphView(model)
    return {s.key: list(pass_.choices(s, view, target)) for s in pass_.sites(view) if isinstance(s, Site)}


def skipped(pass_: Pass, model: ir.Model) -> dict[str, str]:
    return {s.key: s.reason for s in pass_.sites(GraphView(model)) if isinstance(s, Skipped)}


# --- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["", "calibrated"])
@pytest.mark.parametrize("bits", [16, 8, 5, 4])
@pytest.mark.parametrize("kind", NETS)
def test_any_weight_is_unpacked_at_load(kind: str, bits: float, known: bool) -> None:
    """k-means loses 0.0095 of the energy of normal weights with 4 bits, float16 and 8 bits next to nothing."""
    model, feeds = NETS[kind]()
    after = by_hand(ShareWeights(bits=bits), model, feeds if known else ())
    assert weight_bytes(after) < weight_bytes(model) * (0.72 if bits == 16 else 0.55)
    assert sorted(kernels(after)) == sorted(kernels(model))
    assert 0 < noise(model, after, feeds) < {16: 1e-6, 8: 1e-3, 5: 0.01, 4: 0.04}[bits]


@pytest.mark.parametrize("pass_", [
    ShareWeights(width=2), ShareWeights(width=4), ShareWeights(bits=4, block=16), ShareWeights(bits=3, block=16),
    ShareWeights(bits=4, uniform=True), ShareWeights(bits=6), ShareWeights(bits=3), ShareWeights(bits=1.6),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul"])
def test_every_form(kind: str, pass_: ShareWeights) -> None:
    model, feeds = NETS[kind]()
    after = by_hand(pass_, model, feeds)
    assert sorted(kernels(after)) == sorted(kernels(model))
    assert noise(model, after, feeds) < 0.25


@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul", "lstm", "gru", "tied"])
def test_what_calibration_saw_helps(kind: str) -> None:
    model, feeds = NETS[kind]()
    aware, plain = by_hand(ShareWeights(bits=3), model, feeds), by_hand(ShareWeights(bits=3, method="plain"), model)
    assert noise(model, aware, feeds) < noise(model, plain, feeds) * (1.0 if kind == "tied" else 0.9)


@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul"])
def test_the_bias_takes_up_the_mean(kind: str) -> None:
    """Of every channel, over the data that was seen."""
    model, feeds = NETS[kind]()
    after = by_hand(ShareWeights(bits=2, weights=("w",)), model, feeds)
    if kind == "conv":
        (relu,) = (n for n in after.graph if n.op_type == "Relu")
        for one in (model, after):
            (relu,) = (n for n in one.graph if n.op_type == "Relu")
            one.graph.outputs[0] = relu.inputs[0]
    pairs = [[next(iter(run(one, f).values())) for f in feeds] for one in (model, after)]
    axis = (0, 2, 3) if kind == "conv" else 0
    errors = np.concatenate(pairs[1]).astype(np.float64) - np.concatenate(pairs[0])
    assert np.abs(errors.mean(axis)).max() < 1e-4 * np.abs(errors).max() + 1e-5


def test_a_bias_is_made_where_there_is_none() -> None:
    body = "g (float[N,64] x) => (float[N,48] y) { y = Gemm <transB = 1> (x, w) }"
    model, feeds = matrix_net(body, {"w": normal(1, 48, 64)})
    after = by_hand(ShareWeights(bits=2), model, feeds)
    assert len(list(after.graph)[-1].inputs) == 3
    errors = np.concatenate([run(after, f)["y"].astype(np.float64) - run(model, f)["y"] for f in feeds])
    assert np.abs(errors.mean(0)).max() < 1e-4


def test_vectors_do_not_fit_every_row() -> None:
    model = text("g (float[N,50] x) => (float[N,40] y) { y = MatMul (x, w) }", {"w": normal(1, 50, 40)})
    ((key, found),) = offered(ShareWeights(bits=4, width=2), model).items()
    assert (key, found[0].name) == ("w", "4 bits by 2")
    with pytest.raises(Skip, match="vectors of 4"):
        offered(ShareWeights(width=4), model)


# --- on top of integers ------------------------------------------------------------------------


def quantized(kind: str, mode: str) -> tuple[ir.Model, Feeds]:
    model, feeds = NETS[kind]() if kind != "lstm" else forward_lstm()
    return made(Quantize(modes=(mode,), min_weights=1), model, lambda c: mode in c.name, feeds, CONTRIB), feeds


def forward_lstm() -> tuple[ir.Model, Feeds]:
    body = "g (float[S,B,24] x) => (float[S,1,B,32] y) { y = LSTM <hidden_size = 32> (x, w, r, b) }"
    weights = {"w": normal(1, 1, 128, 24), "r": normal(2, 1, 128, 32), "b": normal(3, 1, 256)}
    return text(body, {n: a * np.float32(0.2) for n, a in weights.items()}), [
        {"x": normal(i, 7, 2, 24)} for i in range(4)
    ]


INTEGERS = {
    ("conv", "static"): "QLinearConv", ("matmul", "static"): "QLinearMatMul",
    ("matmul", "dynamic"): "DynamicQuantizeMatMul", ("gemm", "dynamic"): "DynamicQuantizeMatMul",
    ("lstm", "dynamic"): "DynamicQuantizeLSTM",
}  # fmt: skip


@pytest.mark.parametrize("bits", [5, 4, 3])
@pytest.mark.parametrize(("kind", "mode"), INTEGERS)
def test_integers_stay_on_their_kernels(kind: str, mode: str, bits: float) -> None:
    before, feeds = quantized(kind, mode)
    after = by_hand(ShareWeights(bits=bits, min_weights=1500), before, feeds)
    assert kernels(after) == kernels(before)
    assert INTEGERS[kind, mode] in kernels(after)
    assert weight_bytes(after) < weight_bytes(before)
    assert 0 < noise(before, after, feeds) < {5: 0.02, 4: 0.04, 3: 0.15}[bits]


@pytest.mark.parametrize(("kind", "mode"), INTEGERS)
def test_every_coding_of_integers_has_a_price(kind: str, mode: str) -> None:
    """In a model that onnxruntime loads, and of both weights of an LSTM."""
    before, feeds = quantized(kind, mode)
    priced(before, feeds, ShareWeights(min_weights=1500), at_least={"lstm": 2, "conv": 2}.get(kind, 1))


@pytest.mark.parametrize("kind", NETS)
def test_every_coding_has_a_price(kind: str) -> None:
    model, feeds = NETS[kind]()
    priced(model, feeds, ShareWeights(min_weights=1025), at_least=1)


def priced(model: ir.Model, feeds: Feeds, pass_: ShareWeights, at_least: int) -> None:
    evidence, sites = learn(pass_, model, feeds), offered(pass_, model)
    assert len(sites) >= at_least
    terms = [t for choices in sites.values() for c in choices for t in c.terms]
    prices = measure_prices(pass_, model, terms, evidence, TARGET, feeds, ["y"], budget=1e-9)
    assert not prices.impossible
    assert all(prices.terms[t] > 0 for t in terms)
    for choices in sites.values():
        alone: list[Term] = [t for c in choices for t in c.terms if " by " not in t.subject]
        by_bits = sorted(alone, key=lambda t: -float(t.subject.rsplit(": ")[1].split()[0]))
        found = [prices.terms[t] for t in by_bits]
        assert all(few > 1.1 * many for many, few in pairwise(found))


def test_a_price_is_what_is_built() -> None:
    model, feeds = matmul()
    pass_ = ShareWeights(bits=3, method="plain")
    (choice,) = offered(pass_, model)["w"]
    prices = measure_prices(pass_, model, choice.terms, Evidence(), TARGET, feeds, ["y"], budget=1e-9)
    built = build(model, pass_, [choice], Evidence())
    assert prices.terms[choice.terms[0]] == pytest.approx(noise(model, built.model, feeds), rel=0.2)


def test_a_price_knows_of_zero_points() -> None:
    """Integers of others may not be about zero."""
    body = "g (float[N,64] x) => (float[N,48] y) { d = DequantizeLinear (w, s, z)  y = MatMul (x, d) }"
    integers = np.random.default_rng(0).integers(-20, 120, (64, 48)).astype(np.int8)
    zeros, scales = np.arange(30, 78, dtype=np.int8), np.linspace(0.01, 0.02, 48, dtype=np.float32)
    model, feeds = matrix_net(body, {"w": integers, "s": scales, "z": zeros})
    pass_ = ShareWeights(bits=3, method="plain")
    (choice,) = offered(pass_, model)["w"]
    prices = measure_prices(pass_, model, choice.terms, Evidence(), TARGET, feeds, ["y"], budget=1e-9)
    built = build(model, pass_, [choice], Evidence())
    assert prices.terms[choice.terms[0]] == pytest.approx(noise(model, built.model, feeds), rel=0.2)


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"bits": 7}, "bits is 7"), ({"width": 3}, "width is 3"), ({"bits": 4, "width": 4}, "bits=4 with width=4"),
    ({"block": 1}, "block is 1"), ({"block": -2}, "block is -2"), ({"method": "activations"}, "activations"),
    ({"min_weights": 0}, "min_weights is 0"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassOptionError, match=message) as caught:
        ShareWeights(**options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_options_from_the_command_line() -> None:
    assert parse("share_weights{bits=4,block=32,method=plain}") == ShareWeights(4, block=32, method=Method.PLAIN)


def test_weights_by_name() -> None:
    model, _ = conv_net()
    assert list(offered(ShareWeights(bits=4, weights=("v",)), model)) == ["v"]
    node = next(iter(model.graph))
    assert list(offered(ShareWeights(bits=4, weights=(str(node.name),)), model)) == ["w"]
    with pytest.raises(PassOptionError, match="called 'vv'") as caught:
        offered(ShareWeights(bits=4, weights=("vv",)), model)
    assert "'v'" in str(caught.value.hint) or "v" in str(caught.value.hint)
    with pytest.raises(PassOptionError, match="fewer than min_weights=99999"):
        offered(ShareWeights(bits=4, weights=("v",), min_weights=99999), model)


def test_what_is_left_alone_has_a_reason() -> None:
    body = "g (float16[N,64] x) => (float16[N,64] y) { y = MatMul (x, w) }"
    half = text(body, {"w": normal(1, 64, 64).astype(np.float16)})
    assert skipped(ShareWeights(), half) == {"w": "it is float16; float32 and int8 can be stored in fewer bits"}
    model, _ = matmul()
    assert "fewer than min_weights=5000" in skipped(ShareWeights(min_weights=5000), model)["w"]
    broken = text("g (float[N,64] x) => (float[N,48] y) { y = MatMul (x, w) }", {"w": np.full((64, 48), np.nan, "f")})
    assert skipped(ShareWeights(), broken) == {"w": "it holds NaN or infinity"}


def test_int4_stays() -> None:
    body = "g (float[N,64] x) => (float[N,64] y) { d = DequantizeLinear (w, s)  y = MatMul (x, d) }"
    model = text(body, {"w": np.zeros((64, 64), np.int8), "s": np.float32(1)}, opset=21)
    four = ir.PackedTensor(np.zeros(2048, np.uint8), ir.DataType.INT4, shape=ir.Shape((64, 64)))
    value = model.graph.initializers["w"]
    value.const_value, value.type = four, ir.TensorType(ir.DataType.INT4)
    assert "it is int4" in skipped(ShareWeights(), model)["w"]


def test_too_small_to_gain() -> None:
    model = text("g (float[N,8] x) => (float[N,4] y) { y = MatMul (x, w) }", {"w": normal(1, 8, 4)})
    with pytest.raises(Skip, match="would not make it smaller: 128 bytes now"):
        offered(ShareWeights(bits=4, min_weights=1), model)


def test_integers_of_eight_bits_have_them_already() -> None:
    before, _ = quantized("matmul", "dynamic")
    with pytest.raises(Skip, match="8 bits already"):
        offered(ShareWeights(bits=8), before)


def test_a_runtime_that_does_not_fold_constants() -> None:
    model, _ = matmul()
    target = load_profile("cortex-m4").target()
    assert not target.folds_constants
    with pytest.raises(Skip, match="unpack it in every run"):
        offered(FOUR, model, target)
    result = onnxcompress.optimize(model, profile="cortex-m4", passes=[FOUR], timing=False)
    (row,) = [s for s in result.report.sites if s.pass_name == "share_weights"]
    assert "unpack it in every run" in row.reason


# --- whole runs --------------------------------------------------------------------------------


def net(seed: int = 0) -> tuple[ir.Model, Feeds]:
    body = """g (float[N,96] x) => (float[N,64] y) {
      a = MatMul (x, w0)  b = Add (a, b0)  c = Relu (b)  d = MatMul (c, w1)  e = Relu (d)  y = MatMul (e, w2) }"""
    shapes = {"w0": (96, 256), "b0": (256,), "w1": (256, 256), "w2": (256, 64)}
    weights = {n: normal(seed + i, *s) / np.float32(16) for i, (n, s) in enumerate(shapes.items())}
    return text(body, weights), [{"x": mixed(i, 32, 96)} for i in range(6)]


def test_the_same_bytes_twice() -> None:
    model, feeds = net()
    first, second = (
        onnxcompress.optimize(model, calibration=feeds, passes=[ShareWeights(bits=3)], timing=False) for _ in range(2)
    )
    assert serialize(first.model) == serialize(second.model)


def test_a_plan_for_size_keeps_the_budget() -> None:
    model, feeds = net()
    result = onnxcompress.optimize(model, calibration=feeds, budget=Budget(min_sqnr_db=25), target="size", timing=False)
    assert result.report.totals.comparison.min_sqnr_db >= 25
    assert weight_bytes(result.model) < weight_bytes(model) / 4
    check(result.model)
    rows = [s for s in result.report.sites if s.pass_name == "share_weights" and s.decision != "keep"]
    assert rows
    assert all(r.bytes_saved and r.bytes_saved > 0 for r in rows)
    assert not {"Gather", "Cast", "Slice"} & set(kernels(result.model))


def test_rows_of_the_report() -> None:
    model, feeds = matmul()
    result = onnxcompress.optimize(model, calibration=feeds, passes=[FOUR], timing=False)
    (row,) = [s for s in result.report.sites if s.pass_name == "share_weights"]
    assert row.decision == "4 bits"
    assert row.key == "w"
