"""What is measured: operators as links of chains, float and quantized.

A link says how it is added to a chain and how much work it is. Quantized links follow what onnxruntime fuses:
u8 activations with scalar scales, s8 weights with a scale per channel, int32 biases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
SCALE = np.float32(0.03)
"""Scale of every quantized activation: links keep a standard deviation near 1, so +-3.8 is covered."""

Array = npt.NDArray[Any]


class Chain:
    """A growing graph: nodes, initializers and the helpers that quantized links need."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.rng = np.random.default_rng(seed)
        self._scale = ""
        self._zero_point = ""

    def const(self, array: npt.ArrayLike) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op_type: str, inputs: Sequence[str], *, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, f"n{len(self.nodes)}", domain=domain, **attributes))
        return names[0] if outputs == 1 else ",".join(names)

    def normal(self, *shape: int, std: float = 1.0) -> Array:
        return (self.rng.standard_normal(shape) * std).astype(np.float32)

    def _activation_grid(self) -> tuple[str, str]:
        if not self._scale:
            self._scale, self._zero_point = self.const(SCALE), self.const(np.uint8(128))
        return self._scale, self._zero_point

    def quantize(self, value: str) -> str:
        return self.op("QuantizeLinear", [value, *self._activation_grid()])

    def dequantize(self, value: str) -> str:
        return self.op("DequantizeLinear", [value, *self._activation_grid()])

    def weight(self, array: Array, axis: int, quantized: bool) -> tuple[str, Array]:
        """An initializer, float or s8 per channel behind a DequantizeLinear; and its scale."""
        if not quantized:
            return self.const(array), np.ones(1, np.float32)
        others = tuple(i for i in range(array.ndim) if i != axis)
        scale = (np.abs(array).max(axis=others) / 127).astype(np.float32)
        shape = [1] * array.ndim
        shape[axis] = -1
        integers = np.clip(np.rint(array / scale.reshape(shape)), -127, 127).astype(np.int8)
        names = [self.const(integers), self.const(scale), self.const(np.zeros(scale.shape, np.int8))]
        return self.op("DequantizeLinear", names, axis=axis), scale

    def bias(self, count: int, weight_scale: Array, quantized: bool) -> str:
        values = self.normal(count, std=0.1)
        if not quantized:
            return self.const(values)
        scale = (SCALE * weight_scale).astype(np.float32)
        integers = np.rint(values / scale).astype(np.int32)
        return self.op(
            "DequantizeLinear", [self.const(integers), self.const(scale), self.const(np.zeros(count, np.int32))], axis=0
        )

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "chain", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


Emit = Callable[[Chain, str], str]


@dataclasses.dataclass(frozen=True)
class Link:
    """One link: how to emit it, and its device-independent work.

    Attributes:
        kind: Kernel kind or operator the measurement belongs to.
        precision: ``f32``, ``u8s8`` or ``dynamic``.
        label: Shape, for people.
        emit: Appends the link to a chain: ``emit(chain, input) -> output``. Quantized links take and
            return quantized values.
        shape: Shape of the input; links of a serial chain return the same shape.
        nodes: Operators of this kind in a link.
        macs: Multiply-accumulates of a link.
        channels: (in, out) channels, for the padding of ``macs``; 0 where there are none.
        elements: Activation elements read and written.
        weights: Weight elements read.
        patches: Input elements that one output channel reads, counted once per use (the unfolded input).
        on: ``maps`` if the price holds for feature maps (4-D) only, else ``any``.
        parallel: Links hang side by side on inputs of their own instead of one after another.
        expect: Operator types that ``nodes`` per link must have become in the optimized graph.
        raw: Run without graph optimizations (layout operators would cancel each other).
        integer_input: Element type of the graph input if not float.
        baseline: A link whose cost is part of this one and is taken off.
    """

    kind: str
    precision: str
    label: str
    emit: Emit
    shape: tuple[int, ...]
    nodes: int = 1
    macs: int = 0
    channels: tuple[int, int] = (0, 0)
    elements: int = 0
    weights: int = 0
    patches: int = 0
    on: str = "any"
    parallel: bool = False
    expect: tuple[str, ...] = ()
    raw: bool = False
    integer_input: int = 0
    baseline: Link | None = None

    def build(self, count: int) -> onnx.ModelProto:
        """The chain of ``count`` links."""
        chain = Chain()
        quantized = self.precision == "u8s8" and not self.raw
        element_type = self.integer_input or TensorProto.FLOAT
        value = ""
        for i in range(count):
            if self.parallel or i == 0:
                value = "x" if i == 0 else f"x{i}"
                chain.inputs.append(helper.make_tensor_value_info(value, element_type, self.shape))
                if quantized:
                    value = chain.quantize(value)
            value = self.emit(chain, value)
            if self.parallel or i == count - 1:
                chain.outputs.append(helper.make_empty_tensor_value_info(value))
        return chain.model()


