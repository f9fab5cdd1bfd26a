"""Weights in blocks: the node that is written, its numbers against numpy, its price, and why it is not offered.

The bound of a product: the kernel's weights are w' = s q, known exactly, and inside it rounds each block of a row of x
to int8, so that x_k moves by at most a_B / 254, a_B the largest absolute value of the block:

    |y' - x w'| <= sum_B a_B / 254 * sum_(k in B) |w'_k|
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from models import TARGET, Array, fused, made, normal, ops, run, text, wiring
from prices import priced
from scipy.optimize import minimize_scalar

import onnxcompress
from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.base import Choice, Precision, Site, Skip, Term
from onnxcompress.cost import CostModel
from onnxcompress.errors import PassOptionError
from onnxcompress.passes._blocked import Blocking, apply
from onnxcompress.passes._blocks import Form, Rounded, pack, rounded
from onnxcompress.passes.quantize import Quantize
from onnxcompress.profile import load_profile
from onnxcompress.questions import ask, offers
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

HOST = Target("host", weight_only_bits=(4, 8))
BLOCKED = Quantize(modes=("blocked",), min_weights=1, block=(32,))
SLACK = 1 + 1e-4

MATMUL = "g (float[2, 64] x) => (float[2, 8] y) { y = MatMul (x, w) }"


def blocked(model: ir.Model, form: str = "w4/32", pass_: Quantize = BLOCKED) -> ir.Model:
    return made(pass_, model, form, target=HOST)


def dequantized(matrix: Rounded, block: int) -> Array:
    """Weights, (outputs, inputs), that integers and scales stand for."""
    return matrix.integers * np.repeat(matrix.scales, block, axis=1)[:, : matrix.integers.shape[1]].astype(np.float64)


# --- what is written ---------------------------------------------------------------------------


def test_a_product_becomes_one_node() -> None:
    after = blocked(text(MATMUL, {"w": normal(0, 64, 8)}))
    attributes = "K = 64, N = 8, accuracy_level = 4, bits = 4, block_size = 32"
    expected = text(
        f"""g (float[2, 64] x, uint8[8, 2, 16] W, float[16] S) => (float[2, 8] y) {{
              y = com.microsoft.MatMulNBits <{attributes}> (x, W, S) }}""",
        imports=["com.microsoft"],
    )
    assert wiring(after) == wiring(expected)
    assert list(after.graph.initializers) == ["w_4bit", "w_scale"]


def test_of_two_weights_in_a_byte_the_first_is_the_low_half() -> None:
    blocks = pack(Rounded(np.array([[-8, 7, 0, 1, -1]], np.int8), np.ones((1, 1), np.float32)), Form(4, 16))
    assert blocks.packed.tolist() == [[[0xF0, 0x98, 0x87, 0x88, 0x88, 0x88, 0x88, 0x88]]]
    assert blocks.inputs == 5


@pytest.mark.parametrize("activation", ["Relu", "Clip", "Sigmoid"])
def test_what_follows_does_not_keep_the_kernel_away(activation: str) -> None:
    """Behind a DequantizeLinear, a Relu would keep onnxruntime from fusing."""
    body = f"g (float[2, 64] x) => (float[2, 8] y) {{ m = MatMul (x, w)  y = {activation} (m) }}"
    after = blocked(text(body, {"w": normal(0, 64, 8)}))
    assert [n.op_type for n in fused(after).graph.node] == ["MatMulNBits", activation]


def test_an_older_opset_will_do() -> None:
    assert ops(blocked(text(MATMUL, {"w": normal(0, 64, 8)}, opset=13))) == ["MatMulNBits"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("m = MatMul (x, w)  y = Add (m, b)", ["MatMulNBits"]),
        ("m = MatMul (x, w)  y = Add (b, m)", ["MatMulNBits"]),
        ("m = MatMul (x, w)  a = Add (m, b)  y = Relu (a)", ["MatMulNBits", "Relu"]),
        ("m = MatMul (x, w)  a = Add (m, b)  y = Mul (a, m)", ["MatMulNBits", "Add", "Mul"]),
        ("m = MatMul (x, w)  a = Add (m, m)  y = Add (a, b)", ["MatMulNBits", "Add", "Add"]),
        ("m = MatMul (x, w)  a = Add (m, c)  y = Sub (a, b)", ["MatMulNBits", "Add", "Sub"]),
    ],
)
def test_an_add_of_a_constant_row_becomes_the_bias(body: str, left: list[str]) -> None:
    weights = {"w": normal(0, 64, 8), "b": normal(1, 8), "c": normal(2, 1, 1, 1)}
    model = text(f"g (float[1, 2, 64] x) => (float[1, 2, 8] y) {{ {body} }}", weights)
    after, feed = blocked(model, "w8/32"), {"x": normal(9, 1, 2, 64)}
    assert ops(after) == left
    assert [o.name for o in after.graph.outputs] == ["y"]
    before = run(model, feed)["y"]
    assert np.square(run(after, feed)["y"] - before).sum() < 1e-3 * np.square(before).sum()


def test_the_output_of_the_product_may_be_the_models() -> None:
    body = "g (float[2, 64] x) => (float[2, 8] y, float[2, 8] z) { y = MatMul (x, w)  z = Add (y, b) }"
    assert ops(blocked(text(body, {"w": normal(0, 64, 8), "b": normal(1, 8)}))) == ["MatMulNBits", "Add"]


# --- numbers -----------------------------------------------------------------------------------

CASES = {
    "matmul": ("float[3, 64] x", "y = MatMul (x, w)", (3, 64), False),
    "one row": ("float[1, 64] x", "y = MatMul (x, w)", (1, 64), False),
    "vector": ("float[64] x", "y = MatMul (x, w)", (64,), False),
    "three axes": ("float[2, 3, 64] x", "y = MatMul (x, w)", (2, 3, 64), False),
    "blocks not full": ("float[3, 100] x", "y = MatMul (x, w)", (3, 100), False),
    "less than a block": ("float[3, 27] x", "y = MatMul (x, w)", (3, 27), False),
    "gemm": ("float[3, 64] x", "y = Gemm (x, w, b)", (3, 64), False),
    "gemm, transposed": ("float[3, 70] x", "y = Gemm <transB = 1> (x, w, b)", (3, 70), True),
    "gemm, a row": ("float[3, 64] x", "y = Gemm (x, w, r)", (3, 64), False),
    "gemm, a column": ("float[3, 64] x", "y = Gemm (x, w, c)", (3, 64), False),
    "gemm, a bias at run time": ("float[3, 64] x", "t = Neg (b)  n = Neg (t)  y = Gemm (x, w, n)", (3, 64), False),
}


def products(case: str, form: Form) -> tuple[Array, Array, Array]:
    """What the node makes, what numpy makes of the same weights, and the bound on the difference."""
    given, body, shape, transposed = CASES[case]
    inputs = shape[-1]
    matrix = normal(0, 7, inputs)
    weights = {
        "w": matrix if transposed else np.ascontiguousarray(matrix.T),
        "b": normal(1, 7),
        "r": normal(2, 1, 7),
        "c": normal(3, 3, 1),
    }
    axes = ", ".join("abcd"[: max(len(shape), 1)])
    model = text(f"g ({given}) => (float[{axes}] y) {{ {body} }}", {n: w for n, w in weights.items() if n in body})
    x = normal(9, *shape)
    after = blocked(model, form.name, Quantize(modes=("blocked",), min_weights=1, block=(form.block,)))
    stands_for = dequantized(rounded(matrix, form), form.block)
    bias = next((weights[n] for n in "rcb" if f" {n})" in body or f"Neg ({n})" in body), np.zeros(7))
    count = -(-inputs // form.block)
    padded = np.zeros((*shape[:-1], count * form.block))
    padded[..., :inputs] = np.abs(x)
    largest = padded.reshape(*shape[:-1], count, form.block).max(-1)
    wide = np.zeros((7, count * form.block))
    wide[:, :inputs] = np.abs(stands_for)
    bound = (largest / 254) @ wide.reshape(7, count, form.block).sum(-1).T
    rounding = 1e-6 * (np.abs(x) @ np.abs(stands_for.T) + np.abs(bias))
    return run(after, {"x": x})["y"], x @ stands_for.T + bias, bound * SLACK + rounding


@pytest.mark.parametrize("form", [Form(4, 16), Form(4, 32), Form(4, 128), Form(8, 32), Form(8, 64)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_node_computes_what_its_weights_say(case: str, form: Form) -> None:
    found, expected, bound = products(case, form)
    assert found.shape == expected.shape
    error = np.abs(found - expected)
    assert np.all(error <= bound)
    assert error.max() > 0


def test_a_smaller_bound_fails() -> None:
    found, expected, bound = products("matmul", Form(4, 32))
    assert np.any(np.abs(found - expected) > bound / 20)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tail", [2.1, 5.0, 1e9])
def test_scales_beat_those_of_the_extremes(bits: int, tail: float) -> None:
    matrix = np.random.default_rng(0).standard_t(tail, (40, 96)).astype(np.float32)
    top = 2 ** (bits - 1) - 1
    blocks = matrix.reshape(40, 3, 32)
    step = np.abs(blocks).max(-1, keepdims=True) / top
    plain = np.square(blocks - np.rint(blocks / step) * step).sum(-1)
    errors = np.square(matrix - dequantized(rounded(matrix, Form(bits, 32)), 32)).reshape(40, 3, 32).sum(-1)
    assert np.all(errors <= plain * SLACK + 1e-6 * np.square(blocks).sum(-1)), "chosen in float32"
    assert errors.sum() < (0.85 if bits == 4 else 1.0) * plain.sum()


def test_scales_are_near_the_best_there_are() -> None:
    """A fine search of one block's scale, for both signs, finds at most a little better."""
    matrix = normal(0, 30, 32)
    errors = np.square(matrix - dequantized(rounded(matrix, Form(4, 32)), 32)).sum(1)

    def error(scale: float, row: Array) -> float:
        return float(np.square(row - np.clip(np.rint(row / scale), -8, 7) * scale).sum())

    best = []
    for row in matrix:
        grid = np.abs(row).max() / np.linspace(5, 13, 400)
        near = min((*grid, *-grid), key=lambda s: error(s, row))
        found = minimize_scalar(error, args=(row,), bounds=sorted((0.98 * near, 1.02 * near)), method="bounded")
        best.append(min(found.fun, error(near, row)))
    assert errors.sum() < 1.1 * sum(best)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_are_kept(bits: int) -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (5, 64)).astype(np.float32)
    integers[:, ::32] = -(2 ** (bits - 1))
    matrix = integers * np.repeat(normal(1, 5, 2), 32, axis=1)
    np.testing.assert_allclose(dequantized(rounded(matrix, Form(bits, 32)), 32), matrix, rtol=1e-6)


