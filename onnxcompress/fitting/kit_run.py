"""Times the models of this kit with onnxruntime on this device, on one thread.

    python3 run.py                 # a few minutes; writes results.json
    python3 run.py --budget 0.3    # longer, steadier
    python3 run.py                 # again, after Ctrl-C or a crash: goes on where it was

Then take results.json back to where the kit was made. Needs Python 3.8, numpy and onnxruntime, nothing else, and
no network. Leave the device alone meanwhile: nothing else should run, and it should not get hot.

An operator is timed as a link of a chain: a chain of 10 links and one of 2 run in turns, and what the longer one
takes more is the time of 8 links. Weights are random numbers, made here by how they are spread; so the kit is small
and every weight has memory of its own, as in a real model.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

if __package__:
    from onnxcompress.fitting.machine import describe
else:  # in a kit it lies beside this file
    from machine import describe  # type: ignore[import-not-found, no-redef, unused-ignore]

__all__ = ["Device", "main"]

RUNS = 20
"""Of a network under the profiler."""


class LeftOutError(Exception):
    """This model cannot be timed here; the text says why."""


# --- models -------------------------------------------------------------------------------------------------


def field(number: int, payload: bytes) -> bytes:
    """A field of a protobuf message: its number, length and bytes."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    """An unsigned number in groups of seven bits, as protobuf has it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def sample(name: str, dims: list[int], dtype: str, quantiles: list[float]) -> Any:
    """Numbers spread like those the quantiles were taken of; the same at every call."""
    count = 1
    for dim in dims:
        count *= dim
    random = np.random.RandomState(zlib.crc32(name.encode()))
    few = random.random_sample(min(count, 65521))  # a prime: repeated, no two rows are alike
    values = np.interp(few, np.linspace(0.0, 1.0, len(quantiles)), quantiles)
    if np.dtype(dtype).kind in "iu":
        values = np.rint(values)
    return np.resize(values.astype(dtype), dims)


def with_weights(model: bytes, weights: list[Any], spreads: list[list[float]]) -> bytes:
    """A model with the initializers it was stored without.

    Protobuf merges what is said twice of one message: a second ``graph`` adds its initializers to the first.

    Args:
        model: the stored model.
        weights: of each its name, dims, ONNX element type, numpy type and number of its spread.
        spreads: quantiles of values.
    """
    parts = []
    for name, dims, element_type, dtype, spread in weights:
        head = b"".join(b"\x08" + varint(dim) for dim in dims)
        head += b"\x10" + varint(element_type) + field(8, name.encode())
        parts.append(field(5, head + field(9, sample(name, dims, dtype, spreads[spread]).tobytes())))
    return model + field(7, b"".join(parts)) if parts else model


# --- timing -------------------------------------------------------------------------------------------------


def clock() -> Callable[[], float]:
    """Seconds this thread has computed; of the wall where the system cannot tell finely enough."""
    if hasattr(time, "thread_time") and time.get_clock_info("thread_time").resolution < 1e-5:
        return time.thread_time
    return time.perf_counter


