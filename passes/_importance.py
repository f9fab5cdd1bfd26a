"""Which atoms of a group go first: channels, heads, hidden units.

An atom owns features of one or more consumers y = W x, each with second moments S = E[x x'] of its
input (``matrix``; the covariance, where the bias will be corrected). Removing it removes its features
everywhere. Costs of several consumers are added, each relative to the energy tr(W S W') of its output.

Reconstruction, the exact greedy. Let T = S + ridge m I, with m the mean of S's diagonal, P = T^-1, and
W~ the weights refitted so far (zero on what is gone). The least-squares objective is

    J(V) = tr((W - V) T (W - V)') = E||W x - V x||^2 + ridge m ||W - V||^2

The best V is the T-orthogonal projection of W onto weights that are zero on what is gone, so taking
features F away adds to J exactly the distance from W~ to the smaller space (Pythagoras). Minimising
tr(D T D') subject to D_F = -W~_F gives D = -W~_F (P_FF)^-1 P_F: and

    cost(F) = tr(W~_F (P_FF)^-1 W~_F') = tr((P_FF)^-1 G_FF),        G = W~' W~
    W~ <- W~ - W~_F (P_FF)^-1 P_F:          P <- P - P_:F (P_FF)^-1 P_F:

(structured OBS: Hassibi 1993, Kurtic's ZipLM 2023). The final W~ is ``refit`` with the same ridge, and
the sum of costs is its loss plus ridge m ||W - V||^2: with ridge 0 exactly ``lost``, else a little above.
Only G and P are needed, not W~, and of them only the columns of F and the blocks of live atoms: their
updates are of rank |F| and are gathered until there are ``BLOCK`` of them. So n features cost about
6 n^2 flops for each that goes, in matrix products.

A choice is made among atoms within rounding of the cheapest, lowest index first; so the order is the
same whatever order sums were taken in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cho_factor, solve_triangular
from scipy.linalg.lapack import dpocon, dpotri

from onnxcompress.passes._refit import RIDGE, scale_of

__all__ = ["Consumer", "Order", "activation", "along", "geometric_median", "magnitude", "reconstruction", "redundancy"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

BLOCK = 64
"""Removed features whose updates are gathered."""
LEAST_RIDGE = 1e-8
"""Relative; takes the place of a smaller ridge where moments are singular, so that an inverse exists."""
SINGULAR = 1e-11
"""Reciprocal condition below which they are."""
RELATIVE_TIE, ABSOLUTE_TIE = 1e-9, 1e-13


@dataclass(frozen=True, eq=False)
class Consumer:
    """One linear reader of a group.

    Attributes:
        weight: (outputs, n); a k x k Conv over channel moments has (outputs * taps, channels).
        matrix: (n, n) second moments of the features, or their covariance.
        labels: (n,) the atom each feature belongs to, or -1 for one that always stays.
    """

    weight: Array
    matrix: Array
    labels: Indices


@dataclass(frozen=True, eq=False)
class Order:
    """Atoms, first to go first.

    Attributes:
        atoms: Without the fixed ones, and not more than were asked for.
        loss: What is lost after each of them has gone, of the consumers' output energy, added over
            consumers; None where the measure says nothing about it.
    """

    atoms: Indices
    loss: Array | None = None


def magnitude(producers: npt.ArrayLike, *, fixed: Iterable[int] = (), stop: int | None = None) -> Order:
    """Least L2 norm of what makes an atom first; ``producers`` is (atoms, ...)."""
    rows = _rows(producers)
    return _sorted(np.sqrt((rows**2).sum(axis=1)), fixed, stop)


def geometric_median(producers: npt.ArrayLike, *, fixed: Iterable[int] = (), stop: int | None = None) -> Order:
    """Nearest to the geometric median first (FPGM, He 2019): least sum of distances to all other atoms."""
    rows = _rows(producers)
    squares = (rows**2).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    np.fill_diagonal(distances, 0)
    return _sorted(np.sqrt(np.maximum(distances, 0)).sum(axis=1), fixed, stop)


def activation(
    consumers: Sequence[Consumer], atoms: int, *, fixed: Iterable[int] = (), stop: int | None = None
) -> Order:
    """Least E[x_j^2] ||W_j||^2 first (Wanda, Sun 2023), added over an atom's features and its consumers.

    The loss is what it would be if features were uncorrelated and nothing was refitted.
    """
    scores = np.zeros(atoms)
    for consumer in consumers:
        energy = _energy(consumer)
        each = np.diagonal(consumer.matrix) * (consumer.weight**2).sum(axis=0)
        owned = consumer.labels >= 0
        if energy > 0:
            np.add.at(scores, consumer.labels[owned], each[owned] / energy)
    order = _sorted(scores, fixed, stop)
    return Order(order.atoms, np.cumsum(scores[order.atoms]))


def redundancy(
    consumers: Sequence[Consumer], atoms: int, *, ridge: float = RIDGE, fixed: Iterable[int] = (),
    stop: int | None = None,
) -> Order:  # fmt: skip
    """Best predicted by the others first: ||W_j||^2 / (S^-1)_jj, each as if it went alone.

    No loss is given: two that stand in for each other are both cheap, until one is gone.
    """
    states = [_State(c, atoms, ridge) for c in consumers]
    return _sorted(_costs(states, np.arange(atoms), atoms), fixed, stop)


def reconstruction(
    consumers: Sequence[Consumer], atoms: int, *, ridge: float = RIDGE, fixed: Iterable[int] = (),
    stop: int | None = None,
) -> Order:  # fmt: skip
    """Greedy backward elimination by the exact increase of the least-squares loss; see the module.

    Args:
        consumers: At least one; each read by the atoms its labels name.
        atoms: How many there are.
        ridge: Relative to the mean second moment, as in ``refit``.
        fixed: Atoms that must stay.
        stop: Most atoms to remove; all that may go by default.

    Raises:
        ValueError: if shapes or labels do not fit; a bug of the caller.
    """
    alive = _free(atoms, fixed)
    count = len(alive) if stop is None else min(stop, len(alive))
    return _eliminate(consumers, atoms, ridge, alive, count, None)


def along(consumers: Sequence[Consumer], atoms: int, order: npt.ArrayLike, *, ridge: float = RIDGE) -> Order:
    """The same loss, after refitting, along an order that something else chose."""
    given = np.asarray(order, np.intp)
    if len(np.unique(given)) != len(given) or (len(given) and not 0 <= given.min() <= given.max() < atoms):
        raise ValueError(f"an order has to be different atoms in 0..{atoms - 1}")
    return _eliminate(consumers, atoms, ridge, given, len(given), given)


def _eliminate(
    consumers: Sequence[Consumer], atoms: int, ridge: float, alive: Indices, count: int, given: Indices | None
) -> Order:
    states = [_State(c, atoms, ridge) for c in consumers]
    gone, losses, total = np.empty(count, np.intp), np.empty(count), 0.0
    for step in range(count):
        if given is None:
            costs = _costs(states, alive, atoms)
            place = int(np.argmax(costs <= costs.min() * (1 + RELATIVE_TIE) + ABSOLUTE_TIE))
            cost = costs[place]
        else:
            place, cost = 0, _costs(states, alive[:1], atoms)[0]
        gone[step], total = alive[place], total + cost
        losses[step] = total
        alive = np.delete(alive, place)
        if step + 1 < count:
            for state in states:
                state.remove(int(gone[step]))
    return Order(gone, losses)


def _costs(states: Sequence[_State], alive: Indices, atoms: int) -> Array:
    """Increase of the loss for each atom in ``alive``, never negative."""
    total = np.zeros(len(alive))
    for state in states:
        total += state.costs(alive)
    return np.maximum(total, 0.0)


class _State:
    """P and G of one consumer: full matrices as of the last flush, and what has come since.

    Now P is ``inverse`` - U U', and G is ``gram`` - H X' - X H', with U, X, H of shape (features,
    pending). An extra row of U, X and H that is always zero stands for the padding of atoms that own
    fewer features than others.
    """

    def __init__(self, consumer: Consumer, atoms: int, ridge: float) -> None:
        weight, matrix, labels = consumer.weight, consumer.matrix, consumer.labels
        n = len(labels)
        if weight.ndim != 2 or weight.shape[1] != n or matrix.shape != (n, n):
            raise ValueError(f"a weight {weight.shape}, moments {matrix.shape} and {n} labels do not fit")
        if n and not -1 <= labels.min() <= labels.max() < atoms:
            raise ValueError(f"labels have to be -1 or an atom in 0..{atoms - 1}")
        self.members = _members(labels, atoms)
        self.energy = _energy(consumer)
        self.inverse = _inverse(matrix, ridge)
        self.gram = np.asarray(weight.T @ weight, np.float64)
        widest = max((len(m) for m in self.members), default=0)
        self.place = np.full((atoms, widest), n, np.intp)  # n is the row that is zero
        for atom, members in enumerate(self.members):
            self.place[atom, : len(members)] = members
        inside = self.place < n
        rows, columns = np.minimum(self.place[:, :, None], n - 1), np.minimum(self.place[:, None, :], n - 1)
        both = inside[:, :, None] & inside[:, None, :]
        self.blocks = np.where(both, self.inverse[rows, columns], np.eye(widest))
        self.grams = np.where(both, self.gram[rows, columns], 0.0)
        self.room = max(BLOCK, widest)
        self.u, self.x, self.h = (np.zeros((n + 1, self.room)) for _ in range(3))
        self.pending = 0

    def costs(self, alive: Indices) -> Array:
        if self.energy <= 0 or not self.place.shape[1]:
            return np.zeros(len(alive))
        blocks, grams = self.blocks[alive], self.grams[alive]
        if self.place.shape[1] == 1:
            return np.asarray(grams[:, 0, 0] / blocks[:, 0, 0] / self.energy)
        return np.asarray(np.trace(np.linalg.solve(blocks, grams), axis1=1, axis2=2) / self.energy)

    def remove(self, atom: int) -> None:
        """Rank-|F| update of P and G by what the atom owns here."""
        f = self.members[atom]
        if not len(f) or self.energy <= 0:
            return
        if self.pending + len(f) > self.room:
            self._flush()
        old = slice(self.pending)
        p = self.inverse[f].T - self.u[:-1, old] @ self.u[f, old].T
        g = self.gram[f].T - self.h[:-1, old] @ self.x[f, old].T - self.x[:-1, old] @ self.h[f, old].T
        lower = np.linalg.cholesky(p[f])
        u = solve_triangular(lower, p.T, lower=True).T  # P_:F L'^-1, so that u u' is P_:F (P_FF)^-1 P_F:
        x = solve_triangular(lower, u.T, lower=True, trans=1).T  # P_:F (P_FF)^-1
        h = g - x @ g[f] / 2
        new = slice(self.pending, self.pending + len(f))
        self.u[:-1, new], self.x[:-1, new], self.h[:-1, new] = u, x, h
        self.pending += len(f)
        u_, x_, h_ = (a[self.place, new] for a in (self.u, self.x, self.h))  # (atoms, widest, |F|)
        if self.place.shape[1] == 1 and len(f) == 1:
            self.blocks -= u_**2
            self.grams -= 2 * h_ * x_
        else:
            self.blocks -= u_ @ u_.transpose(0, 2, 1)
            cross = h_ @ x_.transpose(0, 2, 1)
            self.grams -= cross + cross.transpose(0, 2, 1)

    def _flush(self) -> None:
        now = slice(self.pending)
        u, x, h = self.u[:-1, now], self.x[:-1, now], self.h[:-1, now]
        self.inverse -= u @ u.T
        cross = h @ x.T
        self.gram -= cross
        self.gram -= cross.T
        self.pending = 0


def _inverse(matrix: Array, ridge: float) -> Array:
    """(S + ridge m I)^-1; a ridge of ``LEAST_RIDGE`` where that is numerically singular.

    Moments added up in float32 can have negative eigenvalues as large as their rounding: then the ridge grows.
    """
    if ridge < 0:
        raise ValueError(f"the ridge is {ridge}, and has to be 0 or more")
    scale, n = scale_of(matrix), len(matrix)
    for relative in (ridge, *(max(ridge, LEAST_RIDGE * k) for k in (1, 1e2, 1e4))):
        damped = np.array(matrix, np.float64, order="F")
        damped.flat[:: n + 1] += relative * scale
        norm = np.abs(damped).sum(axis=0).max(initial=0.0)
        try:
            factor, _ = cho_factor(damped, lower=True, overwrite_a=True)
        except LinAlgError:
            continue
        if relative >= LEAST_RIDGE or dpocon(factor, norm, uplo="L")[0] > SINGULAR:
            break
    else:
        raise ValueError("second moments are not positive semidefinite")
    inverse, _ = dpotri(factor, lower=1)
    lower = np.tril(inverse)
    return np.ascontiguousarray(lower + np.tril(lower, -1).T)


def _members(labels: Indices, atoms: int) -> list[Indices]:
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(atoms + 1))
    return [order[edges[a] : edges[a + 1]] for a in range(atoms)]


def _energy(consumer: Consumer) -> float:
    return float(np.vdot(consumer.weight @ consumer.matrix, consumer.weight))


def _rows(producers: npt.ArrayLike) -> Array:
    array = np.asarray(producers, np.float64)
    return array.reshape(len(array), -1)


def _free(atoms: int, fixed: Iterable[int]) -> Indices:
    return np.setdiff1d(np.arange(atoms), np.asarray(list(fixed), np.intp))


def _sorted(scores: Array, fixed: Iterable[int], stop: int | None) -> Order:
    free = _free(len(scores), fixed)
    return Order(free[np.argsort(scores[free], kind="stable")][:stop])