def test_weights_that_are_zero_or_next_to_it() -> None:
    matrix = normal(0, 4, 64)
    matrix[0], matrix[1, :32], matrix[2] = 0, 0, 1e-39
    found = rounded(matrix, Form(4, 32))
    assert np.all(np.isfinite(found.scales)) and np.all(found.scales != 0)
    assert not found.integers[0].any() and not found.integers[1, :32].any()
    w = np.ascontiguousarray(matrix.T)
    after = blocked(text("g (float[2, 64] x) => (float[2, 4] y) { y = MatMul (x, w) }", {"w": w}))
    np.testing.assert_allclose(run(after, {"x": normal(9, 2, 64)})["y"][:, 0], 0, atol=1e-4)


def test_rounding_can_be_handed_in() -> None:
    """Integers that somebody else has chosen, as rounding with feedback does."""

    def down(matrix: Array, form: Form) -> Rounded:
        plain = rounded(matrix, form)
        return Rounded(np.maximum(plain.integers - 1, -8).astype(np.int8), plain.scales)

    model, matrix = text(MATMUL, {"w": np.ascontiguousarray(normal(0, 8, 64).T)}), normal(0, 8, 64)
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    apply(rewriter.node("node"), rewriter, Blocking(Form(4, 32), "", None), down)
    x = normal(9, 2, 64)
    expected = x @ dequantized(down(matrix, Form(4, 32)), 32).T
    np.testing.assert_allclose(run(copy, {"x": x})["y"], expected, atol=0.02 * np.abs(expected).max())
    plain = run(blocked(model), {"x": x})["y"]
    assert np.abs(plain - expected).max() > 0.05 * np.abs(expected).max(), "not what was remembered"


