"""A node done otherwise: with fewer channels or lower rank, what that would cost, and what its time goes to.

Everything is asked of the cost model by trying: a count of channels is a step because the price falls
there, whatever it is in the profile that makes it fall.

    fewer channels   out -> c: MACs, weights and what is written shrink in proportion
    rank r           (K x out) = (K x r)(r x out), two nodes. Of a k x k convolution (channel SVD):
                     k x k to r channels, then 1 x 1 to all; K = input channels times taps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from onnxcompress.cost import CostModel
from onnxcompress.findings import Option, Verdict
from onnxcompress.work import NodeWork

__all__ = [
    "GAINS",
    "LOSES",
    "ChannelStep",
    "break_even",
    "channel_options",
    "channel_step",
    "duration",
    "factors",
    "fewer",
    "full_rank",
    "impossible",
    "option",
    "rank_options",
    "spent_on",
    "times",
]

GAINS, LOSES = 1.05, 0.95

_DENSE = ("conv", "conv_pointwise", "conv_stem", "matmul", "matmul_rows1")
_LOOK = 64
"""Counts of channels tried downwards; block sizes of kernels are smaller."""
_STEP = 1.5
"""A drop of as much as this many average channels cost is a step."""
_PADS = (2, 4, 8, 16, 32, 64)
"""Multiples tried upwards."""
_FEWEST = 8
"""Matrices of lower rank are not worth factors."""
_TOO_FEW = 8
"""A rank below this part of the full one is of no use."""


def option(kind: str, detail: str, now: float, then: float, why: str, keeps: float = 1.0) -> Option:
    """An option of a layer that takes ``now`` seconds and would take ``then``."""
    ratio = now / then if then > 0 else 1.0
    verdict: Verdict = "gains" if ratio >= GAINS else "loses" if ratio <= LOSES else "same"
    return Option(kind, detail, then, ratio, verdict, why, keeps)


def impossible(kind: str, detail: str, why: str) -> Option:
    return Option(kind, detail, None, None, "impossible", why)


def times(ratio: float) -> str:
    """A ratio in two digits.

    >>> times(2.94), times(0.561), times(0.998), times(12.3)
    ('2.9x', '0.56x', '1.0x', '12x')
    """
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(1.24e-5), duration(0.0123), duration(3e-7)
    ('12 us', '12 ms', '0.3 us')
    """
    value, unit = (1e3 * seconds, "ms") if seconds >= 0.9995e-3 else (1e6 * seconds, "us")
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"


def spent_on(cost: CostModel, work: NodeWork, precision: str) -> dict[str, float]:
    """Shares of a node's time, 0..1, most first: what it would save without each part of its work.

    ``arithmetic`` for multiply-accumulates, ``activations`` for data read and written, ``weights`` for
    reading weights from the cache, ``memory`` for what they cost more because they come from memory,
    ``dispatch`` for what is left with no work at all. Empty if the device cannot run the node.
    """

    def price(what: NodeWork, model: CostModel = cost) -> float:
        return model.node(what, precision) or 0.0

    now = price(work)
    memory = now - price(work, replace(cost, traffic_bytes=0))
    still = replace(work, elements_in=0, elements_out=0, patches=0, segments=0, segments_nhwc=0)
    parts = {
        "arithmetic": now - price(replace(work, macs=0)),
        "activations": now - price(still),
        "weights": now - price(replace(work, weights=0)) - memory,
        "memory": memory,
        "dispatch": price(replace(still, macs=0, weights=0)),
    }
    total = sum(max(p, 0.0) for p in parts.values())
    shares = {name: max(part, 0.0) / total for name, part in parts.items()} if total > 0 else {}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


# --- channels -----------------------------------------------------------------------------------


def fewer(work: NodeWork, channels: int) -> NodeWork:
    """The node with this many output channels (per group). What it reads stays, but that of a depthwise one."""
    share = channels / work.out_channels
    reads = share if work.kind == "conv_depthwise" else 1.0
    return replace(
        work,
        out_channels=channels,
        macs=round(work.macs * share),
        weights=round(work.weights * share),
        params=round(work.params * share),
        elements_in=round(work.elements_in * reads),
        segments=round(work.segments * reads),
        segments_nhwc=round(work.segments_nhwc * reads),
        elements_out=round(work.elements_out * share),
    )


@dataclass(frozen=True)
class ChannelStep:
    """Where the price steps when channels are taken away or added.

    Attributes:
        count: channels now.
        below: the next lower count at which the price steps down, but not below half; None if none is near.
        between: (least, most) seconds of the counts between; None if there are none.
        above: a higher count that is cheaper than the present one; None if there is none.
    """

    count: int
    below: int | None
    between: tuple[float, float] | None
    above: int | None


