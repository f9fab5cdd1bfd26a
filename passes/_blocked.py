"""Weights of 4 or 8 bits in blocks, read by a kernel that multiplies them as they are stored.

    y_n = b_n + sum_B s_nB sum_(k in B) q_nk x_k        q in [-2^(b-1), 2^(b-1) - 1], a scale for each block of a column

onnxruntime's com.microsoft.MatMulNBits reads b/8 bytes for a weight where the float kernel reads 4, so it gains where
reading weights is the work: products of one or two rows. It is written as such and not as DequantizeLinear and
MatMul: these fuse to it only where no Relu follows, and unfused they dequantize in every call (3-8 times slower,
measured). ``accuracy_level`` is 4, as in what profiles are fitted to: inside, x is rounded to int8, a scale for
each block of a row, which is noise of -42 to -46 dB. :func:`simulate` runs the very node, so that is part of its price.

Four bits are rounded with feedback, to what calibration saw the product read; 8 bits are fine enough without.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from onnxcompress.base import Choice, Site, Skip, Term
from onnxcompress.passes import _dynamic, _weight_storage
from onnxcompress.passes._blocks import Blocks, Feedback, Floats, Form, Rounding, pack, rounded
from onnxcompress.passes._int8 import WeightOptions, calibrated_name, gate, remembered, remembered_for
from onnxcompress.passes._linear_maps import MOST_FEATURES
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need, Statistic
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["OPS", "Blocking", "Weight", "apply", "choice", "obstacle", "rounding_with", "simulate", "weight_of"]

OPS = ("MatMul", "Gemm")
"""Operators whose weights may be in blocks."""

_ACCURACY_LEVEL = 4
_COARSE = (4,)
"""Bits that are rounded with feedback."""
_IN_THE_FLOAT_KERNEL = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh")
"""What runs inside a float Gemm, and by itself behind this kernel."""


@dataclass(frozen=True)
class Blocking:
    """What a choice is.

    Attributes:
        form: of the weight.
        add: name of the Add that becomes the bias; "" for none.
        table: how the weight is stored for those who look up rows in it; None if nobody does.
        gram: second moments that it is rounded with; None if without.
    """

    form: Form
    add: str
    table: WeightOptions | None
    gram: Need | None = None


@dataclass(frozen=True)
class Weight:
    """The matrix of a product.

    Attributes:
        value: the initializer.
        tensor: what it holds.
        outputs_first: its axes are (outputs, inputs).
        turned: the Transpose between it and the product, if there is one.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    outputs_first: bool
    turned: ir.Node | None

    def stored_bytes(self, form: Form) -> int:
        """Bytes it takes in blocks, scales included."""
        inputs, outputs = self.tensor.shape.numpy()
        if self.outputs_first:
            inputs, outputs = outputs, inputs
        return int(outputs * -(-inputs // form.block) * (form.block * form.bits // 8 + 4))


# --- finding -----------------------------------------------------------------------------------


def obstacle(node: ir.Node, target: Target, form: Form) -> str | None:
    """Why the weight of a node cannot be in such blocks; None if it can."""
    if node.op_type not in OPS:
        return "only matrix products read weights in blocks"
    if not target.contrib_ops:
        return "the target runs standard operators only, and MatMulNBits, which reads blocks, is com.microsoft"
    if form.bits not in target.weight_only_bits:
        there = " and ".join(map(str, target.weight_only_bits))
        have = f"it has one for {there} bits" if there else "nor for any other number of bits"
        return f"the target has no kernel for weights of {form.bits} bits in blocks, {have}"
    weight = weight_of(node)
    if weight is None:
        return "its weight is not a float32 constant of two axes"
    if weight.stored_bytes(form) >= weight.tensor.nbytes:
        return f"in blocks of {form.block} its weight would not be smaller"
    return _dynamic.product_obstacle(node)


def choice(
    site: Site, node: ir.Node, view: GraphView, form: Form, table: WeightOptions, *, feedback: bool = False
) -> Choice:
    """The choice of a form at a node that nothing is in the way of.

    Args:
        site: of the node.
        node: the product.
        view: of the model.
        form: of the weight.
        table: how what else is looked up in the weight is stored, if it is a table.
        feedback: it is rounded to what the product reads, if it is coarse.
    """
    weight, add = _weight(node), _bias_add(node, view)
    name, saved = str(weight.value.name), -weight.stored_bytes(form)
    adds: list[tuple[str, str]] = []
    follower = _only_reader(node, view) if node.op_type == "Gemm" else None
    if follower is not None and follower.op_type in _IN_THE_FLOAT_KERNEL:
        adds.append((follower.op_type, str(node.outputs[0].name)))
    lookups = _lookups(weight)
    if weight.turned is None or lookups:
        saved += weight.tensor.nbytes
    if lookups:
        rows, columns = weight.tensor.shape.numpy()
        saved -= rows * columns + 4 * rows
        adds += [(op, str(n.outputs[0].name)) for n in lookups for op in ("Cast", "Mul")]
    return Choice(
        site,
        form.name,
        form.precision,
        adds=tuple(adds),
        removes=() if add is None else (str(add.name),),
        bytes_saved=saved,
        terms=(Term(form.name, name), *((Term("weight", name),) if lookups else ())),
        detail=Blocking(
            form,
            "" if add is None else str(add.name),
            table if lookups else None,
            _gram(node, form) if feedback and not view.in_subgraph(node) else None,
        ),
        effects=False,
    )


def _gram(node: ir.Node, form: Form) -> Need | None:
    """Second moments to round with: what other passes that fit weights ask for, so that one sweep will do."""
    value, weight = node.inputs[0], _weight(node)
    inputs = weight.tensor.shape[1 if weight.outputs_first else 0]
    if form.bits not in _COARSE or value is None or value.is_initializer():
        return None
    if not isinstance(inputs, int) or inputs > MOST_FEATURES:
        return None
    return Need(calibrated_name(value), Statistic.GRAM, 1 if node.op_type == "Gemm" else -1)


def rounding_with(gram: Need | None, evidence: Evidence) -> Rounding:
    """With feedback where there is something to go by; made-up inputs are not."""
    if gram is None or evidence.synthetic or not evidence.has(gram):
        return rounded
    return Feedback(evidence.second_moments(gram))


def _lookups(weight: Weight) -> list[ir.Node]:
    """Lookups in a table that a product turns, if nobody else reads it, so that it need not stay float."""
    if weight.turned is None or weight.value.is_graph_output() or len(weight.turned.outputs[0].uses()) != 1:
        return []
    uses = [use for use in weight.value.uses() if use.node is not weight.turned]
    plain = (u.node.op_type == "Gather" and u.idx == 0 and u.node.attributes.get_int("axis", 0) == 0 for u in uses)
    return [use.node for use in uses] if all(plain) else []


def weight_of(node: ir.Node) -> Weight | None:
    """The float32 matrix a product reads, also through a Transpose, as from the table of an embedding; or None."""
    value = node.inputs[1] if node.op_type in OPS else None
    producer = None if value is None else value.producer()
    turned = producer is not None and producer.op_type == "Transpose"
    if turned and producer is not None:
        value = producer.inputs[0]
    tensor = None if value is None or not value.is_initializer() else value.const_value
    if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return None
    if turned and producer is not None and tuple(producer.attributes.get_ints("perm", (1, 0))) != (1, 0):
        return None
    outputs_first = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    return Weight(value, tensor, outputs_first != turned, producer if turned else None)


def _weight(node: ir.Node) -> Weight:
    weight = weight_of(node)
    if weight is None:
        raise Skip("its weight is not a float32 constant of two axes")
    return weight


def _bias_add(node: ir.Node, view: GraphView) -> ir.Node | None:
    """The Add of a constant behind a MatMul that can be the bias of the kernel."""
    reader = _only_reader(node, view)
    if node.op_type != "MatMul" or reader is None or reader.op_type != "Add":
        return None
    operand = reader.inputs[0 if reader.inputs[1] is node.outputs[0] else 1]
    tensor = view.weight(operand)
    weight = _weight(node)
    outputs = weight.tensor.shape[0 if weight.outputs_first else 1]
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tuple(tensor.shape) != (outputs,):
        return None
    return reader


def _only_reader(node: ir.Node, view: GraphView) -> ir.Node | None:
    uses = view.consumers(node.outputs[0])
    if view.is_output(node.outputs[0]) or len(uses) != 1 or uses[0][0].graph is not node.graph:
        return None
    return uses[0][0]


def _stored(weight: Weight, form: Form, rounding: Rounding) -> Blocks:
    make = partial(_blocks, form=form, turn=not weight.outputs_first, rounding=rounding)
    key = f"onnxcompress.blocked.{form}.{weight.outputs_first}"
    if isinstance(rounding, Feedback):
        return remembered_for(weight.tensor, f"{key}.feedback", rounding.moments, make)
    if rounding is not rounded:  # what it looks at is not only the weight
        return make(weight.tensor.numpy())
    return remembered(weight.tensor, key, make)


def _blocks(array: Floats, *, form: Form, turn: bool, rounding: Rounding) -> Blocks:
    return pack(rounding(array.T if turn else array, form), form)


# --- making ------------------------------------------------------------------------------------


def apply(node: ir.Node, rewriter: Rewriter, blocking: Blocking, rounding: Rounding = rounded) -> None:
    """Puts MatMulNBits in the place of a product, and of the Add behind it that is its bias."""
    weight, form = _weight(node), blocking.form
    add = rewriter.node(blocking.add) if blocking.add else None
    stored = _stored(weight, form, rounding)
    if blocking.table is not None:
        for lookup in _lookups(weight):
            _weight_storage.apply(lookup, rewriter, blocking.table)
    anchor = add or node
    biases = [v for v in add.inputs if v is not node.outputs[0]] if add is not None else _gemm_bias(node)
    result = _product(node, rewriter, form, stored, biases, before=anchor)
    rewriter.replace_node(anchor, result)
    if add is not None:
        rewriter.remove(node)
    if weight.turned is not None:
        rewriter.remove_unused(weight.turned)


def simulate(
    value: ir.Value,
    rewriter: Rewriter,
    target: Target,
    form: Form,
    switch: ir.Value,
    evidence: Evidence | None = None,
) -> None:
    """Gates the rounding of a weight, and that of what is multiplied with it: the node itself behind a switch.

    Args:
        value: the weight.
        rewriter: of the model.
        target: the device.
        form: of the weight.
        switch: a bool.
        evidence: weights are rounded with feedback where it knows what they meet; None for without.
    """
    readers = [use.node for use in value.uses()]
    readers += [use.node for n in readers if n.op_type == "Transpose" for use in n.outputs[0].uses()]
    nodes = [
        n
        for n in dict.fromkeys(readers)
        if obstacle(n, target, form) is None and _weight(n).value is value and n.inputs[0] is not value
    ]
    if not nodes:
        raise Skip(f"no matrix product reads {value.name!r}")
    for node in nodes:
        rounding = rounded if evidence is None else rounding_with(_gram(node, form), evidence)
        stored = _stored(_weight(node), form, rounding)
        edits = len(rewriter.log)
        result = _product(node, rewriter, form, stored, _gemm_bias(node), after=node)
        gate(rewriter, node.outputs[0], result, switch, edits)


def _gemm_bias(node: ir.Node) -> list[ir.Value | None]:
    return [v for v in node.inputs[2:] if v is not None]


def _product(
    node: ir.Node,
    rewriter: Rewriter,
    form: Form,
    stored: Blocks,
    biases: list[ir.Value | None],
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
) -> ir.Value:
    name = _weight(node).value.name
    packed = rewriter.constant(stored.packed, f"{name}_{form.bits}bit", like=node)
    scales = rewriter.constant(stored.scales, f"{name}_scale", like=node)
    outputs = len(stored.packed)
    inputs: list[ir.Value | None] = [node.inputs[0], packed, scales]
    inside = [v for v in biases if v is not None and _is_row(v, outputs)]
    if inside:
        inputs += [None, None, _row(inside[0], rewriter, node)]
    attributes = {
        "K": stored.inputs,
        "N": outputs,
        "bits": form.bits,
        "block_size": form.block,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    (result,) = rewriter.insert(
        "MatMulNBits", inputs, attributes, before=before, after=after, domain="com.microsoft", dtype=ir.DataType.FLOAT
    )
    for bias in (v for v in biases if v not in inside):
        (result,) = rewriter.insert(
            "Add",
            [result, bias],
            before=before,
            after=None if before is not None else result.producer(),
            dtype=ir.DataType.FLOAT,
        )
    return result


def _is_row(bias: ir.Value, outputs: int) -> bool:
    """Whether it is constant, with a number for every output."""
    tensor = bias.const_value if bias.is_initializer() and not bias.is_graph_input() else None
    return tensor is not None and tensor.size == outputs == (tensor.shape.numpy() or (1,))[-1]


def _row(bias: ir.Value, rewriter: Rewriter, node: ir.Node) -> ir.Value:
    """The bias with one axis, which is what the kernel wants."""
    tensor = bias.const_value
    if tensor is None or len(tensor.shape) == 1:
        return bias
    return rewriter.constant(tensor.numpy().reshape(-1), f"{bias.name}_row", like=node)
