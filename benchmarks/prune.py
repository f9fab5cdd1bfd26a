"""Structured pruning held against what it has to reach: any graph, score against speed, seconds and memory.

    python -m benchmarks.prune [--parts families,curves,scale] [--onnxsim PYTHON] [--json out.json]

families  half of every free group removed, from generated models and, with ``ONNXCOMPRESS_ZOO``, real ones;
          onnxsim 0.8.1 on the same files where ``--onnxsim`` names an interpreter that has it
curves    score against measured speed-up without training, against magnitude pruning at equal latency
scale     coupling analysis of 5,000 nodes; a 90 MB transformer pruned end to end

Every measured step runs in a process of its own: seconds and peak memory are of the whole process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import prune_curves as curves
from benchmarks import prune_families as families
from benchmarks.measure import run_worker
from benchmarks.parts import Part, choose, floats, run_parts
from benchmarks.printing import aligned, figure
from benchmarks.tasks import TASKS, BenchmarkError, zoo_folder
from benchmarks.zoo import Verdict, note

# The targets.
NODES, COUPLING_SECONDS = 5000, 5.0
_WIDTH, _DEPTH = "32", "44"  # a GPT of just over so many nodes
PRUNING_SECONDS, PRUNING_MB = 120.0, 1500.0


def run_families(
    arguments: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]
) -> tuple[str, list[Verdict]]:
    """Half of every free group removed."""
    rows: list[dict[str, Any]] = result.setdefault("families", [])
    for name in arguments.subjects or families.subjects(arguments.zoo):
        if name in TASKS and not arguments.zoo:
            continue
        note(f"half of {name}")
        done = run_worker(
            "benchmarks.prune_worker", "family", name, arguments.onnxsim, str(arguments.samples), arguments.profile,
            timeout=arguments.timeout,
        )  # fmt: skip
        error = {"error": done.error} if done.error else {}
        rows.append({"model": name, **done.result, **error, "seconds": done.seconds, "peak_megabytes": done.peak_mb})
        save()
    lines = [
        "Share of float weight bytes left after half of every free group is removed (cut: groups, by auto):",
        aligned(families.HEADER, [families.line(r) for r in rows]),
        *(p for r in rows for p in families.problems(r)),
    ]
    bad = [r["model"] for r in rows if not families.good(r)]
    said = f"{len(rows) - len(bad)} of {len(rows)}" + (f"; not {', '.join(bad)}" if bad else "")
    found = [Verdict("half removed: loads, runs, keeps its signature, is as small as predicted", not bad, said)]
    if not arguments.zoo:
        lines.append("* real models left out: ONNXCOMPRESS_ZOO is not set")
    return "\n".join(lines), found


def run_curves(
    arguments: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]
) -> tuple[str, list[Verdict]]:
    """Score against measured speed-up."""
    if not arguments.zoo:
        return "* curves left out: ONNXCOMPRESS_ZOO is not set", []
    points: list[curves.Point] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            before = list(points)

            def so_far(new: Sequence[curves.Point], before: list[curves.Point] = before) -> None:
                result["curves"] = [asdict(p) for p in (*before, *new)]
                save()

            made = curves.curve(name, arguments, Path(temporary) / name, so_far)
            if arguments.keep:
                curves.keep_files(made, arguments.keep)
            points += made
            so_far(made)
    lines = [
        "Score against measured speed-up, no training (dB: floor asked for; s: of the process that made it):",
        aligned(curves.HEADER, [curves.line(p) for p in points], left=2),
        *(f"* {p.model} {p.candidate} FAILED: {p.error}" for p in points if p.error),
    ]
    return "\n".join(lines), curves.verdicts(points)


def run_scale(
    arguments: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]
) -> tuple[str, list[Verdict]]:
    """Seconds and memory."""
    rows: list[tuple[object, ...]] = []
    found: list[Verdict] = []
    scale: dict[str, Any] = result.setdefault("scale", {})
    note("coupling of a large graph")
    done = run_worker("benchmarks.prune_worker", "couple", _WIDTH, _DEPTH, timeout=arguments.timeout)
    scale["coupling"] = {**done.result, "peak_megabytes": done.peak_mb}
    save()
    if done.error:
        found.append(Verdict("coupling of a large graph", False, done.error))
    else:
        worst = max(done.result["cpu_seconds"].values())  # one thread that never waits: wall time without the load
        nodes = done.result["nodes"]
        cpu = done.result["cpu_seconds"]
        for shapes, seconds in done.result["seconds"].items():
            rows.append((f"coupling of {nodes} nodes, {shapes}", figure(seconds, 1), figure(cpu[shapes], 1), None))
        whole = (figure(done.seconds, 1), figure(done.cpu_seconds, 1), figure(done.peak_mb, 0))
        rows.append(("both with imports and building the model", *whole))
        met = nodes >= NODES and worst <= COUPLING_SECONDS
        found.append(
            Verdict(f"coupling of {NODES:,} nodes in {COUPLING_SECONDS:g} s", met, f"{nodes} in {worst:.1f} s")
        )
    if not arguments.zoo:
        rows.append(("minilm pruned: ONNXCOMPRESS_ZOO is not set", None, None, None))
    ways: dict[str, tuple[str, float]] = {
        "half, by hand": ("ratio=0.5", -1000.0),
        "planned": ("", 20.0),
    }
    for name, (options, decibels) in ways.items() if arguments.zoo else ():
        note(f"minilm, {name}")
        with tempfile.TemporaryDirectory() as folder:
            done = run_worker(
                "benchmarks.prune_worker", "prune", "minilm", str(Path(folder) / "model.onnx"),
                str(arguments.calibration), arguments.profile, options, str(decibels),
                timeout=arguments.timeout,
            )  # fmt: skip
        scale[f"minilm {name}"] = {**done.result, "seconds": done.seconds, "cpu_seconds": done.cpu_seconds,
                                   "peak_megabytes": done.peak_mb}  # fmt: skip
        save()
        whole = (figure(done.seconds, 1), figure(done.cpu_seconds, 1), figure(done.peak_mb, 0))
        rows.append((f"minilm pruned with recovery, {name}", *whole))
        met = not done.error and done.seconds <= PRUNING_SECONDS and (done.peak_mb or 0) <= PRUNING_MB
        said = done.error or f"{done.seconds:.0f} s ({done.cpu_seconds:.0f} of processor time), {done.peak_mb:.0f} MB"
        target = f"minilm, {name}, in {PRUNING_SECONDS:.0f} s and {PRUNING_MB:.0f} MB"
        found.append(Verdict(target, met, said))
    return aligned(("what", "s", "cpu s", "peak MB"), rows), found


PARTS: dict[str, Part] = {"families": run_families, "curves": run_curves, "scale": run_scale}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="comma list of: " + ", ".join(PARTS))
    add("--subjects", default="", help="families: comma list of families and zoo models; all by default")
    add("--models", default=",".join(curves.LADDERS), help="curves: comma list of: " + ", ".join(TASKS))
    add("--ladder", default="", help="curves: dB floors for every model, as 20,15,10")
    rivals = f"{curves.PLAIN},{curves.REFITTED}"
    add("--rivals", default=rivals, help="curves: comma list of: " + ", ".join(curves.RIVALS))
    add("--options", default="", help="curves: options of the planned pass, as criterion=activation")
    add("--onnxsim", default="", metavar="PYTHON", help="families: interpreter that has onnxsim 0.8.1")
    add("--samples", type=int, default=8, help="families: feeds the pass sees")
    add("--calibration", type=int, default=64, help="calibration samples of curves and scale")
    add("--limit", type=int, default=0, help="evaluation samples; 0 for all")
    add("--seconds", type=float, default=60, help="time for the latency of one model's files")
    add("--profile", default="host-x86-vnni", help="hardware profile")
    add("--timeout", type=float, default=3600, help="seconds any one step may take")
    add("--json", type=Path, help="write everything measured here, after every step")
    add("--keep", type=Path, help="curves: keep the planner's files in this folder")
    arguments = parser.parse_args(argv)
    known = {
        "parts": list(PARTS),
        "subjects": families.subjects(zoo=True),
        "models": list(TASKS),
        "rivals": list(curves.RIVALS),
    }
    choose(parser, arguments, known)
    floats(parser, arguments, "ladder")
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every target that could be judged was met."""
    arguments = parse(argv)
    try:
        arguments.zoo = zoo_folder()
    except BenchmarkError:
        arguments.zoo = None
    return run_parts(PARTS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
