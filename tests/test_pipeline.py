"""The whole way on small models: what comes out runs, keeps its budget, and is what the report says."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Array, fused, normal, ops, proto_of, run, text

import onnxcompress
from onnxcompress import Budget, Result, job
from onnxcompress import model as models
from onnxcompress.base import KEEP, Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.errors import OutputError, PassContractError, UsageError
from onnxcompress.evaluate import compare
from onnxcompress.models_zoo import get_model, sample_feeds
from onnxcompress.models_zoo.generated import write_external_model
from onnxcompress.passes.quantize import Quantize
from onnxcompress.profile import load_profile
from onnxcompress.report import Latency
from onnxcompress.rewrite import Rewriter
from onnxcompress.sizes import file_size, model_size
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import QUANTIZED_OPS, GraphView

PROFILE = "host-x86-vnni"
ZOO = ("gen-cnn", "gen-transformer", "gen-lstm", "gen-if")
Feed = dict[str, Array]


def optimize(model: ir.Model | str | Path, calibration: object = None, **options: Any) -> Result:
    return onnxcompress.optimize(model, profile=PROFILE, calibration=calibration, timing=False, **options)


def feeds(name: str, count: int = 12) -> list[Feed]:
    return list(sample_feeds(name, count))


def held_out(samples: list[Feed]) -> list[Feed]:
    """Every fourth sample is kept from calibration."""
    return samples[3::4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def done(folder: Path) -> Callable[[str], tuple[Path, Path, Result]]:
    """Input file, output file and result of a zoo model, optimized once."""
    known: dict[str, tuple[Path, Path, Result]] = {}

    def get(name: str) -> tuple[Path, Path, Result]:
        if name not in known:
            path = get_model(name, folder)
            output = folder / f"{name}-small.onnx"
            known[name] = path, output, optimize(path, feeds(name), output=output)
        return known[name]

    return get


def consistent(result: Result) -> None:
    """What must hold of every report."""
    report = result.report
    assert all(s.reason for s in report.sites if s.decision == KEEP)
    assert not any(s.reason for s in report.sites if s.decision != KEEP)
    keys = [(s.pass_name, s.key) for s in report.sites]
    assert len(keys) == len(set(keys))
    for p in report.passes:
        assert p.outcome in ("applied", "nothing to do", "dropped")
        assert (p.changed > 0) == (p.outcome == "applied")
        assert p.reason or p.outcome != "dropped"
    rewrites = [p for p in report.passes if p.name == "quantize"]
    made = sum(s.decision != KEEP for s in report.sites if s.pass_name == "quantize")
    assert made == sum(p.changed for p in rewrites)
    assert report.attempts or not made
    json.loads(report.to_json())


# --- whole models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_a_whole_model(name: str, done: Callable[[str], tuple[Path, Path, Result]]) -> None:
    path, output, result = done(name)
    report, samples = result.report, feeds(name)
    consistent(result)
    before, after = onnx.load(path), onnx.load(output)
    onnx.checker.check_model(after, full_check=True)
    for old, new in ((before.graph.input, after.graph.input), (before.graph.output, after.graph.output)):
        assert [(v.name, v.type) for v in old] == [(v.name, v.type) for v in new]
    assert proto_of(result.model) == after, "the file is the model that was returned"
    assert result.files == (output,)

    totals = report.totals
    assert totals.file_bytes == (path.stat().st_size, output.stat().st_size)
    assert totals.zstd_bytes == (file_size(path).zstd, file_size(output).zstd)
    assert totals.file_bytes[0] > 2.7 * totals.file_bytes[1]
    independent = compare(path, output, held_out(samples), [o.name for o in totals.comparison.outputs])
    assert totals.comparison.samples == len(held_out(samples)) == independent.samples
    assert totals.comparison.min_sqnr_db == pytest.approx(independent.min_sqnr_db, abs=0.1)
    assert independent.min_sqnr_db >= 20
    predicted = onnxcompress.inspect(result.model, profile=PROFILE, shapes={k: v.shape for k, v in samples[0].items()})
    assert totals.predicted_ms[1] <= totals.predicted_ms[0]
    assert totals.predicted_ms[1] == pytest.approx(1e3 * predicted.seconds, rel=0.1)
    assert "accepted" in [a.verdict for a in report.attempts]
    assert report.warnings == ()


def test_decisions_are_in_the_graph(done: Callable[[str], tuple[Path, Path, Result]]) -> None:
    """Static sites run as integer kernels; stored weights are int8 and restored."""
    _, _, result = done("gen-cnn")
    decisions = {s.key: (s.op, s.decision) for s in result.report.sites if s.pass_name == "quantize"}
    static = sum(d == ("Conv", "static") for d in decisions.values())
    assert static >= 5
    kernels = [n.op_type for n in fused(result.model).graph.node]
    assert kernels.count("QLinearConv") == static
    stored = sum(d == "weights" for _, d in decisions.values())
    assert sum(v.endswith("_int8") for v in result.model.graph.initializers) == stored


def test_batch_norm_is_gone_and_the_report_says_so(done: Callable[[str], tuple[Path, Path, Result]]) -> None:
    path, output, result = done("gen-cnn")
    assert "BatchNormalization" in [n.op_type for n in onnx.load(path).graph.node]
    assert "BatchNormalization" not in [n.op_type for n in onnx.load(output).graph.node]
    (fuse,) = (p for p in result.report.passes if p.name == "fuse_batchnorm")
    assert fuse.outcome == "applied" and fuse.changed >= 9


def test_dynamic_extents_stay_dynamic(done: Callable[[str], tuple[Path, Path, Result]]) -> None:
    """Calibrated on batches of one; other batches and other images run, and are as close."""
    path, output, _ = done("gen-cnn")
    batch = {"image": np.concatenate([f["image"] for f in feeds("gen-cnn", 5)])}
    assert compare(path, output, [batch]).min_sqnr_db > 20


def test_both_branches_are_quantized(done: Callable[[str], tuple[Path, Path, Result]]) -> None:
    _, output, result = done("gen-if")
    (node,) = onnx.load(output).graph.node[-1:]
    for attribute in node.attribute:
        inner = [i.data_type for i in attribute.g.initializer]
        assert onnx.TensorProto.INT8 in inner
    assert sum(s.decision in ("weights", "dynamic") for s in result.report.sites) == 6


def test_the_input_file_is_never_touched(done: Callable[[str], tuple[Path, Path, Result]], tmp_path: Path) -> None:
    path, _, _ = done("gen-lstm")
    fresh = get_model("gen-lstm", tmp_path)
    assert path.read_bytes() == fresh.read_bytes()


def test_a_model_in_memory_is_not_changed_either() -> None:
    model = block()
    before = models.serialize(model)
    result = optimize(model, block_feeds())
    assert models.serialize(model) == before
    assert result.report.input == "model in memory"
    assert result.report.totals.file_bytes == (len(before), model_size(result.model).raw)


@pytest.mark.parametrize("name", ["gen-cnn", "gen-transformer"])
def test_two_runs_give_the_same_bytes_and_the_same_report(name: str, folder: Path, tmp_path: Path) -> None:
    path = get_model(name, folder)
    budget = Budget(min_sqnr_db=38.0)
    first, second = (optimize(path, feeds(name), budget=budget, output=tmp_path / f"{i}.onnx") for i in ("one", "two"))
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert first.report == second.report
    assert len(first.report.attempts) > 1, "the search had something to do"


# --- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gen-cnn", "gen-transformer"])
def test_a_stricter_budget_is_kept_and_costs_sites(
    name: str, folder: Path, done: Callable[[str], tuple[Path, Path, Result]]
) -> None:
    path, samples = get_model(name, folder), feeds(name)
    loose = done(name)[2]
    strict = optimize(path, samples, budget=Budget(min_sqnr_db=40.0))
    consistent(strict)
    assert strict.report.totals.comparison.min_sqnr_db >= 40
    assert compare(path, models_file(strict.model, folder), held_out(samples)).min_sqnr_db >= 40
    assert sites(strict) > 0 and strict.report.totals.predicted_ms[1] > loose.report.totals.predicted_ms[1]
    over = [s for s in strict.report.sites if "does not fit into the budget" in s.reason]
    assert over and all("would pay" in s.reason for s in over)
    assert any("dB" in s.reason for s in over)


def sites(result: Result) -> int:
    return sum(s.decision != KEEP for s in result.report.sites)


def models_file(model: ir.Model, folder: Path) -> Path:
    path = folder / "candidate.onnx"
    path.write_bytes(models.serialize(model))
    return path


def test_an_impossible_budget_gives_the_normalised_model(folder: Path) -> None:
    """By hand with nothing but tidying: the same graph, to the byte."""
    path, samples = get_model("gen-cnn", folder), feeds("gen-cnn")
    result = optimize(path, samples, budget=Budget(min_sqnr_db=200.0))
    consistent(result)
    assert sites(result) == 0
    assert result.report.outcome == "no rewrite pays; the model is normalised only"
    assert not {n.op_type for n in result.model.graph} & QUANTIZED_OPS
    assert all("dB asked for" in s.reason for s in result.report.sites if s.pass_name == "quantize")
    tidy = optimize(path, samples, passes=[])
    raised = [p for p in result.report.passes if p.name == "raise_opset"]
    assert not raised
    assert len(models.serialize(tidy.model)) == len(models.serialize(result.model))
    assert ops(tidy.model) == ops(result.model)
    assert compare(path, models_file(result.model, folder), samples).min_sqnr_db > 100


def test_a_metric_that_falls_holds_the_rewrites_back(folder: Path) -> None:
    """Each quantized convolution costs a hundredth here, whatever the numbers: four may stay."""
    path, samples = get_model("gen-cnn", folder), feeds("gen-cnn")
    seen: list[str] = []

    def metric(file: str) -> float:
        seen.append(file)
        kinds = [n.op_type for n in fused(models.load(file)).graph.node]
        return 1.0 - 0.01 * kinds.count("QLinearConv")

    result = optimize(path, samples, metric=metric, budget=Budget(max_drop=0.04))
    consistent(result)
    totals = result.report.totals
    assert totals.metric_before == 1.0
    assert totals.metric_after is not None and totals.metric_after >= 0.96
    assert sites(result) > 0
    failed = [a for a in result.report.attempts if a.verdict != "accepted"]
    assert failed and all(a.metric is not None and "is below 0.96" in a.verdict for a in failed)
    assert not any(Path(f).exists() for f in seen), "files it is shown are temporary"


def test_a_real_metric(folder: Path) -> None:
    """Share of samples whose class is that of the float model, on all samples."""
    path, samples = get_model("gen-cnn", folder), feeds("gen-cnn")
    labels = [run(models.load(path), f)["scores"].argmax() for f in samples]

    def accuracy(file: str) -> float:
        loaded = models.load(file)
        return float(np.mean([run(loaded, f)["scores"].argmax() == c for f, c in zip(samples, labels, strict=True)]))

    result = optimize(path, samples, metric=accuracy, budget=Budget(max_drop=0.0))
    assert result.report.totals.metric_before == 1.0 == result.report.totals.metric_after
    assert sites(result) > 0


def test_a_metric_and_a_floor_both_count(folder: Path) -> None:
    path, samples = get_model("gen-cnn", folder), feeds("gen-cnn")
    result = optimize(path, samples, metric=lambda file: 1.0, budget=Budget(max_drop=0.5, min_sqnr_db=40.0))
    assert result.report.totals.comparison.min_sqnr_db >= 40


def test_a_drop_of_a_negative_metric_is_relative_to_its_size() -> None:
    """A loss: -2 may fall to -2.02 at one per cent, and not rise to -1.98 only."""
    values = iter([-2.0, -2.019, -2.019, -2.019])
    result = optimize(block(), block_feeds(), metric=lambda file: next(values), budget=Budget(max_drop=0.01))
    assert sites(result) > 0 and result.report.attempts[0].verdict == "accepted"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_must_be_finite(value: float) -> None:
    with pytest.raises(UsageError, match=r"the metric returned (nan|inf)"):
        optimize(block(), block_feeds(), metric=lambda file: value, budget=Budget(max_drop=0.01))


def test_a_drop_needs_a_metric() -> None:
    with pytest.raises(UsageError, match="needs a metric"):
        optimize(block(), block_feeds(), budget=Budget(max_drop=0.01))


def test_the_budget_holds_on_every_held_out_sample() -> None:
    """Late samples are a thousand times larger than what was calibrated on, and are clipped.

    Held out are the samples 3, 7, 11, ...; a look at the first few of them would see nothing.
    """
    samples = block_feeds(64)
    for i in (47, 51, 55, 59, 63):
        samples[i] = {"x": samples[i]["x"] * 1000}
    model = block()
    result = optimize(model, samples)
    assert result.report.totals.comparison.min_sqnr_db >= 20
    assert compare(model, result.model, held_out(samples)).min_sqnr_db >= 20


# --- without data ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gen-cnn", "gen-transformer"])
def test_made_up_inputs_are_no_ground_for_ranges(name: str, folder: Path) -> None:
    result = optimize(get_model(name, folder))
    consistent(result)
    assert "MADE UP" in result.report.warnings[0]
    decisions = {s.decision for s in result.report.sites}
    assert not decisions & {"static", "smooth"}
    assert "weights" in decisions
    assert result.report.totals.comparison.min_sqnr_db >= 20
    if name == "gen-cnn":
        assert any("there is no calibration data" in s.reason for s in result.report.sites)


# --- by hand -----------------------------------------------------------------------------------


def test_weights_only_by_hand(folder: Path) -> None:
    """Every float weight of some size is int8 in the file, and onnxruntime restores all of them when it loads."""
    path = get_model("gen-cnn", folder)
    result = optimize(path, feeds("gen-cnn"), passes=[Quantize(modes=("weights",))])
    consistent(result)
    assert {s.decision for s in result.report.sites if s.pass_name == "quantize"} <= {"weights", KEEP}
    left = [v for v in result.model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert max(v.const_value.size for v in left if v.const_value is not None) < 256
    assert not {"Cast", "Mul", "QuantizeLinear"} & {n.op_type for n in fused(result.model).graph.node}
    assert len(result.report.attempts) == 1
    (quantize,) = (p for p in result.report.passes if p.name == "quantize")
    assert quantize.options["modes"] == ["weights"]
    assert quantize.options.keys() == {f.name for f in dataclasses.fields(Quantize)}
    assert result.report.totals.file_bytes[0] > 3 * result.report.totals.file_bytes[1]


def test_what_is_asked_for_by_hand_is_verified_all_the_same(folder: Path) -> None:
    path = get_model("gen-cnn", folder)
    result = optimize(path, feeds("gen-cnn"), passes=[Quantize()], budget=Budget(min_sqnr_db=90.0))
    consistent(result)
    assert sites(result) == 0
    (quantize,) = (p for p in result.report.passes if p.name == "quantize")
    assert quantize.outcome == "dropped" and "90.0 dB asked for" in quantize.reason


def test_by_hand_makes_what_does_not_pay(folder: Path) -> None:
    """A lone small product: left alone by cost, made when asked for."""
    model = text("g (float[N, 8] x) => (float[N, 8] y) { y = MatMul (x, w) }", {"w": normal(0, 8, 8)})
    samples = [{"x": normal(i, 2, 8)} for i in range(400)]
    assert sites(optimize(model, samples)) == 0
    result = optimize(model, samples, passes=[Quantize(modes=("static",))])
    assert [s.decision for s in result.report.sites] == ["static"]


# --- models that pass through ------------------------------------------------------------------


def test_a_quantized_model_passes_through(done: Callable[[str], tuple[Path, Path, Result]]) -> None:
    _, output, _ = done("gen-cnn")
    result = optimize(output, feeds("gen-cnn"))
    consistent(result)
    assert sites(result) == 0
    assert all("already quantized" in s.reason for s in result.report.sites if s.pass_name == "quantize")
    assert sorted(ops(result.model)) == sorted(ops(models.load(output)))
    assert compare(output, result.model, feeds("gen-cnn")).min_sqnr_db == math.inf


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_float_models_pass_through_with_a_reason(kind: str, dtype: type) -> None:
    w = normal(0, 16, 32).astype(dtype)
    model = text(f"g ({kind}[N, 16] x) => ({kind}[N, 32] y) {{ m = MatMul (x, w)  y = Relu (m) }}", {"w": w})
    result = optimize(model, [{"x": normal(i, 4, 16).astype(dtype)} for i in range(8)])
    consistent(result)
    assert ops(result.model) == ["MatMul", "Relu"]
    assert any(s.reason == f"its weight is {kind}; only float32 is quantized" for s in result.report.sites)
    assert result.report.totals.comparison.min_sqnr_db == math.inf


@pytest.mark.parametrize("opset", [11, 17])
def test_nodes_of_other_domains_are_passed_through(opset: int) -> None:
    """With what they are set to, and around them work goes on; the standard operators are raised to 13."""
    model = text(
        """g (float[N, 64] x) => (float[N, 64] y) {
             m = MatMul (x, w)  b = com.microsoft.BiasGelu (m, c)  y = MatMul (b, w) }""",
        {"w": normal(0, 64, 64), "c": normal(1, 64)},
        opset=opset,
        imports=["com.microsoft"],
    )
    result = optimize(model, [{"x": normal(i, 8, 64)} for i in range(8)])
    consistent(result)
    (custom,) = (n for n in result.model.graph if n.op_type == "BiasGelu")
    assert custom.domain == "com.microsoft"
    assert result.model.graph.opset_imports["com.microsoft"] == 1
    assert result.model.graph.opset_imports[""] == max(opset, 13)
    assert sites(result) == 2
    assert ("raise_opset" in {p.name for p in result.report.passes}) == (opset == 11)
    reasons = {s.op: s.reason for s in result.report.sites if s.decision == KEEP and s.pass_name == "quantize"}
    assert "not standard ONNX" in reasons["BiasGelu"]


def test_a_model_without_weights_passes_through() -> None:
    result = optimize(text("g (float[4] x) => (float[4] y) { t = Sin (x)  y = Cos (t) }"), [{"x": normal(0, 4)}] * 4)
    consistent(result)
    assert ops(result.model) == ["Sin", "Cos"]
    assert {s.reason for s in result.report.sites} >= {"onnxruntime has no int8 kernel for Sin"}


def test_external_data_is_read_and_counted(tmp_path: Path) -> None:
    path = write_external_model(tmp_path / "big.onnx", 4 * 128 * 128 * 3, width=128)
    data = path.with_name("big.onnx.data")
    before = path.read_bytes(), data.read_bytes()
    samples = [{"x": normal(i, 2, 128)} for i in range(8)]
    for output in (path, data):
        with pytest.raises(OutputError, match="never overwritten"):
            optimize(path, samples, output=output)
    result = optimize(path, samples, output=tmp_path / "small.onnx")
    consistent(result)
    assert (path.read_bytes(), data.read_bytes()) == before
    totals = result.report.totals
    assert totals.file_bytes == (len(before[0]) + len(before[1]), (tmp_path / "small.onnx").stat().st_size)
    assert totals.file_bytes[0] > 3 * totals.file_bytes[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data", "small.onnx"]


@pytest.mark.parametrize("way", ["plain", "link", "relative"])
def test_the_output_must_not_be_the_input(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(models.serialize(block()))
    before = path.read_bytes()
    (tmp_path / "link.onnx").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    output = {"plain": path, "link": tmp_path / "link.onnx", "relative": Path("./model.onnx")}[way]
    with pytest.raises(OutputError, match="never overwritten"):
        optimize(path, block_feeds(), output=output)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.onnx", "model.onnx"]


# --- what is not kept --------------------------------------------------------------------------


def block() -> ir.Model:
    """Two products with a Relu between: large enough to be worth quantizing."""
    weights = {"w": normal(0, 128, 256) / 10, "v": normal(1, 256, 64) / 16}
    return text(
        "g (float[N, 128] x) => (float[N, 64] y) { m = MatMul (x, w)  r = Relu (m)  y = MatMul (r, v) }", weights
    )


def block_feeds(count: int = 8) -> list[Feed]:
    return [{"x": normal(100 + i, 32, 128)} for i in range(count)]


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies what a MatMul makes by a factor."""

    name: ClassVar[str] = "scale"
    stage: ClassVar[Stage] = Stage.SHARE
    ops: ClassVar[tuple[str, ...]] = ("MatMul",)
    factor: float = 1.5

    def match(self, node: ir.Node, view: GraphView) -> Site:
        return Site.of(node)

    def choices(self, site: Site, view: GraphView, target: Target) -> Sequence[Choice]:
        return [Choice(site, "scaled", effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        output = rewriter.node(choice.site.key).outputs[0]
        factor = rewriter.constant(np.array(self.factor, np.float32), "factor")
        (scaled,) = rewriter.insert("Mul", [output, factor], after=output)
        rewriter.replace_uses(output, scaled, keep=[n for n in [scaled.producer()] if n is not None])


class Tidy(Scale):
    """Claims to change nothing."""

    name: ClassVar[str] = "tidy"
    stage: ClassVar[Stage] = Stage.NORMALISE
    lossless: ClassVar[bool] = True


def test_a_lossless_pass_that_changes_outputs_is_dropped() -> None:
    result = optimize(block(), block_feeds(), passes=[Tidy(factor=1.0), Tidy(factor=1.001)])
    honest, liar = (p for p in result.report.passes if p.name == "tidy")
    assert (honest.outcome, honest.changed) == ("applied", 2)
    assert (liar.outcome, liar.changed) == ("dropped", 0)
    assert "it changed the outputs: 'y' is at 5" in liar.reason  # 1.001^2: 20 log10(500) = 54 dB
    assert ops(result.model).count("Mul") == 2
    assert result.report.totals.comparison.min_sqnr_db == math.inf


def test_a_pass_that_does_too_much_is_dropped() -> None:
    result = optimize(block(), block_feeds(), passes=[Scale(), Quantize(modes=("weights",))])
    scale, quantize = (p for p in result.report.passes if p.name in ("scale", "quantize"))
    assert scale.outcome == "dropped" and "dB asked for" in scale.reason
    assert quantize.outcome == "applied"
    assert [s.reason for s in result.report.sites if s.pass_name == "scale"] == [scale.reason] * 2
    consistent(result)


class Broken(Scale):
    """Writes a node onnxruntime does not know."""

    name: ClassVar[str] = "broken"

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        rewriter.insert("Unheard", [], after=rewriter.node(choice.site.key), domain="com.example")


def test_a_rewrite_that_does_not_run_is_dropped() -> None:
    result = optimize(block(), block_feeds(), passes=[Broken()])
    (broken,) = (p for p in result.report.passes if p.name == "broken")
    assert broken.outcome == "dropped" and "it does not run" in broken.reason
    assert "Unheard" not in ops(result.model)
    assert result.report.attempts[0].min_sqnr_db == -math.inf


class Raises(Scale):
    """Has a bug."""

    name: ClassVar[str] = "raises"

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        raise IndexError("seven")


class Hesitates(Scale):
    """Changes its mind too late."""

    name: ClassVar[str] = "hesitates"

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        super().apply(choice, rewriter, evidence)
        raise Skip("after all")


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (Raises(), r"pass 'raises' broke at 'node': IndexError: seven"),
        (Hesitates(), r"pass 'hesitates' edited the model at 'node' and then refused: after all"),
    ],
)
def test_a_pass_that_breaks_its_promise_is_named(pass_: Pass, message: str, tmp_path: Path) -> None:
    with pytest.raises(PassContractError, match=message):
        optimize(block(), block_feeds(), passes=[pass_], output=tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


class Refuses(Scale):
    """Looks again and leaves one site alone."""

    name: ClassVar[str] = "refuses"

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        if choice.site.key == "node":
            raise Skip("not that one")
        super().apply(choice, rewriter, evidence)


def test_a_refusal_is_a_reason() -> None:
    result = optimize(block(), block_feeds(), passes=[Refuses(factor=1.01)])
    found = {s.key: (s.decision, s.reason) for s in result.report.sites if s.pass_name == "refuses"}
    assert found == {"node": (KEEP, "not that one"), "node_2": ("scaled", "")}
    consistent(result)


class Picky(Scale):
    """Offers nothing anywhere."""

    name: ClassVar[str] = "picky"

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        yield Skipped("node", "it is Monday")

    def choices(self, site: Site, view: GraphView, target: Target) -> Sequence[Choice]:
        raise AssertionError("there is no site")


def test_a_pass_without_sites_says_so() -> None:
    result = optimize(block(), block_feeds(), passes=[Picky()])
    (picky,) = (p for p in result.report.passes if p.name == "picky")
    assert picky.outcome == "nothing to do"
    assert [(s.op, s.reason) for s in result.report.sites if s.pass_name == "picky"] == [("MatMul", "it is Monday")]


# --- timed -------------------------------------------------------------------------------------


def timed(
    monkeypatch: pytest.MonkeyPatch, speed: Callable[[ir.Model], float], **options: Any
) -> tuple[Result, list[str]]:
    """A run that believes it is on the profile's device, where models have made-up speeds."""
    measured: list[str] = []

    def measure(before: ir.Model, after: ir.Model, feed: Mapping[str, Array], **_: object) -> Latency:
        measured.append("int8" if {n.op_type for n in after.graph} & QUANTIZED_OPS else "float")
        return Latency(1.0, 1.0 / speed(after), speed(after), 10, 1)

    monkeypatch.setattr(job, "measure", measure)
    monkeypatch.setattr(type(load_profile(PROFILE).device), "is_here", lambda self: True)
    return onnxcompress.optimize(block(), profile=PROFILE, calibration=block_feeds(), **options), measured


def test_what_measures_faster_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    result, measured = timed(monkeypatch, lambda model: 2.0)
    consistent(result)
    assert measured == ["int8"]
    assert result.report.totals.latency == Latency(1.0, 0.5, 2.0, 10, 1)


def test_where_integers_measure_slower_only_the_weights_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    result, measured = timed(
        monkeypatch, lambda model: 0.5 if {n.op_type for n in model.graph} & QUANTIZED_OPS else 1.0
    )
    consistent(result)
    assert measured == ["int8", "int8", "float"], "a slow result gets a second chance"
    assert {s.decision for s in result.report.sites if s.pass_name == "quantize"} == {"weights", KEEP}
    assert any(
        a.verdict == "slower than the input on this machine" and a.speed_up == 0.5 for a in result.report.attempts
    )
    assert result.report.totals.latency is not None and result.report.totals.latency.speed_up == 1.0


def test_where_everything_measures_slower_the_input_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, _ = timed(monkeypatch, lambda model: 0.5, output=tmp_path / "out.onnx")
    consistent(result)
    assert sites(result) == 0
    assert all(
        "slower" in s.reason for s in result.report.sites if s.pass_name == "quantize" and s.key in ("node", "node_2")
    )
    assert all(p.outcome != "applied" for p in result.report.passes)
    assert ops(result.model) == ["MatMul", "Relu", "MatMul"]
    assert result.report.totals.latency is None
    assert result.report.totals.predicted_ms[0] == result.report.totals.predicted_ms[1]
    assert result.report.outcome == "no rewrite pays; the input model is kept"


def test_what_is_asked_for_by_hand_and_measures_slower_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is tried instead; the prediction is that of the model which is handed back."""
    result, measured = timed(
        monkeypatch,
        lambda model: 0.5 if {n.op_type for n in model.graph} & QUANTIZED_OPS else 1.0,
        passes=[Quantize(modes=("dynamic",))],
    )
    consistent(result)
    assert measured == ["int8", "int8", "float"]
    assert sites(result) == 0
    assert result.report.outcome == "no rewrite pays; the model is normalised only"
    assert result.report.totals.predicted_ms[0] == result.report.totals.predicted_ms[1]


def test_nothing_is_timed_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "measure", lambda *a, **k: pytest.fail("timed"))
    monkeypatch.setattr(type(load_profile(PROFILE).device), "is_here", lambda self: False)
    result = onnxcompress.optimize(block(), profile="cortex-a53", calibration=block_feeds())
    assert result.report.totals.latency is None


# --- the rest of the interface -----------------------------------------------------------------


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []
    optimize(block(), block_feeds(), progress=lambda *step: told.append(step))
    stages = [stage for stage, _, _ in told]
    assert stages[0] == "checking the model"
    assert {"calibrating", "building and checking a plan"} <= set(stages)
    assert all(total is None or 0 <= done <= total for _, done, total in told)


def test_fewer_samples_where_asked() -> None:
    result = optimize(block(), block_feeds(16), samples=4)
    assert result.report.totals.comparison.samples == 1


def test_one_sample_is_calibrated_and_checked_on_and_the_report_says_so() -> None:
    result = optimize(block(), block_feeds(1))
    assert any("one sample" in n for n in result.report.notes)


def test_every_sample_is_checked_even_if_no_plan_reads_it() -> None:
    """Weights need no ranges, so the broken sample would never be calibrated on; nor is it held out."""
    graph = "g (float[4,8] x) => (float[4,8] y) { y = MatMul (x, w) }"
    model = text(graph, {"w": np.eye(8, dtype=np.float32)})
    samples = [{"x": normal(i, 4, 8)} for i in range(8)]
    samples[1]["x"] = samples[1]["x"] * np.nan
    with pytest.raises(onnxcompress.errors.DataError, match="sample 1"):
        optimize(model, samples, passes=[Quantize(modes=("weights",))])


# --- pruning where nobody named it -------------------------------------------------------------


def test_pruning_takes_a_part_of_what_the_others_leave(done: Callable[[str], tuple[Path, Path, Result]]) -> None:
    """Half of a group at most, and only where the whole is then faster than without."""
    path, _, result = done("gen-cnn")
    cuts = [s for s in result.report.sites if s.pass_name == "prune_channels" and s.decision != KEEP]
    assert cuts
    for site in cuts:
        kept, _, size, _ = site.decision.split(maxsplit=3)
        assert 2 * int(kept) >= int(size)
    without = optimize(path, feeds("gen-cnn"), passes=[Quantize()])
    assert result.report.totals.predicted_ms[1] is not None
    assert without.report.totals.predicted_ms[1] is not None
    assert result.report.totals.predicted_ms[1] < 0.97 * without.report.totals.predicted_ms[1]


def test_pruning_is_not_tried_where_the_budget_is_used_up(
    done: Callable[[str], tuple[Path, Path, Result]],
) -> None:
    path, _, free = done("gen-cnn")
    alone = free.report.attempts[0]
    assert (alone.kind, alone.verdict) == ("quantize", "accepted")
    assert alone.min_sqnr_db is not None
    result = optimize(path, feeds("gen-cnn"), budget=Budget(min_sqnr_db=alone.min_sqnr_db - 0.5))
    reasons = [s.reason for s in result.report.sites if s.pass_name == "prune_channels"]
    assert any("of the accuracy budget: too little for this one" in r for r in reasons)
    assert all(reasons)
    assert not any(a.kind == "prune_channels" for a in result.report.attempts)