def _qdq(chain: Chain, quantized: bool, value: str, body: Callable[[str], str]) -> str:
    return chain.quantize(body(chain.dequantize(value))) if quantized else body(value)


def conv(
    kind: str, precision: str, cin: int, cout: int, size: int, kernel: int, group: int = 1, width: int = 0
) -> Link:
    """Two convolutions, ``cin -> cout -> cin``, on ``size`` x ``width`` maps (``width`` defaults to ``size``)."""
    quantized = precision == "u8s8"
    w = width or size
    pads = [kernel // 2 if size > 1 else 0, kernel // 2] * 2

    def emit(chain: Chain, x: str) -> str:
        for a, b in ((cin, cout), (cout, cin)):
            rows = kernel if size > 1 else 1
            fan_in = a // group * rows * kernel

            def body(v: str, a: int = a, b: int = b, rows: int = rows, fan_in: int = fan_in) -> str:
                array = chain.normal(b, a // group, rows, kernel, std=fan_in**-0.5)
                name, scale = chain.weight(array, 0, quantized)
                return chain.op("Conv", [v, name, chain.bias(b, scale, quantized)], pads=pads, group=group)

            x = _qdq(chain, quantized, x, body)
        return x

    taps = kernel * (kernel if size > 1 else 1)
    weights = cin * cout // group * taps
    return Link(
        kind, precision, f"{kernel}x{kernel} {cin}-{cout} @{size}x{w} g{group}", emit, (1, cin, size, w), nodes=2,
        macs=2 * weights * size * w, channels=(1, cin) if group == cin else (cin // group, cout // group),
        elements=2 * (cin + cout) * size * w, weights=2 * weights + cin + cout,
        patches=(cin + cout) // group * taps * size * w,
        expect=("QLinearConv",) if quantized else ("Conv",),
    )  # fmt: skip


def _conv(chain: Chain, quantized: bool, x: str, cin: int, cout: int, kernel: int = 1, stride: int = 1) -> str:
    array = chain.normal(cout, cin, kernel, kernel, std=(cin * kernel * kernel) ** -0.5)

    def body(v: str) -> str:
        name, scale = chain.weight(array, 0, quantized)
        return chain.op(
            "Conv", [v, name, chain.bias(cout, scale, quantized)], pads=[kernel // 2] * 4, strides=[stride] * 2
        )

    return _qdq(chain, quantized, x, body)


def _pick(chain: Chain, quantized: bool, x: str, size: int) -> str:
    """One pixel: ends a side branch at next to no cost, in whatever layout the runtime has chosen."""
    return _qdq(chain, quantized, x, lambda v: chain.op("MaxPool", [v], kernel_shape=[1, 1], strides=[size, size]))


def stem(precision: str, cin: int, cout: int, size: int, kernel: int) -> Link:
    """A stride-2 convolution of few input channels."""
    quantized = precision == "u8s8"
    half = size // 2
    taps = kernel * kernel
    return Link(
        "conv_stem", precision, f"{kernel}x{kernel} {cin}-{cout} @{size}/2",
        lambda chain, x: _pick(chain, quantized, _conv(chain, quantized, x, cin, cout, kernel, 2), half),
        (1, cin, size, size), macs=cout * cin * taps * half * half, channels=(cin, cout),
        elements=cin * size * size + cout * half * half, weights=cout * cin * taps + cout,
        patches=cin * taps * half * half, parallel=True,
    )  # fmt: skip


def after_conv(
    kind: str, precision: str, shape: tuple[int, ...], body: Emit, elements: int, *, skip: bool = False
) -> Link:  # fmt: skip
    """An operator behind a 1x1 convolution, less the convolution: the layout is the one it has in a real model.

    ``body(chain, convolved)`` gets and returns a float value; with ``skip`` it gets "convolved,x", as a
    residual sum does.
    """
    quantized = precision == "u8s8"
    channels = shape[1]

    def emit(chain: Chain, x: str) -> str:
        y = _conv(chain, quantized, x, channels, channels)
        return _qdq(
            chain, quantized, y, lambda v: body(chain, f"{v},{chain.dequantize(x) if quantized else x}" if skip else v)
        )

    base = Link("", precision, "", lambda chain, x: _conv(chain, quantized, x, channels, channels), shape)
    on = "maps" if kind in ("Add", "Mul", "Sigmoid") else "any"  # met on tokens too, at another price
    return Link(
        kind,
        precision,
        f"{kind} {shape}",
        emit,
        shape,
        channels=(channels, channels),
        elements=elements,
        on=on,
        baseline=base,
    )


def upsample(precision: str, shape: tuple[int, ...]) -> Link:
    """Nearest upsampling by 2, then a stride-2 1x1 convolution, less the same convolution without."""
    quantized = precision == "u8s8"
    channels = shape[1]

    def emit(chain: Chain, x: str) -> str:
        scales = chain.const(np.array([1, 1, 2, 2], np.float32))
        how: dict[str, Any] = {
            "mode": "nearest",
            "nearest_mode": "floor",
            "coordinate_transformation_mode": "asymmetric",
        }
        y = _qdq(chain, quantized, x, lambda v: chain.op("Resize", [v, "", scales], **how))
        return _conv(chain, quantized, y, channels, channels, stride=2)

    base = Link("", precision, "", lambda chain, x: _conv(chain, quantized, x, channels, channels), shape)
    return Link(
        "Resize", precision, f"nearest x2 {shape}", emit, shape, elements=5 * int(np.prod(shape)), baseline=base
    )


def global_pool(precision: str, shape: tuple[int, ...]) -> Link:
    """A global pool behind a 1x1 convolution, less the convolution."""
    quantized = precision == "u8s8"
    _, channels, size, _ = shape

    def emit(chain: Chain, x: str) -> str:
        y = _conv(chain, quantized, x, channels, channels)
        return _qdq(chain, quantized, y, lambda v: chain.op("GlobalAveragePool", [v]))

    base = Link(
        "", precision, "",
        lambda chain, x: _pick(chain, quantized, _conv(chain, quantized, x, channels, channels), size),
        shape, parallel=True,
    )  # fmt: skip
    elements = channels * (size * size + 1)
    return Link(
        "GlobalAveragePool", precision, f"{shape}", emit, shape, elements=elements, parallel=True, baseline=base
    )


def boundary_map(shape: tuple[int, ...]) -> Link:
    """Leaving and entering the integers between convolutions, with the layout changes that brings.

    A link alternates a float and a u8s8 convolution; what is over their own cost is one quantize and one
    dequantize of a feature map.
    """
    channels, size = shape[1], int(np.prod(shape))

    def emit(chain: Chain, x: str) -> str:
        # Without the activation onnxruntime would quantize the float convolution too, seeing Q and DQ around it.
        y = chain.quantize(chain.op("HardSwish", [_conv(chain, False, x, channels, channels)]))
        return chain.dequantize(_conv(chain, True, y, channels, channels))

    alone = lambda chain, x: chain.op("HardSwish", [_conv(chain, False, x, channels, channels)])  # noqa: E731
    both = Link("", "f32", "", alone, shape)
    integer = Link("", "u8s8", "", lambda chain, x: _conv(chain, True, x, channels, channels), shape, baseline=None)
    both = dataclasses.replace(both, baseline=integer)
    return Link("boundary", "f32", f"{shape}", emit, shape, nodes=2, elements=4 * size, on="maps", baseline=both)


def conv_transpose(cin: int, cout: int, size: int, kernel: int) -> Link:
    """Stride-2 upsampling, brought back to size by a stride-2 slice-like pooling (a baseline of its own)."""

    def emit(chain: Chain, x: str) -> str:
        w = chain.const(chain.normal(cin, cout, kernel, kernel, std=(cin * kernel) ** -0.5))
        return chain.op("ConvTranspose", [x, w], strides=[2, 2])

    out = (size - 1) * 2 + kernel
    return Link(
        "conv_transpose", "f32", f"{kernel}x{kernel} {cin}-{cout} @{size}", emit, (1, cin, size, size),
        macs=cin * cout * kernel * kernel * size * size, channels=(cin, cout),
        elements=cin * size * size + cout * out * out, weights=cin * cout * kernel * kernel, parallel=True,
    )  # fmt: skip


def matmul(precision: str, rows: int, k: int, n: int) -> Link:
    """Two products with constant matrices, ``k -> n -> k``."""
    quantized = precision == "u8s8"

    def emit(chain: Chain, x: str) -> str:
        for a, b in ((k, n), (n, k)):
            array = chain.normal(a, b, std=a**-0.5)
            if precision == "dynamic":
                scale = (np.abs(array).max(axis=0) / 127).astype(np.float32)
                integers = chain.const(np.rint(array / scale).astype(np.int8))
                xq, xs, xz = chain.op("DynamicQuantizeLinear", [x], outputs=3).split(",")
                product = chain.op("MatMulInteger", [xq, integers, xz, chain.const(np.zeros(b, np.int8))])
                x = chain.op(
                    "Mul",
                    [chain.op("Cast", [product], to=TensorProto.FLOAT), chain.op("Mul", [xs, chain.const(scale)])],
                )
            else:
                weight = chain.weight(array, 1, quantized)[0]
                x = _qdq(chain, quantized, x, lambda v, w=weight: chain.op("MatMul", [v, w]))  # type: ignore[misc]
        return x

    fused = {"f32": "MatMul", "u8s8": "QLinearMatMul", "dynamic": "DynamicQuantizeMatMul"}[precision]
    return Link(
        "matmul_rows1" if rows <= 4 else "matmul", precision, f"{rows}x{k}x{n}", emit, (rows, k), nodes=2,
        macs=2 * rows * k * n, channels=(k, n), elements=2 * rows * (k + n), weights=2 * k * n, expect=(fused,),
    )  # fmt: skip


def matmul_dynamic(precision: str, heads: int, rows: int, depth: int) -> Link:
    """The two products of attention: [h,r,d] x [h,d,r] and [h,r,r] x [h,r,d], second operand never constant."""
    quantized = precision == "u8s8"

    def emit(chain: Chain, x: str) -> str:
        # The other operand is a second input of the graph, shared by all links.
        if not any(i.name == "k" for i in chain.inputs):
            chain.inputs.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, (heads, depth, rows)))
            chain.inputs.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, (heads, rows, depth)))
            if quantized:
                for name in ("k", "v"):
                    chain.nodes.append(
                        helper.make_node(
                            "QuantizeLinear", [name, *chain._activation_grid()], [f"{name}_q"], f"{name}_quantize"
                        )
                    )
        for name in ("k", "v"):
            other = chain.dequantize(f"{name}_q") if quantized else name
            x = _qdq(chain, quantized, x, lambda a, b=other: chain.op("MatMul", [a, b]))  # type: ignore[misc]
        return x

    return Link(
        "matmul_dynamic", precision, f"{heads}h {rows}x{depth}", emit, (heads, rows, depth), nodes=2,
        macs=2 * heads * rows * rows * depth, elements=heads * (4 * rows * depth + 2 * rows * rows),
        expect=("QLinearMatMul",) if quantized else ("MatMul",),
    )  # fmt: skip


