"""Low-rank forms of a Conv that take its weight as a tensor: Tucker-2 and CP. One group only.

    tucker   W[o,c,t] ~ sum_qr U[o,q] K[q,r,t] V[r,c]     1 C->r, k r->q, 1 q->O    (Kim et al. 2016, arXiv 1511.06530)
    cp       W[o,c,t] ~ sum_r U[o,r] H[r,t] V[r,c]        1 C->r, k by channel, 1 r->O

tensorly decomposes W (A^1/2 (x) B^1/2), for the metrics A over channels and B over taps (see ``_conv_layer``), and
the roots are taken off again. Where windows were seen, what follows the last spatial link is then fitted on all of S:

    tucker   with Z = V at every tap: the best U, K for this V are a reduced-rank regression, whose closed form is the
             unrestricted least squares M of y on Z x, cut to rank q by what its directions carry of E|M Z x|^2
    cp       U by least squares on (H V) x

CP has one filter of all taps a component. Written with one filter an axis (Lebedev et al. 2015, arXiv 1412.6553) it
has fewer weights a component and more nodes; of 3 x 3 kernels at equal weights it loses more (half of the weights
of CRNN's, plain: .146 against .140, .170 against .165 of the energy), and each of its filters is one more pass over
r channels.

CP has no closed form, and where W has no such structure its components may grow and cancel. So it begins at what is
exact at full rank (singular vectors of each of the principal taps), is damped, takes a bounded number of sweeps, and
keeps the sweep that lost least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.passes._conv_chain import ConvForm, Link, balanced, pointwise, root
from onnxcompress.passes._conv_layer import Seen
from onnxcompress.passes._forms import Ranks
from onnxcompress.passes._low_rank import basis, solved

__all__ = ["CpForm", "TuckerForm"]

Array = npt.NDArray[np.float64]

_SWEEPS = 100
_WORK = 7e9
"""Multiplications that all sweeps of a CP decomposition may take together: less than a second."""
_SETTLED = 1e-3
"""A sweep that lowers the error by less than this share of it is the last."""
_DAMPING = 1e-9
_TUCKER_SWEEPS = 10
_STEPS = 2
"""Of conjugate gradients; a third lowers what CRNN's layers lose by another 1 to 2 %."""


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A weight in the metric of what was seen.

    Attributes:
        weight: W (A^1/2 (x) B^1/2), (outputs, channels, taps).
        back: A^-1/2.
        back_taps: B^-1/2.
    """

    weight: Array
    back: Array
    back_taps: Array


class TuckerForm(ConvForm[_Scaled]):
    """1 x 1 to r channels, k x k to q, 1 x 1."""

    @property
    def most(self) -> Ranks:
        """The ranks of the two unfoldings."""
        outputs, channels, taps = self.layer.outputs, self.layer.channels, self.layer.taps
        return min(channels, outputs * taps), min(outputs, channels * taps)

    def links(self, ranks: Ranks) -> tuple[Link, ...]:
        """All that is spatial is in the middle."""
        (read, made), layer = ranks, self.layer
        ones = (1,) * len(layer.kernel)
        return (
            Link((read, layer.channels, *ones), (), 1),
            Link((made, read, *layer.kernel), layer.axes, 1),
            Link((layer.outputs, made, *ones), (), 1),
        )

    def prepared(self, weight: Array, seen: Seen) -> _Scaled:
        """W in the metric."""
        return _in_metric(weight, seen)

    def group_factors(self, weight: Array, ranks: Ranks, seen: Seen, prepared: _Scaled) -> tuple[Array, ...]:
        """Tensorly's orthogonal iteration on the weight in the metric; then a reduced-rank regression."""
        (read, made), kernel = ranks, weight.shape[2:]
        last, core, right = _tucker(prepared.weight, read, made)
        first = right.T @ prepared.back
        if seen.windowed:
            cross, square = seen.placed(first, seen.windows())
            best = basis(solved(square, cross @ weight.reshape(len(weight), -1).T), square)
        else:
            best = basis(last @ core.reshape(made, -1), np.eye(core[0].size))
        last, middle = best.cut(made)
        fewer = made - len(middle)  # more than read x taps directions there are not
        last, middle = np.pad(last, ((0, 0), (0, fewer))), np.pad(middle, ((0, fewer), (0, 0)))
        core = middle.reshape(made, read, -1)
        # what V makes of x has a mean square of 1 in each direction: V A^1/2 is orthonormal
        turned, first = balanced(np.moveaxis(core, 1, 2), first, np.ones(read))
        core = np.moveaxis(turned, 2, 1).reshape(made, read, *kernel)
        return pointwise(first, len(kernel)), core, pointwise(last, len(kernel))

    def composed(self, factors: tuple[Array, ...]) -> Array:
        """U K V."""
        first, core, last = factors
        inner = np.tensordot(core, first.reshape(len(first), -1), (1, 0))
        return np.tensordot(last.reshape(len(last), -1), np.moveaxis(inner, -1, 1), 1)


