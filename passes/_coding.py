"""Coding one weight in few bits: scales, a codebook, rounding with feedback, and closed-form refits of the first two.

    w_rj ~ s_r c[i_rj]        s_r of an output (or of a block of its inputs), c shared by the tensor, i of few bits

The error that counts is that of what the layer makes of what it reads, E |(W - W') x|^2 = tr(E H E^T): with second
moments H weights are rounded with feedback (:mod:`~onnxcompress.passes._feedback`), and scales and codebook are
refitted to H once the indices stand:

    s_r = (q_r H w_r) / (q_r H q_r)         q_r the row in entries of the codebook
    A c = b,  A_kl = sum_r s_r^2 m_rk H m_rl,  b_k = sum_r s_r m_rk H w_r        m_rk marks the weights with entry k
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from onnxcompress.passes._codebook import edges_of, even_codebook, scalar_codebook, vector_codebook
from onnxcompress.passes._codes import Code, Half, Layout, Scaled, packed
from onnxcompress.passes._feedback import lost, rounded
from onnxcompress.passes._linear_maps import LinearMap, Moments
from onnxcompress.passes._row_scales import Scales, blocks_of
from onnxcompress.passes._sparse_code import MASK_NODES, pays, smallest

__all__ = ["Coding", "Fitted", "Subject", "coded", "estimated_bytes", "fits", "previews"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_SAMPLE = 65_536
_VECTOR_GAIN = {2: 0.81, 4: 0.7, 8: 0.65}
"""Noise of vectors of normal numbers relative to that of single ones with as many bits."""
_MOST_SUMS = 4e10
"""Multiplications above which a codebook is not refitted."""
_REFITS = 2
_BY_LARGEST = 4
"""Bits from which rows are divided by their largest weight, so that the codebook reaches it: what is cut off costs more
than finer steps bring. With fewer bits, and no vectors, it is the other way round, and the root mean square divides."""
_MANY_ZEROS = 0.2
"""Share of zeros above which they are kept: somebody has put them there."""


@dataclass(frozen=True)
class Coding:
    """How a weight is stored.

    Attributes:
        bits: of a weight: 16 (float16), 8 (integers times scales), or of the index into a codebook; 1.6: three values.
        width: weights that have one index together: a vector of the codebook.
        block: inputs that have one scale together; 0: all of an output.
        uniform: the codebook is evenly spaced.
        feedback: round with feedback, where second moments are known.
        rate: what a bit of the compressed index is worth, in units of the mean square of the rounding error; 0: weights
            go to the nearest entry; 1.4 is what a bit takes off evenly spaced codebooks, 2 ln 2.
    """

    bits: float
    width: int = 1
    block: int = 0
    uniform: bool = False
    feedback: bool = True
    rate: float = 0.0

    @property
    def entries(self) -> int:
        """Of the codebook."""
        return round(2 ** (self.bits * self.width))

    def keeps(self, zeros: float) -> bool:
        """Whether zeros stay zero where they are this share; vectors and two values alone leave no room for that."""
        return self.width == 1 and self.entries > 2 and zeros > _MANY_ZEROS

    def __str__(self) -> str:
        if self.bits == 16:
            return "float16"
        text = f"{self.bits:g} bits"
        text += f" by {self.width}" if self.width > 1 else ""
        text += f", blocks of {self.block}" if self.block else ""
        text += ", evenly spaced" if self.uniform else ""
        return text + (f", a bit worth {self.rate:g}" if self.rate else "")


@dataclass(frozen=True, eq=False)
class Subject:
    """A weight that is to be coded.

    Attributes:
        array: float32, or int8 with ``scales``.
        linear: as what kind of map its reader uses it.
        moments: of what each group reads; None if not known.
        scales: of an int8 weight, broadcast to it; the codebook is then of integers.
    """

    array: npt.NDArray[np.generic]
    linear: LinearMap
    moments: tuple[Moments, ...] | None = None
    scales: npt.NDArray[np.float32] | None = None

    @property
    def integers(self) -> bool:
        """It stays int8."""
        return self.scales is not None

    def maps(self) -> Array:
        """What it stands for, as (groups, rows, features)."""
        floats = np.asarray(self.array, np.float32)
        return self.linear.maps(floats if self.scales is None else floats * self.scales)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A coded weight.

    Attributes:
        code: what is stored.
        lost: share of its output's energy that is lost; of its own where nothing is known of what it reads.
        values: what it stands for now, as (groups, rows, features).
    """

    code: Code
    lost: float
    values: Array


