"""Every error a user can meet.

    OnnxCompressError                 exit code 1
    ├── UsageError                    2   the call itself is off (options that contradict, unknown names)
    ├── ModelError                    3   the model cannot be used as it is
    │   ├── ModelReadError                not ONNX, truncated, external data missing
    │   ├── UnsupportedModelError         valid, but holds something we would have to drop
    │   └── ModelRunError                 onnxruntime itself cannot load or run it
    ├── DataError                     4   calibration data: names, shapes, dtypes, NaN, empty
    ├── ProfileError                  5   a hardware profile file is wrong (file and line)
    │   ├── UnknownProfileError
    │   └── MeasurementError              a file of measured times is wrong (file and line)
    ├── PassError                     6   a pass is unknown, misconfigured or broke its promise
    │   ├── UnknownPassError
    │   ├── PassOptionError
    │   ├── PassContractError
    │   └── CouplingError                 positions that must stay were to be removed, or a coupling rule is wrong
    ├── RewriteError                  6   an edit that cannot be made
    │   └── StaleViewError                a view was used after the model changed
    ├── OutputError                   7   the result cannot be written
    ├── ZooError                      8   a zoo model cannot be fetched
    └── EmulatorError                 9   the emulator is not set up, or failed

Each says what is wrong, where, and what to do next (``hint``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "CouplingError",
    "DataError",
    "EmulatorError",
    "MeasurementError",
    "ModelError",
    "ModelReadError",
    "ModelRunError",
    "OnnxCompressError",
    "OutputError",
    "PassContractError",
    "PassError",
    "PassOptionError",
    "ProfileError",
    "RewriteError",
    "StaleViewError",
    "UnknownPassError",
    "UnknownProfileError",
    "UnsupportedModelError",
    "UsageError",
    "ZooError",
    "suggest",
]


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence naming what ``name`` may have meant, or what there is."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"known: {', '.join(options)}" if options else "none are installed"


class OnnxCompressError(Exception):
    """Root of the tree.

    Attributes:
        message: what is wrong and where.
        hint: what to do next; may be empty.
        exit_code: process exit status the command line uses for it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(OnnxCompressError):
    exit_code = 2


class ModelError(OnnxCompressError):
    """Something about the model. ``node`` and ``tensor`` name the place where known."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        node: str | None = None,
        tensor: str | None = None,
        hint: str = "",
    ) -> None:
        where = [str(path)] if path is not None else []
        where += [f"node {node!r}"] if node else []
        where += [f"tensor {tensor!r}"] if tensor else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message, hint=hint)
        self.path, self.node, self.tensor = path, node, tensor


class ModelReadError(ModelError):
    pass


class UnsupportedModelError(ModelError):
    pass


class ModelRunError(ModelError):
    pass


class DataError(OnnxCompressError):
    """Calibration data. ``sample`` is the 0-based index of the feed, ``input`` the model input."""

    exit_code = 4

    def __init__(self, message: str, *, sample: int | None = None, input: str | None = None, hint: str = "") -> None:
        where = [f"sample {sample}"] if sample is not None else []
        where += [f"input {input!r}"] if input else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message, hint=hint)
        self.sample, self.input = sample, input


class ProfileError(OnnxCompressError):
    """A profile file; ``line`` is 1-based."""

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        line: int | None = None,
        hint: str = "",
    ) -> None:
        where = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(where + message, hint=hint)
        self.path, self.line = path, line


class UnknownProfileError(ProfileError):
    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no hardware profile is called {name!r}", hint=suggest(name, known))


class MeasurementError(ProfileError):
    """A file of measured times that profiles are fitted to or compared with; ``line`` is 1-based."""


class PassError(OnnxCompressError):
    exit_code = 6


class UnknownPassError(PassError):
    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no pass is called {name!r}", hint=suggest(name, known))


class PassOptionError(PassError):
    pass


class PassContractError(PassError):
    """A pass did not keep what it claims (valid graph, lossless, smaller)."""


class CouplingError(PassError):
    """Positions of a tensor that have to stay were to be removed, or a coupling rule is wrong."""


class RewriteError(OnnxCompressError):
    exit_code = 6


class StaleViewError(RewriteError):
    pass


class OutputError(OnnxCompressError):
    exit_code = 7


class ZooError(OnnxCompressError):
    exit_code = 8


class EmulatorError(OnnxCompressError):
    exit_code = 9
