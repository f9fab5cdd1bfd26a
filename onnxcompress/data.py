"""Where calibration feeds come from: files, folders, images, Python code, or made up.

Every source can be read any number of times, gives the same feeds each time, and holds one sample
in memory: ``.npy`` and ``.npz`` members are read sample by sample (compressed ones too), folders
file by file, and whatever Python code yields is called once and kept in a :class:`Spool`, on disk
once it is large. A feed is checked against the model's inputs before anyone sees it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcompress.errors import DataError, ModelRunError, UsageError, suggest
from onnxcompress.feeds import Feed, InputSpec, checked, input_specs, only_input
from onnxcompress.images import IMAGE_SUFFIXES, Preprocess
from onnxcompress.origins import Files, Images, Listed, Origin, Spool, Stacked
from onnxcompress.session import Runner
from onnxcompress.synthetic import SIZES, Synthetic

__all__ = ["Feed", "InputSpec", "Source", "Spool", "input_specs", "open_data"]

SPOOL_SAMPLES = 4096
"""Python code that yields more feeds than this is cut off here, unless a limit says otherwise."""
SYNTHETIC_SAMPLES = 16
"""Feeds made up when there is no data and no limit."""


# --- the source --------------------------------------------------------------------------------


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
            yield checked(raw, self._specs, sample, self._notes)

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

    def apart(self, count: int) -> tuple[Source, Source]:
        """At most ``count`` samples, spread evenly, and all the others; both are everything where that leaves few."""
        chosen = set(_spread(len(self._samples), count))
        if len(self._samples) - len(chosen) < 2 * count:
            return self, self
        rest = tuple(s for i, s in enumerate(self._samples) if i not in chosen)
        return self._with(tuple(self._samples[i] for i in sorted(chosen))), self._with(rest)

    def split(self, holdout_fraction: float = 0.25) -> tuple[Source, Source]:
        """Disjoint parts: one to calibrate on, one to check on.

        Every k-th sample is held out, k = 1 / ``holdout_fraction``; each part has at least one. A
        single sample is in both, and a note says so.
        """
        if not 0 < holdout_fraction < 1:
            raise UsageError(f"holdout_fraction is {holdout_fraction}; it must be between 0 and 1")
        count = len(self._samples)
        if count == 1:
            self._notes["there is one sample, so the result is checked on the data it was calibrated on"] = None
            return self, self
        step = max(2, round(1 / holdout_fraction))
        held = set(self._samples[step - 1 :: step] or self._samples[-1:])
        rest = tuple(s for s in self._samples if s not in held)
        return self._with(rest), self._with(tuple(s for s in self._samples if s in held))

    def cached(self) -> Source:
        """The same feeds, read and checked once: in memory while small, on disk beyond."""
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
    source: object, model: ir.Model, *, preprocess: str | None = None, limit: int | None = None, seed: int = 0
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
            - None: feeds made up from the graph's declared shapes and types (where sizes are left open,
              usual ones are tried until the model runs).
        model: whose inputs they feed.
        preprocess: for images, see :class:`~onnxcompress.images.Preprocess`.
        limit: at most so many samples, spread evenly (the first ones, of Python code).
        seed: for made-up feeds.

    Raises:
        DataError: nothing there, unreadable, empty, or not fitting the model's inputs (of the first
            sample here, of others when they are read).
    """
    specs = input_specs(model)
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit} samples", hint="calibration needs at least one")
    if isinstance(source, Source):
        return source.take(limit) if limit is not None else source
    if source is None:
        made_up = _made_up(model, specs, limit or SYNTHETIC_SAMPLES, seed)
        return Source(made_up, specs, made_up.description, synthetic=True)
    if isinstance(source, (str, os.PathLike)):
        opened = _open_path(os.fspath(source), specs, preprocess, limit)
    elif preprocess is not None:
        raise DataError("preprocess= is for a folder of images", hint="apply it in the Python code that yields feeds")
    elif isinstance(source, (list, tuple)):
        opened = Source(Listed(source), specs, f"{len(source)} feeds given in Python")
    elif callable(source) or isinstance(source, Iterable):
        opened = _spooled(source, specs, getattr(source, "__qualname__", type(source).__name__), limit)
    else:
        raise DataError(
            f"a {type(source).__name__} is no calibration data", hint="give a path or an iterable of feed dicts"
        )
    opened.first()  # what is wrong with every sample should not come up minutes later
    return opened.take(limit) if limit is not None else opened


def _made_up(model: ir.Model, specs: Mapping[str, InputSpec], count: int, seed: int) -> Synthetic:
    """Where sizes are not declared, the first guess that the model runs with."""
    made_up = Synthetic(model, specs, count, seed)
    if not made_up.guessed:
        return made_up
    runner = Runner(model)
    refusal: ModelRunError | None = None
    for sizes in SIZES:
        made_up = Synthetic(model, specs, count, seed, sizes)
        try:
            runner.run(next(made_up.read([0])))
        except ModelRunError as error:
            refusal = refusal or error
        else:
            return made_up
    raise DataError(
        "input sizes are not declared, and the model runs with none of those tried",
        hint="give calibration data, or fix the input shapes in the model",
    ) from refusal


def _open_path(text: str, specs: Mapping[str, InputSpec], preprocess: str | None, limit: int | None) -> Source:
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, specs, preprocess)
    if path.is_file():
        if preprocess is not None:
            raise DataError(f"{path} is a file; preprocess= is for a folder of images")
        if path.suffix.lower() in {".npz", ".npy"}:
            return Source(Stacked(path, specs), specs, str(path))
        raise DataError(f"{path} is not of a known kind", hint=".npz, .npy, a folder, or module:function")
    module, colon, function = text.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        with _current_folder_on_path():
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
        spec = only_input(specs, kind)
        how = Preprocess.parse(preprocess, spec.shape, spec.dtype, name=spec.name)
        return Source(Images(members, spec, how), specs, f"{description}, {how}")
    if preprocess is not None:
        raise DataError(f"{path} holds {kind}; preprocess= is for images")
    return Source(Files(members, specs), specs, description)


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _imported(module: str, function: str) -> Any:
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise DataError(f"module {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(loaded, function):
        public = [name for name in vars(loaded) if callable(getattr(loaded, name)) and not name.startswith("_")]
        raise DataError(f"module {module!r} has no {function!r}", hint=suggest(function, public))
    return getattr(loaded, function)


def _spooled(source: Any, specs: Mapping[str, InputSpec], description: str, limit: int | None) -> Source:
    """Calls user code once and keeps what it gives, so that every later reading sees the same."""
    spool, notes = Spool(), dict[str, None]()
    stop = limit or SPOOL_SAMPLES
    try:
        feeds: Any = source() if callable(source) and not isinstance(source, Iterable) else source
        if isinstance(feeds, Mapping) or not isinstance(feeds, Iterable):
            raise DataError(
                f"{description} gives a {type(feeds).__name__}", hint="it must give feed dicts, one a sample"
            )
        for sample, raw in enumerate(feeds):
            if sample >= stop:
                if limit is None:
                    notes[f"{description} gives more than {stop} samples; the first {stop} are used"] = None
                break
            spool.append(checked(raw, specs, sample, notes))
    except DataError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise DataError(f"{description} raised {type(error).__name__}: {error}", sample=len(spool)) from error
    return Source(spool, specs, f"{len(spool)} feeds from {description}", notes=notes)


def _spread(count: int, wanted: int) -> list[int]:
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]
