"""Keep-lists and masks that somebody else made, say a training framework.

    {"conv1": [0, 2, 5], "features.3.weight": [true, false, ...]}        .json
    arrays by name, integer (kept positions) or bool (masks)             .npz

A name is the node that makes a group, or a tensor of it. Numbers count atoms (heads) or positions of the axis
(channels of all heads). An array with the shape of the weight itself is a mask of its elements: a channel goes
where all of it is zero.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxcompress.coupling import Axis, Coupling, Group, check_keep
from onnxcompress.errors import CouplingError, PassOptionError
from onnxcompress.view import GraphView

__all__ = ["read_keep_lists"]

Mask = npt.NDArray[np.bool_]


def read_keep_lists(path: str, coupling: Coupling, view: GraphView) -> dict[Group, Mask]:
    """Atoms kept, by group.

    Raises:
        PassOptionError: the file cannot be read, or an entry is of no known form.
        CouplingError: no such group, wrong length, nothing kept, or what has to stay is not kept.
    """
    found: dict[Group, Mask] = {}
    for name, entry in _entries(path).items():
        group = coupling.group(name)
        mask = _mask(name, entry, group, coupling, view)
        check_keep(group, mask)
        found[group] = mask & found[group] if group in found else mask
    return found


def _entries(path: str) -> Mapping[str, npt.NDArray[np.generic]]:
    file = Path(path)
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise PassOptionError(
            f"keep-lists {path!r} cannot be read: {error}", hint="give a .json or .npz file of lists by name"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(v, list) for v in data.values()):
        raise PassOptionError(f"keep-lists {path!r} are not lists by name", hint='write {"node": [0, 2, 5]}')
    arrays = {name: np.asarray(entry) for name, entry in data.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "ib":
            raise PassOptionError(f"keep-lists {path!r}: {name!r} holds neither numbers nor true and false")
    return arrays


def _mask(name: str, entry: npt.NDArray[np.generic], group: Group, coupling: Coupling, view: GraphView) -> Mask:
    where = f"keep-list {name!r} of group {group.key!r} ({group.size} {group.unit})"
    axes = [m for m in group.makers if m.value == name] or list(group.makers)
    if entry.ndim > 1:
        axis = next((a for a in axes if _shape(a, view) == entry.shape), None)
        if axis is None:
            raise CouplingError(f"{where}: a mask of shape {entry.shape} fits no weight of it")
        entry = (entry != 0).any(axis=tuple(d for d in range(entry.ndim) if d != axis.dim))
        axes = [axis]
    sizes = {a: int(np.prod(coupling.factors(a))) for a in axes}
    if entry.dtype.kind == "b":
        return _by_positions(where, entry.astype(bool), group, coupling, sizes)
    numbers = entry.astype(np.int64)
    if numbers.size and numbers.min() < 0:
        raise CouplingError(f"{where}: {numbers.min()} is no position", hint="count from 0")
    largest = int(numbers.max(initial=0))
    size = group.size if largest < group.size else next((s for s in sizes.values() if largest < s), None)
    if size is None:
        raise CouplingError(f"{where}: there is no position {largest}", hint=f"count from 0 to {group.size - 1}")
    mask = np.zeros(size, bool)
    mask[numbers] = True
    return _by_positions(where, mask, group, coupling, sizes)


def _by_positions(where: str, mask: Mask, group: Group, coupling: Coupling, sizes: Mapping[Axis, int]) -> Mask:
    if mask.size == group.size:
        return mask
    axis = next((a for a, size in sizes.items() if size == mask.size), None)
    if axis is None:
        raise CouplingError(f"{where}: the list is for {mask.size}", hint=f"give {group.size} values, one for each")
    factors = coupling.factors(axis)
    part = next(p for p in group.parts if p.factor.axis == axis)
    inner = int(np.prod(factors[part.factor.place + 1 :]))
    atoms = part.atoms[np.arange(mask.size) // inner % factors[part.factor.place]]
    keep = np.zeros(group.size, bool)
    keep[atoms[mask]] = True
    torn = np.flatnonzero(keep[atoms] & ~mask)
    if torn.size:
        raise CouplingError(
            f"{where}: position {torn[0]} is to go without others it is tied to",
            hint=f"keep or remove whole {group.unit}",
        )
    return keep


def _shape(axis: Axis, view: GraphView) -> tuple[int, ...]:
    tensors = (v.const_value for v in view.weights() if v.name == axis.value)
    return next((tuple(int(d) for d in t.shape.numpy()) for t in tensors if t is not None), ())
