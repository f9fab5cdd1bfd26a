"""Records of the library as text for a person. Computes nothing."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxcompress import render_load
from onnxcompress.render_profile import profile, profiles
from onnxcompress.report import Attempt, Comparison, Latency, PassReport, Report, SiteReport
from onnxcompress.tables import amount, columns, decibel, milliseconds, plural, ratio, section, size, some, used_columns

if TYPE_CHECKING:  # what is shown is not needed for showing it, and takes a second to import
    from onnxcompress.cost import ModelCost, NodeCost
    from onnxcompress.models_zoo import ZooModel
    from onnxcompress.sizes import FileSize

__all__ = ["SiteGroup", "collapse", "comparison", "cost", "passes", "profile", "profiles", "report", "zoo"]

_DEAREST = 20
_VARIABLE = re.compile(r"'[^']*'|[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


# --- the report --------------------------------------------------------------------------------


def report(what: Report, *, output: Path | None = None, verbose: bool = False) -> RenderableType:
    """A whole run: totals, what was done, what was left alone and why, attempts, warnings.

    Args:
        what: the run.
        output: the file that was written.
        verbose: one row a site; otherwise sites with the same fate are one row.
    """
    head = Text.assemble((Path(what.input).name or what.input, "bold"))
    if output is not None:
        head.append(f" -> {output}", style="bold")
    parts: list[RenderableType] = [
        head,
        Text(f"profile {what.profile}, calibration: {what.calibration}"),
        *([Text(f"target: {_target(what.target)}")] if what.target else ()),
        Text(what.outcome, style="bold green" if _changed(what) else "bold yellow"),
        section("Totals", _totals(what)),
    ]
    applied = [p for p in what.passes if p.outcome != "nothing to do" or verbose]
    if applied:
        rows = [(p.name, p.outcome, str(p.changed) if p.changed else "", *_added(p), p.reason) for p in applied]
        heads = ("pass", "outcome", "sites", "saves", "off the file", "outputs at", "what it did")
        parts.append(section("Passes", used_columns(rows, heads, right=(2, 3, 4, 5))))
    order = [p.name for p in what.passes]
    done = [s for s in what.sites if s.decision != "keep"]
    kept = [s for s in what.sites if s.decision == "keep"]
    if done:
        parts.append(section(f"Changed: {plural(len(done), 'site')}", _sites(done, order, verbose)))
    if kept:
        parts.append(section(f"Left alone: {plural(len(kept), 'site')}", _sites(kept, order, verbose)))
    if what.attempts:
        parts.append(section("Attempts", _attempts(what.attempts, what.target)))
    if what.notes:
        parts.append(section("Notes", Group(*(Text(n) for n in what.notes))))
    if what.warnings:
        parts.append(section("Warnings", Group(*(Text(w, style="yellow") for w in what.warnings))))
    return Group(*parts)


def _added(row: PassReport) -> tuple[str, str, str]:
    """What a pass brought, and where the worst output stands after it."""
    if row.added is None:
        return "", "", ""
    sqnr = f"{row.added.min_sqnr_db:.1f} dB" if math.isfinite(row.added.min_sqnr_db) else ""
    return some(milliseconds, row.added.predicted_ms), some(size, row.added.weight_bytes), sqnr


def _changed(what: Report) -> bool:
    return any(s.decision != "keep" for s in what.sites) or any(p.outcome == "applied" for p in what.passes)


def _totals(what: Report) -> Table:
    t = what.totals
    rows = [
        ("file", size(t.file_bytes[0]), size(t.file_bytes[1]), ratio(*t.file_bytes, "smaller", "larger")),
        ("file, zstd -3", size(t.zstd_bytes[0]), size(t.zstd_bytes[1]), ratio(*t.zstd_bytes, "smaller", "larger")),
        _predicted_row(*t.predicted_ms, what.profile),
    ]
    if t.memory_bytes is not None:
        less = ratio(*t.memory_bytes, "smaller", "larger")
        rows.append(("memory, predicted", size(t.memory_bytes[0]), size(t.memory_bytes[1]), less))
    if t.energy_mj is not None:
        before, after = t.energy_mj
        rows.append(("energy, predicted", f"{before:.3g} mJ", f"{after:.3g} mJ", ratio(before, after, "less", "more")))
    if t.latency is not None:
        rows.append(_latency_row(t.latency))
    if t.load is not None:
        rows += render_load.rows(t.load, peak=False)
    rows.append(("worst output", "", decibel(t.comparison.min_sqnr_db), _worst(t.comparison, what.budget.min_sqnr_db)))
    if t.metric_before is not None and t.metric_after is not None:
        drop = (t.metric_after - t.metric_before) / abs(t.metric_before) if t.metric_before else 0.0
        allowed = f" (-{what.budget.max_drop:.2%} allowed)" if what.budget.max_drop is not None else ""
        rows.append(("metric", f"{t.metric_before:.4g}", f"{t.metric_after:.4g}", f"{drop:+.2%}{allowed}"))
    return columns(rows, ("", "before", "after", ""), right=[1, 2])


def _target(weights: Mapping[str, float]) -> str:
    """As the command line takes it."""
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items() if weight)


def _predicted_row(before: float | None, after: float | None, profile: str) -> tuple[str, str, str, str]:
    change = "" if before is None or after is None else f"{ratio(before, after, 'faster', 'slower')} "
    return "predicted", _time_there(before), _time_there(after), f"{change}on {profile}"


def _time_there(time: float | None) -> str:
    return "does not run" if time is None else milliseconds(time)


def _latency_row(latency: Latency) -> tuple[str, str, str, str]:
    return (
        "measured here",
        milliseconds(latency.before_ms),
        milliseconds(latency.after_ms),
        f"{ratio(latency.speed_up, 1.0, 'faster', 'slower')}"
        f" ({plural(latency.rounds, 'round')} in turns, {plural(latency.threads, 'thread')})",
    )


def _worst(what: Comparison, least: float | None) -> str:
    known = [o for o in what.outputs if o.sqnr_db is not None]
    worst = min(known, key=lambda o: o.sqnr_db if o.sqnr_db is not None else math.inf, default=None)
    parts = [f"SQNR of {worst.name}" if worst is not None else "no output is floating point"]
    if least is not None:
        parts.append(f"at least {least:g} dB asked for")
    parts.append(f"{plural(what.samples, 'held-out sample')}")
    return ", ".join(parts)


def _sites(sites: Sequence[SiteReport], order: Sequence[str], verbose: bool) -> Table:
    if verbose:
        rows = [
            (s.pass_name, s.op, s.key, s.decision, s.reason, *_amounts(s.gain_ms, s.bytes_saved, s.distortion_db))
            for s in sites
        ]
        heads = ("pass", "op", "node", "decision", "reason", "saves", "off the file", "noise")
        return used_columns(rows, heads, right=(5, 6, 7))
    rows = [
        (
            f"{g.count} x",
            next(iter(g.ops)) if len(g.ops) == 1 else ", ".join(f"{op} {n}" for op, n in g.ops.items()),
            g.pass_name,
            g.decision,
            g.reason,
            *_amounts(g.gain_ms, g.bytes_saved, g.distortion_db),
        )
        for g in collapse(sites, order)
    ]
    heads = ("", "op", "pass", "decision", "reason", "saves", "off the file", "most noise")
    return used_columns(rows, heads, right=(0, 5, 6, 7))


def _amounts(gain_ms: float, bytes_saved: int, distortion_db: float | None) -> tuple[str, str, str]:
    return (
        some(milliseconds, gain_ms),
        some(size, bytes_saved),
        decibel(distortion_db) if distortion_db is not None else "",
    )


@dataclasses.dataclass(frozen=True)
class SiteGroup:
    """Sites that met the same fate.

    Attributes:
        pass_name: whose sites.
        ops: how many of each operator type, most first.
        decision: what was done.
        reason: what their reasons have in common.
        gain_ms: sum.
        bytes_saved: sum.
        distortion_db: the worst.
    """

    pass_name: str
    ops: Mapping[str, int]
    decision: str
    reason: str
    gain_ms: float
    bytes_saved: int
    distortion_db: float | None

    @property
    def count(self) -> int:
        return sum(self.ops.values())


def collapse(sites: Iterable[SiteReport], order: Sequence[str] = ()) -> list[SiteGroup]:
    """Groups sites by pass, decision and reason; changed ones by operator type too.

    Reasons that differ in quoted names and numbers only are one: "saves 0.1 ms" and "saves 0.3 ms"
    become "saves 0.1..0.3 ms".

    Args:
        sites: of a run.
        order: names of passes as they ran; the last comes first, and in it what saves or counts most.
    """
    groups: dict[tuple[str, str, str, str], list[SiteReport]] = {}
    rank = {name: number for number, name in enumerate(order)}
    for site in sites:
        op = "" if site.decision == "keep" else site.op
        groups.setdefault((site.pass_name, op, site.decision, _VARIABLE.sub("\0", _general(site))), []).append(site)
    found = [
        SiteGroup(
            pass_name=name,
            ops=dict(Counter(m.op for m in members).most_common()),
            decision=decision,
            reason=_common_reason(members),
            gain_ms=sum(m.gain_ms for m in members),
            bytes_saved=sum(m.bytes_saved for m in members),
            distortion_db=max((m.distortion_db for m in members if m.distortion_db is not None), default=None),
        )
        for (name, _, decision, _), members in groups.items()
    ]
    return sorted(found, key=lambda g: (-rank.get(g.pass_name, -1), -g.gain_ms, -g.bytes_saved, -g.count, g.reason))


def _general(site: SiteReport) -> str:
    """The reason, with a mark where it ends in the site's operator type ("no int8 kernel for Div")."""
    return site.reason.removesuffix(site.op) + "\1" if site.op and site.reason.endswith(f" {site.op}") else site.reason


