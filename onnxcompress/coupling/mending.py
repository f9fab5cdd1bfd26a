"""Mender: what a rule may ask and do after positions were removed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.coupling.axes import Axis
from onnxcompress.coupling.coupler import written
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
    """

    def __init__(self, rewriter: Rewriter, kept: Mapping[Axis, Indices], sizes: Mapping[Axis, int]) -> None:
        self.rewriter = rewriter
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

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Concrete shape a tensor had before.

        Raises:
            CouplingError: it is not known.
        """
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

    def length(self, node: ir.Node, index: int) -> int:
        """Elements of a list of extents at an input."""
        value = node.inputs[index]
        found = None if value is None else self._written(value)
        if found is None:
            raise CouplingError(f"input {index} of {node.op_type} {node.name!r} is computed", hint="report this model")
        return len(found)

    def set_extents(self, node: ir.Node, index: int, changes: Mapping[int, Indices], keep: Sequence[int] = ()) -> None:
        """Gives some elements of a list of extents the number of positions kept.

        Args:
            node: reads the list.
            index: at this input.
            changes: by place in the list, positions kept.
            keep: elements that say something else ("copy", "as many as fit") and stay.
        """
        value = node.inputs[index]
        old = None if value is None else self._written(value)
        if old is None:
            raise CouplingError(f"input {index} of {node.op_type} {node.name!r} is computed", hint="report this model")
        new = [len(changes[k]) if k in changes and e not in (None, *keep) else None for k, e in enumerate(old)]
        if any(e is not None for e in new):
            self._write(node, index, new)

    def set_ints(self, node: ir.Node, index: int, new: Sequence[int]) -> None:
        """Gives a constant list of integers new values, leaving other readers theirs."""
        old = self.array(node, index)
        dtype = np.dtype(np.int64) if old is None else old.dtype
        self.rewriter.set_weight(
            node, index, np.asarray(new, dtype).reshape(np.shape(old) if old is not None else (-1,))
        )

    def _written(self, value: ir.Value) -> list[int | None] | None:
        return written(value, self.shape)

    def _write(self, node: ir.Node, index: int, new: Sequence[int | None]) -> None:
        """Replaces elements of a constant, or constants in a Concat; None leaves the old."""
        value = node.inputs[index]
        producer = None if value is None else value.producer()
        if value is None or value.const_value is not None or producer is None:
            self.set_ints(node, index, _over(self.array(node, index), new))
            return
        inputs: list[ir.Value | None] = []
        place = 0
        for piece in producer.inputs:
            tensor = None if piece is None else piece.const_value
            count = int(tensor.size) if tensor is not None else self.shape(piece)[0]
            wanted = new[place : place + count]
            place += count
            if tensor is not None and any(e is not None for e in wanted):
                array = np.asarray(_over(tensor.numpy(), wanted), tensor.numpy().dtype)
                inputs.append(self.rewriter.constant(array, f"{node.name}_extent", like=node))
            else:
                inputs.append(piece)
        (fresh,) = self.rewriter.insert(
            "Concat", inputs, {"axis": 0}, before=node, dtype=value.dtype, shape=value.shape
        )
        self.rewriter.set_input(node, index, fresh)
        self.rewriter.remove_unused(producer)


def _over(old: npt.NDArray[np.generic] | None, new: Sequence[int | None]) -> list[int]:
    before = [0] * len(new) if old is None else [int(v) for v in np.asarray(old).reshape(-1).tolist()]
    return [b if n is None else n for b, n in zip(before, new, strict=True)]
