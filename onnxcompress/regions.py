"""Layers, and the regions in which they could hold their data in another form.

A layer is a node with all that runs in its kernel, in float (a Conv and its BatchNormalization) or as
integers (an Add and its Relu). Layers that can run in a form, joined by the values that flow between
them, make a region; inside it nothing is converted, at its border every value is, once:

    seconds(S) = sum_{l in S} form(l) + sum_{l not in S} float(l)
               + sum_v into(v)  [v is made outside S and read inside]
               + sum_v out_of(v)  [v is made inside S and read outside, or leaves the model]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import onnx_ir as ir

from onnxcompress.cost import ModelCost
from onnxcompress.view import GraphView
from onnxcompress.work import is_constant

__all__ = ["Form", "Layer", "Region", "find_layers", "find_regions"]

_PASSED_ON = ("Identity", "Dropout")
_SWEEPS = 10


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with all that runs in its kernel.

    Attributes:
        nodes: the node that gives the layer its name first, the others in execution order.
        seconds: all of it as it is now.
        reads: float values it needs from outside, each once; no constants.
        writes: float values others need from it.
        leaves: those of ``writes`` that leave the graph.
    """

    nodes: tuple[ir.Node, ...]
    seconds: float
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    leaves: frozenset[str]

    @property
    def name(self) -> str:
        return str(self.nodes[0].name)


def find_layers(view: GraphView, cost: ModelCost, together: Iterable[Sequence[str]]) -> list[Layer]:
    """Every node in its layer, in execution order.

    Args:
        view: the model, its values typed.
        cost: what it costs; says what runs inside what.
        together: names of nodes that would run as one kernel.
    """
    rows = {row.name: row for row in cost.nodes}
    joined: nx.Graph[str] = nx.Graph()
    joined.add_nodes_from(rows)
    joined.add_edges_from((row.name, row.inside) for row in cost.nodes if row.inside)
    for names in together:
        joined.add_edges_from((names[0], name) for name in names[1:])
    for node in view.nodes(*_PASSED_ON):
        maker = None if node.inputs[0] is None else view.producer(node.inputs[0])
        if maker is not None:
            joined.add_edge(str(node.name), str(maker.name))
    order = {name: number for number, name in enumerate(rows)}
    groups = [sorted(group, key=order.__getitem__) for group in nx.connected_components(joined)]
    layers = []
    for group in sorted(groups, key=lambda g: order[g[0]]):
        host = max(group, key=lambda name: (rows[name].macs, not rows[name].inside, -order[name]))
        nodes = tuple(view.node(name) for name in (host, *(n for n in group if n != host)))
        layers.append(_layer(view, nodes, sum(rows[name].seconds for name in group)))
    return layers


def _layer(view: GraphView, nodes: tuple[ir.Node, ...], seconds: float) -> Layer:
    members = set(nodes)
    reads = [v for n in nodes for v in n.inputs if v is not None and v.producer() not in members]
    reads = [v for v in reads if _is_float(v) and not is_constant(view, v)]
    made = [v for n in nodes for v in n.outputs if v.name and _is_float(v) and not is_constant(view, v)]
    leaves = frozenset(str(v.name) for v in made if view.is_output(v))
    writes = [v for v in made if view.is_output(v) or any(n not in members for n, _ in view.consumers(v))]
    return Layer(
        nodes, seconds, tuple(dict.fromkeys(str(v.name) for v in reads)), tuple(str(v.name) for v in writes), leaves
    )


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, None)


