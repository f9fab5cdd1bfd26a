"""Whose range sets the scale of a value."""

from __future__ import annotations

import pytest
from models import text

from onnxcompress import model as models
from onnxcompress.passes import _qdq
from onnxcompress.view import GraphView


@pytest.mark.parametrize(("mode", "owner"), [("nearest", "a"), ("linear", "b"), ("cubic", "b")])
def test_a_resize_that_mixes_neighbours_has_a_range_of_its_own(mode: str, owner: str) -> None:
    model = models.infer_types(
        text(
            f"""g (float[1,2,4,4] x) => (float[1,2,8,8] y) {{
                scales = Constant <value_floats=[1.0, 1.0, 2.0, 2.0]> ()
                a = Sigmoid (x)
                b = Resize <mode="{mode}"> (a, , scales)
                y = Sigmoid (b)
            }}"""
        )
    )
    view = GraphView(model)
    node = view.nodes("Sigmoid")[1]
    assert _qdq.range_owners(node, node, view)[0] == owner
