"""What of a model can hold its data as int8 or float16 on a device, layer by layer, and for how much.

What has an int8 form is asked of the installed passes, so it is what `optimize` could make; what it costs, of
the cost model. float16 needs a kernel and float32 data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import onnx_ir as ir

from onnxcompress import registry
from onnxcompress.base import Choice, Precision, Stage
from onnxcompress.cost import CostModel
from onnxcompress.profile import Profile
from onnxcompress.questions import offers
from onnxcompress.regions import Form, Layer, Region, find_layers, find_regions
from onnxcompress.view import GraphView
from onnxcompress.work import FAMILY, NodeWork, Shapes, is_constant, work_of

__all__ = ["Forms"]


class Forms:
    """Layers of one model on one device.

    Args:
        view: the model, its values typed.
        profile: the device.
        shapes: concrete shapes by value name.

    Attributes:
        total: what the model costs as it is.
        cost: prices where this model's weights compete for the cache.
        rows: the cost of each node, by name.
        work: the work of each node, by name.
        static: by node, the choice that makes it int8 with known scales.
        dynamic: nodes that can be quantized on the fly.
        refused: by node, why no pass offers an int8 form.
        stranded: by node, why it cannot use the int8 form there is.
        covered: nodes that run inside another's int8 kernel.
        layers: in execution order.
        writers: by value, the layer that makes it.
        readers: by value, the layers that read it.
    """

    def __init__(self, view: GraphView, profile: Profile, shapes: Shapes) -> None:
        self.view, self.profile, self.shapes = view, profile, shapes
        self.total = CostModel(profile).model(view, shapes)
        self.cost = CostModel(profile).for_model(view, shapes)
        self.rows = {row.name: row for row in self.total.nodes}
        self.work = {str(n.name): work_of(view, n, shapes) for n in view.nodes()}
        self.static: dict[str, Choice] = {}
        self.dynamic: set[str] = set()
        self.refused: dict[str, str] = {}
        self.stranded: dict[str, str] = {}
        self._ask_passes()
        self.covered = {name for c in self.static.values() for name in c.site.nodes[1:]}
        self.layers = find_layers(view, self.total, [c.site.nodes for c in self.static.values()])
        self.readers: dict[str, list[str]] = {}
        self.writers: dict[str, str] = {}
        for layer in self.layers:
            self.writers.update(dict.fromkeys(layer.writes, layer.name))
            for value in layer.reads:
                self.readers.setdefault(value, []).append(layer.name)

    def _ask_passes(self) -> None:
        target = self.profile.target()
        for cls in registry.available().values():
            if cls.stage is not Stage.QUANTIZE:
                continue
            offer = offers(cls(), self.view, target, synthetic=False)
            self.refused.update({s.key: s.reason for s in offer.skipped})
            for site, choices in offer.choices.items():
                for choice in choices:
                    if choice.precision == Precision.STATIC:
                        self.static.setdefault(site.key, choice)
                    elif choice.precision == Precision.DYNAMIC:
                        self.dynamic.add(site.key)

    @cached_property
    def both(self) -> tuple[Form, Form]:
        """Ways to hold data that neighbours can share."""
        half = self._in_form("f16", [layer for layer in self.layers if self._is_float(layer)])
        int8 = self._int8_layers()
        needs = {name: [self.writers[v] for v in self.static[name].native] for name in int8}
        return (
            Form("int8", Precision.STATIC, int8, self._quantize, self._dequantize, needs=needs),
            Form("f16", "f16", half, self._cast, self._cast, ("Cast", "Cast")),
        )

    @cached_property
    def regions(self) -> dict[str, list[Region]]:
        return {form.kind: find_regions(self.layers, form) for form in self.both}

    @cached_property
    def region_of(self) -> dict[tuple[str, str], Region]:
        return {
            (kind, name): region for kind, found in self.regions.items() for region in found for name in region.border
        }

    def _int8_layers(self) -> dict[str, float]:
        """Seconds of layers that can be int8, but for those that would convert what they must find as integers."""
        able = self._in_form(Precision.STATIC, [layer for layer in self.layers if layer.name in self.static])
        integer = {
            str(v.name) for name in (*self.static, *self.covered) for v in self.view.node(name).outputs
        }  # fmt: skip

        def ready(value: str) -> bool:
            return value in integer and self.writers.get(value) in able

        while lost := [n for n in able if not all(map(ready, self.static[n].native))]:
            for name in lost:
                maker = self.view.producer(self._value(name, next(v for v in self.static[name].native if not ready(v))))
                front = "the input" if maker is None else f"the {maker.op_type} in front of it"
                self.stranded[name] = f"its input must be integers already, and {front} stays float"
            for name in lost:
                del able[name]
        return able

    def _value(self, node: str, name: str) -> ir.Value:
        return next(v for v in self.view.node(node).inputs if v is not None and v.name == name)

    def _in_form(self, precision: str, layers: Sequence[Layer]) -> dict[str, float]:
        found: dict[str, float] = {}
        for layer in layers:
            parts = [self._part(node, layer, precision) for node in layer.nodes]
            prices = [p for p in parts if p is not None]
            if len(prices) == len(parts):
                found[layer.name] = sum(prices)
        return found

    def _part(self, node: ir.Node, layer: Layer, precision: str) -> float | None:
        """What a node of a layer adds to its seconds at a precision."""
        name = str(node.name)
        work, row, integer = self.work[name], self.rows[name], precision == Precision.STATIC
        if node is layer.nodes[0]:
            return self.cost.node(work, precision)
        if integer and (name in self.static or name in self.covered):
            rules = [f for f in self.profile.fusions if f.precision == precision and f.op == layer.nodes[0].op_type]
            for rule in rules:
                if node.op_type in rule.absorbs:
                    return 1e-9 * rule.ns_per_element * work.elements_out
            return 0.0 if name in self.covered else self.cost.node(work, precision)
        if integer and row.inside:  # it is part of the float kernel only, so it stays float amid integers
            ends = [self._dequantize(str(v.name)) for v in self._activations(node)]
            return (self.cost.node(work) or 0.0) + sum(ends) + sum(self._quantize(str(v.name)) for v in node.outputs)
        if row.inside or not row.seconds:  # fused in float, and so in this form
            return row.seconds
        return self.cost.node(work, precision)

    def _activations(self, node: ir.Node) -> list[ir.Value]:
        return [v for v in node.inputs if v is not None and not is_constant(self.view, v)]

    def _is_float(self, layer: Layer) -> bool:
        """Whether it works on float32 and could be float16 instead."""
        inside = self.view.in_subgraph(layer.nodes[0]) or self.view.quantized_nodes
        return bool(layer.writes) and not inside and all(v.dtype == ir.DataType.FLOAT for v in layer.nodes[0].outputs)

    def _quantize(self, value: str) -> float:
        shape = self.shapes.get(value, ())
        return self.cost.convert(math.prod(shape), "quantize", maps=len(shape) >= 4)

    def _dequantize(self, value: str) -> float:
        shape = self.shapes.get(value, ())
        return self.cost.convert(math.prod(shape), "dequantize", maps=len(shape) >= 4)

    def _cast(self, value: str) -> float:
        shape = self.shapes.get(value, ())
        size = math.prod(shape)
        cast = NodeWork("", "Cast", FAMILY["Cast"], len(shape) >= 4, elements_in=size, elements_out=size)
        return self.cost.node(cast) or 0.0
