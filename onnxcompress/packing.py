"""Models one after the other into a folder, with one file for the weights of all.

Equal tensors are found by SHA-256. Nearly equal ones by :mod:`~onnxcompress.likeness`; then the model is run against
its original, and if it does not hold, the least alike merges are taken back, as many as it takes (found by bisection).

The weights of a model go from file to file in blocks and are let go of once they are written, so memory follows the
largest model and not their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.data import open_data
from onnxcompress.errors import ModelRunError
from onnxcompress.evaluate import Reference, Runner, observed
from onnxcompress.external import Extent, ModelFile, Weight, WeightsFile, flaw
from onnxcompress.likeness import Floats, Gallery, Sketch, sketch, sqnr_db
from onnxcompress.report import Comparison
from onnxcompress.sizes import FileSize
from onnxcompress.view import GraphView

__all__ = ["WEIGHTS", "BundledModel", "Data", "Merge", "Packer"]

WEIGHTS = "weights.bin"
"""Name of the file with everybody's weights."""

_SAMPLES = 16
"""Feeds each model is checked on, if nobody says how many; made-up ones only a quarter of it."""


class Data(NamedTuple):
    """What a model is checked on: see :func:`~onnxcompress.data.open_data`."""

    calibration: object = None
    preprocess: str | None = None
    samples: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Merge:
    """A tensor that a nearly equal one took the place of.

    Attributes:
        tensor: its name.
        model: the model that brought the other in.
        by: name of the other there.
        sqnr_db: how alike they are, in dB.
        nbytes: bytes saved.
    """

    tensor: str
    model: str
    by: str
    sqnr_db: float
    nbytes: int


@dataclass(frozen=True)
class BundledModel:
    """One model of a bundle.

    Attributes:
        name: of its file in the bundle.
        source: the file it came from.
        before: size of that with its external data.
        onnx_bytes: size of the new .onnx file.
        weight_bytes: of ``weights.bin`` that it reads.
        shared_bytes: of these that another model reads, too.
        repeated_bytes: of its weights that were in it more than once, and are now stored once.
        merges: tensors of other bytes that were near enough.
        taken_back: merges that were tried and did too much to the outputs.
        equal: all outputs were the original's, bit for bit.
        comparison: with the original, on the data it was checked on.
        data: what that data was.
        notes: what a user should know of it.
    """

    name: str
    source: str
    before: FileSize
    onnx_bytes: int
    weight_bytes: int
    shared_bytes: int
    repeated_bytes: int
    merges: tuple[Merge, ...]
    taken_back: int
    equal: bool
    comparison: Comparison
    data: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Kept:
    """A tensor that is stored, and who brought it."""

    model: str
    tensor: str
    extent: Extent


@dataclass(frozen=True)
class _Tried:
    """A model as it was written.

    Attributes:
        back: weights whose merge was taken back.
        placed: where its weights are.
        comparison: with the original.
        problem: what is wrong with it; empty if nothing.
    """

    back: frozenset[int]
    placed: Mapping[int, Extent]
    comparison: Comparison
    problem: str


