"""Making choices on a clone: the model is committed or dropped, never half-edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.base import Choice, Pass, Skip, Skipped
from onnxcompress.errors import OnnxCompressError, PassContractError
from onnxcompress.evaluate import Reference, is_lossless
from onnxcompress.report import Comparison, PassReport
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["LOSSLESS_SAMPLES", "Built", "build", "commit_lossless", "pass_options"]

LOSSLESS_SAMPLES = 4
"""Feeds a lossless pass is checked on; the final result is checked on all held-out ones."""


@dataclass(frozen=True)
class Built:
    """A rewritten clone, which choices were made on it, and which turned out impossible."""

    model: ir.Model
    made: tuple[Choice, ...]
    refused: tuple[Skipped, ...]


def build(model: ir.Model, pass_: Pass, choices: Iterable[Choice], evidence: Evidence) -> Built:
    """Makes choices on a clone of the model, in the order given.

    Raises:
        PassContractError: the pass raised something that is not Skip or an error of ours.
    """
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    made: list[Choice] = []
    refused: list[Skipped] = []
    for choice in choices:
        edits = len(rewriter.log)
        try:
            pass_.apply(choice, rewriter, evidence)
        except Skip as skip:
            if len(rewriter.log) != edits:
                raise PassContractError(
                    f"pass {pass_.name!r} edited the model at {choice.site.key!r} and then refused: {skip.reason}"
                ) from skip
            refused.append(Skipped(choice.site.key, skip.reason))
        except OnnxCompressError:
            raise
        except Exception as error:  # a pass may be anybody's code: say whose and where
            raise PassContractError(
                f"pass {pass_.name!r} broke at {choice.site.key!r}: {type(error).__name__}: {error}",
                hint="report it to the author of the pass",
            ) from error
        else:
            made.append(choice)
    rewriter.drop_unused_weights()
    return Built(copy, tuple(made), tuple(refused))


def commit_lossless(
    model: ir.Model,
    pass_: Pass,
    evidence: Evidence,
    target: Target,
    reference: Reference,
    noise: Callable[[], Comparison],
) -> tuple[ir.Model, PassReport, tuple[Skipped, ...]]:
    """Makes every choice of a lossless pass; keeps the result only if no output changed.

    Args:
        model: what to improve.
        pass_: a pass with ``lossless = True``.
        evidence: what it asked for.
        target: the device.
        reference: outputs of the original to compare with.
        noise: measures what float rounding alone does to the original; called only in doubt.

    Returns:
        The new model, or ``model`` itself; what happened; sites left alone.
    """
    view = GraphView(model)
    sites = list(pass_.sites(view))
    skipped = [s for s in sites if isinstance(s, Skipped)]
    choices: list[Choice] = []
    for site in sites:
        if isinstance(site, Skipped):
            continue
        try:
            choices += list(pass_.choices(site, view, target))[-1:]  # the strongest: it costs nothing
        except Skip as skip:
            skipped.append(Skipped(site.key, skip.reason))
    if not choices:
        return model, _report(pass_, 0, "nothing to do", ""), tuple(skipped)
    built = build(model, pass_, choices, evidence)
    skipped += built.refused
    if not built.made:
        return model, _report(pass_, 0, "nothing to do", ""), tuple(skipped)
    try:
        comparison = reference.compare(built.model, limit=LOSSLESS_SAMPLES)
    except OnnxCompressError as error:
        return model, _report(pass_, 0, "dropped", f"the result does not run: {error.message}"), tuple(skipped)
    depth = len(view.nodes())
    if not is_lossless(comparison, depth) and not is_lossless(comparison, depth, noise()):
        return model, _report(pass_, 0, "dropped", f"it changed the outputs: {_worst(comparison)}"), tuple(skipped)
    return built.model, _report(pass_, len(built.made), "applied", ""), tuple(skipped)


def pass_options(pass_: Pass) -> dict[str, object]:
    """The options of a pass as plain values."""
    return {name: _plain(getattr(pass_, name)) for name in getattr(pass_, "__dataclass_fields__", {})}


def _plain(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def _report(pass_: Pass, changed: int, outcome: str, reason: str) -> PassReport:
    return PassReport(pass_.name, pass_options(pass_), changed, outcome, reason)


def _worst(comparison: Comparison) -> str:
    worst = min(comparison.outputs, key=lambda o: float("inf") if o.sqnr_db is None else o.sqnr_db, default=None)
    return "none" if worst is None else f"{worst.name!r} is at {worst.sqnr_db} dB, {worst.max_abs:.3g} off at most"
