"""Attention in one node: whole heads go, or widths of all heads; the scale stays what it was.

Queries are [kv heads, queries of a kv head, width], keys and values [kv heads, width]; with as many query as
kv heads the middle factor is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.coupling.axes import Axis
from onnxcompress.coupling.coupler import Coupler, Operand
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import mends, rule

_ALONG = "attention runs along it"
_ROTATES = "a rotation pairs its positions"
_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class _Heads:
    groups: Axis
    each: Axis
    width: Axis
    width_v: Axis

    @property
    def query(self) -> tuple[Axis, Axis, Axis]:
        return (self.groups, self.each, self.width)

    @property
    def output(self) -> tuple[Axis, Axis, Axis]:
        return (self.groups, self.each, self.width_v)


def _heads(node: ir.Node, at: Coupler, count: int, groups: int, width: int, width_v: int | None) -> _Heads:
    widths = at.virtual(node, "width", width, "head widths")
    at.sums_data(node, widths)
    return _Heads(
        at.virtual(node, "heads", groups, "heads"),
        at.virtual(node, "queries of a head", count // groups, "query heads"),
        widths,
        widths if width_v is None else at.virtual(node, "value width", width_v, "head widths"),
    )


def _spread(operand: Operand, factors: tuple[Axis, ...], node: ir.Node, at: Coupler) -> None:
    """[B, S, heads x width] or [B, heads, S, width]; the other axes stay."""
    if len(operand) == 3:
        at.product([operand[2]], factors, node)
        rest = (0, 1)
    else:
        at.product([operand[1]], factors[:-1], node)
        at.same(operand[3], factors[-1], node)
        rest = (0, 2)
    for k in rest:
        at.pin(operand[k], node, _ALONG)


def _cache(operand: Operand | None, groups: Axis, width: Axis, node: ir.Node, at: Coupler) -> None:
    if operand is not None and len(operand) == 4:
        _spread(operand, (groups, width), node, at)


def _mask(operand: Operand | None, heads: _Heads, node: ir.Node, at: Coupler) -> None:
    """[..., heads or 1, S, T]."""
    if operand is None:
        return
    for k, axis in enumerate(operand.axes):
        if k != len(operand) - 3:
            at.pin(axis, node, _ALONG)
        elif at.size(axis) > 1:
            at.product([axis], [heads.groups, heads.each], node)


def _keep_rest(node: ir.Node, at: Coupler, *indices: int) -> None:
    """Whatever else it reads stays as it is."""
    for index in indices:
        if (operand := at.input(node, index)) is not None:
            for axis in operand.axes:
                at.pin(axis, node, f"{node.op_type} reads it whole")


def _width(operand: Operand, count: int) -> int:
    return operand.shape[3] if len(operand) == 4 else operand.shape[2] // count


@rule("Attention")
def attention(node: ir.Node, at: Coupler) -> None:
    """ONNX 23: Q, K, V, mask, past key, past value -> Y, present key, present value, scores."""
    q, k, v, y = at.data(node), at.data(node, 1), at.data(node, 2), at.output(node)
    count = q.shape[1] if len(q) == 4 else node.attributes.get_int("q_num_heads")
    groups = k.shape[1] if len(k) == 4 else node.attributes.get_int("kv_num_heads")
    heads = _heads(node, at, count, groups, _width(q, count), _width(v, groups))
    _spread(q, heads.query, node, at)
    _spread(k, (heads.groups, heads.width), node, at)
    _spread(v, (heads.groups, heads.width_v), node, at)
    _spread(y, heads.output, node, at)
    _mask(at.input(node, 3), heads, node, at)
    _cache(at.input(node, 4), heads.groups, heads.width, node, at)
    _cache(at.input(node, 5), heads.groups, heads.width_v, node, at)
    _keep_rest(node, at, 6)
    for index, width in ((1, heads.width), (2, heads.width_v)):
        if index < len(node.outputs) and node.outputs[index].name:
            _cache(at.output(node, index), heads.groups, width, node, at)
    if len(node.outputs) > 3 and node.outputs[3].name:
        _mask(at.output(node, 3), heads, node, at)


@rule("MultiHeadAttention", domain=_CONTRIB)
def multi_head(node: ir.Node, at: Coupler) -> None:
    """Query, key, value, bias, key padding mask, attention bias, past key, past value."""
    q, k, v, y = at.data(node), at.input(node, 1), at.input(node, 2), at.output(node)
    count = node.attributes.get_int("num_heads")
    if k is None or v is None or len(k) == 5 or len(q) == 5:
        at.pin_all(node, "query, key and value are packed into one tensor")
        return
    heads = _heads(node, at, count, count, _width(q, count), _width(v, count))
    _spread(q, heads.query, node, at)
    _spread(k, (heads.groups, heads.width), node, at)
    _spread(v, (heads.groups, heads.width_v), node, at)
    _spread(y, heads.output, node, at)
    if (bias := at.input(node, 3)) is not None:
        sizes = [at.size(heads.width) * count] * 2 + [at.size(heads.width_v) * count]
        for what, start, size in zip("qkv", (0, sizes[0], 2 * sizes[0]), sizes, strict=True):
            part = at.virtual(node, f"bias {what}", size)
            at.block(part, bias[0], start, node)
            at.product([part], [heads.groups, heads.width_v if what == "v" else heads.width], node)
    _keep_rest(node, at, 4, 8, 9)
    _mask(at.input(node, 5), heads, node, at)
    _cache(at.input(node, 6), heads.groups, heads.width, node, at)
    _cache(at.input(node, 7), heads.groups, heads.width_v, node, at)
    for index, width in ((1, heads.width), (2, heads.width_v)):
        if index < len(node.outputs) and node.outputs[index].name:
            _cache(at.output(node, index), heads.groups, width, node, at)


@rule("GroupQueryAttention", domain=_CONTRIB)
def group_query(node: ir.Node, at: Coupler) -> None:
    """Query, key, value, past key, past value, lengths, total, cosines, sines, ..."""
    q, k, v, y = at.data(node), at.input(node, 1), at.input(node, 2), at.output(node)
    count, groups = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    if k is None or v is None:
        at.pin_all(node, "query, key and value are packed into one tensor")
        return
    heads = _heads(node, at, count, groups, _width(q, count), None)
    for operand, factors in ((q, heads.query), (k, (heads.groups, heads.width)), (v, (heads.groups, heads.width))):
        _spread(operand, factors, node, at)
    _spread(y, heads.output, node, at)
    at.pin(heads.width, node, "onnxruntime takes only widths of 8, 16, 24, ...")
    for index in (3, 4):
        _cache(at.input(node, index), heads.groups, heads.width, node, at)
    _keep_rest(node, at, 5, 6, 7, 8, 9)
    _mask(at.input(node, 10), heads, node, at)
    if (sink := at.input(node, 11)) is not None:
        at.product([sink[0]], [heads.groups, heads.each], node)
    for index in (1, 2):
        if index < len(node.outputs) and node.outputs[index].name:
            _cache(at.output(node, index), heads.groups, heads.width, node, at)


@rule("Attention", domain=_CONTRIB)
def packed(node: ir.Node, at: Coupler) -> None:
    """X [B, S, I] and W [I, q k v of all heads], with a bias; projects and attends."""
    x, w, y, bias = at.data(node), at.data(node, 1), at.output(node), at.input(node, 2)
    count = node.attributes.get_int("num_heads")
    sizes = node.attributes.get_ints("qkv_hidden_sizes", None)
    if sizes is not None and len(set(sizes)) > 1:
        at.pin_all(node, "query, key and value have sizes of their own")
        return
    heads = _heads(node, at, count, count, w.shape[1] // 3 // count, None)
    three = at.virtual(node, "q k v", 3, "blocks")
    at.pin(three, node, "query, key and value stay")
    at.same(x[2], w[0], node)
    for axis in [w[1], *([bias[0]] if bias is not None else [])]:
        at.product([axis], [three, heads.groups, heads.width], node)
    _spread(y, heads.output, node, at)
    for axis in x.axes[:2]:
        at.pin(axis, node, _ALONG)
    if node.attributes.get_int("do_rotary", 0):
        at.pin(heads.width, node, _ROTATES)
    _keep_rest(node, at, 3, 6)
    _mask(at.input(node, 5), heads, node, at)
    for operand in (at.input(node, 4), at.output(node, 1) if len(node.outputs) > 1 and node.outputs[1].name else None):
        if operand is not None:  # [2, B, heads, T, width]
            at.same(operand[2], heads.groups, node)
            at.same(operand[4], heads.width, node)
            for k in (0, 1, 3):
                at.pin(operand[k], node, _ALONG)
    if w.constant:
        at.sums(node, 1, w[0], x[2], 1)


@mends("Attention")
@mends("Attention", "MultiHeadAttention", "GroupQueryAttention", domain=_CONTRIB)
def fewer_heads(node: ir.Node, mender: Mender) -> None:
    """As many heads as are left; the scale is that of the old width."""
    groups = mender.left(node, "heads")
    count = groups * mender.left(node, "queries of a head")
    for name, number in (("num_heads", count), ("q_num_heads", count), ("kv_num_heads", groups)):
        if node.attributes.get(name) is not None:
            mender.rewriter.set_attribute(node, name, number)
    sizes = node.attributes.get_ints("qkv_hidden_sizes", None)
    if sizes is not None and node.op_type == "Attention":
        mender.rewriter.set_attribute(node, "qkv_hidden_sizes", [count * mender.left(node, "width")] * len(sizes))
    if mender.virtual(node, "width") is not None and not node.attributes.get_float("scale", 0.0):
        mender.rewriter.set_attribute(node, "scale", 1 / math.sqrt(mender.before(node, "width")))


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", domain=_CONTRIB)
def rotary(node: ir.Node, at: Coupler) -> None:
    """[B, S, heads x width] or [B, heads, S, width]; positions turn in pairs: a pair goes, and its angle."""
    x, y = at.data(node), at.output(node)
    first = 2 if node.domain else 1
    cos, sin = at.data(node, first), at.data(node, first + 1)
    _keep_rest(node, at, 1 if node.domain else 3)
    for a, b in zip(x.axes, y.axes, strict=True):
        at.same(a, b, node)
    pairs = at.virtual(node, "pairs", cos.shape[-1], "head widths")
    two = at.virtual(node, "ends of a pair", 2)
    at.pin(two, node, _ROTATES)
    for table in (cos, sin):
        at.same(table[-1], pairs, node)
        for axis in table.axes[:-1]:
            at.pin(axis, node, "angles are looked up by position")
    if node.attributes.get_int("rotary_embedding_dim", 0):
        at.pin(pairs, node, "just a part of each head is turned")
        at.pin(x[-1], node, "just a part of each head is turned")
        return
    turned = (pairs, two) if node.attributes.get_int("interleaved", 0) else (two, pairs)
    if len(x) == 4:
        at.product([x[3]], turned, node)
    else:
        heads = at.virtual(node, "heads", x.shape[2] // (2 * cos.shape[-1]), "heads")
        at.product([x[2]], [heads, *turned], node)


@mends("RotaryEmbedding")
@mends("RotaryEmbedding", domain=_CONTRIB)
def fewer_turned(node: ir.Node, mender: Mender) -> None:
    """As many heads as are left."""
    kept = mender.virtual(node, "heads")
    if kept is not None and node.attributes.get_int("num_heads", 0) > 0:
        mender.rewriter.set_attribute(node, "num_heads", len(kept))


@rule("EmbedLayerNormalization", domain=_CONTRIB)
def embed(node: ir.Node, at: Coupler) -> None:
    """Ids, segments, tables of words, positions and segments, gamma, beta."""
    y = at.output(node)
    for index in (2, 3, 4):
        if (table := at.input(node, index)) is not None:
            at.pin(table[0], node, "positions are looked up that the data say")
            at.same(table[1], y[2], node)
    for index in (5, 6):
        if (constant := at.input(node, index)) is not None:
            at.same(constant[0], y[2], node)
    at.pin(y[2], node, "EmbedLayerNormalization normalizes over it")