# --- tables that are read twice ----------------------------------------------------------------

TIED = """g (int64[1, 3] i) => (float[1, 3, 40] y) {
  x = Gather (w, i)  t = Transpose <perm = [1, 0]> (w)  y = MatMul (x, t) }"""


def test_a_table_that_is_turned_gets_blocks_of_its_own() -> None:
    """As the head of a language model; for lookups the table becomes int8, so no float one stays."""
    w = normal(0, 40, 64)
    model, feed = text(TIED, {"w": w}), {"i": np.array([[0, 7, 39]])}
    after = blocked(model, "w8/32")
    assert ops(after) == ["Gather", "Cast", "Gather", "Mul", "MatMulNBits"]
    step = np.abs(w).max(1, keepdims=True) / 127
    expected = (np.rint(w / step) * step)[[0, 7, 39]] @ dequantized(rounded(w, Form(8, 32)), 32).T
    np.testing.assert_allclose(run(after, feed)["y"][0], expected, atol=0.3)
    (choice,) = (c for c in all_choices(model) if c.name == "w8/32")
    assert choice.terms == (Term("w8/32", "w"), Term("weight", "w"))
    stored = sum(v.const_value.nbytes for v in after.graph.initializers.values() if v.const_value)
    assert choice.bytes_saved == w.nbytes - stored


