"""Connection pruning: how many weights become zero, which, and what that loses; and that nothing gets faster by it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from models import TARGET, Array, learn, made, normal, ops, run, text

import onnxcompress
from onnxcompress.base import Site, Skipped
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.errors import PassError, PassOptionError
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.passes._linear_maps import linear_maps
from onnxcompress.passes._sparse import Zeros, reconstruct, zero
from onnxcompress.passes.prune_connections import Method, PruneConnections
from onnxcompress.questions import offers
from onnxcompress.registry import available, create, parse
from onnxcompress.report import Budget
from onnxcompress.view import GraphView

SMALL = {"min_weights": 0, "min_inputs": 0}
HALF = PruneConnections(min_weights=0, min_inputs=0)
PAIRS = PruneConnections(pattern="2:4", min_weights=0, min_inputs=0)


def mixed(seed: int, n: int, rows: int = 512) -> Array:
    """Rows of features that depend on one another and differ in size."""
    noise = np.random.default_rng(seed)
    return (noise.standard_normal((rows, n)) @ normal(99, n, n) * np.exp(normal(98, n))).astype(np.float32)


def weight(model: ir.Model, node: str, index: int = 1) -> Array:
    value = model.graph.node(node).inputs[index]
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def named(body: str, weights: Mapping[str, Array]) -> ir.Model:
    """A model whose nodes are called like what they make."""
    model = text(body, weights)
    for node in model.graph.all_nodes():
        node.name = node.outputs[0].name
    return model


def reasons(pass_: PruneConnections, model: ir.Model) -> dict[str, str]:
    return {s.key: s.reason for s in pass_.sites(GraphView(model)) if isinstance(s, Skipped)}


# --- the algorithm ---------------------------------------------------------------------------------


def test_a_share_is_exact_and_ties_go_to_the_first() -> None:
    assert (zero(normal(0, 7, 11), Zeros(0.3)) == 0).sum() == round(0.3 * 77)
    assert zero(np.ones((1, 6)), Zeros(0.5)).tolist() == [[0, 0, 0, 1, 1, 1]]
    assert zero(np.ones((1, 6)), Zeros(kept=1, group=3)).tolist() == [[0, 0, 1, 0, 0, 1]]


def test_of_each_group_the_largest_stay() -> None:
    old = normal(1, 6, 12).astype(np.float64)
    for row, new in zip(old.reshape(-1, 4), zero(old, Zeros(kept=2, group=4)).reshape(-1, 4), strict=True):
        assert set(np.flatnonzero(new)) == set(np.argsort(np.abs(row))[2:])


def test_a_weight_that_reads_little_goes_before_a_smaller_one() -> None:
    old = np.array([[1.0, 2.0]])
    assert zero(old, Zeros(0.5), np.array([9.0, 1.0])).tolist() == [[1.0, 0.0]]
    assert zero(old, Zeros(0.5)).tolist() == [[0.0, 2.0]]


def loss(old: Array, new: Array, moments: Array) -> float:
    return float(np.vdot((old - new) @ moments, old - new) / np.vdot(old @ moments, old))


@pytest.mark.parametrize("zeros", [Zeros(0.3), Zeros(0.6), Zeros(kept=2, group=4), Zeros(kept=1, group=8)])
def test_reconstruction_loses_less_than_activation_and_that_less_than_magnitude(zeros: Zeros) -> None:
    x = mixed(0, 160).astype(np.float64)
    moments, old = x.T @ x / len(x), normal(2, 24, 160).astype(np.float64)
    blind, aware = zero(old, zeros), zero(old, zeros, np.diagonal(moments))
    fitted = reconstruct(old, moments, zeros)
    assert loss(old, fitted, moments) < loss(old, aware, moments) < loss(old, blind, moments)
    share = 1 - zeros.kept / zeros.group if zeros.group else zeros.share
    assert np.mean(fitted == 0) == pytest.approx(share, abs=2 / old.size * 24)
    if zeros.group:
        assert (np.count_nonzero(fitted.reshape(-1, zeros.group), axis=1) == zeros.kept).all()


def test_one_zero_is_made_up_for_as_brain_surgeon_says() -> None:
    """Of n features one goes, the last columns compensate: w + e_j correction of the damped problem, by brute force."""
    x = mixed(3, 5).astype(np.float64)
    moments, old = x.T @ x / len(x), normal(4, 1, 5).astype(np.float64)
    new = reconstruct(old, moments, Zeros(0.2))
    (gone,) = np.flatnonzero(new[0] == 0)
    power = np.diagonal(moments)
    damped = moments + np.diag(0.1 * np.sqrt(power * power.mean()))
    later = np.arange(gone + 1, 5)
    expected = old.copy()
    expected[0, gone] = 0
    if later.size:
        fit = np.linalg.solve(damped[np.ix_(later, later)], damped[later, gone])
        expected[0, later] += old[0, gone] * fit
    np.testing.assert_allclose(new, expected, rtol=1e-9, atol=1e-12)


def test_features_never_seen_are_zero_and_harm_nobody() -> None:
    x = mixed(5, 12).astype(np.float64)
    x[:, 3] = 0
    moments, old = x.T @ x / len(x), normal(6, 8, 12).astype(np.float64)
    new = reconstruct(old, moments, Zeros(0.25))
    assert not new[:, 3].any() and np.isfinite(new).all()
    assert not reconstruct(old, np.zeros((12, 12)), Zeros(0.5)).any()
    with pytest.raises(PassError, match=r"\(11, 11\) do not go with 12 columns"):
        reconstruct(old, moments[:11, :11], Zeros(0.5))


# --- weights as maps -------------------------------------------------------------------------------

CASES = {
    "conv": ("y = Conv <pads = [1,0,1,0], strides = [2,1]> (x, w)", (6, 8, 3, 3), (2, 8, 7, 6)),
    "pointwise": ("y = Conv (x, w)", (6, 8, 1, 1), (2, 8, 5, 5)),
    "grouped": ("y = Conv <group = 2> (x, w)", (6, 4, 3, 3), (2, 8, 5, 5)),
    "conv1d": ("y = Conv <dilations = [2]> (x, w)", (6, 8, 3), (2, 8, 9)),
    "gemm": ("y = Gemm (x, w)", (8, 6), (9, 8)),
    "gemm_b": ("y = Gemm <transB = 1> (x, w)", (6, 8), (9, 8)),
    "gemm_a": ("y = Gemm <transA = 1> (x, w)", (8, 6), (8, 9)),
    "matmul": ("y = MatMul (x, w)", (8, 6), (2, 5, 8)),
    "batched": ("y = MatMul (x, w)", (3, 8, 6), (3, 5, 8)),
    "lstm": ("y = LSTM <hidden_size = 4, direction = \"bidirectional\"> (x, w, r)", (2, 16, 8), (7, 2, 8)),
    "gru": ("y = GRU <hidden_size = 4> (x, w, r)", (1, 12, 8), (7, 2, 8)),
}  # fmt: skip


def case(name: str) -> tuple[ir.Model, dict[str, Array]]:
    line, shape, fed = CASES[name]
    weights = {"w": normal(10, *shape)}
    if "r)" in line:
        weights["r"] = normal(11, *shape[:2], 4)
    dims = ",".join(map(str, fed))
    rank = 4 if "r)" in line else max(len(fed), len(shape) if "MatMul" in line else 0)
    free = ",".join("abcd"[:rank])
    model = named(f"g (float[{dims}] x) => (float[{free}] y) {{ {line} }}", weights)
    return model, {"x": normal(12, *fed)}


@pytest.mark.parametrize("name", CASES)
def test_a_weight_comes_back_from_its_maps(name: str) -> None:
    model, _ = case(name)
    view = GraphView(model)
    for linear in linear_maps(view.node("y"), view):
        old = weight(model, "y", linear.index)
        np.testing.assert_array_equal(linear.weight(linear.maps(old)), old)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("lstm", "gru")])
def test_moments_are_of_what_the_maps_read(name: str) -> None:
    """The energy of the outputs, from maps and moments alone, is the energy that a run shows."""
    model, feed = case(name)
    view = GraphView(model)
    (linear,) = linear_maps(view.node("y"), view)
    needs = [n for n in (linear.gram, linear.power) if n is not None]
    evidence = calibrate(model, needs, open_data([feed], model), shapes=False)
    power = linear.channel_power(evidence)
    if name != "batched":
        assert power is not None
        np.broadcast_shapes(power.shape, linear.maps(weight(model, "y")).shape)
    moments = linear.moments(evidence)
    if name == "batched":
        assert moments is None
        return
    assert moments is not None
    if linear.rows == 1:
        maps = linear.maps(weight(model, "y"))
        energy = sum(float(np.vdot(m @ s.matrix, m)) for m, s in zip(maps, moments, strict=True))
        y = run(model, feed)["y"].astype(np.float64)
        assert energy == pytest.approx(float(np.square(y).sum()) / (y.size / (maps.shape[0] * maps.shape[1])), rel=1e-4)


@pytest.mark.parametrize(("name", "method"), list(itertools.product(CASES, Method)))
def test_half_of_every_kind_of_weight(name: str, method: Method) -> None:
    model, feed = case(name)
    after = made(PruneConnections(method=method, **SMALL), model, "50% zeros", [feed])
    assert ops(after) == ops(model)
    for index in (1, 2) if "r)" in CASES[name][0] else (1,):
        old, new = weight(model, "y", index), weight(after, "y", index)
        assert new.shape == old.shape and np.mean(new == 0) == pytest.approx(0.5, abs=0.02)
    assert run(after, feed)["y"].shape == run(model, feed)["y"].shape


@pytest.mark.parametrize("name", CASES)
def test_two_of_four_along_the_input(name: str) -> None:
    model, feed = case(name)
    after = made(PAIRS, model, "2:4 zeros", [feed])
    new = weight(after, "y")
    axis = {"gemm": 0, "gemm_a": 0, "matmul": 0, "batched": 1, "lstm": 2, "gru": 2}.get(name, 1)
    assert (np.count_nonzero(np.moveaxis(new, axis, -1).reshape(-1, 4), axis=1) == 2).all()


# --- at a node -------------------------------------------------------------------------------------

BIASED = "g (float[n,16] x) => (float[n,8] y) { y = Gemm <alpha = 2.0, beta = 0.5> (x, w, b) }"
GEMM = {"w": normal(20, 16, 8), "b": normal(21, 8)}


def shifted() -> list[dict[str, Array]]:
    return [{"x": mixed(30 + i, 16, 64) + 5} for i in range(4)]


@pytest.mark.parametrize(
    ("body", "weights", "axes"),
    [
        (BIASED, GEMM, (0,)),
        ("g (float[n,16] x) => (float[n,8] y) { y = Gemm (x, w) }", {"w": GEMM["w"]}, (0,)),
        (
            "g (float[n,16] x) => (float[k,a,c,d] y) {s = Constant <value = int64[4] {-1,4,2,2}> () r = Reshape (x, s)"
            "  y = Conv <pads = [1,1,1,1]> (r, w) }",
            {"w": normal(22, 6, 4, 3, 3)},
            (0, 2, 3),
        ),
    ],
)
def test_the_mean_of_each_output_stays(body: str, weights: dict[str, Array], axes: tuple[int, ...]) -> None:
    model, data = named(body, weights), shifted()

    def mean(one: ir.Model) -> Array:
        return np.asarray(np.mean([run(one, f)["y"].astype(np.float64).mean(axes) for f in data], axis=0))

    after = made(HALF, model, "50% zeros", data)
    # sums of float32 of about 100, added up over windows
    np.testing.assert_allclose(mean(after), mean(model), atol=2e-3)
    blind = made(PruneConnections(method=Method.MAGNITUDE, **SMALL), model, "50% zeros")
    assert np.abs(mean(blind) - mean(model)).max() > 1, "the check can fail"


def test_each_method_loses_less_than_the_one_before() -> None:
    model = named("g (float[n,96] x) => (float[n,32] y) { y = MatMul (x, w) }", {"w": normal(23, 96, 32)})
    data = [{"x": mixed(40 + i, 96)} for i in range(4)]
    unseen = {"x": mixed(50, 96)}
    wanted, errors = run(model, unseen)["y"], []
    for method in Method:
        after = made(PruneConnections(method=method), model, "50% zeros", data)
        errors.append(float(np.square(run(after, unseen)["y"] - wanted).sum()))
    assert errors[2] < errors[1] < errors[0]
    best = made(PruneConnections(), model, "50% zeros", data)
    np.testing.assert_array_equal(weight(best, "y"), weight(after, "y"))


def test_without_real_data_it_is_magnitude() -> None:
    model, feed = case("gemm")
    blind = made(PruneConnections(method=Method.MAGNITUDE, **SMALL), model, "50% zeros")
    np.testing.assert_array_equal(weight(made(HALF, model, "50% zeros"), "y"), weight(blind, "y"))
    view = GraphView(model)
    assert offers(HALF, view, TARGET, synthetic=True).choices
    assert not offers(PruneConnections(method=Method.RECONSTRUCTION, **SMALL), view, TARGET, synthetic=True).choices
    assert learn(HALF, model, [feed]).samples == 1


@pytest.mark.parametrize(
    ("body", "weights", "why"),
    [
        ("y = MatMul (x, x)", {}, "not a float32 constant"),
        ("y = MatMul (x, w)", {"w": normal(0, 4, 4)}, "16 weights, fewer than min_weights"),
        ("y = Relu (x)  z = MatMul (x, w)", {"w": normal(0, 4, 512)}, "read 4 values each"),
    ],
)
def test_what_is_left_alone_says_why(body: str, weights: dict[str, Array], why: str) -> None:
    model = named(f"g (float[4,4] x) => (float[a,b] y) {{ {body} }}", weights)
    (reason,) = reasons(PruneConnections(), model).values()
    assert why in reason


def test_a_shared_weight_and_a_width_that_does_not_divide() -> None:
    weights = {"w": normal(0, 6, 6), "u": normal(1, 8, 6)}
    body = "a = MatMul (x, w)  b = MatMul (a, w)  y = MatMul (b, v)"
    model = named(f"g (float[4,6] x) => (float[a,b] y) {{ {body} }}", {"w": weights["w"], "v": normal(2, 6, 4)})
    found = reasons(PAIRS, model)
    assert "shared by 2 nodes" in found["a"]
    assert found["y"] == "2:4 needs an input width that 4 divides, and it is 6"
    assert "y" not in reasons(PruneConnections(pattern="1:3", **SMALL), model)


def test_a_depthwise_convolution_is_left_alone() -> None:
    model = named("g (float[1,128,6,6] x) => (float[a,b,c,d] y) { y = Conv <group = 128> (x, w) }",
                  {"w": normal(0, 128, 1, 3, 3)})  # fmt: skip
    assert "fewer than min_inputs" in reasons(PruneConnections(), model)["y"]


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0 \(choose it at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity and pattern are both given"),
        ({"pattern": "5:4"}, r"pattern is '5:4' \(write N:M with N below M"),
        ({"pattern": "4:4"}, "pattern is '4:4'"),
        ({"pattern": "0:4"}, "pattern is '0:4'"),
        ({"pattern": "2/4"}, "pattern is '2/4'"),
        ({"only": ("Relu",)}, "only names Relu"),
        ({"min_weights": -1}, "min_weights is -1"),
        ({"min_inputs": -1}, "min_inputs is -1"),
        ({"method": "luck"}, "option 'method' of pass 'prune_connections'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassOptionError, match=message):
        create("prune_connections", **options)


def test_options_from_the_command_line() -> None:
    assert parse("prune_connections{pattern=2:4, method=magnitude}") == PruneConnections(
        pattern="2:4", method=Method.MAGNITUDE
    )
    assert parse("prune_connections{sparsity=0.7}").zeros == Zeros(0.7)  # type: ignore[attr-defined]
    assert PruneConnections().zeros == Zeros(0.5)
    assert not available()["prune_connections"].automatic


# --- the whole way ---------------------------------------------------------------------------------


def test_the_file_stays_and_its_compressed_form_shrinks() -> None:
    model = named("g (float[n,96] x) => (float[n,96] y) { h = MatMul (x, w)  r = Relu (h)  y = MatMul (r, u) }",
                  {"w": normal(60, 96, 96), "u": normal(61, 96, 96)})  # fmt: skip
    data = [{"x": mixed(70 + i, 96, 8)} for i in range(16)]

    def pruned() -> onnxcompress.Result:
        budget = Budget(min_sqnr_db=0)
        return onnxcompress.optimize(
            model, profile="host-x86-vnni", calibration=data, passes=[PruneConnections()], budget=budget, timing=False
        )

    result = pruned()
    totals = result.report.totals
    assert {s.decision for s in result.report.sites if s.pass_name == "prune_connections"} == {"50% zeros"}
    assert totals.file_bytes[1] == pytest.approx(totals.file_bytes[0], rel=0.02)
    assert totals.zstd_bytes[1] < 0.65 * totals.zstd_bytes[0]
    before, after = totals.predicted_ms
    assert before is not None and after == pytest.approx(before, rel=1e-6)
    (told,) = (p.reason for p in result.report.passes if p.name == "prune_connections")
    assert "onnxruntime's speed stay" in told and "compressed file is smaller" in told
    assert onnxcompress.model.serialize(pruned().model) == onnxcompress.model.serialize(result.model)


def test_the_list_of_passes_says_that_it_has_to_be_named() -> None:
    from click.testing import CliRunner

    from onnxcompress.cli import cli

    shown = CliRunner().invoke(cli, ["passes", "list"]).output
    assert "prune_connections  (share, lossy, only with --pass)" in shown
    assert "quantize  (quantize, lossy)" in shown


def test_it_takes_no_part_unless_named() -> None:
    model, feed = case("gemm")
    result = onnxcompress.optimize(model, profile="host-x86-vnni", calibration=[feed], timing=False)
    assert "prune_connections" not in {p.name for p in result.report.passes}
    assert [s for s in HALF.sites(GraphView(model)) if isinstance(s, Site)]


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_every_family(name: str) -> None:
    model = ir.from_proto(FAMILIES[name]())
    onnxcompress.model.canonicalize(model)
    model = onnxcompress.model.infer_types(model)
    data = [*family_feeds(name, 3, batch=2)]
    after = made(HALF, model, "50% zeros", data)
    view, found = GraphView(after), 0
    for site in HALF.sites(GraphView(model)):
        for linear in linear_maps(view.node(site.key), view) if isinstance(site, Site) else ():
            value = view.node(site.key).inputs[linear.index]
            new = view.array(value)
            assert new is not None
            # but for rounding to whole weights of each group; more where a feature is always zero
            assert np.mean(new == 0) >= 0.5 - 1 / new.size - 0.5 / linear.inputs, site.key
            found += 1
    assert found
    wanted, got = run(model, data[0]), run(after, data[0])
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in wanted.items()}
    assert all(np.isfinite(v).all() for v in got.values() if v.dtype == np.float32)
