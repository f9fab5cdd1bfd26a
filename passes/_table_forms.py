"""Low-rank forms of embedding tables.

    Gather(E, ids)  ->  Gather(A, ids) B        E (rows, width), A (rows, r), B (r, width)
    h E'            ->  (h B') A'               a head that is tied to the table stays tied: A and B are there once

Memory: E is read in blocks of rows, once for its second moments and once for A. How A and B are found is in
:mod:`~onnxcompress.passes._table_factors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.errors import PassError
from onnxcompress.passes._forms import Factors, Form, Ranks, Settings
from onnxcompress.passes._low_rank import metric
from onnxcompress.passes._table_factors import Metrics, balanced, in_turns, mixed, ratio, start
from onnxcompress.sketch import Drawn, Slot
from onnxcompress.statistics import Evidence, Need, SecondMoments, Statistic
from onnxcompress.view import GraphView

__all__ = ["table_forms"]

Array = npt.NDArray[np.float64]

_MOST_FEATURES = 6144
"""Width above which there are no second moments: 300 MB."""
_LEAST = 16
"""Rows or widths below which nothing is gained."""
_BLOCK = 1 << 18
"""Elements of a table that are looked at together."""
_GEMM_WITHOUT_BIAS = 11
"""Operator set in which the bias of Gemm became optional."""


@dataclass(frozen=True)
class Head:
    """A product of states with the transposed table.

    Attributes:
        node: its name.
        data: name of the states.
        result: name of what it makes.
        gemm: it is, or can be, a Gemm: the states have two dimensions.
        flipped: the states are transposed.
        bias: name of a Gemm's bias; None for none.
        attributes: alpha and beta, where they are given.
        need: second moments of the states; None where there are none to be had.
        copy: name of the weight it reads, where that is a transposed copy of the table.
    """

    node: str
    data: str
    result: str
    gemm: bool
    flipped: bool
    bias: str | None
    attributes: tuple[tuple[str, float], ...]
    need: Need | None
    copy: str = ""


@dataclass(frozen=True)
class Fetch:
    """A Gather of rows.

    Attributes:
        node: its name.
        ids: name of the indices.
        result: name of what it makes.
        need: second moments of the rows it fetches; None where there are none to be had.
    """

    node: str
    ids: str
    result: str
    need: Need | None


@dataclass(eq=False)
class _Table(Form):
    """A table that Gathers, and heads where it is tied, read.

    Attributes:
        table: E, (rows, width).
        fetches: all of them.
        heads: all of them.
    """

    table: ir.TensorProtocol
    fetches: tuple[Fetch, ...]
    heads: tuple[Head, ...]

    @property
    def most(self) -> Ranks:
        return (min(self._shape),)

    @property
    def _shape(self) -> tuple[int, int]:
        rows, width = self.table.shape.numpy()
        return int(rows), int(width)

    def needs(self) -> tuple[Need, ...]:
        readers: tuple[Fetch | Head, ...] = (*self.fetches, *self.heads)
        wanted = (reader.need for reader in readers)
        return tuple(dict.fromkeys(need for need in wanted if need is not None))

    def drawing(self, ranks: Ranks) -> tuple[Drawn, ...]:
        narrow, wide = self._slots(ranks)
        drawn: list[Drawn] = []
        for fetch in self.fetches:
            low = f"{fetch.result}_low"
            drawn += [Drawn("Gather", (narrow, fetch.ids), (low,)), Drawn("MatMul", (low, wide), (fetch.result,))]
        turned = f"{self.fetches[0].result}_A", f"{self.fetches[0].result}_B"
        if not all(head.gemm for head in self.heads):
            for slot, name in zip((narrow, wide), turned, strict=True):
                drawn.append(Drawn("Transpose", (slot,), (name,), (("perm", (1, 0)),)))
        for head in self.heads:
            low = f"{head.result}_low"
            if head.gemm:
                flipped = (("transA", 1),) if head.flipped else ()
                last = (low, narrow) if head.bias is None else (low, narrow, head.bias)
                drawn.append(Drawn("Gemm", (head.data, wide), (low,), (*flipped, ("transB", 1))))
                drawn.append(Drawn("Gemm", last, (head.result,), (*head.attributes, ("transB", 1))))
            else:
                drawn.append(Drawn("MatMul", (head.data, turned[1]), (low,)))
                drawn.append(Drawn("MatMul", (low, turned[0]), (head.result,)))
        return tuple(drawn)

    def factors(self, ranks: Ranks, evidence: Evidence, settings: Settings) -> Factors:
        width, even = self._shape[1], self._even
        fetched = _together(self.fetches, width, evidence, settings)
        states = _together(self.heads, width, evidence, settings)
        seen = even.matrix if fetched is None or not np.trace(fetched.matrix) > 0 else fetched.matrix
        rows = even.matrix if np.trace(even.matrix) > 0 else np.eye(width)
        heard = metric(None if states is None else states.matrix, width, settings.ridge) if self.heads else None
        weight = 1.0 if states is None else ratio(fetched or even, states, even)
        measured = Metrics(mixed(seen, even.matrix), rows, heard, weight)
        left, right = self.remembered(fetched or states, settings, lambda: start(measured))
        first, second = balanced(*in_turns(left[:, : ranks[0]], right[: ranks[0]], measured), even.matrix)
        lost = Metrics(seen, even.matrix, heard, weight).lost(np.eye(width) - first @ second)
        narrow, wide = self._slots(ranks)
        return Factors({narrow: self._narrow(first), wide: np.ascontiguousarray(second, np.float32)}, lost)

    def _slots(self, ranks: Ranks) -> tuple[Slot, Slot]:
        rows, width = self._shape
        return Slot((rows, ranks[0]), "A"), Slot((ranks[0], width), "B")

    @cached_property
    def _even(self) -> SecondMoments:
        """Of all rows, each once."""
        rows, width = self._shape
        total, mean = np.zeros((width, width)), np.zeros(width)
        for _, block in _blocks(self.table.numpy()):
            total += block.T @ block
            mean += block.sum(0) / rows
        if not np.isfinite(total).all():
            raise PassError("a table has NaN or infinite rows", hint="repair the model: it has no factors")
        return SecondMoments(total / rows, mean, rows)

    def _narrow(self, first: Array) -> npt.NDArray[np.float32]:
        """A = E Q."""
        narrow = np.empty((self._shape[0], first.shape[1]), np.float32)
        for row, block in _blocks(self.table.numpy()):
            narrow[row : row + len(block)] = block @ first
        return narrow


@dataclass(eq=False)
class _Turned(_Table):
    """A table of which a transposed copy is stored as well, which becomes a Transpose of A that is folded at load."""

    stored: ClassVar[bool] = True


def _together(
    readers: Sequence[Fetch | Head], width: int, evidence: Evidence, settings: Settings
) -> SecondMoments | None:
    """Second moments over the rows of all readers; None where one was not observed."""
    if not settings.aware or evidence.synthetic:
        return None
    found: list[SecondMoments] = []
    for reader in readers:
        if reader.need is None or not evidence.has(reader.need):
            return None
        found.append(evidence.second_moments(reader.need))
        if len(found[-1].mean) != width:
            return None
    if len(found) <= 1:
        return found[0] if found else None
    count = sum(m.count for m in found)
    matrix = sum((m.count / count * m.matrix for m in found), np.zeros((width, width)))
    return SecondMoments(matrix, sum((m.count / count * m.mean for m in found), np.zeros(width)), count)


def _blocks(table: npt.NDArray[np.float32]) -> Iterator[tuple[int, Array]]:
    """Blocks of rows in double precision, with the row each starts at."""
    step = max(1, _BLOCK // table.shape[1])
    for row in range(0, len(table), step):
        yield row, table[row : row + step].astype(np.float64)


# --- finding -----------------------------------------------------------------------------------


def table_forms(node: ir.Node, view: GraphView) -> tuple[Form, ...]:
    """The form of the table a Gather reads, "table"; all that read it are in it.

    Raises:
        Skip: it has none, or another Gather of the same table comes first.
    """
    value = node.inputs[0]
    tensor = view.weight(value)
    if value is None or tensor is None:
        raise Skip("what it reads is no constant")
    if tensor.dtype != ir.DataType.FLOAT:
        raise Skip(f"its table is of type {tensor.dtype.name}, and FLOAT can be factored")
    if len(tensor.shape) != 2:
        raise Skip(f"its table has {len(tensor.shape)} dimensions, and 2 can be factored")
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if min(shape) < _LEAST:
        raise Skip(f"its table of {shape[0]} x {shape[1]} is too small to gain from two factors")
    if value.is_graph_output():
        raise Skip("its table is an output of the model")
    order = {n: i for i, n in enumerate(view.nodes())}
    readers = sorted(view.consumers(value), key=lambda use: order[use[0]])
    gathers = [n for n, index in readers if n.op_type == "Gather" and index == 0]
    if gathers[0] is not node:
        raise Skip(f"its table is factored together with {gathers[0].name!r}")
    fetches = tuple(_fetch(n, node, shape[1], view) for n in gathers)
    heads: list[Head] = []
    for reader, index in readers:
        if reader not in gathers:
            heads += _heads(reader, index, node, shape[1], view)
    copies = tuple(_copies(value, tensor, node, view))
    form = _Turned if copies and not all(head.gemm for head in copies) else _Table
    old = math.prod(shape) * (1 + len({head.copy for head in copies}))
    nodes = (*(f.node for f in fetches), *(h.node for h in (*heads, *copies)))
    return (form("table", nodes, old, tensor, fetches, (*heads, *copies)),)


def _fetch(gather: ir.Node, first: ir.Node, width: int, view: GraphView) -> Fetch:
    if gather.attributes.get_int("axis", 0) not in (0, -2):
        raise Skip(f"{gather.name!r} takes columns of the table, not rows")
    if gather.graph is not first.graph:
        raise Skip(f"the table is also read by {gather.name!r} in another graph")
    ids, result = gather.inputs[1], gather.outputs[0]
    shape = view.shape(ids)
    if ids is None or shape == ():
        raise Skip(f"{gather.name!r} fetches a single row")
    return Fetch(str(gather.name), str(ids.name), str(result.name), _need(result, -1, width, gather, view))


def _need(value: ir.Value, axis: int, width: int, node: ir.Node, view: GraphView) -> Need | None:
    """Second moments to ask for; None where the value is not observed, or too wide."""
    if view.in_subgraph(node) or value.is_initializer() or not value.name or width > _MOST_FEATURES:
        return None
    return Need(str(value.name), Statistic.GRAM, axis)


def _heads(reader: ir.Node, index: int, first: ir.Node, width: int, view: GraphView) -> Iterator[Head]:
    """The heads behind a reader of the table that is no Gather.

    Raises:
        Skip: it is something else.
    """
    if reader.op_type == "Transpose" and tuple(reader.attributes.get_ints("perm", (1, 0))) == (1, 0):
        turned = reader.outputs[0]
        uses = view.consumers(turned)
        if uses and not turned.is_graph_output() and all(_multiplies(n, i, False) for n, i in uses):
            for product, _ in uses:
                yield _head(product, first, width, view)
            return
    if _multiplies(reader, index, True):
        yield _head(reader, first, width, view)
        return
    raise Skip(f"its table is also read by {reader.op_type} {reader.name!r}, which cannot read two factors")


def _multiplies(node: ir.Node, index: int, upright: bool) -> bool:
    """Whether a node is a product with E' by its right operand, stored as E (``upright``) or transposed."""
    if index != 1:
        return False
    if node.op_type == "Gemm":
        return bool(node.attributes.get_int("transB", 0)) == upright
    return node.op_type == "MatMul" and not upright


