"""Every link that is measured: which operators, at which sizes and precisions.

Shapes are those people use, and those around the steps that kernels have: channels off a block, maps that leave a
cache, rows too few to fill a register, copies of single elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from onnxcompress.fitting.links import (
    Chain,
    Emit,
    Link,
    after_conv,
    beside,
    binary,
    block_quantized,
    boundary,
    boundary_map,
    conv,
    conv_transpose,
    dequantized_weight,
    gather,
    global_pool,
    half,
    joined_maps,
    matmul,
    matmul_dynamic,
    on_tensor,
    recurrent,
    stem,
    twice,
    two,
    unary,
    upsample,
)

__all__ = ["links"]


MAPS = "16 56 56, 64 56 56, 64 28 28, 128 14 14, 256 14 14, 256 7 7, 24 112 112"
TOKENS = "16 384, 128 384, 128 768, 64 192"
DENSE = """16 16 56, 20 20 28, 24 24 56, 32 32 28, 32 64 28, 40 40 28, 48 48 28, 56 56 14, 64 64 28, 64 64 14, 96 96 14,
    128 128 14, 128 128 7, 256 256 7, 64 64 56, 256 256 14, 512 512 7"""
ODD = "63 28, 50 28, 33 28, 36 28, 60 14, 92 14, 250 7"
POINTWISE = """
    16 64 56, 24 96 56, 24 144 28, 32 128 28, 40 240 28, 64 64 28, 64 256 28, 64 384 14, 80 200 14, 96 576 14,
    128 512 14, 160 960 7, 256 256 14, 512 128 28, 1024 256 7, 256 1024 1, 96 24 1, 48 192 1, 16 64 1"""
DEPTHWISE = """16 56 3, 32 56 3, 96 56 3, 144 28 3, 40 28 3, 240 14 3, 384 14 3, 576 14 3, 960 7 3, 512 14 3, 72 28 5,
    240 14 5, 480 14 5, 960 7 5, 32 56 5, 64 28 7, 63 56 3, 50 28 3, 36 28 3, 24 56 3, 72 28 3, 120 28 3, 120 14 5,
    200 14 3, 184 14 3, 88 28 5, 250 14 3"""
GROUPED = """64 4 28, 128 32 28, 128 4 28, 256 8 14, 256 32 14, 64 2 56, 128 2 14, 256 4 7, 96 3 28, 32 2 56, 512 32 7,
    64 16 28, 512 4 7, 96 12 14"""
BROADCASTS: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...] = (
    ((1, 64, 28, 28), ((1, 64, 1, 1), (1,), (), (1, 1, 28, 28))),
    ((1, 24, 80, 80), ((1, 24, 1, 1), (1,))),
    ((1, 240, 7, 7), ((1, 240, 1, 1),)),
    ((1, 32, 240, 320), ((1, 32, 240, 320), (1,))),
    ((1, 24, 160, 160), ((1, 24, 160, 160), (1, 24, 1, 1))),
    ((1, 128, 384), ((384,), (1, 128, 1), (1,))),
    ((1, 172, 300, 2), ((1, 1, 300, 1),)),
    ((1, 172, 300, 1), ((1,), (1, 1, 1, 1))),
    ((1, 512, 508), ((1, 512, 1), (1, 1, 1))),
)
TURNED: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1, 128, 12, 32), (0, 2, 1, 3)),
    ((1, 32, 8, 64), (0, 2, 1, 3)),
    ((1, 12, 128, 32), (0, 1, 3, 2)),
    ((2, 64, 96, 4), (0, 2, 1, 3)),
    ((1, 24, 80, 80), (0, 2, 3, 1)),
    ((1, 512, 256), (0, 2, 1)),
)
JOINED: tuple[tuple[tuple[int, ...], int], ...] = (
    ((1, 8, 80, 80), 1), ((1, 64, 14, 14), 1), ((1, 100, 100, 4), 3), ((1, 4, 100, 100), 1), ((1, 128, 64), 2),
    ((1, 128, 64), 1), ((1, 2, 300, 170), 1), ((1, 6400, 8), 2), ((1, 20000, 4), 2), ((1, 784, 64), 2),
)  # fmt: skip
SIGNALS = "1 16 4096 256, 1 64 2048 128, 16 16 512 64, 128 16 256 64, 1 48 8192 32, 16 64 512 9"
FILTERS = "1 1 8192 256 2, 1 1 1024 256 2, 1 4 4096 64 1, 1 36 16384 256 128"
FEW = "8 8 80 5, 8 8 160 3, 8 1 80 5, 4 4 160 3, 2 8 80 5, 32 1 80 3, 12 12 48 3"
STEMS = """3 16 32 3, 1 8 48 3, 3 8 64 5, 3 16 112 3, 3 32 112 3, 3 32 224 3, 3 24 160 3, 1 16 64 3, 1 32 128 3,
    3 64 112 7, 3 32 160 7"""
TRANSPOSED = "64 32 14 2, 128 64 14 2, 64 24 28 2, 32 32 28 4, 24 8 40 2"
PRODUCTS = "384 384, 384 1536, 768 768, 768 3072, 128 512"
ATTENTION = "12 128 64, 6 128 64, 8 40 15, 12 32 32, 4 256 32"
RECURRENT = "1 128, 16 64, 32 64, 16 128, 40 128, 16 256, 32 96"


def shapes(text: str) -> list[tuple[int, ...]]:
    """``"3 16, 4 5"`` as tuples."""
    return [tuple(int(number) for number in group.split()) for group in text.split(",")]


def links() -> Iterator[Link]:
    """Everything that is measured."""
    for p in ("f32", "u8s8"):
        yield from convolutions(p)
    for cin, cout, size, kernel in shapes(TRANSPOSED):
        yield conv_transpose(cin, cout, size, kernel)
    for p in ("f32", "u8s8", "dynamic"):
        for rows in (1, 16, 128, 512):
            for k, n in shapes(PRODUCTS):
                if rows * k * n <= 3.1e8:
                    yield matmul(p, rows, k, n)
        for rows, k, n in shapes("1 2048 1000, 1 256 256, 1 256 512, 1 512 512, 1 320 640, 4 512 512, 40 120 240"):
            yield matmul(p, rows, k, n)
        if p != "dynamic":
            for heads, rows, depth in shapes(ATTENTION):
                yield matmul_dynamic(p, heads, rows, depth)
        if p != "u8s8":
            for steps, hidden in shapes(RECURRENT):
                yield recurrent("lstm", p, steps, hidden)
    for steps, hidden in shapes("16 64, 16 128, 32 96, 16 256"):
        yield recurrent("gru", "f32", steps, hidden)
    for shape in shapes(MAPS):
        yield from on_maps((1, *shape))
    for shape in shapes(TOKENS):
        yield from on_tokens((1, *shape))
    yield from on_pieces()
    yield from on_little()
    for p in ("f32", "u8s8"):
        for channels, size in shapes("8 80, 24 80, 32 28, 64 28, 16 112"):
            yield joined_maps(p, channels, size)
    for bits in (8, 4):
        for rows, k, n in shapes("1 256 256, 1 384 1536, 1 768 768, 4 768 768, 16 384 384, 128 384 384, 64 768 3072"):
            yield block_quantized(bits, rows, k, n)
    yield from halves()
    for vocabulary, ids, width in shapes("4000 128 384, 30000 128 256, 4000 16 768, 4000 512 128"):
        for p in ("f32", "u8s8"):
            yield gather(p, vocabulary, ids, width)


def convolutions(p: str) -> Iterator[Link]:
    """Convolutions of every kind at one precision; the last of some kinds are over sequences."""
    for cin, cout, size in shapes(DENSE):
        yield conv("conv", p, cin, cout, size, 3)
    for c, size in shapes(ODD):
        yield conv("conv", p, c, c, size, 3)
        yield conv("conv_pointwise", p, c, c, size, 1)
    yield conv("conv", p, 32, 32, 28, 5)
    yield conv("conv", p, 64, 64, 1, 3, width=512)
    yield conv("conv", p, 128, 128, 1, 5, width=128)
    for cin, cout, size in shapes(POINTWISE):
        yield conv("conv_pointwise", p, cin, cout, size, 1)
    yield conv("conv_pointwise", p, 128, 256, 1, 1, width=256)
    for c, size, kernel in shapes(DEPTHWISE):
        yield conv("conv_depthwise", p, c, c, size, kernel, group=c)
    yield conv("conv_depthwise", p, 256, 256, 1, 5, group=256, width=256)
    for c, group, size in shapes(GROUPED):
        yield conv("conv_grouped", p, c, c, size, 3, group=group)
    for cin, cout, size, kernel in shapes(STEMS):
        yield stem(p, cin, cout, size, kernel)
    for cin, cout, length, kernel in shapes(SIGNALS):
        yield beside(p, cin, cout, (1, length), (1, kernel))
        yield beside(p, cin, cout, (length // 2, 1), (kernel, 1))
    for cin, cout, length, kernel, stride in shapes(FILTERS):
        yield beside(p, cin, cout, (1, length), (1, kernel), stride=(1, stride))
    for c, size in shapes("32 160, 96 56, 256 14, 480 28"):
        yield beside(p, c, c, (size, size), (3, 3), stride=(2, 2), group=c)
    for cin, cout, size, kernel in shapes(FEW):
        yield beside(p, cin, cout, (size, size), (kernel, kernel))


def on_maps(shape: tuple[int, ...]) -> Iterator[Link]:
    """Operators met on feature maps."""
    _, channels, height, _ = shape
    size = int(np.prod(shape))

    def squeeze(g: Chain, v: str) -> str:
        if not any(i.name == "k" for i in g.inputs):
            g.inputs.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, (1, channels, 1, 1)))
            g.nodes.append(helper.make_node("QuantizeLinear", ["k", *g._activation_grid()], ["k_q"], "k_quantize"))
            g.nodes.append(
                helper.make_node("DequantizeLinear", ["k_q", *g._activation_grid()], ["k_d"], "k_dequantize")
            )
        return g.op("Mul", [v, "k_d"])

    def scale(g: Chain, v: str) -> str:
        if not any(i.name == "s" for i in g.inputs):
            g.inputs.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, (1,)))
            grid = g._activation_grid()
            g.nodes.append(helper.make_node("QuantizeLinear", ["s", *grid], ["s_q"], "s_quantize"))
            g.nodes.append(helper.make_node("DequantizeLinear", ["s_q", *grid], ["s_d"], "s_dequantize"))
        return g.op("Mul", [v, "s_d"])

    def one(op_type: str, **attributes: Any) -> Emit:
        return lambda g, v: g.op(op_type, [v], **attributes)

    def resize(g: Chain, v: str, factor: float, mode: str) -> str:
        scales = g.const(np.array([1, 1, factor, factor], np.float32))
        return g.op("Resize", [v, "", scales], mode=mode, coordinate_transformation_mode="asymmetric")

    def split_concat(g: Chain, x: str) -> str:
        return g.op("Concat", g.op("Split", [x], outputs=2, axis=1, num_outputs=2).split(","), axis=1)

    swap: tuple[str, dict[str, Any]] = ("Transpose", {"perm": [0, 2, 3, 1]})
    back: tuple[str, dict[str, Any]] = ("Transpose", {"perm": [0, 3, 1, 2]})
    window: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}
    small: dict[str, Any] = {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}
    for p in ("f32", "u8s8"):
        yield after_conv("Add", p, shape, lambda g, both: g.op("Add", both.split(",")), 3 * size, skip=True)
        yield after_conv("Mul", p, shape, squeeze, 2 * size + channels)
        scaled = dataclasses.replace(after_conv("Mul", p, shape, scale, 2 * size), label=f"Mul scalar {shape}")
        yield scaled
        yield dataclasses.replace(
            after_conv("Mul", p, shape, lambda g, both: g.op("Mul", both.split(",")), 3 * size, skip=True),
            label=f"Mul whole {shape}",
        )
        yield after_conv("Sigmoid", p, shape, one("Sigmoid"), 2 * size)
        yield after_conv("LeakyRelu", p, shape, one("LeakyRelu"), 2 * size)
        yield after_conv("MaxPool", p, shape, one("MaxPool", **window), 2 * size)
        yield after_conv("AveragePool", p, shape, one("AveragePool", **window), 2 * size)
        for op_type in ("MaxPool", "AveragePool"):
            yield dataclasses.replace(
                after_conv(op_type, p, shape, one(op_type, **small), 2 * size), label=f"{op_type} 2x2 {shape}"
            )
        yield global_pool(p, shape)
        yield on_tensor(
            "Transpose", p, f"Transpose {shape}", lambda g, x: two(g, x, swap, back), shape, 4 * size, nodes=2
        )
        yield on_tensor("move", p, f"Split+Concat {shape}", split_concat, shape, 4 * size, nodes=2)
        if height <= 56:
            if p == "f32":
                emit = lambda g, x: resize(g, resize(g, x, 2.0, "linear"), 0.5, "linear")  # noqa: E731
                yield on_tensor("resize_linear", p, f"{shape}", emit, shape, 10 * size, nodes=2)
            yield upsample(p, shape)
    for op_type in ("HardSwish", "HardSigmoid"):
        yield after_conv(op_type, "f32", shape, one(op_type), 2 * size)
    for op_type in ("Relu", "Abs"):
        yield unary("Relu" if op_type == "Relu" else "elementwise", "f32", op_type, shape)
    yield unary("Clip", "f32", "Clip", shape, extra=lambda g: [g.const(np.float32(-6)), g.const(np.float32(6))])
    axes = np.array([2, 3], np.int64)
    yield on_tensor("reduce", "f32", f"ReduceMean {shape}", lambda g, x: g.op("ReduceMean", [x, g.const(axes)]), shape,
                    size + channels, parallel=True)  # fmt: skip
    yield from boundary(shape)
    yield boundary_map(shape)


def on_tokens(shape: tuple[int, ...]) -> Iterator[Link]:
    """Operators met on sequences of vectors."""
    size, width = int(np.prod(shape)), shape[-1]
    for op_type in ("Tanh", "Erf", "Exp", "Gelu", "Sqrt"):
        yield unary("transcendental" if op_type == "Exp" else op_type, "f32", op_type, shape)
    for op_type in ("Sub", "Div"):
        yield unary(
            "elementwise" if op_type == "Sub" else op_type,
            "f32",
            op_type,
            shape,
            extra=lambda g: [g.const(np.ones(width, np.float32))],
        )
    swap: tuple[str, dict[str, Any]] = ("Transpose", {"perm": [0, 2, 1]})
    for p in ("f32", "u8s8"):
        yield unary("softmax", p, "Softmax", shape, axis=-1)
        for op_type in ("Add", "Mul"):
            yield binary(op_type, p, shape)
        yield unary("Sigmoid", p, "Sigmoid", shape)
        twice = lambda g, x: two(g, x, swap, swap)  # noqa: E731
        yield on_tensor("Transpose", p, f"Transpose {shape}", twice, shape, 4 * size, nodes=2)
    ones = lambda g: [g.const(np.ones(width, np.float32)), g.const(np.zeros(width, np.float32))]  # noqa: E731
    yield unary("normalization", "f32", "LayerNormalization", shape, extra=ones)
    yield on_tensor(
        "reduce",
        "f32",
        f"ReduceMean {shape}",
        lambda g, x: g.op("ReduceMean", [x, g.const(np.array([-1], np.int64))]),
        shape,
        size + size // width,
        parallel=True,
    )
    yield from boundary(shape)


def on_pieces() -> Iterator[Link]:
    """Operators whose price is in how short the pieces are that they work on: broadcasts, copies, turned axes."""
    for shape, others in BROADCASTS:
        for other in others:
            for p in ("f32", "u8s8") if len(shape) < 4 and other else ("f32",):
                for op_type in ("Add", "Mul"):
                    yield binary(op_type, p, shape, other)
            yield binary("Sub", "f32", shape, other, kind="elementwise")
    for shape in shapes("1 32 240 320, 1 16 160 160"):
        yield unary("Relu", "f32", "Relu", shape)
        yield unary("HardSigmoid", "f32", "HardSigmoid", shape)
        yield unary("Clip", "f32", "Clip", shape, extra=lambda g: [g.const(np.float32(v)) for v in (-6, 6)])
        yield unary("Div", "f32", "Div", shape, extra=lambda g: [g.const(np.float32(1.01))])
    for shape, perm in TURNED:
        size = int(np.prod(shape))
        back = [perm.index(i) for i in range(len(perm))]
        swap: tuple[str, dict[str, Any]] = ("Transpose", {"perm": list(perm)})
        again: tuple[str, dict[str, Any]] = ("Transpose", {"perm": back})
        for p in ("f32", "u8s8"):
            label = f"Transpose {shape} {perm}"
            yield on_tensor("Transpose", p, label, twice(swap, again), shape, 4 * size, nodes=2)
    for shape, axis in JOINED:
        size, parts = int(np.prod(shape)), min(shape[axis], 4)

        def joined(g: Chain, x: str, axis: int = axis, parts: int = parts) -> str:
            return g.op("Concat", g.op("Split", [x], outputs=parts, axis=axis, num_outputs=parts).split(","), axis=axis)

        for p in ("f32", "u8s8") if len(shape) < 4 else ("f32",):  # integer maps have their channels last
            yield on_tensor("move", p, f"Split+Concat {shape} {axis}", joined, shape, 4 * size, nodes=2)
    for shape in shapes("1 16 56 56, 1 128 384, 1 4 200 300"):
        ones, size = [1] * len(shape), int(np.prod(shape))

        def padded(g: Chain, x: str, ones: list[int] = ones, shape: tuple[int, ...] = shape) -> str:
            wide = g.op("Pad", [x, g.const(np.array([*[0] * (len(ones) - 1), 1, *[0] * (len(ones) - 1), 1], np.int64))])
            axis = np.array([len(ones) - 1], np.int64)
            return g.op("Slice", [wide, g.const(np.array([1])), g.const(np.array([shape[-1] + 1])), g.const(axis)])

        yield on_tensor("move", "f32", f"Pad+Slice {shape}", padded, shape, 4 * size, nodes=2)
    for shape in shapes("1 16 56 56, 1 128 256 1, 1 24 80 80"):
        grids = lambda g, c=shape[1]: [g.const(np.full(c, v, np.float32)) for v in (1.0, 0.0, 0.0, 1.0)]  # noqa: E731
        yield unary("BatchNormalization", "f32", "BatchNormalization", shape, extra=grids)
    for shape in shapes("1 24 80 80, 1 64 40 40, 1 96 20 20"):
        size = int(np.prod(shape))

        def doubled(g: Chain, x: str) -> str:
            attributes: dict[str, Any] = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
            for factor in (2.0, 0.5):
                scales = g.const(np.array([1, 1, factor, factor], np.float32))
                x = g.op("Resize", [x, "", scales], nearest_mode="floor", **attributes)
            return x

        yield on_tensor("Resize", "f32", f"Resize {shape}", doubled, shape, 10 * size, nodes=2)
    for shape in shapes("1 12 128 128, 1 8 32 32, 1 4 300 300"):
        yield unary("softmax", "f32", "Softmax", shape, axis=-1)
    for shape in shapes("1 512 256, 1 128 384, 1 2048 64"):
        size = int(np.prod(shape))

        def summed(g: Chain, x: str) -> str:
            return g.op("ReduceMean", [x, g.const(np.array([1], np.int64))])

        work = size + size // shape[1]
        yield on_tensor("reduce", "f32", f"ReduceMean {shape} 1", summed, shape, work, parallel=True)
    for shape in shapes("1 2048 257, 1 512 508, 1 32 80 80, 1 64"):
        for op_type in ("Log", "Exp", "Sqrt", "Neg"):
            yield unary(op_type, "f32", op_type, shape)
        emit = twice(("Cast", {"to": TensorProto.INT32}), ("Cast", {"to": TensorProto.FLOAT}))
        yield on_tensor("elementwise", "f32", f"Cast {shape}", emit, shape, 4 * int(np.prod(shape)), nodes=2)
    for rows, columns in shapes("768 1000, 320 640, 64 4000"):
        for axis in (0, 1):
            yield dequantized_weight(rows, columns, axis)


def on_little() -> Iterator[Link]:
    """Operators on a handful of numbers, as graphs are full of that compute shapes: what remains is the call."""
    few = (4, 8)

    def small(op_type: str, *inputs: npt.ArrayLike, **attributes: Any) -> Emit:
        return lambda g, x: g.op(op_type, [x, *(g.const(np.asarray(i)) for i in inputs)], **attributes)

    def both(first: Emit, second: Emit) -> Emit:
        return lambda g, x: second(g, first(g, x))

    zero, one, two = np.array([0]), np.array([1]), np.array([4, 8])
    whole = small("Slice", zero, np.array([8]), one)
    yield on_tensor("move", "f32", "Slice little", whole, few, 64)
    yield on_tensor("move", "f32", "Expand little", small("Expand", two), few, 64)
    yield on_tensor(
        "move", "f32", "Concat little", lambda g, x: whole(g, g.op("Concat", [x, x], axis=1)), few, 160, nodes=2
    )
    yield on_tensor("free", "f32", "Reshape little", small("Reshape", two), few, 64)
    pair = both(small("Unsqueeze", zero), small("Squeeze", zero))
    yield on_tensor("free", "f32", "Unsqueeze little", pair, few, 128, nodes=2)
    yield on_tensor("gather", "f32", "Gather little", small("Gather", np.arange(4), axis=0), few, 64)
    yield on_tensor(
        "Transpose", "f32", "Transpose little", twice(("Transpose", {}), ("Transpose", {})), few, 128, nodes=2
    )
    yield on_tensor("reduce", "f32", "ReduceMean little", small("ReduceMean", one), few, 36, parallel=True)
    for op_type in ("Add", "Mul"):
        yield on_tensor(op_type, "f32", f"{op_type} little", small(op_type, np.ones(few, np.float32)), few, 96)
        yield on_tensor(op_type, "f32", f"{op_type} scalar", small(op_type, np.float32(1)), few, 65)
    yield on_tensor("elementwise", "f32", "Sub little", small("Sub", np.ones(few, np.float32)), few, 96)
    yield unary("softmax", "f32", "Softmax", few, axis=-1)


def halves() -> Iterator[Link]:
    """Operators in float16."""

    def convolved(c: int, kernel: int, group: int) -> Emit:
        def emit(chain: Chain, x: str) -> str:
            array = chain.normal(c, c // group, kernel, kernel, std=(c // group * kernel * kernel) ** -0.5)
            inputs = [x, chain.const(array.astype(np.float16)), chain.const(np.zeros(c, np.float16))]
            return chain.op("Conv", inputs, pads=[kernel // 2] * 4, group=group)

        return emit

    def multiplied(k: int) -> Emit:
        return lambda chain, x: chain.op("MatMul", [x, chain.const(chain.normal(k, k, std=k**-0.5).astype(np.float16))])

    ran = ("Conv", "NhwcFusedConv", "NhwcConv", "FusedConv")
    for c, size in shapes("16 56, 32 28, 64 28, 128 14, 256 7"):
        for kernel, kind in ((3, "conv"), (1, "conv_pointwise")):
            yield half(kind, f"{kernel}x{kernel} {c} @{size}", (1, c, size, size), convolved(c, kernel, 1), ran)
        yield half("conv_depthwise", f"3x3 {c} @{size}", (1, c, size, size), convolved(c, 3, c), ran)
    for rows, k in shapes("1 256, 1 512, 1 1024, 64 256, 128 512, 128 768"):
        kind = "matmul" if rows > 4 else "matmul_rows1"
        yield half(kind, f"{rows}x{k}x{k}", (rows, k), multiplied(k), ("MatMul",))
    for shape in shapes("1 64 28 28, 1 16 56 56, 1 128 384, 1 24 80 80"):
        for op_type in ("Relu", "Sigmoid"):
            emit = lambda chain, x, op=op_type: chain.op(op, [x])  # noqa: E731
            yield half("elementwise" if op_type == "Relu" else "Sigmoid", f"{op_type} {shape}", shape, emit, (op_type,))
