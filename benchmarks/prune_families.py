"""Half of every free group removed: generated families and the zoo's models, here and by onnxsim.

A removal counts when onnxruntime loads and runs the file, inputs and outputs are declared as before,
outputs have the shapes they had, and weights take exactly the bytes that the sizes of axes say.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.measure import session
from benchmarks.producers import first_line
from benchmarks.tasks import TASKS, Feed
from onnxcompress import Budget, optimize
from onnxcompress import model as models
from onnxcompress.calibrate import value_shapes
from onnxcompress.coupling import Coupling, Group, kept_positions, remove
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.passes.prune_channels import Criterion, PruneChannels
from onnxcompress.rewrite import Rewriter
from onnxcompress.view import GraphView

Mask = npt.NDArray[np.bool_]

WIDTHS = {
    "vit": 192, "gpt_gqa": 256, "bert": 256, "bilstm": 128, "shufflenet_v2": 128, "grouped": 128,
    "c2f_detector": 32, "vgg": 32,
}  # fmt: skip
WIDTH = 64
RATIO = 0.5
_NO_FLOOR = Budget(min_sqnr_db=-1000.0)
_SIMILAR = 1e-3

_ONNXSIM = """
import json, sys
import onnx, onnxsim
model = onnx.load(sys.argv[1])
if sys.argv[3] == "simplified":
    model, _ = onnxsim.simplify(model)
onnx.save(onnxsim.apply_structured_pruning(model, sparsity=float(sys.argv[4])), sys.argv[2])
"""


@dataclass
class Removal:
    """What came of one way to remove half.

    Attributes:
        ratio: float weight bytes left, as a share; None where it failed.
        sites: groups cut.
        problem: why it does not count; empty when it does.
    """

    ratio: float | None = None
    sites: int | None = None
    problem: str = ""

    @property
    def unchanged(self) -> bool:
        """Whether no weight got smaller."""
        return self.ratio is not None and abs(1 - self.ratio) < _SIMILAR

    @property
    def smaller(self) -> bool:
        """Whether weights take less in all; copies for readers that keep different positions count."""
        return self.ratio is not None and self.ratio < 1 - _SIMILAR


def subjects(zoo: bool) -> list[str]:
    """Families, and the zoo's models."""
    return [*FAMILIES, *(TASKS if zoo else ())]


