"""The half of :mod:`onnxcompress.emulation` that runs inside the emulator. Needs numpy and onnxruntime only.

    python guest.py FOLDER

``FOLDER/jobs.json`` lists models, feeds and how many runs to count. Outputs go to numbered files, and after each
job a line to ``done.jsonl``. The system call getpriority with an odd first argument marks where counting
starts and ends; to anything but the emulator's plugin it means nothing.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

MARK, GETPRIORITY = 0x4D41524B, 141  # the number of the system call is that of aarch64


EMULATED = platform.machine() == "aarch64"
LIBC = ctypes.CDLL(None)


def mark(tag: int) -> None:
    """Ends a region of the counted program; its counts are written with the tag."""
    if EMULATED:
        LIBC.syscall(GETPRIORITY, MARK, tag)


def load(path: Path, names: Sequence[str]) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[f"arr_{i}"] for i, name in enumerate(names)}


def run(folder: Path, number: int, job: dict[str, Any]) -> list[str]:
    """Runs one job and returns the names of the outputs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if job["raw"]:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    tensors = {o.name for o in session.get_outputs() if o.type.startswith("tensor(")}
    names = [name for name in (job["outputs"] or [o.name for o in session.get_outputs()]) if name in tensors]
    feeds = [load(folder / f"feed_{number}_{i}.npz", names_) for i, names_ in enumerate(job["feeds"])]
    for i, feed in enumerate(feeds if job["keep"] else ()):
        np.savez(folder / f"output_{number}_{i}.npz", *session.run(names, feed))
    if job["runs"]:
        binding = session.io_binding()  # so that Python's part is as small as can be
        for name, array in feeds[0].items():
            binding.bind_cpu_input(name, array)
        for output in session.get_outputs():
            binding.bind_output(output.name)
        session.run_with_iobinding(binding)  # allocates
        mark(2 * number)  # the first is slow, for Python looks the function up
        session.run_with_iobinding(binding)
        mark(2 * number)
        for _ in range(job["runs"]):
            session.run_with_iobinding(binding)
        mark(2 * number + 1)
    return names


def main(folder: Path) -> None:
    jobs = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    with (folder / "done.jsonl").open("a", encoding="utf-8") as done:
        for number, job in enumerate(jobs):
            answer: dict[str, Any] = {"job": number, "onnxruntime": ort.__version__}
            try:
                answer["outputs"] = run(folder, number, job)
            except Exception as error:  # told to the host, which raises it there
                answer["error"] = f"{type(error).__name__}: {error}"
            done.write(json.dumps(answer) + "\n")
            done.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
