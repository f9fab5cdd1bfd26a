"""Nearly equal weights of one model become one: the first takes the place of the others.

    SQNR = 10 log10(sum w**2 / sum (w - v)**2) >= min_sqnr   ->   readers of w read v

Which pairs are compared is told by sketches (:mod:`onnxcompress.likeness`), so a large model costs one reading of its
weights. A weight that stays is never itself replaced, so errors do not add up along a chain. Equal weights are the job
of ``merge_duplicates``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.errors import PassOptionError
from onnxcompress.likeness import Gallery, floats, sketch, sqnr_db
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["TieWeights"]

_WEIGHT = "weight: "  # marks the key of a site that is no node


@dataclass(frozen=True)
class TieWeights(Pass):
    """Stores nearly equal weights once.

    Attributes:
        min_sqnr: how much alike they have to be, in dB; 40 is a difference of a hundredth.
        min_weights: tensors with fewer elements are left alone.
    """

    name: ClassVar[str] = "tie_weights"
    stage: ClassVar[Stage] = Stage.SHARE
    automatic: ClassVar[bool] = False

    min_sqnr: float = 40.0
    min_weights: int = 1024

    def __post_init__(self) -> None:
        if not self.min_sqnr > 0:
            raise PassOptionError(f"tie_weights: min_sqnr is {self.min_sqnr}", hint="choose decibels above 0, as 40")
        if self.min_weights < 0:
            raise PassOptionError(f"tie_weights: min_weights is {self.min_weights}", hint="choose 0 or more")

    @property
    def planned(self) -> bool:
        """Those are tied that the budget has room for."""
        return True

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        for value, (partner, alike) in self._pairs(view).items():
            key = _WEIGHT + str(value.name)
            if value.is_graph_output():
                yield Skipped(key, f"{value.name!r} is an output of the model")
            elif np.isinf(alike):
                yield Skipped(key, f"it equals {partner.name!r}: merge_duplicates shares such")
            else:
                yield Site(key, tuple(dict.fromkeys(str(n.name) for n, _ in view.consumers(value))))

    def _pairs(self, view: GraphView) -> dict[ir.Value, tuple[ir.Value, float]]:
        """Weights that an earlier one is near enough to, that one, and how alike they are in dB."""
        return view.derive(("tie_weights", self), lambda: dict(self._search(view)))

    def _search(self, view: GraphView) -> Iterator[tuple[ir.Value, tuple[ir.Value, float]]]:
        gallery: Gallery[ir.Value] = Gallery()
        for value in view.weights():
            array = view.array(value) if view.is_float_weight(value) and view.consumers(value) else None
            seen = sketch(floats(array)) if array is not None and array.size >= self.min_weights else None
            if array is None or seen is None:
                continue
            best: tuple[ir.Value, float] | None = None
            for other in gallery.near(array.shape, seen, self.min_sqnr):
                there = view.array(other)
                if there is None or other.graph not in (value.graph, view.model.graph):
                    continue
                alike = sqnr_db(floats(array), floats(there))
                if alike >= self.min_sqnr and (best is None or alike > best[1]):
                    best = other, alike
            if best is None:
                gallery.add(value, array.shape, seen)
            else:
                yield value, best

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        weight = view.value(site.key.removeprefix(_WEIGHT))
        pair = None if weight is None else self._pairs(view).get(weight)
        if weight is None or weight.const_value is None or pair is None:
            raise Skip("its weight is no constant any more")
        partner, saved = str(pair[0].name), weight.const_value.nbytes
        return [Choice(site, f"as {partner}", bytes_saved=saved, detail=partner, effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        weight = rewriter.value(choice.site.key.removeprefix(_WEIGHT))
        rewriter.replace_uses(weight, rewriter.value(str(choice.detail)))
        rewriter.drop_unused_weights()
