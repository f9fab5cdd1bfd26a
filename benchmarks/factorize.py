"""Low-rank factorization held against what it has to reach: output errors, scores, latency, seconds and memory.

    ONNXCOMPRESS_ZOO=folder python -m benchmarks.factorize [--parts exact,curves,latency,scale] [--json out.json]

exact     what every layer loses of its output at half of its weights: plain SVD and fitted to activations
curves    score against measured speed-up and size, without training
latency   factored layers of real models, measured and predicted
scale     all layers of a 90 MB transformer: seconds, and memory beyond the model

Every measured step runs in a process of its own. With ``--resume`` the steps that ``--json`` holds are not measured
again, and ``--work`` keeps the models they made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import factorize_curves as curves
from benchmarks.measure import Run
from benchmarks.parts import Part, choose, floats, run_parts
from benchmarks.printing import aligned, figure
from benchmarks.steps import Steps
from benchmarks.tasks import TASKS, BenchmarkError, zoo_folder
from benchmarks.zoo import Verdict, note

Saving = Callable[[], None]
Tables = tuple[str, list[Verdict]]

MODELS = {
    "exact": ("lite0", "det", "crnn", "minilm", "crepe"),
    "curves": ("minilm", "lm", "crepe", "crnn", "lite0"),
    "latency": ("lite0", "crnn", "minilm", "crepe"),
    "scale": ("minilm",),
}
"""Of each part where the command line names none."""
LINEAR = ("svd", "joint", "channel")
"""Forms whose weights are the closed-form optimum; of others it is a start and a refit."""

# The targets.
SCALE_SECONDS, SCALE_LAYERS = 60.0, 2.0
LATENCY_WITHIN = 0.15

_EQUAL = 1e-3
"""Errors that differ by less are equal."""
_LEAST_MS = 0.02
"""Layers that take less are measured, and judged by nobody: entering and leaving onnxruntime is most of it."""


def _steps(result: dict[str, Any], save: Saving) -> Steps:
    return Steps(result.setdefault("steps", {}), save)


def _models(arguments: argparse.Namespace, part: str) -> Sequence[str]:
    return arguments.models or MODELS[part]


@contextmanager
def _folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Where models are written: the user's, or one that is deleted."""
    if arguments.work:
        yield arguments.work.resolve()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _failures(part: str, runs: Mapping[str, Run]) -> list[Verdict]:
    return [Verdict(f"{part} of {name}", False, run.error) for name, run in runs.items() if run.error]


# --- exact ---------------------------------------------------------------------------------------------


