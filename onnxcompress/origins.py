"""Places samples are kept: files, folders, images, lists, and the spool for what Python code yields.

Each reads one sample at a time, by ascending number.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import shutil
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import DataError, suggest
from onnxcompress.feeds import InputSpec, only_input
from onnxcompress.images import Preprocess, read_image

__all__ = ["Files", "Images", "Listed", "Origin", "Spool", "Stacked"]

Array = npt.NDArray[Any]


class Origin(Protocol):
    """Samples by number. ``read`` gets ascending numbers and yields one raw feed for each."""

    def __len__(self) -> int: ...

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]: ...


class Spool:
    """A growing list of feeds (or outputs): in memory up to ``limit`` bytes, on disk beyond.

    The limit is small beside what onnxruntime takes, so that many samples need no more memory than few;
    files just written are read from the system's cache. They are deleted with the object.
    """

    def __init__(self, limit: int = 8 << 20) -> None:
        self._limit = limit
        self._used = 0
        self._memory: list[dict[str, Any]] = []
        self._folder: Path | None = None
        self._on_disk = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of arrays held in memory; never above the limit."""
        return self._used

    def __len__(self) -> int:
        return len(self._memory) + self._on_disk

    def append(self, feed: Mapping[str, Any]) -> None:
        size = sum(_bytes(a) for a in feed.values())
        if self._folder is None and self._used + size <= self._limit:
            self._memory.append({name: _owned(a) for name, a in feed.items()})
            self._used += size
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="onnxcompress-feeds-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        with (self._folder / f"{self._on_disk}").open("wb") as file:
            pickle.dump(dict(feed), file, protocol=5)
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
        with (self._folder / f"{index}").open("rb") as file:
            loaded: dict[str, Any] = pickle.load(file)  # written above, in a folder only we can enter
        return loaded


def _bytes(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return int(getattr(value, "nbytes", 64))


def _owned(value: Any) -> Any:
    """A private copy: a generator may reuse its buffer, and onnxruntime's outputs keep their arena."""
    return np.array(value, copy=True, order="C") if isinstance(value, np.ndarray) else value


class Listed:
    """Feeds in a Python list."""

    def __init__(self, feeds: Sequence[Mapping[str, Any]]) -> None:
        self._feeds = feeds

    def __len__(self) -> int:
        return len(self._feeds)

    def read(self, samples: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            yield self._feeds[sample]


class Files:
    """A file per feed."""

    def __init__(self, files: Sequence[Path], specs: Mapping[str, InputSpec]) -> None:
        self._files, self._specs = files, specs
        if files[0].suffix.lower() == ".npy":
            only_input(specs, ".npy files")

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


class Images:
    """A picture per feed, of batch size 1."""

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


class Stacked:
    """Samples along the first axis of each array of one file; holds one sample in memory.

    An array with one axis more than the input gives ``array[i]``; with as many axes,
    ``array[i:i+1]`` (or as many rows as a static batch has; rows that do not fill one are left out).
    A scalar serves every sample. Arrays in Fortran order are read whole.
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
            return {only_input(self._specs, "a .npy file").name: ""}
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
            whole = np.lib.format.read_array(file, allow_pickle=False)
            for sample in samples:
                start = sample * member.step
                yield whole if member.samples is None else _rows(whole[start : start + member.step], member)
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
        step = max(spec.shape[0], 1) if isinstance(spec.shape[0], int) else 1
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


_UNREADABLE = (OSError, ValueError, EOFError, KeyError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile)
"""What numpy, zipfile and Pillow raise for a damaged file."""


@contextlib.contextmanager
def _reading(path: Path, sample: int | None) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}", sample=sample) from error


def _with_batch(array: Array, spec: InputSpec) -> Array:
    """Adds the batch axis where only that is missing."""
    if spec.shape is None or array.ndim != len(spec.shape) - 1:
        return array
    batch = spec.shape[0]
    return array[None] if batch == 1 or not isinstance(batch, int) else array
