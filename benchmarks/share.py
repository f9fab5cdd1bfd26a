"""Weights stored in fewer bits, held against what they have to reach: bytes, score, latency, loading and seconds.

    ONNXCOMPRESS_ZOO=folder python -m benchmarks.share [--parts zoo,lm,load,speed,classes] [--onnxsim PYTHON]

zoo      six models: files planned for size, for the download, for size and latency, in four bits by hand, and rivals'
lm       the language model in four bits: file and perplexity
load     seconds and memory of loading what ``zoo`` and ``lm`` made, in full
speed    clustering a 90 MB model, in a process of its own
classes  what the compressed bytes of these files are spent on

Every measured step runs in a process of its own. With ``--resume`` the steps that ``--json`` holds are not measured
again, and ``--work`` keeps the models they made.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import share_zoo as zoo
from benchmarks.parts import Part, choose, run_parts
from benchmarks.printing import aligned, figure
from benchmarks.share_data import SOURCES
from benchmarks.share_makers import BY_HAND, MAKERS, NBITS, ONNXSIM, OURS
from benchmarks.steps import Steps
from benchmarks.tasks import TASKS, BenchmarkError, zoo_folder
from benchmarks.zoo import FP32, Verdict, note

Saving = Callable[[], None]
Tables = tuple[str, list[Verdict]]

MODELS = ("lite0", "minilm", "crnn", "rec", "magika", "crepe")
LM, LM_CANDIDATES = "lm", (BY_HAND, ONNXSIM, NBITS)
SCALE_MODEL, SCALE_SECONDS, SCALE_CALIBRATION = "minilm", 60.0, 64
_SHOWN = 12
"""Classes of bytes a file is shown with."""


def _rows(part: str, arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> list[zoo.Row]:
    """Rows of all models of a part; steps that are known are not measured again."""
    run = Steps(result.setdefault("steps", {}), save)
    rows: list[zoo.Row] = []
    models = [LM] if part == "lm" else [m for m in arguments.models if m != LM]
    defaults = LM_CANDIDATES if part == "lm" else tuple(MAKERS)
    for name in models:
        rows += zoo.measure(name, arguments.candidates or defaults, arguments, arguments.work / name, run, save)
        result[part] = [asdict(r) for r in rows]
        save()
    return rows


def _table(rows: Sequence[zoo.Row]) -> str:
    lines = [
        "Ratios to fp32, above 1 is better: file, compressed by zstd, latency (speed). Score: share of fp32's and its",
        "standard error. Load, memory: of making a session, over fp32's, below 1 is better. s: of the whole process.",
        aligned(zoo.HEADER, [zoo.line(r) for r in rows], left=2),
        *(f"* {r.model}: score of {r.samples} samples" for r in rows if r.candidate == FP32 and r.samples),
        *(f"* {r.model} {r.candidate}: {r.remark}" for r in rows if r.remark),
        *(f"* {r.model} {r.candidate} FAILED: {r.error}" for r in rows if r.error),
    ]
    return "\n".join(lines)


def run_zoo(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """Small models."""
    rows = _rows("zoo", arguments, result, save)
    return _table(rows), zoo.verdicts(rows)


def run_lm(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """The language model."""
    rows = _rows("lm", arguments, result, save)
    return _table(rows), zoo.perplexity(rows)


def run_load(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """What loading costs, in full."""
    known = [r for part in ("zoo", "lm") for r in result.get(part, ()) if r["load_megabytes"]]
    cells = [
        [
            r["model"], r["candidate"], figure(1e3 * r["load_seconds"], 0), figure(r["load"]),
            figure(r["load_megabytes"][0], 0), figure(r["memory"]), figure(r["load_megabytes"][1], 0),
        ]
        for r in known
    ]  # fmt: skip
    header = ("model", "candidate", "load ms", "of fp32", "MB after", "of fp32", "peak MB")
    said = "Making a session, median of processes of their own taking turns; resident memory that it added:"
    return f"{said}\n{aligned(header, cells, left=2)}" if known else "* load: nothing made yet", []


def run_speed(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """Seconds and memory of clustering."""
    run = Steps(result.setdefault("steps", {}), save)
    rows: list[list[object]] = []
    found: list[Verdict] = []
    options = ",".join(filter(None, ("bits=4", arguments.options)))
    for samples in (0, SCALE_CALIBRATION):
        way = "calibrated" if samples else "without data"
        note(f"{SCALE_MODEL}: all weights clustered, {way}")
        done = run(zoo.WORKER, "speed", SCALE_MODEL, str(samples), options, timeout=arguments.timeout)
        target = f"{SCALE_MODEL} in four bits, {way}, in {SCALE_SECONDS:g} s"
        if done.error:
            found.append(Verdict(target, False, done.error))
            continue
        facts = done.result
        rows += [
            [
                SCALE_MODEL,
                way,
                step,
                figure(s, 1),
                figure(facts["cpu_seconds"][step], 1),
                figure(facts["megabytes"][step]),
            ]
            for step, s in facts["seconds"].items()
        ]
        said = (
            f"{facts['made']} tensors of {facts['model_megabytes']:.0f} MB in {sum(facts['seconds'].values()):.1f} s "
            f"({sum(facts['cpu_seconds'].values()):.1f} of processor time), {done.seconds:.1f} s with imports; "
            f"{facts['made_megabytes']:.1f} MB of new weights"
        )
        found.append(Verdict(target, sum(facts["seconds"].values()) <= SCALE_SECONDS, said))
    return aligned(("model", "way", "step", "s", "cpu s", "MB beyond the model"), rows, left=3), found


def run_classes(arguments: argparse.Namespace, result: dict[str, Any], save: Saving) -> Tables:
    """What the bytes hold."""
    run = Steps(result.setdefault("steps", {}), save)
    rows: list[list[object]] = []
    made = [r for part in ("zoo", "lm") for r in result.get(part, ()) if r["candidate"] in OURS and not r["error"]]
    failed: list[Verdict] = []
    for r in made:
        if not Path(r["file"]).is_file():
            continue
        done = run(zoo.WORKER, "classes", r["file"], timeout=arguments.timeout)
        if done.error:
            failed.append(Verdict(f"{r['model']}, {r['candidate']}: classes", False, done.error))
            continue
        kinds = {**done.result["classes"], "graph": done.result["graph"]}
        raw, packed = (sum(k[i] for k in kinds.values()) for i in (0, 1))
        for kind, (mine, small) in sorted(kinds.items(), key=lambda item: -item[1][1])[:_SHOWN]:
            rows.append([r["model"], r["candidate"], kind, mine, f"{mine / raw:.1%}", small, f"{small / packed:.1%}"])
    header = ("model", "candidate", "what", "bytes", "of the file", "zstd -3", "of all")
    said = "What the bytes are (type of constants, operators that read them), each class compressed by itself:"
    return f"{said}\n{aligned(header, rows, left=3)}" if rows else "* classes: nothing made yet", failed


PARTS: dict[str, Part] = {
    "zoo": run_zoo, "lm": run_lm, "load": run_load, "speed": run_speed, "classes": run_classes,
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    known = [name for name, task in TASKS.items() if task.script in SOURCES]
    add("--parts", default=",".join(PARTS), help="comma list of: " + ", ".join(PARTS))
    add("--models", default=",".join(MODELS), help="zoo: comma list of: " + ", ".join(known))
    add("--candidates", default="", help="zoo, lm: comma list of: " + ", ".join(MAKERS))
    add("--options", default="", help="more options of the pass where it is named by hand, as group=64")
    add("--onnxsim", default="", metavar="PYTHON", help="interpreter that has onnxsim 0.8.1")
    add("--calibration", type=int, default=0, help="calibration samples; 0: 64, few where slow")
    add("--metric-samples", type=int, default=0, help="samples of the metric that plans are made with; 0 for all")
    add("--limit", type=int, default=0, help="evaluation samples; 0: all, few where slow")
    add("--seconds", type=float, default=60, help="time for the latency of one model's files; 0 for none")
    add("--loads", type=int, default=5, help="times each file is loaded; 0 for none")
    add("--profile", default="host-x86-vnni", help="hardware profile")
    add("--timeout", type=float, default=7200, help="seconds any one step may take")
    add("--json", type=Path, help="write everything measured here, after every step")
    add("--resume", action="store_true", help="do not measure again what --json holds")
    add("--work", type=Path, help="keep the models that are made in this folder")
    arguments = parser.parse_args(argv)
    choose(parser, arguments, {"parts": list(PARTS), "models": known, "candidates": list(MAKERS)})
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json, which holds what was measured")
    return arguments


@contextmanager
def _work(folder: Path | None) -> Iterator[Path]:
    """Where models are written: the user's folder, or one that is deleted."""
    if folder:
        yield folder.resolve()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


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
    with _work(arguments.work) as arguments.work:
        return run_parts(PARTS, arguments, earlier)


if __name__ == "__main__":
    raise SystemExit(main())
