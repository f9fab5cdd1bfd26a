"""One streaming sweep over the feeds; what it keeps depends on the model and not on their number.

**Histograms.** Bins lie on the grid of multiples of ``2**k``, so a value's bin is
``floor(x / 2**k)``, which is exact in floating point. When the range outgrows the bins, ``k`` goes
up by one and neighbours are merged, also exactly: bin ``i`` becomes ``i >> 1``. The result is
therefore the histogram one would have built knowing the final range, in whatever order the samples
came. Minimum and maximum are over all elements; counts over a strided subsample whose stride has no
common factor with the tensor's size, so that no axis is favoured.

**Moments.** Sums in float32 over blocks, added up in float64: see :mod:`onnxcompress.moments`.

**Threads.** onnxruntime runs a sample while threads of this module count the one before; samples are
counted in order, and each accumulator by one thread at a time, so the result does not depend on timing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import ThreadpoolController

from onnxcompress.data import Source
from onnxcompress.errors import DataError, ModelRunError
from onnxcompress.model import clone, inferred_types
from onnxcompress.moments import ChannelAccumulator, HalvedGram
from onnxcompress.session import Runner, main_values
from onnxcompress.statistics import Evidence, Histogram, Need, Statistic

__all__ = ["BINS", "ChannelAccumulator", "HistogramAccumulator", "calibrate", "value_shapes"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

BINS = 4096
"""Bins of a histogram; between half and all of them span the range seen."""

_COUNTED = 1 << 19
_LEAST_COUNTED = 2048
_COUNTERS = 2
"""Threads that count. One keeps up with onnxruntime on two cores; the second shares the rest where it does not."""
_AHEAD = 1 << 29
"""Bytes of one sample's values above which it is counted before the next is run, not while."""