def test_a_table_with_other_readers_stays() -> None:
    body = TIED.replace("y = MatMul (x, t) }", "y = MatMul (x, t)  z = Neg (w) }").replace(
        "y) {", "y, float[40, 64] z) {"
    )
    model = text(body, {"w": normal(0, 40, 64)})
    assert sorted(ops(blocked(model, "w8/32"))) == ["Gather", "MatMulNBits", "Neg"]
    (choice,) = (c for c in all_choices(model) if c.name == "w8/32")
    assert choice.bytes_saved == -(40 * 64 + 4 * 2 * 40)


def test_a_table_that_is_turned_is_not_stored_for_lookups_alone() -> None:
    view = GraphView(text(TIED, {"w": normal(0, 40, 64)}))
    pass_ = Quantize(modes=("weights",))
    (site,) = (s for s in pass_.sites(view) if isinstance(s, Site))
    with pytest.raises(Skip, match="a product reads its table, too"):
        list(pass_.choices(site, view, HOST))


def all_choices(model: ir.Model) -> list[Choice]:
    view = GraphView(model)
    sites = [s for s in BLOCKED.sites(view) if isinstance(s, Site) and view.node(s.key).op_type == "MatMul"]
    return [c for s in sites for c in BLOCKED.choices(s, view, HOST)]


