"""The last factor of every factored layer, refitted layer by layer to what the original model made there.

A layer y = W x has become V z + b, and V is the best there is for the x the original has. Behind other factored layers
z is another one, and what the layer makes is off by e. On the same feeds through both models,

    minimise over D, d   E|e - D z - d|^2 + ridge m |D|^2         m the mean of the diagonal of C = cov(z)
    solved by            D = cov(e, z) (C + ridge m I)^-1,   d = E[e] - D E[z]

and V + D, b + d make up for what the layers before have lost, as far as z still tells. Without a place for a bias the
same holds of moments about zero. Where nothing is lost, nothing changes.

**Sums.** Where y is added to a value that no later refit changes, e is the error of the sum: so a layer makes up for
what came along the other way, too. Worst output on held-out samples, all 36 products of a MiniLM's layers at half of
their weights, 64 samples: 7.5 dB as they are, 8.0 fitted to y, 8.2 fitted to sums.

**Few rows.** Rows of one sample resemble each other, so least squares wants many. Where there are few, the ridge is the
one that loses least on the half of the samples it was not fitted to. "As it is" is not among them: V has seen both
halves. EfficientNet-Lite0, 64 samples, share of y's variance that is off on held-out samples, by ridge:

    rows a feature         0.001   0.01    0.1     1      10
    261, (80, 48)           .305   .305   .309   .329   .351
    28, (192, 112)          .420   .419   .415   .416   .436
    24, (192, 128)          .846   .845   .836   .822   .837
    16, (320, 192)          .788   .785   .765   .736   .745

Layers are refitted in the order they run, each observed on what those before it left; layers of which none reads
another share a round, and where there are more rounds than :data:`_ROUNDS`, neighbours do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
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
Indices = npt.NDArray[np.intp]

_FACTORED = "factored"
"""Note on the last node of a factored layer: name of the value of the original model it has to give."""
_ROUNDS = 24
_MOST_FEATURES = 2304
_ENOUGH_ROWS = 50
"""A feature; where there are fewer, the ridge is found on samples it was not fitted to."""
_FACTORS = (1.0, 10.0, 100.0)


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
    levels = sorted({layer.depth for layer in layers})
    count = min(_ROUNDS, len(levels))
    turn = {level: i * count // len(levels) for i, level in enumerate(levels)}
    found: list[list[Pair]] = [[] for _ in range(count)]
    for layer in layers:
        found[turn[layer.depth]].append(layer.pair)
    return found


def settle(rewriter: Rewriter, after: Evidence) -> None:
    """Refits the factored layers that were observed.

    Args:
        rewriter: of the rewritten model.
        after: moments of it against the model before, of this round.
    """
    if after.synthetic:
        return
    for layer in _layers(rewriter.view()):
        if after.has(layer.pair):
            with threadpool_limits(1, "blas"):
                layer.refit(rewriter, after.cross_moments(layer.pair))


@dataclass(frozen=True, eq=False)
class _Last:
    """The last node of a factored layer.

    Attributes:
        node: y = V z; of a Conv in groups of channels.
        index: of the input that holds V.
        transposed: V is stored as (features, outputs).
        place: of the bias; None where there is none, and moments are about zero.
        pair: what it reads, and what it makes.
        depth: how many factored layers there are on the longest way to it, itself included.
    """

    node: ir.Node
    index: int
    transposed: bool
    place: Place | None
    pair: Pair
    depth: int

    def refit(self, rewriter: Rewriter, moments: CrossMoments) -> None:
        """Adds to weight and bias what fits best."""
        conv = self.node.op_type == "Conv"
        groups = self.node.attributes.get_int("group", 1) if conv else 1
        value = self.node.inputs[self.index]
        if value is None or value.const_value is None:
            raise ValueError(f"input {self.index} of {self.node.name!r} is no weight")
        stored = np.asarray(value.const_value.numpy(), np.float64)
        old = stored.T if self.transposed else stored.reshape(len(stored), -1)
        if moments.cross.shape != (len(old), groups * old.shape[1]):
            return
        change, shift = np.zeros(old.shape), np.zeros(len(old))
        for rows, columns in zip(*(np.split(np.arange(n), groups) for n in moments.cross.shape), strict=True):
            change[rows], shift[rows] = _fitted(_part(moments, rows, columns), centred=self.place is not None)
        if not (np.isfinite(change).all() and np.isfinite(shift).all()):
            return
        new = old + change / (self.node.attributes.get_float("alpha", 1.0) if self.node.op_type == "Gemm" else 1.0)
        array = new.T if self.transposed else new.reshape(stored.shape)
        rewriter.set_weight(self.node, self.index, np.ascontiguousarray(array, np.float32))
        if self.place is not None:
            absorb(rewriter, self.place, shift, 1 if conv else -1)


def _fitted(moments: CrossMoments, *, centred: bool) -> tuple[Array, Array]:
    """What is to be added to V (outputs, features) and to b (outputs,)."""
    halves = moments.halves
    if halves is None or moments.count >= _ENOUGH_ROWS * len(moments.mean):
        return _solved(moments, RIDGE, centred=centred)

    def lost(ridge: float) -> float:
        fits = (_solved(half, ridge, centred=centred) for half in halves)
        return sum(_error(*fit, unseen) for fit, unseen in zip(fits, halves[::-1], strict=True))

    return _solved(moments, min((f * RIDGE for f in _FACTORS), key=lost), centred=centred)


def _solved(moments: CrossMoments, ridge: float, *, centred: bool) -> tuple[Array, Array]:
    """The minimum; see the module."""
    square, cross = moments.matrix, moments.cross
    if centred:
        square = square - np.outer(moments.mean, moments.mean)
        cross = cross - np.outer(moments.error, moments.mean)
    damped = square.copy()
    damped.flat[:: len(square) + 1] += ridge * scale_of(square)
    change = np.asarray(cho_solve(cho_factor(damped, lower=True), cross.T), np.float64).T
    return change, moments.error - change @ moments.mean if centred else np.zeros(len(change))


def _error(change: Array, shift: Array, moments: CrossMoments) -> float:
    """E|e - D z - d|^2 less E|e|^2: below 0 where it is better than nothing."""
    fit = float(np.vdot(change @ moments.matrix - 2 * moments.cross, change))
    return fit + float(np.vdot(2 * (change @ moments.mean - moments.error) + shift, shift))


def _part(moments: CrossMoments, rows: Indices, columns: Indices) -> CrossMoments:
    """Of some outputs and features."""
    first = None if moments.first is None else _part(moments.first, rows, columns)
    square, cross = moments.matrix[np.ix_(columns, columns)], moments.cross[np.ix_(rows, columns)]
    return CrossMoments(square, cross, moments.mean[columns], moments.error[rows], moments.count, first)


# --- which ------------------------------------------------------------------------------------------


def _layers(view: GraphView) -> list[_Last]:
    """Those that can be refitted, in the order they run."""
    nodes = [n for n in view.nodes("MatMul", "Gemm", "Conv", subgraphs=False) if noted(n, _FACTORED) and not n.domain]
    depth = _depths(view, [str(n.name) for n in nodes]) if nodes else {}
    found = (_layer(node, view, depth) for node in nodes)
    return [layer for layer in found if layer is not None]


def _layer(node: ir.Node, view: GraphView, depth: Mapping[str, int]) -> _Last | None:
    """How the last node of a factored layer is refitted; None where it cannot be."""
    left = node.op_type == "MatMul" and view.is_float_weight(node.inputs[0])
    weight, data = node.inputs[0 if left else 1], node.inputs[1 if left else 0]
    if weight is None or data is None or data.is_initializer() or not view.is_float_weight(weight):
        return None
    if len(weight.uses()) != 1 or weight.is_graph_output():  # what others read, too, is not for this layer to change
        return None
    shape = tuple(int(d) for d in weight.const_value.shape.numpy()) if weight.const_value is not None else ()
    reads, axis = _reads(node, str(data.name), shape, left)
    if reads is None:
        return None
    place = None if left else bias_place(node)
    own = str(node.name)
    value = node.outputs[0] if place is None else place[0].outputs[0]
    name = noted(node, _FACTORED) if value is node.outputs[0] else str(value.name)
    name = _sum(value, depth, depth[own]) or name
    transposed = not left and node.op_type != "Conv" and not bool(node.attributes.get_int("transB", 0))
    pair = Pair(reads, Need(name, Statistic.GRAM, axis))
    return _Last(node, 0 if left else 1, transposed, place, pair, depth[own])


def _reads(node: ir.Node, data: str, shape: tuple[int, ...], left: bool) -> tuple[Need | None, int]:
    """Features of what a node reads, and the channel axis of what it makes; None where there are too many."""
    if node.op_type != "Conv":
        made = -2 if left else -1
        flipped: int = node.attributes.get_int("transA", 0)
        return Need(data, Statistic.GRAM, 0 if flipped else made) if len(shape) == 2 else None, made
    patches = windows_of(node, shape[2:])
    if patches is None or node.attributes.get_int("group", 1) * math.prod(shape[1:]) > _MOST_FEATURES:
        return None, 1
    moves = (*patches.strides, *(p + 1 for p in (*patches.pads_begin, *patches.pads_end)))
    if math.prod((*patches.kernel, *moves)) == 1:  # its windows are the positions
        return Need(data, Statistic.GRAM, 1), 1
    return Need(data, Statistic.GRAM, patches=patches), 1


def _sum(value: ir.Value, depth: Mapping[str, int], own: int) -> str | None:
    """Name of the sum that a value goes into, where the other part is refitted before, or never."""
    uses = tuple(value.uses())
    add = uses[0].node if len(uses) == 1 else None
    if add is None or add.op_type != "Add" or value.is_graph_output() or add.graph is not value.graph:
        return None
    other = add.inputs[1 - uses[0].idx]
    if other is None or other.is_initializer():
        return None
    producer = other.producer()
    return str(add.outputs[0].name) if producer is None or depth[str(producer.name)] < own else None


def _depths(view: GraphView, names: Collection[str]) -> dict[str, int]:
    """How many of these nodes there are on the longest way to each node, itself included."""
    chosen, depth = set(names), dict[str, int]()
    for name in nx.topological_sort(view.graph):
        before = max((depth[p] for p in view.graph.predecessors(name)), default=0)
        depth[name] = before + (name in chosen)
    return depth
