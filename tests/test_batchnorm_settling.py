"""Means of normalizations behind a removal: which, how, and that nothing is kept that loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir
import pytest
from cuts import choices_of, family, named, weights
from models import Array, Feeds, normal, run

import onnxcompress
from onnxcompress import model as models
from onnxcompress.calibrate import calibrate
from onnxcompress.coupling import Coupling, remove
from onnxcompress.coupling.removal import noted_positions
from onnxcompress.data import open_data
from onnxcompress.errors import DataError
from onnxcompress.models_zoo.families import family_feeds
from onnxcompress.notes import forget_notes
from onnxcompress.passes import _batchnorm as batchnorm
from onnxcompress.passes.prune_channels import Criterion, PruneChannels
from onnxcompress.registry import parse
from onnxcompress.report import Budget
from onnxcompress.rewrite import Rewriter
from onnxcompress.settling import settled
from onnxcompress.statistics import Evidence, Need
from onnxcompress.trial import build
from onnxcompress.view import GraphView

BODY = """g (float[2,3,6,6] x) => (float[2,5,6,6] y) {
  first = BatchNormalization (x, s0, b0, m0, v0)
  a = Conv <kernel_shape = [1,1]> (first, wa, ba)
  p = Relu (a)
  b = Conv <kernel_shape = [1,1]> (first, wb, bb)
  q = Sigmoid (b)
  c = Concat <axis = 1> (p, q)
  n = BatchNormalization (c, s1, b1, m1, v1)
  r = Relu (n)
  y = Conv <kernel_shape = [1,1]> (r, wc, bc)
}"""
PARTS: dict[str, Array] = {
    "wa": normal(1, 6, 3, 1, 1), "ba": normal(2, 6), "wb": normal(3, 4, 3, 1, 1), "bb": normal(4, 4),
    "wc": normal(5, 5, 10, 1, 1), "bc": normal(6, 5),
    **{f"{k}0": np.abs(normal(10 + j, 3)) + np.float32(0.5) for j, k in enumerate("sbmv")},
    **{f"{k}1": np.abs(normal(20 + j, 10)) + np.float32(0.5) for j, k in enumerate("sbmv")},
}  # fmt: skip
FEEDS: Feeds = [{"x": normal(100 + i, 2, 3, 6, 6)} for i in range(8)]
KEPT = np.array([0, 2, 3, 5])


def joined() -> ir.Model:
    """Two branches of 6 and 4 channels, joined and normalized: no convolution is next to the normalization."""
    return named(BODY, PARTS)


def without_two(model: ir.Model) -> ir.Model:
    """A clone that keeps four of the first branch's six channels."""
    copy = models.clone(model)
    coupling = Coupling(GraphView(model))
    group = coupling.group("a")
    keep = (
        np.isin(np.arange(group.size), KEPT) if group.size == 6 else np.isin(np.arange(group.size), [*KEPT, 6, 7, 8, 9])
    )
    remove(coupling, {group: keep}, Rewriter(copy))
    return models.infer_types(copy)


def observe(model: ir.Model, needs: Collection[Need]) -> Evidence:
    return calibrate(model, sorted(needs), open_data([dict(f) for f in FEEDS], model), shapes=False)


def level(model: ir.Model, wanted: ir.Model) -> float:
    """Decibels of the first output against another model's."""
    pairs = [(run(model, f)["y"], run(wanted, f)["y"]) for f in FEEDS]
    noise = sum(float(np.square(a - b).sum(dtype=np.float64)) for a, b in pairs)
    return (
        10 * math.log10(sum(float(np.square(b).sum(dtype=np.float64)) for _, b in pairs) / noise) if noise else math.inf
    )


def shifted(model: ir.Model) -> ir.Model:
    """A clone with its joined value moved by a constant for each channel, as an error far before it would.

    Adding it behind the join keeps what is in front, Relu and Sigmoid, what it was.
    """
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    node = rewriter.node("n")
    value = node.inputs[0]
    assert value is not None
    moved = rewriter.constant(normal(7, 1, weights(copy)["m1"].size, 1, 1), "moved")
    (total,) = rewriter.insert("Add", [value, moved], before=node, dtype=value.dtype, shape=value.shape)
    rewriter.set_input(node, 0, total)
    return copy


# --- which, and what of it is kept -----------------------------------------------------------------


