"""Well-known networks as lists of work, to compare published latencies with what a profile predicts.

Only shapes matter to a price, so no weights and no graph are made: a layer appends the
:class:`~onnxcompress.work.NodeWork` that :func:`~onnxcompress.work.work_of` would count for it. Activations
that every runtime here runs inside their producer (Relu, Relu6, SiLU, BatchNormalization) are left out.

    >>> round(sum(w.macs for w in NETS["mobilenet_v1"]()) / 1e6)
    569
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnxcompress.work import NodeWork

__all__ = ["NETS", "Net"]

_Arm = list[tuple[int, int | tuple[int, int]]]
"""Convolutions one behind the other: width and kernel of each."""


class Net:
    """A network being built, one map (channels, height, width) flowing through it.

    Args:
        channels: of the input.
        height: of the input.
        width: of the input; the height if not given.
    """

    def __init__(self, channels: int, height: int, width: int | None = None) -> None:
        self.shape = (channels, height, height if width is None else width)
        self.nodes: list[NodeWork] = []

    def conv(
        self, out: int, kernel: int | tuple[int, int], stride: int = 1, *, groups: int = 1, valid: bool = False
    ) -> Net:
        """A convolution with bias; padded so that only the stride shrinks the map, unless ``valid``."""
        channels, height, width = self.shape
        taps = (kernel, kernel) if isinstance(kernel, int) else kernel
        less = (taps[0] - 1, taps[1] - 1) if valid else (0, 0)
        rows, columns = math.ceil((height - less[0]) / stride), math.ceil((width - less[1]) / stride)
        inner, pixels = channels // groups, rows * columns
        area = taps[0] * taps[1]
        depthwise = groups > 1 and inner == 1
        kind = (
            ("conv_depthwise" if depthwise else "conv_grouped") if groups > 1
            else "conv_stem" if inner <= 4 else "conv_pointwise" if area == 1 else "conv"
        )  # fmt: skip
        weights = out * inner * area + out
        self._append(
            NodeWork(
                f"conv{len(self.nodes)}", "Conv", kind, True, macs=pixels * inner * out * area,
                in_channels=1 if depthwise else inner, out_channels=out if depthwise else out // groups,
                elements_in=channels * height * width, elements_out=out * pixels, weights=weights, params=weights,
                patches=pixels * inner * area,
            ),
            (out, rows, columns),
        )  # fmt: skip
        return self

    def depthwise(self, kernel: int | tuple[int, int], stride: int = 1) -> Net:
        """One filter a channel."""
        return self.conv(self.shape[0], kernel, stride, groups=self.shape[0])

    def pool(self, kernel: int, stride: int, op: str = "MaxPool", *, valid: bool = False) -> Net:
        """Pooling; padded like a convolution."""
        channels, height, width = self.shape
        less = kernel - 1 if valid else 0
        rows, columns = math.ceil((height - less) / stride), math.ceil((width - less) / stride)
        self._elementwise(op, "pool", channels * height * width, (channels, rows, columns))
        return self

    def gap(self) -> Net:
        """Mean of every channel."""
        self._elementwise("GlobalAveragePool", "pool", math.prod(self.shape), (self.shape[0], 1, 1))
        return self

    def add(self) -> Net:
        """Sum with another map of the same shape."""
        self._elementwise("Add", "elementwise", 2 * math.prod(self.shape), self.shape)
        return self

    def concat(self, channels: int) -> Net:
        """Everything so far side by side, ``channels`` in all."""
        shape = (channels, *self.shape[1:])
        self._elementwise("Concat", "move", math.prod(shape), shape)
        return self

    def dense(self, out: int, rows: int = 1) -> Net:
        """A matrix product with bias."""
        inner = math.prod(self.shape) // rows
        weights = inner * out + out
        self._append(
            NodeWork(
                f"gemm{len(self.nodes)}", "Gemm", "matmul_rows1" if rows <= 4 else "matmul", False,
                macs=rows * inner * out, in_channels=inner, out_channels=out, elements_in=rows * inner,
                elements_out=rows * out, weights=weights, params=weights, patches=rows * inner,
            ),
            (out, rows, 1),
        )  # fmt: skip
        return self

    def branch(self) -> Net:
        """A net that starts from the map reached so far and adds its nodes to the same list."""
        other = Net(*self.shape)
        other.nodes = self.nodes
        return other

    def _elementwise(self, op: str, kind: str, read: int, shape: tuple[int, int, int]) -> None:
        channels = self.shape[0] if kind == "pool" else 0
        work = NodeWork(
            f"{op}{len(self.nodes)}", op, kind, True, in_channels=channels, out_channels=channels, elements_in=read,
            elements_out=math.prod(shape),
        )  # fmt: skip
        self._append(work, shape)

    def _append(self, work: NodeWork, shape: tuple[int, int, int]) -> None:
        self.nodes.append(work)
        self.shape = shape


def _autoencoder() -> list[NodeWork]:
    net = Net(640, 1)
    for width in (128, 128, 128, 128, 8, 128, 128, 128, 128, 640):
        net.dense(width)
    return net.nodes


def _resnet8() -> list[NodeWork]:
    net = Net(3, 32).conv(16, 3)
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        if stride > 1:
            net.branch().conv(width, 1, stride)
        net.conv(width, 3, stride).conv(width, 3).add()
    return net.gap().dense(10).nodes


def _ds_cnn() -> list[NodeWork]:
    net = Net(1, 49, 10).conv(64, (10, 4), 2)
    for _ in range(4):
        net.depthwise(3).conv(64, 1)
    return net.gap().dense(12).nodes


def _mobilenet_v1(alpha: float = 1.0, size: int = 224, classes: int = 1001) -> list[NodeWork]:
    net = Net(3, size).conv(int(32 * alpha), 3, 2)
    for width, stride in (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ):
        net.depthwise(3, stride).conv(int(width * alpha), 1)
    return net.gap().dense(classes).nodes


def _rounded(width: float) -> int:
    """To a multiple of 8, and never down by more than a tenth, as MobileNetV2 does (MCUNet: the head, too)."""
    whole = max(8, int(width + 4) // 8 * 8)
    return whole + 8 if whole < 0.9 * width else whole


def _mobilenet_v2(alpha: float = 1.0, size: int = 224, classes: int = 1000) -> list[NodeWork]:
    net = Net(3, size).conv(_rounded(32 * alpha), 3, 2)
    for expand, width, repeat, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for index in range(repeat):
            before = net.shape
            if expand > 1:
                net.conv(before[0] * expand, 1)
            net.depthwise(3, stride if index == 0 else 1).conv(_rounded(width * alpha), 1)
            if net.shape == before:
                net.add()
    return net.conv(_rounded(1280 * alpha), 1).gap().dense(classes).nodes


def _resnet(depths: tuple[int, ...], *, bottleneck: bool, size: int = 224, groups: int = 1, width: int = 64) -> Net:
    net = Net(3, size).conv(64, 7, 2).pool(3, 2)
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        out = 256 * 2**stage if bottleneck else planes
        for block in range(depth):
            stride = 2 if stage and not block else 1
            if net.shape[0] != out or stride > 1:
                net.branch().conv(out, 1, stride)
            if bottleneck:
                net.conv(planes, 1).conv(planes, 3, stride, groups=groups).conv(out, 1)
            else:
                net.conv(out, 3, stride).conv(out, 3)
            net.add()
    return net


def _inception(net: Net, *branches: _Arm, pooled: int = 0) -> None:
    """Branches of convolutions (width, kernel) side by side, and one that pools first."""
    total = 0
    shape = net.shape
    for branch in branches:
        arm = net.branch()
        for width, kernel in branch:
            arm.conv(width, kernel)
        total += arm.shape[0]
    if pooled:
        net.branch().pool(3, 1).conv(pooled, 1)
        total += pooled
    net.shape = shape
    net.concat(total)


def _googlenet() -> list[NodeWork]:
    net = Net(3, 224).conv(64, 7, 2).pool(3, 2).conv(64, 1).conv(192, 3).pool(3, 2)
    for block in (
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None, (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128), None, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    ):  # fmt: skip
        if block is None:
            net.pool(3, 2)
            continue
        one, three_in, three, five_in, five, pooled = block
        _inception(net, [(one, 1)], [(three_in, 1), (three, 3)], [(five_in, 1), (five, 3)], pooled=pooled)
    return net.gap().dense(1000).nodes


def _inception_v3(size: int = 299) -> list[NodeWork]:
    net = Net(3, size).conv(32, 3, 2, valid=True).conv(32, 3, valid=True).conv(64, 3).pool(3, 2, valid=True)
    net.conv(80, 1).conv(192, 3, valid=True).pool(3, 2, valid=True)
    for pooled in (32, 64, 64):
        _inception(net, [(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], pooled=pooled)
    _reduction(net, [(384, 3)], [(64, 1), (96, 3), (96, 3)])
    for width in (128, 160, 160, 192):
        seven: _Arm = [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
        _inception(net, [(192, 1)], [(width, 1), (width, (1, 7)), (192, (7, 1))], seven, pooled=192)
    _reduction(net, [(192, 1), (320, 3)], [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)])
    for _ in range(2):
        _wide(net)
    return net.gap().dense(1000).nodes


def _reduction(net: Net, *branches: _Arm) -> None:
    """Branches whose last convolution halves the map, and a pooling beside them."""
    arms = []
    for branch in branches:
        arm = net.branch()
        for width, kernel in branch[:-1]:
            arm.conv(width, kernel)
        arms.append(arm.conv(*branch[-1], 2, valid=True))
    pooled = net.branch().pool(3, 2, valid=True)
    net.shape = pooled.shape
    net.concat(sum(a.shape[0] for a in arms) + pooled.shape[0])


def _wide(net: Net) -> None:
    """The last blocks of Inception: a 1x3 and a 3x1 side by side, twice."""
    net.branch().conv(320, 1)
    net.branch().pool(3, 1).conv(192, 1)
    for arm in (net.branch().conv(384, 1), net.branch().conv(448, 1).conv(384, 3)):
        arm.branch().conv(384, (1, 3))
        arm.branch().conv(384, (3, 1))
    net.concat(2048)


def _inception_v4(size: int = 299) -> list[NodeWork]:
    net = Net(3, size).conv(32, 3, 2, valid=True).conv(32, 3, valid=True).conv(64, 3)
    net.branch().pool(3, 2, valid=True)
    net.conv(96, 3, 2, valid=True).concat(160)
    net.branch().conv(64, 1).conv(96, 3, valid=True)
    net.conv(64, 1).conv(64, (7, 1)).conv(64, (1, 7)).conv(96, 3, valid=True).concat(192)
    net.branch().pool(3, 2, valid=True)
    net.conv(192, 3, 2, valid=True).concat(384)
    for _ in range(4):
        _inception(net, [(96, 1)], [(64, 1), (96, 3)], [(64, 1), (96, 3), (96, 3)], pooled=96)
    _reduction(net, [(384, 3)], [(192, 1), (224, 3), (256, 3)])
    for _ in range(7):
        seven: _Arm = [(192, 1), (192, (7, 1)), (224, (1, 7)), (224, (7, 1)), (256, (1, 7))]
        _inception(net, [(384, 1)], [(192, 1), (224, (1, 7)), (256, (7, 1))], seven, pooled=128)
    _reduction(net, [(192, 1), (192, 3)], [(256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3)])
    for _ in range(3):
        net.branch().conv(256, 1)
        arm = net.branch().conv(384, 1)
        arm.branch().conv(256, (1, 3))
        arm.branch().conv(256, (3, 1))
        arm = net.branch().conv(384, 1).conv(448, (3, 1)).conv(512, (1, 3))
        arm.branch().conv(256, (1, 3))
        arm.branch().conv(256, (3, 1))
        net.branch().pool(3, 1).conv(256, 1)
        net.concat(1536)
    return net.gap().dense(1001).nodes


def _squeezenet() -> list[NodeWork]:
    net = Net(3, 224).conv(64, 3, 2, valid=True).pool(3, 2)
    for index, (squeeze, expand) in enumerate(
        ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
    ):
        if index in (2, 4):
            net.pool(3, 2, valid=True)
        net.conv(squeeze, 1)
        net.branch().conv(expand, 1)
        net.conv(expand, 3).concat(2 * expand)
    return net.conv(1000, 1).gap().nodes


def _bert_large(tokens: int = 384) -> list[NodeWork]:
    nodes: list[NodeWork] = []
    hidden, heads = 1024, 16
    for _ in range(24):
        for inner, out in ((hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)):
            nodes += Net(inner, tokens, 1).dense(out, rows=tokens).nodes
        for _ in range(2):  # queries by keys, then scores by values
            macs = tokens * tokens * hidden
            elements = tokens * hidden * 2 + heads * tokens * tokens
            nodes.append(NodeWork("scores", "MatMul", "matmul_dynamic", True, macs=macs, elements_in=elements))
        scores = heads * tokens * tokens
        nodes.append(NodeWork("softmax", "Softmax", "softmax", True, elements_in=scores, elements_out=scores))
        for _ in range(2):
            size = tokens * hidden
            nodes.append(NodeWork("norm", "LayerNormalization", "normalization", False, 0, 0, 0, 2 * size, size))
    return nodes


def _retinanet(size: int = 800) -> list[NodeWork]:
    """ResNeXt-50 32x4d, feature pyramid, heads for 264 classes: the detector of MLPerf Inference."""
    net = _resnet((3, 4, 6, 3), bottleneck=True, size=size, groups=32, width=128)
    levels = []
    for channels, scale in ((512, 8), (1024, 16), (2048, 32)):
        level = Net(channels, size // scale)
        level.nodes = net.nodes
        level.conv(256, 1).add().conv(256, 3)
        levels.append(level)
    six = net.branch().conv(256, 3, 2)
    levels += [six, six.branch().conv(256, 3, 2)]
    for level in levels:
        for out in (9 * 264, 9 * 4):
            head = level.branch()
            for _ in range(4):
                head.conv(256, 3)
            head.conv(out, 3)
    return net.nodes


NETS: dict[str, Callable[[], list[NodeWork]]] = {
    "mlperf_tiny_ad": _autoencoder,
    "mlperf_tiny_ic": _resnet8,
    "mlperf_tiny_kws": _ds_cnn,
    "mlperf_tiny_vww": lambda: _mobilenet_v1(0.25, 96, 2),
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v2_w0.3_r64": lambda: _mobilenet_v2(0.3, 64),
    "resnet18": lambda: _resnet((2, 2, 2, 2), bottleneck=False).gap().dense(1000).nodes,
    "resnet50": lambda: _resnet((3, 4, 6, 3), bottleneck=True).gap().dense(1000).nodes,
    "resnet50_299": lambda: _resnet((3, 4, 6, 3), bottleneck=True, size=299).gap().dense(1001).nodes,
    "inception_v1": _googlenet,
    "inception_v3_224": lambda: _inception_v3(224),
    "inception_v4": _inception_v4,
    "squeezenet1_1": _squeezenet,
    "bert_large_384": _bert_large,
    "retinanet_800": _retinanet,
}
"""Networks by name. Sizes are of the published measurements, not always of the papers."""
