"""Measure the kernels of onnxruntime on this machine and write them as the kernels of a profile.

An operator timed alone is a poor guide to the same operator inside a model: session entry, layout changes
and cold memory weigh as much as the work. So every operator is timed as a *link* of a chain: a chain of
10 links and a chain of 2 are run in turns and one link costs ``(t10 - t2) / 8``. What both chains share
cancels out. On a set of 18 models this predicted 7 times better than operators timed alone.

The seconds of the links are then fitted, kernel by kernel, to a linear form with no negative term::

    t = ns_fixed + ns_per_mac * macs + ns_per_element * elements + ns_per_weight * weights

by non-negative least squares on the *relative* error. ``macs`` are counted with the channels rounded up to
``channel_block``; the block is the candidate that fits best.

    python benchmarks/measure_kernels.py                       # table of fit errors
    python benchmarks/measure_kernels.py --profile new.toml    # and the kernels, as TOML
    python benchmarks/measure_kernels.py --rows rows.csv       # keep the measurements
    python benchmarks/measure_kernels.py --from-rows rows.csv  # fit again without measuring

Takes about five minutes on one thread. Close everything else first.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import scipy.optimize
from onnx import TensorProto

from onnxcompress.fitting.links import Array, Chain, Link, links, unary

SHORT, LONG = 2, 10


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured link."""

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


# ---- measuring ---------------------------------------------------------------------------------------------


class NotFusedError(Exception):
    """The optimized graph does not run the link with the expected operators."""


def session(model: onnx.ModelProto, raw: bool = False, save: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if raw:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save:
        options.optimized_model_filepath = save
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimized_ops(model: onnx.ModelProto) -> list[str]:
    """Operator types onnxruntime really runs for a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder, "optimized.onnx"))
        session(model, save=path)
        return [node.op_type for node in onnx.load(path).graph.node]


def check_fused(link: Link) -> None:
    """Raise NotFusedError if the optimized graph does not run a link as meant.

    Every node must have become one of the expected operators, and a longer quantized chain must not hold
    more QuantizeLinear and DequantizeLinear than a short one.
    """
    quantized = link.precision == "u8s8" and not link.raw
    if not link.expect and not quantized:
        return
    ops = optimized_ops(link.build(SHORT))
    if link.expect and sum(op in link.expect for op in ops) != SHORT * link.nodes:
        raise NotFusedError(f"runs as {sorted(set(ops))}")
    if quantized:
        longer = optimized_ops(link.build(SHORT + 1))
        boundaries = [sum(op in ("QuantizeLinear", "DequantizeLinear") for op in graph) for graph in (ops, longer)]
        if boundaries[1] > boundaries[0] + 2 * link.parallel:
            raise NotFusedError(f"stays float: {sorted(set(ops))}")


def feeds(model: onnx.ModelProto, seed: int = 1) -> dict[str, Array]:
    """Inputs that keep long chains away from infinities and denormals; indices stay inside small tables."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        match value.type.tensor_type.elem_type:
            case TensorProto.INT64:
                made[value.name] = rng.integers(0, 4000, shape)
            case TensorProto.UINT8:
                made[value.name] = rng.integers(0, 256, shape).astype(np.uint8)
            case _:
                spread = 0.08 if len(shape) == 3 and value.name in "kv" else 0.1
                made[value.name] = (rng.standard_normal(shape) * spread + (0.0 if value.name in "kv" else 0.5)).astype(
                    np.float32
                )
                if value.name == "k" and len(shape) == 4:
                    made[value.name] += np.float32(1.0)
    return made


class Stopwatch:
    """A session with inputs and outputs bound once, so that a run is the kernels and little else."""

    def __init__(self, model: onnx.ModelProto, raw: bool) -> None:
        self.session = session(model, raw)
        self.binding = self.session.io_binding()
        for name, array in feeds(model).items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name)
        self.times: list[float] = []
        self.session.run_with_iobinding(self.binding)

    def run(self, repeats: int = 1) -> None:
        start = time.thread_time()  # one thread, so what other processes take does not count
        for _ in range(repeats):
            self.session.run_with_iobinding(self.binding)
        self.times.append((time.thread_time() - start) / repeats)

    def seconds(self) -> float:
        return float(np.percentile(self.times, 10))