@dataclass(frozen=True, eq=False)
class Form:
    """A way to hold data: what converting to and from it costs, and what layers cost in it.

    Attributes:
        kind: what options call it ("int8").
        precision: what the profile calls it.
        seconds: of each layer that can run in it, conversions apart; by name.
        into: seconds to bring a value into the form, by its name.
        out_of: seconds to bring it back.
        names: what the conversions into it and out of it are called.
        needs: by layer, the layers that must be in the form for it to be; they are in the same region.
    """

    kind: str
    precision: str
    seconds: Mapping[str, float]
    into: Callable[[str], float]
    out_of: Callable[[str], float]
    names: tuple[str, str] = ("Q", "DQ")
    needs: Mapping[str, Collection[str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Region:
    """Layers joined by values that need no conversion between them.

    Attributes:
        layers: all that could be in the form, in execution order.
        border: by layer, (seconds into the form, seconds out of it) for the values it converts where the
            whole region is in the form; a value several read is shared by them.
        middle: by layer, seconds of the conversions it causes by staying float amid the others.
        best: names of the layers that are best in the form, the others float.
        seconds_float: of the region as it is.
        seconds_all: with all of it in the form, conversions included.
        seconds_best: with ``best`` in the form, conversions included.
    """

    layers: tuple[Layer, ...]
    border: Mapping[str, tuple[float, float]]
    middle: Mapping[str, float]
    best: frozenset[str]
    seconds_float: float
    seconds_all: float
    seconds_best: float


def find_regions(layers: Sequence[Layer], form: Form) -> list[Region]:
    """Maximal sets of layers that can run in a form and hand each other values, in execution order."""
    readers: dict[str, list[Layer]] = {}
    writers: dict[str, Layer] = {}
    for layer in layers:
        writers.update(dict.fromkeys(layer.writes, layer))
        for value in layer.reads:
            readers.setdefault(value, []).append(layer)
    able: nx.Graph[Layer] = nx.Graph()
    able.add_nodes_from(layer for layer in layers if layer.name in form.seconds)
    for value, writer in writers.items():
        if writer in able:
            able.add_edges_from((writer, reader) for reader in readers.get(value, ()) if reader in able)
    order = {layer: number for number, layer in enumerate(layers)}
    groups = [sorted(group, key=order.__getitem__) for group in nx.connected_components(able)]
    return [
        _Borders(form, group, readers, writers).region() for group in sorted(groups, key=lambda group: order[group[0]])
    ]


class _Borders:
    """Conversions of one region, for any part of it that is in the form."""

    def __init__(
        self,
        form: Form,
        layers: Sequence[Layer],
        readers: Mapping[str, Sequence[Layer]],
        writers: Mapping[str, Layer],
    ) -> None:
        self.form, self.layers, self.readers, self.writers = form, layers, readers, writers
        by_name = {layer.name: layer for layer in layers}
        self.needs = {layer: [by_name[n] for n in form.needs.get(layer.name, ())] for layer in layers}
        self.needed: dict[Layer, list[Layer]] = {layer: [] for layer in layers}
        for layer, others in self.needs.items():
            for other in others:
                self.needed[other].append(layer)

    def at(self, value: str, inside: Collection[Layer]) -> tuple[float, float]:
        """Seconds into and out of the form at a value, where these layers are in it."""
        readers, writer = self.readers.get(value, ()), self.writers.get(value)
        if writer in inside:
            leaves = writer is not None and value in writer.leaves
            return 0.0, self.form.out_of(value) if leaves or any(r not in inside for r in readers) else 0.0
        return self.form.into(value) if any(r in inside for r in readers) else 0.0, 0.0

    def around(self, layer: Layer, inside: Collection[Layer]) -> float:
        """Seconds of all conversions of values that a layer reads or writes."""
        return sum(sum(self.at(value, inside)) for value in (*layer.reads, *layer.writes))

    def total(self, inside: Collection[Layer]) -> float:
        values = dict.fromkeys(v for layer in self.layers for v in (*layer.reads, *layer.writes))
        kernels = sum(self.form.seconds[n.name] if n in inside else n.seconds for n in self.layers)
        return kernels + sum(sum(self.at(value, inside)) for value in values)

    def region(self) -> Region:
        everyone = frozenset(self.layers)
        best = self._best(everyone)
        return Region(
            layers=tuple(self.layers),
            border={layer.name: self._border(layer, everyone) for layer in self.layers},
            middle={
                layer.name: max(self.around(layer, everyone - {layer}) - self.around(layer, everyone), 0.0)
                for layer in self.layers
            },
            best=frozenset(layer.name for layer in best),
            seconds_float=self.total(frozenset()),
            seconds_all=self.total(everyone),
            seconds_best=self.total(best),
        )

    def _border(self, layer: Layer, inside: Collection[Layer]) -> tuple[float, float]:
        shared = 0.0
        for value in layer.reads:
            sharers = sum(r in inside for r in self.readers.get(value, ()))
            shared += self.at(value, inside)[0] / max(sharers, 1)
        return shared, sum(self.at(value, inside)[1] for value in layer.writes)

    def _best(self, everyone: frozenset[Layer]) -> set[Layer]:
        """From all and from nothing, one layer after the other to the other side while that saves."""
        starts: list[set[Layer]] = [set(everyone), set()]
        for chosen in starts:
            for _ in range(_SWEEPS):
                if not [layer for layer in self.layers if self._flip(layer, chosen)]:
                    break
        return min(starts, key=self.total)

    def _flip(self, layer: Layer, chosen: set[Layer]) -> bool:
        """Moves a layer into the form, or out of it, with those that must come along, if that saves."""
        leaves = layer in chosen
        along: dict[Layer, None] = {layer: None}
        waiting = [layer]
        while waiting:
            one = waiting.pop()
            more = [
                m for m in (self.needed if leaves else self.needs)[one] if m not in along and (m in chosen) == leaves
            ]
            along.update(dict.fromkeys(more))
            waiting += more
        values = dict.fromkeys(v for one in along for v in (*one.reads, *one.writes))

        def seconds() -> float:
            kernels = sum(self.form.seconds[one.name] if one in chosen else one.seconds for one in along)
            return kernels + sum(sum(self.at(value, chosen)) for value in values)

        now = seconds()
        chosen ^= set(along)
        if seconds() < now:
            return True
        chosen ^= set(along)
        return False
