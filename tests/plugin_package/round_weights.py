"""A pass of somebody else: keeps the leading bits of a weight's mantissa, so the file compresses better.

w = m * 2^e with 1/2 <= |m| < 1; m is rounded to ``bits`` bits, a relative error of at most 2^-bits.
"""

from dataclasses import dataclass

import numpy as np

from onnxcompress import Choice, Pass, Site, Skip


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Keeps the leading bits of a weight's mantissa: the same file size, fewer bytes over the wire."""

    name = "round_weights"
    ops = ("Conv", "Gemm", "MatMul")
    bits: int = 8

    def match(self, node, view):
        if not view.is_float_weight(node.inputs[1]):
            raise Skip("its second input is not a float constant")
        return Site.of(node)

    def choices(self, site, view, target):
        return [Choice(site, f"{self.bits} bits", effects=False)]

    def apply(self, choice, rewriter, evidence):
        node = rewriter.node(choice.site.key)
        mantissa, exponent = np.frexp(node.inputs[1].const_value.numpy())
        rounded = np.ldexp(np.rint(mantissa * 2**self.bits) / 2**self.bits, exponent)
        rewriter.set_weight(node, 1, rounded.astype(np.float32))
