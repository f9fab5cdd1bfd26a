"""Cheaper arithmetic for the same function.

    x / c = x * (1 / c)             c constant: a product is faster, and has an integer kernel
    (x * a) * b = x * (a * b)       a, b constants, nobody else reads x * a

Both hold up to float rounding; the constants are combined in float64 and stored as float32.
Exporters write HardSwish as x * clip(x + 3, 0, 6) / 6 and scale the result in the next node, which
this makes one product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Stage
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["ReduceStrength"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ReduceStrength(Pass):
    """Division by a constant becomes a product, and products with constants in a row become one."""

    name: ClassVar[str] = "reduce_strength"
    stage: ClassVar[Stage] = Stage.NORMALISE
    place: ClassVar[int] = 2
    lossless: ClassVar[bool] = True
    ops: ClassVar[tuple[str, ...]] = ("Div", "Mul")

    def match(self, node: ir.Node, view: GraphView) -> Site:
        data, constant = _split(node)
        if data is None or constant is None:
            raise Skip("it does not combine a value with a constant")
        if node.op_type == "Mul" and _factor_before(data) is None:
            raise Skip("there is no product with a constant before it")
        if node.op_type == "Div" and not np.all(np.isfinite(_as_factor(node, constant))):
            raise Skip("the reciprocal of its constant is not finite in float32")
        return Site.of(node)

    def choices(self, site: Site, view: GraphView, target: Target) -> Iterable[Choice]:
        return [Choice(site, "product", effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        data, constant = _split(node)
        if data is None or constant is None:
            raise Skip("it does not combine a value with a constant any more")
        factor = _as_factor(node, constant)
        before = _factor_before(data)
        if before is not None:
            inner, constant = _split(before)
            both = None if constant is None else _product(_as_factor(before, constant), factor)
            if inner is None or both is None:
                before = None
            else:
                data, factor = inner, both
        if before is None and node.op_type == "Mul":
            raise Skip("the two constants do not combine into one as small")
        value = rewriter.constant(factor, f"{node.name}_factor", like=node)
        (result,) = rewriter.insert("Mul", [data, value], before=node, dtype=ir.DataType.FLOAT)
        rewriter.replace_node(node, result)
        if before is not None:
            rewriter.remove(before)


def _split(node: ir.Node) -> tuple[ir.Value | None, Array | None]:
    """The value computed at run time and the float32 constant of a Mul or Div; None where there is none."""
    first, second = node.inputs[0], node.inputs[1]
    for data, other in ((first, second), (second, first)) if node.op_type == "Mul" else ((first, second),):
        tensor = other.const_value if other is not None and other.is_initializer() else None
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and data is not None and not data.is_initializer():
            return data, np.asarray(tensor.numpy())
    return None, None


def _as_factor(node: ir.Node, constant: Array) -> Array:
    if node.op_type == "Mul":
        return constant
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(1.0 / constant.astype(np.float64), np.float32)


def _product(first: Array, second: Array) -> Array | None:
    """Two constants as one; None if it would be larger than both, or not finite."""
    with np.errstate(over="ignore"):
        both = np.asarray(first.astype(np.float64) * second.astype(np.float64), np.float32)
    return both if both.size <= max(first.size, second.size) and np.all(np.isfinite(both)) else None


def _factor_before(data: ir.Value) -> ir.Node | None:
    """The Mul or Div by a constant that makes a value nobody else reads."""
    node = data.producer()
    if node is None or node.op_type not in ("Mul", "Div") or len(data.uses()) != 1 or data.is_graph_output():
        return None
    _, constant = _split(node)
    if constant is None or not np.all(np.isfinite(_as_factor(node, constant))):
        return None
    return node
