"""Low-rank forms of a Conv: two or more convolutions with fewer weights. y = U (V x) + b, with V and U convolutions.

    channel    k C->r, 1 r->O              V mixes all of a window; by groups, each of rank r; "svd" where k is 1
    input      1 C->r, k r->O              V mixes channels at one tap; by groups
    spatial    kh x 1 C->r, 1 x kw r->O    V mixes channels and rows (Jaderberg et al. 2014, arXiv 1405.3866)
    tucker     1 C->r, k r->q, 1 q->O      see ``_conv_tensor_forms``
    cp         1 C->r, k by channel, 1 r->O

"channel" is at the closed-form optimum of ``_low_rank`` on what was seen of windows. For "input" and "spatial" W is a
matrix, too: with rows (outputs, the axes that V does not mix) and columns those it mixes. Its best factors
for a metric A (x) B (see ``_conv_layer``) are those of (W B^1/2) in the metric A; they are the optimum where only
channels were seen or nothing at all. Where windows were seen, U is then fitted again on all of S, in closed form.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.passes._conv_chain import ConvForm, Link, balanced, pointwise, root
from onnxcompress.passes._conv_layer import Seen, conv_layer
from onnxcompress.passes._conv_tensor_forms import CpForm, TuckerForm
from onnxcompress.passes._forms import Form, Ranks
from onnxcompress.passes._low_rank import Basis, basis, solved
from onnxcompress.view import GraphView

__all__ = ["conv_forms"]

Array = npt.NDArray[np.float64]


class ChannelForm(ConvForm[Basis]):
    """k x k to r channels a group, then 1 x 1."""

    @property
    def most(self) -> Ranks:
        """The rank of W."""
        return (min(self.layer.outputs, self.layer.channels * self.layer.taps),)

    def links(self, ranks: Ranks) -> tuple[Link, ...]:
        """All that is spatial comes first."""
        (rank,), layer = ranks, self.layer
        inner, ones = layer.groups * rank, (1,) * len(layer.kernel)
        return (
            Link((inner, layer.channels, *layer.kernel), layer.axes, layer.groups),
            Link((layer.shape[0], rank, *ones), (), layer.groups),
        )

    def prepared(self, weight: Array, seen: Seen) -> Basis:
        """All directions."""
        rows = weight.reshape(len(weight), -1)
        if rows.shape[0] > rows.shape[1]:
            return basis(rows, seen.windows())
        # projections of W onto directions of y: nothing as large as features x features is needed
        found = basis(np.eye(len(rows)), seen.outputs(weight))
        return Basis(found.left, found.right @ rows, found.energies)

    def group_factors(self, weight: Array, ranks: Ranks, seen: Seen, prepared: Basis) -> tuple[Array, ...]:
        """The optimum."""
        left, right = prepared.cut(ranks[0])
        return right.reshape(-1, *weight.shape[1:]), pointwise(left, weight.ndim - 2)

    def composed(self, factors: tuple[Array, ...]) -> Array:
        """U V."""
        first, last = factors
        return np.asarray(np.tensordot(last.reshape(len(last), -1), first, 1))


class _Unfolded(ConvForm[Basis]):
    """Forms that are a matrix product: V mixes the first axes of (channels, *kernel), U the others."""

    mixed: ClassVar[int] = 1
    """How many axes V mixes."""

    @property
    def most(self) -> Ranks:
        """The rank of the unfolded W."""
        inner, outer = self._sizes()
        return (min(inner, self.layer.outputs * outer),)

    def prepared(self, weight: Array, seen: Seen) -> Basis:
        """All directions of W B^1/2 in the metric A."""
        inner, outer = self._sizes()
        mixing, apart = seen.split(self.mixed)
        by_outer = weight.reshape(len(weight), inner, outer).swapaxes(1, 2)
        return basis((root(apart)[0] @ by_outer).reshape(-1, inner), mixing)

    def group_factors(self, weight: Array, ranks: Ranks, seen: Seen, prepared: Basis) -> tuple[Array, ...]:
        """The optimum for a product metric; then U once more where whole windows were seen."""
        _, outer = self._sizes()
        left, right = prepared.cut(ranks[0])
        left = left.reshape(len(weight), outer, -1)
        if seen.windowed:
            sizes = np.sqrt(np.sqrt(np.maximum(prepared.energies[: ranks[0]], 0.0)))  # of V x, evenly split
            cross, square = seen.placed(right, seen.windows())
            left = solved(square, cross @ weight.reshape(len(weight), -1).T)
            left, right = balanced(left.reshape(len(weight), -1, outer).swapaxes(1, 2), right, sizes)
        return self._shaped(left, right)

    def composed(self, factors: tuple[Array, ...]) -> Array:
        """U V."""
        first, last = factors
        product = np.tensordot(last.reshape(*last.shape[:2], -1), first.reshape(len(first), -1), (1, 0))
        return product.swapaxes(1, 2).reshape(len(last), self.layer.channels, *self.layer.kernel)

    @abstractmethod
    def _shaped(self, left: Array, right: Array) -> tuple[Array, ...]:
        """V and U as weights of convolutions, of (outputs, outer, rank) and (rank, inner)."""

    def _sizes(self) -> tuple[int, int]:
        shape = (self.layer.channels, *self.layer.kernel)
        return math.prod(shape[: self.mixed]), math.prod(shape[self.mixed :])


class InputForm(_Unfolded):
    """1 x 1 to r channels a group, then k x k."""

    def links(self, ranks: Ranks) -> tuple[Link, ...]:
        """All that is spatial comes last."""
        (rank,), layer = ranks, self.layer
        return (
            Link((layer.groups * rank, layer.channels, *(1,) * len(layer.kernel)), (), layer.groups),
            Link((layer.shape[0], rank, *layer.kernel), layer.axes, layer.groups),
        )

    def _shaped(self, left: Array, right: Array) -> tuple[Array, ...]:
        kernel = self.layer.kernel
        second = left.swapaxes(1, 2).reshape(len(left), len(right), *kernel)
        return pointwise(right, len(kernel)), second


class SpatialForm(_Unfolded):
    """kh x 1 to r channels, then 1 x kw; one group, two dimensions."""

    mixed: ClassVar[int] = 2

    def links(self, ranks: Ranks) -> tuple[Link, ...]:
        """Rows, then columns."""
        (rank,), (rows, columns) = ranks, self.layer.kernel
        return (
            Link((rank, self.layer.channels, rows, 1), (0,), 1),
            Link((self.layer.outputs, rank, 1, columns), (1,), 1),
        )

    def _shaped(self, left: Array, right: Array) -> tuple[Array, ...]:
        first = right.reshape(len(right), self.layer.channels, -1, 1)
        return first, left.swapaxes(1, 2)[:, :, np.newaxis]


def conv_forms(node: ir.Node, view: GraphView) -> tuple[Form, ...]:
    """Every form of a Conv that can have fewer weights than it has.

    Raises:
        Skip: there is none.
    """
    layer = conv_layer(node, view)
    if layer.channels == 1 and layer.groups > 1:
        raise Skip("depthwise: each output reads too few features to share any")
    kinds: Sequence[tuple[str, type[ConvForm[Any]]]] = (("svd", ChannelForm),)
    if layer.taps > 1:
        kinds = [("channel", ChannelForm), ("input", InputForm)]
        if layer.groups == 1 and len(layer.kernel) == 2 and min(layer.kernel) > 1:
            kinds.append(("spatial", SpatialForm))
        if layer.groups == 1 and min(layer.channels, layer.outputs) > 1:
            kinds += [("tucker", TuckerForm), ("cp", CpForm)]
    forms = [kind(name, (layer.name,), layer.old_weights, layer) for name, kind in kinds]
    found = tuple(form for form in forms if form.weights((1,) * len(form.most)) < layer.old_weights)
    if not found:
        raise Skip(f"its weight of shape {layer.shape} is too small: even rank 1 has no fewer weights")
    return found
