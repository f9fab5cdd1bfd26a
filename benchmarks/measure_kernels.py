"""Measure the kernels of onnxruntime on this machine and write them as the kernels of a profile.

An operator timed alone is a poor guide to the same operator inside a model: session entry, layout changes
and cold memory weigh as much as the work. So every operator is timed as a *link* of a chain: a chain of
10 links and a chain of 2 are run in turns and one link costs ``(t10 - t2) / 8``. What both chains share
cancels out. On a set of 18 models this predicted 7 times better than operators timed alone.

The seconds of the links are then fitted, kernel by kernel, to a linear form with no negative term::

    t = ns_fixed + ns_per_mac * macs + ns_per_element * elements + ns_per_weight * weights

by non-negative least squares on the *relative* error. ``macs`` are counted with the channels rounded up to
``channel_block``; the block is the candidate that fits best.

    python benchmarks/measure_kernels.py                       # table of fit errors
    python benchmarks/measure_kernels.py --profile new.toml    # and the kernels, as TOML
    python benchmarks/measure_kernels.py --rows rows.csv       # keep the measurements
    python benchmarks/measure_kernels.py --from-rows rows.csv  # fit again without measuring

Takes about five minutes on one thread. Close everything else first.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import scipy.optimize
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
SHORT, LONG = 2, 10
SCALE = np.float32(0.03)
"""Scale of every quantized activation: links keep a standard deviation near 1, so +-3.8 is covered."""

Array = npt.NDArray[np.generic]


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

    def const(self, array: Array) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(
        self, op_type: str, inputs: Sequence[str], *, domain: str = "", outputs: int = 1, **attributes: object
    ) -> str:
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


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured link."""

    kind: str
    precision: str
    label: str
    nodes: int
    macs: int
    in_channels: int
    out_channels: int
    elements: int
    weights: int
    patches: int
    on: str
    seconds: float


# ---- links -------------------------------------------------------------------------------------------------


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
        how = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
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
        "", precision, "", lambda chain, x: _pick(chain, quantized, _conv(chain, quantized, x, channels, channels), size),
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
                quantized = precision == "u8s8"
                x = _qdq(
                    chain, quantized, x, lambda v, w=array: chain.op("MatMul", [v, chain.weight(w, 1, quantized)[0]])
                )  # type: ignore[misc]
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
        common = {"hidden_size": hidden, "direction": "bidirectional"}
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
    **attributes: object,
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


def _two(chain: Chain, x: str, first: tuple[str, dict[str, object]], second: tuple[str, dict[str, object]]) -> str:
    for op_type, attributes in (first, second):
        x = chain.op(op_type, [x], **attributes)
    return x


MAPS = [
    (1, 16, 56, 56),
    (1, 64, 56, 56),
    (1, 64, 28, 28),
    (1, 128, 14, 14),
    (1, 256, 14, 14),
    (1, 256, 7, 7),
    (1, 24, 112, 112),
]
TOKENS = [(1, 16, 384), (1, 128, 384), (1, 128, 768), (1, 64, 192)]


