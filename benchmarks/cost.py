"""How well a profile of this machine predicts real models it was not fitted to.

    ONNXCOMPRESS_ZOO=folder python -m benchmarks.cost [--profile host-x86-vnni] [--keep folder] [--json out.json]

Three tables. *Models*: every model of the zoo, in float, quantized by onnxruntime (static, everything it can) and by
onnxcompress; seconds predicted against seconds measured on one thread (10th percentile). *Layers*: every
distinct convolution and matrix product of those models as a link of a chain, float and int8: is the sign of "int8 is
faster" predicted right where the true ratio is outside 0.9 to 1.1? *Speed*: seconds to price a model of 5,000
nodes, and to price it again after one shape changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

import onnxcompress as library
import onnxcompress.model as models
from benchmarks.producers import first_line, ort_static
from benchmarks.tasks import TASKS, BenchmarkError, Feed, Feeds, zoo_folder
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import Costing, CostModel
from onnxcompress.fitting.equations import seen
from onnxcompress.fitting.links import Link, beside, conv, matmul
from onnxcompress.fitting.measuring import LONG, SHORT, NotFusedError, chain_seconds, check_fused, feeds
from onnxcompress.profile import load_profile
from onnxcompress.view import GraphView
from onnxcompress.work import shape_of

FORMS = ("fp32", "static", "onnxcompress")
EXTRA = {"nmp": "x/basic_pitch-*/**/nmp.onnx"}
"""Models without a score here; inputs are noise, which costs the same."""


@dataclass
class ModelRow:
    """A model in one form; ``error`` if it could not be made or run."""

    model: str
    form: str
    measured_ms: float | None = None
    predicted_ms: float | None = None
    note: str = ""

    @property
    def error(self) -> float | None:
        """Relative, above zero if predicted too slow."""
        if self.measured_ms is None or self.predicted_ms is None:
            return None
        return self.predicted_ms / self.measured_ms - 1


@dataclass
class LayerRow:
    """A layer: how many times as fast int8 is, measured and predicted."""

    layer: str
    measured: float
    predicted: float

    @property
    def decided(self) -> bool:
        """The truth is far enough from 1 for its sign to mean something."""
        return not 0.9 <= self.measured <= 1.1

    @property
    def right(self) -> bool:
        """The sign is predicted."""
        return (self.measured > 1) == (self.predicted > 1)


# --- models ---------------------------------------------------------------------------------------------


def sources(names: list[str]) -> Iterator[tuple[str, Path, Feeds]]:
    """Models with feeds: those of the tasks, and the extra ones."""
    for name in names:
        if name in TASKS:
            yield name, TASKS[name].path, TASKS[name].feeds(8)
            continue
        found = sorted(zoo_folder().glob(EXTRA[name]))
        if not found:
            raise BenchmarkError(f"no {EXTRA[name]} in the zoo folder: run its fetch.sh")
        yield name, found[0], Feeds(lambda path=found[0]: iter([_noise(path)] * 2))  # type: ignore[misc]


def _noise(path: Path) -> Feed:
    rng = np.random.default_rng(0)
    inputs = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()
    shapes = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in inputs}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def produce(form: str, path: Path, output: Path, data: Feeds, profile: str) -> None:
    """Writes one form of a model."""
    if form == "fp32":
        shutil.copyfile(path, output)
    elif form == "static":
        ort_static(path, output, data, profile)
    else:  # by prediction alone, so that no measurement corrects what is judged here
        library.optimize(path, profile=profile, calibration=data, output=output, timing=False)


def measured(path: Path, feed: Feed, budget: float = 1.5) -> float:
    """Seconds of a run on one thread: 10th percentile."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 8:
        start = time.thread_time()
        session.run(None, feed)
        times.append(time.thread_time() - start)
    return float(np.percentile(times, 10))


