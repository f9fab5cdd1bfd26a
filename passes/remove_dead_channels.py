"""Dead channels: what nobody reads, what is always zero, what a bias can say, and what is there twice, goes.

    sum_j w_j x_j          terms with w_j = 0, or with x_j = 0 whatever the input, are left out
    sum_j w_j c_j + b      constants c_j go into the bias b
    w_i x + w_j x          equal channels are one, with the sum of their weights

Found on any graph by axis coupling, together with everything that has to go along: all makers of a residual sum have
to agree. Weight decay and sparsity penalties leave such channels behind; masks of a pruning framework do, too.

In exact arithmetic nothing changes. In floating point a term of zero changes no sum either, but a kernel may add a
shorter sum in another order, so outputs are equal bit for bit only where it does not; what goes into a bias, and sums
of weights, are rounded anew. The pipeline holds the result to float rounding.

Widths that the device likes are kept: a channel count that falls off a multiple can be several times slower, so some
dead channels stay where not enough of them are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.coupling import Coupling, Group
from onnxcompress.errors import PassOptionError
from onnxcompress.passes._dead_channels import Found, find, take_away
from onnxcompress.passes._dead_look import TWICE, suspects
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["RemoveDeadChannels"]


@dataclass(frozen=True, eq=False)
class _Removal:
    """Atoms of one group that go."""

    found: Found
    atoms: tuple[int, ...]


@dataclass(frozen=True)
class RemoveDeadChannels(Pass):
    """Removes channels, heads and hidden units that add nothing or are there twice.

    Attributes:
        multiple: widths keep to multiples of this; by default of what the profile says. 1 removes all.
    """

    name: ClassVar[str] = "remove_dead_channels"
    stage: ClassVar[Stage] = Stage.NORMALISE
    place: ClassVar[int] = 6
    lossless: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    multiple: int | None = None

    def __post_init__(self) -> None:
        if self.multiple is not None and self.multiple < 1:
            raise PassOptionError(f"remove_dead_channels: multiple is {self.multiple}", hint="choose 1 or more")

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        """Groups with something to remove; those that only look so, with the reason."""
        if view.quantized_nodes:
            return
        suspected = self._suspects(view)
        if not suspected:
            return
        found, refused = self._found(view)
        for group in self._coupling(view).groups:
            if group in found:
                yield Site(group.key, group.nodes)
                continue
            axes = {(p.factor.axis.value, p.factor.axis.dim) for p in group.parts}
            why = next((text for key, text in suspected.items() if key in axes), None)
            if why is not None:
                yield Skipped(group.key, f"a weight {why}, but {_reason(group, refused)}")

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        found, _ = self._found(view)
        one = found[self._coupling(view).group(site.key)]
        multiple = _narrow(one, target.channel_multiple if self.multiple is None else self.multiple)
        atoms, group = _in_step(one, multiple), one.group
        rest = len(one.all) - len(atoms)
        why = f"{rest} of {group.size} {group.unit} add nothing or are there twice, but keep the width to {multiple}s"
        if not atoms:
            raise Skip(why)
        name = f"{group.size - len(atoms)} of {group.size} {group.unit}" + (f" ({why})" if rest else "")
        return [Choice(site, name, effects=False, detail=_Removal(one, atoms))]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        self.apply_all([choice], rewriter, evidence)

    def apply_all(self, choices: Sequence[Choice], rewriter: Rewriter, evidence: Evidence) -> Mapping[Choice, str]:
        removals = [_removal(choice) for choice in choices]
        found = {r.found.group: r.found for r in removals}
        if found:
            take_away({r.found.group: r.atoms for r in removals}, found, rewriter)
        return {}

    def _found(self, view: GraphView) -> tuple[dict[Group, Found], dict[Group, str]]:
        def look() -> tuple[dict[Group, Found], dict[Group, str]]:
            twins = any(TWICE in text for text in self._suspects(view).values())
            found, refused = find(view, self._coupling(view), twins=twins)
            return {f.group: f for f in found}, refused

        return view.derive(("dead channels", self.name), look)

    def _suspects(self, view: GraphView) -> dict[tuple[str, int], str]:
        return view.derive(("suspects", self.name), lambda: suspects(view))

    def _coupling(self, view: GraphView) -> Coupling:
        return view.derive("coupling", lambda: Coupling(view, view.observed))


def _removal(choice: Choice) -> _Removal:
    if not isinstance(choice.detail, _Removal):
        raise PassOptionError(f"choice {choice.name!r} was not made by remove_dead_channels")
    return choice.detail


def _reason(group: Group, refused: Mapping[Group, str]) -> str:
    if group.pinned:
        return f"these {group.size} {group.unit} have to stay: {group.why_fixed()}"
    if group in refused:
        return refused[group]
    return "another weight or bias of these channels is not zero, or a padded border would miss a constant"


def _narrow(found: Found, multiple: int) -> int:
    """The multiple for narrow groups: half of the block rather than nothing."""
    makers = [p.factor.axis for p in found.group.parts if p.factor.axis in found.group.makers]
    narrowest = min(found.coupling.sizes[axis] for axis in makers)
    while multiple > 1 and multiple * 2 > narrowest:
        multiple //= 2
    return multiple


def _in_step(found: Found, multiple: int) -> tuple[int, ...]:
    """As many atoms as can go without leaving the multiples that the width is of now.

    Where tensors hold different atoms (a Concat and its inputs), the atoms of each go in whole multiples, which
    changes the remainder of no tensor's width.
    """
    group = found.group
    tensors = [p for p in group.parts if p.factor.axis.dim >= 0]
    made = [p.factor for p in tensors if p.factor.axis in group.makers]
    each = min(math.prod(found.coupling.factors(f.axis)[f.place + 1 :]) for f in made)
    members = {p.atoms.tobytes(): np.isin(np.arange(group.size), p.atoms) for p in tensors}
    patterns = np.stack(list(members.values()), axis=1)
    kinds: dict[bytes, list[int]] = {}
    for atom in range(group.size):
        kinds.setdefault(patterns[atom].tobytes(), []).append(atom)
    going: list[int] = []
    for atoms in kinds.values():
        candidates = [a for a in found.all if a in set(atoms)]
        going += candidates[: _count(len(atoms), len(candidates), each, multiple, alone=len(kinds) == 1)]
    return tuple(sorted(going))


def _count(size: int, most: int, each: int, multiple: int, *, alone: bool) -> int:
    """How many of at most ``most`` atoms go."""
    most = min(most, size - 1)
    if not alone:
        step = multiple // math.gcd(multiple, each)
        return most // step * step
    now = math.gcd(size * each, multiple)
    return next((n for n in range(most, 0, -1) if math.gcd((size - n) * each, multiple) >= now), 0)
