"""Rounding with feedback: what one weight loses, those that are rounded later make up for.

    min tr((W - Q) H (W - Q)^T)        H = E[x x^T] of what the layer reads, Q from a few values

Weights are rounded feature by feature. The error e of feature j, divided by U_jj, is taken off the features behind it
by e U_j., where U is the upper Cholesky factor of H^-1: the optimal brain surgeon's update, in GPTQ's order and blocks
(Frantar et al. 2022, arXiv 2210.17323). It works for any set of values a weight may take, scalars or vectors.
Features with most energy come first (act-order): they are rounded while many are left to make up for them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from onnxcompress.errors import PassError

__all__ = ["lost", "rounded"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Rounding = Callable[[Array, Indices], tuple[Indices, Array]]
"""Of weights (rows, features) and which features these are: indices, and the values they stand for."""

_BLOCK = 64
_DAMPING = 0.01
"""Share of the mean energy added to every feature, as in GPTQ."""


def rounded(weights: Array, moments: Array, rounding: Rounding, *, width: int = 1) -> tuple[Indices, Array]:
    """Rounds every weight to a value it may take.

    Args:
        weights: shape (rows, features).
        moments: E[x x^T], shape (features, features).
        rounding: picks the values for some features, see :data:`Rounding`.
        width: features that are rounded together, neighbours all; divides their number.

    Returns:
        Indices, shape (rows, features / width), and values, shape (rows, features).
    """
    rows, features = weights.shape
    groups = features // width
    energy = np.diag(moments).reshape(groups, width).sum(1)
    by_group = np.argsort(-energy, kind="stable")
    order = (by_group[:, None] * width + np.arange(width)).ravel()
    factor = _factor(moments[np.ix_(order, order)])
    left = np.ascontiguousarray(weights[:, order].T)  # features first: a feature of all rows is one piece
    values = np.empty_like(left)
    indices = np.empty((groups, rows), np.int64)
    block = max(width, _BLOCK // width * width)
    for start in range(0, features, block):
        end = min(start + block, features)
        errors = np.zeros((end - start, rows))
        for j in range(start, end, width):
            part = slice(j, j + width)
            found, made = rounding(left[part].T, order[part])
            indices[j // width], values[part] = found.reshape(-1), made.T
            error = left[part] - values[part]
            for i in range(width):  # within a vector the error of one entry is seen by the next
                own = error[i] / factor[j + i, j + i]
                errors[j - start + i] = own
                error[i + 1 :] -= factor[j + i, j + i + 1 : j + width, None] * own
            if j + width < end:
                left[j + width : end] -= factor[part, j + width : end].T @ errors[j - start : j - start + width]
        if end < features:
            left[end:] -= factor[start:end, end:].T @ errors
    back = np.argsort(order)
    return indices[np.argsort(by_group)].T.copy(), values[back].T.copy()


def lost(weights: Array, values: Array, moments: Array | None) -> float:
    """Share of the energy of W x that rounding takes: tr(E H E^T) / tr(W H W^T)."""
    error = weights - values
    if moments is None:
        return float((error**2).sum() / max(float((weights**2).sum()), 1e-300))
    whole = float(((weights @ moments) * weights).sum())
    return max(0.0, float(((error @ moments) * error).sum())) / max(whole, 1e-300)


def _factor(moments: Array) -> Array:
    """The upper Cholesky factor of the inverse, damped; more than usual where rounding has left H indefinite."""
    mean = max(float(np.trace(moments)) / len(moments), 1e-300)
    damping = _DAMPING
    while damping <= 1:
        damped = moments + np.eye(len(moments)) * damping * mean
        # of the matrix in reverse order: the inverse of that factor, turned back, is the upper one of the inverse
        lower, failed = lapack.dpotrf(damped[::-1, ::-1], lower=1)
        if not failed:
            inverse, failed = lapack.dtrtri(lower, lower=1)
            if not failed:
                return np.ascontiguousarray(np.tril(inverse)[::-1, ::-1])
        damping *= 10
    raise PassError("the second moments of what a layer reads are not positive", hint="this is a bug; please report it")
