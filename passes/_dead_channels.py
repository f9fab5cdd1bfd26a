"""Which atoms of which groups can go without a loss, and taking them away.

    sum_j w_j x_j  =  sum over j in K of w_j x_j         where w_j = 0 or x_j = 0 for all j not in K
    w_i x + w_j x  =  (w_i + w_j) x                      twins
    w_j c + b      =  b + (w_j c)                        constants

**Dead** atoms are found as a collector finds garbage: an atom is live if it has to stay, or if a weight that is not
zero carries something of it that is not zero into an output position that is live. So atoms that only other dead ones
read go, too. **Constants** go into biases where all positions of the output see them alike, not at padded borders.
**Twins** are atoms with the same label (see ``_channel_values``) wherever they are read; the first of them stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.coupling import Axis, Coupling, Factor, Group, Part, remove
from onnxcompress.coupling.removal import kept_positions
from onnxcompress.passes._channel_states import End, by_position
from onnxcompress.passes._channel_values import ChannelValues
from onnxcompress.passes._constant_sum import absorb
from onnxcompress.passes._readers import bias_place
from onnxcompress.rewrite import Rewriter
from onnxcompress.view import GraphView

__all__ = ["Found", "find", "take_away"]

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Found:
    """What can go of one group.

    Attributes:
        group: which.
        coupling: it is part of.
        ends: where it is read.
        dead: atoms that nobody reads, or that add nothing; ascending.
        constant: atoms that are a constant biases can take; ascending.
        twins: atoms that are equal to another, and to which.
    """

    group: Group
    coupling: Coupling
    ends: tuple[End, ...]
    dead: tuple[int, ...]
    constant: tuple[int, ...]
    twins: Mapping[int, int]

    @property
    def all(self) -> tuple[int, ...]:
        """Every atom that can go, what costs nothing first."""
        return (*self.dead, *self.constant, *sorted(self.twins, reverse=True))


def find(view: GraphView, coupling: Coupling, *, twins: bool = True) -> tuple[list[Found], dict[Group, str]]:
    """Everything that can go, and the groups that were left alone, with the reason.

    Args:
        view: the model.
        coupling: its groups.
        twins: look for atoms that are there twice, too.
    """
    values = ChannelValues(view, coupling, labels=twins)
    live = _live(view, coupling, values)
    found: list[Found] = []
    for group, mask in live.items():
        ends = tuple(values.ends[group])
        dead = np.flatnonzero(~mask)
        rest = mask & ~group.fixed
        constant = np.flatnonzero(rest & _foldable(view, coupling, ends, group))
        rest[constant] = False
        equal = _twins(view, ends, group, rest, mask) if twins and rest.any() else {}
        if dead.size or constant.size or equal:
            found.append(Found(group, coupling, ends, tuple(map(int, dead)), tuple(map(int, constant)), equal))
    return found, values.refused


# --- what is live ----------------------------------------------------------------------------------


def _live(view: GraphView, coupling: Coupling, values: ChannelValues) -> dict[Group, Mask]:
    """Atoms that reach something which has to stay; groups that can shrink only."""
    live = {g: g.fixed.copy() for g in coupling.groups if not g.pinned and g not in values.refused}
    holders: dict[Axis, list[tuple[Group, Part]]] = defaultdict(list)
    for group in live:
        for part in group.parts:
            holders[part.factor.axis].append((group, part))
    ends = [(group, end) for group in live for end in values.ends[group]][::-1]
    changed = True
    while changed:
        changed = False
        for group, end in ends:
            if live[group].all():
                continue
            seen = live[group] | (~end.zero & _read(view, coupling, group, end, live, holders))
            if (seen != live[group]).any():
                live[group], changed = seen, True
    return live


def _read(
    view: GraphView,
    coupling: Coupling,
    group: Group,
    end: End,
    live: Mapping[Group, Mask],
    holders: Mapping[Axis, Sequence[tuple[Group, Part]]],
) -> Mask:
    """Atoms with a weight that is not zero into something live; those known to be live may be left out."""
    part, array = end.part, view.array(view.node(end.node).inputs[end.index])
    if part is None or array is None:
        return np.ones(group.size, bool)
    axis = part.factor.axis
    rows = np.ones(1, bool)
    outputs = axis._replace(dim=end.makes)
    known = {p.factor.place: live[g][p.atoms] for g, p in holders.get(outputs, ())}
    for place, size in enumerate(coupling.factors(outputs)):
        rows = (rows[:, None] & known.get(place, np.ones(size, bool))[None, :]).reshape(-1)
    if not rows.all():
        array = np.compress(rows, array, axis=end.makes)
    weights = by_position(array, axis.dim, part, coupling)
    asked = ~live[group][part.atoms]
    read = np.zeros(group.size, bool)
    np.logical_or.at(read, part.atoms[asked], weights[asked].any(axis=tuple(range(1, weights.ndim))))
    return read


def _needed(view: GraphView, coupling: Coupling, end: End, group: Group) -> Mask:
    """Atoms that add something at an end."""
    read = _read(view, coupling, group, end, {group: np.zeros(group.size, bool)}, {})
    return np.asarray(read & ~end.zero)


# --- constants and twins ---------------------------------------------------------------------------


def _foldable(view: GraphView, coupling: Coupling, ends: Sequence[End], group: Group) -> Mask:
    fits = np.ones(group.size, bool)
    for end in ends:
        if _takes_constants(view, coupling, end):
            fits &= np.isfinite(end.state.constant) | end.zero
        else:
            fits &= ~_needed(view, coupling, end, group)
    return fits & bool(ends)


def _takes_constants(view: GraphView, coupling: Coupling, end: End) -> bool:
    """Whether a bias can take what a constant adds: one that is there, and no border that does not see it."""
    node = view.node(end.node)
    if end.part is None or len(coupling.factors(end.part.factor.axis)) > 1:  # two groups could count one position
        return False
    if not view.is_float_weight(node.inputs[end.index]) or bias_place(node) is None:
        return False
    if node.op_type == "Conv":
        padded = (
            any(node.attributes.get_ints("pads", ())) or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        )
        return node.attributes.get_int("group", 1) == 1 and not padded
    return node.op_type in ("Gemm", "MatMul") and end.index == 1


def _twins(view: GraphView, ends: Sequence[End], group: Group, free: Mask, live: Mask) -> dict[int, int]:
    """Atoms that are equal wherever they are read, and which one of them stays."""
    if not ends or any(len(np.unique(p.atoms)) < len(p.atoms) for p in group.parts):
        return {}  # several positions of one atom may have changed places
    able = live.copy()
    for end in ends:
        able &= end.zero | (end.part is not None and _alone(view, end, group))
    present = {p.atoms.tobytes(): np.isin(np.arange(group.size), p.atoms) for p in group.parts}
    keys = np.stack([*(e.state.label for e in ends), *present.values()], axis=1)
    first: dict[bytes, int] = {}
    for atom in (*np.flatnonzero(able & group.fixed), *np.flatnonzero(able & free)):
        first.setdefault(keys[atom].tobytes(), int(atom))
    kept = {int(a): first[keys[a].tobytes()] for a in np.flatnonzero(able & free)}
    return {a: b for a, b in kept.items() if a != b}


def _alone(view: GraphView, end: End, group: Group) -> bool:
    """Whether all who use a weight read this group with it, along the same axis."""
    value = view.node(end.node).inputs[end.index]
    if value is None or end.part is None or not view.is_float_weight(value):
        return False
    axis = end.part.factor.axis
    uses = view.consumers(value)
    readers = {(r.node, r.index) for r in group.readers if r.weight == axis}
    return bool(axis.use) or all((str(n.name), i) in readers for n, i in uses)


# --- taking away -----------------------------------------------------------------------------------


def take_away(gone: Mapping[Group, Sequence[int]], found: Mapping[Group, Found], rewriter: Rewriter) -> None:
    """Removes atoms of several groups at once.

    Args:
        gone: by group, which of what was found.
        found: what was found, of one coupling.
        rewriter: of the model the coupling is of, or of a clone.
    """
    coupling = next(iter(found.values())).coupling
    keeps = {group: ~np.isin(np.arange(group.size), atoms) for group, atoms in gone.items()}
    kept = kept_positions(coupling, keeps)
    shifts = [s for g, atoms in gone.items() for s in _shifts(found[g], atoms, rewriter, kept)]
    done: set[Factor] = set()
    for group, atoms in gone.items():
        twins = {a: b for a, b in found[group].twins.items() if a in set(atoms)}
        for end in found[group].ends if twins else ():
            if end.part is not None and end.part.factor not in done:
                done.add(end.part.factor)
                _merge(rewriter, end, end.part, twins, coupling)
    remove(coupling, keeps, rewriter)
    for name, shift in shifts:
        node = rewriter.node(name)
        place = bias_place(node)
        if place is not None:
            absorb(rewriter, place, shift, -1 if node.op_type == "MatMul" else 1)


def _shifts(
    found: Found, atoms: Sequence[int], rewriter: Rewriter, kept: Mapping[Axis, Indices]
) -> list[tuple[str, npt.NDArray[np.float64]]]:
    """What constants add to the outputs that are kept, by node."""
    constant, view = sorted(set(found.constant) & set(atoms)), rewriter.view()
    shifts: list[tuple[str, npt.NDArray[np.float64]]] = []
    for end in found.ends if constant else ():
        value = rewriter.node(end.node).inputs[end.index]
        if end.part is None or value is None or value.const_value is None:
            continue
        axis = end.part.factor.axis
        array = np.asarray(value.const_value.numpy(), np.float64)
        outputs = kept.get(axis._replace(dim=end.makes))
        array = array if outputs is None else np.take(array, outputs, axis=end.makes)
        moved = by_position(array, axis.dim, end.part, found.coupling)
        known = np.isin(end.part.atoms, constant) & np.isfinite(end.state.constant[end.part.atoms])
        if not _takes_constants(view, found.coupling, end) or not known.any():
            continue
        factors = np.where(known, end.state.constant[end.part.atoms], 0.0)
        rest = np.tensordot(factors, moved, axes=1)  # the axis summed over is gone
        order = end.makes if end.makes < axis.dim else end.makes - 1
        shifts.append((end.node, rest.sum(axis=tuple(k for k in range(rest.ndim) if k != order))))
    return shifts


def _merge(rewriter: Rewriter, end: End, part: Part, twins: Mapping[int, int], coupling: Coupling) -> None:
    """Adds the weights of those that go to the weights of those that stay."""
    node = rewriter.node(end.node)
    value = node.inputs[end.index]
    if value is None or value.const_value is None:
        return
    array = np.array(value.const_value.numpy())
    moved = by_position(array, part.factor.axis.dim, part, coupling)
    position = {int(a): p for p, a in enumerate(part.atoms)}
    sums: dict[int, npt.NDArray[np.float64]] = {}
    for atom, stays in twins.items():
        if atom in position:
            at = position[stays]
            sums[at] = sums.get(at, moved[at].astype(np.float64)) + moved[position[atom]]
    for at, total in sums.items():
        moved[at] = total
    if part.factor.axis.use:
        rewriter.set_weight(node, end.index, array)
    else:
        rewriter.replace_weight(value, array)
