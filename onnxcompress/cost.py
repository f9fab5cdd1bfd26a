"""What a model costs on a device: seconds, bytes and energy, node by node.

``CostModel(profile)`` prices the work of nodes (:mod:`onnxcompress.work`) with the kernels of a profile.
It counts what onnxruntime runs, not what the file says: nodes that only see constants are folded away,
cheap activations run inside their producer, and in a quantized model a node between DequantizeLinear and
QuantizeLinear is one integer kernel where the profile has one; where it has none the node runs in float
and both conversions are paid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import onnx_ir as ir

from onnxcompress.profile import Fusion, Kernel, Profile
from onnxcompress.view import GraphView
from onnxcompress.work import FAMILY, NodeWork, Shapes, is_constant, work_of

__all__ = ["CostModel", "ModelCost", "NodeCost", "NodeWork", "work_of"]

_REMOVED = ("Identity", "Dropout", "Constant")
_ALIASES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", *_REMOVED)
"""Operators whose output is their input's memory under another shape."""


@dataclass(frozen=True)
class NodeCost:
    """What a node costs.

    Attributes:
        name: node name.
        op_type: operator type.
        kind: kernel kind.
        precision: how it runs: "f32", "u8s8" or "dynamic".
        macs: multiply-accumulates.
        params: constant elements.
        weight_bytes: bytes the constants take in the file; shared ones count at each node.
        seconds: time on the device.
        share: part of the model's seconds, 0..1.
        inside: name of the node in whose kernel it runs for free; "" if it runs by itself.
        known: all shapes were known and the profile has a kernel; if not, ``seconds`` is too low.
    """

    name: str
    op_type: str
    kind: str
    precision: str
    macs: int
    params: int
    weight_bytes: int
    seconds: float
    share: float
    inside: str = ""
    known: bool = True


