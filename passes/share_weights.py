"""Weight sharing and low-bit storage: weights take few bits in the file, and the kernels stay what they are.

    w_rj ~ s_r c[i_rj]        a few values c for the whole tensor, an index of 1 to 8 bits for each weight

How weights are stored is asked last, when it is settled what they are: floats of any kernel, or the integers that
``quantize`` made, which become a palette of integers. Nothing of this runs: the nodes that unpack a weight read
constants, and a runtime that folds constants computes them once, at load (:mod:`~onnxcompress.passes._codes`). The file
shrinks; latency and memory are those of the plain weights, and loading takes longer.

Weights are fitted to what calibration saw of what they meet (:mod:`~onnxcompress.passes._coding`). Where many are zero,
as behind ``prune_connections``, zeros stay zero and take one bit (:mod:`~onnxcompress.passes._sparse_code`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage, Term
from onnxcompress.errors import PassError, PassOptionError, suggest
from onnxcompress.passes._codes import Code
from onnxcompress.passes._coding import Coding, Fitted, Subject, coded, estimated_bytes, fits, previews
from onnxcompress.passes._constant_sum import absorb
from onnxcompress.passes._int8 import remembered, remembered_for
from onnxcompress.passes._linear_maps import Moments
from onnxcompress.passes._readers import bias_place
from onnxcompress.passes._stored_weights import Weight, stored_weights
from onnxcompress.passes._switched import read_instead
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["Method", "ShareWeights"]

_LADDER = (Coding(8), Coding(6), Coding(5), Coding(4), Coding(4, 2), Coding(3), Coding(2, 4), Coding(2))
"""Codings worth trying, weak to strong."""
_BITS = (16.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.6, 1.0)
_WIDTHS = (1, 2, 4, 8)
_LEAST_SAVED = 0.02
"""Share of a weight's bytes that a coding has to take off."""


class Method(StrEnum):
    """What weights are rounded by."""

    ACTIVATION = "activation"
    """What calibration saw: the error of the layer's output, with feedback from weight to weight."""
    PLAIN = "plain"
    """The weights alone: each goes to the nearest entry of the codebook."""


@dataclass(frozen=True)
class _Loss(Term):
    """What a coding loses."""

    coding: Coding | None = field(default=None, compare=False, repr=False)
    weight: Weight | None = field(default=None, compare=False, repr=False)
    plain: float = field(
        default=0.0, compare=False, repr=False
    )  # share of its energy that rounding to the nearest takes


