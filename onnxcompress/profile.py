"""Hardware profiles: what a device can run and what each kernel costs on it, as TOML.

A profile is data anyone can copy, edit or fit to a device of their own
(``benchmarks/measure_kernels.py``). It says where every number comes from. The price of a node is
linear in its work and no coefficient is negative, so more work never costs less::

    t = ns_fixed + ns_per_mac * macs + ns_per_element * elements + ns_per_weight * weights
        + ns_per_patch * patches

with ``macs`` counted at channels rounded up to ``channel_block``, the whole times ``misaligned_factor``
where a channel count is no multiple of ``aligned_to``; and ``memory`` prices weights that have to come
from memory because the model as a whole does not fit into the cache. Names are looked up as a file, then in the
folders of ``ONNXCOMPRESS_PROFILES``, then in the user's configuration folder, then among those
shipped.
"""

from __future__ import annotations

import datetime
import itertools
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from onnxcompress.errors import ProfileError, UnknownProfileError, suggest
from onnxcompress.target import Target
from onnxcompress.work import FAMILY, KINDS, kinds_of

__all__ = [
    "PRECISIONS",
    "Device",
    "Energy",
    "Fusion",
    "Kernel",
    "Memory",
    "Profile",
    "Provenance",
    "list_profiles",
    "load_profile",
]

PRECISIONS = ("f32", "u8s8", "dynamic")
"""Ways to run a node: float; integers between QuantizeLinear and DequantizeLinear (u8 activations, s8
weights); float activations quantized on the fly (DynamicQuantizeLinear, or DynamicQuantizeLSTM)."""

Nanoseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Precision = Literal["f32", "u8s8", "dynamic"]
_LIST = Field(strict=False)  # a TOML array, kept as a tuple


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Device(_Table):
    """The hardware.

    Attributes:
        cpu: processor, by its public name.
        cores: physical cores the device has (kernels are priced on one thread).
        frequency_ghz: clock the numbers hold for.
        isa: instruction set extensions that matter, as the operating system names them.
        host: the profile is of the kind of machine people run the optimizer on, so latency is
            measured where the processor here has ``isa``.
    """

    cpu: str
    cores: int = Field(ge=1)
    frequency_ghz: float = Field(gt=0)
    isa: Annotated[tuple[str, ...], _LIST] = ()
    host: bool = False

    def is_here(self) -> bool:
        """Whether this process runs on such a device, as far as the operating system tells."""
        if not self.host:
            return False
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
        except OSError:
            return False
        return set(self.isa) <= set(flags)


class Provenance(_Table):
    """How the numbers were obtained and how far they can be trusted.

    Attributes:
        status: ``measured`` on the device; ``emulated-ratios``: absolute speed fitted to published
            milliseconds, ratios between precisions from instruction counts; ``published``: derived
            from published measurements; ``spec``: from a data sheet.
        method: what was done.
        source: where the underlying numbers are from.
        date: when.
        error: mean relative error on work the fit had not seen, if that was measured.
        notes: what is not validated.
    """

    status: Literal["measured", "emulated-ratios", "published", "spec"]
    method: str
    source: str
    date: datetime.date
    error: float | None = Field(default=None, ge=0)
    notes: str = ""


class Runtime(_Table):
    """The runtime the numbers hold for."""

    name: str
    version: str
    threads: int = Field(ge=1)
    contrib_ops: bool


class Quantization(_Table):
    """What quantized models must look like; see :class:`~onnxcompress.target.Target`."""

    activation: Literal["u8", "s8"]
    weight_bits: int = Field(ge=2, le=8)
    per_channel: bool
    channel_multiple: int = Field(ge=1)


class Overhead(_Table):
    """Cost of running at all: per call of the model and per node that is dispatched."""

    ns_per_run: Nanoseconds
    ns_per_node: Nanoseconds


class Memory(_Table):
    """What weights cost that do not stay in the cache from one run to the next.

    Attributes:
        cache_bytes: weights that together take no more than this stay; twice as many all come from memory.
        ns_per_byte: for every byte that comes from memory, on top of the kernel.
        source: where the numbers come from.
    """

    cache_bytes: int = Field(ge=0)
    ns_per_byte: Nanoseconds
    source: str = ""


