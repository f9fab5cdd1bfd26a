"""Weights of 4 or 8 bits in blocks, read by a kernel that multiplies them as they are stored.

    y_n = b_n + sum_B s_nB sum_(k in B) q_nk x_k        q in [-2^(b-1), 2^(b-1) - 1], a scale for each block of a column

onnxruntime's com.microsoft.MatMulNBits reads b/8 bytes for a weight where the float kernel reads 4, so it gains where
reading weights is the work: products of one or two rows. It is written as such and not as DequantizeLinear and
MatMul: these fuse to it only where no Relu follows, and unfused they dequantize in every call (3-8 times slower,
measured). ``accuracy_level`` is 4, as in what profiles are fitted to: inside, x is rounded to int8, a scale for
each block of a row, which is noise of -42 to -46 dB. :func:`simulate` runs the very node, so that is part of its price.

A block's scale is looked for: its largest weight, sign and all, is put on -d for some d around 2^(b-1); the rounded
q that points closest to w, that is with the greatest <w, q>^2 / <q, q>, wins, and s = <w, q> / <q, q> is then the best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Choice, Precision, Site, Skip, Term
from onnxcompress.passes import _dynamic
from onnxcompress.passes._int8 import gate, remembered
from onnxcompress.rewrite import Rewriter
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = [
    "BITS",
    "BLOCKS",
    "OPS",
    "Blocks",
    "Form",
    "Rounded",
    "Weight",
    "apply",
    "choice",
    "obstacle",
    "pack",
    "rounded",
    "simulate",
    "weight_of",
]

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of blocks there are kernels for."""

OPS = ("MatMul", "Gemm")
"""Operators whose weights may be in blocks."""

_ACCURACY_LEVEL = 4
_PRECISION = {4: Precision.BLOCKED4, 8: Precision.BLOCKED8}
_ENDS = {4: (7.0, 7.5, 8.0, 8.5, 9.0, 10.0, 11.0), 8: (127.0, 128.0)}
"""Where the largest weight of a block is put; beyond 2^(bits-1) it is clipped."""
_IN_THE_FLOAT_KERNEL = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh")
"""What runs inside a float Gemm, and by itself behind this kernel."""
_PIECE = 2_000_000

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, order=True)
class Form:
    """Bits of a weight, and how many weights share a scale."""

    bits: int
    block: int

    @property
    def name(self) -> str:
        """Of choices and terms."""
        return f"w{self.bits}/{self.block}"

    @property
    def precision(self) -> str:
        """What profiles call the kernel."""
        return _PRECISION[self.bits]


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


@dataclass(frozen=True)
class Rounded:
    """A matrix in blocks.

    Attributes:
        integers: shape (outputs, inputs), within [-2^(bits-1), 2^(bits-1) - 1].
        scales: shape (outputs, blocks).
    """

    integers: npt.NDArray[np.int8]
    scales: Floats


@dataclass(frozen=True)
class Blocks:
    """A matrix as MatMulNBits reads it.

    Attributes:
        packed: shape (outputs, blocks, bytes of a block); of two weights in a byte the first is the low half.
        scales: shape (outputs * blocks,).
        inputs: length of a column.
    """

    packed: npt.NDArray[np.uint8]
    scales: Floats
    inputs: int


Rounding = Callable[[Floats, Form], Rounded]
"""How a matrix (outputs, inputs) becomes integers; :func:`rounded` by default."""


# --- finding -----------------------------------------------------------------------------------


def obstacle(node: ir.Node, target: Target, form: Form) -> str | None:
    """Why the weight of a node cannot be in such blocks; None if it can."""
    if node.op_type not in OPS:
        return f"only matrix products read weights in blocks, and this is a {node.op_type}"
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


def choice(site: Site, node: ir.Node, view: GraphView, form: Form) -> Choice:
    """The choice of a form at a node that nothing is in the way of."""
    weight, add = _weight(node), _bias_add(node, view)
    follower = _only_reader(node, view) if node.op_type == "Gemm" else None
    alone = follower is not None and follower.op_type in _IN_THE_FLOAT_KERNEL
    return Choice(
        site,
        form.name,
        form.precision,
        adds=((follower.op_type, str(node.outputs[0].name)),) if follower is not None and alone else (),
        removes=() if add is None else (str(add.name),),
        # a table that is turned here is looked up elsewhere, so it stays
        bytes_saved=(0 if weight.turned else weight.tensor.nbytes) - weight.stored_bytes(form),
        terms=(Term(form.name, str(weight.value.name)),),
        detail=form,
        effects=False,
    )


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