def _common_reason(sites: Sequence[SiteReport]) -> str:
    reasons = [_general(s) for s in sites]
    words = _VARIABLE.split(reasons[0])
    values = list(zip(*(_VARIABLE.findall(r) for r in reasons), strict=True))
    text = words[0] + "".join(_span(v) + w for v, w in zip(values, words[1:], strict=True))
    return text.replace("\1", sites[0].op if len({s.op for s in sites}) == 1 else "it")


def _span(values: Sequence[str]) -> str:
    if len(set(values)) == 1:
        return values[0]
    if any(v.startswith("'") for v in values):
        return "..."
    return "..".join((min(values, key=float), max(values, key=float)))


_BYTES = {"size": "weights", "download": "weights, packed", "memory": "weights in memory"}
"""What bytes are called, by what is aimed at."""


def _attempts(attempts: Sequence[Attempt], target: Mapping[str, float]) -> Table:
    rows = [
        (
            str(number),
            a.kind,
            str(a.sites),
            milliseconds(a.predicted_ms),
            size(a.predicted_bytes) if a.predicted_bytes is not None else "",
            decibel(a.min_sqnr_db) if a.min_sqnr_db is not None else "",
            f"{a.metric:.4g}" if a.metric is not None else "",
            f"{a.speed_up:.2f}x" if a.speed_up is not None else "",
            a.verdict,
        )
        for number, a in enumerate(attempts, 1)
    ]
    aimed_at = max(_BYTES, key=lambda name: target.get(name, 0.0))
    heads = ("", "tried", "sites", "predicted", _BYTES[aimed_at], "worst output", "metric", "speed-up", "verdict")
    return used_columns(rows, heads, right=(0, 2, 3, 4, 5, 6, 7))


