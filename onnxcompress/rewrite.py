"""Rewriter: the only door for changing a model.

It owns fresh names, shared weights, staleness of views and the log of edits. A pass gets one and
keeps no reference to the graph beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import RewriteError
from onnxcompress.model import all_graphs, compute
from onnxcompress.view import REVISION, GraphView, body_nodes

__all__ = ["Edit", "Rewriter", "can_be_output"]

Attribute = int | float | str | ir.Attr | Sequence[int] | Sequence[float] | Sequence[str] | ir.TensorProtocol


@dataclass(frozen=True)
class Edit:
    """One change: what was done to which node or tensor."""

    action: str
    subject: str


def can_be_output(value: ir.Value, graph: object) -> bool:
    """Whether a value may become an output of a graph: made by one of its nodes, and no output yet."""
    producer = value.producer()
    return producer is not None and producer.graph is graph and not value.is_graph_output()


class Rewriter:
    """Edits one model in place.

    Args:
        model: usually a clone, so the edit can be dropped.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._log: list[Edit] = []
        self._told: dict[str, str] = {}
        self._names: set[str] = set()
        self._index()

    def _index(self) -> None:
        self._nodes = {str(n.name): n for n in self._model.graph.all_nodes()}
        self._values = {
            value.name: value
            for graph in all_graphs(self._model)
            for values in (graph.inputs, graph.initializers.values(), *(n.outputs for n in graph))
            for value in values
            if value.name
        }
        self._names |= set(self._nodes) | set(self._values)

    @property
    def model(self) -> ir.Model:
        return self._model

    @property
    def log(self) -> tuple[Edit, ...]:
        """Every edit made, in order."""
        return tuple(self._log)

    @property
    def told(self) -> Mapping[str, str]:
        """What passes had to say of what they made, by site."""
        return dict(self._told)

    def tell(self, key: str, text: str) -> None:
        """Says something of the rewrite at a site that its choice could not know; the report shows it.

        Args:
            key: of the site.
            text: one line; several are joined.
        """
        self._told[key] = "; ".join(filter(None, (self._told.get(key), text)))

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
        found = self.find(name)
        if found is None:
            raise RewriteError(f"no value is called {name!r}", hint="an earlier rewrite may have removed it")
        return found

    def find(self, name: str) -> ir.Value | None:
        """The value of this name anywhere in the model, or None."""
        if name not in self._names:
            return None
        value = self._values.get(name)
        if value is None or value.name != name or value.graph is None:
            self._index()
            value = self._values.get(name)
        return value

    def compute(
        self, values: Sequence[ir.Value], given: Mapping[str | None, npt.NDArray[Any]] | None = None
    ) -> list[npt.NDArray[Any]]:
        """Constants of the model as it is now; see :meth:`GraphView.compute`."""
        return compute(self._model, values, given or {})

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
        tensor = ir.tensor(np.asarray(array, order="C"), name=name) if isinstance(array, np.ndarray) else array
        graph = self._graph_of(like)
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
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
        """Gives one input of one node a new weight; other readers of the old one keep it.

        A weight nobody else read is gone afterwards, and the new one has its name.
        """
        value = node.inputs[index] if index < len(node.inputs) else None
        base = str(value.name) if value is not None else f"{node.name}_input{index}"
        if value is not None and value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
            self.set_input(node, index, None)
            self._forget(value)
        fresh = self.constant(array, base, like=node)
        self.set_input(node, index, fresh)
        return fresh

    def replace_weight(self, value: ir.Value, array: npt.NDArray[Any]) -> ir.Value:
        """Gives all readers of a weight a new one, which has its name.

        Raises:
            RewriteError: the value is no weight.
        """
        graph, name = value.graph, str(value.name)
        if not value.is_initializer() or not isinstance(graph, ir.Graph):
            raise RewriteError(f"{name!r} is not a weight")
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        fresh = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        for use in tuple(value.uses()):
            use.node.replace_input_with(use.idx, fresh)
        del graph.initializers[name]
        graph.register_initializer(fresh)
        self._values[name] = fresh
        self._note("set weight", name)
        return fresh

    def _forget(self, weight: ir.Value) -> None:
        if isinstance(weight.graph, ir.Graph):
            del weight.graph.initializers[str(weight.name)]
        self._names.discard(str(weight.name))

    # --- nodes ---------------------------------------------------------------------------------

    def insert(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        before: ir.Node | None = None,
        after: ir.Node | ir.Value | None = None,
        name: str | None = None,
        domain: str = "",
        outputs: int = 1,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
    ) -> tuple[ir.Value, ...]:
        """A new node; exactly one of ``before`` and ``after`` says where (its graph too).

        Args:
            after: a node, or a value: then right after its producer, for graph inputs and weights
                at the start of the graph.
            dtype: element type of the first output, where known.
            shape: shape of the first output, where known.

        Returns:
            Its outputs.
        """
        if isinstance(after, ir.Value):
            producer = after.producer()
            before, after = (self._model.graph[0], None) if producer is None else (before, producer)
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

    def nodes_since(self, edits: int) -> tuple[ir.Node, ...]:
        """Nodes added since the log had ``edits`` entries, and still there."""
        names = (e.subject for e in self._log[edits:] if e.action.startswith("add "))
        return tuple(self._nodes[n] for n in names if n in self._nodes)

    def only_if(self, switch: ir.Value, computed: ir.Value, nodes: Sequence[ir.Node], otherwise: ir.Value) -> ir.Value:
        """A value that is ``computed`` where ``switch`` is true and ``otherwise`` where not.

        Args:
            switch: boolean scalar.
            computed: made by the last of ``nodes``.
            nodes: in execution order; they move into the If and run only where it is true. Nobody
                else may read what they make.
            otherwise: a value of the same type.
        """
        graph = self._graph_of(nodes[-1])
        edits = len(self._log)
        (same,) = self.insert("Identity", [otherwise], after=nodes[-1], dtype=otherwise.dtype)
        moved = [*nodes, *self.nodes_since(edits)]
        node = ir.node("If", [switch], name=self.fresh(f"{nodes[-1].name}_If"), num_outputs=1)
        node.outputs[0].name = self.fresh(f"{node.name}_out")
        graph.insert_after(moved[-1], node)
        graph.remove(moved)
        for name, body, output in (("then_branch", list(nodes), computed), ("else_branch", moved[-1:], same)):
            output.type = output.type or ir.TensorType(ir.DataType.FLOAT)
            inner = ir.Graph([], [output], nodes=body, name=f"{node.name}_{name}")
            node.attributes[name] = ir.AttrGraph(name, inner)
        self._nodes[str(node.name)] = node
        self._note("add If", str(node.name))
        return node.outputs[0]

    def add_input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
        """A new input of the model."""
        value = ir.Value(name=self.fresh(name), shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._model.graph.inputs.append(value)
        self._note("add input", str(value.name))
        return value

    def remove_input(self, value: ir.Value) -> None:
        """Removes an input nobody reads.

        Raises:
            RewriteError: something reads it, or it is no input of the model.
        """
        if value.uses() or not any(value is v for v in self._model.graph.inputs):
            raise RewriteError(f"input {value.name!r} cannot go: it is read, or is no input")
        self._model.graph.inputs.remove(value)
        self._note("remove input", str(value.name))

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
        self,
        old: ir.Value,
        new: ir.Value,
        *,
        only: Sequence[ir.Node] | None = None,
        keep: Sequence[ir.Node] = (),
        outputs: bool = True,
    ) -> None:
        """Everything that reads ``old`` reads ``new``.

        Args:
            only: just these consumers, and no graph output.
            keep: these consumers go on reading ``old``.
            outputs: where ``old`` is a graph output, ``new`` takes its place *and its name*, so the
                interface of the model stays what it was.

        Raises:
            RewriteError: ``new`` would have to become an output and cannot (:func:`can_be_output`);
                nothing was edited.
        """
        leaves = only is None and outputs and old.is_graph_output()
        if leaves and not can_be_output(new, old.graph):
            raise RewriteError(f"{new.name!r} cannot take the place of the output {old.name!r}")
        for use in tuple(old.uses()):
            if use.node not in keep and (only is None or use.node in only):
                use.node.replace_input_with(use.idx, new)
        if leaves:
            self._take_over_output(old, new)
        self._note("replace value", f"{old.name} -> {new.name}")

    def sort(self) -> None:
        """Puts the nodes of all graphs in an order in which everything is made before it is read."""
        for graph in all_graphs(self._model):
            graph.sort()
        self._note("sort", "nodes")

    def rename(self, value: ir.Value, name: str) -> None:
        """Gives a value a wanted name, or that name with a number if it is taken."""
        value.name = self.fresh(name)
        self._note("rename", value.name)

    def replace_node(self, node: ir.Node, *new: ir.Value) -> None:
        """Puts ``new`` in the place of a node's outputs, names included, and removes the node."""
        for old, value in zip(node.outputs, new, strict=False):
            if not old.name:
                continue
            name = old.name
            self.replace_uses(old, value)
            if value.name != name:
                old.name = self.fresh(f"{name}_before")
                value.name = name
                value.shape = old.shape
                if old.dtype is not None:
                    value.dtype = old.dtype
        self.remove(node)

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
        for inner in body_nodes(node):  # what they capture is no longer read either
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)
            self._nodes.pop(str(inner.name), None)
        node.graph.remove(node, safe=True)
        self._nodes.pop(str(node.name), None)
        self._note(f"remove {node.op_type}", str(node.name))

    def remove_unused(self, *nodes: ir.Node) -> int:
        """Removes those of the nodes that nobody reads, then what only they read, weights included."""
        before = len(self._nodes)
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            read = [v for n in (node, *body_nodes(node)) for v in n.inputs if v is not None]
            self.remove(node)
            stack += [p for v in read if (p := v.producer()) is not None]
            for value in read:
                if value.is_initializer() and not value.uses() and not value.is_graph_output():
                    self._forget(value)
        return before - len(self._nodes)

    def drop_outputs(self, node: ir.Node, keep: int) -> None:
        """Asks a node for its first ``keep`` outputs only.

        Raises:
            RewriteError: one of the others is still in use.
        """
        for value in node.outputs[keep:]:
            if value.uses() or value.is_graph_output():
                raise RewriteError(f"output {value.name!r} of node {node.name!r} is still read")
        node.resize_outputs(keep)
        self._note("drop outputs", str(node.name))

    def inline_branch(self, node: ir.Node, branch: str) -> tuple[ir.Node, ...]:
        """Replaces an If by the nodes of one of its branches.

        Args:
            node: the If.
            branch: ``then_branch`` or ``else_branch``.

        Returns:
            The nodes that moved, in execution order.
        """
        body, graph = node.attributes[branch].as_graph(), self._graph_of(node)
        results = list(body.outputs)
        moved = list(body)
        body.outputs.clear()
        body.remove(moved)
        for name in list(body.initializers):
            graph.register_initializer(body.initializers.pop(name))
        graph.insert_before(node, moved)
        self._nodes |= {str(n.name): n for n in (*moved, *(i for m in moved for i in body_nodes(m)))}
        for i, (old, new) in enumerate(zip(node.outputs, results, strict=True)):
            if new in results[:i] or new.producer() not in moved:  # handed on, not made here
                (new,) = self.insert("Identity", [new], before=node, name=f"{node.name}_{i}")
                moved += [p for p in [new.producer()] if p is not None]
            self.replace_uses(old, new)
        self.remove(node)
        self._note(f"inline {branch}", str(node.name))
        return tuple(moved)

    def run_library_pass(self, edit: Callable[[ir.Model], object], name: str) -> None:
        """Lets a pass of another library edit the model in place; ``name`` goes into the log."""
        edit(self._model)
        self._index()
        self._note("run", name)

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
                    name = old.name
                    old.name = self.fresh(f"{name}_before")
                    new.name, new.shape = name, old.shape
                    if old.dtype is not None:
                        new.dtype = old.dtype
                    graph.outputs[i] = new

    def _note(self, action: str, subject: str) -> None:
        self._model.meta[REVISION] = int(self._model.meta.get(REVISION, 0)) + 1
        self._log.append(Edit(action, subject))
