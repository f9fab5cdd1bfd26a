"""Coupler: what operators have said about axes, and what follows from it.

Three kinds of statement come in: these axes read row-major are the same positions as those, this axis is
these positions of that one, nobody may touch this axis. Reshapes split axes into factors; the split is
carried along all statements until nothing changes, and where two splits do not nest the axes are pinned.
Then each factor is a node of a networkx graph, and every statement some edges.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.coupling.axes import Axis, Factor, Strides, factors, regroup
from onnxcompress.coupling.groups import Pin, Reader
from onnxcompress.coupling.statements import Pick, Same, split_pick, split_same
from onnxcompress.errors import CouplingError
from onnxcompress.view import GraphView

__all__ = ["CONSEQUENCES", "PRIVATE", "Coupler", "Operand"]

PRIVATE = 1 << 14
"""A weight of at most so many elements that several nodes read is copied for each, so that they are free."""

Indices = npt.NDArray[np.int64]
_REGROUPED = "two operators split it into blocks that do not nest"
_APART = "its parts do not line up with the blocks that a Reshape makes of it"
CONSEQUENCES = (_REGROUPED, _APART)
"""Reasons that follow from what several operators say, and so tell less than others."""


@dataclass(frozen=True)
class Operand:
    """A tensor at an input or output of a node.

    Attributes:
        value: behind it.
        shape: its concrete shape.
        use: see :class:`~onnxcompress.coupling.axes.Axis`.
        constant: it is a weight.
    """

    value: ir.Value
    shape: tuple[int, ...]
    use: str = ""
    constant: bool = False

    def __getitem__(self, index: int) -> Axis:
        """An axis; may be negative."""
        return Axis(str(self.value.name), range(len(self.shape))[index], self.use)

    def __len__(self) -> int:
        return len(self.shape)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes."""
        return tuple(self[i] for i in range(len(self.shape)))


