"""Removing positions for good: every weight is sliced, every size that was written down is mended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.coupling.analysis import Coupling
from onnxcompress.coupling.axes import Axis
from onnxcompress.coupling.groups import Group
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.rules import rule_of
from onnxcompress.errors import CouplingError
from onnxcompress.notes import note, noted
from onnxcompress.rewrite import Rewriter

__all__ = ["check_keep", "kept_positions", "new_sizes", "noted_positions", "remove"]

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_KEPT = "kept"
"""Note on an activation that shrank: by axis, which of the positions it once had are left."""


def check_keep(group: Group, keep: Mask) -> None:
    """Whether a group can be cut down to these atoms.

    Args:
        group: to cut.
        keep: bool, shape (group.size,).

    Raises:
        CouplingError: wrong length, nothing kept, or an atom that has to stay is removed.
    """
    where = f"group {group.key!r} ({group.size} {group.unit})"
    if keep.shape != (group.size,):
        raise CouplingError(f"{where}: the list is for {keep.size}", hint=f"give {group.size} values, one for each")
    if not keep.any():
        raise CouplingError(f"{where} would be empty", hint="keep at least one")
    wrong = np.flatnonzero(group.fixed & ~keep)
    if wrong.size:
        text = f"{where} is pinned" if group.pinned else f"{where}: number {wrong[0]} has to stay"
        raise CouplingError(f"{text}: {group.why_fixed()}", hint="keep it, or change what pins it")


def kept_positions(coupling: Coupling, keeps: Mapping[Group, Mask]) -> dict[Axis, Indices]:
    """Positions kept of every axis that shrinks, ascending."""
    masks: dict[Axis, dict[int, Mask]] = defaultdict(dict)
    for group, keep in keeps.items():
        check_keep(group, keep)
        if not keep.all():
            for part in group.parts:
                mask = keep[part.atoms]
                if not mask.all():
                    masks[part.factor.axis][part.factor.place] = mask
    kept: dict[Axis, Indices] = {}
    for axis, by_place in masks.items():
        sizes = coupling.factors(axis)
        whole = np.ones(1, bool)
        for place, size in enumerate(sizes):
            mask = by_place.get(place, np.ones(size, bool))
            whole = (whole[:, None] & mask[None, :]).reshape(-1)
        kept[axis] = np.flatnonzero(whole)
        if not kept[axis].size:
            raise CouplingError(f"nothing would be left of {axis}", hint="keep more")
    return kept


def new_sizes(coupling: Coupling, keeps: Mapping[Group, Mask]) -> dict[tuple[str, int], int]:
    """Sizes of the axes that shrink, by name of the tensor and axis; private copies under the name of all."""
    kept = kept_positions(coupling, keeps)
    return {(a.value, a.dim): len(p) for a, p in kept.items() if a.dim >= 0}


def remove(coupling: Coupling, keeps: Mapping[Group, Mask], rewriter: Rewriter) -> dict[Axis, Indices]:
    """Cuts groups down to the atoms kept.

    Args:
        coupling: of the model as it is; stale afterwards.
        keeps: by group, which atoms stay.
        rewriter: of the model, or of a clone with the same names.

    Returns:
        The positions kept of every axis that shrank.

    Raises:
        CouplingError: see :func:`check_keep`; nothing was edited then.
    """
    kept = kept_positions(coupling, keeps)
    if not kept:
        return kept
    names = {a.value for a in kept}
    virtual = {a.value.rpartition(":")[0] for a in kept if a.dim < 0}
    touched = [
        node
        for node in rewriter.model.graph.all_nodes()
        if str(node.name) in virtual
        or any(v is not None and str(v.name) in names for v in (*node.inputs, *node.outputs))
    ]
    mender = Mender(rewriter, kept, coupling.sizes)
    for node in touched:
        rule = rule_of(node)
        if rule is not None and rule.mend is not None:
            rule.mend(node, mender)
    rewriter.remove_unused(*mender.replaced)
    _slice_weights(kept, rewriter, touched)
    _set_shapes(kept, rewriter)
    return kept


def _slice_weights(kept: Mapping[Axis, Indices], rewriter: Rewriter, nodes: list[ir.Node]) -> None:
    by_tensor: dict[tuple[str, str], dict[int, Indices]] = defaultdict(dict)
    for axis, positions in kept.items():
        if axis.dim >= 0:
            by_tensor[axis.value, axis.use][axis.dim] = positions
    known = {str(n.name): n for n in nodes}
    for (name, use), cuts in by_tensor.items():
        if use:
            owner, _, index = use.rpartition(":")
            node = known.get(owner)
            value = None if node is None else node.inputs[int(index)]
            if node is not None and value is not None and value.const_value is not None:
                rewriter.set_weight(node, int(index), _cut(value.const_value.numpy(), cuts))
            continue
        value = rewriter.find(name)
        if value is not None and value.is_initializer() and value.const_value is not None:
            rewriter.replace_weight(value, _cut(value.const_value.numpy(), cuts))


def _cut(array: npt.NDArray[np.generic], cuts: Mapping[int, Indices]) -> npt.NDArray[np.generic]:
    for index, positions in sorted(cuts.items(), key=lambda item: len(item[1]) / max(1, array.shape[item[0]])):
        array = np.take(array, positions, axis=index)
    return np.ascontiguousarray(array)


def _set_shapes(kept: Mapping[Axis, Indices], rewriter: Rewriter) -> None:
    """Shapes written down in the file are those of the smaller tensors."""
    for axis, positions in kept.items():
        value = None if axis.dim < 0 or axis.use else rewriter.find(axis.value)
        if value is not None and value.shape is not None and not value.is_initializer():
            extents = list(value.shape)
            extents[axis.dim] = len(positions)
            value.shape = ir.Shape(extents)
        if value is not None and not value.is_initializer():
            earlier = noted_positions(value)
            whole = earlier[axis.dim][positions] if axis.dim in earlier else positions
            note(value, _KEPT, {**earlier, axis.dim: whole})


def noted_positions(value: ir.Value) -> Mapping[int, Indices]:
    """By axis that shrank, which positions of an activation are left, in the numbers of the model before the pass."""
    found: Mapping[int, Indices] | None = noted(value, _KEPT)
    return found or {}
