"""Pieces are counted like onnxruntime's loops and numpy's strides have them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.pieces import pieces, span

Shape = tuple[int, ...]

DIMS = st.integers(1, 4)
SHAPES = st.lists(DIMS, min_size=1, max_size=4).map(tuple)


def counted(
    op: str,
    inputs: list[Shape],
    outputs: list[Shape],
    kind: str,
    constants: dict[int, Shape] | None = None,
    **attributes: Any,
) -> tuple[int, int]:
    """Pieces of a node; ``constants`` are what integer inputs say, by index."""
    values = [ir.Value(name=f"i{i}") for i in range(max([len(inputs), *((constants or {}).keys())]) + 1)]
    node = ir.node(op, values[: max(len(inputs), 1 + max(constants or {0: ()}))], attributes=attributes)
    known = {values[i]: c for i, c in (constants or {}).items()}
    shapes = [inputs[i] if i < len(inputs) else None for i in range(len(node.inputs))]
    return pieces(node, shapes, outputs, kind, lambda v: known.get(v, ()) if v is not None else ())


def runs(array: npt.NDArray[np.int64]) -> int:
    """Stretches of neighbours, in the order an array is written."""
    flat = array.ravel()
    return 1 + int(np.count_nonzero(np.diff(flat) != 1))


def consecutive(array: npt.NDArray[np.int64], count: int) -> bool:
    """Whether ``count`` equal parts of an array are made of neighbours."""
    assert array.size % count == 0
    return bool((np.diff(array.ravel().reshape(count, -1), axis=1) == 1).all())


# ---- broadcasting ----------------------------------------------------------------------------------------


class Iterator:
    """One side of onnxruntime's ``BroadcastIterator``: how often its innermost loop runs."""

    def __init__(self, axis: int, largest: int) -> None:
        self.moving, self.counts = axis > 1, [largest]

    def append(self, axis: int, largest: int) -> None:
        if (axis > 1) != self.moving:
            self.moving = axis > 1
            self.counts.append(1)
        self.counts[-1] *= largest


def broadcaster(first: Shape, second: Shape) -> int:
    """Span of onnxruntime's ``Broadcaster``, by its own steps (element_wise_ops.h)."""
    a, b = list(first), list(second)
    most, least = max(len(a), len(b)), min(len(a), len(b))
    index = 0
    if least == 0:
        size = (a or b or [1]).pop()
        one, two = Iterator(size if first else 1, size), Iterator(size if second else 1, size)
        index = 1
    while index < least:
        x, y = a.pop(), b.pop()
        index += 1
        if max(x, y) <= 1 and index < least:
            continue
        one, two = Iterator(x, max(x, y)), Iterator(y, max(x, y))
        break
    for i in range(index, most):
        x, y = (a.pop() if a else 1), (b.pop() if b else 1)
        if i < least and max(x, y) == 1:
            continue
        one.append(x, max(x, y))
        two.append(y, max(x, y))
    return min(one.counts[0], two.counts[0])


@st.composite
def broadcast(draw: st.DrawFn) -> tuple[Shape, Shape, Shape]:
    """Two shapes that go together, and what comes out."""
    out = draw(st.lists(DIMS, min_size=0, max_size=5))
    both = [[d if draw(st.booleans()) else 1 for d in out] for _ in range(2)]
    first, second = (tuple(s[draw(st.integers(0, len(s))) :]) for s in both)
    return first, second, np.broadcast_shapes(first, second)


@settings(deadline=None)
@given(broadcast())
def test_spans_are_those_of_the_broadcaster(shapes: tuple[Shape, Shape, Shape]) -> None:
    first, second, out = shapes
    assert span(first, second) == broadcaster(first, second)
    assert span(second, first) == span(first, second)
    assert math.prod(out) % span(first, second) == 0


@settings(deadline=None)
@given(broadcast())
def test_a_span_reads_neighbours_or_one_element(shapes: tuple[Shape, Shape, Shape]) -> None:
    first, second, out = shapes
    length = span(first, second)
    for shape in (first, second):
        index = np.broadcast_to(np.arange(math.prod(shape)).reshape(shape), out).reshape(-1, length)
        step = np.diff(index, axis=1)
        assert ((step == 1).all(axis=1) | (step == 0).all(axis=1)).all()


@settings(deadline=None)
@given(broadcast())
def test_pieces_of_an_elementwise_operator_are_its_spans(shapes: tuple[Shape, Shape, Shape]) -> None:
    first, second, out = shapes
    straight, _ = counted("Add", [first, second], [out], "elementwise")
    assert straight == math.prod(out) // broadcaster(first, second)