class Stopwatch:
    """A session with inputs and outputs bound once, so that a run is the kernels and little else.

    Args:
        model: serialized.
        feeds: inputs.
        raw: without graph optimizations.
        watched: first runs under the profiler; what it saw is in ``events``.
    """

    def __init__(self, model: bytes, feeds: dict[str, Any], raw: bool, watched: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if raw:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.now = clock()
        self.feeds = feeds  # onnxruntime reads them where they are, and older ones do not keep them alive
        self.times: list[float] = []
        self.events: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            if watched:
                options.enable_profiling = True
                options.profile_file_prefix = str(Path(folder, "nodes"))
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self.binding = self.session.io_binding()
            for name, array in feeds.items():
                self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            for output in self.session.get_outputs():
                self.binding.bind_output(output.name)
            for _ in range(max(watched, 1)):
                self.session.run_with_iobinding(self.binding)
            if watched:
                self.events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))

    def run(self, repeats: int = 1) -> float:
        """Times ``repeats`` runs together."""
        start = self.now()
        for _ in range(repeats):
            self.session.run_with_iobinding(self.binding)
        self.times.append((self.now() - start) / repeats)
        return self.times[-1]

    def seconds(self) -> float:
        """10th percentile of the rounds."""
        return float(np.percentile(self.times, 10))

    def spread(self) -> float:
        """(90th - 10th percentile) / median of the rounds."""
        low, middle, high = np.percentile(self.times, (10, 50, 90))
        return float((high - low) / middle) if middle > 0 else 0.0

    def nodes(self) -> list[dict[str, Any]]:
        """What the profiler saw: seconds of every node, the 20th percentile of its runs."""
        times: dict[Any, list[float]] = collections.defaultdict(list)
        sizes: dict[Any, int] = {}
        for event in self.events:
            name = str(event.get("name", ""))
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                key = name[: -len("_kernel_time")], str(event["args"]["op_name"])
                times[key].append(1e-6 * float(event["dur"]))
                shapes = event["args"].get("output_type_shape") or [{}]
                sizes[key] = int(np.prod(next(iter(shapes[0].values()), [1])))
        return [
            # Fused nodes may share a name: those of one run are added up.
            {"node": key[0], "op_type": key[1], "elements": sizes[key],
             "seconds": max(1, round(len(took) / RUNS)) * float(np.percentile(took, 20))}
            for key, took in times.items()
        ]  # fmt: skip

    def ops(self) -> list[str]:
        """Operators that ran, after one run under the profiler."""
        return [
            str(event["args"]["op_name"])
            for event in self.events
            if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")
        ]


def rounds(watches: list[Stopwatch], budget: float, repeats: int) -> None:
    """Runs them in turns for ``budget`` seconds; at least 8 rounds, or 3 if that takes very long."""
    start = time.perf_counter()
    count = 0
    while True:
        passed = time.perf_counter() - start
        if count >= 3 and passed >= budget and (count >= 8 or passed >= 8 * budget):
            return
        for watch in watches:
            watch.run(repeats)
        count += 1


# --- the kit ------------------------------------------------------------------------------------------------


