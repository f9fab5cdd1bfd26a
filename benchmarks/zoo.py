"""Real models with real scores: fp32, onnxruntime's quantizers and onnxcompress side by side.

    ONNXCOMPRESS_ZOO=folder python -m benchmarks.zoo [--models lite0,minilm] [--json out.json]

Every producer gets the same model and the same calibration feeds and runs in a process of its
own: seconds and peak memory are of the whole process, imports and reading the data included.
Latency is of one thread, all candidates taking turns in one process, 10th percentile over the
rounds; fp32 takes part twice, so its second figure shows the noise. Speed and score are ratios
to fp32, above 1 is better.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx
import onnxruntime as ort
import zstandard

from benchmarks.measure import run_worker
from benchmarks.producers import PRODUCERS
from benchmarks.tasks import TASKS, BenchmarkError, Task, zoo_folder

FP32 = "fp32"
OURS = "onnxcompress"
RIVALS = ("ort-static", "ort-dynamic", "ort-dynamic-prepared")

# The targets.
SCORE_LOSS = 0.01
GEOMEAN = 2.0
SMALLER = 3.5
WEIGHTS_DOMINATE = 0.9


@dataclass
class Row:
    """One candidate of one model; ``error`` set and the rest empty when it failed."""

    model: str
    candidate: str
    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    score_ratio: float | None = None
    megabytes: float | None = None
    smaller: float | None = None
    zstd_megabytes: float | None = None
    milliseconds: float | None = None
    speed: float | None = None
    score_times_speed: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_megabytes: float | None = None
    weight_share: float | None = None
    noise: float | None = None
    latency: dict[str, Any] = field(default_factory=dict)
    remark: str = ""
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """One line of the issue's "Must reach"."""

    target: str
    met: bool | None
    figure: str

    def __str__(self) -> str:
        word = {True: "PASS", False: "MISS", None: "----"}[self.met]
        return f"{word}  {self.target}: {self.figure}"


def size_of(folder: Path, level: int = 9) -> tuple[int, int]:
    """Bytes of all files in ``folder``, and of the same compressed by zstd."""
    plain = packed = 0
    for file in folder.iterdir():
        compressor = zstandard.ZstdCompressor(level=level).compressobj(size=file.stat().st_size)
        with file.open("rb") as source:
            while chunk := source.read(1 << 22):
                plain += len(chunk)
                packed += len(compressor.compress(chunk))
        packed += len(compressor.flush())
    return plain, packed