def channel_step(price: Callable[[int], float], count: int) -> ChannelStep:
    """Looks for steps around a count of channels.

    Args:
        price: seconds at a count.
        count: channels now.

    Example:
        >>> channel_step(lambda c: 16.0 * -(-c // 16), 64)
        ChannelStep(count=64, below=48, between=(64.0, 64.0), above=None)
        >>> channel_step(lambda c: float(c), 64).below is None
        True
    """
    now = last = price(count)
    passed: list[float] = []
    below = None
    for fewer_ in range(count - 1, max(count - _LOOK, count // 2) - 1, -1):
        seconds = price(fewer_)
        if last - seconds >= _STEP * now / count and seconds < now:
            below = fewer_
            break
        passed.append(seconds)
        last = seconds
    padded = sorted({-(-count // m) * m for m in _PADS} - {count})
    above = min((c for c in padded if price(c) < LOSES * now), key=price, default=None)
    between = (min(passed), max(passed)) if passed and below is not None else None
    return ChannelStep(count, below, between, above)


def channel_options(cost: CostModel, work: NodeWork, precision: str, now: float) -> list[Option]:
    """A layer with fewer channels: the next step, half of them, and more where that is faster.

    Args:
        cost: prices of the device.
        work: of the node that has the channels.
        precision: how it runs.
        now: seconds of the whole layer.
    """
    count = work.out_channels
    rest = now - (cost.node(work, precision) or 0.0)

    def price(channels: int) -> float:
        return rest + (cost.node(fewer(work, channels), precision) or 0.0)

    def at(channels: int, why: str) -> Option:
        return option("channels", f"{channels} of {count}", now, price(channels), why, channels / count)

    step = channel_step(price, count)
    options = []
    with_it = "only together with the layer it reads" if work.kind == "conv_depthwise" else ""
    if step.below is not None:
        options.append(at(step.below, "; ".join(filter(None, (_between(step, now), with_it)))))
    half = count // 2
    if half not in (0, step.below):
        flat = price(half) > LOSES * now
        smooth = f"{half} channels cost the same" if flat else with_it or "no steps: each channel saves its share"
        options.append(at(half, "" if options else smooth))
    if step.above is not None:
        options.append(at(step.above, f"{step.above} channels take less time than {count}: more can be faster"))
    return options


def _between(step: ChannelStep, now: float) -> str:
    """What the counts between the present one and the step are worth."""
    if step.between is None or step.below is None:
        return ""
    least, most = step.between
    low, high = step.below + 1, step.count - 1
    span = f"{low} to {high} channels" if low < high else f"{low} channels"
    if most > now / LOSES:
        return f"{span} cost up to {times(most / now)} as much as {step.count}"
    if least >= LOSES * now:
        return f"{span} cost the same as {step.count}"
    return f"{span} save at most {1 - least / now:.0%}"


# --- rank ---------------------------------------------------------------------------------------


def full_rank(work: NodeWork) -> int:
    """Rank of the node's weight seen as a matrix; 0 if it is no dense matrix."""
    if work.kind not in _DENSE or not (work.weights and work.macs and work.elements_out and work.out_channels):
        return 0
    return min(work.macs // work.elements_out, work.out_channels)


def factors(work: NodeWork, rank: int) -> tuple[NodeWork, NodeWork]:
    """The two nodes a dense one becomes at a rank; the bias goes with the second."""
    out, inner = work.out_channels, work.macs // work.elements_out
    rows = work.elements_out // out
    bias = max(work.params - inner * out, 0)
    product = work.kind.startswith("matmul")
    first = replace(
        work, out_channels=rank, macs=rows * inner * rank, weights=inner * rank, params=inner * rank,
        elements_out=rows * rank,
    )  # fmt: skip
    second = replace(
        work, kind=work.kind if product else "conv_pointwise", in_channels=rank, macs=rows * rank * out,
        weights=rank * out + bias, params=rank * out + bias, elements_in=rows * rank, patches=rows * rank,
        segments=work.segments if product else rows, segments_nhwc=work.segments_nhwc if product else rows,
    )  # fmt: skip
    return first, second


def break_even(price: Callable[[int], float], full: int, now: float) -> int:
    """Largest rank at which two factors cost no more than the node; 0 if there is none.

    Ranks are tried by bisection in multiples of a power of two (16 for large matrices), the ones
    anybody would choose.

    Example:
        >>> break_even(lambda r: 2.0 * r, full=384, now=384.0)
        192
    """
    step = 1
    while step < 16 and step * 2 * 16 <= full:
        step *= 2
    low, high = 0, -(-full // step)
    while high - low > 1:
        middle = (low + high) // 2
        if price(middle * step) <= now:
            low = middle
        else:
            high = middle
    return low * step


def rank_options(cost: CostModel, work: NodeWork, precision: str, now: float) -> list[Option]:
    """A layer as two factors at half and a quarter of its rank; nothing for what is no dense matrix."""
    full = full_rank(work)
    if full < _FEWEST:
        return []
    rest = now - (cost.node(work, precision) or 0.0)

    def price(rank: int) -> float:
        return rest + sum(cost.node(part, precision) or 0.0 for part in factors(work, rank))

    even = break_even(price, full, now)
    pays = even * _TOO_FEW >= full
    why = f"pays up to rank {even} of {full}" if pays else "no useful rank pays: two nodes cost more than one"
    return [
        option("rank", f"{rank} of {full}", now, price(rank), text, rank / full)
        for rank, text in ((full // 2, why), (full // 4, ""))
    ]
