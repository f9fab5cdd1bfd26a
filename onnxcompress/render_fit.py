"""How a fitted profile, and a kit, are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from onnxcompress.tables import columns, milliseconds, plural, section, size, used_columns

if TYPE_CHECKING:  # what is shown is not needed for showing it
    from onnxcompress.fitting.kit import Kit
    from onnxcompress.fitting.making import Made

__all__ = ["fitted", "kit"]


def fitted(made: Made, *, every_row: bool = False) -> RenderableType:
    """Errors by kernel and by network, how steady the machine was, and how to use the profile."""
    counts = f"{plural(made.links, 'chain')} and {plural(made.nets, 'network')}"
    nets = [
        (net.name, milliseconds(net.measured_ms), milliseconds(net.predicted_ms), f"{net.error:+.1%}")
        for net in sorted(made.held_out, key=lambda n: -abs(n.error))
    ]
    kernels = [
        (k.kind, k.precision, "" if k.on == "any" else k.on, str(k.points), "" if k.error is None else f"{k.error:.1%}")
        for k in made.kernels
    ]
    left_out = [(name, reason) for name, reason in made.left_out.items()]
    parts: list[RenderableType] = [
        Text(f"{made.name}: {made.cpu}, onnxruntime {made.onnxruntime}", style="bold"),
        Text(f"fitted to {counts}; rounds scatter by {made.spread:.1%}"),
        Text(
            f"held-out error {made.median_error:.1%} (median), {made.mean_error:.1%} (mean) of "
            f"{plural(len(made.held_out), 'network')} it was not fitted to"
        ),
        *(Text(note, style="yellow") for note in made.notes),
        section(
            "Kernels",
            used_columns(kernels, ("kind", "precision", "on", "points", "fit error"), right=(3, 4)),
        ),
        section("Networks held out", columns(nets, ("network", "measured", "predicted", "error"), right=(1, 2, 3))),
    ]
    if every_row and left_out:
        parts.append(section("Left out", columns(left_out, ("chain", "reason"))))
    elif left_out:
        parts += [Text(), Text(f"{plural(len(left_out), 'chain')} left out; -v says why", style="dim")]
    parts += [Text(), Text(f"written to {made.path}; use it with --profile {made.use}")]
    return Group(*parts)


def kit(made: Kit) -> RenderableType:
    """What was written, and what to do with it."""
    counts = f"{plural(made.chains, 'chain')}, {plural(made.nets, 'network')}, {size(made.file_bytes)}"
    return Group(
        Text(f"{made.folder}: {counts}", style="bold"),
        Text("copy it to the device and run there: python3 run.py   (needs numpy and onnxruntime only)"),
        Text("bring results.json back: onnxcompress profile fit --from-results results.json --name my-device"),
    )
