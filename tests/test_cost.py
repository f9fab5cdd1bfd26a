"""Costs are counted right: work by hand-made numbers, prices by a profile whose coefficients are one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model as models
from onnxcompress.cost import CostModel, ModelCost, NodeCost, work_of
from onnxcompress.profile import list_profiles, load_profile
from onnxcompress.view import GraphView
from onnxcompress.work import NodeWork, is_constant

PROFILE = """\
schema = 1
name = "ones"
description = "1 ns a MAC in float, half in integers, 1 ns an element"
device = {cpu = "none", cores = 1, frequency_ghz = 1.0}
runtime = {name = "onnxruntime", version = "1", threads = 1, contrib_ops = true}
quantization = {activation = "u8", weight_bits = 8, per_channel = true, channel_multiple = 1}
overhead = {ns_per_run = 1000, ns_per_node = 0}
energy = {active_w = 2.0, source = "test"}

[provenance]
status = "spec"
method = "made up"
source = "this test"
date = 2026-11-23
"""

KERNELS = [
    ("conv", "f32", "ns_per_mac = 1"),
    ("conv", "u8s8", "ns_per_mac = 0.5"),
    ("conv_pointwise", "f32", "ns_per_mac = 1\nchannel_block = 16"),
    ("conv_depthwise", "f32", "ns_per_mac = 1\naligned_to = 4\nmisaligned_factor = 3.0"),
    ("conv_grouped", "f32", "ns_per_mac = 1"),
    ("conv_stem", "f32", "ns_per_mac = 1"),
    ("conv_transpose", "f32", "ns_per_mac = 1"),
    ("matmul", "f32", "ns_per_mac = 1"),
    ("matmul", "dynamic", "ns_per_mac = 0.25"),
    ("matmul_rows1", "f32", "ns_per_mac = 1\nns_per_weight = 2"),
    ("matmul_dynamic", "f32", "ns_per_mac = 1"),
    ("lstm", "f32", "ns_per_mac = 1"),
    ("elementwise", "f32", "ns_per_element = 1"),
    ("Add", "u8s8", "ns_per_element = 0.25"),
    ("pool", "f32", "ns_per_element = 1"),
    ("reduce", "f32", "ns_per_element = 1"),
    ("gather", "f32", "ns_per_element = 1"),
    ("move", "f32", "ns_per_element = 1"),
    ("resize_linear", "f32", "ns_per_element = 9"),
    ("quantize", "f32", "ns_per_element = 1"),
    ("dequantize", "f32", "ns_per_element = 1"),
    ("free", "f32", ""),
    ("free", "u8s8", ""),
]

FUSIONS = """
[[fusion]]
op = "Conv"
absorbs = ["Relu"]
[[fusion]]
op = "Conv"
absorbs = ["Add"]
constant_operand = true
[[fusion]]
op = "Conv"
absorbs = ["Pad"]
side = "before"
[[fusion]]
op = "Conv"
absorbs = ["Relu"]
precision = "u8s8"
"""


def profile_text(extra: str = "") -> str:
    kernels = "".join(f'[[kernel]]\nkind = "{k}"\nprecision = "{p}"\n{more}\n' for k, p, more in KERNELS)
    return PROFILE + extra + kernels + FUSIONS


@pytest.fixture
def cost(tmp_path: Path) -> CostModel:
    path = tmp_path / "ones.toml"
    path.write_text(profile_text())
    return CostModel(load_profile(path))


def view_of(body: str, inputs: str, outputs: str, **weights: np.ndarray) -> GraphView:
    """A view of ONNX text; ``weights`` become initializers."""
    names = ", ".join(f"{_type(w.dtype)}[{','.join(map(str, w.shape))}] {n}" for n, w in weights.items())
    text = f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
    g ({inputs}{", " + names if names else ""}) => ({outputs}) {{ {body} }}"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
    models.canonicalize(model)
    return GraphView(models.infer_types(model))


def _type(dtype: np.dtype) -> str:
    return {"float32": "float", "int8": "int8", "uint8": "uint8", "int32": "int32", "int64": "int64"}[str(dtype)]


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def only(view: GraphView, shapes: dict[str, tuple[int, ...]] | None = None, op: str = "") -> NodeWork:
    nodes = view.nodes(op) if op else view.nodes()
    return work_of(view, nodes[0], shapes or {})


def row(cost: ModelCost, op: str) -> NodeCost:
    return next(n for n in cost.nodes if n.op_type == op)


# ---- work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "attributes", "channels", "kind", "macs", "patches"),
    [
        ((8, 16, 3, 3), "<pads=[1,1,1,1]>", 16, "conv", 8 * 16 * 9 * 100, 16 * 9 * 100),
        ((8, 16, 1, 1), "", 16, "conv_pointwise", 8 * 16 * 100, 16 * 100),
        ((16, 1, 3, 3), "<pads=[1,1,1,1], group=16>", 16, "conv_depthwise", 16 * 9 * 100, 9 * 100),
        ((8, 4, 3, 3), "<pads=[1,1,1,1], group=4>", 16, "conv_grouped", 8 * 4 * 9 * 100, 4 * 9 * 100),
        ((8, 3, 3, 3), "<pads=[1,1,1,1], strides=[2,2]>", 3, "conv_stem", 8 * 3 * 9 * 25, 3 * 9 * 25),
    ],
)
def test_convolutions(
    weight: tuple[int, ...], attributes: str, channels: int, kind: str, macs: int, patches: int
) -> None:
    view = view_of(f"y = Conv{attributes}(x, w)", f"float[1,{channels},10,10] x", "float[1,c,h,q] y", w=f32(*weight))
    work = only(view)
    assert (work.kind, work.macs, work.patches, work.maps) == (kind, macs, patches, True)
    assert work.weights == work.params == np.prod(weight)
    assert work.elements_in == channels * 100 and work.known


def test_convolution_over_a_sequence_is_no_map() -> None:
    view = view_of("y = Conv<pads=[2,2]>(x, w)", "float[1,16,10] x", "float[1,c,l] y", w=f32(8, 16, 5))
    work = only(view)
    assert (work.kind, work.macs, work.maps) == ("conv", 8 * 16 * 5 * 10, False)


def test_conv_transpose_counts_input_pixels() -> None:
    view = view_of("y = ConvTranspose<strides=[2,2]>(x, w)", "float[1,4,5,5] x", "float[1,c,h,q] y", w=f32(4, 6, 2, 2))
    assert only(view).macs == 4 * 6 * 4 * 25


@pytest.mark.parametrize(
    ("body", "x", "w", "kind", "macs"),
    [
        ("y = MatMul(x, w)", "8,32", (32, 64), "matmul", 8 * 32 * 64),
        ("y = MatMul(x, w)", "1,32", (32, 64), "matmul_rows1", 32 * 64),
        ("y = MatMul(x, w)", "2,4,32", (32, 64), "matmul", 8 * 32 * 64),
        ("y = MatMul(w, x)", "32,8", (64, 32), "matmul", 64 * 32 * 8),
        ("y = Gemm<transB=1>(x, w)", "8,32", (64, 32), "matmul", 8 * 32 * 64),
        ("y = Gemm<transA=1>(x, w)", "32,8", (32, 64), "matmul", 8 * 32 * 64),
    ],
)
def test_products(body: str, x: str, w: tuple[int, int], kind: str, macs: int) -> None:
    rank = ",".join("abc"[: x.count(",") + 1])
    work = only(view_of(body, f"float[{x}] x", f"float[{rank}] y", w=f32(*w)))
    assert (work.kind, work.macs, work.params) == (kind, macs, w[0] * w[1])


def test_product_of_two_activations() -> None:
    work = only(view_of("y = MatMul(a, b)", "float[2,8,4] a, float[2,4,8] b", "float[c,d,e] y"))
    assert (work.kind, work.macs, work.weights) == ("matmul_dynamic", 2 * 8 * 4 * 8, 0)


def test_recurrence() -> None:
    view = view_of(
        'y = LSTM<hidden_size=4, direction="bidirectional">(x, w, r)', "float[7,1,3] x", "float[7,2,1,4] y",
        w=f32(2, 16, 3), r=f32(2, 16, 4),
    )  # fmt: skip
    assert only(view).macs == 7 * 2 * 16 * (3 + 4)


def test_gather_reads_rows_and_not_the_table() -> None:
    view = view_of("y = Gather(w, i)", "int64[5] i", "float[5,8] y", w=f32(1000, 8))
    work = only(view)
    assert (work.kind, work.weights, work.params, work.elements) == ("gather", 40, 8000, 45)


def test_resize_by_interpolation_is_another_kind() -> None:
    body = 'y = Resize<mode="{}">(x, , s)'
    for mode, kind in (("nearest", "move"), ("linear", "resize_linear")):
        view = view_of(body.format(mode), "float[1,2,4,4] x", "float[a,b,c,d] y", s=f32(4))
        assert only(view, {"y": (1, 2, 4, 4)}).kind == kind


def test_observed_shapes_go_before_declared_and_unknown_ones_do_no_harm() -> None:
    view = view_of("y = MatMul(x, w)", "float[n,32] x", "float[n,64] y", w=f32(32, 64))
    unknown = only(view)
    assert not unknown.known and unknown.macs == 0 and unknown.weights == 2048
    known = only(view, {"x": (9, 32), "y": (9, 64)})
    assert known.known and known.macs == 9 * 32 * 64


@pytest.mark.parametrize("op", ["Conv", "MatMul", "Gemm", "LSTM", "Softmax", "Resize", "Gather", "MaxPool", "Mystery"])
def test_no_shape_at_all(op: str) -> None:
    text = f'<ir_version: 10, opset_import: ["": 20]> g (a, b, c) => (y) {{ y = {op}(a, b, c) }}'
    model = ir.from_onnx_text(text)
    models.canonicalize(model)
    assert not only(GraphView(model)).known


def test_weights_stored_in_another_form_are_weights() -> None:
    view = view_of(
        "f = Cast<to=1>(q) v = Mul(f, s) y = MatMul(x, v)", "float[8,32] x", "float[8,64] y",
        q=np.ones((32, 64), np.int8), s=f32(64),
    )  # fmt: skip
    work = only(view, op="MatMul")
    assert (work.kind, work.params) == ("matmul", 2048)
    book = view_of(
        "i = Cast<to=6>(q) v = Gather(b, i) y = MatMul(x, v)", "float[8,32] x", "float[8,64] y",
        q=np.zeros((32, 64), np.uint8), b=f32(256),
    )  # fmt: skip
    assert only(book, op="MatMul").params == 2048
    assert [is_constant(book, n.outputs[0]) for n in book.nodes()] == [True, True, False]


# ---- prices of nodes -------------------------------------------------------------------------------------


def test_price_is_linear_in_work(cost: CostModel) -> None:
    assert cost.node(NodeWork("", "Conv", "conv", macs=500)) == pytest.approx(500e-9)
    assert cost.node(NodeWork("", "Conv", "conv", macs=500), "u8s8") == pytest.approx(250e-9)
    assert cost.node(NodeWork("", "Gemm", "matmul_rows1", macs=5, weights=5)) == pytest.approx(15e-9)


def test_channels_are_padded_to_blocks(cost: CostModel) -> None:
    work = NodeWork("", "Conv", "conv_pointwise", macs=17 * 32, in_channels=17, out_channels=32)
    assert cost.node(work) == pytest.approx(32 * 32e-9)


def test_misaligned_channels_cost_more(cost: CostModel) -> None:
    def price(channels: int) -> float | None:
        return cost.node(NodeWork("", "Conv", "conv_depthwise", macs=100, in_channels=1, out_channels=channels))

    assert price(64) == pytest.approx(100e-9)
    assert price(63) == pytest.approx(300e-9)


def test_what_the_device_cannot_run_has_no_price(cost: CostModel) -> None:
    assert cost.node(NodeWork("", "HardSwish", "elementwise"), "u8s8") is None
    assert cost.node(NodeWork("", "Resize", "resize_linear"), "u8s8") is None
    assert cost.node(NodeWork("", "Add", "elementwise", elements_in=8), "u8s8") == pytest.approx(2e-9)


def test_conversion_reads_and_writes(cost: CostModel) -> None:
    assert cost.convert(100, "quantize") == pytest.approx(200e-9)


def test_weights_beyond_the_cache_cost_more(tmp_path: Path) -> None:
    path = tmp_path / "ones.toml"
    path.write_text(profile_text("[memory]\ncache_bytes = 8192\nns_per_byte = 1.0\n"))
    model = CostModel(load_profile(path))
    seconds = {}
    for columns in (32, 48, 64, 128):  # 4, 6, 8 and 16 KiB of weights in each of two products
        view = view_of(
            "t = MatMul(x, a) y = MatMul(t, b)",
            "float[8,32] x",
            "float[8,32] y",
            a=f32(32, columns),
            b=f32(columns, 32),
        )
        weights = 4 * 2 * 32 * columns
        traffic = weights + 4 * 8 * (columns + 32)  # activations push weights out as well
        seconds[columns] = 1e9 * model.model(view, {}).seconds - 1000 - 8 * 2 * 32 * columns
        assert model.for_model(view, {}).traffic_bytes == traffic
        missed = min(max((traffic - 8192) / 8192, 0), 1)
        assert seconds[columns] == pytest.approx(missed * weights)
    assert seconds[128] == pytest.approx(4 * 2 * 32 * 128)  # all of them
    assert 0 < seconds[32] < seconds[48] < seconds[64]


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_prices_grow_with_work(name: str) -> None:
    profile = load_profile(name)
    model = CostModel(profile)
    small = NodeWork("", "Conv", "conv", True, 10**6, 64, 64, 10**4, 10**4, 10**4, 10**4, 10**4)
    large = NodeWork("", "Conv", "conv", True, 10**7, 64, 64, 10**5, 10**5, 10**5, 10**5, 10**5)
    for precision in ("u8s8",) if profile.quantization.required else ("f32", "u8s8"):
        prices = [model.node(w, precision) for w in (small, large)]
        assert None not in prices and 0 < prices[0] < prices[1]


# ---- models ----------------------------------------------------------------------------------------------

CONV = "float[1,16,10,10] x"
MACS = 8 * 16 * 9 * 100


def test_totals(cost: CostModel) -> None:
    view = view_of("y = Conv<pads=[1,1,1,1]>(x, w)", CONV, "float[1,8,10,10] y", w=f32(8, 16, 3, 3))
    total = cost.model(view, {})
    assert total.seconds == pytest.approx(1e-6 + MACS * 1e-9)
    assert (total.macs, total.params, total.weight_bytes) == (MACS, 1152, 4608)
    assert total.energy_joule == pytest.approx(2 * total.seconds)
    assert total.peak_activation_bytes == 4 * (1600 + 800)
    assert sum(n.share for n in total.nodes) == pytest.approx(1 - 1e-6 / total.seconds)
    assert total.profile == "ones" and total.unknown == ()


def test_fused_activation_costs_nothing_and_takes_no_memory(cost: CostModel) -> None:
    body = "t = Conv<pads=[1,1,1,1]>(x, w) y = Relu(t)"
    view = view_of(body, CONV, "float[1,8,10,10] y", w=f32(8, 16, 3, 3))
    total = cost.model(view, {})
    assert row(total, "Relu").seconds == 0
    assert row(total, "Relu").inside == row(total, "Conv").name
    assert total.peak_activation_bytes == 4 * (1600 + 800)


def test_activation_is_not_fused_if_someone_else_reads(cost: CostModel) -> None:
    body = "t = Conv<pads=[1,1,1,1]>(x, w) y = Relu(t) z = Sigmoid(t)"
    view = view_of(body, CONV, "float[1,8,10,10] y, float[1,8,10,10] z", w=f32(8, 16, 3, 3))
    total = cost.model(view, {})
    assert row(total, "Relu").seconds == pytest.approx(1600e-9)
    assert total.peak_activation_bytes == 4 * 3 * 800


def test_activation_is_not_fused_if_the_value_leaves(cost: CostModel) -> None:
    body = "t = Conv<pads=[1,1,1,1]>(x, w) y = Relu(t)"
    view = view_of(body, CONV, "float[1,8,10,10] y, float[1,8,10,10] t", w=f32(8, 16, 3, 3))
    assert row(cost.model(view, {}), "Relu").seconds > 0


def test_sum_is_fused_only_with_a_constant(cost: CostModel) -> None:
    constant = view_of(
        "t = Conv(x, w) y = Add(t, b)", CONV, "float[1,16,10,10] y", w=f32(16, 16, 1, 1), b=f32(16, 1, 1)
    )
    residual = view_of("t = Conv(x, w) y = Add(t, x)", CONV, "float[1,16,10,10] y", w=f32(16, 16, 1, 1))
    assert row(cost.model(constant, {}), "Add").seconds == 0
    assert row(cost.model(residual, {}), "Add").seconds == pytest.approx(4800e-9)


def test_pad_is_fused_into_what_follows(cost: CostModel) -> None:
    body = "p = Pad(x, n) y = Conv(p, w)"
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    view = view_of(body, CONV, "float[1,8,10,10] y", n=pads, w=f32(8, 16, 3, 3))
    total = cost.model(view, {})
    assert row(total, "Pad").seconds == 0 and total.seconds == pytest.approx(1e-6 + MACS * 1e-9)


def test_nodes_on_constants_are_folded(cost: CostModel) -> None:
    view = view_of(
        "f = Cast<to=1>(q) v = Mul(f, s) y = MatMul(x, v)", "float[8,32] x", "float[8,64] y",
        q=np.ones((32, 64), np.int8), s=f32(64),
    )  # fmt: skip
    total = cost.model(view, {})
    assert total.seconds == pytest.approx(1e-6 + 8 * 2048e-9)
    assert total.weight_bytes == 2048 + 256
    assert row(total, "MatMul").weight_bytes == 2048 + 256


QUANTIZED = """
    xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear(w, s, wz)
    t = Conv<pads=[1,1,1,1]>(xd, wd) {activation} yq = QuantizeLinear(a, s, z) y = DequantizeLinear(yq, s, z)
