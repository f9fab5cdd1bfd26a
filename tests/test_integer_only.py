"""Devices that run integers only: all of the model is integer, or the report says what is not and why.

The form on a device's own operators (Relu, Tanh, Sub, ...) is a pair around a node that onnxruntime computes in
float, so the error of such a node is that of rounding what it reads and what it makes: half a step each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import Array, learn, made, normal, ops, run, text

import onnxcompress
from onnxcompress import Budget, Result
from onnxcompress.base import Choice, Precision, Site, Skip, Skipped, Term
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.errors import OnnxCompressError
from onnxcompress.execution import Execution
from onnxcompress.objective import Rates
from onnxcompress.passes.quantize import Quantize
from onnxcompress.planner import Option, Plan, Question, solve
from onnxcompress.profile import Profile, list_profiles, load_profile
from onnxcompress.questions import ask, offers
from onnxcompress.report import OnDevice
from onnxcompress.search import Checked, Search
from onnxcompress.sensitivity import Prices
from onnxcompress.statistics import Evidence, RangeMethod
from onnxcompress.suitability import stranded
from onnxcompress.target import Target
from onnxcompress.view import GraphView

INTEGERS = "edge-tpu"
EXACT = Quantize(ranges=RangeMethod.MINMAX)

NET = """g (float[1, 4, 16, 16] x) => (float[1, 5] y) {
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
  c = Conv <pads = [1, 1, 1, 1]> (p, w1, b1)  r = Relu (c)
  t = Tanh (c)  s = Sub (r, t)
  d = Conv <pads = [1, 1, 1, 1], group = 8> (s, w2)
  a = Add (d, s)  g = GlobalAveragePool (a)  f = Flatten (g)
  y = Gemm (f, w3, b3)
}"""
"""A MaxPool on the input, an activation that is not fused for its producer has two readers, a depthwise product."""


def net(body: str = NET) -> ir.Model:
    weights = {"w1": normal(0, 8, 4, 3, 3), "b1": normal(1, 8), "w2": normal(2, 8, 1, 3, 3), "w3": normal(3, 8, 5)}
    return text(body, {**weights, "b3": normal(4, 5)})


def feeds(count: int = 16, shape: Sequence[int] = (1, 4, 16, 16)) -> list[dict[str, Array]]:
    return [{"x": normal(100 + i, *shape)} for i in range(count)]


def optimize(model: ir.Model, profile: str | Profile = INTEGERS, calibration: Any = None, **options: Any) -> Result:
    samples = feeds() if calibration is None else calibration or None
    return onnxcompress.optimize(model, profile=profile, calibration=samples, timing=False, **options)


def device(result: Result) -> OnDevice:
    assert result.report.on_device is not None
    return result.report.on_device


def floats(model: ir.Model) -> list[str]:
    """Operator types of nodes that read or make a value which is in no QuantizeLinear/DequantizeLinear pair."""
    found = []
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        makers = [v.producer() for v in node.inputs[:1] if v is not None]
        reads = all(m is not None and m.op_type == "DequantizeLinear" for m in makers)
        readers = [use.node.op_type for v in node.outputs for use in v.uses()]
        fused = readers in (["Relu"], ["Clip"]) or node.op_type in ("Relu", "Clip")
        if not fused and not (reads and readers and set(readers) == {"QuantizeLinear"}):
            found.append(node.op_type)
    return found


def sqnr(model: ir.Model, other: ir.Model, samples: Sequence[dict[str, Array]]) -> float:
    signal = noise = 0.0
    for feed in samples:
        for name, value in run(model, feed).items():
            signal += float(np.sum(value.astype(np.float64) ** 2))
            noise += float(np.sum((value.astype(np.float64) - run(other, feed)[name]) ** 2))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


# --- all of it is integer ------------------------------------------------------------------------


def test_all_of_a_model_becomes_integer_though_the_float_one_has_no_price() -> None:
    model = net()
    result = optimize(model)
    assert not floats(result.model)
    assert floats(model)  # the check can fail
    assert "Cast" not in ops(result.model)
    assert device(result).runs and not device(result).cannot_run
    assert {s.decision for s in result.report.sites if s.pass_name == "quantize"} == {"static"}
    assert not result.report.warnings
    found = sqnr(model, result.model, feeds()[3::4])
    assert found >= 20
    assert result.report.totals.comparison.min_sqnr_db == pytest.approx(found, abs=0.5)


def test_what_does_not_run_has_no_time() -> None:
    totals = optimize(net()).report.totals
    before, after = totals.predicted_ms
    assert before is None and after is not None and after > 0


def test_elsewhere_float_stays_a_choice() -> None:
    report = optimize(net(), "cortex-a53").report
    assert report.on_device is None and None not in report.totals.predicted_ms
    assert {s.decision for s in report.sites} >= {"keep"}


def test_no_time_is_claimed_to_be_saved_against_float() -> None:
    assert {s.gain_ms for s in optimize(net()).report.sites} == {0.0}


def test_by_hand_it_is_the_same() -> None:
    assert not floats(optimize(net(), passes=[Quantize()]).model)


# --- operators of other runtimes -------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Relu", "Tanh", "HardSwish", "HardSigmoid", "Elu", "ReduceMean"])
def test_an_operator_of_the_device_is_offered_there_only(op: str) -> None:
    view = GraphView(text(f"g (float[2, 4] x) => (float[2, 4] y) {{ y = {op} (x) }}".replace("2, 4] y", "a, b] y")))
    (site,) = Quantize().sites(view)
    assert isinstance(site, Site)
    with pytest.raises(Skip, match=f"no int8 kernel for {op}$"):
        list(Quantize().choices(site, view, Target("plain")))
    able = Target("able", kernels=frozenset({(op, Precision.STATIC)}))
    assert [c.name for c in Quantize().choices(site, view, able)] == ["static"]


SUB = "g (float[1, 4, 6] a, float[1, 4, 6] b) => (float[1, 4, 6] y) { y = Sub (a, b) }"


def test_error_of_a_difference_is_half_a_step_each() -> None:
    model, feed = text(SUB), {"a": normal(1, 1, 4, 6), "b": 3 * normal(2, 1, 4, 6)}
    after = made(EXACT, model, "static", [feed], Target("able", kernels=frozenset({("Sub", Precision.STATIC)})))
    assert ops(after).count("QuantizeLinear") == 3 == ops(after).count("DequantizeLinear")
    steps = {n: float(v.const_value.numpy()) for n, v in after.graph.initializers.items() if n.endswith("_scale")}  # type: ignore[union-attr]
    assert len(steps) == 3
    difference = np.abs(run(model, feed)["y"] - run(after, feed)["y"])
    bound = sum(steps.values()) / 2
    assert difference.max() <= bound * (1 + 1e-5)
    assert difference.max() > bound / 20  # it did round


def test_a_linear_resize_is_integer_where_the_device_has_one() -> None:
    body = """g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) {
                y = Resize <mode = "linear"> (x, , scales) }"""
    model = text(body, {"scales": np.asarray([1, 1, 2, 2], np.float32)})
    view = GraphView(model)
    (site,) = Quantize().sites(view)
    assert isinstance(site, Site)
    with pytest.raises(Skip, match="nearest"):
        list(Quantize().choices(site, view, Target("plain")))
    able = Target("able", kernels=frozenset({("resize_linear", Precision.STATIC)}))
    after = made(EXACT, model, "static", [{"x": normal(5, 1, 2, 4, 4)}], able)
    assert not floats(after)


def test_a_computed_shape_does_not_make_a_reshape_float() -> None:
    body = """g (float[n, 4, 2] x) => (float[n, 8] y) {
                s = Shape (x)  n = Gather <axis = 0> (s, zero)  one = Unsqueeze (n, axes)
                shape = Concat <axis = 0> (one, rest)  y = Reshape (x, shape) }"""
    scalars = {"zero": np.asarray(0), "axes": np.asarray([0]), "rest": np.asarray([-1])}
    model = text(body, scalars)
    feed = {"x": normal(6, 3, 4, 2)}
    after = made(EXACT, model, "static", [feed])
    view, profile = GraphView(after), load_profile("cortex-m85")
    execution = Execution(profile, view, value_shapes(after, feed))
    assert {n.op_type for n in execution.integer} == {"Reshape"}
    assert not stranded(view, profile, value_shapes(after, feed))  # and the shape of floats is no float


# --- what cannot be integer -------------------------------------------------------------------------


def test_a_node_without_an_integer_form_is_named() -> None:
    body = NET.replace("t = Tanh (c)", "e = Erf (c)  t = Tanh (e)")
    result = optimize(net(body))
    found = device(result)
    assert not found.runs and [(s.op, s.reason) for s in found.cannot_run] == [("Erf", "the device does not run Erf")]
    (warning,) = result.report.warnings
    assert warning.startswith("not fully integer: edge-tpu cannot run 1 of ")
    assert f"1 Erf: {found.cannot_run[0].node!r}" in warning and "host CPU" in warning and "another profile" in warning
    assert result.report.totals.predicted_ms[1] is None and found.predicted_ms > 0
    document = json.loads(result.report.to_json())["on_device"]
    assert document["runs"] is False and document["cannot_run"][0]["op"] == "Erf"
    assert sqnr(net(body), result.model, feeds()[3::4]) >= 20


def test_the_reason_a_node_was_left_float_is_told() -> None:
    body = "g (float[1, 32, 32] x, float[1, 32, 32] z) => (float[1, 32, 32] y) { r = Relu (x)  y = MatMul (r, z) }"
    samples = [{"x": normal(i, 1, 32, 32), "z": normal(50 + i, 1, 32, 32)} for i in range(8)]
    found = device(optimize(text(body), calibration=samples))
    assert [(s.op, s.reason) for s in found.cannot_run] == [("MatMul", "its weight is not a float32 constant")]


def test_dynamic_dimensions_leave_work_no_such_device_does() -> None:
    body = """g (float[n, 4, 2] x) => (float[n, 8] y) {
                r = Relu (x)  s = Shape (x)  n = Gather <axis = 0> (s, zero)  one = Unsqueeze (n, axes)
                shape = Concat <axis = 0> (one, rest)  y = Reshape (r, shape) }"""
    scalars = {"zero": np.asarray(0), "axes": np.asarray([0]), "rest": np.asarray([-1])}
    result = optimize(text(body, scalars), calibration=feeds(8, (2, 4, 2)))
    assert {s.op for s in device(result).cannot_run} == {"Shape", "Gather"}
    assert any("dynamic dimensions" in w and "fixed" in w for w in result.report.warnings)


def test_without_data_it_says_what_is_missing() -> None:
    result = optimize(net(), calibration=[])
    assert "QuantizeLinear" not in ops(result.model)
    assert not device(result).runs
    assert any("give calibration data" in w and "integers only" in w for w in result.report.warnings)


# --- the budget holds ---------------------------------------------------------------------------------


def test_a_budget_out_of_reach_leaves_the_model_and_tells_how_close_it_came() -> None:
    model = net()
    result = optimize(model, budget=Budget(min_sqnr_db=90.0))
    report = result.report
    assert "QuantizeLinear" not in ops(result.model) and report.outcome.startswith("nothing could be made integer")
    assert sqnr(model, result.model, feeds()[:2]) > 100
    reached = [a.min_sqnr_db for a in report.attempts]
    assert len(reached) == 1 + len(list(Quantize().gentler()))  # gentler settings were tried, and each but once
    best = max(s for s in reached if s is not None)
    told = [w for w in report.warnings if w.startswith("the all-integer model was built and not kept")]
    assert len(told) == 1 and f"worst output at {best:.1f} dB, 90.0 dB asked for" in told[0]
    assert report.totals.predicted_ms == (None, None) and not device(result).runs


def test_gentler_settings_are_tried_where_there_is_no_other_way() -> None:
    plain = optimize(net()).report
    assert [a.verdict for a in plain.attempts] == ["accepted"]
    first = plain.attempts[0].min_sqnr_db
    everything = optimize(net(), budget=Budget(min_sqnr_db=90.0)).report
    best = max(a.min_sqnr_db or 0.0 for a in everything.attempts)
    assert first is not None and best > first + 0.1
    result = optimize(net(), budget=Budget(min_sqnr_db=(best + first) / 2))
    assert [a.verdict == "accepted" for a in result.report.attempts][-1] and not floats(result.model)
    assert len(result.report.attempts) > 1
    (row,) = [p for p in result.report.passes if p.name == "quantize"]
    assert row.outcome == "applied" and row.options["bias_correction"] is True


def test_gentler_settings_end() -> None:
    ways = list(Quantize().gentler())
    assert ways and all(w.bias_correction for w in ways)
    assert list(ways[-1].gentler()) == []


# --- the plan ------------------------------------------------------------------------------------------


def question(key: str, seconds: float, *options: float, must: bool) -> Question:
    site = Site(key, (key,))
    made_of = [
        Option(Choice(site, f"int8-{i}", Precision.STATIC, terms=(Term("t", f"{key}{i}"),)), s)
        for i, s in enumerate(options)
    ]
    return Question(site, seconds, tuple(made_of), must)


def planned(questions: Sequence[Question], prices: dict[str, float], budget: float | None) -> Plan | None:
    priced = {Term("t", name): price for name, price in prices.items()}
    return solve(questions, {}, priced, budget=budget, rates=Rates())


def test_what_must_change_does_though_it_is_slower() -> None:
    found = planned([question("a", 0.0, 5.0, 7.0, must=True), question("b", 1.0, 5.0, must=False)], {}, None)
    assert found is not None
    assert {k: c.name for k, c in found.choices.items()} == {"a": "int8-0"}
    assert found.seconds == 6.0 and found.gains == {}


def test_a_quieter_form_is_taken_where_staying_is_no_choice() -> None:
    found = planned([question("a", 0.0, 5.0, 7.0, must=True)], {"a0": 1.0, "a1": 0.1}, 0.5)
    assert found is not None and found.choices["a"].name == "int8-1"


def test_no_plan_where_what_must_change_is_too_noisy() -> None:
    assert planned([question("a", 0.0, 5.0, must=True)], {"a0": 1.0}, 0.5) is None
    both = [question(k, 0.0, 5.0, must=True) for k in "ab"]
    assert planned(both, {"a0": 0.3, "b0": 0.3}, 0.5) is None
    free = [question(k, 9.0, 5.0, must=False) for k in "ab"]
    assert planned(free, {"a0": 0.3, "b0": 0.3}, 0.5) is not None


def test_a_site_all_of_whose_forms_are_gone_stays() -> None:
    found = planned([question("a", 0.0, must=True), question("b", 0.0, 5.0, must=True)], {}, None)
    assert found is not None and set(found.choices) == {"b"}


def test_nothing_is_priced_where_nothing_could_differ() -> None:
    model = net()
    view = GraphView(model)
    profile = load_profile(INTEGERS)
    offer = offers(EXACT, view, profile.target(), synthetic=False)
    shapes = value_shapes(model, feeds(1)[0])
    questions, values, missing = ask(offer, view, CostModel(profile), shapes, lambda c: None, integers_only=True)
    assert all(q.must and {o.choice.name for o in q.options} == {"static"} for q in questions)
    assert list(missing.values()) == ["the profile has no dynamic kernel for this Gemm"]
    evidence = learn(EXACT, model, feeds(4), profile.target())

    def price(terms: Sequence[Term], found: Evidence, samples: int) -> Prices:
        raise OnnxCompressError("nobody needs to know")

    search = Search(
        model, EXACT, questions, values, 1.0, Rates(), lambda c: evidence, price, lambda m: Checked(3.0, None, "3.0 dB")
    )
    found = search.run()
    assert found.built is None and found.problem == "3.0 dB" and len(search.attempts) == 1


# --- what is stored, and what fits -----------------------------------------------------------------------


def test_stored_weights_are_offered_only_where_constants_are_folded() -> None:
    model = text("g (float[2, 64] x) => (float[2, 64] y) { y = MatMul (x, w) }", {"w": normal(0, 64, 64)})
    folds = Target("folds")
    for target, stored in ((folds, True), (replace(folds, folds_constants=False), False)):
        (choices,) = offers(Quantize(), GraphView(model), target, synthetic=False).choices.values()
        assert ("weights" in {c.name for c in choices}) is stored


def test_why_weights_are_not_stored_is_told() -> None:
    body = "g (float[2, 4, 4] x) => (float[2, 4, 4] y) { y = ConvTranspose <kernel_shape = [1]> (x, w) }"
    view = GraphView(text(body, {"w": normal(0, 4, 4, 1)}))
    offer = offers(Quantize(min_weights=1), view, Target("t", folds_constants=False), synthetic=False)
    assert not offer.choices
    (skipped,) = offer.skipped
    assert isinstance(skipped, Skipped) and "multiplied out in every run" in skipped.reason


@pytest.mark.parametrize("name", list_profiles())
def test_only_onnxruntime_is_said_to_fold_constants(name: str) -> None:
    profile = load_profile(name)
    assert profile.runtime.folds_constants == profile.runtime.name.startswith("onnxruntime")
    assert profile.target().folds_constants == profile.runtime.folds_constants


def limited(flash: int, ram: int) -> Profile:
    profile = load_profile("cortex-m7")
    assert profile.limits is not None
    limits = profile.limits.model_copy(update={"flash_bytes": flash, "ram_bytes": ram})
    return profile.model_copy(update={"limits": limits})


def test_limits_are_stated_and_what_exceeds_them_is_a_warning() -> None:
    fits = optimize(net(), limited(10**6, 10**6))
    assert not fits.report.warnings
    assert any("the file takes" in n and "1 MB of flash" in n for n in fits.report.notes)
    assert any("activations take at most" in n and "1 MB of RAM" in n for n in fits.report.notes)
    found = device(fits)
    assert found.file_bytes == fits.report.totals.file_bytes[1] and found.flash_bytes == 10**6
    too_large = optimize(net(), limited(found.file_bytes - 1, found.peak_activation_bytes - 1))
    assert len([w for w in too_large.report.warnings if w.startswith("it does not fit")]) == 2
    just = optimize(net(), limited(found.file_bytes, found.peak_activation_bytes))
    assert not just.report.warnings


def test_integers_take_less_room_than_floats() -> None:
    model = text("g (float[1, 4, 16, 16] x) => (float[1, 4, 16, 16] y) { a = Relu (x)  b = Tanh (a)  y = Relu (b) }")
    result = optimize(model)
    size = 4 * 16 * 16
    assert device(result).peak_activation_bytes == 4 * size + size  # the float input and its integers