def run_exact(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """Activation-aware against plain, layer by layer."""
    run = _steps(result, save)
    runs: dict[str, Run] = {}
    for name in _models(arguments, "exact"):
        note(f"{name}: layers at {arguments.share:.0%} of their weights")
        runs[name] = run(
            "benchmarks.factorize_worker", "exact", name, str(arguments.samples), str(arguments.held_out),
            str(arguments.share), "+".join(arguments.forms), timeout=arguments.timeout,
        )  # fmt: skip
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    left_out: list[str] = []
    for name, done in runs.items():
        for layer in done.result.get("layers", ()):
            by_kind.setdefault((name, layer["form"]), []).append(layer)
        left_out += [f"* {name} {what}: {why}" for what, why in done.result.get("left_out", {}).items()]
    rows, found = [], _failures("exact", runs)
    lost: dict[tuple[str, bool], list[str]] = {}
    judged: dict[tuple[str, bool], int] = {}
    for (name, form), layers in by_kind.items():
        row: list[object] = [name, form, len(layers)]
        for of in ("fitted", "held_out"):
            ratios = [_ratio(layer, of) for layer in layers]
            better, worse = sum(r > 1 + _EQUAL for r in ratios), sum(r < 1 - _EQUAL for r in ratios)
            row += [better, len(ratios) - better - worse, worse, figure(median(ratios)), figure(min(ratios))]
            kind = (of, form in LINEAR)
            judged[kind] = judged.get(kind, 0) + len(ratios)
            worse_here = [x["layer"] for x, r in zip(layers, ratios, strict=True) if r < 1 - _EQUAL]
            lost.setdefault(kind, []).extend(f"{layer} of {name} ({form})" for layer in worse_here)
        seconds = [layer["seconds"]["aware"] for layer in layers]
        rows.append([*row, figure(median(seconds), 3), figure(max(seconds), 2)])
    words = {"fitted": "the samples it was fitted to", "held_out": "other samples"}
    for (of, linear), count in sorted(judged.items(), key=lambda item: not item[0][1]):
        bad = lost[of, linear]
        said = f"better or equal at {count - len(bad)} of {count}" + (f"; not {', '.join(bad[:5])}" if bad else "")
        forms = ", ".join(LINEAR) if linear else "other forms"
        met = not bad if linear and of == "fitted" else None
        found.append(Verdict(f"activation-aware not worse than plain on {words[of]}, {forms}", met, said))
    header = (
        "model", "form", "layers", "better", "equal", "worse", "ratio", "least", "better'", "equal'", "worse'",
        "ratio'", "least'", "s", "most s",
    )  # fmt: skip
    lines = [
        f"Output error of plain over that of activation-aware at {arguments.share:.0%} of the weights, by layer: how",
        "often above, at and below 1, median and least; on samples it was fitted to, and (') on others; s: to fit one.",
        aligned(header, rows, left=2),
        *left_out,
    ]
    return "\n".join(lines), found


def _ratio(layer: Mapping[str, Any], of: str) -> float:
    """Error of plain over that of aware; 1 where there is none."""
    plain, aware = (layer["errors"][c][of] for c in ("plain", "aware"))
    return plain / aware if aware > 0 else 1.0 if plain == 0 else math.inf


# --- curves --------------------------------------------------------------------------------------------


def run_curves(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """Score against measured speed-up and size."""
    run = _steps(result, save)
    points: list[curves.LowRank] = []
    with _folder(arguments) as folder:
        for name in _models(arguments, "curves"):
            before = list(points)

            def so_far(new: Sequence[curves.LowRank], before: list[curves.LowRank] = before) -> None:
                result["curves"] = [asdict(p) for p in (*before, *new)]
                save()

            points += curves.curve(name, arguments, folder / name, run, so_far)
    forms = dict.fromkeys(f"* {p.model}, {p.candidate}: {p.forms}" for p in points if p.forms and p.keep in (0.5, 0.8))
    lines = [
        "Score against measured speed-up and size, no training (keep: of each layer's weights, of lm's whole file; dB:",
        "floor asked of the planner; s: of the process that made it):",
        aligned(curves.HEADER, [curves.line(p) for p in points], left=2),
        *forms,
        *(f"* {p.model} {p.candidate} {p.keep or p.decibels or ''} FAILED: {p.error}" for p in points if p.error),
    ]
    return "\n".join(lines), curves.verdicts(points)


# --- latency -------------------------------------------------------------------------------------------


def run_latency(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """Measured against predicted, layer by layer."""
    run = _steps(result, save)
    runs: dict[str, Run] = {}
    for name in _models(arguments, "latency"):
        note(f"{name}: latency of single layers")
        runs[name] = run(
            "benchmarks.factorize_worker", "latency", name, arguments.profile, str(arguments.share),
            str(arguments.layer_seconds), "+".join(arguments.forms), timeout=arguments.timeout,
        )  # fmt: skip
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    left_out: list[str] = []
    for name, done in runs.items():
        left_out += [f"* {name} {what}: {why}" for what, why in done.result.get("left_out", {}).items()]
        for layer in done.result.get("layers", ()):
            if layer["after_ms"] >= _LEAST_MS:
                by_kind.setdefault((name, layer["form"]), []).append(layer)
    rows = [[name, form, *_latency_row(layers)] for (name, form), layers in by_kind.items()]
    everything = [layer for layers in by_kind.values() for layer in layers]
    found = _failures("latency", runs)
    if everything:
        rows.append(["all", "", *_latency_row(everything)])
        near = [layer for layer in everything if abs(_after(layer)) <= LATENCY_WITHIN]
        errors = [abs(_after(layer)) for layer in everything]
        said = f"{len(near)} of {len(everything)} ({len(near) / len(everything):.0%}), median {median(errors):.0%} off"
        found.append(
            Verdict(f"factored layers within {LATENCY_WITHIN:.0%} of their prediction", len(near) == len(errors), said)
        )
        worth = [x for x in everything if x["predicted_after_ms"] < x["predicted_before_ms"]]
        faster = sum(x["after_ms"] < x["before_ms"] for x in worth)
        found.append(Verdict("predicted faster and measured faster", None, f"{faster} of {len(worth)}"))
    worst = sorted(everything, key=lambda x: -abs(math.log(x["predicted_after_ms"] / x["after_ms"])))[:5]
    header = (
        "model", "form", "layers", "speed-up", "predicted", "error", "within", "ratio error", "within", "before error",
    )  # fmt: skip
    lines = [
        f"Layers alone at {arguments.share:.0%} of their weights: median speed-up measured and predicted; median error",
        "of the seconds predicted of the factored layer and share within 15 %; the same of the ratio to the layer as",
        "it was; median error of that one's seconds:",
        aligned(header, rows, left=2),
        *(
            f"* far off: {x['layer']} as {x['form']} {x['ranks']}: {x['after_ms']:.3f} ms, "
            f"{x['predicted_after_ms']:.3f} predicted; before {x['before_ms']:.3f}, {x['predicted_before_ms']:.3f}"
            for x in worst
        ),
        *left_out,
    ]
    return "\n".join(lines), found


def _after(layer: Mapping[str, Any]) -> float:
    return float(layer["predicted_after_ms"] / layer["after_ms"] - 1)


def _latency_row(layers: Sequence[Mapping[str, Any]]) -> list[object]:
    measured = [x["before_ms"] / x["after_ms"] for x in layers]
    predicted = [x["predicted_before_ms"] / x["predicted_after_ms"] for x in layers]
    after = [_after(x) for x in layers]
    before = [x["predicted_before_ms"] / x["before_ms"] - 1 for x in layers]
    ratio = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
    row: list[object] = [len(layers), figure(median(measured)), figure(median(predicted))]
    for errors in (after, ratio):
        within = sum(abs(e) <= LATENCY_WITHIN for e in errors) / len(errors)
        row += [f"{median(errors):+.0%}", f"{within:.0%}"]
    return [*row, f"{median(before):+.0%}"]


# --- scale ---------------------------------------------------------------------------------------------

WAYS = {
    "plain": ("method=plain,recover=false", False),
    "activation-aware": ("recover=false", True),
}
"""Options of the pass, and whether it needs calibration; the share comes on top."""


def run_scale(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """Seconds and memory."""
    run = _steps(result, save)
    rows: list[list[object]] = []
    found: list[Verdict] = []
    for name in _models(arguments, "scale"):
        for way, (options, calibrated) in WAYS.items():
            note(f"{name}: all layers, {way}")
            samples = str((arguments.calibration or curves.CALIBRATION) if calibrated else 0)
            text = f"keep={arguments.share:g},{options}"
            done = run("benchmarks.factorize_worker", "scale", name, samples, text, timeout=arguments.timeout)
            if done.error:
                found.append(Verdict(f"{name}, all layers, {way}", False, done.error))
                continue
            facts = done.result
            rows += [
                [name, way, step, figure(s, 1), figure(facts["cpu_seconds"][step], 1), figure(facts["megabytes"][step])]
                for step, s in facts["seconds"].items()
            ]
            if not calibrated:
                found += _scale_verdicts(name, facts)
    header = ("model", "way", "step", "s", "cpu s", "MB beyond the model")
    return aligned(header, rows, left=3), found


def _scale_verdicts(name: str, facts: Mapping[str, Any]) -> list[Verdict]:
    seconds = sum(facts["seconds"].values())
    peak = max(facts["megabytes"].values())
    working = max(v for step, v in facts["megabytes"].items() if step != "write")
    largest = facts["largest_touched_megabytes"]
    layers = f"{facts['made']} layers of {facts['model_megabytes']:.0f} MB"
    return [
        Verdict(
            f"{name}: all layers in {SCALE_SECONDS:g} s",
            seconds <= SCALE_SECONDS,
            f"{layers} in {seconds:.1f} s ({sum(facts['cpu_seconds'].values()):.1f} of processor time), written",
        ),
        Verdict(
            f"{name}: memory beyond the model below {SCALE_LAYERS:g}x the largest layer",
            peak <= SCALE_LAYERS * largest,
            f"{working:.0f} MB and {peak:.0f} MB while it is written; {facts['made_megabytes']:.0f} MB of these are "
            f"new weights; the largest layer factored has {largest:.1f} MB, the largest weight "
            f"{facts['largest_megabytes']:.1f} MB",
        ),
    ]


# --- command line --------------------------------------------------------------------------------------

PARTS: dict[str, Part] = {"exact": run_exact, "curves": run_curves, "latency": run_latency, "scale": run_scale}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="comma list of: " + ", ".join(PARTS))
    add("--models", default="", help="comma list of: " + ", ".join(TASKS) + "; by default those of each part")
    add("--forms", default="", help="exact, latency: comma list of forms; all by default")
    add("--share", type=float, default=0.5, help="exact, latency, scale: share of a layer's weights that is kept")
    add("--samples", type=int, default=32, help="exact: feeds that layers are fitted to")
    add("--held-out", type=int, default=16, help="exact: feeds after those")
    add("--ladder", default="", help="curves: shares kept, for every model, as 0.8,0.5")
    add("--decibels", default=None, help="curves: floors of the planner, for every model, as 20,15; '' for none")
    add("--options", default="", help="curves: more options of the pass for all candidates, as layers=fc1")
    add("--candidates", default=",".join(curves.CANDIDATES), help="curves: of: " + ", ".join(curves.CANDIDATES))
    add("--calibration", type=int, default=0, help="calibration samples of curves and scale; 0: 64, few where slow")
    add("--limit", type=int, default=0, help="curves: evaluation samples; 0: all, few where slow")
    add("--seconds", type=float, default=60, help="curves: time for the latency of one model's files")
    add("--layer-seconds", type=float, default=0.3, help="latency: time for one layer in one form")
    add("--profile", default="host-x86-vnni", help="hardware profile")
    add("--timeout", type=float, default=7200, help="seconds any one step may take")
    add("--json", type=Path, help="write everything measured here, after every step")
    add("--resume", action="store_true", help="do not measure again what --json holds")
    add("--work", type=Path, help="curves: keep the models that are made in this folder")
    arguments = parser.parse_args(argv)
    choose(parser, arguments, {"parts": list(PARTS), "models": list(TASKS), "candidates": list(curves.CANDIDATES)})
    floats(parser, arguments, "ladder", *(["decibels"] if arguments.decibels is not None else []))
    arguments.forms = [f for f in arguments.forms.split(",") if f]
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json, which holds what was measured")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every target that could be judged was met."""
    arguments = parse(argv)
    try:
        zoo_folder()
    except BenchmarkError as error:
        note(str(error))
        return 2
    earlier: dict[str, Any] = {}
    if arguments.resume and arguments.json.is_file():
        earlier = json.loads(arguments.json.read_text())
    return run_parts(PARTS, arguments, earlier)


if __name__ == "__main__":
    raise SystemExit(main())
