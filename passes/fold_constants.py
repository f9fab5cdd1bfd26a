"""Constant folding: what depends on weights and static shapes only is computed once, here.

A node is *constant* if all its inputs are weights or outputs of constant nodes, or if it asks for a
shape that graph inputs and weights determine. The last constant node before a variable one is
replaced by its value. An If whose condition is constant is replaced by the branch it takes.

The value is computed by onnxruntime, so it is bit for bit what the runtime would have computed.
Shape arithmetic is evaluated element by element with NaN for "unknown", so ``Shape -> Gather`` of a
static extent folds even where other extents are dynamic.

Left alone: anything that would make the file larger by more than ``max_growth`` bytes (int8 weights
times a scale, codebook lookups, Expand), quantization operators, operators of other domains, and
whatever draws random numbers. onnxscript's folder is not used: it has no rule on bytes, emits
operators the model's opset may lack and writes provenance into the file; graphsurgeon's makes an
invalid If.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.errors import ModelRunError, PassContractError
from onnxcompress.passes._constants import ConstantPlan, Fold, growth
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["FoldConstants"]


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Computes what depends on constants only and inlines branches that are always taken."""

    name: ClassVar[str] = "fold_constants"
    stage: ClassVar[Stage] = Stage.NORMALISE
    lossless: ClassVar[bool] = True
    max_growth: int = 512
    """Bytes by which one fold may make the file larger."""

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        plan = self._plan(view)
        for node in plan.last:
            yield Site.of(node, *plan.cone(node)[:-1])
        if plan.branches:  # last: what they free is folded along with them
            yield Site.of(*plan.branches)
        yield from plan.skipped

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        node = view.node(site.key)
        if node.op_type == "If":
            return [Choice(site, "inline", effects=False)]
        return [Choice(site, "fold", detail=self._plan(view).fold(node), effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        if node.op_type != "If":
            self._fold(node, choice.detail, rewriter)
            return
        while (plan := self._plan(rewriter.view())).branches:
            try:
                taken = [bool(plan.value(branch.inputs[0]).item()) for branch in plan.branches]
            except ModelRunError as error:
                raise Skip(str(error)) from error
            for branch, condition in zip(plan.branches, taken, strict=True):
                source = branch.inputs[0]
                rewriter.inline_branch(branch, "then_branch" if condition else "else_branch")
                if source is not None and (producer := source.producer()) is not None:
                    rewriter.remove_unused(producer)
            rewriter.drop_unused_weights()
            plan = self._plan(rewriter.view())
            for last, fold in [(n, plan.fold(n)) for n in plan.last]:
                self._fold(last, fold, rewriter)

    def _plan(self, view: GraphView) -> ConstantPlan:
        return view.derive(self, lambda: ConstantPlan.of(view, self.max_growth))

    def _fold(self, node: ir.Node, fold: object, rewriter: Rewriter) -> None:
        if not isinstance(fold, Fold):
            raise PassContractError(f"{node.name!r} was not planned by fold_constants")
        wanted = [v for v in node.outputs if v.name and v.uses()]
        arrays = [fold.given[v.name] for v in wanted if v.name in fold.given]
        if not arrays:
            try:
                arrays = rewriter.compute(wanted, fold.given)
            except ModelRunError as error:
                raise Skip(str(error)) from error
            size = sum(a.nbytes for a in arrays)
            if size > fold.freed + self.max_growth:
                raise Skip(growth(size, fold.freed))
        for value, array in zip(wanted, arrays, strict=True):
            rewriter.replace_uses(value, rewriter.constant(array, f"{value.name}_folded", like=node))
        rewriter.remove_unused(node)
