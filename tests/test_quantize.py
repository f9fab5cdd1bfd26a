"""Int8 in its forms: the graph that is written, what onnxruntime makes of it, and how far the numbers move.

Bounds are derived, not measured. Rounding to a grid of step s moves a value by at most s/2, as long
as nothing is clipped; ranges are therefore the exact extremes (``minmax``) of the very feed that is
compared. With e_x the error of the input, s_w the steps of the weights and d = s_w / 2,

    |x' w' - x w| <= sum(|x| d + e_x |w| + e_x d),

plus s_x s_w / 2 for the bias, plus s_y / 2 for rounding the output. Relu, MaxPool and moves pass an
error on as it is. ``SLACK`` covers float32 summation: these sums have fewer than 200 terms, so the
rounding of both sides stays below 2 * 200 * 2**-24 of the sum of absolute products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import TARGET, Array, Feeds, check, fused, learn, made, normal, ops, proto_of, run, text, wiring

from onnxcompress import model as models
from onnxcompress.base import Choice, Site, Skip, Skipped, Term
from onnxcompress.errors import PassError
from onnxcompress.passes._int8 import ActivationOptions
from onnxcompress.passes._qdq import affine
from onnxcompress.passes.quantize import Quantize
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, RangeMethod
from onnxcompress.target import Target
from onnxcompress.trial import build
from onnxcompress.view import GraphView

SLACK = 2 * 200 * 2.0**-24
EXACT = Quantize(ranges=RangeMethod.MINMAX)
SEVEN = Target("seven", weight_bits=7)
"""Weights within [-63, 63]: integer kernels without VNNI sum pairs of products in 16 bits, 2 * 255 * 63 fits."""

CONV = "g (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }"
GEMM = "g (float[4, 16] x) => (float[4, 8] y) { y = Gemm (x, w, b) }"
MATMUL = "g (float[4, 16] x) => (float[4, 8] y) { y = MatMul (x, w) }"


def constant(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return np.asarray(value.numpy())


def conv(x: Array, w: Array, attributes: str = "pads = [1, 1, 1, 1]") -> Array:
    """A convolution, as onnxruntime computes it in float."""
    shape = ", ".join(map(str, x.shape))
    model = text(f"g (float[{shape}] x) => (float[a, b, c, d] y) {{ y = Conv <{attributes}> (x, w) }}", {"w": w})
    return run(model, {"x": x.astype(np.float32)})["y"].astype(np.float64)


def product_error(product: Callable[[Array, Array], Array], x: Array, e_x: Array, w: Array, step: Array) -> Array:
    """Bound on the error of a product; see the module. ``step`` is broadcast against the weight."""
    half = np.broadcast_to(step / 2, w.shape).astype(np.float32)
    e_x = np.broadcast_to(e_x, x.shape).astype(np.float32)
    rounding = product(np.abs(x), np.abs(w)) * SLACK
    return product(np.abs(x), half) + product(e_x, np.abs(w)) + product(e_x, half) + rounding


def one_feed(*shape: int) -> list[dict[str, Array]]:
    return [{"x": normal(9, *shape)}]


# --- static: the graph -------------------------------------------------------------------------


def test_a_convolution_and_its_activation_become_one_site() -> None:
    model = text(
        """g (float[1, 8, 8, 8] x) => (float[1, 4, 8, 8] y) {
             c = Conv <pads = [1, 1, 1, 1]> (x, w, b)  y = Relu (c)
           }""",
        {"w": normal(0, 4, 8, 3, 3), "b": normal(1, 4)},
    )
    after = made(EXACT, model, "static", one_feed(1, 8, 8, 8))
    assert wiring(after) == wiring(
        text(
            """g (float[1, 8, 8, 8] x, float S, uint8 Z, int8[4, 8, 3, 3] W, float[4] WS,
                  int32[4] B, float[4] BS, float T, uint8 U) => (float[1, 4, 8, 8] y) {
                 q = QuantizeLinear (x, S, Z)                       d = DequantizeLinear (q, S, Z)
                 w = DequantizeLinear <axis = 0> (W, WS)        b = DequantizeLinear <axis = 0> (B, BS)
                 c = Conv <pads = [1, 1, 1, 1]> (d, w, b)           r = Relu (c)
                 p = QuantizeLinear (r, T, U)                       y = DequantizeLinear (p, T, U)
               }"""
        )
    )


def test_a_value_has_one_pair_however_many_read_it() -> None:
    """A residual block: x and a feed two nodes each; the last Relu runs inside the Add."""
    model = text(
        """g (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
             c = Conv <pads = [1, 1, 1, 1]> (x, w, b)  a = Relu (c)
             d = Conv <pads = [1, 1, 1, 1]> (a, v)  s = Add (d, a)  y = Relu (s)
           }""",
        {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8), "v": normal(2, 8, 8, 3, 3)},
    )
    after = made(EXACT, model, "static", one_feed(1, 8, 6, 6))
    assert wiring(after) == wiring(
        text(
            """g (float[1, 8, 6, 6] x, float S, uint8 Z, int8[8, 8, 3, 3] W, float[8] WS,
                  int32[8] B, float[8] BS, float T, uint8 U, int8[8, 8, 3, 3] V, float[8] VS,
                  float DS, uint8 DZ, float YS, uint8 YZ) => (float[1, 8, 6, 6] y) {
                 xq = QuantizeLinear (x, S, Z)                    xd = DequantizeLinear (xq, S, Z)
                 w = DequantizeLinear <axis = 0> (W, WS)      b = DequantizeLinear <axis = 0> (B, BS)
                 c = Conv <pads = [1, 1, 1, 1]> (xd, w, b)        r = Relu (c)
                 aq = QuantizeLinear (r, T, U)                    a = DequantizeLinear (aq, T, U)
                 v = DequantizeLinear <axis = 0> (V, VS)
                 e = Conv <pads = [1, 1, 1, 1]> (a, v)
                 eq = QuantizeLinear (e, DS, DZ)                  d = DequantizeLinear (eq, DS, DZ)
                 s = Add (d, a)                                   f = Relu (s)
                 yq = QuantizeLinear (f, YS, YZ)                  y = DequantizeLinear (yq, YS, YZ)
               }"""
        )
    )


def test_moves_keep_the_scale_of_what_they_move() -> None:
    model = text(
        """g (float[1, 4, 8, 8] x) => (float[1, 64] y) <int64[2] shape = {1, 64}> {
             p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
             t = Transpose <perm = [0, 2, 3, 1]> (p)  y = Reshape (t, shape)
           }"""
    )
    after = made(EXACT, model, "static", one_feed(1, 4, 8, 8))
    assert wiring(after) == wiring(
        text(
            """g (float[1, 4, 8, 8] x, float S, uint8 Z, int64[2] SHAPE) => (float[1, 64] y) {
                 a = QuantizeLinear (x, S, Z)   b = DequantizeLinear (a, S, Z)
                 p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
                 c = QuantizeLinear (p, S, Z)   d = DequantizeLinear (c, S, Z)
                 t = Transpose <perm = [0, 2, 3, 1]> (d)
                 e = QuantizeLinear (t, S, Z)   f = DequantizeLinear (e, S, Z)
                 r = Reshape (f, SHAPE)
                 g = QuantizeLinear (r, S, Z)   y = DequantizeLinear (g, S, Z)
               }"""
        )
    )
    assert "DequantizeLinear" not in [n.op_type for n in fused(after).graph.node][:-1]


def test_a_float_reader_reads_the_same_pair() -> None:
    """Sin has no int8 form; it reads the dequantized value, which costs it nothing extra."""
    model = text(
        """g (float[4, 16] x) => (float[4, 8] y, float[4, 8] z) {
             m = MatMul (x, w)  y = Sin (m)  z = MatMul (m, v)
           }""",
        {"w": normal(0, 16, 8), "v": normal(1, 8, 8)},
    )
    after = made(EXACT, model, {"node": "static"}, one_feed(4, 16))
    assert ops(after).count("QuantizeLinear") == 2
    readers = {n.op_type: n.inputs[0] for n in after.graph if n.op_type in ("Sin", "MatMul") and n.name != "node"}
    assert readers["Sin"] is readers["MatMul"]
    assert readers["Sin"].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]


def test_an_output_keeps_its_name_and_type_and_inner_readers_see_the_pair() -> None:
    model = text(
        "g (float[4, 16] x) => (float[4, 8] m, float[4, 8] y) { m = MatMul (x, w)  y = MatMul (m, v) }",
        {"w": normal(0, 16, 8), "v": normal(1, 8, 8)},
    )
    after = made(EXACT, model, "static", one_feed(4, 16))
    before_outputs, after_outputs = proto_of(model).graph.output, proto_of(after).graph.output
    assert [(o.name, o.type) for o in after_outputs] == [(o.name, o.type) for o in before_outputs]
    assert ops(after).count("QuantizeLinear") == 3
    assert all(o.producer().op_type == "DequantizeLinear" for o in after.graph.outputs)  # type: ignore[union-attr]


def test_types_and_shapes_of_constants_are_those_that_fuse() -> None:
    model = text(CONV, {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8)})
    after = made(EXACT, model, "static", one_feed(1, 8, 8, 8))
    kinds = {
        n: (str(v.dtype), tuple(v.shape.numpy())) for n, v in after.graph.initializers.items() if v.shape is not None
    }
    assert kinds == {
        "x_scale": ("FLOAT", ()),
        "x_zero_point": ("UINT8", ()),
        "y_scale": ("FLOAT", ()),
        "y_zero_point": ("UINT8", ()),
        "w_quantized": ("INT8", (8, 8, 3, 3)),
        "w_scale": ("FLOAT", (8,)),
        "b_quantized": ("INT32", (8,)),
        "b_scale": ("FLOAT", (8,)),
    }
    np.testing.assert_allclose(constant(after, "b_scale"), constant(after, "x_scale") * constant(after, "w_scale"))
    np.testing.assert_allclose(
        constant(after, "w_scale"), np.abs(normal(0, 8, 8, 3, 3)).reshape(8, -1).max(1) / 127, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", (6, 8, 3, 3), 0),
        ("y = MatMul (x, w)", (8, 6), 1),
        ("y = Gemm (x, w)", (8, 6), 1),
        ("y = Gemm <transB = 1> (x, w)", (6, 8), 0),
    ],
)
def test_scales_lie_along_the_output_channels(body: str, shape: tuple[int, ...], axis: int) -> None:
    """Six outputs, each a thousandth of the next: along any other axis the small ones would round to zero."""
    sizes = 10.0 ** -np.arange(6, dtype=np.float64) * 100
    w = normal(0, *shape) * np.expand_dims(sizes, [i for i in range(len(shape)) if i != axis]).astype(np.float32)
    x = "float[1, 8, 5, 5]" if len(shape) == 4 else "float[3, 8]"
    model = text(f"g ({x} x) => (float[a, b{', c, d' if len(shape) == 4 else ''}] y) {{ {body} }}", {"w": w})
    feed = one_feed(*((1, 8, 5, 5) if len(shape) == 4 else (3, 8)))
    after = made(EXACT, model, "static", feed)
    (dequantize,) = (n for n in after.graph if n.name == "w_dequantize")
    assert dequantize.attributes.get_int("axis", 1) == axis
    restored = constant(after, "w_quantized") * np.expand_dims(
        constant(after, "w_scale"), [i for i in range(len(shape)) if i != axis]
    )
    biggest = np.abs(w).max(axis=tuple(i for i in range(len(shape)) if i != axis), keepdims=True)
    assert np.all(np.abs(restored - w) <= biggest / 254 * (1 + 1e-5))


def test_one_scale_where_the_target_has_no_others() -> None:
    model = text(CONV, {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8)})
    for pass_, target in ((EXACT, Target("t", per_channel=False)), (Quantize(per_channel=False), TARGET)):
        after = made(pass_, model, "static", one_feed(1, 8, 8, 8), target)
        assert constant(after, "w_scale").shape == ()
        assert constant(after, "b_scale").shape == (8,)


def test_a_shared_weight_is_quantized_for_each_reader() -> None:
    """One reader static, the other left alone: that one still reads float."""
    model = text(
        "g (float[4, 8] x) => (float[4, 8] y) { a = MatMul (x, w)  t = Sin (a)  y = MatMul (t, w) }",
        {"w": normal(0, 8, 8)},
    )
    one = made(EXACT, model, {"node": "static"}, one_feed(4, 8))
    assert "w" in one.graph.initializers and "w_quantized" in one.graph.initializers
    both = made(EXACT, model, "static", one_feed(4, 8))
    assert "w" not in both.graph.initializers
    x = one_feed(4, 8)[0]
    assert np.abs(run(both, x)["y"] - run(model, x)["y"]).max() < np.abs(run(model, x)["y"]).max() / 10


# --- static: what onnxruntime runs -------------------------------------------------------------

FUSED: dict[str, tuple[str, dict[str, Array], tuple[int, ...], dict[str, int]]] = {
    "conv and relu": (
        "(float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) { c = Conv <pads = [1, 1, 1, 1]> (x, w, b)  y = Relu (c) }",
        {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8)},
        (1, 8, 8, 8),
        {"QLinearConv": 1},
    ),
    "conv and clip": (
        "(float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) <float lo = {0}, float hi = {6}> "
        "{ c = Conv <pads = [1, 1, 1, 1]> (x, w)  y = Clip (c, lo, hi) }",
        {"w": normal(0, 8, 8, 3, 3)},
        (1, 8, 8, 8),
        {"QLinearConv": 1},
    ),
    "residual": (
        """(float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) {
             a = Conv <pads = [1, 1, 1, 1]> (x, w, b)  r = Relu (a)
             c = Conv <pads = [1, 1, 1, 1]> (r, w)  s = Add (c, x)  y = Relu (s) }""",
        {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8)},
        (1, 8, 8, 8),
        {"QLinearConv": 2, "QLinearAdd": 1},
    ),
    "depthwise": (
        "(float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) { y = Conv <pads = [1, 1, 1, 1], group = 8> (x, w, b) }",
        {"w": normal(0, 8, 1, 3, 3), "b": normal(1, 8)},
        (1, 8, 8, 8),
        {"QLinearConv": 1},
    ),
    "matmul": (
        "(float[2, 4, 16] x) => (float[2, 4, 8] y) { y = MatMul (x, w) }",
        {"w": normal(0, 16, 8)},
        (2, 4, 16),
        {"QLinearMatMul": 1},
    ),
    "gemm": (
        "(float[4, 16] x) => (float[4, 8] y) { y = Gemm (x, w, b) }",
        {"w": normal(0, 16, 8), "b": normal(1, 8)},
        (4, 16),
        {"QGemm": 1},
    ),
    "gemm transposed and relu": (
        "(float[4, 16] x) => (float[4, 8] y) { g = Gemm <transB = 1> (x, w, b)  y = Relu (g) }",
        {"w": normal(0, 8, 16), "b": normal(1, 8)},
        (4, 16),
        {"QGemm": 1},
    ),
    "gemm without bias": (
        "(float[4, 16] x) => (float[4, 8] y) { y = Gemm (x, w) }",
        {"w": normal(0, 16, 8)},
        (4, 16),
        {"QGemm": 1},
    ),
    "concat": (
        """(float[1, 8, 8, 8] x) => (float[1, 16, 8, 8] y) {
             a = Conv <pads = [1, 1, 1, 1]> (x, w)  y = Concat <axis = 1> (x, a) }""",
        {"w": normal(0, 8, 8, 3, 3)},
        (1, 8, 8, 8),
        {"QLinearConv": 1, "QLinearConcat": 1},
    ),
    "mul with a constant": (
        "(float[4, 16] x) => (float[4, 16] y) { y = Mul (x, w) }",
        {"w": normal(0, 16)},
        (4, 16),
        {"QLinearMul": 1},
    ),
    "add of a constant": (
        "(float[4, 16] x) => (float[4, 16] y) { y = Add (w, x) }",
        {"w": normal(0, 16)},
        (4, 16),
        {"QLinearAdd": 1},
    ),
    "add of a value to itself": (
        "(float[4, 16] x) => (float[4, 16] y) { y = Add (x, x) }",
        {},
        (4, 16),
        {"QLinearAdd": 1},
    ),
    "average": (
        """(float[1, 8, 8, 8] x) => (float[1, 8, 1, 1] y) {
             a = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)  y = GlobalAveragePool (a) }""",
        {},
        (1, 8, 8, 8),
        {"QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1},
    ),
    "pooled between convolutions": (
        """(float[1, 8, 8, 8] x) => (float[1, 8, 4, 4] y) {
             a = Conv <pads = [1, 1, 1, 1]> (x, w)
             p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
             y = Conv <pads = [1, 1, 1, 1]> (p, w) }""",
        {"w": normal(0, 8, 8, 3, 3)},
        (1, 8, 8, 8),
        {"QLinearConv": 2, "NhwcMaxPool": 1},
    ),
    "functions": (
        "(float[4, 16] x) => (float[4, 16] y) { s = Sigmoid (x)  l = LeakyRelu (s)  y = Softmax (l) }",
        {},
        (4, 16),
        {"QLinearSigmoid": 1, "QLinearLeakyRelu": 1, "QLinearSoftmax": 1},
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_onnxruntime_fuses_what_is_written(case: str) -> None:
    """Integer kernels and one pair at the ends, nothing else: no float node is left."""
    body, weights, shape, kernels = FUSED[case]
    model = text("g " + body, weights)
    after = made(EXACT, model, "static", one_feed(*shape))
    found = [n.op_type for n in fused(after).graph.node if n.op_type != "Transpose"]  # a change of layout
    counted = {op: found.count(op) for op in dict.fromkeys(found)}
    assert counted == {"QuantizeLinear": 1, **kernels, "DequantizeLinear": 1}


def test_the_fusion_test_can_fail() -> None:
    """A scale of shape [1] is as valid, and keeps the Add in float."""
    model = text("g (float[4, 16] x) => (float[4, 16] y) { y = Add (x, x) }")
    after = made(EXACT, model, "static", one_feed(4, 16))
    for name in list(after.graph.initializers):
        value = after.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().reshape(1), name=name)
        value.shape = ir.Shape([1])
    assert "Add" in [n.op_type for n in fused(after).graph.node]


# --- static: the numbers -----------------------------------------------------------------------


def within(model: ir.Model, after: ir.Model, feed: Mapping[str, Array], bound: Array, output: str = "y") -> None:
    """Node by node and in integer kernels; and the bound says something."""
    expected = run(model, feed)[output]
    assert bound.max() < np.abs(expected).max() / 2
    for fuse in (False, True):
        error = np.abs(run(after, feed, fuse=fuse)[output].astype(np.float64) - expected)
        assert np.all(error <= bound)
        assert error.max() > 0  # it is int8


def test_error_of_a_convolution_is_within_its_steps() -> None:
    w, b = normal(0, 8, 8, 3, 3), normal(1, 8)
    model, (feed,) = text(CONV, {"w": w, "b": b}), one_feed(1, 8, 8, 8)
    after = made(EXACT, model, "static", [feed], SEVEN)
    s_x, s_w, s_y = (constant(after, f"{n}_scale") for n in "xwy")
    bound = product_error(conv, feed["x"], s_x / 2, w, s_w[:, None, None, None])
    within(model, after, feed, bound + (s_x * s_w / 2)[:, None, None] + s_y / 2)


def test_error_of_a_residual_block_is_within_its_steps() -> None:
    body, weights, shape, _ = FUSED["residual"]
    model, (feed,) = text("g " + body, weights), one_feed(*shape)
    after = made(EXACT, model, "static", [feed], SEVEN)
    x, w = feed["x"], weights["w"]
    steps = {n: constant(after, f"{n}_scale") for n in ("x", "w", "r", "c", "y")}
    s_w = steps["w"][:, None, None, None]
    error = product_error(conv, x, steps["x"] / 2, w, s_w) + (steps["x"] * steps["w"] / 2)[:, None, None]
    error += steps["r"] / 2
    r = np.maximum(conv(x, w) + weights["b"][:, None, None], 0)
    error = product_error(conv, r, error, w, s_w) + steps["c"] / 2 + steps["x"] / 2 + steps["y"] / 2
    expected = run(model, feed)["y"]
    for fuse in (False, True):
        assert np.all(np.abs(run(after, feed, fuse=fuse)["y"] - expected) <= error)


FORMS = {  # seven bits of weights: see SEVEN
    "u8 in the middle": (Target("t", weight_bits=7, activation_symmetric=True), np.uint8, 128),
    "s8": (Target("t", weight_bits=7, activation="s8"), np.int8, None),
    "s8 around zero": (Target("t", weight_bits=7, activation="s8", activation_symmetric=True), np.int8, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_activations_take_the_form_the_target_asks_for(form: str) -> None:
    target, dtype, zero = FORMS[form]
    w, b = normal(0, 8, 8, 3, 3), normal(1, 8)
    model, (feed,) = text(CONV, {"w": w, "b": b}), [{"x": normal(9, 1, 8, 8, 8) + 1}]
    after = made(EXACT, model, "static", [feed], target)
    for name in "xy":
        found = constant(after, f"{name}_zero_point")
        assert found.dtype == dtype and (zero is None or found == zero)
    kernels = [n.op_type for n in fused(after).graph.node if n.op_type != "Transpose"]
    assert kernels == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
    s_x, s_w, s_y = (constant(after, f"{n}_scale") for n in "xwy")
    bound = product_error(conv, feed["x"], s_x / 2, w, s_w[:, None, None, None])
    within(model, after, feed, bound + (s_x * s_w / 2)[:, None, None] + s_y / 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_operand_takes_the_form_too(form: str) -> None:
    target, dtype, _ = FORMS[form]
    model, (feed,) = (
        text("g (float[4, 16] x) => (float[4, 16] y) { y = Add (x, w) }", {"w": normal(0, 16)}),
        one_feed(4, 16),
    )
    after = made(EXACT, model, "static", [feed], target)
    assert constant(after, "w_quantized").dtype == dtype
    bound = sum(constant(after, f"{n}_scale") / 2 for n in "xwy") * (1 + 1e-5)
    within(model, after, feed, np.full((4, 16), bound))


def test_a_relu_stays_where_rounding_does_not_clip_at_zero() -> None:
    """With the zero point in the middle the integers go below zero, so onnxruntime must not drop the Relu."""
    model = text(
        "g (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) { c = Conv <pads = [1, 1, 1, 1]> (x, w)  y = Relu (c) }",
        {"w": normal(0, 8, 8, 3, 3)},
    )
    (feed,) = one_feed(1, 8, 8, 8)
    target = FORMS["s8 around zero"][0]
    after = made(EXACT, model, "static", [feed], target)
    for fuse in (False, True):
        assert run(after, feed, fuse=fuse)["y"].min() == 0


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (8,), (1,)])
def test_error_of_a_gemm_is_within_its_steps(transposed: int, bias: tuple[int] | None) -> None:
    """A bias of one element is added to all outputs."""
    w = normal(0, *((8, 16) if transposed else (16, 8)))
    weights = {"w": w} if bias is None else {"w": w, "b": normal(1, *bias)}
    inputs = "x, w" if bias is None else "x, w, b"
    model = text(f"g (float[4, 16] x) => (float[4, 8] y) {{ y = Gemm <transB = {transposed}> ({inputs}) }}", weights)
    (feed,) = one_feed(4, 16)
    after = made(EXACT, model, "static", [feed], SEVEN)
    s_x, s_w, s_y = (constant(after, f"{n}_scale") for n in "xwy")
    matrix = w.T if transposed else w
    bound = product_error(np.matmul, feed["x"], s_x / 2, matrix, s_w) + s_y / 2
    within(model, after, feed, bound + (0 if bias is None else s_x * s_w / 2))


@pytest.mark.parametrize("group", [8, 2])
def test_error_of_a_grouped_convolution_is_within_its_steps(group: int) -> None:
    w = normal(0, 8, 8 // group, 3, 3)
    attributes = f"pads = [1, 1, 1, 1], group = {group}"
    model = text(f"g (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y) {{ y = Conv <{attributes}> (x, w) }}", {"w": w})
    (feed,) = one_feed(1, 8, 8, 8)
    after = made(EXACT, model, "static", [feed], SEVEN)
    s_x, s_w, s_y = (constant(after, f"{n}_scale") for n in "xwy")
    bound = product_error(lambda a, b: conv(a, b, attributes), feed["x"], s_x / 2, w, s_w[:, None, None, None])
    within(model, after, feed, bound + s_y / 2)


def test_a_shifted_bound_fails() -> None:
    """The bound is tight enough to notice a wrong scale: that of the next channel."""
    w = normal(0, 8, 8, 3, 3) * np.float32(2) ** -np.arange(8, dtype=np.float32)[:, None, None, None]
    model, (feed,) = text(CONV.replace(", b", ""), {"w": w}), one_feed(1, 8, 8, 8)
    after = made(EXACT, model, "static", [feed], SEVEN)
    s_x, s_w, s_y = (constant(after, f"{n}_scale") for n in "xwy")
    bound = product_error(conv, feed["x"], s_x / 2, w, s_w[:, None, None, None]) + s_y / 2
    within(model, after, feed, bound)
    after.graph.initializers["w_scale"].const_value = ir.tensor(np.roll(s_w, 1), name="w_scale")
    with pytest.raises(AssertionError):
        within(model, after, feed, bound)


@pytest.mark.parametrize(
    ("body", "derivatives"),
    [("y = Mul (x, w)", "w"), ("y = Add (x, w)", "1"), ("y = LeakyRelu (x)", "1"), ("y = Sigmoid (x)", "1/4")],
)
def test_error_of_elementwise_operators(body: str, derivatives: str) -> None:
    """Steps of input and constant through a derivative, and the step of the output."""
    w = normal(3, 16)
    model, (feed,) = text(f"g (float[4, 16] x) => (float[4, 16] y) {{ {body} }}", {"w": w}), one_feed(4, 16)
    after = made(EXACT, model, "static", [feed])
    s_x, s_y = constant(after, "x_scale"), constant(after, "y_scale")
    s_w = constant(after, "w_scale") if "w_scale" in after.graph.initializers else np.float32(0)
    x = feed["x"]
    slope = {"w": np.abs(w) + s_w / 2, "1": np.ones(16), "1/4": np.ones(16) / 4}[derivatives]
    through = np.abs(x) * s_w / 2 if derivatives == "w" else np.ones_like(x) * s_w / 2
    within(model, after, feed, slope * s_x / 2 + through + s_y / 2 * (1 + 1e-4))


# --- static: corners ---------------------------------------------------------------------------


def test_a_bias_too_large_for_int32_raises_the_scale_of_its_weight() -> None:
    """Channel 0 hardly weighs anything but has a huge bias: b / (s_x s_w) would be 1e6 / 1e-8."""
    w, b = normal(0, 16, 8), normal(1, 8)
    w[:, 0] *= 1e-9
    b[0] = 1e5
    model, (feed,) = text(GEMM, {"w": w, "b": b}), one_feed(4, 16)
    after = made(EXACT, model, "static", [feed])
    integers = constant(after, "b_quantized").astype(np.int64)
    assert np.abs(integers).max() <= 2**30 + 2**7
    restored = integers * constant(after, "b_scale").astype(np.float64)
    assert np.all(np.abs(restored - b) <= constant(after, "b_scale") / 2 + np.abs(b) * 2.0**-23)
    np.testing.assert_allclose(constant(after, "w_scale")[1:], np.abs(w[:, 1:]).max(0) / 127, rtol=1e-6)
    error = np.abs(run(after, feed)["y"] - run(model, feed)["y"])
    assert error[:, 0].max() <= 1e5 / 255  # half a step of the output


@pytest.mark.parametrize("empty", ["channel", "all"])
def test_weights_of_zeros(empty: str) -> None:
    w, b = normal(0, 8, 8, 3, 3), normal(1, 8)
    w[2 if empty == "channel" else slice(None)] = 0
    model, (feed,) = text(CONV, {"w": w, "b": b}), one_feed(1, 8, 8, 8)
    after = made(EXACT, model, "static", [feed])
    s_x, s_w, s_y = (constant(after, f"{n}_scale") for n in "xwy")
    assert np.isfinite(s_w).all() and (s_w > 0).all()
    error = np.abs(run(after, feed)["y"] - run(model, feed)["y"])[:, 2]
    assert error.max() <= s_x * s_w[2] / 2 + s_y / 2 * (1 + 1e-4)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-42])
def test_an_input_that_never_changes(value: float) -> None:
    """One end of the range is 0, the other the constant: it is represented exactly up to float rounding."""
    model = text(MATMUL, {"w": normal(0, 16, 8)})
    feed = {"x": np.full((4, 16), value, np.float32)}
    after = made(EXACT, model, "static", [feed])
    scale, zero = constant(after, "x_scale"), constant(after, "x_zero_point")
    assert scale > 0 and np.isfinite(scale)
    restored = (np.clip(np.rint(value / scale) + zero, 0, 255) - zero) * scale
    assert restored == pytest.approx(value, rel=1e-6, abs=1e-37)
    assert np.isfinite(run(after, feed)["y"]).all()


def test_zero_is_exact_whatever_the_range() -> None:
    """Padding and Relu need it: all values are above 5."""
    model = text(MATMUL, {"w": normal(0, 16, 8)})
    after = made(EXACT, model, "static", [{"x": normal(0, 4, 16) ** 2 + 5}])
    assert constant(after, "x_zero_point") == 0
    after = made(EXACT, model, "static", [{"x": -(normal(0, 4, 16) ** 2) - 5}])
    assert constant(after, "x_zero_point") == 255


@pytest.mark.parametrize(("low", "high"), [(2.0, 5.0), (-5.0, -2.0), (-1.0, 3.0), (0.0, 0.0), (0.0, 1e-44)])
def test_scale_and_zero_point_of_a_range(low: float, high: float) -> None:
    """The range is widened to hold zero, which is then exact; both ends are within half a step."""
    scale, zero = affine(low, high)
    assert scale.shape == zero.shape == () and scale.dtype == np.float32 and zero.dtype == np.uint8
    for value in (low, high, 0.0):
        restored = (np.clip(np.rint(value / scale) + zero, 0, 255) - zero) * scale
        assert abs(restored - value) <= (scale / 2 * (1 + 1e-6) if value else 0)
    for signed, least, middle in ((False, 0, 128), (True, -128, 0)):
        scale, zero = affine(low, high, ActivationOptions(signed, symmetric=True))
        assert zero == middle
        for value in (low, high, 0.0):
            restored = (np.clip(np.rint(value / scale) + int(zero), least, least + 255) - int(zero)) * scale
            assert abs(restored - value) <= (scale / 2 * (1 + 1e-6) if value else 0)


@pytest.mark.parametrize("mode", ["weights", "dynamic", "static"])
def test_seven_bit_targets_keep_weights_within_63(mode: str) -> None:
    model = text(MATMUL, {"w": normal(0, 16, 32)[:, :8] * 3})
    after = made(Quantize(min_weights=1), model, mode, one_feed(4, 16), SEVEN)
    (weight,) = (v.const_value.numpy() for v in after.graph.initializers.values() if v.dtype == ir.DataType.INT8
                 and v.const_value is not None and v.const_value.size > 8)  # fmt: skip
    assert np.abs(weight).max() == 63
    after = made(Quantize(min_weights=1), model, mode, one_feed(4, 16))
    assert max(np.abs(v.const_value.numpy().astype(int)).max() for v in after.graph.initializers.values()
               if v.dtype == ir.DataType.INT8 and v.const_value is not None) == 127  # fmt: skip


@pytest.mark.parametrize("mode", ["weights", "dynamic", "static"])
def test_weights_beyond_their_range_are_clipped_to_it(mode: str) -> None:
    """A range chosen by error leaves out one weight in 2048; with 4 bits the integers end at 7, not at 127."""
    w = normal(0, 2048, 8)
    w[0] = 8
    model = text("g (float[4, 2048] x) => (float[4, 8] y) { y = MatMul (x, w) }", {"w": w})
    target = Target("coarse", weight_bits=4)
    after = made(Quantize(weight_ranges=RangeMethod.MSE), model, mode, one_feed(4, 2048), target)
    assert np.all(constant(after, "w_scale") < 0.9 * 8 / 7), "it is narrower"
    weight = constant(after, "w_int8" if mode == "weights" else "w_quantized")
    assert np.abs(weight.astype(int)).max() == 7


def test_bias_correction_takes_the_mean_error_out() -> None:
    """E[(W - Q(W)) x] is added to the bias: what remains averages to the rounding of values, not of weights.

    Two convolutions in a row, so the second reads a value that is quantized already. With 3 bits and
    inputs around 1 the weights' error dominates, and its mean is what a constant can undo.
    """
    weights = {"w": normal(0, 8, 8, 1, 1), "v": normal(1, 8, 8, 1, 1), "b": normal(2, 8)}
    model = text(
        """g (float[1, 8, 16, 16] x) => (float[1, 8, 16, 16] y) {
             c = Conv (x, w)  r = Relu (c)  y = Conv (r, v, b) }""",
        weights,
    )
    feeds: Feeds = [{"x": normal(7, 1, 8, 16, 16) * 0.1 + 1}]
    target = Target("coarse", weight_bits=3)
    error = {}
    for correct in (False, True):
        pass_ = Quantize(ranges=RangeMethod.MINMAX, bias_correction=correct)
        after = made(pass_, model, "static", feeds, target)
        error[correct] = np.abs((run(after, feeds[0])["y"] - run(model, feeds[0])["y"]).mean((0, 2, 3))).max()
    assert error[True] < error[False] / 4


# --- dynamic -----------------------------------------------------------------------------------


def test_a_dynamic_matmul_in_standard_operators() -> None:
    model = text(MATMUL, {"w": normal(0, 16, 8)})
    after = made(Quantize(), model, "dynamic")
    assert wiring(after) == wiring(
        text(
            """g (float[4, 16] x, int8[16, 8] W, float[8] S) => (float[4, 8] y) {
                 q, s, z = DynamicQuantizeLinear (x)
                 i = MatMulInteger (q, W, z)  f = Cast <to = 1> (i)  t = Mul (s, S)  y = Mul (f, t)
               }"""
        )
    )
    assert [n.op_type for n in fused(after).graph.node] == ["DynamicQuantizeMatMul"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_error_of_a_dynamic_gemm_is_within_its_steps(transposed: int, bias: bool) -> None:
    w, b = normal(0, *((8, 16) if transposed else (16, 8))), normal(1, 8)
    body = f"y = Gemm <transB = {transposed}> (x, w{', b' if bias else ''})"
    model = text(f"g (float[4, 16] x) => (float[4, 8] y) {{ {body} }}", {"w": w, "b": b} if bias else {"w": w})
    (feed,) = one_feed(4, 16)
    after = made(Quantize(), model, "dynamic", target=SEVEN)
    x = feed["x"]
    s_x = (max(x.max(), 0) - min(x.min(), 0)) / 255
    bound = product_error(np.matmul, x, s_x / 2, w.T if transposed else w, constant(after, "w_scale"))
    within(model, after, feed, bound * (1 + 1e-4))


def test_nodes_that_read_the_same_value_share_its_quantization() -> None:
    """Queries, keys and values of attention."""
    model = text(
        """g (float[4, 16] x) => (float[4, 8] q, float[4, 8] k, float[4, 8] v) {
             h = Tanh (x)  q = MatMul (h, a)  k = MatMul (h, b)  v = MatMul (h, c) }""",
        {n: normal(i, 16, 8) for i, n in enumerate("abc")},
    )
    after = made(Quantize(), model, "dynamic")
    assert ops(after).count("DynamicQuantizeLinear") == 1
    assert ops(after).count("MatMulInteger") == 3
    assert [o.name for o in after.graph.outputs] == ["q", "k", "v"]


LSTM_CASES = {
    "forward": (1, "x, w, r", "Y, H, C", ""),
    "bidirectional with everything": (2, "x, w, r, b, , h, c", "Y, H, C", 'direction = "bidirectional", '),
    "last state only": (1, "x, w, r, b", ", H", ""),
    "reverse": (1, "x, w, r, b", "Y", 'direction = "reverse", '),
    "lengths": (1, "x, w, r, b, lengths", "Y, H", ""),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("case", LSTM_CASES)
def test_error_of_a_dynamic_lstm_is_within_its_steps(case: str, per_channel: bool) -> None:
    directions, inputs, outputs, attributes = LSTM_CASES[case]
    hidden, width, steps, batch = 4, 6, 3, 2
    weights = {
        "w": normal(0, directions, 4 * hidden, width) / 3,
        "r": normal(1, directions, 4 * hidden, hidden) / 3,
        "b": normal(2, directions, 8 * hidden) / 3,
        "h": normal(3, directions, batch, hidden) / 3,
        "c": normal(4, directions, batch, hidden) / 3,
        "lengths": np.array([3, 2], np.int32),
    }
    wanted = [n for n in ("Y", "H", "C") if n in outputs]
    kinds = {"Y": "float[s, d, b, h] Y", "H": "float[d, b, h] H", "C": "float[d, b, h] C"}
    model = text(
        f"g (float[{steps}, {batch}, {width}] x) => ({', '.join(kinds[n] for n in wanted)})"
        f"{{ {outputs} = LSTM <{attributes}hidden_size = {hidden}> ({inputs}) }}",
        {k: v for k, v in weights.items() if f" {k}" in inputs},
    )
    (feed,) = one_feed(steps, batch, width)
    pass_ = Quantize(per_channel=per_channel)
    after = made(pass_, model, "dynamic", target=SEVEN)
    assert ops(after) == ["DynamicQuantizeLSTM"]
    assert after.graph.opset_imports["com.microsoft"] == 1
    given = {k: weights[k] if f" {k}" in inputs else None for k in ("b", "h", "c", "lengths")}
    top = 63
    axes = 2 if per_channel else (0, 1, 2)
    grids = {n: np.broadcast_to(np.abs(weights[n]).max(axes, keepdims=True) / top, weights[n].shape) for n in "wr"}
    values, bounds = lstm(feed["x"], weights["w"], weights["r"], grids["w"], grids["r"], attributes, **given)
    before, result = run(model, feed), run(after, feed, fuse=True)
    for name in wanted:
        np.testing.assert_allclose(before[name], values[name], atol=1e-5)  # the reference is an LSTM
        assert np.all(np.abs(result[name] - before[name]) <= bounds[name] + 1e-5)
        assert bounds[name].max() < 0.7 * np.abs(before[name]).max()


def lstm(
    x: Array,
    w: Array,
    r: Array,
    grid_w: Array,
    grid_r: Array,
    attributes: str,
    b: Array | None,
    h: Array | None,
    c: Array | None,
    lengths: Array | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """An LSTM and a bound on the error of its dynamic int8 form, step by step.

    Gates a = x W + h R + B; i, o, f = sigmoid(a), slope 1/4 at most; g = tanh(a), slope 1 at most;
    c' = f c + i g; h' = o tanh(c'). Errors of products of u and v: |u| e_v + |v| e_u + e_u e_v.
    The state h is quantized anew at each step, on the range of its own (wrong) values.
    """
    steps, batch, _ = x.shape
    directions, hidden = len(w), r.shape[2]
    shape = (steps, directions, batch, hidden)
    values = {"Y": np.zeros(shape), "H": np.zeros(shape[1:]), "C": np.zeros(shape[1:])}
    bounds = {k: np.zeros_like(v) for k, v in values.items()}
    s_x = (max(x.max(), 0) - min(x.min(), 0)) / 255
    for d in range(directions):
        back = "reverse" in attributes or d == 1
        state = np.zeros((batch, hidden)) if h is None else h[d].astype(np.float64)
        cell = np.zeros((batch, hidden)) if c is None else c[d].astype(np.float64)
        e_h, e_c = np.zeros_like(state), np.zeros_like(cell)
        bias = np.zeros(4 * hidden) if b is None else b[d, : 4 * hidden] + b[d, 4 * hidden :]
        length = np.full(batch, steps) if lengths is None else lengths
        for t in range(steps):
            at = np.where(t < length, length - 1 - t if back else t, t)
            data = x[at, np.arange(batch)]
            s_h = (np.ptp(np.append(state, 0)) + 2 * e_h.max()) / 255
            pre = data @ w[d].T + state @ r[d].T + bias
            e_a = product_error(np.matmul, data, np.float64(s_x / 2), w[d].T, grid_w[d].T)
            e_a = e_a + product_error(np.matmul, state, e_h + s_h / 2, r[d].T, grid_r[d].T)
            i, o, f = (1 / (1 + np.exp(-pre[:, k * hidden : (k + 1) * hidden])) for k in range(3))
            g = np.tanh(pre[:, 3 * hidden :])
            e_i, e_o, e_f = (e_a[:, k * hidden : (k + 1) * hidden] / 4 for k in range(3))
            e_g = e_a[:, 3 * hidden :]
            e_next = both(f, e_f, cell, e_c) + both(i, e_i, g, e_g)
            following = f * cell + i * g
            alive = (t < length)[:, None]
            e_c, cell = np.where(alive, e_next, e_c), np.where(alive, following, cell)
            e_h = np.where(alive, both(o, e_o, np.tanh(cell), e_c), e_h)
            state = np.where(alive, o * np.tanh(cell), state)
            for k in range(batch):
                if t < length[k]:
                    values["Y"][at[k], d, k], bounds["Y"][at[k], d, k] = state[k], e_h[k]
        values["H"][d], bounds["H"][d], values["C"][d], bounds["C"][d] = state, e_h, cell, e_c
    return values, bounds


def both(u: Array, e_u: Array, v: Array, e_v: Array) -> Array:
    return np.asarray(np.abs(u) * e_v + np.abs(v) * e_u + e_u * e_v)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Y, H, C = LSTM <hidden_size = 4> (x, w, r, b, , , , p)", "peepholes"),
        ("Y, H, C = LSTM <hidden_size = 4, clip = 1.0> (x, w, r)", "clips"),
        ("Y, H, C = LSTM <hidden_size = 4, layout = 1> (x, w, r)", "layout"),
        ("Y, H, C = LSTM <hidden_size = 4, input_forget = 1> (x, w, r)", "input_forget"),
    ],
)
def test_unusual_lstms_keep_their_float_kernel(body: str, reason: str) -> None:
    weights = {"w": normal(0, 1, 16, 6), "r": normal(1, 1, 16, 4), "b": normal(2, 1, 32), "p": normal(3, 1, 12)}
    model = text(f"g (float[3, 2, 6] x) => (float[a, b, c] H) {{ {body} }}", weights)
    assert choices(model, Quantize(min_weights=1))["node"] == ["weights"], reason


def test_no_dynamic_lstm_without_contrib_operators() -> None:
    weights = {"w": normal(0, 1, 16, 6), "r": normal(1, 1, 16, 4)}
    model = text("g (float[3, 2, 6] x) => (float[a, b, c] H) { , H = LSTM <hidden_size = 4> (x, w, r) }", weights)
    assert choices(model, Quantize(min_weights=1), Target("t", contrib_ops=False))["node"] == ["weights"]
    assert choices(model, Quantize(min_weights=1))["node"] == ["weights", "dynamic"]


# --- smooth ------------------------------------------------------------------------------------


def test_smooth_moves_outliers_into_the_weights() -> None:
    """Exact up to rounding, and closer than plain dynamic where one input channel is a hundred times larger."""
    x = normal(5, 32, 16)
    x[:, 3] *= 100
    w = normal(0, 16, 8)
    w[3] /= 100
    for transposed in (False, True):
        body = "MatMul (x, w)" if not transposed else "Gemm <transB = 1> (x, w)"
        model = text(
            f"g (float[32, 16] x) => (float[32, 8] y) {{ y = {body} }}", {"w": w.T.copy() if transposed else w}
        )
        feeds: Feeds = [{"x": x}]
        plain, smooth = (made(Quantize(), model, mode, feeds) for mode in ("dynamic", "smooth"))
        assert ops(smooth)[0] == "Mul"
        expected = run(model, feeds[0])["y"]
        error = {n: np.square(run(m, feeds[0])["y"] - expected).mean() for n, m in (("p", plain), ("s", smooth))}
        assert error["s"] < error["p"] / 100
        factors = 1 / constant(smooth, "node_smooth").astype(np.float64)
        np.testing.assert_allclose(factors, np.sqrt(np.abs(x).max(0) / np.abs(w).max(1)), rtol=1e-5)


def test_smooth_on_values_that_others_made_integer() -> None:
    """The producer is static: what the product reads has another name by then, and is the same value."""
    model = text(
        "g (float[4, 16] x) => (float[4, 8] y) { a = Add (x, c)  y = MatMul (a, w) }",
        {"c": normal(1, 16), "w": normal(0, 16, 8)},
    )
    after = made(Quantize(), model, {"node": "static", "node_1": "smooth"}, one_feed(4, 16))
    assert {"QuantizeLinear", "MatMulInteger"} <= set(ops(after))


def test_channels_of_zeros_are_left_alone_by_smooth() -> None:
    x, w = normal(0, 8, 16), normal(1, 16, 8)
    x[:, 2] = 0
    w[5] = 0
    model = text(MATMUL.replace("4,", "8,"), {"w": w})
    after = made(Quantize(), model, "smooth", [{"x": x}])
    inverse = constant(after, "node_smooth")
    assert inverse[2] == inverse[5] == 1
    assert np.isfinite(run(after, {"x": x})["y"]).all()


# --- weights only ------------------------------------------------------------------------------

STORED: dict[str, tuple[str, dict[str, Array], tuple[int, ...]]] = {
    "conv": (CONV[2:], {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8)}, (1, 8, 8, 8)),
    "gemm": (GEMM[2:], {"w": normal(0, 16, 8), "b": normal(1, 8)}, (4, 16)),
    "matmul": (MATMUL[2:], {"w": normal(0, 16, 8)}, (4, 16)),
    "transposed conv": (
        "(float[1, 8, 5, 5] x) => (float[1, 4, 7, 7] y) { y = ConvTranspose (x, w) }",
        {"w": normal(0, 8, 4, 3, 3)},
        (1, 8, 5, 5),
    ),
    "gru": (
        "(float[3, 2, 6] x) => (float[3, 1, 2, 4] y) { y = GRU <hidden_size = 4> (x, w, r) }",
        {"w": normal(0, 1, 12, 6), "r": normal(1, 1, 12, 4)},
        (3, 2, 6),
    ),
    "shared": (
        "(float[4, 8] x) => (float[4, 8] y) { a = MatMul (x, w)  t = Tanh (a)  y = MatMul (t, w) }",
        {"w": normal(0, 8, 8)},
        (4, 8),
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_stored_weights_are_folded_when_the_model_is_loaded(case: str) -> None:
    """Then onnxruntime runs the very nodes of the float model, on the rounded weights."""
    body, weights, shape = STORED[case]
    model = text("g " + body, weights)
    after = made(Quantize(min_weights=1), model, "weights")
    found, expected = ([n.op_type for n in fused(m).graph.node] for m in (after, model))
    assert found == expected
    for name in weights.keys() - {"b"}:
        assert name not in after.graph.initializers
        stored = constant(after, f"{name}_int8")
        assert stored.dtype == np.int8
        w, step = weights[name], constant(after, f"{name}_scale")
        assert np.all(np.abs(stored * step - w) <= step / 2 * (1 + 1e-5))
    rounded = models.clone(model)
    for name in weights.keys() - {"b"}:
        rounded.graph.initializers[name].const_value = ir.tensor(
            constant(after, f"{name}_int8") * constant(after, f"{name}_scale"), name=name
        )
    (feed,) = one_feed(*shape)
    np.testing.assert_array_equal(run(after, feed)["y"], run(rounded, feed)["y"])


def test_a_shared_weight_is_stored_once() -> None:
    body, weights, _ = STORED["shared"]
    after = made(Quantize(min_weights=1), text("g " + body, weights), "weights")
    assert ops(after) == ["Cast", "Mul", "MatMul", "Tanh", "MatMul"]


def test_the_same_weight_read_along_two_axes_gets_two_forms() -> None:
    """Once as the matrix of a MatMul, once transposed by a Gemm: output channels differ."""
    model = text(
        "g (float[4, 8] x) => (float[4, 8] y) { a = MatMul (x, w)  y = Gemm <transB = 1> (a, w) }",
        {"w": normal(0, 8, 8)},
    )
    after = made(Quantize(min_weights=1), model, "weights")
    assert sorted(constant(after, n).shape for n in after.graph.initializers if "scale" in n) == [(1, 8), (8, 1)]


@pytest.mark.parametrize(
    ("attributes", "table", "indices"),
    [
        ("", (50, 8), np.array([[1, -1], [49, 0]])),
        ("<axis = 0>", (50, 4, 2), np.array([3, 3, 7])),
        ("<axis = 1>", (8, 50), np.array([3, 3, 7])),
        ("", (50, 8), np.array(-2)),
        ("", (300,), np.array([3, 299])),
        ("", (1, 300), np.array([0])),
    ],
)
def test_a_table_is_multiplied_out_after_the_lookup(attributes: str, table: tuple[int, ...], indices: Array) -> None:
    shape = ", ".join(map(str, indices.shape))
    w = normal(0, *table)
    given, made_of = f"int64[{shape}] i" if shape else "int64 i", ", ".join("abcd"[: indices.ndim + len(table) - 1])
    model = text(f"g ({given}) => (float[{made_of}] y) {{ y = Gather {attributes} (w, i) }}", {"w": w})
    after = made(Quantize(min_weights=1), model, "weights")
    axis = 1 if "1" in attributes else 0
    per_row = axis == 0 and len(table) > 1
    step = np.abs(w).max(axis=tuple(range(1, w.ndim)), keepdims=True) / 127 if per_row else np.abs(w).max() / 127
    feed = {"i": indices.astype(np.int64)}
    bound = np.take(np.broadcast_to(step / 2, w.shape), indices, axis=axis)
    error = np.abs(run(after, feed)["y"] - run(model, feed)["y"])
    assert error.shape == np.take(w, indices, axis=axis).shape
    assert np.all(error <= bound * (1 + 1e-5)) and error.max() > 0
    stored = [i for i in fused(after).graph.initializer if i.data_type == onnx.TensorProto.INT8]
    assert [tuple(t.dims) for t in stored] == [table]  # still int8 in memory


IF = """g (float[4, 16] x, bool flag) => (float[4, 8] y) {
  y = If (flag) <
    then_branch = t () => (float[4, 8] a) { u = MatMul (x, w)  a = Relu (u) },
    else_branch = e () => (float[4, 8] b) { b = MatMul (x, w) }
  > }"""


@pytest.mark.parametrize("mode", ["weights", "dynamic"])
def test_weights_read_in_branches(mode: str) -> None:
    w = normal(0, 16, 8)
    model = text(IF, {"w": w})
    after = made(Quantize(min_weights=1), model, mode)
    (x,) = one_feed(4, 16)
    s_w = np.abs(w).max(0) / 127
    s_x = np.float64(0 if mode == "weights" else np.ptp(np.append(x["x"], 0)) / 255)
    bound = product_error(np.matmul, x["x"], s_x / 2, w, s_w) * (1 + 1e-5)
    for flag in (True, False):
        feed = {**x, "flag": np.array(flag)}
        error = np.abs(run(after, feed)["y"] - run(model, feed)["y"])
        assert error.max() > 0 and np.all(error <= bound)
    inner = [n.op_type for n in fused(after).graph.node] + [
        n.op_type for node in fused(after).graph.node for a in node.attribute for n in a.g.node
    ]
    assert not {"Cast", "Mul"} & set(inner)


def test_static_is_not_offered_in_branches() -> None:
    model = text(IF, {"w": normal(0, 16, 8)})
    assert {c for found in choices(model, Quantize(min_weights=1)).values() for c in found} == {"weights", "dynamic"}


# --- what is offered ---------------------------------------------------------------------------


def choices(model: ir.Model, pass_: Quantize | None = None, target: Target = TARGET) -> dict[str, list[str]]:
    pass_, view = pass_ or Quantize(), GraphView(model)
    sites = [s for s in pass_.sites(view) if isinstance(s, Site)]
    return {s.key: [c.name for c in pass_.choices(s, view, target)] for s in sites}


def reasons(model: ir.Model, pass_: Quantize | None = None) -> dict[str, str]:
    return {s.key: s.reason for s in (pass_ or Quantize()).sites(GraphView(model)) if isinstance(s, Skipped)}


def test_forms_from_weak_to_strong() -> None:
    model = text(MATMUL, {"w": normal(0, 16, 8)})
    assert choices(model, Quantize(min_weights=1)) == {"node": ["weights", "dynamic", "smooth", "static"]}
    assert choices(model, Quantize(min_weights=1, modes=("static", "weights"))) == {"node": ["weights", "static"]}
    assert choices(model) == {"node": ["dynamic", "smooth", "static"]}, "128 weights are too few to store apart"


def test_what_needs_ranges_says_so() -> None:
    view = GraphView(text(MATMUL, {"w": normal(0, 16, 8)}))
    (site,) = Quantize().sites(view)
    assert isinstance(site, Site)
    assert {c.name: c.calibrated for c in Quantize().choices(site, view, TARGET)} == {
        "dynamic": False,
        "smooth": True,
        "static": True,
    }


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("y = Erf (x)", {}, "no int8 kernel for Erf"),
        ("y = MatMul (x, x)", {}, "not a float32 constant"),
        ("y = Gemm <alpha = 2.0> (x, x)", {}, "not a float32 constant"),
        ("s = Sin (x)  y = Concat <axis = 0> (s, w)", {"w": normal(0, 4, 4)}, "joins constants"),
    ],
)
def test_nodes_left_alone_say_why(body: str, weights: dict[str, Array], reason: str) -> None:
    model = text(f"g (float[4, 4] x) => (float[a, b] y) {{ {body} }}", weights)
    found = reasons(model)
    assert not choices(model)
    assert any(reason in r for r in found.values()), found


@pytest.mark.parametrize("attribute", ["alpha = 2.0", "beta = 0.5", "transA = 1"])
def test_unusual_gemms_can_only_be_stored(attribute: str) -> None:
    model = text(
        f"g (float[16, 16] x) => (float[16, 16] y) {{ y = Gemm <{attribute}> (x, w, b) }}",
        {"w": normal(0, 16, 16), "b": normal(1, 16)},
    )
    assert choices(model) == {"node": ["weights"]}


@pytest.mark.parametrize(("dtype", "word"), [(np.float16, "float16"), (np.float64, "double")])
def test_other_float_types_are_named(dtype: type, word: str) -> None:
    kind = {"float16": "float16", "double": "double"}[word]
    model = text(
        f"g ({kind}[4, 16] x) => ({kind}[4, 8] y) {{ y = MatMul (x, w) }}", {"w": normal(0, 16, 8).astype(dtype)}
    )
    assert not choices(model)
    assert reasons(model) == {"node": f"its weight is {word}; only float32 is quantized"}


def test_a_quantized_model_is_left_alone() -> None:
    model = text(CONV, {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8)})
    after = made(EXACT, model, "static", one_feed(1, 8, 8, 8))
    assert not choices(after)
    assert all("already quantized" in r for r in reasons(after).values())


def test_other_domains_are_left_alone() -> None:
    model = text("g (float[4, 16] x) => (float[4, 16] y) { y = com.microsoft.Gelu (x) }", imports=["com.microsoft"])
    assert not choices(model)
    assert reasons(model) == {"node": "operator com.microsoft.Gelu is not standard ONNX"}


def test_only_the_named_operators() -> None:
    model = text(
        "g (float[4, 16] x) => (float[4, 16] y) { m = MatMul (x, w)  y = Sigmoid (m) }", {"w": normal(0, 16, 16)}
    )
    assert set(choices(model, Quantize(only=("Sigmoid",)))) == {"node_1"}


@pytest.mark.parametrize(
    "options",
    [{"modes": ()}, {"modes": ("int3",)}, {"percentile": 50}, {"percentile": 101}, {"weight_ranges": "entropy"}],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    if "weight_ranges" in options:
        options = {"weight_ranges": RangeMethod.ENTROPY}
    with pytest.raises(ValueError, match=r"must be|at most"):
        Quantize(**options)  # type: ignore[arg-type]


def test_a_value_nobody_observed_is_no_ground_for_ranges() -> None:
    model = text(CONV, {"w": normal(0, 8, 8, 3, 3), "b": normal(1, 8)})
    view = GraphView(model)
    (site,) = EXACT.sites(view)
    assert isinstance(site, Site)
    (static,) = (c for c in EXACT.choices(site, view, TARGET) if c.name == "static")
    built = build(model, EXACT, [static], Evidence())
    assert not built.made
    assert built.refused[0].reason == "'x' was not observed in calibration"
    assert ops(built.model) == ["Conv"]


def test_a_choice_of_somebody_else_is_refused() -> None:
    model = text(MATMUL, {"w": normal(0, 16, 8)})
    with pytest.raises(PassError, match="not made by quantize"):
        EXACT.apply(Choice(Site("node", ("node",)), "weights"), Rewriter(model), Evidence())


# --- simulated ---------------------------------------------------------------------------------


def board(model: ir.Model, terms: list[Term], evidence: Evidence | None = None) -> ir.Model:
    """The model with a switch for each term, s0, s1, ..."""
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    for number, term in enumerate(terms):
        switch = rewriter.add_input(f"s{number}", ir.DataType.BOOL, ())
        assert EXACT.simulate(term, rewriter, evidence or Evidence(), TARGET, switch)
    check(copy)
    return copy


def switched(model: ir.Model, feed: Mapping[str, Array], *on: int) -> dict[str, Array]:
    switches = [v.name for v in model.graph.inputs if str(v.name)[0] == "s" and str(v.name)[1:].isdigit()]
    return run(model, {**feed, **{str(s): np.array(int(str(s)[1:]) in on) for s in switches}})


CHAIN = """g (float[4, 16] x) => (float[4, 8] y, float[4, 16] m) {
  m = MatMul (x, w)  n = MatMul (m, v)  y = Gemm <transB = 1> (n, u, b) }"""
CHAIN_WEIGHTS = {"w": normal(0, 16, 16), "v": normal(1, 16, 8), "u": normal(2, 8, 8), "b": normal(3, 8)}


@pytest.mark.parametrize(
    ("kind", "subjects"),
    [("weight", "wvu"), ("activation", "xmny"), ("dynamic", "xmn"), ("smooth", ("node", "node_1", "node_2"))],
)
def test_a_switchboard_is_the_original_and_each_distortion_alone(kind: str, subjects: tuple[str, ...] | str) -> None:
    """Three products in a row, the first also an output. Off: equal to the bit."""
    model, (feed,) = text(CHAIN, CHAIN_WEIGHTS), one_feed(4, 16)
    evidence = learn(EXACT, model, [feed])
    panel = board(model, [Term(kind, s) for s in subjects], evidence)
    before = run(model, feed)
    off = switched(panel, feed)
    assert [o.name for o in panel.graph.outputs] == ["y", "m"]
    for name, expected in before.items():
        np.testing.assert_array_equal(off[name], expected)
    seen = []
    for number in range(len(subjects)):
        alone = switched(panel, feed, number)["y"]
        seen.append(float(np.abs(alone - before["y"]).max()))
        single = switched(board(model, [Term(kind, subjects[number])], evidence), feed, 0)["y"]
        np.testing.assert_allclose(alone, single, rtol=1e-5, atol=1e-5)  # the others' switches do not interfere
    assert all(0 < s < np.abs(before["y"]).max() / 5 for s in seen)


@pytest.mark.parametrize("case", STORED)
def test_simulated_weights_are_exactly_the_stored_ones(case: str) -> None:
    """To the bit: where a switch is on, readers run on the rounded weight itself."""
    body, weights, shape = STORED[case]
    model, (feed,) = text("g " + body, weights), one_feed(*shape)
    after = made(Quantize(min_weights=1), model, "weights")
    terms = [Term("weight", n) for n in weights if n != "b"]
    panel = board(model, terms)
    on = switched(panel, feed, *range(len(terms)))["y"]
    np.testing.assert_array_equal(on, run(after, feed)["y"])


def test_simulated_tables_are_the_stored_ones() -> None:
    """Read twice; one of the readers is an output."""
    model = text(
        """g (int64[3] i, int64[3] j) => (float[3, 8] y, float[3, 8] z) {
             y = Gather (w, i)  t = Gather (w, j)  z = Neg (t) }""",
        {"w": normal(0, 40, 8)},
    )
    feed = {"i": np.array([0, 5, 39]), "j": np.array([1, -1, 2])}
    after, panel = made(Quantize(min_weights=1), model, "weights"), board(model, [Term("weight", "w")])
    for name in ("y", "z"):
        np.testing.assert_array_equal(switched(panel, feed)[name], run(model, feed)[name])
        np.testing.assert_array_equal(switched(panel, feed, 0)[name], run(after, feed)[name])


def test_simulated_weights_in_branches() -> None:
    model = text(IF, {"w": normal(0, 16, 8)})
    after, panel = made(Quantize(min_weights=1), model, "weights"), board(model, [Term("weight", "w")])
    for flag in (True, False):
        feed = {**one_feed(4, 16)[0], "flag": np.array(flag)}
        np.testing.assert_array_equal(switched(panel, feed)["y"], run(model, feed)["y"])
        np.testing.assert_array_equal(switched(panel, feed, 0)["y"], run(after, feed)["y"])


@pytest.mark.parametrize("mode", ["dynamic", "smooth", "static"])
def test_all_terms_of_a_choice_are_its_distortion(mode: str) -> None:
    """Equal up to float rounding, and once in a while a value on the edge between two integers."""
    model, (feed,) = (
        text(GEMM.replace("4", "64"), {"w": normal(0, 16, 8), "b": np.zeros(8, np.float32)}),
        one_feed(64, 16),
    )
    view = GraphView(model)
    (site,) = EXACT.sites(view)
    assert isinstance(site, Site)
    (choice,) = (c for c in EXACT.choices(site, view, TARGET) if c.name == mode)
    panel = board(model, list(choice.terms), learn(EXACT, model, [feed]))
    simulated = switched(panel, feed, *range(len(choice.terms)))["y"]
    real = run(made(EXACT, model, mode, [feed]), feed)["y"]
    noise = np.square(real - run(model, feed)["y"]).mean()
    assert np.square(simulated - real).mean() < noise / 50


def test_what_cannot_be_simulated_says_why() -> None:
    model = text("g (float[4, 16] x) => (float[4, 16] y) { t = Sin (x)  y = Cos (t) }")
    rewriter = Rewriter(models.clone(model))
    switch = rewriter.add_input("s", ir.DataType.BOOL, ())
    with pytest.raises(Skip, match="no matrix product reads 't'"):
        EXACT.simulate(Term("dynamic", "t"), rewriter, Evidence(), TARGET, switch)
    with pytest.raises(Skip, match="'t' was not observed"):
        EXACT.simulate(Term("activation", "t"), rewriter, Evidence(), TARGET, switch)
    assert len(rewriter.log) == 1  # the switch
