"""Hardware profiles as files: finding, reading, merging with what they extend, writing.

Names are looked up as a file, then in the folders of ``ONNXCOMPRESS_PROFILES``, then in the user's
configuration folder, then among those shipped. A file that ``extends`` another is merged over it as raw
TOML: tables key by key, kernels by (kind, precision, on), other arrays as a whole. Where a value came from
is kept, so that a mistake is told with the file and line that hold it.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError

from onnxcompress.errors import OutputError, ProfileError, UnknownProfileError, suggest
from onnxcompress.profile_merge import ARRAYS, Merged, Source, Where, merge
from onnxcompress.profile_schema import TABLES, Profile
from onnxcompress.profile_text import dumps

__all__ = ["list_profiles", "load_profile", "write"]

_NEEDED = ("elementwise", "move", "free", "conv", "matmul")
_KEYS_OF_THE_WHOLE = [f.alias or name for name, f in Profile.model_fields.items() if name != "lineage"]


# ---- finding ---------------------------------------------------------------------------------------------


def list_profiles() -> tuple[str, ...]:
    """Names of all profiles: the user's and those shipped."""
    return tuple(sorted(_available()))


def load_profile(name_or_path: str | Path) -> Profile:
    """Loads a profile by name or from a file.

    Args:
        name_or_path: a name of :func:`list_profiles`, or a path (it ends in ``.toml`` or has a separator).

    Raises:
        UnknownProfileError: there is no such name.
        ProfileError: the file cannot be read or is wrong; says the line.

    Example:
        >>> load_profile("cortex-a53").target().activation
        'u8'
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or _is_path(text):
        return _profile(_read(Path(text), text))
    available = _available()
    if text not in available:
        raise UnknownProfileError(text, available)
    return _profile(_read(available[text], _shown(available[text])))


def _is_path(text: str) -> bool:
    return text.endswith(".toml") or os.sep in text or "/" in text


def _shown(file: Path | Traversable) -> str:
    return str(file) if isinstance(file, Path) else file.name


def _user_folders() -> Iterator[Path]:
    """Folders that may hold profiles of the user, the most important last."""
    yield Path(platformdirs.user_config_dir("onnxcompress")) / "profiles"
    for folder in reversed(os.environ.get("ONNXCOMPRESS_PROFILES", "").split(os.pathsep)):
        if folder:
            yield Path(folder)


def _available() -> dict[str, Path | Traversable]:
    shipped = resources.files("onnxcompress.hardware_profiles")
    files: dict[str, Path | Traversable] = {f.name[:-5]: f for f in shipped.iterdir() if f.name.endswith(".toml")}
    for folder in _user_folders():
        files.update({f.stem: f for f in sorted(folder.glob("*.toml"))} if folder.is_dir() else {})
    return files


# ---- writing ---------------------------------------------------------------------------------------------


def write(profile: Profile | Mapping[str, Any], path: str | Path) -> None:
    """Writes a profile as TOML that :func:`load_profile` reads; nothing is written if it would not.

    A :class:`Profile` is written whole, with what it inherited in it; a mapping of tables (keys as in the
    file) as it is, so a short one may extend another profile.

    Raises:
        ProfileError: it is no sound profile.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if isinstance(profile, Profile):
        skip = {"lineage", "extends"}
        given: Mapping[str, Any] = profile.model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
    else:
        skip, given = set(), profile
    order = [key for key in _KEYS_OF_THE_WHOLE if key in given and key not in skip]
    unknown = [key for key in given if key not in order and key not in skip]
    text = dumps({key: given[key] for key in (*order, *unknown)})
    _profile(_parse(text, path, str(path)))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


# ---- reading ---------------------------------------------------------------------------------------------


def _read(file: Path | Traversable, shown: str, chain: tuple[Source, ...] = ()) -> Merged:
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors mark their files
    except UnicodeDecodeError as error:
        raise ProfileError("is not UTF-8 text", path=shown, hint="save it as UTF-8") from error
    except OSError as error:
        if chain:
            raise _no_parent(chain, f"{shown!r} cannot be read: {error.strerror}", "correct the path") from error
        hint = "check the path; `onnxcompress profiles list` names the profiles there are"
        raise ProfileError(f"cannot be read: {error.strerror}", path=shown, hint=hint) from error
    return _parse(text, file, shown, chain)


