"""Codes of weights: what the nodes make is what they say, to the last bit, and a runtime folds them at load."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, check, fused, run, text

from onnxcompress.errors import PassError
from onnxcompress.model import weight_bytes
from onnxcompress.passes._codes import Code, Half, Layout, Palette, Scaled, packed
from onnxcompress.rewrite import Rewriter

SHAPES = [(7, 5), (3, 3, 3), (2, 3, 3, 5), (1031,), (64, 48)]
COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256]


def holder(shape: tuple[int, ...], dtype: str = "float") -> ir.Model:
    """A model whose one node looks up all rows of a weight."""
    rows = ",".join(["n", *map(str, shape[1:])])
    array = np.zeros(shape, np.float32 if dtype == "float" else np.int8)
    return text(f"g (int64[n] x) => ({dtype}[{rows}] y) {{ y = Gather <axis = 0> (w, x) }}", {"w": array})


def written(code: Code) -> ir.Model:
    """A model whose weights lie in the file as a code."""
    decoded = code.decoded()
    model = holder(decoded.shape, "float" if decoded.dtype == np.float32 else "int8")
    rewriter = Rewriter(model)
    value = rewriter.value("w")
    rewriter.replace_uses(value, code.write("w", model.graph[0], rewriter))
    rewriter.drop_unused_weights()
    rewriter.sort()
    check(model)
    return model


def assert_made(code: Code) -> None:
    """The model makes what the code says, with and without optimizations, and nothing of it is left to run."""
    decoded, model = code.decoded(), written(code)
    feed = {"x": np.arange(len(decoded))}
    for fuse in (False, True):
        made = run(model, feed, fuse=fuse)["y"]
        assert made.dtype == decoded.dtype
        np.testing.assert_array_equal(made.view(np.uint8), decoded.view(np.uint8))
    assert [n.op_type for n in fused(model).graph.node] == ["Gather"]


def indices(seed: int, entries: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(0, entries, shape)


def codebook(entries: int, *width: int, dtype: type = np.float32) -> Array:
    if dtype is np.int8:
        return (indices(1, 256, entries, *width) - 128).astype(np.int8)
    return np.random.default_rng(1).standard_normal((entries, *width)).astype(np.float32)


def scales(*shape: int) -> Array:
    return np.random.default_rng(2).uniform(0.2, 3, shape).astype(np.float16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("entries", [2, 3, 5, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_a_palette_is_what_it_says(shape: tuple[int, ...], entries: int, dtype: type) -> None:
    chosen, book = indices(0, entries, *shape), codebook(entries, dtype=dtype)
    code = packed(chosen, book, None, Layout(shape, shape))
    np.testing.assert_array_equal(code.decoded(), book[chosen])
    assert_made(code)


@pytest.mark.parametrize("entries", [2, 3, 16, 64])
def test_scales_are_multiplied(entries: int) -> None:
    chosen, book, by = indices(0, entries, 6, 10), codebook(entries), scales(6, 1)
    code = packed(chosen, book, by, Layout((6, 10), (6, 10)))
    np.testing.assert_array_equal(code.decoded(), book[chosen] * by.astype(np.float32))
    assert_made(code)


@pytest.mark.parametrize("entries", [4, 8, 16])
def test_blocks_of_scales(entries: int) -> None:
    chosen, book, by = indices(0, entries, 6, 4, 8), codebook(entries), scales(6, 4, 1)
    code = packed(chosen, book, by, Layout((6, 32), (6, 4, 8)))
    np.testing.assert_array_equal(code.decoded(), (book[chosen] * by.astype(np.float32)).reshape(6, 32))
    assert_made(code)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_vectors_whose_neighbours_are_not_the_tensor_s(width: int, dtype: type) -> None:
    """As for a Conv: stored as (groups, outputs, taps, channels)."""
    stored, order, shape = (2, 3, 9, 8), (0, 1, 3, 2), (6, 8, 3, 3)
    layout = Layout(shape, stored, order)
    chosen, book = indices(0, 200, math.prod(stored) // width), codebook(200, width, dtype=dtype)
    code = packed(chosen, book, None, layout)
    np.testing.assert_array_equal(code.decoded(), layout.tensor(book[chosen].reshape(stored)))
    assert_made(code)
    if dtype is np.float32:
        assert_made(packed(chosen, book, scales(2, 3, 1, 1), layout))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_and_half(shape: tuple[int, ...]) -> None:
    integers = (indices(0, 255, *shape) - 127).astype(np.int8)
    by = np.random.default_rng(0).uniform(0.1, 1, (shape[0], *(1,) * (len(shape) - 1))).astype(np.float32)
    eight = Scaled(integers, by, Layout(shape, shape))
    np.testing.assert_array_equal(eight.decoded(), integers.astype(np.float32) * by)
    assert_made(eight)
    floats = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    assert_made(Half(floats))


def test_eight_bits_in_blocks() -> None:
    integers = (indices(0, 255, 6, 4, 8) - 127).astype(np.int8)
    assert_made(Scaled(integers, scales(6, 4, 1).astype(np.float32), Layout((6, 32), (6, 4, 8))))


@pytest.mark.parametrize("entries", COUNTS)
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 250, 4099])
def test_no_number_of_entries_or_weights_is_special(entries: int, size: int) -> None:
    chosen, book = indices(3, entries, size), codebook(entries)
    code = packed(chosen, book, None, Layout((size,), (size,)))
    np.testing.assert_array_equal(code.decoded(), book[chosen])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 256),
    st.booleans(),
    st.sampled_from([np.float32, np.int8]),
    st.integers(0, 99),
)
def test_any_shape_and_any_codebook(dims: list[int], entries: int, scaled: bool, dtype: type, seed: int) -> None:
    shape = tuple(dims)
    chosen, book = indices(seed, entries, *shape), codebook(entries, dtype=dtype)
    by = scales(*(d if i == 0 else 1 for i, d in enumerate(shape))) if scaled and dtype is np.float32 else None
    code = packed(chosen, book, by, Layout(shape, shape))
    wanted = book[chosen] if by is None else book[chosen] * by.astype(np.float32)
    np.testing.assert_array_equal(code.decoded(), wanted)
    assert_made(code)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_a_layout_goes_there_and_back(dims: list[int]) -> None:
    order = tuple(int(i) for i in np.random.default_rng(sum(dims)).permutation(len(dims)))
    tensor = np.arange(math.prod(dims)).reshape([dims[i] for i in order])
    layout = Layout(tensor.shape, tuple(dims), order)
    np.testing.assert_array_equal(layout.tensor(layout.storing(tensor)), tensor)


@pytest.mark.parametrize(("entries", "bits"), [(2, 1), (3, 1.6), (4, 2), (6, 8 / 3), (8, 3), (16, 4), (32, 5), (64, 6)])
def test_indices_take_as_many_bits_as_they_should(entries: int, bits: float) -> None:
    size = 192_000
    code = packed(indices(0, entries, size), codebook(entries), None, Layout((size,), (size,)))
    stored = sum(part.nbytes for part, _ in code.planes)
    assert stored == math.ceil(size * bits / 8)
    assert sum(a.nbytes for a in code.arrays()) <= stored * 1.5


@pytest.mark.parametrize("entries", [2, 3, 4, 16])
def test_a_small_weight_has_no_large_table(entries: int) -> None:
    code = packed(indices(0, entries, 4096), codebook(entries), None, Layout((4096,), (4096,)))
    assert sum(a.nbytes for a in code.arrays()) <= 4096 * math.ceil(math.log2(entries)) / 8 + 4 * entries
    assert_made(code)


def test_a_table_of_pairs_is_for_weights_that_are_large_enough() -> None:
    """256 pairs of floats take 2 KiB; digits of a byte do as well."""
    small = packed(indices(0, 16, 2000), codebook(16), None, Layout((2000,), (2000,)))
    large = packed(indices(0, 16, 64000), codebook(16), None, Layout((64000,), (64000,)))
    assert small.planes[0][1] == 4
    assert small.table.nbytes == 64
    assert large.planes[0][1] == 0
    assert large.table.shape == (256, 2)


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(PassError, match="257 entries"):
        packed(indices(0, 257, 5000), codebook(257), None, Layout((5000,), (5000,)))


@pytest.mark.parametrize("entries", [3, 8, 16, 64])
def test_the_size_that_is_said_is_about_the_size_in_the_file(entries: int) -> None:
    code = packed(indices(0, entries, 128, 128), codebook(entries), scales(128, 1), Layout((128, 128), (128, 128)))
    model = written(code)
    arrays = sum(a.nbytes for a in code.arrays())
    shared = 256 * 12 + 64  # tables of digits and shapes
    assert arrays <= weight_bytes(model) <= arrays + shared
    unpacking = len(list(model.graph)) - 1
    assert unpacking <= code.nodes + 8  # tables of digits are shared, and cost up to four nodes each


def test_two_weights_share_the_tables_of_digits() -> None:
    model = text(
        "g (int64[n] x) => (float[n,9] y) { a = Gather (v, x)  b = Gather (w, x)  y = Add (a, b) }",
        {"v": np.zeros((8, 9), np.float32), "w": np.zeros((8, 9), np.float32)},
    )
    rewriter = Rewriter(model)
    codes = {n: packed(indices(s, 8, 8, 9), codebook(8), None, Layout((8, 9), (8, 9))) for s, n in enumerate("vw")}
    for name, code in codes.items():
        rewriter.replace_uses(rewriter.value(name), code.write(name, model.graph[0], rewriter))
    rewriter.drop_unused_weights()
    rewriter.sort()
    check(model)
    assert sum(str(n.outputs[0].name).startswith("onnxcompress_digits") for n in model.graph) == 2
    assert sum(n.startswith("onnxcompress_digits_of") for n in model.graph.initializers) == 1
    expected = codes["v"].decoded() + codes["w"].decoded()
    np.testing.assert_array_equal(run(model, {"x": np.arange(8)})["y"], expected)


def test_the_check_can_fail() -> None:
    """One index off is seen."""
    chosen, book = indices(0, 8, 5, 7), codebook(8)
    code, other = (packed(c, book, None, Layout((5, 7), (5, 7))) for c in (chosen, (chosen + 1) % 8))
    assert isinstance(code, Palette)
    made = run(written(other), {"x": np.arange(5)})["y"]
    assert not np.array_equal(made, code.decoded())
