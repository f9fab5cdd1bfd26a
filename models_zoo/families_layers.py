"""Layers that several families use, with weights that keep activations near unit variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxcompress.models_zoo.building import Net, Operand

__all__ = [
    "LINEAR",
    "RELU",
    "SILU",
    "batch_norm",
    "classifier",
    "clip6",
    "conv",
    "conv_relu",
    "gelu",
    "gemm",
    "heads_of",
    "image_shape",
    "linear",
    "silu",
]

# What a layer multiplies the variance by, to make up for the activation in front of it:
# about E[x^2] / E[f(x)^2] of a standard normal x.
LINEAR, RELU, SILU = 1.0, 2.0, 2.5
_CENTRED = 1.2  # and for what centred weights take away: E[f(x)^2] / Var[f(x)], 1.1 to 1.5


def conv(
    net: Net,
    x: str,
    name: str,
    cin: int,
    cout: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    pad: int | None = None,
    group: int = 1,
    dilation: int = 1,
    gain: float = RELU,
    bias: bool | str = True,
    rank: int = 2,
) -> str:
    """Convolution; some filters are stronger than others, as in trained models.

    Args:
        pad: On both sides; keeps the size of an odd kernel when not given.
        gain: Of the variance; see ``RELU`` and others.
        bias: Whether to have one, or the name of an initializer that is one.
        rank: Spatial axes.
    """
    fan_in = cin // group * kernel**rank
    # Not where a filter sees few channels: without its mean it would see edges only.
    centre = tuple(range(1, rank + 2)) if cin // group >= 4 and gain > LINEAR else ()
    std = math.sqrt(gain / fan_in * (_CENTRED if centre else 1))
    weight = net.random(f"{name}.weight", (cout, cin // group, *[kernel] * rank), std, centre=centre)
    spread = 1 + net.random(f"{name}.spread", (cout,), 0.3)
    inputs = [x, net.tensor(f"{name}.weight", weight * spread.reshape(-1, *[1] * (rank + 1)))]
    if bias:
        inputs.append(bias if isinstance(bias, str) else net.weight(f"{name}.bias", (cout,), 0.1))
    pad = dilation * (kernel // 2) if pad is None else pad
    with net.scope(name):
        return net(
            "Conv",
            *inputs,
            dilations=[dilation] * rank,
            group=group,
            kernel_shape=[kernel] * rank,
            pads=[pad] * (2 * rank),
            strides=[stride] * rank,
        )


def conv_relu(net: Net, x: str, name: str, cin: int, cout: int, kernel: int = 1, *, stride: int = 1) -> str:
    return net("Relu", conv(net, x, name, cin, cout, kernel, stride=stride))


def batch_norm(net: Net, x: str, name: str, channels: int) -> str:
    """Batch normalization that shifts and scales every channel differently."""
    values = {
        "weight": 1 + net.random(f"{name}.weight", (channels,), 0.2),
        "bias": net.random(f"{name}.bias", (channels,), 0.2),
        "running_mean": net.random(f"{name}.running_mean", (channels,), 0.2),
        "running_var": (1 + net.random(f"{name}.running_var", (channels,), 0.15)) ** 2,
    }
    names = [net.tensor(f"{name}.{part}", value.astype(np.float32)) for part, value in values.items()]
    with net.scope(name):
        return net("BatchNormalization", x, *names, epsilon=1e-5, momentum=0.9)


def silu(net: Net, x: str) -> str:
    return net("Mul", x, net("Sigmoid", x))


def clip6(net: Net, x: str) -> str:
    return net("Clip", x, 0.0, 6.0)


def gelu(net: Net, x: str) -> str:
    """The exact one, in the five operators it takes before opset 20."""
    erf = net("Erf", net("Div", x, math.sqrt(2)))
    return net("Mul", net("Mul", x, net("Add", erf, 1.0)), 0.5)


def linear(net: Net, x: str, name: str, cin: int, cout: int, *, gain: float = LINEAR, bias: bool = True) -> str:
    """``nn.Linear`` on three axes: MatMul with a transposed weight, then the bias in front."""
    spread = 1 + net.random(f"{name}.spread", (cout,), 0.3)
    weight = net.random(f"{name}.weight", (cin, cout), math.sqrt(gain / cin)) * spread
    with net.scope(name):
        y: Operand = net("MatMul", x, net.tensor("weight", weight))
        return net("Add", net.weight("bias", (cout,), 0.1), y) if bias else str(y)


def gemm(net: Net, x: str, name: str, cin: int, cout: int, *, gain: float = LINEAR) -> str:
    """``nn.Linear`` on two axes."""
    values = net.random(f"{name}.weight", (cout, cin), math.sqrt(gain / cin), centre=(1,))
    with net.scope(name):
        weight = net.tensor("weight", values)
        return net("Gemm", x, weight, net.weight("bias", (cout,), 0.1), alpha=1.0, beta=1.0, transB=1)


def classifier(net: Net, x: str, channels: int, classes: int = 10, *, gain: float = 8.0) -> None:
    """Mean over the picture, one linear layer, output ``scores``."""
    pooled = net("Flatten", net("GlobalAveragePool", x), axis=1)
    net.output(gemm(net, pooled, "fc", channels, classes, gain=gain), "scores", ["batch", classes])


def heads_of(width: int) -> int:
    """Attention heads: 64 channels each in wide models, never fewer than 4, always even."""
    return width // 64 if width % 128 == 0 and width >= 256 else 4


def image_shape(side: int | None = None) -> Sequence[int | str]:
    return ["batch", 3, side or "height", side or "width"]
