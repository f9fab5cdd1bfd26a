"""The way through the house: load, normalise, plan, calibrate, build, verify, save, report."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.base import Pass
from onnxcompress.data import open_data
from onnxcompress.errors import UsageError
from onnxcompress.job import DEFAULT_MIN_SQNR_DB, IN_MEMORY, Job, Metric, Progress
from onnxcompress.objective import DEFAULT, Objective
from onnxcompress.profile import Profile, load_profile
from onnxcompress.report import Budget, Report

__all__ = ["DEFAULT_MIN_SQNR_DB", "Metric", "Progress", "Result", "optimize"]


@dataclass(frozen=True)
class Result:
    """What :func:`optimize` returns.

    Attributes:
        model: the optimized model.
        report: what was done and why.
        files: what was written, if an output was asked for.
    """

    model: ir.Model
    report: Report
    files: tuple[Path, ...] = ()


def optimize(
    model: ir.Model | str | os.PathLike[str],
    *,
    profile: str | os.PathLike[str] | Profile = "host-x86-vnni",
    calibration: object = None,
    preprocess: str | None = None,
    budget: Budget | None = None,
    metric: Metric | None = None,
    passes: Sequence[Pass] | None = None,
    output: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    timing: bool = True,
    progress: Progress | None = None,
    target: str | Objective = DEFAULT,
) -> Result:
    """Makes a model smaller and faster on a device, inside an accuracy budget.

    Args:
        model: a file, or an ``ir.Model`` (not changed).
        profile: name or path of a hardware profile, or one that is loaded.
        calibration: feeds: a .npz file, a folder of arrays or images, ``module:function``, or any
            iterable of dicts from input name to array. Without it inputs are made up, loudly, and
            only rewrites that need no ranges are made.
        preprocess: how image files become inputs.
        budget: the accuracy that may be given up; by default every output keeps 20 dB of SQNR.
        metric: scores an ONNX file given its path, higher is better; needed for ``max_drop``.
        passes: exactly these, with their options, at every site they can change, still verified;
            by default all installed ones, each where it pays.
        output: where to write the result.
        samples: use at most this many feeds.
        seed: of everything random.
        timing: measure latency where the profile is of this machine.
        progress: called as the work goes on.
        target: what is to become less: "latency", "size", "download", "memory", "energy", or weights of them such as
            "latency=1,size=1", each relative to what the model takes.

    Raises:
        OnnxCompressError: the branch of the tree in ``errors.py`` says what is wrong.
    """
    budget = budget or Budget()
    _check_call(model, budget, metric, passes)
    objective = _objective(target)
    loaded = profile if isinstance(profile, Profile) else load_profile(os.fspath(profile))
    if objective.energy and loaded.energy is None:
        message = f"the target counts energy, and profile {loaded.name!r} has no prices for it"
        raise UsageError(message, hint="aim at something else, or add an [energy] table to a profile of your own")
    original = _canonical_copy(model) if isinstance(model, ir.Model) else models.load(model)
    report_progress = progress or (lambda stage, done, total: None)
    report_progress("checking the model", 0, None)
    source = open_data(calibration, original, preprocess=preprocess, limit=samples, seed=seed)
    with _calm_collector():
        job = Job(original, loaded, source, budget, metric, timing, report_progress, objective)
        job.run(passes)
        files: tuple[Path, ...] = ()
        if output is None:
            job.final(job.result)
        else:
            files = models.save(job.result, output, protect=models.source_files(original), check=job.final)
        return Result(job.result, job.report(_name_of(model), seed, files), files)


@contextlib.contextmanager
def _calm_collector() -> Iterator[None]:
    """Lets Python look for reference cycles less often.

    A graph of 5,000 nodes is some 100,000 objects; cloning it a few times makes the collector walk
    them over and over: a third of the time on an SSD detector.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _check_call(model: object, budget: Budget, metric: Metric | None, passes: Sequence[Pass] | None) -> None:
    if not isinstance(model, (str, os.PathLike, ir.Model)):
        hint = "onnx_ir.from_proto() makes an ir.Model of a ModelProto; for a gs.Graph see onnxcompress.interop"
        raise UsageError(f"the model is a {type(model).__name__}, not a path or an onnx_ir.Model", hint=hint)
    if budget.max_drop is not None and metric is None:
        raise UsageError("a largest drop needs a metric", hint="pass metric=, or use min_sqnr_db")
    if budget.max_drop is not None and not 0 <= budget.max_drop <= 1:
        raise UsageError(f"max_drop is {budget.max_drop}", hint="it is a share of the metric, 0 to 1")
    if budget.min_sqnr_db is not None and math.isnan(budget.min_sqnr_db):
        raise UsageError("min_sqnr_db is not a number", hint="give decibels")
    for pass_ in passes or ():
        if not isinstance(pass_, Pass):
            hint = "onnxcompress.registry.parse('quantize{ranges=minmax}') makes one"
            raise UsageError(f"passes holds {pass_!r}, which is no pass", hint=hint)


def _objective(target: object) -> Objective:
    if isinstance(target, (str, Objective)):
        return target if isinstance(target, Objective) else Objective.parse(target)
    raise UsageError(f"target is {target!r}", hint="give a name, weights such as 'latency=1,size=1', or an Objective")


def _canonical_copy(model: ir.Model) -> ir.Model:
    copy = models.clone(model)
    models.canonicalize(copy)
    return copy


def _name_of(model: object) -> str:
    return str(model) if isinstance(model, (str, os.PathLike)) else IN_MEMORY
