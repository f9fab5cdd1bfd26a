"""Low-rank forms of MatMul and Gemm, and of several that read the same value.

    x W  ->  (x V') U'          W [K, N] as it is stored, V' [K, r], U' [r, N]
    W x  ->  U (V x)            where the weight is the left operand
    x Wq, x Wk, x Wv  ->  z = x V',  z Uq', z Uk', z Uv'        one V' for all

The last works out V' for the layers on top of each other, each divided by the energy of its output, so that none is
lost because others are louder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.passes._constant_sum import is_free
from onnxcompress.passes._forms import Factors, Form, Ranks, Settings
from onnxcompress.passes._low_rank import Basis, basis, lost, metric
from onnxcompress.passes._readers import bias_place
from onnxcompress.passes._ridge import trusted_ridge
from onnxcompress.sketch import Drawn, Slot
from onnxcompress.statistics import Evidence, Need, SecondMoments, Statistic
from onnxcompress.view import GraphView

__all__ = ["joint_forms", "product_forms"]

Array = npt.NDArray[np.float64]

_MOST_FEATURES = 6144
"""Features above which there are no second moments between them: 300 MB."""


@dataclass(frozen=True)
class Layer:
    """One MatMul or Gemm with a constant weight.

    Attributes:
        node: its name.
        op: "MatMul" or "Gemm".
        data: name of what it reads.
        result: name of what it makes.
        stored: the weight.
        transposed: the weight is stored as (outputs, features).
        left: the weight is the left operand.
        bias: name of a Gemm's bias; None for none.
        offset: the same where it is a weight.
        attributes: of a Gemm, without what says how operands lie.
        flipped: a Gemm's data are transposed.
        shiftable: the mean of what is lost can go into a bias.
        need: second moments of the features; None where there are none to be had.
    """

    node: str
    op: str
    data: str
    result: str
    stored: ir.TensorProtocol
    transposed: bool
    left: bool
    bias: str | None
    offset: ir.TensorProtocol | None
    attributes: tuple[tuple[str, float], ...]
    flipped: bool
    shiftable: bool
    need: Need | None

    @property
    def outputs(self) -> int:
        """Values it makes of a row."""
        return int(self.stored.shape.numpy()[0 if self.transposed else 1])

    @property
    def features(self) -> int:
        """Values it reads of a row."""
        return int(self.stored.shape.numpy()[1 if self.transposed else 0])

    def weight(self) -> Array:
        """W, (outputs, features)."""
        array = self.stored.numpy()
        return np.asarray(array if self.transposed else array.T, np.float64)

    def moments(self, evidence: Evidence) -> SecondMoments | None:
        """Of the features, where they were observed."""
        if self.need is None or evidence.synthetic or not evidence.has(self.need):
            return None
        found = evidence.second_moments(self.need)
        return found if len(found.mean) == self.features else None


def layer_of(node: ir.Node, view: GraphView) -> Layer:
    """The layer a node is.

    Raises:
        Skip: it is none that has factors.
    """
    constant = [view.is_float_weight(v) for v in node.inputs[:2]]
    if not any(constant):
        raise Skip("its weight is no float32 constant")
    index = 1 if constant[1] else 0
    value, data = node.inputs[index], node.inputs[1 - index]
    if value is None or data is None or value.const_value is None:
        raise Skip("its weight is no float32 constant")
    if len(value.const_value.shape) != 2:
        raise Skip(f"its weight has {len(value.const_value.shape)} dimensions, and 2 can be factored")
    gemm = node.op_type == "Gemm"
    if gemm and index == 0:
        raise Skip("the weight of this Gemm is its left operand")
    flipped = gemm and bool(node.attributes.get_int("transA", 0))
    left = index == 0
    axis = -2 if left else 0 if flipped else -1
    seen = not data.is_initializer() and not view.in_subgraph(node)
    transposed = left or (gemm and bool(node.attributes.get_int("transB", 0)))
    features = int(value.const_value.shape.numpy()[1 if transposed else 0])
    bias = node.inputs[2] if gemm and len(node.inputs) > 2 else None
    scales = tuple((n, node.attributes.get_float(n, 1.0)) for n in ("alpha", "beta") if n in node.attributes)
    plain = all(factor == 1.0 for _, factor in scales)
    return Layer(
        str(node.name),
        node.op_type,
        str(data.name),
        str(node.outputs[0].name),
        value.const_value,
        transposed,
        left,
        None if bias is None else str(bias.name),
        view.weight(bias),
        scales,
        flipped,
        plain and _by_output(node, view) if gemm else index == 1 and bias_place(node) is not None,
        Need(str(data.name), Statistic.GRAM, axis) if seen and features <= _MOST_FEATURES else None,
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """What serves all ranks.

    Attributes:
        basis: of the layers on top of each other.
        stacked: their weights, each divided by the size of its output.
        second: moments that errors are counted by.
        sizes: of the outputs.
        mean: of the features, where biases take up the mean of what is lost.
    """

    basis: Basis
    stacked: Array
    second: Array
    sizes: tuple[float, ...]
    mean: Array | None


@dataclass(eq=False)
class _Products(Form):
    """Layers that read the same value through one V."""

    layers: tuple[Layer, ...] = ()

    @property
    def most(self) -> Ranks:
        return (min(sum(layer.outputs for layer in self.layers), self.layers[0].features),)

    def needs(self) -> tuple[Need, ...]:
        return tuple(dict.fromkeys(layer.need for layer in self.layers if layer.need is not None))

    def drawing(self, ranks: Ranks) -> tuple[Drawn, ...]:
        first, rank = self.layers[0], ranks[0]
        inner = f"{first.result}_low"
        shape = (rank, first.features) if first.left else (first.features, rank)
        shared = Slot(shape, "V")
        drawn = [_first(first, shared, inner)]
        for number, layer in enumerate(self.layers):
            slot = Slot((layer.outputs, rank) if layer.left else (rank, layer.outputs), self._name("U", number))
            drawn.append(self._second(layer, inner, slot, number))
        return tuple(drawn)

    def _name(self, stem: str, number: int) -> str:
        return stem if len(self.layers) == 1 else f"{stem}{number}"

    def _second(self, layer: Layer, inner: str, slot: Slot, number: int) -> Drawn:
        if layer.op == "MatMul":
            return Drawn("MatMul", (slot, inner) if layer.left else (inner, slot), (layer.result,))
        bias: str | Slot | None = layer.bias
        if layer.shiftable:
            bias = Slot((layer.outputs,), self._name("bias", number))
        inputs = (inner, slot) if bias is None else (inner, slot, bias)
        return Drawn("Gemm", inputs, (layer.result,), layer.attributes)

    def losses(self, rungs: Sequence[Ranks], evidence: Evidence, settings: Settings) -> dict[Ranks, float]:
        found = self._found(evidence, settings)
        return {ranks: found.basis.lost(ranks[0]) for ranks in rungs}

    def _found(self, evidence: Evidence, settings: Settings) -> _Found:
        """What serves all ranks."""
        moments = self.layers[0].moments(evidence) if settings.aware else None
        return self.remembered(moments, settings, lambda: self._look(moments, settings))

    def _look(self, moments: SecondMoments | None, settings: Settings) -> _Found:
        centred = moments is not None and all(layer.shiftable for layer in self.layers)
        seen = None if moments is None else moments.covariance if centred else moments.matrix
        weights = [layer.weight() for layer in self.layers]
        ridge = settings.ridge
        if moments is not None:  # that of the first serves all: it is their input of which little was seen
            ridge = trusted_ridge(weights[0], moments, ridge, centred=centred, layer=self.nodes[0])
        second = metric(seen, self.layers[0].features, ridge)
        sizes = [_size(w, second) for w in weights] if len(weights) > 1 else [1.0]
        stacked = np.concatenate([w / size for w, size in zip(weights, sizes, strict=True)])
        mean = moments.mean if moments is not None and centred else None
        return _Found(basis(stacked, second), stacked, second if seen is None else seen, tuple(sizes), mean)

    def factors(self, ranks: Ranks, evidence: Evidence, settings: Settings) -> Factors:
        found = self._found(evidence, settings)
        left, right = found.basis.cut(ranks[0])
        error = lost(found.stacked, left @ right, found.second)
        made: dict[Slot, npt.NDArray[np.float32]] = {}
        shifts: dict[str, Array] = {}
        start = 0
        drawing = self.drawing(ranks)
        slot = drawing[0].inputs[0 if self.layers[0].left else 1]
        if isinstance(slot, Slot):
            made[slot] = _as_stored(right if self.layers[0].left else right.T)
        for drawn, layer, size in zip(drawing[1:], self.layers, found.sizes, strict=True):
            rows = slice(start, start + layer.outputs)
            start += layer.outputs
            own = left[rows] * size
            shift = np.zeros(layer.outputs)
            if found.mean is not None:
                shift = (found.stacked[rows] * size - own @ right) @ found.mean
            for read in drawn.inputs:
                if isinstance(read, Slot) and read.name.startswith("U"):
                    made[read] = _as_stored(own if layer.left else own.T)
                elif isinstance(read, Slot):
                    made[read] = (_offset(layer) + shift).astype(np.float32)
            if layer.op == "MatMul" and found.mean is not None:
                shifts[layer.result] = shift
        return Factors(made, error, shifts)


def _offset(layer: Layer) -> Array:
    """A Gemm's bias as one number for each output."""
    zeros = np.zeros(layer.outputs)
    return zeros if layer.offset is None else zeros + np.asarray(layer.offset.numpy(), np.float64).reshape(-1)


