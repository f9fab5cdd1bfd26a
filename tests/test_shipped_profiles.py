"""The profiles that come with the package: sound, honest about what nobody checked, and as their evidence says."""

from __future__ import annotations

import gzip
import importlib
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import normal, text

from onnxcompress.cost import CostModel, ModelCost, work_of
from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.nets import CHECKED, FITTED
from onnxcompress.fitting.samples import Measurements
from onnxcompress.profile import PRECISIONS, Kernel, Profile, load_profile
from onnxcompress.view import GraphView
from onnxcompress.work import NodeWork

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "hardware_profiles").glob("*.toml"))
PROFILES = {name: load_profile(name) for name in SHIPPED}
CONVERSIONS = ("free", "quantize", "dequantize")
PRICED = (
    "op_type", "kind", "maps", "macs", "in_channels", "out_channels", "elements_in", "elements_out", "weights",
    "params", "known",
)  # fmt: skip
"""What a published fit, or a channel rule, looks at in the work of a node."""

# Scripts of the repository, which are not installed with the package.
nets: Any = importlib.import_module("onnxcompress.hardware_profiles.fitting.nets")
published: Any = importlib.import_module("onnxcompress.hardware_profiles.fitting.published")

ROWS = published.read_rows()
FITS = [fit for fit in published.read_fits() if any(row.group in fit.rows for row in ROWS)]

shipped = pytest.mark.parametrize("name", SHIPPED)
fits = pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.profile}-{fit.precision}")

FLOAT = """
net (float[1,8,16,16] x) => (float[1,10] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = MatMul(f, v)
}
"""

QUANTIZED = """
net (float[1,8,16,16] x) => (float[1,16,16,16] y) {
    xq = QuantizeLinear(x, one, zero)
    xd = DequantizeLinear(xq, one, zero)
    wd = DequantizeLinear(w, one, zero)
    c = Conv<pads=[1,1,1,1]>(xd, wd)
    cq = QuantizeLinear(c, one, zero)
    cd = DequantizeLinear(cq, one, zero)
    s = Add(cd, cd)
    sq = QuantizeLinear(s, one, zero)
    y = DequantizeLinear(sq, one, zero)
}
"""
FLOAT_WEIGHTS = {"w": normal(0, 16, 8, 3, 3), "b": normal(1, 16), "v": normal(2, 16, 10)}
QUANTIZED_WEIGHTS = {"w": np.ones((16, 8, 3, 3), np.int8), "one": np.float32(1), "zero": np.int8(0)}


def cost_of(profile: Profile, body: str, weights: dict[str, Any]) -> ModelCost:
    return CostModel(profile).model(GraphView(text(body, {k: np.asarray(v) for k, v in weights.items()})), {})


def precisions_of(profile: Profile) -> set[str]:
    return {k.precision for k in profile.kernels if k.kind not in CONVERSIONS}


def work(kind: str, op: str, scale: int = 1) -> NodeWork:
    maps = kind.startswith("conv")
    return NodeWork(
        "n", op, kind, maps, macs=10_000 * scale, in_channels=16, out_channels=16, elements_in=500 * scale,
        elements_out=500 * scale, weights=300 * scale, params=300 * scale, patches=700 * scale,
    )  # fmt: skip


# ---- what a profile has to say -----------------------------------------------------------------------------


@shipped
def test_everything_has_a_source(name: str) -> None:
    profile = PROFILES[name]
    provenance = profile.provenance
    assert provenance.method.strip() and provenance.source.strip()
    for table in (profile.limits, profile.memory_, profile.energy):
        assert table is None or table.source.strip()
    if profile.runtime.name != "onnxruntime":  # whose rules the package measured itself
        assert profile.quantization.source.strip()


@shipped
def test_seconds_that_are_claimed_were_checked(name: str) -> None:
    provenance = PROFILES[name].provenance
    if provenance.seconds == "absolute":
        assert provenance.status in ("measured", "published")
        assert provenance.held_out_error is not None and provenance.held_out
    if provenance.held_out_error is not None:
        assert 0 < provenance.held_out_error < 0.5
    if provenance.status == "spec":
        assert provenance.unverified


