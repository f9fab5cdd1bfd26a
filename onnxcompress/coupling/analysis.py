"""Coupling: which positions of which tensors of a model can only go together."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property

import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxcompress.coupling.axes import Axis, Factor
from onnxcompress.coupling.coupler import CONSEQUENCES, Coupler
from onnxcompress.coupling.groups import Group, Part, Pin, Reader
from onnxcompress.coupling.rules import rule_of
from onnxcompress.coupling.shapes import fill_shapes, made_up_shapes
from onnxcompress.errors import CouplingError, suggest
from onnxcompress.model import all_graphs, bodies
from onnxcompress.view import GraphView

__all__ = ["Coupling"]

Indices = npt.NDArray[np.int64]

_NO_WEIGHTS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING)


class Coupling:
    """The groups of one model.

    Args:
        view: the model.
        shapes: concrete shapes by value name as seen in a run; without them extents that only a run
            tells are made up, and values whose shape stays unknown pin what they touch.

    Attributes:
        graph: frozen networkx graph over :class:`~onnxcompress.coupling.axes.Factor`.
        groups: those with weights, in execution order of what makes them; also the pinned ones.
    """

    def __init__(self, view: GraphView, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        known = made_up_shapes(view) if shapes is None else dict(shapes)
        fill_shapes(view, known)
        self._coupler = coupler = Coupler(view, known)
        for node in view.nodes():
            _couple(node, coupler)
        _pin_ends(view, coupler)
        coupler.settle()
        self.graph: nx.Graph = nx.freeze(coupler.graph())
        self.groups: tuple[Group, ...] = tuple(_groups(view, self.graph, coupler))

    def group(self, name: str) -> Group:
        """The group made by a node, or that a tensor belongs to.

        Args:
            name: of a node or a tensor.

        Raises:
            CouplingError: there is none, or it is not clear which.
        """
        if name in self._by_key:
            return self._by_key[name]
        found = [g for g in self.groups if any(p.factor.axis.value == name for p in g.parts)]
        found = [g for g in found if not g.pinned] or found
        if len(found) == 1:
            return found[0]
        if found:
            raise CouplingError(
                f"{name!r} belongs to {len(found)} groups",
                hint="name the node that makes one: " + ", ".join(repr(g.key) for g in found[:8]),
            )
        raise CouplingError(f"no group is called {name!r}", hint=suggest(name, self._by_key))

    @cached_property
    def _by_key(self) -> dict[str, Group]:
        return {g.key: g for g in self.groups}

    @property
    def sizes(self) -> Mapping[Axis, int]:
        """Positions of every axis."""
        return self._coupler._sizes

    def factors(self, axis: Axis) -> tuple[int, ...]:
        """Sizes of the factors of an axis, outermost first."""
        return self._coupler.factors(axis)


def _couple(node: ir.Node, coupler: Coupler) -> None:
    found = rule_of(node)
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    unknown = next((v for v in values if coupler.shape(v) is None), None)
    if found is None:
        domain = f"{node.domain}." if node.domain else ""
        coupler.pin_all(node, f"{domain}{node.op_type} has no coupling rule")
    elif unknown is not None and node.op_type != "If":
        coupler.pin_all(node, f"the shape of {unknown.name!r} is not known")
    else:
        before = len(coupler.pins)
        try:
            found.couple(node, coupler)
        except Exception as error:  # anyone's rule, wrong in any way: what it touches stays, and the reason says so
            del coupler.pins[before:]
            text = error.message if isinstance(error, CouplingError) else f"its coupling rule broke: {error}"
            coupler.pin_all(node, text)


def _pin_ends(view: GraphView, coupler: Coupler) -> None:
    graph = view.model.graph
    for value, what in (*((v, "input") for v in graph.inputs), *((v, "output") for v in graph.outputs)):
        _pin_value(value, coupler, f"it is an {what} of the model")
    for node in view.nodes():
        for body in bodies(node) if node.op_type != "If" else ():
            for value in (*body.inputs, *body.outputs):
                _pin_value(value, coupler, f"it enters or leaves the body of {node.op_type} {node.name!r}")


def _pin_value(value: ir.Value, coupler: Coupler, reason: str) -> None:
    shape = coupler.shape(value)
    if shape is not None and value.name:
        for index, size in enumerate(shape):
            axis = Axis(value.name, index)
            coupler._sizes[axis] = size
            coupler.pin(axis, None, reason)


# --- groups ----------------------------------------------------------------------------------------


def _groups(view: GraphView, graph: nx.Graph, coupler: Coupler) -> list[Group]:
    order = {str(n.name): i for i, n in enumerate(view.nodes())}
    weights = {str(v.name): v for g in all_graphs(view.model) for v in g.initializers.values()}
    users: dict[str, list[str]] = defaultdict(list)
    for node in view.nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name:
                users[value.name].append(str(node.name))
    summed: dict[Axis, list[Reader]] = defaultdict(list)
    for reader in coupler.readers:
        summed[reader.weight].append(reader)
    found: list[Group] = []
    for component in nx.connected_components(graph):
        if any(f.axis.value in weights for f in component):
            group = _group(sorted(component), graph, coupler, order, users, weights, summed)
            if group is not None:
                found.append(group)
    keys = _keys(found, users)
    named = [replace(group, key=keys[id(group)]) for group in found]
    return sorted(named, key=lambda g: order.get(g.key, order[g.nodes[0]]))


def _keys(found: list[Group], users: Mapping[str, list[str]]) -> dict[int, str]:
    """A node for each group: one whose weight makes it, else one whose weight reads it, else any of it.

    Groups that can shrink choose first, and among them those with the least choice.
    """
    wishes: dict[int, list[str]] = {}
    first: dict[int, int] = {}
    for group in found:
        holders = {n for m in group.makers for n in _holders(m, users)}
        makers = [n for n in group.nodes if n in holders]
        readers = [r.node for r in group.readers]
        first[id(group)] = len(makers)
        wishes[id(group)] = list(dict.fromkeys([*makers, *readers, *group.nodes]))
    place = {id(g): i for i, g in enumerate(found)}
    keys: dict[int, str] = {}
    taken: set[str] = set()
    for group in sorted(found, key=lambda g: (g.pinned, first[id(g)], place[id(g)])):
        names = wishes[id(group)]
        more = (f"{n}:{group.unit}{i}" for n in names[:1] for i in itertools.chain([""], itertools.count(2)))
        key = next(n for n in itertools.chain(names, more) if n not in taken)
        taken.add(key)
        keys[id(group)] = key
    return keys


def _holders(axis: Axis, users: Mapping[str, list[str]]) -> Iterable[str]:
    return [axis.use.rpartition(":")[0]] if axis.use else users.get(axis.value, ())


def _group(
    component: list[Factor],
    graph: nx.Graph,
    coupler: Coupler,
    order: Mapping[str, int],
    users: Mapping[str, list[str]],
    weights: Mapping[str, ir.Value],
    summed: Mapping[Axis, list[Reader]],
) -> Group | None:
    sizes = {f: int(graph.nodes[f]["size"]) for f in component}
    atoms, count = _atoms(component, sizes, graph)
    fixed = np.zeros(count, bool)
    pins: list[Pin] = []
    for f in component:
        if graph.nodes[f]["pins"]:
            fixed[atoms[f]] = True
            pins += graph.nodes[f]["pins"]
        for position, pin in graph.nodes[f]["fixed"]:
            fixed[atoms[f][position]] = True
            pins.append(pin)
    axes = {f.axis for f in component}
    nodes: set[str] = set()
    makers: list[Axis] = []
    readers: list[Reader] = []
    for f in component:
        axis = f.axis
        if axis.use:
            nodes.add(axis.use.rpartition(":")[0])
        else:
            nodes.update(users.get(axis.value, ()))
        if axis.value in weights:
            sums = [r for r in summed[axis] if coupler.apart.get(r) not in axes]
            if sums:
                readers += [r for r in sums if r not in readers]
            elif axis not in makers:
                makers.append(axis)
    in_order = tuple(sorted(nodes & order.keys(), key=order.__getitem__))
    if not in_order or not any(_counts(weights[m.value]) for m in makers):  # no weight makes it: nothing to remove
        return None
    pins.sort(key=lambda p: (p.reason in CONSEQUENCES, p.node != "", order.get(p.node, -1)))
    parts = tuple(Part(f, atoms[f]) for f in component)
    unit = _unit(parts, coupler, weights, readers, makers)
    apart = dict.fromkeys(name for f in component for name in coupler.unweighted.get(f.axis, ()))
    return Group(
        in_order[0], unit, count, parts, fixed, tuple(pins), in_order, tuple(readers), tuple(makers), tuple(apart)
    )


def _atoms(component: list[Factor], sizes: Mapping[Factor, int], graph: nx.Graph) -> tuple[dict[Factor, Indices], int]:
    """Atom of every position of every factor, and how many atoms there are."""
    inside = graph.subgraph(component)
    edges = [link for _, _, links in inside.edges(data="maps") for link in links]
    first = sizes[component[0]]
    if all(maps is None for _, _, maps in edges) and all(s == first for s in sizes.values()):
        same = np.arange(first)
        return dict.fromkeys(component, same), first
    starts = dict(zip(component, np.cumsum([0, *(sizes[f] for f in component)]), strict=False))
    total = sum(sizes.values())
    rows, columns = [], []
    for a, b, maps in edges:
        left, right = (np.arange(sizes[a]),) * 2 if maps is None else maps
        rows.append(starts[a] + left)
        columns.append(starts[b] + right)
    row, column = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (rows, columns))
    matrix = coo_array((np.ones(len(row), np.int8), (row, column)), (total, total))
    count, labels = connected_components(matrix, directed=False)
    _, firsts = np.unique(labels, return_index=True)  # number atoms by their first position
    rank = np.empty(count, np.int64)
    rank[labels[np.sort(firsts)]] = np.arange(count)
    atoms = rank[labels]
    return {f: atoms[starts[f] : starts[f] + sizes[f]] for f in component}, int(count)


def _counts(weight: ir.Value) -> bool:
    """Whether a constant is a weight, and no list of extents, axes or positions."""
    return weight.dtype not in _NO_WEIGHTS


def _unit(
    parts: Iterable[Part],
    coupler: Coupler,
    weights: Mapping[str, ir.Value],
    readers: Iterable[Reader],
    makers: Iterable[Axis],
) -> str:
    """What an atom is called."""
    told = next((coupler.units[p.factor.axis] for p in parts if p.factor.axis in coupler.units), None)
    if told is not None:
        return told
    axes = {*makers, *(r.weight for r in readers)}
    ops = {node.op_type for axis in axes for node, _ in coupler.view.consumers(weights[axis.value])}
    places = {(p.factor.place, len(coupler.factors(p.factor.axis))) for p in parts if p.factor.axis in axes}
    last = any(place == count - 1 for place, count in places)
    if any("Conv" in op for op in ops):
        return "channels" if last else "groups of channels"
    if all(count == 1 for _, count in places):
        return "neurons"
    if any(place == count - 1 > 0 for place, count in places):
        return "head widths"
    return "heads" if any(place == count - 2 for place, count in places) else "blocks"
