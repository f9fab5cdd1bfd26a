"""Real models stored in fewer bits: size, compressed size, score, latency and what loading costs, by candidate."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, stdev
from typing import Any

from benchmarks.printing import figure
from benchmarks.share_makers import BY_HAND, DOWNLOAD, OURS, SIZE
from benchmarks.steps import RunWorker
from benchmarks.tasks import TASKS
from benchmarks.zoo import FP32, SCORE_LOSS, Verdict, note

__all__ = ["FEW", "HEADER", "Row", "line", "measure", "perplexity", "verdicts"]

WORKER = "benchmarks.share_worker"
CALIBRATION = 64
FEW = {"lm": (32, 12)}
"""Calibration and evaluation samples of models that take seconds a sample, where the command line says nothing."""
_BEST_BELOW = 200e6
"""Larger files are not compressed at the best level, which takes a second for 2 MB."""

# The targets.
FILE_RATIO, ZSTD_RATIO, LATENCY_WITHIN, PERPLEXITY = 6.0, 8.0, 0.05, 1.05


@dataclass
class Row:
    """One candidate of one model; ratios are fp32 over candidate where smaller is better, so above 1 is better.

    Attributes:
        zstd: bytes compressed by zstd, by level.
        score_ratio: share of the score of fp32 that is left.
        score_error: standard error of that share, from paired differences of parts of the samples.
        samples: that the score is of.
        latency: of fp32 over its own, taking turns.
        load: median seconds of making a session over those of fp32.
        load_megabytes: resident memory that a session adds, and at its peak.
        seconds: of the process that made it.
    """

    model: str
    candidate: str
    file: str
    bytes: int | None = None
    file_ratio: float | None = None
    zstd: dict[str, int] = field(default_factory=dict)
    zstd_ratio: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    score_ratio: float | None = None
    score_error: float | None = None
    samples: int | None = None
    milliseconds: float | None = None
    latency: float | None = None
    noise: float | None = None
    load_seconds: float | None = None
    load: float | None = None
    load_megabytes: tuple[float, float] | None = None
    memory: float | None = None
    seconds: float | None = None
    peak_megabytes: float | None = None
    remark: str = ""
    error: str = ""


def measure(
    name: str, candidates: Sequence[str], arguments: Namespace, work: Path, run: RunWorker, save: Callable[[], None]
) -> list[Row]:
    """All rows of one model; ``save`` is called after every step that is not remembered by ``run`` itself."""
    few, least = FEW.get(name, (CALIBRATION, 0))
    samples, limit = arguments.calibration or few, arguments.limit or least
    rows = [Row(name, FP32, str(work / FP32.replace(" ", "_") / "model.onnx"))]
    reference = Path(rows[0].file)
    reference.parent.mkdir(parents=True, exist_ok=True)
    if not reference.exists():
        reference.symlink_to(TASKS[name].path)
    for candidate in candidates:
        folder = work / candidate.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        row = Row(name, candidate, str(folder / "model.onnx"))
        rows.append(row)
        extra = {BY_HAND: arguments.options, "onnxsim k-means": arguments.onnxsim}.get(candidate, "")
        if candidate == "onnxsim k-means" and not extra:
            row.error = "left out: --onnxsim names no interpreter"
            continue
        note(f"{name}: {candidate}")
        made = run(
            WORKER, "make", candidate, name, row.file, str(samples), str(arguments.metric_samples or least),
            arguments.profile, extra, timeout=arguments.timeout, makes=Path(row.file),
        )  # fmt: skip
        row.seconds, row.peak_megabytes = made.seconds, made.peak_mb
        row.error, row.remark = made.error, made.result.get("remark", "")
        if not row.error and not Path(row.file).is_file():
            row.error = "wrote no file"
    for row in rows:
        if not row.error:
            _size(row, rows[0], arguments, run)
        if not row.error:
            _score(row, rows[0], limit, arguments, run)
        save()
    _latency(rows, arguments, run)
    _loads(rows, arguments, run)
    save()
    return rows


def _size(row: Row, reference: Row, arguments: Namespace, run: RunWorker) -> None:
    note(f"{row.model}: size of {row.candidate}")
    best = row.candidate in (FP32, *OURS) and TASKS[row.model].path.stat().st_size <= _BEST_BELOW
    done = run(WORKER, "size", row.file, "best" if best else "fast", timeout=arguments.timeout)
    row.error = done.error
    if row.error:
        return
    row.bytes = int(done.result["raw"])
    row.zstd = {level: int(done.result[f"zstd{level}"]) for level in ("3", "19") if done.result[f"zstd{level}"]}
    if reference.bytes:
        row.file_ratio = reference.bytes / row.bytes
        row.zstd_ratio = {k: reference.zstd[k] / v for k, v in row.zstd.items() if k in reference.zstd}


def _score(row: Row, reference: Row, limit: int, arguments: Namespace, run: RunWorker) -> None:
    note(f"{row.model}: score of {row.candidate}")
    task = TASKS[row.model]
    found = [run(WORKER, "score", row.model, r.file, str(limit), timeout=arguments.timeout) for r in (reference, row)]
    row.error = next((f.error for f in found if f.error), "")
    if row.error:
        return
    theirs, ours = (f.result for f in found)
    row.score, row.samples = float(ours[task.metrics[0]]), int(ours["n"])
    row.score_ratio = task.ratio(row.score, float(theirs[task.metrics[0]]))
    parts = [task.ratio(a, b) for a, b in zip(ours["blocks"], theirs["blocks"], strict=True) if a and b]
    row.score_error = stdev(parts) / len(parts) ** 0.5 if len(parts) > 1 else None


def _latency(rows: Sequence[Row], arguments: Namespace, run: RunWorker) -> None:
    """All candidates in one process, fp32 twice."""
    alive = [r for r in rows if not r.error]
    if not alive or alive[0].candidate != FP32 or not arguments.seconds:
        return
    note(f"{rows[0].model}: latency of {len(alive)} files")
    files = [r.file for r in (alive[0], *alive)]
    timed = run(
        "benchmarks.worker", "latency", rows[0].model, str(arguments.seconds), *files, timeout=arguments.timeout
    )
    found: list[dict[str, Any]] = timed.result.get("rows", [{"error": timed.error}] * len(files))
    if "error" in found[0]:
        alive[0].error = f"latency: {found[0]['error']}"
        return
    base = found[1]["p10_ms"]
    alive[0].noise = abs(1 - found[0]["p10_ms"] / base)
    for row, own in zip(alive, found[1:], strict=True):
        row.error = str(own.get("error", ""))
        if not row.error:
            row.milliseconds, row.latency = own["p10_ms"], base / own["p10_ms"]


def _loads(rows: Sequence[Row], arguments: Namespace, run: RunWorker) -> None:
    """Each load in a process of its own, candidates taking turns; medians."""
    alive = [r for r in rows if not r.error]
    if not alive or alive[0].candidate != FP32 or not arguments.loads:
        return
    note(f"{rows[0].model}: loading {len(alive)} files")
    found: dict[str, list[dict[str, Any]]] = {r.file: [] for r in alive}
    for number in range(arguments.loads):
        for row in alive:
            done = run(WORKER, "load", row.file, str(number), timeout=arguments.timeout)
            row.error = row.error or done.error
            found[row.file].append(done.result)
    for row in (r for r in alive if not r.error):
        mine = {key: median(f[key] for f in found[row.file]) for key in ("seconds", "megabytes", "peak_megabytes")}
        row.load_seconds, row.load_megabytes = mine["seconds"], (mine["megabytes"], mine["peak_megabytes"])
        if alive[0].load_seconds and alive[0].load_megabytes:
            row.load = mine["seconds"] / alive[0].load_seconds
            row.memory = mine["megabytes"] / alive[0].load_megabytes[0]


# --- what is asked for -----------------------------------------------------------------------------


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The issue's targets for the small models."""
    lines = [Verdict(f"{r.model}, {r.candidate}", False, r.error) for r in rows if r.error and r.candidate in OURS]
    for candidate in OURS:
        own = [r for r in rows if r.candidate == candidate and not r.error]
        if not own:
            continue
        files = [r.file_ratio for r in own if r.file_ratio]
        packed = [r.zstd_ratio["3"] for r in own if "3" in r.zstd_ratio]
        plain = [_fp32_bytes(rows, r) / r.zstd["3"] for r in own if "3" in r.zstd]
        if candidate != BY_HAND:
            lines.append(_scores(candidate, own))
        lines.append(
            Verdict(
                f"{candidate}: median file {FILE_RATIO:g}x smaller",
                median(files) >= FILE_RATIO if candidate == SIZE else None,
                f"{median(files):.2f}x ({_each(own, files)})",
            )
        )
        lines.append(
            Verdict(
                f"{candidate}: median {ZSTD_RATIO:g}x smaller as compressed by zstd -3",
                median(packed) >= ZSTD_RATIO if candidate == DOWNLOAD else None,
                f"{median(packed):.2f}x ({_each(own, packed)}); against the plain fp32 file {median(plain):.2f}x",
            )
        )
    return lines + [verdict for r in rows if r.candidate == BY_HAND and r.latency for verdict in _folded(rows, r)]