@dataclass(frozen=True)
class ModelCost:
    """What a model costs in one run.

    Attributes:
        profile: name of the profile.
        nodes: every node, in execution order.
        seconds: all nodes and the overhead of a run.
        macs: multiply-accumulates.
        params: elements of all weights.
        weight_bytes: bytes of all weights in the file, each once.
        peak_activation_bytes: most bytes of activations alive at once, in execution order.
        energy_joule: energy of a run; None if the profile does not know.
    """

    profile: str
    nodes: tuple[NodeCost, ...]
    seconds: float
    macs: int
    params: int
    weight_bytes: int
    peak_activation_bytes: int
    energy_joule: float | None = None

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of nodes whose cost is not, or not fully, in the sum."""
        return tuple(n.name for n in self.nodes if not n.known)

    def by_op(self) -> dict[str, float]:
        """Seconds by operator type, most first."""
        sums: dict[str, float] = {}
        for node in self.nodes:
            sums[node.op_type] = sums.get(node.op_type, 0.0) + node.seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class CostModel:
    """Prices of one device.

    Args:
        profile: the device.
        misses: share of the weights that comes from memory in every run, 0..1; a matter of the whole
            model, see :meth:`for_model`.

    Example:
        >>> from onnxcompress.profile import load_profile
        >>> cost = CostModel(load_profile("cortex-a53"))
        >>> work = NodeWork("n", "Conv", "conv_pointwise", macs=10**6, in_channels=64, out_channels=64)
        >>> cost.node(work, "f32") > 0
        True
        >>> cost.node(NodeWork("n", "HardSwish", "elementwise"), "u8s8") is None
        True
    """

    profile: Profile
    misses: float = 0.0

    def for_model(self, view: GraphView, shapes: Shapes) -> CostModel:
        """These prices where the nodes of a model, and so the misses of its weights, are meant."""
        return _Count(self, view, shapes).settled()

    def node(self, work: NodeWork, precision: str = "f32") -> float | None:
        """Seconds of one node at a precision; None if the device cannot run it so.

        Unknown shapes count as no work (``work.known`` tells).
        """
        kernel = self.profile.kernel(work.kind, precision, op_type=_float_name(work.op_type), maps=work.maps)
        if kernel is None:
            return None
        seconds = 1e-9 * (self.profile.overhead.ns_per_node + _nanoseconds(kernel, work))
        if self.profile.memory is not None:
            seconds += (
                1e-9 * self.profile.memory.ns_per_byte * self.misses * work.weights * _bytes_per_weight(precision)
            )
        return seconds

    def convert(self, elements: int, direction: Literal["quantize", "dequantize"], *, maps: bool = False) -> float:
        """Seconds of a QuantizeLinear or DequantizeLinear of its own.

        Args:
            elements: size of the tensor.
            direction: which of the two.
            maps: the tensor is a feature map (4-D), whose layout may have to change on the way.
        """
        op = "QuantizeLinear" if direction == "quantize" else "DequantizeLinear"
        return self.node(NodeWork("", op, direction, maps, elements_in=elements, elements_out=elements)) or 0.0

    def model(self, view: GraphView, shapes: Shapes) -> ModelCost:
        """Cost of every node and of the whole.

        Of the branches of an If the dearer counts; the body of a Loop or Scan counts once.

        Args:
            view: the model, float or quantized.
            shapes: concrete shapes by value name, as seen in a run.
        """
        return _Count(self, view, shapes).result()


def _nanoseconds(kernel: Kernel, work: NodeWork) -> float:
    padded, factor = 1.0, 1.0
    for channels in (work.in_channels, work.out_channels):
        if channels > 1:
            padded *= math.ceil(channels / kernel.channel_block) * kernel.channel_block / channels
            factor = factor if channels % kernel.aligned_to == 0 else kernel.misaligned_factor
    return factor * (
        kernel.ns_fixed
        + kernel.ns_per_mac * work.macs * padded
        + kernel.ns_per_element * work.elements
        + kernel.ns_per_weight * work.weights
        + kernel.ns_per_patch * work.patches
    )


def _bytes_per_weight(precision: str) -> int:
    return 4 if precision == "f32" else 1


def _float_name(op_type: str) -> str:
    """The float operator behind an integer one: QLinearConv is a Conv."""
    for prefix in ("QLinear", "DynamicQuantize"):
        if op_type.startswith(prefix) and len(op_type) > len(prefix):
            return op_type.removeprefix(prefix)
    return op_type.removesuffix("Integer")


@dataclass
class _Count:
    """Counting one model."""

    cost: CostModel
    view: GraphView
    shapes: Shapes
    inside: dict[ir.Node, ir.Node] = field(default_factory=dict)  # node -> the node whose kernel runs it
    integer: set[ir.Node] = field(default_factory=set)

    def settled(self) -> CostModel:
        memory = self.cost.profile.memory
        if memory is None:
            return self.cost
        if not self.inside:
            self._fuse(self.view.nodes())
        work = ((work_of(self.view, n, self.shapes), self._precision(n)) for n in self.view.nodes())
        resident = sum(w.weights * _bytes_per_weight(precision) for w, precision in work)
        # Weights are read in turn, so a cache that keeps the latest soon keeps none of the next run's.
        over = (resident - memory.cache_bytes) / max(memory.cache_bytes, 1)
        return replace(self.cost, misses=min(max(over, 0.0), 1.0))

    def result(self) -> ModelCost:
        nodes = self.view.nodes()
        self._fuse(nodes)
        self.cost = self.settled()
        rows = {node: self._row(node) for node in nodes}
        for node in self._other_branches(rows):
            rows[node] = _priced(rows[node], 0.0)
        seconds = 1e-9 * self.cost.profile.overhead.ns_per_run + sum(r.seconds for r in rows.values())
        weights = {id(v): v.const_value for v in self.view.weights()}
        energy = self.cost.profile.energy
        return ModelCost(
            profile=self.cost.profile.name,
            nodes=tuple(_priced(r, r.seconds, seconds) for r in rows.values()),
            seconds=seconds,
            macs=sum(r.macs for r in rows.values()),
            params=sum(t.size for t in weights.values() if t is not None),
            weight_bytes=sum(t.nbytes for t in weights.values() if t is not None),
            peak_activation_bytes=self._peak(),
            energy_joule=None if energy is None or energy.active_w is None else energy.active_w * seconds,
        )

    # --- what runs inside what --------------------------------------------------------------------------

    def _fuse(self, nodes: tuple[ir.Node, ...]) -> None:
        for node in nodes:
            if node in self.inside or node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
                continue
            if node.op_type == "MatMulInteger":
                self._fuse_dynamic(node)
            elif not self._fuse_integer(node):
                self.inside.update(dict.fromkeys(self._followers(node, "f32"), node))
                if (feeder := self._predecessor(node)) is not None:
                    self.inside[feeder] = node
        for node in nodes:
            if node.op_type == "DequantizeLinear":
                readers = [n for n, _ in self.view.consumers(node.outputs[0])]
                if readers and all(n in self.integer for n in readers):
                    self.inside[node] = readers[0]

    def _followers(self, node: ir.Node, precision: str) -> list[ir.Node]:
        """Nodes that vanish into a producer, one behind the other."""
        rules = self._rules(node, precision, "after")
        found: list[ir.Node] = []
        last = node
        while (reader := self._only_reader(last)) is not None:
            others = [v for v in reader.inputs if v is not None and v is not last.outputs[0]]
            constant = all(is_constant(self.view, v) for v in others)
            if not any(reader.op_type in f.absorbs and (constant or not f.constant_operand) for f in rules):
                break
            if len(others) != sum(v is not None for v in reader.inputs) - 1:
                break
            found.append(reader)
            last = reader
        return found

    def _rules(self, node: ir.Node, precision: str, side: str) -> list[Fusion]:
        fusions = self.cost.profile.fusions
        return [f for f in fusions if (f.op, f.precision, f.side) == (node.op_type, precision, side)]

    def _predecessor(self, node: ir.Node) -> ir.Node | None:
        """The node that vanishes into the one it feeds, as a Pad does into a Conv."""
        rules = self._rules(node, "f32", "before")
        feeder = self.view.producer(node.inputs[0]) if rules and node.inputs[0] is not None else None
        if feeder is None or self._only_reader(feeder) is not node:
            return None
        constant = all(v is None or is_constant(self.view, v) for v in feeder.inputs[1:])
        absorbed = any(feeder.op_type in f.absorbs and (constant or not f.constant_operand) for f in rules)
        return feeder if absorbed else None

    def _only_reader(self, node: ir.Node) -> ir.Node | None:
        if len(node.outputs) != 1 or self.view.is_output(node.outputs[0]):
            return None
        readers = [n for n, _ in self.view.consumers(node.outputs[0])]
        return readers[0] if len(set(readers)) == 1 else None

    def _fuse_integer(self, node: ir.Node) -> bool:
        """Whether a node between DequantizeLinear and QuantizeLinear is an integer kernel."""
        data = [v for v in node.inputs if v is not None and not is_constant(self.view, v)]
        if node.op_type == "Gather":  # looks up integers in an integer table, whatever the indices are
            data = [v for v in node.inputs[:1] if v is not None]
        fed = [self.view.producer(v) for v in data]
        if not fed or any(n is None or n.op_type != "DequantizeLinear" for n in fed):
            return False
        followers = self._followers(node, "u8s8")
        outputs = (followers[-1] if followers else node).outputs
        readers = [n for v in outputs for n, _ in self.view.consumers(v)]
        leaves = any(self.view.is_output(v) for v in outputs)
        if leaves or not readers or any(n.op_type != "QuantizeLinear" for n in readers):
            return False
        if self.cost.node(work_of(self.view, node, self.shapes), "u8s8") is None:
            return False
        self.integer.add(node)
        self.inside.update(dict.fromkeys((*followers, *readers), node))
        return True

    def _fuse_dynamic(self, node: ir.Node) -> None:
        """DynamicQuantizeLinear, MatMulInteger, Cast, Mul by the scales: one kernel in onnxruntime."""
        quantizer = self.view.producer(node.inputs[0]) if node.inputs[0] is not None else None
        cast = self._only_reader(node)
        scaled = self._only_reader(cast) if cast is not None and cast.op_type == "Cast" else None
        if quantizer is None or quantizer.op_type != "DynamicQuantizeLinear" or cast is None or scaled is None:
            return
        if scaled.op_type != "Mul":
            return
        self.inside.update({quantizer: node, cast: node, scaled: node})
        for value in scaled.inputs:
            producer = None if value is None else self.view.producer(value)
            if producer is not None and producer.op_type == "Mul" and self._only_reader(producer) is scaled:
                self.inside[producer] = node

    # --- prices -----------------------------------------------------------------------------------------

    def _row(self, node: ir.Node) -> NodeCost:
        work = work_of(self.view, node, self.shapes)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            work = replace(work, maps=work.maps and self._keeps_layout(node))
        precision = self._precision(node)
        known, seconds = work.known, 0.0
        inside = self.inside.get(node)
        if inside is None and node.op_type not in _REMOVED and not self._folded(node):
            price = self.cost.node(work, precision)
            known, seconds = known and price is not None, price or 0.0
        size = sum(t.nbytes for v in node.inputs if v is not None for t in self._stored(v))
        return NodeCost(
            work.name, work.op_type, work.kind, precision, work.macs, work.params, size, seconds, 0.0,
            "" if inside is None else str(inside.name), known or inside is not None,
        )  # fmt: skip

    def _keeps_layout(self, node: ir.Node) -> bool:
        """Whether the float side of a conversion is a kernel with a layout of its own, not a mere move."""
        quantizes = node.op_type == "QuantizeLinear"
        maker = self.view.producer(node.inputs[0]) if quantizes and node.inputs[0] is not None else None
        others = [maker] if quantizes else [n for n, _ in self.view.consumers(node.outputs[0])]
        return any(n is not None and FAMILY.get(n.op_type) not in ("move", "free") for n in others)

    def _precision(self, node: ir.Node) -> str:
        if node in self.integer or node.op_type.startswith("QLinear"):
            return "u8s8"
        return "dynamic" if node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM") else "f32"

    def _folded(self, node: ir.Node) -> bool:
        """Computed once, when the model is loaded. Of a DequantizeLinear that is not so."""
        if node.op_type == "DequantizeLinear" or not node.outputs:
            return False
        return is_constant(self.view, node.outputs[0]) and not self._reads_dequantized(node)

    def _reads_dequantized(self, node: ir.Node) -> bool:
        producers = [self.view.producer(v) for v in node.inputs if v is not None]
        return any(p is not None and (p.op_type == "DequantizeLinear" or self._reads_dequantized(p)) for p in producers)

    def _stored(self, value: ir.Value) -> Iterator[ir.TensorProtocol]:
        """Tensors in the file behind a constant."""
        tensor = self.view.weight(value)
        if tensor is not None:
            yield tensor
        elif is_constant(self.view, value) and (producer := self.view.producer(value)) is not None:
            for source in producer.inputs:
                if source is not None:
                    yield from self._stored(source)

    def _other_branches(self, rows: dict[ir.Node, NodeCost]) -> set[ir.Node]:
        """Nodes in the cheaper branches of every If."""
        idle: set[ir.Node] = set()
        for node in reversed(self.view.nodes("If")):
            branches = [tuple(graph.all_nodes()) for graph in _bodies(node)]
            branches.sort(key=lambda branch: sum(rows[n].seconds for n in branch if n not in idle))
            idle.update(n for branch in branches[:-1] for n in branch)
        return idle

    # --- memory -----------------------------------------------------------------------------------------

    @cached_property
    def _position(self) -> dict[ir.Node, int]:
        """Step at which a node runs: of a body with its owner, inside a kernel with that kernel."""
        steps: dict[ir.Node, int] = {}
        for step, node in enumerate(self.view.nodes(subgraphs=False)):
            steps[node] = step
            steps.update({inner: step for graph in _bodies(node) for inner in graph.all_nodes()})
        return {node: steps[self.inside.get(node, node)] for node in steps}

    def _peak(self) -> int:
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


def _priced(row: NodeCost, seconds: float, total: float = 0.0) -> NodeCost:
    return replace(row, seconds=seconds, share=seconds / total if total else 0.0)


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
