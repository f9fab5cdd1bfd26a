"""The passes that tidy a graph: structure before and after, and numbers from onnxruntime on both.

Where a pass claims equality, outputs are compared bit for bit. Where it rounds weights once, the bound
is the rounding of one weight, eps / 2 relative, summed over the products it enters, plus the runtime's
own summation error on both sides: gamma_n = n eps / (1 - n eps) of the sum of absolute products.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import model as models
from onnxcompress.base import Pass, Site, Skip, Skipped
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.passes.fuse_batchnorm import FuseBatchNorm
from onnxcompress.passes.merge_duplicates import MergeDuplicates
from onnxcompress.passes.remove_dead_code import RemoveDeadCode
from onnxcompress.passes.remove_noops import RemoveNoOps
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]

EPS = float(np.finfo(np.float32).eps)
ALL: tuple[Pass, ...] = (FoldConstants(), RemoveNoOps(), FuseBatchNorm(), MergeDuplicates(), RemoveDeadCode())
TARGET = Target("any")
RNG = np.random.default_rng(0)


def text(body: str, opset: int = 17, weights: Mapping[str, Array] | None = None) -> ir.Model:
    """A model from ONNX text; ``weights`` become initializers of the main graph."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{body}')
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)  # the checker wants shapes of outputs
    del proto.graph.output[:]
    proto.graph.output.extend(inferred.graph.output)
    onnx.checker.check_model(proto)
    model = ir.from_proto(proto)
    models.canonicalize(model)
    return model


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph.all_nodes()]


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(models.serialize(model), options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, feeds: Feeds) -> list[Array]:
    return [np.asarray(a) for a in session(model).run(None, dict(feeds))]


def apply(pass_: Pass, model: ir.Model) -> dict[str, str]:
    """Makes every choice; returns why sites were left alone."""
    view = GraphView(model)
    sites = list(pass_.sites(view))
    reasons = {s.key: s.reason for s in sites if isinstance(s, Skipped)}
    choices = [c for s in sites if isinstance(s, Site) for c in pass_.choices(s, view, TARGET)]
    rewriter = Rewriter(model)
    for choice in choices:
        try:
            pass_.apply(choice, rewriter, Evidence())
        except Skip as skip:
            reasons[choice.site.key] = skip.reason
    if not any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values()):
        onnx.checker.check_model(onnx.load_from_string(models.serialize(model)))
    return reasons


def same_outputs(pass_: Pass, model: ir.Model, feeds: Feeds) -> ir.Model:
    """Applies the pass to a clone and insists on equal names, types and bits."""
    copy = models.clone(model)
    apply(pass_, copy)
    before, after = session(model), session(copy)
    assert [(o.name, o.type) for o in before.get_outputs()] == [(o.name, o.type) for o in after.get_outputs()]
    for old, new in zip(run(model, feeds), run(copy, feeds), strict=True):
        np.testing.assert_array_equal(old, new)
    return copy


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


# --- fold constants ----------------------------------------------------------------------------


def test_folds_a_chain_and_names_stay_unique() -> None:
    model = text(
        """g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}> {
             s = Add(a, b)  t = Sqrt(s)  y = Mul(x, t)
           }"""
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(2)})
    assert ops(after) == ["Mul"]
    assert len(after.graph.initializers) == 1
    np.testing.assert_array_equal(
        next(iter(after.graph.initializers.values())).const_value.numpy(), np.sqrt(np.float32([4, 6]))
    )


def test_folds_shape_arithmetic_where_the_extent_is_static() -> None:
    model = text(
        """g (float[N, 3, 4] x) => (float[N, M] y) <int64[1] one = {1}, int64[1] two = {2}, int64[1] open = {-1}> {
             s = Shape(x)  a = Gather(s, one)  b = Gather(s, two)  m = Mul(a, b)
             shape = Concat<axis = 0>(open, m)  y = Reshape(x, shape)
           }"""
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(5, 3, 4)})
    assert ops(after) == ["Reshape"]


def test_keeps_shape_arithmetic_of_a_dynamic_extent() -> None:
    model = text(
        """g (float[N, 3] x) => (int64[1] y) <int64[1] zero = {0}, int64[1] one = {1}> {
             s = Shape(x)  n = Gather(s, zero)  y = Add(n, one)
           }"""
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(5, 3)})
    assert ops(after) == ["Shape", "Gather", "Add"]


def test_declared_shapes_of_inner_values_are_not_believed() -> None:
    model = text(
        """g (float[N, 3] x) => (int64[2] y) <float[N, 3] unused, float[7, 3] z> {
             z = Relu(x)  s = Shape(z)  y = Identity(s)
           }"""
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(5, 3)})
    assert "Shape" in ops(after)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("w = Cast<to = 1>(q)  v = Mul(w, scale)", {"q": np.arange(4096, dtype=np.int8).reshape(64, 64)}),
        ("i = Cast<to = 7>(q)  v = Gather(scale, i)", {"q": (np.arange(4096) % 1).astype(np.uint8).reshape(64, 64)}),
        ("v = Expand(scale, q)", {"q": np.array([64, 64])}),
        ("v = Tile(row, q)", {"q": np.array([64, 64]), "row": np.ones((1, 1), np.float32)}),
        ("v = ConstantOfShape(q)", {"q": np.array([64, 64])}),
    ],
    ids=["int8 weight", "codebook", "expand", "tile", "constant of shape"],
)
def test_never_makes_the_file_larger(body: str, weights: dict[str, Array]) -> None:
    weights = {"scale": np.float32([0.5]), **weights}
    model = text(f"g (float[2, 64] x) => (float[2, 64] y) {{ {body}  y = MatMul(x, v) }}", weights=weights)
    before = ops(model)
    reasons = apply(FoldConstants(), model)
    assert ops(model) == before
    assert any("would take the place of" in r for r in reasons.values())


