"""Equalization: the model does not change by a bit, and int8 rounding of it hurts less, as predicted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from onnxcompress import model as models
from onnxcompress.base import Site, Skip, Skipped
from onnxcompress.errors import PassOptionError
from onnxcompress.passes._channel_scaling import Part, scaling_of
from onnxcompress.passes.equalize import Equalize, cross_layer_scales, rounding_noise, smoothing_scales
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import ChannelMoments, Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

Floats = npt.NDArray[np.float32]
RNG = np.random.default_rng(3)
UNEVEN = np.exp2(np.linspace(-4, 4, 8)).astype(np.float32)  # ranges of eight channels, 256 : 1


def normal(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def text(body: str, weights: Mapping[str, npt.NDArray[np.generic]]) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{body}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    models.canonicalize(model)
    return model


def run(model: ir.Model, x: Floats, *values: str) -> list[Floats]:
    proto = onnx.load_from_string(models.serialize(model))
    known = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=v) for v in values if v not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(a) for a in session.run(list(values) or None, {"x": x})]


def observe(model: ir.Model, pass_: Equalize, x: Floats) -> Evidence:
    view = GraphView(model)
    channels = {}
    for site in pass_.sites(view):
        choices = pass_.choices(site, view, Target("any")) if isinstance(site, Site) else ()
        for need in (n for c in choices for n in pass_.needs(c, view)):
            (array,) = run(model, x, need.value)
            rows = np.moveaxis(array.astype(np.float64), need.axis, 0)
            rows = rows.reshape(rows.shape[0], -1)
            channels[need.value, need.axis] = ChannelMoments(
                rows.mean(axis=1), (rows**2).mean(axis=1), np.abs(rows).max(axis=1)
            )
    return Evidence(channels=channels, samples=1)


def equalized(model: ir.Model, x: Floats, pass_: Equalize | None = None) -> tuple[ir.Model, int, list[str]]:
    """The result, how many sites were changed, and why others were not."""
    pass_ = pass_ or Equalize()
    copy = models.clone(model)
    view, evidence = GraphView(copy), observe(model, pass_, x)
    sites = list(pass_.sites(view))
    reasons = [s.reason for s in sites if isinstance(s, Skipped)]
    choices = [c for s in sites if isinstance(s, Site) for c in pass_.choices(s, view, Target("any"))]
    rewriter, made = Rewriter(copy), 0
    for choice in choices:
        log = len(rewriter.log)
        try:
            pass_.apply(choice, rewriter, evidence)
            made += 1
        except Skip as skip:
            assert len(rewriter.log) == log  # nothing was edited
            reasons.append(skip.reason)
    return copy, made, reasons


def uneven_pair() -> dict[str, Floats]:
    """Channels of very different range that matter equally: what is made large is read small."""
    return {
        "w1": normal(8, 3, 3, 3) * UNEVEN[:, None, None, None],
        "b1": normal(8) * UNEVEN,
        "w2": normal(5, 8, 3, 3) / UNEVEN[:, None, None],
    }


PAIR = "g (float[1, 3, 9, 9] x) => (float[] y) {{ a = Conv(x, w1, b1)  {between}  y = Conv(r, w2) }}"
BETWEEN = {
    "nothing": "r = Identity(a)",
    "Relu": "r = Relu(a)",
    "LeakyRelu": "r = LeakyRelu<alpha = 0.2>(a)",
    "PRelu": "r = PRelu(a, slope)",
    "pooled": "s = Relu(a)  r = MaxPool<kernel_shape = [2, 2]>(s)",
    "averaged": "r = AveragePool<kernel_shape = [2, 2]>(a)",
    "gated": "s = GlobalAveragePool(x)  t = ReduceMean<axes = [1]>(s)  u = Sigmoid(t)  r = Mul(u, a)",
    "biased": "t = Add(a, bias)  r = Relu(t)",
    "measured": "s = Shape(a)  r = Relu(a)",
    "normalized": "r = BatchNormalization(a, gamma, gamma, gamma, gamma)",
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_pair_of_convolutions_keeps_its_outputs_bit_for_bit(between: str) -> None:
    weights = uneven_pair() | {"slope": normal(8, 1, 1), "bias": normal(1, 8, 1, 1), "gamma": np.abs(normal(8))}
    model = text(PAIR.format(between=BETWEEN[between]), weights)
    x = normal(1, 3, 9, 9)
    after, made, reasons = equalized(model, x, Equalize(min_gain_db=0.01))
    assert made == 1, reasons
    np.testing.assert_array_equal(run(model, x)[0], run(after, x)[0])
    assert not np.array_equal(run(model, x, "r")[0], run(after, x, "r")[0])


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("r = Clip(a, zero, six)", "Clip"),
        ("r = HardSwish(a)", "HardSwish"),
        ("s = Sigmoid(a)  r = Mul(a, s)", "other readers"),
        ("s = Relu(a)  r = Add(s, a)", "Add"),
        ("r = Relu(a)  z = Neg(r)", "Neg"),
        ("r = Concat<axis = 1>(a)", "Concat"),
    ],
)
def test_what_does_not_hand_a_factor_on_is_left_alone(between: str, reason: str) -> None:
    model = text(PAIR.format(between=between), uneven_pair() | {"zero": np.float32(0), "six": np.float32(6)})
    _, made, reasons = equalized(model, normal(1, 3, 9, 9), Equalize(min_gain_db=0.01))
    assert made == 0
    assert any(reason in r for r in reasons), reasons


def test_a_factor_through_a_clip_would_have_changed_the_outputs() -> None:
    """The comparison of bits can fail: the same scaling with Clip(0, 6) in between is seen."""
    relu = text(PAIR.format(between="r = Relu(a)"), uneven_pair())
    x = normal(1, 3, 9, 9)
    after, _, _ = equalized(relu, x, Equalize(min_gain_db=0.01))
    old, new = ({n: v.const_value.numpy() for n, v in m.graph.initializers.items()} for m in (relu, after))
    limits = {"zero": np.float32(0), "six": np.float32(6)}
    clipped = [text(PAIR.format(between="r = Clip(a, zero, six)"), w | limits) for w in (old, new)]
    assert not np.array_equal(run(clipped[0], x)[0], run(clipped[1], x)[0])


def test_depthwise_in_the_middle() -> None:
    model = text(
        """g (float[1, 3, 9, 9] x) => (float[] y) {
             a = Conv(x, w1, b1)  r = Relu(a)  d = Conv<group = 8>(r, wd, bd)  s = Relu(d)  y = Conv(s, w2)
           }""",
        uneven_pair() | {"wd": normal(8, 1, 3, 3), "bd": normal(8) * UNEVEN},
    )
    x = normal(1, 3, 9, 9)
    after, made, reasons = equalized(model, x, Equalize(min_gain_db=0.01))
    assert made == 2, reasons
    np.testing.assert_array_equal(run(model, x)[0], run(after, x)[0])


def test_grouped_reader_and_several_readers() -> None:
    model = text(
        """g (float[1, 3, 9, 9] x) => (float[] y, float[] z) {
             a = Conv(x, w1, b1)  r = Relu(a)  y = Conv<group = 2>(r, wg)  z = Conv(r, w2)
           }""",
        uneven_pair() | {"wg": normal(6, 4, 1, 1) / np.repeat(UNEVEN.reshape(2, 4, 1, 1), 3, axis=0)},
    )
    x = normal(1, 3, 9, 9)
    after, made, reasons = equalized(model, x)
    assert made == 1, reasons
    for old, new in zip(run(model, x), run(after, x), strict=True):
        np.testing.assert_array_equal(old, new)


NORMS = {
    "LayerNormalization": "n = LayerNormalization(x, gain, bias)",
    "without bias": "n = LayerNormalization(x, gain)",
    "decomposed": """m = ReduceMean<axes = [-1]>(x)  c = Sub(x, m)  q = Mul(c, c)  v = ReduceMean<axes = [-1]>(q)
                     d = Sqrt(v)  o = Div(c, d)  p = Mul(o, gain)  n = Add(p, bias)""",
    "root mean square": """q = Mul(x, x)  v = ReduceMean<axes = [-1]>(q)  d = Sqrt(v)  o = Div(x, d)
                           n = Mul(gain, o)""",
    "linear": "t = MatMul(x, wv)  n = Add(t, bias)",
    "gated": "t = MatMul(x, wv)  g1 = MatMul(x, wg)  s = Sigmoid(g1)  n = Mul(s, t)",
}


@pytest.mark.parametrize("norm", NORMS)
def test_smoothing_behind_a_normalization_keeps_the_outputs_bit_for_bit(norm: str) -> None:
    model = text(
        f"""g (float[6, 8] x) => (float[] y, float[] z) {{
              {NORMS[norm]}  y = MatMul(n, w2)  z = Gemm<transB = 1>(n, w3)
            }}""",
        {
            "gain": np.abs(normal(8)) * UNEVEN,
            "bias": normal(8) * UNEVEN,
            "w2": normal(8, 4) / UNEVEN[:, None],
            "w3": normal(5, 8) / UNEVEN,
            "wv": normal(8, 8) * UNEVEN,
            "wg": normal(8, 8),
        },
    )
    x = normal(6, 8)
    after, made, reasons = equalized(model, x)
    assert made == 1, reasons
    for old, new in zip(run(model, x), run(after, x), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_normalization_that_also_feeds_the_residual_is_left_alone_with_the_reason() -> None:
    model = text(
        "g (float[6, 8] x) => (float[] y) { n = LayerNormalization(x, gain)  h = MatMul(n, w)  y = Add(h, n) }",
        {"gain": UNEVEN, "w": normal(8, 8)},
    )
    _, made, reasons = equalized(model, normal(6, 8))
    assert made == 0
    assert any("reads the value too" in r and "Add" in r for r in reasons), reasons


def test_even_channels_gain_nothing_and_the_report_says_how_little() -> None:
    weights = {"w1": normal(8, 3, 3, 3), "b1": normal(8), "w2": normal(5, 8, 3, 3)}
    _, made, reasons = equalized(text(PAIR.format(between=BETWEEN["Relu"]), weights), normal(1, 3, 9, 9))
    assert made == 0
    assert any("predicted gain" in r and "is below 3 dB" in r for r in reasons), reasons


def test_a_shared_weight_and_a_shared_gain() -> None:
    shared = text(
        """g (float[6, 8] x) => (float[] y, float[] z) {
             n = LayerNormalization(x, g)  y = MatMul(n, w)  z = MatMul(x, w)
           }""",
        {"g": UNEVEN, "w": np.tile(normal(8, 8), (1, 80))},
    )
    _, made, reasons = equalized(shared, normal(6, 8))
    assert made == 0
    assert any("has other readers" in r for r in reasons)
    gains = text(
        """g (float[6, 8] x) => (float[] y, float[] z) {
             n = LayerNormalization(x, g)  y = MatMul(n, w)  z = LayerNormalization(x, g)
           }""",
        {"g": UNEVEN, "w": normal(8, 8) / UNEVEN[:, None]},
    )
    x = normal(6, 8)
    after, made, _ = equalized(gains, x)
    assert made == 1
    for old, new in zip(run(gains, x), run(after, x), strict=True):
        np.testing.assert_array_equal(old, new)


def test_dead_channels_do_no_harm() -> None:
    weights = uneven_pair()
    weights["w1"][2] = 0
    weights["b1"][2] = 0
    weights["w2"][:, 5] = 0
    model = text(PAIR.format(between=BETWEEN["Relu"]), weights)
    x = normal(1, 3, 9, 9)
    after, made, _ = equalized(model, x, Equalize(min_gain_db=0.01))
    assert made == 1
    assert all(np.isfinite(v.const_value.numpy()).all() for v in after.graph.initializers.values())
    np.testing.assert_array_equal(run(model, x)[0], run(after, x)[0])


def test_scales_are_those_of_the_papers() -> None:
    made, read = np.abs(normal(8)).astype(np.float64), np.abs(normal(8)).astype(np.float64)
    scales = cross_layer_scales(made, read)
    np.testing.assert_allclose(scales, np.sqrt(made * read) / read, rtol=1e-12)
    np.testing.assert_allclose(made / scales, read * scales, rtol=1e-12)  # what the rule is for
    np.testing.assert_allclose(smoothing_scales(made, read, 0.3), made**0.3 / read**0.7, rtol=1e-12)
    np.testing.assert_allclose(smoothing_scales(made, read, 1.0), made, rtol=1e-12)


def test_ranges_end_up_even_but_for_powers_of_two() -> None:
    model = text(PAIR.format(between=BETWEEN["Relu"]), uneven_pair())
    x = normal(1, 3, 9, 9)
    after, _, _ = equalized(model, x)
    spread = [float(np.ptp(np.log2(run(m, x, "r")[0].max(axis=(0, 2, 3))))) for m in (model, after)]
    assert spread[0] > 6
    assert spread[1] < 3


def fake_int8(array: npt.NDArray[np.float64], step: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
    return np.asarray(np.round(array / step) * step)


@pytest.mark.parametrize("scaled", [False, True])
def test_predicted_noise_is_the_measured_noise(scaled: bool) -> None:
    """Rounding errors are uniform and independent: 4000 rows estimate their variance to a few per cent."""
    x = RNG.standard_normal((4000, 8)) * UNEVEN
    weight = RNG.standard_normal((8, 16))
    scales = np.exp2(np.round(np.log2(UNEVEN))).astype(np.float64) if scaled else np.ones(8)
    moments = ChannelMoments(x.mean(axis=0), (x**2).mean(axis=0), np.abs(x).max(axis=0))
    readers = [(Part("m", 1, -2), weight.astype(np.float32))]
    predicted = rounding_noise(scales, readers, moments, rectified=False)
    a, w = x / scales, weight * scales[:, None]
    noisy = fake_int8(a, 2 * np.abs(a).max() / 255) @ fake_int8(w, 2 * np.abs(w).max(axis=0) / 254)
    measured = float(((noisy - a @ w) ** 2).mean(axis=0).sum())
    assert abs(10 * np.log10(predicted / measured)) < 1.5


def test_equalization_lowers_measured_int8_noise() -> None:
    model = text(PAIR.format(between=BETWEEN["Relu"]), uneven_pair())
    x = normal(1, 3, 9, 9)
    after, _, _ = equalized(model, x)
    noise = []
    for candidate in (model, after):
        (r,) = run(candidate, x, "r")
        weight = candidate.graph.initializers["w2"].const_value.numpy().astype(np.float64)
        steps = 2 * np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 254
        patches = np.lib.stride_tricks.sliding_window_view(r[0].astype(np.float64), (3, 3), axis=(1, 2))
        exact = np.einsum("chwij,ocij->ohw", patches, weight)
        rounded = np.einsum("chwij,ocij->ohw", fake_int8(patches, r.max() / 255), fake_int8(weight, steps))
        noise.append(float(((rounded - exact) ** 2).mean()))
    assert 10 * np.log10(noise[0] / noise[1]) > 3


def test_without_real_data_nothing_is_done() -> None:
    model = text(PAIR.format(between=BETWEEN["Relu"]), uneven_pair())
    pass_, view = Equalize(), GraphView(model)
    (site,) = [s for s in pass_.sites(view) if isinstance(s, Site)]
    (choice,) = pass_.choices(site, view, Target("any"))
    assert choice.calibrated
    with pytest.raises(Skip, match="not observed"):
        pass_.apply(choice, Rewriter(model), Evidence(synthetic=True))
    with pytest.raises(Skip, match="not observed"):
        pass_.apply(choice, Rewriter(model), Evidence())


def test_quantized_models_have_no_sites_and_alpha_is_checked() -> None:
    body = """g (float[1, 3, 9, 9] x) => (float[] y) {
                a = Conv(x, w1, b1)  q = QuantizeLinear(a, s)  r = DequantizeLinear(q, s)  y = Conv(r, w2) }"""
    assert not list(Equalize().sites(GraphView(text(body, uneven_pair() | {"s": np.float32(1)}))))
    with pytest.raises(PassOptionError):
        Equalize(alpha=1.5)


def test_the_second_output_of_a_node_is_no_site() -> None:
    model = text(
        "g (float[6, 16] x) => (float[] y, float[] p) { p, n = Split<axis = 1>(x)  y = MatMul(n, w) }",
        {"w": normal(8, 4)},
    )
    value = next(n for n in model.graph if n.op_type == "Split").outputs[1]
    with pytest.raises(Skip, match="not made by a linear operator"):
        scaling_of(value, GraphView(model))