@dataclass(frozen=True)
class ShareWeights(Pass):
    """Stores weights in few bits: indices into a codebook (k-means), unpacked once when the model is loaded.

    Without bits the planner chooses the weights and how many bits each takes.

    Attributes:
        bits: of every weight: 16 (float16), 8, 6, 5, 4, 3, 2, 1.6 (three values) or 1 (two).
        width: weights that have one index together, as a vector of the codebook; bits are then 8 / width.
        block: inputs of a layer that have one scale together; by default all inputs of an output have.
        entropy: what a bit of the compressed file is worth, in units of the mean square of the rounding error: weights
            then go where their index is short. k-means indices are 6 % from incompressible, so it gains little.
        uniform: evenly spaced codebooks, as integers are, instead of k-means.
        method: what weights are rounded by.
        weights: only these tensors, or those that these nodes read; all by default.
        min_weights: tensors with fewer elements are left alone.
    """

    name: ClassVar[str] = "share_weights"
    stage: ClassVar[Stage] = Stage.STORE
    min_opset: ClassVar[int] = 13
    for_size: ClassVar[bool] = True
    remark: ClassVar[str] = (
        "weights are unpacked when the model is loaded: loading takes longer, speed and memory are those of plain ones"
    )

    bits: float | None = None
    width: int = 1
    block: int = 0
    entropy: float = 0.0
    uniform: bool = False
    method: Method = Method.ACTIVATION
    weights: tuple[str, ...] = ()
    min_weights: int = 1024

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "method", Method(self.method))  # a plain string will do
        except ValueError:
            raise PassOptionError(
                f"share_weights: method is {self.method!r}", hint=suggest(str(self.method), list(Method))
            ) from None
        if self.width not in _WIDTHS:
            raise PassOptionError(f"share_weights: width is {self.width}", hint="choose 1, 2, 4 or 8")
        if self.bits is not None and self.bits not in _BITS:
            hint = f"choose one of {', '.join(f'{b:g}' for b in _BITS)}"
            raise PassOptionError(f"share_weights: bits is {self.bits:g}", hint=hint)
        if self.width > 1 and self.bits is not None and self.bits * self.width != 8:
            hint = f"leave bits out, or set it to {8 / self.width:g}: an index of a vector is a byte"
            raise PassOptionError(f"share_weights: bits={self.bits:g} with width={self.width}", hint=hint)
        if self.block < 0 or self.block == 1:
            raise PassOptionError(f"share_weights: block is {self.block}", hint="choose 0 or at least 2, as 64")
        if not 0 <= self.entropy < math.inf:
            raise PassOptionError(f"share_weights: entropy is {self.entropy}", hint="choose 0 or more, as 1.4")
        if self.entropy and self.width > 1:
            raise PassOptionError("share_weights: entropy and width are both given", hint="leave one of them out")
        if self.min_weights < 1:
            raise PassOptionError(f"share_weights: min_weights is {self.min_weights}", hint="choose 1 or more")

    @property
    def planned(self) -> bool:
        """Bits are the user's word; without them they are chosen by what they save and cost."""
        return self._coding is None

    @property
    def _coding(self) -> Coding | None:
        """The one asked for."""
        bits = self.bits if self.bits is not None or self.width == 1 else 8 / self.width
        if bits is None:
            return None
        return Coding(bits, self.width, self.block, self.uniform, self.method is Method.ACTIVATION, self.entropy)

    # --- reading -----------------------------------------------------------------------------------

    def sites(self, view: GraphView) -> Iterator[Site | Skipped]:
        """Every weight that is large enough.

        Raises:
            PassOptionError: one asked for by name is not there, or cannot be stored otherwise.
        """
        found, refused = self._found(view)
        for name in self.weights:
            if name in found or any(name in weight.readers for weight in found.values()):
                continue
            if name in refused:
                raise PassOptionError(f"share_weights: weight {name!r}: {refused[name]}", hint="leave it out")
            hint = suggest(name, [*found, *sorted({r for w in found.values() for r in w.readers})])
            raise PassOptionError(f"share_weights: there is no weight, or node with one, called {name!r}", hint=hint)
        for key, weight in found.items():
            if self._asked(key, weight):
                yield Site(key, weight.readers)
        if not self.weights:
            yield from (Skipped(key, reason) for key, reason in refused.items())

    def _asked(self, key: str, weight: Weight) -> bool:
        return not self.weights or key in self.weights or any(r in self.weights for r in weight.readers)

    def _found(self, view: GraphView) -> tuple[Mapping[str, Weight], Mapping[str, str]]:
        return view.derive(("stored weights", self.min_weights), lambda: stored_weights(view, self.min_weights))

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        if not target.folds_constants:
            raise Skip("the runtime would unpack it in every run")
        weight = self._found(view)[0][site.key]
        if not all(target.allows(op) for op in ("Gather", "Reshape", "Cast", "Mul")):
            raise Skip("the device has no operators that unpack it")
        if self._coding is not None:
            codings = [self._coding]
        else:
            feedback = self.method is Method.ACTIVATION
            ladder = (replace(c, rate=self.entropy) if self.entropy and c.width == 1 else c for c in _LADDER)
            codings = [
                replace(c, block=self.block, uniform=self.uniform and c.width == 1, feedback=feedback)
                for c in dict.fromkeys(ladder)
            ]
        found = [c for c in codings if self._problem(weight, c) is None]
        if not found:
            raise Skip(self._problem(weight, codings[-1]) or "no coding makes it smaller")
        found.sort(key=lambda c: -_size(weight, c))
        if not self.planned:
            return [self._choice(site, weight, coding) for coding in found]
        value = next(v for v in view.weights() if v.name == weight.name)
        with threadpool_limits(1, "blas"):
            guesses = previews(_subject(value, weight, None), found)
        compressed = view.derive(("compressed", weight.name), lambda: weight.compressed(view))
        return [
            self._choice(site, weight, coding, plain, compressed - self._compressed(weight, coding, entropy))
            for coding, (plain, entropy) in zip(found, guesses, strict=True)
        ]

    def _problem(self, weight: Weight, coding: Coding) -> str | None:
        """Why a coding does not fit a weight."""
        if weight.integers and coding.bits >= 8:
            return "it is stored in 8 bits already"
        if not fits(weight.linear, coding):
            return f"rows of it cannot be cut into vectors of {coding.width}"
        size = _size(weight, coding)
        if size > (1 - _LEAST_SAVED) * weight.bytes:
            return (
                f"{coding} would not make it smaller: {weight.bytes} bytes now, {size} with codebook, scales and nodes"
            )
        return None

    def _compressed(self, weight: Weight, coding: Coding, entropy: float) -> int:
        """Bytes in the compressed file: indices take their entropy."""
        size = estimated_bytes(weight.linear, coding, integers=weight.integers)  # as digits; zeros have their entropy
        return int(size - math.prod(weight.linear.shape) * (coding.bits - entropy) / 8)

    def _choice(
        self, site: Site, weight: Weight, coding: Coding, plain: float = 0.0, download: int | None = None
    ) -> Choice:
        saved = weight.bytes - _size(weight, coding)
        return Choice(
            site,
            str(coding),
            bytes_saved=saved,
            download_saved=download,
            resident_saved=0,
            stored=True,
            terms=(_Loss("stored", f"{site.key}: {coding}", coding, weight, plain),),
            detail=(coding, weight),
            effects=False,
        )

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        coding, weight = _detail(choice)
        return (weight.linear.gram,) if coding.feedback and weight.linear.gram is not None else ()

    # --- writing -----------------------------------------------------------------------------------

    def apply_all(
        self, choices: Sequence[Choice], rewriter: Rewriter, evidence: Evidence
    ) -> Mapping[Choice, str | Choice]:
        outcome = super().apply_all(choices, rewriter, evidence)
        rewriter.sort()
        return outcome

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        coding, weight = _detail(choice)
        value = rewriter.value(choice.site.key)
        readers = [use.node for use in value.uses()]
        if not readers or value.const_value is None:
            raise Skip("nothing reads it any more")
        code, shift = _coded(value, weight, coding, evidence)
        graph = value.graph
        like = readers[0] if not isinstance(graph, ir.Graph) else graph[0]
        made = code.write(choice.site.key, like, rewriter)
        rewriter.replace_uses(value, made)
        rewriter.drop_unused_weights()
        place = bias_place(readers[0])
        if shift is not None and place is not None and shift.any():
            absorb(rewriter, place, shift, -1)

    def simulate(self, term: Term, rewriter: Rewriter, evidence: Evidence, target: Target, switch: ir.Value) -> bool:
        if not isinstance(term, _Loss) or term.coding is None or term.weight is None:
            return False
        weight = term.weight
        value = rewriter.value(weight.name)
        array = _coded(value, weight, term.coding, evidence)[0].decoded()
        read = value
        if weight.behind:  # what a DequantizeLinear makes of it, so that its readers need no second one
            read = rewriter.value(weight.behind)
            array = (np.asarray(array, np.float32) - weight.zero_of(value)) * weight.scale_of(value)
        uses = [(use.node, use.idx) for use in tuple(read.uses())]
        read_instead(read, array, rewriter, switch, at=uses)
        return True

    def relative(self, term: Term, evidence: Evidence) -> tuple[Hashable, float] | None:
        if not isinstance(term, _Loss) or term.coding is None or term.weight is None:
            return None
        return (term.weight.name, term.plain) if term.plain > 0 else None