def test_folds_what_frees_as_much_as_it_adds() -> None:
    """Gate reordering of an exported LSTM: slices of one weight, joined again; and a transpose."""
    model = text(
        """g (float[2, 64] x) => (float[2, 64] y)
           <int64[1] zero = {0}, int64[1] half = {32}, int64[1] all = {64}> {
             a = Slice(w, zero, half)  b = Slice(w, half, all)  c = Concat<axis = 0>(b, a)  t = Transpose(c)
             y = MatMul(x, t)
           }""",
        weights={"w": normal(64, 64)},
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(2, 64)})
    assert ops(after) == ["MatMul"]
    assert models.weight_bytes(after) == 64 * 64 * 4


def test_a_weight_that_stays_is_not_counted_as_freed() -> None:
    model = text(
        "g (float[2, 64] x) => (float[2, 64] y) { t = Transpose(w)  a = MatMul(x, t)  y = MatMul(a, w) }",
        weights={"w": normal(64, 64)},
    )
    reasons = apply(FoldConstants(), model)
    assert "Transpose" in ops(model)
    assert reasons


def test_quantization_random_numbers_and_other_domains_stay() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
           g (float[2] x) => (float[2] y, float[2] z, float[2] u)
           <int8[2] q = {1, 2}, float s = {0.5}, float[2] one = {1, 1}> {
             w = DequantizeLinear(q, s)  y = Add(x, w)
             r = RandomNormalLike(one)  z = Add(x, r)
             h = com.microsoft.Gelu(one)  u = Add(x, h)
           }"""
    )
    model = ir.from_proto(proto)
    models.canonicalize(model)
    before = ops(model)
    reasons = apply(FoldConstants(), model)
    assert ops(model) == before
    assert len(reasons) == 3


BRANCHES = """<then_branch = t () => (float[2] p) {{ a = {first}(x)  p = Identity(a) }},
               else_branch = e () => (float[2] p) {{ a = Neg(x)  p = Identity(a) }}>"""


@pytest.mark.parametrize("condition", [0, 1])
def test_inlines_the_branch_that_is_taken(condition: int) -> None:
    branches = BRANCHES.format(first="Relu")
    model = text(
        f"""g (float[2] x) => (float[2] y, float[2] z) <int64[1] one = {{1}}, int64[1] c = {{{condition}}}> {{
              b = Equal(c, one)
              y = If(b) {branches}
              z = If(b) {branches}
            }}"""
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(2)})
    assert "If" not in ops(after)
    assert ops(after).count("Relu" if condition else "Neg") == 2
    names = [v.name for n in after.graph for v in n.outputs]
    assert len(set(names)) == len(names)


def test_inlines_nested_branches_and_folds_what_they_free() -> None:
    """As in Silero VAD: the inner condition asks for a shape that only the outer branch determines."""
    model = text(
        """g (float[2, 1] x) => (float[2] y) <bool yes = {1}, int64 one = {1}, int64[1] axis = {1}> {
             y = If(yes) <
               then_branch = t () => (float[2] o) {
                 s = Shape(x)  d = Gather(s, one)  e = Equal(d, one)
                 o = If(e) <then_branch = tt () => (float[2] p) { p = Squeeze(x, axis) },
                            else_branch = te () => (float[2, 1] p) { p = Identity(x) }>
               },
               else_branch = f () => (float[2] o) { o = Squeeze(x, axis) }>
           }"""
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(2, 1)})
    assert ops(after) == ["Squeeze"]


def test_a_branch_that_hands_on_an_outer_value_is_inlined() -> None:
    body = ir.Graph([], [], nodes=[], name="t")
    model = text("g (float[2] x) => (float[2] y) <bool yes = {1}> { y = If(yes) " + BRANCHES.format(first="Relu") + "}")
    node = next(n for n in model.graph if n.op_type == "If")
    weight = ir.Value(name="kept", const_value=ir.tensor(np.float32([1, 2])), type=ir.TensorType(ir.DataType.FLOAT))
    body.register_initializer(weight)
    body.outputs.append(weight)
    node.attributes["then_branch"] = ir.AttrGraph("then_branch", body)
    copy = models.clone(model)
    apply(FoldConstants(), copy)
    assert ops(copy) == ["Identity"]
    np.testing.assert_array_equal(run(copy, {"x": normal(2)})[0], np.float32([1, 2]))


def test_a_loop_body_has_no_static_shape() -> None:
    model = text(
        """g (float[1] x) => (float[M] y) <int64 n = {3}, bool yes = {1}> {
             y = Loop(n, yes, x) <body = b (int64 i, bool c, float[1] v) => (bool k, float[M] w) {
               k = Identity(c)  s = Shape(v)  f = Cast<to = 1>(s)  w = Concat<axis = 0>(v, f)
             }>
           }"""
    )
    after = same_outputs(FoldConstants(), model, {"x": normal(1)})
    assert "Shape" in ops(after)


def test_folding_shows_when_values_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: a folder that is off by one is caught."""
    model = text("g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { b = Neg(a)  y = Add(x, b) }")
    compute = Rewriter.compute
    monkeypatch.setattr(Rewriter, "compute", lambda *a: [v + 1 for v in compute(*a)])
    with pytest.raises(AssertionError):
        same_outputs(FoldConstants(), model, {"x": normal(2)})


