"""What is known of every channel of every value before the model ever runs: that it is a constant, or equal to another.

A linear operator without a weight for a channel makes its bias; elementwise operators work on constants as on any
number (onnxruntime computes them); what moves elements moves states. Labels are value numbers: of the operator, its
weights for the channel, and the labels of what it reads. An end is where a channel is summed over, so that others see
it. What an operator that is not known here does with channels is unknown, so those it touches are left alone.

Values are taken to be finite: an infinity times a weight of zero is not zero.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.coupling import Axis, Coupling, Group, Part
from onnxcompress.errors import ModelRunError
from onnxcompress.passes._channel_states import End, State, by_position, common, whole
from onnxcompress.passes._dead_look import RECURRENT, linear_axes
from onnxcompress.view import GraphView

__all__ = ["ChannelValues"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Carried = dict[int, Part]

_ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu",
        "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow",
        "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum",
        "Swish", "Tanh", "ThresholdedRelu", "Where",
    }
)  # fmt: skip
_MOVES = frozenset(
    {
        "Concat", "Dropout", "Expand", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool", "Identity",
        "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
_KEEPS_ZERO = frozenset({"AveragePool", "GlobalLpPool", "LpPool", "ReduceL1", "ReduceL2", "ReduceSum", "Resize"})
_SLICEWISE = frozenset({"ArgMax", "ArgMin", "LayerNormalization", "LogSoftmax", "ReduceProd", "Softmax"})
_BLIND = frozenset({"Shape", "Size"})
_USUAL = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


class ChannelValues:
    """One forward look over a model.

    Args:
        view: the model.
        coupling: its groups.
        labels: tell which channels are equal; without, every label is another.

    Attributes:
        ends: by group, in execution order.
        refused: groups left alone, and why.
    """

    def __init__(self, view: GraphView, coupling: Coupling, *, labels: bool = True) -> None:
        self._view, self._coupling, self._labelled = view, coupling, labels
        self._weights = {str(v.name) for v in view.weights()}
        self.ends: dict[Group, list[End]] = defaultdict(list)
        self.refused: dict[Group, str] = {}
        self._states: dict[tuple[Group, str], State] = {}
        self._silent: dict[Axis, Mask] = {}
        self._ids: dict[Hashable, int] = {}
        self._carried: dict[Group, dict[tuple[str, str], Carried]] = {}
        groups_of: dict[str, list[Group]] = defaultdict(list)
        for group in coupling.groups:
            if not group.pinned and self._index(group):
                for name in group.nodes:
                    groups_of[name].append(group)
        for node in view.nodes():
            for group in groups_of[str(node.name)]:
                if group not in self.refused:
                    self._visit(node, group)

    def _index(self, group: Group) -> bool:
        carried: dict[tuple[str, str], Carried] = defaultdict(dict)
        for part in group.parts:
            axis = part.factor.axis
            if axis.dim in carried[axis.value, axis.use]:
                self.refused[group] = f"two factors of {axis} go together"
                return False
            carried[axis.value, axis.use][axis.dim] = part
        diagonal = next((v for (v, _), dims in carried.items() if len(dims) > 1 and v not in self._weights), None)
        if diagonal is not None:
            self.refused[group] = f"two axes of {diagonal!r} go together"
            return False
        self._carried[group] = dict(carried)
        return True

    # --- what carries a group --------------------------------------------------------------------

    def _input(self, node: ir.Node, index: int, group: Group) -> Carried:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return {}
        carried = self._carried[group]
        return carried.get((str(value.name), f"{node.name}:{index}")) or carried.get((str(value.name), "")) or {}

    def _output(self, node: ir.Node, index: int, group: Group) -> Carried:
        return self._carried[group].get((str(node.outputs[index].name), "")) or {}

    def _visit(self, node: ir.Node, group: Group) -> None:
        inputs = [i for i in range(len(node.inputs)) if self._input(node, i, group)]
        if node.op_type == "ConstantOfShape":
            self._filled(node, group)
        if not inputs or node.op_type in _BLIND:
            return
        handler = None if node.domain else self._handler(node)
        if handler is None:
            self._refuse(group, node, "is not looked through")
        else:
            handler(node, group)

    def _handler(self, node: ir.Node) -> Callable[[ir.Node, Group], None] | None:
        op = node.op_type
        if op == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
            return None  # it may be training
        if op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return self._product if linear_axes(node, self._view) is None else self._linear
        if op in RECURRENT:
            return self._recurrent
        if op in _ELEMENTWISE:
            return self._elementwise
        if op in _MOVES or op in _KEEPS_ZERO or op in _SLICEWISE or op == "Pad":
            return self._moved
        return self._normalized if op in ("BatchNormalization", "InstanceNormalization") else None

    def _refuse(self, group: Group, node: ir.Node, why: str) -> None:
        self.refused[group] = f"{node.op_type} {node.name!r} {why}"

    # --- states ----------------------------------------------------------------------------------

    def _label(self, *key: Hashable) -> int:
        return self._ids.setdefault(key, len(self._ids))

    def _labels(self, group: Group, what: Hashable, *labels: Indices) -> Indices:
        """Labels of what is a function of things with these labels."""
        if not self._labelled:
            return np.arange(group.size)
        return np.array([self._label(what, *row) for row in zip(*(v.tolist() for v in labels), strict=True)], np.int64)

    def _unknown(self, group: Group, carried: Carried) -> State:
        labels = np.full(group.size, -1, np.int64)
        for part in carried.values():
            for atom in part.atoms.tolist():
                labels[atom] = self._label("fresh", len(self._ids))
        return State(np.full(group.size, np.nan), labels)

    def _operand(self, node: ir.Node, index: int, group: Group, dim: int | None = None) -> State:
        """State of an input; of a constant along one of its axes."""
        value = node.inputs[index]
        if value is None:
            raise ValueError(f"input {index} of {node.name!r} is left out")
        carried, array = self._input(node, index, group), self._view.array(value)
        if array is None:
            known = self._states.get((group, str(value.name)))
            if known is not None or carried:
                return known or self._unknown(group, carried)
            same = self._label("value", value.name)
            return State(np.full(group.size, np.nan), np.full(group.size, same, np.int64))
        if not carried:
            flat = array.reshape(-1)
            number = float(flat[0]) if flat.size and array.dtype.kind == "f" and (flat == flat[0]).all() else np.nan
            same = self._label("value", value.name)
            return State(np.full(group.size, number), np.full(group.size, same, np.int64))
        if dim is None and len(carried) > 1:
            return self._unknown(group, carried)
        dim = next(iter(carried)) if dim is None else dim
        return self._of_rows(by_position(array, dim, carried[dim], self._coupling), carried[dim], group)

    def _of_rows(self, rows: Array, part: Part, group: Group) -> State:
        rows = rows.reshape(len(rows), -1)
        if not rows.size or rows.dtype.kind != "f":
            return self._unknown(group, {0: part})
        numbers = np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0].astype(np.float64), np.nan)
        labels = np.full(group.size, -1, np.int64)
        for atom, row in () if not self._labelled else zip(part.atoms.tolist(), rows, strict=True):
            labels[atom] = self._label(int(labels[atom]), hashlib.blake2b(row.tobytes(), digest_size=16).digest())
        return State(common([(numbers, part)], group.size), labels)

    def _set(self, value: ir.Value, state: State, group: Group) -> None:
        self._states[group, str(value.name)] = state
        for dim, part in self._carried[group].get((str(value.name), ""), {}).items():
            axis = Axis(str(value.name), dim)
            zero = whole(state.zero[part.atoms], part, self._coupling)
            self._silent[axis] = self._silent.get(axis, np.zeros(len(zero), bool)) | zero

    # --- operators -------------------------------------------------------------------------------

    def _linear(self, node: ir.Node, group: Group) -> None:
        found = linear_axes(node, self._view)
        if found is None:
            return
        data, index, summed, makes = found
        weight = self._view.array(node.inputs[index])
        if weight is None or weight.dtype.kind != "f":
            self._refuse(group, node, "has a weight that is no array of floats")
            return
        conv = node.op_type in ("Conv", "ConvTranspose")
        filters, x, out = self._input(node, index, group), self._input(node, data, group), node.outputs[0]
        if conv and (f"{node.name}:groups", "") in self._carried[group]:
            self._grouped(node, group, filters)
            return
        inner = self._summed_axis(node, data)
        state, bias = self._operand(node, data, group), self._bias(node, group)
        if summed in filters:
            self.ends[group].append(End(str(node.name), state, state.zero, index, filters[summed], makes))
        elif inner in x:
            self._refuse(group, node, "sums over it in a way not known")
        elif x and makes not in filters:  # rows, batches
            constant = np.where(state.zero & (node.op_type == "MatMul"), 0.0, np.nan)
            self._set(out, State(constant, self._labels(group, node.name, state.label, bias.label)), group)
        if makes in filters:
            if summed != makes and not (conv and node.attributes.get_int("group", 1) > 1):
                value = node.inputs[data]
                silent = self._silent.get(Axis(str(None if value is None else value.name), inner))
                live = weight if silent is None else np.compress(~silent, weight, axis=summed)
            else:
                live = weight
            self._made(
                node, group, filters[makes], by_position(live, makes, filters[makes], self._coupling), weight, makes
            )

    def _made(self, node: ir.Node, group: Group, part: Part, rows: Array, weight: Array, makes: int) -> None:
        """Nothing but the bias, where weights are zero."""
        silent = np.ones(group.size, bool)
        silent[part.atoms[rows.any(axis=tuple(range(1, rows.ndim)))]] = False
        bias = self._bias(node, group)
        own = self._of_rows(by_position(weight, makes, part, self._coupling), part, group)
        labels = self._labels(group, node.name, own.label, bias.label)
        self._set(node.outputs[0], State(np.where(silent, bias.constant, np.nan), labels), group)

    def _grouped(self, node: ir.Node, group: Group, filters: Carried) -> None:
        """Every atom goes through filters of its own."""
        if len(filters) != 1:
            self._refuse(group, node, "ties filters to themselves")
            return
        ((dim, _),) = filters.items()
        x, w, bias = self._operand(node, 0, group), self._operand(node, 1, group, dim), self._bias(node, group)
        constant = np.where(x.zero | w.zero, bias.constant, np.nan)
        self._set(node.outputs[0], State(constant, self._labels(group, node.name, x.label, w.label, bias.label)), group)

    def _bias(self, node: ir.Node, group: Group) -> State:
        if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
            return State(np.zeros(group.size), np.zeros(group.size, np.int64))
        state = self._operand(node, 2, group)
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        return State(state.constant * beta, state.label)

    def _summed_axis(self, node: ir.Node, index: int) -> int:
        """Axis of a factor that a product sums over."""
        if node.op_type in ("Conv", "ConvTranspose"):
            return 1
        if node.op_type == "Gemm":
            turned = int(node.attributes.get_int("transB" if index else "transA", 0) != 0)
            return turned if index else 1 - turned
        value, rank = node.inputs[index], 0
        if value is not None and value.const_value is not None:
            rank = len(value.const_value.shape)
        elif value is not None:
            rank = next(k for k in range(64) if Axis(str(value.name), k) not in self._coupling.sizes)
        return max(rank - 2, 0) if index else rank - 1

    def _product(self, node: ir.Node, group: Group) -> None:
        """Two computed values, or stacks of matrices."""
        if node.op_type not in ("MatMul", "Gemm"):
            self._refuse(group, node, "has a weight that is computed")
            return
        carried = [self._input(node, i, group) for i in (0, 1)]
        states = [self._operand(node, i, group) for i in (0, 1)]
        inner = [self._summed_axis(node, i) in carried[i] for i in (0, 1)]
        if any(len(c) > 1 for c in carried) or inner[0] != inner[1]:
            self._refuse(group, node, "multiplies it with itself")
            return
        zero = np.zeros(group.size, bool)
        for state, c in zip(states, carried, strict=True):
            zero |= state.zero & bool(c)
        if all(inner):
            self.ends[group].append(End(str(node.name), states[0], zero))
        bias = self._bias(node, group)
        if not all(inner) and any(carried):
            constant = np.where(zero, bias.constant, np.nan)
            labels = self._labels(group, node.name, *(s.label for s in states), bias.label)
            self._set(node.outputs[0], State(constant, labels), group)

    def _elementwise(self, node: ir.Node, group: Group) -> None:
        present = [i for i, v in enumerate(node.inputs) if v is not None]
        states = {i: self._operand(node, i, group) for i in present}
        labels = self._labels(group, node.name, *(s.label for s in states.values()))
        constant = np.full(group.size, np.nan)
        known = np.all([np.isfinite(s.constant) for s in states.values()], axis=0)
        if node.op_type == "Where":
            same = states[1].constant == states[2].constant
            constant[same] = states[1].constant[same]
        elif known.any() and all(self._float(node.inputs[i]) for i in present) and self._float(node.outputs[0]):
            constant[known] = self._evaluated(node, states, known, group)
        if node.op_type == "Mul":
            constant[states[0].zero | states[1].zero] = 0
        self._set(node.outputs[0], State(constant, labels), group)

    def _float(self, value: ir.Value | None) -> bool:
        return self._view.dtype(value) == ir.DataType.FLOAT

    def _evaluated(self, node: ir.Node, states: dict[int, State], known: Mask, group: Group) -> Array:
        given: dict[str | None, Array] = {}
        for index, state in states.items():
            value, array = node.inputs[index], self._view.array(node.inputs[index])
            if value is not None and (array is None or array.size != 1):
                given[value.name] = state.constant[known].astype(np.float32)
        try:
            (found,) = self._view.compute([node.outputs[0]], given)
        except ModelRunError:  # it does not run on a vector: what it makes is not known
            return np.full(int(known.sum()), np.nan)
        return np.asarray(found, np.float64)

    def _filled(self, node: ir.Node, group: Group) -> None:
        """One number everywhere, 0 by default (initial states of recurrent operators)."""
        given = node.attributes.get("value")
        number = 0.0 if given is None else float(given.as_tensor().numpy().reshape(-1)[0])
        same = np.full(group.size, self._label(node.name), np.int64)
        self._set(node.outputs[0], State(np.full(group.size, number), same), group)

    def _moved(self, node: ir.Node, group: Group) -> None:
        """Elements change places, or meet others of their own channel."""
        sources = range(len(node.inputs)) if node.op_type == "Concat" else (0,)
        if any(self._input(node, i, group) for i in range(len(node.inputs)) if i not in sources):
            self._refuse(group, node, "is told by it where to look")
            return
        states = [(self._operand(node, i, group), self._input(node, i, group)) for i in sources]
        parts = [(s, part) for s, carried in states for part in carried.values()]
        constant = common([(s.constant[p.atoms], p) for s, p in parts], group.size)
        if node.op_type in _KEEPS_ZERO or node.op_type in _SLICEWISE or node.op_type == "Pad":
            constant = self._kept(node, constant)
        for place, value in enumerate(node.outputs):
            if value.name:
                labels = self._labels(group, (node.name, place), *(s.label for s, _ in states))
                first = place == 0 or node.op_type == "Split"  # the others are masks and places
                self._set(value, State(constant if first else np.full(group.size, np.nan), labels), group)

    def _kept(self, node: ir.Node, constant: Array) -> Array:
        kept = 0.0 if node.op_type in _KEEPS_ZERO else np.nan
        if node.op_type == "Resize" and node.attributes.get_float("extrapolation_value", 0.0) != 0:
            kept = np.nan
        if node.op_type == "Pad":
            if node.attributes.get_string("mode", "constant") != "constant":
                return constant
            given = self._view.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
            kept = node.attributes.get_float("value", 0.0) if len(node.inputs) < 3 or node.inputs[2] is None else np.nan
            kept = float(given.reshape(-1)[0]) if given is not None and given.size == 1 else kept
        return np.where(constant == kept, constant, np.nan)

    def _normalized(self, node: ir.Node, group: Group) -> None:
        """(x - mean) / deviation x scale + bias, by channel."""
        states = [self._operand(node, i, group) for i in range(len(node.inputs))]
        x, scale, bias = states[:3]
        constant = np.where(scale.zero, bias.constant, np.nan)
        if node.op_type == "BatchNormalization":
            mean, variance = states[3].constant, states[4].constant
            with np.errstate(invalid="ignore", divide="ignore"):
                deviation = np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
                affine = (x.constant - mean) / deviation * scale.constant + bias.constant
            constant = np.where(scale.zero, constant, affine)
        else:
            constant = np.where(x.zero, bias.constant, constant)
        labels = self._labels(group, node.name, *(s.label for s in states))
        self._set(node.outputs[0], State(constant, labels), group)

    def _recurrent(self, node: ir.Node, group: Group) -> None:
        """Hidden units: zero where nothing gets into the cell."""
        weights = [self._view.array(v) for v in node.inputs[1:3]]
        if any(w is None or w.dtype.kind != "f" for w in weights):
            self._refuse(group, node, "has weights that are computed")
            return
        state = self._units(node, group)
        for index, data in ((1, self._operand(node, 0, group)), (2, state)):
            carried = self._input(node, index, group)
            if 2 in carried and data is not None:
                self.ends[group].append(End(str(node.name), data, data.zero, index, carried[2], 1))
            elif 2 in carried:
                self._refuse(group, node, "has states not known")

    def _units(self, node: ir.Node, group: Group) -> State | None:
        if (f"{node.name}:hidden units", "") not in self._carried[group]:
            return None
        operands = [i for i in (1, 2, 3, 5, 6, 7) if self._input(node, i, group)]
        states: list[State] = []
        silent = np.full(group.size, _plain(node))
        for i in operands:
            array, carried = self._view.array(node.inputs[i]), self._input(node, i, group)
            if i in (5, 6):  # initial states
                states.append(self._operand(node, i, group))
                silent &= states[-1].zero
                continue
            if array is None or 1 not in carried or len(self._coupling.factors(carried[1].factor.axis)) != 2:
                self._refuse(group, node, "has weights in blocks, or computed ones")
                return None
            states.append(self._operand(node, i, group, 1))
            if i != 7:  # peepholes look at the cell, which is zero
                rows = by_position(array, 1, carried[1], self._coupling)  # (units, directions, gates ...)
                gates = [RECURRENT[node.op_type] - 1 + k for k in range(0, rows.shape[2], RECURRENT[node.op_type])]
                np.logical_and.at(silent, carried[1].atoms, ~rows[:, :, gates].any(axis=tuple(range(1, rows.ndim))))
        labels = self._labels(group, node.name, *(s.label for s in states))
        state = State(np.where(silent, 0.0, np.nan), labels)
        for value in node.outputs:
            if value.name:
                self._set(value, state, group)
        return state


def _plain(node: ir.Node) -> bool:
    """Whether the activations of a recurrent operator are the usual ones, which leave zero at zero."""
    given, usual = tuple(node.attributes.get_strings("activations", ())), _USUAL[node.op_type]
    return given == usual * (len(given) // len(usual))
