"""What a model costs on a device: seconds, bytes and energy, node by node.

``CostModel(profile)`` prices the work of nodes (:mod:`onnxcompress.work`) with the kernels of a profile, for
what the runtime really executes (:mod:`onnxcompress.execution`). Every price is a sum of quantities times
coefficients of the profile, so a fit can turn the sums around: :meth:`CostModel.usage` gives the quantities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import onnx_ir as ir
import zstandard

from onnxcompress.execution import Execution, float_name, touches
from onnxcompress.liveness import peak_activation_bytes
from onnxcompress.model import bodies
from onnxcompress.profile import Kernel, Profile
from onnxcompress.sizes import ZSTD_LEVEL
from onnxcompress.view import GraphView
from onnxcompress.work import NodeWork, Shapes, is_constant, kinds_of, work_of

__all__ = ["CostModel", "Costing", "ModelCost", "NodeCost", "NodeWork", "Quantities", "Use", "quantities", "work_of"]


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
        inside: name of the node in whose kernel it runs; "" if it runs by itself.
        known: all shapes were known and the profile has a kernel; if not, ``seconds`` is too low.
        energy_joule: energy of a run; None if the profile does not know.
        zstd_bytes: what the constants take when compressed, each by itself; None if not asked for.
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
    energy_joule: float | None = None
    zstd_bytes: int | None = None


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
        zstd_bytes: all weights compressed, each once and by itself; None if not asked for.
    """

    profile: str
    nodes: tuple[NodeCost, ...]
    seconds: float
    macs: int
    params: int
    weight_bytes: int
    peak_activation_bytes: int
    energy_joule: float | None = None
    zstd_bytes: int | None = None

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


class Quantities(NamedTuple):
    """What the coefficients of a kernel are multiplied with, in the order of its fields."""

    fixed: float
    mac: float
    element: float
    weight: float
    patch: float
    segment: float


class Missed(NamedTuple):
    """Bytes of a node that a level of the cache does not hold."""

    activations: float
    weights: float


@dataclass(frozen=True)
class Use:
    """One node's draw on the coefficients of a profile.

    Attributes:
        name: of the node.
        key: of the kernel: (kind, precision, on), or of a fusion: ("fused", precision, operator type).
        work: what it is multiplied with, see :func:`quantities`; of a fusion only ``elements_out`` counts.
        missed: by level of the cache, nearest first, and of memory at last.
        dispatched: nodes dispatched: 1, or 0 for what runs inside another.
    """

    name: str
    key: tuple[str, str, str]
    work: NodeWork
    missed: tuple[Missed, ...] = ()
    dispatched: int = 1


