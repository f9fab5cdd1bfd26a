"""The linear forms of kernel prices, and how they are fitted to links.

    t = ns_fixed + ns_per_mac * macs + ns_per_element * elements + ns_per_weight * weights + ns_per_patch * patches

by non-negative least squares on the relative error, kernel by kernel; ``macs`` with channels rounded up to
``channel_block``, the whole times ``misaligned_factor`` where channels are no multiple of ``aligned_to``. Counted
instructions have no noise and see no memory, so nothing more is needed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.optimize


@dataclasses.dataclass(frozen=True)
class Row:
    """A link: its work, as :class:`onnxcompress.fitting.links.Link` has it, and its seconds."""

    kind: str
    precision: str
    label: str
    nodes: int
    macs: int
    in_channels: int
    out_channels: int
    elements: int
    weights: int
    patches: int
    on: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """A kernel's coefficients (ns) and how well they fit."""

    kind: str
    precision: str
    on: str
    fixed: float
    per_mac: float
    per_element: float
    per_weight: float
    per_patch: float
    channel_block: int
    aligned_to: int
    misaligned_factor: float
    points: int
    mean_error: float
    worst_error: float


CONVOLUTIONS = ("conv", "conv_pointwise", "conv_depthwise", "conv_grouped")
UNITS = np.array([1e-6, 1e-11, 1e-9, 1e-9, 1e-9])


def padded_macs(r: Row, block: int) -> float:
    """MACs with channels rounded up to ``block`` (per group); a single channel is never padded."""
    padded = 1.0
    for channels in (r.in_channels, r.out_channels):
        if channels > 1:
            padded *= -(-channels // block) * block / channels
    return r.macs * padded


def aligned(r: Row, to: int) -> bool:
    return all(c % to == 0 for c in (r.in_channels, r.out_channels) if c > 1)


def fit(rows: Sequence[Row], per_node: float) -> Fit:
    """Non-negative least squares on relative error.

    Channel block, alignment and the factor that misaligned channels cost are searched on a small grid; more
    structure is believed only where it takes a tenth off the mean error, and tried only with enough points.
    """
    first = rows[0]
    measured = np.array([r.seconds for r in rows])
    own = np.array([max(r.seconds - per_node * r.nodes, 0.05 * r.seconds) for r in rows])
    grid: list[tuple[int, int, float]] = [(1, 1, 1.0)]
    blocks = (1, 4, 8, 16) if first.kind in CONVOLUTIONS else (1,)
    grid += [(block, 1, 1.0) for block in blocks[1:]]
    if (len(rows) >= 7 and first.kind in CONVOLUTIONS) or first.kind.endswith("Pool"):
        factors = (1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0, 20.0, 80.0)
        grid += [(block, to, factor) for block in blocks for to in (4, 8, 16) for factor in factors]
    best: Fit | None = None
    for block, to, factor in grid:
        design = np.array([[r.nodes, padded_macs(r, block), r.elements, r.weights, r.patches] for r in rows], float)
        slower = np.array([1.0 if aligned(r, to) else factor for r in rows])
        scaled = design * UNITS * slower[:, None]
        solution, _ = scipy.optimize.nnls(scaled / measured[:, None], own / measured)
        error = np.abs((scaled @ solution + per_node * design[:, 0]) / measured - 1)
        if best is None or error.mean() < 0.9 * best.mean_error:
            fixed, per_mac, per_element, per_weight, per_patch = (float(c) for c in solution * UNITS * 1e9)
            best = Fit(
                kind=first.kind,
                precision=first.precision,
                on=first.on,
                fixed=fixed,
                per_mac=per_mac,
                per_element=per_element,
                per_weight=per_weight,
                per_patch=per_patch,
                channel_block=block,
                aligned_to=to,
                misaligned_factor=factor,
                points=len(rows),
                mean_error=float(error.mean()),
                worst_error=float(error.max()),
            )
    if best is None:
        raise ValueError("nothing to try")
    return best


def fits(rows: Sequence[Row], per_node: float) -> list[Fit]:
    """All kernels."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        groups.setdefault((r.kind, r.precision, r.on), []).append(r)
    return [fit(group, per_node) for group in groups.values()]


STANDS_FOR = {
    ("move", "u8s8"): ("Concat", "Slice", "Split", "Expand", "Tile", "DepthToSpace"),
    ("softmax", "u8s8"): ("Softmax",),
    ("gather", "u8s8"): ("Gather",),
    ("MaxPool", "f32"): ("MaxPool", "pool"),
}
"""Which kernels of a profile a measured link prices, if not the one it is named after.

Families are priced in float only, as a family has members that onnxruntime keeps float (Pad, LogSoftmax).
"""


def toml(found: Sequence[Fit]) -> str:
    """The ``[[kernel]]`` tables of a profile."""
    lines: list[str] = []
    for precision in ("f32", "u8s8", "f16"):
        if any(f.precision == precision for f in found):
            lines += ["[[kernel]]", 'kind = "free"', f'precision = "{precision}"', ""]
    named = [(kind, f) for f in found for kind in STANDS_FOR.get((f.kind, f.precision), (f.kind,))]
    for kind, f in named:
        lines += ["[[kernel]]", f'kind = "{kind}"', f'precision = "{f.precision}"']
        lines += [f'on = "{f.on}"'] if f.on != "any" else []
        for name in ("per_mac", "per_element", "per_weight", "per_patch", "fixed"):
            value = float(f"{getattr(f, name):.3g}")
            if value > 0:
                lines.append(f"ns_{name} = {value:.10f}".rstrip("0").rstrip("."))
        if f.channel_block > 1:
            lines.append(f"channel_block = {f.channel_block}")
        if f.aligned_to > 1:
            lines += [f"aligned_to = {f.aligned_to}", f"misaligned_factor = {f.misaligned_factor}"]
        lines += [f"fit_error = {f.mean_error:.2f}", ""]
    return "\n".join(lines)
