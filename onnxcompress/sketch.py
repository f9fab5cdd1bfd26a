"""Nodes drawn before their weights are known: enough to price a rewrite, and what it is later written from.

A drawing is a list of nodes in execution order. Their inputs are values of the model, by name, outputs of nodes
drawn before, and weights still to be worked out, of which only the shape is known (:class:`Slot`). The same drawing
is priced on a profile (:func:`drawn_model`) and written into the model (:func:`draw`), so what was priced is what
is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import RewriteError
from onnxcompress.model import inferred_types
from onnxcompress.rewrite import Attribute, Rewriter
from onnxcompress.view import GraphView

__all__ = ["Drawn", "Slot", "draw", "drawn_model", "redrawn", "slots", "what_makes"]

AttributeValue = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """A float32 weight that is not known yet.

    Attributes:
        shape: its shape.
        name: what its name ends in; two slots of one drawing with the same name are one weight.
    """

    shape: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Drawn:
    """A node that is not there yet.

    Attributes:
        op: operator type of the standard domain.
        inputs: names of values of the model or of outputs drawn before, slots, or None for an absent input.
        outputs: names. Where a name is that of a value of the model, the new output takes that value's place;
            other names are only known within the drawing. "" is an output nobody wants.
        attributes: by name, in the order they are written.
    """

    op: str
    inputs: tuple[str | Slot | None, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, AttributeValue], ...] = ()


def redrawn(node: ir.Node) -> Drawn:
    """A node of a model as a drawing.

    Raises:
        RewriteError: it has a body, or an attribute that is a tensor.
    """
    attributes: list[tuple[str, AttributeValue]] = []
    for name, attribute in node.attributes.items():
        value = attribute.value
        if isinstance(value, (int, float, str)):
            attributes.append((name, value))
        elif isinstance(value, Sequence):
            attributes.append((name, tuple(value)))
        else:
            raise RewriteError(f"{node.name!r} cannot be drawn: attribute {name!r} is {attribute.type.name}")
    inputs = tuple(None if v is None else str(v.name) for v in node.inputs)
    return Drawn(node.op_type, inputs, tuple(str(v.name or "") for v in node.outputs), tuple(attributes))


def what_makes(drawing: Sequence[Drawn], output: str) -> tuple[Drawn, ...]:
    """The nodes of a drawing that one output needs."""
    wanted, found = {output}, []
    for node in reversed(drawing):
        if wanted & set(node.outputs):
            found.append(node)
            wanted.update(i for i in node.inputs if isinstance(i, str))
    return tuple(reversed(found))


def slots(drawing: Sequence[Drawn]) -> tuple[Slot, ...]:
    """The weights of a drawing, in the order they are read, each once."""
    return tuple(dict.fromkeys(i for node in drawing for i in node.inputs if isinstance(i, Slot)))


def draw(
    rewriter: Rewriter,
    drawing: Sequence[Drawn],
    weights: Mapping[Slot, npt.NDArray[np.float32]],
    *,
    after: ir.Node,
    prefix: str,
    values: Mapping[str, ir.Value] | None = None,
    constants: dict[Slot, ir.Value] | None = None,
) -> dict[str, ir.Value]:
    """Writes a drawing into a model; what it is to replace stays, for the caller to take out.

    Args:
        rewriter: of the model.
        drawing: what to write.
        weights: one array for every slot.
        after: node behind which the new ones go; what they read is made before it.
        prefix: of the names of new nodes and weights.
        values: what names in the drawing stand for, where that is not the value of this name.
        constants: weights written already, which are used again; those written now are added.

    Returns:
        The new outputs by the names they have in the drawing.

    Raises:
        RewriteError: a weight is missing or has another shape than its slot; nothing was edited.
    """
    for slot in slots(drawing):
        if slot not in weights or tuple(weights[slot].shape) != slot.shape:
            found = tuple(weights[slot].shape) if slot in weights else None
            raise RewriteError(f"{prefix}: weight {slot.name!r} has to be of shape {slot.shape} and is {found}")
    made: dict[str, ir.Value] = {}
    constants = {} if constants is None else constants
    known = {} if values is None else values
    anchor = after
    for node in drawing:
        inputs: list[ir.Value | None] = []
        for read in node.inputs:
            if isinstance(read, Slot):
                if read not in constants:
                    array = np.ascontiguousarray(weights[read], np.float32)
                    constants[read] = rewriter.constant(array, f"{prefix}_{read.name}", like=after)
                inputs.append(constants[read])
            else:
                inputs.append(None if read is None else made.get(read) or known.get(read) or rewriter.value(read))
        attributes: dict[str, Attribute] = {**dict[str, Attribute](node.attributes)}
        outputs = rewriter.insert(
            node.op, inputs, attributes, after=anchor, name=f"{prefix}_{node.op}",
            outputs=len(node.outputs), dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        made.update({name: value for name, value in zip(node.outputs, outputs, strict=True) if name})
        producer = outputs[0].producer()
        anchor = anchor if producer is None else producer
    return made


def drawn_model(
    drawing: Sequence[Drawn], view: GraphView, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    """The drawing as a model of its own, to be priced.

    Args:
        drawing: what is drawn.
        view: of the model it is for.
        shapes: concrete shapes of that model's values.

    Returns:
        The model, whose slots hold nothing, and concrete shapes of its values, as far as they can be inferred.
    """
    values: dict[str, ir.Value] = {}
    inputs: list[ir.Value] = []
    weights: dict[Slot, ir.Value] = {}
    known: dict[str, tuple[int, ...]] = {}

    def value_of(read: str | Slot | None) -> ir.Value | None:
        if read is None:
            return None
        if isinstance(read, Slot):
            if read not in weights:
                weights[read] = _constant(read.name, ir.tensor(np.broadcast_to(np.float32(0), read.shape)))
            return weights[read]
        if read not in values:
            original = view.value(read)
            tensor = None if original is None else view.weight(original)
            if tensor is not None:
                values[read] = _constant(read, tensor)
            else:
                shape = shapes.get(read)
                dtype = ir.DataType.FLOAT if original is None or original.dtype is None else original.dtype
                values[read] = ir.Value(name=read, type=ir.TensorType(dtype), shape=ir.Shape(shape) if shape else None)
                inputs.append(values[read])
                if shape is not None:
                    known[read] = shape
        return values[read]

    nodes: list[ir.Node] = []
    made: list[ir.Value] = []
    for number, node in enumerate(drawing):
        read = [value_of(i) for i in node.inputs]
        new = ir.node(node.op, read, dict(node.attributes), num_outputs=len(node.outputs), name=f"{node.op}_{number}")
        for name, value in zip(node.outputs, new.outputs, strict=True):
            value.name = name
            if name:
                values[name] = value
                made.append(value)
        nodes.append(new)
    ends = [v for v in made if not v.uses()]
    constants = [v for v in (*weights.values(), *values.values()) if v.const_value is not None]
    opset = {"": view.opset}
    graph = ir.Graph(inputs, ends, nodes=nodes, initializers=constants, opset_imports=opset, name="drawing")
    model = ir.Model(graph, ir_version=view.model.ir_version)
    for value, (_, shape) in inferred_types(model).items():
        concrete = tuple(d for d in shape or () if isinstance(d, int))
        if shape is not None and len(concrete) == len(shape):
            known.setdefault(str(value.name), concrete)
    return model, known


def _constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