def chain_seconds(link: Link, budget: float) -> float:
    """Seconds of one link by the slope between a long and a short chain, run in turns."""
    short, long = (Stopwatch(link.build(n), link.raw) for n in (SHORT, LONG))
    long.run()
    repeats = max(1, int(2e-3 / max(long.times.pop(), 1e-7)))
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(long.times) < 8:
        short.run(repeats)
        long.run(repeats)
    return (long.seconds() - short.seconds()) / (LONG - SHORT)


def link_seconds(link: Link, budget: float) -> float:
    """Seconds of a link less those of everything it stands on."""
    seconds = chain_seconds(link, budget)
    while link.baseline:
        link = link.baseline
        seconds -= chain_seconds(link, budget)
    return seconds


def measure(selected: Iterable[Link], budget: float) -> Iterator[Row]:
    """Time links, skipping those onnxruntime does not run as meant."""
    for link in selected:
        try:
            check_fused(link)
            seconds = link_seconds(link, budget)
        except NotFusedError as error:
            print("not fused:", link.kind, link.precision, link.label, error, file=sys.stderr)
            continue
        if seconds <= 0:
            print("lost in noise:", link.kind, link.precision, link.label, file=sys.stderr)
            continue
        if link.kind == "boundary":  # a pair; which of the two pays for the layout cannot be told
            half = dataclasses.replace(row(link, seconds / 2), nodes=1, elements=link.elements // 2)
            yield from (dataclasses.replace(half, kind=kind) for kind in ("quantize", "dequantize"))
        else:
            yield row(link, seconds)


def row(link: Link, seconds: float) -> Row:
    return Row(
        link.kind,
        link.precision,
        link.label,
        link.nodes,
        link.macs,
        *link.channels,
        link.elements,
        link.weights,
        link.patches,
        link.on,
        seconds,
    )


def overheads(budget: float = 0.3) -> tuple[float, float]:
    """Seconds per run and per node: the intercept and slope of chains of a trivial operator."""
    link = unary("overhead", "f32", "Abs", (1, 4))
    link = dataclasses.replace(link, raw=True)
    per_node = chain_seconds(link, budget)
    watch = Stopwatch(link.build(1), True)
    for _ in range(200):
        watch.run(20)
    return max(watch.seconds() - per_node, 0.0), max(per_node, 0.0)


PRODUCERS = ("Conv", "Gemm", "MatMul", "ConvTranspose", "Add", "Mul", "AveragePool", "LayerNormalization")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")
"""Activations cheap enough to be called free when fused; a fused Sigmoid still costs its exponentials."""

WITH_CONSTANT = ("Add", "Mul", "BatchNormalization")


def fusions() -> Iterator[tuple[str, str, list[str]]]:
    """(precision, producer, consumers that vanish from the optimized graph when they follow it)."""
    for precision in ("f32", "u8s8"):
        for producer in PRODUCERS:
            shapes: list[tuple[int, ...]] = (
                [(8, 32), (2, 8, 32)] if producer in ("MatMul", "LayerNormalization") else [(1, 32, 8, 8)]
            )
            shapes = [(8, 32)] if producer == "Gemm" else shapes
            consumers = (*ACTIVATIONS, *WITH_CONSTANT)
            gone = [c for c in consumers if all(_vanishes(precision, producer, c, shape) for shape in shapes)]
            if precision == "f32" and producer == "Conv" and _pad_vanishes():
                gone.append("Pad")
            if gone:
                yield precision, producer, gone


def _pad_vanishes() -> bool:
    def emit(chain: Chain, x: str) -> str:
        padded = chain.op("Pad", [x, chain.const(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))])
        return chain.op("Conv", [padded, chain.const(chain.normal(32, 32, 3, 3))])

    return "Pad" not in optimized_ops(Link("fusion", "f32", "", emit, (1, 32, 8, 8)).build(1))


