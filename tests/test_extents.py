"""A Where over a list of extents that can choose nothing is none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.base import Site
from onnxcompress.passes.remove_noops import RemoveNoOps
from onnxcompress.view import GraphView
from tests.models import Array, made, ops, run, text

WEIGHTS: dict[str, Array] = {
    "zero": np.array(0),
    "one": np.array([0]),
    "twelve": np.array([12]),
    "minus": np.array([-1, -1]),
    "seven": np.array([7, 7]),
    "scalar": np.array(-1),
    "ones": np.array([1, 1]),
    "wide": np.ones((3, 2), np.int64),
    "negative": np.array([-1]),
}


def graph(condition: str, choice: str = "Where (c, ones, list)", last: str = "twelve") -> ir.Model:
    return text(
        f"""m (float[N, 1] x, int64[1] k) => (float[A, B] y) {{
            s = Shape (x)
            n = Gather (s, zero)
            u = Unsqueeze (n, one)
            list = Concat <axis = 0> (u, {last})
            c = {condition}
            target = {choice}
            y = Expand (x, target)
        }}""",
        WEIGHTS,
    )


@pytest.mark.parametrize("condition", ["Equal (list, minus)", "Equal (minus, list)", "Equal (list, scalar)"])
def test_it_goes(condition: str) -> None:
    before = graph(condition)
    after = made(RemoveNoOps(), before, "bypass")
    assert ops(after) == ["Shape", "Gather", "Unsqueeze", "Concat", "Expand"]
    assert GraphView(after).shape(after.graph.outputs[0]) in (("N", 12), ("A", 12), (None, 12))
    feed = {"x": np.arange(3, dtype=np.float32)[:, None], "k": np.array([12])}
    assert np.array_equal(run(before, feed)["y"], run(after, feed)["y"])


@pytest.mark.parametrize(
    "model",
    [
        graph("Equal (list, seven)"),
        graph("Equal (list, minus)", last="k"),
        graph("Equal (list, minus)", last="negative"),
        graph("Greater (list, minus)"),
        graph("Equal (ones, minus)"),
        graph("Equal (list, minus)", "Where (c, list, ones)"),
    ],
    ids=["an extent may be 7", "from outside", "minus one itself", "another question", "of others", "turned round"],
)
def test_it_stays(model: ir.Model) -> None:
    view = GraphView(model)
    sites = [s for s in RemoveNoOps().sites(view) if isinstance(s, Site)]
    assert "Where" not in [view.node(s.key).op_type for s in sites]