def links() -> Iterator[Link]:
    """Every measured link, cheap ones first within a kind."""
    for p in ("f32", "u8s8"):
        for cin, cout, size in [(16, 16, 56), (20, 20, 28), (24, 24, 56), (32, 32, 28), (32, 64, 28), (40, 40, 28), (48, 48, 28), (56, 56, 14), (64, 64, 28),
                                (64, 64, 14), (96, 96, 14), (128, 128, 14), (128, 128, 7), (256, 256, 7), (64, 64, 56), (256, 256, 14), (512, 512, 7)]:  # fmt: skip
            yield conv("conv", p, cin, cout, size, 3)
        for c, size in [(63, 28), (50, 28), (33, 28), (36, 28), (60, 14), (92, 14), (250, 7)]:
            yield conv("conv", p, c, c, size, 3)
            yield conv("conv_pointwise", p, c, c, size, 1)
        for c, size, k in [
            (63, 56, 3),
            (50, 28, 3),
            (36, 28, 3),
            (24, 56, 3),
            (72, 28, 3),
            (120, 28, 3),
            (120, 14, 5),
            (200, 14, 3),
            (184, 14, 3),
            (88, 28, 5),
            (250, 14, 3),
        ]:
            yield conv("conv_depthwise", p, c, c, size, k, group=c)
        yield conv("conv", p, 32, 32, 28, 5)
        yield conv("conv", p, 64, 64, 1, 3, width=512)
        yield conv("conv", p, 128, 128, 1, 5, width=128)
        for cin, cout, size in [(16, 64, 56), (24, 96, 56), (24, 144, 28), (32, 128, 28), (40, 240, 28), (64, 64, 28), (64, 256, 28), (64, 384, 14),
                                (80, 200, 14), (96, 576, 14), (128, 512, 14), (160, 960, 7), (256, 256, 14), (512, 128, 28), (1024, 256, 7), (256, 1024, 1), (96, 24, 1)]:  # fmt: skip
            yield conv("conv_pointwise", p, cin, cout, size, 1)
        yield conv("conv_pointwise", p, 128, 256, 1, 1, width=256)
        for c, size, k in [(16, 56, 3), (32, 56, 3), (96, 56, 3), (144, 28, 3), (40, 28, 3), (240, 14, 3), (384, 14, 3), (576, 14, 3), (960, 7, 3), (512, 14, 3),
                           (72, 28, 5), (240, 14, 5), (480, 14, 5), (960, 7, 5), (32, 56, 5), (64, 28, 7)]:  # fmt: skip
            yield conv("conv_depthwise", p, c, c, size, k, group=c)
        yield conv("conv_depthwise", p, 256, 256, 1, 5, group=256, width=256)
        for c, g, size in [(64, 4, 28), (128, 32, 28), (128, 4, 28), (256, 8, 14), (256, 32, 14), (64, 2, 56), (128, 2, 14), (256, 4, 7),
                           (96, 3, 28), (32, 2, 56), (512, 32, 7), (64, 16, 28), (512, 4, 7), (96, 12, 14)]:  # fmt: skip
            yield conv("conv_grouped", p, c, c, size, 3, group=g)
        for cin, cout, size, kernel in [(3, 16, 112, 3), (3, 32, 112, 3), (3, 32, 224, 3), (3, 24, 160, 3), (1, 16, 64, 3), (1, 32, 128, 3), (3, 64, 112, 7),
                                        (3, 32, 160, 7)]:  # fmt: skip
            yield stem(p, cin, cout, size, kernel)
    for cin, cout, size, kernel in [
        (64, 32, 14, 2),
        (128, 64, 14, 2),
        (64, 24, 28, 2),
        (32, 32, 28, 4),
        (24, 8, 40, 2),
    ]:
        yield conv_transpose(cin, cout, size, kernel)
    for p in ("f32", "u8s8", "dynamic"):
        for rows in (1, 16, 128, 512):
            for k, n in [(384, 384), (384, 1536), (768, 768), (768, 3072), (128, 512)]:
                if rows * k * n <= 3.1e8:
                    yield matmul(p, rows, k, n)
        yield matmul(p, 1, 2048, 1000)
        yield matmul(p, 4, 512, 512)
        yield matmul(p, 40, 120, 240)
        if p != "dynamic":
            for heads, rows, depth in [(12, 128, 64), (6, 128, 64), (8, 40, 15), (12, 32, 32), (4, 256, 32)]:
                yield matmul_dynamic(p, heads, rows, depth)
        if p != "u8s8":
            for steps, hidden in [(1, 128), (16, 64), (32, 64), (16, 128), (40, 128), (16, 256), (32, 96)]:
                yield recurrent("lstm", p, steps, hidden)
    for steps, hidden in [(16, 64), (16, 128), (32, 96), (16, 256)]:
        yield recurrent("gru", "f32", steps, hidden)
    for shape in MAPS:
        yield from on_maps(shape)
    for shape in TOKENS:
        yield from on_tokens(shape)
    for vocabulary, ids, width in [(4000, 128, 384), (30000, 128, 256), (4000, 16, 768), (4000, 512, 128)]:
        for p in ("f32", "u8s8"):
            yield gather(p, vocabulary, ids, width)


