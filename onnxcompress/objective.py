"""What a run aims at: shares of what the model takes now, each with its weight.

    minimise    sum_k weight_k * takes_k / took_k      k: latency, size, download, memory, energy

so that ``latency=1,size=1`` says that half the time is worth as much as half the file. Each choice is priced in one
unit, the seconds of the model it is made on (:class:`Rates`), and whole results are compared by the sum itself.

A file that gets a little smaller at the same speed is always welcome (:data:`BYTES_WORTH`), but no reason to call one
plan better than another. Only where a target weighs files more than that do bytes count there, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

from onnxcompress.base import Choice
from onnxcompress.errors import UsageError, suggest

__all__ = ["BYTES_WORTH", "DEFAULT", "TARGETS", "Objective", "Rates", "Spent", "memory_saved"]

BYTES_WORTH = 0.5
"""All weight bytes together are worth this share of the model's time where latency is aimed at."""

_TIE = 0.01
"""Settles what the target leaves open: a hundredth of the model's time for all of its bytes."""


@dataclass(frozen=True)
class Spent:
    """What a model takes.

    Attributes:
        seconds: of a run on the profile.
        file_bytes: on disk.
        download_bytes: of the compressed file; None where nobody asked.
        memory_bytes: weights in memory while it runs, and the most bytes of activations alive at once; None likewise.
        joules: energy of a run; None if the profile does not know.
    """

    seconds: float
    file_bytes: int
    download_bytes: int | None
    memory_bytes: int | None
    joules: float | None


