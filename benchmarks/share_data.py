"""Two disjoint lots of labelled samples for a task: one to plan with, one to judge with.

A planner that is handed a metric looks at it often, so what it was handed is no evidence of the score. The
evaluation scripts of the zoo know one lot; here the names through which they get their samples are pointed at
others for a while, and the score stays theirs. What is planned with is taken from calibration data that carry labels
where there is enough of it, or made from other seeds; of lite0's images half are set aside. Calibration uses none of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime as ort

from benchmarks.measure import session
from benchmarks.tasks import Task

__all__ = ["BLOCKS", "PLAN", "SCORE", "SOURCES", "evaluate", "metric"]

PLAN, SCORE = "plan", "score"
BLOCKS = 8
"""Parts of a lot that are scored by themselves, for the error of a difference."""
MOST_CALIBRATION = 64
"""Samples that calibration may take from the side that :data:`PLAN` is taken from."""

Samples = Sequence[Any]


@dataclass(frozen=True)
class Source:
    """Where a script gets its samples.

    Attributes:
        name: global of the script that they come from.
        samples: those of a lot.
        stand_in: what to put in the global's place so that just these are evaluated.
    """

    name: str
    samples: Callable[[ModuleType, str], Samples]
    stand_in: Callable[[Samples], Any]


def _images(script: ModuleType, lot: str) -> Samples:
    digits = (2, 6) if lot == PLAN else (4, 8)
    return [item for item in script.FILES.items() if item[0] % 10 in digits]


def _pairs(script: ModuleType, lot: str) -> Samples:
    rows: Samples = script.sts("train" if lot == PLAN else "dev")
    return rows[8 * MOST_CALIBRATION :][:1500] if lot == PLAN else rows


def _lines(script: ModuleType, lot: str) -> Samples:
    first, count = (100_000, 300) if lot == PLAN else (0, 600)  # seeds
    return [script.line(first + i) for i in range(count)]


def _files(script: ModuleType, lot: str) -> Samples:
    known: dict[str, Samples] = script.files()
    if lot == SCORE:
        return known["eval"]
    rest = np.random.default_rng(1).permutation(len(known["cal"]))[MOST_CALIBRATION:]  # the script's own order
    return [known["cal"][i] for i in rest]


def _tones(script: ModuleType, lot: str) -> Samples:
    seed, count = (3, 2048) if lot == PLAN else (2, script.EVALUATED)
    return list(zip(*script.tones(count, seed), strict=True))


def _same_tones(samples: Samples) -> Callable[..., Any]:
    arrays = tuple(np.stack(part) for part in zip(*samples, strict=True))
    return lambda count, seed, first=0: arrays


def _chunks(script: ModuleType, lot: str) -> Samples:
    chunks: Samples = script.chunks(1 if lot == PLAN else 0)
    return chunks[MOST_CALIBRATION:] if lot == PLAN else chunks


SOURCES = {
    "eval_imagenet": Source("FILES", _images, dict),
    "eval_sts": Source("sts", _pairs, lambda samples: lambda split: samples),
    "eval_ocr": Source("line", _lines, lambda samples: lambda seed, cal=False: samples[seed]),
    "eval_magika": Source("files", _files, lambda samples: lambda: {"eval": samples}),
    "benchmarks.crepe": Source("tones", _tones, _same_tones),
    "eval_lm": Source("chunks", _chunks, lambda samples: lambda odd: samples),
}
"""By script of a task."""


def evaluate(task: Task, path: Path, lot: str, limit: int, *, blocks: int = 0) -> dict[str, Any]:
    """The task's score on one lot.

    Args:
        task: whose model it is.
        path: of the model.
        lot: :data:`PLAN` or :data:`SCORE`.
        limit: so many samples, evenly out of all; 0 for all.
        blocks: score so many interleaved parts of them by themselves, too.

    Returns:
        What the script returns, and ``blocks``: the score of each.
    """
    samples, runner = _lot(task, lot, limit), session(path, threads=2)
    found = [_scores(task, runner, samples[i::blocks]) for i in range(blocks)]
    return {**_scores(task, runner, samples), "blocks": [float(f[task.metrics[0]]) for f in found]}


def metric(task: Task, limit: int) -> Callable[[str], float]:
    """What a user would hand to ``optimize``: higher is better, on the lot to plan with."""
    samples = _lot(task, PLAN, limit)

    def score(path: str) -> float:
        found = float(_scores(task, session(Path(path), threads=2), samples)[task.metrics[0]])
        return 1 / found if task.lower_is_better else found

    return score


def _lot(task: Task, lot: str, limit: int) -> Samples:
    samples = SOURCES[task.script].samples(task.script_module, lot)
    return samples[:: max(1, len(samples) // limit)][:limit] if limit else samples  # as eval_lm chooses its chunks


def _scores(task: Task, runner: ort.InferenceSession, samples: Samples) -> dict[str, Any]:
    source, script = SOURCES[task.script], task.script_module
    with patch.object(script, source.name, source.stand_in(samples)):
        return dict(script.evaluate(runner, len(samples)))