# --- a comparison ------------------------------------------------------------------------------


def comparison(
    what: Comparison, latency: Latency | None = None, sizes: tuple[FileSize, FileSize] | None = None
) -> RenderableType:
    """Two models side by side: outputs, then sizes and time."""
    rows = [
        (o.name, "" if o.sqnr_db is None else decibel(o.sqnr_db), f"{o.max_abs:.3g}", f"{o.agreement:.1%}")
        for o in what.outputs
    ]
    parts: list[RenderableType] = [
        columns(rows, ("output", "SQNR", "largest difference", "equal elements"), right=[1, 2, 3]),
        Text(f"on {plural(what.samples, 'sample')}"),
    ]
    totals = []
    if sizes is not None:
        for name, a, b in (
            ("file", sizes[0].raw, sizes[1].raw),
            ("file, zstd -3", sizes[0].zstd, sizes[1].zstd),
        ):
            totals.append((name, size(a), size(b), ratio(a, b, "smaller", "larger")))
    if latency is not None:
        totals.append(_latency_row(latency))
    if totals:
        parts += [Text(), columns(totals, ("", "first", "second", ""), right=[1, 2])]
    return Group(*parts)


# --- cost --------------------------------------------------------------------------------------


def cost(what: ModelCost, *, verbose: bool = False) -> RenderableType:
    """What a model costs: totals, operator types, and the dearest nodes (all of them if ``verbose``)."""
    totals = [
        ("predicted", milliseconds(1e3 * what.seconds), f"on {what.profile}"),
        ("MACs", amount(what.macs), ""),
        ("weights", size(what.weight_bytes), f"{amount(what.params)} parameters"),
        *((("weights, zstd", size(what.zstd_bytes), ""),) if what.zstd_bytes is not None else ()),
        ("peak activations", size(what.peak_activation_bytes), ""),
    ]
    if what.energy_joule is not None:
        totals.append(("energy", f"{1e3 * what.energy_joule:.3g} mJ", "a run"))
    by_op: dict[tuple[str, str], list[NodeCost]] = {}
    for node in what.nodes:
        by_op.setdefault((node.op_type, node.precision), []).append(node)
    ops = [
        (
            op,
            precision,
            str(len(members)),
            milliseconds(1e3 * sum(n.seconds for n in members)),
            f"{sum(n.share for n in members):.1%}",
            some(amount, sum(n.macs for n in members)),
            some(size, sum(n.weight_bytes for n in members)),
        )
        for (op, precision), members in sorted(by_op.items(), key=lambda item: -sum(n.seconds for n in item[1]))
    ]
    shown = what.nodes if verbose else sorted(what.nodes, key=lambda n: -n.seconds)[:_DEAREST]
    nodes = [
        (
            n.name,
            n.op_type,
            f"in {n.inside}" if n.inside else n.kind,
            n.precision,
            "?" if not n.known else "" if n.inside else milliseconds(1e3 * n.seconds),
            f"{n.share:.1%}" if n.share else "",
            some(amount, n.macs),
            some(size, n.weight_bytes),
        )
        for n in shown
    ]
    heads = ("node", "op", "kernel", "runs as", "time", "share", "MACs", "weights")
    title = "Nodes" if len(shown) == len(what.nodes) else f"The {len(shown)} dearest of {len(what.nodes)} nodes"
    parts: list[RenderableType] = [
        columns(totals, ("", "", ""), right=[1]),
        section("Operators", columns(ops, ("op", "runs as", "nodes", *heads[4:]), right=[2, 3, 4, 5, 6])),
        section(title, columns(nodes, heads, right=[4, 5, 6, 7])),
    ]
    if what.unknown:
        names = ", ".join(what.unknown[:5]) + (", ..." if len(what.unknown) > 5 else "")
        message = f"the cost of {plural(len(what.unknown), 'node')} is not known, so the sum is too low: {names}"
        parts += [Text(), Text(message, style="yellow")]
    return Group(*parts)


