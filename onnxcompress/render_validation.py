"""How profiles against measurements, and models on an emulated core, are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from onnxcompress.render import comparison
from onnxcompress.tables import amount, columns, decibel, milliseconds, plural, ratio, section, used_columns

if TYPE_CHECKING:  # what is shown is not needed for showing it
    from onnxcompress.emulated import EmulatedVerification
    from onnxcompress.validation import Validation

__all__ = ["emulated", "validation"]


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
    if found.guessed_shapes:
        names = ", ".join(found.guessed_shapes[:3]) + (", ..." if len(found.guessed_shapes) > 3 else "")
        notes.append(f"inputs of open extent and no column shapes, so made-up sizes were predicted: {names}")
    return Group(
        Text(f"{found.profile} against {found.against}: {plural(found.n, 'row')}", style="bold"),
        Text(f"mean error {_share(found.mape)} after one scalar a device, {_share(found.mape_raw)} without"),
        *(Text(note, style="dim") for note in notes),
        section("Devices", columns(devices, heads, right=(1, 2, 3, 4, 6))),
        section("All rows" if every_row else "Worst rows", used_columns(table, row_heads, right=(3, 4, 5, 6))),
    )


def _share(value: float) -> str:
    return f"{value:.1%}"


def emulated(found: EmulatedVerification) -> RenderableType:
    """Two models on an emulated core."""
    before, after = found.before, found.after
    rows = [
        ("instructions", amount(before.instructions), amount(after.instructions),
         ratio(before.instructions, after.instructions, "fewer", "more")),
    ]  # fmt: skip
    if before.seconds is not None and after.seconds is not None:
        rows.append(("priced by class", milliseconds(1e3 * before.seconds), milliseconds(1e3 * after.seconds),
                     ratio(before.seconds, after.seconds, "faster", "slower")))  # fmt: skip
    rows.append(("against this machine", decibel(before.host.min_sqnr_db), decibel(after.host.min_sqnr_db), ""))
    title = f"On the emulated core of {found.profile}, onnxruntime {found.onnxruntime}"
    return section(
        title,
        Group(comparison(found.comparison), Text(), columns(rows, ("", "original", "optimized", ""), right=(1, 2))),
    )
