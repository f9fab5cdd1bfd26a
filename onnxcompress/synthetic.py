"""Feeds made up from what the graph declares, where nobody gives any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import DataError
from onnxcompress.feeds import InputSpec

__all__ = ["SIZES", "Sizes", "Synthetic"]

Array = npt.NDArray[Any]


class Sizes(NamedTuple):
    """What dynamic axes are given: of pictures, of (batch, length) float signals, of anything else."""

    height: int = 224
    width: int = 224
    signal: int = 512
    length: int = 32


SIZES = (Sizes(), Sizes(length=1), Sizes(48, 320), Sizes(32, 320), Sizes(64, 224), Sizes(640, 640), Sizes(signal=16000))
"""Tried in this order until the model runs: a recogniser of lines wants 48 rows, a recurrent state 1."""


class Synthetic:
    """Feeds from the declared shapes and types: standard normal floats, small integers.

    Dynamic axes: 1 for the first, then what ``sizes`` says; the same for the same symbol. Integers
    that index a weight stay inside it, one that is compared with a constant equals it, masks are 1,
    segment ids 0, positions count up.
    """

    def __init__(
        self, model: ir.Model, specs: Mapping[str, InputSpec], count: int, seed: int, sizes: Sizes | None = None
    ) -> None:
        self._count, self._seed, self._specs = count, seed, specs
        symbols: dict[str, int] = {}
        self.guessed = False
        """Whether an axis other than the first had no declared size."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, spec in specs.items():
            if spec.dtype is None or spec.shape is None:
                raise DataError(
                    "its type or rank is not declared, so it cannot be made up",
                    input=name,
                    hint="give calibration data",
                )
            self.guessed |= any(not isinstance(d, int) for d in spec.shape[1:])
            self._shapes[name] = tuple(_size(spec, i, symbols, sizes or SIZES[0]) for i in range(len(spec.shape)))
        self._below = {str(v.name): _below(v) for v in model.graph.inputs}
        self._equal = {str(v.name): _compared_with(v) for v in model.graph.inputs}
        shapes = ", ".join(f"{n} {'x'.join(map(str, s)) or 'scalar'}" for n, s in self._shapes.items())
        self.description = f"{count} made-up samples, seed {seed}: {shapes}"

    def __len__(self) -> int:
        return self._count

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            rng = np.random.default_rng([self._seed, sample])
            yield {name: self._array(spec, rng) for name, spec in self._specs.items()}

    def _array(self, spec: InputSpec, rng: np.random.Generator) -> Array:
        shape, dtype = self._shapes[spec.name], np.dtype(spec.dtype)
        name = spec.name.lower()
        if dtype.kind == "f":
            return np.asarray(rng.standard_normal(shape), dtype)
        if dtype.kind == "b" or "mask" in name:
            return np.ones(shape, dtype)
        if "token_type" in name or "segment" in name:
            return np.zeros(shape, dtype)
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        constant = self._equal[spec.name]
        if constant is not None:
            return np.full(shape, constant, dtype)
        high = self._below[spec.name] or (256 if dtype.itemsize == 1 and dtype.kind == "u" else 100)
        return rng.integers(0, min(high, int(np.iinfo(dtype).max) + 1), shape).astype(dtype)


def _size(spec: InputSpec, axis: int, symbols: dict[str, int], sizes: Sizes) -> int:
    shape = spec.shape or ()
    dim = shape[axis]
    if isinstance(dim, int):
        return dim
    if isinstance(dim, str) and dim in symbols:
        return symbols[dim]
    channels_last = len(shape) == 4 and shape[-1] in (1, 3, 4)
    if axis == 0:
        size = 1
    elif len(shape) == 4:
        channel = 3 if channels_last else 1
        height = 1 if channels_last else 2
        size = 3 if axis == channel else sizes.height if axis == height else sizes.width
    else:
        signal = len(shape) == 2 and spec.dtype is not None and spec.dtype.kind == "f"
        size = sizes.signal if signal else sizes.length
    if isinstance(dim, str):
        symbols[dim] = size
    return size


def _below(value: ir.Value) -> int | None:
    """Rows of the smallest weight the value indexes."""
    rows = []
    for use in _reached(value):
        node, index = use
        table = node.inputs[0]
        if node.op_type == "Gather" and index == 1 and table is not None and table.const_value is not None:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            rows.append(table.const_value.numpy().shape[axis])
    return min(rows, default=None)


def _compared_with(value: ir.Value) -> int | None:
    for node, index in _reached(value):
        if node.op_type == "Equal":
            other = node.inputs[1 - index]
            if other is not None and other.const_value is not None and other.const_value.size == 1:
                return int(other.const_value.numpy().reshape(-1)[0])
    return None


def _reached(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Consumers of a value, seen through casts and reshapes."""
    pending = [value]
    for _ in itertools.repeat(None, 64):
        if not pending:
            return
        for use in pending.pop().uses():
            yield use.node, use.idx
            if use.node.op_type in {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"} and use.idx == 0:
                pending.append(use.node.outputs[0])
