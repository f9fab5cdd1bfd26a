"""Per-channel affine maps go into the weights of the linear operator before or after them.

With ``conv(x) = W * x + B`` and a map ``f(y) = a y + b``, constant along every axis but the channels:

    f(conv(x)) = (a W) * x + (a B + b)           always; a scales output channels
    conv(f(x)) = (W a) * x + (B + sum W b)       where nothing is padded, or b = 0; a scales input channels

BatchNormalization in inference is such a map with ``a = gamma / sqrt(var + eps)``, ``b = beta - a mean``;
Mul, Div, Add and Sub with per-channel constants are, too. Computed in float64 and rounded once, so each
weight is off by at most half a unit in the last place. The linear operator is a Conv, ConvTranspose
(maps after it only) or Gemm, and the value in between has no other reader and is no output.

    conv(pad(x)) = conv with larger pads         where pad adds zeros to spatial axes

onnxscript's rules compute in float32, refuse shared weights, and write the new weights under the old
names, so they are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.passes._affine import AFFINE, LINEAR, affine_of, pads_of, reader_of, weights_after, weights_before
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["FuseBatchNorm"]


@dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """Folds BatchNormalization and other per-channel affine maps into Conv, ConvTranspose and Gemm."""

    name: ClassVar[str] = "fuse_batchnorm"
    stage: ClassVar[Stage] = Stage.NORMALISE
    place: ClassVar[int] = 3
    ops: ClassVar[tuple[str, ...]] = (*AFFINE, "Pad")
    lossless: ClassVar[bool] = True

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        reasons: dict[ir.Node, str] = {}
        into: dict[ir.Value, ir.Node] = {}  # what a linear operator computes once the sites so far are made
        for node in view.nodes(*AFFINE):
            linear = next((n for v in node.inputs if v is not None and (n := into.get(v, v.producer()))), None)
            if linear is None or linear.op_type not in LINEAR or linear.domain or not _has_constant(node, view):
                continue
            try:
                weights_after(node, linear, view)
            except Skip as skip:
                reasons[node] = skip.reason
            else:
                into[node.outputs[0]] = linear
                yield Site.of(node, linear)
        towards: dict[ir.Node, ir.Node] = {}
        for node in reversed(view.nodes(*AFFINE, "Pad")):
            reader = reader_of(node)
            linear = towards.get(reader, reader) if reader is not None else None
            if node.outputs[0] in into or linear is None or linear.op_type not in ("Conv", "Gemm") or linear.domain:
                continue
            if not _has_constant(node, view):
                continue
            try:
                pads_of(node, linear, view) if node.op_type == "Pad" else weights_before(node, linear, view)
            except Skip as skip:
                reasons[node] = skip.reason
            else:
                towards[node] = linear
                reasons.pop(node, None)
                yield Site.of(node, linear)
        for node in view.nodes("BatchNormalization"):
            if node.outputs[0] not in into and node not in towards:
                reasons.setdefault(node, "no Conv, ConvTranspose or Gemm with constant weights is next to it")
        yield from (Skipped(str(node.name), reason) for node, reason in reasons.items())

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return [Choice(site, "fuse", effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node, linear = (rewriter.node(name) for name in choice.site.nodes)
        view = rewriter.view()
        if node.op_type == "Pad" and reader_of(node) is linear:
            pads = pads_of(node, linear, view)
            source = node.inputs[0]
            rewriter.set_attribute(linear, "pads", pads)
        elif any(v is not None and v.producer() is linear for v in node.inputs):
            weight, bias = weights_after(node, linear, view)
            source = linear.outputs[0]
            _set(linear, weight, bias, rewriter)
        elif reader_of(node) is linear:
            weight, bias = weights_before(node, linear, view)
            source = node.inputs[affine_of(node, view, linear, inputs=True).operand]
            _set(linear, weight, bias, rewriter)
        else:
            raise Skip("it is not next to the linear operator any more")
        if source is not None:
            rewriter.replace_uses(node.outputs[0], source)
        rewriter.remove_unused(node)


def _has_constant(node: ir.Node, view: GraphView) -> bool:
    return any(view.weight(v) is not None for v in node.inputs) or node.op_type in ("BatchNormalization", "Pad")


def _set(linear: ir.Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any], rewriter: Rewriter) -> None:
    rewriter.set_weight(linear, 1, weight)
    rewriter.set_weight(linear, 2, bias)
    if linear.op_type == "Gemm":
        rewriter.set_attribute(linear, "beta", 1.0)