def _vanishes(precision: str, producer: str, consumer: str, shape: tuple[int, ...]) -> bool:
    quantized = precision == "u8s8"
    flat = len(shape) < 4

    def produce(chain: Chain, v: str) -> str:
        if producer in ("Conv", "ConvTranspose"):
            name, scale = chain.weight(chain.normal(32, 32, 3, 3, std=0.06), 0, quantized)
            return chain.op(producer, [v, name, chain.bias(32, scale, quantized)], pads=[1] * 4)
        if producer in ("Gemm", "MatMul"):
            name, scale = chain.weight(chain.normal(32, 32, std=0.2), 1, quantized)
            return chain.op(producer, [v, name, *([chain.bias(32, scale, quantized)] if producer == "Gemm" else [])])
        if producer == "LayerNormalization":
            return chain.op(producer, [v, chain.const(np.ones(32, np.float32))])
        if producer == "AveragePool":
            return chain.op(producer, [v], kernel_shape=[3, 3], pads=[1] * 4)
        return chain.op(producer, [v, v])

    def emit(chain: Chain, x: str) -> str:
        v = produce(chain, chain.dequantize(x) if quantized else x)
        match consumer:
            case "Clip":
                v = chain.op(consumer, [v, chain.const(np.float32(0)), chain.const(np.float32(3))])
            case "Add" | "Mul":
                v = chain.op(consumer, [v, chain.const(np.full((32,) if flat else (32, 1, 1), 1.5, np.float32))])
            case "BatchNormalization":
                v = chain.op(consumer, [v, *(chain.const(np.full(32, 0.7, np.float32)) for _ in range(4))])
            case _:
                v = chain.op(consumer, [v])
        if not quantized:
            return v
        # The grid a quantizer gives a value that has been rectified: 0 is its lowest point.
        return chain.op("QuantizeLinear", [v, chain.const(np.float32(3 / 255)), chain.const(np.uint8(0))])

    try:
        ops = optimized_ops(Link("fusion", precision, "", emit, shape).build(1))
    except Exception as error:  # an operator this runtime refuses is simply not fused
        print(f"fusion {precision} {producer}+{consumer}: {error}", file=sys.stderr)
        return False
    layout = ("ReorderInput", "ReorderOutput", "Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear")
    left = [op for op in ops if op not in layout]
    return len(left) == 1 and (not quantized or left[0].startswith("Q"))


# ---- fitting -----------------------------------------------------------------------------------------------


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


def fits(rows: Sequence[Row], per_node: float, cache_bytes: int = 0) -> tuple[list[Fit], float]:
    """All kernels, and the nanoseconds that a byte of weights costs on top if it comes from memory.

    A chain whose weights exceed the cache runs at the speed of memory, one that fits does not. Kernels are
    fitted to chains that fit (all of them if ``cache_bytes`` is 0); what the others take longer than their
    kernel says is the cost of memory, of which the median is given.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        groups.setdefault((r.kind, r.precision, r.on), []).append(r)
    found: list[Fit] = []
    extra: list[float] = []
    for group in groups.values():
        cold = [r for r in group if 0 < cache_bytes < LONG * weight_bytes(r)]
        warm = [r for r in group if r not in cold]
        if len(warm) < 4:
            cold, warm = [], group
        found.append(fit(warm, per_node))
        extra += [1e9 * (r.seconds - predict(found[-1], r, per_node)) / weight_bytes(r) for r in cold]
    return found, max(0.0, float(np.median(extra))) if extra else 0.0


def weight_bytes(r: Row) -> int:
    return r.weights * (4 if r.precision == "f32" else 1)


def predict(f: Fit, r: Row, per_node: float) -> float:
    """Seconds of a link by a fit."""
    ns = (
        f.fixed * r.nodes
        + f.per_mac * padded_macs(r, f.channel_block)
        + f.per_element * r.elements
        + f.per_weight * r.weights
        + f.per_patch * r.patches
    )
    return per_node * r.nodes + 1e-9 * ns * (1.0 if aligned(r, f.aligned_to) else f.misaligned_factor)


def usable_cache() -> int:
    """Half of the last-level cache in bytes, as other cores use it too; 0 if it cannot be told (Linux only)."""
    sizes = sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return int(sizes[-1].read_text().strip().removesuffix("K")) * 1024 // 2 if sizes else 0


STANDS_FOR = {
    ("move", "u8s8"): ("Concat", "Slice", "Split", "Expand", "Tile", "DepthToSpace"),
    ("softmax", "u8s8"): ("Softmax",),
    ("gather", "u8s8"): ("Gather",),
    ("MaxPool", "f32"): ("MaxPool", "pool"),
}
"""Which kernels of a profile a measured link prices, if not the one it is named after.