def on_maps(shape: tuple[int, ...]) -> Iterator[Link]:
    """Operators met on feature maps."""
    _, channels, height, width = shape
    size = int(np.prod(shape))

    def squeeze(g: Chain, v: str) -> str:
        if not any(i.name == "k" for i in g.inputs):
            g.inputs.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, (1, channels, 1, 1)))
            g.nodes.append(helper.make_node("QuantizeLinear", ["k", *g._activation_grid()], ["k_q"], "k_quantize"))
            g.nodes.append(
                helper.make_node("DequantizeLinear", ["k_q", *g._activation_grid()], ["k_d"], "k_dequantize")
            )
        return g.op("Mul", [v, "k_d"])

    def one(op_type: str, **attributes: object) -> Emit:
        return lambda g, v: g.op(op_type, [v], **attributes)

    def resize(g: Chain, v: str, factor: float, mode: str) -> str:
        scales = g.const(np.array([1, 1, factor, factor], np.float32))
        return g.op("Resize", [v, "", scales], mode=mode, coordinate_transformation_mode="asymmetric")

    def split_concat(g: Chain, x: str) -> str:
        return g.op("Concat", g.op("Split", [x], outputs=2, axis=1, num_outputs=2).split(","), axis=1)

    swap: tuple[str, dict[str, object]] = ("Transpose", {"perm": [0, 2, 3, 1]})
    back: tuple[str, dict[str, object]] = ("Transpose", {"perm": [0, 3, 1, 2]})
    window: dict[str, object] = {"kernel_shape": [3, 3], "pads": [1] * 4}
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
    for p in ("f32", "u8s8"):
        yield unary("softmax", p, "Softmax", shape, axis=-1)
        for op_type in ("Add", "Mul"):
            yield binary(op_type, p, shape)
        yield unary("Sigmoid", p, "Sigmoid", shape)
        yield on_tensor("Transpose", p, f"Transpose {shape}", lambda g, x: _two(g, x, ("Transpose", {"perm": [0, 2, 1]}), ("Transpose", {"perm": [0, 2, 1]})),
                        shape, 4 * size, nodes=2)  # fmt: skip
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

    return Link("gather", precision, f"{ids} of {vocabulary}x{width}", emit, (ids,), elements=ids * (width + 1), parallel=True, raw=True,
                integer_input=TensorProto.INT64)  # fmt: skip


# ---- measuring ---------------------------------------------------------------------------------------------


class NotFusedError(Exception):
    """The optimized graph does not run the link with the expected operators."""


def session(model: onnx.ModelProto, raw: bool = False, save: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if raw:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save:
        options.optimized_model_filepath = save
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimized_ops(model: onnx.ModelProto) -> list[str]:
    """Operator types onnxruntime really runs for a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder, "optimized.onnx"))
        session(model, save=path)
        return [node.op_type for node in onnx.load(path).graph.node]


def check_fused(link: Link) -> None:
    """Raise NotFusedError if the optimized graph does not run a link as meant.

    Every node must have become one of the expected operators, and a longer quantized chain must not hold
    more QuantizeLinear and DequantizeLinear than a short one.
    """
    quantized = link.precision == "u8s8" and not link.raw
    if not link.expect and not quantized:
        return
    ops = optimized_ops(link.build(SHORT))
    if link.expect and sum(op in link.expect for op in ops) != SHORT * link.nodes:
        raise NotFusedError(f"runs as {sorted(set(ops))}")
    if quantized:
        longer = optimized_ops(link.build(SHORT + 1))
        boundaries = [sum(op in ("QuantizeLinear", "DequantizeLinear") for op in graph) for graph in (ops, longer)]
        if boundaries[1] > boundaries[0] + 2 * link.parallel:
            raise NotFusedError(f"stays float: {sorted(set(ops))}")


def feeds(model: onnx.ModelProto, seed: int = 1) -> dict[str, Array]:
    """Inputs that keep long chains away from infinities and denormals; indices stay inside small tables."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        match value.type.tensor_type.elem_type:
            case TensorProto.INT64:
                made[value.name] = rng.integers(0, 4000, shape)
            case TensorProto.UINT8:
                made[value.name] = rng.integers(0, 256, shape).astype(np.uint8)
            case _:
                spread = 0.08 if len(shape) == 3 and value.name in "kv" else 0.1
                made[value.name] = (rng.standard_normal(shape) * spread + (0.0 if value.name in "kv" else 0.5)).astype(
                    np.float32
                )
                if value.name == "k" and len(shape) == 4:
                    made[value.name] += np.float32(1.0)
    return made


class Stopwatch:
    """A session with inputs and outputs bound once, so that a run is the kernels and little else."""

    def __init__(self, model: onnx.ModelProto, raw: bool) -> None:
        self.session = session(model, raw)
        self.binding = self.session.io_binding()
        for name, array in feeds(model).items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name)
        self.times: list[float] = []
        self.session.run_with_iobinding(self.binding)

    def run(self, repeats: int = 1) -> None:
        start = time.thread_time()  # one thread, so what other processes take does not count
        for _ in range(repeats):
            self.session.run_with_iobinding(self.binding)
        self.times.append((time.thread_time() - start) / repeats)

    def seconds(self) -> float:
        return float(np.percentile(self.times, 10))


