"""Weights of Conv, Gemm, MatMul, LSTM and GRU as linear maps, and the moments of what they read.

    Conv        [O, C/g, *k]   g maps of (O/g, taps x C/g); features are windows, or channels where windows are many
    Gemm        [K, N], [N, K] one map of (N, K)
    MatMul      [..., K, N]    one map of (N, K) for each of the leading ones
    LSTM, GRU   [d, ., I]      d maps, all of the same input;   [d, ., H]   d maps of the hidden states

Within a window, channels run fastest, so neighbours in a row of a map are channels at one tap: what engines with
N:M kernels want.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.statistics import Evidence, Need, Patches, Statistic
from onnxcompress.view import GraphView

__all__ = ["MOST_FEATURES", "LinearMap", "Moments", "linear_map", "linear_maps", "windows_of"]

Array = npt.NDArray[np.float64]

_FEATURES = 2304
"""Features above which a convolution's windows are looked at channel by channel: the matrix grows with the square."""
MOST_FEATURES = 6144
"""Features above which there are no second moments between features at all: 300 MB of them."""


@dataclass(frozen=True)
class Moments:
    """Of what one map reads.

    Attributes:
        matrix: E[x x^T], shape (n, n).
        mean: shape (n,).
    """

    matrix: Array
    mean: Array


@dataclass(frozen=True)
class LinearMap:
    """One weight of a node.

    Attributes:
        index: the node's input that holds it.
        shape: its shape.
        split: shape of the weight seen as [groups, outputs, channels, taps], or with leading axes in another order.
        order: permutation of ``split`` to (groups, outputs, taps, channels).
        rows: axes of the permuted array, after the first, that count as outputs: 1, or 2 with taps apart.
        gram: second moments to ask for; None if there are none to be had.
        power: moments by channel to ask for; None if there are none.
        together: all groups read the same features.
    """

    index: int
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    rows: int = 1
    gram: Need | None = None
    power: Need | None = None
    together: bool = False

    @property
    def width(self) -> int:
        """Channels a row reads at one tap."""
        return self.permuted[-1]

    @property
    def inputs(self) -> int:
        """Values each output reads, taps included."""
        return self.permuted[2] * self.permuted[3]

    @property
    def outputs(self) -> int:
        """Outputs of all groups."""
        return self.permuted[0] * self.permuted[1]

    @property
    def permuted(self) -> tuple[int, ...]:
        """How many groups, outputs, taps and channels."""
        return tuple(self.split[i] for i in self.order)

    def maps(self, weight: npt.NDArray[np.float32]) -> Array:
        """The weight as (groups, rows, features)."""
        permuted = weight.astype(np.float64).reshape(self.split).transpose(self.order)
        groups, outputs, taps, channels = permuted.shape
        if self.rows == 1:
            return permuted.reshape(groups, outputs, taps * channels)
        return permuted.reshape(groups, outputs * taps, channels)

    @property
    def back(self) -> tuple[int, ...]:
        """Permutation of (groups, outputs, taps, channels) to the axes of ``split``."""
        return tuple(int(i) for i in np.argsort(self.order))

    def weight(self, maps: Array) -> npt.NDArray[np.float32]:
        """The weight of these maps, in its own shape."""
        permuted = maps.reshape(self.permuted).transpose(self.back)
        return np.ascontiguousarray(permuted.reshape(self.shape), np.float32)

    def moments(self, evidence: Evidence) -> tuple[Moments, ...] | None:
        """Second moments of what each group reads; None where they were not observed."""
        if self.gram is None or evidence.synthetic or not evidence.has(self.gram):
            return None
        found = evidence.second_moments(self.gram)
        groups, _, taps, channels = self.permuted
        n = channels * (taps if self.rows == 1 else 1)
        if self.together and found.mean.size == n:
            return (Moments(found.matrix, found.mean),) * groups
        if found.mean.size != groups * n:
            return None
        parts = []
        # evidence has channels x taps, maps have taps x channels
        index = np.arange(n).reshape(channels, -1).T.reshape(-1)
        for group in range(groups):
            chosen = group * n + index
            parts.append(Moments(found.matrix[np.ix_(chosen, chosen)], found.mean[chosen]))
        return tuple(parts)

    def channel_power(self, evidence: Evidence) -> Array | None:
        """E[x^2] that broadcasts to :meth:`maps`; None where it was not observed."""
        if self.power is None or evidence.synthetic or not evidence.has(self.power):
            return None
        found = evidence.channels(self.power.value, self.power.axis).mean_square
        groups, _, taps, channels = self.permuted
        if found.size not in (channels, groups * channels):
            return None
        by_group = found.reshape(-1, 1, channels)
        return np.tile(by_group, (1, 1, taps if self.rows == 1 else 1))


