"""What explain finds, as frozen records. Only the command line formats them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Explanation", "Family", "ModelExplanation", "Option", "RegionReport", "Verdict"]

Verdict = Literal["gains", "same", "loses", "impossible"]


@dataclass(frozen=True)
class Option:
    """A way to do a layer otherwise.

    Attributes:
        kind: int8, dynamic, f16, w8, w4, channels or rank.
        detail: which: "alone", "region of 12 layers", "48 of 64".
        seconds: of the layer then; None if it is impossible.
        ratio: seconds now over then, so above 1 is faster; None if it is impossible.
        verdict: "gains" from 1.05 on, "loses" up to 0.95, "same" between, or "impossible".
        why: in words.
        keeps: share of the channels or of the rank that is left.
    """

    kind: str
    detail: str
    seconds: float | None
    ratio: float | None
    verdict: Verdict
    why: str
    keeps: float = 1.0


@dataclass(frozen=True)
class Explanation:
    """What would make one layer faster.

    Attributes:
        name: of the node that gives the layer its name.
        op: its operator type.
        kind: its kernel kind.
        nodes: names of the other nodes that run with it.
        precision: how it runs now.
        seconds: all of it.
        share: of the model's seconds.
        spent: what its time goes to, shares of it, most first.
        note: what decides its time, if one thing does.
        region: number of the int8 region it is in; None if it has no int8 kernel.
        options: what was looked at.
        helps: the option that saves most, in words; "" if none gains. Less than half of the channels
            or of the rank does not count.
    """

    name: str
    op: str
    kind: str
    nodes: tuple[str, ...]
    precision: str
    seconds: float
    share: float
    spent: Mapping[str, float]
    note: str
    region: int | None
    options: tuple[Option, ...]
    helps: str


@dataclass(frozen=True)
class RegionReport:
    """Layers that could be int8 without conversions between them.

    Attributes:
        layers: their names.
        seconds: as they are.
        seconds_all: all of them int8, conversions at the border included.
        best: names of those that are int8 in the cheapest mix found.
        seconds_best: of that mix, conversions included.
    """

    layers: tuple[str, ...]
    seconds: float
    seconds_all: float
    best: tuple[str, ...]
    seconds_best: float


@dataclass(frozen=True)
class Family:
    """How much of the model a kind of change could touch.

    Attributes:
        kind: as in :class:`Option`.
        touches: share of the time in layers where it is possible.
        gains: share of the time in layers where it gains.
        speed_up: of the model, were it made wherever it gains: int8 and f16 in the cheapest mix, half the
            channels, half the rank.
        why: what is missing where it is possible nowhere.
    """

    kind: str
    touches: float
    gains: float
    speed_up: float
    why: str


@dataclass(frozen=True)
class ModelExplanation:
    """What would make a model faster on a device.

    Attributes:
        profile: name of the device.
        nodes: in the file, and after tidying.
        seconds: predicted, after tidying.
        spent: what the time goes to, shares, most first; what is missing to 1 is the overhead of a run.
        matters: names of the five dearest layers.
        families: by kind of change.
        regions: of int8, in execution order.
        layers: every layer that takes time, in execution order.
        unknown: names of nodes whose cost is not, or not fully, known.
    """

    profile: str
    nodes: tuple[int, int]
    seconds: float
    spent: Mapping[str, float]
    matters: tuple[str, ...]
    families: tuple[Family, ...]
    regions: tuple[RegionReport, ...]
    layers: tuple[Explanation, ...]
    unknown: tuple[str, ...]