def test_the_switch_of_a_table_leaves_lookups_alone() -> None:
    model, feed = text(TIED, {"w": normal(0, 40, 64)}), {"i": np.array([[0, 7, 39]])}
    panel = models.clone(model)
    rewriter = Rewriter(panel)
    switch = rewriter.add_input("switch", ir.DataType.BOOL, ())
    assert BLOCKED.simulate(Term("w4/32", "w"), rewriter, Evidence(), HOST, switch)
    off, on = (run(panel, {**feed, "switch": np.array(value)})["y"] for value in (False, True))
    np.testing.assert_array_equal(off, run(model, feed)["y"])
    expected = normal(0, 40, 64)[[0, 7, 39]] @ dequantized(rounded(normal(0, 40, 64), Form(4, 32)), 32).T
    np.testing.assert_allclose(on[0], expected, atol=0.3)


def test_other_turns_are_no_weight() -> None:
    body = "g (float[64, 64] x) => (float[64, 64] y) { t = Transpose <perm = [0, 1]> (w)  y = MatMul (x, t) }"
    assert offered(text(body, {"w": normal(0, 64, 64)}), BLOCKED) == []


# --- branches, switches ------------------------------------------------------------------------

IF = """g (float[2, 64] x, bool flag) => (float[2, 8] y) {
  y = If (flag) <
    then_branch = t () => (float[2, 8] a) { u = MatMul (x, w)  a = Relu (u) },
    else_branch = e () => (float[2, 8] b) { m = MatMul (x, w)  b = Add (m, v) }
  > }"""


def test_weights_read_in_branches() -> None:
    model = text(IF, {"w": normal(0, 64, 8), "v": normal(1, 8)})
    after = blocked(model, "w8/32")
    assert sorted(ops(after)) == ["If", "MatMulNBits", "MatMulNBits", "Relu"]
    for flag in (True, False):
        feed = {"x": normal(9, 2, 64), "flag": np.array(flag)}
        before = run(model, feed)["y"]
        assert 0 < np.abs(run(after, feed)["y"] - before).max() < 0.03 * np.abs(before).max()


@pytest.mark.parametrize("form", ["w4/32", "w8/32"])
@pytest.mark.parametrize(
    "body",
    [
        MATMUL,
        "g (float[2, 64] x) => (float[2, 8] y) { y = Gemm (x, w, b) }",
        "g (float[2, 64] x) => (float[2, 8] y) { m = MatMul (x, w)  y = Add (m, b) }",
        "g (float[2, 64] x) => (float[2, 8] y) { n = Neg (x)  m = MatMul (x, w)  o = MatMul (n, w)  y = Mul (m, o) }",
    ],
)
def test_the_switch_does_what_the_choice_does(body: str, form: str) -> None:
    """The very node, so equal to the bit but for where a bias is added; off, equal to the original."""
    weights = {"w": normal(0, 64, 8), **({"b": normal(1, 8)} if "b)" in body else {})}
    model, feed = text(body, weights), {"x": normal(9, 2, 64)}
    panel = models.clone(model)
    rewriter = Rewriter(panel)
    switch = rewriter.add_input("switch", ir.DataType.BOOL, ())
    assert BLOCKED.simulate(Term(form, "w"), rewriter, Evidence(), HOST, switch)
    off, on = (run(panel, {**feed, "switch": np.array(value)})["y"] for value in (False, True))
    np.testing.assert_array_equal(off, run(model, feed)["y"])
    np.testing.assert_allclose(on, run(blocked(model, form), feed)["y"], rtol=1e-5, atol=1e-6)
    assert np.abs(on - off).max() > 0


def test_a_switch_for_no_product_says_so() -> None:
    rewriter = Rewriter(text("g (float[2, 64] x) => (float[2, 64] y) { y = Add (x, b) }", {"b": normal(0, 64)}))
    switch = rewriter.add_input("switch", ir.DataType.BOOL, ())
    with pytest.raises(Skip, match="no matrix product reads 'b'"):
        BLOCKED.simulate(Term("w4/32", "b"), rewriter, Evidence(), HOST, switch)


