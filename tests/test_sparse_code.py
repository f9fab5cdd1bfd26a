"""Weights with many zeros: a mask and a palette of the others, exact in onnxruntime, folded at load, and smaller."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, check, fused, made, normal, run, text

from onnxcompress.model import serialize, weight_bytes
from onnxcompress.passes._codes import Code, Layout, Palette, packed
from onnxcompress.passes._coding import Coding, Subject, coded, estimated_bytes
from onnxcompress.passes._linear_maps import LinearMap, Moments
from onnxcompress.passes._sparse_code import Sparse, pays, smallest
from onnxcompress.passes.prune_connections import PruneConnections
from onnxcompress.passes.share_weights import ShareWeights
from onnxcompress.rewrite import Rewriter


def written(code: Code, opset: int = 13) -> ir.Model:
    """A model that looks rows up in a weight that lies in the file as the code says."""
    array = code.decoded()
    rows = ",".join(["n", *map(str, array.shape[1:])])
    dtype = "float" if array.dtype == np.float32 else "int8"
    body = f"g (int64[n] x) => ({dtype}[{rows}] y) {{ y = Gather <axis = 0> (w, x) }}"
    model = text(body, {"w": np.zeros_like(array)}, opset=opset)
    rewriter = Rewriter(model)
    value = rewriter.value("w")
    rewriter.replace_uses(value, code.write("w", model.graph[0], rewriter))
    rewriter.drop_unused_weights()
    rewriter.sort()
    check(model)
    return model


def assert_made(code: Code, opset: int = 13) -> None:
    decoded, model = code.decoded(), written(code, opset)
    for fuse in (False, True):
        found = run(model, {"x": np.arange(len(decoded))}, fuse=fuse)["y"]
        assert found.dtype == decoded.dtype
        np.testing.assert_array_equal(found.view(np.uint8), decoded.view(np.uint8))
    assert [n.op_type for n in fused(model).graph.node] == ["Gather"]


def draw(seed: int, shape: tuple[int, ...], entries: int, share: float) -> Array:
    """Indices of which about a share is 0, the others from 1 on."""
    chooser = np.random.default_rng(seed)
    return np.where(chooser.random(shape) < share, 0, chooser.integers(1, entries, shape))


def book(entries: int, dtype: type = np.float32) -> Array:
    """A codebook whose first entry is zero, and no other."""
    if dtype is np.int8:
        return (np.arange(entries) - (np.arange(entries) > 127) * 256).astype(np.int8)
    return np.append(np.float32(0), normal(3, entries - 1))


def sparse(indices: Array, codebook: Array, scales: Array | None, layout: Layout) -> Sparse:
    kept = indices.ravel() != 0
    values = packed(indices.ravel()[kept] - 1, codebook[1:], None, Layout((int(kept.sum()),), (int(kept.sum()),)))
    return Sparse(np.packbits(kept), values, scales, layout)


# --- what is stored is what is made ----------------------------------------------------------------


@pytest.mark.parametrize("entries", [2, 3, 4, 5, 8, 17, 33, 65, 200])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 3, 5), (1031,), (64, 48)])
def test_values_are_those_of_the_code_to_the_last_bit(entries: int, shape: tuple[int, ...]) -> None:
    indices, codebook = draw(entries, shape, entries, 0.6), book(entries)
    code = sparse(indices, codebook, None, Layout(shape, shape))
    np.testing.assert_array_equal(code.decoded(), codebook[indices])
    assert_made(code)


def test_integers_stay_int8() -> None:
    indices = draw(0, (33, 21), 12, 0.5)
    code = sparse(indices, book(12, np.int8), None, Layout((33, 21), (33, 21)))
    assert code.decoded().dtype == np.int8
    assert_made(code)


def test_scales_and_order_come_after_placing() -> None:
    stored, codebook = (4, 9, 6), book(20)
    indices, scales = draw(1, stored, 20, 0.7), np.abs(normal(5, 4, 1, 6)).astype(np.float16)
    code = sparse(indices, codebook, scales, Layout((6, 36), stored, (2, 0, 1)))
    wanted = (codebook[indices] * scales.astype(np.float32)).transpose(2, 0, 1).reshape(6, 36)
    np.testing.assert_array_equal(code.decoded(), wanted)
    assert_made(code)


def test_two_weights_share_the_constants_that_are_the_same() -> None:
    shape = (40, 50)
    code = sparse(draw(0, shape, 9, 0.8), book(9), None, Layout(shape, shape))
    body = "g (float[n,40] x) => (float[n,50] y) { a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }"
    model = text(body, {"w": np.zeros(shape, np.float32), "v": np.ones(shape, np.float32)}, opset=13)
    rewriter = Rewriter(model)
    for name in ("w", "v"):
        value = rewriter.value(name)
        rewriter.replace_uses(value, code.write(name, model.graph[0], rewriter))
    rewriter.drop_unused_weights()
    rewriter.sort()
    check(model)
    names = [str(v.name) for v in model.graph.initializers.values()]
    assert sum(n.startswith("onnxcompress_zero") for n in names) == 1
    assert sum(n.startswith("onnxcompress_axis") for n in names) == 1
    x = np.eye(40, dtype=np.float32)
    np.testing.assert_array_equal(run(model, {"x": x}, fuse=True)["y"], 2 * code.decoded())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    entries=st.integers(2, 256),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_sparsity(shape: tuple[int, ...], entries: int, share: float, scaled: bool, seed: int) -> None:
    indices, codebook = draw(seed, shape, entries, share), book(entries)
    scales = None
    if scaled:
        scales = np.abs(normal(seed, *shape[:1], *([1] * (len(shape) - 1)))).astype(np.float16)
    layout = Layout(shape, shape)
    wanted = codebook[indices] * (np.float32(1) if scales is None else scales.astype(np.float32))
    chosen = smallest(indices, codebook, scales, layout)
    np.testing.assert_array_equal(chosen.decoded(), wanted)
    assert_made(chosen)
    if (indices != 0).any():
        assert_made(sparse(indices, codebook, scales, layout))


# --- which form is taken ---------------------------------------------------------------------------


def form(share: float, entries: int, shape: tuple[int, ...] = (256, 256)) -> Code:
    return smallest(draw(0, shape, entries, share), book(entries), None, Layout(shape, shape))


@pytest.mark.parametrize(("entries", "dense", "thin"), [(4, 0.2, 0.6), (16, 0.15, 0.4), (32, 0.1, 0.3), (64, 0.1, 0.3)])
def test_the_form_with_fewer_bytes_is_taken(entries: int, dense: float, thin: float) -> None:
    assert isinstance(form(dense, entries), Palette)
    assert isinstance(form(thin, entries), Sparse)


def test_few_weights_and_nothing_but_zeros_stay_as_they_are() -> None:
    assert isinstance(form(0.9, 16, (20, 20)), Palette)
    shape = (64, 64)
    zeros = smallest(np.zeros(shape, np.int64), np.zeros(1, np.float32), None, Layout(shape, shape))
    assert isinstance(zeros, Palette) and not zeros.decoded().any()
    assert_made(zeros)


def test_vectors_and_codebooks_without_zero_have_no_mask() -> None:
    layout = Layout((64, 64), (64, 64))
    assert isinstance(smallest(draw(0, (64, 32), 9, 0.9), normal(0, 9, 2), None, layout), Palette)
    assert isinstance(smallest(draw(0, (64, 64), 9, 0.9), normal(0, 9), None, layout), Palette)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("bits", [2, 4, 5, 6])
def test_bytes_are_a_bit_for_each_and_the_indices_of_the_others(share: float, bits: int) -> None:
    shape = (256, 300)
    code = form(share, 2**bits + 1, shape)
    assert isinstance(code, Sparse)
    size, left = math.prod(shape), np.count_nonzero(code.decoded())
    bare = size / 8 + left * bits / 8
    stored = sum(a.nbytes for a in code.arrays())
    assert bare <= stored <= bare + 4 * 2**bits + 3 * 1024  # a table for two or four weights a byte has up to 256 rows
    grown = len(serialize(written(code)))
    assert stored < grown < stored + 128 * code.nodes + 5120  # and tables of digits


def test_what_is_expected_is_what_happens() -> None:
    for share in (0.1, 0.25, 0.5, 0.8):
        for bits in (2, 3, 4, 5, 6):
            if pays(256 * 256, share, bits):
                assert isinstance(form(share, 2**bits + 1), Sparse), (share, bits)


# --- zeros stay ------------------------------------------------------------------------------------


def pruned(seed: int, share: float, outputs: int = 48, inputs: int = 64) -> Array:
    weight = normal(seed, outputs, inputs)
    return np.where(np.random.default_rng(seed).random(weight.shape) < share, 0, weight).astype(np.float32)


def subject(array: Array, *, known: bool, scales: Array | None = None) -> Subject:
    outputs, inputs = array.shape
    linear = LinearMap(1, array.shape, (1, outputs, inputs, 1), (0, 1, 3, 2))
    x = normal(7, 500, inputs).astype(np.float64) @ normal(8, inputs, inputs)
    moments = (Moments(x.T @ x / len(x), x.mean(0)),)
    return Subject(array, linear, moments if known else None, scales)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("bits", [1.6, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_zeros_stay_through_feedback_and_refits(bits: float, uniform: bool, known: bool, share: float) -> None:
    array = pruned(1, share)
    fitted = coded(subject(array, known=known), Coding(bits, uniform=uniform))
    decoded = fitted.code.decoded()
    assert not decoded[array == 0].any()
    assert decoded.any()
    assert fitted.lost < 0.7


def test_zeros_of_integers_stay() -> None:
    array = np.rint(pruned(2, 0.6) * 40).clip(-127, 127).astype(np.int8)
    decoded = coded(subject(array, known=True, scales=np.full((1, 1), 0.01, np.float32)), Coding(4)).code.decoded()
    assert decoded.dtype == np.int8
    assert not decoded[array == 0].any()


def test_vectors_of_a_weight_with_zeros_are_vectors_like_others() -> None:
    fitted = coded(subject(pruned(3, 0.5), known=True), Coding(4, 2))
    assert isinstance(fitted.code, Palette)
    assert fitted.lost < 0.5


def test_behind_a_mask_the_codebook_has_all_its_entries_for_what_is_not_zero() -> None:
    array = pruned(4, 0.7, 256, 256)
    code = coded(subject(array, known=False), Coding(2)).code
    assert isinstance(code, Sparse)
    assert np.unique(code.values.decoded()).size == 4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("bits", [1.6, 2, 3, 4, 5, 6])
def test_bytes_are_as_estimated(bits: float, share: float) -> None:
    array = pruned(5, share, 256, 512)
    asked = subject(array, known=False)
    code = coded(asked, Coding(bits)).code
    zeros = float((array == 0).mean())
    expected = estimated_bytes(asked.linear, Coding(bits), zeros=zeros)
    tables = 8192  # of digits a byte, that load faster
    assert code.bytes - tables < expected < code.bytes * 1.15 + 300  # 1.6 bits: what is not zero takes one
    assert expected <= estimated_bytes(asked.linear, Coding(bits))


# --- the pass --------------------------------------------------------------------------------------


def test_pruned_weights_take_fewer_bytes_and_nothing_more_runs() -> None:
    body = "g (float[n,128] x) => (float[n,96] y) { y = Gemm <transB = 1> (x, w, b) }"
    model = text(body, {"w": normal(0, 96, 128), "b": normal(1, 96)})
    feeds = [{"x": normal(i + 2, 64, 128)} for i in range(8)]
    thin = made(PruneConnections(sparsity=0.8), model, lambda _: True, feeds)
    dense, shared = (made(ShareWeights(bits=5), m, lambda _: True, feeds) for m in (model, thin))
    assert weight_bytes(shared) < 0.6 * weight_bytes(dense)
    assert [n.op_type for n in fused(shared).graph.node] == [n.op_type for n in fused(model).graph.node]
    kept = run(thin, feeds[0])["y"], run(shared, feeds[0])["y"]
    assert np.square(kept[0] - kept[1]).mean() < 0.01 * np.square(kept[0]).mean()
