"""Image classifiers: residual, dense, inverted residual, shuffled, grouped, plain."""

from __future__ import annotations

import numpy as np
import onnx

from onnxcompress.models_zoo.building import SEED, Net
from onnxcompress.models_zoo.families_layers import (
    LINEAR,
    RELU,
    SILU,
    batch_norm,
    classifier,
    clip6,
    conv,
    conv_relu,
    gemm,
    image_shape,
)

__all__ = [
    "densenet",
    "grouped",
    "mobilenet_v2",
    "mobilenet_v3",
    "resnet",
    "resnet_bn",
    "shared_biases",
    "shufflenet_v2",
    "vgg",
]


def resnet(width: int = 16, *, depth: int = 2, seed: int = SEED) -> onnx.ModelProto:
    """Three stages of ``depth`` basic blocks; batch normalization is in the convolutions' biases."""
    return _resnet(Net("resnet", width, seed, depth), width, depth, folded=True)


def resnet_bn(width: int = 16, *, depth: int = 2, seed: int = SEED) -> onnx.ModelProto:
    """The same with BatchNormalization nodes behind convolutions without bias."""
    return _resnet(Net("resnet_bn", width, seed, depth), width, depth, folded=False)


def _resnet(net: Net, width: int, depth: int, *, folded: bool) -> onnx.ModelProto:
    def unit(x: str, name: str, cin: int, cout: int, kernel: int, stride: int = 1, gain: float = RELU) -> str:
        y = conv(net, x, f"conv{name}", cin, cout, kernel, stride=stride, gain=gain, bias=folded)
        return y if folded else batch_norm(net, y, f"bn{name}", cout)

    x = net("Relu", unit(net.input("image", image_shape()), "1", 3, width, 3, 2))
    cin = width
    for stage in range(3):
        cout = width << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            with net.scope(f"layer{stage + 1}.{block}"):
                y = net("Relu", unit(x, "1", cin, cout, 3, stride))
                y = unit(y, "2", cout, cout, 3, gain=RELU / 4)
                if stride > 1 or cin != cout:
                    with net.scope("downsample"):
                        x = unit(x, "", cin, cout, 1, stride, gain=LINEAR)
                x = net("Relu", net("Add", y, x))
            cin = cout
    classifier(net, x, cin)
    return net.finish()


