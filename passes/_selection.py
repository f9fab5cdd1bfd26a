"""Which atoms of a group stay."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from onnxcompress.coupling import Axis, Coupling, Group
from onnxcompress.passes import _importance as importance
from onnxcompress.passes._readers import Linear, held_out, labels_of, linears
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence

__all__ = ["Criterion", "Selection", "without"]

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Criterion(StrEnum):
    """How atoms are chosen."""

    AUTO = "auto"
    """Whatever loses least on the calibration data."""
    RECONSTRUCTION = "reconstruction"
    REDUNDANCY = "redundancy"
    ACTIVATION = "activation"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Selection:
    """Orders of removal for the groups of one model; each is worked out once for the same evidence.

    Args:
        coupling: the groups.
        criterion: how atoms are chosen.
        ridge: of the refit, which the loss counts on.
        seed: of random choice.
    """

    def __init__(self, coupling: Coupling, criterion: Criterion, ridge: float, seed: int) -> None:
        self._coupling, self._criterion, self._ridge, self._seed = coupling, criterion, ridge, seed
        self._orders: dict[tuple[str, Criterion, tuple[int, ...]], npt.NDArray[np.intp]] = {}
        self._best: dict[tuple[str, tuple[int, ...]], Criterion] = {}
        self._deepest: dict[str, int] = {}
        self._held: list[object] = []  # moments whose identity is part of a key
        self.chosen: dict[tuple[str, int], Criterion] = {}

    def expect(self, group: Group, count: int) -> None:
        """Says how few atoms of a group will be asked for, so that an order is not worked out further."""
        self._deepest[group.key] = min(count, self._deepest.get(group.key, count))

    def keep(self, group: Group, count: int, rewriter: Rewriter, evidence: Evidence) -> Mask:
        """Atoms that stay.

        Args:
            group: which.
            count: how many stay.
            rewriter: of the model before anything was cut.
            evidence: second moments of what reads the group, where they were observed.
        """
        with threadpool_limits(
            1, "blas"
        ):  # matrices are small; threads that wait for each other cost more than they give
            return self._keep(group, count, rewriter, evidence)

    def _keep(self, group: Group, count: int, rewriter: Rewriter, evidence: Evidence) -> Mask:
        found = [m for r in group.readers for m in linears(rewriter.node(r.node), r, evidence)]
        complete = {m.reader for m in found} == set(group.readers) and found
        criteria: tuple[Criterion, ...] = (self._criterion,)
        if self._criterion is Criterion.AUTO:
            criteria = (
                (Criterion.RECONSTRUCTION, Criterion.ACTIVATION, Criterion.MAGNITUDE)
                if complete
                else (Criterion.MAGNITUDE,)
            )
        elif not found and self._criterion not in (Criterion.MAGNITUDE, Criterion.RANDOM):
            criteria = (Criterion.MAGNITUDE,)
        key = (group.key, tuple(id(m.moments.matrix) for m in found))
        if len(criteria) > 1 and key in self._best:
            criteria = (self._best[key],)
        masks = {c: self._mask(group, count, c, found, rewriter) for c in criteria}
        if len(masks) > 1:  # the same for all widths, told at the first that is asked for
            best = min(criteria, key=lambda c: (self._loss(group, masks[c], found), criteria.index(c)))
            self._best[key] = best
            criteria = (best,)
        self.chosen[group.key, count] = criteria[0]
        return masks[criteria[0]]

    def _mask(self, group: Group, count: int, criterion: Criterion, found: list[Linear], rewriter: Rewriter) -> Mask:
        key = (group.key, criterion, tuple(id(m.moments.matrix) for m in found))
        if key not in self._orders:
            self._held += [m.moments for m in found]
            self._orders[key] = self._order(group, criterion, found, rewriter)
        return without(group, self._orders[key], count)

    def _order(
        self, group: Group, criterion: Criterion, found: list[Linear], rewriter: Rewriter
    ) -> npt.NDArray[np.intp]:
        stop = None if _uneven(group) else group.size - self._deepest.get(group.key, 1)
        fixed = [int(i) for i in np.flatnonzero(group.fixed)]
        if criterion is Criterion.RANDOM:
            free = np.flatnonzero(~group.fixed)
            return np.random.default_rng(zlib.crc32(group.key.encode()) ^ self._seed).permutation(free)
        if criterion is Criterion.MAGNITUDE:
            return importance.magnitude(self._norms(group, rewriter), fixed=fixed).atoms
        consumers = [self._consumer(group, m) for m in found]
        ridge = max(m.ridge(self._ridge) for m in found)
        by_name: dict[Criterion, Callable[..., importance.Order]] = {
            Criterion.RECONSTRUCTION: importance.reconstruction,
            Criterion.REDUNDANCY: importance.redundancy,
        }
        if criterion is Criterion.ACTIVATION:
            return importance.activation(consumers, group.size, fixed=fixed).atoms
        return by_name[criterion](consumers, group.size, ridge=ridge, fixed=fixed, stop=stop).atoms

    def _consumer(self, group: Group, linear: Linear) -> importance.Consumer:
        matrix = linear.moments.matrix if linear.bias is None else linear.moments.covariance
        labels = labels_of(group, linear, self._coupling.factors(linear.reader.weight))
        return importance.Consumer(linear.weight, matrix, labels.astype(np.intp))

    def _loss(self, group: Group, mask: Mask, found: list[Linear]) -> float:
        """Share of the readers' output energy that a refit does not make up for where it was not fitted, summed."""
        total = 0.0
        for linear in found:
            labels = labels_of(group, linear, self._coupling.factors(linear.reader.weight))
            kept = np.flatnonzero((labels < 0) | mask[labels])
            total += held_out(linear, kept, linear.ridge(self._ridge))
        return total

    def _norms(self, group: Group, rewriter: Rewriter) -> Array:
        """L2 norm of the weights that make each atom, (atoms, 1); biases do not count."""
        squares = np.zeros(group.size)
        for axis in group.makers:
            array = _array(axis, rewriter)
            if array is None or array.ndim < 2 or array.dtype.kind != "f":
                continue
            others = tuple(d for d in range(array.ndim) if d != axis.dim)
            each = np.square(array.astype(np.float64)).sum(axis=others)
            sizes = self._coupling.factors(axis)
            for part in group.parts:
                if part.factor.axis == axis:
                    np.add.at(squares, part.along(sizes), each)
        return np.asarray(np.sqrt(squares)[:, None])


