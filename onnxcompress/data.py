"""Where calibration feeds come from: files, folders, images, Python code, or made up.

Every source can be read any number of times, gives the same feeds each time, and holds one sample
in memory: ``.npy`` and ``.npz`` members are read sample by sample (compressed ones too), folders
file by file, and whatever Python code yields is called once and kept in a :class:`Spool`, on disk
once it is large. A feed is checked against the model's inputs before anyone sees it.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import DataError, suggest
from onnxcompress.images import IMAGE_SUFFIXES, Preprocess, read_image

__all__ = ["Feed", "InputSpec", "Source", "Spool", "input_specs", "open_data"]

Array = npt.NDArray[Any]
Feed = dict[str, Array]

SPOOL_SAMPLES = 4096
"""Python code that yields more feeds than this is cut off here, unless a limit says otherwise."""
SYNTHETIC_SAMPLES = 16
"""Feeds made up when there is no data and no limit."""

Data = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | None


@dataclass(frozen=True)
class InputSpec:
    """What the model says about one input.

    Attributes:
        name: of the input.
        dtype: numpy type; None where numpy has none or the input is no tensor.
        shape: an int per static axis, a name or None per dynamic one; None if the rank is unknown.
        text: the input holds strings.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
    text: bool = False


def input_specs(model: ir.Model) -> dict[str, InputSpec]:
    """The model's inputs by name, in order."""
    return {str(v.name): _spec(v) for v in model.graph.inputs}


_FEEDABLE = {
    ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
}  # fmt: skip


def _spec(value: ir.Value) -> InputSpec:
    shape = None
    if value.shape is not None:
        shape = tuple(d if isinstance(d, int) else d.value for d in value.shape.dims)
    dtype = value.dtype if isinstance(value.type, ir.TensorType) else None
    numpy_type = dtype.numpy() if dtype in _FEEDABLE and dtype is not None else None
    return InputSpec(str(value.name), numpy_type, shape, dtype == ir.DataType.STRING)


# --- the source --------------------------------------------------------------------------------


class Origin(Protocol):
    """Samples by number. ``read`` gets ascending numbers and yields one raw feed for each."""

    def __len__(self) -> int: ...

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]: ...


class Source:
    """Checked feeds, as often as wanted.

    Attributes:
        description: where they come from, for the report.
        synthetic: they are made up and say nothing about real inputs.
        notes: conversions that were made (``input 'x': float64 was cast to float32``).
    """

    def __init__(
        self,
        origin: Origin,
        specs: Mapping[str, InputSpec],
        description: str,
        *,
        samples: Sequence[int] | None = None,
        synthetic: bool = False,
        notes: dict[str, None] | None = None,
    ) -> None:
        self._origin = origin
        self._specs = dict(specs)
        self._samples = tuple(range(len(origin)) if samples is None else samples)
        self._notes: dict[str, None] = {} if notes is None else notes
        self.description = description
        self.synthetic = synthetic
        if not self._samples:
            raise DataError(f"{description} holds no samples", hint="calibration needs at least one")

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Feed]:
        for sample, raw in zip(self._samples, self._origin.read(self._samples), strict=True):
            yield _checked(raw, self._specs, sample, self._notes)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    @property
    def warning(self) -> str:
        """What must be said out loud about this data; empty if nothing."""
        if not self.synthetic:
            return ""
        return (
            "no calibration data was given: inputs are MADE UP from the declared shapes and types "
            f"({self.description}). Value ranges and accuracy measured on them say little about real "
            "inputs; give real samples"
        )

    def first(self) -> Feed:
        """The first feed."""
        return next(iter(self._with(self._samples[:1])))

    def take(self, count: int) -> Source:
        """At most ``count`` samples, spread evenly over all of them."""
        return self._with(tuple(self._samples[i] for i in _spread(len(self._samples), count)))

    def split(self, holdout_fraction: float = 0.25) -> tuple[Source, Source]:
        """Disjoint parts: one to calibrate on, one to check on.

        Every k-th sample is held out, k = 1 / ``holdout_fraction``; each part has at least one. A
        single sample is in both, and a note says so.
        """
        if not 0 < holdout_fraction < 1:
            raise DataError(f"holdout_fraction is {holdout_fraction}; it must be between 0 and 1")
        count = len(self._samples)
        if count == 1:
            self._notes["there is one sample, so the result is checked on the data it was calibrated on"] = None
            return self, self
        step = max(2, round(1 / holdout_fraction))
        held = set(self._samples[step - 1 :: step] or self._samples[-1:])
        rest = tuple(s for s in self._samples if s not in held)
        return self._with(rest), self._with(tuple(s for s in self._samples if s in held))

    def cached(self) -> Source:
        """The same feeds, read and checked once: in memory up to 64 MB, on disk beyond."""
        if isinstance(self._origin, Spool):
            return self
        spool = Spool()
        for feed in self:
            spool.append(feed)
        return Source(spool, self._specs, self.description, synthetic=self.synthetic, notes=self._notes)

    def _with(self, samples: Sequence[int]) -> Source:
        return Source(
            self._origin,
            self._specs,
            self.description,
            samples=samples,
            synthetic=self.synthetic,
            notes=self._notes,
        )


