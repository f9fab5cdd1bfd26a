"""factorize as a pass: what it offers and refuses, what it writes, and that prices tell what is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from models import TARGET, Array, Feeds, learn, made, normal, ops, run, text, wiring

import onnxcompress
from onnxcompress import model as models
from onnxcompress.base import Choice, Site, Skip, Skipped
from onnxcompress.errors import PassOptionError
from onnxcompress.passes.factorize import Factorize
from onnxcompress.registry import parse
from onnxcompress.report import Budget
from onnxcompress.sensitivity import measure_prices
from onnxcompress.sketch import drawn_model, redrawn
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import build
from onnxcompress.view import GraphView

ROWS, WIDE, RANK = 64, 80, 8
LINEAR = "g (float[R,64] x) => (float[R,80] y) { m = MatMul (x, w)  y = Add (m, b) }"
QKV = """g (float[R,64] x) => (float[R,80] q, float[R,80] k, float[R,96] v) {
  q = MatMul (x, wq)  k = MatMul (x, wk)  v0 = MatMul (x, wv)  v = Add (v0, bv) }"""


def low(seed: int, rows: int, columns: int, rank: int = RANK) -> Array:
    """A matrix of a rank."""
    return (normal(seed, rows, rank) @ normal(seed + 1, rank, columns) / rank).astype(np.float32)


def feeds(width: int = ROWS, count: int = 4, rows: int = 100) -> list[dict[str, Array]]:
    """Rows whose features depend on one another and are not about zero."""
    mix = normal(99, width, width) * np.geomspace(1, 0.02, width).astype(np.float32)[:, None]
    return [{"x": (normal(70 + i, rows, width) @ mix + 0.5).astype(np.float32)} for i in range(count)]


def named(body: str, weights: Mapping[str, Array]) -> ir.Model:
    """A model whose nodes are called like what they make."""
    model = text(body, weights)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def linear(weight: Array | None = None) -> ir.Model:
    return named(LINEAR, {"w": low(1, ROWS, WIDE) if weight is None else weight, "b": normal(3, WIDE)})


def joint() -> ir.Model:
    return named(QKV, {n: normal(s, ROWS, w) for s, (n, w) in enumerate((("wq", 80), ("wk", 80), ("wv", 96)), 5)} | {
        "bv": normal(9, 96)})  # fmt: skip


def offered(pass_: Factorize, model: ir.Model, target: Target = TARGET) -> dict[str, list[Choice]]:
    view = GraphView(model, shapes_of(model))
    sites = [s for s in pass_.sites(view) if isinstance(s, Site)]
    return {s.key: list(pass_.choices(s, view, target)) for s in sites}


def shapes_of(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {str(v.name): tuple(100 if not isinstance(d, int) else d for d in v.shape or ()) for v in
            (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))}  # fmt: skip


def error(before: ir.Model, after: ir.Model, data: Feeds, name: str = "y") -> float:
    """Energy of the difference over energy of the output."""
    pairs = [(run(before, f)[name].astype(np.float64), run(after, f)[name]) for f in data]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs))


# --- exact where the rank is true -------------------------------------------------------------

GEMMS: dict[str, tuple[str, tuple[int, ...] | None, bool, bool]] = {
    "plain": ("", (WIDE,), False, False),
    "no bias": ("", None, False, False),
    "transposed weight": ("<transB = 1>", (WIDE,), True, False),
    "transposed data": ("<transA = 1>", (WIDE,), False, True),
    "scaled": ("<alpha = 0.5, beta = 2.0>", (WIDE,), False, False),
    "one bias for all": ("", (1,), False, False),
    "a row of bias": ("", (1, WIDE), False, False),
    "a bias for each row": ("", (100, 1), False, False),
}


@pytest.mark.parametrize("name", GEMMS)
def test_a_gemm_of_true_rank_is_replaced_exactly(name: str) -> None:
    attributes, bias, transposed, flipped = GEMMS[name]
    weight = low(1, ROWS, WIDE)
    weights = {"w": weight.T.copy() if transposed else weight}
    if bias is not None:
        weights["b"] = normal(3, *bias)
    data = [{"x": f["x"].T.copy()} if flipped else f for f in feeds()]
    shape = "64,100" if flipped else "100,64"
    reads = "x, w, b" if bias is not None else "x, w"
    model = text(f"g (float[{shape}] x) => (float[100,80] y) {{ y = Gemm {attributes} ({reads}) }}", weights)
    after = made(Factorize(rank=RANK), model, f"svd {RANK}", data)
    assert models.weight_bytes(after) < models.weight_bytes(model) * 0.4
    assert error(model, after, data) < 1e-11


@pytest.mark.parametrize("aware", [True, False])
def test_a_matmul_of_true_rank_is_replaced_exactly(aware: bool) -> None:
    model, data = linear(), feeds()
    after = made(Factorize(rank=RANK, method="activation" if aware else "plain"), model, f"svd {RANK}", data)
    assert wiring(after) == wiring(
        text("""g (float[R,64] x, float[64,8] V, float[8,80] U, float[80] B) => (float[R,80] y) {
          z = MatMul (x, V)  m = MatMul (z, U)  y = Add (m, B) }""")
    )
    assert error(model, after, data) < 1e-11


def test_a_weight_on_the_left() -> None:
    model = text("g (float[2,64,7] x) => (float[2,80,7] y) { y = MatMul (w, x) }", {"w": low(1, WIDE, ROWS)})
    data = [{"x": normal(i, 2, 64, 7)} for i in range(3)]
    after = made(Factorize(rank=RANK), model, f"svd {RANK}", data)
    assert [n.inputs[0].name == "x" for n in after.graph] == [False, False]
    assert error(model, after, data) < 1e-11


def test_layers_that_read_the_same_share_one_factor() -> None:
    model, data = joint(), feeds()
    stacked = np.concatenate([low(20, ROWS, 256)], 1)
    for name, part in zip(("wq", "wk", "wv"), np.split(stacked, [80, 160], 1), strict=True):
        model.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(part), name=name)
    after = made(Factorize(rank=RANK, forms=("joint",)), model, f"joint {RANK}", data)
    assert ops(after).count("MatMul") == 4
    for name in ("q", "k", "v"):
        assert error(model, after, data, name) < 1e-11


# --- the best there is ------------------------------------------------------------------------


def analytic(weight: Array, data: Feeds, rank: int, *, centred: bool) -> float:
    """Least possible error of the output: singular values left out of W L, over all of them."""
    x = np.concatenate([f["x"] for f in data]).astype(np.float64)
    energy = float(((x @ weight + 0) ** 2).sum())
    x = x - x.mean(0) if centred else x
    values = np.linalg.svd(x @ weight, compute_uv=False)
    return float((values[rank:] ** 2).sum()) / energy


@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("centred", [True, False])
def test_the_error_is_the_analytic_optimum_and_plain_is_never_better(rank: int, centred: bool) -> None:
    weight, data = normal(1, ROWS, WIDE), feeds()
    body = LINEAR if centred else "g (float[R,64] x) => (float[R,80] m) { m = MatMul (x, w) }"
    model = text(body, {"w": weight, **({"b": normal(3, WIDE)} if centred else {})})
    name = "y" if centred else "m"
    scale = sum((run(model, f)[name].astype(np.float64) ** 2).sum() for f in data)
    energy = sum(((f["x"].astype(np.float64) @ weight) ** 2).sum() for f in data)
    aware = made(Factorize(rank=rank, ridge=0.0), model, f"svd {rank}", data)
    plain = made(Factorize(rank=rank, method="plain"), model, f"svd {rank}", data)
    best = analytic(weight, data, rank, centred=centred) * energy / scale
    assert error(model, aware, data, name) == pytest.approx(best, rel=1e-3)
    assert best <= error(model, plain, data, name) * (1 + 1e-6)


def test_a_bias_keeps_the_mean() -> None:
    model, data = linear(normal(1, ROWS, WIDE)), feeds()
    after = made(Factorize(rank=8), model, "svd 8", data)
    means = [np.concatenate([run(m, f)["y"] for f in data]).mean(0, dtype=np.float64) for m in (model, after)]
    assert means[1] == pytest.approx(means[0], abs=1e-4)


# --- what is offered --------------------------------------------------------------------------


def test_ranks_fall_and_save_weights() -> None:
    choices = offered(Factorize(), linear(), Target("any", channel_multiple=8))["m"]
    ranks = [int(c.name.split()[1]) for c in choices]
    assert ranks == sorted(ranks, reverse=True) and len(ranks) > 3
    assert all(r % 8 == 0 and r * (ROWS + WIDE) < ROWS * WIDE for r in ranks)
    assert [c.bytes_saved for c in choices] == [4 * (ROWS * WIDE - r * (ROWS + WIDE)) for r in ranks]


def test_joint_and_single_choices_exclude_one_another() -> None:
    found = offered(Factorize(), joint())
    (together,) = (cs for cs in found.values() if cs[0].name.startswith("joint"))
    assert all(set(c.removes) == {"q", "k", "v0"} and c.site.nodes == c.removes for c in together)
    assert {"q", "k", "v0"} < set(found)
    assert not any(c.removes for key in ("q", "k", "v0") for c in found[key])


def test_by_hand_layers_are_not_taken_together_unless_asked() -> None:
    assert set(offered(Factorize(keep=0.5), joint())) == {"q", "k", "v0"}
    assert len(offered(Factorize(keep=0.5, forms=("joint",)), joint())) == 1


def test_the_drawing_has_the_weights_and_shapes_of_what_is_built() -> None:
    model = joint()
    view = GraphView(model, shapes_of(model))
    for choices in offered(Factorize(), model).values():
        choice = choices[-1]
        drawing, known = drawn_model(choice.becomes, view, shapes_of(model))
        built = build(model, Factorize(), [choice], Evidence()).model
        before = drawn_model([redrawn(view.node(n)) for n in choice.site.nodes], view, shapes_of(model))[0]
        saved = models.weight_bytes(before) - models.weight_bytes(drawing)
        assert models.weight_bytes(model) - models.weight_bytes(built) == saved == choice.bytes_saved
        for node in choice.site.nodes:
            name = str(view.node(node).outputs[0].name)
            assert known[name] == shapes_of(model)[name]


def test_a_rank_of_its_own_for_a_layer() -> None:
    found = offered(Factorize(ranks=("q=8", "v0=16")), joint())
    assert {key: c[0].name for key, c in found.items()} == {"q": "svd 8", "v0": "svd 16"}
    found = offered(Factorize(ranks=("q=8",), rank=12), joint())
    assert {key: c[0].name for key, c in found.items()} == {"q": "svd 8", "k": "svd 12", "v0": "svd 12"}


def test_energy_finds_the_smallest_rank_that_keeps_it() -> None:
    model, data = linear(normal(1, ROWS, WIDE)), feeds()
    pass_ = Factorize(energy=0.99)
    view = GraphView(model)
    (site,) = (s for s in pass_.sites(view) if isinstance(s, Site))
    (choice,) = pass_.choices(site, view, TARGET)
    evidence = learn(pass_, model, data)
    built = build(model, pass_, [choice], evidence)
    rank = built.model.graph[0].inputs[1].shape[1]
    (instead,) = built.made
    assert instead.name == f"svd {rank}" and instead.bytes_saved == 4 * (ROWS * WIDE - rank * (ROWS + WIDE))
    (form,) = pass_._found(view)[0]["m"]
    lost = {r: form.factors((r,), evidence, pass_._settings).lost for r in (rank, rank - 1)}
    assert lost[rank] <= 0.01 < lost[rank - 1]
    assert built.told["m"].startswith("it keeps 0.99")


def test_a_share_of_all_weights_goes_where_least_is_lost(tmp_path: Path) -> None:
    path, data = deep(tmp_path), feeds(count=12)
    results = {}
    for together in ("true", "false"):
        results[together] = onnxcompress.optimize(
            path, calibration=data, passes=[parse(f"factorize{{keep=0.4,together={together},recover=false}}")],
            budget=Budget(min_sqnr_db=-99.0), timing=False,
        )  # fmt: skip
    report = results["true"].report
    fates = {s.key: (s.decision, s.reason) for s in report.sites if s.key in "ady"}
    assert fates["a"][0].startswith("svd") and fates["d"][0].startswith("svd")  # of hidden low rank
    assert fates["y"] == ("keep", "it would lose more than the other layers: all of its weights are kept")
    saved = sum(s.bytes_saved for s in report.sites)
    assert saved == models.weight_bytes(models.load(path)) - models.weight_bytes(results["true"].model)
    assert saved >= 0.6 * 4 * (64 * 512 + 512 * 512 + 512 * 64)
    better, worse = (results[k].report.totals.comparison.min_sqnr_db for k in ("true", "false"))
    assert better > worse + 10
    (done,) = (p for p in report.passes if p.name == "factorize")
    assert done.added is not None and done.added.weight_bytes == saved


# --- what is refused --------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Mapping[str, Array], str]] = {
    "no constant": ("g (float[9,64] x, float[64,80] w) => (float[9,80] y) { y = MatMul (x, w) }", {}, "constant"),
    "stacked": (
        "g (float[3,9,64] x) => (float[3,9,80] y) { y = MatMul (x, w) }", {"w": normal(1, 3, 64, 80)}, "3 dimensions"
    ),
    "few weights": ("g (float[9,8] x) => (float[9,8] y) { y = MatMul (x, w) }", {"w": normal(1, 8, 8)}, "too few"),
    "NaN": (
        "g (float[9,64] x) => (float[9,80] y) { y = MatMul (x, w) }",
        {"w": np.where(np.arange(80) == 3, np.nan, normal(1, 64, 80)).astype(np.float32)}, "NaN",
    ),
    "left operand of a Gemm": (
        "g (float[64,9] x) => (float[80,9] y) { y = Gemm (w, x) }", {"w": normal(1, 80, 64)}, "left operand"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_have_no_factors_say_why(name: str) -> None:
    body, weights, reason = REFUSED[name]
    (found,) = Factorize().sites(GraphView(text(body, weights)))
    assert isinstance(found, Skipped) and reason in found.reason


OPTIONS = {
    "rank=0": "choose 1 or more",
    "keep=1.0": "above 0 and below 1",
    "energy=0.0": "above 0 and below 1",
    "rank=4,keep=0.5": "more than one",
    "together=true": "which share",
    "ranks=[fc1]": "node=rank",
    "ranks=[fc1=0]": "node=rank",
    "multiple=0": "1 or more",
    "ridge=-1.0": "0 or more",
    "forms=[svdd]": "svd",
    "method=none": "method",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_make_no_sense(options: str) -> None:
    with pytest.raises(PassOptionError) as caught:
        parse(f"factorize{{{options}}}")
    assert OPTIONS[options] in f"{caught.value} {caught.value.hint}"


def test_a_rank_above_the_smaller_side_is_an_error_where_the_layer_is_named() -> None:
    with pytest.raises(PassOptionError, match=r"'m': rank 65 is above 64, the smaller side"):
        offered(Factorize(ranks=("m=65",)), linear())
    with pytest.raises(PassOptionError, match=r"'m': rank 60 has more weights than the layer"):
        offered(Factorize(ranks=("m=60",)), linear())
    with pytest.raises(Skip, match="no rank that is asked for saves weights"):
        offered(Factorize(rank=60), linear())


@pytest.mark.parametrize(
    ("layer", "why"),
    [("nobody", "there is no such node"), ("y", "Add has no low-rank form"), ("t", "has 64 weights")],
)
def test_a_layer_that_is_no_candidate_is_an_error(layer: str, why: str) -> None:
    body = """g (float[9,64] x, float[9,8] u) => (float[9,80] y, float[9,8] t) {
      m = MatMul (x, w)  y = Add (m, b)  t = MatMul (u, v) }"""
    model = named(body, {"w": normal(1, 64, 80), "b": normal(2, 80), "v": normal(3, 8, 8)})
    for pass_ in (Factorize(rank=4, layers=(layer,)), Factorize(ranks=(f"{layer}=4",))):
        with pytest.raises(PassOptionError, match=f"{layer!r}: .*{why}"):
            list(pass_.sites(GraphView(model)))


def test_few_rows_and_no_rows_are_said() -> None:
    model = linear(normal(1, ROWS, WIDE))
    for data, said in (([{"x": normal(1, 30, ROWS)}], "30 rows were seen for 64 inputs"), ([], "plain: nothing was")):
        pass_ = Factorize(rank=16)
        view = GraphView(model)
        (site,) = (s for s in pass_.sites(view) if isinstance(s, Site))
        evidence = learn(pass_, model, data) if data else Evidence(synthetic=True)
        built = build(model, pass_, pass_.choices(site, view, TARGET), evidence)
        assert said in built.told["m"]
        assert np.isfinite(run(built.model, feeds()[0])["y"]).all()


# --- prices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["q", "v0", "q + k + v0"])
def test_a_switch_does_what_building_does(key: str) -> None:
    model, data, pass_ = joint(), feeds(), Factorize()
    evidence = learn(pass_, model, data)
    for choice in offered(pass_, model)[key][::3]:
        prices = measure_prices(
            pass_, model, choice.terms, evidence, TARGET, data, ("q", "k", "v"), budget=1e-9
        )  # fmt: skip
        after = build(model, pass_, [choice], evidence).model
        worst = max(error(model, after, data, name) for name in ("q", "k", "v"))
        assert prices.terms[choice.terms[0]] == pytest.approx(worst, rel=1e-3)


def test_sizes_of_losses_stand_for_their_prices() -> None:
    """For a layer whose output is the model's, the share lost is the price."""
    model, data, pass_ = joint(), feeds(), Factorize()
    evidence = learn(pass_, model, data)
    terms = [c.terms[0] for c in offered(pass_, model)["q"]]
    prices = measure_prices(pass_, model, terms, evidence, TARGET, data, ("q", "k", "v"), budget=1e-12).terms
    found = [pass_.relative(t, evidence) for t in terms]
    assert len({f[0] for f in found if f is not None}) == 1
    assert [f[1] for f in found if f is not None] == pytest.approx([prices[t] for t in terms], rel=1e-3)


