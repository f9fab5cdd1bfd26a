"""What a pass may know of a device: what it can run, never what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """The abilities of a device and its runtime.

    Attributes:
        name: the profile it comes from.
        activation: integer type of quantized activations the runtime is fast with.
        activation_symmetric: activations need the zero point in the middle: 0 of s8, 128 of u8.
        weight_bits: bits an int8 weight may use; 7 where u8 x s8 products saturate 16-bit sums
            (x86 without VNNI), so that weights stay within -64..63.
        per_channel: weights may have a scale per output channel.
        channel_multiple: channel counts worth keeping to; others are padded or fall off a fast path.
        contrib_ops: ``com.microsoft`` operators run.
        max_opset: newest ONNX opset the runtime reads; None if that is no limit.
        required: integers only: whatever is not quantized does not run on the device.
        folds_constants: the runtime computes constant nodes once, at load.
        float32: some float32 kernel runs.
        float16: some float16 kernel runs.
        weight_only_bits: widths of block-quantized weights that run with float activations (MatMulNBits).
        ops: operator types that run; empty means any.
        kernels: what runs how: (kernel kind or operator type, precision).
    """

    name: str
    activation: Literal["u8", "s8"] = "u8"
    activation_symmetric: bool = False
    weight_bits: int = 8
    per_channel: bool = True
    channel_multiple: int = 1
    contrib_ops: bool = True
    max_opset: int | None = None
    required: bool = False
    folds_constants: bool = True
    float32: bool = True
    float16: bool = False
    weight_only_bits: tuple[int, ...] = ()
    ops: frozenset[str] = frozenset()
    kernels: frozenset[tuple[str, str]] = frozenset()

    def has(self, kind: str, precision: str) -> bool:
        """Whether an operator type ("HardSwish") or kernel kind ("conv_depthwise") runs at a precision.

        An operator of several kinds ("Conv") counts as running if one of its kinds does.

        >>> Target("t", kernels=frozenset({("Add", "u8s8")})).has("HardSwish", "u8s8")
        False
        """
        return (kind, precision) in self.kernels

    def allows(self, op_type: str) -> bool:
        """Whether the device runs an operator type at all.

        >>> Target("t", ops=frozenset({"Conv"})).allows("LSTM"), Target("t").allows("LSTM")
        (False, True)
        """
        return not self.ops or op_type in self.ops
