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
        weight_bits: bits an int8 weight may use; 7 where u8 x s8 products saturate 16-bit sums
            (x86 without VNNI), so that weights stay within -64..63.
        per_channel: weights may have a scale per output channel.
        channel_multiple: channel counts worth keeping to; others are padded or fall off a fast path.
        contrib_ops: ``com.microsoft`` operators run.
        kernels: what runs how: (kernel kind or operator type, precision).
    """

    name: str
    activation: Literal["u8", "s8"] = "u8"
    weight_bits: int = 8
    per_channel: bool = True
    channel_multiple: int = 1
    contrib_ops: bool = True
    kernels: frozenset[tuple[str, str]] = frozenset()

    def has(self, kind: str, precision: str) -> bool:
        """Whether an operator type ("HardSwish") or kernel kind ("conv_depthwise") runs at a precision.

        An operator of several kinds ("Conv") counts as running if one of its kinds does.

        >>> Target("t", kernels=frozenset({("Add", "u8s8")})).has("HardSwish", "u8s8")
        False
        """
        return (kind, precision) in self.kernels