# --- the whole way ----------------------------------------------------------------------------


def deep(tmp_path: Path) -> Path:
    """Layers of hidden low rank between others of full rank."""
    body = """g (float[R,64] x) => (float[R,64] y) {
      a = MatMul (x, w1)  b = Add (a, b1)  c = Relu (b)
      d = MatMul (c, w2)  e = Add (d, b2)  f = Relu (e)  y = MatMul (f, w3) }"""
    noise = 1e-3
    weights = {
        "w1": low(1, 64, 512, 12) + noise * normal(11, 64, 512), "b1": normal(2, 512),
        "w2": low(3, 512, 512, 12) + noise * normal(12, 512, 512), "b2": normal(4, 512), "w3": normal(5, 512, 64),
    }  # fmt: skip
    path = tmp_path / "deep.onnx"
    models.save(named(body, weights), path)
    return path


def test_planned_ranks_hold_the_budget_and_repeat(tmp_path: Path) -> None:
    path, data = deep(tmp_path), feeds(count=12)
    files = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.onnx"
        result = onnxcompress.optimize(
            path, calibration=data, passes=[Factorize()], budget=Budget(min_sqnr_db=30.0), timing=False, output=out
        )
        files.append(out.read_bytes())
    assert files[0] == files[1]
    report = result.report
    (done,) = (p for p in report.passes if p.name == "factorize")
    assert done.outcome == "applied" and done.added is not None
    assert done.added.min_sqnr_db >= 30 and done.added.predicted_ms > 0
    assert done.added.weight_bytes == sum(s.bytes_saved for s in report.sites if s.decision != "keep")
    assert report.totals.comparison.min_sqnr_db >= 29.9
    assert len(files[0]) < 0.5 * path.stat().st_size


