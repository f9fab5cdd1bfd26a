"""Structured pruning: channels, heads, neurons and hidden units go, and tensors really get smaller.

What must go together is found by axis coupling, on any graph. Which atoms of a group go is chosen by what loses
least: after removal the weights that read the group are refitted in closed form to give what they gave before
(least squares from second moments of the original's activations; no labels), so the loss of a choice is what the
refit cannot make up for. Criteria compete by that loss unless one is named.

    magnitude       least norm of the weights that make an atom
    activation      least energy its readers see (Wanda, Sun et al. 2023, arXiv 2306.11695)
    redundancy      best predicted by the others (one shot)
    reconstruction  greedy by the exact increase of the least-squares loss (structured OBS; ThiNet's objective,
                    Luo et al. 2017, arXiv 1707.06342)
    random          for comparison

Several groups that meet in one weight (heads and widths of heads; what a layer reads and what it makes) are cut
together, and the weight is refitted once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage, Term
from onnxcompress.coupling import Coupling, Group
from onnxcompress.coupling.removal import kept_positions, new_sizes
from onnxcompress.errors import CouplingError, PassOptionError, suggest
from onnxcompress.passes import _batchnorm as batchnorm
from onnxcompress.passes import _recovery as recovery
from onnxcompress.passes._keep_lists import read_keep_lists
from onnxcompress.passes._refit import RIDGE
from onnxcompress.passes._selection import Criterion, Selection, without
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["Criterion", "PruneChannels"]

Mask = npt.NDArray[np.bool_]

_ROUNDING = 1e-9
"""1 - 0.7 is a little more than 0.3, and three tenths of ten atoms are not four."""
_LADDER = (0.97, 0.94, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Shares of a group worth trying to keep."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One width of one group.

    Attributes:
        group: which.
        count: atoms kept.
        coupling: the analysis it is part of.
        selection: chooses the atoms; shared by all widths.
        mask: atoms kept, where the user gave them.
    """

    group: Group
    count: int
    coupling: Coupling
    selection: Selection
    mask: Mask | None = None


