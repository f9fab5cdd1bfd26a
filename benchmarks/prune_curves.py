"""Score against measured speed-up, without any training: the planner, and magnitude pruning as fast as it.

For every dB of a ladder the planner prunes with nothing else allowed. Its rivals prune every group by one
ratio, by magnitude, with and without refitting the readers; the ratio is the one whose predicted latency is
that of the planner's result. All are timed in one process, and a rival that came out faster or slower is
read off its own curve at the planner's speed-up.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.measure import run_worker
from benchmarks.printing import figure
from benchmarks.steps import RunWorker
from benchmarks.tasks import TASKS
from benchmarks.zoo import Verdict, note

FP32 = "fp32"
OURS = "planned"
PLAIN = "magnitude"
REFITTED = "magnitude+refit"
UNIFORM = "uniform"
RIVALS = {PLAIN: "criterion=magnitude,recover=false", REFITTED: "criterion=magnitude", UNIFORM: "criterion=auto"}
"""Options of the pass as on the command line; the ratio comes on top."""
LADDERS: dict[str, tuple[float, ...]] = {
    "lite0": (12, 9, 7, 5.5, 4),
    "det": (20, 16, 13, 10, 7),
    "minilm": (20, 16, 13, 10, 7),
    "crnn": (25, 20, 17, 15, 13),
}
SCORE_KEPT = 0.99
NO_FLOOR = -1000.0


@dataclass
class Point:
    """One file of one curve.

    Attributes:
        decibels: floor asked for (the planner), of the point it is matched with (rivals).
        ratio: share of every group removed (rivals).
        sqnr_db: worst output on held-out data.
        seconds: of the process that made it.
    """

    model: str
    candidate: str
    decibels: float | None = None
    ratio: float | None = None
    predicted_ms: float | None = None
    predicted_speed: float | None = None
    milliseconds: float | None = None
    speed: float | None = None
    score: float | None = None
    score_ratio: float | None = None
    megabytes: float | None = None
    sqnr_db: float | None = None
    sites: int | None = None
    seconds: float | None = None
    peak_megabytes: float | None = None
    file: str = ""
    error: str = ""


def curve(name: str, arguments: Namespace, work: Path, save: Callable[[Sequence[Point]], None]) -> list[Point]:
    """All points of one model; what is known is saved after every one."""
    work.mkdir(parents=True, exist_ok=True)
    points = [Point(name, FP32, file=str(TASKS[name].path))]
    for decibels in arguments.ladder or LADDERS.get(name, LADDERS["det"]):
        points.append(_planned(name, decibels, arguments, work))
        if points[-1].predicted_ms and points[-1].predicted_speed:
            points[0].predicted_ms = points[-1].predicted_ms * points[-1].predicted_speed
        save(points)
    points += _rivals(name, points[1:], arguments, work)
    save(points)
    scored: dict[str, Point] = {}
    for point in points:
        if (same := scored.get(point.file)) is None:
            judge(point, points[0], arguments.limit, arguments.timeout)
            scored[point.file] = point
        else:
            point.megabytes, point.score, point.score_ratio = same.megabytes, same.score, same.score_ratio
        save(points)
    time_files(points, arguments.seconds, arguments.timeout)
    return points


def _planned(name: str, decibels: float, arguments: Namespace, work: Path) -> Point:
    point = Point(name, OURS, decibels, file=str(work / f"planned_{decibels:g}.onnx"))
    return _made(point, arguments.options, decibels, arguments.calibration, arguments)


def _rivals(name: str, planned: Sequence[Point], arguments: Namespace, work: Path) -> list[Point]:
    """Every rival at the ratios that make it as fast as the planner's results."""
    ours = [p for p in planned if not p.error]
    if not ours or not arguments.rivals:
        return []
    note(f"{name}: ratios as fast as each of these")
    matched = run_worker(
        "benchmarks.prune_worker", "match", name, "2", arguments.profile, RIVALS[PLAIN],
        json.dumps([p.predicted_ms for p in ours]), timeout=arguments.timeout,
    )  # fmt: skip
    if matched.error:
        return [Point(name, rival, error=matched.error) for rival in arguments.rivals]
    points: list[Point] = []
    for rival in arguments.rivals:
        made: dict[float, Point] = {}
        for mine, ratio in zip(ours, matched.result["ratios"], strict=True):
            if ratio not in made:
                new = Point(name, rival, mine.decibels, ratio, file=str(work / f"{rival}_{ratio}.onnx"))
                samples = 2 if rival == PLAIN else arguments.calibration  # it has nothing to calibrate
                made[ratio] = _made(new, f"{RIVALS[rival]},ratio={ratio}", NO_FLOOR, samples, arguments)
            points.append(replace(made[ratio], decibels=mine.decibels))
    return points


def _made(point: Point, options: str, decibels: float, samples: int, arguments: Namespace) -> Point:
    """Fills in what came of a pruning in a process of its own."""
    shown = "" if point.ratio is None else f", {point.ratio:.0%} removed"
    note(f"{point.model}: {point.candidate} for {point.decibels or 0:g} dB{shown}")
    made = run_worker(
        "benchmarks.prune_worker", "prune", point.model, point.file, str(samples), arguments.profile, options,
        str(decibels), timeout=arguments.timeout,
    )  # fmt: skip
    point.seconds, point.peak_megabytes, point.error = made.seconds, made.peak_mb, made.error
    if not point.error:
        point.predicted_ms, point.sqnr_db = made.result["predicted_ms"], made.result["sqnr_db"]
        point.predicted_speed = made.result["fp32_predicted_ms"] / made.result["predicted_ms"]
        point.sites = made.result["sites"]
    return point


