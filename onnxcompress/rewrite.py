"""Rewriter: the only door for changing a model.

It owns fresh names, shared weights, staleness of views and the log of edits. A pass gets one and
keeps no reference to the graph beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import RewriteError
from onnxcompress.model import all_graphs
from onnxcompress.view import REVISION, GraphView

__all__ = ["Edit", "Rewriter"]

Attribute = int | float | str | Sequence[int] | Sequence[float] | ir.TensorProtocol


@dataclass(frozen=True)
class Edit:
    """One change: what was done to which node or tensor."""

    action: str
    subject: str


class Rewriter:
    """Edits one model in place.

    Args:
        model: usually a clone, so the edit can be dropped.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._log: list[Edit] = []
        self._nodes = {str(n.name): n for n in model.graph.all_nodes()}
        self._names = set(self._nodes)
        for graph in all_graphs(model):
            self._names |= {str(v.name) for v in (*graph.inputs, *graph.initializers.values())}
        self._names |= {str(v.name) for n in self._nodes.values() for v in n.outputs if v.name}

    @property
    def model(self) -> ir.Model:
        return self._model

    @property
    def log(self) -> tuple[Edit, ...]:
        """Every edit made, in order."""
        return tuple(self._log)

    def view(self) -> GraphView:
        """A fresh view of the model as it is now; stale after the next edit."""
        return GraphView(self._model)

    # --- finding -------------------------------------------------------------------------------

    def node(self, name: str) -> ir.Node:
        """The node of this name in the model being edited.

        Raises:
            RewriteError: there is none (another rewrite removed it).
        """
        if name not in self._nodes:
            raise RewriteError(f"no node is called {name!r}", hint="an earlier rewrite may have removed it")
        return self._nodes[name]

    def value(self, name: str) -> ir.Value:
        """The value of this name anywhere in the model.

        Raises:
            RewriteError: there is none.
        """
        for graph in all_graphs(self._model):
            if name in graph.initializers:
                return graph.initializers[name]
            for value in graph.inputs:
                if value.name == name:
                    return value
        for node in self._nodes.values():
            for value in node.outputs:
                if value.name == name:
                    return value
        raise RewriteError(f"no value is called {name!r}", hint="an earlier rewrite may have removed it")

    def fresh(self, base: str) -> str:
        """A name nobody uses, ``base`` itself if it is free."""
        name, n = base, 1
        while name in self._names:
            name, n = f"{base}_{n}", n + 1
        self._names.add(name)
        return name

    # --- weights -------------------------------------------------------------------------------

    def constant(
        self, array: npt.NDArray[Any] | ir.TensorProtocol, name: str, *, like: ir.Node | None = None
    ) -> ir.Value:
        """A new initializer.

        Args:
            array: its contents; an ``ir.TensorProtocol`` for types numpy lacks (int4).
            name: wanted name; a number is added if it is taken.
            like: put it into the graph of this node; the main graph by default.
        """
        name = self.fresh(name)
        tensor = ir.tensor(np.ascontiguousarray(array), name=name) if isinstance(array, np.ndarray) else array
        graph = self._graph_of(like)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        self._note("add weight", name)
        return value

    def own_weight(self, node: ir.Node, index: int) -> ir.Value:
        """The weight at an input, made private to that input if others read it too.

        Raises:
            RewriteError: the input is no weight.
        """
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or value.const_value is None or not value.is_initializer():
            raise RewriteError(f"input {index} of node {node.name!r} is not a weight")
        if len(value.uses()) == 1 and not value.is_graph_output():
            return value
        copy = self.constant(value.const_value, f"{value.name}_{node.name}", like=node)
        node.replace_input_with(index, copy)
        self._note("un-share weight", str(value.name))
        return copy

    def set_weight(self, node: ir.Node, index: int, array: npt.NDArray[Any]) -> ir.Value:
        """Gives one input of one node a new weight; other readers of the old one keep it."""
        value = node.inputs[index] if index < len(node.inputs) else None
        base = f"{value.name}_new" if value is not None else f"{node.name}_input{index}"
        fresh = self.constant(array, base, like=node)
        self.set_input(node, index, fresh)
        return fresh

    # --- nodes ---------------------------------------------------------------------------------

    def insert(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        name: str | None = None,
        domain: str = "",
        outputs: int = 1,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
    ) -> tuple[ir.Value, ...]:
        """A new node; exactly one of ``before`` and ``after`` says where (its graph too).

        Args:
            dtype: element type of the first output, where known.
            shape: shape of the first output, where known.

        Returns:
            Its outputs.
        """
        anchor = before if before is not None else after
        if anchor is None or (before is not None and after is not None) or anchor.graph is None:
            raise RewriteError(f"a new {op} needs exactly one of before= and after=")
        name = self.fresh(name or f"{anchor.name}_{op}")
        node = ir.node(op, inputs, dict(attributes or {}), domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = self.fresh(f"{name}_out{i}" if i else f"{name}_out")
        if dtype is not None:
            node.outputs[0].dtype = dtype
        node.outputs[0].shape = shape
        graph = anchor.graph
        if before is not None:
            graph.insert_before(anchor, node)
        else:
            graph.insert_after(anchor, node)
        if domain and domain not in self._model.graph.opset_imports:
            self._model.graph.opset_imports[domain] = 1
        self._nodes[name] = node
        self._note(f"add {op}", name)
        return tuple(node.outputs)

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Reads ``value`` at this input from now on; grows the input list if needed."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)
        self._note("set input", f"{node.name}[{index}]")

    def set_attribute(self, node: ir.Node, name: str, value: Attribute) -> None:
        node.attributes[name] = ir.convenience.convert_attribute(name, value)
        self._note(f"set {name}", str(node.name))

    def replace_uses(
        self, old: ir.Value, new: ir.Value, *, only: Sequence[ir.Node] | None = None, outputs: bool = True
    ) -> None:
        """Everything that reads ``old`` reads ``new``.

        Args:
            only: just these consumers.
            outputs: where ``old`` is a graph output, ``new`` takes its place *and its name*, so the
                interface of the model stays what it was.
        """
        for use in tuple(old.uses()):
            if only is None or use.node in only:
                use.node.replace_input_with(use.idx, new)
        if only is None and outputs and old.is_graph_output():
            self._take_over_output(old, new)
        self._note("replace value", f"{old.name} -> {new.name}")

    def remove(self, node: ir.Node) -> None:
        """Removes a node nobody reads any more.

        Raises:
            RewriteError: one of its outputs is still in use.
        """
        for value in node.outputs:
            if value.uses() or value.is_graph_output():
                raise RewriteError(f"{node.op_type} {node.name!r} cannot go: {value.name!r} is still read")
        if node.graph is None:
            raise RewriteError(f"node {node.name!r} is in no graph")
        node.graph.remove(node, safe=True)
        self._nodes.pop(str(node.name), None)
        self._note(f"remove {node.op_type}", str(node.name))

    def drop_unused_weights(self) -> int:
        """Removes initializers nobody reads; returns how many."""
        count = 0
        for graph in all_graphs(self._model):
            for name, value in list(graph.initializers.items()):
                if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                    del graph.initializers[name]
                    count += 1
        if count:
            self._note("drop weights", f"{count} unused")
        return count

    # --- inside --------------------------------------------------------------------------------

    def _graph_of(self, like: ir.Node | None) -> ir.Graph:
        graph = self._model.graph if like is None else like.graph
        if not isinstance(graph, ir.Graph):
            raise RewriteError("the node is in no graph")
        return graph

    def _take_over_output(self, old: ir.Value, new: ir.Value) -> None:
        for graph in all_graphs(self._model):
            for i, output in enumerate(graph.outputs):
                if output is old:
                    if new.is_graph_input() or new.is_initializer() or new.is_graph_output():
                        raise RewriteError(f"{new.name!r} cannot take the place of the output {old.name!r}")
                    name = old.name
                    old.name = self.fresh(f"{name}_before")
                    new.name, new.dtype, new.shape = name, old.dtype, old.shape
                    graph.outputs[i] = new

    def _note(self, action: str, subject: str) -> None:
        self._model.meta[REVISION] = int(self._model.meta.get(REVISION, 0)) + 1
        self._log.append(Edit(action, subject))