# --- fuse batch normalization ------------------------------------------------------------------


def conv_bound(x: Array, w: Array, b: Array, taps: int) -> float:
    """Largest difference rounding can make between two ways of computing ``w * x + b`` in float32.

    Both sum ``taps`` products and a bias (gamma_n each) and their weights differ by the rounding of a
    scale, a product and a sum; 2 (n + 4) eps of the sum of absolute products covers it.
    """
    magnitude = float(np.abs(w).reshape(w.shape[0], -1).sum(axis=1).max() * np.abs(x).max() + np.abs(b).max())
    return 2 * (taps + 4) * EPS * magnitude


def close(model: ir.Model, after: ir.Model, feeds: Feeds, bound: float) -> None:
    for old, new in zip(run(model, feeds), run(after, feeds), strict=True):
        assert np.abs(old.astype(np.float64) - new).max() <= bound


NORM = {"gamma": normal(4), "beta": normal(4), "mean": normal(4), "var": np.abs(normal(4)) + np.float32(0.5)}
LINEAR = {
    "Conv": ("Conv<pads = [1, 1, 1, 1]>(x, w, b)", normal(4, 3, 3, 3), (2, 3, 5, 5), 27),
    "grouped Conv": ("Conv<group = 2>(x, w, b)", normal(4, 2, 3, 3), (2, 4, 5, 5), 18),
    "ConvTranspose": ("ConvTranspose<strides = [2, 2]>(x, w, b)", normal(3, 4, 3, 3), (2, 3, 5, 5), 27),
    "grouped ConvTranspose": ("ConvTranspose<group = 2>(x, w, b)", normal(6, 2, 3, 3), (2, 6, 5, 5), 27),
    "Gemm": ("Gemm<alpha = 0.5, beta = 2.0>(x, w, b)", normal(3, 4), (2, 3), 3),
    "Gemm, transposed": ("Gemm<transB = 1>(x, w, b)", normal(4, 3), (2, 3), 3),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_batch_normalization_goes_into_the_linear_operator(kind: str) -> None:
    call, w, shape, taps = LINEAR[kind]
    dims = ", ".join(map(str, shape))
    model = text(
        f"g (float[{dims}] x) => (float[] y) {{ c = {call}  y = BatchNormalization(c, gamma, beta, mean, var) }}",
        weights={"w": w, "b": normal(4), **NORM},
    )
    after = models.clone(model)
    assert apply(FuseBatchNorm(), after) == {}
    assert ops(after) == [kind.split(",")[0].split()[-1]]
    x = normal(*shape)
    scale = np.abs(NORM["gamma"]) / np.sqrt(NORM["var"])
    close(model, after, {"x": x}, 4 * conv_bound(x, np.abs(w) * scale.max(), np.abs(NORM["mean"]) + 8, taps))


def test_the_bound_is_tight_enough_to_notice_a_missing_epsilon() -> None:
    call, w, shape, taps = LINEAR["Conv"]
    weights = {"w": w, "b": normal(4), **NORM}
    body = "g (float[2, 3, 5, 5] x) => (float[] y) {{ c = {}  y = BatchNormalization{}(c, gamma, beta, mean, var) }}"
    model = text(body.format(call, ""), weights=weights)
    other = text(body.format(call, "<epsilon = 0.001>"), weights=weights)
    apply(FuseBatchNorm(), other)
    x = normal(*shape)
    scale = np.abs(NORM["gamma"]) / np.sqrt(NORM["var"])
    bound = 4 * conv_bound(x, np.abs(w) * scale.max(), np.abs(NORM["mean"]) + 8, taps)
    with pytest.raises(AssertionError):
        close(model, other, {"x": x}, bound)


@pytest.mark.parametrize("kind", ["Conv", "grouped Conv", "ConvTranspose"])
def test_a_chain_of_maps_after(kind: str) -> None:
    call, w, shape, taps = LINEAR[kind]
    dims = ", ".join(map(str, shape))
    model = text(
        f"""g (float[{dims}] x) => (float[] y) {{
              c = {call}  n = BatchNormalization(c, gamma, beta, mean, var)
              m = Mul(scale, n)  a = Add(m, shift)  d = Div(a, scale)  y = Sub(two, d)
            }}""",
        weights={
            "w": w,
            "b": normal(4),
            **NORM,
            "scale": np.abs(normal(1, 4, 1, 1)) + np.float32(1),
            "shift": normal(4, 1, 1),
            "two": np.float32(2),
        },
    )
    after = models.clone(model)
    assert apply(FuseBatchNorm(), after) == {}
    assert len(ops(after)) == 1
    x = normal(*shape)
    close(model, after, {"x": x}, 16 * conv_bound(x, np.abs(w) * 3, np.float32([8]), taps))


@pytest.mark.parametrize(("pads", "fused"), [("0, 0, 0, 0", True), ("1, 1, 1, 1", False)])
def test_a_map_before_needs_a_conv_without_padding(pads: str, fused: bool) -> None:
    weights = {"w": normal(4, 2, 3, 3), **NORM}
    model = text(
        f"""g (float[2, 4, 5, 5] x) => (float[] y) {{
              n = BatchNormalization(x, gamma, beta, mean, var)  y = Conv<group = 2, pads = [{pads}]>(n, w)
            }}""",
        weights=weights,
    )
    after = models.clone(model)
    reasons = apply(FuseBatchNorm(), after)
    assert (ops(after) == ["Conv"]) is fused
    assert fused or any("pads with zeros" in r for r in reasons.values())
    x = normal(2, 4, 5, 5)
    close(model, after, {"x": x}, 16 * conv_bound(x, np.abs(weights["w"]) * 3, np.float32([8]), 18))


def test_a_pure_scale_before_a_padded_conv_is_fused() -> None:
    model = text(
        "g (float[2, 4, 5, 5] x) => (float[] y) { n = Mul(x, s)  y = Conv<pads = [1, 1, 1, 1]>(n, w) }",
        weights={"w": normal(2, 4, 3, 3), "s": normal(4, 1, 1)},
    )
    after = models.clone(model)
    apply(FuseBatchNorm(), after)
    assert ops(after) == ["Conv"]
    x = normal(2, 4, 5, 5)
    close(model, after, {"x": x}, 8 * conv_bound(x, normal(2, 4, 3, 3) * 3, np.float32([8]), 36))


def test_normalized_pixels_go_into_the_first_layer() -> None:
    model = text(
        "g (float[2, 3, 5, 5] x) => (float[] y) { c = Sub(x, mean)  n = Div(c, std)  y = Conv(n, w, b) }",
        weights={
            "mean": normal(1, 3, 1, 1),
            "std": np.abs(normal(3, 1, 1)) + np.float32(1),
            "w": normal(4, 3, 3, 3),
            "b": normal(4),
        },
    )
    after = models.clone(model)
    assert apply(FuseBatchNorm(), after) == {}
    assert ops(after) == ["Conv"]
    x = normal(2, 3, 5, 5)
    close(model, after, {"x": x}, 8 * conv_bound(x, normal(4, 3, 3, 3) * 3, np.float32([16]), 27))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("c = Conv(x, w)  y = BatchNormalization(c, gamma, beta, mean, var)  z = Neg(c)", "other readers"),
        ("z = Conv(x, w)  y = BatchNormalization(z, gamma, beta, mean, var)", "other readers"),
        ("c = Relu(x)  z = BatchNormalization(c, g3, g3, g3, g3)  y = Neg(z)", "no Conv"),
        ("v = Neg(w)  c = Conv(x, v)  y = BatchNormalization(c, gamma, beta, mean, var)  z = Neg(y)", "no constant"),
        ("c = Conv(x, w)  y = Add(c, wide)  z = Neg(y)", "not one number per channel"),
    ],
)
def test_why_a_map_stays(body: str, reason: str) -> None:
    weights = {"w": normal(4, 3, 1, 1), "g3": np.ones(3, np.float32), "wide": normal(1, 4, 5, 5), **NORM}
    model = text(f"g (float[2, 3, 5, 5] x) => (float[] y, float[] z) {{ {body} }}", weights=weights)
    before = ops(model)
    reasons = apply(FuseBatchNorm(), model)
    assert ops(model) == before
    assert any(reason in r for r in reasons.values()), reasons


