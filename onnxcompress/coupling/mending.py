"""Mender: what a rule may ask and do after positions were removed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.coupling.axes import Axis
from onnxcompress.errors import CouplingError
from onnxcompress.rewrite import Rewriter

__all__ = ["Mender"]

_MOST_AXES = 16

Indices = npt.NDArray[np.int64]


class Mender:
    """Hands a rule the sizes before and after.

    Args:
        rewriter: edits the model.
        kept: positions kept of every axis that shrinks, ascending.
        sizes: positions of every axis before.

    Attributes:
        replaced: nodes whose outputs somebody else gives now; they go at the end if nobody reads them.
    """

    def __init__(self, rewriter: Rewriter, kept: Mapping[Axis, Indices], sizes: Mapping[Axis, int]) -> None:
        self.rewriter = rewriter
        self.replaced: list[ir.Node] = []
        self._lists: dict[str, int] = {}
        self._kept, self._sizes = kept, sizes

    def input(self, node: ir.Node, index: int, axis: int) -> Indices | None:
        """Positions kept of an axis of an input; None if all are. The axis counts from 0."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        own = self._kept.get(Axis(str(value.name), axis, f"{node.name}:{index}"))
        return own if own is not None else self._kept.get(Axis(str(value.name), axis))

    def output(self, node: ir.Node, axis: int, index: int = 0) -> Indices | None:
        """Positions kept of an axis of an output; None if all are."""
        return self._kept.get(Axis(str(node.outputs[index].name), axis))

    def virtual(self, node: ir.Node, what: str) -> Indices | None:
        """Positions kept of a virtual axis; None if all are."""
        return self._kept.get(Axis(f"{node.name}:{what}", -1))

    def before(self, node: ir.Node, what: str) -> int:
        """Size a virtual axis had."""
        return self._sizes[Axis(f"{node.name}:{what}", -1)]

    def has(self, node: ir.Node, what: str) -> bool:
        """Whether a node's rule made such a virtual axis."""
        return Axis(f"{node.name}:{what}", -1) in self._sizes

    def left(self, node: ir.Node, what: str) -> int:
        """Size a virtual axis has now."""
        kept = self.virtual(node, what)
        return self.before(node, what) if kept is None else len(kept)

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Concrete shape a tensor had before.

        Raises:
            CouplingError: it is not known.
        """
        if value is not None and value.const_value is not None:
            return tuple(int(d) for d in value.const_value.shape.numpy())
        if value is not None and str(value.name) in self._lists:
            return (self._lists[str(value.name)],)
        found = [] if value is None else [self._sizes.get(Axis(str(value.name), k)) for k in range(_MOST_AXES)]
        shape = tuple(itertools.takewhile(lambda size: size is not None, found))
        if value is None or not shape:
            raise CouplingError(f"the shape of {value.name if value else None!r} is not known")
        return tuple(size for size in shape if size is not None)

    def array(self, node: ir.Node, index: int) -> npt.NDArray[np.generic] | None:
        """The constant at an input; None if it is left out or computed."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())

    def ints(self, node: ir.Node, index: int) -> list[int] | None:
        """The constant list of integers at an input; None if it is left out or computed."""
        found = self.array(node, index)
        return None if found is None else [int(v) for v in found.reshape(-1).tolist()]

    def set_extents(self, node: ir.Node, index: int, sizes: Mapping[int, int]) -> None:
        """Writes numbers over some elements of a list of extents, wherever the rest of it comes from.

        What shrinks is tied to a weight, so its extent is the same in every run and can be written down.

        Args:
            node: reads the list.
            index: at this input.
            sizes: new extents by place in the list.
        """
        value = node.inputs[index]
        if value is None or not sizes:
            return
        old = self.ints(node, index)
        if old is not None:
            self.set_ints(node, index, [sizes.get(k, e) for k, e in enumerate(old)])
            return
        places = self._pieces(value)
        if places is not None and all(len(run) == 1 for run in places if any(k in sizes for k in run)):
            self._rewrite_concat(node, index, places, sizes)
            return
        self.rewriter.set_input(node, index, self._overwritten(value, sizes, before=node))

    def _pieces(self, value: ir.Value) -> list[range] | None:
        """Places in a list that the inputs of the Concat behind it fill; None if there is none."""
        producer = value.producer()
        if producer is None or producer.op_type != "Concat" or any(v is None for v in producer.inputs):
            return None
        found: list[range] = []
        for piece in producer.inputs:
            shape = self.shape(piece)
            if len(shape) != 1:
                return None
            start = found[-1].stop if found else 0
            found.append(range(start, start + shape[0]))
        return found

    def _rewrite_concat(self, node: ir.Node, index: int, places: Sequence[range], sizes: Mapping[int, int]) -> None:
        value = node.inputs[index]
        producer = None if value is None else value.producer()
        if value is None or producer is None:
            return
        inputs = [
            self._extents([sizes[run.start]], node, value.dtype) if len(run) == 1 and run.start in sizes else piece
            for run, piece in zip(places, producer.inputs, strict=True)
        ]
        (fresh,) = self.rewriter.insert(
            "Concat", inputs, {"axis": 0}, before=node, dtype=value.dtype, shape=value.shape
        )
        self.rewriter.set_input(node, index, fresh)
        self.replaced.append(producer)

    def _overwritten(
        self, value: ir.Value, sizes: Mapping[int, int], *, before: ir.Node | None = None, after: ir.Node | None = None
    ) -> ir.Value:
        like = before if before is not None else after
        if like is None:
            raise CouplingError("a list of extents is written nowhere", hint="report this model")
        count = self.shape(value)[0]
        mask = np.array([k in sizes for k in range(count)])
        numbers = self._extents([sizes.get(k, 0) for k in range(count)], like, value.dtype)
        where = self.rewriter.constant(mask, f"{like.name}_known", like=like)
        (fresh,) = self.rewriter.insert(
            "Where", [where, numbers, value], before=before, after=after, dtype=value.dtype, shape=value.shape
        )
        self._lists[str(fresh.name)] = count
        return fresh

    def _extents(self, sizes: Sequence[int], like: ir.Node, dtype: ir.DataType | None) -> ir.Value:
        kind = np.int32 if dtype == ir.DataType.INT32 else np.int64
        return self.rewriter.constant(np.array(sizes, kind), f"{like.name}_extent", like=like)

    def freeze(self, node: ir.Node, sizes: Mapping[int, int]) -> None:
        """Elements of a list that a Shape makes go on saying what they said; who needs the new says so itself.

        Args:
            node: a Shape.
            sizes: old extents by place in its output.
        """
        output = node.outputs[0]
        count = self.shape(output)[0]
        rest: list[ir.Node] = []
        for use in tuple(output.uses()):
            reader = use.node
            indices = self.array(reader, 1) if reader.op_type == "Gather" and use.idx == 0 else None
            chosen = None if indices is None else [int(k) for k in indices.reshape(-1).tolist()]
            if (
                indices is None
                or chosen is None
                or reader.outputs[0].is_graph_output()
                or any(k % count not in sizes for k in chosen)
            ):
                rest.append(reader)
                continue
            values = np.array([sizes[k % count] for k in chosen], np.int64).reshape(indices.shape)
            self.rewriter.replace_uses(
                reader.outputs[0], self.rewriter.constant(values, f"{reader.name}_extent", like=reader)
            )
            self.replaced.append(reader)
        if output.is_graph_output():
            fresh = self._overwritten(output, sizes, after=node)
            self.rewriter.replace_uses(output, fresh, keep=[n for n in (fresh.producer(),) if n is not None])
        elif rest:
            self.rewriter.replace_uses(output, self._overwritten(output, sizes, after=node), only=rest)
        else:
            self.replaced.append(node)

    def set_ints(self, node: ir.Node, index: int, new: Sequence[int]) -> None:
        """Gives a constant list of integers new values, leaving other readers theirs."""
        old = self.array(node, index)
        dtype = np.dtype(np.int64) if old is None else old.dtype
        self.rewriter.set_weight(
            node, index, np.asarray(new, dtype).reshape(np.shape(old) if old is not None else (-1,))
        )
