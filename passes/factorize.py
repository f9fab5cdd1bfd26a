"""Low-rank factorization: a layer becomes two or three smaller ones, really smaller in the file and in the kernel.

    y = W x + b   ->   y = U (V x) + b'        V (r, n), U (m, r),  r (m + n) < m n

The factors are those that lose least of the layer's *output* on what calibration saw of its input, in closed form
(:mod:`~onnxcompress.passes._low_rank`); a bias takes up the mean of what is lost. Where a layer is a convolution,
several forms compete; a value that several products read may go through one V for all of them; an LSTM or GRU gets its
input matrix factored, an embedding table becomes a narrower table and a product.

    _product_forms      MatMul, Gemm: svd, joint
    _conv_forms         Conv: channel (svd of 1 x 1), input, spatial, tucker, cp
    _recurrent_forms    LSTM, GRU, RNN: input, recurrent (in the file only)
    _table_forms        Gather from a table, tied heads included: table

A rank is a choice where the profile says that it is faster, or smaller and not slower. Last, what stands second in
every pair is refitted in sequence (:mod:`~onnxcompress.passes._sequence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Self

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage, Term
from onnxcompress.errors import PassOptionError, suggest
from onnxcompress.passes import _sequence as sequence
from onnxcompress.passes._conv_forms import conv_forms
from onnxcompress.passes._factoring import behind_switch, write
from onnxcompress.passes._forms import Form, Ranks, Settings
from onnxcompress.passes._portions import Cut, shared_out
from onnxcompress.passes._product_forms import joint_forms, product_forms
from onnxcompress.passes._recurrent_forms import recurrent_forms
from onnxcompress.passes._table_forms import table_forms
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need, Pair
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["Factorize", "Method"]

_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.125)
"""Shares of a layer's weights worth trying to keep."""
_LEAST_WEIGHTS = 4096
"""Layers with fewer are left alone: nodes cost more than they save."""
_STEPS = 4
"""A layer has at least so many ranks to choose from; steps are halved until it has,"""
_LEAST_STEP = 4
"""but not below this: counts of channels that 4 does not divide fall off every fast path."""

FORMS: Mapping[str, Callable[[ir.Node, GraphView], tuple[Form, ...]]] = {
    "MatMul": product_forms,
    "Gemm": product_forms,
    "Conv": conv_forms,
    "LSTM": recurrent_forms,
    "GRU": recurrent_forms,
    "RNN": recurrent_forms,
    "Gather": table_forms,
}
"""What makes the forms of an operator type."""
NAMES = ("svd", "joint", "channel", "input", "spatial", "tucker", "cp", "recurrent", "both", "table")


_ONLY_ASKED_FOR = ("cp", "recurrent", "both")
"""Forms that save weights and little or no time: by hand only where they are named."""


class Method(StrEnum):
    """What factors are measured by."""

    ACTIVATION = "activation"
    """What calibration saw: the error of the layer's output."""
    PLAIN = "plain"
    """The weights alone: the truncated singular value decomposition."""