"""
GRID = {"s": np.float32(0.1) * np.ones((), np.float32), "z": np.zeros((), np.uint8), "wz": np.zeros((), np.int8)}


@pytest.mark.parametrize("activation", ["a = Relu(t)", "a = Identity(t)"])
def test_a_quantized_convolution_is_one_integer_kernel(cost: CostModel, activation: str) -> None:
    body = (
        QUANTIZED.format(activation=activation)
        if "Relu" in activation
        else QUANTIZED.format(activation="").replace("(a,", "(t,")
    )
    view = view_of(body, CONV, "float[1,8,10,10] y", w=np.ones((8, 16, 3, 3), np.int8), **GRID)
    total = cost.model(view, {})
    conv = row(total, "Conv")
    assert (conv.precision, conv.seconds) == ("u8s8", pytest.approx(0.5e-9 * MACS))
    # Only entering and leaving the integers is paid: 1600 elements in, 800 out, each read and written.
    assert total.seconds == pytest.approx(1e-6 + conv.seconds + 2 * 1600e-9 + 2 * 800e-9)
    assert total.macs == MACS and conv.params == 1152 and conv.weight_bytes == 1152 + 4 + 1
    # x, then x as integers beside the result as integers, then the result twice.
    assert total.peak_activation_bytes == max(4 * 1600 + 1600, 1600 + 800, 800 + 4 * 800)


def test_what_stays_float_between_integers_pays_both_conversions(cost: CostModel) -> None:
    body = QUANTIZED.format(activation="a = HardSwish(t)")
    view = view_of(body, CONV, "float[1,8,10,10] y", w=np.ones((8, 16, 3, 3), np.int8), **GRID)
    total = cost.model(view, {})
    assert row(total, "Conv").precision == "f32"
    conversions = [n.seconds for n in total.nodes if "Linear" in n.op_type]
    # x into integers and out again, the weights out (at every run), the result in and out.
    assert conversions == pytest.approx([3200e-9, 3200e-9, 2 * 1152e-9, 1600e-9, 1600e-9])


def test_dynamic_quantization_is_one_kernel(cost: CostModel) -> None:
    body = """xq, xs, xz = DynamicQuantizeLinear(x) i = MatMulInteger(xq, w, xz) f = Cast<to=1>(i)
              k = Mul(xs, s) y = Mul(f, k)"""
    view = view_of(body, "float[8,32] x", "float[8,64] y", w=np.ones((32, 64), np.int8), s=f32(64))
    total = cost.model(view, {})
    assert row(total, "MatMulInteger").precision == "dynamic"
    assert total.seconds == pytest.approx(1e-6 + 0.25 * 8 * 2048e-9)


def test_the_dearer_branch_counts(cost: CostModel) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (bool c, float[8,8] x) => (float[8,8] y) {
        y = If(c) <then_branch = a () => (float[8,8] u) { u = MatMul(x, x) },
                   else_branch = b () => (float[8,8] v) { v = Relu(x) }>
    }"""
    model = ir.from_onnx_text(text)
    models.canonicalize(model)
    total = cost.model(GraphView(model), {"u": (8, 8), "v": (8, 8)})
    assert total.seconds == pytest.approx(1e-6 + 512e-9)
    assert row(total, "Relu").seconds == 0


