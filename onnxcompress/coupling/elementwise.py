"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.rules import rule

_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "CastLike", "Ceil", "Celu",
    "Clip", "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink",
    "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BROADCAST = (
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip


@rule(*_UNARY)
@rule("FastGelu", "Gelu", "QuickGelu", domain="com.microsoft")
def unary(node: ir.Node, at: Coupler) -> None:
    """Every output has the axes of the first input; a bias of FastGelu is broadcast."""
    for y in at.outputs(node):
        bias = at.input(node, 1) if node.op_type == "FastGelu" else None
        at.elementwise(node, [at.input(node, 0), bias], y)


@rule(*_BROADCAST)
@rule("BiasGelu", domain="com.microsoft")
def broadcast(node: ir.Node, at: Coupler) -> None:
    """Axes meet from the right."""
    at.elementwise(node, [at.input(node, i) for i in range(len(node.inputs))], at.output(node))


@rule("QuantizeLinear", "DequantizeLinear")
@rule("QuantizeLinear", "DequantizeLinear", domain="com.microsoft")
def convert(node: ir.Node, at: Coupler) -> None:
    """Scales and zero points are of one axis, or of all."""
    x, y = at.data(node), at.output(node)
    at.elementwise(node, [x], y)
    axis = node.attributes.get_int("axis", 1)
    for index in (1, 2):
        scale = at.input(node, index)
        if scale is None or scale.shape in ((), (1,)):
            continue
        if len(scale) == 1:
            at.same(scale[0], x[axis], node)
        else:  # blocks of positions share a scale
            for k in range(len(scale)):
                if scale.shape[k] == x.shape[k]:
                    at.same(scale[k], x[k], node)
                else:
                    at.pin(x[k], node, "blocks of it share a scale")
                    at.pin(scale[k], node, "blocks of it share a scale")
