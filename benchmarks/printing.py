"""Results as aligned text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(header: Sequence[str], lines: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """A table; the first ``left`` columns are words, the rest figures. ``None`` is a dash."""
    cells = [tuple(map(str, header)), *(tuple("-" if v is None else str(v) for v in line) for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    rows = [
        "  ".join(v.ljust(w) if i < left else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    rows.insert(1, "-" * len(rows[0]))
    return "\n".join(rows)


def figure(value: float | None, digits: int = 2) -> str | None:
    """A number with that many decimals."""
    return None if value is None else f"{value:.{digits}f}"
