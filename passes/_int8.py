"""What the three int8 forms share: where weights sit, along which axes they have scales, gates.

Symmetric weights: w ~ s q with q in [-Q, Q], Q = 2^(bits-1) - 1, one s per output channel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.ranges import weight_scales
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import RangeMethod
from onnxcompress.view import GraphView

__all__ = [
    "ActivationOptions",
    "Int8Options",
    "WeightOptions",
    "activation_inputs",
    "calibrated_name",
    "channel_axes",
    "fused_activation",
    "gate",
    "gate_on_top",
    "keep_calibrated_name",
    "quantize_tensor",
    "quantize_weight",
    "remembered",
    "remembered_for",
    "weight_indices",
]

_WEIGHTS: dict[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1,),
    "MatMul": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
}
_CALIBRATED = "onnxcompress.int8.calibrated_name"
_GATED = "onnxcompress.gated"
_FUSED = ("Relu", "Clip")
_BEFORE_FUSED = ("Conv", "Gemm", "Add")

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class WeightOptions:
    """How weights become integers: scales per output channel or one, bits used, range search."""

    per_channel: bool
    bits: int
    method: RangeMethod


@dataclass(frozen=True)
class ActivationOptions:
    """How activations become integers: u8, or s8 if ``signed``; ``symmetric``: with the zero point in the middle."""

    signed: bool = False
    symmetric: bool = False

    @property
    def dtype(self) -> ir.DataType:
        """Type of the integers."""
        return ir.DataType.INT8 if self.signed else ir.DataType.UINT8

    @property
    def least(self) -> int:
        """The smallest integer; the largest is 255 above it."""
        return -128 if self.signed else 0


@dataclass(frozen=True)
class Int8Options:
    """How anything becomes integers on a device."""

    weights: WeightOptions
    activations: ActivationOptions


def weight_indices(node: ir.Node) -> tuple[int, ...]:
    """Inputs of a node that hold weights when they are constant."""
    return tuple(i for i in _WEIGHTS.get(node.op_type, ()) if i < len(node.inputs) and node.inputs[i] is not None)


def activation_inputs(node: ir.Node, view: GraphView | None = None) -> tuple[ir.Value, ...]:
    """Inputs that carry data computed at run time: all operands of Add, Mul, Sub and Concat, else the first."""
    inputs = node.inputs if node.op_type in ("Add", "Mul", "Sub", "Concat") else node.inputs[:1]
    if node.op_type == "Gather":
        inputs = ()
    return tuple(v for v in inputs if v is not None and not v.is_initializer())


def fused_activation(node: ir.Node, view: GraphView) -> ir.Node | None:
    """The Relu or Clip that runs inside the integer kernel: rounding to u8 clips anyway."""
    if node.op_type not in _BEFORE_FUSED or len(node.outputs) != 1 or view.is_output(node.outputs[0]):
        return None
    uses = view.consumers(node.outputs[0])
    if len(uses) != 1 or uses[0][0].op_type not in _FUSED or uses[0][1] != 0 or uses[0][0].graph is not node.graph:
        return None
    return uses[0][0]


def channel_axes(node: ir.Node, index: int, rank: int) -> tuple[int, ...]:
    """Axes of the weight at ``index`` along which scales may differ without leaving the product's sum."""
    if node.op_type == "Conv":
        return (0,)
    if node.op_type == "ConvTranspose":
        return (1,)
    if node.op_type == "MatMul":
        return (rank - 1,) if rank >= 2 else ()
    if node.op_type == "Gemm":
        return (0,) if node.attributes.get_int("transB", 0) else (1,)
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return (0, 1)
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 and rank >= 2:
        return (0,)
    return ()


