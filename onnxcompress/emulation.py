"""Models run by the Arm build of onnxruntime, in an emulator, with executed instructions counted by class.

The emulator is a folder that ``hardware_profiles/fitting/setup.sh`` makes. Of it only this is relied on:

- ``run CPU PREFIX COUNTS SCRIPT ARGUMENTS...`` runs a Python script in the emulated Python;
- ``root`` is the file tree the emulated programs see.

Outputs are those of the real kernels. Time is not emulated; a profile's ``[instructions]`` table makes an estimate
of the counts. Which kernels onnxruntime picks depends on what the system says about the core, so every
run gets a tree of its own in which ``/proc`` and ``/sys`` speak of the core of the profile and not of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from onnxcompress.errors import EmulatorError, ProfileError
from onnxcompress.instructions import CLASSES
from onnxcompress.profile import Emulation, Profile

__all__ = ["ENVIRONMENT", "Emulator", "Executed", "Job"]

ENVIRONMENT = "ONNXCOMPRESS_EMULATOR"
"""Environment variable that names the folder of the emulator."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Job:
    """A model to run.

    Attributes:
        model: its file.
        feeds: inputs; the first is used for counting.
        runs: runs to count instructions of; 0 for none.
        outputs: outputs to return, in this order; all if empty.
        keep: return outputs, of every feed.
        raw: without graph optimizations.
    """

    model: Path
    feeds: Sequence[Mapping[str, Array]]
    runs: int = 0
    outputs: tuple[str, ...] = ()
    keep: bool = True
    raw: bool = False


