"""Keep-lists and masks that somebody else made, say a training framework.

    {"conv1": [0, 2, 5], "features.3.weight": [true, false, ...]}        .json
    arrays by name: integers (kept positions), bool or float (masks)     .npz

A name is the node that makes a group, or a weight that does. Numbers count atoms (heads) or positions of the axis
(channels of all heads); of a weight that makes only some of the atoms (a branch of a Concat) they count its own
positions, and what other branches make stays. An array with the shape of the weight itself is a mask of its
elements: a channel goes where all of it is zero.
"""

from __future__ import annotations

import json
import zipfile
import zlib
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
    """Atoms kept, by group; where several entries name one group, what all of them keep.

    Raises:
        PassOptionError: the file cannot be read, or an entry is of no known form.
        CouplingError: no such group, wrong length, nothing kept, or what has to stay is not kept.
    """
    found: dict[Group, Mask] = {}
    for name, entry in _entries(path).items():
        try:
            group, mask = _meant(name, entry, coupling, view)
            found[group] = mask & found[group] if group in found else mask
            _check(group, found[group])
        except CouplingError as error:
            hint = error.hint or "`onnxcompress groups MODEL` lists what can be pruned"
            raise CouplingError(f"keep-lists {path!r}: {error.message}", hint=hint) from error
    return found


def _check(group: Group, mask: Mask) -> None:
    check_keep(group, mask)
    empty = next((p.factor.axis for p in group.parts if not mask[p.atoms].any()), None)
    if empty is not None:
        text = f"group {group.key!r} ({group.size} {group.unit}): nothing would be left of {empty}"
        raise CouplingError(text, hint="keep at least one of each branch")


# --- reading ---------------------------------------------------------------------------------------


def _entries(path: str) -> Mapping[str, npt.NDArray[np.generic]]:
    file = Path(path)
    try:
        if file.suffix.lower() == ".npz":
            return _arrays(path)
        data = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PassOptionError(
            f"keep-lists {path!r} cannot be read: {error}", hint="give a .json or .npz file of lists by name"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(v, list) for v in data.values()):
        raise PassOptionError(f"keep-lists {path!r} are not lists by name", hint='write {"node": [0, 2, 5]}')
    return {name: _listed(path, name, entry) for name, entry in data.items()}


def _arrays(path: str) -> dict[str, npt.NDArray[np.generic]]:
    with Path(path).open("rb") as file:  # numpy leaves one it cannot read open
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array without a name")
        found = {name: arrays[name] for name in arrays.files}
    for name, array in found.items():
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise PassOptionError(
                f"keep-lists {path!r}: {name!r} is {array.dtype} of shape {array.shape}",
                hint="give kept positions (integers) or a mask (bool, or floats that are 0 where something goes)",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PassOptionError(f"keep-lists {path!r}: {name!r} holds NaN or infinity")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _listed(path: str, name: str, entry: list[object]) -> npt.NDArray[np.generic]:
    if all(isinstance(e, bool) for e in entry) and entry:
        return np.asarray(entry, np.bool_)
    if all(isinstance(e, int) and not isinstance(e, bool) and abs(e) < 1 << 62 for e in entry):
        return np.asarray(entry, np.int64)
    raise PassOptionError(
        f"keep-lists {path!r}: {name!r} is neither a list of whole numbers nor one of true and false",
        hint="write [0, 2, 5] for the positions kept, or true and false for each",
    )


# --- what an entry says ----------------------------------------------------------------------------


def _meant(name: str, entry: npt.NDArray[np.generic], coupling: Coupling, view: GraphView) -> tuple[Group, Mask]:
    """The group an entry is about: the one of that key, else what a weight of that name makes."""
    made = [g for g in coupling.groups if g.key == name]
    made = made or [g for g in coupling.groups if not g.pinned and any(m.value == name for m in g.makers)]
    if len(made) < 2:
        group = made[0] if made else coupling.group(name)
        return group, _mask(name, entry, group, coupling, view)
    fits: list[tuple[Group, Mask]] = []
    for group in made:  # heads and their widths: a list of whole heads is none of widths
        try:
            fits.append((group, _mask(name, entry, group, coupling, view)))
        except CouplingError:
            continue
    if len(fits) == 1:
        return fits[0]
    raise CouplingError(
        f"{name!r} makes {len(made)} groups, and the list fits {len(fits) or 'none'} of them",
        hint="name the node of one: " + ", ".join(f"{g.key!r} ({g.size} {g.unit})" for g in made[:8]),
    )


def _mask(name: str, entry: npt.NDArray[np.generic], group: Group, coupling: Coupling, view: GraphView) -> Mask:
    where = f"keep-list {name!r} of group {group.key!r} ({group.size} {group.unit})"
    axes = [m for m in group.makers if m.value == name] or list(group.makers)
    if entry.ndim > 1:
        axis = next((a for a in axes if _shape(a, view) == entry.shape), None)
        if axis is None:
            known = ", ".join(f"{a.value!r} {list(_shape(a, view))}" for a in axes)
            raise CouplingError(
                f"{where}: a mask of shape {list(entry.shape)} fits no weight of it", hint=f"its weights: {known}"
            )
        entry = (entry != 0).any(axis=tuple(d for d in range(entry.ndim) if d != axis.dim))
        axes = [axis]
    sizes = {a: int(np.prod(coupling.factors(a))) for a in axes}
    if entry.dtype.kind in "bf":
        return _by_positions(where, entry != 0, group, coupling, sizes)
    few = next((sizes[p.factor.axis] for p in group.parts if p.factor.axis in sizes and len(p.atoms) < group.size), 0)
    if axes[0].value == name and few:  # one branch of several
        sizes = {a: s for a, s in sizes.items() if s == few}
        mask = _from_numbers(where, entry.astype(np.int64), few, sizes)
    else:
        mask = _from_numbers(where, entry.astype(np.int64), group.size, sizes)
    return _by_positions(where, mask, group, coupling, sizes)


def _from_numbers(where: str, numbers: npt.NDArray[np.int64], atoms: int, sizes: Mapping[Axis, int]) -> Mask:
    if numbers.size and numbers.min() < 0:
        raise CouplingError(f"{where}: {numbers.min()} is no position", hint="count from 0")
    values, counts = np.unique(numbers, return_counts=True)
    if (counts > 1).any():
        raise CouplingError(
            f"{where}: position {values[counts > 1][0]} is there twice",
            hint="list each position kept once; a mask is written as true and false",
        )
    largest = int(numbers.max(initial=0))
    size = atoms if largest < atoms else next((s for s in sizes.values() if largest < s), None)
    if size is None:
        raise CouplingError(f"{where}: there is no position {largest}", hint=f"count from 0 to {atoms - 1}")
    mask = np.zeros(size, bool)
    mask[numbers] = True
    return mask


def _by_positions(where: str, mask: Mask, group: Group, coupling: Coupling, sizes: Mapping[Axis, int]) -> Mask:
    if mask.size == group.size:
        return mask
    axis = next((a for a, size in sizes.items() if size == mask.size), None)
    if axis is None:
        raise CouplingError(f"{where}: the list is for {mask.size}", hint=f"give {group.size} values, one for each")
    part = next(p for p in group.parts if p.factor.axis == axis)
    atoms = part.along(coupling.factors(axis))
    keep = np.ones(group.size, bool)
    keep[atoms[~mask]] = False
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