def recurrent(kind: str, precision: str, steps: int, hidden: int) -> Link:
    """A bidirectional LSTM or GRU, ``[T, 1, 2H] -> [T, 1, 2H]``."""
    gates = 4 if kind == "lstm" else 3
    size = 2 * hidden

    def emit(chain: Chain, x: str) -> str:
        w = chain.normal(2, gates * hidden, size, std=size**-0.5)
        r = chain.normal(2, gates * hidden, hidden, std=hidden**-0.5)
        b = chain.const(np.zeros((2, 2 * gates * hidden), np.float32))
        common: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional"}
        if precision == "dynamic":
            operands = []
            for array in (w, r):
                scale = (np.abs(array).max(axis=2) / 127).astype(np.float32)
                integers = np.ascontiguousarray(np.rint(array / scale[:, :, None]).astype(np.int8).transpose(0, 2, 1))
                operands.append(
                    (chain.const(integers), chain.const(scale), chain.const(np.zeros(scale.shape, np.int8)))
                )
            (wi, ws, wz), (ri, rs, rz) = operands
            inputs = [x, wi, ri, b, "", "", "", "", ws, wz, rs, rz]
            y = chain.op("DynamicQuantizeLSTM", inputs, domain="com.microsoft", **common)
        else:
            y = chain.op(kind.upper(), [x, chain.const(w), chain.const(r), b], **common)
        swapped = chain.op("Transpose", [y], perm=[0, 2, 1, 3])
        return chain.op("Reshape", [swapped, chain.const(np.array([steps, 1, size], np.int64))])

    weights = 2 * gates * hidden * (size + hidden)
    return Link(
        kind, precision, f"T{steps} H{hidden} bi", emit, (steps, 1, size), macs=weights * steps,
        elements=2 * steps * size, weights=weights,
    )  # fmt: skip


