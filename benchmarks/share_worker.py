"""One measured step of ``benchmarks.share`` in a process of its own.

make CANDIDATE TASK OUTPUT SAMPLES METRIC_SAMPLES PROFILE EXTRA
size MODEL BEST
score TASK MODEL LIMIT
load MODEL ROUND
speed TASK SAMPLES OPTIONS
classes MODEL
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import zstandard

from benchmarks.measure import session, status_bytes
from benchmarks.scale import applied
from benchmarks.share_data import BLOCKS, SCORE, evaluate
from benchmarks.share_makers import MAKERS, PASS, Request
from benchmarks.tasks import TASKS
from benchmarks.worker import run_step
from benchmarks.zoo import size_of
from onnxcompress import model as models
from onnxcompress.view import GraphView

LEVEL, BEST_LEVEL = 3, 19
_SMALL = 256
"""Constants with fewer elements are codebooks, scales, biases and shapes."""


def make(
    candidate: str, task: str, output: str, samples: str, metric_samples: str, profile: str, extra: str
) -> dict[str, Any]:
    """One smaller model."""
    return MAKERS[candidate](Request(task, Path(output), int(samples), int(metric_samples), profile, extra))


def size(model: str, best: str) -> dict[str, Any]:
    """Bytes of a model with all files beside it; compressed well, too, where that is asked for."""
    folder = Path(model).parent
    raw, packed = size_of(folder, LEVEL)
    return {"raw": raw, "zstd3": packed, "zstd19": size_of(folder, BEST_LEVEL)[1] if best == "best" else None}


def score(task: str, model: str, limit: str) -> dict[str, Any]:
    """The task's score on samples nobody planned with, and of parts of them."""
    return evaluate(TASKS[task], Path(model), SCORE, int(limit), blocks=BLOCKS)


def load(model: str, number: str) -> dict[str, Any]:
    """Seconds and resident memory of making a session; nothing else is imported in between."""
    before, start = status_bytes("VmRSS"), time.perf_counter()
    held = session(Path(model))
    seconds = time.perf_counter() - start
    after, peak = status_bytes("VmRSS"), status_bytes("VmHWM")
    del held
    return {"seconds": seconds, "megabytes": (after - before) / 1e6, "peak_megabytes": (peak - before) / 1e6}


def speed(task: str, samples: str, options: str) -> dict[str, Any]:
    """All weights of a model clustered and written, to the current folder."""
    return applied(task, Path("shared.onnx"), int(samples), f"{PASS}{{{options}}}")


def classes(model: str) -> dict[str, Any]:
    """Bytes of a file by what they hold, plain and compressed class by class."""
    loaded = models.load(model)
    held: dict[str, list[bytes]] = defaultdict(list)
    view = GraphView(loaded)
    for value in view.weights():
        tensor = value.const_value
        if tensor is None:
            continue
        readers = sorted({use.node.op_type for use in value.uses()})
        large = tensor.size >= _SMALL
        kind = f"{str(tensor.dtype).lower()}, " + ("+".join(readers) if large else f"below {_SMALL} elements")
        held[kind].append(tensor.tobytes())
    total = sum(f.stat().st_size for f in Path(model).parent.iterdir())
    rows = {kind: _packed(b"".join(parts)) for kind, parts in held.items()}
    inside = sum(raw for raw, _ in rows.values())
    return {"classes": rows, "graph": [total - inside, _packed(_without_weights(Path(model)))[1]]}


def _packed(data: bytes) -> tuple[int, int]:
    return len(data), len(zstandard.ZstdCompressor(level=LEVEL).compress(data))


def _without_weights(model: Path) -> bytes:
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
    return bytes(proto.SerializeToString())


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "make": make,
    "size": size,
    "score": score,
    "load": load,
    "speed": speed,
    "classes": classes,
}


if __name__ == "__main__":
    raise SystemExit(run_step(STEPS))
