"""Scales of stored weights: one for each output of a layer, or for each block of its inputs."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnxcompress.passes._codes import Layout
from onnxcompress.passes._linear_maps import LinearMap

__all__ = ["Scales", "blocks_of"]

Array = npt.NDArray[np.float64]


def blocks_of(linear: LinearMap, block: int) -> int:
    """Channels that share a scale: all, or the largest block that fits, at most as large as asked for."""
    channels = linear.permuted[-1]
    return math.gcd(channels, block) if block else channels


class Scales:
    """Scales of the rows of maps, or of blocks of their channels."""

    def __init__(self, linear: LinearMap, block: int, sizes: Array, reduce: str = "mean") -> None:
        self.linear = linear
        groups, outputs, taps, channels = linear.permuted
        self.block = blocks_of(linear, block)
        self._parts = (groups, outputs, taps, channels // self.block, self.block)
        by_part = sizes.reshape(self._parts)
        found = by_part.max((2, 4), keepdims=True) if reduce == "max" else by_part.mean((2, 4), keepdims=True)
        if reduce == "mean":
            found = np.sqrt(found)
        self.values = np.where(found > 0, found, 1.0)  # (groups, outputs, 1, blocks, 1)

    def divided(self, by: float) -> Scales:
        self.values = (self.values / by).astype(np.float32).astype(np.float64)
        return self

    @property
    def full(self) -> Array:
        """As large as the maps."""
        groups, outputs, taps, channels = self.linear.permuted
        whole = np.broadcast_to(self.values, self._parts)
        if self.linear.rows == 1:
            return whole.reshape(groups, outputs, taps * channels)
        return whole.reshape(groups, outputs * taps, channels)

    @property
    def layout(self) -> Layout:
        """Weights in the order of the tensor, its channels split where blocks are smaller."""
        linear, blocks = self.linear, self._parts[3]
        if blocks == 1:
            return Layout(linear.shape, linear.split)
        axis = linear.back.index(3)
        return Layout(linear.shape, (*linear.split[:axis], blocks, self.block, *linear.split[axis + 1 :]))

    @property
    def stored(self) -> Array:
        """In the order of the tensor."""
        if self._parts[3] == 1:
            return self.values[..., 0].transpose(self.linear.back)
        order = [axis for i in self.linear.back for axis in ((3, 4) if i == 3 else (i,))]
        return self.values.transpose(order)

    @property
    def vectors(self) -> tuple[Layout, Array]:
        """Weights in the order of the maps, and the scales for that."""
        linear = self.linear
        if self._parts[3] == 1:
            order = () if linear.back == (0, 1, 2, 3) else linear.back
            return Layout(linear.shape, linear.permuted, order), self.values[..., 0]
        order = tuple(axis for i in linear.back for axis in ((3, 4) if i == 3 else (i,)))
        return Layout(linear.shape, self._parts, () if order == (0, 1, 2, 3, 4) else order), self.values
