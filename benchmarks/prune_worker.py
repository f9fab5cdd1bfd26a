"""One measured step of ``benchmarks.prune`` in a process of its own.

family NAME ONNXSIM SAMPLES PROFILE
prune TASK OUTPUT SAMPLES PROFILE OPTIONS DB
match TASK SAMPLES PROFILE OPTIONS MILLISECONDS
couple WIDTH DEPTH
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks.prune_families import examine
from benchmarks.tasks import TASKS, Feed
from benchmarks.worker import run_step
from onnxcompress import Budget, Result, optimize, registry
from onnxcompress import model as models
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.coupling import Coupling
from onnxcompress.models_zoo.families import family_feeds
from onnxcompress.models_zoo.families_transformers import gpt_gqa
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.profile import load_profile
from onnxcompress.view import GraphView

NO_FLOOR = -1000.0
_STEPS = 32
"""Ratios tried are multiples of one over this."""


def family(name: str, onnxsim: str, samples: str, profile: str) -> dict[str, Any]:
    """Half of every free group of one model removed."""
    return examine(name, onnxsim, int(samples), profile)


def prune(task: str, output: str, samples: str, profile: str, options: str, decibels: str) -> dict[str, Any]:
    """One pruned model; ``options`` are those of the pass, as on the command line."""
    result = _pruned(task, int(samples), profile, options, float(decibels), Path(output))
    return summary(result, task, profile, PruneChannels.name)


def summary(result: Result, task: str, profile: str, pass_name: str) -> dict[str, Any]:
    """What the table of a curve says of a result."""
    feed, sqnr = next(iter(TASKS[task].feeds(1))), result.report.totals.comparison.min_sqnr_db
    return {
        "predicted_ms": _predicted(result.model, feed, profile),
        "fp32_predicted_ms": _predicted(models.load(TASKS[task].path), feed, profile),
        "sqnr_db": sqnr if math.isfinite(sqnr) else None,
        "sites": sum(s.decision != "keep" and s.pass_name == pass_name for s in result.report.sites),
        "outcome": result.report.outcome,
    }


def match(task: str, samples: str, profile: str, options: str, milliseconds: str) -> dict[str, Any]:
    """For every latency asked for, the uniform ratio whose predicted latency is nearest to it."""
    wanted = json.loads(milliseconds)
    feed = next(iter(TASKS[task].feeds(1)))

    @cache
    def latency(step: int) -> float:
        """Falls as the step grows."""
        made = _pruned(task, int(samples), profile, f"{options},ratio={step / _STEPS}", NO_FLOOR, None)
        return _predicted(made.model, feed, profile)

    ratios = []
    for target in wanted:
        after = bisect_left(range(_STEPS - 1), -target, key=lambda step: -latency(step))
        step = min((s for s in (after - 1, after) if 0 <= s < _STEPS), key=lambda s: abs(latency(s) - target))
        ratios.append(step / _STEPS)
    return {"ratios": ratios}


def couple(width: str, depth: str) -> dict[str, Any]:
    """Seconds of the coupling analysis of a large graph, with the shapes of a run and without."""
    model = ir.from_proto(gpt_gqa(int(width), depth=int(depth)))
    models.canonicalize(model)
    (feed,) = islice(family_feeds("gpt_gqa", 1), 1)
    shapes = value_shapes(model, dict(feed), bodies=True)
    seconds, cpu = {}, {}
    for name, known in (("measured shapes", shapes), ("no shapes", None)):
        view = GraphView(model)
        start, used = time.perf_counter(), time.process_time()
        coupling = Coupling(view, known)
        seconds[name] = round(time.perf_counter() - start, 2)
        cpu[name] = round(time.process_time() - used, 2)
    free = sum(not g.pinned for g in coupling.groups)
    nodes = len(view.nodes())
    return {"nodes": nodes, "groups": len(coupling.groups), "free": free, "seconds": seconds, "cpu_seconds": cpu}


def _pruned(task: str, samples: int, profile: str, options: str, decibels: float, output: Path | None) -> Result:
    return rewritten(task, samples, profile, f"{PruneChannels.name}{{{options}}}", decibels, output)


def rewritten(task: str, samples: int, profile: str, text: str, decibels: float, output: Path | None) -> Result:
    """What one pass makes of a task's model.

    Args:
        task: its name.
        samples: of calibration.
        profile: hardware profile.
        text: the pass with its options, as on the command line.
        decibels: floor of the worst output.
        output: the file to write.
    """
    chosen = TASKS[task]
    return optimize(
        chosen.path,
        passes=[registry.parse(text)],
        budget=Budget(min_sqnr_db=decibels),
        calibration=chosen.feeds(samples),
        profile=profile,
        timing=False,  # what is slower has to show, not to be replaced by the input
        output=output,
    )


def _predicted(model: ir.Model, feed: Feed, profile: str) -> float:
    """Milliseconds on the profile, of the feed that latency is measured with."""
    shapes = value_shapes(model, dict(feed), bodies=True)
    return 1e3 * CostModel(load_profile(profile)).model(GraphView(model), shapes).seconds


STEPS: dict[str, Callable[..., dict[str, Any]]] = {"family": family, "prune": prune, "match": match, "couple": couple}


if __name__ == "__main__":
    raise SystemExit(run_step(STEPS))
