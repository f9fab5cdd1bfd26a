"""How the comparison of a profile with measurements is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from onnxcompress.tables import columns, milliseconds, plural, section, used_columns

if TYPE_CHECKING:  # what is shown is not needed for showing it, and takes a second to import
    from onnxcompress.validation import Validation

__all__ = ["validation"]


def validation(found: Validation, *, every_row: bool = False) -> RenderableType:
    """Errors by device, then the worst rows, or all of them."""
    devices = [
        (d.device or "(one device)", str(d.n), f"{d.scalar:.3g}", _share(d.mape), _share(d.mape_raw),
         d.worst, f"{d.worst_error:+.0%}")
        for d in found.devices
    ]  # fmt: skip
    heads = ("device", "rows", "scalar", "error", "without scalar", "worst model", "by")
    rows = sorted(found.rows, key=lambda r: -abs(r.error))
    shown = rows if every_row else rows[:5]
    table = [
        (r.device, r.model, r.precision, milliseconds(r.measured_ms), milliseconds(r.predicted_ms),
         f"{r.error:+.1%}", f"{r.error_raw:+.1%}")
        for r in shown
    ]  # fmt: skip
    row_heads = ("device", "model", "precision", "measured", "predicted", "error", "without scalar")
    notes = []
    if found.other_cores:
        notes.append(f"{plural(found.other_cores, 'row')} of other cores left out")
    if found.ignored_columns:
        notes.append(f"columns not used: {', '.join(found.ignored_columns)}")
    return Group(
        Text(f"{found.profile} against {found.against}: {plural(found.n, 'row')}", style="bold"),
        Text(f"mean error {_share(found.mape)} after one scalar a device, {_share(found.mape_raw)} without"),
        *(Text(note, style="dim") for note in notes),
        section("Devices", columns(devices, heads, right=(1, 2, 3, 4, 6))),
        section("All rows" if every_row else "Worst rows", used_columns(table, row_heads, right=(3, 4, 5, 6))),
    )


def _share(value: float) -> str:
    return f"{value:.1%}"
