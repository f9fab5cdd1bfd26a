"""Score against measured speed-up and size of factored models, without any training.

Every layer keeps the same share of its weights: by plain SVD, fitted to activations, and fitted and then refitted in
sequence. All three have the same ranks, so they are equally large and fast, and scores compare as they are. Beside
them stand the planner's results for some dB.

A ladder is of each layer's weights; that of the language model is of the parameters of the whole file. There only
products of the main graph are factored, and the share of each follows.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.printing import figure
from benchmarks.prune_curves import FP32, NO_FLOOR, OURS, Point, judge, score_at, time_files, within
from benchmarks.steps import RunWorker
from benchmarks.tasks import TASKS
from benchmarks.zoo import Verdict, note

PLAIN, AWARE, REFITTED = "plain svd", "aware", "aware+refit"
CANDIDATES = {PLAIN: "method=plain,recover=false", AWARE: "recover=false", REFITTED: "recover=true"}
"""Options of the pass as on the command line; what is kept comes on top."""
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
DECIBELS: dict[str, tuple[float, ...]] = {
    "minilm": (20, 16, 13, 10),
    "crepe": (25, 20, 15, 10),
    "crnn": (25, 20, 17, 15),
    "lite0": (12, 9, 7, 5.5),
}
WHOLE_FILE = {"lm": (0.9, 0.8)}
"""Models whose ladder is of all parameters; they are too slow to plan by measuring."""
WHOLE_FILE_FORMS = "svd"
WHOLE_FILE_OPTIONS = f"multiple=4,forms={WHOLE_FILE_FORMS}"
"""Ranks in small steps, so that the share is met."""
CALIBRATION = 64
FEW = {"lm": (32, 12)}
"""Calibration and evaluation samples of models that take seconds a sample, where the command line says nothing."""

# The target.
LM, LM_SHARE, LM_RATIO = "lm", 0.8, 3.0
_ROUNDING = 0.005
_SAME = 5e-4


@dataclass
class LowRank(Point):
    """One file of one curve.

    Attributes:
        keep: rung of the ladder: share of each layer's weights, or of the whole file's.
        parameters: float weights, as a share of fp32's.
        forms: layers by form.
    """

    keep: float | None = None
    parameters: float | None = None
    forms: str = ""


def curve(
    name: str, arguments: Namespace, work: Path, run: RunWorker, save: Callable[[Sequence[LowRank]], None]
) -> list[LowRank]:
    """All points of one model; what is known is saved after every one."""
    work.mkdir(parents=True, exist_ok=True)
    few, least = FEW.get(name, (CALIBRATION, 0))
    calibration, limit = arguments.calibration or few, arguments.limit or least
    options = {"timeout": arguments.timeout}
    forms = WHOLE_FILE_FORMS if name in WHOLE_FILE else ""
    held = run("benchmarks.factorize_worker", "sizes", name, forms, **options)
    points = [LowRank(name, FP32, file=str(TASKS[name].path), error=held.error, parameters=1.0)]
    if held.error:
        return points
    size = held.result
    for rung in arguments.ladder or WHOLE_FILE.get(name, LADDER):
        keep = rung
        if name in WHOLE_FILE:
            keep = round(1 - (1 - rung) * size["parameters"] / size["factored"], 4)
        for candidate in arguments.candidates:
            parts = (f"keep={keep}", CANDIDATES[candidate], forms and WHOLE_FILE_OPTIONS, arguments.options)
            text = ",".join(filter(None, parts))
            file = work / f"{candidate.replace(' ', '_')}_{rung:g}.onnx"
            points.append(LowRank(name, candidate, keep=rung, file=str(file)))
            _make(points[-1], text, NO_FLOOR, calibration, arguments, run)
            save(points)
    for decibels in DECIBELS.get(name, ()) if arguments.decibels is None else arguments.decibels:
        points.append(LowRank(name, OURS, decibels, file=str(work / f"planned_{decibels:g}.onnx")))
        _make(points[-1], arguments.options, decibels, calibration, arguments, run)
        save(points)
    known = [p for p in points if p.predicted_ms and p.predicted_speed]
    if known:
        points[0].predicted_ms = (known[0].predicted_ms or 0.0) * (known[0].predicted_speed or 0.0)
    for point in points:
        if point.parameters is not None and point is not points[0]:
            point.parameters /= size["parameters"]
        judge(point, points[0], limit, arguments.timeout, run)
        save(points)
    time_files(points, arguments.seconds, arguments.timeout, run)
    save(points)
    return points


def _make(point: LowRank, options: str, decibels: float, samples: int, arguments: Namespace, run: RunWorker) -> None:
    """Fills in what came of a factorization in a process of its own."""
    wanted = f"{point.decibels:g} dB" if point.keep is None else f"{point.keep:.0%} kept"
    note(f"{point.model}: {point.candidate}, {wanted}")
    made = run(
        "benchmarks.factorize_worker", "make", point.model, point.file, str(samples), arguments.profile, options,
        str(decibels), timeout=arguments.timeout, makes=Path(point.file),
    )  # fmt: skip
    point.seconds, point.peak_megabytes, point.error = made.seconds, made.peak_mb, made.error
    if not point.error:
        result = made.result
        point.predicted_ms, point.sqnr_db, point.sites = result["predicted_ms"], result["sqnr_db"], result["sites"]
        point.predicted_speed = result["fp32_predicted_ms"] / result["predicted_ms"]
        point.parameters = result["parameters"]
        point.forms = " ".join(f"{n} {form}" for form, n in sorted(result["forms"].items()))


# --- reading the curves ----------------------------------------------------------------------------


def verdicts(points: Sequence[LowRank]) -> list[Verdict]:
    """The issue's targets against the curves."""
    lines: list[Verdict] = []
    for name in dict.fromkeys(p.model for p in points):
        own = [p for p in points if p.model == name]
        failed = [p for p in own if p.error]
        if failed:
            lines.append(Verdict(f"{name} curve", False, f"{len(failed)} of {len(own)} failed: {failed[0].error}"))
        for better, worse in ((AWARE, PLAIN), (REFITTED, AWARE)):
            if line := _against(name, own, better, worse):
                lines.append(line)
        planned = [p for p in own if p.candidate == OURS and (p.speed or 0) > 1.02 and p.score_ratio is not None]
        for rival in (PLAIN, REFITTED):
            rivals = [p for p in own if p.candidate == rival]
            pairs = [(p.score_ratio, score_at(rivals, p.speed)) for p in planned if p.speed is not None]
            gaps = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
            if gaps and rivals:
                said = f"better at {sum(g > 0 for g in gaps)} of {len(gaps)}, by {sum(gaps) / len(gaps):+.3f} of fp32"
                lines.append(Verdict(f"{name}: planned against {rival} at equal latency", None, said))
        reached = {c: within(own, c) for c in (*CANDIDATES, OURS)}
        said = ", ".join(f"{c}: {'none' if s is None else f'{s:.2f}x'}" for c, s in reached.items())
        lines.append(Verdict(f"{name}: speed-up with at most 1 % lost", None, said))
    return lines + _perplexity(points)


