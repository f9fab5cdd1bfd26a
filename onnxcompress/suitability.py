"""Whether a file runs on a device and fits it, and in what words that is said.

A device that runs integers only cannot run what stayed float, and one with a list of operators runs no others;
such nodes have no price, so without a word about them the file would look faster the less of it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from onnxcompress.base import Precision
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.data import Feed
from onnxcompress.execution import Execution, float_name
from onnxcompress.profile import Profile
from onnxcompress.report import OnDevice, Stranded
from onnxcompress.view import GraphView
from onnxcompress.work import Shapes

__all__ = ["on_device", "remarks", "stranded"]

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
"""Where integers begin and end. Between two integer kernels they are no nodes, at the model's ends the host's."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_NAMED = 3


def on_device(
    model: ir.Model, profile: Profile, feed: Feed, file_bytes: int, reasons: Mapping[str, str]
) -> OnDevice | None:
    """What becomes of a file on a device; None if its profile sets no limits.

    Args:
        model: what is in the file.
        profile: the device.
        feed: an input, for the shapes.
        file_bytes: size of the file.
        reasons: by node, why it was left as it is, where that is known.
    """
    limits = profile.limits
    if limits is None and not profile.quantization.required:
        return None
    view, shapes = GraphView(model), value_shapes(model, feed)
    execution = Execution(profile, view, shapes)
    found = _stranded(execution, reasons)
    cost = CostModel(profile).model(view, shapes)
    return OnDevice(
        runs=not found,
        cannot_run=found,
        nodes=sum(1 for _ in _kernels(execution)),
        predicted_ms=1e3 * cost.seconds,
        file_bytes=file_bytes,
        flash_bytes=None if limits is None else limits.flash_bytes,
        peak_activation_bytes=cost.peak_activation_bytes,
        ram_bytes=None if limits is None else limits.ram_bytes,
    )


def stranded(view: GraphView, profile: Profile, shapes: Shapes) -> tuple[Stranded, ...]:
    """Nodes the device cannot run, in execution order.

    Args:
        view: the model, float or quantized.
        profile: the device.
        shapes: concrete shapes by value name.
    """
    return _stranded(Execution(profile, view, shapes), {})


def _stranded(execution: Execution, reasons: Mapping[str, str]) -> tuple[Stranded, ...]:
    profile, target = execution.profile, execution.profile.target()
    found: list[Stranded] = []
    for node in _kernels(execution):
        work, precision, reason = execution.work(node), execution.precision(node), ""
        kernel = profile.kernel(work.kind, precision, op_type=float_name(node.op_type), maps=work.maps)
        if not target.allows(float_name(node.op_type)):
            reason = f"the device does not run {node.op_type}"
        elif target.required and precision != Precision.STATIC and _is_float(node):
            reason = reasons.get(str(node.name)) or "it is float, and the device runs integers only"
        elif precision == Precision.STATIC and kernel is None:
            reason = f"the profile has no {precision} kernel for {node.op_type}"
        if reason:
            found.append(Stranded(str(node.name), node.op_type, reason))
    return tuple(found)


def _kernels(execution: Execution) -> Iterator[ir.Node]:
    """Nodes that are the runtime's to run, but for conversions."""
    for node in execution.view.nodes():
        if node.op_type not in _CONVERSIONS and execution.runs(node):
            yield node


def _is_float(node: ir.Node) -> bool:
    """Whether it computes on floats; a Shape does not look at what it reads."""
    values = node.outputs if node.op_type in ("Shape", "Size") else (*node.inputs[:1], *node.outputs)
    return any(v is not None and v.dtype in (*_FLOATS, None) for v in values)


# --- in words -----------------------------------------------------------------------------------


def remarks(what: OnDevice | None, profile: Profile, *, dropped: str, synthetic: bool) -> tuple[list[str], list[str]]:
    """Notes and warnings for a report.

    Args:
        what: of the file.
        profile: the device.
        dropped: why the best plan that was built was not kept; empty if one was, or none was built.
        synthetic: there was no real data.
    """
    notes: list[str] = []
    if what is None:
        return [], []
    warnings = list(_not_running(what, profile, dropped, synthetic))
    for name, used, room, memory in (
        ("the file takes", what.file_bytes, what.flash_bytes, "flash"),
        ("activations take at most", what.peak_activation_bytes, what.ram_bytes, "RAM"),
    ):
        if room is not None and used > room:
            warnings.append(f"it does not fit: {name} {_size(used)}, and {profile.name} has {_size(room)} of {memory}")
        elif room is not None:
            notes.append(f"{name} {_size(used)} of {_size(room)} of {memory}; the program needs room besides")
    return notes, warnings


def _not_running(what: OnDevice, profile: Profile, dropped: str, synthetic: bool) -> Iterator[str]:
    if what.runs:
        return
    required = profile.quantization.required
    kinds = ", ".join(f"{n} {op}" for op, n in Counter(s.op for s in what.cannot_run).most_common())
    names = ", ".join(repr(s.node) for s in what.cannot_run[:_NAMED])
    more = ", ..." if len(what.cannot_run) > _NAMED else ""
    yield (
        f"{'not fully integer: ' if required else ''}{profile.name} cannot run {len(what.cannot_run)} of {what.nodes} "
        f"nodes of the file ({kinds}: {names}{more}). Where its runtime has a host CPU they fall to that, and perhaps "
        "what follows them; where not, the file does not run: choose another profile, or a model without them. "
        f"The rest is predicted to take {what.predicted_ms:.3g} ms"
    )
    if any(s.op == "Shape" for s in what.cannot_run):
        yield "the file computes shapes at run time: if inputs have dynamic dimensions, export it with fixed ones"
    if required and dropped:
        yield (
            f"the all-integer model was built and not kept, nor was any part of it. At best: {dropped}. Allow that, or "
            "calibrate on more data"
        )
    if required and synthetic:
        yield f"{profile.name} runs integers only, and their scales need ranges of real data: give calibration data"


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"
