"""The factors of a table of rows that are fetched, and of one that a head multiplies by as well.

    e'  ~  e' Q B          e a row of E, B (r, width), and one Q (width, r) for all rows: A = E Q

With G the second moments of the rows that are fetched, sum p_v e_v e_v' for row v fetched with probability p_v, what is
lost is

    tr R' G R,   R = 1 - Q B

It is least where B' and Q are the leading eigenvectors of G, and then no other A does better with this B, whatever the
rows are. G is what the output of the Gather has for second moments, so no row has to be counted. Rows that nobody
fetched in calibration must not be lost: G is mixed with the second moments C = E' E / rows of all of them.

A head makes h E' of states h, S = E[h h']. It loses, all rows counted alike,

    tr R' C R S

For a tied table both are divided by what varies of them, and summed: rows about the mean of rows, logits about the mean
over states and the mean over words. Of the logits of SmolLM2 this is 6 % of the energy; the rest is the same in every
place or for every word. Divided by the whole of it, errors of logits count for too little (perplexity with half of the
tied table 39.0, and 31.6 with 16 times the weight).

Each row then has a metric of its own, p_v 1 + S / rows, so there is no closed form even if all p_v were known. But with
B fixed the best Q is a linear problem that is diagonal in the generalized eigenvectors of (G, C) and of (B S B', B B'),
and with Q fixed the best B is diagonal in those of (Q' G Q, Q' C Q) and of S. They are solved in turns, each exactly,
from the optimum for the average of the metrics, and what is lost falls with every turn. All of this is on matrices of
the width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from onnxcompress.statistics import SecondMoments

__all__ = ["Metrics", "balanced", "in_turns", "mixed", "ratio", "start"]

Array = npt.NDArray[np.float64]

_EVEN = 0.1
"""Share of all rows, each counted alike, in what the rows are measured by; the rest is what was fetched.

Half of the weights kept; share lost of rows fetched from text that was held out (all rows alike in brackets), and the
perplexity of SmolLM2 (15.7) with its tied table so (rows and logits divided by all of their energy). Calibrated on a
few thousand ids:

    share              0              0.1            0.25           0.5            1
    MiniLM, 1616       .092 (.40)     .072 (.28)     .068 (.25)     .071 (.23)     .450 (.21)
    MiniLM, 13936      .051 (.33)     .051 (.27)     .053 (.25)     .062 (.23)     .450 (.21)
    SmolLM2, 2048      .090 (.23)     .089 (.22)     .088 (.21)     .092 (.20)     .388 (.17)
    SmolLM2, 8192      .078 (.23)     .077 (.22)     .078 (.21)     .083 (.20)     .388 (.17)
    perplexity, 2048                  38.8           42.0           47.3