def test_a_shared_weight_is_unshared() -> None:
    model = text(
        """g (float[2, 4, 5, 5] x) => (float[] y, float[] z) {
             c = Conv(x, w, b)  y = BatchNormalization(c, gamma, beta, mean, var)  z = Conv(x, w, b)
           }""",
        weights={"w": normal(4, 4, 1, 1), "b": normal(4), **NORM},
    )
    after = models.clone(model)
    apply(FuseBatchNorm(), after)
    assert ops(after) == ["Conv", "Conv"]
    x = normal(2, 4, 5, 5)
    old, new = run(model, {"x": x}), run(after, {"x": x})
    np.testing.assert_array_equal(old[1], new[1])
    assert np.abs(old[0] - new[0]).max() <= 16 * conv_bound(x, normal(4, 4, 1, 1) * 3, np.float32([8]), 4)


@pytest.mark.parametrize(("fill", "mode", "fused"), [(0, "constant", True), (1, "constant", False), (0, "edge", False)])
def test_zero_pads_go_into_the_conv(fill: int, mode: str, fused: bool) -> None:
    model = text(
        f"""g (float[2, 3, 5, 5] x) => (float[] y) <int64[8] p = {{0, 0, 1, 2, 0, 0, 3, 0}}, float v = {{{fill}}}> {{
              q = Pad<mode = "{mode}">(x, p, v)  y = Conv<pads = [1, 0, 0, 1], strides = [2, 1]>(q, w)
            }}""",
        weights={"w": normal(4, 3, 3, 3)},
    )
    after = same_outputs(FuseBatchNorm(), model, {"x": normal(2, 3, 5, 5)})
    assert (ops(after) == ["Conv"]) is fused