Families are priced in float only, as a family has members that onnxruntime keeps float (Pad, LogSoftmax).
"""


def toml(found: Sequence[Fit], fused: Iterable[tuple[str, str, list[str]]]) -> str:
    """The ``[[kernel]]`` and ``[[fusion]]`` tables of a profile."""
    lines: list[str] = []
    for precision in ("f32", "u8s8"):
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
    for precision, op_type, absorbed in fused:
        rules = {
            "": [n for n in absorbed if n not in (*WITH_CONSTANT, "Pad")],
            "constant_operand = true": [n for n in absorbed if n in WITH_CONSTANT],
            'side = "before"': [n for n in absorbed if n == "Pad"],
        }
        for condition, names in rules.items():
            if names:
                quoted = ", ".join(f'"{n}"' for n in names)
                lines += ["[[fusion]]", f'op = "{op_type}"', f"absorbs = [{quoted}]", f'precision = "{precision}"']
                lines += [condition, ""] if condition else [""]
    return "\n".join(lines)


def read_rows(path: pathlib.Path) -> list[Row]:
    types = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{k: types[k](v) for k, v in record.items()}) for record in csv.DictReader(file)]


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(r) for r in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds to measure, separated by commas")
    parser.add_argument("--precision", default="", help="measure one precision only")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds of timing per link")
    parser.add_argument("--rows", type=pathlib.Path, help="write the measurements as CSV")
    parser.add_argument("--from-rows", type=pathlib.Path, help="fit measurements written by --rows")
    parser.add_argument("--profile", type=pathlib.Path, help="write the kernels as TOML")
    parser.add_argument(
        "--cache-bytes", type=int, help="cache that weights may stay in; half the last level's if not given"
    )
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    start = time.perf_counter()
    if arguments.from_rows:
        rows = read_rows(arguments.from_rows)
        per_run, per_node = (
            next(r.seconds for r in rows if r.kind == "per_run"),
            next(r.seconds for r in rows if r.kind == "per_node"),
        )
    else:
        per_run, per_node = overheads()
        chosen = [
            k
            for k in links()
            if (not only or k.kind in only) and (not arguments.precision or k.precision == arguments.precision)
        ]
        rows = list(measure(chosen, arguments.budget))
        rows += [
            Row(kind, "f32", "", 1, 0, 0, 0, 0, 0, 0, "any", s)
            for kind, s in (("per_run", per_run), ("per_node", per_node))
        ]
    if arguments.rows:
        write_rows(arguments.rows, rows)
    cache = usable_cache() if arguments.cache_bytes is None else arguments.cache_bytes
    found, per_byte = fits([r for r in rows if not r.kind.startswith("per_")], per_node, 3 * cache // 2)
    print(
        f"onnxruntime {ort.__version__}: {per_run * 1e9:.0f} ns per run, {per_node * 1e9:.0f} ns per node, "
        f"{per_byte:.3f} ns per weight byte beyond {cache} bytes"
    )
    print(
        f"{'kind':18}{'on':5}{'precision':10}{'n':>3}{'mean':>7}{'worst':>7}{'GMAC/s':>9}{'ns/el':>9}{'ns/w':>9}"
        f"{'ns/patch':>9}{'fixed ns':>10}{'block':>6}{'align':>9}"
    )
    for f in found:
        rate = f"{1 / f.per_mac:.1f}" if f.per_mac else "-"
        print(
            f"{f.kind:18}{f.on:5}{f.precision:10}{f.points:3}{f.mean_error:7.0%}{f.worst_error:7.0%}{rate:>9}{f.per_element:9.4f}{f.per_weight:9.4f}"
            f"{f.per_patch:9.4f}{f.fixed:10.0f}{f.channel_block:6}{f.aligned_to:5}x{f.misaligned_factor:.1f}"
        )
    if arguments.profile:
        overhead = f"[overhead]\nns_per_run = {per_run * 1e9:.0f}\nns_per_node = {per_node * 1e9:.0f}\n\n"
        if per_byte:
            overhead += f"[memory]\ncache_bytes = {cache}\nns_per_byte = {per_byte:.3f}\n\n"
        arguments.profile.write_text(overhead + toml(found, fusions()))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