@dataclass(frozen=True, order=True)
class _Loss(Term):
    """What a cut loses."""

    cut: Cut | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Factorize(Pass):
    """Writes layers as products of smaller ones (low rank), fitted to what they really read.

    Without rank, ranks, keep or energy the planner chooses layers, forms and ranks.

    Attributes:
        rank: of every layer, as far as it saves weights there.
        ranks: of single layers, as ``node=32``; others are left alone where there is no rank, keep or energy besides.
        keep: share of each layer's weights to keep.
        together: ``keep`` is a share of the weights of all layers together, and those keep more that would lose more.
        energy: share of the energy of each layer's output to keep, at the smallest rank that does.
        layers: only these nodes; all by default.
        forms: only these; all that fit by default.
        method: what factors are measured by.
        recover: refit what stands second in every pair, in sequence, to what the original gives there.
        multiple: ranks are multiples of this; by default of what the profile says.
        ridge: weight of what calibration did not see, relative to the mean of what it saw; more is taken where few rows
            were seen and that loses less on samples that were not fitted to, except of 0.
    """

    name: ClassVar[str] = "factorize"
    stage: ClassVar[Stage] = Stage.FACTORIZE

    rank: int | None = None
    ranks: tuple[str, ...] = ()
    keep: float | None = None
    together: bool = False
    energy: float | None = None
    layers: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    method: Method = Method.ACTIVATION
    recover: bool = True
    multiple: int | None = None
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "method", Method(self.method))  # a plain string will do
        except ValueError:
            raise PassOptionError(
                f"factorize: method is {self.method!r}", hint=suggest(str(self.method), list(Method))
            ) from None
        if sum(o is not None for o in (self.rank, self.keep, self.energy)) > 1:
            raise PassOptionError("factorize: more than one of rank, keep and energy is given", hint="choose one")
        if self.together and self.keep is None:
            raise PassOptionError("factorize: together is given without keep", hint="say which share, as keep=0.8")
        if self.rank is not None and self.rank < 1:
            raise PassOptionError(f"factorize: rank is {self.rank}", hint="choose 1 or more")
        for name, share in (("keep", self.keep), ("energy", self.energy)):
            if share is not None and not 0 < share < 1:
                raise PassOptionError(f"factorize: {name} is {share}", hint="choose it above 0 and below 1")
        if self.multiple is not None and self.multiple < 1:
            raise PassOptionError(f"factorize: multiple is {self.multiple}", hint="choose 1 or more")
        if not 0 <= self.ridge < math.inf:
            raise PassOptionError(f"factorize: ridge is {self.ridge}", hint="choose 0 or more")
        for form in self.forms:
            if form not in NAMES:
                raise PassOptionError(f"factorize: there is no form {form!r}", hint=suggest(form, NAMES))
        _ = self._named

    @classmethod
    def by_default(cls) -> Self:
        """Nothing is refitted in sequence where nobody asked: it takes as long as all the rest."""
        return cls(recover=False)

    @property
    def planned(self) -> bool:
        """A rank is the user's word; without one ranks are chosen where they pay."""
        return self.rank is None and self.keep is None and self.energy is None and not self.ranks

    @property
    def _named(self) -> dict[str, int]:
        """Ranks of single layers, by node.

        Raises:
            PassOptionError: one cannot be read.
        """
        found: dict[str, int] = {}
        for text in self.ranks:
            name, equals, number = text.rpartition("=")
            if not equals or not name.strip() or not number.strip().isdigit() or int(number) < 1:
                raise PassOptionError(f"factorize: cannot read rank {text!r}", hint="write node=rank, as fc1=32")
            found[name.strip()] = int(number)
        return found

    @property
    def _settings(self) -> Settings:
        return Settings(self.method is Method.ACTIVATION, self.ridge)

    # --- reading -----------------------------------------------------------------------------------

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        """Every layer with factors, and every value that several layers read.

        Raises:
            PassOptionError: a layer asked for by name is none that has factors.
        """
        if done := view.quantized_nodes:
            yield Skipped(done[0], f"the model is already quantized ({done[0]!r} and {len(done) - 1} more nodes)")
            return
        found, refused = self._found(view)
        wanted = {*self.layers, *self._named}
        for name in sorted(wanted):
            if not any(name == key or name in forms[0].nodes for key, forms in found.items()):
                raise self._no_candidate(name, found, refused, view)
        others = not self.layers and any(o is not None for o in (self.rank, self.keep, self.energy))
        for name, reason in refused.items():
            if others or not wanted or name in wanted:
                yield Skipped(name, reason)
        for key, forms in found.items():
            if others or not wanted or wanted & {key, *forms[0].nodes}:
                yield Site(key, forms[0].nodes)

    def _no_candidate(
        self, name: str, found: Collection[str], refused: Mapping[str, str], view: GraphView
    ) -> PassOptionError:
        reason = refused.get(name)
        if reason is None and any(name == str(n.name) for n in view.nodes()):
            reason = f"{view.node(name).op_type} has no low-rank form, or none of those asked for"
        hint = "leave it out" if reason is not None else suggest(name, list(found))
        return PassOptionError(f"factorize: layer {name!r}: {reason or 'there is no such node'}", hint=hint)

    def _found(self, view: GraphView) -> tuple[dict[str, tuple[Form, ...]], dict[str, str]]:
        """Forms by site, and why other nodes have none."""
        return view.derive(("factors", self.forms, self.planned), lambda: self._look(view))

    def _look(self, view: GraphView) -> tuple[dict[str, tuple[Form, ...]], dict[str, str]]:
        found: dict[str, tuple[Form, ...]] = {}
        refused: dict[str, str] = {}
        for node in view.nodes(*FORMS):
            name = str(node.name)
            try:
                forms = tuple(f for f in FORMS[node.op_type](node, view) if self._allows(f))
                if not forms:
                    raise Skip(f"it has no form among {', '.join(self.forms)}")
                if forms[0].old_weights < _LEAST_WEIGHTS:
                    raise Skip(f"it has {forms[0].old_weights} weights: too few to be worth more nodes")
                if not _finite(node):
                    raise Skip("its weight holds NaN or infinity")
                if forms[0].nodes[0] == name:
                    found[name] = forms
            except Skip as skip:
                refused[name] = skip.reason
        for form in joint_forms(view) if self.planned or "joint" in self.forms else ():
            if self._allows(form) and all(_finite(view.node(name)) for name in form.nodes):
                found[" + ".join(form.nodes)] = (form,)
        covered = {name for forms in found.values() for form in forms for name in form.nodes}
        return found, {name: reason for name, reason in refused.items() if name not in covered}

    def _allows(self, form: Form) -> bool:
        return not self.forms or form.name in self.forms

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        forms = [f for f in self._found(view)[0][site.key] if target.folds_constants or not f.stored]
        step = self._step(forms, target)
        if self.planned:
            cuts = [Cut(form, ranks) for form in forms for ranks in _rungs(form, step)]
        else:
            cuts = [self._by_hand(site, forms, step)]
        cuts.sort(key=lambda cut: -cut.form.weights(cut.ranks))
        return [self._choice(site, cut) for cut in cuts]

    def _step(self, forms: Sequence[Form], target: Target) -> int:
        if self.multiple is not None:
            return self.multiple
        step = target.channel_multiple
        while step > _LEAST_STEP and step * _STEPS > min((min(f.most) for f in forms), default=0):
            step //= 2
        return step

    def _by_hand(self, site: Site, forms: Sequence[Form], step: int) -> Cut:
        """The cut that the user's word leads to; of several forms the one with least weights, or lost of them."""
        wanted = self._named.get(site.key, self.rank)
        cuts: list[Cut] = []
        for form in forms:
            if form.name in _ONLY_ASKED_FOR and form.name not in self.forms:
                continue
            if wanted is not None:
                if site.key in self._named and wanted > max(form.most):
                    continue
                ranks: Ranks | None = tuple(min(wanted, m) for m in form.most)
            elif self.keep is not None:
                ranks = form.at_share(self.keep, step)
            elif self.energy is not None:
                ranks = form.at_share(1.0, 1)
            else:
                raise Skip("no rank is given for it")
            if ranks is not None and form.weights(ranks) < form.old_weights:
                cuts.append(Cut(form, ranks, self.energy, self.keep if self.together else None, step))
        if len(cuts) == 1:
            return cuts[0]
        if cuts:
            with threadpool_limits(1, "blas"):
                return min(cuts, key=lambda cut: cut.form.factors(cut.ranks, Evidence(), Settings(False)).lost)
        most = max((max(f.most) for f in forms), default=0)
        if wanted is not None and site.key in self._named:
            problem = (
                f"rank {wanted} is above {most}, the smaller side of its weight"
                if wanted > most
                else f"rank {wanted} has more weights than the layer itself"
            )
            raise PassOptionError(f"factorize: layer {site.key!r}: {problem}", hint="choose a smaller rank")
        raise Skip("no rank that is asked for saves weights here")

    def _choice(self, site: Site, cut: Cut) -> Choice:
        form, ranks = cut.form, cut.ranks
        size = _text(ranks)
        name = f"{form.name} {size}"
        if cut.energy is not None:
            name = f"{form.name}, {cut.energy:.4g} of the energy"
        elif cut.share is not None:
            name = f"{form.name}, its part of {cut.share:.4g} of all weights"
        return Choice(
            site,
            name,
            becomes=form.drawing(ranks),
            removes=form.nodes if len(form.nodes) > 1 else (),
            bytes_saved=4 * (form.old_weights - form.weights(ranks)),
            terms=(_Loss("low_rank", f"{site.key}:{form.name}:{size}", cut),),
            detail=cut,
            calibrated=self.planned and bool(form.needs()),
        )

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        return _cut(choice).form.needs() if self.method is Method.ACTIVATION else ()

    # --- writing -----------------------------------------------------------------------------------

    def apply_all(
        self, choices: Sequence[Choice], rewriter: Rewriter, evidence: Evidence
    ) -> Mapping[Choice, str | Choice]:
        shared = [choice for choice in choices if _cut(choice).share is not None]
        if not shared:
            return super().apply_all(choices, rewriter, evidence)
        with threadpool_limits(1, "blas"):
            found = shared_out([_cut(c) for c in shared], evidence, self._settings)
        given: dict[Choice, Choice] = {}
        outcome: dict[Choice, str | Choice] = {}
        for choice, ranks in zip(shared, found, strict=True):
            if ranks is None:
                outcome[choice] = "it would lose more than the other layers: all of its weights are kept"
            else:
                given[choice] = self._choice(choice.site, Cut(_cut(choice).form, ranks))
        made = super().apply_all(list(given.values()), rewriter, evidence)
        return outcome | {choice: made.get(other, other) for choice, other in given.items()}

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> Choice | None:
        cut = _cut(choice)
        form = cut.form
        with threadpool_limits(1, "blas"):
            ranks = self._ranks(cut, evidence)
            factors = form.factors(ranks, evidence, self._settings)
        if cut.energy is not None:
            rewriter.tell(choice.site.key, f"it keeps {1 - factors.lost:.4g} of its output's energy")
        if self.method is Method.ACTIVATION and (remark := _on_what(form, evidence)):
            rewriter.tell(choice.site.key, remark)
        write(form, ranks, factors, rewriter)
        return None if cut.energy is None else self._choice(choice.site, Cut(form, ranks))

    def _ranks(self, cut: Cut, evidence: Evidence) -> Ranks:
        """Those of a cut; by energy the smallest that keep enough."""
        if cut.energy is None:
            return cut.ranks
        rungs = [r for r in cut.form.ladder(1) if cut.form.weights(r) <= cut.form.weights(cut.ranks)]
        low, high = 0, len(rungs) - 1
        while low < high:
            middle = (low + high) // 2
            if cut.form.factors(rungs[middle], evidence, self._settings).lost <= 1 - cut.energy:
                high = middle
            else:
                low = middle + 1
        if cut.form.factors(rungs[low], evidence, self._settings).lost > 1 - cut.energy:
            raise Skip(f"no rank that saves weights keeps {cut.energy:.4g} of its output's energy")
        return rungs[low]

    def simulate(self, term: Term, rewriter: Rewriter, evidence: Evidence, target: Target, switch: ir.Value) -> bool:
        cut = term.cut if isinstance(term, _Loss) else None
        if cut is None:
            return False
        form = cut.form
        with threadpool_limits(1, "blas"):
            factors = form.factors(cut.ranks, evidence, self._settings)
        behind_switch(form, cut.ranks, factors, rewriter, switch)
        return True

    def settling(self, view: GraphView) -> Iterable[Collection[Need | Pair]]:
        return sequence.rounds(view) if self.recover else ()

    def settle(self, rewriter: Rewriter, before: Evidence, after: Evidence) -> None:
        sequence.settle(rewriter, after)

    def relative(self, term: Term, evidence: Evidence) -> tuple[Hashable, float] | None:
        cut = term.cut if isinstance(term, _Loss) else None
        if cut is None:
            return None
        with threadpool_limits(1, "blas"):
            return cut.form.nodes, cut.form.factors(cut.ranks, evidence, self._settings).lost