class CpForm(ConvForm[_Scaled]):
    """1 x 1 to r channels, a filter for each of them, 1 x 1."""

    @property
    def most(self) -> Ranks:
        """A rank at which it is exact: that of every tap by itself."""
        return (self.layer.taps * min(self.layer.outputs, self.layer.channels),)

    def links(self, ranks: Ranks) -> tuple[Link, ...]:
        """All that is spatial is in the middle, channel by channel."""
        (rank,), layer = ranks, self.layer
        ones = (1,) * len(layer.kernel)
        return (
            Link((rank, layer.channels, *ones), (), 1),
            Link((rank, 1, *layer.kernel), layer.axes, rank),
            Link((layer.outputs, rank, *ones), (), 1),
        )

    def prepared(self, weight: Array, seen: Seen) -> _Scaled:
        """W in the metric."""
        return _in_metric(weight, seen)

    def group_factors(self, weight: Array, ranks: Ranks, seen: Seen, prepared: _Scaled) -> tuple[Array, ...]:
        """Tensorly's alternating least squares on the weight in the metric; then a sweep on what was seen."""
        kernel = weight.shape[2:]
        left, right, filters = _canonical(prepared.weight, ranks[0])
        right, filters = right.T @ prepared.back, filters.T @ prepared.back_taps
        if seen.windowed and left.any():
            left, right, filters = _on_windows(weight, seen.windows(), prepared, (left, right, filters))
        sizes = [np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), np.linalg.norm(filters, axis=1)]
        even = np.cbrt(np.prod(sizes, axis=0))
        scales = [np.where(size > 0, even / np.where(size > 0, size, 1.0), 0.0) for size in sizes]
        left, right, filters = left * scales[0], right * scales[1][:, None], filters * scales[2][:, None]
        return (
            pointwise(right, len(kernel)),
            filters.reshape(ranks[0], 1, *kernel),
            pointwise(left, len(kernel)),
        )

    def composed(self, factors: tuple[Array, ...]) -> Array:
        """Sum of its components."""
        first, filters, last = (part.reshape(len(part), -1) for part in factors)
        whole = last @ (first[:, :, np.newaxis] * filters[:, np.newaxis]).reshape(len(first), -1)
        return whole.reshape(len(last), first.shape[1], *factors[1].shape[2:])


def _in_metric(weight: Array, seen: Seen) -> _Scaled:
    channels, taps = seen.split(1)
    (scale, back), (scale_taps, back_taps) = root(channels), root(taps)
    flat = weight.reshape(*weight.shape[:2], -1)
    return _Scaled(np.asarray(scale @ flat @ scale_taps), back, back_taps)


def _tucker(tensor: Array, read: int, made: int) -> tuple[Array, Array, Array]:
    """U (outputs, made), core (made, read, taps) and V (channels, read), orthonormal but for the core."""
    from tensorly.decomposition import partial_tucker

    left, right = _directions(tensor, 0, made), _directions(tensor, 1, read)
    taps = tensor.shape[2]
    if read <= made * taps and made <= read * taps and tensor.any():  # else there is nothing to turn
        _, (left, right) = partial_tucker(
            tensor, (made, read), modes=[0, 1], init=[left, right], n_iter_max=_TUCKER_SWEEPS, tol=1e-4, random_state=0
        )[0]
    core = np.einsum("oct,oq,cr->qrt", tensor, left, right, optimize=True)
    return np.asarray(left), core, np.asarray(right)


def _directions(tensor: Array, axis: int, many: int) -> Array:
    """The leading singular vectors of an unfolding, (extent, many)."""
    rows = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    return np.asarray(np.linalg.eigh(rows @ rows.T)[1][:, ::-1][:, :many])


