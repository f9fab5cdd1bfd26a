"""Where a runtime keeps feature maps in blocks of channels, and where it has to reorder them.

Float convolutions of onnxruntime's CPU provider work on maps whose channels are cut into blocks
(NCHWc). Convolutions and pooling start such a layout, some operators carry it on, and everything else makes
onnxruntime put a ReorderOutput behind the maker and a ReorderInput before the next reader, one for each value.
The rules are those of its ``nchwc_transformer.cc``; which operators, block and alignment are data of the profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.profile_tables import Layout
from onnxcompress.view import GraphView
from onnxcompress.work import FAMILY, groups_of, is_constant, text_of

__all__ = ["Layouts", "Reorder"]

Shape = tuple[int, ...]
ShapeOf = Callable[["ir.Value | None"], Shape | None]


@dataclass(frozen=True)
class Reorder:
    """A change of layout.

    Attributes:
        node: whose reading (into blocks) or making (out of them) asks for it.
        value: what is reordered.
        inwards: into blocks.
    """

    node: ir.Node
    value: ir.Value
    inwards: bool


class Layouts:
    """The float feature maps of a model.

    Args:
        layout: the rules.
        view: the model.
        floats: whether a node runs as a float kernel, or inside one.
        shape: of a value, None if unknown.
        static: whether a value is known once the model is loaded.
        absorbed: node -> the node whose kernel runs it; these follow their host where that kernel takes them.

    Attributes:
        blocked: nodes that work in the blocked layout.
        plain: convolutions among them that read the plain layout.
        reorders: every change of layout the model needs.
    """

    def __init__(
        self, layout: Layout, view: GraphView, floats: Callable[[ir.Node], bool], shape: ShapeOf,
        static: Callable[[ir.Value], bool], absorbed: dict[ir.Node, ir.Node],
    ) -> None:  # fmt: skip
        self.layout, self.view, self.floats, self.shape = layout, view, floats, shape
        self.static, self.absorbed = static, absorbed
        self._values: set[ir.Value] = set()
        self.blocked: set[ir.Node] = set()
        self.plain: set[ir.Node] = set()
        self.reorders: tuple[Reorder, ...] = tuple(self._found())

    def _found(self) -> Iterator[Reorder]:
        inwards: set[ir.Value] = set()
        readers: dict[ir.Node, list[ir.Value]] = {}
        for node in self.view.nodes():
            takes = self._takes(node)
            if takes is None:
                continue
            readers[node] = takes
            self.blocked.add(node)
            self._values.update(v for v in node.outputs[:1])
            for value in takes:
                if value not in self._values and value not in inwards:
                    inwards.add(value)
                    yield Reorder(node, value, inwards=True)
        for value in [v for n in self.view.nodes() for v in n.outputs[:1] if v in self._values]:
            maker = self.view.producer(value)
            outside = [n for n, _ in self.view.consumers(value) if value not in readers.get(n, ())]
            if maker is not None and (outside or self.view.is_output(value)):
                yield Reorder(maker, value, inwards=False)

    def _takes(self, node: ir.Node) -> list[ir.Value] | None:
        """Values a node reads in blocks if it makes a blocked one; None if it does not."""
        if not self.floats(node):
            return None
        data = node.inputs[0] if node.inputs else None
        out = self.shape(node.outputs[0]) if node.outputs else None
        if data is None or out is None or len(out) != 4:
            return None
        if node in self.absorbed:
            return self._with_host(node)
        if node.op_type == "Conv":
            return self._convolution(node, data)
        if FAMILY.get(node.op_type) == "pool" and (len(node.outputs) > 1 or out[1] % self.layout.block):
            return None  # pooling takes whole blocks only, and none that also tells where the maxima were
        if node.op_type in self.layout.starts:
            return [data] if out[1] % self.layout.align == 0 else None
        return self._carried(node, data, out)

    def _computed(self, node: ir.Node) -> list[ir.Value]:
        return [v for v in node.inputs if v is not None and not is_constant(self.view, v)]

    def _with_host(self, node: ir.Node) -> list[ir.Value] | None:
        """Of a node inside another: a blocked kernel takes no plain map, and few operators after a sum."""
        inputs = self._computed(node)
        if not inputs or any(v not in self._values for v in inputs):
            return None
        maker = self.view.producer(inputs[0])
        summed = maker in self.absorbed and maker is not None and len(self._computed(maker)) > 1
        return inputs if not summed or node.op_type in (*self.layout.carries, *self.layout.joins) else None

    def _carried(self, node: ir.Node, data: ir.Value, out: Shape) -> list[ir.Value] | None:
        if node.op_type in self.layout.carries:
            carried = node.op_type not in ("Resize", "Upsample") or self._upsamples(node, data, out)
            return [data] if data in self._values and carried else None
        if node.op_type not in self.layout.joins:
            return None
        inputs = self._computed(node)
        if not inputs or any(v not in self._values for v in inputs):
            return None
        if node.op_type == "Mul" and len(inputs) == 1:  # becomes a depthwise convolution
            scales = [self.shape(v) for v in node.inputs[1:]]
            return inputs if data in inputs and scales[0] in ((out[1], 1, 1), (1, out[1], 1, 1)) else None
        if len(inputs) < sum(v is not None for v in node.inputs):
            return None
        shapes = [self.shape(v) for v in inputs]
        if node.op_type == "Concat":
            axis = node.attributes.get("axis")
            whole = all(s is not None and s[1] % self.layout.block == 0 for s in shapes)
            return inputs if whole and axis is not None and axis.as_int() == 1 else None
        if node.op_type in ("Add", "Sum"):  # may repeat a pixel, but no channel
            return inputs if all(s is not None and len(s) == 4 and s[1] == out[1] for s in shapes) else None
        return inputs if all(s == out for s in shapes) else None

    def _upsamples(self, node: ir.Node, data: ir.Value, out: Shape) -> bool:
        """By whole factors, and in the ways there are blocked kernels for."""
        before = self.shape(data)
        if before is None or before[1] != out[1] or any(b < 1 or o % b for b, o in zip(before, out, strict=True)):
            return False
        old = node.op_type == "Upsample" or self.view.opset < 11
        how = text_of(node, "coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
        rounds = text_of(node, "nearest_mode", "floor" if old else "round_prefer_floor")
        mode = text_of(node, "mode", "nearest")
        if mode == "nearest":
            return how == "asymmetric" and rounds == "floor"
        return mode == "linear" and how in ("asymmetric", "half_pixel", "align_corners")

    def _convolution(self, node: ir.Node, data: ir.Value) -> list[ir.Value] | None:
        weight = self.shape(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or len(weight) != 4 or "Conv" not in self.layout.starts:
            return None
        if any(v is not None and not self.static(v) for v in node.inputs[1:]):
            return None  # weights are brought into blocks when the model is loaded
        group = groups_of(node, self.shape(data), self.shape(node.outputs[0]), weight)
        outer, inner = weight[:2]
        if group > 1:
            if outer % self.layout.align:
                return None
            depthwise = inner == 1 and outer == group
            whole = inner % self.layout.block == 0 and (outer // group) % self.layout.block == 0
            return [data] if depthwise or whole else None
        if inner < self.layout.block:
            self.plain.add(node)
            return []  # reads the plain layout, makes the blocked one
        return [data] if inner % self.layout.align == 0 else None