def _each(rows: Sequence[Row], values: Sequence[float]) -> str:
    return ", ".join(f"{r.model} {v:.1f}" for r, v in zip(rows, values, strict=True))


def _fp32_bytes(rows: Sequence[Row], row: Row) -> int:
    return next((r.bytes for r in rows if r.model == row.model and r.candidate == FP32 and r.bytes), 0)


def _scores(candidate: str, own: Sequence[Row]) -> Verdict:
    """Whether all keep 99 %; those that do not, and how sure that is."""
    low = [r for r in own if (r.score_ratio or 0) < 1 - SCORE_LOSS]
    said = f"{len(own) - len(low)} of {len(own)}"
    for r in low:
        said += f"; {r.model} {r.score_ratio or 0:.4f}" + (f" +- {r.score_error:.4f}" if r.score_error else "")
    return Verdict(f"{candidate}: score within {SCORE_LOSS:.0%} of fp32", not low, said)


def _folded(rows: Sequence[Row], row: Row) -> list[Verdict]:
    """Latency and loading of what is decoded when it is loaded."""
    fp32 = next(r for r in rows if r.model == row.model and r.candidate == FP32)
    within = max(LATENCY_WITHIN, fp32.noise or 0)
    slower = 1 / (row.latency or 1) - 1
    lines = [
        Verdict(
            f"{row.model}, {row.candidate}: latency within {LATENCY_WITHIN:.0%} of fp32",
            slower <= within,
            f"{slower:+.1%} ({fp32.milliseconds:.2f} ms; fp32 against itself {fp32.noise or 0:.1%})",
        )
    ]
    if row.load is not None and row.memory is not None:
        said = f"{row.load:.2f}x the time ({1e3 * (row.load_seconds or 0):.0f} ms), {row.memory:.2f}x the memory after"
        lines.append(Verdict(f"{row.model}, {row.candidate}: loading", None, said))
    return lines