def judge(point: Point, reference: Point, limit: int, timeout: float, run: RunWorker = run_worker) -> None:
    """Size and score, on so many samples (0 for all)."""
    if point.error:
        return
    task = TASKS[point.model]
    point.megabytes = round(Path(point.file).stat().st_size / 1e6, 3)
    note(f"{point.model}: score of {point.candidate} {'' if point.decibels is None else f'{point.decibels:g} dB'}")
    scored = run("benchmarks.worker", "score", point.model, point.file, str(limit), timeout=timeout)
    point.error = scored.error
    if not point.error:
        point.score = float(scored.result[task.metrics[0]])
        base = point.score if reference.score is None else reference.score
        point.score_ratio = round(task.ratio(point.score, base), 4) if point.score else 0.0


def time_files(points: Sequence[Point], seconds: float, timeout: float, run: RunWorker = run_worker) -> None:
    """Latency of all of them in one process; equal files once."""
    files = list(dict.fromkeys(p.file for p in points if not p.error))
    name = points[0].model
    note(f"{name}: latency of {len(files)} files")
    timed = run("benchmarks.worker", "latency", name, str(seconds), *files, timeout=timeout)
    if timed.error:
        points[0].error = f"latency: {timed.error}"
        return
    by_file = dict(zip(files, timed.result["rows"], strict=True))
    base = by_file[points[0].file]["p10_ms"]
    for point in points:
        row = by_file.get(point.file, {})
        if "p10_ms" in row:
            point.milliseconds, point.speed = row["p10_ms"], round(base / row["p10_ms"], 3)
        elif not point.error:
            point.error = str(row.get("error", "not timed"))


def keep_files(points: Sequence[Point], folder: Path) -> None:
    """Copies of what the planner made."""
    for point in points:
        if point.candidate == OURS and not point.error:
            shutil.copy(point.file, folder / f"{point.model}_{point.decibels:g}.onnx")


# --- reading the curves ----------------------------------------------------------------------------


def score_at(points: Sequence[Point], speed: float) -> float | None:
    """Score ratio of a curve at a speed-up, between its points in a straight line; fp32 is its first point.

    Beyond its fastest point the curve is taken to stay where it is, which flatters it.
    """
    known = sorted((p.speed, p.score_ratio) for p in points if p.speed is not None and p.score_ratio is not None)
    if not known:
        return None
    best: list[tuple[float, float]] = [(1.0, 1.0)]
    for x, y in known:
        if x > best[-1][0]:
            best.append((x, y))
        elif x == best[-1][0]:
            best[-1] = (x, max(y, best[-1][1]))
    for (x0, y0), (x1, y1) in pairwise(best):
        if x0 <= speed <= x1:
            return y0 + (y1 - y0) * (speed - x0) / (x1 - x0)
    return best[-1][1] if speed > best[-1][0] else best[0][1]


def within(points: Sequence[Point], candidate: str) -> float | None:
    """The largest measured speed-up of a curve with at most 1 % of the score lost."""
    found = [
        p.speed
        for p in points
        if p.candidate == candidate and p.speed is not None and (p.score_ratio or 0.0) >= SCORE_KEPT
    ]
    return max(found, default=None)


def verdicts(points: Sequence[Point]) -> list[Verdict]:
    """The issue's targets against the curves."""
    lines = []
    for name in dict.fromkeys(p.model for p in points):
        of_model = [p for p in points if p.model == name]
        if error := next((p.error for p in of_model if p.candidate in (FP32, OURS) and p.error), ""):
            lines.append(Verdict(f"{name} curve", False, error))
        ours = [p for p in of_model if p.candidate == OURS and p.speed is not None and p.score_ratio is not None]
        for rival in dict.fromkeys(p.candidate for p in of_model if p.candidate in RIVALS):
            theirs = [p for p in of_model if p.candidate == rival]
            pairs = [(p.score_ratio, score_at(theirs, p.speed)) for p in ours if p.speed is not None and p.speed > 1.02]
            gaps = [mine - other for mine, other in pairs if mine is not None and other is not None]
            if gaps:
                better = sum(g > 0 for g in gaps)
                lines.append(
                    Verdict(
                        f"{name}: score at equal latency against {rival}",
                        better == len(gaps) if rival == PLAIN else None,
                        f"better at {better} of {len(gaps)} points, by {sum(gaps) / len(gaps):+.3f} of fp32 on average",
                    )
                )
        reached = within(of_model, OURS)
        said = "none of the points" if reached is None else f"{reached:.2f}x"
        others = ", ".join(
            f"{r}: {'none' if (s := within(of_model, r)) is None else f'{s:.2f}x'}"
            for r in dict.fromkeys(p.candidate for p in of_model if p.candidate in RIVALS)
        )
        lines.append(Verdict(f"{name}: speed-up with at most 1 % lost", None, f"{said} ({others})"))
    return lines


HEADER = (
    "model", "candidate", "dB", "ratio", "groups", "got dB", "predicted ms", "predicted", "ms", "speed", "score",
    "of fp32", "MB", "s", "peak MB",
)  # fmt: skip


def line(p: Point) -> list[object]:
    """A point as the table shows it."""
    return [
        p.model, p.candidate, figure(p.decibels, 0), figure(p.ratio), p.sites, figure(p.sqnr_db, 1),
        figure(p.predicted_ms), figure(p.predicted_speed), figure(p.milliseconds), figure(p.speed),
        figure(p.score, 4), figure(p.score_ratio, 4), figure(p.megabytes), figure(p.seconds, 0),
        figure(p.peak_megabytes, 0),
    ]  # fmt: skip