def examine(name: str, onnxsim: str, samples: int, profile: str) -> dict[str, Any]:
    """One model, all ways."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, feeds = _subject(name, folder, samples)
        feed = feeds[0]
        loaded = models.load(path)
        view = GraphView(loaded)
        coupling = Coupling(view, value_shapes(loaded, dict(feed), bodies=True))
        free = [g for g in coupling.groups if not g.pinned]
        row: dict[str, Any] = {
            "model": name,
            "nodes": len(view.nodes()),
            "groups": len(coupling.groups),
            "free": len(free),
            "weight_bytes": _float_bytes(loaded),
            "file_bytes": path.stat().st_size,
        }
        before = _Original(path, feeds[:2])
        direct, predicted = _direct(loaded, coupling, folder / "direct.onnx", before)
        row["predicted"] = predicted
        row["direct"] = asdict(direct)
        for criterion in (Criterion.AUTO, Criterion.RANDOM):
            row[criterion.value] = asdict(_optimized(path, feeds, criterion, folder, before, profile))
        if onnxsim:
            for form in ("as it is", "simplified"):
                row[f"onnxsim {form}"] = asdict(_by_onnxsim(onnxsim, form, path, folder, before))
        return row


def _subject(name: str, folder: Path, samples: int) -> tuple[Path, list[Feed]]:
    if name in TASKS:
        return TASKS[name].path, list(islice(TASKS[name].feeds(samples), samples))
    path = folder / f"{name}.onnx"
    onnx.save(FAMILIES[name](WIDTHS.get(name, WIDTH)), path)
    return path, list(family_feeds(name, samples))


# --- the ways --------------------------------------------------------------------------------------


def _direct(model: ir.Model, coupling: Coupling, output: Path, before: _Original) -> tuple[Removal, float | None]:
    """Any half of every free group, on the file as it is; also the share of bytes the axes say will be left."""
    keeps = half(coupling)
    size = _float_bytes(model)
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    try:
        predicted = _predicted_bytes(model, coupling, keeps)
        remove(coupling, keeps, rewriter)
        rewriter.drop_unused_weights()
        models.save(copy, output)
        left = _float_bytes(copy)
        problem = before.problem_of(output)
    except Exception as error:  # a model that cannot be cut is a row, not a crash
        return Removal(problem=first_line(error)), None
    if not problem and left != predicted:
        problem = f"{left} bytes left, {predicted} predicted"
    return Removal(left / size, len(keeps), problem), predicted / size


def half(coupling: Coupling, seed: int = 0) -> dict[Group, Mask]:
    """Keeps any half of the atoms that are free; no tensor is left empty."""
    rng = np.random.default_rng(seed)
    keeps: dict[Group, Mask] = {}
    for group in coupling.groups:
        free = np.flatnonzero(~group.fixed)
        keep = np.ones(group.size, bool)
        keep[rng.permutation(free)[: round(RATIO * len(free))]] = False
        for part in group.parts:
            if not keep[part.atoms].any():
                keep[part.atoms[0]] = True
        if not keep.all():
            keeps[group] = keep
    return keeps


def _predicted_bytes(model: ir.Model, coupling: Coupling, keeps: Mapping[Group, Mask]) -> int:
    """Bytes of float weights when every axis has the size its groups give it.

    A weight whose readers keep different positions becomes one for each.
    """
    cuts: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for axis, positions in kept_positions(coupling, keeps).items():
        if axis.dim >= 0:
            cuts[axis.value][axis.use][axis.dim] = len(positions)
    total = 0
    for value in GraphView(model).weights():
        tensor = value.const_value
        if tensor is None or not _is_float(value):
            continue
        shape, uses = list(tensor.shape.numpy()), cuts.get(str(value.name), {})
        copies = {use: cut for use, cut in uses.items() if use}
        whole = len(value.uses()) > len(copies) or not copies
        for cut in (*([uses.get("", {})] if whole else []), *copies.values()):
            total += prod(cut.get(d, n) for d, n in enumerate(shape)) * int(tensor.dtype.itemsize)
    return total


def _optimized(
    path: Path, feeds: list[Feed], criterion: Criterion, folder: Path, before: _Original, profile: str
) -> Removal:
    """By the pass, which also refits what reads a group; the graph is normalised first."""
    output = folder / f"{criterion.value}.onnx"
    pass_ = PruneChannels(ratio=RATIO, multiple=1, criterion=criterion)
    try:
        result = optimize(
            path, passes=[pass_], budget=_NO_FLOOR, calibration=feeds, profile=profile, timing=False, output=output
        )
    except Exception as error:
        return Removal(problem=first_line(error))
    size = _float_bytes(models.load(path))
    cut = sum(s.pass_name == pass_.name and s.decision != "keep" for s in result.report.sites)
    dropped = next((r.reason for r in result.report.passes if r.name == pass_.name and r.outcome == "dropped"), "")
    return Removal(_float_bytes(result.model) / size, cut, dropped or before.problem_of(output))


def _by_onnxsim(python: str, form: str, path: Path, folder: Path, before: _Original) -> Removal:
    output = folder / "onnxsim.onnx"
    output.unlink(missing_ok=True)
    command = [python, "-c", _ONNXSIM, str(path), str(output), form, str(RATIO)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        return Removal(problem="took more than 600 s")
    if not output.is_file():
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Removal(problem=said[-1][:160])
    sizes = [_float_bytes(models.load(p)) for p in (path, output)]
    return Removal(sizes[1] / sizes[0], None, before.problem_of(output))


# --- judging ---------------------------------------------------------------------------------------


class _Original:
    """What a smaller file is held against."""

    def __init__(self, path: Path, feeds: list[Feed]) -> None:
        self._feeds = feeds
        self._signature = _signature(path)
        self._shapes = _outputs(path, feeds)

    def problem_of(self, path: Path) -> str:
        """Why a file does not count; empty when it does."""
        try:
            if _signature(path) != self._signature:
                return "inputs or outputs changed"
            shapes = _outputs(path, self._feeds)
        except Exception as error:  # whatever onnxruntime says about it is the finding
            return first_line(error)
        wrong = [name for name, shape in shapes.items() if self._shapes.get(name) != shape]
        return f"another shape of {wrong[0]!r}" if wrong else ""


def _signature(path: Path) -> list[tuple[str, str, str]]:
    loaded = session(path)
    return [(v.name, v.type, str(v.shape)) for v in (*loaded.get_inputs(), *loaded.get_outputs())]


def _outputs(path: Path, feeds: list[Feed]) -> dict[str, Any]:
    loaded: ort.InferenceSession = session(path)
    fixed = {v.name for v in loaded.get_outputs() if v.shape and all(isinstance(d, int) for d in v.shape)}
    shapes: dict[str, Any] = {}
    for i, feed in enumerate(feeds):
        for out, array in zip(loaded.get_outputs(), loaded.run(None, feed), strict=True):
            # The number of boxes a detector finds depends on its weights; only the rank does not.
            shapes[f"{out.name}:{i}"] = array.shape if out.name in fixed else np.ndim(array)
    return shapes


def _float_bytes(model: ir.Model) -> int:
    tensors = {id(v): v.const_value for v in GraphView(model).weights() if _is_float(v)}
    return sum(t.nbytes for t in tensors.values() if t is not None)


def _is_float(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


# --- table -----------------------------------------------------------------------------------------

HEADER = (
    "model", "nodes", "groups", "free", "MB", "predicted", "any half", "auto", "random", "cut", "onnxsim",
    "onnxsim after simplify",
)  # fmt: skip


def line(row: dict[str, Any]) -> list[object]:
    """A row as the table shows it: shares of the float weights' bytes left."""
    if row.get("error"):
        return [row["model"], *["-"] * 9, "", row["error"]]
    direct, auto, rival = row["direct"], row["auto"], row.get("onnxsim as it is")
    predicted = row["predicted"]
    return [
        row["model"], row["nodes"], row["groups"], row["free"], f"{row['file_bytes'] / 1e6:.2f}",
        None if predicted is None else f"{predicted:.3f}", _cell(direct), _cell(auto), _cell(row["random"]),
        auto["sites"], "not installed" if rival is None else _cell(rival),
        "not installed" if rival is None else _cell(row["onnxsim simplified"]),
    ]  # fmt: skip


def _cell(removal: dict[str, Any]) -> str:
    found = Removal(**removal)
    if found.ratio is None:
        return "fails"
    return f"{found.ratio:.3f}" + (
        " BROKEN" if found.problem else " no-op" if found.unchanged else "" if found.smaller else " LARGER"
    )


def problems(row: dict[str, Any]) -> list[str]:
    """What the table only hints at."""
    ways = ("direct", "auto", "random", "onnxsim as it is", "onnxsim simplified")
    return [f"* {row['model']} {w}: {row[w]['problem']}" for w in ways if row.get(w, {}).get("problem")]


def good(row: dict[str, Any]) -> bool:
    """Whether our three ways all count and all made it smaller where anything is free."""
    if row.get("error"):
        return False
    ways = [Removal(**row[w]) for w in ("direct", "auto", "random")]
    return all(not w.problem and (not row["free"] or w.smaller) for w in ways)


def dump(row: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(row)
