"""Models that say something of every place: a detector, a segmenter, a model of sound, a tagger of sequences."""

from __future__ import annotations

import math

import numpy as np
import onnx

from onnxcompress.errors import ZooError
from onnxcompress.models_zoo.building import SEED, Net, to_tensor
from onnxcompress.models_zoo.families_layers import LINEAR, RELU, SILU, conv, conv_relu, image_shape, linear, silu

__all__ = ["bilstm", "c2f_detector", "unet", "wavenet1d"]


def c2f_detector(width: int = 16, *, side: int = 64, classes: int = 8, seed: int = SEED) -> onnx.ModelProto:
    """C2f blocks, pyramid pooling, a neck of Resize and Concat, two heads joined to [N, 4 + classes, places].

    Pictures have ``side`` pixels, a multiple of 16.
    """
    net = Net("c2f_detector", width, seed)
    if side <= 0 or side % 16:
        raise ZooError(f"c2f_detector takes no pictures of {side} pixels", hint="side has to be a multiple of 16")

    def block(
        x: str, name: str, cin: int, cout: int, kernel: int = 1, stride: int = 1, gain: float = 0.9 * SILU
    ) -> str:
        return silu(net, conv(net, x, name, cin, cout, kernel, stride=stride, gain=gain))

    def c2f(x: str, name: str, cin: int, cout: int, depth: int = 1, *, shortcut: bool = True) -> str:
        half = cout // 2
        with net.scope(name):
            parts = net.many("Split", 2, block(x, "cv1", cin, cout), [half, half], axis=1)
            for i in range(depth):
                with net.scope(f"m.{i}"):
                    y = block(block(parts[-1], "cv1", half, half, 3), "cv2", half, half, 3)
                    parts.append(net("Add", parts[-1], y) if shortcut else y)
            return block(net("Concat", *parts, axis=1), "cv2", (2 + depth) * half, cout)

    def pyramid(x: str, name: str, channels: int) -> str:
        with net.scope(name):
            parts = [block(x, "cv1", channels, channels // 2)]
            for _ in range(3):
                pool = net("MaxPool", parts[-1], kernel_shape=[5, 5], pads=[2] * 4, strides=[1, 1], ceil_mode=0)
                parts.append(pool)
            # Pooled twice and three times values are large.
            return block(net("Concat", *parts, axis=1), "cv2", 2 * channels, channels, gain=LINEAR / 2)

    def head(x: str, name: str, channels: int) -> str:
        with net.scope(name):
            boxes = conv(net, block(x, "cv2.0", channels, width, 3), "cv2.1", width, 4, gain=SILU)
            scores = conv(net, block(x, "cv3.0", channels, width, 3), "cv3.1", width, classes, gain=SILU)
            y = net("Concat", boxes, scores, axis=1)
            return net.reshape(y, net.dim(y, 0), 4 + classes, -1)

    mid, top = 4 * width, 8 * width
    x = block(net.input("image", image_shape(side)), "model.0", 3, width, 3, 2, LINEAR)
    x = c2f(block(x, "model.1", width, 2 * width, 3, 2), "model.2", 2 * width, 2 * width)
    p3 = c2f(block(x, "model.3", 2 * width, mid, 3, 2), "model.4", mid, mid, 2)
    p4 = c2f(block(p3, "model.5", mid, top, 3, 2), "model.6", top, top)
    p4 = pyramid(p4, "model.7", top)
    up = net(
        "Resize",
        p4,
        "",
        np.array([1, 1, 2, 2], np.float32),
        coordinate_transformation_mode="asymmetric",
        mode="nearest",
        nearest_mode="floor",
    )
    n3 = c2f(net("Concat", up, p3, axis=1), "model.10", top + mid, mid, shortcut=False)
    down = block(n3, "model.11", mid, mid, 3, 2)
    n4 = c2f(net("Concat", down, p4, axis=1), "model.13", mid + top, top, shortcut=False)
    both = net("Concat", head(n3, "detect.0", mid), head(n4, "detect.1", top), axis=2)
    boxes, scores = net.many("Split", 2, both, [4, classes], axis=1)
    places = (side // 8) ** 2 + (side // 16) ** 2
    net.output(boxes, "boxes", ["batch", 4, places])
    net.output(net("Sigmoid", scores), "scores", ["batch", classes, places])
    return net.finish()


def unet(width: int = 16, *, seed: int = SEED) -> onnx.ModelProto:
    """Two levels down by MaxPool and up by ConvTranspose, skips by Concat; sides are multiples of 4."""
    net = Net("unet", width, seed)

    def twice(x: str, name: str, cin: int, cout: int) -> str:
        with net.scope(name):
            return conv_relu(net, conv_relu(net, x, "0", cin, cout, 3), "2", cout, cout, 3)

    def up(x: str, name: str, cin: int, cout: int) -> str:
        weight = net.weight(f"{name}.weight", (cin, cout, 2, 2), math.sqrt(RELU / cin))
        bias = net.weight(f"{name}.bias", (cout,), 0.1)
        return net("ConvTranspose", x, weight, bias, dilations=[1, 1], kernel_shape=[2, 2], strides=[2, 2])

    skips = [twice(net.input("image", image_shape()), "down0", 3, width)]
    for level in (1, 2):
        x = net("MaxPool", skips[-1], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=0)
        skips.append(twice(x, f"down{level}", width << level - 1, width << level))
    x = skips.pop()
    for level in (1, 0):
        channels = width << level
        x = net("Concat", skips.pop(), up(x, f"up{level}", 2 * channels, channels), axis=1)
        x = twice(x, f"conv{level}", 2 * channels, channels)
    net.output(conv(net, x, "head", width, 4), "mask", ["batch", 4, "height", "width"])
    return net.finish()


def wavenet1d(width: int = 16, *, depth: int = 4, seed: int = SEED) -> onnx.ModelProto:
    """Causal convolutions of growing dilation, gated by halves of their channels, skips summed."""
    net = Net("wavenet1d", width, seed, depth)
    signal = net.input("signal", ["batch", 8, "time"])
    x = conv(net, signal, "front", 8, width, gain=LINEAR, rank=1)
    total = ""
    for i in range(depth):
        with net.scope(f"layers.{i}"):
            padded = net("Pad", x, [0, 0, 1 << i, 0, 0, 0], 0.0, mode="constant")
            y = conv(net, padded, "dilated", width, 2 * width, 2, pad=0, dilation=1 << i, gain=LINEAR, rank=1)
            kept, gate = net.many("Split", 2, y, [width, width], axis=1)
            y = net("Mul", net("Tanh", kept), net("Sigmoid", gate))  # second moment about 1/9
            skip = conv(net, y, "skip", width, width, gain=9 / depth, rank=1)
            total = net("Add", total, skip) if total else skip
            if i < depth - 1:
                x = net("Add", conv(net, y, "residual", width, width, gain=9 / depth, rank=1), x)
    y = net("Relu", conv(net, net("Relu", total), "head.0", width, width, rank=1))
    net.output(conv(net, y, "head.2", width, 16, rank=1), "scores", ["batch", 16, "time"])
    return net.finish()


def bilstm(width: int = 16, *, seed: int = SEED) -> onnx.ModelProto:
    """Convolution, two bidirectional LSTM layers of ``width`` hidden units, a GRU and a linear head.

    The first layer's states are zeros of a shape worked out in the graph, as the exporter writes them.
    """
    net = Net("bilstm", width, seed)

    def weights(name: str, gates: int, directions: int, cin: int) -> list[str]:
        # A state's variance is about 1/10; both products should bring 1/2 to a gate.
        first = math.sqrt(0.5 / (cin * (0.1 if name != "lstm.0" else 0.5)))
        return [
            net.weight(f"{name}.W", (directions, gates * width, cin), first),
            net.weight(f"{name}.R", (directions, gates * width, width), math.sqrt(4 / width)),
            net.weight(f"{name}.B", (directions, 2 * gates * width), 0.1),
        ]

    features = net.input("features", ["batch", 24, "steps"])
    x = net("Relu", conv(net, features, "conv", 24, width, 3, gain=LINEAR, rank=1))
    x = net("Transpose", x, perm=[2, 0, 1])
    for i, cin in enumerate((width, 2 * width)):
        states: list[str] = []
        if i == 0:
            shape = net.dims(2, net.dim(x, 1), width)
            zeros = net("ConstantOfShape", shape, value=to_tensor("value", np.zeros(1, np.float32)))
            states = ["", zeros, zeros]
        inputs = [x, *weights(f"lstm.{i}", 4, 2, cin), *states]
        x = net.many("LSTM", 3, *inputs, hidden_size=width, direction="bidirectional")[0]
        x = net.reshape(net("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, -1)
    inputs = [x, *weights("gru", 3, 1, 2 * width)]
    x = net.many("GRU", 2, *inputs, hidden_size=width, linear_before_reset=1)[0]
    x = net("Transpose", net("Squeeze", x, [1]), perm=[1, 0, 2])
    net.output(linear(net, x, "head", width, 16, gain=8.0), "scores", ["batch", "steps", 16])
    return net.finish()
