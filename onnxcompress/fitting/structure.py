"""What a profile for onnxruntime's CPU provider is made of, before there are any numbers.

Which kernels are told apart, what vanishes into what, and which operators keep the blocked layout are facts of the
runtime, the same on every processor; they were read from optimized graphs of onnxruntime 1.32 and its
``nchwc_transformer.cc``. What each costs is measured.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Literal

from onnxcompress.profile_schema import Profile
from onnxcompress.profile_tables import Cache, Fusion, Kernel, Layout

__all__ = ["CAREFUL", "STANDS_FOR", "structure"]

_CONV = ("conv", "conv_pointwise", "conv_depthwise", "conv_grouped", "conv_stem")
_PRODUCT = ("matmul", "matmul_rows1")
_FLOAT = (
    "free", "move", "pool", "reduce", "normalization", "softmax", "transcendental", "elementwise", "gather", "quantize",
    "dequantize", "lstm", "gru", "conv_transpose", "matmul_dynamic", "resize_linear", "reorder", "Add", "Mul", "Div",
    "Sqrt", "Neg", "Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Exp", "Log", "Erf",
    "Gelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Transpose", "Resize", "BatchNormalization",
)  # fmt: skip
_ON_MAPS = ("Add", "Mul", "Sigmoid", "quantize", "dequantize")
_BLOCKED = (
    "Add", "Mul", "Sigmoid", "Tanh", "Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "MaxPool", "AveragePool",
    "GlobalAveragePool", "BatchNormalization", "Resize",
)  # fmt: skip
_INTEGER = (
    "free", "matmul_dynamic", "gather", "softmax", "Add", "Mul", "Sigmoid", "LeakyRelu", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Transpose", "Resize", "Concat", "move",
)  # fmt: skip
_HALF = ("free", *_CONV[:3], *_PRODUCT, "elementwise", "Sigmoid")
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish")
_CARRIES = (
    "Relu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "BatchNormalization", "Resize", "Upsample",
    "GlobalAveragePool", "GlobalMaxPool",
)  # fmt: skip

CAREFUL = frozenset({*_CONV, "MaxPool", "AveragePool"})
"""Kinds whose price depends on how many channels there are beyond their work."""

STANDS_FOR: dict[tuple[str, str], tuple[str, ...]] = {
    ("move", "u8s8"): ("Slice", "Split", "Expand", "Tile", "DepthToSpace"),
    ("softmax", "u8s8"): ("Softmax",),
    ("gather", "u8s8"): ("Gather",),
}
"""Operators a measured family prices, where it has members that onnxruntime does not run so (Pad, LogSoftmax)."""


def structure(
    caches: Sequence[Cache], *, block: int, precisions: Sequence[str], contrib_ops: bool = True, threads: int = 1
) -> Profile:
    """A profile without prices.

    Args:
        caches: levels of the cache that matter, nearest first.
        block: channels of a block of the blocked layout; 0 if the runtime has none here.
        precisions: what was measured.
        contrib_ops: ``com.microsoft`` operators run.
        threads: of the runtime.
    """
    kernels = [Kernel(kind=kind, precision="f32") for kind in (*_CONV, *_PRODUCT, *_FLOAT)]
    kernels += [Kernel(kind=kind, precision="f32", on="maps") for kind in _ON_MAPS]
    if block:
        kernels += [Kernel(kind=kind, precision="f32", on="blocked") for kind in _BLOCKED]
    if "u8s8" in precisions:
        kernels += [Kernel(kind=kind, precision="u8s8") for kind in (*_CONV, *_PRODUCT, *_INTEGER)]
        kernels += [Kernel(kind=kind, precision="u8s8", on="maps") for kind in ("Add", "Mul", "Sigmoid")]
    if "dynamic" in precisions:
        kernels += [Kernel(kind=kind, precision="dynamic") for kind in (*_PRODUCT, "lstm")]
    blocks: tuple[Literal["w8", "w4"], ...] = ("w8", "w4")
    for precision in blocks:
        if precision in precisions:
            kernels += [Kernel(kind=kind, precision=precision) for kind in _PRODUCT]
    if "f16" in precisions:
        kernels += [Kernel(kind=kind, precision="f16") for kind in _HALF]
    tables: dict[str, Any] = {
        "schema": 2,
        "name": "structure",
        "description": "kernels without prices",
        "device": {"cpu": "", "cores": 1, "frequency_ghz": 1.0},
        "provenance": {"status": "measured", "method": "", "source": "", "date": datetime.date(2026, 1, 1)},
        "runtime": {"name": "onnxruntime", "version": "", "threads": threads, "contrib_ops": contrib_ops},
        "quantization": {"activation": "u8", "weight_bits": 8, "per_channel": True, "channel_multiple": max(block, 1)},
        "overhead": {"ns_per_run": 0.0, "ns_per_node": 0.0},
        "kernel": kernels,
        "fusion": _fusions("u8s8" in precisions, bool(block)),
        "cache": list(caches),
    }
    if block:
        tables["layout"] = Layout(
            block=block,
            align=4,
            starts=("Conv", "MaxPool", "AveragePool"),
            carries=_CARRIES,
            joins=("Add", "Sum", "Mul", "Concat"),
            source="nchwc_transformer.cc of onnxruntime",
        )
    return Profile.model_validate(tables)


def _fusions(integers: bool, blocked: bool) -> list[Fusion]:
    """Constants go into weights for nothing; other operands cost what is left of them."""
    taken = _ACTIVATIONS if blocked else tuple(op for op in _ACTIVATIONS if op != "HardSwish")
    found = [
        Fusion(op="Conv", absorbs=("Add", "Mul", "BatchNormalization"), constant_operand=True),
        Fusion(op="Conv", absorbs=(*taken, *(("Add",) if blocked else ()))),
        Fusion(op="Conv", absorbs=("Pad",), side="before"),
        Fusion(op="ConvTranspose", absorbs=("BatchNormalization",), constant_operand=True),
        Fusion(op="MatMul", absorbs=("Add",), constant_operand=True),
        Fusion(op="Gemm", absorbs=("Relu", "LeakyRelu", "Sigmoid", "Tanh")),
        Fusion(op="Sigmoid", absorbs=("Mul",), same_operand=True),
        Fusion(op="Erf", absorbs=("Div",), side="before"),
        Fusion(op="Erf", absorbs=("Add", "Mul")),
    ]
    if integers:
        ops = ("Conv", "Gemm", "MatMul", "Add", "Mul", "AveragePool")
        found += [Fusion(op=op, absorbs=("Relu", "Clip"), precision="u8s8") for op in ops]
        found.append(Fusion(op="MatMul", absorbs=("Add",), precision="u8s8", constant_operand=True))
    return found