def chain_seconds(link: Link, budget: float) -> float:
    """Seconds of one link by the slope between a long and a short chain, run in turns."""
    short, long = (Stopwatch(link.build(n), link.raw) for n in (SHORT, LONG))
    long.run()
    repeats = max(1, int(2e-3 / max(long.times.pop(), 1e-7)))
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(long.times) < 8:
        short.run(repeats)
        long.run(repeats)
    return (long.seconds() - short.seconds()) / (LONG - SHORT)


def link_seconds(link: Link, budget: float) -> float:
    """Seconds of a link less those of everything it stands on."""
    seconds = chain_seconds(link, budget)
    while link.baseline:
        link = link.baseline
        seconds -= chain_seconds(link, budget)
    return seconds


def measure(selected: Iterable[Link], budget: float) -> Iterator[Row]:
    """Time links, skipping those onnxruntime does not run as meant."""
    for link in selected:
        try:
            check_fused(link)
            seconds = link_seconds(link, budget)
        except NotFusedError as error:
            print("not fused:", link.kind, link.precision, link.label, error, file=sys.stderr)
            continue
        if seconds <= 0:
            print("lost in noise:", link.kind, link.precision, link.label, file=sys.stderr)
            continue
        if link.kind == "boundary":  # a pair; which of the two pays for the layout cannot be told
            half = dataclasses.replace(row(link, seconds / 2), nodes=1, elements=link.elements // 2)
            yield from (dataclasses.replace(half, kind=kind) for kind in ("quantize", "dequantize"))
        else:
            yield row(link, seconds)


def row(link: Link, seconds: float) -> Row:
    return Row(
        link.kind,
        link.precision,
        link.label,
        link.nodes,
        link.macs,
        *link.channels,
        link.elements,
        link.weights,
        link.patches,
        link.on,
        seconds,
    )


def overheads(budget: float = 0.3) -> tuple[float, float]:
    """Seconds per run and per node: the intercept and slope of chains of a trivial operator."""
    link = unary("overhead", "f32", "Abs", (1, 4))
    link = dataclasses.replace(link, raw=True)
    per_node = chain_seconds(link, budget)
    watch = Stopwatch(link.build(1), True)
    for _ in range(200):
        watch.run(20)
    return max(watch.seconds() - per_node, 0.0), max(per_node, 0.0)


PRODUCERS = ("Conv", "Gemm", "MatMul", "ConvTranspose", "Add", "Mul", "AveragePool", "LayerNormalization")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")
"""Activations cheap enough to be called free when fused; a fused Sigmoid still costs its exponentials."""

WITH_CONSTANT = ("Add", "Mul", "BatchNormalization")


def fusions() -> Iterator[tuple[str, str, list[str]]]:
    """(precision, producer, consumers that vanish from the optimized graph when they follow it)."""
    for precision in ("f32", "u8s8"):
        for producer in PRODUCERS:
            shapes = [(8, 32), (2, 8, 32)] if producer in ("MatMul", "LayerNormalization") else [(1, 32, 8, 8)]
            shapes = [(8, 32)] if producer == "Gemm" else shapes
            consumers = (*ACTIVATIONS, *WITH_CONSTANT)
            gone = [c for c in consumers if all(_vanishes(precision, producer, c, shape) for shape in shapes)]
            if precision == "f32" and producer == "Conv" and _pad_vanishes():
                gone.append("Pad")
            if gone:
                yield precision, producer, gone


def _pad_vanishes() -> bool:
    def emit(chain: Chain, x: str) -> str:
        padded = chain.op("Pad", [x, chain.const(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))])
        return chain.op("Conv", [padded, chain.const(chain.normal(32, 32, 3, 3))])

    return "Pad" not in optimized_ops(Link("fusion", "f32", "", emit, (1, 32, 8, 8)).build(1))


