"""Linear readers of a group as matrices: their weights over features, and the second moments of these.

    y = W x      W (outputs, features), features at positions of one axis of the stored weight

A Conv's features are channels x taps where the windows were observed, else channels, with its taps counted as
outputs; an LSTM's recurrent weight is one matrix a direction. Any of them can be refitted for what stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import ref

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.coupling import Group, Reader
from onnxcompress.passes._constant_sum import Place, is_free
from onnxcompress.passes._linear_maps import windows_of
from onnxcompress.passes._refit import RIDGE, refit, refit_with_bias
from onnxcompress.statistics import Evidence, Need, Patches, SecondMoments, Statistic

__all__ = ["Linear", "bias_place", "held_out", "labels_of", "linears", "need_of"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_MOST_FEATURES = 2304
"""Windows with more channels x taps are not observed as such: their second moments would take too much memory."""
_ENOUGH_ROWS = 20
_FACTORS = (1.0, 10.0, 100.0, 1000.0)
_MOST_CHANNELS = 4096
"""Readers of more features are left as they are; their second moments alone would take more than a gigabyte."""
_RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True, eq=False)
class Linear:
    """One matrix of a reader.

    Attributes:
        reader: whose.
        weight: (outputs, features).
        moments: of the features.
        positions: place of each feature along the axis of the stored weight, (features,).
        bias: what the output may be shifted by: adds (outputs,) to the bias; None where there is no place for it.
        write: puts a matrix (outputs, features) into the stored weight, in place.
    """

    reader: Reader
    weight: Array
    moments: SecondMoments
    positions: Indices
    bias: Callable[[Array], Array] | None
    write: Callable[[npt.NDArray[np.float32], Array], None]

    def ridge(self, wanted: float) -> float:
        """As much as wanted, or more where few rows were seen: what loses least where it was not fitted.

        With a quarter of the positions gone, the weights are fitted on every second sample and held against the
        others; so a reader of a thousand features of which only a hundred rows were seen is hardly refitted at all.
        """
        moments = self.moments
        if moments.first is None or moments.count >= _ENOUGH_ROWS * len(moments.mean):
            return wanted
        known = _ridges.get(id(moments.matrix))
        if known is None or known[0]() is not moments.matrix:
            kept = np.flatnonzero(self.positions % 4 != 0)
            factor = min(_FACTORS, key=lambda f: held_out(self, kept, f * RIDGE))
            known = _ridges[id(moments.matrix)] = (ref(moments.matrix), factor)
        return wanted * known[1]


_ridges: dict[int, tuple[ref[Array], float]] = {}
"""By the identity of moments: how much more ridge they need."""


def held_out(linear: Linear, kept: npt.NDArray[np.intp], ridge: float) -> float:
    """What is lost of the output's energy on samples the refit did not see; on those it saw where there was one."""
    halves = linear.moments.halves
    total = 0.0
    for seen, unseen in (halves, halves[::-1]) if halves is not None else ((linear.moments, linear.moments),):
        change = linear.weight.copy()
        if linear.bias is None:
            change[:, kept] -= refit(linear.weight, seen.matrix, kept, ridge=ridge)
            shift = np.zeros(len(change))
            energy = float(np.vdot(linear.weight @ unseen.matrix, linear.weight))
        else:
            change[:, kept] -= refit_with_bias(linear.weight, seen.matrix, seen.mean, kept, ridge=ridge).weight
            shift = change @ seen.mean
            energy = float(np.vdot(linear.weight @ unseen.covariance, linear.weight))
        error = float(np.vdot(change @ unseen.matrix, change) - 2 * shift @ (change @ unseen.mean) + shift @ shift)
        total += max(error, 0.0) / energy if energy > 0 else 0.0
    return total


def need_of(node: ir.Node, reader: Reader) -> Need | None:
    """What calibration has to observe for a reader; None where its data cannot be, or have too many features."""
    weight = node.inputs[reader.index]
    if reader.data is None or reader.data.dim < 0 or weight is None or weight.const_value is None:
        return None
    if int(weight.const_value.shape.numpy()[reader.weight.dim]) > _MOST_CHANNELS:
        return None
    if node.op_type in _RECURRENT and reader.index == 2:
        return Need(reader.data.value, Statistic.GRAM, axes=(1, 3))
    patches = _patches(node)
    if patches is not None:
        return Need(reader.data.value, Statistic.GRAM, patches=patches)
    return Need(reader.data.value, Statistic.GRAM, axis=reader.data.dim)


