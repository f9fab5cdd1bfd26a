"""A pass that only names its choices: gain and price are found by making each on a clone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import onnxcompress
from onnxcompress import registry
from onnxcompress.base import Choice, Pass, Site, Skip, Stage
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

RNG = np.random.default_rng(0)
SIZE = 256


@dataclass(frozen=True)
class RankOne(Pass):
    """Writes a matrix as the product of a column and a row."""

    name: ClassVar[str] = "rank_one"
    stage: ClassVar[Stage] = Stage.FACTORIZE
    ops: ClassVar[tuple[str, ...]] = ("MatMul",)

    def match(self, node: ir.Node, view: GraphView) -> Site:
        if not view.is_float_weight(node.inputs[1]):
            raise Skip("its second input is not a constant")
        return Site.of(node)

    def choices(self, site: Site, view: GraphView, target: Target) -> Iterable[Choice]:
        return [Choice(site, "rank 1")]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
        assert tensor is not None
        u, s, v = np.linalg.svd(tensor.numpy())
        (thin,) = rewriter.insert(
            "MatMul",
            [node.inputs[0], rewriter.constant(np.asarray(u[:, :1] * s[0], np.float32), "column")],
            before=node,
            dtype=ir.DataType.FLOAT,
        )
        row = rewriter.constant(np.asarray(v[:1], np.float32), "row")
        (result,) = rewriter.insert("MatMul", [thin, row], before=node, dtype=ir.DataType.FLOAT)
        rewriter.replace_node(node, result)


def model(*weights: np.ndarray) -> ir.Model:
    values = [ir.Value(name="x", shape=ir.Shape([32, SIZE]), type=ir.TensorType(ir.DataType.FLOAT))]
    nodes, initializers = [], []
    for i, weight in enumerate(weights):
        tensor = ir.tensor(weight.astype(np.float32), name=f"w{i}")
        w = ir.Value(name=f"w{i}", shape=ir.Shape([SIZE, SIZE]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        initializers.append(w)
        nodes.append(ir.node("MatMul", [values[-1], w], name=f"n{i}"))
        values.append(nodes[-1].outputs[0])
    y = values[-1]
    y.name, y.shape, y.type = "y", ir.Shape([32, SIZE]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([values[0]], [y], nodes=nodes, initializers=initializers, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=9)


@pytest.fixture(autouse=True)
def only_this_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "available", lambda: {"rank_one": RankOne})


def run(*weights: np.ndarray) -> onnxcompress.Result:
    feeds = [{"x": RNG.standard_normal((32, SIZE)).astype(np.float32)} for _ in range(8)]
    return onnxcompress.optimize(model(*weights), profile="cortex-a53", calibration=feeds)


def test_a_choice_that_pays_and_costs_nothing_is_made() -> None:
    exact = np.outer(RNG.standard_normal(SIZE), RNG.standard_normal(SIZE)) / SIZE
    result = run(exact)
    (site,) = result.report.sites
    assert (site.decision, site.bytes_saved) == ("rank 1", 4 * (SIZE * SIZE - 2 * SIZE))
    assert site.gain_ms > 0
    assert result.report.totals.comparison.min_sqnr_db > 80


def test_a_choice_that_costs_too_much_is_measured_and_left() -> None:
    """Of two matrices the one of full rank is not replaced, and the reason is its own noise."""
    exact = np.outer(RNG.standard_normal(SIZE), RNG.standard_normal(SIZE)) / SIZE
    full = np.eye(SIZE) + RNG.standard_normal((SIZE, SIZE)) / SIZE
    result = run(full, exact)
    decisions = {s.key: s for s in result.report.sites}
    assert decisions["n1"].decision == "rank 1"
    assert decisions["n0"].decision == "keep"
    assert "does not fit into the budget" in decisions["n0"].reason


def test_a_choice_that_cannot_be_made_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RankOne, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        raise Skip("not today")

    monkeypatch.setattr(RankOne, "apply", refuse)
    (site,) = run(np.eye(SIZE)).report.sites
    assert (site.decision, site.reason) == ("keep", "rank 1 cannot be made, or the result does not run")