@dataclass(frozen=True)
class CostModel:
    """Prices of one device.

    Args:
        profile: the device.
        traffic_bytes: bytes the whole model touches in a run, weights and activations, which decide
            what weights stay in the caches from one run to the next; see :meth:`for_model`.

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
    traffic_bytes: int = 0

    def for_model(self, view: GraphView, shapes: Shapes) -> CostModel:
        """These prices where the nodes of a model, and so the misses of its weights, are meant."""
        return self._settled(Execution(self.profile, view, shapes))

    def node(self, work: NodeWork, precision: str = "f32") -> float | None:
        """Seconds of one node at a precision; None if the device cannot run it so.

        Unknown shapes count as no work (``work.known`` tells).
        """
        kernel = self._kernel(work, precision)
        if kernel is None:
            return None
        nanoseconds = self.profile.overhead.ns_per_node + _price(kernel, quantities(kernel, work))
        return 1e-9 * (nanoseconds + self._price_of_misses(self._missed(work, precision)))

    def convert(self, elements: int, direction: Literal["quantize", "dequantize"], *, maps: bool = False) -> float:
        """Seconds of a QuantizeLinear or DequantizeLinear of its own.

        Args:
            elements: size of the tensor.
            direction: which of the two.
            maps: the tensor is a feature map (4-D), whose layout may have to change on the way.
        """
        op = "QuantizeLinear" if direction == "quantize" else "DequantizeLinear"
        return self.node(NodeWork("", op, direction, maps, elements_in=elements, elements_out=elements)) or 0.0

    def model(self, view: GraphView, shapes: Shapes, *, compressed: bool = False) -> ModelCost:
        """Cost of every node and of the whole.

        Of the branches of an If the dearer counts; the body of a Loop or Scan counts once.

        Args:
            view: the model, float or quantized.
            shapes: concrete shapes by value name, as seen in a run.
            compressed: also compress the weights, which takes a second for 100 MB.
        """
        return Costing(self, view, shapes).cost(compressed=compressed)

    def part(self, view: GraphView, shapes: Shapes) -> ModelCost:
        """Some nodes of the model these prices were made for (:meth:`for_model`), given as a model.

        Without the overhead of a run.
        """
        costing = Costing(self, view, shapes)
        costing.prices = self  # what the caches lose from run to run is up to the whole
        cost = costing.cost()
        return replace(cost, seconds=cost.seconds - 1e-9 * self.profile.overhead.ns_per_run)

    def joules(self, work: NodeWork, precision: str, seconds: float) -> float | None:
        """Energy of a node: what it computes and moves where the profile knows that, else power times time."""
        energy = self.profile.energy
        if energy is None:
            return None
        by_precision = {"f32": energy.pj_per_mac_f32, "f16": energy.pj_per_mac_f16}
        per_mac = by_precision.get(precision, energy.pj_per_mac_int8)
        if per_mac is None:
            return None if energy.active_w is None else energy.active_w * seconds
        missed = self._missed(work, precision)
        far = missed[-1].activations + missed[-1].weights if missed else work.weights * bytes_per_weight(precision)
        return 1e-12 * (per_mac * work.macs + (energy.pj_per_byte or 0.0) * far) + (energy.idle_w or 0.0) * seconds

    def usage(self, view: GraphView, shapes: Shapes) -> tuple[Use, ...]:
        """What a run of a model multiplies the coefficients of the profile with.

        ``model(...).seconds`` is the sum of quantities times coefficients and of the overheads.
        Nodes the profile has no kernel for are left out; control flow is not told apart.
        """
        execution = Execution(self.profile, view, shapes)
        cost = self._settled(execution)
        found = []
        for node in view.nodes():
            work, precision = execution.work(node), execution.precision(node)
            if (rule := execution.rule.get(node)) is not None:
                if not rule.constant_operand:  # else it has gone into the weights
                    found.append(Use(work.name, ("fused", rule.precision, node.op_type), work, dispatched=0))
            elif execution.runs(node):
                found += execution.copies(node) * list(cost._use(_converted(execution, node, work), precision))
            for size in execution.reorders(node):
                found += cost._use(_reorder(work.name, size), "f32")
        return tuple(found)

    def reorder(self, size: int) -> tuple[Use, ...]:
        """What a change to or from the blocked layout draws on; nothing if the profile knows of none.

        Args:
            size: elements of the map.
        """
        return tuple(self._use(_reorder("", size), "f32"))

    def _use(self, work: NodeWork, precision: str) -> Iterator[Use]:
        if (kernel := self._kernel(work, precision)) is not None:
            yield Use(work.name, (kernel.kind, kernel.precision, kernel.on), work, self._missed(work, precision))

    # --- parts of a price -------------------------------------------------------------------------------

    def _settled(self, execution: Execution) -> CostModel:
        total = 0.0
        for node in filter(execution.runs, execution.view.nodes()):
            work, precision = execution.work(node), execution.precision(node)
            if precision == "f32" and self.profile.quantization.required:
                precision = "u8s8"  # what is float now will be integers when it runs
            total += work.weights * bytes_per_weight(precision) + work.elements_out * bytes_per_activation(precision)
        return replace(self, traffic_bytes=int(total))

    def _kernel(self, work: NodeWork, precision: str) -> Kernel | None:
        return self.profile.kernel(
            work.kind, precision, op_type=float_name(work.op_type), maps=work.maps, blocked=work.blocked
        )

    @cached_property
    def _levels(self) -> tuple[tuple[int, float, float], ...]:
        """Of each level its bytes, and what a byte of activations and of weights costs that it does not hold."""
        found = [  # of a cache that cores share, others use half
            (cache.bytes // (2 if cache.shared else 1), cache.ns_per_byte, cache.ns_per_weight_byte)
            for cache in self.profile.caches
        ]
        if self.profile.memory is not None:
            found.append((self.profile.memory.cache_bytes, 0.0, self.profile.memory.ns_per_byte))
        return tuple(found)

    def _missed(self, work: NodeWork, precision: str) -> tuple[Missed, ...]:
        weights = work.weights * bytes_per_weight(precision)
        activations = work.elements * bytes_per_activation(precision)
        found = []
        for (size, *_), gone in zip(self._levels, self.gone, strict=True):
            spilt = min(max(2 * (activations + weights) / max(size, 1) - 1, 0.0), 1.0)
            found.append(Missed(activations * spilt, weights * gone))
        return tuple(found)

    @cached_property
    def gone(self) -> tuple[float, ...]:
        """Share of the weights each level of the cache has lost since the last run, nearest first, memory's at last."""
        # Weights are read in turn, so a cache that keeps the latest soon keeps none of the next run's.
        return tuple(min(max((self.traffic_bytes - size) / max(size, 1), 0.0), 1.0) for size, *_ in self._levels)

    def _price_of_misses(self, missed: Iterable[Missed]) -> float:
        levels = zip(missed, self._levels, strict=True)
        return sum(m.activations * a + m.weights * w for m, (_, a, w) in levels)