# --- what is offered ---------------------------------------------------------------------------


def offered(model: ir.Model, pass_: Quantize, target: Target = HOST) -> list[str]:
    view = GraphView(model)
    return [c.name for s in pass_.sites(view) if isinstance(s, Site) for c in pass_.choices(s, view, target)]


def test_forms_from_weak_to_strong() -> None:
    model = text(MATMUL, {"w": normal(0, 64, 8)})
    everything = Quantize(min_weights=1)
    assert offered(model, everything) == ["weights", "w8/128", "w4/32", "w4/128", "dynamic", "smooth", "static"]
    only = Target("four", weight_only_bits=(4,))
    assert offered(model, everything, only) == ["weights", "w4/32", "w4/128", "dynamic", "smooth", "static"]
    assert offered(model, everything, TARGET) == ["weights", "dynamic", "smooth", "static"]
    assert offered(model, Quantize(min_weights=1, modes=("blocked",), bits=(8,), block=(16, 64))) == ["w8/64"]


def test_what_a_choice_saves() -> None:
    view = GraphView(text(MATMUL, {"w": normal(0, 64, 8)}))
    (site,) = (s for s in BLOCKED.sites(view) if isinstance(s, Site))
    (eight, four) = BLOCKED.choices(site, view, HOST)
    scales = 4 * 2 * 8
    assert (eight.bytes_saved, four.bytes_saved) == (4 * 512 - 512 - scales, 4 * 512 - 256 - scales)
    assert (eight.precision, four.precision) == (Precision.BLOCKED8, Precision.BLOCKED4)
    assert (four.stored, four.resident_saved, four.calibrated, four.effects) == (False, None, False, False)
    stored = sum(v.const_value.nbytes for v in blocked(view.model).graph.initializers.values() if v.const_value)
    assert 4 * 512 - stored == four.bytes_saved


def test_stored_weights_say_what_stays_in_memory() -> None:
    body = "g (float[2, 64] x, int64[2] i) => (float[2, 8] y, float[2, 64] z) { y = MatMul (x, w)  z = Gather (t, i) }"
    view = GraphView(text(body, {"w": normal(0, 64, 8), "t": normal(1, 30, 64)}))
    only = Quantize(modes=("weights",))
    found = {s.key: c for s in only.sites(view) if isinstance(s, Site) for c in only.choices(s, view, HOST)}
    product, table = found.values()
    assert product.stored and table.stored
    assert product.resident_saved == 0, "folded when the model is loaded"
    assert table.resident_saved is None, "as many as in the file"


@pytest.mark.parametrize(
    ("body", "weights", "target", "reason"),
    [
        (
            MATMUL,
            {"w": normal(0, 64, 8)},
            Target("none"),
            "of 4 bits in blocks, nor for any other",
        ),
        (MATMUL, {"w": normal(0, 64, 8)}, Target("t", weight_only_bits=(8,)), "of 4 bits in blocks, it has one for 8"),
        (MATMUL, {"w": normal(0, 64, 8)}, Target("t", contrib_ops=False, weight_only_bits=(4,)), "is com.microsoft"),
        (
            "g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) { y = Conv (x, w) }",
            {"w": normal(0, 8, 4, 1, 1)},
            HOST,
            "only matrix products read weights in blocks",
        ),
        (
            "g (float[2, 64] x) => (float[2, 8] y) { y = Gemm <alpha = 2.0> (x, w) }",
            {"w": normal(0, 64, 8)},
            HOST,
            "alpha or beta is not 1",
        ),
        (
            "g (float[2, 4] x) => (float[2, 8] y) { y = MatMul (x, w) }",
            {"w": normal(0, 4, 8)},
            HOST,
            "in blocks of 32 its weight would not be smaller",
        ),
    ],
)
def test_nodes_left_alone_say_why(body: str, weights: dict[str, Array], target: Target, reason: str) -> None:
    pass_ = Quantize(modes=("blocked",), bits=(4,), min_weights=1, block=(32,))
    view = GraphView(text(body, weights))
    (site,) = (s for s in pass_.sites(view) if isinstance(s, Site))
    with pytest.raises(Skip, match=reason):
        list(pass_.choices(site, view, target))


