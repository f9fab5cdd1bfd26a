"""Tables, numbers and JSON: how anything is shown, whatever it is."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import IO, Any

from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = [
    "amount",
    "as_json",
    "columns",
    "console",
    "decibel",
    "milliseconds",
    "plural",
    "ratio",
    "section",
    "show",
    "size",
    "some",
    "used_columns",
]

_PIPED_WIDTH = 120


def console(file: IO[str]) -> Console:
    """A console for ``file``; without colour, and wider, where it is no terminal.

    Names of nodes hold brackets and colons, so markup, emoji and highlighting are off.
    """
    wide = not file.isatty() and "COLUMNS" not in os.environ
    return Console(file=file, width=_PIPED_WIDTH if wide else None, markup=False, emoji=False, highlight=False)


def show(text: RenderableType, file: IO[str]) -> None:
    """Prints to ``file``; where it is no terminal, without the blanks tables end their lines with."""
    if file.isatty():
        console(file).print(text)
        return
    buffer = io.StringIO()
    console(buffer).print(text)
    file.writelines(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())


def as_json(document: object) -> str:
    """Strict JSON of records, paths and enumerations; infinities become "inf" and "-inf"."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (str, int)):  # bool is an int
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    if hasattr(value, "item"):  # numpy scalars
        return _plain(value.item())
    return str(value)


# --- tables ------------------------------------------------------------------------------------


def columns(rows: Iterable[Sequence[RenderableType]], heads: Sequence[str], *, right: Sequence[int] = ()) -> Table:
    """A plain table; columns numbered in ``right`` hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(heads))
    for index, head in enumerate(heads):
        numeric = index in right
        table.add_column(head, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold", vertical="top")
    for row in rows:
        table.add_row(*row)
    return table


def section(title: str, body: RenderableType) -> Group:
    """A titled part, indented."""
    return Group(Text(), Text(title, style="bold"), Padding(body, (0, 0, 0, 2)))


def used_columns(rows: Sequence[Sequence[str]], heads: Sequence[str], right: Sequence[int]) -> Table:
    """Columns that say nothing, or only "keep", take no room."""
    used = [i for i in range(len(heads)) if any(row[i] and row[i] != "keep" for row in rows)]
    return columns(
        [[row[i] for i in used] for row in rows],
        [heads[i] for i in used],
        right=[used.index(i) for i in right if i in used],
    )


# --- numbers -----------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return ""


def amount(count: float) -> str:
    """A count with three digits: 12.3 M."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(count) < 999.5 or unit == " T":
            return f"{count:.3g}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return ""


def milliseconds(value: float) -> str:
    """About three digits, never in exponential form; microseconds below a hundredth."""
    if not math.isfinite(value):
        return "?"
    if 0 < abs(value) < 0.01:
        return f"{1000 * value:.2g} us"
    decimals = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f} ms"


def decibel(value: float) -> str:
    return "exact" if value == math.inf else "none" if value == -math.inf else f"{value:.1f} dB"


def ratio(before: float, after: float, less: str, more: str) -> str:
    """How many times less or more: "3.42x smaller"."""
    if before <= 0 or after <= 0 or not math.isfinite(before + after):
        return ""
    if before >= after:
        return "the same" if before / after < 1.005 else f"{before / after:.2f}x {less}"
    return "the same" if after / before < 1.005 else f"{after / before:.2f}x {more}"


def some(shown: Callable[[float], str], value: float) -> str:
    """Nothing for zero: an empty cell reads better."""
    return shown(value) if value else ""


def plural(number: int, noun: str) -> str:
    """A number with its noun: 1 sample, 2 samples."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
