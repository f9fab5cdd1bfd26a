"""A profile of one's own: measured here or on a device, judged, fitted, written.

Measuring takes minutes, so what is measured is kept until it is used: a run that is interrupted goes on where it
was. A machine that is busy with other things gives times that mean nothing; that is told before anything is
measured (by its load) and after (by how much the rounds scatter).
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import platformdirs

from onnxcompress.errors import DataError, MeasurementError, OutputError
from onnxcompress.fitting.links import Link
from onnxcompress.fitting.measuring import measure
from onnxcompress.fitting.nets import CHECKED, FITTED, Net
from onnxcompress.fitting.samples import VERSION, LinkTime, Measurements, NetTime, NodeTime

__all__ = ["Kept", "busy", "measured_here", "read_results", "scatter", "spread", "write_new"]

BUSY = 0.75
"""Processes running per processor that make a machine too busy to measure."""

STEADY, UNSTEADY = 0.05, 0.15
"""Median spread of rounds below which times are taken as they are, and above which they are refused."""

Known = dict[str, LinkTime | NetTime | str]
Progress = Callable[[str, int, int], None]


# --- is it quiet enough -------------------------------------------------------------------------------------


def busy(about: Mapping[str, Any], *, force: bool) -> list[str]:
    """Judges a machine by its load before measuring.

    Args:
        about: as :func:`onnxcompress.fitting.machine.describe` says.
        force: measure all the same.

    Returns:
        What to note in the profile.

    Raises:
        MeasurementError: other processes are running, and ``force`` is not given.
    """
    load, cores = about.get("load"), about.get("usable", about.get("cores", 1))
    if load is None or load <= BUSY * cores:
        return []
    text = f"load {load:.2f} on {cores} processor{'s' if cores > 1 else ''} before measuring"
    if not force:
        raise MeasurementError(
            f"the machine is busy: {text}",
            hint="close what else is running and wait a minute; --force goes on and says so in the profile",
        )
    return [f"the machine was busy: {text}"]


def spread(measurements: Measurements) -> float:
    """Median over the links of (90th - 10th percentile) / median of the rounds of a chain."""
    found = sorted(link.spread for link in measurements.links)
    return found[len(found) // 2] if found else 0.0


def scatter(measurements: Measurements, *, force: bool) -> list[str]:
    """Judges measurements by how much their rounds scatter.

    Returns:
        What to note in the profile.

    Raises:
        MeasurementError: more than times worth fitting do, and ``force`` is not given.
    """
    found = spread(measurements)
    if found <= STEADY:
        return []
    text = f"measured on an unsteady machine: rounds scatter by {found:.0%} (median)"
    if found > UNSTEADY and not force:
        raise MeasurementError(
            f"the times scatter too much to be fitted: {found:.0%} between rounds (median), {UNSTEADY:.0%} at most",
            hint="close what else is running, fix the clock if you can, and measure again; "
            "--force fits them all the same and says so in the profile",
        )
    return [text]


# --- measuring ----------------------------------------------------------------------------------------------


class Kept:
    """Results of a run that may be interrupted, a line each, in the user's cache folder.

    Args:
        name: of the profile.
        about: the machine; results of another one are not gone on with.
        budget: seconds for a link; neither are results of another budget.
        folder: where to keep them.
    """

    def __init__(self, name: str, about: Mapping[str, Any], budget: float, folder: Path | None = None) -> None:
        folder = folder or Path(platformdirs.user_cache_dir("onnxcompress")) / "fits"
        self.path = folder / f"{name}-onnxruntime{ort.__version__}-links{VERSION}.jsonl"
        self.head = {"cpu": about.get("cpu"), "isa": about.get("isa"), "budget": budget}
        self.known: Known = {}
        self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return  # nothing was interrupted
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                if number == 0 and record != self.head:
                    return
                if number:
                    name, item = _item(record)
                    self.known[name] = item
            except (ValueError, TypeError, KeyError):
                return  # the line that was being written; what follows is not to be trusted

    def __call__(self, item: LinkTime | NetTime | tuple[str, str]) -> None:
        """Keeps one result."""
        record = {"left_out": item} if isinstance(item, tuple) else {_TYPES[type(item)]: dataclasses.asdict(item)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def start(self) -> None:
        """Makes the file, with what is known in it and no broken end.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.head) + "\n", encoding="utf-8")
            for name, item in self.known.items():
                self((name, item) if isinstance(item, str) else item)
        except OSError as error:
            raise OutputError(
                f"cannot keep measurements in {self.path.parent}: {error.strerror}",
                hint="XDG_CACHE_HOME names another folder" if os.name == "posix" else "",
            ) from error

    def drop(self) -> None:
        """Forgets everything: it was used."""
        self.path.unlink(missing_ok=True)