def open_data(
    source: Data, model: ir.Model, *, preprocess: str | None = None, limit: int | None = None, seed: int = 0
) -> Source:
    """Calibration data of any kind as a :class:`Source`.

    Args:
        source: one of

            - a ``.npz`` file with one array per input, samples along the first axis (or a ``.npy``
              file, or one array of any name, for a model with one input);
            - a folder of ``.npz`` files, each one feed, or of ``.npy`` files for one input;
            - a folder of images, with ``preprocess``;
            - ``"module:function"``, called without arguments, giving feed dicts; the current folder
              is on the path;
            - an iterable of feed dicts, or a callable that gives one;
            - None: feeds made up from the graph's declared shapes and types.
        model: whose inputs they feed.
        preprocess: for images, see :class:`~onnxcompress.images.Preprocess`.
        limit: at most so many samples, spread evenly (the first ones, of Python code).
        seed: for made-up feeds.

    Raises:
        DataError: nothing there, unreadable, empty, or not fitting the model's inputs.
    """
    specs = input_specs(model)
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit} samples", hint="calibration needs at least one")
    if isinstance(source, Source):
        return source.take(limit) if limit is not None else source
    if source is None:
        made_up = _Synthetic(model, specs, limit or SYNTHETIC_SAMPLES, seed)
        return Source(made_up, specs, made_up.description, synthetic=True)
    if isinstance(source, (str, os.PathLike)):
        opened = _open_path(os.fspath(source), specs, preprocess, limit)
    elif preprocess is not None:
        raise DataError("preprocess= is for a folder of images", hint="apply it in the Python code that yields feeds")
    elif isinstance(source, (list, tuple)):
        opened = Source(_Listed(source), specs, f"{len(source)} feeds given in Python")
    elif callable(source) or isinstance(source, Iterable):
        opened = _spooled(source, specs, getattr(source, "__qualname__", type(source).__name__), limit)
    else:
        raise DataError(
            f"a {type(source).__name__} is no calibration data", hint="give a path or an iterable of feed dicts"
        )
    return opened.take(limit) if limit is not None else opened


def _open_path(text: str, specs: Mapping[str, InputSpec], preprocess: str | None, limit: int | None) -> Source:
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, specs, preprocess)
    if path.is_file():
        if preprocess is not None:
            raise DataError(f"{path} is a file; preprocess= is for a folder of images")
        if path.suffix.lower() in {".npz", ".npy"}:
            return Source(_Stacked(path, specs), specs, str(path))
        raise DataError(f"{path} is not of a known kind", hint=".npz, .npy, a folder, or module:function")
    module, colon, function = text.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return _spooled(_imported(module, function), specs, text, limit)
    raise DataError(
        f"there is no file or folder {text!r}",
        hint="give a .npz, a folder of .npz, .npy or images, or module:function",
    )


def _open_folder(path: Path, specs: Mapping[str, InputSpec], preprocess: str | None) -> Source:
    files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    kinds = {
        ".npz files": [f for f in files if f.suffix.lower() == ".npz"],
        ".npy files": [f for f in files if f.suffix.lower() == ".npy"],
        "images": [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES],
    }
    found = {kind: f for kind, f in kinds.items() if f}
    if not found:
        raise DataError(f"{path} holds no .npz, .npy or image files", hint=f"{len(files)} other files are there")
    if len(found) > 1:
        raise DataError(f"{path} holds {' and '.join(found)}", hint="keep one kind in a folder")
    ((kind, members),) = found.items()
    description = f"{len(members)} {kind} in {path}"
    if kind == "images":
        spec = _only(specs, kind)
        how = Preprocess.parse(preprocess, spec.shape, spec.dtype, name=spec.name)
        return Source(_Images(members, spec, how), specs, f"{description}, {how}")
    if preprocess is not None:
        raise DataError(f"{path} holds {kind}; preprocess= is for images")
    return Source(_Files(members, specs), specs, description)


