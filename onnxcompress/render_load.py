"""What loading costs, as text for a person. Computes nothing."""

from __future__ import annotations

from rich.table import Table

from onnxcompress.report import Load
from onnxcompress.tables import columns, milliseconds, ratio, size

__all__ = ["load", "rows"]


def load(what: Load) -> Table:
    """Time and memory, a row each."""
    return columns(rows(what), ("", "first", "second", ""), right=[1, 2])


def rows(what: Load, *, peak: bool = True) -> list[tuple[str, str, str, str]]:
    """Of a table of two models.

    Args:
        what: was measured.
        peak: with the most memory, too.
    """
    found = [("load", milliseconds(what.ms[0]), milliseconds(what.ms[1]), ratio(*what.ms, "faster", "slower"))]
    kinds = [("memory after load", what.resident_bytes), ("memory at most", what.peak_bytes if peak else None)]
    for name, pair in kinds:
        if pair is not None:
            less = ratio(*pair, "smaller", "larger") if min(pair) > 0 else ""
            found.append((name, size(pair[0]), size(pair[1]), less))
    return found