def test_factors_are_quantized_and_the_report_says_what_each_pass_added(tmp_path: Path) -> None:
    path, data = deep(tmp_path), feeds(count=12)
    result = onnxcompress.optimize(
        path, calibration=data, passes=[parse("factorize{keep=0.3,layers=[a,d]}"), parse("quantize")],
        budget=Budget(min_sqnr_db=15.0), timing=False,
    )  # fmt: skip
    added = {p.name: p.added for p in result.report.passes if p.added is not None}
    assert set(added) == {"factorize", "quantize"}
    assert added["factorize"].min_sqnr_db >= added["quantize"].min_sqnr_db
    view = GraphView(result.model)
    for node in view.nodes("MatMul"):
        producer = node.inputs[1].producer()
        assert producer is not None and producer.op_type == "DequantizeLinear"  # both factors are integers
    assert added["quantize"].weight_bytes > 0 and added["factorize"].weight_bytes > 0


def test_no_data_means_plain_factors_by_hand_and_none_planned(tmp_path: Path) -> None:
    path = deep(tmp_path)
    by_hand = onnxcompress.optimize(path, passes=[Factorize(keep=0.3)], budget=Budget(min_sqnr_db=-99.0), timing=False)
    reasons = {s.reason for s in by_hand.report.sites if s.decision != "keep"}
    assert reasons == {"plain: nothing was observed of what it reads"}
    planned = onnxcompress.optimize(path, passes=[Factorize()], timing=False)
    assert all(s.decision == "keep" for s in planned.report.sites)


def test_a_pruned_group_is_factored_and_then_quantized(tmp_path: Path) -> None:
    path, data = deep(tmp_path), feeds(count=12)
    result = onnxcompress.optimize(
        path, calibration=data, budget=Budget(min_sqnr_db=5.0), timing=False,
        passes=[parse("quantize"), parse("factorize{keep=0.3,layers=[a,d]}"), parse("prune_channels{ratio=0.25}")],
    )  # fmt: skip
    added = [(p.name, p.added) for p in result.report.passes if p.added is not None]
    assert [name for name, _ in added] == ["prune_channels", "factorize", "quantize"]
    assert sum(a.weight_bytes for _, a in added if a is not None) == models.weight_bytes(
        models.load(path)
    ) - models.weight_bytes(result.model)
    assert sum("MatMul" in n.op_type or "Gemm" in n.op_type for n in result.model.graph) == 5  # 3, two of them in two