@shipped
def test_what_is_unverified_exists(name: str) -> None:
    profile = PROFILES[name]
    kernels = {k.kind for k in profile.kernels} | {f"{k.kind}.{k.precision}" for k in profile.kernels}
    for entry in profile.provenance.unverified:
        key, colon, why = entry.partition(":")
        assert colon and why.strip(), entry
        table, _, inner = key.partition(".")
        value: Any = profile
        if table == "kernel":
            assert not inner or inner in kernels, entry
            continue
        for part in key.split("."):
            value = getattr(value, {"cache": "caches", "fusion": "fusions"}.get(part, part), None)
        assert value is not None, entry


@shipped
def test_prices_that_are_assumed_are_named(name: str) -> None:
    """Where whole models were all there was, only products are fitted: every other price has to be owned up to."""
    profile = PROFILES[name]
    own = [fit for fit in published.read_fits() if fit.profile in (name, *profile.lineage)]
    if not own:
        return
    named = {entry.partition(":")[0].removeprefix("kernel.") for entry in profile.provenance.unverified}
    fitted = {(fit.precision, kind) for fit in own for kind in published.fitted_kinds(fit)}
    same = {"f32": "f16"} if "f32" not in {fit.precision for fit in own} else {}  # floats run in float16
    for kernel in profile.kernels:
        precision = same.get(kernel.precision, kernel.precision)
        if kernel.kind == "free" or (precision, kernel.kind) in fitted:
            continue
        assert named & {kernel.kind, f"{kernel.kind}.{kernel.precision}", f"{kernel.kind}.{precision}"}, kernel


# ---- what it does ------------------------------------------------------------------------------------------


@shipped
def test_small_models_have_a_price_at_every_precision(name: str) -> None:
    profile = PROFILES[name]
    if profile.target().float32:
        cost = cost_of(profile, FLOAT, FLOAT_WEIGHTS)
        assert not cost.unknown and 0 < cost.seconds < 10
    if "u8s8" in precisions_of(profile):
        cost = cost_of(profile, QUANTIZED, QUANTIZED_WEIGHTS)
        rows = {node.op_type: node for node in cost.nodes}
        assert rows["Conv"].precision == "u8s8" and rows["Conv"].seconds > 0
        assert rows["Add"].precision == "u8s8"
        assert {n.op_type for n in cost.nodes if not n.known} <= {"QuantizeLinear", "DequantizeLinear"}
    model = CostModel(profile)
    for precision in sorted(precisions_of(profile)):
        kinds = [k for k in profile.kernels if k.precision == precision and k.kind not in CONVERSIONS]
        assert kinds and all(0 <= (model.node(work(k.kind, _op(k)), precision) or 0.0) < 1 for k in kinds)


def _op(kernel: Kernel) -> str:
    return kernel.kind if kernel.kind[0].isupper() else ""


@shipped
def test_integer_devices_run_no_floats(name: str) -> None:
    profile = PROFILES[name]
    if profile.quantization.required:
        assert precisions_of(profile) == {"u8s8"}
        assert not profile.target().float32 and not profile.target().float16
        assert CostModel(profile).node(work("conv", "Conv"), "f32") is None
    else:
        assert "f32" in precisions_of(profile)


@shipped
def test_what_quantized_models_look_like_is_possible(name: str) -> None:
    profile = PROFILES[name]
    target = profile.target()
    assert target.has("Conv", "u8s8") and target.has("conv_depthwise", "u8s8")
    assert target.channel_multiple in (1, 2, 4, 8, 16, 32, 64)
    if target.ops:
        assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Reshape"} <= target.ops
    if profile.limits is not None and profile.limits.flash_bytes is not None:
        assert profile.limits.ram_bytes is not None and profile.limits.ram_bytes < profile.limits.flash_bytes