def quantities(kernel: Kernel, work: NodeWork) -> Quantities:
    """What the coefficients of a kernel are multiplied with for a node: channels padded, misalignment included."""
    padded, factor = 1.0, 1.0
    for channels, least in ((work.in_channels, 1), (work.out_channels, 0)):  # one input channel has a path of its own
        if channels > least:
            padded *= math.ceil(channels / kernel.channel_block) * kernel.channel_block / channels
        if channels > 1:
            factor = factor if channels % kernel.aligned_to == 0 else kernel.misaligned_factor
    segments = work.segments
    if kernel.precision == "u8s8" and (work.maps or work.kind.startswith("conv")):
        # Channels are last, but elementwise operators also run where there is no convolution to ask for that.
        either = kinds_of(work.op_type)[0] in ("elementwise", "transcendental")
        segments = min(work.segments, work.segments_nhwc) if either else work.segments_nhwc
    found = (1.0, work.macs * padded, work.elements, work.weights, work.patches, segments)
    return Quantities(*(factor * q for q in found))


def _price(kernel: Kernel, amounts: Quantities) -> float:
    return (
        kernel.ns_fixed * amounts.fixed
        + kernel.ns_per_mac * amounts.mac
        + kernel.ns_per_element * amounts.element
        + kernel.ns_per_weight * amounts.weight
        + kernel.ns_per_patch * amounts.patch
        + kernel.ns_per_segment * amounts.segment
    )


def bytes_per_weight(precision: str) -> float:
    """Bytes the kernels of a precision read for one weight."""
    return {"f32": 4.0, "f16": 2.0, "w4": 0.5}.get(precision, 1.0)


def _reorder(name: str, size: int) -> NodeWork:
    return NodeWork(name, "", "reorder", elements_in=size, elements_out=size)


def bytes_per_activation(precision: str) -> float:
    """Bytes of an activation at a precision."""
    return {"u8s8": 1.0, "f16": 2.0}.get(precision, 4.0)


