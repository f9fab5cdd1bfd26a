"""Concrete shapes: made up where no run tells them, and those a run leaves open."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.model import inferred_types
from onnxcompress.view import GraphView

__all__ = ["fill_shapes", "made_up_shapes"]

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
"""Extents put in for symbols, so that equal products are no accident."""


def made_up_shapes(view: GraphView) -> dict[str, tuple[int, ...]]:
    """Shapes with a number of its own in place of every symbol, as far as they follow from the graph inputs."""
    numbers: dict[str, int] = {}
    given: dict[str, tuple[int, ...]] = {}
    for value in view.model.graph.inputs:
        if value.shape is None or not value.name:
            continue
        extents = []
        for place, extent in enumerate(value.shape):
            if isinstance(extent, int):
                extents.append(extent)
                continue
            symbol = extent.value or f"{value.name}:{place}"
            number = numbers.setdefault(symbol, _PRIMES[len(numbers) % len(_PRIMES)])
            extents.append(32 * number if place >= 2 and len(value.shape) >= 4 else number)
        given[value.name] = tuple(extents)
    found = dict(given)
    for value, (_, shape) in inferred_types(view.model, given).items():
        if value.name and shape is not None and all(isinstance(d, int) for d in shape):
            found.setdefault(value.name, tuple(d for d in shape if isinstance(d, int)))
    return found


def fill_shapes(view: GraphView, shapes: dict[str, tuple[int, ...]]) -> None:
    """Adds shapes of the branch of an If that a run did not take, as far as they follow from what is around it."""
    open_ = [n for n in view.nodes("If", "Identity", "Squeeze", "Unsqueeze") if not _known(n, shapes)]
    while open_:
        found = {node: shape for node in open_ if (shape := _follows(node, view, shapes)) is not None}
        for node, shape in found.items():
            shapes[str(node.outputs[0].name)] = shape
        open_ = [n for n in open_ if n not in found] if found else []


def _known(node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> bool:
    return len(node.outputs) != 1 or str(node.outputs[0].name) in shapes


def _follows(node: ir.Node, view: GraphView, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    if node.op_type == "If":
        ends = [node.attributes[name].as_graph().outputs[0] for name in ("then_branch", "else_branch")]
        first, second = (shapes.get(str(v.name)) for v in ends)
        return first if first == second else None
    source = node.inputs[0]
    shape = None if source is None else shapes.get(str(source.name))
    if shape is None or node.op_type == "Identity":
        return shape
    given = view.array(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes.get_ints("axes", None) if given is None else [int(a) for a in given.reshape(-1)]
    if node.op_type == "Squeeze":
        gone = {a % len(shape) for a in axes} if axes is not None else {k for k, n in enumerate(shape) if n == 1}
        return tuple(n for k, n in enumerate(shape) if k not in gone) if all(shape[k] == 1 for k in gone) else None
    return None if axes is None else np.expand_dims(np.empty(shape, np.bool_), tuple(axes)).shape
