"""Codebooks: the few values that many weights share, k-means in one dimension or in several.

In one dimension k-means has an optimum that can be computed (kmeans1d, after Wu 1991 and Grønlund et al. 2017,
arXiv 1701.07204). It takes no weights and time in proportion to the values, so it runs on the values in bins, each as
often as its weight says; a few steps of Lloyd's algorithm on all bins then take the rounding out. Codebooks of vectors
come from Lloyd's algorithm alone (scikit-learn).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["edges_of", "even_codebook", "nearest", "scalar_codebook", "vector_codebook"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_BINS = 8192
_COPIES = 20_000
_STEPS = 30
_ENTROPY_STEPS = 4
_SAMPLE = 65_536
_VECTORS = 16_384
"""Vectors a codebook is fitted to: 64 for each entry."""


def scalar_codebook(values: Array, weights: Array | None, size: int, *, keep_zero: bool = False) -> Array:
    """The ``size`` numbers that stand for many at least squared error.

    Args:
        values: of any shape.
        weights: how much the error of each counts, broadcasts to ``values``; all the same if None.
        size: of the codebook.
        keep_zero: zero is in the codebook, and stands for zeros alone where there are any.

    Returns:
        Sorted; fewer than ``size`` where the values have no more.
    """
    flat = values.ravel()
    mass = np.ones_like(flat) if weights is None else np.broadcast_to(weights, values.shape).ravel()
    if keep_zero:
        kept = flat != 0
        found = scalar_codebook(flat[kept], mass[kept], size - 1) if size > 1 and kept.any() else np.zeros(0)
        return np.unique(np.append(found, 0.0))
    centres, counts = _binned(flat, mass)
    if len(centres) <= size:
        return centres
    return _lloyd(centres, counts, _start(centres, counts, size))


def _binned(values: Array, mass: Array) -> tuple[Array, Array]:
    """Means and masses of bins that hold something; the values themselves where there are few."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.array([low]), np.array([float(mass.sum())])
    distinct = np.unique(values[: _BINS * 4])
    if len(distinct) <= _BINS // 2 and (len(values) <= _BINS * 4 or np.isin(values, distinct).all()):
        return distinct, np.bincount(np.searchsorted(distinct, values), mass, len(distinct)).astype(np.float64)
    bins = np.minimum(((values - low) * (_BINS / (high - low))).astype(np.int64), _BINS - 1)
    counts = np.bincount(bins, mass, _BINS).astype(np.float64)
    sums = np.bincount(bins, mass * values, _BINS)
    held = counts > 0
    return sums[held] / counts[held], counts[held]


def _start(centres: Array, counts: Array, size: int) -> Array:
    import kmeans1d  # here, for it loads a library of its own

    copies = np.maximum(1, np.rint(counts * (_COPIES / counts.sum()))).astype(np.int64)
    return np.unique(np.asarray(kmeans1d.cluster(np.repeat(centres, copies).tolist(), size).centroids))


def _lloyd(centres: Array, counts: Array, codebook: Array) -> Array:
    masses = np.concatenate([[0.0], np.cumsum(counts)])
    sums = np.concatenate([[0.0], np.cumsum(counts * centres)])
    for _ in range(_STEPS):
        edges = np.searchsorted(centres, (codebook[1:] + codebook[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [len(centres)]])
        mass = np.diff(masses[bounds])
        moved = np.where(mass > 0, np.diff(sums[bounds]) / np.where(mass > 0, mass, 1), codebook)
        if np.array_equal(moved, codebook):
            break
        codebook = moved
    return np.sort(codebook)


def nearest(codebook: Array, values: Array) -> Indices:
    """Index of the entry of a sorted codebook that is nearest to each value."""
    return np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)


def vector_codebook(vectors: Array, weights: Array | None, size: int, seed: int = 0) -> Array:
    """The ``size`` vectors that stand for many at least squared error, as far as Lloyd's algorithm gets.

    Args:
        vectors: shape (n, d).
        weights: of each vector, shape (n,); all the same if None.
        size: of the codebook.
        seed: of the first guess, and of the vectors that are looked at where there are many.

    Returns:
        Shape (size, d), or fewer where there are fewer vectors.
    """
    from sklearn.cluster import KMeans  # takes a second to import

    chooser = np.random.default_rng(seed)
    if len(vectors) > _VECTORS:
        chosen = np.sort(chooser.choice(len(vectors), _VECTORS, replace=False))
        vectors, weights = vectors[chosen], None if weights is None else weights[chosen]
    distinct = np.unique(vectors, axis=0)
    if len(distinct) <= size:
        return distinct
    found = KMeans(size, init="k-means++", n_init=1, max_iter=15, random_state=seed, algorithm="lloyd")
    return np.asarray(found.fit(vectors, sample_weight=weights).cluster_centers_, np.float64)


def edges_of(book: Array, values: Array, rate: float) -> Array:
    """Where one entry of a sorted codebook ends and the next begins, when short indices are worth some error.

    An entry of chance p takes -log2 p bits. The border between neighbours is where (w - c)^2 + L bits is equal, with L
    in proportion to the mean square error (entropy-constrained quantization, Chou, Lookabaugh and Gray 1989).
    """
    edges = (book[1:] + book[:-1]) / 2
    if not rate or len(book) < 3:
        return edges
    flat = values.ravel()[:: max(1, values.size // _SAMPLE)]
    worth = rate * float(((book[np.searchsorted(edges, flat)] - flat) ** 2).mean())
    middles = edges
    for _ in range(_ENTROPY_STEPS):
        counts = np.bincount(np.searchsorted(edges, flat), minlength=len(book)) + 0.5
        bits = -np.log2(counts / counts.sum())
        edges = np.maximum.accumulate(middles + worth * np.diff(bits) / (2 * np.maximum(np.diff(book), 1e-30)))
    return edges


def even_codebook(values: Array, weights: Array, entries: int) -> Array:
    """Evenly spaced entries, zero among them, whose spacing loses least."""
    top = float(np.abs(values).max()) or 1.0
    low, high = -(entries // 2), (entries - 1) // 2
    if low == -high or entries % 2 == 0:
        low = max(low, -high) if entries > 2 else low
    levels = np.arange(low, high + 1, dtype=np.float64) if entries > 2 else np.array([-1.0, 1.0])
    flat, mass = values.ravel()[:: max(1, values.size // _SAMPLE)], weights.ravel()[:: max(1, values.size // _SAMPLE)]
    best, least = levels, math.inf
    for share in np.geomspace(1.0, 0.15, 40):
        book = levels * (share * top / max(high, 1))
        error = float(((book[nearest(book, flat)] - flat) ** 2 * mass).sum())
        if error < least:
            best, least = book, error
    return best
