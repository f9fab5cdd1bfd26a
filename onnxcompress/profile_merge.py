"""Laying the file of a profile over the one it extends, as raw TOML.

Tables are merged key by key, kernels by (kind, precision, on), other arrays as a whole; the file's own win.
Where every value came from is kept, so that a mistake is told with the file and line that hold it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from onnxcompress.errors import ProfileError
from onnxcompress.profile_text import line_of

__all__ = ["ARRAYS", "Merged", "Source", "Where", "merge"]

ARRAYS = ("cache", "kernel", "fusion")
"""Arrays of tables."""

_OWN = ("schema", "name", "description", "provenance", "extends")

Where = tuple[str | int, ...]
"""A key of a profile: ("kernel", 3, "ns_per_mac")."""


@dataclass(frozen=True)
class Source:
    """A file and what is in it; ``file`` is what a relative ``extends`` is relative to."""

    file: Path | Traversable
    shown: str
    text: str
    data: dict[str, Any]

    def line(self, where: Where) -> int | None:
        return line_of(self.text, where)

    @property
    def identity(self) -> str:
        return str(self.file.resolve()) if isinstance(self.file, Path) else self.shown

    @property
    def name(self) -> str:
        name = self.data.get("name")
        return name if isinstance(name, str) else self.shown


@dataclass
class Merged:
    """Tables of a file and of what it extends, with the file each came from.

    Attributes:
        sources: the file itself, then what it extends, and so on.
        data: the merged tables.
        owners: file that holds a key (``("name",)``, ``("device", "cores")``).
        entries: file, and index in it, of every entry of an array of tables.
    """

    sources: tuple[Source, ...]
    data: dict[str, Any] = field(default_factory=dict)
    owners: dict[Where, Source] = field(default_factory=dict)
    entries: dict[str, list[tuple[Source, int]]] = field(default_factory=dict)

    def locate(self, where: Where) -> tuple[str, int | None]:
        """File and line of a key of the merged profile, or of the nearest thing there is."""
        entries = self.entries.get(str(where[0])) if where else None
        if entries and len(where) > 1 and isinstance(where[1], int):
            source, index = entries[where[1]]
            return source.shown, source.line((where[0], index, *where[2:]))
        source = next((self.owners[where[:n]] for n in (2, 1) if where[:n] in self.owners), self.sources[0])
        return source.shown, source.line(where)

    def error(self, where: Where, message: str, hint: str) -> ProfileError:
        shown, line = self.locate(where)
        return ProfileError(message, path=shown, line=line, hint=hint)


def merge(source: Source, into: Merged) -> None:
    """Lays a file over what it extends."""
    parent = into.data
    data = {key: value for key, value in parent.items() if key not in _OWN}
    if isinstance(data.get("kernel"), list):
        data["kernel"] = [_attributed(kernel, parent) for kernel in data["kernel"]]
    into.owners = {where: owner for where, owner in into.owners.items() if where[0] not in _OWN}
    for key, value in source.data.items():
        if key in ARRAYS and isinstance(value, list):
            _merge_array(source, into, data, key, value)
            continue
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            data[key] = {**data[key], **value}
        elif key == "time_scale" and _is_factor(value) and _is_factor(data.get(key)):
            data[key] *= value  # each says how it differs from what it extends
        else:
            data[key] = value
            into.entries.pop(key, None)
        into.owners[(key,)] = source
        if isinstance(value, dict):
            into.owners.update({(key, inner): source for inner in value})
    if parent:
        _inherit_doubts(source, parent, data)
    into.data = data


def _merge_array(source: Source, into: Merged, data: dict[str, Any], key: str, value: list[Any]) -> None:
    before = data.get(key)
    kept: list[tuple[Any, tuple[Source, int]]] = []
    if key == "kernel" and isinstance(before, list):
        own = {_identity(entry) for entry in value}
        origins = into.entries[key]
        taken = zip(before, origins, strict=True)
        kept = [(e, o) for e, o in taken if _identity(e) not in own]
    data[key] = [*(entry for entry, _ in kept), *value]
    into.entries[key] = [*(origin for _, origin in kept), *((source, index) for index in range(len(value)))]
    into.owners[(key,)] = source


def _identity(kernel: object) -> tuple[str, ...]:
    if not isinstance(kernel, dict):
        return (repr(kernel),)
    return (repr(kernel.get("kind")), repr(kernel.get("precision")), repr(kernel.get("on", "any")))


def _attributed(kernel: object, parent: dict[str, Any]) -> object:
    """An inherited kernel without a source names its file: the source of the heir is not its own."""
    if not isinstance(kernel, dict) or "source" in kernel:
        return kernel
    return {**kernel, "source": f"see {parent.get('name')}"}


def _is_factor(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _inherit_doubts(source: Source, parent: dict[str, Any], data: dict[str, Any]) -> None:
    """What nobody checked stays unchecked in a profile that takes it over."""
    before, own = parent.get("provenance"), data.get("provenance")
    doubts = before.get("unverified", []) if isinstance(before, dict) else []
    if not isinstance(own, dict) or not isinstance(doubts, list) or not isinstance(own.get("unverified", []), list):
        return
    taken = [d for d in doubts if isinstance(d, str) and not _gives(source.data, d.partition(":")[0])]
    note = f" (of {parent.get('name')})"
    taken = [d if re.search(r" \(of [^ )]+\)$", d) else d + note for d in taken]
    data["provenance"] = {**own, "unverified": [*own.get("unverified", []), *taken]} if taken else own


def _gives(data: dict[str, Any], dotted: str) -> bool:
    """Whether a file itself has a value for a key such as ``energy.active_w`` or ``kernel.Conv.u8s8``."""
    table, _, key = dotted.strip().partition(".")
    found = data.get(table)
    if isinstance(found, list) and table == "kernel":
        own = {(str(e.get("kind")), str(e.get("precision"))) for e in found if isinstance(e, dict)}
        return any(key in (kind, f"{kind}.{precision}") for kind, precision in own)
    return found is not None and (not isinstance(found, dict) or key in found)
