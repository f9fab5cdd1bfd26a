"""Two models on an emulated core: what the Arm build answers, and how much it executes for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.data import open_data
from onnxcompress.emulation import Emulator, Executed, Job
from onnxcompress.errors import EmulatorError
from onnxcompress.evaluate import compare_outputs, observed
from onnxcompress.instructions import seconds, total
from onnxcompress.profile import Profile, load_profile
from onnxcompress.report import Comparison
from onnxcompress.session import Runner, exposed, main_values
from onnxcompress.view import GraphView

__all__ = ["EmulatedRun", "EmulatedVerification", "verify"]

SAMPLES = 4
"""Feeds run by default; an emulated core is some fifty times slower than a real one."""


@dataclass(frozen=True)
class EmulatedRun:
    """One model on the emulated core.

    Attributes:
        host: the same model on this machine, against which its outputs are compared.
        counts: instructions and bytes of one run by class.
        instructions: all of them.
        seconds: of one run, by the profile's prices of classes; None if it has none.
    """

    host: Comparison
    counts: Mapping[str, float]
    instructions: float
    seconds: float | None


@dataclass(frozen=True)
class EmulatedVerification:
    """A model and what became of it, on the emulated core.

    Attributes:
        profile: whose core.
        onnxruntime: version of the emulated runtime.
        comparison: the result against the original, both on the core.
        before: the original.
        after: the result.
    """

    profile: str
    onnxruntime: str
    comparison: Comparison
    before: EmulatedRun
    after: EmulatedRun


def verify(
    original: str | os.PathLike[str],
    optimized: str | os.PathLike[str],
    profile: str | os.PathLike[str] | Profile,
    calibration: object = None,
    *,
    preprocess: str | None = None,
    samples: int = SAMPLES,
    emulator: Emulator | None = None,
) -> EmulatedVerification:
    """Runs two models with the Arm build of onnxruntime and counts what they execute.

    Outputs are compared where :func:`~onnxcompress.evaluate.observed` says; instructions are those of the
    files as they are.

    Args:
        original: the file before.
        optimized: the file after.
        profile: the device; it has an ``[emulation]`` table.
        calibration: feeds, as everywhere; made up if None.
        preprocess: how images become feeds.
        samples: feeds to run.
        emulator: by default the one that is set up.

    Raises:
        EmulatorError: there is no emulator, or a model does not run on the core.
        ProfileError: the profile does not say how to emulate its core.
    """
    device = profile if isinstance(profile, Profile) else load_profile(os.fspath(profile))
    emulator = emulator or Emulator()
    paths = (Path(original), Path(optimized))
    loaded = (models.load(paths[0]), models.load(paths[1]))
    feeds = list(open_data(calibration, loaded[0], preprocess=preprocess).take(samples))
    names = _common(loaded)
    with tempfile.TemporaryDirectory(prefix="onnxcompress-emulated-") as folder:
        shown = tuple(_showing(m, names, Path(folder, f"{i}.onnx")) for i, m in enumerate(loaded))
        jobs = [Job(path, feeds, outputs=names) for path in shown]
        jobs += [Job(path, feeds[:1], runs=1, keep=False) for path in paths]
        done = emulator.run(device, jobs)
        for path, one in zip((*paths, *paths), done, strict=True):
            if one.error:
                raise EmulatorError(f"{path} does not run on the emulated {device.device.cpu}: {one.error}")
        names = tuple(n for n in names if all(n in one.outputs[0] for one in done[:2]))  # tensors only
        runs = [
            _run(device, names, Runner(path, outputs=names), feeds, answer, counted)
            for path, answer, counted in zip(shown, done[:2], done[2:], strict=True)
        ]
    comparison = compare_outputs(names, zip(done[0].outputs, done[1].outputs, strict=True))
    return EmulatedVerification(device.name, done[0].onnxruntime, comparison, *runs)


def _common(loaded: Sequence[ir.Model]) -> tuple[str, ...]:
    """Values to compare: the original's last smooth ones, or the outputs both have."""
    ends = [[str(v.name) for v in m.graph.outputs] for m in loaded]
    wanted = tuple(observed(GraphView(loaded[0])))
    if all(n in e or n in main_values(m) for n in wanted for m, e in zip(loaded, ends, strict=True)):
        return wanted
    return tuple(n for n in ends[0] if n in ends[1])


def _showing(model: ir.Model, names: Sequence[str], path: Path) -> Path:
    models.save(exposed(model, names), path)
    return path


def _run(
    device: Profile, names: Sequence[str], here: Runner, feeds: Sequence[Any], answer: Executed, counted: Executed
) -> EmulatedRun:
    host = compare_outputs(names, ((here.run(f, names), o) for f, o in zip(feeds, answer.outputs, strict=True)))
    estimate = None if device.instructions is None else seconds(device, counted.counts)
    return EmulatedRun(host, counted.counts, total(counted.counts), estimate)
