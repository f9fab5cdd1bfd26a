"""The best weights of low rank, by what they lose of a layer's output.

A layer computes y = W x, W (outputs, features), and S = E[x x'] is what calibration saw. For a W' of rank r

    E|W x - W' x|^2 = |(W - W') L|_F^2,   S = L L'

is least where W' L is the truncated singular value decomposition of W L (Eckart and Young 1936; Wang et al., SVD-LLM,
2024, arXiv 2403.07378). It is reached in two ways that cost an eigendecomposition of the smaller side only:

    outputs <= features     W' = Q Q' W            Q (outputs, r): leading eigenvectors of W S W'
    outputs >  features     W' = W L Q Q' L^-1     Q (features, r): leading eigenvectors of L' W' W L

Both are projections of W itself, so a W of true rank r comes back whole: what squaring the singular values blurs are
directions whose share is below rounding. With S = I this is the plain SVD.

S is singular where calibration saw fewer rows than features. ``ridge`` adds a small multiple of its mean diagonal to
the diagonal, so that directions nobody saw count a little, and among them the plain SVD decides.

Where a bias takes up the mean of what is lost, S is the covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cholesky, eigh, solve_triangular

from onnxcompress.errors import PassError
from onnxcompress.passes._refit import scale_of

__all__ = ["Basis", "basis", "lost", "metric", "refitted_outputs", "solved"]

Array = npt.NDArray[np.float64]

_ROUNDING = 1e-14
"""Relative to the mean diagonal: what is added at least, so that rounding leaves no negative eigenvalue."""


@dataclass(frozen=True, eq=False)
class Basis:
    """W = left right, with the directions that matter most first; the first r of them are the best of rank r.

    Attributes:
        left: (outputs, p), with the size of each direction.
        right: (p, features); what it makes of x has a mean square of 1 in each direction.
        energies: (p,), descending: what each direction carries of E|y|^2.
    """

    left: Array
    right: Array
    energies: Array

    def cut(self, rank: int) -> tuple[Array, Array]:
        """U (outputs, rank) and V (rank, features); the size of each direction is split evenly between them."""
        size = np.sqrt(np.maximum(self.energies[:rank], 0.0))
        scale = np.where(size > size.max(initial=0.0) * 1e-6, np.sqrt(size), 1.0)
        return self.left[:, :rank] / scale, self.right[:rank] * scale[:, None]

    def lost(self, rank: int) -> float:
        """Share of the energy that the directions left out carry."""
        total = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / total if total > 0 else 0.0


def metric(matrix: Array | None, features: int, ridge: float) -> Array:
    """Second moments fit for :func:`basis`: regularized; the identity where there are none.

    Args:
        matrix: E[x x'] or a covariance, (features, features).
        features: how many.
        ridge: added to the diagonal, relative to its mean.
    """
    if matrix is None or not float(np.trace(matrix)) > 0:
        return np.eye(features)
    damped = np.array(matrix, np.float64)
    damped.flat[:: features + 1] += max(ridge, _ROUNDING) * scale_of(damped)
    return damped


def basis(weight: npt.ArrayLike, second: Array) -> Basis:
    """All directions of W, by what they carry of its output.

    Args:
        weight: W, (outputs, features).
        second: positive definite (features, features), see :func:`metric`.

    Raises:
        PassError: a weight is not finite.
    """
    old = np.asarray(weight, np.float64)
    if not np.isfinite(old).all():
        raise PassError("a weight is NaN or infinite", hint="repair the model: it has no factors")
    outputs, features = old.shape
    if outputs <= features:
        values, vectors = _leading(old @ second @ old.T)
        return _scaled(vectors, vectors.T @ old, values)
    lower = _root(second)
    scaled = old @ lower
    values, vectors = _leading(scaled.T @ scaled)
    right = np.asarray(solve_triangular(lower, vectors, trans="T", lower=True)).T
    return Basis(scaled @ vectors, right, values)


def lost(weight: npt.ArrayLike, new: npt.ArrayLike, second: Array) -> float:
    """E|W x - W' x|^2 / E|W x|^2."""
    old = np.asarray(weight, np.float64)
    change = old - np.asarray(new, np.float64)
    energy = float(np.vdot(old @ second, old))
    error = max(float(np.vdot(change @ second, change)), 0.0)
    return error / energy if energy > 0 else (0.0 if error == 0 else float("inf"))


def refitted_outputs(weight: npt.ArrayLike, composed: npt.ArrayLike, second: Array) -> Array:
    """U that gives least E|W x - U Z x|^2 for inner features Z x that are already chosen.

    Args:
        weight: W, (outputs, features).
        composed: Z, (rank, features): what the nodes before the last make of x.
        second: positive definite (features, features).

    Returns:
        (outputs, rank).
    """
    old, inner = np.asarray(weight, np.float64), np.asarray(composed, np.float64)
    seen = inner @ second
    return solved(seen @ inner.T, seen @ old.T)


def solved(square: Array, cross: Array) -> Array:
    """U of least squares, (outputs, rank), from what inner features z = Z x have in common.

    Args:
        square: E[z z'], (rank, rank).
        cross: E[z y'], (rank, outputs).
    """
    square = np.array(square)
    square.flat[:: len(square) + 1] += _ROUNDING * scale_of(square)
    try:
        root = cholesky(square, lower=True)
    except LinAlgError:  # inner features that repeat one another
        return np.asarray(cross.T @ np.linalg.pinv(square, hermitian=True))
    half = solve_triangular(root, cross, lower=True)
    return np.asarray(solve_triangular(root, half, trans="T", lower=True)).T


def _leading(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, descending and not negative, and eigenvectors in columns."""
    values, vectors = eigh((matrix + matrix.T) / 2)
    return np.maximum(values[::-1], 0.0), np.asarray(vectors[:, ::-1])


def _scaled(left: Array, right: Array, energies: Array) -> Basis:
    """The same product with the size of each direction on the left, as in the other case."""
    size = np.sqrt(energies)
    size = np.where(size > size.max(initial=0.0) * 1e-9, size, 1.0)
    return Basis(left * size, right / size[:, None], energies)


def _root(second: Array) -> Array:
    """L with L L' = S."""
    try:
        return np.asarray(cholesky(second, lower=True))
    except LinAlgError:  # rounding made an eigenvalue negative: put back what is surely less than the rest
        damped = np.array(second)
        damped.flat[:: len(damped) + 1] += np.sqrt(np.finfo(np.float64).eps) * scale_of(second)
        return np.asarray(cholesky(damped, lower=True))
