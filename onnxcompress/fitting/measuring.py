"""Timing chains and networks with onnxruntime on this machine, one thread.

An operator timed alone is a poor guide to the same operator inside a model: session entry, layout changes and
cold memory weigh as much as the work. So operators are timed as links of chains: a chain of 10 links and a chain
of 2 run in turns, and one link costs ``(t10 - t2) / 8``; what both share cancels out. Whole networks are timed
as they are, and once more with onnxruntime's profiler for the share of their nodes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto

from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.links import Link, unary
from onnxcompress.fitting.nets import CHECKED, FITTED, PARTLY, WHOLLY, Net, quantized
from onnxcompress.fitting.samples import LinkTime, Measurements, NetTime, NodeTime

__all__ = ["FORMS", "LONG", "SHORT", "NotFusedError", "check_fused", "feeds", "forms", "measure"]

SHORT, LONG = 2, 10
Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Called with what is measured, how many are done and how many there are."""


class NotFusedError(Exception):
    """The optimized graph does not run the link with the expected operators."""


def session(model: onnx.ModelProto, *, raw: bool = False, save: str = "", profile: str = "") -> ort.InferenceSession:
    """A session on one thread.

    Args:
        model: what to run.
        raw: without graph optimizations.
        save: where to write the optimized graph.
        profile: prefix of the profiler's file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if raw:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save:
        options.optimized_model_filepath = save
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimized_ops(model: onnx.ModelProto) -> list[str]:
    """Operator types onnxruntime really runs for a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "optimized.onnx"))
        session(model, save=path)
        return [node.op_type for node in onnx.load(path).graph.node]


def check_fused(link: Link) -> None:
    """Raises NotFusedError if onnxruntime does not run a link as meant.

    Every node must have become one of the expected operators, and a longer quantized chain must not hold
    more QuantizeLinear and DequantizeLinear than a short one.
    """
    integer = link.precision == "u8s8" and not link.raw
    if not link.expect and not integer:
        return
    ops = optimized_ops(link.build(SHORT))
    if link.expect and sum(op in link.expect for op in ops) != SHORT * link.nodes:
        raise NotFusedError(f"runs as {sorted(set(ops))}")
    if link.precision == "f16" and "Cast" in ops:
        raise NotFusedError("is computed in float32")
    if integer:
        longer = optimized_ops(link.build(SHORT + 1))
        boundaries = [sum(op in ("QuantizeLinear", "DequantizeLinear") for op in graph) for graph in (ops, longer)]
        if boundaries[1] > boundaries[0] + 2 * link.parallel:
            raise NotFusedError(f"stays float: {sorted(set(ops))}")


def feeds(model: onnx.ModelProto, seed: int = 1) -> dict[str, Array]:
    """Inputs that keep long chains away from infinities and denormals; indices stay inside small tables."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
        match value.type.tensor_type.elem_type:
            case TensorProto.INT64:
                made[value.name] = rng.integers(0, 4000, shape)
            case TensorProto.UINT8:
                made[value.name] = rng.integers(0, 256, shape).astype(np.uint8)
            case element_type:
                spread = 0.08 if len(shape) == 3 and value.name in "kv" else 0.1
                array = rng.standard_normal(shape) * spread + (0.0 if value.name in "kv" else 0.5)
                if value.name == "k" and len(shape) == 4:
                    array = array + 1.0
                dtype = np.float16 if element_type == TensorProto.FLOAT16 else np.float32
                made[value.name] = np.asarray(array).astype(dtype)
    return made


class Stopwatch:
    """A session with inputs and outputs bound once, so that a run is the kernels and little else."""

    def __init__(self, model: onnx.ModelProto, *, raw: bool = False, inputs: Mapping[str, Array] | None = None) -> None:
        self.session = session(model, raw=raw)
        self.binding = self.session.io_binding()
        for name, array in (feeds(model) if inputs is None else inputs).items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name)
        self.times: list[float] = []
        self.session.run_with_iobinding(self.binding)

    def run(self, repeats: int = 1) -> None:
        """Times ``repeats`` runs together."""
        start = time.thread_time()  # one thread, so what other processes take does not count
        for _ in range(repeats):
            self.session.run_with_iobinding(self.binding)
        self.times.append((time.thread_time() - start) / repeats)

    def seconds(self) -> float:
        """10th percentile of the rounds."""
        return float(np.percentile(self.times, 10))

    def spread(self) -> float:
        """(90th - 10th percentile) / median of the rounds."""
        low, middle, high = np.percentile(self.times, (10, 50, 90))
        return float((high - low) / middle) if middle > 0 else 0.0


def chain_seconds(link: Link, budget: float) -> tuple[float, float]:
    """Seconds of one link by the slope between a long and a short chain run in turns; and the spread."""
    short, long = (Stopwatch(link.build(n), raw=link.raw) for n in (SHORT, LONG))
    long.run()
    repeats = max(1, int(2e-3 / max(long.times.pop(), 1e-7)))
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(long.times) < 8:
        short.run(repeats)
        long.run(repeats)
    return (long.seconds() - short.seconds()) / (LONG - SHORT), long.spread()


def measure_link(link: Link, budget: float) -> LinkTime:
    """Times a link, less everything it stands on.

    Args:
        link: the link.
        budget: seconds of timing for it and each of those.

    Raises:
        NotFusedError: onnxruntime does not run it as meant.
    """
    check_fused(link)
    seconds, spread = chain_seconds(link, budget)
    base = link.baseline
    while base is not None:
        seconds -= chain_seconds(base, budget)[0]
        base = base.baseline
    return LinkTime(link.name, seconds, spread)


def overheads(budget: float = 0.3) -> tuple[float, float]:
    """Seconds per run and per node: the intercept and slope of chains of a trivial operator."""
    link = dataclasses.replace(unary("overhead", "f32", "Abs", (1, 4)), raw=True)
    per_node, _ = chain_seconds(link, budget)
    watch = Stopwatch(link.build(1), raw=True)
    for _ in range(200):
        watch.run(20)
    return max(watch.seconds() - per_node, 0.0), max(per_node, 0.0)


FORMS = ("f32", "wholly", "partly")
"""Names of what :func:`forms` makes."""


def forms(net: Net) -> dict[str, onnx.ModelProto]:
    """A network as it is measured: float, with all it can have as integers, and with only its products so."""
    model = net.build()
    ranges = _ranges(model, net.feed())
    return {"f32": model, "wholly": quantized(model, ranges, WHOLLY), "partly": quantized(model, ranges, PARTLY)}


def _ranges(model: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, tuple[float, float]]:
    """Lowest and highest of every float value in one run."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.output)}
    names = [o for n in model.graph.node for o in n.output if types.get(o, TensorProto.FLOAT) == TensorProto.FLOAT]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    arrays = session(probe, raw=True).run(None, feed)
    found = {n: (float(a.min()), float(a.max())) for n, a in zip(names, arrays, strict=True)}
    found.update({n: (float(a.min()), float(a.max())) for n, a in feed.items() if a.dtype == np.float32})
    return found


