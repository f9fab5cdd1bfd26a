"""From measurements to a profile in a file, with all that says how far to trust it."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxcompress.errors import MeasurementError
from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.nets import CHECKED
from onnxcompress.fitting.own import scatter, spread, write_new
from onnxcompress.fitting.regression import fit
from onnxcompress.fitting.samples import Measurements
from onnxcompress.profile_files import write

__all__ = ["KernelError", "Made", "NetError", "enough", "make"]

FEWEST = 8
"""Chains of a kind that every profile needs, or half of those there are; each has up to six coefficients."""

NEEDED = ("conv", "elementwise", "free", "matmul", "move")
"""Kinds whose price in float stands in for others, so that every model has some price."""

FEWEST_NETS = 3
"""Networks held out, in whatever form, without which there is no error to state."""


@dataclass(frozen=True)
class KernelError:
    """How well a kernel fits the points it was fitted to.

    Attributes:
        kind: of work, or operator type.
        precision: of the kernel.
        on: ``any``, or what it is for.
        points: measurements it makes most of.
        error: mean relative error on these; None without points of its own.
    """

    kind: str
    precision: str
    on: str
    points: int
    error: float | None


@dataclass(frozen=True)
class NetError:
    """A network the profile was not fitted to; ``error`` is relative, above zero if predicted too slow."""

    name: str
    measured_ms: float
    predicted_ms: float
    error: float


@dataclass(frozen=True)
class Made:
    """A profile that was fitted and written.

    Attributes:
        name: of the profile.
        path: of its file.
        use: what to give to ``--profile``.
        cpu: the machine.
        onnxruntime: its version there.
        links: chains measured.
        nets: networks measured.
        spread: median over the chains of (90th - 10th percentile) / median of their rounds.
        median_error: of ``held_out``, relative.
        mean_error: of ``held_out``, relative.
        kernels: fit errors.
        held_out: networks it was checked on.
        left_out: chains that were not measured, and why.
        notes: what the profile says about doubts.
    """

    name: str
    path: Path
    use: str
    cpu: str
    onnxruntime: str
    links: int
    nets: int
    spread: float
    median_error: float
    mean_error: float
    kernels: tuple[KernelError, ...]
    held_out: tuple[NetError, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


def enough(measurements: Measurements) -> list[str]:
    """Judges whether there is enough to fit.

    Returns:
        What to note in the profile: kinds of which less than half was measured.

    Raises:
        MeasurementError: kinds that every profile needs are missing, or nothing is there to check it on.
    """
    kinds = {link.name: (link.kind, link.precision) for link in links()}
    wanted = collections.Counter(kinds.values())
    found = collections.Counter(kinds[link.name] for link in measurements.links if link.name in kinds)
    missing = []
    for kind in NEEDED:
        fewest = min(FEWEST, (wanted[kind, "f32"] + 1) // 2)
        if found[kind, "f32"] < fewest:
            missing.append(f"{kind} f32 ({found[kind, 'f32']} of at least {fewest} chains)")
    held_out = {net.name for net in CHECKED}
    nets = sum(net.name.rpartition(" ")[0] in held_out for net in measurements.nets)
    if nets < FEWEST_NETS:
        missing.append(f"networks to check it on ({nets} of at least {FEWEST_NETS})")
    if missing:
        reasons = collections.Counter(measurements.left_out.values()).most_common(1)
        why = f" Most often left out because: {reasons[0][0]}." if reasons else ""
        raise MeasurementError(
            f"too few measurements to fit a profile; missing: {', '.join(missing)}",
            hint=f"let the measuring run to its end.{why}",
        )
    few = [
        f"{kind} {precision} ({found[kind, precision]} of {count})"
        for (kind, precision), count in sorted(wanted.items())
        if 0 < found[kind, precision] < count / 2
    ]
    return [f"few measurements of {', '.join(few)}"] if few else []


def make(
    measurements: Measurements,
    name: str,
    path: Path,
    *,
    notes: Sequence[str] = (),
    force: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Made:
    """Fits a profile to measurements and writes it.

    Args:
        measurements: of a machine.
        name: of the profile.
        path: of its file.
        notes: doubts the profile has to name.
        force: take measurements that scatter.
        overwrite: ``path`` may replace a file.
        progress: called with what is worked on, how much is done and how much there is.

    Raises:
        MeasurementError: the measurements scatter too much, or are too few.
        OutputError: the file cannot be written.
    """
    doubts = [*notes, *scatter(measurements, force=force), *enough(measurements)]
    about = measurements.machine
    cpu = str(about.get("cpu") or "unknown processor")
    if not about.get("frequency_ghz") and not about.get("current_ghz"):
        doubts.append("the clock could not be told; device.frequency_ghz is made up")
    fitted = fit(
        measurements,
        name=name,
        description=f"{cpu}, onnxruntime {measurements.onnxruntime} on one thread",
        notes=doubts,
        host="kit" not in about and bool(about.get("isa")),  # nothing else says that this is the machine
        progress=progress,
    )
    write_new(path, lambda staged: write(fitted.profile, staged), overwrite=overwrite)
    kernels = [KernelError(*key, fitted.points[key], fitted.errors[key] if fitted.points[key] else None)
               for key in sorted(fitted.points)]  # fmt: skip
    return Made(
        name=name,
        path=path,
        use=str(path) if os.sep in str(path) else f".{os.sep}{path}",
        cpu=cpu,
        onnxruntime=measurements.onnxruntime,
        links=len(measurements.links),
        nets=len(measurements.nets),
        spread=spread(measurements),
        median_error=fitted.median_error,
        mean_error=fitted.mean_error,
        kernels=tuple(kernels),
        held_out=tuple(NetError(c.name, 1e3 * c.seconds, 1e3 * c.predicted, c.error) for c in fitted.checked),
        left_out=dict(measurements.left_out),
        notes=tuple(doubts),
    )