_TYPES: dict[type, str] = {LinkTime: "link", NetTime: "net"}


def _item(record: dict[str, Any]) -> tuple[str, LinkTime | NetTime | str]:
    if "left_out" in record:
        name, reason = record["left_out"]
        return str(name), str(reason)
    if "link" in record:
        link = LinkTime(**record["link"])
        return link.name, link
    net = record["net"]
    return net["name"], NetTime(**{**net, "nodes": tuple(NodeTime(**node) for node in net["nodes"])})


def measured_here(
    *,
    about: Mapping[str, Any],
    budget: float,
    kept: Kept,
    selected: Iterable[Link] | None = None,
    nets: Iterable[Net] = (*FITTED, *CHECKED),
    progress: Progress = lambda what, done, total: None,
) -> Measurements:
    """Measures this machine, going on where an interrupted run was.

    Args:
        about: facts about the machine, kept with the results.
        budget: seconds of timing for a link.
        kept: what is known, and where new results go.
        selected: links; all by default.
        nets: networks.
        progress: as for :func:`~onnxcompress.fitting.measuring.measure`.

    Raises:
        OutputError: intermediate results cannot be kept.
    """
    kept.start()
    return measure(
        budget=budget, selected=selected, nets=nets, machine={**about, "budget": budget}, progress=progress,
        known=dict(kept.known), keep=kept,
    )  # fmt: skip


# --- results of a kit ---------------------------------------------------------------------------------------


def read_results(path: Path, *, force: bool) -> tuple[Measurements, list[str]]:
    """Reads what the script of a kit wrote.

    Args:
        path: results.json.
        force: take results of another onnxruntime, too.

    Returns:
        The measurements, and what to note in the profile.

    Raises:
        MeasurementError: it cannot be read, or is of another kit, or of another onnxruntime.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MeasurementError(f"cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise MeasurementError("is no text", path=path, hint="name the results.json a kit wrote") from error
    try:
        found = Measurements.from_json(text, path=str(path))
    except DataError as error:
        raise MeasurementError(error.message, hint=error.hint) from error
    try:
        caches = [{"name": str(c["name"]), "bytes": int(c["bytes"]), "shared": bool(c["shared"])}
                  for c in found.machine.get("caches", ())]  # fmt: skip
        isa = [str(flag) for flag in found.machine.get("isa", ())]
    except (TypeError, KeyError, ValueError) as error:
        raise MeasurementError("what it says of the machine is no description", path=path,
                               hint="run the kit again") from error  # fmt: skip
    found = dataclasses.replace(found, machine={**found.machine, "caches": caches, "isa": isa})
    notes: list[str] = []
    meant = str(found.machine.get("kit_onnxruntime", found.onnxruntime))
    for other, what in ((meant, "its kit is for"), (ort.__version__, "here is")):
        if _minor(other) != _minor(found.onnxruntime):
            message = f"measured with onnxruntime {found.onnxruntime}, but {what} {other}"
            if not force:
                raise MeasurementError(
                    message,
                    path=path,
                    hint=f"make the kit with onnxruntime {_minor(found.onnxruntime)} installed here; what is fused "
                    "differs between versions. --force fits them all the same and says so in the profile",
                )
            notes.append(message)
    if not found.machine.get("complete", True):
        notes.append(f"the kit was not run to its end: {len(found.links)} links and {len(found.nets)} networks")
    return found, notes


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


# --- writing ------------------------------------------------------------------------------------------------


def write_new(path: Path, text: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Writes a file whole or not at all.

    Args:
        path: of the file.
        text: writes it to a path it is given.
        overwrite: it may replace a file.

    Raises:
        OutputError: there is such a file, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} is there already", hint="choose another name, or give --overwrite")
    try:
        with tempfile.TemporaryDirectory(dir=path.resolve().parent, prefix=".fit-") as staged:
            text(Path(staged, path.name))
            os.replace(Path(staged, path.name), path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error