def weight_share(model: Path) -> float:
    """Fraction of the file that is floating-point weights, in subgraphs and Constants too."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)

    def tensors(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    yield from tensors(attribute.g)

    held = sum(t.ByteSize() for t in tensors(onnx.load(model).graph) if t.data_type in floats)
    return float(held / model.stat().st_size)


def run_model(task: Task, arguments: argparse.Namespace, work: Path) -> list[Row]:
    """All rows of one model."""
    reference = work / FP32
    reference.mkdir(parents=True)
    (reference / "model.onnx").symlink_to(task.path)
    rows = [Row(task.name, FP32, weight_share=round(weight_share(task.path), 4))]
    for kind in arguments.candidates:
        folder = work / kind
        folder.mkdir()
        note(f"{task.name}: {kind}")
        output = str(folder / "model.onnx")
        made = run_worker(
            "benchmarks.worker", "produce", kind, task.name, output, str(arguments.calibration), arguments.profile,
            timeout=arguments.timeout,
        )  # fmt: skip
        row = Row(task.name, kind, seconds=made.seconds, cpu_seconds=made.cpu_seconds, peak_megabytes=made.peak_mb)
        row.error, row.remark = made.error, made.result.get("remark", "")
        if not row.error and not (folder / "model.onnx").is_file():
            row.error = "wrote no file"
        rows.append(row)
    for row in rows:
        if not row.error:
            judge(row, rows[0], task, work, arguments)
    time_rows(rows, task, work, arguments)
    return rows


def judge(row: Row, reference: Row, task: Task, work: Path, arguments: argparse.Namespace) -> None:
    """Fill in size and score."""
    note(f"{task.name}: score of {row.candidate}")
    plain, packed = size_of(work / row.candidate)
    row.megabytes, row.zstd_megabytes = round(plain / 1e6, 3), round(packed / 1e6, 3)
    row.smaller = round((reference.megabytes or row.megabytes) / row.megabytes, 3)
    model = str(work / row.candidate / "model.onnx")
    scored = run_worker("benchmarks.worker", "score", task.name, model, str(arguments.limit), timeout=arguments.timeout)
    row.error = scored.error
    if not row.error:
        row.scores = scored.result
        row.score = float(row.scores[task.metrics[0]])
        base = row.score if reference.score is None else reference.score
        row.score_ratio = round(task.ratio(row.score, base), 5)


def time_rows(rows: Sequence[Row], task: Task, work: Path, arguments: argparse.Namespace) -> None:
    """Fill in latency: all candidates of the model in one process, fp32 twice."""
    alive = [r for r in rows if not r.error]
    if not alive or alive[0].candidate != FP32:
        return
    note(f"{task.name}: latency")
    paths = [str(work / r.candidate / "model.onnx") for r in (alive[0], *alive)]
    timed = run_worker(
        "benchmarks.worker", "latency", task.name, str(arguments.seconds), *paths, timeout=arguments.timeout
    )
    if timed.error:
        alive[0].error = f"latency: {timed.error}"
        return
    again, *figures = timed.result["rows"]
    if "error" in again:
        alive[0].error = again["error"]
        return
    base = figures[0]["p10_ms"]
    alive[0].noise = round(abs(1 - again["p10_ms"] / base), 4)
    for row, figure in zip(alive, figures, strict=True):
        if "error" in figure:
            row.error = figure["error"]
            continue
        row.latency = figure
        row.milliseconds = figure["p10_ms"]
        row.speed = round(base / figure["p10_ms"], 3)
        if row.score_ratio is not None:
            row.score_times_speed = round(row.score_ratio * row.speed, 3)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The issue's targets against these rows."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, {})[row.candidate] = row
    ours = {m: c[OURS] for m, c in by_model.items() if OURS in c}
    if not ours:
        return []
    lines = []
    for model, row in ours.items():
        if row.error or row.score_ratio is None or row.speed is None:
            lines.append(Verdict(f"{model} runs", False, row.error or "not measured"))
            continue
        lines.append(
            Verdict(f"{model} score within 1 %", row.score_ratio >= 1 - SCORE_LOSS, f"{row.score_ratio:.4f} of fp32")
        )
        noise = max(0.02, by_model[model][FP32].noise or 0)
        lines.append(
            Verdict(f"{model} not slower", row.speed >= 1 - noise, f"{row.speed:.2f}x (noise {noise * 100:.0f} %)")
        )
        rivals = [r for k in RIVALS if (r := by_model[model].get(k)) and r.score_times_speed is not None]
        if rivals:
            best = max(rivals, key=lambda r: r.score_times_speed or 0)
            mine, theirs = row.score_times_speed or 0, best.score_times_speed or 0
            lines.append(
                Verdict(
                    f"{model} score x speed", mine >= theirs, f"{mine:.3f} against {theirs:.3f} of {best.candidate}"
                )
            )
        share = by_model[model][FP32].weight_share or 0
        if share >= WEIGHTS_DOMINATE and row.smaller is not None:
            lines.append(
                Verdict(f"{model} file", row.smaller >= SMALLER, f"{row.smaller:.2f}x smaller ({share:.0%} weights)")
            )
        static = by_model[model].get("ort-static")
        if static and static.seconds and row.seconds and not static.error:
            lines.append(
                Verdict(
                    f"{model} wall time",
                    row.seconds <= static.seconds,
                    f"{row.seconds:.1f} s against {static.seconds:.1f} s of ort-static "
                    f"(processor time {row.cpu_seconds or 0:.1f} against {static.cpu_seconds or 0:.1f})",
                )
            )
    headline = [t.name for t in TASKS.values() if t.headline]
    speeds = [r.speed for m in headline if (r := ours.get(m)) and r.speed]
    if speeds:
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        complete = len(speeds) == len(headline)
        remark = "" if complete else f" over {len(speeds)} of {len(headline)} models"
        lines.append(
            Verdict(f"geometric mean speed-up over {', '.join(headline)}",
                    mean >= GEOMEAN if complete else None, f"{mean:.2f}x{remark}")
        )  # fmt: skip
    return lines


HEADER = (
    "model", "candidate", "score", "ratio", "MB", "smaller", "zstd MB", "ms", "speed", "score*speed", "s", "cpu s",
    "peak MB",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; a failed row shows its error, remarks follow the table."""

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    cells = [HEADER]
    for r in rows:
        cells.append(
            (
                r.model, r.candidate, cell(r.score, 4), cell(r.score_ratio, 4), cell(r.megabytes, 2),
                cell(r.smaller, 2), cell(r.zstd_megabytes, 2), cell(r.milliseconds, 2), cell(r.speed, 2),
                cell(r.score_times_speed, 3), cell(r.seconds, 1), cell(r.cpu_seconds, 1), cell(r.peak_megabytes, 0),
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    lines = [
        "  ".join(v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [f"* {r.model} {r.candidate} FAILED: {r.error}" for r in rows if r.error]
    lines += [f"* {r.model} {r.candidate}: {r.remark}" for r in rows if r.remark]
    lines += [f"* {r.model}: the same fp32 file timed twice differs by {r.noise:.1%}" for r in rows if r.noise]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text()
        cpu = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), cpu)
        flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
        cpu += "".join(f" {f}" for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if f in flags)
    return {"cpu": cpu, "cores": str(os.cpu_count()), "onnxruntime": ort.__version__, "onnx": onnx.__version__}


def note(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", default=",".join(t for t in TASKS if t != "rec"), help="comma list of: " + ", ".join(TASKS))
    add("--candidates", default=",".join(PRODUCERS), help="comma list of: " + ", ".join(PRODUCERS))
    add("--calibration", type=int, default=64, help="calibration samples for every producer")
    add("--limit", type=int, default=0, help="evaluation samples; 0 for all")
    add("--seconds", type=float, default=30, help="time for the latency of one model")
    add("--profile", default="host-x86-vnni", help="hardware profile onnxcompress is given")
    add("--timeout", type=float, default=3600, help="seconds any one step may take")
    add("--json", type=Path, help="write rows, verdicts and machine here, after every model")
    add("--keep", type=Path, help="keep the produced files in this folder")
    arguments = parser.parse_args(argv)
    for name, known in (("models", TASKS), ("candidates", PRODUCERS)):
        chosen = [v for v in getattr(arguments, name).split(",") if v]
        setattr(arguments, name, chosen)
        if unknown := [v for v in chosen if v not in known]:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every target that could be judged was met."""
    arguments = parse(argv)
    try:
        zoo_folder()
    except BenchmarkError as error:
        note(str(error))
        return 2
    rows: list[Row] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            work = (arguments.keep.resolve() if arguments.keep else Path(temporary)) / name
            try:
                rows += run_model(TASKS[name], arguments, work)
            except (BenchmarkError, OSError) as error:
                rows.append(Row(name, FP32, error=str(error)))
            if arguments.json:
                write_json(arguments, rows)
    print(table(rows))
    if load > 0.3:
        print(f"* the machine was busy when this began (load {load:.1f}): seconds and latency are worth less")
    lines = verdicts(rows)
    print("\n".join(map(str, lines)))
    return int(any(v.met is False for v in lines))


def write_json(arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Everything measured so far."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    result = {
        "machine": machine(),
        "options": options,
        "rows": [asdict(r) for r in rows],
        "verdicts": [asdict(v) for v in verdicts(rows)],
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
