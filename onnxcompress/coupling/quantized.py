"""Operators on integers: those of float with scales and zero points beside them.

Scales go with the axis they belong to. No integer weight can make up for what is removed, so they are summed over like
computed values.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.axes import Axis
from onnxcompress.coupling.convolution import convolve, regroup_channels
from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.products import multiply
from onnxcompress.coupling.rules import mends, rule


def _scales(node: ir.Node, at: Coupler, axis: Axis, *indices: int) -> None:
    """One for all, or one for each position of an axis."""
    for index in indices:
        scale = at.input(node, index)
        if scale is None:
            continue
        for a in scale.axes:
            if at.size(a) == at.size(axis):
                at.same(a, axis, node)
            else:
                at.pin(a, node, "its scales belong to no axis")


@rule("QLinearConv")
def qlinear_conv(node: ir.Node, at: Coupler) -> None:
    """X, scale, zero, W, scale, zero, scale, zero of Y, bias."""
    w = at.data(node, 3)
    convolve(node, at, at.data(node), w, at.input(node, 8), at.output(node), None)
    _scales(node, at, w[0], 4, 5)


@rule("ConvInteger")
def conv_integer(node: ir.Node, at: Coupler) -> None:
    """X, W, zero points."""
    w = at.data(node, 1)
    convolve(node, at, at.data(node), w, None, at.output(node), None)
    _scales(node, at, w[0], 3)


mends("QLinearConv", "ConvInteger")(regroup_channels)


def _multiply(node: ir.Node, at: Coupler, index: int) -> Axis | None:
    a = at.data(node)
    _, columns = multiply(node, at, a, at.data(node, index), at.output(node))
    at.sums_data(node, a[-1])
    return columns


@rule("MatMulInteger")
@rule("MatMulIntegerToFloat", domain="com.microsoft")
def matmul_integer(node: ir.Node, at: Coupler) -> None:
    """A, B, zero points; with scales in front of them where it gives float."""
    columns = _multiply(node, at, 1)
    if columns is not None:
        _scales(node, at, columns, *((3, 5, 6) if node.domain else (3,)))


@rule("DynamicQuantizeMatMul", domain="com.microsoft")
def dynamic_matmul(node: ir.Node, at: Coupler) -> None:
    """A, B, scale and zero of B, bias."""
    columns = _multiply(node, at, 1)
    if columns is not None:
        _scales(node, at, columns, 2, 3, 4)


@rule("QLinearMatMul")
def qlinear_matmul(node: ir.Node, at: Coupler) -> None:
    """A, scale, zero, B, scale, zero, scale, zero of Y."""
    columns = _multiply(node, at, 3)
    if columns is not None:
        _scales(node, at, columns, 4, 5)


@rule("DynamicQuantizeLinear")
def dynamic_quantize(node: ir.Node, at: Coupler) -> None:
    """One scale for all; fewer positions can only make it finer."""
    at.elementwise(node, [at.data(node)], at.output(node))


_PACKED = {
    "MatMulNBits": "its weight is packed, several positions to a byte",
    "GatherBlockQuantized": "its weight is packed, several positions to a byte",
    "QAttention": "QAttention is quantized, query, key and value in one",
    "DynamicQuantizeLSTM": "DynamicQuantizeLSTM holds packed weights",
    "QGemm": "QGemm is quantized",
}


@rule(*_PACKED, domain="com.microsoft")
def packed(node: ir.Node, at: Coupler) -> None:
    """Stays."""
    at.pin_all(node, _PACKED[node.op_type])