def _against(name: str, points: Sequence[LowRank], better: str, worse: str) -> Verdict | None:
    """Two candidates at the same rungs; the first one must not be worse anywhere where the second is plain SVD."""
    scores = {(p.candidate, p.keep): p.score_ratio for p in points if p.score_ratio is not None}
    rungs = [k for c, k in scores if c == better and (worse, k) in scores]
    if not rungs:
        return None
    gaps = [scores[better, k] - scores[worse, k] for k in rungs]
    above, below = sum(g > _SAME for g in gaps), sum(g < -_SAME for g in gaps)
    said = f"better at {above} of {len(gaps)} rungs, worse at {below}, by {sum(gaps) / len(gaps):+.3f} of fp32"
    return Verdict(f"{name}: score of {better} against {worse}", below == 0 if worse == PLAIN else None, said)


def _perplexity(points: Sequence[LowRank]) -> list[Verdict]:
    """How much lower the perplexity is than plain SVD's, at the share of parameters the issue asks about."""
    near = {
        p.candidate: p
        for p in points
        if p.model == LM and p.keep == LM_SHARE and p.score and (p.parameters or 1.0) <= LM_SHARE + _ROUNDING
    }
    ours = [near[c] for c in (AWARE, REFITTED) if c in near]
    if PLAIN not in near or not ours:
        return []
    plain, best = near[PLAIN], min(ours, key=lambda p: p.score or 0.0)
    ratio = (plain.score or 0.0) / (best.score or 1.0)
    fp32 = next((f"{p.score:.1f}" for p in points if p.model == LM and p.candidate == FP32 and p.score), "?")
    said = (
        f"{ratio:.1f}x: {plain.score:.1f} and {best.score:.1f} ({best.candidate}), fp32 {fp32}, "
        f"{best.parameters or 0:.1%} of the parameters, factored: {best.forms}"
    )
    return [Verdict(f"{LM}: perplexity {LM_RATIO:g}x below plain SVD's", ratio >= LM_RATIO, said)]


HEADER = (
    "model", "candidate", "keep", "dB", "layers", "params", "MB", "got dB", "predicted", "speed", "ms", "score",
    "of fp32", "s", "peak MB",
)  # fmt: skip


def line(p: LowRank) -> list[object]:
    """A point as the table shows it."""
    return [
        p.model, p.candidate, figure(p.keep), figure(p.decibels, 1), p.sites, figure(p.parameters, 3),
        figure(p.megabytes), figure(p.sqnr_db, 1), figure(p.predicted_speed), figure(p.speed), figure(p.milliseconds),
        figure(p.score, 4), figure(p.score_ratio, 4), figure(p.seconds, 0), figure(p.peak_megabytes, 0),
    ]  # fmt: skip
