"""What a run did and why, as frozen records. Only the command line formats them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Added",
    "Attempt",
    "Budget",
    "Comparison",
    "Latency",
    "Load",
    "OnDevice",
    "OutputDifference",
    "PassReport",
    "Report",
    "SiteReport",
    "Stranded",
    "Totals",
]

SCHEMA = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class Budget:
    """How much accuracy may be given up.

    Attributes:
        min_sqnr_db: every output keeps at least this signal-to-quantization-noise ratio, in dB.
        max_drop: the user's metric may fall by this much, relative to the metric of the input model
            (0.01 = one per cent); needs a metric.
    """

    min_sqnr_db: float | None = None
    max_drop: float | None = None


@dataclass(frozen=True)
class OutputDifference:
    """How far one observed value is from the original.

    Attributes:
        name: a graph output, or the last smooth value before a discrete one (NonMaxSuppression, ArgMax).
        sqnr_db: 10 log10(signal power / error power) over all samples; inf when equal; None for
            values that are not floating point.
        max_abs: largest absolute difference; for discrete values too.
        agreement: share of equal elements.
    """

    name: str
    sqnr_db: float | None
    max_abs: float
    agreement: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same feeds."""

    outputs: tuple[OutputDifference, ...]
    samples: int

    @property
    def min_sqnr_db(self) -> float:
        """The worst output; inf if all are equal or none is floating point."""
        return min((o.sqnr_db for o in self.outputs if o.sqnr_db is not None), default=math.inf)


@dataclass(frozen=True)
class Latency:
    """Interleaved timing of two models in one process.

    Attributes:
        before_ms: 10th percentile of the input model's runs.
        after_ms: 10th percentile of the result's runs.
        speed_up: median over rounds of the paired ratio before/after.
        rounds: how many.
        threads: intra-op threads.
    """

    before_ms: float
    after_ms: float
    speed_up: float
    rounds: int
    threads: int


@dataclass(frozen=True)
class Load:
    """Two models while they are loaded; pairs are before and after. Bytes are None where the system does not tell.

    Attributes:
        ms: median milliseconds to make a session.
        resident_bytes: more in memory after the load.
        peak_bytes: more in memory at most, during the load.
        rounds: how often each was timed.
    """

    ms: tuple[float, float]
    resident_bytes: tuple[int, int] | None
    peak_bytes: tuple[int, int] | None
    rounds: int


@dataclass(frozen=True)
class Added:
    """What one pass added to those before it.

    Attributes:
        predicted_ms: milliseconds its plan saves on the profile.
        weight_bytes: bytes of weights it took off.
        min_sqnr_db: worst output on held-out data once it was done, against the input model.
    """

    predicted_ms: float
    weight_bytes: int
    min_sqnr_db: float


@dataclass(frozen=True)
class PassReport:
    """One lossless or hand-chosen pass as a whole.

    Attributes:
        name: of the pass.
        options: its fields.
        changed: how many sites it changed.
        outcome: "applied", "nothing to do" or "dropped".
        reason: why it was dropped, or what it did.
        added: what it brought; None for lossless passes, and where nothing was changed.
    """

    name: str
    options: Mapping[str, Any]
    changed: int
    outcome: str
    reason: str
    added: Added | None = None


@dataclass(frozen=True)
class SiteReport:
    """One site: what was done, or why not.

    Attributes:
        pass_name: whose site.
        key: name of its node.
        op: operator type of that node.
        decision: name of the choice made; "keep" if none.
        reason: for "keep": what speaks against it; else what has to be known of how it was made, if anything.
        gain_ms: predicted milliseconds saved on the profile, conversions included where they are
            the site's own; negative where bytes were bought with time.
        bytes_saved: weight bytes off the file.
        distortion_db: noise the choice alone puts on the worst output, in dB relative to the signal
            (negative; -40 is a hundredth of the amplitude); None where it was not measured.
    """

    pass_name: str
    key: str
    op: str
    decision: str
    reason: str
    gain_ms: float = 0.0
    bytes_saved: int = 0
    distortion_db: float | None = None


@dataclass(frozen=True)
class Attempt:
    """One plan that was made, built and checked.

    Attributes:
        kind: what was tried.
        sites: how many sites it changed.
        predicted_ms: cost of the result on the profile.
        min_sqnr_db: worst output on held-out data, or None if it did not get that far.
        metric: the user's metric, where there is one.
        speed_up: measured on this machine, where it is the profile's device.
        verdict: "accepted", or why not.
        predicted_bytes: weights of the result, in the file, compressed or in memory, whichever the target weighs most;
            None where it aims at no bytes.
    """

    kind: str
    sites: int
    predicted_ms: float
    min_sqnr_db: float | None
    metric: float | None
    speed_up: float | None
    verdict: str
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class Totals:
    """Before and after.

    Attributes:
        file_bytes: size of the ONNX file with its external data.
        zstd_bytes: the same compressed with zstd level 3: what goes over the wire.
        predicted_ms: on the profile; the first figure is of the normalised model, whose nodes are
            what the plan is about. None of a model the device cannot run, for it runs integers only.
        latency: measured here; None where the profile is of another device or timing was off.
        comparison: against the input model on data not used for calibration.
        metric_before: the user's metric, where there is one.
        metric_after: the same for the result.
        memory_bytes: predicted, as ``predicted_ms``: weights in memory while the model runs, those unpacked at load as
            they then are, and the most bytes of activations alive at once.
        energy_mj: predicted millijoules of a run; None if the profile does not know.
        load: what loading takes, measured here; None where nothing is unpacked at load, and as for ``latency``.
    """

    file_bytes: tuple[int, int]
    zstd_bytes: tuple[int, int]
    predicted_ms: tuple[float | None, float | None]
    latency: Latency | None
    comparison: Comparison
    metric_before: float | None = None
    metric_after: float | None = None
    memory_bytes: tuple[int, int] | None = None
    energy_mj: tuple[float, float] | None = None
    load: Load | None = None


@dataclass(frozen=True)
class Stranded:
    """A node of the file that the device cannot run, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class OnDevice:
    """What becomes of the file on the device; predictions from its profile.

    Attributes:
        runs: the device runs all of it. On one that runs integers only: it is fully integer.
        cannot_run: what it does not run.
        nodes: how many kernels the file comes to, conversions to and from integers left out.
        predicted_ms: time of those it runs.
        file_bytes: size of the file.
        flash_bytes: room for it; None if the profile sets no limit.
        peak_activation_bytes: most bytes of activations alive at once, inputs and outputs as the file has them.
        ram_bytes: room for them; None if the profile sets no limit.
    """

    runs: bool
    cannot_run: tuple[Stranded, ...]
    nodes: int
    predicted_ms: float
    file_bytes: int
    flash_bytes: int | None
    peak_activation_bytes: int
    ram_bytes: int | None


@dataclass(frozen=True)
class Report:
    """Everything about one run of the optimizer; ``on_device`` is there if the profile sets limits.

    ``target`` is what it aimed at: weights of latency, size, download, memory and energy, each relative to the input.
    """

    input: str
    profile: str
    calibration: str
    budget: Budget
    seed: int
    outcome: str
    totals: Totals
    passes: tuple[PassReport, ...]
    sites: tuple[SiteReport, ...]
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    on_device: OnDevice | None = None
    target: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Strict JSON; infinities become the strings "inf" and "-inf"."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=2, sort_keys=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