def _detail(choice: Choice) -> tuple[Coding, Weight]:
    match choice.detail:
        case (Coding() as coding, Weight() as weight):
            return coding, weight
    raise PassError(f"choice {choice.name!r} was not made by share_weights")


def _size(weight: Weight, coding: Coding) -> int:
    return estimated_bytes(weight.linear, coding, integers=weight.integers, zeros=weight.zeros)


def _subject(value: ir.Value, weight: Weight, moments: tuple[Moments, ...] | None) -> Subject:
    if value.const_value is None:
        raise PassError(f"{value.name!r} is not a weight")
    array = np.asarray(value.const_value.numpy())
    return Subject(array, weight.linear, moments, weight.scale_of(value) if weight.integers else None)


def _coded(
    value: ir.Value, weight: Weight, coding: Coding, evidence: Evidence
) -> tuple[Code, npt.NDArray[np.float64] | None]:
    """What to store for a weight, and what its reader's bias has to take up; remembered, for plans repeat.

    A bias takes up the mean of what is lost, so that only what happens around the mean counts. Rows of a table that is
    looked up count by themselves, too, as much as what a product makes of them.
    """
    need, tensor = weight.linear.gram, value.const_value
    if tensor is None:
        raise PassError(f"{value.name!r} is not a weight")
    seen = weight.linear.moments(evidence) if coding.feedback else None
    readers = [use.node for use in value.uses()]
    biased = seen is not None and not weight.integers and len(readers) == 1 and bias_place(readers[0]) is not None

    def make(_: object) -> tuple[Code, npt.NDArray[np.float64] | None]:
        moments = seen
        if moments is not None and biased:
            moments = tuple(Moments(m.matrix - np.outer(m.mean, m.mean), m.mean) for m in moments)
        elif moments is not None and weight.looked_up:
            moments = tuple(_with_lookups(m) for m in moments)
        with threadpool_limits(1, "blas"):
            subject = _subject(value, weight, moments)
            fitted = coded(subject, coding)
        return fitted.code, _shift(subject, fitted, moments) if biased and moments is not None else None

    key = f"onnxcompress.shared.{coding!r}.{biased}"
    if seen is None or need is None:
        return remembered(tensor, key + ".plain", make)
    return remembered_for(tensor, key, evidence.second_moments(need), make)


def _with_lookups(moments: Moments) -> Moments:
    size = float(np.trace(moments.matrix)) / len(moments.matrix)
    return Moments(moments.matrix / max(size, 1e-300) + np.eye(len(moments.matrix)), moments.mean)


def _shift(subject: Subject, fitted: Fitted, moments: Sequence[Moments]) -> npt.NDArray[np.float64]:
    """(W - W') E[x], by output."""
    error = subject.maps() - fitted.values
    shift = np.einsum("grn,gn->gr", error, np.stack([m.mean for m in moments]))
    groups, outputs = subject.linear.permuted[:2]
    return np.asarray(shift.reshape(groups * outputs, -1).sum(1), np.float64)
