"""A bundle of models, as text for a person. Computes nothing."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from onnxcompress.bundling import Bundle
from onnxcompress.packing import BundledModel
from onnxcompress.tables import columns, decibel, plural, ratio, section, size, some, used_columns

__all__ = ["bundle"]


def bundle(made: Bundle, *, verbose: bool = False) -> RenderableType:
    """Totals, one row a model, and what was merged that is not equal; every merge if ``verbose``."""
    rows = [
        (
            m.name,
            size(m.before.raw),
            size(m.onnx_bytes),
            size(m.weight_bytes),
            size(m.shared_bytes),
            some(size, m.repeated_bytes),
            _outputs(m),
        )
        for m in made.models
    ]
    heads = ("model", "before", ".onnx now", "weights", "of them shared", "were repeated", "outputs")
    totals = [
        ("files", size(made.before.raw), size(made.after.raw), ratio(made.before.raw, made.after.raw, *_WORDS)),
        ("files, zstd -3", size(made.before.zstd), size(made.after.zstd), _packed(made)),
    ]
    parts: list[RenderableType] = [
        Text(f"{plural(len(made.models), 'model')} -> {made.folder}", style="bold"),
        section("Totals", columns(totals, ("", "before", "after", ""), right=[1, 2])),
        section("Models", used_columns(rows, heads, right=[1, 2, 3, 4, 5])),
    ]
    merged = [(m.name, merge) for m in made.models for merge in m.merges]
    if merged:
        shown = merged if verbose else sorted(merged, key=lambda row: row[1].sqnr_db)[:_FEW]
        lines = [
            (name, merge.tensor, f"{merge.by} of {merge.model}", decibel(merge.sqnr_db), size(merge.nbytes))
            for name, merge in shown
        ]
        title = "Merged though not equal" if len(shown) == len(merged) else f"The {_FEW} least alike of {len(merged)}"
        named = ("model", "tensor", "gave way to", "alike", "saves")
        parts.append(section(title, columns(lines, named, right=[3, 4])))
    notes = [Text(f"{m.name}: {note}") for m in made.models for note in (f"checked on {m.data}", *m.notes)]
    parts.append(section("Notes", Group(*notes)))
    return Group(*parts)


_WORDS = ("smaller", "larger")
_FEW = 10


def _packed(made: Bundle) -> str:
    return ratio(made.before.zstd, made.after.zstd, *_WORDS)


def _outputs(model: BundledModel) -> str:
    kept = "equal" if model.equal else f"worst at {decibel(model.comparison.min_sqnr_db)}"
    back = f", {plural(model.taken_back, 'merge')} taken back" if model.taken_back else ""
    return kept + back
