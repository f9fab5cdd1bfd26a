"""Which weights of a linear map become zero, and what the others become then.

    y = W x,  W (rows, n)        some W_ij = 0, the other ones free

With S = E[x x^T] the loss is E|(W - V) x|^2 = sum over rows of d S d^T, d = w - v.

**Scores.** Leaving the others alone, a weight costs w_ij^2 S_jj to first order (Wanda, Sun et al. 2023,
arXiv 2306.11695); without data S_jj counts as 1, which is magnitude.

**Reconstruction.** Column by column, the weights not reached yet make up for a zero: with U upper triangular,
U^T U = (S + damping)^-1, zeroing w_ij costs (w_ij / U_jj)^2 and adds -w_ij / U_jj * U_j,j: to row i (optimal brain
surgeon in the order of columns; SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import PassError

__all__ = ["Zeros", "reconstruct", "zero"]

Array = npt.NDArray[np.float64]

_BLOCK = 128
_DAMPING = 0.1
"""Added to the diagonal of S, as a share of the geometric mean of the feature's power and the mean power.

Loss on samples held out decided (docs/decisions.md): SparseGPT's share of the mean power drowns small features
where few are large, a share of a feature's own power trusts few samples with quiet ones.
"""


@dataclass(frozen=True)
class Zeros:
    """How many weights are zero: a share of all, or all but ``kept`` of each ``group`` in a row.

    Attributes:
        share: of all weights, from 0 to 1; counts where ``group`` is 0.
        kept: weights kept of a group.
        group: neighbours along the input of the map.
    """

    share: float = 0.0
    kept: int = 0
    group: int = 0

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{100 * self.share:g}%"

    def mask(self, scores: Array) -> npt.NDArray[np.bool_]:
        """True where a weight becomes zero: the lowest scores, of equal ones the first.

        Args:
            scores: any shape; groups lie along the last axis, whose length they must divide.
        """
        if self.group:
            grouped = scores.reshape(-1, self.group)
            lowest = np.argsort(grouped, axis=1, kind="stable")[:, : self.group - self.kept]
            chosen = np.zeros(grouped.shape, np.bool_)
            np.put_along_axis(chosen, lowest, True, axis=1)
            return chosen.reshape(scores.shape)
        mask = np.zeros(scores.size, np.bool_)
        mask[np.argsort(scores, axis=None, kind="stable")[: round(self.share * scores.size)]] = True
        return mask.reshape(scores.shape)


def zero(weight: Array, zeros: Zeros, power: Array | None = None) -> Array:
    """The weight with zeros where they cost least, the others as they are.

    Args:
        weight: shape (..., n).
        zeros: how many.
        power: E[x_j^2], broadcasts to the weight; none for magnitude.
    """
    scores = np.square(weight) * (1.0 if power is None else power)
    return np.where(zeros.mask(scores), 0.0, weight)


def reconstruct(weight: Array, moments: Array, zeros: Zeros) -> Array:
    """The weight with zeros, the others changed to make up for them.

    Args:
        weight: shape (rows, n).
        moments: S, shape (n, n).
        zeros: how many; a share is met in each block of columns. What was never seen (no power) becomes zero as well.

    Raises:
        PassError: the moments are not those of n features.
    """
    rows, n = weight.shape
    if moments.shape != (n, n):
        raise PassError(f"moments of shape {moments.shape} do not go with {n} columns of weights")
    result = np.array(weight.T, np.float64, order="C")  # a column of weights in a row of memory
    dead = np.diagonal(moments) <= 0
    result[dead] = 0.0
    upper = _upper(moments, dead)
    scale = np.diagonal(upper)[:, None]
    block = max(_BLOCK - _BLOCK % zeros.group, zeros.group) if zeros.group else _BLOCK
    for start in range(0, n, block):
        end = min(start + block, n)
        part, errors = result[start:end], np.zeros((end - start, rows))
        costs = np.square(part / scale[start:end])
        mask = np.zeros(part.shape, np.bool_) if zeros.group else zeros.mask(costs.T).T
        for j in range(end - start):
            column = start + j
            if zeros.group and j % zeros.group == 0:  # chosen as late as can be, for columns before have changed it
                group = slice(j, j + zeros.group)
                mask[group] = zeros.mask(np.square(part[group] / scale[start:end][group]).T).T
            errors[j] = np.where(mask[j], part[j] / scale[column], 0.0)
            part[j:] -= np.outer(upper[column, column:end], errors[j])
            part[j, mask[j]] = 0.0
        result[end:] -= upper[start:end, end:].T @ errors
    return np.ascontiguousarray(result.T)


def _upper(moments: Array, dead: npt.NDArray[np.bool_]) -> Array:
    """Upper triangular U with U^T U = (S + damping)^-1."""
    from scipy.linalg import cholesky, lapack  # here, for it takes a while to import and few runs need it

    damped = np.array(moments, np.float64)
    damped[dead, dead] = 1.0
    power = np.diagonal(damped).copy()
    damped[np.diag_indices_from(damped)] += _DAMPING * np.sqrt(power * power.mean())
    inverse, failed = lapack.dpotri(cholesky(damped, lower=True), lower=1)
    if failed:
        raise PassError("second moments have no inverse", hint="this is a bug; please report it")
    full = np.tril(inverse) + np.tril(inverse, -1).T
    return np.asarray(cholesky(full, lower=False), np.float64)