def test_examples_of_spans() -> None:
    assert span((1, 64, 8, 8), (1, 64, 8, 8)) == 4096
    assert span((1, 64, 8, 8), ()) == 4096
    assert span((1, 64, 8, 8), (64, 1, 1)) == 64  # a number for each map
    assert span((8, 128), (128,)) == 128
    assert span((8, 128), (8, 1)) == 128
    assert span((3, 1), (1,)) == 1  # nothing is left to tell that the rest is repeated, too
    assert span((5000, 1, 4), ()) == 4  # measured: 40 us, and 5 us for 5000 x 4
    assert span((1, 20000, 1), ()) == 1  # measured: 273 us, and 8 us where 20000 is the last axis
    assert span((3, 1), (1, 1)) == 3


def test_a_number_for_each_channel_is_a_span_where_channels_are_last() -> None:
    for constant in ((64, 1, 1), (1, 64, 1, 1)):
        assert counted("Mul", [(1, 64, 8, 8), constant], [(1, 64, 8, 8)], "elementwise") == (64, 64)
    assert counted("Mul", [(2, 64, 4, 8), (64, 1, 1)], [(2, 64, 4, 8)], "elementwise") == (128, 64)
    assert counted("Mul", [(1, 64, 8, 8), (8, 8)], [(1, 64, 8, 8)], "elementwise") == (64, 64)
    assert counted("Mul", [(1, 64, 8, 8), (1,)], [(1, 64, 8, 8)], "elementwise") == (1, 1)


# ---- moving ----------------------------------------------------------------------------------------------


@st.composite
def turned(draw: st.DrawFn) -> tuple[Shape, tuple[int, ...]]:
    shape = draw(SHAPES)
    return shape, tuple(draw(st.permutations(range(len(shape)))))


@settings(deadline=None)
@given(turned())
def test_transpose(case: tuple[Shape, tuple[int, ...]]) -> None:
    shape, perm = case
    array = np.arange(math.prod(shape)).reshape(shape).transpose(perm)
    found, same = counted("Transpose", [shape], [array.shape], "move", perm=list(perm))
    assert found == same
    assert consecutive(array, found)
    fewer = [n for n in range(1, found) if array.size % n == 0]
    assert not any(consecutive(array, n) for n in fewer)


def test_transpose_without_a_permutation_turns_all_axes() -> None:
    assert counted("Transpose", [(3, 4)], [(4, 3)], "move") == (12, 12)


@st.composite
def joined(draw: st.DrawFn) -> tuple[list[Shape], int]:
    shape, parts = draw(SHAPES), draw(st.integers(1, 3))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    shapes = []
    for _ in range(parts):
        each = list(shape)
        each[axis] = draw(DIMS)
        shapes.append(tuple(each))
    return shapes, axis


def _numbered(shapes: list[Shape], order: tuple[int, ...] | None = None) -> list[npt.NDArray[np.int64]]:
    arrays = []
    for i, shape in enumerate(shapes):
        shape = shape if order is None else tuple(shape[a] for a in order)
        arrays.append(np.arange(math.prod(shape)).reshape(shape) + 10_000 * (len(shapes) - i))
    return arrays


@settings(deadline=None)
@given(joined())
def test_concat(case: tuple[list[Shape], int]) -> None:
    shapes, axis = case
    arrays = _numbered(shapes)
    out = np.concatenate(arrays, axis)
    straight, last = counted("Concat", shapes, [out.shape], "move", axis=axis)
    at, rank = axis % out.ndim, out.ndim
    outer = math.prod(out.shape[:at])
    assert straight == outer * len(shapes)
    if len(shapes) > 1:  # of one alone, onnxruntime copies what is one run in pieces all the same
        assert straight == runs(out)
    if rank < 3:
        assert last == straight
        return
    order = (0, *range(2, rank), 1)
    turned = np.concatenate(_numbered(shapes, order), order.index(at))
    if len(shapes) > 1:
        assert last == runs(turned)


@settings(deadline=None)
@given(joined())
def test_split_is_concat_backwards(case: tuple[list[Shape], int]) -> None:
    shapes, axis = case
    whole = np.concatenate(_numbered(shapes), axis).shape
    assert counted("Split", [whole], shapes, "move", axis=axis) == counted("Concat", shapes, [whole], "move", axis=axis)