def whole(names: list[str], profile: str, folder: Path) -> Iterator[ModelRow]:
    """Rows of the first table."""
    cost = CostModel(load_profile(profile))
    for name, path, data in sources(names):
        feed = next(iter(data))
        for form in FORMS:
            row = ModelRow(name, form)
            output = folder / f"{name}.{form}.onnx"
            try:
                if not output.exists():
                    produce(form, path, output, data, profile)
                model = models.load(output)
                shapes = value_shapes(model, feed, bodies=True)
                row.measured_ms = 1e3 * measured(output, feed)
                row.predicted_ms = 1e3 * cost.model(GraphView(model), shapes).seconds
            except Exception as error:  # a model a rival breaks is a row, not the end
                row.note = first_line(error)
            print(f"{name:10}{form:14}{_ms(row.measured_ms)}{_ms(row.predicted_ms)}{_percent(row.error)}  {row.note}")
            yield row


def _ms(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.3f}"


def _percent(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:+8.0%}"


# --- layers ---------------------------------------------------------------------------------------------


def layers(names: list[str], folder: Path) -> dict[str, tuple[Link, Link]]:
    """Every distinct convolution and product of the float models as a pair of links, float and int8."""
    found: dict[str, tuple[Link, Link]] = {}
    for name, path, data in sources(names):
        model = models.load(folder / f"{name}.fp32.onnx" if (folder / f"{name}.fp32.onnx").exists() else path)
        shapes = value_shapes(model, next(iter(data)))
        view = GraphView(model)
        for node in view.nodes(subgraphs=False):
            made = [_as_link(node, view, shapes, precision) for precision in ("f32", "u8s8")]
            if made[0] is not None and made[1] is not None:
                found.setdefault(made[0].label, (made[0], made[1]))
    return found


def _as_link(node: ir.Node, view: GraphView, shapes: dict[str, tuple[int, ...]], precision: str) -> Link | None:
    if node.op_type not in ("Conv", "MatMul", "Gemm") or view.weight(node.inputs[1]) is None:  # type: ignore[arg-type]
        return None
    data, weight = (shape_of(view, shapes, v) for v in node.inputs[:2])  # type: ignore[arg-type]
    if data is None or weight is None:
        return None
    if node.op_type == "Conv":
        if len(data) != 4 or data[0] != 1:
            return None
        stride = node.attributes.get("strides")
        group = node.attributes.get("group")
        steps = (1, 1) if stride is None else tuple(stride.as_ints())
        groups = 1 if group is None else group.as_int()
        kernel = (weight[2], weight[3])
        if steps == (1, 1) and kernel[0] == kernel[1] and kernel[0] % 2 and data[1] > 4:  # there and back again
            return conv("conv", precision, data[1], weight[0], data[2], kernel[0], groups, data[3])
        return beside(precision, data[1], weight[0], (data[2], data[3]), kernel, stride=steps, group=groups)
    turned = node.attributes.get("transB")
    k, n = weight[-2:] if turned is None or not turned.as_int() else weight[:-3:-1]
    rows = int(np.prod(data)) // k
    # A link goes there and back, and so has both products; of very wide ones too much memory.
    return None if max(k, n) > 8192 or rows * k * n > 4e8 else matmul(precision, rows, k, n)


def compared(pairs: dict[str, tuple[Link, Link]], profile: str, budget: float) -> Iterator[LayerRow]:
    """Rows of the second table."""
    device = load_profile(profile)
    for label, pair in sorted(pairs.items()):
        seconds, predicted = [], []
        try:
            for link in pair:
                check_fused(link)
                seconds.append(chain_seconds(link, budget)[0])
                totals = []
                for count in (LONG, SHORT):
                    proto = link.build(count)
                    totals.append(_predicted(proto, device))
                predicted.append((totals[0] - totals[1]) / (LONG - SHORT))
        except NotFusedError as error:
            print(f"{label}: left out, {error}")
            continue
        if min(seconds) > 2e-6:  # below, a slope is noise
            yield LayerRow(label, seconds[0] / seconds[1], predicted[0] / predicted[1])


def _predicted(proto: onnx.ModelProto, device: Any) -> float:
    return CostModel(device).model(*seen(proto, feeds(proto))).seconds