def _only(specs: Mapping[str, InputSpec], kind: str) -> InputSpec:
    if len(specs) != 1:
        raise DataError(
            f"{kind} feed one input, but the model has {len(specs)}: {', '.join(specs)}",
            hint="give .npz files with an array per input",
        )
    return next(iter(specs.values()))


def _imported(module: str, function: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise DataError(f"module {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    if not hasattr(loaded, function):
        public = [name for name in vars(loaded) if callable(getattr(loaded, name)) and not name.startswith("_")]
        raise DataError(f"module {module!r} has no {function!r}", hint=suggest(function, public))
    return getattr(loaded, function)


def _spooled(source: Any, specs: Mapping[str, InputSpec], description: str, limit: int | None) -> Source:
    """Calls user code once and keeps what it gives, so that every later reading sees the same."""
    spool, notes = Spool(), dict[str, None]()
    stop = limit or SPOOL_SAMPLES
    try:
        feeds: Any = source() if callable(source) else source
        if isinstance(feeds, Mapping) or not isinstance(feeds, Iterable):
            raise DataError(
                f"{description} gives a {type(feeds).__name__}", hint="it must give feed dicts, one a sample"
            )
        for sample, raw in enumerate(feeds):
            if sample >= stop:
                if limit is None:
                    notes[f"{description} gives more than {stop} samples; the first {stop} are used"] = None
                break
            spool.append(_checked(raw, specs, sample, notes))
    except DataError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise DataError(f"{description} raised {type(error).__name__}: {error}", sample=len(spool)) from error
    return Source(spool, specs, f"{len(spool)} feeds from {description}", notes=notes)


def _spread(count: int, wanted: int) -> list[int]:
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]


# --- checking ----------------------------------------------------------------------------------


def _checked(raw: Any, specs: Mapping[str, InputSpec], sample: int, notes: dict[str, None]) -> Feed:
    if not isinstance(raw, Mapping):
        raise DataError(f"is a {type(raw).__name__}, not a dict of arrays", sample=sample)
    for name in raw:
        if name not in specs:
            raise DataError(
                "the model has no such input", sample=sample, input=str(name), hint=suggest(str(name), specs)
            )
    missing = [name for name in specs if name not in raw]
    if missing:
        raise DataError("is missing", sample=sample, input=missing[0], hint=f"the model reads {', '.join(specs)}")
    return {name: _fitted(raw[name], spec, sample, notes) for name, spec in specs.items()}


def _fitted(value: Any, spec: InputSpec, sample: int, notes: dict[str, None]) -> Any:
    if spec.dtype is None and not spec.text:
        return value  # a sequence, an optional or a type numpy lacks: onnxruntime is the judge
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"cannot be made an array: {error}", sample=sample, input=spec.name) from error
    if array.dtype == object and not spec.text:
        raise DataError("holds Python objects, or rows of unequal length", sample=sample, input=spec.name)
    array = _typed(array, spec, sample, notes)
    _check_shape(array.shape, spec, sample)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        what = "NaN" if np.isnan(array).any() else "infinity"
        raise DataError(f"holds {what}", sample=sample, input=spec.name, hint="remove or repair this sample")
    return array if array.flags.c_contiguous else array.copy(order="C")


def _typed(array: Array, spec: InputSpec, sample: int, notes: dict[str, None]) -> Array:
    if spec.text:
        if array.dtype.kind not in "UOST":
            raise DataError(f"is {array.dtype}, the model reads text", sample=sample, input=spec.name)
        return array.astype(object)
    wanted = spec.dtype
    if wanted is None or array.dtype == wanted:
        return array
    hint = f"convert it to {wanted}, with the model's own preprocessing"
    same_kind = array.dtype.kind == wanted.kind or {array.dtype.kind, wanted.kind} == {"i", "u"}
    if not same_kind:
        raise DataError(f"is {array.dtype}, the model reads {wanted}", sample=sample, input=spec.name, hint=hint)
    with np.errstate(over="ignore"):
        cast = array.astype(wanted)
    if wanted.kind == "f":
        kept = bool(np.array_equal(np.isfinite(array), np.isfinite(cast)))
    else:
        kept = bool(np.array_equal(array, cast))
    if not kept:
        raise DataError(f"is {array.dtype} with values {wanted} cannot hold", sample=sample, input=spec.name, hint=hint)
    notes[f"input {spec.name!r}: {array.dtype} was cast to {wanted}"] = None
    return cast


