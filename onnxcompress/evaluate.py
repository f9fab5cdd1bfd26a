"""Running two models and saying how far apart they are, and how fast each is.

**Where to look.** A graph that ends in NonMaxSuppression or ArgMax turns a rounding error into a
different selection, which no signal-to-noise ratio describes. :func:`observed` therefore walks back
from each output to the last values that are smooth functions of the weights.

**How far.** SQNR = 10 log10(sum ref**2 / sum (ref - candidate)**2), sums in float64 over all
elements of all samples.

**Float rounding.** A float32 operation rounds with a relative error of at most ``u = 2**-24``, about
uniform: rms ``u / sqrt(3)``, an SQNR of 149 dB. A sum of K terms in another order adds ``10 log10 K``
(random walk), 36 dB for K = 4096. L layers in a row add ``10 log10 L``. Ill-conditioned spots (a
softmax, a difference of near equals) amplify; a factor of 3 is allowed. So two graphs that are equal
in exact arithmetic agree to ``149 - 36 - 10 - 10 log10 L`` dB: 103 for one layer, 83 for a hundred
(:func:`lossless_floor_db`). Where a model amplifies more, onnxruntime's own optimizations show it:
:func:`rounding_noise` compares the model with itself, fused and not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.data import Feed, Spool
from onnxcompress.errors import UsageError
from onnxcompress.report import Comparison, Latency, OutputDifference
from onnxcompress.session import Runner, main_values
from onnxcompress.smooth import observed

__all__ = [
    "Reference",
    "Runner",
    "compare",
    "compare_outputs",
    "is_lossless",
    "lossless_floor_db",
    "measure",
    "observed",
    "rounding_noise",
]

Array = npt.NDArray[Any]
Model = Runner | ir.Model | str | os.PathLike[str]

_CHUNK = 1 << 16
_ALLOWANCE_DB = 10.0


def compare(
    reference: Model, candidate: Model, feeds: Iterable[Feed], names: Collection[str] | None = None
) -> Comparison:
    """Runs both models on every feed, holding one sample at a time.

    Args:
        reference: the original.
        candidate: what came of it.
        feeds: input feeds.
        names: values to compare, usually :func:`observed` of the original; by default, and where
            the candidate lacks one of them, the graph outputs.

    Raises:
        ModelRunError: one of them does not run.
        UsageError: there are no feeds, or nothing in common to compare.
    """
    first, second = _opened(reference), _opened(candidate)
    wanted = _common(names, first, second)
    before, after = _runner(first, wanted), _runner(second, wanted)
    difference = _Difference(wanted)
    for feed in feeds:
        difference.add(before.run(feed, wanted), after.run(feed, wanted))
    return difference.result()


def compare_outputs(names: Sequence[str], pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Comparison:
    """How far outputs are apart that were computed elsewhere.

    Args:
        names: values to compare.
        pairs: of each sample, the values of the original and of the candidate, by name.

    Raises:
        UsageError: there is nothing to compare.
    """
    difference = _Difference(names)
    for before, after in pairs:
        difference.add(before, after)
    return difference.result()


class Reference:
    """The original's outputs, kept, so that many candidates can be compared with them.

    Feeds and outputs are held in memory up to ``memory`` bytes and on disk beyond; they are taken
    from ``feeds`` once, so candidates see the same feeds even if ``feeds`` would change.

    Args:
        model: the original.
        feeds: input feeds.
        names: values to compare; the graph outputs are kept as well, for candidates that lack one.
        memory: bytes kept in memory.
    """

    def __init__(
        self, model: Model, feeds: Iterable[Feed], names: Collection[str] | None = None, *, memory: int = 64 << 20
    ) -> None:
        opened = _opened(model)
        self._ends = _ends(opened)
        self.names: tuple[str, ...] = tuple(names if names is not None else self._ends)
        kept = tuple(dict.fromkeys((*self.names, *self._ends)))
        self._feeds, self._outputs = Spool(memory // 2), Spool(memory // 2)
        runner = _runner(opened, kept)
        for feed in feeds:
            self._feeds.append(feed)
            self._outputs.append(runner.run(feed, kept))
        if not len(self._feeds):
            raise UsageError("there are no samples to compare on")

    def __len__(self) -> int:
        return len(self._feeds)

    @property
    def feeds(self) -> Iterable[Mapping[str, Any]]:
        """The feeds, as often as wanted."""
        return self._feeds

    def compare(self, candidate: Model, *, limit: int | None = None) -> Comparison:
        """How far a candidate is; on the first ``limit`` samples if given."""
        opened = _opened(candidate)
        wanted: tuple[str, ...] = self.names
        if not _has(opened, wanted):
            ends = _ends(opened)
            wanted = tuple(n for n in self._ends if n in ends)
        runner = _runner(opened, wanted)
        difference = _Difference(wanted)
        samples = range(len(self) if limit is None else min(limit, len(self)))
        for feed, before in zip(self._feeds.read(samples), self._outputs.read(samples), strict=True):
            difference.add(before, runner.run(feed, wanted))
        return difference.result()


def measure(
    before: Model,
    after: Model,
    feed: Feed,
    *,
    seconds: float = 1.5,
    min_rounds: int = 10,
    max_rounds: int = 2000,
    threads: int = 1,
) -> Latency:
    """Interleaved timing: each round runs both, in alternating order.

    Args:
        before: the original.
        after: the result.
        feed: one feed for both.
        seconds: stops after this long, once there are ``min_rounds``; slow models get fewer
            rounds rather than more than four times as long, but at least one.
        min_rounds: fewest rounds, time permitting.
        max_rounds: most rounds.
        threads: intra-op threads; a :class:`Runner` keeps its own.
    """
    first, second = (m if isinstance(m, Runner) else Runner(m, threads=threads) for m in (before, after))
    for runner in (first, second, first, second):  # lazy allocation, caches, branch predictors
        runner.run(feed)
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for number in range(max_rounds):
        order = ((0, first), (1, second)) if number % 2 == 0 else ((1, second), (0, first))
        for index, runner in order:
            begin = time.perf_counter()
            runner.run(feed)
            times[index].append(time.perf_counter() - begin)
        spent = time.perf_counter() - start
        if spent >= 4 * seconds or (spent >= seconds and number + 1 >= min_rounds):
            break
    a, b = np.array(times[0]), np.array(times[1])
    return Latency(
        before_ms=float(np.percentile(a, 10)) * 1e3,
        after_ms=float(np.percentile(b, 10)) * 1e3,
        speed_up=float(np.median(a / b)),
        rounds=len(a),
        threads=first.threads,
    )


def lossless_floor_db(depth: int) -> float:
    """Least SQNR of a rewrite that changes nothing but rounding, for ``depth`` layers in a row.

    The derivation is at the top of this module.
    """
    unit = 20 * math.log10(2**24 * math.sqrt(3))
    return unit - 10 * math.log10(4096) - 20 * math.log10(3) - 10 * math.log10(max(depth, 1))


def rounding_noise(model: ir.Model, feeds: Iterable[Feed], names: Collection[str] | None = None) -> Comparison:
    """The model against itself with onnxruntime's fusions off: what rounding alone does to it."""
    return compare(model, Runner(model, outputs=names, optimize=False), feeds, names)