# --- remove no-ops -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Identity(x)  y = Relu(a)", ["Relu"]),
        ("a = Relu(x)  y = Identity(a)", ["Relu"]),
        ("a, m = Dropout(x)  y = Relu(a)", ["Relu"]),
        ("a = Cast<to = 1>(x)  y = Relu(a)", ["Relu"]),
        ("a = Transpose<perm = [0, 1, 2]>(x)  y = Relu(a)", ["Relu"]),
        ("a = Transpose<perm = [2, 0, 1]>(x)  b = Transpose<perm = [1, 2, 0]>(a)  y = Relu(b)", ["Relu"]),
        ("a = Transpose(x)  b = Transpose(a)  y = Relu(b)", ["Relu"]),
        ("a = Transpose<perm = [2, 0, 1]>(x)  y = Transpose<perm = [2, 0, 1]>(a)", ["Transpose"]),
        ("a = Reshape(x, same)  y = Relu(a)", ["Relu"]),
        ("a = Reshape(x, flat)  b = Reshape(a, same)  y = Relu(b)", ["Relu"]),
        ("a = Reshape(x, flat)  y = Reshape(a, pair)", ["Reshape"]),
        ("a = Unsqueeze(x, one)  b = Squeeze(a, one)  y = Relu(b)", ["Relu"]),
        ("a = Expand(x, one)  y = Relu(a)", ["Relu"]),
        ("a = Slice(x, zero, far, one)  y = Relu(a)", ["Relu"]),
        ("a = Tile(x, ones)  y = Relu(a)", ["Relu"]),
        ("a = Mul(x, f1)  b = Div(a, f1)  c = Sub(b, f0)  d = Add(f0, c)  y = Relu(d)", ["Relu"]),
        ("a = Concat<axis = 0>(x)  b = Sum(a)  y = Max(b)", ["Max"]),
        ("a = Relu(x)  y = Relu(a)", ["Relu"]),
        ("a = Clip(x, f0, f6)  y = Relu(a)", ["Clip"]),
        ("a = Relu(x)  y = Clip(a, neg, f6)", ["Clip"]),
        ("a = Clip(x, neg, f1)  b = Relu(a)  y = Clip(b, f0, f6)", ["Clip"]),
        ("a = Clip(x, neg, neg)  y = Relu(a)", ["Clip"]),
        ("a, i = MaxPool<kernel_shape = [2]>(x)  y = Relu(a)", ["MaxPool", "Relu"]),
    ],
)
def test_noops_go(body: str, left: list[str]) -> None:
    model = text(
        f"""g (float[2, 3, 4] x) => (float[] y)
            <int64[3] same = {{2, 3, 4}}, int64[1] flat = {{-1}}, int64[2] pair = {{6, 4}}, int64[1] one = {{1}},
             int64[1] zero = {{0}}, int64[1] far = {{9223372036854775807}}, int64[3] ones = {{1, 1, 1}},
             float f0 = {{0}}, float f1 = {{1}}, float f6 = {{6}}, float neg = {{-2}}> {{ {body} }}"""
    )
    after = same_outputs(RemoveNoOps(), model, {"x": 4 * normal(2, 3, 4)})
    assert ops(after) == left
    if left[0] == "MaxPool":
        assert len(next(iter(after.graph)).outputs) == 1


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity(x)",  # joins an input to an output
        "a = Mul(x, wide)  y = Neg(a)",  # broadcasts x
        "a = Reshape(x, swapped)  y = Neg(a)",
        "a = Slice(x, zero, two, one)  y = Neg(a)",
        "a = Expand(x, wider)  y = Neg(a)",
        "a = Transpose<perm = [1, 0, 2]>(x)  b = Neg(a)  y = Transpose<perm = [1, 0, 2]>(b)",
        "a = Sub(f0, x)  y = Neg(a)",
        "a = Div(f1, x)  y = Neg(a)",
        "a = Clip(x, neg, f6)  b = Relu(a)  y = Add(a, b)",  # the first has another reader
    ],
)
def test_what_is_no_noop_stays(body: str) -> None:
    model = text(
        f"""g (float[2, 3, 4] x) => (float[] y)
            <int64[3] swapped = {{2, 4, 3}}, float[5, 1, 1, 1] wide = {{1, 1, 1, 1, 1}}, int64[1] one = {{1}},
             int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[4] wider = {{2, 1, 1, 1}},
             float f0 = {{0}}, float f1 = {{1}}, float f6 = {{6}}, float neg = {{-2}}> {{ {body} }}"""
    )
    after = same_outputs(RemoveNoOps(), model, {"x": normal(2, 3, 4)})
    assert ops(after) == ops(model)


def test_a_reshape_with_one_unknown_extent_is_a_noop_and_with_two_is_not() -> None:
    body = "g (float[N, {}, 4] x) => (float[] y) <int64[3] s = {{{}}}> {{ a = Reshape(x, s)  y = Relu(a) }}"
    feeds = {"x": normal(2, 3, 4)}
    assert ops(same_outputs(RemoveNoOps(), text(body.format(3, "-1, 3, 4")), feeds)) == ["Relu"]
    assert ops(same_outputs(RemoveNoOps(), text(body.format("M", "3, 2, 4")), feeds)) == ["Reshape", "Relu"]


