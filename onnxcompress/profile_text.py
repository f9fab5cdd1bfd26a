"""Profiles as TOML text: where a key stands in a file, and writing one.

Both rely on the flat shape of profiles: keys, tables of keys, arrays of such tables.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from onnxcompress.errors import ProfileError

__all__ = ["dumps", "line_of"]

_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.\"-]+)\s*\]")
_KEY = re.compile(r"\s*[\"']?([\w-]+)[\"']?\s*[=.]")
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'|#.*")
_OPENER = re.compile(r"[^=]*=\s*(\"{3}|'{3})")
_WIDTH = 110
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def line_of(text: str, where: Sequence[str | int]) -> int | None:
    """1-based line of a key (``("kernel", 3, "ns_per_mac")``), or of its table if it is not there.

    tomllib tells no positions. Scanning for headers and keys finds the line; text inside multi-line
    strings and arrays is skipped.
    """
    best: tuple[int, int] | None = None  # (path parts matched, line)
    here: tuple[str | int, ...] = ()
    path: tuple[str | int, ...]
    counts: dict[str, int] = {}
    quote, depth = "", 0
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would count form feeds, too
        if quote:
            quote = "" if quote in line else quote
            continue
        if depth:
            depth = max(0, depth + _opened(line))
            continue
        if header := _HEADER.match(line):
            name = header[2].strip('"')
            here = (name,)
            if header[1] == "[[":
                counts[name] = counts.get(name, -1) + 1
                here = (name, counts[name])
            path = here
        elif key := _KEY.match(line):
            path = (*here, key[1])
        else:
            continue
        if path == tuple(where[: len(path)]) and (best is None or len(path) > best[0]):
            best = (len(path), number)
        opened = _OPENER.match(line)
        quote = opened[1] if opened and opened[1] not in line[opened.end() :] else ""
        depth = 0 if quote else max(0, _opened(line))
    return None if best is None else best[1]


def _opened(line: str) -> int:
    bare = _QUOTED.sub("", line)
    return bare.count("[") - bare.count("]")


def dumps(document: Mapping[str, object]) -> str:
    """A profile as TOML: keys, then tables, then arrays of tables, each in the order given.

    None is left out. Floats have four significant digits, which is more than any of them is good for;
    integers are exact.

    Raises:
        ProfileError: a value is not finite, or of a kind profiles do not have.
    """
    tables = {k: v for k, v in document.items() if isinstance(v, Mapping)}
    arrays = {k: entries for k, v in document.items() if (entries := _array_of_tables(v))}
    lines = [*_lines({k: v for k, v in document.items() if k not in tables and k not in arrays}, "")]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_lines(table, f"{name}.")]
    for name, entries in arrays.items():
        for entry in entries:
            lines += ["", f"[[{name}]]", *_lines(entry, f"{name}.")]
    return "\n".join(lines) + "\n"


def _array_of_tables(value: object) -> list[Mapping[str, object]]:
    entries = value if isinstance(value, (list, tuple)) else ()
    tables = [entry for entry in entries if isinstance(entry, Mapping)]
    return tables if len(tables) == len(entries) else []


def _lines(table: Mapping[str, object], where: str) -> Iterator[str]:
    for key, value in table.items():
        if value is not None:
            yield f"{key} = {_value(value, where + key)}"


def _value(value: object, where: str) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float():
            return _number(value, where)
        case str():
            return _text(value)
        case datetime.date():
            return value.isoformat()
        case list() | tuple():
            items = [_quoted(v) if isinstance(v, str) else _value(v, where) for v in value]
            line = f"[{', '.join(items)}]"
            if len(line) <= _WIDTH:
                return line
            return "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    raise ProfileError(f"{where}: a {type(value).__name__} cannot stand in a profile")


def _number(value: float, where: str) -> str:
    if not math.isfinite(value):
        raise ProfileError(f"{where} is {value}; profiles hold finite numbers only")
    rounded = float(f"{value:.4g}")
    return str(int(rounded)) if 1e3 <= abs(rounded) < 1e15 else f"{rounded:.4g}"


def _text(value: str) -> str:
    if "\n" not in value:
        return _quoted(value)
    escaped = value.replace("\\", "\\\\")
    if '"""' in escaped or escaped.endswith('"'):
        escaped = escaped.replace('"', '\\"')
    escaped = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", escaped)
    return f'"""\n{escaped}"""'


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