def test_only_normalizations_behind_a_removal_are_observed() -> None:
    model = joined()
    assert not list(batchnorm.rounds(GraphView(model)))
    (needs,) = batchnorm.rounds(GraphView(without_two(model)))
    assert [n.value for n in needs] == ["n"]


def test_statistics_that_are_computed_are_left_alone() -> None:
    body = BODY.replace("(c, s1, b1, m1, v1)", "(c, s1, b1, m2, v1)").replace("  n =", "  m2 = Neg (m1)\n  n =")
    assert not list(batchnorm.rounds(GraphView(without_two(named(body, PARTS)))))


def test_what_shrinks_notes_the_positions_left() -> None:
    model = joined()
    after = without_two(model)
    value = GraphView(after).node("n").outputs[0]
    np.testing.assert_array_equal(noted_positions(value)[1], [0, 2, 3, 5, 6, 7, 8, 9])
    again = models.clone(after)
    coupling = Coupling(GraphView(after))
    group = coupling.group("b")
    places = sorted(p for part in group.parts if part.factor.axis.value == "b" for p in part.atoms)
    keep = np.ones(group.size, bool)
    keep[places[1]] = False
    remove(coupling, {group: keep}, Rewriter(again))
    np.testing.assert_array_equal(noted_positions(GraphView(again).node("n").outputs[0])[1], [0, 2, 3, 5, 6, 8, 9])
    np.testing.assert_array_equal(noted_positions(value)[1], [0, 2, 3, 5, 6, 7, 8, 9])  # clones do not share
    forget_notes(again)
    assert not noted_positions(GraphView(again).node("n").outputs[0])


def test_every_pass_counts_from_the_model_it_was_given() -> None:
    after = without_two(joined())
    built = build(after, PruneChannels(ratio=0.5), [], Evidence())
    assert not any(noted_positions(v) for n in built.model.graph for v in n.outputs)
    assert noted_positions(GraphView(after).node("n").outputs[0])


# --- the numbers -----------------------------------------------------------------------------------


def test_inputs_that_moved_by_a_constant_are_made_up_for_exactly() -> None:
    model = joined()
    pruned = without_two(model)
    wrong = shifted(pruned)
    assert level(wrong, pruned) < 20
    (needs,) = batchnorm.rounds(GraphView(wrong))
    batchnorm.settle(Rewriter(wrong), observe(model, needs), observe(wrong, needs))
    assert level(wrong, pruned) > 100
    for name in ("s1", "b1", "v1"):
        np.testing.assert_array_equal(weights(wrong)[name], weights(pruned)[name])


def test_means_are_those_of_the_model_before_whatever_the_scale() -> None:
    model = joined()
    wrong = without_two(model)
    rewriter = Rewriter(wrong)
    rewriter.set_weight(rewriter.node("a"), 1, 1.5 * weights(wrong)["wa"])
    (needs,) = batchnorm.rounds(GraphView(wrong))
    before = observe(model, needs)
    batchnorm.settle(Rewriter(wrong), before, observe(wrong, needs))
    kept = noted_positions(GraphView(wrong).node("n").outputs[0])[1]
    found = observe(wrong, needs).channels("n").mean
    np.testing.assert_allclose(found, before.channels("n").mean[kept], atol=1e-5)


def test_a_channel_scaled_by_nothing_keeps_its_mean() -> None:
    scale = PARTS["s1"].copy()
    scale[2] = 0
    model = named(BODY, {**PARTS, "s1": scale})
    wrong = shifted(without_two(model))
    old = weights(wrong)["m1"]
    (needs,) = batchnorm.rounds(GraphView(wrong))
    batchnorm.settle(Rewriter(wrong), observe(model, needs), observe(wrong, needs))
    new = weights(wrong)["m1"]
    assert (new != old).tolist() == [True, False, *[True] * 6]
    assert np.isfinite(new).all()


def test_the_same_bytes_twice() -> None:
    def once() -> bytes:
        model = joined()
        wrong = shifted(without_two(model))
        (needs,) = batchnorm.rounds(GraphView(wrong))
        batchnorm.settle(Rewriter(wrong), observe(model, needs), observe(wrong, needs))
        return models.serialize(wrong)

    assert once() == once()


# --- rounds, and whether it is worth it ------------------------------------------------------------