def quantize_tensor(
    tensor: ir.TensorProtocol, axes: tuple[int, ...], options: WeightOptions
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """:func:`quantize_weight` of a tensor, remembered with it: clones share tensors, and trials repeat."""
    return remembered(
        tensor, f"onnxcompress.int8.{axes}.{options}", lambda array: quantize_weight(array, axes, options)
    )


def remembered(tensor: ir.TensorProtocol, key: str, make: Callable[[npt.NDArray[Any]], _Made]) -> _Made:
    """What is made of a tensor, once: clones share tensors, and trials repeat."""
    if key not in tensor.meta:
        tensor.meta[key] = make(tensor.numpy())
        if isinstance(tensor, ir.ExternalTensor):  # or every page of the file stays in memory
            with contextlib.suppress(BufferError):  # somebody else is reading it: it stays mapped
                tensor.release()
    made: _Made = tensor.meta[key]
    return made


def remembered_for(
    tensor: ir.TensorProtocol, key: str, about: object, make: Callable[[npt.NDArray[Any]], _Made]
) -> _Made:
    """As :func:`remembered`, of what was made with one thing last: another one makes it anew."""
    known = tensor.meta.get(key)
    if known is None or known[0]() is not about:
        known = ref(about), make(tensor.numpy())
        tensor.meta[key] = known
    made: _Made = known[1]
    return made


def quantize_weight(
    array: npt.NDArray[Any], axes: tuple[int, ...], options: WeightOptions, floor: npt.NDArray[Any] | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Integers and scales of a weight.

    Args:
        array: float32 weight.
        axes: axes that have their own scales; empty for a single scale.
        options: bits and search.
        floor: smallest scale allowed per channel (keeps an int32 bias from overflowing).

    Returns:
        int8 of the shape of ``array``; float32 scales, shape of ``array`` with the other axes 1.
    """
    axes = axes if options.per_channel else ()
    scales = weight_scales(array, axes or None, bits=options.bits, method=options.method)
    scales = np.asarray(scales, np.float32).reshape([n if i in axes else 1 for i, n in enumerate(array.shape)])
    if floor is not None:
        scales = np.maximum(scales, floor.reshape(scales.shape) if floor.size == scales.size else floor.max())
    scales = scales.astype(np.float32)
    top = 2 ** (options.bits - 1) - 1
    quantized = np.empty(array.shape, np.int8)
    step = max(1, 4_000_000 // max(1, array[:1].size)) if array.ndim else 1
    for start in range(0, len(array), step):  # in pieces, so a big table needs no second copy of itself
        part = slice(start, start + step)
        scale = scales[part] if scales.shape[0] > 1 else scales
        quantized[part] = np.clip(np.rint(array[part] / scale), -top, top).astype(np.int8)
    return quantized, scales


def calibrated_name(value: ir.Value) -> str:
    """Name a value had in calibration: of what is read behind a Q/DQ pair or a gate, that of what went in."""
    return str(value.meta.get(_CALIBRATED, value.name))


def keep_calibrated_name(new: ir.Value, old: ir.Value) -> None:
    """Notes that ``new`` stands for ``old``; to be called before either is renamed."""
    new.meta[_CALIBRATED] = calibrated_name(old)


def gate(
    rewriter: Rewriter,
    value: ir.Value,
    distorted: ir.Value,
    switch: ir.Value,
    edits: int,
    *,
    only: Sequence[ir.Node] | None = None,
) -> ir.Value:
    """Makes readers of ``value`` see ``distorted`` where the switch is on.

    Args:
        rewriter: of the model.
        value: what they read now.
        distorted: what they shall read, made by the nodes added since the log had ``edits`` entries;
            these run only where the switch is on.
        switch: boolean scalar.
        edits: see above.
        only: just these readers.

    Returns:
        What they read from now on.
    """
    nodes = rewriter.nodes_since(edits)
    mixed = rewriter.only_if(switch, distorted, nodes, value)
    keep_calibrated_name(mixed, value)
    rewriter.replace_uses(value, mixed, only=only, keep=[*nodes, *_identities(value)])
    return mixed


def gate_on_top(
    rewriter: Rewriter, value: ir.Value, switch: ir.Value, make: Callable[[ir.Value, str], ir.Value]
) -> None:
    """A gate on what a node makes, behind the gates that are there already.

    Args:
        rewriter: of the model.
        value: output of a node.
        switch: boolean scalar.
        make: adds nodes behind what is read now, of which it gets the calibrated name, too, and returns what is to be
            read instead.
    """
    top = rewriter.find(str(value.meta.get(_GATED, value.name))) or value
    edits = len(rewriter.log)
    distorted = make(top, calibrated_name(top))
    value.meta[_GATED] = gate(rewriter, top, distorted, switch, edits).name


def _identities(value: ir.Value) -> list[ir.Node]:
    """Readers that hand a value on unchanged: the other side of a gate."""
    return [use.node for use in value.uses() if use.node.op_type == "Identity"]
