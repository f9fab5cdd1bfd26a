"""Ways to store a model's weights in fewer bits: this project's and others', each as its own documentation advises."""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.producers import first_line, prepare
from benchmarks.share_data import metric
from benchmarks.tasks import TASKS
from onnxcompress import Budget, Result, optimize, registry

__all__ = ["BY_HAND", "DOWNLOAD", "MAKERS", "MIXED", "NBITS", "ONNXSIM", "OURS", "PASS", "SIZE", "Request"]

SIZE, DOWNLOAD, MIXED, BY_HAND = "ours size", "ours download", "ours size+latency", "ours 4 bits by hand"
ONNXSIM, NBITS = "onnxsim k-means", "onnxruntime 4-bit"
OURS = (SIZE, DOWNLOAD, MIXED, BY_HAND)

PASS = "share_weights"
MAX_DROP = 0.008
NO_FLOOR = -1000.0
BLOCK = 32
"""Weights that have a scale in onnxruntime's 4-bit form."""
_SAID = 160

_ONNXSIM = """
import sys
import onnx, onnxsim
model = onnx.load(sys.argv[1])
made = onnxsim.quantize_weight_only_kmeans(model)
if len(made.graph.node) == len(model.graph.node):
    model, _ = onnxsim.simplify(model)
    made = onnxsim.quantize_weight_only_kmeans(model)
    print("after its simplify, for as it is nothing was stored otherwise")
onnx.save(made, sys.argv[2])
"""


@dataclass(frozen=True)
class Request:
    """What is to be made.

    Attributes:
        task: whose model.
        output: file to write.
        samples: of calibration; 0 for none.
        metric_samples: of the lot to plan with; 0 for all.
        profile: hardware profile.
        extra: options of the pass where it is named by hand; the interpreter that has onnxsim.
    """

    task: str
    output: Path
    samples: int
    metric_samples: int
    profile: str
    extra: str


Maker = Callable[[Request], dict[str, Any]]


def planned(target: str) -> Maker:
    """This project, told what to aim at and to lose at most 1 % of the task's own metric."""

    def make(request: Request) -> dict[str, Any]:
        task = TASKS[request.task]
        result = optimize(
            task.path,
            target=target,
            budget=Budget(max_drop=MAX_DROP),
            metric=metric(task, request.metric_samples),
            calibration=task.feeds(request.samples),
            profile=request.profile,
            timing=False,  # what is slower has to show, not to be replaced by the input
            output=request.output,
        )
        return _summary(result)

    return make


def by_hand(request: Request) -> dict[str, Any]:
    """Every tensor in four bits."""
    options = ",".join(filter(None, ("bits=4", request.extra)))
    task = TASKS[request.task]
    result = optimize(
        task.path,
        passes=[registry.parse(f"{PASS}{{{options}}}")],
        budget=Budget(min_sqnr_db=NO_FLOOR),
        calibration=task.feeds(request.samples) if request.samples else None,
        profile=request.profile,
        timing=False,
        output=request.output,
    )
    return _summary(result)


def onnxsim_kmeans(request: Request) -> dict[str, Any]:
    """By onnxsim 0.8.1: MatMul and Gemm, one codebook of 16 a tensor, an index in each byte of its own."""
    command = [request.extra, "-c", _ONNXSIM, str(TASKS[request.task].path), str(request.output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise RuntimeError(f"onnxsim: {said[:_SAID]}")
    return {"remark": (done.stdout.strip().splitlines() or [""])[-1][:_SAID]}


def matmul_nbits(request: Request) -> dict[str, Any]:
    """Blocked 4 bits, by onnxruntime: MatMul, and embedding tables where it can."""
    import onnx
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    from benchmarks.measure import session

    def quantize(model: Path, *ops: str) -> bool:
        config = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, bits=4, quant_format=QuantFormat.QOperator, op_types_to_quantize=ops
        )
        quantizer = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(request.output))
        session(request.output)
        return any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node)

    def attempt(model: Path) -> tuple[bool, str]:
        try:
            return quantize(model, "MatMul", "Gather"), ""
        except Exception as error:  # the rival's own failure; its user would leave tables alone
            return quantize(model, "MatMul"), f"MatMul only, as with Gather it raised {first_line(error)}"

    source = TASKS[request.task].path
    changed, remark = attempt(source)
    if not changed:
        with tempfile.TemporaryDirectory() as folder:
            prepared, how = prepare(source, Path(folder))
            _, remark = attempt(prepared)
        remark = "; ".join(filter(None, ("pre-processed, for as it is nothing was stored otherwise", how, remark)))
    return {"remark": remark}


def _summary(result: Result) -> dict[str, Any]:
    report = result.report
    changed = Counter(s.pass_name for s in report.sites if s.decision != "keep")
    kinds = Counter(s.decision for s in report.sites if s.decision != "keep" and s.pass_name == PASS)
    said = ", ".join(f"{n} {name}" for name, n in changed.most_common())
    stored = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(4))
    return {"remark": f"{report.outcome}; {said or 'nothing changed'}" + (f" ({stored})" if stored else "")}


MAKERS: dict[str, Maker] = {
    SIZE: planned("size"),
    DOWNLOAD: planned("download"),
    MIXED: planned("latency=1,size=1"),
    BY_HAND: by_hand,
    ONNXSIM: onnxsim_kmeans,
    NBITS: matmul_nbits,
}