def test_nodes_are_settled_in_the_order_they_run_in_four_rounds() -> None:
    model = family("densenet")
    pass_ = PruneChannels(ratio=0.25, criterion=Criterion.MAGNITUDE, recover=False)
    after = build(model, pass_, choices_of(pass_, model), Evidence()).model
    found = [[n.value for n in needs] for needs in batchnorm.rounds(GraphView(after))]
    order = [n.outputs[0].name for n in after.graph if n.op_type == "BatchNormalization"]
    assert len(found) == 4
    together = [name for part in found for name in part]
    assert together == [name for name in order if name in together]


class Sweeps:
    """Counts what is observed."""

    def __init__(self, model: ir.Model, fails: bool = False) -> None:
        self.model, self.fails, self.count = model, fails, 0

    def before(self, needs: Collection[Need]) -> Evidence:
        self.count += 1
        return observe(self.model, needs)

    def after(self, model: ir.Model, needs: Collection[Need]) -> Evidence:
        self.count += 1
        if self.fails:
            raise DataError("node 'a' (Conv) makes NaN", sample=0)
        return observe(model, needs)


def test_it_is_kept_where_outputs_gain() -> None:
    model, pass_ = joined(), PruneChannels(ratio=0.5)
    pruned, sweeps = without_two(model), Sweeps(model)
    wrong = shifted(pruned)
    bytes_before = models.serialize(wrong)
    after = settled(wrong, pass_, sweeps.before, sweeps.after, lambda m: level(m, pruned))
    assert after is not wrong and level(after, pruned) > 100 and sweeps.count == 2
    assert models.serialize(wrong) == bytes_before


@pytest.mark.parametrize("quality", [lambda m: -level(m, without_two(joined())), lambda m: 5.0])
def test_it_is_dropped_where_they_do_not(quality: Callable[[ir.Model], float]) -> None:
    model = joined()
    wrong, sweeps = shifted(without_two(model)), Sweeps(model)
    assert settled(wrong, PruneChannels(ratio=0.5), sweeps.before, sweeps.after, quality) is wrong


@pytest.mark.parametrize("decibels", [math.inf, -math.inf])
def test_nothing_is_observed_where_nothing_can_be_gained(decibels: float) -> None:
    model = joined()
    wrong, sweeps = shifted(without_two(model)), Sweeps(model)
    assert settled(wrong, PruneChannels(ratio=0.5), sweeps.before, sweeps.after, lambda m: decibels) is wrong
    assert sweeps.count == 0


def test_a_result_that_makes_nan_is_left_to_the_check() -> None:
    model = joined()
    wrong, sweeps = shifted(without_two(model)), Sweeps(model, fails=True)
    assert settled(wrong, PruneChannels(ratio=0.5), sweeps.before, sweeps.after, lambda m: 3.0) is wrong


def test_no_normalization_and_no_recovery_cost_no_sweep() -> None:
    model = family("resnet")
    pass_ = PruneChannels(ratio=0.25, criterion=Criterion.MAGNITUDE, recover=False)
    after, sweeps = build(model, pass_, choices_of(pass_, model), Evidence()).model, Sweeps(model)

    def quality(candidate: ir.Model) -> float:
        raise AssertionError("nobody needs to know")

    assert settled(after, PruneChannels(ratio=0.25), sweeps.before, sweeps.after, quality) is after
    small = shifted(without_two(joined()))
    assert settled(small, pass_, sweeps.before, sweeps.after, quality) is small
    assert sweeps.count == 0


# --- as part of a run ------------------------------------------------------------------------------


def test_optimize_settles_what_it_prunes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("densenet")
    data = list(family_feeds("densenet", 12))

    def decibels() -> float:
        found = onnxcompress.optimize(
            model, passes=[parse("prune_channels{ratio=0.25}")], calibration=data, budget=Budget(min_sqnr_db=0.0)
        )
        assert any(p.name == "prune_channels" and p.changed for p in found.report.passes)
        return found.report.totals.comparison.min_sqnr_db

    rounds, asked = batchnorm.rounds, []

    def counted(view: GraphView) -> list[Collection[Need]]:
        asked.append(list(rounds(view)))
        return asked[-1]

    monkeypatch.setattr(batchnorm, "rounds", counted)
    on = decibels()
    assert asked and all(asked)
    monkeypatch.setattr(batchnorm, "rounds", lambda view: ())
    assert on >= decibels()
