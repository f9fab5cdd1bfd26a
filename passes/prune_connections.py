"""Connection pruning: single weights become zero, and the tensors keep their size.

    y = W x + b   ->   y = V x + b + (W - V) E[x]        V has zeros, see :mod:`~onnxcompress.passes._sparse`

The last term goes into the bias of Conv and Gemm, so the mean of y stays what it was, and V is fitted to what x does
around its mean; a MatMul has no bias, and V is fitted to x itself.

This is for the size of a compressed file, and for engines that skip zeros. onnxruntime multiplies them like any
number: nothing runs faster, so the planner never takes it by itself. It comes after everything that changes weights
(channels, factors) and before int8, which keeps zeros: they are zero in symmetric scales, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.errors import PassOptionError
from onnxcompress.passes._constant_sum import absorb, is_free
from onnxcompress.passes._linear_maps import LinearMap, linear_maps
from onnxcompress.passes._sparse import Zeros, reconstruct, zero
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["Method", "PruneConnections"]

Array = npt.NDArray[np.float64]

_OPS = ("Conv", "Gemm", "MatMul", "LSTM", "GRU")
_SHARE = 0.5
_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


class Method(StrEnum):
    """How weights are chosen."""

    MAGNITUDE = "magnitude"
    """The smallest go."""
    ACTIVATION = "activation"
    """Those go whose product with what they read is smallest."""
    RECONSTRUCTION = "reconstruction"
    """Those go that the others can make up for; the others are changed to do so."""


@dataclass(frozen=True)
class PruneConnections(Pass):
    """Sets single weights to zero: smaller when compressed, not faster in onnxruntime.

    Attributes:
        sparsity: share of each weight that becomes zero, at least 0 and below 1; 0.5 if there is no pattern either.
        pattern: ``N:M`` keeps N of each M neighbours along the input, as ``2:4``; instead of ``sparsity``.
        method: how weights are chosen; the best the data allows by default: reconstruction, else activation, else
            magnitude.
        min_weights: tensors with fewer elements are left alone.
        min_inputs: weights each output of which reads fewer values, as in depthwise convolutions, are left alone: there
            is little to gain and much to lose.
        only: just these operator types; all by default.
    """

    name: ClassVar[str] = "prune_connections"
    stage: ClassVar[Stage] = Stage.SHARE
    ops: ClassVar[tuple[str, ...]] = _OPS
    automatic: ClassVar[bool] = False
    remark: ClassVar[str] = (
        "zeros take as much room and time as other numbers: the file and onnxruntime's speed stay as they were; "
        "the compressed file is smaller, and engines with sparse kernels gain"
    )

    sparsity: float | None = None
    pattern: str | None = None
    method: Method | None = None
    min_weights: int = 1024
    min_inputs: int = 32
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.pattern is not None:
            raise PassOptionError(
                "prune_connections: sparsity and pattern are both given", hint="leave one of them out"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise PassOptionError(
                f"prune_connections: sparsity is {self.sparsity}", hint="choose it at least 0 and below 1, as 0.5"
            )
        for name, least in (("min_weights", self.min_weights), ("min_inputs", self.min_inputs)):
            if least < 0:
                raise PassOptionError(f"prune_connections: {name} is {least}", hint="choose 0 or more")
        unknown = sorted(set(self.only) - set(_OPS))
        if unknown:
            raise PassOptionError(
                f"prune_connections: only names {', '.join(unknown)}", hint=f"it can name {', '.join(_OPS)}"
            )
        _zeros(self.sparsity, self.pattern)

    @property
    def zeros(self) -> Zeros:
        """How many weights become zero."""
        return _zeros(self.sparsity, self.pattern)

    # --- finding -------------------------------------------------------------------------------

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        done = view.quantized_nodes
        for node in view.nodes(*(self.only or self.ops)):
            try:
                if done:
                    raise Skip(f"the model is already quantized ({done[0]!r} and {len(done) - 1} more nodes)")
                self._maps(node, view)
            except Skip as skip:
                yield Skipped(str(node.name), skip.reason)
            else:
                yield Site.of(node)

    def _maps(self, node: ir.Node, view: GraphView) -> list[LinearMap]:
        """The weights of a node that can get zeros.

        Raises:
            Skip: none can, and why not.
        """
        found, problem = [], "its weight is not a float32 constant"
        for linear in linear_maps(node, view):
            value = node.inputs[linear.index]
            if value is None:
                continue
            size = int(np.prod(linear.shape))
            if size < self.min_weights:
                problem = f"it has {size} weights, fewer than min_weights"
            elif linear.inputs < self.min_inputs:
                problem = f"its outputs read {linear.inputs} values each, fewer than min_inputs"
            elif len(value.uses()) > 1:
                problem = f"{value.name!r} is shared by {len(value.uses())} nodes; zeros for one would store it twice"
            elif self.zeros.group and linear.width % self.zeros.group:
                problem = f"{self.zeros} needs an input width that {self.zeros.group} divides, and it is {linear.width}"
            else:
                found.append(linear)
        if not found:
            raise Skip(problem)
        return found

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        wanted = self.method in (Method.ACTIVATION, Method.RECONSTRUCTION)
        return [Choice(site, f"{self.zeros} zeros", calibrated=wanted, effects=False)]

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        for linear in self._maps(view.node(choice.site.key), view):
            reconstructed = self.method in (None, Method.RECONSTRUCTION) and linear.gram is not None
            if linear.gram is not None and reconstructed:
                yield linear.gram
            elif linear.power is not None and self.method is not Method.MAGNITUDE:
                yield linear.power

    # --- making --------------------------------------------------------------------------------

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        for linear in self._maps(node, rewriter.view()):
            value = node.inputs[linear.index]
            if value is None or value.const_value is None:
                raise Skip("its weight is no constant any more")
            old = linear.maps(np.asarray(value.const_value.numpy()))
            new, shift = self._pruned(node, linear, old, evidence)
            rewriter.set_weight(node, linear.index, linear.weight(new))
            if shift is not None and shift.any():
                factor = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
                absorb(rewriter, (node, 2), factor * shift, -1)

    def _pruned(self, node: ir.Node, linear: LinearMap, old: Array, evidence: Evidence) -> tuple[Array, Array | None]:
        """New maps, and what has to be added to the bias."""
        moments = linear.moments(evidence) if self.method in (None, Method.RECONSTRUCTION) else None
        if moments is None:
            power = None if self.method is Method.MAGNITUDE else linear.channel_power(evidence)
            return zero(old, self.zeros, power), None
        biased = node.op_type in ("Conv", "Gemm") and is_free(node, 2)
        new = np.empty_like(old)
        for group, seen in enumerate(moments):
            centred = seen.matrix - np.outer(seen.mean, seen.mean) if biased else seen.matrix
            new[group] = reconstruct(old[group], centred, self.zeros)
        if not biased:
            return new, None
        means = np.stack([seen.mean for seen in moments])
        shift = np.einsum("grn,gn->gr", old - new, means)
        return new, shift.reshape(linear.outputs, -1).sum(1)


def _zeros(sparsity: float | None, pattern: str | None) -> Zeros:
    """What the options ask for.

    Raises:
        PassOptionError: the pattern is none.
    """
    if pattern is None:
        return Zeros(_SHARE if sparsity is None else sparsity)
    match = _PATTERN.fullmatch(pattern)
    kept, group = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= kept < group:
        raise PassOptionError(
            f"prune_connections: pattern is {pattern!r}", hint="write N:M with N below M and at least 1, as 2:4"
        )
    return Zeros(kept=kept, group=group)