def _vanishes(precision: str, producer: str, consumer: str, shape: tuple[int, ...]) -> bool:
    quantized = precision == "u8s8"
    flat = len(shape) < 4

    def produce(chain: Chain, v: str) -> str:
        if producer in ("Conv", "ConvTranspose"):
            name, scale = chain.weight(chain.normal(32, 32, 3, 3, std=0.06), 0, quantized)
            return chain.op(producer, [v, name, chain.bias(32, scale, quantized)], pads=[1] * 4)
        if producer in ("Gemm", "MatMul"):
            name, scale = chain.weight(chain.normal(32, 32, std=0.2), 1, quantized)
            return chain.op(producer, [v, name, *([chain.bias(32, scale, quantized)] if producer == "Gemm" else [])])
        if producer == "LayerNormalization":
            return chain.op(producer, [v, chain.const(np.ones(32, np.float32))])
        if producer == "AveragePool":
            return chain.op(producer, [v], kernel_shape=[3, 3], pads=[1] * 4)
        return chain.op(producer, [v, v])

    def emit(chain: Chain, x: str) -> str:
        v = produce(chain, chain.dequantize(x) if quantized else x)
        match consumer:
            case "Clip":
                v = chain.op(consumer, [v, chain.const(np.float32(0)), chain.const(np.float32(3))])
            case "Add" | "Mul":
                v = chain.op(consumer, [v, chain.const(np.full((32,) if flat else (32, 1, 1), 1.5, np.float32))])
            case "BatchNormalization":
                v = chain.op(consumer, [v, *(chain.const(np.full(32, 0.7, np.float32)) for _ in range(4))])
            case _:
                v = chain.op(consumer, [v])
        if not quantized:
            return v
        # The grid a quantizer gives a value that has been rectified: 0 is its lowest point.
        return chain.op("QuantizeLinear", [v, chain.const(np.float32(3 / 255)), chain.const(np.uint8(0))])

    try:
        ops = optimized_ops(Link("fusion", precision, "", emit, shape).build(1))
    except Exception as error:  # an operator this runtime refuses is simply not fused
        print(f"fusion {precision} {producer}+{consumer}: {error}", file=sys.stderr)
        return False
    layout = ("ReorderInput", "ReorderOutput", "Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear")
    left = [op for op in ops if op not in layout]
    return len(left) == 1 and (not quantized or left[0].startswith("Q"))


# ---- fitting -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fit:
    """A kernel's coefficients (ns) and how well they fit."""

    kind: str
    precision: str
    on: str
    fixed: float
    per_mac: float
    per_element: float
    per_weight: float
    per_patch: float
    channel_block: int
    aligned_to: int
    misaligned_factor: float
    points: int
    mean_error: float
    worst_error: float


CONVOLUTIONS = ("conv", "conv_pointwise", "conv_depthwise", "conv_grouped")
UNITS = np.array([1e-6, 1e-11, 1e-9, 1e-9, 1e-9])