def test_output_names_and_two_names_for_one_value_are_kept() -> None:
    model = text("g (float[2] x) => (float[2] y, float[2] z) { a = Relu(x)  y = Identity(a)  z = Identity(a) }")
    after = same_outputs(RemoveNoOps(), model, {"x": normal(2)})
    assert ops(after) == ["Relu", "Identity"]


def test_inside_a_branch_an_outer_value_cannot_become_an_output() -> None:
    model = text(
        "g (float[2] x, bool c) => (float[2] y) { y = If(c) " + BRANCHES.format(first="Relu") + "}",
    )
    after = same_outputs(RemoveNoOps(), model, {"x": normal(2), "c": np.array(True)})
    assert ops(after) == ["If", "Relu", "Neg"]


SWISH = {
    "x * HardSigmoid": "h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)  y = Mul(h, x)",
    "x * (Clip / 6)": "a = Add(x, three)  c = Clip(a, zero, six)  d = Div(c, six)  y = Mul(x, d)",
    "(x * Clip) / 6": "a = Add(three, x)  c = Clip(a, zero, six)  d = Mul(x, c)  y = Div(d, six)",
    "(x * Clip) * 1/6": "a = Add(x, three)  c = Clip(a, zero, six)  d = Mul(x, c)  y = Mul(d, sixth)",
}


@pytest.mark.parametrize("form", SWISH)
@pytest.mark.parametrize("opset", [13, 14])
def test_hard_swish_is_recognised_where_the_opset_has_it(form: str, opset: int) -> None:
    model = text(
        f"""g (float[64] x) => (float[64] y)
            <float three = {{3}}, float zero = {{0}}, float six = {{6}}, float sixth = {{0.16666667}}> {{
              {SWISH[form]}
            }}""",
        opset,
    )
    after = models.clone(model)
    apply(RemoveNoOps(), after)
    x = 4 * normal(64)
    if opset < 14:
        assert ops(after) == ops(model)
    else:
        assert ops(after) == ["HardSwish"]
        assert np.abs(run(model, {"x": x})[0] - run(after, {"x": x})[0]).max() <= 6 * EPS * np.abs(x).max()


def test_a_swish_with_another_slope_is_left_alone() -> None:
    model = text("g (float[64] x) => (float[64] y) { h = HardSigmoid(x)  y = Mul(h, x) }")
    apply(RemoveNoOps(), model)
    assert ops(model) == ["HardSigmoid", "Mul"]


# --- merge duplicates --------------------------------------------------------------------------


def test_equal_weights_are_shared_by_bytes_type_and_shape() -> None:
    w = normal(64, 64)
    other = w.copy()
    other[20, 3] += 1  # differs where no sample is taken
    model = text(
        """g (float[2, 64] x) => (float[2, 64] y) {
             a = MatMul(x, w1)  b = MatMul(a, w2)  c = MatMul(b, w3)  d = Add(c, i)  e = Add(d, f)  y = Add(e, z) }""",
        weights={
            "w1": w,
            "w2": w.copy(),
            "w3": other,
            "i": np.zeros((64,), np.float32),
            "f": np.zeros((1, 64), np.float32),
            "z": -np.zeros((64,), np.float32),
        },
    )
    after = same_outputs(MergeDuplicates(), model, {"x": normal(2, 64)})
    assert set(after.graph.initializers) == {"w1", "w3", "i", "f", "z"}  # -0 and 0 differ in bytes


def test_subexpressions_are_merged_through_their_inputs() -> None:
    model = text(
        """g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
             p = Add(x, a)  q = Add(x, b)  r = Relu(p)  s = Relu(q)  t = LeakyRelu<alpha = 0.1>(q)
             u = LeakyRelu<alpha = 0.2>(p)  v = Mul(r, s)  w = Mul(t, u)  y = Add(v, w)
           }"""
    )
    after = same_outputs(MergeDuplicates(), model, {"x": normal(2)})
    assert ops(after) == ["Add", "Relu", "LeakyRelu", "LeakyRelu", "Mul", "Mul", "Add"]


