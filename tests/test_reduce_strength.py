"""Divisions become products and products in a row become one; nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import normal, ops, run, text

from onnxcompress.base import Site, Skipped
from onnxcompress.passes.reduce_strength import ReduceStrength
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import build
from onnxcompress.view import GraphView

X = normal(0, 2, 3)


def reduced(body: str, **weights: np.ndarray) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Operators after, reasons for what was left, and the output before and after."""
    model = text(f"g (float[2,3] x) => (float[2,3] y) {{ {body} }}", weights)
    pass_, view = ReduceStrength(), GraphView(model)
    sites = list(pass_.sites(view))
    choices = [c for s in sites if isinstance(s, Site) for c in pass_.choices(s, view, Target("any"))]
    built = build(model, pass_, choices, Evidence())
    reasons = [s.reason for s in sites if isinstance(s, Skipped)] + [s.reason for s in built.refused]
    return ops(built.model), reasons, run(model, {"x": X})["y"], run(built.model, {"x": X})["y"]


SIX = np.array(6, np.float32)
HALF = np.array(0.5, np.float32)
ROW = np.array([1, 2, 3], np.float32)
COLUMN = np.array([[1], [2]], np.float32)


@pytest.mark.parametrize(
    ("body", "weights", "after"),
    [
        ("y = Div (x, a)", {"a": SIX}, ["Mul"]),
        ("t = Div (x, a) y = Mul (t, b)", {"a": SIX, "b": HALF}, ["Mul"]),
        ("t = Mul (a, x) y = Div (t, b)", {"a": ROW, "b": SIX}, ["Mul"]),
        ("t = Mul (x, a) u = Mul (t, b) y = Mul (u, b)", {"a": ROW, "b": HALF}, ["Mul"]),
        ("t = Mul (x, a) y = Mul (t, b)", {"a": ROW, "b": COLUMN}, ["Mul", "Mul"]),  # together 6 instead of 5
        ("t = Mul (x, a) u = Relu (t) v = Mul (t, a) y = Add (u, v)", {"a": SIX}, ["Mul", "Relu", "Mul", "Add"]),
        ("y = Div (a, x)", {"a": SIX}, ["Div"]),
        ("y = Div (x, a)", {"a": np.array(1e-45, np.float32)}, ["Div"]),
    ],
)
def test_what_becomes_what(body: str, weights: dict[str, np.ndarray], after: list[str]) -> None:
    found, _, before, result = reduced(body, **weights)
    assert found == after
    np.testing.assert_allclose(result, before, rtol=3 * 2**-23)  # three roundings at most


def test_reasons_are_given() -> None:
    _, reasons, _, _ = reduced("t = Mul (x, a) y = Mul (t, b)", a=ROW, b=COLUMN)
    assert reasons == [
        "there is no product with a constant before it",
        "the two constants do not combine into one as small",
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["Mul", "Div"]), st.floats(0.1, 10)), min_size=1, max_size=6))
def test_a_chain_of_any_length_is_one_product(steps: list[tuple[str, float]]) -> None:
    names = ["x", *(f"t{i}" for i in range(len(steps) - 1)), "y"]
    body = " ".join(f"{names[i + 1]} = {op} ({names[i]}, c{i})" for i, (op, _) in enumerate(steps))
    weights = {f"c{i}": np.array(c, np.float32) for i, (_, c) in enumerate(steps)}
    found, _, before, after = reduced(body, **weights)
    assert found == ["Mul"]
    np.testing.assert_allclose(after, before, rtol=2 * len(steps) * 2**-23)
