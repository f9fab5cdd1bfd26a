"""Layer pruning: a residual block gives way to what it adds on average.

    y = x + f(x)   ->   y = x + E[f(x)]        E over samples and positions, per channel

so the mean of y stays what it was, and what is lost is the variance of f. The constant goes into the bias of what
makes x where nobody else reads x; else the Add stays and adds it, unless it explains so little of f that the Add
is not worth its time (``_WORTH``). In a network with normalization behind the sum (post-norm transformers) the
normalization stays. A whole transformer layer is its two blocks.

Where blocks are inside one another, either the outer one goes or some of the inner ones.

Which blocks are worth keeping is not guessed: each is measured, all in one session, by what the outputs lose
without it. Published rankings by the similarity of x and y (ShortGPT, Men et al. 2024, arXiv 2403.03853) say less.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage, Term
from onnxcompress.errors import PassError, PassOptionError, RewriteError, suggest
from onnxcompress.passes._constant_sum import absorb, bias_of, spread
from onnxcompress.passes._int8 import calibrated_name, gate
from onnxcompress.passes._residual import Block, block_at, exclusive
from onnxcompress.rewrite import Rewriter, can_be_output
from onnxcompress.statistics import ChannelMoments, Evidence, Need, Statistic
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["PruneBlocks"]

REMOVE = "remove"
_AXES = range(-1, -7, -1)
_WORTH = 0.01
"""Share of the power of f below which its mean is not worth an Add."""


@dataclass(frozen=True)
class PruneBlocks(Pass):
    """Removes residual blocks, and adds their mean to a bias.

    Attributes:
        blocks: names of the Adds whose blocks may go; all by default.
        bias: put the mean of a removed block in its place.
    """

    name: ClassVar[str] = "prune_blocks"
    stage: ClassVar[Stage] = Stage.PRUNE
    ops: ClassVar[tuple[str, ...]] = ("Add",)
    automatic: ClassVar[bool] = False

    blocks: tuple[str, ...] = ()
    bias: bool = True

    @property
    def planned(self) -> bool:
        """Named blocks go; of all of them, those that the budget has room for."""
        return not self.blocks

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        """Every Add of two float activations.

        Raises:
            PassOptionError: one of ``blocks`` is no block of this model; says why.
        """
        found = list(self._sites(view))
        for name in self.blocks:
            if name not in {s.key for s in found}:
                known = [s.key for s in found if isinstance(s, Site)]
                raise PassOptionError(
                    f"prune_blocks: blocks names {name!r}, which is no block", hint=suggest(name, known)
                )
        for site in found:
            if not self.blocks or site.key in self.blocks:
                if self.blocks and isinstance(site, Skipped):
                    raise PassOptionError(
                        f"prune_blocks: the block {site.key!r} named in blocks cannot go: {site.reason}",
                        hint="leave it out of blocks",
                    )
                yield site

    def _sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        done = view.quantized_nodes
        for node in view.nodes(*self.ops):
            if view.dtype(node.outputs[0]) not in (ir.DataType.FLOAT, None):
                continue
            if any(v is None or view.weight(v) is not None for v in node.inputs):
                continue  # a bias
            try:
                if done:
                    raise Skip(f"the model is already quantized ({done[0]!r} and {len(done) - 1} more nodes)")
                block = _block(node, view)
            except Skip as skip:
                yield Skipped(str(node.name), skip.reason)
            else:
                yield Site.of(node, *map(view.node, block.nodes))

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        block = _detail(choice)
        return (Need(block.branch, Statistic.CHANNELS, block.axis),) if self.bias else ()

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        add = view.node(site.key)
        block = _block(add, view)
        going = {add, *map(view.node, block.nodes)}
        free = not self.bias or bias_of(_skip(add, block), block.axis, going) is not None
        return [
            Choice(
                site,
                REMOVE,
                removes=(*block.nodes, *([block.add] if free and not _held(add, block) else ())),
                bytes_saved=_weight_bytes(going),
                terms=(Term("block", f"{block.add}[{1 - block.skip}]"),),
                detail=block,
                calibrated=self.bias or not self.blocks,
                effects=False,
            )
        ]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        block = _detail(choice)
        try:
            add = rewriter.node(block.add)
        except RewriteError:
            raise Skip("it went with the block around it") from None
        skip, branch = _skip(add, block), add.inputs[1 - block.skip]
        maker = None if branch is None else branch.producer()
        if branch is None or maker is None:
            raise Skip("nothing is left of its branch")
        mean = self._mean(block.branch, block.axis, evidence)
        place = None if mean is None else bias_of(skip, block.axis, {add, *exclusive(branch, add)})
        if _held(add, block) or (mean is not None and place is None and _telling(mean)):
            constant = np.zeros(1) if mean is None else mean.mean
            value = rewriter.constant(spread(constant, block.axis), f"{block.add}_mean")
            rewriter.set_input(add, 1 - block.skip, value)
            rewriter.remove_unused(maker)
            return
        if mean is not None and place is not None:
            absorb(rewriter, place, mean.mean, block.axis)
        rewriter.replace_uses(add.outputs[0], _skip(add, block))
        rewriter.remove_unused(add)

    def simulate(self, term: Term, rewriter: Rewriter, evidence: Evidence, target: Target, switch: ir.Value) -> bool:
        name, _, index = term.subject.removesuffix("]").rpartition("[")
        add = rewriter.node(name)
        skip, branch = add.inputs[1 - int(index)], add.inputs[int(index)]
        if skip is None or branch is None:
            raise PassError(f"{name!r} is not the Add of a block", hint="this is a bug; please report it")
        known = calibrated_name(branch)
        axis = next((a for a in _AXES if evidence.has(Need(known, Statistic.CHANNELS, a))), -1)
        mean = self._mean(known, axis, evidence)
        constant = None if mean is None else rewriter.constant(spread(mean.mean, axis), f"{name}_mean")
        edits = len(rewriter.log)
        inputs = [skip] if constant is None else [skip, constant]
        (output,) = rewriter.insert("Identity" if constant is None else "Add", inputs, after=add)
        gate(rewriter, add.outputs[0], output, switch, edits)
        return True

    def _mean(self, branch: str, axis: int, evidence: Evidence) -> ChannelMoments | None:
        """What the branch is on average; None where that is nothing, or not wanted."""
        if not self.bias:
            return None
        if not evidence.has(Need(branch, Statistic.CHANNELS, axis)):
            raise Skip(f"{branch!r} was not observed in calibration")
        moments = evidence.channels(branch, axis)
        return moments if moments.mean.any() else None


def _block(add: ir.Node, view: GraphView) -> Block:
    """The block that ends in an Add, worked out once for a view.

    Raises:
        Skip: there is none, or it must stay.
    """

    def find() -> Block | Skip:
        try:
            return block_at(add, view)
        except Skip as skip:
            return skip

    found = view.derive(("prune_blocks", add), find)
    if isinstance(found, Skip):
        raise found
    return found


def _detail(choice: Choice) -> Block:
    if not isinstance(choice.detail, Block):
        raise PassError(f"this choice at {choice.site.key!r} was not made by prune_blocks")
    return choice.detail


def _skip(add: ir.Node, block: Block) -> ir.Value:
    value = add.inputs[block.skip]
    if value is None:
        raise PassError(f"{block.add!r} has lost an input")
    return value


def _held(add: ir.Node, block: Block) -> bool:
    """Whether the Add must stay, for its output leaves the graph and what it reads cannot take its place."""
    return add.outputs[0].is_graph_output() and not can_be_output(_skip(add, block), add.graph)


def _telling(moments: ChannelMoments) -> bool:
    """Whether the mean explains enough of a branch to be worth an Add."""
    return float(np.square(moments.mean).sum()) > _WORTH * float(moments.mean_square.sum())


def _weight_bytes(nodes: Collection[ir.Node]) -> int:
    """Bytes of the weights that only these nodes read."""
    weights = {v for n in nodes for v in n.inputs if v is not None and v.is_initializer()}
    return sum(
        v.const_value.nbytes
        for v in weights
        if v.const_value is not None and not v.is_graph_output() and all(u.node in nodes for u in v.uses())
    )