@dataclass(frozen=True)
class Executed:
    """What came of a job.

    Attributes:
        outputs: of each feed, by name; values that are no tensors are left out.
        counts: instructions and bytes of one run by class; empty if none were to be counted.
        onnxruntime: version of the emulated runtime.
        error: why it did not run; "" if it did.
    """

    outputs: tuple[Mapping[str, Array], ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    onnxruntime: str = ""
    error: str = ""


class Emulator:
    """An emulator that is set up.

    Args:
        folder: where; by default the one ``ONNXCOMPRESS_EMULATOR`` names, or ``emulator`` in the user's cache.

    Raises:
        EmulatorError: it is not there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        named = os.environ.get(ENVIRONMENT)
        default = Path(platformdirs.user_cache_dir("onnxcompress")) / "emulator"
        self.folder = (folder or (Path(named) if named else default)).absolute()
        for part in ("run", "root"):
            if not (self.folder / part).exists():
                raise EmulatorError(
                    f"no emulator in {self.folder}: it has no {part!r}",
                    hint="set one up with hardware_profiles/fitting/setup.sh of the source tree (Debian 12 on x86-64), "
                    f"or name its folder in {ENVIRONMENT}",
                )

    def run(self, profile: Profile, jobs: Sequence[Job], *, timeout: float | None = None) -> list[Executed]:
        """Runs models one after another on the core of a profile.

        A model that cannot be loaded or run gives its reason in ``error``.

        Args:
            profile: the device; it has an ``[emulation]`` table.
            jobs: what to run.
            timeout: seconds for all of it.

        Raises:
            ProfileError: the profile does not say how to emulate its core.
            EmulatorError: the emulator failed, or did not finish in time.
        """
        if profile.emulation is None:
            raise ProfileError(
                f"{profile.name} has no [emulation] table, so its core cannot be emulated",
                hint="profiles of Arm cores have one: the emulator's name of the core and its identification register",
            )
        with tempfile.TemporaryDirectory(prefix="onnxcompress-emulation-") as name:
            folder = Path(name)
            _make_tree(folder / "tree", self.folder / "root", profile.emulation, profile)
            _hand_over(folder, jobs)
            command = [self.folder / "run", profile.emulation.cpu, folder / "tree", folder / "counts.jsonl"]
            self._call([*map(str, command), str(folder / "guest.py"), str(folder)], folder, jobs, timeout)
            return list(_results(folder, jobs))

    def _call(self, command: list[str], folder: Path, jobs: Sequence[Job], timeout: float | None) -> None:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise EmulatorError(f"{_at(folder, jobs)}: not done after {timeout:g} s") from error
        except OSError as error:
            raise EmulatorError(f"{command[0]} does not start: {error.strerror}") from error
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise EmulatorError(
                f"{_at(folder, jobs)}: the emulator ended with status {done.returncode}: {last}",
                hint="the emulated runtime may use instructions this emulator does not know",
            )


# --- the tree a core sees ----------------------------------------------------------------------


def _make_tree(tree: Path, root: Path, core: Emulation, profile: Profile) -> None:
    """The emulator's root by links, with ``/proc`` and ``/sys`` that tell of the core."""
    tree.mkdir()
    for entry in root.iterdir():
        if entry.name not in ("proc", "sys"):
            (tree / entry.name).symlink_to(entry)
    files = dict(_system(core, profile.device.cores, int(1e6 * profile.device.frequency_ghz)))
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")


def _system(core: Emulation, count: int, khz: int) -> Iterator[tuple[str, str]]:
    """Files of Linux that describe processors, and what is in them."""
    register, everyone = int(core.midr, 16), f"0-{count - 1}"
    cpus = "sys/devices/system/cpu"
    for name in ("possible", "present", "online"):
        yield f"{cpus}/{name}", everyone
    yield f"{cpus}/kernel_max", str(count - 1)
    about = []
    for i in range(count):
        cpu = f"{cpus}/cpu{i}"
        yield f"{cpu}/cpufreq/cpuinfo_max_freq", str(khz)
        yield f"{cpu}/cpufreq/cpuinfo_min_freq", str(min(khz, 600000))
        yield f"{cpu}/regs/identification/midr_el1", f"0x{register:016x}"
        yield f"{cpu}/topology/core_id", str(i)
        yield f"{cpu}/topology/physical_package_id", "0"
        for name in ("core_siblings_list", "package_cpus_list", "cluster_cpus_list"):
            yield f"{cpu}/topology/{name}", everyone
        for name in ("thread_siblings_list", "core_cpus_list"):
            yield f"{cpu}/topology/{name}", str(i)
        caches = (("1", "Data", core.l1_bytes, str(i)), ("1", "Instruction", core.l1_bytes, str(i)),
                  ("2", "Unified", core.l2_bytes, everyone))  # fmt: skip
        for index, (level, kind, size, shared) in enumerate(caches):
            cache = f"{cpu}/cache/index{index}"
            yield f"{cache}/level", level
            yield f"{cache}/type", kind
            yield f"{cache}/size", f"{size // 1024}K"
            yield f"{cache}/shared_cpu_list", shared
            yield f"{cache}/coherency_line_size", "64"
            yield f"{cache}/ways_of_associativity", "4"
            yield f"{cache}/number_of_sets", str(size // 256)
        about.append(
            f"processor\t: {i}\nBogoMIPS\t: 38.40\nFeatures\t: {' '.join(core.features)}\n"
            f"CPU implementer\t: 0x{register >> 24:02x}\nCPU architecture: 8\n"
            f"CPU variant\t: 0x{register >> 20 & 15:x}\nCPU part\t: 0x{register >> 4 & 0xFFF:03x}\n"
            f"CPU revision\t: {register & 15}\n"
        )
    yield "proc/cpuinfo", "\n".join(about)


# --- handing work over and back ----------------------------------------------------------------


def _hand_over(folder: Path, jobs: Sequence[Job]) -> None:
    """Writes what :mod:`onnxcompress.guest` reads, and the script itself."""
    script = resources.files("onnxcompress").joinpath("guest.py").read_text(encoding="utf-8")
    (folder / "guest.py").write_text(script, encoding="utf-8")
    documents = []
    for number, job in enumerate(jobs):
        for i, feed in enumerate(job.feeds):
            for name, array in feed.items():
                if np.asarray(array).dtype.kind not in "fiub":
                    message = f"{job.model}: input {name!r} is no tensor of numbers, which is all that is emulated"
                    raise EmulatorError(message)
            np.savez(folder / f"feed_{number}_{i}.npz", *map(np.asarray, feed.values()))
        documents.append(
            {"model": str(job.model.absolute()), "feeds": [list(feed) for feed in job.feeds], "runs": job.runs,
             "outputs": list(job.outputs), "keep": job.keep, "raw": job.raw}
        )  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(documents), encoding="utf-8")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _at(folder: Path, jobs: Sequence[Job]) -> str:
    """The model it was at."""
    done = len(_lines(folder / "done.jsonl"))
    return str(jobs[done].model) if done < len(jobs) else "the end"


def _results(folder: Path, jobs: Sequence[Job]) -> Iterator[Executed]:
    counted = {line["tag"]: line for line in _lines(folder / "counts.jsonl")}
    for number, (job, told) in enumerate(zip(jobs, _lines(folder / "done.jsonl"), strict=True)):
        if "error" in told:
            yield Executed(onnxruntime=told["onnxruntime"], error=told["error"])
            continue
        counts: dict[str, float] = {}
        if job.runs:
            if 2 * number + 1 not in counted:
                raise EmulatorError("the emulator ran the model and counted nothing", hint="is its plugin built?")
            counts = {name: counted[2 * number + 1][name] / job.runs for name in CLASSES}
        outputs = []
        for i in range(len(job.feeds) if job.keep else 0):
            with np.load(folder / f"output_{number}_{i}.npz", allow_pickle=False) as arrays:
                outputs.append({name: arrays[f"arr_{k}"] for k, name in enumerate(told["outputs"])})
        yield Executed(tuple(outputs), counts, told["onnxruntime"])