def test_what_is_drawn_trained_or_foreign_is_not_merged() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
           g (float[8] x) => (float[8] y) <float half = {0.5}, bool yes = {1}> {
             a = RandomUniformLike(x)  b = RandomUniformLike(x)  c = Bernoulli(a)  d = Bernoulli(a)
             e, m = Dropout(x, half, yes)  f, n = Dropout(x, half, yes)
             g1 = com.microsoft.Gelu(x)  g2 = com.microsoft.Gelu(x)
             y = Sum(a, b, c, d, e, f, g1, g2)
           }"""
    )
    model = ir.from_proto(proto)
    models.canonicalize(model)
    before = ops(model)
    apply(MergeDuplicates(), model)
    assert ops(model) == before


def test_two_outputs_of_one_value_keep_both_names() -> None:
    model = text("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)  z = Relu(x) }")
    after = models.clone(model)
    reasons = apply(MergeDuplicates(), after)
    assert ops(after) == ["Relu", "Relu"]
    assert any("both outputs" in r for r in reasons.values())
    later = text("g (float[2] x) => (float[2] z) { y = Relu(x)  z = Relu(x)  w = Neg(y) }")
    assert ops(same_outputs(MergeDuplicates(), later, {"x": normal(2)})) == ["Relu", "Neg"]


def test_outputs_left_out_are_not_mixed_up() -> None:
    model = text(
        """g (float[1, 1, 8] x) => (float[] y, int64[] i) {
             a = MaxPool<kernel_shape = [2]>(x)  b, i = MaxPool<kernel_shape = [2]>(x)  y = Add(a, b)
           }"""
    )
    after = same_outputs(MergeDuplicates(), model, {"x": normal(1, 1, 8)})
    assert ops(after).count("MaxPool") == 2


def test_weights_of_sibling_branches_move_out_and_are_shared() -> None:
    model = text(
        """g (float[2] x, bool c) => (float[2] y) {
             y = If(c) <then_branch = t () => (float[2] p) <float[2] w = {1, 2}> { p = Add(x, w) },
                        else_branch = e () => (float[2] p) <float[2] w = {1, 2}> { p = Mul(x, w) }>
           }"""
    )
    for condition in (True, False):
        after = same_outputs(MergeDuplicates(), model, {"x": normal(2), "c": np.array(condition)})
        assert models.weight_bytes(after) == 8


def test_external_weights_are_compared_without_mapping_them(tmp_path: Path) -> None:
    w = normal(64, 64)
    body = "g (float[2, 64] x) => (float[2, 64] y) { a = MatMul(x, w1)  y = MatMul(a, w2) }"
    path = tmp_path / "m.onnx"
    models.save(text(body, weights={"w1": w, "w2": w}), path, external_data=True)
    model = models.load(path)
    apply(MergeDuplicates(), model)
    assert set(model.graph.initializers) == {"w1"}
    tensor = model.graph.initializers["w1"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None  # the bytes were read, not mapped


# --- remove dead code --------------------------------------------------------------------------


def test_dead_nodes_weights_bodies_and_operator_sets_go() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
           g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}, float[2] unused = {3, 4}> {
             y = Relu(x)  a = Add(x, w)  b = Neg(a)
             d = If(c) <then_branch = t () => (float[2] p) { p = Mul(b, w) },
                        else_branch = e () => (float[2] p) { q = Sqrt(b)  p = Mul(b, b) }>
           }"""
    )
    model = ir.from_proto(proto)
    models.canonicalize(model)
    after = same_outputs(RemoveDeadCode(), model, {"x": normal(2), "c": np.array(True)})
    assert ops(after) == ["Relu"]
    assert not after.graph.initializers
    assert set(after.graph.opset_imports) == {""}


def test_dead_code_inside_a_living_branch_goes() -> None:
    model = text(
        """g (float[2] x, bool c) => (float[2] y) {
             n = Neg(x)
             y = If(c) <then_branch = t () => (float[2] p) <float[2] w = {1, 2}> { q = Add(n, w)  p = Relu(x) },
                        else_branch = e () => (float[2] p) { p = Relu(x) }>
           }"""
    )
    after = same_outputs(RemoveDeadCode(), model, {"x": normal(2), "c": np.array(True)})
    assert ops(after) == ["If", "Relu", "Relu"]
    assert models.weight_bytes(after) == 0