def _check_shape(shape: tuple[int, ...], spec: InputSpec, sample: int | None) -> None:
    if spec.shape is None:
        return
    wanted = "x".join("?" if not isinstance(d, int) else str(d) for d in spec.shape) or "a scalar"
    given = "x".join(map(str, shape)) or "a scalar"
    if len(shape) != len(spec.shape):
        raise DataError(f"is {given}, the model reads {wanted}", sample=sample, input=spec.name)
    for axis, (have, want) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(want, int) and have != want:
            raise DataError(
                f"is {given}, the model reads {wanted}: axis {axis} must be {want}", sample=sample, input=spec.name
            )
        if have == 0:
            raise DataError(f"is {given}: axis {axis} is empty", sample=sample, input=spec.name)


def _with_batch(array: Array, spec: InputSpec) -> Array:
    """Adds the batch axis where only that is missing."""
    if spec.shape is not None and array.ndim == len(spec.shape) - 1 and spec.shape[0] in (1, None):
        return array[None]
    if spec.shape is not None and array.ndim == len(spec.shape) - 1 and isinstance(spec.shape[0], str):
        return array[None]
    return array


# --- origins -----------------------------------------------------------------------------------


class Spool:
    """A growing list of feeds (or outputs): in memory up to ``limit`` bytes, on disk beyond.

    The files are deleted with the object.
    """

    def __init__(self, limit: int = 64 << 20) -> None:
        self._limit = limit
        self._used = 0
        self._memory: list[dict[str, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._on_disk = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of arrays held in memory; never above the limit."""
        return self._used

    def __len__(self) -> int:
        return len(self._memory) + self._on_disk

    def append(self, feed: Mapping[str, Any]) -> None:
        size = sum(int(getattr(a, "nbytes", 0)) for a in feed.values())
        if self._folder is None and self._used + size <= self._limit:
            self._memory.append({name: _owned(a) for name, a in feed.items()})
            self._used += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="onnxcompress-feeds-", ignore_cleanup_errors=True)
        with (Path(self._folder.name) / f"{self._on_disk}").open("wb") as file:
            for array in feed.values():
                np.save(file, np.asarray(array), allow_pickle=True)
        self._names = tuple(feed)
        self._on_disk += 1

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            if sample < len(self._memory):
                yield dict(self._memory[sample])
            else:
                yield self._load(sample - len(self._memory))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self.read(range(len(self)))

    def _load(self, index: int) -> dict[str, Any]:
        if self._folder is None:
            raise IndexError(index)
        with (Path(self._folder.name) / f"{index}").open("rb") as file:
            return {name: np.load(file, allow_pickle=True) for name in self._names}  # our own files


def _owned(value: Any) -> Any:
    """A private copy: a generator may reuse its buffer, and onnxruntime's outputs keep their arena."""
    return np.array(value, copy=True, order="C") if isinstance(value, np.ndarray) else value


class _Listed:
    def __init__(self, feeds: Sequence[Mapping[str, Any]]) -> None:
        self._feeds = feeds

    def __len__(self) -> int:
        return len(self._feeds)

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            yield self._feeds[sample]


class _Files:
    """A file per feed."""

    def __init__(self, files: Sequence[Path], specs: Mapping[str, InputSpec]) -> None:
        self._files, self._specs = files, specs
        if files[0].suffix.lower() == ".npy":
            _only(specs, ".npy files")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            with _reading(self._files[sample], sample):
                loaded = np.load(self._files[sample], allow_pickle=False)
                raw = {next(iter(self._specs)): loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
                if not isinstance(loaded, np.ndarray):
                    loaded.close()
            raw = _named(raw, self._specs)
            yield {n: _with_batch(a, self._specs[n]) if n in self._specs else a for n, a in raw.items()}


class _Images:
    def __init__(self, files: Sequence[Path], spec: InputSpec, how: Preprocess) -> None:
        self._files, self._spec, self._how = files, spec, how

    def __len__(self) -> int:
        return len(self._files)

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            with _reading(self._files[sample], sample):
                image = read_image(self._files[sample], self._how)
            yield {self._spec.name: image}


@dataclass(frozen=True)
class _Member:
    """One array in a .npy or .npz, read from front to back, ``step`` rows of it a sample."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    keep_axis: bool
    step: int
    samples: int | None


class _Stacked:
    """Samples along the first axis of each array of one file; holds one sample in memory.

    An array with one axis more than the input gives ``array[i]``; with as many axes,
    ``array[i:i+1]`` (or as many rows as a static batch has). A scalar serves every sample. Arrays in
    Fortran order are read whole.
    """

    def __init__(self, path: Path, specs: Mapping[str, InputSpec]) -> None:
        self._path, self._specs = path, specs
        self._zipped = path.suffix.lower() == ".npz"
        with _reading(path, None):
            self._entries = self._find()
            headers = {name: self._header(name) for name in self._entries}
        self._members = [_member(name, *header, specs[name]) for name, header in headers.items()]
        counts = {m.name: m.samples for m in self._members if m.samples is not None}
        if len(set(counts.values())) > 1:
            raise DataError(
                f"{path}: arrays hold different numbers of samples: "
                + ", ".join(f"{n} {c}" for n, c in sorted(counts.items()))
            )
        self._count = next(iter(counts.values()), 1)

    def __len__(self) -> int:
        return self._count

    def _find(self) -> dict[str, str]:
        """Entry in the archive by input name; errors name what does not fit."""
        if not self._zipped:
            return {_only(self._specs, "a .npy file").name: ""}
        with zipfile.ZipFile(self._path) as archive:
            entries = {n.removesuffix(".npy"): n for n in archive.namelist() if n.endswith(".npy")}
        if len(entries) == 1 and len(self._specs) == 1:
            return dict(zip(self._specs, entries.values(), strict=True))
        for name in entries:
            if name not in self._specs:
                raise DataError(
                    f"{self._path}: the model has no such input", input=name, hint=suggest(name, self._specs)
                )
        for name in self._specs:
            if name not in entries:
                raise DataError(
                    f"{self._path}: is missing",
                    input=name,
                    hint=f"the file holds {', '.join(sorted(entries)) or 'nothing'}",
                )
        return {name: entries[name] for name in self._specs}

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        if not self._zipped:
            with self._path.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(self._path) as archive, archive.open(self._entries[name]) as member:
            yield member

    def _header(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        with self._opened(name) as file:
            return _npy_header(file)

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        with contextlib.ExitStack() as stack:
            with _reading(self._path, None):
                streams = [self._stream(m, stack.enter_context(self._opened(m.name)), samples) for m in self._members]
            for sample in samples:
                with _reading(self._path, sample):
                    raw = {m.name: next(s) for m, s in zip(self._members, streams, strict=True)}
                yield raw

    def _stream(self, member: _Member, file: IO[bytes], samples: Sequence[int]) -> Iterator[Array]:
        if member.dtype.hasobject:
            raise ValueError("it holds pickled Python objects")
        if member.samples is None or member.fortran:
            file_again = np.load(self._path, allow_pickle=False) if self._zipped else None
            whole = (
                file_again[self._entries[member.name].removesuffix(".npy")]
                if file_again is not None
                else np.load(self._path)
            )
            for sample in samples:
                yield (
                    whole
                    if member.samples is None
                    else _rows(whole[sample * member.step : (sample + 1) * member.step], member)
                )
            return
        _npy_header(file)
        row = math.prod(member.shape[1:])
        size = row * member.step * member.dtype.itemsize
        position = 0
        for sample in samples:
            _skip(file, (sample - position) * size)
            data = file.read(size)
            if len(data) != size:
                raise EOFError("it is cut off")
            position = sample + 1
            yield _rows(np.frombuffer(data, member.dtype).reshape(member.step, *member.shape[1:]), member)


def _rows(array: Array, member: _Member) -> Array:
    return array if member.keep_axis else array[0]


def _member(name: str, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any], spec: InputSpec) -> _Member:
    rank = None if spec.shape is None else len(spec.shape)
    if not shape:
        return _Member(name, shape, dtype, fortran, True, 1, None)
    if rank is not None and len(shape) == rank and spec.shape is not None:
        step = spec.shape[0] if isinstance(spec.shape[0], int) else 1
        return _Member(name, shape, dtype, fortran, True, step, shape[0] // step)
    if rank is not None and len(shape) != rank + 1:
        raise DataError(
            f"the array has {len(shape)} axes; {rank + 1} are expected (samples, then the input's {rank}), "
            f"or {rank} with samples along the batch axis",
            input=name,
        )
    return _Member(name, shape, dtype, fortran, False, 1, shape[0])


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _skip(file: IO[bytes], count: int) -> None:
    while count > 0:
        chunk = file.read(min(count, 1 << 20))
        if not chunk:
            raise EOFError("it is cut off")
        count -= len(chunk)


def _named(raw: Mapping[str, Array], specs: Mapping[str, InputSpec]) -> dict[str, Array]:
    """A lone array of any name feeds a lone input."""
    if len(raw) == 1 and len(specs) == 1:
        return dict(zip(specs, raw.values(), strict=True))
    return dict(raw)


@contextlib.contextmanager
def _reading(path: Path, sample: int | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, SyntaxError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", sample=sample) from error


# --- made up -----------------------------------------------------------------------------------


class _Synthetic:
    """Feeds from the declared shapes and types: standard normal floats, small integers.

    Dynamic axes: 1 for the first, 224 for height and width, 32 otherwise; the same for the same
    symbol. Integers that index a weight stay inside it, one that is compared with a constant equals
    it, masks are 1, segment ids 0, positions count up.
    """

    def __init__(self, model: ir.Model, specs: Mapping[str, InputSpec], count: int, seed: int) -> None:
        self._count, self._seed, self._specs = count, seed, specs
        symbols: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, spec in specs.items():
            if spec.dtype is None or spec.shape is None:
                raise DataError(
                    "its type or rank is not declared, so it cannot be made up",
                    input=name,
                    hint="give calibration data",
                )
            self._shapes[name] = tuple(_default_size(spec, axis, symbols) for axis in range(len(spec.shape)))
        self._below = {str(v.name): _below(v) for v in model.graph.inputs}
        self._equal = {str(v.name): _compared_with(v) for v in model.graph.inputs}
        shapes = ", ".join(f"{n} {'x'.join(map(str, s)) or 'scalar'}" for n, s in self._shapes.items())
        self.description = f"{count} made-up samples, seed {seed}: {shapes}"

    def __len__(self) -> int:
        return self._count

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            rng = np.random.default_rng([self._seed, sample])
            yield {name: self._array(spec, rng) for name, spec in self._specs.items()}

    def _array(self, spec: InputSpec, rng: np.random.Generator) -> Array:
        shape, dtype = self._shapes[spec.name], np.dtype(spec.dtype)
        name = spec.name.lower()
        if dtype.kind == "f":
            return np.asarray(rng.standard_normal(shape), dtype)
        if dtype.kind == "b" or "mask" in name:
            return np.ones(shape, dtype)
        if "token_type" in name or "segment" in name:
            return np.zeros(shape, dtype)
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        constant = self._equal[spec.name]
        if constant is not None:
            return np.full(shape, constant, dtype)
        high = self._below[spec.name] or (256 if dtype.itemsize == 1 and dtype.kind == "u" else 100)
        return rng.integers(0, min(high, int(np.iinfo(dtype).max) + 1), shape).astype(dtype)


def _default_size(spec: InputSpec, axis: int, symbols: dict[str, int]) -> int:
    shape = spec.shape or ()
    dim = shape[axis]
    if isinstance(dim, int):
        return max(dim, 1)
    if isinstance(dim, str) and dim in symbols:
        return symbols[dim]
    channels_last = len(shape) == 4 and shape[-1] in (1, 3, 4)
    if axis == 0:
        size = 1
    elif len(shape) == 4:
        channel = 3 if channels_last else 1
        size = 3 if axis == channel else 224
    else:
        size = 32
    if isinstance(dim, str):
        symbols[dim] = size
    return size


def _below(value: ir.Value) -> int | None:
    """Rows of the smallest weight the value indexes."""
    rows = []
    for use in _reached(value):
        node, index = use
        table = node.inputs[0]
        if node.op_type == "Gather" and index == 1 and table is not None and table.const_value is not None:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            rows.append(table.const_value.numpy().shape[axis])
    return min(rows, default=None)


def _compared_with(value: ir.Value) -> int | None:
    for node, index in _reached(value):
        if node.op_type == "Equal":
            other = node.inputs[1 - index]
            if other is not None and other.const_value is not None and other.const_value.size == 1:
                return int(other.const_value.numpy().reshape(-1)[0])
    return None


def _reached(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Consumers of a value, seen through casts and reshapes."""
    pending = [value]
    for _ in itertools.repeat(None, 64):
        if not pending:
            return
        for use in pending.pop().uses():
            yield use.node, use.idx
            if use.node.op_type in {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"} and use.idx == 0:
                pending.append(use.node.outputs[0])
