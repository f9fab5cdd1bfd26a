"""Transformers: pictures, a decoder with grouped-query attention, an encoder of text."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from onnxcompress.models_zoo.building import SEED, Array, Net
from onnxcompress.models_zoo.families_layers import LINEAR, conv, gelu, gemm, heads_of, image_shape, linear

__all__ = ["LONGEST", "VOCABULARY", "bert", "gpt_gqa", "vit"]

VOCABULARY = 256
LONGEST = 128
"""Tokens that position tables reach."""

_SILENT = -1e4  # added where attention must not look


def _gain(net: Net, name: str, width: int) -> str:
    return net.tensor(name, 1 + net.random(name, (width,), 0.2))


def _attend(net: Net, q: str, k: str, v: str, width: int, mask: str = "") -> str:
    """Values [B, heads, T, d] seen through softmax(q k / sqrt(d)); ``k`` is [B, heads, d, T]."""
    scores = net("Mul", net("MatMul", q, k), 1 / math.sqrt(width))
    if mask:
        scores = net("Add", scores, mask)
    return net("MatMul", net("Softmax", scores, axis=-1), v)


def vit(width: int = 32, *, depth: int = 2, seed: int = SEED) -> onnx.ModelProto:
    """Patches of 8x8 pixels and a class token; queries, keys and values from one product.

    They are told apart by Gather in even layers and by Split and Squeeze in odd ones (indexing
    and ``unbind``); the last Reshape has its width as a number, or by Shape and Gather from the block's input.
    """
    net = Net("vit", width, seed, depth)
    heads = heads_of(width)
    d, tokens = width // heads, 17

    def norm(x: str, name: str) -> str:
        with net.scope(name):
            shift = net.weight("bias", (width,), 0.1)
            return net("LayerNormalization", x, _gain(net, "weight", width), shift, axis=-1, epsilon=1e-6)

    def attention(x: str, layer: int) -> str:
        y = linear(net, x, "qkv", width, 3 * width, gain=1.5)
        n, steps = net.dim(x, 0), net.dim(x, 1)
        y = net.reshape(y, n, steps, 3, heads, d)
        y = net("Transpose", y, perm=[2, 0, 3, 1, 4])
        if layer % 2:
            q, k, v = (net("Squeeze", part, [0]) for part in net.many("Split", 3, y, [1, 1, 1], axis=0))
        else:
            q, k, v = (net("Gather", y, np.array(i, np.int64), axis=0) for i in range(3))
        y = _attend(net, q, net("Transpose", k, perm=[0, 1, 3, 2]), v, d)
        y = net("Transpose", y, perm=[0, 2, 1, 3])
        y = net.reshape(y, n, steps, net.dim(x, 2) if layer % 2 else width)
        return linear(net, y, "proj", width, width)

    x = conv(net, net.input("image", image_shape(32)), "patch_embed", 3, width, 8, stride=8, pad=0, gain=8.0)
    x = net("Transpose", net.reshape(x, net.dim(x, 0), width, -1), perm=[0, 2, 1])
    cls = net.expand(net.weight("cls_token", (1, 1, width), 0.5), net.dim(x, 0), -1, -1)
    x = net("Concat", cls, x, axis=1)
    x = net("Add", x, net.weight("pos_embed", (1, tokens, width), 0.3))
    for layer in range(depth):
        with net.scope(f"blocks.{layer}"):
            with net.scope("attn"):
                y = attention(norm(x, "norm1"), layer)
            x = net("Add", x, y)
            with net.scope("mlp"):
                y = gelu(net, linear(net, norm(x, "norm2"), "fc1", width, 4 * width))
                y = linear(net, y, "fc2", 4 * width, width, gain=0.7)
            x = net("Add", x, y)
    x = net("Gather", norm(x, "norm"), np.array(0, np.int64), axis=1)
    net.output(gemm(net, x, "head", width, 10), "scores", ["batch", 10])
    return net.finish()


def _rotations(d: int) -> tuple[Array, Array]:
    """Cosines and sines [LONGEST, d] of d/2 frequencies, both halves alike.

    Angles grow by 2 atan(t): sine and cosine of that are rational in t, and each next place is a
    product of complex numbers, so nothing here depends on a library's ``cos``.
    """
    half = d // 2
    table = np.zeros((LONGEST, 2, half), np.float64)
    for i in range(half):
        t = 0.5 / (1 + 100 * i / half)
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        cos, sin = 1.0, 0.0
        for place in range(LONGEST):
            table[place, :, i] = cos, sin
            cos, sin = cos * c - sin * s, sin * c + cos * s
    both = np.concatenate([table, table], axis=2).astype(np.float32)
    return both[:, 0], both[:, 1]


def gpt_gqa(width: int = 32, *, depth: int = 2, seed: int = SEED) -> onnx.ModelProto:
    """Decoder: RMSNorm, rotary positions, two query heads for each key-value head, SwiGLU."""
    net = Net("gpt_gqa", width, seed, depth)
    heads = heads_of(width)
    pairs, d, inner = heads // 2, width // heads, 8 * width // 3 // 8 * 8

    def norm(x: str, name: str) -> str:
        with net.scope(name):
            mean = net("ReduceMean", net("Pow", x, 2.0), axes=[-1], keepdims=1)
            scale = net("Div", 1.0, net("Sqrt", net("Add", mean, 1e-6)))
            return net("Mul", _gain(net, "weight", width), net("Mul", x, scale))

    ids = net.input("input_ids", ["batch", "sequence"], TensorProto.INT64)
    x = net("Gather", net.weight("embed_tokens.weight", (VOCABULARY, width), 1.0), ids)
    end = net("Unsqueeze", net.dim(ids, 1), [0])

    def table(name: str, values: Array) -> str:
        return net("Unsqueeze", net("Slice", net.tensor(name, values), [0], end, [0], [1]), [0, 1])

    cos, sin = (table(n, values) for n, values in zip(("rotary.cos", "rotary.sin"), _rotations(d), strict=True))
    above = np.triu(np.full((1, 1, LONGEST, LONGEST), _SILENT, np.float32), 1)
    mask = net("Slice", net.tensor("causal_mask", above), [0], end, [2], [1])
    mask = net("Slice", mask, [0], end, [3], [1])

    def project(x: str, name: str, count: int, gain: float = LINEAR) -> str:
        y = linear(net, x, name, width, count * d, gain=gain, bias=False)
        y = net.reshape(y, net.dim(x, 0), net.dim(x, 1), count, d)
        return net("Transpose", y, perm=[0, 2, 1, 3])

    def rotate(x: str) -> str:
        first = net("Slice", x, [0], [d // 2], [3], [1])
        second = net("Slice", x, [d // 2], [2**63 - 1], [3], [1])
        turned = net("Concat", net("Neg", second), first, axis=-1)
        return net("Add", net("Mul", x, cos), net("Mul", turned, sin))

    def repeat(x: str) -> str:
        n, steps = net.dim(x, 0), net.dim(x, 2)
        y = net.expand(net("Unsqueeze", x, [2]), n, pairs, 2, steps, d)
        return net.reshape(y, n, heads, steps, d)

    def attention(x: str) -> str:
        q, k = rotate(project(x, "q_proj", heads, 1.5)), rotate(project(x, "k_proj", pairs, 1.5))
        k, v = repeat(k), repeat(project(x, "v_proj", pairs))
        y = _attend(net, q, net("Transpose", k, perm=[0, 1, 3, 2]), v, d, mask)
        y = net("Transpose", y, perm=[0, 2, 1, 3])
        y = net.reshape(y, net.dim(x, 0), net.dim(x, 1), -1)
        return linear(net, y, "o_proj", width, width, bias=False)

    def mlp(x: str) -> str:
        gate = linear(net, x, "gate_proj", width, inner, bias=False)
        gate = net("Mul", gate, net("Sigmoid", gate))
        y = net("Mul", gate, linear(net, x, "up_proj", width, inner, bias=False))
        return linear(net, y, "down_proj", inner, width, bias=False)

    for layer in range(depth):
        with net.scope(f"layers.{layer}"):
            with net.scope("self_attn"):
                y = attention(norm(x, "input_layernorm"))
            x = net("Add", x, y)
            with net.scope("mlp"):
                y = mlp(norm(x, "post_attention_layernorm"))
            x = net("Add", x, y)
    x = linear(net, norm(x, "norm"), "lm_head", width, VOCABULARY, bias=False)
    net.output(x, "logits", ["batch", "sequence", VOCABULARY])
    return net.finish()


def bert(width: int = 32, *, depth: int = 2, seed: int = SEED) -> onnx.ModelProto:
    """Encoder with the normalization behind each sum, written out; a pooler on the first token."""
    net = Net("bert", width, seed, depth)
    heads = heads_of(width)
    d = width // heads

    def norm(x: str, name: str) -> str:
        with net.scope(name):
            y = net("Sub", x, net("ReduceMean", x, axes=[-1], keepdims=1))
            variance = net("ReduceMean", net("Pow", y, 2.0), axes=[-1], keepdims=1)
            y = net("Div", y, net("Sqrt", net("Add", variance, 1e-12)))
            return net("Add", net("Mul", y, _gain(net, "weight", width)), net.weight("bias", (width,), 0.1))

    ids = net.input("input_ids", ["batch", "sequence"], TensorProto.INT64)
    seen = net.input("attention_mask", ["batch", "sequence"], TensorProto.INT64)
    hidden = net("Cast", net("Unsqueeze", net("Unsqueeze", seen, [1]), [2]), to=TensorProto.FLOAT)
    mask = net("Mul", net("Sub", 1.0, hidden), _SILENT)

    with net.scope("embeddings"):
        words = net("Gather", net.weight("word_embeddings.weight", (VOCABULARY, width), 1.0), ids)
        places = np.arange(LONGEST, dtype=np.int64)[None]
        places_used = net("Slice", places, [0], net("Unsqueeze", net.dim(ids, 1), [0]), [1], [1])
        positions = net("Gather", net.weight("position_embeddings.weight", (LONGEST, width), 0.3), places_used)
        x = norm(net("Add", words, positions), "LayerNorm")

    def project(x: str, name: str, perm: list[int], gain: float = LINEAR) -> str:
        y = linear(net, x, name, width, width, gain=gain)
        y = net.reshape(y, net.dim(y, 0), net.dim(y, 1), heads, d)
        return net("Transpose", y, perm=perm)

    for layer in range(depth):
        with net.scope(f"encoder.layer.{layer}"):
            with net.scope("attention"):
                q = project(x, "query", [0, 2, 1, 3], 1.5)
                k = project(x, "key", [0, 2, 3, 1], 1.5)
                y = _attend(net, q, k, project(x, "value", [0, 2, 1, 3]), d, mask)
                y = net("Transpose", y, perm=[0, 2, 1, 3])
                y = net.reshape(y, net.dim(y, 0), net.dim(y, 1), width)
                x = norm(net("Add", linear(net, y, "dense", width, width), x), "LayerNorm")
            y = gelu(net, linear(net, x, "intermediate", width, 4 * width))
            x = norm(net("Add", linear(net, y, "output", 4 * width, width, gain=LINEAR), x), "LayerNorm")
    first = net("Gather", x, np.array(0, np.int64), axis=1)
    pooled = net("Tanh", gemm(net, first, "pooler", width, width))
    net.output(x, "last_hidden_state", ["batch", "sequence", width])
    net.output(pooled, "pooled", ["batch", width])
    return net.finish()