@dataclass(frozen=True)
class Objective:
    """Weights of what is to become less; each is multiplied with the share of what the model takes before.

    Attributes:
        latency: of the predicted time.
        size: of the file.
        download: of the compressed file.
        memory: of weights and activations in memory.
        energy: of the predicted energy, where the profile has prices for it.
    """

    latency: float = 0.0
    size: float = 0.0
    download: float = 0.0
    memory: float = 0.0
    energy: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UsageError(f"the target's weight of {name} is {weight!r}", hint="it is a number, 0 or more")
            if weight < 0:
                raise UsageError(f"the target's weight of {name} is {weight:g}", hint="no weight is negative")
        if not any(self.weights.values()):
            raise UsageError("the target weighs nothing", hint=f"give a weight to one of {', '.join(self.weights)}")

    @classmethod
    def parse(cls, text: str) -> Objective:
        """``size``, or ``latency=1,size=0.5``.

        Raises:
            UsageError: it is neither, or the weights make no sense.
        """
        word = text.strip()
        if "=" not in word and "," not in word:
            if word not in TARGETS:
                raise UsageError(f"no target is called {word!r}", hint=suggest(word, TARGETS))
            return TARGETS[word]
        known = [f.name for f in fields(cls)]
        weights: dict[str, float] = {}
        for part in word.split(","):
            name, equals, number = (p.strip() for p in part.partition("="))
            if name not in known:
                raise UsageError(f"target {text!r}: there is no {name!r} to aim at", hint=suggest(name, known))
            if not equals:
                raise UsageError(f"target {text!r}: {name} has no weight", hint=f"write {name}=1")
            if name in weights:
                raise UsageError(f"target {text!r}: {name} has two weights", hint="give one")
            try:
                weights[name] = float(number)
            except ValueError:
                raise UsageError(f"target {text!r}: {number!r} is no number", hint=f"write {name}=1") from None
        return cls(**weights)

    @property
    def weights(self) -> Mapping[str, float]:
        """Weights by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def for_files(self) -> bool:
        """Whether it shrinks files more than the default does."""
        return self.size > BYTES_WORTH * (self.latency + self.energy) or self.download > 0

    @property
    def by_bytes(self) -> bool:
        """Whether plans and results are compared by bytes of some kind."""
        return self.for_files or self.memory > 0

    @property
    def running(self) -> float:
        """Share of all weights that is about running the model, and not about its file."""
        return (self.latency + self.energy + self.memory) / sum(self.weights.values())

    @property
    def bytes_aimed_at(self) -> str:
        """Which bytes weigh most, "size", "download" or "memory"; empty where bytes are no aim."""
        if not self.by_bytes:
            return ""
        return max(("size", "download", "memory"), key=lambda name: self.weights[name])

    def value(self, now: Spent, before: Spent) -> float:
        """What a whole result takes, relative to the model before; less is better."""
        terms = (
            (self.latency, now.seconds, before.seconds),
            (self.size if self.for_files else 0.0, now.file_bytes, before.file_bytes),
            (self.download, now.download_bytes, before.download_bytes),
            (self.memory, now.memory_bytes, before.memory_bytes),
            (self.energy, now.joules, before.joules),
        )
        return sum(weight * (after or 0.0) / (first or 1.0) for weight, after, first in terms if weight)

    def rates(self, spent: Spent, seconds: float, *, for_files: bool = False) -> Rates:
        """Prices of choices on a model.

        Args:
            spent: what the model takes; of its files, its weights.
            seconds: what the sites of a pass take, at most the whole. Where bytes only break ties, all of them together
                are worth their share of that.
            for_files: the pass is there for nothing else, so plans are compared by bytes of the file in any case.
        """
        for_files = for_files or self.for_files
        by_bytes = for_files or self.memory > 0
        unit = (spent.seconds or 1.0) if by_bytes else seconds
        joules = spent.joules or 0.0
        size = self.size or (_TIE if for_files and not self.download else 0.0)
        counted = (size if for_files else 0.0) + self.download + self.memory
        rates = Rates(
            second=self.latency,
            joule=self.energy * spent.seconds / joules if joules else 0.0,
            watts=joules / spent.seconds if spent.seconds else 0.0,
            file_byte=size * unit / max(1, spent.file_bytes),
            download_byte=self.download * unit / max(1, spent.download_bytes or 0),
            memory_byte=self.memory * unit / max(1, spent.memory_bytes or 0),
            packed=(spent.download_bytes or 0) / max(1, spent.file_bytes),
            by_bytes=by_bytes,
            for_files=for_files,
            bytes_total=counted * unit,
        )
        return replace(rates, total=rates.running(spent.seconds, joules) + rates.bytes_total)


TARGETS: Mapping[str, Objective] = MappingProxyType(
    {
        "latency": Objective(latency=1.0, size=BYTES_WORTH),
        "size": Objective(size=1.0, latency=_TIE),
        "download": Objective(download=1.0, latency=_TIE),
        "memory": Objective(memory=1.0, latency=_TIE, size=BYTES_WORTH * _TIE),
        "energy": Objective(energy=1.0, latency=_TIE, size=_TIE),
    }
)
"""Targets that have a name; what they leave open, a small weight of something else settles."""

DEFAULT = TARGETS["latency"]


@dataclass(frozen=True)
class Rates:
    """What the planner pays and is paid, in one unit.

    Attributes:
        second: of predicted time.
        joule: of predicted energy.
        watts: mean power of the model, for what has a time and no energy of its own.
        file_byte: what a byte off the file is worth.
        download_byte: a byte off the compressed file.
        memory_byte: a byte of weights out of memory.
        packed: compressed bytes of a byte of weights.
        by_bytes: plans are compared by bytes of some kind, too.
        for_files: by those of the file.
        bytes_total: what all bytes that plans are compared by are worth.
        total: what plans are compared by, of the whole model as it is; 0 where that is not known.
    """

    second: float = 1.0
    joule: float = 0.0
    watts: float = 0.0
    file_byte: float = 0.0
    download_byte: float = 0.0
    memory_byte: float = 0.0
    packed: float = 1.0
    by_bytes: bool = False
    for_files: bool = False
    bytes_total: float = 0.0
    total: float = 0.0

    def running(self, seconds: float, joules: float) -> float:
        """The price of time and energy."""
        price = self.second * seconds
        return price + self.joule * joules if self.joule else price

    def joules(self, known: float | None, seconds: float) -> float:
        """Energy as it counts: at mean power where it is not known, and nothing where it is no aim."""
        if not self.joule:
            return 0.0
        return self.watts * seconds if known is None else known

    def worth(self, choice: Choice) -> float:
        """What the bytes are worth that a choice saves; decides between choices."""
        worth = self.file_byte * choice.bytes_saved
        if self.download_byte:
            worth += self.download_byte * self.download_saved(choice)
        if self.memory_byte:
            worth += self.memory_byte * memory_saved(choice)
        return worth

    def counted(self, choice: Choice) -> float:
        """The part of it that plans are compared by."""
        if not self.by_bytes:
            return 0.0
        return self.worth(choice) - (0.0 if self.for_files else self.file_byte * choice.bytes_saved)

    def download_saved(self, choice: Choice) -> float:
        """Bytes a choice takes off the compressed file."""
        return self.packed * choice.bytes_saved if choice.download_saved is None else choice.download_saved


def memory_saved(choice: Choice) -> int:
    """Bytes of weights a choice takes out of memory."""
    return choice.bytes_saved if choice.resident_saved is None else choice.resident_saved
