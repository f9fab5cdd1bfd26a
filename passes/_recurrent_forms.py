"""Low-rank forms of LSTM, GRU and RNN.

    W x  ->  W' (V x)     W' (directions, gates x hidden, r), V (r, features): one V for all gates and directions
    R h  ->  (U V) h      U (directions, gates x hidden, r), V (directions, r, hidden)

The first puts a MatMul in front of the node, which then reads r values a step. The second cannot run as two products,
as the operator itself multiplies by R in every step. What can be had is storage: R is the product of two weights, which
a runtime that folds constants works out once, at load. The file gets smaller, and the speed stays what it was.

What is made least is E|W x - W' V x|^2 and E|R h - U V h|^2, over all gates: the error of what goes into their
activations, each row counted as it is. Dividing each gate by its own energy sounds fair, for some are louder, but of
three trained LSTMs none had better outputs so (1 to 10 % more was lost of them).

Both add to what a bias adds to, B = [of W, of R], so a bias that is a weight, or that is absent, takes up the means
of what is lost. That matters: what is lost of the mean adds up from step to step (with half of R, 0.6 % of a voice
detector's states are lost so, and 18 % otherwise). Where the reset gate of a GRU multiplies h before R does
(``linear_before_reset = 0``), the mean of what R reads is not that of h, and there is no correction for R.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.passes._constant_sum import is_free
from onnxcompress.passes._forms import Factors, Form, Ranks, Settings
from onnxcompress.passes._low_rank import Basis, basis, metric
from onnxcompress.sketch import Drawn, Slot, redrawn
from onnxcompress.statistics import Evidence, Need, SecondMoments, Statistic
from onnxcompress.view import GraphView

__all__ = ["recurrent_forms"]

Array = npt.NDArray[np.float64]

_MOST_FEATURES = 6144
"""Features above which there are no second moments between them: 300 MB."""
_LEAST = 16
"""Inputs or hidden units below which nothing is gained."""


@dataclass(frozen=True)
class Layer:
    """One recurrent node.

    Attributes:
        node: its name.
        drawn: the node as it is.
        weight: W, (directions, gates x hidden, features).
        recurrent: R, (directions, gates x hidden, hidden).
        offset: B, (directions, 2 x gates x hidden), where it is a weight.
        shiftable: B is a weight, or absent.
        states_shiftable: and what R reads are the hidden states themselves.
        seen: second moments of what W reads; None where there are none to be had.
        states: of what R reads, all directions.
    """

    node: str
    drawn: Drawn
    weight: ir.TensorProtocol
    recurrent: ir.TensorProtocol
    offset: ir.TensorProtocol | None
    shiftable: bool
    states_shiftable: bool
    seen: Need | None
    states: Need | None

    @property
    def directions(self) -> int:
        """1 or 2."""
        return _extents(self.weight)[0]

    @property
    def rows(self) -> int:
        """Gates x hidden units."""
        return _extents(self.weight)[1]

    @property
    def features(self) -> int:
        """Values read a step."""
        return _extents(self.weight)[2]

    @property
    def hidden(self) -> int:
        """Hidden units of a direction."""
        return _extents(self.recurrent)[2]


class _Seen(NamedTuple):
    """What calibration knows of the features of one matrix.

    Attributes:
        second: regularized second moments, to find factors with.
        plain: to say what is lost.
        mean: what a bias makes up for is the change of the weight times this; None where nothing does.
    """

    second: Array
    plain: Array
    mean: Array | None


class _Result(NamedTuple):
    """Factors of one matrix: the product is ``left @ right``."""

    left: Array
    right: Array
    error: float
    energy: float
    shift: Array


@dataclass(eq=False)
class _Recurrent(Form):
    """W as two products, R as two weights, or both.

    Attributes:
        layer: the node.
        inputs: W is factored.
        states: R is.
    """

    layer: Layer
    inputs: ClassVar[bool] = True
    states: ClassVar[bool] = False

    @property
    def most(self) -> Ranks:
        layer = self.layer
        read = min(layer.directions * layer.rows, layer.features)
        held = min(layer.rows, layer.hidden)
        return (*((read,) if self.inputs else ()), *((held,) if self.states else ()))

    def needs(self) -> tuple[Need, ...]:
        wanted = (self.layer.seen if self.inputs else None, self.layer.states if self.states else None)
        return tuple(need for need in wanted if need is not None)

    def drawing(self, ranks: Ranks) -> tuple[Drawn, ...]:
        layer, old = self.layer, self.layer.drawn
        stem = next(name for name in old.outputs if name)
        inputs: list[str | Slot | None] = [*old.inputs, *(None,) * (4 - len(old.inputs))]
        drawn: list[Drawn] = []
        if self.inputs:
            low = f"{stem}_low"
            drawn.append(Drawn("MatMul", (inputs[0], self._right(ranks)), (low,)))
            inputs[:2] = low, self._left(ranks)
        if self.states:
            product = f"{stem}_recurrent"
            drawn.append(Drawn("MatMul", self._stored(ranks), (product,)))
            inputs[2] = product
        if layer.shiftable:
            inputs[3] = self._bias
        while inputs[-1] is None:
            inputs.pop()
        return (*drawn, replace(old, inputs=tuple(inputs)))

    def factors(self, ranks: Ranks, evidence: Evidence, settings: Settings) -> Factors:
        layer = self.layer
        read = _moments(layer.seen, layer.features, evidence, settings) if self.inputs else None
        held = _moments(layer.states, layer.directions * layer.hidden, evidence, settings) if self.states else None
        sights = self._sights(read, held, settings)
        matrices = self._matrices()
        # both are observed in one sweep, so the identity of one stands for the other
        bases: list[Basis] = self.remembered(
            held if read is None else read,
            settings,
            lambda: [basis(w, seen.second) for w, seen in zip(matrices, sights, strict=True)],
        )
        made: dict[Slot, npt.NDArray[np.float32]] = {}
        cuts = [ranks[0]] * self.inputs + [ranks[-1]] * (layer.directions * self.states)
        found = [_cut(*each) for each in zip(bases, cuts, matrices, sights, strict=True)]
        shifts = np.zeros((layer.directions, 2, layer.rows))
        if self.inputs:
            made[self._right(ranks)] = _as_stored(found[0].right.T)
            made[self._left(ranks)] = _as_stored(found[0].left.reshape(layer.directions, layer.rows, -1))
            shifts[:, 0] = found[0].shift.reshape(layer.directions, -1)
        if self.states:
            own = found[1:] if self.inputs else found
            left, right = self._stored(ranks)
            made[left], made[right] = _as_stored([r.left for r in own]), _as_stored([r.right for r in own])
            shifts[:, 1] = [r.shift for r in own]
        if layer.shiftable:
            old = 0.0 if layer.offset is None else np.asarray(layer.offset.numpy(), np.float64)
            made[self._bias] = _as_stored(old + shifts.reshape(layer.directions, -1))
        error, energy = sum(r.error for r in found), sum(r.energy for r in found)
        return Factors(made, error / energy if energy > 0 else 0.0)

    def _matrices(self) -> list[Array]:
        """W of all directions on top of each other, then R of each."""
        layer, found = self.layer, []
        if self.inputs:
            found.append(np.asarray(layer.weight.numpy(), np.float64).reshape(-1, layer.features))
        if self.states:
            found += list(np.asarray(layer.recurrent.numpy(), np.float64))
        return found

    def _sights(self, read: SecondMoments | None, held: SecondMoments | None, settings: Settings) -> list[_Seen]:
        """Of each of these matrices."""
        layer, found = self.layer, []
        if self.inputs:
            found.append(_seen(read, slice(None), layer.features, layer.shiftable, settings))
        for d in range(layer.directions * self.states):
            part = slice(d * layer.hidden, (d + 1) * layer.hidden)
            found.append(_seen(held, part, layer.hidden, layer.states_shiftable, settings))
        return found

    def _right(self, ranks: Ranks) -> Slot:
        return Slot((self.layer.features, ranks[0]), "V")

    def _left(self, ranks: Ranks) -> Slot:
        return Slot((self.layer.directions, self.layer.rows, ranks[0]), "W")

    def _stored(self, ranks: Ranks) -> tuple[Slot, Slot]:
        layer, rank = self.layer, ranks[-1]
        return (
            Slot((layer.directions, layer.rows, rank), "R_left"),
            Slot((layer.directions, rank, layer.hidden), "R_right"),
        )

    @property
    def _bias(self) -> Slot:
        return Slot((self.layer.directions, 2 * self.layer.rows), "B")


@dataclass(eq=False)
class _States(_Recurrent):
    """R only."""

    stored: ClassVar[bool] = True
    inputs: ClassVar[bool] = False
    states: ClassVar[bool] = True


@dataclass(eq=False)
class _Both(_Recurrent):
    """W and R."""

    stored: ClassVar[bool] = True
    states: ClassVar[bool] = True


def recurrent_forms(node: ir.Node, view: GraphView) -> tuple[Form, ...]:
    """The forms of an LSTM, GRU or RNN: "input" for W, "recurrent" for R, "both".

    Raises:
        Skip: it has none.
    """
    layer = _layer(node, view)
    bias = 0 if layer.offset is None else layer.offset.size
    read = layer.weight.size + bias if _alone(node, 1) and layer.features >= _LEAST else 0
    held = layer.recurrent.size + bias if _alone(node, 2) and layer.hidden >= _LEAST else 0
    forms: list[Form] = []
    if read:
        forms.append(_Recurrent("input", (layer.node,), read, layer))
    if held:
        forms.append(_States("recurrent", (layer.node,), held, layer))
    if read and held:
        forms.append(_Both("both", (layer.node,), read + held - bias, layer))
    if not forms:
        raise Skip("its weights are read by other nodes, too, or are too small to gain from two factors")
    return tuple(forms)


def _layer(node: ir.Node, view: GraphView) -> Layer:
    inputs = (*node.inputs, *(None,) * (8 - len(node.inputs)))
    data, weight, recurrent = inputs[0], view.weight(inputs[1]), view.weight(inputs[2])
    for tensor, name in ((weight, "W"), (recurrent, "R")):
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 3:
            raise Skip(f"its {name} is no float32 constant of three dimensions")
    if data is None or weight is None or recurrent is None or not any(o.name for o in node.outputs):
        raise Skip("it lacks an input or has no output")
    offset = view.weight(inputs[3])
    shiftable = is_free(node, 3) and (offset is None or offset.dtype == ir.DataType.FLOAT)
    early = node.op_type == "GRU" and not node.attributes.get_int("linear_before_reset", 0)
    directions, _, hidden = _extents(recurrent)
    outside = view.in_subgraph(node)  # what is in a body is not observed
    seen = str(data.name) if not outside and not data.is_initializer() else ""
    states = str(node.outputs[0].name or "") if not outside else ""
    axes = (2 if node.attributes.get_int("layout", 0) else 1, 3)
    return Layer(
        str(node.name),
        redrawn(node),
        weight,
        recurrent,
        offset if shiftable else None,
        shiftable,
        shiftable and not early,
        Need(seen, Statistic.GRAM, -1) if seen and _extents(weight)[2] <= _MOST_FEATURES else None,
        Need(states, Statistic.GRAM, axes=axes) if states and directions * hidden <= _MOST_FEATURES else None,
    )


def _alone(node: ir.Node, index: int) -> bool:
    """Whether nobody else reads the weight, so that it goes when the node does."""
    value = node.inputs[index]
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _moments(need: Need | None, features: int, evidence: Evidence, settings: Settings) -> SecondMoments | None:
    if need is None or not settings.aware or evidence.synthetic or not evidence.has(need):
        return None
    found = evidence.second_moments(need)
    return found if len(found.mean) == features else None


def _seen(moments: SecondMoments | None, part: slice, features: int, shiftable: bool, settings: Settings) -> _Seen:
    if moments is None:
        return _Seen(metric(None, features, 0.0), np.eye(features), None)
    mean = moments.mean[part]
    plain = moments.matrix[part, part]
    if shiftable:
        plain = plain - np.outer(mean, mean)
    return _Seen(metric(plain, features, settings.ridge), plain, mean if shiftable else None)


def _cut(found: Basis, rank: int, weight: Array, seen: _Seen) -> _Result:
    left, right = found.cut(rank)
    change = weight - left @ right
    shift = np.zeros(len(weight)) if seen.mean is None else change @ seen.mean
    error = max(float(np.vdot(change @ seen.plain, change)), 0.0)
    return _Result(left, right, error, float(np.vdot(weight @ seen.plain, weight)), shift)


def _extents(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor.shape.numpy())


def _as_stored(array: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(array, np.float32)