def _canonical(tensor: Array, rank: int) -> tuple[Array, Array, Array]:
    """Components of (outputs, channels, taps): (outputs, rank), (channels, rank), (taps, rank)."""
    from tensorly.cp_tensor import CPTensor
    from tensorly.decomposition import parafac

    size = float(np.linalg.norm(tensor))
    if size == 0:
        outputs, channels, taps = (np.zeros((n, rank)) for n in tensor.shape)
        return outputs, channels, taps
    left, right, filters = _principal(tensor / size, rank)
    turned = np.ascontiguousarray(np.moveaxis(tensor / size, 2, 0))
    best, least = (left, right, filters), _error(turned, left, right, filters)
    sweeps = int(min(_SWEEPS, max(1, _WORK // (3 * tensor.size * rank))))
    for _ in range(sweeps):
        # filters keep to themselves: the product of the other two would have outputs x channels x rank numbers
        begin = CPTensor((np.ones(rank), [filters, left, right]))
        _, (_, left, right) = parafac(
            turned, rank, init=begin, n_iter_max=1, tol=0, fixed_modes=[0], l2_reg=_DAMPING, random_state=0
        )
        filters = _filters(turned, left, right)
        error = _error(turned, left, right, filters)
        before = least
        if error < least:
            best, least = (left, right, filters), error
        if not error < before * (1 - _SETTLED):
            break
    left, right, filters = best
    return left * size, right, filters


def _principal(tensor: Array, rank: int) -> tuple[Array, Array, Array]:
    """The largest singular triples of all principal taps: exact at full rank."""
    turns = _directions(tensor, 2, tensor.shape[2])
    left, sizes, right = np.linalg.svd(np.moveaxis(tensor @ turns, 2, 0), full_matrices=False)
    chosen = np.argsort(-sizes.reshape(-1), kind="stable")[:rank]
    tap, which = np.unravel_index(chosen, sizes.shape)
    even = np.cbrt(np.maximum(sizes[tap, which], 1e-12))
    return left[tap, :, which].T * even, right[tap, which].T * even, turns[:, tap] * even


def _on_windows(
    weight: Array, windows: Array, prepared: _Scaled, parts: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """One sweep over U, V and H in the metric S of whole windows; (outputs, r), (r, channels), (r, taps).

    U has a closed form. For V and H the equations are too many to write down: a few steps of conjugate gradients,
    with the Kronecker product of what they are near to as a preconditioner.
    """
    left, right, filters = parts
    rows, (rank, taps) = weight.reshape(len(weight), -1), filters.shape
    single = windows.astype(np.float32)  # for steps that the next ones make up for

    def whole(first: Array, second: Array) -> Array:
        return (first[:, :, np.newaxis] * second[:, np.newaxis]).reshape(rank, -1)

    def last(first: Array, second: Array) -> Array:
        placed = whole(first, second)
        seen = placed @ windows
        return solved(seen @ placed.T, seen @ rows.T)

    def fitted(start: Array, wide: Callable[[Array], Array], narrow: Callable[[Array], Array], near: Array,
               back: Array) -> Array:  # fmt: skip
        """Least squares for what ``wide`` turns into Z; ``narrow`` is its transpose."""
        near = near + np.eye(rank) * (_DAMPING * np.trace(near) / rank)
        inverse, both = np.linalg.inv(near), back @ back

        def gradient(change: Array) -> Array:
            return narrow(left.T @ (change.astype(np.float32) @ single))

        found, rest = start, gradient(rows - left @ wide(start))
        step = better = inverse @ rest @ both
        size = float(np.vdot(rest, better))
        for _ in range(_STEPS):
            bent = gradient(left @ wide(step))
            curve = float(np.vdot(step, bent))
            if not (size > 0 and curve > 0):
                break
            found, rest = found + size / curve * step, rest - size / curve * bent
            better = inverse @ rest @ both
            before, size = size, float(np.vdot(rest, better))
            step = better + size / before * step
        return found

    def error() -> float:
        change = rows - left @ whole(right, filters)
        return float(np.vdot(change @ windows, change))

    left = last(right, filters)
    best, least = (left, right, filters), error()
    right = fitted(
        right, lambda v: whole(v, filters), lambda z: np.vecdot(z.reshape(rank, -1, taps), filters[:, np.newaxis]),
        (left.T @ left) * _gram(filters @ np.linalg.inv(prepared.back_taps)), prepared.back,
    )  # fmt: skip
    filters = fitted(
        filters, lambda h: whole(right, h), lambda z: (right[:, np.newaxis] @ z.reshape(rank, -1, taps))[:, 0],
        (left.T @ left) * _gram(right @ np.linalg.inv(prepared.back)), prepared.back_taps,
    )  # fmt: skip
    left = last(right, filters)
    return (left, right, filters) if error() < least else best


def _gram(rows: Array) -> Array:
    return np.asarray(rows @ rows.T)


def _filters(turned: Array, left: Array, right: Array) -> Array:
    """Least squares for the filters, (taps, rank)."""
    products = np.stack([np.einsum("cr,cr->r", tap.T @ left, right) for tap in turned])
    square = (left.T @ left) * (right.T @ right)
    square.flat[:: len(square) + 1] += _DAMPING
    return np.asarray(np.linalg.solve(square, products.T)).T


def _error(turned: Array, left: Array, right: Array, filters: Array) -> float:
    return float(sum(np.square(tap - (left * f) @ right.T).sum() for tap, f in zip(turned, filters, strict=True)))