def linear_maps(node: ir.Node, view: GraphView) -> Iterator[LinearMap]:
    """Every constant float32 weight of a node."""
    for index in (1, 2) if node.op_type in ("LSTM", "GRU") else (1,):
        value = node.inputs[index] if index < len(node.inputs) else None
        tensor = view.weight(value)
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        shape = tuple(int(d) for d in tensor.shape if isinstance(d, int))
        if len(shape) >= 2 and all(shape):
            yield _MAKERS[node.op_type](node, index, shape, view)


def linear_map(node: ir.Node, index: int, shape: tuple[int, ...], view: GraphView) -> LinearMap | None:
    """The map at an input of a node, whatever stands there; None if the node multiplies nothing by it."""
    if node.op_type not in _MAKERS or len(shape) < 2 or not all(shape):
        return None
    recurrent = node.op_type in ("LSTM", "GRU")
    if index != 1 and not (recurrent and index == 2):
        return None
    return _MAKERS[node.op_type](node, index, shape, view)


def _read(value: ir.Value | None, node: ir.Node, view: GraphView) -> str:
    """Name of an activation that can be observed; empty if it cannot."""
    seen = value is not None and bool(value.name) and not value.is_initializer() and not view.in_subgraph(node)
    return str(value.name) if seen and value is not None else ""


def _gram(
    name: str, features: int, axis: int = 1, axes: tuple[int, ...] = (), patches: Patches | None = None
) -> Need | None:
    if not name or features > MOST_FEATURES:
        return None
    return Need(name, Statistic.GRAM, axis, axes, patches)


def _power(name: str, axis: int) -> Need | None:
    return Need(name, Statistic.CHANNELS, axis) if name else None


def _convolution(node: ir.Node, index: int, shape: tuple[int, ...], view: GraphView) -> LinearMap:
    name = _read(node.inputs[0], node, view)
    groups, taps = node.attributes.get_int("group", 1), math.prod(shape[2:])
    split = (groups, shape[0] // groups, shape[1], taps)
    windows = windows_of(node, shape[2:])
    features = groups * shape[1]
    if windows is not None and taps > 1 and features * taps <= _FEATURES:
        gram, rows = _gram(name, features * taps, patches=windows), 1
    else:  # a lone channel has nobody that could make up for it
        gram, rows = _gram(name, features) if shape[1] > 1 else None, 2
    return LinearMap(index, shape, split, (0, 1, 3, 2), rows, gram, _power(name, 1))


def windows_of(node: ir.Node, kernel: tuple[int, ...]) -> Patches | None:
    """The windows of a Conv; None where its padding depends on the input's size."""
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or not 1 <= len(kernel) <= 3:
        return None
    ones, zeros = (1,) * len(kernel), (0,) * 2 * len(kernel)
    pads = tuple(node.attributes.get_ints("pads", zeros))
    return Patches(
        kernel,
        tuple(node.attributes.get_ints("strides", ones)),
        tuple(node.attributes.get_ints("dilations", ones)),
        pads[: len(kernel)],
        pads[len(kernel) :],
    )


def _gemm(node: ir.Node, index: int, shape: tuple[int, ...], view: GraphView) -> LinearMap:
    transposed = bool(node.attributes.get_int("transB", 0))
    axis = 0 if node.attributes.get_int("transA", 0) else 1
    name = _read(node.inputs[0], node, view)
    width = shape[1] if transposed else shape[0]
    order = (0, 1, 3, 2) if transposed else (0, 2, 3, 1)
    return LinearMap(index, shape, (1, *shape, 1), order, 1, _gram(name, width, axis), _power(name, axis))


def _product(node: ir.Node, index: int, shape: tuple[int, ...], view: GraphView) -> LinearMap:
    groups, name = math.prod(shape[:-2]), _read(node.inputs[0], node, view)
    gram = _gram(name, shape[-2], -1) if groups == 1 else None  # else each reads a part of its own
    return LinearMap(index, shape, (groups, *shape[-2:], 1), (0, 2, 3, 1), 1, gram, _power(name, -1))


def _recurrent(node: ir.Node, index: int, shape: tuple[int, ...], view: GraphView) -> LinearMap:
    split = (*shape, 1)
    if index == 1:
        name = _read(node.inputs[0], node, view)
        return LinearMap(
            index, shape, split, (0, 1, 3, 2), 1, _gram(name, shape[2], -1), _power(name, -1), together=True
        )
    states = node.outputs[0] if node.outputs else None
    name = _read(states, node, view)
    direction_axis = 2 if node.attributes.get_int("layout", 0) else 1
    gram = _gram(name, shape[0] * shape[2], axes=(direction_axis, 3))
    return LinearMap(index, shape, split, (0, 1, 3, 2), 1, gram, _power(name, -1))


_MAKERS = {"Conv": _convolution, "Gemm": _gemm, "MatMul": _product, "LSTM": _recurrent, "GRU": _recurrent}