# --- all together ------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    """A small CNN with shared weights, maps before and after, no-ops, constants and branches."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    weights: dict[str, Array] = {"axis": np.array([1]), "yes": np.array(draw(st.booleans()))}
    lines, value, channels, pool = [], "x", 2, ["x"]

    def weight(name: str, *shape: int) -> str:
        weights[name] = (rng.standard_normal(shape) / 2).astype(np.float32)
        return name

    for i in range(draw(st.integers(2, 7))):
        kind = draw(
            st.sampled_from(["conv", "depthwise", "bn", "mul", "add", "relu", "clip", "noop", "if", "fold", "join"])
        )
        new = f"v{i}"
        if kind == "conv":
            name = draw(st.sampled_from(["shared", f"w{i}"]))
            if name not in weights or weights[name].shape[1] != channels:
                name = weight(f"w{i}" if name in weights else name, 2, channels, 3, 3)
            lines.append(f"{new} = Conv<pads = [1, 1, 1, 1]>({value}, {name}, {weight(f'b{i}', 2)})")
        elif kind == "depthwise":
            lines.append(
                f"{new} = Conv<group = {channels}, pads = [1, 1, 1, 1]>({value}, {weight(f'w{i}', channels, 1, 3, 3)})"
            )
        elif kind == "bn":
            weights[f"s{i}"] = np.float32([0.5, 1.5])
            lines.append(f"{new} = BatchNormalization({value}, s{i}, s{i}, {weight(f'm{i}', 2)}, s{i})")
        elif kind in ("mul", "add"):
            shape = draw(st.sampled_from([(), (1,), (2, 1, 1), (1, 2, 1, 1), (1, 1, 4, 4)]))
            lines.append(f"{new} = {kind.capitalize()}({value}, {weight(f'c{i}', *shape)})")
        elif kind == "relu":
            lines.append(f"{new} = Relu({value})")
        elif kind == "clip":
            weights[f"l{i}"], weights[f"h{i}"] = np.float32(draw(st.sampled_from([-1, 0]))), np.float32(3)
            lines.append(f"{new} = Clip({value}, l{i}, h{i})")
        elif kind == "noop":
            lines.append(
                f"{new} = "
                + draw(
                    st.sampled_from(
                        [
                            f"Identity({value})",
                            f"Transpose<perm = [0, 1, 3, 2]>({value})",
                            f"Dropout({value})",
                            f"Cast<to = 1>({value})",
                        ]
                    )
                )
            )
        elif kind == "if":
            lines.append(
                f"{new} = If(yes) <then_branch = t{i} () => (float[1, 2, 4, 4] p) {{ p = Relu({value}) }}, "
                f"else_branch = e{i} () => (float[1, 2, 4, 4] p) {{ q = Neg({value})  p = Identity(q) }}>"
            )
        elif kind == "fold":
            lines.append(f"k{i} = Sqrt({weight(f'r{i}', 2, 1, 1)})  n{i} = Abs(k{i})")
            weights[f"r{i}"] = np.abs(weights[f"r{i}"])
            lines.append(f"{new} = Add({value}, n{i})")
        else:
            lines.append(f"{new} = Add({value}, {draw(st.sampled_from(pool))})")
        pool.append(new)
        value = new
    body, tap = "\n".join(lines), pool[len(pool) // 2]
    return text(
        f"""g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y, float[1, 2, 4, 4] tapped) {{
              {body}  y = Neg({value})  tapped = Abs({tap})
            }}""",
        weights=weights,
    )


def largest_value(model: ir.Model, x: Array) -> float:
    proto = onnx.load_from_string(models.serialize(model))
    known = {o.name for o in proto.graph.output}
    for node in proto.graph.node:
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name and name not in known)
    probe = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return max(float(np.abs(v).max()) for v in probe.run(None, {"x": x}) if v.dtype == np.float32)


def normalise(model: ir.Model) -> None:
    for pass_ in ALL:
        apply(pass_, model)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks())
def test_random_networks_keep_their_outputs(model: ir.Model) -> None:
    """Each of eight layers adds at most 2 (18 + 4) eps of the largest value in the network (18 taps).

    Later layers amplify that error no more than they amplify values, so the sum bounds the outputs.
    """
    after = models.clone(model)
    normalise(after)
    x = normal(1, 2, 4, 4)
    names = [o.name for o in session(model).get_outputs()]
    assert names == [o.name for o in session(after).get_outputs()]
    old, new = run(model, {"x": x}), run(after, {"x": x})
    bound = 8 * 2 * (18 + 4) * EPS * largest_value(model, x)
    for a, b in zip(old, new, strict=True):
        assert np.abs(a - b).max() <= bound
    assert len(ops(after)) <= len(ops(model))
    first = models.serialize(after)
    normalise(after)
    assert models.serialize(after) == first  # idempotent


@settings(max_examples=10, deadline=None, derandomize=True)
@given(networks())
def test_random_networks_give_the_same_bytes(model: ir.Model) -> None:
    results = []
    for _ in range(2):
        copy = models.clone(model)
        normalise(copy)
        results.append(models.serialize(copy))
    assert results[0] == results[1]


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    model = text(
        """g (float[1, 2, 4, 4] x) => (float[] y) <int64[1] one = {1}> {
             a = Conv(x, w)  b = BatchNormalization(a, s, s, s, s)  s1 = Shape(x)  g1 = Gather(s1, one)
             c = Sqrt(s)  d = Abs(c)  e = Sum(c, d)  f = Cast<to = 1>(g1)  h = Mul(e, f)  i = Reshape(h, k)
             j = Add(b, i)  l = Add(b, i)  y = Mul(j, l)
           }""",
        weights={"w": normal(2, 2, 3, 3), "s": np.float32([1, 2]), "k": np.array([1, 2, 1, 1])},
    )
    path = tmp_path / "m.onnx"
    models.save(model, path)
    script = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[2]); import test_normalise as t; "
        "m = t.models.load(sys.argv[1]); t.normalise(m); print(hashlib.sha256(t.models.serialize(m)).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(path), str(Path(__file__).parent)],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("pass_", ALL, ids=lambda p: p.name)
def test_a_tidy_graph_has_no_sites(pass_: Pass) -> None:
    model = text("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Add(x, w)  y = Relu(a) }")
    assert not [s for s in pass_.sites(GraphView(model)) if isinstance(s, Site)]
    assert pass_.summary()


@pytest.mark.parametrize(("taps", "folds"), [(7, True), (16, False)])
def test_a_pad_for_a_long_kernel_stays(taps: int, folds: bool) -> None:
    before = text(
        "g (float[1,3,40,1] x) => (float[1,4,N,1] y) { q = Pad (x, p)  y = Conv (q, w) }",
        weights={"p": np.array([0, 0, taps // 2, 0, 0, 0, (taps - 1) // 2, 0]), "w": normal(4, 3, taps, 1)},
    )
    view = GraphView(before)
    (found,) = FuseBatchNorm().sites(view)
    assert isinstance(found, Site) is folds
    if isinstance(found, Skipped):
        assert found.reason == "long kernels are slower with pads of their own"