# --- rounding ----------------------------------------------------------------------------------


def rounded(matrix: Floats, form: Form) -> Rounded:
    """Rounds to the nearest, with the best scale of a few for each block.

    Args:
        matrix: shape (outputs, inputs).
        form: bits and block.
    """
    outputs, inputs = matrix.shape
    count = -(-inputs // form.block)
    scales = np.empty((outputs, count), np.float32)
    integers = np.empty((outputs, inputs), np.int8)
    step = max(1, _PIECE // (count * form.block))
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        rows = np.zeros((len(matrix[part]), count * form.block), np.float32)
        rows[:, :inputs] = matrix[part]
        found, scales[part] = _best(rows.reshape(-1, count, form.block), form.bits)
        integers[part] = found.reshape(len(rows), -1)[:, :inputs]
    return Rounded(integers, scales)


def _best(blocks: Floats, bits: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Integers and scales of blocks, shape (outputs, blocks, block)."""
    high, low = blocks.max(-1), blocks.min(-1)
    largest = np.where(high > -low, high, low)
    usable = np.abs(largest) > 2.0**bits * np.finfo(np.float32).tiny
    inverse = np.divide(-1.0, largest, out=np.zeros_like(largest), where=usable)
    best = np.full(largest.shape, -1.0, np.float32)
    scales = np.ones_like(largest)
    integers = np.zeros(blocks.shape, np.int8)
    for end in _ENDS[bits]:
        tried = np.rint(blocks * (end * inverse)[..., None])
        np.clip(tried, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, out=tried)
        product, square = np.einsum("nbk,nbk->nb", blocks, tried), np.einsum("nbk,nbk->nb", tried, tried)
        scale = np.divide(product, square, out=np.ones_like(product), where=square > 0)
        better = product * scale > best
        best[better], scales[better] = (product * scale)[better], scale[better]
        integers[better] = tried[better]
    return integers, scales


def pack(matrix: Rounded, form: Form) -> Blocks:
    """The bytes that MatMulNBits reads; blocks that are not full are filled with zeros."""
    outputs, inputs = matrix.integers.shape
    count = matrix.scales.shape[1]
    middle = 2 ** (form.bits - 1)
    codes = np.full((outputs, count * form.block), middle, np.uint8)
    codes[:, :inputs] = matrix.integers.astype(np.int16) + middle
    codes = codes.reshape(outputs, count, form.block)
    if form.bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return Blocks(np.ascontiguousarray(codes), matrix.scales.reshape(-1), inputs)


def _stored(weight: Weight, form: Form, rounding: Rounding) -> Blocks:
    make = partial(_blocks, form=form, turn=not weight.outputs_first, rounding=rounding)
    if rounding is not rounded:  # what it looks at is not only the weight
        return make(weight.tensor.numpy())
    return remembered(weight.tensor, f"onnxcompress.blocked.{form}.{weight.outputs_first}", make)


def _blocks(array: Floats, *, form: Form, turn: bool, rounding: Rounding) -> Blocks:
    return pack(rounding(array.T if turn else array, form), form)


# --- making ------------------------------------------------------------------------------------


def apply(node: ir.Node, add: ir.Node | None, rewriter: Rewriter, form: Form, rounding: Rounding = rounded) -> None:
    """Puts MatMulNBits in the place of a product, and of the Add behind it that is its bias."""
    weight = _weight(node)
    stored = _stored(weight, form, rounding)
    anchor = add or node
    biases = [v for v in add.inputs if v is not node.outputs[0]] if add is not None else _gemm_bias(node)
    result = _product(node, rewriter, form, stored, biases, before=anchor)
    rewriter.replace_node(anchor, result)
    if add is not None:
        rewriter.remove(node)
    if weight.turned is not None:
        rewriter.remove_unused(weight.turned)


def simulate(value: ir.Value, rewriter: Rewriter, target: Target, form: Form, switch: ir.Value) -> None:
    """Gates the rounding of a weight, and that of what is multiplied with it: the node itself behind a switch."""
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
        stored = _stored(_weight(node), form, rounded)
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