def measure_net(name: str, model: onnx.ModelProto, feed: dict[str, Array], budget: float) -> NetTime:
    """Times a network, then asks the profiler about its nodes."""
    watch = Stopwatch(model, inputs=feed)
    watch.run()
    watch.times.clear()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(watch.times) < 8:
        watch.run()
    return NetTime(name, watch.seconds(), watch.spread(), tuple(profiled(model, feed)))


def profiled(model: onnx.ModelProto, feed: dict[str, Array], runs: int = 20) -> Iterator[NodeTime]:
    """Seconds of every node by onnxruntime's profiler: the 20th percentile of some runs."""
    with tempfile.TemporaryDirectory() as folder:
        watched = session(model, profile=str(Path(folder, "nodes")))
        for _ in range(runs):
            watched.run(None, feed)
        events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    sizes: dict[tuple[str, str], int] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = name.removesuffix("_kernel_time"), str(event["args"]["op_name"])
            times[key].append(1e-6 * float(event["dur"]))
            shapes = event["args"].get("output_type_shape") or [{}]
            sizes[key] = int(np.prod(next(iter(shapes[0].values()), [1])))
    for (node, op_type), durations in times.items():
        each = max(1, round(len(durations) / runs))  # fused nodes may share a name
        yield NodeTime(node, op_type, each * float(np.percentile(durations, 20)), sizes[node, op_type])


def measure(
    *,
    budget: float = 0.15,
    selected: Iterable[Link] | None = None,
    nets: Iterable[Net] = (*FITTED, *CHECKED),
    machine: Mapping[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
    known: Mapping[str, LinkTime | NetTime | str] | None = None,
    keep: Callable[[LinkTime | NetTime | tuple[str, str]], None] = lambda item: None,
) -> Measurements:
    """Measures links and networks.

    Args:
        budget: seconds of timing for a link; a network gets four times as much.
        selected: links; all by default.
        nets: networks.
        machine: facts that go with the results.
        progress: called before each measurement.
        known: results of an earlier run by name, reused; of a link left out, the reason.
        keep: called with each new result, so that an interrupted run can go on.
    """
    chosen = list(links() if selected is None else selected)
    wanted = list(nets)
    total = len(chosen) + len(wanted)
    known = known or {}
    times: list[LinkTime] = []
    left_out: dict[str, str] = {}
    whole: list[NetTime] = []
    per_run, per_node = overheads()
    for done, link in enumerate(chosen):
        progress(link.name, done, total)
        if isinstance(earlier := known.get(link.name), LinkTime):
            times.append(earlier)
        elif isinstance(earlier, str):
            left_out[link.name] = earlier
        else:
            try:
                found = measure_link(link, budget)
            except NotFusedError as error:
                left_out[link.name] = str(error)
            else:
                if found.seconds > 0:
                    times.append(found)
                    keep(found)
                    continue
                left_out[link.name] = "lost in noise"
            keep((link.name, left_out[link.name]))
    for done, net in enumerate(wanted, len(chosen)):
        progress(net.name, done, total)
        names = [f"{net.name} {form}" for form in FORMS]
        earlier_nets = [known[n] for n in names if isinstance(known.get(n), NetTime)]
        if len(earlier_nets) == len(names):
            whole += [n for n in earlier_nets if isinstance(n, NetTime)]
            continue
        for form, model in forms(net).items():
            whole.append(measure_net(f"{net.name} {form}", model, net.feed(), 4 * budget))
            keep(whole[-1])
    progress("", total, total)
    return Measurements(ort.__version__, dict(machine or {}), per_run, per_node, tuple(times), tuple(whole), left_out)
