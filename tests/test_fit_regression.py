"""A fit finds again the prices that measurements were made up from."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prices import CACHES, priced

from onnxcompress.cost import CostModel, NodeWork, Use, quantities
from onnxcompress.execution import Execution
from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.equations import Row, seen
from onnxcompress.fitting.links import Link
from onnxcompress.fitting.measuring import LONG, SHORT, feeds, forms
from onnxcompress.fitting.nets import CHECKED, FITTED, Net
from onnxcompress.fitting.regression import Fitted, Solution, fit, rebuilt, solve
from onnxcompress.fitting.samples import LinkTime, Measurements, NetTime, NodeTime
from onnxcompress.fitting.structure import structure
from onnxcompress.profile import Profile, load_profile
from onnxcompress.profile_files import write
from onnxcompress.profile_tables import Kernel

NOISE = 0.02
"""Standard deviation of made-up times, relative."""

OUTLIERS = 0.05
"""Share of them that are wrong by a factor of three to ten."""

MACHINE = {
    "cpu": "made up", "cores": 2, "frequency_ghz": 3.0, "isa": ["avx2", "avx512f", "avx512_vnni"],
    "caches": [{"name": "L1", "bytes": 32 << 10, "shared": False},
               *({"name": c.name, "bytes": c.bytes, "shared": c.shared} for c in CACHES)],
}  # fmt: skip

DENSE = ("conv", "conv_pointwise")
FEWER = (
    "conv_depthwise",
    "conv_stem",
    "conv_grouped",
    "matmul_rows1",
    "Add",
    "Mul",
    "GlobalAveragePool",
    "Relu",
    "Clip",
)
NETS = {net.name: net for net in (*FITTED, *CHECKED) if net.name in ("mobile-small", "mobile-tiny")}


def chosen() -> list[Link]:
    """All links of dense float convolutions, whose blocks are looked for, and five of each other kind."""
    found: dict[tuple[str, str], list[Link]] = {}
    for link in links():
        if link.kind in (*DENSE, *FEWER) and link.precision in ("f32", "u8s8"):
            found.setdefault((link.kind, link.precision), []).append(link)
    some = [each if key in ((k, "f32") for k in DENSE) else each[:: len(each) // 5][:5] for key, each in found.items()]
    return [link for each in some for link in each]


# ---- made-up measurements ----------------------------------------------------------------------------------


def truth() -> Profile:
    """Prices as a device might have; f32 convolutions work on blocks of 8 channels, integer ones on single ones."""
    plain = priced(3, precisions=("f32", "u8s8"))
    kernels = tuple(
        k.model_copy(update={"channel_block": 8 if k.kind in ("conv", "conv_pointwise") and k.precision == "f32" else 1,
                             "aligned_to": 1, "misaligned_factor": 1.0}) for k in plain.kernels_
    )  # fmt: skip
    tables = {f.alias or name: getattr(plain, name) for name, f in type(plain).model_fields.items()}
    fusions = tuple(
        f.model_copy(update={"ns_per_element": 0.0 if f.precision == "u8s8" else f.ns_per_element})
        for f in plain.fusions_
    )
    return Profile.model_validate(tables | {"kernel": kernels, "fusion": fusions})


def link_seconds(link: Link, profile: Profile) -> float:
    """What a link costs by the cost model: a long chain less a short one, less what it stands on."""
    long, short = (seconds_of(link.build(n, drawn=False), profile) for n in (LONG, SHORT))
    base = link.baseline
    return (long - short) / (LONG - SHORT) - (link_seconds(base, profile) if base is not None else 0.0)


def seconds_of(proto: object, profile: Profile) -> float:
    return CostModel(profile).model(*seen(proto, feeds(proto))).seconds  # type: ignore[arg-type]


def net_times(net: Net, profile: Profile, noisy: Callable[[float], float]) -> list[NetTime]:
    """A network's forms, and their nodes as a profiler would name them."""
    found = []
    for form, proto in forms(net).items():
        view, shapes = seen(proto, net.feed())
        execution = Execution(profile, view, shapes)
        cost = CostModel(profile).model(view, shapes)
        spent: dict[str, float] = {}
        by_name = {str(n.name): n for n in view.nodes()}
        reorders = []
        for row in cost.nodes:
            node = by_name[row.name]
            seconds = row.seconds
            for size in execution.reorders(node):
                each = CostModel(profile).node(NodeWork("", "", "reorder", elements_in=size, elements_out=size)) or 0.0
                seconds -= each
                reorders.append(NodeTime(f"ReorderInput_{len(reorders)}", "ReorderInput", noisy(each), size))
            while node in execution.inside:
                node = execution.inside[node]
            spent[str(node.name)] = spent.get(str(node.name), 0.0) + seconds
        nodes = tuple(NodeTime(n, by_name[n].op_type, noisy(s), 1) for n, s in spent.items() if s > 0)
        total = cost.seconds if net in CHECKED else max(cost.seconds, sum(n.seconds for n in (*nodes, *reorders)))
        found.append(NetTime(f"{net.name} {form}", total, 0.0, (*nodes, *reorders)))
    return found


