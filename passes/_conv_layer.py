"""A Conv as the low-rank forms see it: its geometry axis by axis, and what calibration saw of its windows.

    y = W x + b      W (outputs, features), one for each group; features are channels x taps, as stored

A chain of convolutions does the work of one where each axis of the kernel keeps its strides, dilations and pads in
exactly one link: zeros around x stay zeros behind a link without a bias.

**What is seen.** S = E[x x'] of whole windows where these have few features; else of channels, A, and windows then
count as A (x) I: taps that know nothing of one another. Where a form mixes some axes of a window and leaves the rest
apart, S is split into the Kronecker product of two metrics, A over the former and B over the latter:

    A = mean over the rest of S,     B_jj' = <S_jj', A> / <A, A>      the B of least |S - A (x) B|_F for this A

(one step of Van Loan and Pitsianis 1993). Both are positive semidefinite, as sums of blocks of S with such weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.errors import PassError
from onnxcompress.passes._forms import Settings
from onnxcompress.passes._low_rank import metric
from onnxcompress.passes._ridge import trusted_ridge
from onnxcompress.sketch import Drawn, Slot
from onnxcompress.statistics import Evidence, Need, Patches, SecondMoments, Statistic
from onnxcompress.view import GraphView

__all__ = ["ConvLayer", "Seen", "conv_layer"]

Array = npt.NDArray[np.float64]

_MOST_FEATURES = 2304
"""Windows with more channels x taps are not observed as such: their second moments would take too much memory."""
_MOST_CHANNELS = 4096


@dataclass(frozen=True, eq=False)
class Seen:
    """What one group of a Conv reads.

    Attributes:
        shape: (channels, *kernel) of a window.
        matrix: second moments of windows or of channels, about the mean where ``mean`` is there; None where nothing
            is known.
        mean: of the features, (features,); None where no bias makes up for it.
        ridge: see :class:`Settings`.
    """

    shape: tuple[int, ...]
    matrix: Array | None
    mean: Array | None
    ridge: float

    @property
    def windowed(self) -> bool:
        """Whether whole windows were seen, of more than one tap."""
        return self.matrix is not None and len(self.matrix) > self.shape[0]

    def windows(self) -> Array:
        """Second moments of all features, regularized, (features, features)."""
        return self.split(len(self.shape))[0]

    def split(self, mixed: int) -> tuple[Array, Array]:
        """Metrics A over the first so many axes and B over the others, whose product is near S; both regularized."""
        inner, outer = math.prod(self.shape[:mixed]), math.prod(self.shape[mixed:])
        if self.matrix is None:
            return np.eye(inner), np.eye(outer)
        if not self.windowed:
            channels = metric(self.matrix, self.shape[0], self.ridge)
            return np.asarray(np.kron(channels, np.eye(inner // self.shape[0]))), np.eye(outer)
        if outer == 1:
            return metric(self.matrix, inner, self.ridge), np.eye(1)
        blocks = self.matrix.reshape(inner, outer, inner, outer)
        first = np.einsum("ajbj->ab", blocks) / outer
        size = float(np.vdot(first, first))
        second = np.einsum("ajbk,ab->jk", blocks, first, optimize=True) / (size if size > 0 else 1.0)
        return metric(first, inner, self.ridge), metric(second, outer, self.ridge)

    def placed(self, first: Array, windows: Array) -> tuple[Array, Array]:
        """E[z x'] and E[z z'] of z = Z x, for a Z that is V at each place of the axes it does not mix.

        Args:
            first: V, (rank, features of the first axes).
            windows: S.

        Returns:
            (rank x outer, features) and (rank x outer, rank x outer).
        """
        rank, inner = first.shape
        outer = len(windows) // inner
        seen = (first @ windows.reshape(inner, -1)).reshape(rank * outer, inner, outer)
        square = (seen.swapaxes(1, 2).reshape(-1, inner) @ first.T).reshape(rank * outer, outer, rank).swapaxes(1, 2)
        return seen.reshape(rank * outer, -1), square.reshape(rank * outer, -1)

    def outputs(self, weight: Array) -> Array:
        """E[y y'] of a weight (outputs, channels, *kernel), with the regularized metric, (outputs, outputs)."""
        rows = weight.reshape(len(weight), -1)
        if self.windowed:
            return np.asarray(rows @ self.windows() @ rows.T)
        if self.matrix is None:
            return np.asarray(rows @ rows.T)
        by_tap = self._by_tap(weight)
        weighed = by_tap @ metric(self.matrix, self.shape[0], self.ridge)
        return np.asarray(weighed.reshape(len(weight), -1) @ by_tap.reshape(len(weight), -1).T)

    def energy(self, weight: Array) -> float:
        """E|y|^2 of a weight (outputs, channels, *kernel), as seen."""
        if self.matrix is None:
            return float(np.vdot(weight, weight))
        rows = weight.reshape(len(weight), -1)
        if not self.windowed:
            rows = self._by_tap(weight)
        return max(float(np.vdot(rows @ self.matrix, rows)), 0.0)

    def _by_tap(self, weight: Array) -> Array:
        """(outputs x taps, channels) of a weight (outputs, channels, *kernel)."""
        return weight.reshape(*weight.shape[:2], -1).swapaxes(1, 2).reshape(-1, self.shape[0])


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """One Conv with a constant weight.

    Attributes:
        name: of the node.
        read: name of the value it reads.
        made: name of the value it makes.
        tensor: its weight, [O, C/g, *kernel].
        bias: its bias where that is a constant; the name of a value where not; None for none.
        groups: of channels.
        window: kernel, strides, dilations, pads.
        need: what to observe of what it reads; None where that cannot be observed.
    """

    name: str
    read: str
    made: str
    tensor: ir.TensorProtocol
    bias: ir.TensorProtocol | str | None
    groups: int
    window: Patches
    need: Need | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(int(d) for d in self.tensor.shape.numpy())

    @property
    def outputs(self) -> int:
        """Outputs of one group."""
        return self.shape[0] // self.groups

    @property
    def channels(self) -> int:
        """Channels one group reads."""
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps along each axis."""
        return self.window.kernel

    @property
    def taps(self) -> int:
        """Of a window."""
        return math.prod(self.kernel)

    @property
    def axes(self) -> tuple[int, ...]:
        """Its spatial axes, from 0."""
        return tuple(range(len(self.kernel)))

    @property
    def bias_is_free(self) -> bool:
        """Whether a mean can be corrected: the bias is no value that is worked out at run time."""
        return not isinstance(self.bias, str)

    @property
    def old_weights(self) -> int:
        """Weights of the node, its constant bias included."""
        bias = 0 if self.bias is None or isinstance(self.bias, str) else self.shape[0]
        return math.prod(self.shape) + bias

    def last_bias(self) -> Slot | str | None:
        """What the last link of a chain reads as its bias."""
        if isinstance(self.bias, str):
            return self.bias
        return Slot((self.shape[0],), "bias") if self.bias is not None or self.need is not None else None

    def link(
        self, weight: Slot, read: str, made: str, axes: Sequence[int], groups: int, bias: Slot | str | None = None
    ) -> Drawn:
        """A convolution that has the strides, dilations and pads of some axes, and steps of one along the others."""
        part = self.window

        def along(given: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
            return tuple(n if axis in axes else otherwise for axis, n in enumerate(given))

        attributes: tuple[tuple[str, int | tuple[int, ...]], ...] = (
            ("dilations", along(part.dilations, 1)),
            ("group", groups),
            ("kernel_shape", weight.shape[2:]),
            ("pads", (*along(part.pads_begin, 0), *along(part.pads_end, 0))),
            ("strides", along(part.strides, 1)),
        )
        return Drawn("Conv", (read, weight) if bias is None else (read, weight, bias), (made,), attributes)

    def weight(self) -> Array:
        """The weight by groups, (groups, outputs, channels, *kernel).

        Raises:
            PassError: it is not finite.
        """
        found = np.asarray(self.tensor.numpy(), np.float64)
        if not np.isfinite(found).all():
            raise PassError(
                f"a weight of node {self.name!r} is NaN or infinite", hint="repair the model: it has no factors"
            )
        return found.reshape(self.groups, self.outputs, *self.shape[1:])

    def moments(self, evidence: Evidence, settings: Settings) -> SecondMoments | None:
        """What was observed of what it reads; None where it was not, or is not asked for."""
        if not settings.aware or self.need is None or evidence.synthetic or not evidence.has(self.need):
            return None
        found = evidence.second_moments(self.need)
        width = self.channels * (self.taps if self.need.patches is not None else 1)
        return found if len(found.mean) == self.groups * width else None

    def seen(self, found: SecondMoments | None, settings: Settings) -> tuple[Seen, ...]:
        """What each group reads."""
        shape = (self.channels, *self.kernel)
        if found is None:
            return (Seen(shape, None, None, settings.ridge),) * self.groups
        width, groups = len(found.mean) // self.groups, []
        ridge = self._ridge(found, settings, width)
        for start in range(0, len(found.mean), width):
            own = slice(start, start + width)
            matrix, mean = found.matrix[own, own], found.mean[own]
            if not self.bias_is_free:
                groups.append(Seen(shape, matrix, None, ridge))
                continue
            # where only channels were seen, zeros around x are not known of: all taps have the same mean
            whole = mean if width > self.channels else np.repeat(mean, self.taps)
            groups.append(Seen(shape, matrix - np.outer(mean, mean), whole, ridge))
        return tuple(groups)

    def _ridge(self, found: SecondMoments, settings: Settings, width: int) -> float:
        """As asked for, or more where few rows were seen; that of one group serves all."""
        weight, own = self.weight()[0].reshape(self.outputs, self.channels, self.taps), slice(0, width)
        rows = weight.reshape(self.outputs, -1)
        if width < rows.shape[1]:
            rows = weight.swapaxes(1, 2).reshape(-1, width)
        if self.groups > 1:
            found = found.part(own)
        return trusted_ridge(rows, found, settings.ridge, centred=self.bias_is_free, layer=self.name)


def conv_layer(node: ir.Node, view: GraphView) -> ConvLayer:
    """What a Conv is.

    Raises:
        Skip: it has no constant float32 weight, or pads that depend on the size of what it reads.
    """
    value = node.inputs[1] if len(node.inputs) > 1 else None
    tensor, read, made = view.weight(value), node.inputs[0], node.outputs[0]
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        raise Skip("its weight is no float32 constant")
    if read is None or not read.name or not made.name:
        raise Skip("what it reads or makes has no name")
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if not 3 <= len(shape) <= 5 or 0 in shape:
        raise Skip(f"a weight of shape {shape} is of no convolution in one to three dimensions")
    groups = node.attributes.get_int("group", 1)
    window = _window(node, shape[2:], view)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    constant = view.weight(bias)
    need = None
    if not read.is_initializer() and not view.in_subgraph(node):
        need = _need(str(read.name), groups * shape[1], window)
    return ConvLayer(
        str(node.name), str(read.name), str(made.name), tensor,
        constant if constant is not None or bias is None else str(bias.name), groups, window, need,
    )  # fmt: skip


def _need(read: str, channels: int, window: Patches) -> Need | None:
    taps, pads = math.prod(window.kernel), (*window.pads_begin, *window.pads_end)
    plain = math.prod((taps, *window.strides)) == 1 and not any(pads)
    if not plain and channels * taps <= _MOST_FEATURES:
        return Need(read, Statistic.GRAM, patches=window)
    return Need(read, Statistic.GRAM, axis=1) if channels <= _MOST_CHANNELS else None


def _window(node: ir.Node, kernel: tuple[int, ...], view: GraphView) -> Patches:
    """Its windows, with pads as numbers."""
    ones, padding = (1,) * len(kernel), node.attributes.get_string("auto_pad", "NOTSET")
    strides = tuple(node.attributes.get_ints("strides", ones))
    dilations = tuple(node.attributes.get_ints("dilations", ones))
    pads = tuple(node.attributes.get_ints("pads", (0,) * (2 * len(kernel)))) if padding == "NOTSET" else ()
    if padding in ("SAME_UPPER", "SAME_LOWER"):
        shape = view.shape(node.inputs[0])
        sizes = shape[2:] if shape is not None and len(shape) == len(kernel) + 2 else (None,) * len(kernel)
        sums = [_same(*each) for each in zip(sizes, kernel, strides, dilations, strict=True)]
        less, more = tuple(n // 2 for n in sums), tuple(n - n // 2 for n in sums)
        pads = (*less, *more) if padding == "SAME_UPPER" else (*more, *less)
    pads = pads or (0,) * (2 * len(kernel))
    if any(n < 0 for n in pads):
        raise Skip("negative pads cut off a part of what it reads")
    return Patches(kernel, strides, dilations, pads[: len(kernel)], pads[len(kernel) :])


def _same(size: int | str | None, taps: int, stride: int, dilation: int) -> int:
    """Zeros at both ends together that make ceil(size / stride) windows."""
    span = (taps - 1) * dilation + 1
    if stride == 1:
        return span - 1
    if not isinstance(size, int):
        raise Skip("auto_pad SAME with strides: its pads depend on a size that is not known")
    return max(0, (-(-size // stride) - 1) * stride + span - size)