def unary(
    kind: str,
    precision: str,
    op_type: str,
    shape: tuple[int, ...],
    extra: Callable[[Chain], list[str]] | None = None,
    **attributes: Any,
) -> Link:
    """A chain of one-input operators that keep the shape."""
    quantized = precision == "u8s8"

    def emit(chain: Chain, x: str) -> str:
        more = extra(chain) if extra else []
        return _qdq(chain, quantized, x, lambda v: chain.op(op_type, [v, *more], **attributes))

    size = int(np.prod(shape))
    return Link(
        kind,
        precision,
        f"{op_type} {shape}",
        emit,
        shape,
        elements=2 * size,
        expect=(f"QLinear{op_type}",) if quantized else (),
    )


def binary(op_type: str, precision: str, shape: tuple[int, ...], other: tuple[int, ...] = ()) -> Link:
    """``Add`` or ``Mul`` with a second input of the graph (broadcast if smaller)."""
    quantized = precision == "u8s8"

    def emit(chain: Chain, x: str) -> str:
        if not any(i.name == "k" for i in chain.inputs):
            chain.inputs.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, other or shape))
            if quantized:
                grid = chain._activation_grid()
                chain.nodes.append(helper.make_node("QuantizeLinear", ["k", *grid], ["k_q"], "k_quantize"))
        right = chain.dequantize("k_q") if quantized else "k"
        return _qdq(chain, quantized, x, lambda v: chain.op(op_type, [v, right]))

    elements = 2 * int(np.prod(shape)) + int(np.prod(other or shape))
    return Link(
        op_type,
        precision,
        f"{shape}x{other or shape}",
        emit,
        shape,
        elements=elements,
        expect=(f"QLinear{op_type}",) if quantized else (),
    )


