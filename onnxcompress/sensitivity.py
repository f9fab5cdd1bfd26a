"""How much each source of distortion hurts the outputs, measured all in one session.

Every distortion of one kind that a pass can simulate is added to one copy of the model behind a
switch, so with all switches off it is the original and with one on it is that distortion alone; what
is off is not computed. Trying a term is then one run, and not one rewritten model and one session;
terms that do little are tried together, and a group is halved only where it matters.

The price of a term is noise power over signal power at the worst observed output. Prices of
independent roundings add; how well that holds is checked afterwards on the plan as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.base import Pass, Skip, Term
from onnxcompress.data import Feed
from onnxcompress.errors import ModelRunError
from onnxcompress.rewrite import Rewriter
from onnxcompress.session import Runner
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target

__all__ = ["Prices", "measure_prices"]

logger = logging.getLogger(__name__)

_NEGLIGIBLE = 0.05
"""Terms that together cost less than this share of the budget are not taken apart."""


@dataclass(frozen=True)
class Prices:
    """Noise power over signal power at the worst output, by term.

    Attributes:
        terms: the price of every term.
        shared: terms measured together, sharing one figure evenly.
        impossible: terms that cannot be simulated, with the reason; choices that cause them are out.
    """

    terms: Mapping[Term, float]
    shared: tuple[tuple[Term, ...], ...]
    impossible: Mapping[Term, str]

    def joined(self, other: Prices) -> Prices:
        """The terms of both."""
        return Prices(
            {**self.terms, **other.terms}, (*self.shared, *other.shared), {**self.impossible, **other.impossible}
        )


def measure_prices(
    pass_: Pass,
    model: ir.Model,
    terms: Sequence[Term],
    evidence: Evidence,
    target: Target,
    feeds: Sequence[Feed],
    names: Sequence[str],
    *,
    budget: float,
    progress: Callable[[int, int], None] | None = None,
) -> Prices:
    """Prices of all terms.

    Args:
        pass_: whose terms they are; it must be able to simulate them.
        model: the model before the pass.
        terms: distortions to price.
        evidence: what calibration learned.
        target: the device.
        feeds: a few samples; cost grows with their number.
        names: observed values.
        budget: noise power the plan may cause, to tell what is negligible.
        progress: called with (runs done, runs planned).
    """
    kinds: dict[str, list[Term]] = {}
    for term in terms:
        kinds.setdefault(term.kind, []).append(term)
    prices: dict[Term, float] = {}
    shared: list[tuple[Term, ...]] = []
    impossible: dict[Term, str] = {}
    done = 0
    for members in kinds.values():  # a session of its own each: nothing waits for what is not being measured
        board = _Board(pass_, model, members, evidence, target, feeds, names)
        impossible.update(board.impossible)
        waiting = [tuple(t for t in members if t in board.switches)]
        while waiting:
            group = waiting.pop()
            if not group:
                continue
            noise = board.noise(group)
            if len(group) == 1 or noise <= _NEGLIGIBLE * budget:
                prices.update(dict.fromkeys(group, noise / len(group)))
                shared += [group] if len(group) > 1 else []
                done += len(group)
                if progress is not None:
                    progress(done, len(terms))
            else:
                middle = len(group) // 2
                waiting += [group[middle:], group[:middle]]
    return Prices(prices, tuple(shared), impossible)


class _Board:
    """A session of the model with a switch for every term of one kind."""

    def __init__(
        self,
        pass_: Pass,
        model: ir.Model,
        terms: Sequence[Term],
        evidence: Evidence,
        target: Target,
        feeds: Sequence[Feed],
        names: Sequence[str],
    ) -> None:
        board, self.switches, self.impossible = _switchboard(pass_, model, terms, evidence, target)
        self._feeds = feeds
        self._off = {name: np.zeros((), np.bool_) for name in self.switches.values()}
        if not self.switches:
            return
        try:
            self._runner = Runner(board, outputs=_present(board, names))
            self._references = [self._runner.run({**feed, **self._off}) for feed in feeds]
        except ModelRunError as error:  # then nothing can be said about any of them
            reason = f"its noise cannot be measured: {error.message}"
            self.impossible = {**self.impossible, **dict.fromkeys(self.switches, reason)}
            self.switches = {}

    def noise(self, on: Sequence[Term]) -> float:
        """Noise power over signal power at the worst output with these terms switched on."""
        chosen = {self.switches[t]: np.ones((), np.bool_) for t in on}
        results = (self._runner.run({**feed, **self._off, **chosen}) for feed in self._feeds)
        return _worst(self._references, results)


def _switchboard(
    pass_: Pass, model: ir.Model, terms: Sequence[Term], evidence: Evidence, target: Target
) -> tuple[ir.Model, dict[Term, str], dict[Term, str]]:
    board = models.clone(model)
    rewriter = Rewriter(board)
    switches: dict[Term, str] = {}
    impossible: dict[Term, str] = {}
    for number, term in enumerate(terms):
        switch = rewriter.add_input(f"switch_{number}", ir.DataType.BOOL, ())
        try:
            if not pass_.simulate(term, rewriter, evidence, target, switch):
                raise Skip(f"{pass_.name} cannot simulate it")
        except Skip as skip:
            impossible[term] = skip.reason
            rewriter.remove_input(switch)
            continue
        switches[term] = str(switch.name)
    return board, switches, impossible


def _present(board: ir.Model, names: Sequence[str]) -> tuple[str, ...]:
    rewriter = Rewriter(board)
    return tuple(n for n in names if rewriter.find(n) is not None)


def _worst(
    references: Sequence[Mapping[str, npt.NDArray[np.generic]]],
    results: Iterable[Mapping[str, npt.NDArray[np.generic]]],
) -> float:
    signal: dict[str, float] = {}
    error: dict[str, float] = {}
    for reference, result in zip(references, results, strict=True):
        for name, expected in reference.items():
            if not np.issubdtype(expected.dtype, np.floating):
                continue
            if expected.shape != result[name].shape:
                return float("inf")
            a, b = np.asarray(expected, np.float64), np.asarray(result[name], np.float64)
            finite = np.isfinite(a)
            if not finite.all():  # scores masked with minus infinity, which must stay what they are
                if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
                    return float("inf")
                a, b = a[finite], b[finite]
            if not np.isfinite(b).all():
                return float("inf")
            signal[name] = signal.get(name, 0.0) + float(np.square(a).sum())
            error[name] = error.get(name, 0.0) + float(np.square(a - b).sum())
    ratios = [error[n] / signal[n] if signal[n] > 0 else (0.0 if error[n] == 0 else np.inf) for n in signal]
    return float(max(ratios, default=0.0))
