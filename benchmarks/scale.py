"""Seconds and memory of one pass rewriting all it can of a model, beyond the model itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks.factorize_layers import normalised
from benchmarks.measure import status_bytes
from benchmarks.tasks import TASKS, BenchmarkError
from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.base import Choice
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.profile import load_profile
from onnxcompress.questions import offers
from onnxcompress.statistics import Evidence
from onnxcompress.trial import build
from onnxcompress.view import GraphView

_PROFILE = "host-x86-vnni"


def applied(
    task: str, output: Path, samples: int, text: str, touched: Callable[[Choice], int] | None = None
) -> dict[str, Any]:
    """A pass made at every site it finds, and the model written; nothing is compared or priced.

    Args:
        task: its name.
        output: the file to write.
        samples: of calibration; 0 for none, where the pass needs none.
        text: the pass with its options, as on the command line; its options have to say how far to go.
        touched: bytes of weights that a choice rewrites, for the largest of them.

    Returns:
        Seconds and megabytes of each step. Memory is the largest resident set in the step less what the process
        held before any of them, with all weights of the model read once.
    """
    written = output.with_name("normalised.onnx")
    apart = get_context("spawn").Process(target=_normalise, args=(task, written))
    apart.start()  # what it leaves free in the heap would be used again and not be seen here
    apart.join()
    if apart.exitcode:
        raise BenchmarkError(f"normalising {task} failed")
    model = models.load(written)
    layers = {str(v.name): v.const_value.nbytes for v in GraphView(model).weights() if v.const_value is not None}
    pass_ = registry.parse(text)
    target = load_profile(_PROFILE).target()
    _read_all(model)
    base = status_bytes("VmRSS")
    result: dict[str, Any] = {
        "model_megabytes": models.weight_bytes(model) / 1e6,
        "largest_megabytes": max(layers.values()) / 1e6,
        "seconds": {},
        "cpu_seconds": {},
        "megabytes": {},
    }
    view, evidence = GraphView(model), Evidence()
    with _step("choose", result, base):
        offer = offers(pass_, view, target, synthetic=False)
    choices = [found[-1] for found in offer.choices.values()]
    result["sites"], result["skipped"] = len(choices), len(offer.skipped)
    if touched:
        result["largest_touched_megabytes"] = max(map(touched, choices), default=0) / 1e6
    if samples:
        needs = sorted({need for choice in choices for need in pass_.needs(choice, view)})
        with _step("calibrate", result, base):
            evidence = calibrate(model, needs, open_data(TASKS[task].feeds(samples), model), shapes=False)
    with _step("rewrite", result, base):
        built = build(model, pass_, choices, evidence)
    result["made"] = len(built.made)
    result["refused"] = [f"{s.key}: {s.reason}" for s in built.refused]
    result["made_megabytes"] = _new_bytes(built.model, model) / 1e6
    with _step("write", result, base):
        models.save(built.model, output)
    return result


def _normalise(task: str, path: Path) -> None:
    models.save(normalised(task), path)


def _read_all(model: ir.Model) -> None:
    """Brings all weights into memory, so that reading them later counts for nothing."""
    for value in GraphView(model).weights():
        if value.const_value is not None:
            value.const_value.numpy().sum()


def _new_bytes(model: ir.Model, before: ir.Model) -> int:
    """Weights of a model that another does not have."""
    old = {id(v.const_value) for v in GraphView(before).weights()}
    found = [v.const_value for v in GraphView(model).weights() if id(v.const_value) not in old]
    return sum(t.nbytes for t in found if t is not None)


@contextmanager
def _step(name: str, result: dict[str, Any], base: int) -> Iterator[None]:
    _forget_peak()
    start, used = time.perf_counter(), time.process_time()
    yield
    result["seconds"][name] = round(time.perf_counter() - start, 2)
    result["cpu_seconds"][name] = round(time.process_time() - used, 2)
    result["megabytes"][name] = round((status_bytes("VmHWM") - base) / 1e6, 1)


def _forget_peak() -> None:
    """The largest resident set starts anew from the present one (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
