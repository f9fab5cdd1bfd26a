"""Where two models are compared: before the decisions, not after them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxcompress.model import canonicalize
from onnxcompress.smooth import Grade, grades, observed
from onnxcompress.view import GraphView

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
W = "<float[2, 2] w = {1.0, 2.0, 3.0, 4.0}>"


def look(text: str) -> tuple[str, ...]:
    model = ir.from_onnx_text(f"{HEAD} {text}")
    canonicalize(model)
    return observed(GraphView(model))


def test_smooth_outputs_are_observed_themselves() -> None:
    assert look(f"n (float[N, 2] x) => (float[N, 2] y) {W} {{ m = MatMul (x, w)  y = Sigmoid (m) }}") == ("y",)


@pytest.mark.parametrize(
    ("end", "output"),
    [
        ("y = ArgMax <axis = 1> (s)", "int64[N, 1] y"),
        ("y = NonZero (s)", "int64[2, K] y"),
        ("y = Cast <to = 7> (s)", "int64[N, 2] y"),
        ("a = ArgMax <axis = 1> (s)  y = Cast <to = 1> (a)", "float[N, 1] y"),
        ("r = Round (s)  c = Cast <to = 6> (r)  y = Cast <to = 1> (c)", "float[N, 2] y"),
        ("z = NonZero (s)  t = Transpose (z)  y = GatherND (s, t)", "float[K] y"),
        ("y = RandomNormalLike (s)", "float[N, 2] y"),
        ("t = Constant <value = float {0.5}> ()  y = Greater (s, t)", "bool[N, 2] y"),
    ],
)
def test_decisions_are_seen_from_before(end: str, output: str) -> None:
    found = look(f"n (float[N, 2] x) => ({output}) {W} {{ m = MatMul (x, w)  s = Sigmoid (m)  {end} }}")
    assert found in {("s",), ("r",)}


def test_top_k_values_are_smooth_and_its_indices_are_not() -> None:
    text = (
        f"n (float[N, 2] x) => (float[N, 1] v, int64[N, 1] i) {W[:-1]}, int64[1] k = {{1}}>"
        "{ m = MatMul (x, w)  v, i = TopK (m, k) }"
    )
    assert look(text) == ("m", "v")


def test_boxes_and_scores_before_non_maximum_suppression() -> None:
    found = look("""
        n (float[1, 4, 4] x) => (int64[K, 3] selected, float[K, 4] chosen)
        <float[4, 4] w = {1.0,0.0,0.0,0.0, 0.0,1.0,0.0,0.0, 0.0,0.0,1.0,0.0, 0.0,0.0,0.0,1.0}, int64[2] shape = {-1, 4},
         int64 most = {3}, float overlap = {0.5}, int64[1] from = {2}, int64[1] to = {3}, int64[1] last = {1}>
        {
          raw = MatMul (x, w)
          boxes = Exp (raw)
          p = Sigmoid (raw)
          t = Transpose <perm = [0, 2, 1]> (p)
          one = Slice (t, last, from, last)
          selected = NonMaxSuppression (boxes, one, most, overlap)
          column = Slice (selected, from, to, last)
          flat = Squeeze (column, last)
          all = Reshape (boxes, shape)
          chosen = Gather (all, flat)
        }""")
    assert found == ("boxes", "p"), "pieces are followed to the whole"


def test_decisions_about_inputs_are_exact() -> None:
    """Padding masks made from token ids are the same in both models."""
    assert look("""
        n (int64[N, S] ids) => (float[N, S, 2] y)
        <float[3, 2] table = {1.0,2.0,3.0,4.0,5.0,6.0}, int64 pad = {0}, float low = {-9.0}, int64[1] two = {2}>
        { e = Gather (table, ids)  m = Equal (ids, pad)  u = Unsqueeze (m, two)  y = Where (u, low, e) }""") == ("y",)


def test_gates_made_of_comparisons_stay_smooth() -> None:
    """A leaky rectifier written out must not hide the layers behind it."""
    assert look(
        f"n (float[N, 2] x) => (float[N, 2] y) {W[:-1]}, float z = {{0.0}}, float a = {{0.1}}>"
        "{ m = MatMul (x, w)  g = Greater (m, z)  l = Mul (m, a)  r = Where (g, m, l)  y = MatMul (r, w) }"
    ) == ("y",)


def test_sizes_are_no_decisions() -> None:
    """floor(scale * shape), as exporters write Resize."""
    assert look(
        f"n (float[2, 2] x) => (float[K, L] y) {W[:-1]}, float[2] f = {{2.0, 2.0}}>"
        "{ m = MatMul (x, w)  s = Shape (m)  c = Cast <to = 1> (s)  p = Mul (c, f)  q = Floor (p)"
        "  i = Cast <to = 7> (q)  y = Expand (m, i) }"
    ) == ("y",)


def test_a_branch_taken_on_a_computed_condition_is_a_decision() -> None:
    text = f"""
        n (float[2, 2] x, bool flag) => (float[2, 2] y) {W[:-1]}, float z = {{0.0}}>
        {{
          m = MatMul (x, w)
          s = ReduceSum <keepdims = 0> (m)
          c = Greater (s, z)
          y = If (%s) <then_branch = a () => (float[2, 2] t) {{ t = Relu (m) }},
                      else_branch = b () => (float[2, 2] e) {{ e = Neg (m) }}>
        }}"""
    assert look(text % "flag") == ("y",)
    assert set(look(text % "c")) == {"m", "s"}


def test_loops_are_graded_by_their_bodies() -> None:
    text = """
        n (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1.0,2.0,3.0,4.0}, int64 trips = {3}, bool go = {1}>
        {
          m = MatMul (x, w)
          y = Loop (trips, go, m) <body = b (int64 i, bool c, float[2, 2] v) => (bool d, float[2, 2] n) {
             d = Identity (c)
             %s
          }>
        }"""
    assert look(text % "n = Relu (v)") == ("y",)
    assert look(text % "k = Cast <to = 7> (v)  n = Cast <to = 1> (k)") == ("m",)


def test_a_second_stage_nobody_sees_adds_its_output() -> None:
    found = look(
        f"n (float[N, 2] x) => (float[K, 2] y) {W} {{"
        "m = MatMul (x, w)  z = NonZero (m)  t = Transpose (z)  c = Cast <to = 1> (t)  y = MatMul (c, w) }"
    )
    assert found == ("m", "y")


def test_nothing_smooth_falls_back_to_the_outputs() -> None:
    assert look("n (int64[N] x) => (int64[N] y) { y = Neg (x) }") == ("y",)


def test_grades() -> None:
    model = ir.from_onnx_text(
        f"{HEAD} n (float[N, 2] x) => (int64[N, 1] y) {W}"
        "{ a = Neg (x)  s = Shape (a)  m = MatMul (a, w)  y = ArgMax <axis = 1> (m) }"
    )
    canonicalize(model)
    known = {v.name: g for v, g in grades(model).items()}
    assert [known[n] for n in "wsxamy"] == [
        Grade.CONSTANT,
        Grade.CONSTANT,
        Grade.EXACT,
        Grade.EXACT,
        Grade.SMOOTH,
        Grade.DISCRETE,
    ]
