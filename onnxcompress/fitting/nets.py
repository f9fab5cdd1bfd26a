"""Whole networks made up for fitting: what kernels cost among others, and not in a row of their own kind.

In a chain of one operator the data is where the last one left it. In a network, buffers change size, weights
come and go, and layouts meet. So kernels are fitted to chains and to these networks together, and checked on
others of them. Weights are random, shapes are those people use: inverted residuals with and without squeeze
and excitation, residual and plain convolutions, shuffled groups, feature pyramids, encoders of transformers,
convolutions with a bidirectional LSTM, one-dimensional convolutions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["CHECKED", "FITTED", "Net", "quantized"]

OPSET = 20
Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Builder:
    """A growing float network over one input."""

    def __init__(self, name: str, shape: tuple[int | str, ...], dtype: int = TensorProto.FLOAT) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.input = helper.make_tensor_value_info("x", dtype, shape)

    def const(self, array: npt.ArrayLike) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape: int, std: float) -> str:
        return self.const((self.rng.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32))

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, f"n{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    # --- layers -----------------------------------------------------------------------------------------

    def conv(
        self, x: str, cin: int, cout: int, kernel: tuple[int, int] = (3, 3), stride: tuple[int, int] = (1, 1),
        group: int = 1, act: str = "",
    ) -> str:  # fmt: skip
        fan = cin // group * math.prod(kernel)
        weight = self.normal(cout, cin // group, *kernel, std=1.4 / math.sqrt(fan))
        pads = [(k - 1) // 2 for k in kernel]
        y = self.op(
            "Conv", x, weight, self.normal(cout, std=0.1), kernel_shape=list(kernel), strides=list(stride),
            pads=[*pads, *pads], group=group,
        )  # fmt: skip
        return self.act(y, act)

    def act(self, x: str, act: str) -> str:
        if not act:
            return x
        if act == "Clip":
            return str(self.op("Clip", x, self.const(np.float32(0)), self.const(np.float32(6))))
        if act == "HardSwish11":  # as it was exported before there was an operator for it
            y = self.op("Clip", self.op("Add", x, self.const(np.float32(3))), self.const(np.float32(0)),
                        self.const(np.float32(6)))  # fmt: skip
            return str(self.op("Div", self.op("Mul", x, y), self.const(np.float32(6))))
        if act == "Swish":
            return str(self.op("Mul", x, self.op("Sigmoid", x)))
        return str(self.op(act, x))

    def linear(self, x: str, cin: int, cout: int) -> str:
        y = self.op("MatMul", x, self.normal(cin, cout, std=1 / math.sqrt(cin)))
        return str(self.op("Add", y, self.normal(cout, std=0.02)))

    def norm(self, x: str, width: int) -> str:
        return str(self.op("LayerNormalization", x, self.const(np.ones(width, np.float32)),
                           self.const(np.zeros(width, np.float32))))  # fmt: skip

    def reshape(self, x: str, *shape: int) -> str:
        return str(self.op("Reshape", x, self.const(np.array(shape, np.int64))))

    def squeeze_excite(self, x: str, channels: int) -> str:
        small = max(channels // 4, 8)
        y = self.op("GlobalAveragePool", x)
        y = self.conv(self.conv(y, channels, small, (1, 1), act="Relu"), small, channels, (1, 1), act="HardSigmoid")
        return str(self.op("Mul", x, y))

    def classifier(self, x: str, channels: int, classes: int = 1000) -> str:
        y = self.op("Flatten", self.op("GlobalAveragePool", x))
        return str(self.op("Gemm", y, self.normal(channels, classes, std=1 / math.sqrt(channels)),
                           self.normal(classes, std=0.1)))  # fmt: skip

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", [self.input], infos, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def mobile(b: Builder, widths: tuple[int, ...], act: str, excite: bool, taps: int) -> str:
    """Inverted residuals: narrow, wide, depthwise, narrow."""
    x, channels = b.conv("x", 3, widths[0], stride=(2, 2), act=act), widths[0]
    for stage, width in enumerate(widths[1:]):
        for block in range(2):
            inner = channels * (3 if stage == 0 else 6)
            stride = (2, 2) if block == 0 and stage < 4 else (1, 1)
            y = b.conv(x, channels, inner, (1, 1), act=act)
            y = b.conv(y, inner, inner, (taps, taps) if stage % 2 else (3, 3), stride, group=inner, act=act)
            y = b.squeeze_excite(y, inner) if excite and stage % 2 else y
            y = b.conv(y, inner, width, (1, 1))
            x = b.op("Add", x, y) if block else y
            channels = width
    return b.classifier(b.conv(x, channels, 4 * channels, (1, 1), act=act), 4 * channels)


def residual(b: Builder, width: int, bottleneck: bool) -> str:
    """Residual blocks with one or two dense convolutions."""
    x = b.conv("x", 3, width, (7, 7), (2, 2), act="Relu")
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = width
    for stage in range(4):
        out = width << stage
        for block in range(2):
            stride = (2, 2) if stage and not block else (1, 1)
            short = x if stride == (1, 1) and channels == out else b.conv(x, channels, out, (1, 1), stride)
            if bottleneck:
                y = b.conv(x, channels, out // 4, (1, 1), act="Relu")
                y = b.conv(y, out // 4, out // 4, stride=stride, act="Relu")
                y = b.conv(y, out // 4, out, (1, 1))
            else:
                y = b.conv(b.conv(x, channels, out, stride=stride, act="Relu"), out, out)
            x = b.act(b.op("Add", y, short), "Relu")
            channels = out
    return b.classifier(x, channels)


def plain_and_recurrent(b: Builder, width: int, hidden: int) -> str:
    """A text recognizer: plain convolutions over a line, then a bidirectional LSTM over its columns."""
    x, channels = "x", 1
    for stage, pool in enumerate(((2, 2), (2, 2), (2, 1), (4, 1))):
        out = width << min(stage, 2)
        x = b.conv(b.conv(x, channels, out, act="Relu"), out, out, act="Relu")
        x = b.op("MaxPool", x, kernel_shape=list(pool), strides=list(pool))
        channels = out
    x = b.op("Squeeze", x, b.const(np.array([2], np.int64)))
    x = b.op("Transpose", x, perm=[2, 0, 1])
    w = b.normal(2, 4 * hidden, channels, std=channels**-0.5)
    r = b.normal(2, 4 * hidden, hidden, std=hidden**-0.5)
    y, *_ = b.op("LSTM", x, w, r, outputs=3, hidden_size=hidden, direction="bidirectional")
    y = b.op("Transpose", y, perm=[0, 2, 1, 3])
    return b.linear(b.reshape(y, 0, 0, -1), 2 * hidden, 97)


def pyramid(b: Builder, width: int, act: str) -> str:
    """A detector's neck: maps of three sizes brought together by upsampling."""
    x = b.conv("x", 3, width, stride=(2, 2), act=act)
    levels, channels = [], width
    for stage in range(4):
        out = min(width << stage, 8 * width)
        x = b.conv(x, channels, channels, (3, 3), (2, 2), group=channels, act=act)
        x = b.conv(x, channels, out, (1, 1), act=act)
        x = b.conv(b.conv(x, out, out, (5, 5), group=out, act=act), out, out, (1, 1), act=act)
        levels.append((x, out))
        channels = out
    tops, side = [], 6 * width
    for value, count in levels[1:]:
        tops.append(b.conv(value, count, side, (1, 1)))
    merged = tops[-1]
    for low in reversed(tops[:-1]):
        scales = b.const(np.array([1, 1, 2, 2], np.float32))
        up = b.op("Resize", merged, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
                  nearest_mode="floor")  # fmt: skip
        merged = b.op("Add", up, low)
    merged = b.op("Concat", b.conv(merged, side, side // 2), b.conv(tops[0], side, side // 2), axis=1)
    merged = b.conv(merged, side, side // 4, act="Relu")
    weight = b.normal(side // 4, 8, 2, 2, std=0.2)
    return str(b.op("Sigmoid", b.op("ConvTranspose", merged, weight, strides=[2, 2], kernel_shape=[2, 2])))


def encoder(b: Builder, tokens: int, width: int, heads: int, layers: int, gelu: str) -> str:
    """A transformer's encoder over word pieces."""
    x = b.op("Gather", b.normal(8000, width, std=0.05), "x")
    x = b.norm(b.op("Add", x, b.normal(tokens, width, std=0.05)), width)
    depth = width // heads
    for _ in range(layers):
        q, k, v = (b.reshape(b.linear(x, width, width), 0, 0, heads, depth) for _ in range(3))
        q, v = (b.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        k = b.op("Transpose", k, perm=[0, 2, 3, 1])
        scores = b.op("Mul", b.op("MatMul", q, k), b.const(np.float32(depth**-0.5)))
        y = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
        y = b.reshape(b.op("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, width)
        x = b.norm(b.op("Add", x, b.linear(y, width, width)), width)
        y = b.linear(x, width, 4 * width)
        if gelu == "erf":
            half = b.op("Mul", y, b.const(np.float32(0.5)))
            erf = b.op("Erf", b.op("Div", y, b.const(np.float32(2**0.5))))
            y = b.op("Mul", half, b.op("Add", erf, b.const(np.float32(1))))
        else:
            y = b.op(gelu, y)
        x = b.norm(b.op("Add", x, b.linear(y, 4 * width, width)), width)
    return str(b.op("ReduceMean", x, b.const(np.array([1], np.int64))))


def shuffled(b: Builder, width: int, groups: int) -> str:
    """Grouped convolutions between plain ones, halves split off and joined again."""
    x = b.conv("x", 3, width, stride=(2, 2), act="Relu")
    for stage in range(3):
        c = width << stage
        for _ in range(2):
            left, right = b.op("Split", x, outputs=2, axis=1, num_outputs=2)
            right = b.conv(right, c // 2, c // 2, group=groups, act="Relu")
            right = b.conv(right, c // 2, c // 2, (1, 1), act="Relu")
            x = b.op("Concat", left, right, axis=1)
        x = b.conv(x, c, 2 * c, stride=(2, 2), act="LeakyRelu")
    return b.classifier(x, 8 * width)


def one_dimensional(b: Builder, length: int, width: int, taps: int) -> str:
    """Convolutions over a signal, gated and normalized."""
    x = b.op("Unsqueeze", "x", b.const(np.array([2], np.int64)))
    x, channels = b.conv(x, 1, width, (1, taps), (1, 4), act="Relu"), width
    for stage in range(3):
        y = b.conv(x, channels, 2 * width, (1, 9), (1, 2))
        gate = b.op("Sigmoid", b.conv(x, channels, 2 * width, (1, 9), (1, 2)))
        x, channels = b.op("Mul", b.op("Tanh", y), gate), 2 * width
        if stage == 1:
            x = b.op("BatchNormalization", b.op("Relu", x), *(b.const(np.full(channels, v, np.float32)) for v in
                     (1.1, 0.1, 0.2, 0.9)))  # fmt: skip
    x = b.op("Transpose", b.op("Squeeze", x, b.const(np.array([2], np.int64))), perm=[0, 2, 1])
    x = b.norm(x, channels)
    return str(b.op("Softmax", b.linear(b.op("ReduceMax", x, b.const(np.array([1], np.int64)), keepdims=0),
                                        channels, 64), axis=-1))  # fmt: skip


@dataclass(frozen=True)
class Net:
    """A network that is made when asked for.

    Attributes:
        name: for people.
        shape: of its input.
        emit: builds it and returns the name of its output.
        tokens: the input is word pieces, below this number; 0 for a signal.
    """

    name: str
    shape: Shape
    emit: Callable[[Builder], str]
    tokens: int = 0

    def build(self) -> onnx.ModelProto:
        """The float model."""
        # Exported encoders are of any batch, and where a shape is fixed onnxruntime fuses otherwise.
        shape: tuple[int | str, ...] = ("batch", *self.shape[1:]) if self.tokens else self.shape
        b = Builder(self.name, shape, TensorProto.INT64 if self.tokens else TensorProto.FLOAT)
        return b.model(self.emit(b))

    def feed(self) -> dict[str, Array]:
        """An input."""
        rng = np.random.default_rng(1)
        if self.tokens:
            return {"x": rng.integers(0, self.tokens, self.shape)}
        return {"x": rng.standard_normal(self.shape, np.float32)}


def _image(name: str, size: int, emit: Callable[[Builder], str], channels: int = 3, width: int = 0) -> Net:
    return Net(name, (1, channels, size, width or size), emit)


FITTED: tuple[Net, ...] = (
    _image("mobile-relu6", 224, lambda b: mobile(b, (32, 24, 40, 80, 112, 192), "Clip", False, 5)),
    _image("mobile-excited", 160, lambda b: mobile(b, (16, 24, 40, 80, 160), "HardSwish", True, 5)),
    _image("mobile-small", 96, lambda b: mobile(b, (8, 12, 24, 48, 72), "Relu", True, 3)),
    _image("residual", 192, lambda b: residual(b, 48, False)),
    _image("bottleneck", 160, lambda b: residual(b, 128, True)),
    _image("recognizer", 32, lambda b: plain_and_recurrent(b, 48, 128), 1, 320),
    _image("pyramid", 320, lambda b: pyramid(b, 16, "HardSwish")),
    _image("shuffled", 160, lambda b: shuffled(b, 32, 4)),
    _image("exported", 448, lambda b: mobile(b, (16, 32, 48, 96, 144), "HardSwish11", False, 5)),
    _image("pyramid-large", 640, lambda b: pyramid(b, 16, "Relu")),
    Net("encoder-64", (1, 64), lambda b: encoder(b, 64, 256, 4, 3, "erf"), 8000),
    Net("encoder-128", (1, 128), lambda b: encoder(b, 128, 384, 12, 4, "Gelu"), 8000),
    Net("encoder-16", (1, 16), lambda b: encoder(b, 16, 512, 8, 3, "Gelu"), 8000),
    Net("signal", (1, 1, 16000), lambda b: one_dimensional(b, 16000, 32, 64)),
)
"""Networks that kernels are fitted to."""

CHECKED: tuple[Net, ...] = (
    _image("mobile-swish", 192, lambda b: mobile(b, (24, 32, 48, 96, 136), "Swish", False, 3)),
    _image("mobile-tiny", 128, lambda b: mobile(b, (16, 16, 32, 64, 96), "Clip", True, 5)),
    _image("exported-small", 288, lambda b: mobile(b, (16, 24, 40, 80, 112), "HardSwish11", True, 3)),
    _image("residual-wide", 128, lambda b: residual(b, 64, False)),
    _image("recognizer-small", 48, lambda b: plain_and_recurrent(b, 32, 64), 1, 256),
    _image("pyramid-relu", 256, lambda b: pyramid(b, 24, "Relu")),
    Net("encoder-32", (1, 32), lambda b: encoder(b, 32, 320, 5, 4, "erf"), 8000),
    Net("signal-wide", (1, 1, 8000), lambda b: one_dimensional(b, 8000, 64, 128)),
)
"""Networks that a fit is checked on."""


_QUANTIZABLE = ("Conv", "MatMul", "Gemm", "Add", "Mul", "Concat", "GlobalAveragePool", "MaxPool", "Resize", "Sigmoid",
                "LeakyRelu", "Softmax", "Transpose", "Reshape", "Flatten", "Split", "Gather")  # fmt: skip
_KEEPS_SCALE = ("MaxPool", "Resize", "Transpose", "Reshape", "Flatten", "Split", "Squeeze", "Unsqueeze", "Relu", "Clip")
_WEIGHT_AXIS = {"Conv": 0, "MatMul": 1, "Gemm": 1}


def quantized(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]], ops: tuple[str, ...]) -> onnx.ModelProto:
    """The model with u8 activations and s8 weights around the operators of some types.

    Args:
        model: a float model of this module.
        ranges: lowest and highest of every value of the graph that is float.
        ops: operator types that become integer.
    """
    made = {o: n for n in model.graph.node for o in n.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights = {w.name: w for w in model.graph.initializer}
    scales: dict[str, np.float32] = {}
    nodes: list[onnx.NodeProto] = []
    extra: list[onnx.TensorProto] = []
    done: dict[str, str] = {}

    def grid(value: str) -> tuple[str, str]:
        node = made.get(value)
        if node is not None and node.op_type in _KEEPS_SCALE and node.input[0] in ranges and node.op_type in ops:
            return grid(node.input[0])
        low, high = ranges[value]
        low, high = min(low, 0.0), max(high, 0.0, low + 1e-3)
        scale = np.float32((high - low) / 255)
        if value not in scales:
            scales[value] = scale
            zero = np.uint8(np.clip(round(-low / float(scale)), 0, 255))
            extra.append(numpy_helper.from_array(np.asarray(scale), f"{value}_scale"))
            extra.append(numpy_helper.from_array(np.asarray(zero), f"{value}_zero"))
        return f"{value}_scale", f"{value}_zero"

    def activation(value: str) -> str:
        if value not in done:
            done[value] = f"{value}_dq"
            nodes.append(helper.make_node("QuantizeLinear", [value, *grid(value)], [f"{value}_q"], f"{value}_q"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{value}_q", *grid(value)], [f"{value}_dq"],
                                          f"{value}_dq"))  # fmt: skip
        return done[value]

    def weight(value: str, axis: int) -> str:
        if value not in done:
            array = numpy_helper.to_array(weights[value])
            others = tuple(i for i in range(array.ndim) if i != axis)
            scale = np.maximum(np.abs(array).max(axis=others) / 127, 1e-8).astype(np.float32)
            shape = [1] * array.ndim
            shape[axis] = -1
            extra.append(numpy_helper.from_array(np.rint(array / scale.reshape(shape)).astype(np.int8), f"{value}_i"))
            extra.append(numpy_helper.from_array(scale, f"{value}_s"))
            extra.append(numpy_helper.from_array(np.zeros(scale.shape, np.int8), f"{value}_z"))
            done[value] = f"{value}_d"
            names = [f"{value}_i", f"{value}_s", f"{value}_z"]
            nodes.append(helper.make_node("DequantizeLinear", names, [f"{value}_d"], f"{value}_d", axis=axis))
        return done[value]

    def integer(node: onnx.NodeProto) -> bool:
        """Chosen, and everything it reads and makes has a grid."""
        data = [i for i in node.input if i and i not in weights]
        if node.op_type in ("Add", "Mul") and len(data) < 2:
            return False
        return node.op_type in ops and all(i in ranges for i in data) and all(o in ranges for o in node.output)

    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        producer = made.get(node.input[0])
        follows = node.op_type in ("Relu", "Clip", "LeakyRelu") and producer is not None and producer.op_type == "Conv"
        if integer(node) and not follows:
            for i, name in enumerate(node.input):
                if name in weights:
                    if node.op_type in _WEIGHT_AXIS and i == 1:
                        copy.input[i] = weight(name, _WEIGHT_AXIS[node.op_type])
                elif name:
                    copy.input[i] = activation(name)
        elif not follows or producer is None or not integer(producer):
            for i, name in enumerate(node.input):  # float between integers reads what was rounded, too
                if name in done and name not in weights:
                    copy.input[i] = done[name]
        nodes.append(copy)
        for name in node.output if integer(node) else ():
            after = readers.get(name, [])
            if not (len(after) == 1 and after[0].op_type in ("Relu", "Clip") and node.op_type == "Conv"):
                activation(name)
        if follows and producer is not None and integer(producer) and node.op_type != "LeakyRelu":
            activation(node.output[0])
    outputs = list(model.graph.output)
    kept = [w for w in model.graph.initializer if any(w.name in n.input for n in nodes)]
    graph = helper.make_graph(nodes, "net", list(model.graph.input), outputs, [*kept, *extra])
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=10)


WHOLLY = _QUANTIZABLE
"""Everything onnxruntime has an integer kernel for."""

PARTLY = ("Conv", "MatMul", "Gemm")
"""Only what multiplies."""
