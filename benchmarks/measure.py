"""Time and memory, measured so that two figures can be compared.

Peak memory is a process's, so what is measured runs in a process of its own. Latency drifts
with the machine, so candidates take turns in one process and a low percentile over many
rounds is what counts.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.tasks import Feed

ROOT = Path(__file__).resolve().parents[1]
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Run:
    """A finished worker process.

    Attributes:
        result: What it returned; holds only ``error`` when it failed.
        seconds: From start to end, imports included.
        cpu_seconds: Processor time of all its threads and children; hardly depends on other load.
        peak_mb: Largest resident set of it or of any one child; ``None`` when it was killed.
    """

    result: dict[str, Any]
    seconds: float
    cpu_seconds: float
    peak_mb: float | None

    @property
    def error(self) -> str:
        """First line of what went wrong; empty when nothing did."""
        return str(self.result.get("error", ""))


def run_worker(module: str, *arguments: str, timeout: float = 3600) -> Run:
    """Run ``python -m module arguments...``; it writes its result as JSON to ``$RESULT_FILE``.

    It runs in a folder that is deleted afterwards: onnxruntime's preparation leaves hundreds of
    megabytes in the current one when it fails. Paths among the arguments have to be absolute.
    """
    with tempfile.TemporaryDirectory() as folder:
        result_file, log_file = Path(folder) / "result.json", Path(folder) / "log"
        environment = {**os.environ, "RESULT_FILE": str(result_file), "PYTHONPATH": _python_path()}
        if zoo := os.environ.get("ONNXCOMPRESS_ZOO"):
            environment["ONNXCOMPRESS_ZOO"] = str(Path(zoo).resolve())
        with log_file.open("wb") as log:
            start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder,
            )  # fmt: skip
            timer = threading.Timer(timeout, process.kill)
            timer.start()
            code = process.wait()
            seconds = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
            expired = code < 0 and not timer.is_alive()
            timer.cancel()
        if result_file.is_file():
            result = json.loads(result_file.read_text())
        elif expired:
            result = {"error": f"stopped after {timeout:.0f} s"}
        else:
            said = log_file.read_text(errors="replace").strip().splitlines() or [""]
            result = {"error": f"exit status {code}: {said[-1]}"[:200]}
    peak = result.pop("peak_mb", None)
    return Run(result, round(seconds, 2), round(cpu, 2), peak)


def peak_mb() -> float:
    """Largest resident set so far of this process or any child it has waited for, in MB (1e6 bytes).

    Linux keeps a process's ``ru_maxrss`` over exec, so a small program started by a large one
    would be charged for its parent; ``VmHWM`` starts anew.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own = status_bytes("VmHWM") if _STATUS.is_file() else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(max(own, children) / 1e6, 1)


def status_bytes(field: str) -> int:
    """``VmRSS``, ``VmHWM`` or the like of this process, in bytes (Linux)."""
    return 1024 * int(_STATUS.read_text().split(f"{field}:", 1)[1].split()[0])


def write_result(result: dict[str, Any]) -> None:
    """What a worker hands back to :func:`run_worker`."""
    Path(os.environ["RESULT_FILE"]).write_text(json.dumps({**result, "peak_mb": peak_mb()}))


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """A CPU session as the benchmarks use it: ``threads`` threads, all optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleaved_latency(
    paths: Sequence[Path], feed: Feed, *, seconds: float = 30, least: int = 20, most: int = 300
) -> list[dict[str, float | str]]:
    """Latency of each model on ``feed``, all taking turns, one thread.

    Every round runs each model once (several times when a run takes under 3 ms), in random
    order. Rounds go on for ``seconds``, but at least ``least`` and at most ``most``.

    Returns:
        For each path ``p10_ms``, ``median_ms``, ``min_ms`` and ``rounds``, or ``error``.
    """
    results: list[dict[str, float | str]] = [{} for _ in paths]
    sessions: dict[int, ort.InferenceSession] = {}
    repeats: dict[int, int] = {}
    for i, path in enumerate(paths):
        try:
            sessions[i] = session(path)
            for _ in range(2):
                start = time.perf_counter()
                sessions[i].run(None, feed)
                once = time.perf_counter() - start
            repeats[i] = max(1, round(0.003 / max(once, 1e-6)))
        except Exception as error:  # a file onnxruntime cannot run is a row, not a crash
            sessions.pop(i, None)
            text = str(error).strip().splitlines()
            results[i] = {"error": f"{type(error).__name__}: {text[0] if text else ''}"[:160]}
    times: dict[int, list[float]] = {i: [] for i in sessions}
    shuffle = np.random.default_rng(0)  # a fixed order would always put the same one in the other's cache
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for i in shuffle.permutation(list(sessions)):
            start = time.perf_counter()
            for _ in range(repeats[i]):
                sessions[i].run(None, feed)
            times[i].append((time.perf_counter() - start) / repeats[i] * 1e3)
    for i, series in times.items():
        results[i] = {
            "p10_ms": round(float(np.percentile(series, 10)), 4),
            "median_ms": round(float(np.median(series)), 4),
            "min_ms": round(min(series), 4),
            "rounds": len(series),
        }
    return results