# --- speed ----------------------------------------------------------------------------------------------


def speed(profile: str, nodes: int = 5000) -> dict[str, float]:
    """Seconds to price a model of many nodes, and to price it again after one shape changed."""
    view, shapes = seen(_long(nodes), {"x": np.zeros((1, 16, 28, 28), np.float32)})
    start = time.perf_counter()
    costing = Costing(CostModel(load_profile(profile)), view, shapes)
    costing.cost()
    first = time.perf_counter() - start
    start = time.perf_counter()
    costing.reshaped({"v100": (1, 16, 14, 14)}).cost()
    return {"nodes": float(len(view.nodes())), "seconds": first, "again": time.perf_counter() - start}


def _long(nodes: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.standard_normal((16, 16, 3, 3), np.float32), "w")
    made = []
    for i in range(nodes):
        source, target = "x" if i == 0 else f"v{i - 1}", f"v{i}"
        if i % 2 == 0:
            made.append(onnx.helper.make_node("Conv", [source, "w"], [target], f"n{i}", pads=[1, 1, 1, 1]))
        else:
            made.append(onnx.helper.make_node("Relu", [source], [target], f"n{i}"))
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 16, 28, 28))
    output = onnx.helper.make_tensor_value_info(f"v{nodes - 1}", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(made, "long", [value], [output], [weight])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


# --- report ---------------------------------------------------------------------------------------------


def verdicts(rows: list[ModelRow], signs: list[LayerRow], timed: dict[str, float]) -> dict[str, Any]:
    """Figures to reach, and what was reached."""
    errors = [abs(r.error) for r in rows if r.error is not None]
    decided = [r for r in signs if r.decided]
    found: dict[str, Any] = {}
    if errors:
        found["median error (<= 10 %)"] = round(statistics.median(errors), 4)
        found["mean error (<= 15 %)"] = round(statistics.fmean(errors), 4)
    for form in FORMS:
        own = [abs(r.error) for r in rows if r.form == form and r.error is not None]
        if own:
            found[f"{form}: median, mean"] = (round(statistics.median(own), 4), round(statistics.fmean(own), 4))
    if decided:
        found["layers, decided, right"] = (len(signs), len(decided), sum(r.right for r in decided))
        found["sign right (>= 95 %)"] = round(sum(r.right for r in decided) / len(decided), 4)
        logs = [abs(np.log(r.predicted / r.measured)) for r in signs]
        found["int8 ratio: median error"] = round(float(np.expm1(np.median(logs))), 4)
    found |= {f"speed: {k}": round(v, 3) for k, v in timed.items()}
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="host-x86-vnni", help="name or TOML file")
    parser.add_argument("--models", default=",".join([*(t for t in TASKS if t != "lm"), *EXTRA]), help="by commas")
    parser.add_argument("--keep", type=Path, help="folder for the models that are made, used again if there")
    parser.add_argument("--skip", default="", help="tables to leave out, by commas: models, layers, speed")
    parser.add_argument("--budget", type=float, default=0.06, help="seconds of timing for a layer")
    parser.add_argument("--json", type=Path, help="also write everything as JSON")
    arguments = parser.parse_args()
    names, skip = arguments.models.split(","), arguments.skip.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [] if "models" in skip else list(whole(names, arguments.profile, folder))
        pairs = {} if "layers" in skip else layers(names, folder)
        signs = list(compared(pairs, arguments.profile, arguments.budget))
    for row in sorted(signs, key=lambda r: r.measured):
        wrong = "" if not row.decided or row.right else "  WRONG"
        print(f"{row.layer:40} int8 {row.measured:6.2f}x measured {row.predicted:6.2f}x predicted{wrong}")
    timed = {} if "speed" in skip else speed(arguments.profile)
    found = verdicts(rows, signs, timed)
    for what, value in found.items():
        print(f"{what:32} {value}")
    if arguments.json:
        document = {"models": [asdict(r) for r in rows], "layers": [asdict(r) for r in signs], "verdicts": found}
        arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