def _parse(text: str, file: Path | Traversable, shown: str, chain: tuple[Source, ...] = ()) -> Merged:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text, shown) from error
    except RecursionError as error:
        hint = "profiles are flat: tables of numbers and text"
        raise ProfileError("arrays or tables are nested too deeply", path=shown, hint=hint) from error
    source = Source(file, shown, text, data)
    chain = (*chain, source)
    _check_version(source)
    merged = _parent(source, chain) if "extends" in data else Merged(chain)
    merge(source, merged)
    return merged


def _check_version(source: Source) -> None:
    version = source.data.get("schema")
    if version is None:
        hint = "write schema = 2 in the first line"
        raise ProfileError("key 'schema' is missing", path=source.shown, hint=hint)
    if version not in (1, 2) or isinstance(version, (bool, float)):
        message = f"schema is {version!r}; this version of onnxcompress reads 2 (and 1, which is a part of it)"
        hint = "write schema = 2, or install a newer onnxcompress if the file was made by one"
        raise ProfileError(message, path=source.shown, line=source.line(("schema",)), hint=hint)


def _parent(source: Source, chain: tuple[Source, ...]) -> Merged:
    """What a file extends, read and merged."""
    named = source.data["extends"]
    line = source.line(("extends",))
    if not isinstance(named, str) or not named:
        hint = "give a name of `onnxcompress profiles list`, or a path relative to this file"
        raise ProfileError(f"extends: should be a string, not {named!r}", path=source.shown, line=line, hint=hint)
    file: Path | Traversable
    if _is_path(named):
        folder = source.file.parent if isinstance(source.file, Path) else Path()
        file, shown = folder / named, str(folder / named)
    else:
        available = _available()
        if named not in available:
            raise _no_parent(chain, f"no hardware profile is called {named!r}", suggest(named, available))
        file, shown = available[named], _shown(available[named])
    identity = str(file.resolve()) if isinstance(file, Path) else shown
    if any(identity == earlier.identity for earlier in chain):
        circle = " -> ".join([*(s.name for s in chain), named])
        hint = "take one 'extends' out; a profile of your own needs another name than the one it extends"
        raise ProfileError(f"extends goes in a circle: {circle}", path=source.shown, line=line, hint=hint)
    return _read(file, shown, chain)


def _no_parent(chain: tuple[Source, ...], problem: str, hint: str) -> ProfileError:
    source = chain[-1]
    names = " -> ".join([*(s.name for s in chain), str(source.data["extends"])])
    return ProfileError(f"extends: {problem} ({names})", path=source.shown, line=source.line(("extends",)), hint=hint)


# ---- checking --------------------------------------------------------------------------------------------


def _profile(merged: Merged) -> Profile:
    """The profile of merged tables."""
    if "lineage" in merged.data:
        raise merged.error(("lineage",), "unknown key 'lineage'", "take it out; it follows from 'extends'")
    lineage = [source.name for source in merged.sources[1:]]
    try:
        profile = Profile.model_validate({**merged.data, "lineage": lineage})
    except ValidationError as error:
        raise _schema_error(error, merged) from error
    _check_kernels(profile, merged)
    _check_unverified(profile, merged)
    return profile


def _check_kernels(profile: Profile, merged: Merged) -> None:
    seen: dict[tuple[str, str, str], int] = {}
    for index, kernel in enumerate(profile.kernels_):
        key = (kernel.kind, kernel.precision, kernel.on)
        if key in seen:
            _, first = merged.locate(("kernel", seen[key]))
            message = f"kernel {kernel.kind!r} at {kernel.precision} is given twice, first in line {first}"
            raise merged.error(("kernel", index), message, "take one of them out")
        seen[key] = index
    precision = "u8s8" if profile.quantization.required else "f32"
    for kind in _NEEDED:
        if not any(key[:2] == (kind, precision) for key in seen):
            message = f"no kernel of kind {kind!r} at {precision}, which every model may need"
            hint = f'add a [[kernel]] with kind = "{kind}" and precision = "{precision}"'
            raise ProfileError(message, path=merged.sources[0].shown, hint=hint)