Alone, the plain decomposition (perplexity 180 000), it misses few large rows that nearly every text has.
"""
_SINGULAR = 1e-10
"""Share of an even part in C, so that a width the table does not fill can be divided by."""
_TURNS = 8
_GAIN = 1e-2
"""Turns end where one takes off less than this share of what is lost: after about three, 2 % above the end."""
_VARIES = 0.01
"""Share of the energy that varies at least, so that few samples that are alike say little."""
_LEAST = 1e-30
"""Second moments below are those of a table of zeros."""
_NOTHING = 1e-10
"""Share of the energy that is rounding."""


class Metrics(NamedTuple):
    """What R = 1 - Q B is measured by: tr R' fetched R / energy + ratio tr R' rows R states / energy.

    Attributes:
        fetched: G, mixed.
        rows: C.
        states: S; None where there is no head.
        ratio: of the weights of both.
    """

    fetched: Array
    rows: Array
    states: Array | None
    ratio: float = 1.0

    def lost(self, rest: Array) -> float:
        """Mean of the shares that R leaves out, by their weights."""
        share = _share(float(np.vdot(self.fetched @ rest, rest)), float(np.trace(self.fetched)))
        if self.states is None:
            return share
        error, energy = np.vdot(self.rows @ rest, rest @ self.states), np.vdot(self.rows, self.states)
        return (share + self.ratio * _share(float(error), float(energy))) / (1 + self.ratio)


def start(measured: Metrics) -> tuple[Array, Array]:
    """Q and B, most important directions first: the optimum where all rows have the same metric."""
    if measured.states is None:
        _, vectors = eigh(measured.fetched)
        return np.asarray(vectors[:, ::-1]), np.asarray(vectors[:, ::-1].T)
    weight, energy = measured.ratio, float(np.vdot(measured.rows, measured.states))
    rows = _normal(measured.fetched) + weight * _normal(measured.rows)
    second = np.eye(len(rows)) + measured.states * (weight * np.trace(measured.rows) / energy)
    lower = np.linalg.cholesky(second)
    _, vectors = eigh(lower.T @ rows @ lower)
    vectors = vectors[:, ::-1]
    return np.asarray(lower @ vectors), np.asarray(np.linalg.solve(lower.T, vectors).T, np.float64)


def in_turns(left: Array, right: Array, measured: Metrics) -> tuple[Array, Array]:
    """Q and B of least loss, from some to start with; those themselves where there is no head."""
    fetched, states = measured.fetched, measured.states
    if states is None:
        return left, right
    width = len(fetched)
    rows = measured.rows + np.eye(width) * (_SINGULAR * np.trace(measured.rows) / width)
    fetched = fetched / np.trace(fetched)
    heard = states * (measured.ratio / np.vdot(rows, states))
    own, across = eigh(fetched, rows)  # across' rows across = 1, across' fetched across = own
    # no row is fetched less than never: what is below are sums in single precision, of widths the table hardly fills
    own = np.maximum(own, _EVEN / np.trace(rows))
    fetched = rows @ (across * own) @ across.T @ rows
    sizes, along = eigh(heard)
    both = fetched, rows, heard
    lost = _sum(left, right, both)
    for _ in range(_TURNS):
        if lost <= _NOTHING:
            break
        # B B' = 1, B heard B' = weights
        weights, turn = eigh(right @ heard @ right.T, right @ right.T)
        rotated = turn.T @ right
        wanted = across.T @ (fetched @ rotated.T + rows @ (heard @ rotated.T))
        new_left = across @ (wanted / (own[:, None] + weights[None, :]))
        # Q' rows Q = 1, Q' fetched Q = weights
        weights, turn = eigh(new_left.T @ fetched @ new_left, new_left.T @ rows @ new_left)
        new_left = new_left @ turn
        wanted = (new_left.T @ fetched) @ along + (new_left.T @ rows) @ along * sizes
        new_right = wanted / (weights[:, None] + sizes[None, :]) @ along.T
        now = _sum(new_left, new_right, both)
        if not now < lost:
            break
        left, right, before, lost = new_left, new_right, lost, now
        if now > (1 - _GAIN) * before:
            break
    return left, right


def _sum(left: Array, right: Array, both: tuple[Array, Array, Array]) -> float:
    fetched, rows, heard = both
    rest = np.eye(len(fetched)) - left @ right
    return float(np.vdot(fetched @ rest, rest) + np.vdot(rows @ rest, rest @ heard))


def balanced(left: Array, right: Array, even: Array) -> tuple[Array, Array]:
    """The same product, with directions that do not mix and are of one size in both factors, largest first."""
    values, vectors = eigh(left.T @ even @ left)
    values = np.sqrt(np.maximum(values, max(float(values[-1]), _LEAST) * 1e-16))
    turned, size, second = np.linalg.svd((values[:, None] * vectors.T) @ right, full_matrices=False)
    scale = np.sqrt(np.where(size > size[0] * 1e-6, size, 1.0))
    first = left @ ((vectors / values) @ turned) * (size / scale)
    return first, second * scale[:, None]


def ratio(fetched: SecondMoments, states: SecondMoments, even: SecondMoments) -> float:
    """Weight of what is lost of logits, over that of what is lost of rows, both as shares of the energy.

    Args:
        fetched: of rows, as often as they were fetched.
        states: of what the head reads.
        even: of all rows, each once.
    """
    rows = _share(float(np.trace(fetched.covariance)), float(np.trace(fetched.matrix)))
    logits = _share(float(np.vdot(even.covariance, states.covariance)), float(np.vdot(even.matrix, states.matrix)))
    return max(rows, _VARIES) / max(logits, _VARIES)


def mixed(seen: Array, even: Array) -> Array:
    """Of rows that were fetched and of all rows."""
    return (1 - _EVEN) * _normal(seen) + _EVEN * _normal(even)


def _normal(matrix: Array) -> Array:
    trace = float(np.trace(matrix))
    return matrix / trace if trace > 0 else np.eye(len(matrix)) / len(matrix)


def _share(error: float, energy: float) -> float:
    return max(error, 0.0) / energy if energy > 0 else 0.0