def _on_what(form: Form, evidence: Evidence) -> str:
    """What has to be known of what factors were fitted to; empty where calibration saw enough."""
    needs = form.needs()
    seen = [evidence.second_moments(n) for n in needs if evidence.has(n)]
    if evidence.synthetic or not seen:
        return "plain: nothing was observed of what it reads"
    few = [m for m in seen if m.count < len(m.mean)]
    if not few:
        return ""
    return f"{few[0].count} rows were seen for {len(few[0].mean)} inputs: the rest counts evenly; use more samples"


def _text(ranks: Ranks) -> str:
    return "x".join(map(str, ranks))


def _finite(node: ir.Node) -> bool:
    tensors = (v.const_value for v in node.inputs if v is not None and v.is_initializer() and v.const_value is not None)
    return all(np.isfinite(t.numpy()).all() for t in tensors if t.dtype == ir.DataType.FLOAT)


def _rungs(form: Form, step: int) -> list[Ranks]:
    """Ranks at shares of the weights, each once."""
    found = (form.at_share(share, step) for share in _SHARES)
    return list(dict.fromkeys(r for r in found if r is not None))


def _cut(choice: Choice) -> Cut:
    if not isinstance(choice.detail, Cut):
        raise PassOptionError(f"choice {choice.name!r} was not made by factorize")
    return choice.detail