def test_few_weights_are_left_alone() -> None:
    pass_, view = Quantize(modes=("blocked",)), GraphView(text(MATMUL.replace("8", "1"), {"w": normal(0, 64, 1)}))
    (site,) = (s for s in pass_.sites(view) if isinstance(s, Site))
    with pytest.raises(Skip, match="fewer than 256 weights"):
        list(pass_.choices(site, view, HOST))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("quantize{bits=3}", "bits must be some of 4, 8, not 3"),
        ("quantize{bits=[]}", "bits must be some of 4, 8, not none"),
        ("quantize{block=24}", "block must be some of 16, 32, 64, 128, 256, not 24"),
        ("quantize{block=8}", "block must be some of 16, 32, 64, 128, 256, not 8"),
        ("quantize{block=half}", "option 'block' of pass 'quantize' must be int"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, said: str) -> None:
    with pytest.raises(PassOptionError, match=said):
        registry.parse(spec)


def test_options_as_written_at_the_shell() -> None:
    assert registry.parse("quantize{modes=blocked, bits=4, block=32}") == Quantize(
        modes=("blocked",), bits=(4,), block=(32,)
    )


# --- what it costs -----------------------------------------------------------------------------

MLP = """g (float[1, 256] x) => (float[1, 64] y) {
  h = Gemm (x, w, b)  r = Relu (h)  m = MatMul (r, v)  a = Add (m, c)  y = Sigmoid (a) }"""
MLP_WEIGHTS = {
    "w": normal(0, 256, 320) / 16, "b": normal(1, 320) / 9, "v": normal(2, 320, 64) / 18, "c": normal(3, 64) / 9
}  # fmt: skip


@pytest.mark.parametrize("name", ["host-x86-vnni", "cortex-a72"])
@pytest.mark.parametrize("form", ["w8/32", "w4/32"])
def test_the_model_costs_what_the_plan_said(name: str, form: str) -> None:
    """The price of the choices, before anything is written, against that of the file."""
    model, profile = text(MLP, MLP_WEIGHTS), load_profile(name)
    cost, view = CostModel(profile), GraphView(model)
    shapes = {"x": (1, 256), "h": (1, 320), "r": (1, 320), "m": (1, 64), "a": (1, 64), "y": (1, 64)}
    offer = offers(BLOCKED, view, profile.target(), synthetic=True)
    questions, _, missing = ask(offer, view, cost, shapes, lambda choice: None, gains_only=False)
    assert not missing
    change = sum(next(o.seconds for o in q.options if o.choice.name == form) - q.seconds for q in questions)
    after = GraphView(blocked(model, form))
    assert [n.op_type for n in after.nodes()] == ["MatMulNBits", "Relu", "MatMulNBits", "Sigmoid"]
    found = cost.model(after, shapes)
    assert {n.precision for n in found.nodes if n.op_type == "MatMulNBits"} == {form[:2]}
    assert not found.unknown
    before = cost.model(view, shapes).seconds
    assert found.seconds == pytest.approx(before + change, rel=0.01)
    assert found.weight_bytes == cost.model(view, shapes).weight_bytes - sum(
        o.choice.bytes_saved for q in questions for o in q.options if o.choice.name == form
    )