class Device:
    """One run of a kit.

    Args:
        kit: folder of the kit.
        results: file to go on with, and to write to.
        budget: seconds of timing for a chain; a network gets four times as much.
        say: shows a line of progress.

    Raises:
        SystemExit: the kit is damaged, or the results are of something else.
    """

    def __init__(self, kit: Path, results: Path, budget: float, say: Callable[[str], None] = print) -> None:
        try:
            self.manifest = json.loads((kit / "manifest.json").read_text(encoding="utf-8"))
            self.models = zipfile.ZipFile(kit / "models.zip")
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise SystemExit(f"error: the kit in {kit} is not whole: {error}") from error
        self.results, self.budget, self.say = results, budget, say
        self.marker = results.with_name(results.name + ".running")
        self.bases: dict[str, float] = {}
        self.saved = 0.0
        self.data = self._earlier() or {
            "onnxruntime": ort.__version__,
            "machine": {
                **describe(),
                "kit": self.manifest["kit"],
                "kit_onnxruntime": self.manifest["onnxruntime"],
                "budget": budget,
                "complete": False,
            },
            "per_run": 0.0,
            "per_node": 0.0,
            "links": [],
            "nets": [],
            "left_out": {},
            "version": self.manifest["version"],
        }

    def _earlier(self) -> dict[str, Any] | None:
        if not self.results.exists():
            return None
        try:
            data: dict[str, Any] = json.loads(self.results.read_text(encoding="utf-8"))
            made_by = data["machine"].get("kit"), data["onnxruntime"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"error: {self.results} is no file of results ({error}); move it away") from error
        if made_by != (self.manifest["kit"], ort.__version__):
            raise SystemExit(f"error: {self.results} is of another kit or another onnxruntime; move it away")
        if self.marker.exists():  # the process was killed while it held this model
            name = self.marker.read_text(encoding="utf-8")
            data["left_out"].setdefault(name, "the process died while this was timed; out of memory?")
            self.marker.unlink()
        return data

    def close(self) -> None:
        """Lets go of the kit's files."""
        self.models.close()

    def save(self, always: bool = True) -> None:
        """Writes the results, whole or not at all; every five seconds at most unless ``always``."""
        if not always and time.monotonic() - self.saved < 5:
            return
        staged = self.results.with_name(self.results.name + ".new")
        staged.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        os.replace(staged, self.results)
        self.saved = time.monotonic()

    def run(self) -> None:
        """Times everything that has no result yet.

        Raises:
            KeyboardInterrupt: the user had enough; what was measured is saved.
        """
        done = {item["name"] for item in (*self.data["links"], *self.data["nets"])} | set(self.data["left_out"])
        jobs = [(c["name"], c, False) for c in self.manifest["chains"]]
        jobs += [(n["name"], n, True) for n in self.manifest["nets"]]
        left = [job for job in jobs if job[0] not in done]
        start = time.monotonic()
        try:
            if not self.data["per_node"]:
                self.data["per_run"], self.data["per_node"] = self.overheads()
            for number, (name, job, whole) in enumerate(left):
                ahead = (time.monotonic() - start) / number * (len(left) - number) if number else 0.0
                self.say(f"[{len(jobs) - len(left) + number + 1}/{len(jobs)}] {clocked(ahead)}{name}")
                self.marker.write_text(name, encoding="utf-8")
                self.attempt(name, job, whole)
                self.save(always=False)
            self.data["machine"]["complete"] = True
        finally:
            self.save()
            if self.marker.exists():
                self.marker.unlink()

    def attempt(self, name: str, job: dict[str, Any], whole: bool) -> None:
        """Times one chain pair or network and keeps the result, or why there is none."""
        try:
            if whole:
                self.data["nets"].append(self.net(job))
            else:
                self.data["links"].append(self.link(job))
        except LeftOutError as error:
            self.data["left_out"][name] = str(error)
        except MemoryError:
            self.data["left_out"][name] = "does not fit into memory"
        except Exception as error:  # onnxruntime's errors share no base class; each is kept with its reason
            text = (str(error).splitlines() or [""])[0]
            self.data["left_out"][name] = f"{type(error).__name__}: {text[:300]}"

    def watch(self, name: str, raw: bool = False, watched: int = 0) -> Stopwatch:
        """A model of the kit, ready to run."""
        about = self.manifest["models"][name]
        spreads = self.manifest["spreads"]
        size = about["bytes"]
        free = available()
        if free is not None and 3 * size > free:
            raise LeftOutError(f"does not fit into memory: {size / 1e6:.0f} MB of weights, {free / 1e6:.0f} MB free")
        feeds = {n: sample(n, dims, dtype, spreads[spread]) for n, dims, dtype, spread in about["inputs"]}
        model = with_weights(self.models.read(name), about["weights"], spreads)
        return Stopwatch(model, feeds, raw, watched)

    def pair(self, chain: dict[str, Any]) -> tuple[float, float]:
        """Seconds of a link by the slope between its two chains; and the spread of the longer one."""
        check = chain.get("check")
        short, long = (self.watch(name, chain["raw"], 1 if check else 0) for name in chain["files"])
        if check:
            self.fused(check, short.ops(), long.ops())
        repeats = max(1, int(2e-3 / max(long.run(), 1e-7)))
        long.times.clear()
        rounds([short, long], self.budget, repeats)
        links = self.manifest["long"] - self.manifest["short"]
        return (long.seconds() - short.seconds()) / links, long.spread()

    def fused(self, check: dict[str, Any], short: list[str], long: list[str]) -> None:
        """Left out if this onnxruntime does not run the link as meant."""
        expect = check["expect"]
        if expect and sum(op in expect for op in short) != self.manifest["short"] * check["nodes"]:
            raise LeftOutError(f"runs as {sorted(set(short))}")
        if check["half"] and "Cast" in short:
            raise LeftOutError("is computed in float32")
        if check["integer"]:
            grids = [sum(op in ("QuantizeLinear", "DequantizeLinear") for op in ops) for ops in (short, long)]
            links = self.manifest["long"] - self.manifest["short"]
            if grids[1] - grids[0] > 2 * links * check["parallel"]:
                raise LeftOutError(f"stays float: {sorted(set(short))}")

    def link(self, chain: dict[str, Any]) -> dict[str, Any]:
        """A link, less everything it stands on."""
        seconds, spread = self.pair(chain)
        for base in chain["bases"]:
            if base not in self.bases:
                self.bases[base] = self.pair(self.manifest["bases"][base])[0]
            seconds -= self.bases[base]
        if seconds <= 0:
            raise LeftOutError("lost in noise")
        return {"name": chain["name"], "seconds": seconds, "spread": spread}

    def net(self, net: dict[str, Any]) -> dict[str, Any]:
        """A network: its nodes by the profiler first, then whole without it."""
        watch = self.watch(net["file"], watched=RUNS)
        nodes = watch.nodes()
        watch.run()
        watch.times.clear()
        rounds([watch], 4 * self.budget, 1)
        return {"name": net["name"], "seconds": watch.seconds(), "spread": watch.spread(), "nodes": nodes}

    def overheads(self) -> tuple[float, float]:
        """Seconds of a call and of dispatching a node: chains of a trivial operator."""
        about = self.manifest["overhead"]
        per_node, _ = self.pair(about)
        one = self.watch(about["one"], raw=True)
        for _ in range(200):
            one.run(20)
        return max(one.seconds() - per_node, 0.0), max(per_node, 1e-9)