def _patches(node: ir.Node) -> Patches | None:
    """Windows of a Conv that has more than one tap, where they are few enough."""
    if node.op_type != "Conv" or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    shape = tuple(int(d) for d in node.inputs[1].const_value.shape.numpy())
    kernel = shape[2:]
    if math.prod(shape[1:]) > _MOST_FEATURES:
        return None
    windows = windows_of(node, kernel)
    if windows is None:
        return None
    single = math.prod((*kernel, *windows.strides)) == 1 and not any((*windows.pads_begin, *windows.pads_end))
    return None if single else windows


def linears(node: ir.Node, reader: Reader, evidence: Evidence) -> Iterator[Linear]:
    """The matrices of a reader; none where its data were not observed, were made up, or do not fit its weight."""
    need = need_of(node, reader)
    value = node.inputs[reader.index]
    if need is None or value is None or value.const_value is None or evidence.synthetic or not evidence.has(need):
        return
    moments = evidence.second_moments(need)
    array = value.const_value.numpy()
    if node.op_type in _RECURRENT:
        yield from _directions(reader, array, moments)
        return
    axis = reader.weight.dim
    channels = array.shape[axis]
    moved = np.moveaxis(array, axis, -1)  # (outputs and taps in stored order, channels)
    if need.patches is not None:
        matrix = array.reshape(array.shape[0], -1)
        positions = np.repeat(np.arange(channels), math.prod(array.shape[2:]))
        if moments.matrix.shape[0] != matrix.shape[1]:
            return

        def write_windows(stored: npt.NDArray[np.float32], new: Array) -> None:
            stored[...] = new.reshape(stored.shape)

        yield Linear(
            reader, matrix.astype(np.float64), moments, positions, _as_is if bias_place(node) else None, write_windows
        )
        return
    if moments.matrix.shape[0] != channels:
        return
    matrix = moved.reshape(-1, channels)
    outputs = array.shape[reader.outputs]
    order = [d for d in range(array.ndim) if d != axis].index(reader.outputs)
    # steps between the windows a ConvTranspose lays down: a position gets so many fewer taps
    apart = math.prod(node.attributes.get_ints("strides", ())) if node.op_type == "ConvTranspose" else 1

    def write(stored: npt.NDArray[np.float32], new: Array) -> None:
        np.moveaxis(stored, axis, -1)[...] = new.reshape(moved.shape)

    def by_output(shift: Array) -> Array:
        taps = np.moveaxis(shift.reshape(moved.shape[:-1]), order, 0)
        return np.asarray(taps.reshape(outputs, -1).sum(axis=1)) / apart

    shiftable = bias_place(node) is not None and (node.op_type != "MatMul" or reader.index == 1)
    bias = by_output if shiftable else None
    yield Linear(reader, matrix.astype(np.float64), moments, np.arange(channels), bias, write)


def _directions(reader: Reader, array: npt.NDArray[np.float32], moments: SecondMoments) -> Iterator[Linear]:
    """W [D, gates H, I] reads the same input in both directions; R [D, gates H, H] its own states."""
    many, _, inner = array.shape
    recurrent = reader.index == 2
    if moments.matrix.shape[0] != (many * inner if recurrent else inner):
        return
    for d in range(many):
        own = slice(d * inner, (d + 1) * inner) if recurrent else slice(None)
        part = moments.part(own)

        def write(stored: npt.NDArray[np.float32], new: Array, direction: int = d) -> None:
            stored[direction] = new

        yield Linear(reader, array[d].astype(np.float64), part, np.arange(inner), None, write)


def _as_is(shift: Array) -> Array:
    return shift


def bias_place(node: ir.Node) -> Place | None:
    """Where the bias of a reader is, or could be: its own, or that of the one Add behind a MatMul."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return (node, 2) if is_free(node, 2) else None
    if node.op_type == "Gemm":
        return (node, 2) if is_free(node, 2) and node.attributes.get_float("alpha", 1.0) == 1.0 else None
    if node.op_type != "MatMul" or node.outputs[0].is_graph_output():
        return None
    uses = tuple(node.outputs[0].uses())
    add = uses[0].node if len(uses) == 1 else None
    if add is None or add.op_type != "Add":
        return None
    index = 1 - uses[0].idx
    other = add.inputs[index]
    return (add, index) if other is not None and other.const_value is not None and other.is_initializer() else None


def labels_of(group: Group, linear: Linear, factors: tuple[int, ...]) -> Indices:
    """Atom of each feature of a reader in a group; -1 where it is in none.

    Args:
        group: one the reader's axis belongs to.
        linear: of the reader.
        factors: sizes of the factors of the axis.
    """
    labels = np.full(math.prod(factors), -1)
    for part in group.parts:
        if part.factor.axis == linear.reader.weight:
            labels = part.along(factors)
    return np.asarray(labels[linear.positions], np.int64)