def _by_output(node: ir.Node, view: GraphView) -> bool:
    """Whether the bias of a Gemm is absent, or a weight with one number for each output."""
    tensor = view.weight(node.inputs[2]) if len(node.inputs) > 2 else None
    return is_free(node, 2) and (tensor is None or tensor.size in (1, tensor.shape.numpy()[-1]))


def _first(layer: Layer, slot: Slot, inner: str) -> Drawn:
    if layer.flipped:
        return Drawn("Gemm", (layer.data, slot), (inner,), (("transA", 1),))
    return Drawn("MatMul", (slot, layer.data) if layer.left else (layer.data, slot), (inner,))


def _size(weight: Array, second: Array) -> float:
    """Root of the energy of the output; 1 for a layer of zeros."""
    energy = float(np.vdot(weight @ second, weight))
    return float(np.sqrt(energy)) if energy > 0 else 1.0


def _as_stored(array: Array) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(array, np.float32)


def product_forms(node: ir.Node, view: GraphView) -> tuple[Form, ...]:
    """The forms of one MatMul or Gemm.

    Raises:
        Skip: it has none.
    """
    layer = layer_of(node, view)
    return (_Products("svd", (layer.node,), layer.outputs * layer.features, (layer,)),)


def joint_forms(view: GraphView) -> Iterator[Form]:
    """Several layers that read the same value, through one V; one form for each such value, in execution order."""
    readers: dict[str, list[Layer]] = {}
    for node in view.nodes("MatMul", "Gemm", subgraphs=False):
        try:
            layer = layer_of(node, view)
        except Skip:
            continue
        if not layer.left and not layer.flipped:
            readers.setdefault(layer.data, []).append(layer)
    for layers in readers.values():
        if len(layers) > 1 and len({layer.features for layer in layers}) == 1:
            size = sum(layer.outputs * layer.features for layer in layers)
            yield _Products("joint", tuple(layer.node for layer in layers), size, tuple(layers))