def on_tensor(
    kind: str,
    precision: str,
    label: str,
    body: Emit,
    shape: tuple[int, ...],
    elements: int,
    nodes: int = 1,
    parallel: bool = False,
    **more: object,
) -> Link:
    """An operator that moves or pools; on uint8 for ``u8s8``, as it runs once its Q and DQ are dropped."""
    integer = TensorProto.UINT8 if precision == "u8s8" else 0
    return Link(
        kind,
        precision,
        label,
        body,
        shape,
        nodes=nodes,
        elements=elements,
        parallel=parallel,
        raw=True,
        integer_input=integer,
    )


def _two(chain: Chain, x: str, first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]) -> str:
    for op_type, attributes in (first, second):
        x = chain.op(op_type, [x], **attributes)
    return x


MAPS = "16 56 56, 64 56 56, 64 28 28, 128 14 14, 256 14 14, 256 7 7, 24 112 112"
TOKENS = "16 384, 128 384, 128 768, 64 192"
DENSE = """16 16 56, 20 20 28, 24 24 56, 32 32 28, 32 64 28, 40 40 28, 48 48 28, 56 56 14, 64 64 28, 64 64 14, 96 96 14,
    128 128 14, 128 128 7, 256 256 7, 64 64 56, 256 256 14, 512 512 7"""
