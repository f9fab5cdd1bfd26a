"""GraphView: read-only questions about a model, with a frozen networkx graph inside.

A view is a snapshot. After an edit through :class:`~onnxcompress.rewrite.Rewriter` every question
raises :class:`~onnxcompress.errors.StaleViewError`; make a new view instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import RewriteError, StaleViewError
from onnxcompress.model import Shape, bodies, compute, inferred_types

__all__ = ["QUANTIZED_OPS", "REVISION", "GraphView", "Use", "body_nodes"]

REVISION = "onnxcompress.revision"
"""Key in ``model.meta`` counting edits; the Rewriter raises it, a view compares it."""

QUANTIZED_OPS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)
"""Operators whose presence says that somebody has quantized this model already."""

T = TypeVar("T")

Use = tuple[ir.Node, int]
"""A consumer and the index of its input."""


class GraphView:
    """A frozen look at one model.

    Args:
        model: a model as :func:`onnxcompress.model.load` gives it (unique node names, constants
            lifted to initializers).
        observed: concrete shapes by value name as seen in a run, where there was one.

    Attributes:
        observed: the same; None without a run.
    """

    def __init__(self, model: ir.Model, observed: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._model, self.observed = model, observed
        self._revision = _revision(model)
        self._derived: dict[Hashable, Any] = {}
        self._nodes = tuple(model.graph.all_nodes())
        self._by_name = {str(n.name): n for n in self._nodes}
        if len(self._by_name) != len(self._nodes):
            raise RewriteError("node names are not unique", hint="load the model with onnxcompress.model.load")

    # --- nodes ---------------------------------------------------------------------------------

    @property
    def model(self) -> ir.Model:
        self._check()
        return self._model

    def nodes(self, *ops: str, subgraphs: bool = True) -> tuple[ir.Node, ...]:
        """Nodes in execution order; of these operator types if any are named."""
        self._check()
        found = self._nodes if subgraphs else tuple(self._model.graph)
        return tuple(n for n in found if n.op_type in ops) if ops else found

    def node(self, name: str) -> ir.Node:
        """The node of this name.

        Raises:
            RewriteError: there is none.
        """
        self._check()
        if name not in self._by_name:
            raise RewriteError(f"no node is called {name!r}")
        return self._by_name[name]

    def value(self, name: str) -> ir.Value | None:
        """The input, weight or value of the main graph of this name; None if there is none."""
        self._check()
        return self._values_by_name.get(name)

    @cached_property
    def _values_by_name(self) -> dict[str, ir.Value]:
        found: dict[str, ir.Value] = {}
        for value in (*self._model.graph.inputs, *self.weights(), *self.values()):
            found.setdefault(str(value.name), value)
        return found

    def in_subgraph(self, node: ir.Node) -> bool:
        """Whether the node is inside the body of an If, Loop or Scan."""
        self._check()
        return node.graph is not self._model.graph

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        self._check()
        return self._model.graph.opset_imports.get("", 1)

    @cached_property
    def _networkx(self) -> nx.MultiDiGraph:
        graph = nx.MultiDiGraph()
        for node in self._nodes:
            graph.add_node(str(node.name), op=node.op_type)
        for node in self._nodes:
            for index, value in enumerate(node.inputs):
                producer = None if value is None else value.producer()
                if producer is not None and value is not None:
                    graph.add_edge(str(producer.name), str(node.name), value=str(value.name), index=index)
            for inner in body_nodes(node):  # a body runs with, and inside, its If, Loop or Scan
                for value in inner.inputs:
                    producer = None if value is None else value.producer()
                    if value is not None and producer is not None and producer.graph is node.graph:
                        graph.add_edge(str(producer.name), str(node.name), value=str(value.name), index=-1)
        frozen: nx.MultiDiGraph = nx.freeze(graph)
        return frozen

    @property
    def graph(self) -> nx.MultiDiGraph:
        """Node names joined by the values that flow between them (attributes ``value``, ``index``).

        What a subgraph captures is an edge to its If, Loop or Scan with ``index=-1``. Frozen:
        editing it raises ``networkx.NetworkXError``.
        """
        self._check()
        return self._networkx

    # --- values --------------------------------------------------------------------------------

    def producer(self, value: ir.Value) -> ir.Node | None:
        """The node that makes the value; None for graph inputs and weights."""
        self._check()
        return value.producer()

    def consumers(self, value: ir.Value) -> tuple[Use, ...]:
        """Who reads the value, subgraphs included, in execution order of the first graph."""
        self._check()
        return tuple((use.node, use.idx) for use in value.uses())

    def is_output(self, value: ir.Value) -> bool:
        """Whether the value leaves its graph (the model's, or a subgraph's)."""
        self._check()
        return value.is_graph_output()

    def weight(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The constant tensor behind a value, not read from disk until asked; None if it has none."""
        self._check()
        return None if value is None or not value.is_initializer() else value.const_value

    def array(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The constant behind a value as a read-only array; None if it has none."""
        tensor = self.weight(value)
        if tensor is None:
            return None
        array = np.asarray(tensor.numpy())
        array = array.view()
        array.flags.writeable = False
        return array

    def is_float_weight(self, value: ir.Value | None) -> bool:
        """Whether the value is a constant of type float32."""
        tensor = self.weight(value)
        return tensor is not None and tensor.dtype == ir.DataType.FLOAT

    def weights(self) -> Iterator[ir.Value]:
        """Every initializer, in a fixed order, subgraphs included."""
        self._check()
        yield from self._model.graph.initializers.values()
        for graph in self._model.graph.subgraphs():
            yield from graph.initializers.values()

    def values(self) -> Iterator[ir.Value]:
        """Every value a node of the main graph makes, in execution order."""
        self._check()
        for node in self._model.graph:
            yield from (v for v in node.outputs if v.name)

    @cached_property
    def _types(self) -> dict[ir.Value, tuple[ir.DataType | None, Shape | None]]:
        return inferred_types(self._model)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Shape of a value as far as graph inputs and weights determine it; None if even its rank is unknown."""
        self._check()
        return None if value is None else self._types.get(value, (None, None))[1]

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Element type of a value; None if unknown."""
        self._check()
        return None if value is None else self._types.get(value, (None, None))[0]

    def compute(
        self, values: Sequence[ir.Value], given: Mapping[str | None, npt.NDArray[Any]] | None = None
    ) -> list[npt.NDArray[Any]]:
        """Constants, computed by onnxruntime from weights and ``given`` (by name).

        Raises:
            ModelRunError: one depends on a graph input, or onnxruntime cannot compute it.
        """
        self._check()
        return compute(self._model, values, given or {})

    def derive(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a pass worked out about this view, made once and kept as long as the view.

        Args:
            key: usually the pass itself.
            make: called the first time.
        """
        self._check()
        if key not in self._derived:
            self._derived[key] = make()
        found: T = self._derived[key]
        return found

    # --- what kind of model --------------------------------------------------------------------

    @cached_property
    def _quantized(self) -> tuple[str, ...]:
        return tuple(str(n.name) for n in self._nodes if n.op_type in QUANTIZED_OPS)

    @property
    def quantized_nodes(self) -> tuple[str, ...]:
        """Names of nodes that show the model was quantized before; empty for a float model."""
        self._check()
        return self._quantized

    def domains(self) -> Collection[str]:
        """Operator domains in use; "" is the standard one."""
        self._check()
        return sorted({n.domain for n in self._nodes})

    def _check(self) -> None:
        if _revision(self._model) != self._revision:
            raise StaleViewError("the model changed after this view was made", hint="make a new GraphView")


def _revision(model: ir.Model) -> int:
    return int(model.meta.get(REVISION, 0))


def body_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """Every node inside the subgraphs of a node."""
    for body in bodies(node):
        yield from body.all_nodes()