@dataclass(frozen=True, order=True)
class _Loss(Term):
    """What a cut loses."""

    cut: Cut | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Removes channels, heads, neurons and hidden units, and refits what reads them.

    Attributes:
        ratio: share of every group to remove; without it the planner chooses widths that pay.
        groups: only these, by the node that makes them or a tensor of theirs; all by default.
        keep: file of keep-lists or masks (.json or .npz), for what a training framework chose.
        criterion: how atoms are chosen.
        recover: refit the weights that read a group.
        multiple: widths are multiples of this; by default of what the profile says. 1 takes a ratio to the letter.
        ridge: pull of the refit towards the old weights, relative to the mean second moment.
        seed: of random choice.
        least: smallest share of a group that the planner may keep.
    """

    name: ClassVar[str] = "prune_channels"
    stage: ClassVar[Stage] = Stage.PRUNE
    place: ClassVar[int] = 1

    ratio: float | None = None
    groups: tuple[str, ...] = ()
    keep: str | None = None
    criterion: Criterion = Criterion.AUTO
    recover: bool = True
    multiple: int | None = None
    ridge: float = RIDGE
    seed: int = 0
    least: float = 0.25

    @classmethod
    def by_default(cls) -> Self:
        """Half of a group at most goes where nobody asked: what is fitted to samples is only as good as they are."""
        return cls(least=0.5)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "criterion", Criterion(self.criterion))  # a plain string will do
        except ValueError:
            raise PassOptionError(
                f"prune_channels: criterion is {self.criterion!r}", hint=suggest(str(self.criterion), list(Criterion))
            ) from None
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PassOptionError(f"prune_channels: ratio is {self.ratio}", hint="choose it from 0 to below 1")
        if self.multiple is not None and self.multiple < 1:
            raise PassOptionError(f"prune_channels: multiple is {self.multiple}", hint="choose 1 or more")
        if not 0 <= self.ridge < math.inf:
            raise PassOptionError(f"prune_channels: ridge is {self.ridge}", hint="choose 0 or more")
        if self.seed < 0:
            raise PassOptionError(f"prune_channels: seed is {self.seed}", hint="choose 0 or more")
        if not 0 < self.least <= 1:
            raise PassOptionError(f"prune_channels: least is {self.least}", hint="choose it above 0, up to 1")
        if self.keep is not None and self.ratio is not None:
            raise PassOptionError("prune_channels: both keep and ratio are given", hint="leave one out")
        if self.keep is not None and self.groups:
            raise PassOptionError("prune_channels: both keep and groups are given", hint="the file names its groups")

    @property
    def planned(self) -> bool:
        """A ratio and keep-lists are the user's word; without them widths are chosen where they pay."""
        return self.ratio is None and self.keep is None

    @property
    def counts_positions(self) -> bool:
        """Keep-lists number what a training framework saw; channels it set to zero are not to go before."""
        return self.keep is not None

    # --- reading -----------------------------------------------------------------------------------

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        """Every group with weights.

        Raises:
            CouplingError: a group asked for by name is pinned, or there is none of that name.
            PassOptionError: the keep-lists cannot be read.
        """
        if done := view.quantized_nodes:
            yield Skipped(done[0], f"the model is already quantized ({done[0]!r} and {len(done) - 1} more nodes)")
            return
        coupling = self._coupling(view)
        wanted = {coupling.group(name) for name in self.groups}
        masks = self._masks(view)
        for group in coupling.groups:
            if (self.groups and group not in wanted) or (self.keep is not None and group not in masks):
                continue
            if group.pinned:
                if group in wanted:
                    raise _pinned(group)
                yield Skipped(group.key, f"{group.size} {group.unit} have to stay: {group.why_fixed()}")
            elif not group.readers and not group.unweighted:
                yield Skipped(group.key, f"nothing sums over these {group.size} {group.unit}")
            else:
                yield Site(group.key, group.nodes)

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        coupling = self._coupling(view)
        group = coupling.group(site.key)
        mask = self._masks(view).get(group)
        if mask is not None:
            self._check_width(group, mask)
            counts = [int(mask.sum())] if not mask.all() else []
            if not counts:
                raise Skip("its keep-list keeps everything")
        else:
            counts = self._counts(group, coupling, target)
        selection = view.derive(("selection", self), lambda: Selection(coupling, self.criterion, self.ridge, self.seed))
        for count in counts:
            selection.expect(group, count)
        return [self._choice(site, Cut(group, count, coupling, selection, mask), view) for count in counts]

    def _choice(self, site: Site, cut: Cut, view: GraphView) -> Choice:
        group = cut.group
        keep = cut.mask if cut.mask is not None else _some(group, cut.count)
        sizes = new_sizes(cut.coupling, {group: keep})
        observed = self.criterion not in (Criterion.MAGNITUDE, Criterion.RANDOM) and cut.mask is None
        terms = (_Loss("prune", f"{group.key}:{cut.count}", cut),) if recovery.can_simulate(group, view) else ()
        return Choice(
            site,
            f"{cut.count} of {group.size} {group.unit}",
            resizes=tuple((name, axis, size) for (name, axis), size in sorted(sizes.items())),
            bytes_saved=_bytes_saved(view, sizes),
            terms=terms,
            detail=cut,
            calibrated=self.planned and (observed or self.recover),
        )

    def _counts(self, group: Group, coupling: Coupling, target: Target) -> list[int]:
        step = self._step(group, coupling, target)
        least = int(_some(group, 1).sum())
        shares = [s for s in _LADDER if s >= self.least] if self.ratio is None else [1 - self.ratio]
        found: list[int] = []
        for share in shares:
            wanted = math.ceil(share * group.size / step - _ROUNDING) * step
            count = max(wanted, math.ceil(least / step) * step)
            if count < group.size and count not in found:
                found.append(count)
        if not found:
            if self.ratio == 0:
                raise Skip("nothing is to be removed")
            raise Skip(f"{group.size} {group.unit}: no smaller multiple of {step} is near enough")
        return found

    def _step(self, group: Group, coupling: Coupling, target: Target) -> int:
        """Atoms that make up a multiple of what the device likes; heads come one by one."""
        if group.unit == "heads":
            return 1
        wide = _width(group)
        multiple = self.multiple
        if multiple is None:
            multiple = target.channel_multiple
            while multiple > 1 and multiple * 2 > wide:  # narrow groups: half of the block rather than nothing
                multiple //= 2
        elif multiple > wide:
            if group in {coupling.group(name) for name in self.groups}:
                raise CouplingError(
                    f"group {group.key!r}: its {wide} {group.unit} are fewer than the multiple {multiple}",
                    hint="leave the group out, or choose a smaller multiple",
                )
            raise Skip(f"{wide} {group.unit} are fewer than the multiple {multiple}")
        each = max(wide // group.size, 1)
        return max(multiple // math.gcd(multiple, each), 1)

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        cut = _cut(choice)
        observed = self.criterion not in (Criterion.MAGNITUDE, Criterion.RANDOM) and cut.mask is None
        return recovery.needs(cut.group, view) if observed or self.recover else ()

    # --- writing -----------------------------------------------------------------------------------

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        self.apply_all([choice], rewriter, evidence)

    def apply_all(
        self, choices: Sequence[Choice], rewriter: Rewriter, evidence: Evidence
    ) -> dict[Choice, str | Choice]:
        cuts = [_cut(choice) for choice in choices]
        keeps = {cut.group: self._kept(cut, rewriter, evidence) for cut in cuts}
        if cuts:
            recovery.cut_down(cuts[0].coupling, keeps, rewriter, evidence, ridge=self.ridge if self.recover else None)
        return {}

    def simulate(self, term: Term, rewriter: Rewriter, evidence: Evidence, target: Target, switch: ir.Value) -> bool:
        cut = term.cut if isinstance(term, _Loss) else None
        if cut is None:
            return False
        keeps = {cut.group: self._kept(cut, rewriter, evidence)}
        kept = kept_positions(cut.coupling, keeps)
        recovery.behind_switch(cut.group, kept, rewriter, evidence, switch, ridge=self.ridge if self.recover else None)
        return True

    def settling(self, view: GraphView) -> Iterable[Collection[Need]]:
        return batchnorm.rounds(view) if self.recover else ()

    def settle(self, rewriter: Rewriter, before: Evidence, after: Evidence) -> None:
        batchnorm.settle(rewriter, before, after)

    def _kept(self, cut: Cut, rewriter: Rewriter, evidence: Evidence) -> Mask:
        if cut.mask is not None:
            return cut.mask
        return cut.selection.keep(cut.group, cut.count, rewriter, evidence)

    def _check_width(self, group: Group, mask: Mask) -> None:
        kept = int(mask.sum()) * max(_width(group) // group.size, 1)
        if self.multiple is not None and kept < self.multiple and group.unit != "heads":
            raise CouplingError(
                f"group {group.key!r}: its keep-list keeps {int(mask.sum())} of {group.size} {group.unit}, "
                f"a width below the multiple {self.multiple}",
                hint="keep more, or leave multiple out",
            )

    # --- inside ------------------------------------------------------------------------------------

    def _coupling(self, view: GraphView) -> Coupling:
        return view.derive("coupling", lambda: Coupling(view, view.observed))

    def _masks(self, view: GraphView) -> dict[Group, Mask]:
        path = self.keep
        if path is None:
            return {}
        return view.derive(("keep", path), lambda: read_keep_lists(path, self._coupling(view), view))


def _pinned(group: Group) -> CouplingError:
    """Names what pins a group."""
    text = f"group {group.key!r} ({group.size} {group.unit}) is pinned: {group.why_fixed()}"
    return CouplingError(text, hint="leave it out, or change what pins it")


def _width(group: Group) -> int:
    """Positions of the widest weight that makes a group."""
    return max((len(p.atoms) for p in group.parts if p.factor.axis in group.makers), default=group.size)


def _cut(choice: Choice) -> Cut:
    if not isinstance(choice.detail, Cut):
        raise PassOptionError(f"choice {choice.name!r} was not made by prune_channels")
    return choice.detail


def _some(group: Group, count: int) -> Mask:
    """Any atoms of that number, or as few as can stay, for sizes; evenly taken from all branches of a Concat."""
    free = np.flatnonzero(~group.fixed)
    last = np.argsort(np.modf(np.arange(len(free)) * 0.618034)[0], kind="stable")  # spread out at every length
    return without(group, free[last], max(count, int(group.fixed.sum()), 1))


def _bytes_saved(view: GraphView, sizes: Mapping[tuple[str, int], int]) -> int:
    names = {name for name, _ in sizes}
    total = 0
    for value in view.weights():
        tensor = value.const_value
        if tensor is not None and value.name in names:
            share = 1.0
            for axis, extent in enumerate(tensor.shape.numpy()):
                share *= sizes.get((str(value.name), axis), extent) / extent
            total += round(tensor.nbytes * (1 - share))
    return total