def test_memory_follows_lifetimes_and_views_are_free(cost: CostModel) -> None:
    body = "a = Sigmoid(x) b = Reshape(a, n) c = Sigmoid(b) d = Sigmoid(c) y = Add(d, b)"
    view = view_of(body, "float[10,10] x", "float[100] y", n=np.array([100]))
    # a lives on as b until the end: with c and d while d is made, with d and y at the end.
    assert cost.model(view, {}).peak_activation_bytes == 3 * 400


def test_unknown_nodes_are_named(cost: CostModel) -> None:
    view = view_of("t = Relu(x) y = Softmax(t)", "float[n,8] x", "float[n,8] y")
    unknown = cost.model(view, {})
    assert set(unknown.unknown) == {n.name for n in unknown.nodes}
    shapes = dict.fromkeys("xty", (4, 8))
    assert cost.model(view, shapes).unknown == (row(unknown, "Softmax").name,)  # no kernel in this profile


def test_a_deep_model_is_no_problem(cost: CostModel) -> None:
    chain = " ".join(f"v{i + 1} = Relu(v{i})" for i in range(3000))
    view = view_of(chain, "float[4] v0", "float[4] v3000")
    assert cost.model(view, {}).seconds == pytest.approx(1e-6 + 3000 * 8e-9)