@pytest.fixture(scope="module")
def measured() -> Measurements:
    profile, rng = truth(), np.random.default_rng(7)

    def noisy(seconds: float) -> float:
        return seconds * float(np.exp(NOISE * rng.standard_normal()))

    times = []
    for link in chosen():
        if (seconds := link_seconds(link, profile)) > 0:
            wrong = float(rng.choice((1 / 3, 3, 10))) if rng.random() < OUTLIERS else 1.0
            times.append(LinkTime(link.name, wrong * noisy(seconds)))
    nets = [time for net in NETS.values() for time in net_times(net, profile, noisy)]
    overhead = profile.overhead
    return Measurements(
        "1.0", MACHINE, 1e-9 * overhead.ns_per_run, 1e-9 * overhead.ns_per_node, tuple(times), tuple(nets)
    )


@pytest.fixture(scope="module")
def fitted(measured: Measurements) -> Fitted:
    return fit(measured, name="again")


# ---- found again -------------------------------------------------------------------------------------------

TOLERANCE = 2 * NOISE + 0.15 / 7
"""A network is a sum over kernels, so it is off by no more than the kernels are on average. Those are by the noise, and
an outlier pulls by the 0.15 beyond which the loss is linear, shared between the seven points a kernel has at least."""


def test_networks_the_fit_has_not_seen_are_predicted(fitted: Fitted) -> None:
    assert [c.name for c in fitted.checked] == ["mobile-tiny f32", "mobile-tiny wholly", "mobile-tiny partly"]
    assert all(abs(c.error) < TOLERANCE for c in fitted.checked)
    held_out = fitted.profile.provenance.held_out_error
    assert held_out is not None and held_out == pytest.approx(fitted.mean_error, abs=1e-3)


def test_the_block_of_channels_is_found(fitted: Fitted) -> None:
    found = {(k.kind, k.precision): k for k in fitted.profile.kernels}
    assert found["conv", "f32"].channel_block == 8
    assert found["conv_pointwise", "f32"].channel_block == 8
    assert found["conv", "f32"].misaligned_factor == found["conv_pointwise", "f32"].misaligned_factor == 1.0
    assert found["conv", "u8s8"].channel_block == 1  # five points are too few to look


def test_only_what_was_measured_has_a_price(fitted: Fitted) -> None:
    kinds = {k.kind for k in fitted.profile.kernels}
    assert {"conv", "conv_depthwise", "matmul_rows1", "reorder"} <= kinds
    assert not kinds & {"lstm", "gru", "conv_transpose", "matmul_dynamic", "Erf", "resize_linear", "softmax"}
    assert {(k.kind, k.precision, k.on) for k in fitted.profile.kernels if k.kind.startswith("conv")} <= set(
        fitted.points
    )