@shipped
def test_integers_are_no_slower_than_floats_where_both_are_dense(name: str) -> None:
    """Every device here has integer arithmetic that is at least as wide as its float arithmetic."""
    profile = PROFILES[name]
    if profile.quantization.required or profile.provenance.status == "emulated-ratios":
        return  # on old Arm cores that is not so
    model = CostModel(profile)
    large = NodeWork(
        "n", "Conv", "conv", True, macs=10**9, in_channels=256, out_channels=256, elements_in=10**5, elements_out=10**5,
        weights=590_000, params=590_000, patches=10**6,
    )  # fmt: skip
    assert (model.node(large, "u8s8") or math.inf) <= (model.node(large, "f32") or 0)


@given(
    name=st.sampled_from(SHIPPED),
    precision=st.sampled_from(PRECISIONS),
    index=st.integers(0, 100),
    less=st.tuples(*[st.integers(0, 10**7)] * 5),
    more=st.tuples(*[st.integers(0, 10**7)] * 5),
)
def test_more_work_never_costs_less(
    name: str, precision: str, index: int, less: tuple[int, ...], more: tuple[int, ...]
) -> None:
    profile = PROFILES[name]
    kernels = [k for k in profile.kernels if k.precision == precision]
    if not kernels:
        return
    kernel = kernels[index % len(kernels)]
    model = CostModel(profile)

    def price(macs: int, read: int, written: int, weights: int, patches: int) -> float:
        node = NodeWork(
            "n", _op(kernel), kernel.kind, kernel.on == "maps", macs, 12, 20, read, written, weights, weights, patches
        )
        found = model.node(node, precision)
        assert found is not None and math.isfinite(found)
        return found

    low, high = price(*less), price(*(a + b for a, b in zip(less, more, strict=True)))
    assert 0 <= low <= high * (1 + 1e-12)


# ---- boards ------------------------------------------------------------------------------------------------


@shipped
def test_a_board_is_its_core_at_another_clock(name: str) -> None:
    profile = PROFILES[name]
    for parent in map(PROFILES.__getitem__, profile.lineage):
        model, other = CostModel(profile), CostModel(parent)
        node = work("conv_depthwise", "Conv")
        ratio = (model.node(node, "u8s8") or 0) / (other.node(node, "u8s8") or 1)
        assert ratio == pytest.approx(profile.time_scale / parent.time_scale)
        if parent.device.frequency_ghz > profile.device.frequency_ghz:
            assert ratio >= 0.99 * parent.device.frequency_ghz / profile.device.frequency_ghz


# ---- evidence ----------------------------------------------------------------------------------------------


def test_the_evidence_may_be_passed_on() -> None:
    table = (ROOT / "hardware_profiles" / "evidence" / "published.csv").read_text(encoding="utf-8").splitlines()
    licences = {line.split(",")[6] for line in table[1:]}
    assert licences <= {"Apache-2.0", "MIT", "BSD-3-Clause"}
    assert all(line.split(",")[8] for line in table[1:]), "every row names a commit"


@fits
def test_prices_are_those_of_the_fit(fit: Any) -> None:
    raw = {(k.kind, k.precision): k for k in PROFILES[fit.profile].kernels_}
    for table in published.kernels(fit, published.solve(fit, published.wanted(fit, ROWS))):
        kernel = raw.get((table["kind"], table["precision"]))
        for key, value in table.items():
            if kernel is not None and key.startswith("ns_"):
                assert getattr(kernel, key) == pytest.approx(value, rel=0.01), f"{table['kind']}: {key}"


@fits
def test_the_fit_holds_on_models_it_has_not_seen(fit: Any) -> None:
    result = published.run(fit, ROWS)
    left_out = statistics.fmean(map(abs, result.left_out.values()))
    assert left_out < 0.3
    assert result.fit_error <= left_out
    lower = published.lower_bounds(fit)
    assert all(result.coefficients[term] >= 0.999 * least for term, least in lower.items())