def is_lossless(comparison: Comparison, depth: int, noise: Comparison | None = None) -> bool:
    """Whether two models differ by no more than float rounding.

    Args:
        comparison: of the two.
        depth: layers in a row, for :func:`lossless_floor_db`.
        noise: :func:`rounding_noise` of the original; where that is below the derived floor, the
            bound for that output is 10 dB below the noise.
    """
    floor = lossless_floor_db(depth)
    own = {o.name: o.sqnr_db for o in noise.outputs if o.sqnr_db is not None} if noise is not None else {}
    for output in comparison.outputs:
        if output.sqnr_db is None:
            if output.agreement < 0.99:
                return False
        elif not output.sqnr_db >= min(floor, own.get(output.name, math.inf) - _ALLOWANCE_DB):
            return False
    return True


# --- accumulating ------------------------------------------------------------------------------


class _Difference:
    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise UsageError("the two models have no output in common to compare")
        self._parts = {name: _Part() for name in names}
        self._samples = 0

    def add(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        self._samples += 1
        for name, part in self._parts.items():
            for a, b in _tensors(before[name], after[name]):
                part.add(a, b)

    def result(self) -> Comparison:
        if not self._samples:
            raise UsageError("there are no samples to compare on")
        return Comparison(tuple(p.result(n) for n, p in self._parts.items()), self._samples)


class _Part:
    """One output's running sums."""

    def __init__(self) -> None:
        self.signal = self.error = self.max_abs = 0.0
        self.elements = self.equal = 0
        self.continuous = False

    def add(self, before: Array | None, after: Array | None) -> None:
        if before is None or after is None:  # a sequence of another length
            self.elements += 1
            self.error = math.inf
            return
        self.elements += max(before.size, 1) if before.shape != after.shape else before.size
        if before.dtype.kind == "f":
            self.continuous = True
        if before.shape != after.shape:
            self.max_abs = math.inf
            if before.dtype.kind == "f":  # as if the candidate had said nothing
                power = _power(before)
                self.signal += power
                self.error += power or 1.0
            return
        for a, b in zip(_chunks(before), _chunks(after), strict=True):
            self._add(a, b)

    def _add(self, a: Array, b: Array) -> None:
        if a.dtype.kind not in "fiub":  # text
            same = a == b
            self.equal += int(np.count_nonzero(same))
            self.max_abs = max(self.max_abs, 0.0 if same.all() else 1.0)
            return
        x, y = a.astype(np.float64), b.astype(np.float64)
        same = (a == b) | ((x != x) & (y != y))
        self.equal += int(np.count_nonzero(same))
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            if not same[~finite].all():
                self.error = self.max_abs = math.inf
            x, y = x[finite], y[finite]
        difference = x - y
        self.signal += _squares(x)
        self.error += _squares(difference)
        if difference.size:
            self.max_abs = max(self.max_abs, float(np.abs(difference).max()))

    def result(self, name: str) -> OutputDifference:
        agreement = self.equal / self.elements if self.elements else 1.0
        return OutputDifference(name, self._sqnr() if self.continuous else None, self.max_abs, agreement)

    def _sqnr(self) -> float:
        if self.error == 0:
            return math.inf
        if self.signal == 0 or math.isinf(self.error):
            return -math.inf
        return 10 * math.log10(self.signal / self.error)


def _squares(values: Array) -> float:
    """Sum of squares. Not np.dot: BLAS threads wait for cores that others use, a thousandfold slowdown."""
    return float(np.einsum("i,i->", values, values))


def _power(array: Array) -> float:
    total = 0.0
    for chunk in _chunks(array):
        x = chunk.astype(np.float64)
        x = x[np.isfinite(x)]
        total += _squares(x)
    return total


def _chunks(array: Array) -> Iterator[Array]:
    flat = np.ravel(array)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _tensors(before: Any, after: Any) -> Iterator[tuple[Array | None, Array | None]]:
    """Pairs of arrays; a sequence gives one per element."""
    if isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield None, None
            return
        for a, b in zip(before, after, strict=True):
            yield from _tensors(a, b)
    elif isinstance(before, dict) or isinstance(after, dict):  # a map, as classical classifiers give
        same = isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys()
        if not same:
            yield None, None
            return
        yield np.array(list(before.values())), np.array([after[k] for k in before])
    else:
        yield np.asarray(before), np.asarray(after)


# --- models ------------------------------------------------------------------------------------


def _opened(model: Model) -> Runner | ir.Model:
    """A file is opened as it is on disk, so that it is the file that is judged."""
    return model if isinstance(model, (Runner, ir.Model)) else Runner(model)


def _runner(model: Runner | ir.Model, names: Collection[str]) -> Runner:
    if isinstance(model, Runner):
        return model if set(names) <= set(model.outputs) else model.showing(names)
    return Runner(model, outputs=names)


def _ends(model: Runner | ir.Model) -> tuple[str, ...]:
    return model.ends if isinstance(model, Runner) else tuple(str(v.name) for v in model.graph.outputs)


def _has(model: Runner | ir.Model, names: Collection[str]) -> bool:
    wanted = set(names)
    if isinstance(model, Runner):
        return wanted <= {*model.outputs, *model.ends} or wanted <= model.available()
    return wanted <= {*_ends(model), *main_values(model)}


def _common(names: Collection[str] | None, before: Runner | ir.Model, after: Runner | ir.Model) -> tuple[str, ...]:
    if names is not None and _has(before, names) and _has(after, names):
        return tuple(names)
    return tuple(n for n in _ends(before) if n in _ends(after))
