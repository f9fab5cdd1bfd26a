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

    def __init__(self, seed: int = 0, *, drawn: bool = True) -> None:
        self.drawn = drawn
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
        if not self.drawn:
            return np.full(shape, std, np.float32)
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

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return f"{self.kind} {self.precision} {self.on} {self.label}"

    def build(self, count: int, *, drawn: bool = True) -> onnx.ModelProto:
        """The chain of ``count`` links.

        Args:
            count: of links.
            drawn: weights are random; if not they are all the same, which is enough to count work and is faster.
        """
        chain = Chain(drawn=drawn)
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


def joined_maps(precision: str, channels: int, size: int) -> Link:
    """Maps put side by side and brought back to their channels by a convolution."""
    quantized = precision == "u8s8"

    def emit(chain: Chain, x: str) -> str:
        if not any(i.name == "k" for i in chain.inputs):
            chain.inputs.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, (1, channels, size, size)))
            grid = chain._activation_grid()
            if quantized:
                chain.nodes.append(helper.make_node("QuantizeLinear", ["k", *grid], ["k_q"], "k_quantize"))
        other = chain.dequantize("k_q") if quantized else "k"
        y = _qdq(chain, quantized, x, lambda v: chain.op("Concat", [v, other], axis=1))
        return _conv(chain, quantized, y, 2 * channels, channels)

    pixels = size * size
    return Link(
        "Concat", precision, f"{channels} @{size}", emit, (1, channels, size, size), macs=2 * channels**2 * pixels,
        elements=4 * channels * pixels,
    )  # fmt: skip


def beside(
    precision: str, cin: int, cout: int, extent: tuple[int, int], kernel: tuple[int, int], *,
    stride: tuple[int, int] = (1, 1), group: int = 1,
) -> Link:  # fmt: skip
    """A convolution from ``cin`` to ``cout`` channels by itself, on maps of any extent."""
    quantized = precision == "u8s8"
    height, width = (-(-n // s) for n, s in zip(extent, stride, strict=True))
    inner, taps, pixels = cin // group, kernel[0] * kernel[1], height * width

    def emit(chain: Chain, x: str) -> str:
        array = chain.normal(cout, inner, *kernel, std=(inner * taps) ** -0.5)
        pads = [(k - 1) // 2 for k in kernel] + [k // 2 for k in kernel]
        options: dict[str, Any] = {"pads": pads, "strides": list(stride), "group": group}

        def body(v: str) -> str:
            name, scale = chain.weight(array, 0, quantized)
            return chain.op("Conv", [v, name, chain.bias(cout, scale, quantized)], **options)

        y = _qdq(chain, quantized, x, body)
        steps = [height, width]
        return _qdq(chain, quantized, y, lambda v: chain.op("MaxPool", [v], kernel_shape=[1, 1], strides=steps))

    label = f"{kernel[0]}x{kernel[1]} {cin}-{cout} @{extent[0]}x{extent[1]}"
    label += f"/{stride[0]}x{stride[1]}" if stride != (1, 1) else ""
    label += f" g{group}" if group > 1 else ""
    return Link(
        "conv_stem" if inner <= 4 else "conv", precision, label, emit, (1, cin, *extent),
        macs=cout * inner * taps * pixels, channels=(cin, cout), elements=cin * extent[0] * extent[1] + cout * pixels,
        weights=cout * inner * taps + cout, patches=cin * taps * pixels, parallel=True,
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


def binary(
    op_type: str, precision: str, shape: tuple[int, ...], other: tuple[int, ...] | None = None, kind: str = ""
) -> Link:
    """``Add`` or ``Mul`` with a second input of the graph (broadcast if smaller)."""
    other = shape if other is None else other
    quantized = precision == "u8s8"

    def emit(chain: Chain, x: str) -> str:
        if not any(i.name == "k" for i in chain.inputs):
            chain.inputs.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, other))
            if quantized:
                grid = chain._activation_grid()
                chain.nodes.append(helper.make_node("QuantizeLinear", ["k", *grid], ["k_q"], "k_quantize"))
        right = chain.dequantize("k_q") if quantized else "k"
        return _qdq(chain, quantized, x, lambda v: chain.op(op_type, [v, right]))

    elements = 2 * int(np.prod(shape)) + int(np.prod(other))
    return Link(
        kind or op_type,
        precision,
        f"{op_type} {shape}x{other}",
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


def two(chain: Chain, x: str, first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]) -> str:
    for op_type, attributes in (first, second):
        x = chain.op(op_type, [x], **attributes)
    return x


def twice(first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]) -> Emit:
    return lambda chain, x: two(chain, x, first, second)


def block_quantized(bits: int, rows: int, k: int, n: int) -> Link:
    """Two MatMulNBits, ``k -> n -> k``: float activations, weights of few bits in blocks of 32."""

    def emit(chain: Chain, x: str) -> str:
        for inner, outer in ((k, n), (n, k)):
            packed = chain.rng.integers(0, 256, (outer, inner // 32, 32 * bits // 8)).astype(np.uint8)
            scales = np.full(outer * inner // 32, 2.0 / 2**bits * inner**-0.5, np.float32)
            attributes = {"K": inner, "N": outer, "bits": bits, "block_size": 32, "accuracy_level": 4}
            inputs = [x, chain.const(packed), chain.const(scales)]
            x = chain.op("MatMulNBits", inputs, domain="com.microsoft", **attributes)
        return x

    return Link(
        "matmul" if rows > 4 else "matmul_rows1", f"w{bits}", f"{rows}x{k}x{n}", emit, (rows, k), nodes=2,
        macs=2 * rows * k * n, channels=(k, n), elements=2 * rows * (k + n), weights=2 * k * n,
        expect=("MatMulNBits",),
    )  # fmt: skip


def half(kind: str, label: str, shape: tuple[int, ...], body: Emit, expect: tuple[str, ...]) -> Link:
    """A link in float16; not fused, and left out, where the runtime computes it in float32."""
    return Link(kind, "f16", label, body, shape, expect=expect, integer_input=TensorProto.FLOAT16)


def dequantized_weight(rows: int, columns: int, axis: int) -> Link:
    """A weight that no integer kernel takes, made float in every run."""

    def emit(chain: Chain, x: str) -> str:
        scale = chain.const(np.full((rows, columns)[axis], 0.02, np.float32))
        return chain.op("DequantizeLinear", [x, scale], axis=axis)

    size = rows * columns
    label = f"{rows}x{columns} axis {axis}"
    link = on_tensor("dequantize", "f32", label, emit, (rows, columns), 2 * size, parallel=True)
    return dataclasses.replace(link, integer_input=TensorProto.UINT8)


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