def without(group: Group, order: npt.NDArray[np.intp], count: int) -> Mask:
    """Atoms that stay when others go in this order until ``count`` are left.

    An atom without which a tensor would have no position left is passed over: where Concat joins branches,
    each holds only some of the atoms.
    """
    mask = np.ones(group.size, bool)
    branches = {a.tobytes(): a for p in group.parts if len(a := np.unique(p.atoms)) < group.size}
    holders: dict[int, list[bytes]] = {}
    for name, atoms in branches.items():
        for atom in atoms:
            holders.setdefault(int(atom), []).append(name)
    left = {name: len(atoms) for name, atoms in branches.items()}
    gone = 0
    for atom in map(int, order):
        if gone == group.size - count:
            break
        held = holders.get(atom, [])
        if all(left[name] > 1 for name in held):
            mask[atom] = False
            gone += 1
            for name in held:
                left[name] -= 1
    return mask


def _uneven(group: Group) -> bool:
    """Whether some tensors hold only some of the atoms, so that one may be passed over."""
    return any(len(part.atoms) < group.size for part in group.parts)


def _array(axis: Axis, rewriter: Rewriter) -> npt.NDArray[np.generic] | None:
    if axis.use:
        owner, _, index = axis.use.rpartition(":")
        value = rewriter.node(owner).inputs[int(index)]
    else:
        value = rewriter.find(axis.value)
    return None if value is None or value.const_value is None else value.const_value.numpy()
