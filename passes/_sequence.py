"""The last factor of every factored layer, refitted layer by layer to what the original model made there.

A layer y = W x has become y = V (Z x) + b, and V is the best there is for the x the original has. Behind other
factored layers it reads z = Z x' of another x'. With y of the original and z of the rewritten model, on the same feeds,

    minimise over V, b   E|y - V z - b|^2 + ridge m |V - V0|^2         m the mean of the diagonal of C = cov(z)
    solved by            V = V0 + (cov(y, z) - V0 C) (C + ridge m I)^-1,   b = E[y] - V E[z]

Without a place for b the same holds of moments about zero. It makes up, as far as z still tells, for what the layers
before have lost. Where nothing was lost cov(y, z) = V0 C, and V0 stays.

The ridge pulls towards V0: what calibration says nothing about stays as it was. Where few rows were seen it is
the one that loses least on the half of the samples it was not fitted to; if not even that gains, V0 stays.

Layers are refitted in the order they run, each observed on what those before it left; layers of which none reads
another share a round, and where there are more rounds than :data:`_ROUNDS`, neighbours do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.linalg import cho_factor, cho_solve
from threadpoolctl import threadpool_limits

from onnxcompress.notes import note, noted
from onnxcompress.passes._constant_sum import Place, absorb
from onnxcompress.passes._linear_maps import windows_of
from onnxcompress.passes._readers import bias_place
from onnxcompress.passes._refit import RIDGE, scale_of
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import CrossMoments, Evidence, Need, Pair, Statistic
from onnxcompress.view import GraphView

__all__ = ["note_factored", "rounds", "settle"]

Array = npt.NDArray[np.float64]

_FACTORED = "factored"
"""Note on the last node of a factored layer: name of the value of the original model it has to give."""
_ROUNDS = 24
_MOST_FEATURES = 2304
_ENOUGH_ROWS = 20
"""A feature; where there are fewer, the ridge is found on samples it was not fitted to."""
_FACTORS = (1.0, 10.0, 100.0, 1000.0)


def note_factored(node: ir.Node, value: str) -> None:
    """Notes that a node is the last of a factored layer; nodes that cannot be refitted are left alone later.

    Args:
        node: of the rewritten model.
        value: name of the value of the original model that its output stands for.
    """
    note(node, _FACTORED, value)


def rounds(view: GraphView) -> Iterable[Collection[Pair]]:
    """What to observe for every factored layer, in the order they are refitted."""
    layers = _layers(view)
    depth = _depths(view, [str(layer.node.name) for layer in layers])
    levels = sorted(set(depth.values()))
    count = min(_ROUNDS, len(levels))
    turn = {level: i * count // len(levels) for i, level in enumerate(levels)}
    found: list[list[Pair]] = [[] for _ in range(count)]
    for layer in layers:
        found[turn[depth[str(layer.node.name)]]].append(layer.pair)
    return found


def settle(rewriter: Rewriter, after: Evidence) -> None:
    """Refits the factored layers that were observed.

    Args:
        rewriter: of the rewritten model.
        after: moments between it and the model before, of this round.
    """
    if after.synthetic:
        return
    for layer in _layers(rewriter.view()):
        if not after.has(layer.pair):
            continue
        with threadpool_limits(1, "blas"):
            layer.refit(rewriter, after.cross_moments(layer.pair))


@dataclass(frozen=True, eq=False)
class _Last:
    """The last node of a factored layer.

    Attributes:
        node: y = V z, of a Conv in groups of channels.
        index: of the input that holds V.
        transposed: V is stored as (features, outputs).
        place: of the bias; None where there is none, and moments are about zero.
        pair: what it reads now, and what the original made.
    """

    node: ir.Node
    index: int
    transposed: bool
    place: Place | None
    pair: Pair

    @property
    def _groups(self) -> int:
        return self.node.attributes.get_int("group", 1) if self.node.op_type == "Conv" else 1

    def refit(self, rewriter: Rewriter, moments: CrossMoments) -> None:
        """Writes the weight and bias that fit best, where they are better than those there are."""
        stored = _weight(self.node, self.index)
        old = stored.T if self.transposed else stored.reshape(len(stored), -1)
        parts = np.split(old, self._groups)
        if moments.cross.shape != (len(old), self._groups * old.shape[1]):
            return
        bias = np.zeros(len(old)) if self.place is None else np.zeros(len(old)) + _bias(self.place)
        new, shift = old.copy(), np.zeros(len(old))
        for g, part in enumerate(parts):
            rows, columns = slice(g * len(part), (g + 1) * len(part)), slice(g * part.shape[1], (g + 1) * part.shape[1])
            fitted = _refitted(part, bias[rows], _part(moments, rows, columns), centred=self.place is not None)
            if fitted is not None:
                new[rows], shift[rows] = fitted[0], fitted[1] - bias[rows]
        if not (np.isfinite(new).all() and np.isfinite(shift).all()) or np.array_equal(new, old):
            return
        array = new.T if self.transposed else new.reshape(stored.shape)
        rewriter.set_weight(self.node, self.index, np.ascontiguousarray(array, np.float32))
        if self.place is not None:
            absorb(rewriter, self.place, shift, 1 if self.node.op_type == "Conv" else -1)


def _refitted(old: Array, bias: Array, moments: CrossMoments, *, centred: bool) -> tuple[Array, Array] | None:
    """V (outputs, features) and b (outputs,); None where what there is is better."""
    halves = moments.halves
    if halves is None or moments.count >= _ENOUGH_ROWS * len(moments.mean):
        return _solved(old, bias, moments, RIDGE, centred=centred)
    lost = {math.inf: sum(_error(old, bias, half) for half in halves)}
    for ridge in (f * RIDGE for f in _FACTORS):
        fits = [_solved(old, bias, half, ridge, centred=centred) for half in halves]
        lost[ridge] = sum(_error(*fit, unseen) for fit, unseen in zip(fits, halves[::-1], strict=True))
    ridge = min(lost, key=lambda r: (lost[r], -r))
    return None if math.isinf(ridge) else _solved(old, bias, moments, ridge, centred=centred)


def _solved(old: Array, bias: Array, moments: CrossMoments, ridge: float, *, centred: bool) -> tuple[Array, Array]:
    """The minimum; see the module."""
    if centred:
        square = moments.matrix - np.outer(moments.mean, moments.mean)
        cross = moments.cross - np.outer(moments.wanted, moments.mean)
    else:
        square, cross = moments.matrix, moments.cross
    damped = square.copy()
    damped.flat[:: len(square) + 1] += ridge * scale_of(square)
    change = cho_solve(cho_factor(damped, lower=True), (cross - old @ square).T).T
    new = old + change
    return new, moments.wanted - new @ moments.mean if centred else bias


def _error(weight: Array, bias: Array, moments: CrossMoments) -> float:
    """E|y - V z - b|^2 without E|y|^2."""
    fit = float(np.vdot(weight @ moments.matrix - 2 * moments.cross, weight))
    return fit + float(np.vdot(2 * (weight @ moments.mean - moments.wanted) + bias, bias))


def _part(moments: CrossMoments, rows: slice, columns: slice) -> CrossMoments:
    """Of some outputs and features."""
    return CrossMoments(
        moments.matrix[columns, columns],
        moments.cross[rows, columns],
        moments.mean[columns],
        moments.wanted[rows],
        moments.count,
        None if moments.first is None else _part(moments.first, rows, columns),
    )


# --- which ------------------------------------------------------------------------------------------


def _layers(view: GraphView) -> list[_Last]:
    """Those that can be refitted, in the order they run."""
    found = (_layer(node, view) for node in view.nodes("MatMul", "Gemm", "Conv", subgraphs=False))
    return [layer for layer in found if layer is not None]


def _layer(node: ir.Node, view: GraphView) -> _Last | None:
    """How the last node of a factored layer is refitted; None where it is none, or cannot be."""
    wanted = noted(node, _FACTORED)
    if wanted is None or node.domain:
        return None
    left = node.op_type == "MatMul" and view.is_float_weight(node.inputs[0])
    weight, data = node.inputs[0 if left else 1], node.inputs[1 if left else 0]
    if weight is None or data is None or data.is_initializer() or not view.is_float_weight(weight):
        return None
    if len(weight.uses()) != 1 or weight.is_graph_output():  # what others read, too, is not for this layer to change
        return None
    shape = tuple(int(d) for d in weight.const_value.shape.numpy()) if weight.const_value is not None else ()
    if node.op_type == "Conv":
        return _convolution(node, str(data.name), shape, wanted)
    if len(shape) != 2:
        return None
    if left:
        return _Last(node, 0, False, None, _pair(str(data.name), -2, wanted, -2))
    transposed = node.op_type == "MatMul" or not node.attributes.get_int("transB", 0)
    place = bias_place(node)
    if place is not None and not _is_vector(place, shape[1 if transposed else 0]):
        return None
    if node.op_type == "MatMul":
        if place is not None:  # the sum is observed, so that a constant moved into it is in what is fitted
            wanted = str(place[0].outputs[0].name)
        return _Last(node, 1, True, place, _pair(str(data.name), -1, wanted, -1))
    axis = 0 if node.attributes.get_int("transA", 0) else 1
    return None if place is None else _Last(node, 1, transposed, place, _pair(str(data.name), axis, wanted, 1))


def _convolution(node: ir.Node, data: str, shape: tuple[int, ...], wanted: str) -> _Last | None:
    place, patches = bias_place(node), windows_of(node, shape[2:])
    features = node.attributes.get_int("group", 1) * math.prod(shape[1:])
    if place is None or patches is None or features > _MOST_FEATURES:
        return None
    then = Need(wanted, Statistic.GRAM, 1)
    moves = (*patches.strides, *(p + 1 for p in (*patches.pads_begin, *patches.pads_end)))
    if math.prod((*patches.kernel, *moves)) == 1:  # its windows are the positions
        return _Last(node, 1, False, place, Pair(Need(data, Statistic.GRAM, 1), then))
    return _Last(node, 1, False, place, Pair(Need(data, Statistic.GRAM, patches=patches), then))


def _pair(data: str, axis: int, wanted: str, made: int) -> Pair:
    return Pair(Need(data, Statistic.GRAM, axis), Need(wanted, Statistic.GRAM, made))


def _is_vector(place: Place, outputs: int) -> bool:
    """Whether a bias is one number for each output, or one for all."""
    node, index = place
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return True
    shape = tuple(int(d) for d in value.const_value.shape.numpy())
    return math.prod(shape) == 1 or (math.prod(shape) == outputs == shape[-1])


def _bias(place: Place) -> Array:
    """What is added to the output now."""
    node, index = place
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return np.zeros(1)
    scale = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    return scale * np.asarray(value.const_value.numpy(), np.float64).reshape(-1)


def _weight(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    if value is None or value.const_value is None:
        raise ValueError(f"input {index} of {node.name!r} is no weight")
    return np.asarray(value.const_value.numpy(), np.float64)


def _depths(view: GraphView, names: Collection[str]) -> dict[str, int]:
    """How many of these nodes there are on the longest way to each of them, itself included."""
    chosen, depth = set(names), dict[str, int]()
    for name in nx.topological_sort(view.graph):
        before = max((depth[p] for p in view.graph.predecessors(name)), default=0)
        depth[name] = before + (name in chosen)
    return {name: depth[name] for name in names}
