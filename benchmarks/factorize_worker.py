"""One measured step of ``benchmarks.factorize`` in a process of its own.

exact TASK SAMPLES HELD_OUT SHARE FORMS
make TASK OUTPUT SAMPLES PROFILE OPTIONS DB
sizes TASK FORMS
latency TASK PROFILE SHARE SECONDS FORMS
scale TASK SAMPLES OPTIONS
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks.factorize_layers import found_forms, latencies, losses, normalised
from benchmarks.prune_worker import rewritten, summary
from benchmarks.scale import applied
from benchmarks.worker import run_step
from onnxcompress import model as models
from onnxcompress.base import Choice
from onnxcompress.passes.factorize import Factorize
from onnxcompress.view import GraphView

_LARGE = 1024
"""Constants with fewer elements are shapes and the like."""


def exact(task: str, samples: str, held_out: str, share: str, forms: str) -> dict[str, Any]:
    """What every layer loses of its output at a share of its weights."""
    return losses(task, int(samples), int(held_out), float(share), _names(forms))


def make(task: str, output: str, samples: str, profile: str, options: str, decibels: str) -> dict[str, Any]:
    """One factored model; ``options`` are those of the pass, as on the command line."""
    text = f"{Factorize.name}{{{options}}}"
    result = rewritten(task, int(samples), profile, text, float(decibels), Path(output))
    chosen: dict[str, int] = {}
    for site in result.report.sites:
        if site.pass_name == Factorize.name and site.decision != "keep":
            form = site.decision.split()[0]
            chosen[form] = chosen.get(form, 0) + 1
    return {
        **summary(result, task, profile, Factorize.name),
        "forms": chosen,
        "parameters": _parameters(models.load(output)),
    }


def sizes(task: str, forms: str) -> dict[str, Any]:
    """Weights of a whole model, and of the layers that have one of these forms."""
    model = normalised(task)
    found = list(found_forms(GraphView(model), _names(forms)))
    layers = {f.nodes: f.old_weights for kinds in found for f in kinds}
    return {"parameters": _parameters(model), "factored": sum(layers.values()), "layers": len(layers)}


def latency(task: str, profile: str, share: str, seconds: str, forms: str) -> dict[str, Any]:
    """Every distinct layer before and after, timed and predicted."""
    return latencies(task, profile, float(share), float(seconds), _names(forms))


def scale(task: str, samples: str, options: str) -> dict[str, Any]:
    """All layers of a model factored and written, to the current folder."""

    def touched(choice: Choice) -> int:
        cut: Any = choice.detail
        return 4 * int(cut.form.old_weights)

    return applied(task, Path("factored.onnx"), int(samples), f"{Factorize.name}{{{options}}}", touched)


def _names(forms: str) -> tuple[str, ...]:
    return tuple(f for f in forms.split("+") if f)


def _parameters(model: ir.Model) -> int:
    """Elements of all float weights, each once."""
    return sum(
        v.const_value.size
        for v in GraphView(model).weights()
        if v.const_value is not None and v.const_value.dtype.is_floating_point() and v.const_value.size >= _LARGE
    )


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "exact": exact,
    "make": make,
    "sizes": sizes,
    "latency": latency,
    "scale": scale,
}


if __name__ == "__main__":
    raise SystemExit(run_step(STEPS))