@pytest.mark.parametrize("rows", [1, 64])
def test_blocks_are_cheapest_where_rows_are_few(rows: int) -> None:
    """On a core with VNNI: for one row reading weights is the work; for many, integers of 8 bits are faster."""
    body = f"g (float[{rows}, 1024] x) => (float[{rows}, 4096] y) {{ y = MatMul (x, w) }}"
    profile, view = load_profile("host-x86-vnni"), GraphView(text(body, {"w": normal(0, 1024, 4096)}))
    offer = offers(Quantize(), view, profile.target(), synthetic=False)
    shapes = {"x": (rows, 1024), "y": (rows, 4096)}
    ((question,), _, _) = ask(offer, view, CostModel(profile), shapes, lambda choice: None)
    best = min(question.options, key=lambda o: o.seconds).choice
    assert best.precision == (Precision.BLOCKED4 if rows == 1 else Precision.DYNAMIC)


@pytest.mark.parametrize(("floor", "kernel"), [(15, "MatMulNBits"), (28, "MatMulInteger")])
def test_four_bits_give_way_where_they_are_too_coarse(floor: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "available", lambda: {"quantize": Quantize})
    body = "g (float[1, 1024] x) => (float[1, 1024] y) { y = MatMul (x, w) }"
    model, feeds = text(body, {"w": normal(0, 1024, 1024) / 32}), [{"x": normal(seed, 1, 1024)} for seed in range(4)]
    budget = onnxcompress.Budget(min_sqnr_db=floor)
    result = onnxcompress.optimize(model, calibration=feeds, budget=budget, timing=False)
    assert kernel in ops(result.model)
    assert result.report.totals.comparison.min_sqnr_db >= floor


def test_by_hand_without_data() -> None:
    spec = registry.parse("quantize{modes=blocked, bits=4, block=32}")
    model = text(MLP, MLP_WEIGHTS)
    budget = onnxcompress.Budget(min_sqnr_db=10)
    result = onnxcompress.optimize(model, passes=[spec], budget=budget, timing=False)
    assert ops(result.model) == ["MatMulNBits", "Relu", "MatMulNBits", "Sigmoid"]
    assert {s.decision for s in result.report.sites if s.decision != "keep"} == {"w4/32"}


def test_a_profile_without_such_a_kernel_offers_none() -> None:
    profile = priced(precisions=("f32", "u8s8", "dynamic"))
    assert not profile.target().weight_only_bits
    model = text(MLP, MLP_WEIGHTS)
    result = onnxcompress.optimize(
        model, profile=profile, passes=[Quantize(modes=("blocked",))], calibration=[{"x": normal(0, 1, 256)}] * 2
    )
    reasons = {s.reason for s in result.report.sites if s.op in ("MatMul", "Gemm")}
    assert all("the target has no kernel for weights of 8 bits in blocks" in r for r in reasons) and reasons


@pytest.mark.parametrize(("others", "kept"), [(0, True), (40, False)])
def test_four_bits_are_left_out_where_the_whole_hardly_gains(others: int, kept: bool) -> None:
    """The same product alone, and as a small part of a model whose other weights are nearly as good in 8 bits."""
    wide = "".join(f"z{i} = MatMul (x, v{i})  " for i in range(others))
    outputs = "".join(f", float[64, 1024] z{i}" for i in range(others))
    body = f"g (float[1, 1024] s, float[64, 256] x) => (float[1, 1024] y{outputs}) {{ y = MatMul (s, w)  {wide} }}"
    weights = {f"v{i}": normal(i, 256, 1024) for i in range(others)}
    view = GraphView(text(body, {"w": normal(0, 1024, 1024), **weights}))
    profile = load_profile("host-x86-vnni")
    offer = offers(Quantize(), view, profile.target(), synthetic=False)
    shapes = {"s": (1, 1024), "x": (64, 256), "y": (1, 1024), **{f"z{i}": (64, 1024) for i in range(others)}}
    for gains_only in (True, False):
        questions, _, _ = ask(offer, view, CostModel(profile), shapes, lambda choice: None, gains_only=gains_only)
        four = {o.choice.name for q in questions for o in q.options} & {"w4/32", "w4/128"}
        assert bool(four) == (kept or not gains_only)
