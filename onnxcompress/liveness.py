"""The most bytes of activations that are alive at once, in the order a model is executed."""

from __future__ import annotations

import math
from functools import cached_property

import onnx_ir as ir

from onnxcompress.execution import REMOVED, Execution
from onnxcompress.model import bodies
from onnxcompress.work import is_constant

__all__ = ["peak_activation_bytes"]

_ALIASES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", *REMOVED)
"""Operators whose output is their input's memory under another shape."""


def peak_activation_bytes(execution: Execution) -> int:
    """Most bytes alive at once: each value from the node that makes it to the last one that reads it.

    What only exists inside a kernel has no memory, another name of the same memory none of its own;
    values inside the bodies of control flow are not counted.
    """
    return _Liveness(execution).peak()


class _Liveness:
    def __init__(self, execution: Execution) -> None:
        self.view, self.inside, self.shapes = execution.view, execution.inside, execution.shapes

    @cached_property
    def _position(self) -> dict[ir.Node, int]:
        """Step at which a node runs: of a body with its owner, inside a kernel with that kernel."""
        steps: dict[ir.Node, int] = {}
        for step, node in enumerate(self.view.nodes(subgraphs=False)):
            steps[node] = step
            steps.update({inner: step for graph in bodies(node) for inner in graph.all_nodes()})
        return {node: steps[self.inside.get(node, node)] for node in steps}

    def peak(self) -> int:
        """Most bytes alive at once: from the node that makes a value to the last one that reads it."""
        position, graph = self._position, self.view.model.graph
        steps = len(self.view.nodes(subgraphs=False))
        change = [0] * (steps + 2)
        last: dict[ir.Value, int] = {}
        values = [*graph.inputs, *(v for n in self.view.nodes(subgraphs=False) for v in n.outputs if v.name)]
        values = [v for v in values if not is_constant(self.view, v)]
        for value in reversed(values):  # readers of an alias read the memory it stands for
            ends = [position[n] for n, _ in self.view.consumers(value)]
            ends += [last[a] for a in self._aliases_of(value) if a in last]
            last[value] = steps if value.is_graph_output() else max(ends, default=-1)
        for value in values:
            producer = self.view.producer(value)
            start = 0 if producer is None else position[producer]
            if self._has_memory(value):
                end = max(last[value], start)
                change[start] += self._bytes(value)
                change[end + 1] -= self._bytes(value)
        alive = peak = 0
        for step in change:
            alive += step
            peak = max(peak, alive)
        return peak

    def _aliases_of(self, value: ir.Value) -> list[ir.Value]:
        readers = [n for n, _ in self.view.consumers(value)]
        return [n.outputs[0] for n in readers if self._is_alias(n, value)]

    def _is_alias(self, node: ir.Node, value: ir.Value) -> bool:
        dequantizes = node.op_type == "DequantizeLinear" and node in self.inside
        return (node.op_type in _ALIASES or dequantizes) and bool(node.inputs) and node.inputs[0] is value

    def _has_memory(self, value: ir.Value) -> bool:
        """Not for another name of the same memory, nor for what only exists inside a kernel."""
        producer = self.view.producer(value)
        if producer is not None and producer.inputs and producer.inputs[0] is not None:
            source = producer.inputs[0]
            if self._is_alias(producer, source) and not is_constant(self.view, source):
                return False
        home = None if producer is None else self.inside.get(producer, producer)
        readers = [n for n, _ in self.view.consumers(value)]
        return value.is_graph_output() or not readers or any(self.inside.get(n, n) is not home for n in readers)

    def _bytes(self, value: ir.Value) -> int:
        shape = self.shapes.get(str(value.name))
        if shape is None:
            declared = value.shape
            known = declared is not None and all(isinstance(d, int) for d in declared)
            shape = tuple(d for d in declared if isinstance(d, int)) if known and declared is not None else ()
        dtype = value.dtype
        if dtype is None:
            producer = self.view.producer(value)
            dtype = ir.DataType.UINT8 if producer is not None and producer.op_type == "QuantizeLinear" else None
        itemsize = 4.0 if dtype is None or dtype == ir.DataType.STRING else dtype.itemsize
        return math.ceil(math.prod(shape) * itemsize)