class Kernel(_Table):
    """Price of a kernel kind, or of one operator type, at a precision.

    Attributes:
        kind: a kind of :data:`~onnxcompress.work.KINDS`, or an operator type ("HardSwish"), which
            then goes before its family.
        precision: one of :data:`PRECISIONS`.
        on: ``maps``: for feature maps (4-D and more) only.
        ns_fixed: per node, besides ``overhead.ns_per_node``.
        ns_per_mac: per multiply-accumulate.
        ns_per_element: per activation element read or written.
        ns_per_weight: per constant element read.
        ns_per_patch: per element of the unfolded input (what one output channel reads).
        channel_block: channels are rounded up to this multiple when MACs are counted.
        aligned_to: channel counts that are no multiple of this fall off the fast path ...
        misaligned_factor: ... and cost this many times as much.
        fit_error: mean relative error of the fit on its own points.
        source: where the numbers come from; the file's ``provenance.source`` if empty.
    """

    kind: str
    precision: Precision
    on: Literal["any", "maps"] = "any"
    ns_fixed: Nanoseconds = 0.0
    ns_per_mac: Nanoseconds = 0.0
    ns_per_element: Nanoseconds = 0.0
    ns_per_weight: Nanoseconds = 0.0
    ns_per_patch: Nanoseconds = 0.0
    channel_block: int = Field(default=1, ge=1)
    aligned_to: int = Field(default=1, ge=1)
    misaligned_factor: float = Field(default=1.0, ge=1)
    fit_error: float | None = Field(default=None, ge=0)
    source: str = ""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind not in KINDS and not re.fullmatch(r"[A-Z]\w*", kind):
            raise ValueError(f"{kind!r} is neither a kernel kind nor an operator type; {suggest(kind, KINDS)}")
        return kind


class Fusion(_Table):
    """Nodes that cost nothing because the runtime makes them part of a neighbour.

    Attributes:
        op: operator type of the neighbour.
        absorbs: operator types it takes in, if nothing else reads the value between them.
        side: ``after``: those that read its output; ``before``: those that make its first input.
        precision: how the neighbour runs.
        constant_operand: only if all other inputs of the absorbed node are constant.
    """

    op: str
    absorbs: Annotated[tuple[str, ...], _LIST] = Field(min_length=1)
    side: Literal["after", "before"] = "after"
    precision: Precision = "f32"
    constant_operand: bool = False


class Energy(_Table):
    """Energy of a run: the time it takes times the power drawn meanwhile.

    Attributes:
        active_w: watts the device draws while one thread runs a model.
        source: where the number comes from.
    """

    active_w: float = Field(gt=0, allow_inf_nan=False)
    source: str


class Profile(_Table):
    """A device as a cost model sees it. Load one with :func:`load_profile`."""

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    device: Device
    provenance: Provenance
    runtime: Runtime
    quantization: Quantization
    overhead: Overhead
    memory: Memory | None = None
    kernels: Annotated[tuple[Kernel, ...], _LIST] = Field(alias="kernel", min_length=1)
    fusions: Annotated[tuple[Fusion, ...], _LIST] = Field(default=(), alias="fusion")
    energy: Energy | None = None

    @cached_property
    def _table(self) -> dict[tuple[str, str, str], Kernel]:
        return {(k.kind, k.precision, k.on): k for k in self.kernels}

    def kernel(self, kind: str, precision: str, *, op_type: str = "", maps: bool = False) -> Kernel | None:
        """The kernel that prices a node; None if the runtime cannot run it at this precision.

        An entry for the operator type goes before one for its kind, one for feature maps before one
        for anything. ``resize_linear`` has no family to fall back on.

        Args:
            kind: kernel kind.
            precision: one of :data:`PRECISIONS`.
            op_type: operator type of the node.
            maps: it works on feature maps.
        """
        names = [kind] if kind == "resize_linear" else [op_type, kind]
        for name in names:
            for on in ("maps", "any") if maps else ("any",):
                found = self._table.get((name, precision, on))
                if found is not None:
                    return found
        return None

    def target(self) -> Target:
        """What passes may know."""
        ops = {*FAMILY, "Conv", "Gemm", "MatMul", *(k.kind for k in self.kernels if k.kind not in KINDS)}
        runs: set[tuple[str, str]] = {(k.kind, k.precision) for k in self.kernels}
        for op, precision in itertools.product(ops, PRECISIONS):
            kinds = itertools.product(kinds_of(op), (False, True))
            if any(self.kernel(kind, precision, op_type=op, maps=maps) for kind, maps in kinds):
                runs.add((op, precision))
        return Target(
            name=self.name,
            activation=self.quantization.activation,
            weight_bits=self.quantization.weight_bits,
            per_channel=self.quantization.per_channel,
            channel_multiple=self.quantization.channel_multiple,
            contrib_ops=self.runtime.contrib_ops,
            kernels=frozenset(runs),
        )


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
    if isinstance(name_or_path, Path) or text.endswith(".toml") or os.sep in text or "/" in text:
        return _read(Path(text), text)
    available = _available()
    if text not in available:
        raise UnknownProfileError(text, available)
    file = available[text]
    return _read(file, str(file) if isinstance(file, Path) else file.name)


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