ODD = "63 28, 50 28, 33 28, 36 28, 60 14, 92 14, 250 7"
POINTWISE = """
    16 64 56, 24 96 56, 24 144 28, 32 128 28, 40 240 28, 64 64 28, 64 256 28, 64 384 14, 80 200 14, 96 576 14,
    128 512 14, 160 960 7, 256 256 14, 512 128 28, 1024 256 7, 256 1024 1, 96 24 1"""
DEPTHWISE = """16 56 3, 32 56 3, 96 56 3, 144 28 3, 40 28 3, 240 14 3, 384 14 3, 576 14 3, 960 7 3, 512 14 3, 72 28 5,
    240 14 5, 480 14 5, 960 7 5, 32 56 5, 64 28 7, 63 56 3, 50 28 3, 36 28 3, 24 56 3, 72 28 3, 120 28 3, 120 14 5,
    200 14 3, 184 14 3, 88 28 5, 250 14 3"""
GROUPED = """64 4 28, 128 32 28, 128 4 28, 256 8 14, 256 32 14, 64 2 56, 128 2 14, 256 4 7, 96 3 28, 32 2 56, 512 32 7,
    64 16 28, 512 4 7, 96 12 14"""
STEMS = "3 16 112 3, 3 32 112 3, 3 32 224 3, 3 24 160 3, 1 16 64 3, 1 32 128 3, 3 64 112 7, 3 32 160 7"
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
    for p in ("f32", "u8s8"):
        yield after_conv("Add", p, shape, lambda g, both: g.op("Add", both.split(",")), 3 * size, skip=True)
        yield after_conv("Mul", p, shape, squeeze, 2 * size + channels)
        yield after_conv("Sigmoid", p, shape, one("Sigmoid"), 2 * size)
        yield after_conv("LeakyRelu", p, shape, one("LeakyRelu"), 2 * size)
        yield after_conv("MaxPool", p, shape, one("MaxPool", **window), 2 * size)
        yield after_conv("AveragePool", p, shape, one("AveragePool", **window), 2 * size)
        yield global_pool(p, shape)
        yield on_tensor(
            "Transpose", p, f"Transpose {shape}", lambda g, x: _two(g, x, swap, back), shape, 4 * size, nodes=2
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
        twice = lambda g, x: _two(g, x, swap, swap)  # noqa: E731
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


def boundary(shape: tuple[int, ...]) -> Iterator[Link]:
    """What a stretch of float between quantized nodes pays."""
    size = int(np.prod(shape))
    yield on_tensor("quantize", "f32", f"{shape}", lambda g, x: g.quantize(x), shape, 2 * size, parallel=True)
    link = on_tensor("dequantize", "f32", f"{shape}", lambda g, x: g.dequantize(x), shape, 2 * size, parallel=True)
    yield dataclasses.replace(link, integer_input=TensorProto.UINT8)


def gather(precision: str, vocabulary: int, ids: int, width: int) -> Link:
    """Rows of a table; each link has indices and a table of its own. ``u8s8`` is an s8 table, then dequantized."""

    def emit(chain: Chain, x: str) -> str:
        table = chain.normal(vocabulary, width)
        if precision == "f32":
            return chain.op("Gather", [chain.const(table), x])
        rows = chain.op("Gather", [chain.const(np.clip(np.rint(table * 30), -127, 127).astype(np.int8)), x])
        return chain.op("DequantizeLinear", [rows, chain.const(SCALE), chain.const(np.int8(0))])

    return Link(
        "gather", precision, f"{ids} of {vocabulary}x{width}", emit, (ids,), elements=ids * (width + 1), parallel=True,
        raw=True, integer_input=TensorProto.INT64,
    )  # fmt: skip