def _converted(execution: Execution, node: ir.Node, work: NodeWork) -> NodeWork:
    """A conversion between moves changes no layout, whatever the rank."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return replace(work, maps=work.maps and execution.keeps_layout(node))
    return work


@dataclass
class Costing:
    """A model's cost, kept so that a change of shapes prices only the nodes it touches.

    Args:
        prices: of the device.
        view: the model.
        shapes: concrete shapes by value name, as seen in a run.
    """

    prices: CostModel
    view: GraphView
    shapes: Shapes
    _execution: Execution = field(init=False)
    _rows: dict[ir.Node, NodeCost] = field(init=False, default_factory=dict)
    _packed: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._execution = Execution(self.prices.profile, self.view, self.shapes)
        self.prices = self.prices._settled(self._execution)

    def reshaped(self, changes: Mapping[str, tuple[int, ...]], *, same_structure: bool = False) -> Costing:
        """The same model with other shapes; only nodes that read or make one of these values are priced anew.

        Args:
            changes: new shapes by value name.
            same_structure: what runs inside what, and in which layout, is taken to stay; much faster.
        """
        other = copy.copy(self)
        other.shapes = {**self.shapes, **changes}
        other._execution = self._execution.reshaped(changes, same_structure=same_structure)
        other.prices = self.prices._settled(other._execution)
        kept = other._execution.inside is self._execution.inside and other.prices.gone == self.prices.gone
        rows = self._rows.items() if kept else ()
        other._rows = {node: row for node, row in rows if not touches(node, changes)}
        return other

    def cost(self, *, compressed: bool = False) -> ModelCost:
        """Cost of every node and of the whole.

        Args:
            compressed: also compress the weights.
        """
        rows = {node: self._row(node, compressed) for node in self.view.nodes()}
        for node in self._other_branches(rows):
            rows[node] = replace(rows[node], seconds=0.0, energy_joule=None)
        profile = self.prices.profile
        seconds = 1e-9 * profile.overhead.ns_per_run + sum(r.seconds for r in rows.values())
        weights = {id(v): v.const_value for v in self.view.weights()}
        tensors = [t for t in weights.values() if t is not None]
        return ModelCost(
            profile=profile.name,
            nodes=tuple(replace(r, share=r.seconds / seconds if seconds else 0.0) for r in rows.values()),
            seconds=seconds,
            macs=sum(r.macs for r in rows.values()),
            params=sum(t.size for t in tensors),
            weight_bytes=sum(t.nbytes for t in tensors),
            peak_activation_bytes=peak_activation_bytes(self._execution),
            energy_joule=self._energy(rows.values(), seconds),
            zstd_bytes=sum(map(self._compressed, tensors)) if compressed else None,
        )

    def _row(self, node: ir.Node, compressed: bool) -> NodeCost:
        row = self._rows.get(node)
        if row is None or (compressed and row.zstd_bytes is None):
            row = self._rows[node] = self._priced(node, compressed)
        return row

    def _priced(self, node: ir.Node, compressed: bool) -> NodeCost:
        execution = self._execution
        work, precision = execution.work(node), execution.precision(node)
        known, seconds = work.known, 0.0
        inside, runs = execution.inside.get(node), execution.runs(node)
        if (rule := execution.rule.get(node)) is not None:
            seconds = 1e-9 * rule.ns_per_element * work.elements_out
        elif runs:
            price = self.prices.node(_converted(execution, node, work), precision)
            known, seconds = known and price is not None, execution.copies(node) * (price or 0.0)
        for size in execution.reorders(node):
            seconds += self.prices.node(_reorder("", size)) or 0.0
        tensors = self._stored(node)
        return NodeCost(
            work.name, work.op_type, work.kind, precision, work.macs, work.params, sum(t.nbytes for t in tensors),
            seconds, 0.0, "" if inside is None else str(inside.name), known or inside is not None,
            self.prices.joules(work if runs else NodeWork("", "", "free"), precision, seconds),
            sum(map(self._compressed, tensors)) if compressed else None,
        )  # fmt: skip

    def _energy(self, rows: Iterable[NodeCost], seconds: float) -> float | None:
        energy = self.prices.profile.energy
        if energy is None:
            return None
        if energy.active_w is not None and energy.pj_per_mac_f32 is None and energy.pj_per_mac_int8 is None:
            return energy.active_w * seconds
        return sum(row.energy_joule or 0.0 for row in rows)

    def _compressed(self, tensor: ir.TensorProtocol) -> int:
        if id(tensor) not in self._packed:
            self._packed[id(tensor)] = len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(tensor.tobytes()))
        return self._packed[id(tensor)]

    def _stored(self, node: ir.Node) -> list[ir.TensorProtocol]:
        """Tensors in the file behind the constants a node reads, each once."""
        found: dict[int, ir.TensorProtocol] = {}
        waiting, seen = list(reversed(node.inputs)), set(node.inputs)
        while waiting:
            if (value := waiting.pop()) is None:
                continue
            producer = self.view.producer(value)
            if (tensor := self.view.weight(value)) is not None:
                found[id(tensor)] = tensor
            elif producer is not None and is_constant(self.view, value):
                fresh = [v for v in producer.inputs if v not in seen]
                seen.update(fresh)
                waiting += reversed(fresh)
        return list(found.values())

    def _other_branches(self, rows: dict[ir.Node, NodeCost]) -> set[ir.Node]:
        """Nodes in the cheaper branches of every If."""
        idle: set[ir.Node] = set()
        for node in reversed(self.view.nodes("If")):
            branches = [tuple(graph.all_nodes()) for graph in bodies(node)]
            branches.sort(key=lambda branch: sum(rows[n].seconds for n in branch if n not in idle))
            idle.update(n for branch in branches[:-1] for n in branch)
        return idle