class Coupler:
    """Collects statements about one model.

    Args:
        view: the model.
        shapes: concrete shapes by value name, as in a run.

    Attributes:
        opset: of the standard operators.
        readers: linear operators, as they told.
        apart: readers that work on blocks one by one, and the axis of the blocks: along that they do not sum.
        units: what positions are called, by axis, where a rule knows.
    """

    def __init__(self, view: GraphView, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.view, self.opset = view, view.opset
        self.readers: list[Reader] = []
        self.apart: dict[Reader, Axis] = {}
        self.units: dict[Axis, str] = {}
        self.pins: list[Pin] = []
        self.unweighted: dict[Axis, list[str]] = {}
        self._shapes = shapes
        self._sizes: dict[Axis, int] = {}
        self._chains: dict[Axis, Strides] = {}
        self._statements: list[Same | Pick] = []
        self._about: dict[Axis, list[int]] = {}
        self._dead: set[int] = set()
        self._fixed: list[tuple[Axis, int, str, str]] = []

    # --- what rules ask --------------------------------------------------------------------------

    def input(self, node: ir.Node, index: int) -> Operand | None:
        """The tensor at an input; None if it is left out."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        use, constant = "", value.is_initializer()
        if constant and len(value.uses()) > 1 and value.const_value is not None:
            use = f"{node.name}:{index}" if value.const_value.size <= PRIVATE else ""
        return self._operand(value, use, constant)

    def data(self, node: ir.Node, index: int = 0) -> Operand:
        """An input that has to be there.

        Raises:
            CouplingError: it is not.
        """
        found = self.input(node, index)
        if found is None:
            raise CouplingError(
                f"input {index} of {node.op_type} {node.name!r} is missing", hint="the model is invalid"
            )
        return found

    def output(self, node: ir.Node, index: int = 0) -> Operand:
        """The tensor at an output."""
        return self._operand(node.outputs[index], "", False)

    def outputs(self, node: ir.Node) -> list[Operand]:
        """All outputs that are asked for."""
        return [self._operand(v, "", False) for v in node.outputs if v.name]

    def array(self, node: ir.Node, index: int) -> npt.NDArray[np.generic] | None:
        """The constant at an input; None if it is left out or computed."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return self.view.array(value)

    def size(self, axis: Axis) -> int:
        """Positions of an axis."""
        return self._sizes[axis]

    def operand(self, value: ir.Value) -> Operand:
        """Any tensor that is no weight."""
        return self._operand(value, "", False)

    def length(self, node: ir.Node, index: int) -> int | None:
        """Elements of a list at an input; None if that is not known."""
        value = node.inputs[index] if index < len(node.inputs) else None
        shape = None if value is None else self.shape(value)
        return shape[0] if shape is not None and len(shape) == 1 else None

    def pick_fixed(self, whole: Axis, position: int, node: ir.Node, reason: str) -> None:
        """One position of an axis has to stay."""
        self._fixed.append((whole, position, str(node.name), reason))

    def _operand(self, value: ir.Value, use: str, constant: bool) -> Operand:
        shape = self.shape(value)
        if shape is None:
            raise CouplingError(f"the shape of {value.name!r} is not known")
        operand = Operand(value, shape, use, constant)
        for axis, size in zip(operand.axes, shape, strict=True):
            self._sizes[axis] = size
        return operand

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """Concrete shape of a value, where known."""
        if value.is_initializer() and value.const_value is not None:
            return tuple(int(d) for d in value.const_value.shape.numpy())
        return self._shapes.get(str(value.name))

    # --- what rules say --------------------------------------------------------------------------

    def virtual(self, node: ir.Node, what: str, size: int, unit: str = "") -> Axis:
        """An axis of no tensor: a number of groups, of gates.

        Args:
            node: has it.
            what: tells it from others of the node.
            size: how many.
            unit: what they are called, in the plural, where the group has them.
        """
        axis = Axis(f"{node.name}:{what}", -1)
        self._sizes[axis] = size
        if unit:
            self.units[axis] = unit
        return axis

    def same(self, a: Axis, b: Axis, node: ir.Node | None = None) -> None:
        """Two axes are the same positions; one of size 1 is broadcast and says nothing."""
        left, right = self._sizes[a], self._sizes[b]
        if left == 1 or right == 1:
            return
        if left != right:
            self.pin(a, node, f"{left} positions meet {right}")
            self.pin(b, node, f"{left} positions meet {right}")
            return
        self._add(Same("" if node is None else str(node.name), (a,), (b,)))

    def product(self, left: Sequence[Axis], right: Sequence[Axis], node: ir.Node) -> None:
        """Axes read row-major are the same positions as other axes read row-major."""
        left = tuple(a for a in left if self._sizes[a] != 1)
        right = tuple(a for a in right if self._sizes[a] != 1)
        if math.prod(map(self.size, left)) != math.prod(map(self.size, right)):
            for axis in (*left, *right):
                self.pin(axis, node, "its sizes do not multiply to the same")
        elif left:
            self._add(Same(str(node.name), left, right))

    def reshaped(self, before: Operand, after: Operand, node: ir.Node) -> None:
        """The same elements in another shape."""
        for left, right in regroup(before.shape, after.shape):
            self.product([before[i] for i in left], [after[j] for j in right], node)

    def pick(self, part: Axis, whole: Axis, indices: npt.ArrayLike, node: ir.Node) -> None:
        """Position i of one axis is position ``indices[i]`` of the other."""
        self._add(Pick(str(node.name), part, whole, np.asarray(indices, np.int64)))

    def block(self, part: Axis, whole: Axis, start: int, node: ir.Node) -> None:
        """An axis is a run of positions of another."""
        size = self._sizes[part]
        if size == self._sizes[whole]:
            self.same(part, whole, node)
        else:
            self.pick(part, whole, np.arange(start, start + size), node)

    def elementwise(self, node: ir.Node, inputs: Iterable[Operand | None], output: Operand) -> None:
        """Axes are the same from the right, as in broadcasting."""
        for operand in inputs:
            if operand is not None:
                for k in range(1, min(len(operand), len(output)) + 1):
                    self.same(operand[-k], output[-k], node)

    def hand_on(self, inner: ir.Value, outer: ir.Value, node: ir.Node) -> bool:
        """A value leaves a body under another name; axes of size 1 may come or go. False if the shapes differ."""
        if self.shape(inner) is None or self.shape(outer) is None:
            return False
        left, right = ([a for a in self.operand(v).axes if self._sizes[a] != 1] for v in (inner, outer))
        if [self._sizes[a] for a in left] != [self._sizes[a] for a in right]:
            return False
        for a, b in zip(left, right, strict=True):
            self.same(a, b, node)
        return True

    def pin(self, axis: Axis, node: ir.Node | None, reason: str) -> None:
        """All positions of an axis have to stay."""
        if self._sizes.get(axis) != 1:
            self.pins.append(Pin(axis, "" if node is None else str(node.name), reason))

    def ignore(self, axis: Axis) -> None:
        """An axis that is no question: the extent of a window."""
        self._sizes.pop(axis, None)

    def pin_all(self, node: ir.Node, reason: str) -> None:
        """Everything a node reads and makes has to stay as it is."""
        for index, value in enumerate(node.inputs):
            if value is not None and self.shape(value) is not None and (operand := self.input(node, index)) is not None:
                for axis in operand.axes:
                    self.pin(axis, node, reason)
        for value in node.outputs:
            if value.name and self.shape(value) is not None:
                for axis in self._operand(value, "", False).axes:
                    self.pin(axis, node, reason)

    def sums_data(self, node: ir.Node, *axes: Axis) -> None:
        """A node sums over axes of computed values, so that no weight can make up for what is removed."""
        for axis in axes:
            self.unweighted.setdefault(axis, []).append(str(node.name))

    def sums(
        self, node: ir.Node, index: int, weight: Axis, data: Axis | None, outputs: int, apart: Axis | None = None
    ) -> None:
        """The weight at an input is summed over along an axis: it can make up for what is removed.

        Args:
            node: multiplies.
            index: the weight's place among its inputs.
            weight: the axis summed over.
            data: that of what it is multiplied with; None where there is no such value, or just a part of it.
            outputs: the axis of the weight that makes the output.
            apart: the blocks, if it sums over each of them for itself.
        """
        reader = Reader(str(node.name), index, weight, data, outputs)
        self.readers.append(reader)
        if apart is not None:
            self.apart[reader] = apart

    def _add(self, statement: Same | Pick) -> None:
        number = len(self._statements)
        self._statements.append(statement)
        for axis in statement.axes:
            self._about.setdefault(axis, []).append(number)

    # --- factors ---------------------------------------------------------------------------------

    def settle(self) -> None:
        """Splits axes into factors until every statement is one about whole factors."""
        waiting = deque(range(len(self._statements)))
        queued = set(waiting)
        while waiting:
            number = waiting.popleft()
            queued.discard(number)
            if number in self._dead:
                continue
            statement = self._statements[number]
            if isinstance(statement, Same):
                found = split_same(statement, self._sizes, self._chains)
            else:
                found = split_pick(statement, self._sizes, self._chains)
            if found is None:
                self._dead.add(number)
                for axis in statement.axes:
                    self.pins.append(Pin(axis, statement.node, _REGROUPED))
                continue
            for axis, strides in found.items():
                if strides != self._chains.get(axis, ()):
                    self._chains[axis] = strides
                    again = [n for n in self._about[axis] if n not in queued]
                    waiting.extend(again)
                    queued.update(again)

    # --- the graph -------------------------------------------------------------------------------

    def factors(self, axis: Axis) -> tuple[int, ...]:
        """Sizes of the factors of an axis, outermost first; after :meth:`settle`."""
        return factors(self._sizes[axis], self._chains.get(axis, ()))

    def graph(self) -> nx.Graph:
        """Nodes: :class:`Factor` with ``size``; edges with ``maps``: (from, to, None for in order or two index arrays).

        The node attribute ``pins`` lists why all positions of a factor have to stay, ``fixed`` single ones.
        """
        graph = nx.Graph()
        for axis, size in self._sizes.items():
            if size > 1:
                for place, count in enumerate(self.factors(axis)):
                    graph.add_node(Factor(axis, place), size=count, pins=[], fixed=[])
        for number, statement in enumerate(self._statements):
            if number in self._dead:
                continue
            if isinstance(statement, Same):
                left, right = (self._places(side) for side in (statement.left, statement.right))
                for a, b in zip(left, right, strict=True):
                    self._link(graph, a, b, None, statement.node)
            else:
                self._link_pick(graph, statement)
        for pin in self.pins:
            for place in range(len(self.factors(pin.axis))) if self._sizes.get(pin.axis, 1) > 1 else ():
                graph.nodes[Factor(pin.axis, place)]["pins"].append(pin)
        for axis, position, node, reason in self._fixed:
            sizes = self.factors(axis)
            for place, count in enumerate(sizes):
                at = position // math.prod(sizes[place + 1 :]) % count
                if count > 1:
                    graph.nodes[Factor(axis, place)]["fixed"].append((at, Pin(axis, node, reason)))
        return graph

    def _places(self, axes: Sequence[Axis]) -> list[Factor]:
        return [Factor(axis, place) for axis in axes for place in range(len(self.factors(axis)))]

    def _link(self, graph: nx.Graph, a: Factor, b: Factor, maps: tuple[Indices, Indices] | None, node: str) -> None:
        if a == b:
            return
        if graph.has_edge(a, b):
            graph.edges[a, b]["maps"].append((a, b, maps))
        else:
            graph.add_edge(a, b, node=node, maps=[(a, b, maps)])

    def _link_pick(self, graph: nx.Graph, statement: Pick) -> None:
        part, whole = statement.part, statement.whole
        small, large = self.factors(part), self.factors(whole)
        inner = len(small) - 1
        for k in range(1, inner + 1):
            self._link(graph, Factor(part, len(small) - k), Factor(whole, len(large) - k), None, statement.node)
        stride = math.prod(small[1:])
        starts = statement.indices[::stride] // stride
        level = len(large) - 1 - inner
        positions = starts % large[level]
        maps = (np.arange(small[0]), positions)
        if small[0] > 1:
            self._link(graph, Factor(part, 0), Factor(whole, level), maps, statement.node)
        for place in range(level):
            graph.nodes[Factor(whole, place)]["pins"].append(Pin(whole, statement.node, _APART))