@st.composite
def sliced(draw: st.DrawFn) -> tuple[Shape, list[tuple[int, int, int]]]:
    """A shape, and for each axis start, stop and step that leave something."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    cuts = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        cuts.append((start, draw(st.integers(start + 1, size)), draw(st.sampled_from((1, 1, 1, 2)))))
    return shape, cuts


@settings(deadline=None)
@given(sliced())
def test_slice(case: tuple[Shape, list[tuple[int, int, int]]]) -> None:
    shape, cuts = case
    array = np.arange(math.prod(shape)).reshape(shape)[tuple(slice(*c) for c in cuts)]
    starts, stops, steps = (tuple(c[i] for c in cuts) for i in range(3))
    constants = {1: starts, 2: stops, 3: tuple(range(len(shape))), 4: steps}
    found, same = counted("Slice", [shape], [array.shape], "move", constants)
    assert found == same
    assert consecutive(array, found)
    assert found <= array.size


@settings(deadline=None)
@given(sliced())
def test_slice_without_steps_is_as_long_as_can_be(case: tuple[Shape, list[tuple[int, int, int]]]) -> None:
    shape, cuts = case
    array = np.arange(math.prod(shape)).reshape(shape)[tuple(slice(a, b) for a, b, _ in cuts)]
    found, _ = counted("Slice", [shape], [array.shape], "move")
    assert consecutive(array, found)
    cut = [i for i, (a, b) in enumerate(zip(shape, array.shape, strict=True)) if a != b]
    outer = math.prod(array.shape[: cut[-1]]) if cut else 1
    assert found == outer


def test_a_slice_with_steps_copies_single_elements() -> None:
    constants = {1: (0,), 2: (8,), 3: (-1,), 4: (2,)}
    assert counted("Slice", [(3, 8)], [(3, 4)], "move", constants) == (12, 12)
    constants[3] = (0,)
    assert counted("Slice", [(4, 8)], [(2, 8)], "move", {**constants, 2: (4,)}) == (2, 2)
    backwards = {1: (-1,), 2: (-9,), 3: (1,), 4: (-1,)}
    assert counted("Slice", [(3, 8)], [(3, 8)], "move", backwards) == (24, 24)


@settings(deadline=None)
@given(SHAPES, st.data())
def test_gather(shape: Shape, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    count = data.draw(st.integers(1, 3))
    indices = np.array([data.draw(st.integers(0, shape[axis] - 1)) for _ in range(count)])
    array = np.take(np.arange(math.prod(shape)).reshape(shape), indices, axis)
    found, _ = counted("Gather", [shape, (count,)], [array.shape], "gather", axis=axis)
    assert consecutive(array, found)


# ---- rows ------------------------------------------------------------------------------------------------


def test_rows_and_planes() -> None:
    assert counted("Softmax", [(2, 3, 8)], [(2, 3, 8)], "softmax") == (6, 6)
    assert counted("Softmax", [(2, 3, 8)], [(2, 3, 8)], "softmax", axis=1) == (48, 48)
    assert counted("LayerNormalization", [(2, 3, 8), (8,)], [(2, 3, 8)], "normalization") == (6, 6)
    assert counted("BatchNormalization", [(2, 3, 8, 8)], [(2, 3, 8, 8)], "normalization") == (6, 6)
    assert counted("MaxPool", [(2, 3, 8, 8)], [(2, 3, 4, 4)], "pool") == (6, 6)
    assert counted("ReduceMean", [(2, 3, 8)], [(2, 3, 1)], "reduce", {1: (-1,)}) == (6, 6)
    assert counted("ReduceMean", [(2, 3, 8)], [(2, 1, 8)], "reduce", {1: (1,)}) == (48, 48)
    assert counted("DepthToSpace", [(1, 16, 4, 4)], [(1, 4, 8, 8)], "move") == (256, 256)


def test_scales_by_channel() -> None:
    assert counted("DequantizeLinear", [(8, 3, 3, 3), (8,)], [(8, 3, 3, 3)], "dequantize", axis=0) == (8, 8)
    assert counted("DequantizeLinear", [(32, 64), (64,)], [(32, 64)], "dequantize") == (2048, 2048)
    assert counted("QuantizeLinear", [(32, 64), ()], [(32, 64)], "quantize") == (1, 1)


def test_what_is_unknown_or_empty_has_no_pieces() -> None:
    assert counted("Transpose", [(0, 3)], [(3, 0)], "move") == (0, 0)
    node = ir.node("Transpose", [ir.Value(name="x")])
    assert pieces(node, [None], [(3, 4)], "move", lambda v: ()) == (0, 0)
    assert pieces(node, [(4, 3)], [None], "move", lambda v: ()) == (0, 0)
    assert pieces(node, [(4, 3)], [], "move", lambda v: ()) == (0, 0)
