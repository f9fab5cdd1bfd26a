"""Groups of channels, as text for a person. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from onnxcompress.prunable import GroupFound
from onnxcompress.tables import columns, plural, section, used_columns

__all__ = ["groups"]


def groups(found: Sequence[GroupFound], *, verbose: bool = False) -> RenderableType:
    """Those that can shrink, then why the others cannot; all weights and readers by name if ``verbose``."""
    free, fixed = ([g for g in found if bool(g.free) == wanted] for wanted in (True, False))
    parts: list[RenderableType] = [Text(f"{plural(len(found), 'group')}, {len(free)} of them can shrink")]
    if free:
        rows = [
            (
                g.name,
                str(g.size) if g.free == g.size else f"{g.free} of {g.size}",
                g.unit,
                _names(g.weights, verbose),
                _readers(g, verbose),
                g.pinned,
            )
            for g in free
        ]
        heads = ("made by", "free", "unit", "weights", "read by", "why some stay")
        parts.append(section("Can shrink", used_columns(rows, heads, [1])))
    if fixed:
        pins = [(g.name, str(g.size), g.unit, g.pinned) for g in fixed]
        parts.append(section("Have to stay", columns(pins, ("made by", "size", "unit", "why"), right=[1])))
    return Group(*parts)


def _names(names: Sequence[str], verbose: bool) -> str:
    more = len(names) - 1
    return ", ".join(names) if verbose or more < 1 else f"{names[0]} and {more} more"


def _readers(group: GroupFound, verbose: bool) -> str:
    """By name if ``verbose``; else how many, so that names to copy have room."""
    if verbose:
        plain = [f"{name} (no weight)" for name in group.unfitted]
        return ", ".join((*group.readers, *plain))
    plain = [f"{len(group.unfitted)} without a weight"] if group.unfitted else []
    return ", ".join([*([plural(len(group.readers), "node")] if group.readers else []), *plain])