# --- lists -------------------------------------------------------------------------------------


def passes(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Passes with their options, as ``passes list`` collects them."""
    parts: list[RenderableType] = []
    for one in found:
        by_hand = () if one["automatic"] else ("only with --pass",)
        kind = ", ".join((one["stage"], "lossless" if one["lossless"] else "lossy", *by_hand))
        parts.append(Text.assemble((one["name"], "bold"), f"  ({kind})"))
        parts.append(Padding(Text(one["summary"]), (0, 0, 0, 4)))
        rows = [(o["name"], o["type"], _option_default(o["default"])) for o in one["options"]]
        if rows:
            parts.append(Padding(columns(rows, ("option", "type", "default")), (0, 0, 0, 4)))
        parts.append(Text())
    return Group(*parts[:-1])


def _option_default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_option_default(v) for v in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def zoo(models: Sequence[ZooModel], *, verbose: bool = False) -> RenderableType:
    """The zoo; with ``verbose`` also what makes each model worth trying and how to feed it."""
    rows = [
        (m.name, size(m.wheel.size) if m.wheel else "", m.licence, m.wheel.requirement if m.wheel else "built here")
        + (m.task,)
        + (("; ".join(m.traits), "; ".join(map(str, m.inputs)), m.preprocessing) if verbose else ())
        for m in models
    ]
    heads = ("name", "size", "licence", "from", "what it does")
    return columns(rows, (*heads, "traits", "inputs", "preprocessing") if verbose else heads, right=[1])
