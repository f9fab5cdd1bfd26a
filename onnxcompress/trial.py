"""Making choices on a clone: the model is committed or dropped, never half-edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.base import Choice, Pass, Skip, Skipped
from onnxcompress.errors import OnnxCompressError
from onnxcompress.evaluate import Reference, is_lossless
from onnxcompress.notes import forget_notes
from onnxcompress.report import Comparison, PassReport
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["LOSSLESS_SAMPLES", "Built", "Tidied", "build", "difference", "pass_options", "tidy"]

LOSSLESS_SAMPLES = 4
"""Feeds a lossless pass is checked on; the final result is checked on all held-out ones."""


@dataclass(frozen=True)
class Built:
    """A rewritten clone.

    Attributes:
        model: the clone.
        made: choices made on it.
        refused: those that turned out impossible.
        told: what the pass had to say of those it made, by site.
    """

    model: ir.Model
    made: tuple[Choice, ...]
    refused: tuple[Skipped, ...]
    told: Mapping[str, str] = field(default_factory=dict)


def build(model: ir.Model, pass_: Pass, choices: Iterable[Choice], evidence: Evidence) -> Built:
    """Makes choices on a clone of the model, in the order given.

    Raises:
        PassContractError: the pass raised something that is not Skip or an error of ours.
    """
    copy = models.clone(model)
    forget_notes(copy)
    rewriter = Rewriter(copy)
    wanted = tuple(choices)
    outcome = pass_.apply_all(wanted, rewriter, evidence)
    rewriter.drop_unused_weights()
    refused = {choice: reason for choice, reason in outcome.items() if isinstance(reason, str)}
    instead = {choice: other for choice, other in outcome.items() if isinstance(other, Choice)}
    made = tuple(instead.get(c, c) for c in wanted if c not in refused)
    return Built(copy, made, tuple(Skipped(c.site.key, reason) for c, reason in refused.items()), rewriter.told)


@dataclass(frozen=True)
class Tidied:
    """What a lossless pass made of a model, not yet checked.

    Attributes:
        model: the result; the model that was given if there was nothing to do.
        report: what happened.
        skipped: sites left alone.
    """

    model: ir.Model
    report: PassReport
    skipped: tuple[Skipped, ...]


def tidy(
    model: ir.Model, pass_: Pass, target: Target, gather: Callable[[GraphView, Sequence[Choice]], Evidence]
) -> Tidied:
    """Makes every choice of a lossless pass.

    Args:
        model: what to improve.
        pass_: a pass with ``lossless = True``.
        target: the device.
        gather: collects the evidence choices need.
    """
    view = GraphView(model)
    skipped: list[Skipped] = []
    choices: list[Choice] = []
    for site in pass_.sites(view):
        if isinstance(site, Skipped):
            skipped.append(site)
            continue
        try:
            choices += list(pass_.choices(site, view, target))[-1:]  # the strongest: it costs nothing
        except Skip as skip:
            skipped.append(Skipped(site.key, skip.reason))
    if choices:
        built = build(model, pass_, choices, gather(view, choices))
        skipped += built.refused
        if built.made:
            return Tidied(built.model, _report(pass_, len(built.made), "applied", ""), tuple(skipped))
    return Tidied(model, _report(pass_, 0, "nothing to do", ""), tuple(skipped))


def difference(model: ir.Model, reference: Reference, depth: int, noise: Callable[[], Comparison]) -> str:
    """How a model that should be equal differs from the original; empty if only in float rounding.

    Args:
        model: the candidate.
        reference: outputs of the original.
        depth: layers in a row, for the bound on rounding.
        noise: measures what rounding alone does to the original; called only in doubt.
    """
    try:
        comparison = reference.compare(model, limit=LOSSLESS_SAMPLES)
    except OnnxCompressError as error:
        return f"the result does not run: {error.message}"
    if is_lossless(comparison, depth) or is_lossless(comparison, depth, noise()):
        return ""
    return f"it changed the outputs: {_worst(comparison)}"


def pass_options(pass_: Pass) -> dict[str, object]:
    """The options of a pass as plain values."""
    if not dataclasses.is_dataclass(pass_):
        return {}
    return {field.name: _plain(getattr(pass_, field.name)) for field in dataclasses.fields(pass_)}


def _plain(value: object) -> object:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def _report(pass_: Pass, changed: int, outcome: str, reason: str) -> PassReport:
    return PassReport(pass_.name, pass_options(pass_), changed, outcome, reason)


def _worst(comparison: Comparison) -> str:
    worst = min(comparison.outputs, key=lambda o: float("inf") if o.sqnr_db is None else o.sqnr_db, default=None)
    return "none" if worst is None else f"{worst.name!r} is at {worst.sqnr_db} dB, {worst.max_abs:.3g} off at most"
