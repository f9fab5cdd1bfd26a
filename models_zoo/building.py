"""What generated models are made of: weights from a seed, and a graph built node by node.

Weights come from the raw output of PCG64, which numpy keeps stable, through additions and
multiplications only, so no library's ``log`` or ``cos`` can change a bit. A tensor's stream
is seeded by its name: adding a layer leaves the weights of the others as they were.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ZooError

__all__ = [
    "IR_VERSION",
    "OPSET",
    "SEED",
    "Array",
    "Net",
    "Operand",
    "centred",
    "normal",
    "stamp",
    "to_model",
    "to_tensor",
]

OPSET = 17
IR_VERSION = 8
SEED = 20
_FIELDS = np.uint64(0x0000FFFF0000FFFF)
_RAW = math.sqrt((65536**2 - 1) / 3)  # deviation of the sum of four 16-bit numbers

Array = NDArray[np.float32]
Operand = str | float | list[int] | NDArray[np.generic]
"""A value's name, or what a Constant node is to hold: a float32 scalar, int64 numbers, an array."""


def normal(name: str, shape: tuple[int, ...], std: float, seed: int = SEED) -> Array:
    """Bell-shaped values of the given standard deviation, cut at 3.46 of it.

    The sum of four uniform values (Irwin-Hall): close to a normal distribution, and exact
    arithmetic everywhere.
    """
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())])
    raw = np.asarray(bits.random_raw(math.prod(shape)), dtype=np.uint64)
    # The four 16-bit fields of each word, added two and two in place.
    pairs = (raw & _FIELDS) + (raw >> np.uint64(16) & _FIELDS)
    total = (pairs + (pairs >> np.uint64(32)) & np.uint64(0xFFFFFFFF)).astype(np.float32)
    # A field has mean 65535/2 and variance (65536^2 - 1)/12; sums below 2^24 are exact.
    values: Array = (total - np.float32(2 * 65535)) * np.float32(std / _RAW)
    return values.reshape(shape)


def centred(name: str, shape: tuple[int, ...], std: float, axes: tuple[int, ...], seed: int = SEED) -> Array:
    """Like ``normal``, with the mean over ``axes`` taken away.

    Behind an activation that is positive on average, other weights let the same constant through
    for every input, and layer by layer it drowns what differs. Means are of whole numbers, exact.
    """
    raw = normal(name, shape, _RAW, seed).astype(np.float64)
    values: Array = (raw - raw.mean(axes, keepdims=True)).astype(np.float32) * np.float32(std / _RAW)
    return values


def to_tensor(name: str, value: NDArray[np.generic]) -> TensorProto:
    return numpy_helper.from_array(value, name)


def to_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return stamp(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))


def stamp(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` marked as the zoo's, with the one IR version of all generated models."""
    model.ir_version = IR_VERSION
    model.producer_name = "onnxcompress.models_zoo"
    return model


class Net:
    """A graph under construction: each call adds one operator and returns what comes out.

    Written as PyTorch's exporter does: weights are initializers, other constants are Constant
    nodes, and a shape that depends on an input is worked out by Shape, Gather, Unsqueeze, Concat.

    Args:
        name: Of the graph; its weights' random streams start from it.
        width: Channels the family is built from.
        seed: Other seed, other weights.
        depth: Layers, blocks or units, as the family says.

    Raises:
        ZooError: ``width`` is not a positive multiple of 8, or ``depth`` not positive.
    """

    def __init__(self, name: str, width: int, seed: int, depth: int = 1) -> None:
        if width <= 0 or width % 8:
            raise ZooError(f"{name} cannot be {width} wide", hint="width has to be a positive multiple of 8")
        if depth <= 0:
            raise ZooError(f"{name} cannot be {depth} deep", hint="depth has to be positive")
        self._name, self._seed = name, seed
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []
        self._scope: list[str] = []
        self._taken: set[str] = set()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names made inside start with ``name``."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        """Call the node output ``value`` ``name`` and hand it out."""
        for node in self._nodes:
            for side in (node.input, node.output):
                side[:] = [name if v == value else v for v in side]
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def random(self, name: str, shape: tuple[int, ...], std: float, *, centre: tuple[int, ...] = ()) -> Array:
        """Values for the weight ``name``, without their mean over the axes ``centre``."""
        key = f"{self._name}/{self._full(name)}"
        return centred(key, shape, std, centre, self._seed) if centre else normal(key, shape, std, self._seed)

    def tensor(self, name: str, value: NDArray[np.generic]) -> str:
        """Name of the new initializer ``name``."""
        self._weights.append(to_tensor(self._full(name), value))
        return self._full(name)

    def weight(self, name: str, shape: tuple[int, ...], std: float) -> str:
        return self.tensor(name, self.random(name, shape, std))

    def __call__(self, op: str, *inputs: Operand, **attributes: Any) -> str:
        return self.many(op, 1, *inputs, **attributes)[0]

    def many(self, op: str, count: int, *inputs: Operand, **attributes: Any) -> list[str]:
        """Like a call, for an operator with ``count`` outputs."""
        wired = [self._value(v) for v in inputs]
        name = self._fresh(op)
        outputs = [f"{name}_output_{i}" for i in range(count)]
        self._nodes.append(helper.make_node(op, wired, outputs, name, **attributes))
        return outputs

    def dim(self, value: str, axis: int) -> str:
        """One axis length of ``value``, as a scalar."""
        return self("Gather", self("Shape", value), np.array(axis, np.int64), axis=0)

    def dims(self, *parts: int | str) -> str:
        """A shape of numbers and of scalars such as ``dim`` gives."""
        pieces = [self._value([p]) if isinstance(p, int) else self("Unsqueeze", p, [0]) for p in parts]
        return self("Concat", *pieces, axis=0)

    def reshape(self, value: str, *parts: int | str) -> str:
        if any(isinstance(p, str) for p in parts):
            return self("Reshape", value, self.dims(*parts))
        return self("Reshape", value, [int(p) for p in parts])

    def expand(self, value: str, *parts: int | str) -> str:
        """``Tensor.expand``, where -1 keeps a length; the exporter replaces each -1 by 1 in the graph."""
        shape = self.dims(*parts)
        ones = self("ConstantOfShape", [len(parts)], value=to_tensor("value", np.ones(1, np.int64)))
        kept = self("Equal", shape, self("Mul", ones, np.array(-1, np.int64)))
        return self("Expand", value, self("Where", kept, ones, shape))

    def finish(self) -> onnx.ModelProto:
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, self._weights)
        return to_model(graph)

    def _value(self, operand: Operand) -> str:
        if isinstance(operand, str):
            return operand
        array = np.asarray(operand, np.float32 if isinstance(operand, float) else None)
        return self("Constant", value=to_tensor("value", array))

    def _full(self, name: str) -> str:
        return ".".join((*self._scope, name))

    def _fresh(self, op: str) -> str:
        base = "/" + "/".join((*self._scope, op))
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name
