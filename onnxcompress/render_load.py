"""What loading costs, as text for a person. Computes nothing."""

from __future__ import annotations

from rich.table import Table

from onnxcompress.loading import Load
from onnxcompress.tables import columns, milliseconds, ratio, size

__all__ = ["load"]


def load(what: Load) -> Table:
    """Time and memory, a row each."""
    rows = [("load", milliseconds(what.ms[0]), milliseconds(what.ms[1]), ratio(*what.ms, "faster", "slower"))]
    for name, pair in (("memory after load", what.resident_bytes), ("memory at most", what.peak_bytes)):
        if pair is not None:
            rows.append(
                (name, size(pair[0]), size(pair[1]), ratio(*pair, "smaller", "larger") if min(pair) > 0 else "")
            )
    return columns(rows, ("", "first", "second", ""), right=[1, 2])
