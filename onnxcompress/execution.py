"""What onnxruntime runs of a model: which kernel runs which nodes, and at which precision.

The file is not what runs. Nodes that only see constants are folded away, cheap activations run inside their
producer, and in a quantized model a node between DequantizeLinear and QuantizeLinear is one integer kernel
where the profile has one; where it has none the node runs in float and both conversions are paid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import cached_property

import onnx_ir as ir

from onnxcompress.layout import Layouts
from onnxcompress.profile_schema import Profile
from onnxcompress.profile_tables import Fusion, Layout
from onnxcompress.view import GraphView
from onnxcompress.work import FAMILY, NodeWork, Shapes, is_constant, shape_of, work_of

__all__ = ["REMOVED", "Execution", "float_name", "touches"]

REMOVED = ("Identity", "Dropout", "Constant")
"""Operators that are gone once a model is loaded."""

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_BYTES = (ir.DataType.UINT8, ir.DataType.INT8)
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Sum")
_BINARY = ("Add", "Sub", "Mul", "Div", "Where", "Min", "Max")
_DYNAMIC = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul")


class Execution:
    """A model as a profile's runtime executes it.

    Args:
        profile: the device.
        view: the model.
        shapes: concrete shapes by value name.

    Attributes:
        inside: node -> the node whose kernel runs it.
        rule: absorbed node -> the rule that lets it vanish, where there is one.
        integer: nodes that run as integer kernels.
        blocked: nodes that work in the blocked layout.
        reordered: node -> the maps that are brought into or out of the blocked layout for it.
    """

    def __init__(self, profile: Profile, view: GraphView, shapes: Shapes) -> None:
        self.profile, self.view, self.shapes = profile, view, shapes
        self.inside: dict[ir.Node, ir.Node] = {}
        self.rule: dict[ir.Node, Fusion] = {}
        self.integer: set[ir.Node] = set()
        self._work: dict[ir.Node, NodeWork] = {}
        self.blocked: set[ir.Node] = set()
        self._plain: set[ir.Node] = set()
        self._by_op: dict[tuple[str, str, str], list[Fusion]] = {}
        for fusion in profile.fusions:
            self._by_op.setdefault((fusion.op, fusion.precision, fusion.side), []).append(fusion)
        self._fuse(view.nodes())
        self.reordered: dict[ir.Node, list[ir.Value]] = {}
        if profile.layout is not None:
            layouts = Layouts(profile.layout, view, self._floats, self._shape, self._static, self.inside)
            self.blocked = layouts.blocked
            self._release(profile.layout)
            for found in layouts.reorders:
                self.reordered.setdefault(found.node, []).append(found.value)
            self._plain = layouts.plain
            self._work.clear()

    def reshaped(self, changes: Mapping[str, tuple[int, ...]], *, same_structure: bool = False) -> Execution:
        """The same model with other shapes.

        What runs inside what hangs on ranks, channels and which shapes are equal; where only extents change it is
        kept, and only nodes that read or make a changed value are looked at again.

        Args:
            changes: new shapes by value name.
            same_structure: the caller knows that what runs inside what stays; it is not looked at again.
        """
        shapes = {**self.shapes, **changes}
        if not same_structure and any(
            _outline(self.shapes.get(name)) != _outline(shape) for name, shape in changes.items()
        ):
            return Execution(self.profile, self.view, shapes)
        other = copy.copy(self)
        other.shapes = shapes
        touched = {n for n in self.view.nodes() if touches(n, changes)}
        if not same_structure and any(self._relations(node) != other._relations(node) for node in touched):
            return Execution(self.profile, self.view, shapes)
        other._work = {n: w for n, w in self._work.items() if n not in touched}
        return other

    def _relations(self, node: ir.Node) -> tuple[bool, ...]:
        """Which of the shapes a node works on are equal, and whether it enlarges by whole factors."""
        shapes = [self._shape(v) for v in (*node.inputs, *node.outputs[:1])]
        first, last = shapes[0] if shapes else None, shapes[-1] if shapes else None
        whole = (b > 0 and o % b == 0 for b, o in zip(first or (), last or (), strict=False))
        return (*(s == first for s in shapes), *(s == last for s in shapes), all(whole))

    # --- questions ---------------------------------------------------------------------------------------

    def work(self, node: ir.Node) -> NodeWork:
        """Work of a node."""
        if node not in self._work:
            work = work_of(self.view, node, self.shapes)
            if node in self.blocked:
                # Fewer channels than a block are read from the plain layout, by the kernel of a first layer.
                kind = "conv_stem" if node in self._plain else work.kind
                work = replace(work, blocked=True, kind=kind)
            self._work[node] = work
        return self._work[node]

    def precision(self, node: ir.Node) -> str:
        """How a node runs: one of :data:`~onnxcompress.profile_tables.PRECISIONS`."""
        if node in self.integer or node.op_type.startswith("QLinear"):
            return "u8s8"
        if node.op_type == "MatMulNBits":
            bits = node.attributes.get("bits")
            return f"w{4 if bits is None else bits.as_int()}"
        if node.op_type in _DYNAMIC:
            return "dynamic"
        if self._moves_integers(node):
            return "u8s8"
        return "f16" if node.outputs and node.outputs[0].dtype == ir.DataType.FLOAT16 else "f32"

    def _moves_integers(self, node: ir.Node) -> bool:
        """Whether a node works on 8-bit integers as they are: a lookup in a quantized table, a turned map."""
        data = node.inputs[0] if node.inputs else None
        if data is None or data.dtype not in _BYTES or node.op_type in (*_CONVERSIONS, "Cast"):
            return False
        work = self.work(node)
        return self.profile.kernel(work.kind, "u8s8", op_type=float_name(node.op_type), maps=work.maps) is not None

    def runs(self, node: ir.Node) -> bool:
        """Whether a kernel of its own runs a node."""
        return node not in self.inside and node.op_type not in REMOVED and not self._folded(node)

    def reorders(self, node: ir.Node) -> list[int]:
        """Sizes of the maps that are reordered for a node."""
        return [math.prod(self._shape(value) or ()) for value in self.reordered.get(node, ())]

    def copies(self, node: ir.Node) -> int:
        """How many times a node runs: onnxruntime gives each float reader a DequantizeLinear of its own."""
        if node.op_type != "DequantizeLinear" or is_constant(self.view, node.outputs[0]):
            return 1
        floats = sum(n not in self.integer for n, _ in self.view.consumers(node.outputs[0]))
        return max(floats + int(self.view.is_output(node.outputs[0])), 1)

    def keeps_layout(self, node: ir.Node) -> bool:
        """Whether the float side of a conversion is a kernel with a layout of its own, not a mere move."""
        quantizes = node.op_type == "QuantizeLinear"
        maker = self.view.producer(node.inputs[0]) if quantizes and node.inputs[0] is not None else None
        others = [maker] if quantizes else [n for n, _ in self.view.consumers(node.outputs[0])]
        return any(n is not None and FAMILY.get(n.op_type) not in ("move", "free") for n in others)

    def _floats(self, node: ir.Node) -> bool:
        return self.precision(self.inside.get(node, node)) == "f32" and not self._folded(node)

    def _static(self, value: ir.Value) -> bool:
        """Known once the model is loaded; what comes out of a DequantizeLinear is not."""
        producer = self.view.producer(value)
        return self.view.weight(value) is not None or (producer is not None and self._folded(producer))

    def _shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        return None if value is None else shape_of(self.view, self.shapes, value)

    def _folded(self, node: ir.Node) -> bool:
        """Computed once, when the model is loaded. Of a DequantizeLinear that is not so."""
        if node.op_type == "DequantizeLinear" or not node.outputs:
            return False
        return is_constant(self.view, node.outputs[0]) and not self._reads_dequantized(node)

    def _reads_dequantized(self, node: ir.Node) -> bool:
        return any(v in self._dequantized for v in node.inputs)

    @cached_property
    def _dequantized(self) -> frozenset[ir.Value]:
        """Constants that come out of a DequantizeLinear, or are made of such."""
        found: set[ir.Value | None] = set()
        for node in self.view.nodes():
            if node.op_type == "DequantizeLinear" or any(v in found for v in node.inputs):
                found.update(v for v in node.outputs if is_constant(self.view, v))
        return frozenset(v for v in found if v is not None)

    # --- what runs inside what --------------------------------------------------------------------------

    def _fuse(self, nodes: tuple[ir.Node, ...]) -> None:
        for node in nodes:
            if node in self.inside or node.op_type in _CONVERSIONS:
                continue
            if node.op_type == "MatMulInteger":
                self._fuse_dynamic(node)
            elif not self._fuse_integer(node):
                for follower, rule in self._followers(node, "f32"):
                    self._absorb(node, follower, rule)
                if (feeder := self._predecessor(node)) is not None:
                    self._absorb(node, *feeder)
        for node in nodes:
            if node.op_type == "DequantizeLinear":
                readers = [n for n, _ in self.view.consumers(node.outputs[0])]
                if readers and all(n in self.integer for n in readers):
                    self.inside[node] = readers[0]

    def _absorb(self, node: ir.Node, other: ir.Node, rule: Fusion) -> None:
        self.inside[other] = node
        self.rule[other] = rule

    def _release(self, layout: Layout) -> None:
        """Lets those run by themselves that a kernel does not take in the layout it works in."""
        for node in self.view.nodes():
            host, rule = self.inside.get(node), self.rule.get(node)
            if host is None or rule is None or rule.side != "after" or rule.precision != "f32" or node in self.blocked:
                continue
            data = [v for v in node.inputs if v is not None and not is_constant(self.view, v)]
            makers = [self.view.producer(v) for v in data]
            # Only blocked convolutions add another map; what comes after a sum that is left alone is so, too.
            summed = host.op_type in layout.starts and len(data) > 1
            if host in self.blocked or summed or not any(m is host or self.inside.get(m) is host for m in makers if m):
                del self.inside[node], self.rule[node]

    def _followers(self, node: ir.Node, precision: str) -> list[tuple[ir.Node, Fusion]]:
        """Nodes that vanish into a producer, one behind the other, each with the rule that says so."""
        rules = self._rules(node, precision, "after")
        found: list[tuple[ir.Node, Fusion]] = []
        last, reached = node, 0
        while rules and (reader := self._only_reader(last)) is not None:
            others = [v for v in reader.inputs if v is not None and v is not last.outputs[0]]
            if len(others) != sum(v is not None for v in reader.inputs) - 1:
                break
            rule = next((f for f in rules if self._fits(f, node, last, reader, others)), None)
            if rule is None or reader in self.inside:
                break
            if node.op_type not in FAMILY:  # convolutions and products take constants, then one sum, then an activation
                step = 0 if rule.constant_operand else 1 if reader.op_type in _ARITHMETIC else 2
                if reached and step <= reached:
                    break
                reached = step
            found.append((reader, rule))
            last = reader
        return found

    def _fits(self, rule: Fusion, node: ir.Node, last: ir.Node, reader: ir.Node, others: list[ir.Value]) -> bool:
        """Whether a rule lets ``reader`` vanish into ``node``, of whose chain ``last`` is the end so far."""
        if reader.op_type not in rule.absorbs:
            return False
        if rule.same_operand:
            return all(v in node.inputs for v in others)
        data = self._shape(last.outputs[0])
        constant = all(is_constant(self.view, v) for v in others)
        if rule.constant_operand:
            return constant and all(self._per_channel(node, reader, self._shape(v), data) for v in others)
        if constant and (reader.op_type not in _ARITHMETIC or node.op_type in FAMILY):
            return True
        return not constant and all(self._shape(v) == data for v in others)

    def _per_channel(
        self, node: ir.Node, reader: ir.Node, operand: tuple[int, ...] | None, data: tuple[int, ...] | None
    ) -> bool:
        """Whether a constant operand can go into the weights of a convolution or a product."""
        if operand is None or not data:
            return False
        if reader.op_type not in _ARITHMETIC:  # what a normalization reads is one number per channel
            return len(data) > 1 and operand == data[1:2]
        bare = operand
        while bare[:1] == (1,) and len(bare) > 1:
            bare = bare[1:]
        if not node.op_type.startswith("Conv"):
            return bare == data[-1:] and len(operand) <= len(data)
        first = next((v for v in reader.inputs if v is not None), None)
        if first is None or is_constant(self.view, first):  # only looked for behind the convolution's result
            return False
        channels = (data[1], *(1,) * (len(data) - 2))
        return operand in (channels, (1, *channels)) or (operand == () and reader.op_type == "Mul")

    def _rules(self, node: ir.Node, precision: str, side: str) -> list[Fusion]:
        return self._by_op.get((node.op_type, precision, side), [])

    def _predecessor(self, node: ir.Node) -> tuple[ir.Node, Fusion] | None:
        """The node that vanishes into the one it feeds, as a Pad does into a Conv."""
        rules = self._rules(node, "f32", "before")
        feeder = self.view.producer(node.inputs[0]) if rules and node.inputs[0] is not None else None
        if feeder is None or self._only_reader(feeder) is not node:
            return None
        constant = all(v is None or is_constant(self.view, v) for v in feeder.inputs[1:])
        rule = next((f for f in rules if feeder.op_type in f.absorbs and (constant or not f.constant_operand)), None)
        return None if rule is None else (feeder, rule)

    def _only_reader(self, node: ir.Node) -> ir.Node | None:
        if len(node.outputs) != 1 or self.view.is_output(node.outputs[0]):
            return None
        readers = [n for n, _ in self.view.consumers(node.outputs[0])]
        return readers[0] if len(set(readers)) == 1 else None

    def _fuse_integer(self, node: ir.Node) -> bool:
        """Whether a node between DequantizeLinear and QuantizeLinear is an integer kernel."""
        data = [v for v in node.inputs if v is not None and not is_constant(self.view, v)]
        if node.op_type == "Gather":  # looks up integers in an integer table
            data = [v for v in node.inputs[:1] if v is not None]
        data = [v for v in data if v.dtype != ir.DataType.INT64]  # shapes and the like, whoever computes them
        data += self._operands(node)
        fed = [self.view.producer(v) for v in data]
        if not fed or any(n is None or n.op_type != "DequantizeLinear" for n in fed):
            return False
        followers = self._followers(node, "u8s8")
        outputs = (followers[-1][0] if followers else node).outputs
        readers = [n for v in outputs for n, _ in self.view.consumers(v)]
        leaves = any(self.view.is_output(v) for v in outputs)
        if leaves or not readers or any(n.op_type != "QuantizeLinear" for n in readers):
            return False
        work = self.work(node)
        if self.profile.kernel(work.kind, "u8s8", op_type=float_name(node.op_type), maps=work.maps) is None:
            return False
        self.integer.add(node)
        for follower, rule in followers:
            self._absorb(node, follower, rule)
        self.inside.update(dict.fromkeys(readers, node))
        return True

    def _operands(self, node: ir.Node) -> list[ir.Value]:
        """Constants that have to be integers, too: weights, and what is added or multiplied by the element."""
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            values = node.inputs[1:2]
        else:
            values = node.inputs if node.op_type in _BINARY else ()
        return [v for v in values if v is not None and is_constant(self.view, v)]

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


def touches(node: ir.Node, names: Container[str]) -> bool:
    """Whether a node reads or makes one of some values."""
    return any(v is not None and v.name in names for v in (*node.inputs, *node.outputs))


def _outline(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """What fusions and layouts hang on: rank, channels and what is repeated of a map, all of anything else."""
    return shape if shape is None or len(shape) < 4 else (len(shape), shape[1], *(int(d == 1) for d in shape[2:]))


def float_name(op_type: str) -> str:
    """The float operator behind an integer one: QLinearConv is a Conv."""
    for prefix in ("QLinear", "DynamicQuantize"):
        if op_type.startswith(prefix) and len(op_type) > len(prefix):
            return op_type.removeprefix(prefix)
    return op_type.removesuffix("Integer")
