"""Files of measured milliseconds, as CSV: read strictly, with the line of whatever is wrong.

Two kinds, told apart by their columns:

- **instruction rows**: ``device``, ``model``, ``measured_ms`` and a count for each class of
  :data:`~onnxcompress.instructions.CLASSES`. ``core`` says on which core, ``ghz`` at which clock.
- **model rows**: ``model`` (an .onnx file, relative to the CSV), ``measured_ms``; ``device``,
  ``precision`` and ``shapes`` (``input=1x3x224x224;...``) if wanted.

Columns that mean nothing here are listed in :attr:`Measurements.ignored`, never used.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnxcompress.errors import MeasurementError, suggest
from onnxcompress.instructions import CLASSES

__all__ = ["Measurement", "Measurements", "read_measurements"]

_COMMON = ("device", "model", "measured_ms")
_KNOWN = {*_COMMON, *CLASSES, "core", "ghz", "precision", "shapes"}


@dataclass(frozen=True)
class Measurement:
    """One row.

    Attributes:
        line: where it is in the file, 1-based.
        device: what was measured; "" if the file does not say.
        model: name of the model, or path of its file.
        measured_ms: milliseconds of one run.
        core: core it ran on, if given.
        ghz: clock of the device, if given.
        precision: how it was run, if given.
        shapes: shapes of inputs, if given.
        counts: instructions by class; empty for model rows.
    """

    line: int
    device: str
    model: str
    measured_ms: float
    core: str = ""
    ghz: float | None = None
    precision: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurements:
    """A file of one kind of rows.

    Attributes:
        path: the file.
        instructions: it holds counts of instructions; else model files.
        rows: at least one.
        ignored: columns that were not used.
    """

    path: Path
    instructions: bool
    rows: tuple[Measurement, ...]
    ignored: tuple[str, ...]


def read_measurements(path: Path) -> Measurements:
    """Reads a file of measurements.

    Raises:
        MeasurementError: it cannot be read, its columns are of neither kind, or a row is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise MeasurementError("is not UTF-8 text", path=path) from error
    except OSError as error:
        raise MeasurementError(f"cannot be read: {error.strerror}", path=path) from error
    except csv.Error as error:
        raise MeasurementError(f"not CSV: {error}", path=path, line=reader.line_num) from error
    if not lines:
        raise MeasurementError("is empty", path=path, hint="its first line names the columns")
    at, cells = lines[0]
    columns = [cell.strip() for cell in cells]
    instructions = _check_columns(columns, path, at)
    if len(lines) == 1:
        raise MeasurementError("has no rows below the names of its columns", path=path, line=at)
    rows = tuple(_row(columns, line, found, path, instructions) for line, found in lines[1:])
    used = _KNOWN if instructions else _KNOWN - set(CLASSES)
    return Measurements(path, instructions, rows, tuple(c for c in columns if c not in used))


def _check_columns(columns: list[str], path: Path, line: int) -> bool:
    """Whether they are columns of instruction rows, and not of model rows."""
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        raise MeasurementError(f"column {twice[0]!r} is there twice", path=path, line=line)
    instructions = any(name in CLASSES for name in columns)
    required = (*_COMMON, *CLASSES) if instructions else ("model", "measured_ms")
    missing = [name for name in required if name not in columns]
    if not missing:
        return instructions
    if not instructions and len(missing) == len(required):
        raise MeasurementError(
            f"columns {', '.join(columns)} are of no kind that is known here",
            path=path,
            line=line,
            hint="needed are model and measured_ms, with an .onnx file in model; or device, model, measured_ms "
            f"and counts of instructions: {', '.join(CLASSES)}",
        )
    foreign = [c for c in columns if c not in _KNOWN]
    hint = f"columns that are not known: {', '.join(foreign)}" if foreign else ""
    if len(missing) == 1 and foreign and suggest(missing[0], foreign).startswith("did you mean"):
        hint = f"column {suggest(missing[0], foreign).removeprefix('did you mean ').rstrip('?')} is not known"
    if instructions and not hint:
        hint = "write 0 for a class that was not executed"
    raise MeasurementError(
        f"lacks column{'s' if len(missing) > 1 else ''} {', '.join(missing)}", path=path, line=line, hint=hint
    )


def _row(columns: list[str], line: int, cells: list[str], path: Path, instructions: bool) -> Measurement:
    if len(cells) != len(columns):
        raise MeasurementError(f"has {len(cells)} cells for {len(columns)} columns", path=path, line=line)
    row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
    for name in ("device", "model"):
        if name in row and not row[name]:
            raise MeasurementError(f"{name} is empty", path=path, line=line)
    if not instructions and not row["model"].lower().endswith(".onnx"):
        raise MeasurementError(
            f"model {row['model']!r} is no .onnx file, and there are no counts of instructions",
            path=path,
            line=line,
            hint=f"columns for counts: {', '.join(CLASSES)}",
        )
    ghz = row.get("ghz", "")
    return Measurement(
        line,
        row.get("device", ""),
        row["model"],
        _number(row, "measured_ms", path, line, positive=True),
        row.get("core", ""),
        _number(row, "ghz", path, line, positive=True) if ghz else None,
        row.get("precision", ""),
        dict(_shapes(row.get("shapes", ""), path, line)),
        {name: _number(row, name, path, line) for name in CLASSES} if instructions else {},
    )


def _number(row: Mapping[str, str], name: str, path: Path, line: int, *, positive: bool = False) -> float:
    try:
        number = float(row[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        wanted = "a number above 0" if positive else "0 or a number above"
        raise MeasurementError(f"{name} is {row[name]!r}, not {wanted}", path=path, line=line)
    return number


def _shapes(text: str, path: Path, line: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """input=1x3x224x224;other=1x8"""
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, dims = part.rpartition("=")
        sizes = dims.split("x") if dims else []
        if not equals or not name or not all(d.strip().isdigit() for d in sizes):
            raise MeasurementError(f"shapes: {part!r} is none; write NAME=1x3x224x224", path=path, line=line)
        yield name, tuple(int(d) for d in sizes)
