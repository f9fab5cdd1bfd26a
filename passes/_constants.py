"""What of a graph is constant, and where it is worth writing down; see ``fold_constants``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip, Skipped
from onnxcompress.passes._shape_arithmetic import SMALL, shape_arithmetic
from onnxcompress.view import QUANTIZED_OPS, GraphView, body_nodes

__all__ = ["RANDOM_OPS", "ConstantPlan", "Fold", "growth"]

RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_UNBOUNDED = frozenset(
    {"CenterCropPad", "ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"}
)
_MOST = 2**28  # bytes of one intermediate value


@dataclass(frozen=True, eq=False)
class Fold:
    """What :meth:`FoldConstants.apply` must know of the plan: static shapes, by name, and bytes that go."""

    given: Mapping[str | None, npt.NDArray[Any]]
    freed: int


@dataclass
class ConstantPlan:
    """What of a graph is constant, and where it is worth writing down."""

    view: GraphView
    max_growth: int
    values: dict[ir.Value, npt.NDArray[np.float64]] = field(default_factory=dict)  # NaN where unknown
    constant: set[ir.Value] = field(default_factory=set)
    order: dict[ir.Node, int] = field(default_factory=dict)
    last: list[ir.Node] = field(default_factory=list)
    branches: list[ir.Node] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @classmethod
    def of(cls, view: GraphView, max_growth: int) -> ConstantPlan:
        plan = cls(view, max_growth)
        for value in view.weights():
            tensor = view.weight(value)
            if tensor is not None:
                plan.constant.add(value)
                if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.size <= SMALL:
                    plan.values[value] = np.clip(tensor.numpy().astype(np.float64), -(2.0**40), 2.0**40)
        trusted = set(_unconditional(view.model.graph))
        for position, node in enumerate(view.nodes()):
            plan.order[node] = position
            plan._visit(node, trusted)
        vanishing = {inner for branch in plan.branches for inner in body_nodes(branch)}
        plan.branches = [n for n in plan.branches if n not in vanishing]
        plan._settle([n for n in view.nodes() if n not in vanishing and plan._is_last(n)])
        return plan

    def _visit(self, node: ir.Node, trusted: set[ir.Graph]) -> None:
        if node.domain == "" and len(node.outputs) == 1 and not node.outputs[0].is_graph_output():
            extents = shape_arithmetic(node, self.view, self.values, trusted)
            if extents is not None:
                self.values[node.outputs[0]] = extents
                if not np.isnan(extents).any():
                    self.constant.add(node.outputs[0])
                return
        if node.op_type == "If" and node.domain == "":
            if node.inputs[0] in self.constant:
                self.branches.append(node)
            return
        if not node.inputs or any(v is not None and v not in self.constant for v in node.inputs):
            return
        reason = self._refusal(node)
        if reason:
            self.skipped.append(Skipped(str(node.name), reason))
        else:
            self.constant.update(node.outputs)

    def _refusal(self, node: ir.Node) -> str:
        if node.domain != "":
            return f"an operator of domain {node.domain!r}"
        if node.op_type in QUANTIZED_OPS:
            return "it keeps weights in a small type"
        if node.op_type in RANDOM_OPS:
            return "it draws random numbers"
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return "it has a body"
        if "Sequence" in node.op_type or "Optional" in node.op_type:
            return "its value is no tensor"
        if any(v.is_graph_output() for v in node.outputs):
            return "its value is an output of the graph"
        size = self._size(node)
        if size is None and node.op_type in _UNBOUNDED:
            return "the size of its value is not known beforehand"
        return f"its value has {size} bytes" if size is not None and size > _MOST else ""

    def _is_last(self, node: ir.Node) -> bool:
        """Whether a constant node has a reader that is none."""
        return any(
            not user.outputs or user.outputs[0] not in self.constant
            for value in node.outputs
            if value in self.constant
            for user, _ in value.uses()
        )

    def _settle(self, candidates: list[ir.Node]) -> None:
        """Keeps what does not make the file larger; of the rest, tries what comes before."""
        tried = set(candidates)
        asked = list(candidates)
        while asked:
            node = asked.pop()
            size, freed = self._size(node), self.freed(node)
            if size is None or size <= freed + self.max_growth or node.outputs[0] in self.values:
                self.last.append(node)
                continue
            self.constant.difference_update(node.outputs)
            if node in candidates:
                self.skipped.append(Skipped(str(node.name), growth(size, freed)))
            before = {v.producer() for v in node.inputs if v is not None and v in self.constant} - {None}
            more = [n for n in self.order if n in before and n not in tried]
            tried.update(more)
            asked.extend(more)
        self.last.sort(key=self.order.__getitem__)

    def _size(self, node: ir.Node) -> int | None:
        total = 0
        for value in node.outputs:
            shape, dtype = self.view.shape(value), self.view.dtype(value)
            extents = [d for d in shape or () if isinstance(d, int)]
            if shape is None or dtype is None or len(extents) < len(shape):
                return None
            total += -(-math.prod(extents) * dtype.bitwidth // 8) if value.uses() else 0
        return total

    def freed(self, node: ir.Node) -> int:
        """Bytes of weights nobody reads any more once a node is replaced by its value."""
        gone: set[ir.Node] = set()
        for n in reversed(self.cone(node)):
            if n is node or all(user in gone for v in n.outputs for user, _ in v.uses()):
                gone.add(n)
        weights = {v for n in gone for v in n.inputs if v is not None and v.is_initializer()}
        return sum(
            w.const_value.nbytes for w in weights if w.const_value is not None and all(u in gone for u, _ in w.uses())
        )

    def fold(self, node: ir.Node) -> Fold:
        """What it takes to fold a node of :attr:`last`."""
        return Fold(self._given(node), self.freed(node))

    def value(self, value: ir.Value | None) -> npt.NDArray[Any]:
        """A constant, computed."""
        producer = None if value is None else value.producer()
        given = {} if producer is None else self._given(producer)
        if value is None:
            raise Skip("a condition is missing")
        return given[value.name] if value.name in given else self.view.compute([value], given)[0]

    def _given(self, node: ir.Node) -> dict[str | None, npt.NDArray[Any]]:
        return {
            v.name: self.values[v].astype((self.view.dtype(v) or ir.DataType.INT64).numpy())
            for n in self.cone(node)
            for v in n.outputs
            if v in self.values
        }

    def cone(self, node: ir.Node) -> list[ir.Node]:
        """The constant nodes a node depends on, in execution order, itself last."""
        found = {node}
        stack = [node]
        while stack:
            n = stack.pop()
            if n.outputs[0] in self.values:
                continue  # known from shapes, whatever it is computed from
            before = {p for v in n.inputs if v is not None and (p := v.producer()) is not None} - found
            found |= before
            stack.extend(before)
        return sorted(found, key=self.order.__getitem__)


def growth(size: int, freed: int) -> str:
    """Says why a value of ``size`` bytes is too large."""
    return f"its {size} bytes would take the place of {freed}"


def _unconditional(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and the branches of its Ifs: there, a value has one shape. Bodies of loops are not."""
    yield graph
    for node in graph:
        if node.op_type == "If" and node.domain == "":
            for attribute in node.attributes.values():
                yield from _unconditional(attribute.as_graph())