def _head(node: ir.Node, first: ir.Node, width: int, view: GraphView) -> Head:
    data, gemm = node.inputs[0], node.op_type == "Gemm"
    if node.graph is not first.graph or data is None:
        raise Skip(f"the table is also read by {node.name!r} in another graph")
    if gemm and view.opset < _GEMM_WITHOUT_BIAS:
        raise Skip(f"Gemm has to have a bias before opset {_GEMM_WITHOUT_BIAS}, and this is {view.opset}")
    flat = len(view.shape(data) or ()) == 2 and view.opset >= _GEMM_WITHOUT_BIAS
    flipped = gemm and bool(node.attributes.get_int("transA", 0))
    bias = node.inputs[2] if gemm and len(node.inputs) > 2 else None
    scales = tuple((n, node.attributes.get_float(n, 1.0)) for n in ("alpha", "beta") if gemm and n in node.attributes)
    return Head(
        str(node.name),
        str(data.name),
        str(node.outputs[0].name),
        gemm or flat,
        flipped,
        None if bias is None else str(bias.name),
        scales,
        _need(data, 0 if flipped else -1, width, node, view),
    )


def _copies(value: ir.Value, table: ir.TensorProtocol, first: ir.Node, view: GraphView) -> Iterator[Head]:
    """Heads that read a weight of their own which holds the table, as folding a Transpose leaves it."""
    for node in view.nodes("MatMul", "Gemm"):
        weight = node.inputs[1]
        tensor = view.weight(weight)
        if weight is None or weight is value or tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        upright = _multiplies(node, 1, True)
        shape = tensor.shape.numpy()
        if len(shape) != 2 or tuple(shape if upright else shape[::-1]) != tuple(table.shape.numpy()):
            continue
        alone = all(n.graph is first.graph and _multiplies(n, i, upright) for n, i in view.consumers(weight))
        if alone and not weight.is_graph_output() and _same(table.numpy(), tensor.numpy(), upright):
            yield replace(_head(node, first, int(table.shape.numpy()[1]), view), copy=str(weight.name))


def _same(table: npt.NDArray[np.float32], other: npt.NDArray[np.float32], upright: bool) -> bool:
    other = other if upright else other.T
    step = max(1, _BLOCK // table.shape[1])
    return all(np.array_equal(table[i : i + step], other[i : i + step]) for i in range(0, len(table), step))
