"""Residual blocks: x + f(x), and which nodes go when f does.

    y = x + f(x)        f is what nobody but this Add reads

f may hold anything: normalization, attention, a gate g(x) * h(x), convolutions, blocks of its own. The branch is
f only if it is made from x, or from what x is the sum of (attention and MLP side by side, a1 = x + f(x),
y = a1 + g(x)); a shortcut that is a projection is no identity, so neither of its two branches counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.base import Skip
from onnxcompress.view import GraphView, body_nodes

__all__ = ["Block", "block_at", "exclusive"]

_LAYERS = frozenset(
    {"Attention", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "MultiHeadAttention"}
)
_ENLARGING = frozenset({"ConvTranspose", "Expand", "MaxUnpool", "Resize", "Tile", "Upsample"})
_MAPS = frozenset({"BatchNormalization", "Conv", "ConvTranspose", "GroupNormalization", "InstanceNormalization"})
_ROWS = frozenset({"Attention", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization"})


@dataclass(frozen=True)
class Block:
    """One x + f(x).

    Attributes:
        add: name of the Add.
        skip: which of its inputs is x; the other is f(x).
        branch: name of the value f(x).
        axis: channel axis of f(x), counted from the end.
        nodes: names of the nodes of f, in execution order.
    """

    add: str
    skip: int
    branch: str
    axis: int
    nodes: tuple[str, ...]


def block_at(add: ir.Node, view: GraphView) -> Block:
    """The block that ends in an Add.

    Raises:
        Skip: there is none, or it must stay.
    """
    if view.in_subgraph(add):
        raise Skip("it is inside a subgraph, where activations cannot be observed")
    order = view.derive("residual.order", lambda: {n: i for i, n in enumerate(view.nodes(subgraphs=False))})
    inputs = [v for v in add.inputs if v is not None]
    skip = next((i for i in (0, 1) if _made_from(inputs[1 - i], _stream(inputs[i]), order)), None)
    if skip is None:
        raise Skip("neither of its inputs is made from the other: no residual block")
    x, branch = inputs[skip], inputs[1 - skip]
    gone = exclusive(branch, add)
    if not gone:
        raise Skip(f"the branch {branch.name!r} is read elsewhere, too")
    if not any(n.op_type in _LAYERS for n in gone):
        raise Skip("its branch is arithmetic only: no layer to remove")
    _same_shape(x, branch, add, gone, view)
    nodes = sorted(gone, key=order.__getitem__)
    shape = view.shape(branch)
    rank = len(shape) if shape is not None else 0
    return Block(str(add.name), skip, str(branch.name), _channel_axis(branch, rank, gone), tuple(map(_name, nodes)))


def _name(node: ir.Node) -> str:
    return str(node.name)


def _stream(x: ir.Value) -> tuple[ir.Value, ...]:
    """x, and what it is the sum of."""
    producer = x.producer()
    if producer is None or producer.op_type != "Add":
        return (x,)
    return (x, *(v for v in producer.inputs if v is not None and not v.is_initializer()))


def _made_from(value: ir.Value, sources: Collection[ir.Value], order: dict[ir.Node, int]) -> bool:
    """Whether one of the sources leads to the value; nothing older than all of them is looked at."""
    if value in sources:
        return False
    oldest = min(-1 if (p := v.producer()) is None else order.get(p, -1) for v in sources)
    seen: set[ir.Node] = set()
    stack = [value]
    while stack:
        producer = stack.pop().producer()
        if producer is None or producer in seen or order.get(producer, -1) < oldest:
            continue
        seen.add(producer)
        for read in _read(producer):
            if read in sources:
                return True
            stack.append(read)
    return False


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, captures of its subgraphs included."""
    for inner in (node, *body_nodes(node)):
        yield from (v for v in inner.inputs if v is not None)


def exclusive(branch: ir.Value, add: ir.Node) -> set[ir.Node]:
    """Nodes that nobody needs once the Add no longer reads the branch."""
    gone: set[ir.Node] = set()
    inside: set[ir.Node] = set()  # with what is in their subgraphs
    stack = [branch.producer()]
    while stack:
        node = stack.pop()
        if node is None or node in gone or node is add or node.graph is not add.graph:
            continue
        uses = [(v, use) for v in node.outputs for use in v.uses()]
        if any(v.is_graph_output() for v in node.outputs):
            continue
        if all(u.node in inside or (u.node is add and v is branch) for v, u in uses):
            gone.add(node)
            inside.update((node, *body_nodes(node)))
            stack += [v.producer() for v in _read(node)]
    return gone


def _same_shape(x: ir.Value, branch: ir.Value, add: ir.Node, gone: Collection[ir.Node], view: GraphView) -> None:
    """Raises Skip unless x has the shape of the sum, as far as that is known.

    Extents that only a run tells are taken for equal where nothing in the branch enlarges any.
    """
    mine, other = view.shape(x), view.shape(branch)
    if mine is None or other is None:
        raise Skip("the rank of its inputs is unknown")
    known = view.shape(add.outputs[0])
    if len(other) > len(mine) or (known is not None and len(known) != len(mine)):
        raise Skip(f"{x.name!r} has fewer dimensions than the sum")
    padded = (1,) * (len(mine) - len(other)) + tuple(other)
    enlarging = next((n.op_type for n in gone if n.op_type in _ENLARGING), None)
    for a, b in zip(mine, padded, strict=True):
        if a == b or b == 1:
            continue
        if isinstance(a, int) and (isinstance(b, int) or a == 1):
            raise Skip(f"{x.name!r} is broadcast to the shape of the branch")
        if not isinstance(a, int) and (isinstance(b, int) or enlarging):
            raise Skip(f"whether {x.name!r} has the shape of the sum is known in a run only")


def _channel_axis(branch: ir.Value, rank: int, gone: Collection[ir.Node]) -> int:
    """Channels come first after the batch in feature maps, last in rows; what makes the branch tells which it is."""
    stack, seen = [branch.producer()], set[ir.Node]()
    while stack:
        node = stack.pop(0)
        if node is None or node in seen or node not in gone:
            continue
        seen.add(node)
        if node.op_type in _MAPS:
            return 1 - rank
        if node.op_type in _ROWS or node.op_type in ("Reshape", "Transpose"):
            return -1
        stack += [v.producer() for v in node.inputs if v is not None]
    return 1 - rank if rank >= 4 else -1
