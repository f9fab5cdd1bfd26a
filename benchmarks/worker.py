"""One measured step in a process of its own; started by ``benchmarks.measure.run_worker``.

produce KIND TASK OUTPUT SAMPLES PROFILE
score TASK MODEL LIMIT
latency TASK SECONDS MODEL...
"""

from __future__ import annotations

import itertools
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import interleaved_latency, write_result
from benchmarks.producers import PRODUCERS, first_line
from benchmarks.tasks import TASKS


def produce(kind: str, task: str, output: str, samples: str, profile: str) -> dict[str, Any]:
    """Make one compressed model."""
    chosen = TASKS[task]
    remark = PRODUCERS[kind](chosen.path, Path(output), chosen.feeds(int(samples)), profile)
    return {"remark": remark}


def score(task: str, model: str, limit: str) -> dict[str, Any]:
    """Every number of the task's evaluation."""
    return dict(TASKS[task].score(Path(model), int(limit) or None))


def latency(task: str, seconds: str, *models: str) -> dict[str, Any]:
    """Interleaved latency on the first calibration feed."""
    (feed,) = itertools.islice(TASKS[task].feeds(1), 1)
    rows = interleaved_latency([Path(m) for m in models], feed, seconds=float(seconds))
    return {"rows": rows, "shapes": {k: list(v.shape) for k, v in feed.items()}}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {"produce": produce, "score": score, "latency": latency}


def run_step(steps: Mapping[str, Callable[..., dict[str, Any]]]) -> int:
    """Run the step named on the command line and hand its result back."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    step, *arguments = sys.argv[1:]
    try:
        write_result(steps[step](*arguments))
    except Exception as error:  # a failed step, or whatever a rival raises, becomes a row
        traceback.print_exc()
        write_result({"error": first_line(error)})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(run_step(STEPS))
