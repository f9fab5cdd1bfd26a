"""Finding passes. Built-in passes register through the same entry point as anyone's plug-in.

[project.entry-points."onnxcompress.passes"]
round_weights = "my_package:RoundWeights"
"""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from onnxcompress.base import Pass
from onnxcompress.errors import PassError, PassOptionError, UnknownPassError, suggest

__all__ = ["GROUP", "available", "create", "load_pass", "options", "parse"]

GROUP = "onnxcompress.passes"
_SPEC = re.compile(r"^\s*([\w-]+)\s*(?:\{(.*)\})?\s*$", re.DOTALL)


@cache
def _entries() -> Mapping[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        if entry.name in found and found[entry.name].value != entry.value:
            raise PassError(
                f"two installed packages register a pass {entry.name!r}: {found[entry.name].value} and {entry.value}",
                hint="uninstall one",
            )
        found[entry.name] = entry
    return types.MappingProxyType(found)


def available() -> dict[str, type[Pass]]:
    """Every installed pass by name, in order of stage and name."""
    passes = {name: load_pass(name) for name in _entries()}
    return dict(sorted(passes.items(), key=lambda item: (item[1].stage, item[1].place, item[0])))


@cache
def load_pass(name: str) -> type[Pass]:
    """The class of an installed pass.

    Raises:
        UnknownPassError: none has this name.
        PassError: its package does not import, or it is no ``Pass``.
    """
    entries = _entries()
    name = name.replace("-", "_")
    if name not in entries:
        raise UnknownPassError(name, entries)
    try:
        cls = entries[name].load()
    except Exception as error:  # a plug-in may fail to import in any way; say which one it was
        raise PassError(
            f"pass {name!r} ({entries[name].value}) does not import: {error}", hint="repair or uninstall it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Pass) and dataclasses.is_dataclass(cls)):
        raise PassError(f"{entries[name].value} is not a dataclass that derives from onnxcompress.Pass")
    return cls


def options(cls: type[Pass]) -> dict[str, tuple[str, object]]:
    """Options of a pass: name -> (type as text, default)."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: (_type_name(hints[f.name]), None if f.default is dataclasses.MISSING else f.default)
        for f in _fields(cls)
    }


def _fields(cls: type[Pass]) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(cls):
        raise PassError(f"{cls.__qualname__} is not a dataclass", hint="decorate it with @dataclass(frozen=True)")
    return [f for f in dataclasses.fields(cls) if f.init]


def create(name: str, **values: object) -> Pass:
    """A pass with these options.

    Raises:
        UnknownPassError: none has this name.
        PassOptionError: it has no such option, or the value is of the wrong type.
    """
    cls = load_pass(name)
    hints = typing.get_type_hints(cls)
    known = {f.name for f in _fields(cls)}
    checked: dict[str, object] = {}
    for key, value in values.items():
        key = key.replace("-", "_")
        if key not in known:
            raise PassOptionError(f"pass {name!r} has no option {key!r}", hint=suggest(key, known))
        checked[key] = _coerce(value, hints[key], f"option {key!r} of pass {name!r}")
    try:
        return cls(**checked)
    except (TypeError, ValueError) as error:
        raise PassOptionError(f"pass {name!r}: {error}") from error


def parse(spec: str) -> Pass:
    """A pass from its command-line form: ``quantize`` or ``quantize{per_channel=false, ops=[Conv]}``.

    Raises:
        PassOptionError: the text is not of this form.
    """
    match = _SPEC.match(spec)
    if match is None:
        raise PassOptionError(f"cannot read pass {spec!r}", hint="write NAME or NAME{option=value, option=value}")
    values: dict[str, object] = {}
    for item in _split(match.group(2) or ""):
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise PassOptionError(f"cannot read {item!r} in pass {spec!r}", hint="write option=value")
        values[key.strip()] = _literal(text.strip())
    return create(match.group(1), **values)


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [p for p in (*parts, current) if p.strip()]


def _literal(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith("[") and text.endswith("]"):
        return tuple(_literal(item.strip()) for item in _split(text[1:-1]))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _coerce(value: object, hint: object, what: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(value, option, what)
            except PassOptionError:
                continue
    elif origin is tuple and arguments:
        items = value if isinstance(value, (tuple, list)) else (value,)
        inner = arguments[0]
        return tuple(_coerce(item, inner, what) for item in items)
    elif isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise PassOptionError(
                f"{what} is {value!r}", hint=suggest(str(value), [str(m.value) for m in hint])
            ) from None
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint is None or hint is type(None):
        if value is None or value == "none":
            return None
    elif isinstance(hint, type) and hint not in (int, float) and isinstance(value, hint):
        return value
    raise PassOptionError(f"{what} must be {_type_name(hint)}, not {value!r}")


def _type_name(hint: object) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(m.value) for m in hint)
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