# ---- reading ---------------------------------------------------------------------------------------------


def _read(file: Path | Traversable, shown: str) -> Profile:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError("is not UTF-8 text", path=shown) from error
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}", path=shown) from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text, shown) from error
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        raise _schema_error(error, data, text, shown) from error
    _check_kernels(profile, text, shown)
    return profile


def _check_kernels(profile: Profile, text: str, shown: str) -> None:
    seen: dict[tuple[str, str, str], int] = {}
    for index, kernel in enumerate(profile.kernels):
        key = (kernel.kind, kernel.precision, kernel.on)
        if key in seen:
            first = _line_of(text, ("kernel", seen[key]))
            raise ProfileError(
                f"kernel {kernel.kind!r} at {kernel.precision} is given twice, first in line {first}",
                path=shown,
                line=_line_of(text, ("kernel", index)),
            )
        seen[key] = index
    for kind in ("elementwise", "move", "free", "conv", "matmul"):
        if profile.kernel(kind, "f32") is None:
            raise ProfileError(f"no kernel of kind {kind!r} at f32, which every model may need", path=shown)


def _syntax_error(message: str, text: str, shown: str) -> ProfileError:
    found = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$", message)
    line = None if found is None else int(found[1]) if found[1] else len(text.splitlines())
    return ProfileError(f"not TOML: {message[: found.start()] if found else message}", path=shown, line=line)


def _schema_error(error: ValidationError, data: dict[str, Any], text: str, shown: str) -> ProfileError:
    problems = sorted(
        (_problem(dict(e), data, text) for e in error.errors(include_url=False)),
        key=lambda p: (p[0] is None, p[0] or 0),
    )
    line, message, hint = problems[0]
    more = "".join(f"\n{shown}:{'' if ln is None else f'{ln}:'} {m}" for ln, m, _ in problems[1:])
    return ProfileError(message + more, path=shown, line=line, hint=hint)


def _problem(error: dict[str, Any], data: dict[str, Any], text: str) -> tuple[int | None, str, str]:
    """Line, message and hint for one complaint of pydantic."""
    where: tuple[str | int, ...] = error["loc"]
    line = _line_of(text, where)
    shown = ".".join(str(p) for p in where if not isinstance(p, int))
    match error["type"]:
        case "extra_forbidden":
            known = _keys(where[:-1])
            return line, f"unknown key {shown!r}", suggest(str(where[-1]), known)
        case "missing":
            return _line_of(text, where[:-1]) if len(where) > 1 else None, f"key {shown!r} is missing", ""
        case "value_error":
            return line, str(error["ctx"]["error"]), ""
        case _:
            given = error.get("input")
            if isinstance(given, list | dict):
                given = f"{len(given)} entries"
            message = str(error["msg"])[0].lower() + str(error["msg"])[1:]
            return line, f"{shown}: {message}, not {given!r}" if shown else message, ""


def _keys(where: Iterable[str | int]) -> list[str]:
    """Keys a table may have."""
    tables: dict[str, type[_Table]] = {
        "device": Device, "provenance": Provenance, "runtime": Runtime, "quantization": Quantization,
        "overhead": Overhead, "memory": Memory, "kernel": Kernel, "fusion": Fusion, "energy": Energy,
    }  # fmt: skip
    names = [p for p in where if isinstance(p, str)]
    table = tables.get(names[0], Profile) if names else Profile
    return [field.alias or name for name, field in table.model_fields.items()]


_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.\"-]+)\s*\]")
_KEY = re.compile(r"\s*[\"']?([\w-]+)[\"']?\s*[=.]")


def _line_of(text: str, where: tuple[str | int, ...]) -> int | None:
    """1-based line of a key (``("kernel", 3, "ns_per_mac")``), or of its table if it is not there.

    tomllib tells no positions. Profiles are flat (tables, arrays of tables, keys), so scanning for
    headers and keys finds the line; text inside multi-line strings is skipped.
    """
    best: tuple[int, int] | None = None  # (path parts matched, line)
    here: tuple[str | int, ...] = ()
    path: tuple[str | int, ...]
    counts: dict[str, int] = {}
    quote = ""
    for number, line in enumerate(text.splitlines(), 1):
        if quote:
            quote = "" if quote in line else quote
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
        if path == where[: len(path)] and (best is None or len(path) > best[0]):
            best = (len(path), number)
        quote = next((q for q in ('"""', "'''") if line.count(q) % 2), "")
    return None if best is None else best[1]