def estimated_bytes(linear: LinearMap, coding: Coding, *, integers: bool = False, zeros: float = 0.0) -> int:
    """What a weight will take in the file.

    Args:
        linear: the weight.
        coding: how it is coded.
        integers: it is int8.
        zeros: share of its elements.
    """
    size = math.prod(linear.shape)
    groups, outputs, _, channels = linear.permuted
    scales = groups * outputs * (channels // blocks_of(linear, coding.block))
    if coding.bits == 16:
        return 2 * size + 90
    if coding.bits == 8:
        return size + 4 * scales + 180
    item, many = (1, 0) if integers else (4, 2)
    entries = 256 * coding.width if coding.width > 1 else coding.entries
    rest = item * entries + many * scales + 90 * 7
    if coding.keeps(zeros) and pays(size, zeros, coding.bits):
        return math.ceil(size * (1 + (1 - zeros) * coding.bits) / 8) + rest + MASK_NODES
    return math.ceil(size * coding.bits / 8) + rest


def fits(linear: LinearMap, coding: Coding) -> bool:
    """Whether a weight can be coded so: vectors have to fill its rows."""
    _, _, taps, channels = linear.permuted
    return (taps * channels if linear.rows == 1 else channels) % coding.width == 0


def coded(subject: Subject, coding: Coding) -> Fitted:
    """Codes a weight.

    Args:
        subject: the weight.
        coding: how.

    Returns:
        The code, and what it loses.
    """
    maps = subject.maps()
    if coding.bits == 16:
        code: Code = Half(np.asarray(subject.array, np.float16))
        values = subject.linear.maps(np.asarray(code.decoded(), np.float32))
        return Fitted(code, _lost(maps, values, subject.moments), values)
    if coding.bits == 8 and not subject.integers:
        return _eight(subject, coding, maps)
    return _Palette(subject, coding, maps).fitted()


def previews(subject: Subject, codings: Sequence[Coding]) -> list[tuple[float, float]]:
    """What rounding to the nearest would lose, guessed from some rows.

    Args:
        subject: the weight.
        codings: how it might be coded.

    Returns:
        Of each coding the share of the energy and the entropy of an index in bits a weight. Codebooks of vectors take
        long, so theirs are guessed from what is known of normal distributions.
    """
    maps = subject.maps()
    rows = maps.reshape(-1, maps.shape[2])
    step = max(1, maps.size // _SAMPLE)
    values = rows[::step] / np.maximum(np.sqrt((rows[::step] ** 2).mean(1, keepdims=True)), 1e-30)
    found = []
    for coding in codings:
        if coding.bits >= 8 and not subject.integers:
            found.append((2.0 ** (-24 if coding.bits == 16 else -14), coding.bits))
            continue
        entries = round(2**coding.bits)
        book = (
            even_codebook(values, np.ones_like(values), entries)
            if coding.uniform
            else scalar_codebook(values, None, entries)
        )
        indices = np.searchsorted(edges_of(book, values, coding.rate), values)
        counts = np.bincount(indices.ravel(), minlength=len(book))
        chance = counts[counts > 0] / counts.sum()
        share = float(((book[indices] - values) ** 2).mean()) * _VECTOR_GAIN.get(coding.width, 1.0)
        found.append(
            (max(share, 1e-12), float(-(chance * np.log2(chance)).sum()) if coding.width == 1 else coding.bits)
        )
    return found


def _eight(subject: Subject, coding: Coding, maps: Array) -> Fitted:
    linear = subject.linear
    scales = Scales(linear, coding.block, np.abs(maps), reduce="max").divided(127)
    full = scales.full
    integers = np.clip(np.rint(maps / full), -127, 127)
    values = integers * full
    stored = linear.weight(integers).reshape(linear.split).astype(np.int8)
    code = Scaled(stored.reshape(scales.layout.stored), scales.stored.astype(np.float32), scales.layout)
    return Fitted(code, _lost(maps, values, subject.moments), values)


class _Palette:
    """Codes one weight with a codebook."""

    def __init__(self, subject: Subject, coding: Coding, maps: Array) -> None:
        self._subject, self._coding, self._maps = subject, coding, maps
        largest = coding.bits >= _BY_LARGEST or coding.width > 1
        sizes = np.abs(maps) if largest else maps**2
        self._scales = Scales(subject.linear, coding.block, sizes, reduce="max" if largest else "mean")
        if subject.integers and subject.scales is not None:
            whole = np.broadcast_to(subject.scales, subject.linear.shape)
            self._full = subject.linear.maps(np.asarray(whole, np.float32))
        else:
            middle = float(np.median(self._scales.values))
            self._scales.values = self._halved(self._scales.values / middle)
            self._full = self._scales.full
        self._moments = subject.moments
        self._grams = None if self._moments is None else [m.matrix for m in self._moments]
        share = float((maps == 0).mean())
        self._zeros = coding.keeps(share)
        self._zero = 0
        # where a mask tells zeros apart, all indices are for other values
        self._entries = coding.entries + int(self._zeros and pays(maps.size, share, coding.bits))

    @staticmethod
    def _halved(values: Array) -> Array:
        return np.clip(values, 2.0**-14, 65504.0).astype(np.float16).astype(np.float64)  # what float16 can be

    # --- the codebook ---------------------------------------------------------------------------------------

    def _weights(self) -> Array:
        """How much the square of an error of each normalised weight counts."""
        squares = self._full**2
        if self._grams is None:
            return squares
        energy = np.stack([np.diag(g) for g in self._grams])[:, None, :]
        return np.asarray(squares * (energy + 1e-3 * energy.mean()), np.float64)

    def _codebook(self, values: Array, weights: Array) -> Array:
        coding = self._coding
        if coding.width > 1:
            vectors = values.reshape(-1, coding.width)
            book = vector_codebook(vectors, weights.reshape(-1, coding.width).mean(1), coding.entries)
        elif coding.uniform:
            book = even_codebook(values, weights, self._entries)
        else:
            book = scalar_codebook(values, weights, self._entries, keep_zero=self._zeros)
        if self._subject.integers:
            book = np.unique(np.rint(book), axis=0)
        if self._zeros:
            self._zero = int(np.searchsorted(book, 0.0))
        return book

    def _nearest(self, book: Array, values: Array) -> Indices:
        """Indices of values, of shape (..., width) for vectors."""
        if self._coding.width > 1:
            return np.asarray(cKDTree(book).query(values.reshape(-1, self._coding.width))[1], np.int64)
        found = np.searchsorted(self._edges, values)
        if self._zeros:
            found = np.where(values == 0, self._zero, found)
        return found

    # --- the whole way --------------------------------------------------------------------------------------

    def fitted(self) -> Fitted:
        """Codebook, indices, refits, code."""
        normal = self._maps / self._full
        book = self._codebook(normal, self._weights())
        if self._coding.width == 1:
            self._edges = edges_of(book, normal, self._coding.rate)
        indices, values = self._rounded(book, normal)
        loss = _lost(self._maps, values, self._moments)
        fitted = self._grams is not None and self._coding.feedback
        if not self._subject.integers and (fitted or not self._zeros):
            book, values, loss = self._refitted(book, indices, values, loss)
        return Fitted(self._code(indices, book), loss, values)

    def _rounded(self, book: Array, normal: Array) -> tuple[Indices, Array]:
        width = self._coding.width
        if self._grams is None or not self._coding.feedback:
            indices = self._nearest(book, normal)
            return indices, book[indices].reshape(self._maps.shape) * self._full
        parts, values = [], np.empty_like(self._maps)
        tree = cKDTree(book) if width > 1 else None
        for group, gram in enumerate(self._grams):
            rounding = self._rounding(book, self._full[group], self._maps[group] if self._zeros else None, tree)
            found, values[group] = rounded(self._maps[group], gram, rounding, width=width)
            parts.append(found)
        return np.stack(parts), values

    def _rounding(
        self, book: Array, full: Array, maps: Array | None, tree: cKDTree | None
    ) -> Callable[[Array, Indices], tuple[Indices, Array]]:
        def one(weights: Array, features: Indices) -> tuple[Indices, Array]:
            scales = full[:, features]
            wanted = weights / scales
            if tree is not None:
                found = np.asarray(tree.query(wanted)[1], np.int64)
                return found, book[found] * scales
            found = np.searchsorted(self._edges, wanted)
            if maps is not None:
                found = np.where(maps[:, features] == 0, self._zero, found)
            return found, book[found] * scales

        return one

    def _refitted(self, book: Array, indices: Indices, values: Array, loss: float) -> tuple[Array, Array, float]:
        for _ in range(_REFITS):
            better = self._scaled_again(book, indices)
            if better is not None and better[1] < loss:
                self._scales.values, loss = better[0], better[1]
                self._full = self._scales.full
                values = book[indices].reshape(self._maps.shape) * self._full
            again = self._book_again(book, indices)
            if again is None:
                break
            made = again[indices].reshape(self._maps.shape) * self._full
            now = _lost(self._maps, made, self._moments)
            if not now < loss * 0.999:
                break
            book, values, loss = again, made, now
        return book, values, loss

    def _scaled_again(self, book: Array, indices: Indices) -> tuple[Array, float] | None:
        """Scales of whole rows that lose least, and what is lost then."""
        parts = self._scales.values.shape
        if parts[3] > 1 or self._subject.linear.rows != 1:
            return None
        codes = book[indices].reshape(self._maps.shape)
        factors = np.empty(self._maps.shape[:2])
        for group, own in enumerate(codes):
            seen = own if self._grams is None else own @ self._grams[group]
            size, meets = (seen * own).sum(1), (seen * self._maps[group]).sum(1)
            factors[group] = np.where(
                (size > 0) & (meets > 0), meets / np.where(size > 0, size, 1), self._full[group, :, 0]
            )
        scales = self._halved(factors).reshape(parts)
        return scales, _lost(self._maps, codes * factors_of(scales, self._maps.shape), self._moments)

    def _book_again(self, book: Array, indices: Indices) -> Array | None:
        """The codebook that loses least with these indices."""
        _, rows, features = self._maps.shape
        if self._coding.width > 1 or self._coding.uniform or self._grams is None:
            return None
        if len(book) * self._maps.size * features > _MOST_SUMS:
            return None
        left, right = np.zeros((len(book), len(book))), np.zeros(len(book))
        for group, gram in enumerate(self._grams):
            marks = [
                np.where(indices[group].reshape(rows, features) == k, self._full[group], 0) for k in range(len(book))
            ]
            target = self._maps[group] @ gram
            for k, mark in enumerate(marks):
                seen = mark @ gram
                right[k] += (mark * target).sum()
                for other in range(k, len(book)):
                    left[k, other] += np.vdot(seen, marks[other])
        left = left + np.triu(left, 1).T
        left += np.eye(len(book)) * 1e-9 * max(float(np.trace(left)) / len(book), 1e-300)
        found = np.asarray(np.linalg.solve(left, right), np.float64)
        if self._zeros:
            found[self._zero] = 0.0
        return found if np.isfinite(found).all() else None

    def _code(self, indices: Indices, book: Array) -> Code:
        linear, width = self._subject.linear, self._coding.width
        if self._subject.integers:
            layout = Layout(linear.shape, linear.split)
            scales: npt.NDArray[np.float16] | None = None
            table: npt.NDArray[np.generic] = book.astype(np.int8)
        else:
            layout, scales = self._scales.layout, self._scales.stored.astype(np.float16)
            table = book.astype(np.float32)
        if width > 1:
            layout, by_map = self._scales.vectors
            scales = None if self._subject.integers else by_map.astype(np.float16)
            return packed(indices, table, scales, layout)
        permuted = indices.reshape(linear.permuted).transpose(linear.back)
        return smallest(np.ascontiguousarray(permuted), table, scales, layout)


def factors_of(scales: Array, shape: tuple[int, ...]) -> Array:
    """Scales of whole rows, so that they broadcast to maps."""
    return scales.reshape(shape[0], shape[1], 1)


def _lost(maps: Array, values: Array, moments: tuple[Moments, ...] | None) -> float:
    """Share of the energy that is lost, over all groups."""
    if moments is None:
        return lost(maps.reshape(-1, maps.shape[2]), values.reshape(-1, maps.shape[2]), None)
    wholes = [float(((m @ seen.matrix) * m).sum()) for m, seen in zip(maps, moments, strict=True)]
    shares = [lost(m, v, seen.matrix) for m, v, seen in zip(maps, values, moments, strict=True)]
    return sum(w * s for w, s in zip(wholes, shares, strict=True)) / max(sum(wholes), 1e-300)