def _check_unverified(profile: Profile, merged: Merged) -> None:
    where: Where = ("provenance", "unverified")
    for entry in profile.provenance.unverified:
        table, _, key = entry.partition(":")[0].strip().partition(".")
        known = _KEYS_OF_THE_WHOLE if table not in TABLES else _keys((table,))
        if table == "kernel":  # "kernel.Conv" or "kernel.Conv.u8s8"
            known = [name for k in profile.kernels_ for name in (k.kind, f"{k.kind}.{k.precision}")]
        wrong = table if table not in _KEYS_OF_THE_WHOLE else key
        if table in _KEYS_OF_THE_WHOLE and (not key or key in known or table in ("cache", "fusion")):
            continue
        message = f"unverified: {entry!r} starts with no key of a profile"
        shown, line = merged.locate(where)
        source = next(s for s in merged.sources if s.shown == shown)
        line = _line_with(source.text, line, entry)
        raise ProfileError(message, path=shown, line=line, hint=suggest(wrong, known))


def _line_with(text: str, first: int | None, entry: str) -> int | None:
    """Line of an entry of an array that may go over several lines."""
    if first is None:
        return None
    found = (n for n, line in enumerate(text.split("\n"), 1) if n >= first and entry in line)
    return next(found, first)


# ---- errors ----------------------------------------------------------------------------------------------


def _syntax_error(message: str, text: str, shown: str) -> ProfileError:
    found = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$", message)
    line = None if found is None else int(found[1]) if found[1] else text.rstrip().count("\n") + 1
    message = f"not TOML: {message[: found.start()] if found else message}"
    return ProfileError(message, path=shown, line=line, hint="correct this line; strings need quotes")


def _schema_error(error: ValidationError, merged: Merged) -> ProfileError:
    order = {source.shown: rank for rank, source in enumerate(merged.sources)}
    problems = sorted(
        (_problem(dict(e), merged) for e in error.errors(include_url=False)),
        key=lambda p: (order[p[0]], p[1] is None, p[1] or 0),
    )
    shown, line, message, hint = problems[0]
    more = "".join(f"\n{file}:{'' if ln is None else f'{ln}:'} {m}" for file, ln, m, _ in problems[1:])
    return ProfileError(message + more, path=shown, line=line, hint=hint)


def _problem(error: dict[str, Any], merged: Merged) -> tuple[str, int | None, str, str]:
    """File, line, message and hint for one complaint of pydantic."""
    where: Where = error["loc"]
    file, line = merged.locate(where)
    shown = ".".join(str(p) for p in where if not isinstance(p, int))
    see = "docs/profiles.md says what it means"
    match error["type"]:
        case "extra_forbidden":
            return file, line, f"unknown key {shown!r}", suggest(str(where[-1]), _keys(where[:-1]))
        case "missing":
            whole = len(where) == 1
            table = f"[{where[0]}]" if where[0] not in ARRAYS else f"[[{where[0]}]]"
            hint = (f"add {table}" if shown in TABLES else f"add {shown} = ...") if whole else f"add it to {table}"
            message = f"key {shown!r} is missing"
            return (merged.sources[0].shown, None, message, f"{hint}; {see}") if whole else (file, line, message, hint)
        case "value_error":
            message, _, hint = str(error["ctx"]["error"]).partition("; ")
            return file, line, message, hint or see
        case "literal_error" if isinstance(error.get("input"), str):
            known = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
            return file, line, f"{shown}: there is no {error['input']!r}", suggest(error["input"], known)
        case _:
            given = error.get("input")
            if isinstance(given, list | dict):
                given = f"{len(given)} entries"
            given = repr(given) if len(repr(given)) <= 80 else f"{repr(given)[:60]}..."
            message = str(error["msg"])[0].lower() + str(error["msg"])[1:]
            return file, line, f"{shown}: {message}, not {given}" if shown else message, f"correct it; {see}"


def _keys(where: Where) -> list[str]:
    """Keys a table may have."""
    names = [p for p in where if isinstance(p, str)]
    if not names:
        return _KEYS_OF_THE_WHOLE
    return [f.alias or name for name, f in TABLES[names[0]].model_fields.items()] if names[0] in TABLES else []
