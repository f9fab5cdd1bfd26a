"""How much each source of distortion hurts the outputs, measured all in one session.

Every distortion a pass can simulate is added to one copy of the model behind a scalar switch, so
with all switches at 0 it is the original and with one at 1 it is that distortion alone. Trying a
term is then one run, and not one rewritten model and one session.

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
from onnxcompress.evaluate import Feed, Runner
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target

__all__ = ["Prices", "measure_prices"]

logger = logging.getLogger(__name__)

_NEGLIGIBLE = 0.02
"""A whole kind of terms that costs less than this share of the budget is not taken apart."""


@dataclass(frozen=True)
class Prices:
    """Noise power over signal power at the worst output, by term.

    Attributes:
        terms: the price of every term.
        shared: kinds measured together, whose terms share one figure evenly.
        impossible: terms that cannot be simulated, with the reason; choices that cause them are out.
    """

    terms: Mapping[Term, float]
    shared: tuple[str, ...]
    impossible: Mapping[Term, str]


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
    board, switches, impossible = _switchboard(pass_, model, terms, evidence, target)
    if not switches:
        return Prices({}, (), impossible)
    runner = Runner(board, outputs=_present(board, names))
    off = {name: np.zeros((), np.float32) for name in switches.values()}
    references = [runner.run({**feed, **off}) for feed in feeds]

    def noise(on: Sequence[Term]) -> float:
        chosen = {switches[t]: np.ones((), np.float32) for t in on}
        results = (runner.run({**feed, **off, **chosen}) for feed in feeds)
        return _worst(references, results)

    kinds: dict[str, list[Term]] = {}
    for term in switches:
        kinds.setdefault(term.kind, []).append(term)
    prices: dict[Term, float] = {}
    shared: list[str] = []
    planned, done = len(kinds) + len(switches), 0
    for kind, members in kinds.items():
        together = noise(members)
        done += 1
        if together <= _NEGLIGIBLE * budget:
            shared.append(kind)
            prices.update(dict.fromkeys(members, together / len(members)))
            done += len(members)
        else:
            for term in members:
                prices[term] = noise([term]) if len(members) > 1 else together
                done += 1
                if progress is not None:
                    progress(done, planned)
    return Prices(prices, tuple(shared), impossible)


def _switchboard(
    pass_: Pass, model: ir.Model, terms: Sequence[Term], evidence: Evidence, target: Target
) -> tuple[ir.Model, dict[Term, str], dict[Term, str]]:
    board = models.clone(model)
    rewriter = Rewriter(board)
    switches: dict[Term, str] = {}
    impossible: dict[Term, str] = {}
    for number, term in enumerate(terms):
        switch = rewriter.add_input(f"switch_{number}", ir.DataType.FLOAT, ())
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
            a = np.asarray(expected, np.float64)
            signal[name] = signal.get(name, 0.0) + float(np.square(a).sum())
            error[name] = error.get(name, 0.0) + float(np.square(a - result[name]).sum())
    ratios = [error[n] / signal[n] if signal[n] > 0 else (0.0 if error[n] == 0 else np.inf) for n in signal]
    return float(max(ratios, default=0.0))