def test_no_price_is_negative(fitted: Fitted) -> None:
    for table in (*fitted.profile.kernels, *fitted.profile.caches, *fitted.profile.fusions):
        assert all(value >= 0 for name, value in table.model_dump().items() if name.startswith("ns_"))


def test_prices_of_dense_convolutions_are_found(fitted: Fitted) -> None:
    made = {(k.kind, k.precision): k for k in truth().kernels if k.kind in DENSE and k.precision == "f32"}
    found = {(k.kind, k.precision): k for k in fitted.profile.kernels}
    for key, kernel in made.items():  # chains of many multiply-accumulates leave no choice
        assert found[key].ns_per_mac == pytest.approx(kernel.ns_per_mac, rel=TOLERANCE)


def test_the_same_measurements_make_the_same_file(measured: Measurements, tmp_path: Path) -> None:
    some = [k for kind in ("conv", "matmul", "elementwise", "move") for k in links() if k.kind == kind][::12]
    times = tuple(LinkTime(k.name, 1e-6 * (1 + i)) for i, k in enumerate(some))
    few = dataclasses.replace(measured, links=times, nets=measured.nets[:1])
    paths = [tmp_path / "one.toml", tmp_path / "two.toml"]
    for path, again in zip(paths, (few, Measurements.from_json(few.to_json())), strict=True):
        write(fit(again, name="again").profile, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert load_profile(paths[0]).provenance.date == datetime.date.today()


# ---- solving -----------------------------------------------------------------------------------------------

CONV = ("conv_pointwise", "f32", "any")
SHELL = structure([], block=0, precisions=("f32",))


def works(rng: np.random.Generator, count: int, *, kind: str = "conv_pointwise", step: int = 1) -> list[NodeWork]:
    """Convolutions of random sizes; channels are multiples of ``step``."""
    made = []
    for i in range(count):
        cin, cout, pixels = (
            int(step * rng.integers(2, 30)),
            int(step * rng.integers(2, 30)),
            int(rng.integers(50, 3000)),
        )
        made.append(NodeWork(
            f"{kind} {i}", "Conv", kind, True, cin * cout * pixels, cin, cout, cin * pixels, cout * pixels, cin * cout,
            cin * cout, cin * pixels, pixels, pixels,
        ))  # fmt: skip
    return made


def rows(made: list[NodeWork], kernel: Kernel, prices: dict[str, float], per_node: float = 0.0) -> list[Row]:
    """Equations of nodes whose prices are known, in seconds."""
    key = (kernel.kind, kernel.precision, kernel.on)
    found = []
    for work in made:
        seconds = per_node + sum(q * prices.get(t, 0.0) for t, q in quantities(kernel, work)._asdict().items())
        found.append(Row(work.name, seconds, ((1.0, Use(work.name, key, work)),)))
    return found


def predicted(solution: Solution, made: list[NodeWork]) -> np.ndarray:
    model = CostModel(rebuilt(SHELL, solution, 0.0, 0.0))
    return np.array([model.node(work, "f32") for work in made], float)


PRICES = {"fixed": 1e-6, "mac": 4e-11, "element": 1e-10}


@pytest.mark.parametrize(("block", "step"), [(1, 1), (4, 1), (8, 1), (16, 1), (16, 4)])
def test_blocks(block: int, step: int) -> None:
    rng = np.random.default_rng(block)
    kernel = Kernel(kind="conv_pointwise", precision="f32", channel_block=block)
    solution = solve(rows(works(rng, 40, step=step), kernel, PRICES), SHELL, 0.0)
    assert solution.kernels[CONV][0].channel_block == block
    fresh = works(rng, 20, step=step)
    expected = np.array([r.seconds for r in rows(fresh, kernel, PRICES)])
    assert np.abs(predicted(solution, fresh) / expected - 1).max() < TOLERANCE


def test_misalignment_is_found() -> None:
    rng = np.random.default_rng(5)
    kernel = Kernel(kind="conv_pointwise", precision="f32", aligned_to=8, misaligned_factor=3.0)
    found = solve(rows(works(rng, 60, step=4), kernel, PRICES), SHELL, 0.0).kernels[CONV][0]
    assert (found.aligned_to, found.misaligned_factor, found.channel_block) == (8, 3.0, 1)


def test_few_points_are_not_believed_to_show_blocks() -> None:
    kernel = Kernel(kind="conv_pointwise", precision="f32", channel_block=16)
    found = solve(rows(works(np.random.default_rng(1), 6), kernel, PRICES), SHELL, 0.0).kernels[CONV][0]
    assert found.channel_block == 1


def test_outliers_do_not_count() -> None:
    rng = np.random.default_rng(2)
    kernel = Kernel(kind="conv_pointwise", precision="f32")
    equations = rows(works(rng, 60), kernel, PRICES)
    wrong = [
        dataclasses.replace(r, seconds=r.seconds * (10.0 if i % 20 == 0 else 1.0)) for i, r in enumerate(equations)
    ]
    fresh = works(rng, 20)
    expected = np.array([r.seconds for r in rows(fresh, kernel, PRICES)])
    assert np.abs(predicted(solve(wrong, SHELL, 0.0), fresh) / expected - 1).max() < TOLERANCE
    all_wrong = [dataclasses.replace(r, seconds=2 * r.seconds) for r in equations]
    assert np.abs(predicted(solve(all_wrong, SHELL, 0.0), fresh) / expected - 1).min() > 0.5  # the check can fail


@pytest.mark.parametrize("seed", range(6))
def test_outliers_are_not_taken_for_structure(seed: int) -> None:
    """Of random channels hardly any are multiples of 8, so an outlier among those must not make them a fast path."""
    rng = np.random.default_rng(seed)
    kernel = Kernel(kind="conv_pointwise", precision="f32", channel_block=8)
    equations = rows(works(rng, 24), kernel, PRICES)
    wrong = [dataclasses.replace(r, seconds=r.seconds / (3 if i in (3, 11) else 1)) for i, r in enumerate(equations)]
    found = solve(wrong, SHELL, 0.0).kernels[CONV][0]
    assert (found.channel_block, found.misaligned_factor) == (8, 1.0)


def test_dispatch_is_not_paid_twice() -> None:
    rng = np.random.default_rng(4)
    kernel = Kernel(kind="conv_pointwise", precision="f32")
    prices = {"mac": 4e-11, "element": 1e-10}
    solution = solve(rows(works(rng, 40), kernel, prices, per_node=3e-6), SHELL, 3e-6)
    assert solution.kernels[CONV][1].get("fixed", 0.0) < 0.1e-6


def test_noise_alone_makes_no_negative_price() -> None:
    rng = np.random.default_rng(6)
    equations = [
        dataclasses.replace(row, seconds=float(rng.uniform(1e-6, 1e-3)))
        for kind in ("conv", "conv_pointwise", "conv_depthwise")
        for row in rows(works(rng, 20, kind=kind), Kernel(kind=kind, precision="f32"), PRICES)
    ]
    solution = solve(equations, SHELL, 1e-6)
    assert set(solution.kernels) == {("conv", "f32", "any"), CONV, ("conv_depthwise", "f32", "any")}
    assert all(price >= 0 for _, terms in solution.kernels.values() for price in terms.values())
    assert set(solution.points) == set(solution.kernels) and sum(solution.points.values()) == 60


def test_no_coefficient_is_beyond_what_a_processor_can_be() -> None:
    kernel = Kernel(kind="conv_pointwise", precision="f32")
    slow = rows(works(np.random.default_rng(8), 30), kernel, {"element": 1e-6})
    solution = solve(slow, SHELL, 0.0)
    assert solution.kernels[CONV][1]["element"] <= 12e-9 * (1 + 1e-9)


def test_nothing_measured_is_nothing_found() -> None:
    solution = solve([], SHELL, 0.0)
    assert not solution.kernels and not solution.points and not solution.fused