def calibrate(
    model: ir.Model,
    needs: Iterable[Need],
    source: Source,
    *,
    progress: Callable[[int, int], None] | None = None,
    max_elements: int = 65536,
    shapes: bool = True,
    threads: int | None = None,
) -> Evidence:
    """Runs every feed once and collects what was asked for.

    Args:
        model: the model; not changed.
        needs: statistics wanted. Values that are not float32 tensors of the main graph are left out,
            and so are values that are infinite anywhere (an attention mask), whose channel count varies,
            or that lack an axis asked for: ``Evidence.has`` is False for them.
        source: the feeds.
        progress: called with (samples done, samples in all) after each.
        max_elements: most elements of a value that are counted in the histogram, per sample; fewer
            where there are many samples, so that a value is counted about half a million times in
            all. The extremes are always over all elements.
        shapes: measure the shapes too (one run of the first feed).
        threads: for onnxruntime; all there are by default.

    Raises:
        DataError: a value is NaN for some feed; names node and sample.
        ModelRunError: onnxruntime cannot load or run the model.
    """
    wanted, total = list(dict.fromkeys(needs)), len(source)
    most = min(max_elements, max(_LEAST_COUNTED, _COUNTED // total))
    inputs = {str(v.name) for v in model.graph.inputs}
    inside = main_values(model)
    names = [n for n in dict.fromkeys(need.value for need in wanted) if n in inside]
    # its threads must not spin between runs: others count meanwhile
    runner = Runner(model, outputs=names, threads=threads, spinning=False) if names else None
    names = [n for n in names if runner is not None and runner.types[n] == "tensor(float)"]
    observed = {*names, *(need.value for need in wanted if need.value in inputs)}
    histograms = {
        n.value: HistogramAccumulator(most)
        for n in wanted
        if n.statistic is Statistic.HISTOGRAM and n.value in observed
    }
    channels = {
        (n.value, n.axis): ChannelAccumulator(n.axis)
        for n in wanted
        if n.statistic is Statistic.CHANNELS and n.value in observed
    }
    grams = {n: HalvedGram(n, total) for n in wanted if n.statistic is Statistic.GRAM and n.value in observed}
    in_order = (*sorted(observed & inputs), *(n for n in inside if n in observed))  # so the first NaN is named
    accumulators: dict[str, list[_Accumulator]] = {n: [] for n in in_order}
    for name, histogram in histograms.items():
        accumulators[name].append(histogram)
    for (name, _), moments in channels.items():
        accumulators[name].append(moments)
    for need, gram in grams.items():
        accumulators[need.value].append(gram)
    with _blas_divided(bool(grams)), _Counters(model, accumulators) as counters:
        for sample, feed in enumerate(source if observed else ()):
            found = runner.run(feed, names) if runner is not None else {}
            found |= {n: feed[n] for n in observed & inputs if getattr(feed[n], "dtype", None) == np.float32}
            counters.count(sample, found)
            if progress is not None:
                progress(sample + 1, total)
    return Evidence(
        histograms={n: h for n, a in histograms.items() if (h := a.result()) is not None},
        channels={k: m for k, a in channels.items() if (m := a.result()) is not None},
        shapes=value_shapes(model, source.first(), threads=threads) if shapes else None,
        samples=total,
        synthetic=source.synthetic,
        grams={n: g for n, a in grams.items() if (g := a.result()) is not None},
    )


def _blas_divided(wanted: bool) -> AbstractContextManager[object]:
    """Leaves each counting thread its share of the threads BLAS has.

    Counters that each start all of them wait for one another and for onnxruntime. Measured on a MiniLM and two busy
    cores: a sweep takes 4 to 7 s, where it took 11 to 18 s, and half the processor time.
    """
    if not wanted:
        return nullcontext()
    blas = ThreadpoolController().select(user_api="blas")
    threads = min((library["num_threads"] for library in blas.info()), default=1)
    limited: AbstractContextManager[object] = blas.limit(limits=max(1, threads // _COUNTERS))
    return limited


class _Counters:
    """Counts one sample in threads of its own while the next is being run.

    Args:
        model: for the words of an error.
        accumulators: by value.
    """

    def __init__(self, model: ir.Model, accumulators: Mapping[str, Sequence[_Accumulator]]) -> None:
        self._model, self._accumulators = model, accumulators
        self._pool = ThreadPoolExecutor(_COUNTERS, "onnxcompress-count")
        self._pending: list[Future[None]] = []
        self._sample = 0

    def __enter__(self) -> _Counters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None or issubclass(kind, Exception):  # an earlier sample's error comes first
                self._wait()
        finally:
            self._pool.shutdown()

    def count(self, sample: int, found: dict[str, Any]) -> None:
        """Takes the values of a sample, and empties ``found`` as they are counted.

        Raises:
            DataError: the sample before, or this one, makes NaN.
        """
        self._wait()
        self._sample = sample
        size = sum(array.nbytes for array in found.values())
        left = sorted(found, key=lambda name: (found[name].size, name))  # large ones are taken first, from the end
        self._pending = [self._pool.submit(self._drain, left, found) for _ in range(_COUNTERS)]
        if size > _AHEAD:
            self._wait()

    def _drain(self, left: list[str], found: dict[str, Any]) -> None:
        while left:
            try:
                name = left.pop()
            except IndexError:  # the other thread was quicker
                return
            array = found.pop(name)
            for accumulator in self._accumulators[name]:
                accumulator.add(array)

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
        if pending:
            for name, accumulators in self._accumulators.items():
                if any(a.nan for a in accumulators):
                    raise _nan(self._model, name, self._sample)


def _nan(model: ir.Model, name: str, sample: int) -> DataError:
    value = main_values(model).get(name)
    node = value.producer() if value is not None else None
    where = f"node {node.name!r} ({node.op_type}) makes" if node is not None else "there is"
    return DataError(
        f"{where} NaN in {name!r}", sample=sample, hint="does this sample make sense to the model? remove it"
    )


# --- histograms --------------------------------------------------------------------------------


class HistogramAccumulator:
    """Builds one histogram from any number of float32 arrays.

    Args:
        max_elements: most elements counted per array; the extremes are always over all.
        bins: how many.
    """

    def __init__(self, max_elements: int = 65536, bins: int = BINS) -> None:
        self._max, self._bins = max_elements, bins
        self._low, self._high = math.inf, -math.inf
        self._exponent = 0
        self._first = 0
        """Grid index of bin 0; meaningful once something was counted."""
        self._counts: npt.NDArray[np.int64] | None = None
        self.nan = False
        self.infinite = False

    def add(self, array: Array) -> None:
        """Counts the elements of a float32 array."""
        if array.size == 0 or self.nan or self.infinite:
            return
        flat = array.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            self.nan = math.isnan(low) or math.isnan(high)
            self.infinite = not self.nan
            return
        self._low, self._high = min(self._low, low), max(self._high, high)
        counts = self._fit()
        scaled = flat[:: _stride(flat.size, self._max)] * np.float32(2.0**-self._exponent)
        np.floor(scaled, out=scaled)
        scaled -= np.float32(self._first)  # exact: both are whole, and their difference is small
        counts += np.bincount(scaled.astype(np.intp), minlength=self._bins)

    def result(self) -> Histogram | None:
        """The histogram so far; None if nothing finite was added."""
        if self._counts is None or self.nan or self.infinite:
            return None
        width = 2.0**self._exponent
        return Histogram(self._low, self._high, self._first * width, width, self._counts)

    def _fit(self) -> npt.NDArray[np.int64]:
        """Widens bins (by merging) and shifts them until the range fits."""
        exponent = _exponent(self._low, self._high, self._bins)
        first = math.floor(self._low / 2.0**exponent)
        if self._counts is None:
            self._counts = np.zeros(self._bins, np.int64)
        elif (exponent, first) != (self._exponent, self._first):
            used = np.flatnonzero(self._counts)
            merged = np.zeros(self._bins, np.int64)
            np.add.at(merged, ((used + self._first) >> (exponent - self._exponent)) - first, self._counts[used])
            self._counts = merged
        self._exponent, self._first = exponent, first
        return self._counts


def _exponent(low: float, high: float, bins: int) -> int:
    """Least k for which the grid of ``2**k`` puts [low, high] into ``bins`` bins.

    Grows with the range only, which makes the histogram independent of order. Never so small that a
    bin index leaves int32, or that the width underflows.
    """
    absmax = max(abs(low), abs(high))
    smallest = -100 if absmax == 0 else max(-100, math.frexp(absmax)[1] - 30)
    span = high - low
    k = smallest if span == 0 else max(smallest, math.frexp(span / bins)[1] - 2)
    while math.floor(high / 2.0**k) - math.floor(low / 2.0**k) >= bins:
        k += 1
    return k


def _stride(size: int, most: int) -> int:
    """Smallest stride leaving at most ``most`` elements and sharing no factor with the size."""
    stride = max(1, -(-size // most))
    while math.gcd(stride, size) != 1 and stride < size:
        stride += 1
    return stride


_Accumulator: TypeAlias = HistogramAccumulator | ChannelAccumulator | HalvedGram


# --- shapes ------------------------------------------------------------------------------------


def value_shapes(
    model: ir.Model, feed: dict[str, Array], *, threads: int | None = None, bodies: bool = False
) -> dict[str, tuple[int, ...]]:
    """Concrete shape of every tensor for one feed, inputs and weights included.

    A ``Shape`` node is put on every value of the main graph, so no activation is kept or copied. Values that
    are no tensors (sequences, optionals) are left out.

    Args:
        model: the model.
        feed: an input.
        threads: of onnxruntime.
        bodies: also inside If, Loop and Scan, as far as shapes there follow from those of the main graph.
    """
    shapes = {name: tuple(np.shape(array)) for name, array in feed.items() if isinstance(array, np.ndarray)}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            shapes[str(value.name)] = _static(value.const_value)
    names = [n for n, v in main_values(model).items() if v.type is None or isinstance(v.type, ir.TensorType)]
    try:
        found = _measured(model, names, feed, threads)
    except ModelRunError:  # a value of unknown type may be a sequence: ask onnxruntime, then leave those out
        types = Runner(model, outputs=names, optimize=False, threads=threads).types
        found = _measured(model, [n for n in names if types[n].startswith("tensor(")], feed, threads)
    shapes |= found
    if bodies and any(True for _ in model.graph.subgraphs()):
        inside = inferred_types(model, shapes)
        for value, (_, shape) in inside.items():
            if shape is not None and value.name not in shapes and all(isinstance(d, int) for d in shape):
                shapes[str(value.name)] = tuple(d for d in shape if isinstance(d, int))
    return shapes


def _static(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(d for d in tensor.shape if isinstance(d, int))


def _measured(
    model: ir.Model, names: Sequence[str], feed: dict[str, Array], threads: int | None
) -> dict[str, tuple[int, ...]]:
    copy = clone(model)
    values = main_values(copy)
    taken = {*values, *copy.graph.initializers, *(str(v.name) for v in copy.graph.inputs)}
    probes: dict[str, str] = {}
    for name in names:
        node = ir.node("Shape", [values[name]])
        probe = f"{name}__shape"
        while probe in taken:
            probe += "_"
        taken.add(probe)
        node.outputs[0].name = probes[name] = probe
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.name = f"onnxcompress_{probe}"
        copy.graph.append(node)
        copy.graph.outputs.append(node.outputs[0])
    found = Runner(copy, outputs=tuple(probes.values()), optimize=False, threads=threads).run(feed)
    return {name: tuple(int(d) for d in found[probe]) for name, probe in probes.items()}