def available() -> int | None:
    """Bytes of memory that can still be had; None where the system does not tell (Linux only)."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return None


def clocked(seconds: float) -> str:
    """Time left, for people; nothing for none."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left  " if seconds else ""


def main(arguments: list[str] | None = None) -> int:
    """Runs the kit beside this file and returns the exit status."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.1, metavar="SECONDS", help="of timing for a chain (0.1)")
    parser.add_argument("--results", type=Path, default=Path("results.json"), metavar="FILE", help="(results.json)")
    parser.add_argument("--kit", type=Path, default=here, metavar="FOLDER", help="(the one this script is in)")
    parser.add_argument("--any-version", action="store_true", help="run with another onnxruntime than the kit is for")
    given = parser.parse_args(arguments)
    if not 0 < given.budget < 3600:
        parser.error("--budget is a number of seconds")
    device = Device(given.kit, given.results, given.budget)
    try:
        return finish(device, given.any_version)
    finally:
        device.close()


def finish(device: Device, any_version: bool) -> int:
    """Runs what is left of a kit and returns the exit status."""
    meant = device.manifest["onnxruntime"]
    if meant.split(".")[:2] != ort.__version__.split(".")[:2] and not any_version:
        print(f"error: this kit is for onnxruntime {meant}, here is {ort.__version__}. Make it where that version is "
              "installed, or run it with --any-version", file=sys.stderr)  # fmt: skip
        return 2
    running = device.data["machine"].get("load") or 0.0
    if running > 0.75 * device.data["machine"]["usable"]:
        print(f"WARNING: this device is busy (load {running:.1f}); the times will scatter", file=sys.stderr)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        device.run()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {device.results} holds what was measured. Run again to go on.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    data = device.data
    spread = float(np.median([item["spread"] for item in data["links"]])) if data["links"] else 0.0
    counts = f"{len(data['links'])} links, {len(data['nets'])} networks, {len(data['left_out'])} left out"
    print(f"{counts}; median spread of rounds {spread:.1%}")
    print(f"written to {device.results}; where the kit was made: onnxcompress profile fit --from-results results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
