"""What a model costs when it is loaded: time, and memory afterwards and at most.

Weights stored in another form are multiplied out at load: the file is smaller, loading takes longer, and memory may be
more than before. Time is that of making a session, on one thread, files in the page cache, both models in turns.
Memory is that of a process of its own, which imports onnxruntime and loads: the difference to just before the load.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from os import PathLike
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.errors import ModelRunError
from onnxcompress.report import Load
from onnxcompress.session import Runner

__all__ = ["measure_load"]

_PROBE = """
import json, sys
import onnxruntime as ort
def read():
    with open("/proc/self/status") as lines:
        rows = dict(line.split(":", 1) for line in lines)
    return {k: 1024 * int(rows[k].split()[0]) for k in ("VmRSS", "VmHWM")}
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 4
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest mark starts again here, not at what importing took
except OSError:
    pass  # not allowed in some containers: then the mark may be that of the import
before = read()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
after = read()
print(json.dumps([after["VmRSS"] - before["VmRSS"], after["VmHWM"] - before["VmRSS"]]))
"""


def measure_load(
    before: ir.Model | str | PathLike[str],
    after: ir.Model | str | PathLike[str],
    *,
    rounds: int = 5,
    seconds: float = math.inf,
) -> Load:
    """Loads two models in turns.

    Args:
        before: a file, or a model.
        after: the other.
        rounds: how often each is timed.
        seconds: after this long no further round is begun; there is always one.

    Raises:
        ModelRunError: onnxruntime cannot load one of them.
    """
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(models.temporary_file(m)) if isinstance(m, ir.Model) else Path(m)
            for m in (before, after)
        )
        times: dict[int, list[float]] = {0: [], 1: []}
        begun = time.perf_counter()
        for number in range(rounds + 1):
            if number > 1 and time.perf_counter() - begun >= seconds:
                break
            for index, path in ((0, first), (1, second)) if number % 2 else ((1, second), (0, first)):
                start = time.perf_counter()
                runner = Runner(path, threads=1)
                if number:  # the first is slower: nothing is in the page cache yet
                    times[index].append(time.perf_counter() - start)
                del runner
        ms = (1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1]))
        if not Path("/proc/self/status").is_file():
            return Load(ms, None, None, len(times[0]))
        a, b = _memory(first), _memory(second)
        return Load(ms, (a[0], b[0]), (a[1], b[1]), len(times[0]))


def _memory(path: Path) -> tuple[int, int]:
    """Bytes more in memory after a load, and at most during it, in a process of its own."""
    done = subprocess.run([sys.executable, "-P", "-c", _PROBE, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelRunError(f"a process that only loads it failed: {reason}", path=path)
    resident, peak = json.loads(done.stdout)
    return int(resident), int(peak)