class Packer:
    """A bundle in the making: takes models one after the other.

    Args:
        folder: where the files go.
        near: dB that tensors are alike which are merged though they are not equal; None for none.
        min_sqnr: dB that the outputs of a model keep where such were merged.
    """

    def __init__(self, folder: Path, near: float | None, min_sqnr: float) -> None:
        self._folder, self._near, self._least = folder, near, min_sqnr
        self._file = WeightsFile(folder / WEIGHTS)
        self._by_digest: dict[bytes, Extent] = {}
        self._gallery: Gallery[_Kept] = Gallery()
        self._read_by: dict[str, set[Extent]] = {}

    def close(self) -> None:
        self._file.close()

    @property
    def extents(self) -> set[Extent]:
        """All that is stored."""
        return set().union(*self._read_by.values())

    def shared(self, name: str) -> int:
        """Bytes that this model and another one read."""
        others = set().union(*(e for n, e in self._read_by.items() if n != name))
        return sum(e.length for e in self._read_by[name] & others)

    def add(self, path: Path, data: Data) -> BundledModel:
        """Writes a model, checks it, and takes back merges until it holds."""
        file = ModelFile(path)
        placed: dict[int, Extent] = {}
        merges: dict[int, Merge] = {}
        digests: dict[int, bytes] = {}
        for weight in file.weights:
            digest = digests[weight.number] = file.digest(weight)
            known = self._by_digest.get(digest)
            if known is None and (found := self._nearest(file, weight)) is not None:
                kept, likeness = found
                placed[weight.number] = kept.extent
                merges[weight.number] = Merge(weight.name, kept.model, kept.tensor, likeness, weight.nbytes)
                continue
            if known is None:
                known = self._file.add(file.blocks(weight), weight.nbytes)
                self._remember(file, weight, digest, known)
            placed[weight.number] = known
            file.release(weight)
        check = _Check(path, data, merged=bool(merges))
        done = self._settled(file, placed, digests, sorted(merges, key=lambda n: (merges[n].sqnr_db, n)), check)
        for weight in file.weights:
            if weight.number in done.back:
                del merges[weight.number]
                self._remember(file, weight, digests[weight.number], done.placed[weight.number])
        self._read_by[path.name] = set(done.placed.values())
        target = self._folder / path.name
        wrong = flaw(target)
        if wrong and not flaw(path):
            raise ModelRunError(
                f"its new file is not valid: {wrong}", path=path, hint="this is a bug; please report it"
            )
        notes = list(check.notes)
        if file.lifted:
            notes.append(f"{file.lifted} Constant nodes became initializers, which can share")
        if wrong:
            notes.append(f"onnx.checker objects, as it does to the input: {wrong}")
        exact = [w for w in file.weights if w.number not in merges]
        return BundledModel(
            name=path.name,
            source=str(path),
            before=FileSize(0, 0),
            onnx_bytes=target.stat().st_size,
            weight_bytes=sum(e.length for e in self._read_by[path.name]),
            shared_bytes=0,
            repeated_bytes=sum(w.nbytes for w in exact) - sum(e.length for e in {done.placed[w.number] for w in exact}),
            merges=tuple(merges.values()),
            taken_back=len(done.back),
            equal=_equal(done.comparison),
            comparison=done.comparison,
            data=check.data,
            notes=tuple(notes),
        )

    def _settled(
        self, file: ModelFile, placed: Mapping[int, Extent], digests: Mapping[int, bytes], worst: Sequence[int],
        check: _Check,
    ) -> _Tried:  # fmt: skip
        """The model with as many merges as it bears, written.

        Args:
            file: of the model.
            placed: where its weights are with all merges.
            digests: of its weights.
            worst: weights that were merged, the least alike first.
            check: compares with the original.

        Raises:
            ModelRunError: it does not hold without any.
        """
        start = self._file.end
        weights = {w.number: w for w in file.weights}

        def tried(count: int) -> _Tried:
            self._file.cut(start)
            back = frozenset(worst[:count])
            now, new = dict(placed), dict[bytes, Extent]()
            for number in (w.number for w in file.weights if w.number in back):
                digest = digests[number]
                if digest not in new:
                    new[digest] = self._file.add(file.blocks(weights[number]), weights[number].nbytes)
                now[number] = new[digest]
            target = self._folder / file.path.name
            file.write(target, WEIGHTS, now)
            self._file.flush()
            comparison, problem = check.compare(target, self._least if count < len(worst) else None)
            return _Tried(back, now, comparison, problem)

        found = tried(0)
        if found.problem and worst:
            fails, holds = 0, len(worst)
            while holds - fails > 1:
                middle = (fails + holds) // 2
                if tried(middle).problem:
                    fails = middle
                else:
                    holds = middle
            found = tried(holds)
        if found.problem:
            raise ModelRunError(found.problem, path=file.path, hint="this is a bug; please report it")
        return found

    def _remember(self, file: ModelFile, weight: Weight, digest: bytes, extent: Extent) -> None:
        """What is stored can be shared from now on."""
        if digest in self._by_digest:
            return
        self._by_digest[digest] = extent
        seen = self._sketch(file, weight)
        if seen is not None:
            self._gallery.add(_Kept(file.path.name, weight.name, extent), weight.shape, seen)

    def _sketch(self, file: ModelFile, weight: Weight) -> Sketch | None:
        if self._near is None or weight.dtype != ir.DataType.FLOAT:
            return None
        return sketch(_floats(file.blocks(weight)))

    def _nearest(self, file: ModelFile, weight: Weight) -> tuple[_Kept, float] | None:
        """The tensor that is stored and most like a weight, if it is alike enough."""
        seen = self._sketch(file, weight)
        if seen is None or self._near is None:
            return None
        best: tuple[_Kept, float] | None = None
        for kept in self._gallery.near(weight.shape, seen, self._near):
            likeness = sqnr_db(_floats(file.blocks(weight)), _floats(self._file.blocks(kept.extent)))
            if likeness >= self._near and (best is None or likeness > best[1]):
                best = kept, likeness
        return best


def _floats(blocks: Iterator[bytes | memoryview] | Iterator[bytes]) -> Iterator[Floats]:
    for block in blocks:
        yield np.frombuffer(block, "<f4")


# --- checking ----------------------------------------------------------------------------------


class _Check:
    """Runs a model of the bundle against its original.

    Where only equal tensors were merged, both files are run as they are on one thread, and outputs have to be equal to
    the bit; else the values that ``verify`` compares have to be near enough.
    """

    def __init__(self, path: Path, data: Data, *, merged: bool) -> None:
        calibration, how, samples, seed = data
        limit = samples or (_SAMPLES if calibration is not None else _SAMPLES // 4)
        original = models.load(path)
        source = open_data(calibration, original, preprocess=how, limit=limit, seed=seed)
        self.data = source.description
        self.notes: list[str] = []
        self._path, self._feeds = path, source
        self._near = Reference(original, source, observed(GraphView(original))) if merged else None
        self._exact: Reference | None = None

    def compare(self, made: Path, least: float | None) -> tuple[Comparison, str]:
        """How far the new file is, and what is wrong with that; empty if nothing.

        Args:
            made: the new file.
            least: dB that every value keeps; None where outputs have to be equal.
        """
        if least is not None and self._near is not None:
            comparison = self._near.compare(models.load(made))
            worst = comparison.min_sqnr_db
            return comparison, "" if worst >= least else f"worst output at {worst:.1f} dB, {least:g} dB asked for"
        self._exact = self._exact or Reference(Runner(self._path, threads=1), self._feeds)
        comparison = self._exact.compare(Runner(made, threads=1))
        if _equal(comparison):
            return comparison, ""
        if not _equal(self._exact.compare(Runner(self._path, threads=1))):
            self.notes.append("the input gives other outputs every time, so nothing is proven by running it")
            return comparison, ""
        return comparison, "its outputs are not those of the input, though its weights are"


def _equal(comparison: Comparison) -> bool:
    return all(o.agreement == 1 for o in comparison.outputs)