def perplexity(rows: Sequence[Row]) -> list[Verdict]:
    """The issue's target for the language model."""
    lines = [Verdict(f"{r.model}, {r.candidate}", False, r.error) for r in rows if r.error and r.candidate in OURS]
    for r in rows:
        if r.candidate in OURS and r.score_ratio:
            lines.append(
                Verdict(
                    f"{r.model}, {r.candidate}: perplexity at most {PERPLEXITY:g}x fp32",
                    1 / r.score_ratio <= PERPLEXITY if r.candidate == BY_HAND else None,
                    f"{1 / r.score_ratio:.3f}x ({r.score:.2f}; {r.samples} tokens), file {r.file_ratio or 0:.2f}x "
                    f"smaller ({(r.bytes or 0) / 1e6:.1f} MB)",
                )
            )
    return lines + [verdict for r in rows if r.candidate == BY_HAND and r.latency for verdict in _folded(rows, r)]


HEADER = (
    "model", "candidate", "MB", "file", "zstd -3", "zstd -19", "score", "of fp32", "+-", "ms", "speed", "load",
    "memory", "s",
)  # fmt: skip


def line(r: Row) -> list[object]:
    """A row as the table shows it."""
    return [
        r.model, r.candidate, figure(r.bytes and r.bytes / 1e6), figure(r.file_ratio), figure(r.zstd_ratio.get("3")),
        figure(r.zstd_ratio.get("19")), figure(r.score, 4), figure(r.score_ratio, 4), figure(r.score_error, 4),
        figure(r.milliseconds), figure(r.latency, 3), figure(r.load), figure(r.memory), figure(r.seconds, 0),
    ]  # fmt: skip