@fits
def test_profiles_predict_the_models_they_were_made_from(fit: Any) -> None:
    """The cost model, and not only the script of the fit, gives about the published times."""
    profile = PROFILES[fit.profile]
    model = CostModel(profile)
    errors = []
    for row in published.wanted(fit, ROWS):
        nodes = nets.NETS[row.model]()
        seconds = 1e-9 * profile.overhead.ns_per_run + sum(model.node(n, fit.precision) or math.nan for n in nodes)
        if profile.memory is not None:  # weights that fit twice into the cache at most
            weights = sum(n.weights for n in nodes)
            missed = min(max(weights / profile.memory.cache_bytes - 1, 0), 1)
            seconds += 1e-9 * profile.memory.ns_per_byte * weights * missed
        errors.append(1e9 * seconds / row.nanoseconds - 1)
    assert statistics.fmean(map(abs, errors)) < 0.15, errors


def test_networks_are_counted_as_graphs_are() -> None:
    """The lists of work say what work_of says of a graph."""
    body = """
    net (float[1,3,32,32] x) => (float[1,10] y) {
        n1 = Conv<strides=[2,2], pads=[1,1,1,1]>(x, a, ab)
        n2 = Conv<group=8, pads=[1,1,1,1]>(n1, b, bb)
        n3 = Conv(n2, c, cb)
        n4 = Conv<group=4, pads=[1,1,1,1]>(n3, d, db)
        n5 = Add(n4, n3)
        n6 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(n5)
        n7 = GlobalAveragePool(n6)
        n8 = Flatten(n7)
        y = Gemm<transB=1>(n8, e, eb)
    }
    """
    weights = {
        "a": (8, 3, 3, 3), "ab": (8,), "b": (8, 1, 3, 3), "bb": (8,), "c": (16, 8, 1, 1), "cb": (16,),
        "d": (16, 4, 3, 3), "db": (16,), "e": (10, 16), "eb": (10,),
    }  # fmt: skip
    view = GraphView(text(body, {name: normal(0, *shape) for name, shape in weights.items()}))
    counted = [work_of(view, n, {}) for n in view.nodes() if n.op_type != "Flatten"]
    net = nets.Net(3, 32).conv(8, 3, 2).depthwise(3).conv(16, 1).conv(16, 3, groups=4).add().pool(2, 2, valid=True)
    listed = net.gap().dense(10).nodes
    for graph, plain in zip(counted, listed, strict=True):
        for key in PRICED:
            assert getattr(graph, key) == getattr(plain, key), (graph.op_type, key)


@pytest.mark.parametrize(
    ("name", "macs", "params"),
    [  # of the papers and of torchvision, in millions
        ("mobilenet_v1", 569, 4.2),
        ("mobilenet_v2", 301, 3.5),
        ("resnet18", 1814, 11.7),
        ("resnet50", 4089, 25.6),
        ("inception_v1", 1498, 6.6),
        ("inception_v4", 12270, 42.7),
        ("squeezenet1_1", 349, 1.24),
        ("mlperf_tiny_ad", 0.264, 0.27),
        ("mlperf_tiny_ic", 12.5, 0.08),
        ("mlperf_tiny_kws", 2.66, 0.024),
        ("mlperf_tiny_vww", 7.49, 0.22),
    ],
)
def test_networks_are_the_ones_that_were_published(name: str, macs: float, params: float) -> None:
    nodes = nets.NETS[name]()
    assert sum(n.macs for n in nodes) / 1e6 == pytest.approx(macs, rel=0.02)
    assert sum(n.params for n in nodes) / 1e6 == pytest.approx(params, rel=0.08)


def test_what_the_host_was_fitted_to_is_still_what_is_measured() -> None:
    """A link whose name or meaning changes makes the measurements that are kept worthless, silently."""
    kept = Path(__file__).parents[1] / "hardware_profiles" / "fitting" / "measured" / "host-x86-vnni.json.gz"
    if not kept.exists():
        pytest.skip("installed without its measurements")
    results = Measurements.from_json(gzip.decompress(kept.read_bytes()).decode())
    names = {link.name for link in links()}
    assert {t.name for t in results.links} | set(results.left_out) == names
    nets = {f"{net.name} {form}" for net in (*FITTED, *CHECKED) for form in ("f32", "wholly", "partly")}
    assert {t.name for t in results.nets} == nets
