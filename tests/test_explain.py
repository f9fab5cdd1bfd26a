"""What explain says follows from the prices: on a made-up device whose every step is known."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxcompress
from onnxcompress import alternatives
from onnxcompress import model as models
from onnxcompress.cli import main
from onnxcompress.cost import CostModel
from onnxcompress.errors import DataError
from onnxcompress.explanation import explain
from onnxcompress.findings import Explanation, ModelExplanation, Option
from onnxcompress.models_zoo import get_model
from onnxcompress.profile import Profile, list_profiles, load_profile
from onnxcompress.work import NodeWork
from tests.models import Array, normal, text

HEAD = """\
schema = 2
name = "steps"
description = "steps of 16 channels, int8 four times as fast but for depthwise"
device = {cpu = "none", cores = 1, frequency_ghz = 1.0}
runtime = {name = "onnxruntime", version = "1", threads = 1, contrib_ops = true}
quantization = {activation = "u8", weight_bits = 8, per_channel = true, channel_multiple = 1}
overhead = {ns_per_run = 0, ns_per_node = 100}
provenance = {status = "spec", method = "made up", source = "this test", date = 2026-11-23}
"""

KERNELS = [
    ("free", "f32", ""),
    ("free", "u8s8", ""),
    ("conv", "f32", "ns_per_mac = 1\nchannel_block = 16"),
    ("conv", "u8s8", "ns_per_mac = 0.25\nchannel_block = 16"),
    ("conv_pointwise", "f32", "ns_per_mac = 1\nchannel_block = 16"),
    ("conv_pointwise", "u8s8", "ns_per_mac = 0.25\nchannel_block = 16"),
    ("conv_depthwise", "f32", "ns_per_mac = 1"),
    ("conv_depthwise", "u8s8", "ns_per_mac = 2"),
    ("matmul", "f32", "ns_per_mac = 1"),
    ("matmul", "u8s8", "ns_per_mac = 0.25"),
    ("matmul", "dynamic", "ns_per_mac = 0.5"),
    ("matmul_rows1", "f32", "ns_per_weight = 1"),
    ("elementwise", "f32", "ns_per_element = 1"),
    ("Add", "u8s8", "ns_per_element = 0.25"),
    ("move", "f32", "ns_per_element = 1"),
    ("pool", "f32", "ns_per_element = 1"),
    ("MaxPool", "u8s8", "ns_per_element = 0.25"),
    ("quantize", "f32", "ns_per_element = 1"),
    ("dequantize", "f32", "ns_per_element = 2"),
]

HALF = [
    ("conv", "f16", "ns_per_mac = 0.5"),
    ("matmul", "f16", "ns_per_mac = 0.5"),
    ("matmul", "w8", "ns_per_mac = 0.8"),
]

FUSIONS = """
fusion = [
  {op = "Conv", absorbs = ["Relu"]},
  {op = "Conv", absorbs = ["Relu"], precision = "u8s8"},
]
"""


def device(folder: Path, *more: tuple[str, str, str], extra: str = "") -> Profile:
    kernels = "".join(f'[[kernel]]\nkind = "{k}"\nprecision = "{p}"\n{rest}\n' for k, p, rest in [*KERNELS, *more])
    path = folder / "steps.toml"
    path.write_text(HEAD + FUSIONS.strip() + "\n" + extra + kernels)
    return load_profile(path)


@pytest.fixture
def steps(tmp_path: Path) -> Profile:
    return device(tmp_path)


def net(body: str, inputs: str, outputs: str, **weights: Array) -> ir.Model:
    """One line of ONNX text with its weights."""
    return text(f"g ({inputs}) => ({outputs}) {{ {body} }}", weights)


def layer(found: ModelExplanation, op: str) -> Explanation:
    return next(one for one in found.layers if one.op == op)


def options(one: Explanation, kind: str) -> list[Option]:
    return [o for o in one.options if o.kind == kind]


def conv(out: int, inner: int, taps: int, group: int = 1) -> np.ndarray:
    return normal(out + inner, out, inner // group, taps, taps)


# --- channels and rank ---------------------------------------------------------------------------


def test_channels_step_where_the_price_does(steps: Profile) -> None:
    model = net(
        "h = Conv<pads=[1,1,1,1]>(x, w)  y = Conv<pads=[1,1,1,1]>(h, v)",
        "float[1,16,8,8] x",
        "float[1,16,8,8] y",
        w=conv(64, 16, 3),
        v=conv(16, 64, 3),
    )
    first, last = explain(model, profile=steps).layers
    step, half = options(first, "channels")
    assert (step.detail, half.detail) == ("48 of 64", "32 of 64")
    assert "49 to 63 channels cost the same as 64" in step.why
    assert step.ratio == pytest.approx((64 * 16 * 9 * 64 + 100) / (48 * 16 * 9 * 64 + 100))
    (pruned,) = options(last, "channels")
    assert (pruned.verdict, pruned.why) == ("impossible", "cannot be pruned: its output is a graph output")


@pytest.mark.parametrize(
    ("count", "price", "below", "above"),
    [
        (64, lambda c: 16.0 * -(-c // 16), 48, None),
        (50, lambda c: 16.0 * -(-c // 16), 48, None),
        (64, float, None, None),
        (12, lambda c: 16.0 * -(-c // 16), None, None),
        (50, lambda c: c * (1.0 if c % 4 == 0 else 8.0), 48, 52),
        (1, float, None, None),
    ],
)
def test_steps(count: int, price: object, below: int | None, above: int | None) -> None:
    assert callable(price)
    found = alternatives.channel_step(price, count)
    assert (found.below, found.above) == (below, above)


def test_a_count_off_the_fast_path_is_told_to_grow(tmp_path: Path) -> None:
    profile = device(tmp_path, ("conv_stem", "f32", "ns_per_mac = 1\naligned_to = 4\nmisaligned_factor = 8.0"))
    work = NodeWork("n", "Conv", "conv_stem", macs=50 * 1000, in_channels=1, out_channels=50, weights=50, params=50)
    cost = CostModel(profile)
    seconds = cost.node(work)
    assert seconds is not None
    padded = alternatives.channel_options(cost, work, "f32", seconds)[-1]
    assert (padded.detail, padded.verdict) == ("52 of 50", "gains")
    assert "more can be faster" in padded.why


def test_rank_pays_below_half_of_a_square_matrix(steps: Profile) -> None:
    model = net("h = MatMul(x, w)  y = Softmax(h)", "float[1,32,256] x", "float[1,32,256] y", w=normal(0, 256, 256))
    half, quarter = options(layer(explain(model, profile=steps), "MatMul"), "rank")
    assert (half.detail, quarter.detail) == ("128 of 256", "64 of 256")
    assert half.verdict == "same"
    assert quarter.ratio == pytest.approx(2.0, rel=0.01)
    assert half.why == "pays up to rank 112 of 256"  # at 128 the second node's dispatch is lost


def test_factors_hold_the_work_of_the_two_nodes_they_become() -> None:
    """3x3 from 24 to 64 channels at 10x10, rank 20: 3x3 to 20 channels, then 1x1 to 64."""
    whole = NodeWork(
        "n", "Conv", "conv", True, 64 * 24 * 9 * 100, 24, 64, 24 * 100, 64 * 100, 64 * 24 * 9 + 64, 64 * 24 * 9 + 64,
        24 * 9 * 100,
    )  # fmt: skip
    first, second = alternatives.factors(whole, 20)
    assert (first.kind, first.macs, first.weights, first.elements_out) == ("conv", 20 * 24 * 9 * 100, 20 * 24 * 9, 2000)
    assert (second.kind, second.macs, second.weights) == ("conv_pointwise", 64 * 20 * 100, 64 * 20 + 64)
    assert (second.in_channels, second.elements_in, second.elements_out) == (20, 2000, 6400)
    assert alternatives.full_rank(whole) == 64
    assert alternatives.full_rank(NodeWork("n", "Conv", "conv_depthwise", macs=9, elements_out=1, weights=9)) == 0


def test_a_depthwise_convolution_is_pruned_with_what_it_reads(steps: Profile) -> None:
    model = net(
        "h = Conv<group=32, pads=[1,1,1,1]>(x, w)  y = Conv(h, v)",
        "float[1,32,8,8] x", "float[1,16,8,8] y", w=conv(32, 32, 3, 32), v=conv(16, 32, 1),
    )  # fmt: skip
    one = explain(model, profile=steps).layers[0]
    assert one.kind == "conv_depthwise"
    assert "together with the layer it reads" in options(one, "channels")[0].why
    assert not options(one, "rank")
    assert "0.50x by itself: the int8 kernel is slower" in options(one, "int8")[0].why


def test_what_reaches_an_output_through_a_reshape_keeps_its_channels(steps: Profile) -> None:
    model = net(
        "h = Conv(x, w)  r = Relu(h)  y = Flatten(r)",
        "float[1,16,4,4] x", "float[1,1024] y", w=conv(64, 16, 1),
    )  # fmt: skip
    (pruned,) = options(layer(explain(model, profile=steps), "Conv"), "channels")
    assert pruned.why == "cannot be pruned: its channels reach the graph output 'y'"


def test_a_shared_weight_is_not_pruned_alone(steps: Profile) -> None:
    model = net(
        "h = Conv(x, w)  g = Conv(h, w)  s = Conv(g, v)  y = Neg(s)",
        "float[1,32,4,4] x", "float[1,16,4,4] y", w=conv(32, 32, 1), v=conv(16, 32, 1),
    )  # fmt: skip
    first = explain(model, profile=steps).layers[0]
    assert "its weight is shared with" in options(first, "channels")[0].why


# --- int8 ----------------------------------------------------------------------------------------


def test_int8_alone_pays_both_conversions_and_in_a_region_only_the_border(steps: Profile) -> None:
    """Relu, conv, conv, Neg on 16 channels at 8x8: 1024 elements in and out of each convolution."""
    model = net(
        "a = Neg(x)  h = Conv<pads=[1,1,1,1]>(a, w)  r = Relu(h)  g = Conv<pads=[1,1,1,1]>(r, v)  y = Neg(g)",
        "float[1,16,8,8] x", "float[1,16,8,8] y", w=conv(16, 16, 3), v=conv(16, 16, 3),
    )  # fmt: skip
    found = explain(model, profile=steps)
    first, second = (one for one in found.layers if one.op == "Conv")
    macs, elements = 16 * 16 * 9 * 64, 1024
    now, kernel = 1e-9 * (macs + 100), 1e-9 * (macs / 4 + 100)
    quantize, dequantize = 1e-9 * (2 * elements + 100), 1e-9 * (4 * elements + 100)
    assert len(first.nodes) == 1  # the Relu
    alone, region = options(first, "int8")
    assert alone.seconds == pytest.approx(kernel + quantize + dequantize)
    assert alone.ratio == pytest.approx(now / (kernel + quantize + dequantize))
    assert alone.why.startswith("4.0x by itself, ")
    assert "with its conversions (Q 2.1 us, DQ 4.2 us)" in alone.why
    assert region.detail == "region of 2 layers"
    assert region.seconds == pytest.approx(kernel + quantize)  # the other end is its neighbour's
    assert options(second, "int8")[1].seconds == pytest.approx(kernel + dequantize)
    (whole,) = found.regions
    assert whole.seconds == pytest.approx(2 * now)
    assert whole.seconds_all == whole.seconds_best == pytest.approx(2 * kernel + quantize + dequantize)
    int8 = next(f for f in found.families if f.kind == "int8")
    assert int8.speed_up == pytest.approx(found.seconds / (found.seconds - whole.seconds + whole.seconds_best))


def test_the_cheapest_mix_leaves_out_what_loses(steps: Profile) -> None:
    """A large depthwise convolution between two dense ones stays float: both conversions cost less than it loses."""
    model = net(
        "h = Conv(x, w)  d = Conv<group=16, pads=[3,3,3,3]>(h, k)  g = Conv<pads=[1,1,1,1]>(d, v)  y = Neg(g)",
        "float[1,64,16,16] x", "float[1,64,16,16] y", w=conv(16, 64, 1), k=conv(16, 16, 7, 16), v=conv(64, 16, 3),
    )  # fmt: skip
    found = explain(model, profile=steps)
    (whole,) = found.regions
    slow = next(one for one in found.layers if one.kind == "conv_depthwise")
    assert len(whole.layers) == 3
    assert set(whole.layers) - set(whole.best) == {slow.name}
    assert whole.seconds_best < whole.seconds_all
    assert "in the cheapest mix it stays float" in options(slow, "int8")[1].why
    assert not slow.helps.startswith("int8")


def test_the_mix_is_the_best_of_all_subsets(steps: Profile) -> None:
    """Against every subset of a region, on sizes where none of the simple answers is right."""
    from itertools import combinations, pairwise

    from onnxcompress.regions import Form, Layer, find_regions

    rng = np.random.default_rng(3)
    for _ in range(50):
        names = [f"l{i}" for i in range(6)]
        seconds = {n: float(s) for n, s in zip(names, rng.uniform(0.2, 2, 6), strict=True)}
        node = {n: ir.Node("", "Neg", [], name=n) for n in names}
        layers = [
            Layer((node[n],), 1.0, (f"v{i}",), (f"v{i + 1}",), frozenset({f"v{i + 1}"} if i == 5 else ()))
            for i, n in enumerate(names)
        ]
        into, back = rng.uniform(0, 0.5, 2)
        (region,) = find_regions(layers, Form("int8", "u8s8", seconds, lambda _, c=into: c, lambda _, c=back: c))

        def total(chosen: set[str], layers: list[Layer] = layers, cost: object = (seconds, into, back)) -> float:
            price, q, dq = cost  # type: ignore[misc]
            kinds = ["float", *("int8" if one.name in chosen else "float" for one in layers), "float"]
            crossings = sum({"floatint8": q, "int8float": dq}.get(a + b, 0.0) for a, b in pairwise(kinds))
            return crossings + sum(price[one.name] if one.name in chosen else one.seconds for one in layers)

        subsets = [set(c) for size in range(7) for c in combinations(names, size)]
        assert region.seconds_best == pytest.approx(total(set(region.best)))
        assert region.seconds_all == pytest.approx(total(set(names)))
        assert region.seconds_best <= min(1.1 * min(map(total, subsets)), region.seconds_all, region.seconds_float)


def test_an_operator_without_int8_splits_the_region(steps: Profile) -> None:
    model = net(
        "h = Conv(x, w)  s = HardSwish(h)  g = Conv(s, v)  y = Neg(g)",
        "float[1,16,8,8] x", "float[1,16,8,8] y", w=conv(16, 16, 1), v=conv(16, 16, 1),
    )  # fmt: skip
    found = explain(model, profile=steps)
    (why,) = [o.why for o in options(layer(found, "HardSwish"), "int8")]
    assert why.startswith("onnxruntime has no int8 kernel for HardSwish: it stays float and splits the region (")
    assert len(found.regions) == 2


def test_a_convolution_behind_a_float_pool_stays_float(steps: Profile) -> None:
    """There, onnxruntime would move the QuantizeLinear before the MaxPool; the passes do not offer that."""
    model = net(
        "a = Neg(x)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)  h = Conv(p, w)  y = Neg(h)",
        "float[1,16,8,8] x", "float[1,16,4,4] y", w=conv(16, 16, 1),
    )  # fmt: skip
    found = explain(model, profile=steps)
    (one,) = options(layer(found, "Conv"), "int8")
    assert (one.verdict, one.why) == (
        "impossible", "its input must be integers already, and the MaxPool in front of it stays float"
    )  # fmt: skip
    assert not found.regions


def test_a_kernel_the_profile_does_not_price_is_named(steps: Profile) -> None:
    model = net("y = Sigmoid(x)", "float[1,16,8,8] x", "float[1,16,8,8] y")
    (only,) = explain(model, profile=steps).layers
    assert [o.why for o in only.options] == ["the profile has no int8 kernel for this Sigmoid"]


def test_a_quantized_model_says_so(steps: Profile) -> None:
    model = net(
        "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = MatMul(d, w)",
        "float[8,32] x", "float[8,32] y", w=normal(0, 32, 32), s=np.float32(0.1), z=np.uint8(0),
    )  # fmt: skip
    one = layer(explain(model, profile=steps), "MatMul")
    assert "already quantized" in options(one, "int8")[0].why
    assert options(one, "f16")[0].verdict == "impossible"


# --- other forms ---------------------------------------------------------------------------------


def test_what_the_profile_has_no_kernel_for_is_impossible(steps: Profile) -> None:
    model = net("y = MatMul(x, w)", "float[32,64] x", "float[32,64] y", w=normal(0, 64, 64))
    found = explain(model, profile=steps)
    for kind in ("f16", "w8", "w4"):
        (one,) = options(layer(found, "MatMul"), kind)
        assert (one.verdict, one.why, one.seconds) == ("impossible", "no such kernel on this profile", None)
    assert {f.kind for f in found.families if f.why} == {"f16", "w8", "w4"} | {"channels"}


def test_forms_the_profile_prices_are_compared(tmp_path: Path) -> None:
    model = net("y = MatMul(x, w)", "float[32,64] x", "float[32,64] y", w=normal(0, 64, 64))
    one = layer(explain(model, profile=device(tmp_path, *HALF)), "MatMul")
    macs = 32 * 64 * 64
    (dynamic,), (weights,), (half,) = (options(one, kind) for kind in ("dynamic", "w8", "f16"))
    assert dynamic.seconds == pytest.approx(1e-9 * (macs / 2 + 100))
    assert weights.ratio == pytest.approx((macs + 100) / (0.8 * macs + 100))
    assert half.seconds == pytest.approx(1e-9 * (macs / 2 + 100 + 2 * (2 * 32 * 64 + 100)))  # a Cast at each end
    assert options(one, "w4")[0].verdict == "impossible"


def test_what_decides_a_layer_is_said(tmp_path: Path) -> None:
    far = 'memory = {cache_bytes = 100, ns_per_byte = 10.0, source = "test"}\n'
    model = net(
        "h = MatMul(x, w)  y = Neg(h)", "float[1,64] x", "float[1,64] y", w=normal(0, 64, 64)
    )  # fmt: skip
    found = explain(model, profile=device(tmp_path, extra=far))
    assert layer(found, "MatMul").note == "weights come from memory: bytes decide"
    tiny = explain(net("y = Neg(x)", "float[2] x", "float[2] y"), profile=device(tmp_path))
    assert tiny.layers[0].note == "too small: dispatch is 96% of its time"
    assert sum(tiny.layers[0].spent.values()) == pytest.approx(1.0)


# --- whole models --------------------------------------------------------------------------------


def test_it_looks_at_the_model_after_tidying_and_leaves_it_alone(steps: Profile) -> None:
    ones = np.ones(16, np.float32)
    model = net(
        "h = Conv(x, w)  b = BatchNormalization(h, s, o, o, s)  y = Neg(b)",
        "float[1,16,8,8] x", "float[1,16,8,8] y", w=conv(16, 16, 1), s=ones, o=0 * ones,
    )  # fmt: skip
    before = models.serialize(model)
    found = explain(model, profile=steps)
    assert found.nodes == (3, 2)
    assert {one.op for one in found.layers} == {"Conv", "Neg"}
    assert models.serialize(model) == before


@pytest.mark.parametrize("name", ["gen-cnn", "gen-transformer"])
def test_shares_add_up_and_options_agree_with_their_ratios(name: str, tmp_path: Path) -> None:
    found = onnxcompress.explain(get_model(name, tmp_path))
    assert sum(one.share for one in found.layers) <= 1.0 + 1e-9
    assert 0.9 < sum(found.spent.values()) <= 1.0 + 1e-9
    assert [f.kind for f in found.families] == ["int8", "dynamic", "f16", "w8", "w4", "channels", "rank"]
    for one in found.layers:
        for o in one.options:
            if o.seconds is None or o.ratio is None:
                assert (o.verdict, bool(o.why)) == ("impossible", True)
            else:
                assert o.ratio == pytest.approx(one.seconds / o.seconds)
                assert o.verdict == ("gains" if o.ratio >= 1.05 else "loses" if o.ratio <= 0.95 else "same")
    for region in found.regions:
        assert region.seconds_best <= min(region.seconds, region.seconds_all) + 1e-12


@pytest.mark.parametrize("profile", list_profiles())
def test_every_profile_can_be_asked(profile: str, tmp_path: Path) -> None:
    found = onnxcompress.explain(get_model("gen-cnn", tmp_path), profile=profile)
    assert found.profile == profile
    assert found.layers


def test_five_hundred_layers_take_less_than_a_second(steps: Profile) -> None:
    body = "".join(f"a{i + 1} = Conv(a{i}, w)  " for i in range(500))
    model = net(body + "y = Neg(a500)", "float[1,64,4,4] a0", "float[1,64,4,4] y", w=conv(64, 64, 1))
    start = time.process_time()
    found = explain(model, profile=steps)
    assert len(found.layers) == 501
    assert time.process_time() - start < 4  # a slow machine; loading and running the model once are in it


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get_model("gen-cnn", tmp_path_factory.mktemp("zoo"))


def test_the_command_says_what_matters(cnn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(cnn)]) == 0
    short = capsys.readouterr().out
    for words in (
        "What could help",
        "What matters",
        "int8 regions",
        "of the time; -v shows all",
        "by itself",
        "channels",
    ):
        assert words in short
    assert "no such kernel on this profile" in short
    assert main(["explain", str(cnn), "-v"]) == 0
    long = capsys.readouterr().out
    assert "-v shows all" not in long
    assert len(long) > len(short)


def test_the_command_prints_json(cnn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(cnn), "--profile", "cortex-a53", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["profile"] == "cortex-a53"
    assert {"name", "op", "seconds", "spent", "options", "helps"} <= set(document["layers"][0])
    assert {o["verdict"] for one in document["layers"] for o in one["options"]} >= {"gains", "impossible"}


def test_an_unknown_input_is_a_clear_error(cnn: Path) -> None:
    with pytest.raises(DataError, match="no such input"):
        onnxcompress.explain(cnn, shapes={"nobody": (1,)})
