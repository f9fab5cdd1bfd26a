"""Worker processes whose results are remembered, so that a benchmark that was stopped can go on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Run, run_worker

__all__ = ["RunWorker", "Steps"]

RunWorker = Callable[..., Run]
"""As :func:`benchmarks.measure.run_worker`."""


class Steps:
    """Runs a worker unless it has been run with just these arguments.

    Args:
        known: what earlier runs gave; kept up to date, and fit for JSON.
        save: called after every new result.
    """

    def __init__(self, known: dict[str, Any], save: Callable[[], None]) -> None:
        self._known, self._save = known, save

    def __call__(self, module: str, *arguments: str, timeout: float, makes: Path | None = None) -> Run:
        """As :func:`benchmarks.measure.run_worker`; what failed is tried again.

        Args:
            makes: a file it writes. Where it is missing the step is run, and what was known of an earlier file of
                this name is forgotten.
        """
        key = json.dumps([module, *arguments])
        known = self._known.get(key)
        if known is not None and (makes is None or makes.is_file()):
            return Run(**known)
        if makes is not None:
            for other in [k for k in self._known if str(makes) in json.loads(k)]:
                del self._known[other]
        done = run_worker(module, *arguments, timeout=timeout)
        if not done.error:
            self._known[key] = asdict(done)
            self._save()
        return done