def padded_macs(r: Row, block: int) -> float:
    """MACs with channels rounded up to ``block`` (per group); a single channel is never padded."""
    padded = 1.0
    for channels in (r.in_channels, r.out_channels):
        if channels > 1:
            padded *= -(-channels // block) * block / channels
    return r.macs * padded


def aligned(r: Row, to: int) -> bool:
    return all(c % to == 0 for c in (r.in_channels, r.out_channels) if c > 1)


def fit(rows: Sequence[Row], per_node: float) -> Fit:
    """Non-negative least squares on relative error.

    Channel block, alignment and the factor that misaligned channels cost are searched on a small grid; more
    structure is believed only where it takes a tenth off the mean error, and tried only with enough points.
    """
    first = rows[0]
    measured = np.array([r.seconds for r in rows])
    own = np.array([max(r.seconds - per_node * r.nodes, 0.05 * r.seconds) for r in rows])
    grid: list[tuple[int, int, float]] = [(1, 1, 1.0)]
    blocks = (1, 4, 8, 16) if first.kind in CONVOLUTIONS else (1,)
    grid += [(block, 1, 1.0) for block in blocks[1:]]
    if (len(rows) >= 7 and first.kind in CONVOLUTIONS) or first.kind.endswith("Pool"):
        factors = (1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0, 20.0, 80.0)
        grid += [(block, to, factor) for block in blocks for to in (4, 8, 16) for factor in factors]
    best: Fit | None = None
    for block, to, factor in grid:
        design = np.array([[r.nodes, padded_macs(r, block), r.elements, r.weights, r.patches] for r in rows], float)
        slower = np.array([1.0 if aligned(r, to) else factor for r in rows])
        scaled = design * UNITS * slower[:, None]
        solution, _ = scipy.optimize.nnls(scaled / measured[:, None], own / measured)
        error = np.abs((scaled @ solution + per_node * design[:, 0]) / measured - 1)
        if best is None or error.mean() < 0.9 * best.mean_error:
            ns = [float(c) for c in solution * UNITS * 1e9]
            best = Fit(
                first.kind,
                first.precision,
                first.on,
                *ns,
                block,
                to,
                factor,
                len(rows),
                float(error.mean()),
                float(error.max()),
            )  # type: ignore[arg-type]
    if best is None:
        raise ValueError("nothing to try")
    return best


def fits(rows: Sequence[Row], per_node: float, cache_bytes: int = 0) -> tuple[list[Fit], float]:
    """All kernels, and the nanoseconds that a byte of weights costs on top if it comes from memory.

    A chain whose weights exceed the cache runs at the speed of memory, one that fits does not. Kernels are
    fitted to chains that fit (all of them if ``cache_bytes`` is 0); what the others take longer than their
    kernel says is the cost of memory, of which the median is given.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        groups.setdefault((r.kind, r.precision, r.on), []).append(r)
    found: list[Fit] = []
    extra: list[float] = []
    for group in groups.values():
        cold = [r for r in group if 0 < cache_bytes < LONG * weight_bytes(r)]
        warm = [r for r in group if r not in cold]
        if len(warm) < 4:
            cold, warm = [], group
        found.append(fit(warm, per_node))
        extra += [1e9 * (r.seconds - predict(found[-1], r, per_node)) / weight_bytes(r) for r in cold]
    return found, max(0.0, float(np.median(extra))) if extra else 0.0


def weight_bytes(r: Row) -> int:
    return r.weights * (4 if r.precision == "f32" else 1)


def predict(f: Fit, r: Row, per_node: float) -> float:
    """Seconds of a link by a fit."""
    ns = (
        f.fixed * r.nodes
        + f.per_mac * padded_macs(r, f.channel_block)
        + f.per_element * r.elements
        + f.per_weight * r.weights
        + f.per_patch * r.patches
    )
    return per_node * r.nodes + 1e-9 * ns * (1.0 if aligned(r, f.aligned_to) else f.misaligned_factor)


def usable_cache() -> int:
    """Half of the last-level cache in bytes, as other cores use it too; 0 if it cannot be told (Linux only)."""
    sizes = sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return int(sizes[-1].read_text().strip().removesuffix("K")) * 1024 // 2 if sizes else 0


STANDS_FOR = {
    ("move", "u8s8"): ("Concat", "Slice", "Split", "Expand", "Tile", "DepthToSpace"),
    ("softmax", "u8s8"): ("Softmax",),
    ("gather", "u8s8"): ("Gather",),
    ("MaxPool", "f32"): ("MaxPool", "pool"),
}
"""Which kernels of a profile a measured link prices, if not the one it is named after.

Families are priced in float only, as a family has members that onnxruntime keeps float (Pad, LogSoftmax).
"""


def toml(found: Sequence[Fit], fused: Iterable[tuple[str, str, list[str]]]) -> str:
    """The ``[[kernel]]`` and ``[[fusion]]`` tables of a profile."""
    lines: list[str] = []
    for precision in ("f32", "u8s8"):
        lines += ["[[kernel]]", 'kind = "free"', f'precision = "{precision}"', ""]
    named = [(kind, f) for f in found for kind in STANDS_FOR.get((f.kind, f.precision), (f.kind,))]
    for kind, f in named:
        lines += ["[[kernel]]", f'kind = "{kind}"', f'precision = "{f.precision}"']
        lines += [f'on = "{f.on}"'] if f.on != "any" else []
        for name in ("per_mac", "per_element", "per_weight", "per_patch", "fixed"):
            value = float(f"{getattr(f, name):.3g}")
            if value > 0:
                lines.append(f"ns_{name} = {value:.10f}".rstrip("0").rstrip("."))
        if f.channel_block > 1:
            lines.append(f"channel_block = {f.channel_block}")
        if f.aligned_to > 1:
            lines += [f"aligned_to = {f.aligned_to}", f"misaligned_factor = {f.misaligned_factor}"]
        lines += [f"fit_error = {f.mean_error:.2f}", ""]
    for precision, op_type, absorbed in fused:
        rules = {
            "": [n for n in absorbed if n not in (*WITH_CONSTANT, "Pad")],
            "constant_operand = true": [n for n in absorbed if n in WITH_CONSTANT],
            'side = "before"': [n for n in absorbed if n == "Pad"],
        }
        for condition, names in rules.items():
            if names:
                quoted = ", ".join(f'"{n}"' for n in names)
                lines += ["[[fusion]]", f'op = "{op_type}"', f"absorbs = [{quoted}]", f'precision = "{precision}"']
                lines += [condition, ""] if condition else [""]
    return "\n".join(lines)


def read_rows(path: pathlib.Path) -> list[Row]:
    types = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{k: types[k](v) for k, v in record.items()}) for record in csv.DictReader(file)]


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(r) for r in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds to measure, separated by commas")
    parser.add_argument("--precision", default="", help="measure one precision only")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds of timing per link")
    parser.add_argument("--rows", type=pathlib.Path, help="write the measurements as CSV")
    parser.add_argument("--from-rows", type=pathlib.Path, help="fit measurements written by --rows")
    parser.add_argument("--profile", type=pathlib.Path, help="write the kernels as TOML")
    parser.add_argument(
        "--cache-bytes", type=int, help="cache that weights may stay in; half the last level's if not given"
    )
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    start = time.perf_counter()
    if arguments.from_rows:
        rows = read_rows(arguments.from_rows)
        per_run, per_node = (
            next(r.seconds for r in rows if r.kind == "per_run"),
            next(r.seconds for r in rows if r.kind == "per_node"),
        )
    else:
        per_run, per_node = overheads()
        chosen = [
            k
            for k in links()
            if (not only or k.kind in only) and (not arguments.precision or k.precision == arguments.precision)
        ]
        rows = list(measure(chosen, arguments.budget))
        rows += [
            Row(kind, "f32", "", 1, 0, 0, 0, 0, 0, 0, "any", s)
            for kind, s in (("per_run", per_run), ("per_node", per_node))
        ]
    if arguments.rows:
        write_rows(arguments.rows, rows)
    cache = usable_cache() if arguments.cache_bytes is None else arguments.cache_bytes
    found, per_byte = fits([r for r in rows if not r.kind.startswith("per_")], per_node, 3 * cache // 2)
    print(
        f"onnxruntime {ort.__version__}: {per_run * 1e9:.0f} ns per run, {per_node * 1e9:.0f} ns per node, "
        f"{per_byte:.3f} ns per weight byte beyond {cache} bytes"
    )
    print(
        f"{'kind':18}{'on':5}{'precision':10}{'n':>3}{'mean':>7}{'worst':>7}{'GMAC/s':>9}{'ns/el':>9}{'ns/w':>9}{'ns/patch':>9}{'fixed ns':>10}{'block':>6}{'align':>9}"
    )
    for f in found:
        rate = f"{1 / f.per_mac:.1f}" if f.per_mac else "-"
        print(
            f"{f.kind:18}{f.on:5}{f.precision:10}{f.points:3}{f.mean_error:7.0%}{f.worst_error:7.0%}{rate:>9}{f.per_element:9.4f}{f.per_weight:9.4f}"
            f"{f.per_patch:9.4f}{f.fixed:10.0f}{f.channel_block:6}{f.aligned_to:5}x{f.misaligned_factor:.1f}"
        )
    if arguments.profile:
        overhead = f"[overhead]\nns_per_run = {per_run * 1e9:.0f}\nns_per_node = {per_node * 1e9:.0f}\n\n"
        if per_byte:
            overhead += f"[memory]\ncache_bytes = {cache}\nns_per_byte = {per_byte:.3f}\n\n"
        arguments.profile.write_text(overhead + toml(found, fusions()))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
