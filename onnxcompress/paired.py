"""Two models on the same feeds: moments between what one reads and how far off it then is from the other.

Each model is cut down to what makes the values asked for, as onnxruntime runs all of a graph whatever is fetched: a
value of the first layer costs the first layer only. One sample of both is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcompress.data import Feed, Source
from onnxcompress.errors import DataError
from onnxcompress.model import clone
from onnxcompress.moments import HalvedCross
from onnxcompress.session import Runner, main_values
from onnxcompress.statistics import CrossMoments, Pair

__all__ = ["cross_moments"]

Array = npt.NDArray[Any]


def cross_moments(
    now: ir.Model,
    then: ir.Model,
    pairs: Collection[Pair],
    source: Source,
    *,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> Mapping[Pair, CrossMoments]:
    """Runs every feed through both models and collects what was asked for.

    Args:
        now: the rewritten model; not changed.
        then: the model before; not changed.
        pairs: what is wanted. Those with a value that is missing, no float32 tensor, infinite anywhere, or without
            the axes asked for are left out, and so are those whose rows do not go together. What is made has to be
            in both models.
        source: the feeds.
        progress: called with (samples done, samples in all) after each.
        threads: for onnxruntime; all there are by default.

    Raises:
        DataError: one of the models makes NaN; names value and sample.
        ModelRunError: onnxruntime cannot load or run one of them.
    """
    wanted = sorted(set(pairs))
    left = _Part(now, {n.value for p in wanted for n in (p.reads, p.makes)}, threads)
    right = _Part(then, {p.makes.value for p in wanted}, threads)
    both = left.names & right.names
    sums = {p: HalvedCross(p, len(source)) for p in wanted if p.reads.value in left.names and p.makes.value in both}
    for sample, feed in enumerate(source if sums else ()):
        found, before = left.run(feed), right.run(feed)
        errors = {n: _difference(before[n], found[n]) for n in both if before[n].shape == found[n].shape}
        for pair, moments in sums.items():
            if pair.makes.value in errors:
                moments.add(found[pair.reads.value], errors[pair.makes.value])
            if moments.nan:
                raise DataError(
                    f"there is NaN in {pair.reads.value!r}, or in {pair.makes.value!r} of one of two models",
                    sample=sample,
                    hint="does this sample make sense to the model? remove it",
                )
        if progress is not None:
            progress(sample + 1, len(source))
    return {pair: result for pair, moments in sums.items() if (result := moments.result()) is not None}


class _Part:
    """What of a model makes some of its values.

    Args:
        model: not changed.
        names: of the values; graph inputs, too.
        threads: for onnxruntime.
    """

    def __init__(self, model: ir.Model, names: Collection[str], threads: int | None) -> None:
        inside = main_values(model)
        made = [n for n in inside if n in names]
        self._runner = Runner(_making(model, made), threads=threads, spinning=False) if made else None
        types = {} if self._runner is None else self._runner.types
        self._given = [str(v.name) for v in model.graph.inputs if v.name in names and v.dtype == ir.DataType.FLOAT]
        self._made = [n for n in made if types[n] == "tensor(float)"]
        self.names = {*self._given, *self._made}

    def run(self, feed: Feed) -> dict[str, Array]:
        """The values for one feed, by name."""
        found: dict[str, Array] = {} if self._runner is None else self._runner.run(feed, self._made)
        return found | {n: np.asarray(feed[n]) for n in self._given}


def _making(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A clone whose outputs are these values of the main graph, without the nodes they do not depend on."""
    copy = clone(model)
    values = main_values(copy)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[n] for n in names)
    RemoveUnusedNodesPass()(copy)
    return copy


def _difference(before: Array, now: Array) -> Array:
    """Infinite where a value is, and NaN only where one is NaN."""
    with np.errstate(invalid="ignore"):
        error = np.asarray(before - now)
    if np.isnan(error).any() and not (np.isnan(before).any() or np.isnan(now).any()):
        error[...] = np.inf
    return error