def densenet(width: int = 16, *, depth: int = 3, seed: int = SEED) -> onnx.ModelProto:
    """Two dense blocks of ``depth`` layers that each add ``width`` channels.

    The normalization in front of each layer's first convolution follows a Concat, so no exporter
    can fold it; the one behind it is folded.
    """
    net = Net("densenet", width, seed, depth)
    channels = 2 * width
    x = conv_relu(net, net.input("image", image_shape()), "conv0", 3, channels, 3, stride=2)
    for block in (1, 2):
        features = [x]
        for layer in range(depth):
            with net.scope(f"denseblock{block}.denselayer{layer + 1}"):
                y = net("Concat", *features, axis=1)
                y = net("Relu", batch_norm(net, y, "norm1", channels))
                y = conv_relu(net, y, "conv1", channels, 4 * width)
                features.append(conv(net, y, "conv2", 4 * width, width, 3, bias=False))
            channels += width
        x = net("Concat", *features, axis=1)
        if block == 1:
            with net.scope("transition1"):
                x = net("Relu", batch_norm(net, x, "norm", channels))
                x = conv(net, x, "conv", channels, channels // 2, bias=False)
                x = net("AveragePool", x, ceil_mode=0, kernel_shape=[2, 2], strides=[2, 2])
            channels //= 2
    x = net("Relu", batch_norm(net, x, "norm5", channels))
    classifier(net, x, channels)
    return net.finish()


def mobilenet_v2(width: int = 16, *, side: int = 64, seed: int = SEED) -> onnx.ModelProto:
    """Inverted residuals with Clip(0, 6); pictures of ``side`` pixels."""
    net = Net("mobilenet_v2", width, seed)
    x = clip6(net, conv(net, net.input("image", image_shape(side)), "features.0", 3, 2 * width, 3, stride=2))
    cin = 2 * width
    # Expansion, channels, stride.
    table = ((1, width, 1), (6, 2 * width, 2), (6, 2 * width, 1), (6, 4 * width, 2), (6, 4 * width, 1))
    for i, (expansion, cout, stride) in enumerate(table, 1):
        inner, y = expansion * cin, x
        with net.scope(f"features.{i}"):
            if expansion > 1:
                y = clip6(net, conv(net, y, "expand", cin, inner, gain=LINEAR))
            y = clip6(net, conv(net, y, "depthwise", inner, inner, 3, stride=stride, group=inner))
            y = conv(net, y, "project", inner, cout)
            x = net("Add", x, y) if cin == cout and stride == 1 else y
        cin = cout
    x = clip6(net, conv(net, x, "features.last", cin, 8 * width, gain=LINEAR))
    classifier(net, x, 8 * width)
    return net.finish()


def mobilenet_v3(width: int = 16, *, seed: int = SEED) -> onnx.ModelProto:
    """Inverted residuals with squeeze-and-excite, Relu in the early ones and HardSwish in the late."""
    net = Net("mobilenet_v3", width, seed)

    def act(x: str, name: str) -> str:
        return net(name, x)

    def excite(x: str, channels: int) -> str:
        with net.scope("se"):
            inner = max(8, channels // 4 // 8 * 8)
            s = net("Relu", conv(net, net("GlobalAveragePool", x), "fc1", channels, inner, gain=4 * RELU))
            s = conv(net, s, "fc2", inner, channels, gain=4 * RELU)
            return net("Mul", net("HardSigmoid", s, alpha=1 / 6), x)

    x = act(conv(net, net.input("image", image_shape()), "features.0", 3, width, 3, stride=2), "HardSwish")
    cin = width
    # Kernel, hidden channels, channels, squeeze-and-excite, activation, stride.
    table = (
        (3, width, width, True, "Relu", 1),
        (3, 4 * width, 3 * width // 2, False, "Relu", 2),
        (3, 5 * width, 3 * width // 2, False, "Relu", 1),
        (5, 6 * width, 5 * width // 2, True, "HardSwish", 2),
        (5, 12 * width, 5 * width // 2, True, "HardSwish", 1),
    )
    for i, (kernel, inner, cout, squeezed, name, stride) in enumerate(table, 1):
        gain, y = RELU if name == "Relu" else SILU, x
        with net.scope(f"features.{i}"):
            if inner != cin:
                y = act(conv(net, y, "expand", cin, inner, gain=LINEAR), name)
            y = act(conv(net, y, "depthwise", inner, inner, kernel, stride=stride, group=inner, gain=gain), name)
            if squeezed:
                y, gain = excite(y, inner), 4 * gain  # the gates are 1/2 on average
            y = conv(net, y, "project", inner, cout, gain=gain)
            x = net("Add", x, y) if cin == cout and stride == 1 else y
        cin = cout
    x = act(conv(net, x, "features.last", cin, 6 * cin, gain=LINEAR), "HardSwish")
    x = net("Flatten", net("GlobalAveragePool", x), axis=1)
    x = act(gemm(net, x, "classifier.0", 6 * cin, 8 * width, gain=8.0), "HardSwish")
    net.output(gemm(net, x, "classifier.3", 8 * width, 10, gain=SILU), "scores", ["batch", 10])
    return net.finish()


def shufflenet_v2(width: int = 16, *, depth: int = 3, seed: int = SEED) -> onnx.ModelProto:
    """Two stages of ``depth`` units; halves are made by Split, or by two Slices in every other unit."""
    net = Net("shufflenet_v2", width, seed, depth)

    def branch(x: str, cin: int, channels: int, stride: int) -> str:
        with net.scope("branch2"):
            y = conv_relu(net, x, "0", cin, channels)
            y = conv(net, y, "3", channels, channels, 3, stride=stride, group=channels)
            return net("Relu", conv(net, y, "5", channels, channels, gain=LINEAR))

    def shuffle(x: str, channels: int) -> str:
        n, h, w = (net.dim(x, axis) for axis in (0, 2, 3))
        y = net("Transpose", net.reshape(x, n, 2, channels // 2, h, w), perm=[0, 2, 1, 3, 4])
        return net.reshape(y, n, channels, h, w)

    x = conv_relu(net, net.input("image", image_shape()), "conv1", 3, width, 3, stride=2)
    cin = width
    for stage in range(2):
        half = width << stage
        for unit in range(depth):
            with net.scope(f"stage{stage + 2}.{unit}"):
                if unit == 0:
                    with net.scope("branch1"):
                        kept = conv(net, x, "0", cin, cin, 3, stride=2, group=cin)
                        kept = net("Relu", conv(net, kept, "2", cin, half, gain=LINEAR))
                    y = branch(x, cin, half, 2)
                else:
                    if unit % 2:
                        kept, y = net.many("Split", 2, x, [half, half], axis=1)
                    else:
                        kept = net("Slice", x, [0], [half], [1], [1])
                        y = net("Slice", x, [half], [2 * half], [1], [1])
                    y = branch(y, half, half, 1)
                x = shuffle(net("Concat", kept, y, axis=1), 2 * half)
            cin = 2 * half
    x = conv_relu(net, x, "conv5", cin, 8 * width)
    classifier(net, x, 8 * width)
    return net.finish()


def grouped(width: int = 16, *, seed: int = SEED) -> onnx.ModelProto:
    """ResNeXt-like blocks; group normalization as Reshape, InstanceNormalization, Reshape, Mul, Add."""
    net, groups = Net("grouped", width, seed), 4

    def norm(x: str, name: str, channels: int) -> str:
        with net.scope(name):
            y = net.reshape(x, 0, groups, -1)
            ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
            y = net("Reshape", net("InstanceNormalization", y, ones, zeros, epsilon=1e-5), net("Shape", x))
            y = net("Mul", y, net.tensor("weight", 1 + net.random("weight", (channels, 1, 1), 0.2)))
            return net("Add", y, net.weight("bias", (channels, 1, 1), 0.2))

    x = conv(net, net.input("image", image_shape()), "conv1", 3, width, 3, stride=2, bias=False)
    x = net("Relu", norm(x, "norm1", width))
    cin, inner, cout = width, 2 * width, 4 * width
    for block in range(2):
        with net.scope(f"layer1.{block}"):
            y = net("Relu", norm(conv(net, x, "conv1", cin, inner, bias=False), "norm1", inner))
            y = conv(net, y, "conv2", inner, inner, 3, stride=2 - block, group=groups, bias=False)
            y = net("Relu", norm(y, "norm2", inner))
            y = norm(conv(net, y, "conv3", inner, cout, bias=False), "norm3", cout)
            if not block:
                with net.scope("downsample"):
                    x = norm(conv(net, x, "conv", cin, cout, stride=2, bias=False), "norm", cout)
            x = net("Relu", net("Add", y, x))
        cin = cout
    classifier(net, x, cout)
    return net.finish()


def vgg(width: int = 16, *, seed: int = SEED) -> onnx.ModelProto:
    """Three times conv and pool, then [N, C, 7, 7] flattened into a linear layer."""
    net = Net("vgg", width, seed)
    x, cin = net.input("image", image_shape(56)), 3
    for i in range(3):
        cout = width << i
        x = conv_relu(net, x, f"features.{3 * i}", cin, cout, 3)
        x = net("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=0)
        cin = cout
    x = net("Flatten", x, axis=1)
    x = net("Relu", gemm(net, x, "classifier.0", cin * 49, 8 * width, gain=LINEAR))
    net.output(gemm(net, x, "classifier.3", 8 * width, 10, gain=RELU), "scores", ["batch", 10])
    return net.finish()


def shared_biases(width: int = 16, *, seed: int = SEED) -> onnx.ModelProto:
    """Four convolutions that read one bias."""
    net = Net("shared_biases", width, seed)
    bias = net.weight("bias", (width,), 0.2)
    x, cin = net.input("image", image_shape()), 3
    for i in range(4):
        x = net("Relu", conv(net, x, f"conv{i}", cin, width, 3, stride=1 + i % 2, bias=bias))
        cin = width
    classifier(net, x, width)
    return net.finish()
