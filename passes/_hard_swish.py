"""HardSwish in the forms exporters write it: x * clip(x / 6 + 1/2, 0, 1), from smaller operators."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcompress.view import GraphView

__all__ = ["hard_swish_of"]

Same = Mapping[ir.Value, ir.Value]


def hard_swish_of(node: ir.Node, view: GraphView, same: Same) -> ir.Value | None:
    """Returns x, if the node is the last of the nodes that compute HardSwish(x) and nobody reads what is in between.

    Args:
        node: a Mul or Div.
        view: for constants.
        same: values about to be replaced by others.
    """
    factor = _scale(node, view)
    if factor is not None:  # (x * clip(x + 3, 0, 6)) / 6
        product = _inner(factor[0], ("Mul",), same)
        return None if product is None or not _near(factor[1], 1 / 6) else _product(product, view, same, 6.0)
    return _product(node, view, same, 1.0) if node.op_type == "Mul" else None


def _product(node: ir.Node, view: GraphView, same: Same, height: float) -> ir.Value | None:
    """Returns x of x * gate(x), where the gate rises to ``height``."""
    for x, gate in (node.inputs, tuple(node.inputs)[::-1]) if len(node.inputs) == 2 else ():
        if x is not None and gate is not None and _gate_of(gate, view, same, height) is same.get(x, x):
            return x
    return None


def _gate_of(gate: ir.Value, view: GraphView, same: Same, height: float) -> ir.Value | None:
    """Returns x of height * clip(x / 6 + 1/2, 0, 1)."""
    node = _inner(gate, ("HardSigmoid", "Clip", "Mul", "Div"), same)
    if node is None:
        return None
    if node.op_type == "HardSigmoid":
        slope = _near(node.attributes.get_float("alpha", 0.2), 1 / 6)
        return _source(node, same) if height == 1 and slope and node.attributes.get_float("beta", 0.5) == 0.5 else None
    if node.op_type != "Clip":
        factor = _scale(node, view)
        if height != 1 or factor is None or not _near(factor[1], 1 / 6):
            return None
        return _gate_of(factor[0], view, same, 6.0) if _inner(factor[0], ("Clip",), same) else None
    low = _number(node, 1, "min", view)
    high = _number(node, 2, "max", view)
    if height != 6 or low != 0 or high != 6:
        return None
    addition = _inner(node.inputs[0], ("Add",), same)
    if addition is None:
        return None
    for index in (0, 1):
        if _number(addition, 1 - index, "", view) == 3:
            value = addition.inputs[index]
            return None if value is None else same.get(value, value)
    return None


def _inner(value: ir.Value | None, ops: tuple[str, ...], same: Same) -> ir.Node | None:
    """The producer, if it is one of these operators and the value is read once."""
    if value is None:
        return None
    value = same.get(value, value)
    node = value.producer()
    if (
        node is None
        or node.op_type not in ops
        or node.domain != ""
        or len(value.uses()) != 1
        or value.is_graph_output()
    ):
        return None
    return node


def _source(node: ir.Node, same: Same) -> ir.Value | None:
    value = node.inputs[0]
    return None if value is None else same.get(value, value)


def _scale(node: ir.Node, view: GraphView) -> tuple[ir.Value, float] | None:
    """Value and factor of a product or quotient with a scalar."""
    if node.op_type == "Div" and node.inputs[0] is not None and (by := _number(node, 1, "", view)):
        return node.inputs[0], 1 / by
    for index in (0, 1) if node.op_type == "Mul" else ():
        factor, value = _number(node, 1 - index, "", view), node.inputs[index]
        if factor is not None and value is not None:
            return value, factor
    return None


def _number(node: ir.Node, index: int, attribute: str, view: GraphView) -> float | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return node.attributes.get_float(attribute, None) if attribute else None
    array = view.array(value) if value.const_value is not None and value.const_value.size == 1 else None
    return None if array is None or array.ndim > 1 or array.dtype.kind != "f" else float(array.item())


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) < 1e-6 * wanted
