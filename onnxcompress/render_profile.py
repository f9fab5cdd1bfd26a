"""Profiles as text for a person: what a device can do, what it costs, and how far that can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from onnxcompress.tables import columns, plural, section, size, used_columns

if TYPE_CHECKING:  # what is shown is not needed for showing it
    from onnxcompress.profile import Energy, Profile, Provenance, Quantization

__all__ = ["profile", "profiles"]

_SECONDS = {
    "absolute": "absolute: seconds hold by themselves",
    "ratios": "ratios: seconds hold relative to each other, not by themselves",
}
_PICOJOULES = ("pj_per_mac_f32", "pj_per_mac_f16", "pj_per_mac_int8", "pj_per_byte")


def profiles(found: Sequence[Profile]) -> RenderableType:
    """Profiles, one a line, with how far their numbers can be trusted."""
    rows = [
        (
            p.name,
            p.provenance.status,
            p.provenance.seconds,
            _error(p.provenance) or "?",
            str(len(p.provenance.unverified) or ""),
            Text(p.description, no_wrap=True, overflow="ellipsis"),
        )
        for p in found
    ]
    heads = ("name", "numbers", "seconds", "held-out error", "UNVERIFIED", "device")
    table = columns(rows, heads, right=[3, 4])
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table


def profile(what: Profile) -> RenderableType:
    """One profile: the device, where its numbers come from, what each kernel costs."""
    parts: list[RenderableType] = [
        Text(f"{what.name}: {what.description}", style="bold"),
        Text(),
        _facts(_device(what)),
        section("Trust", _facts(_trust(what))),
    ]
    if what.provenance.unverified:
        rows = [("UNVERIFIED", *map(str.strip, entry.partition(":")[::2])) for entry in what.provenance.unverified]
        parts.append(section("Not verified by anyone", columns(rows, ("", "", ""))))
    parts.append(section("What runs", _facts(_legality(what))))
    if what.instructions is not None:
        parts.append(section("Cycles of an instruction", _facts(_cycles(what))))
    parts.append(section(_title(what), _kernels(what)))
    if what.fusions:
        parts.append(section("Run as a part of another node", _fusions(what)))
    return Group(*parts)


def _facts(rows: Iterable[tuple[str, str]]) -> RenderableType:
    return columns([(name, " ".join(fact.split())) for name, fact in rows if fact], ("", ""))


def _device(what: Profile) -> list[tuple[str, str]]:
    device, runtime = what.device, what.runtime
    caches = [
        f"{c.name} {size(c.bytes)}{' shared' if c.shared else ''}"
        + (f" (misses {c.ns_per_byte:.3g}, of weights {c.ns_per_weight_byte:.3g} ns a byte)" if c.ns_per_byte else "")
        for c in what.caches
    ]
    opset = "" if runtime.max_opset is None else f", up to opset {runtime.max_opset}"
    contrib = ", with com.microsoft operators" if runtime.contrib_ops else ", standard operators only"
    folds = "" if runtime.folds_constants else ", constants not folded"
    return [
        ("extends", " -> ".join(what.lineage)),
        ("time scale", f"all times x {what.time_scale:g}" if what.time_scale != 1 else ""),
        ("device", f"{device.cpu}, {plural(device.cores, 'core')} at {device.frequency_ghz:g} GHz"),
        ("instructions", " ".join(device.isa)),
        ("caches", ", ".join(caches)),
        ("memory", _memory(what)),
        ("energy", "" if what.energy is None else _energy(what.energy)),
        ("runtime", f"{runtime.name} {runtime.version}, {plural(runtime.threads, 'thread')}{contrib}{opset}{folds}"),
        ("source", device.source),
    ]


def _memory(what: Profile) -> str:
    memory = what.memory
    if memory is None:
        return ""
    rate = "" if memory.bandwidth_gb_per_s is None else f", {memory.bandwidth_gb_per_s:g} GB/s"
    price = f"weights beyond {size(memory.cache_bytes)} cost {memory.ns_per_byte:.4g} ns a byte{rate}"
    return f"{price} ({memory.source})" if memory.source else price


def _energy(energy: Energy) -> str:
    parts = [f"{energy.active_w:g} W active"] if energy.active_w is not None else []
    parts += [f"{energy.idle_w:g} W idle"] if energy.idle_w is not None else []
    for key in _PICOJOULES:
        value = getattr(energy, key)
        parts += [f"{value:g} pJ a {key.removeprefix('pj_per_').replace('_', ' in ')}"] if value is not None else []
    return f"{', '.join(parts)} ({energy.source})"


def _trust(what: Profile) -> list[tuple[str, str]]:
    origin = what.provenance
    return [
        ("status", f"{origin.status}, {origin.date}"),
        ("seconds", _SECONDS[origin.seconds]),
        ("fitted to", origin.fit_set or "not stated"),
        ("held out", origin.held_out or "nothing"),
        ("held-out error", _percent(origin.held_out_error) or "not measured"),
        ("mean error", _percent(origin.error)),
        ("method", origin.method),
        ("source", origin.source),
        ("notes", origin.notes),
    ]


def _error(origin: Provenance) -> str:
    return _percent(origin.held_out_error if origin.held_out_error is not None else origin.error)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.3g}" if share >= 10 else f"{share:.1%}".replace(".0%", "%")


def _legality(what: Profile) -> list[tuple[str, str]]:
    target, limits = what.target(), what.limits
    widths = " and ".join(str(bits) for bits in target.weight_only_bits)
    rows = [
        ("quantization", _quantization(what.quantization)),
        ("float", ", ".join(["float32"] * target.float32 + ["float16"] * target.float16) or "none"),
        ("block weights", f"{widths} bits (MatMulNBits)" if widths else "none"),
    ]
    if limits is not None:
        rows += [
            ("flash", size(limits.flash_bytes) if limits.flash_bytes is not None else ""),
            ("RAM", size(limits.ram_bytes) if limits.ram_bytes is not None else ""),
            ("operators", ", ".join(limits.ops) or "any"),
            ("limits from", limits.source),
        ]
    return rows


def _quantization(quantization: Quantization) -> str:
    zero = ", symmetric" if quantization.activation_symmetric else ""
    parts = [
        f"{quantization.activation} activations{zero}",
        f"{quantization.weight_bits}-bit weights",
        "per channel" if quantization.per_channel else "per tensor",
        f"channels in multiples of {quantization.channel_multiple}",
        "required: what is not quantized does not run" if quantization.required else "",
    ]
    text = "; ".join(part for part in parts if part)
    return f"{text} ({quantization.source})" if quantization.source else text


def _cycles(what: Profile) -> list[tuple[str, str]]:
    instructions = what.instructions
    if instructions is None:
        return []
    cycles = ", ".join(f"{name} {value:.3g}" for name, value in instructions.cycles.items() if value)
    return [
        ("core", f"{instructions.core}, {instructions.runtime}"),
        ("cycles", cycles),
        ("of a run", f"{instructions.cycles_per_run:.4g}" if instructions.cycles_per_run else ""),
        ("fitted to", instructions.fit_set),
        ("held out", instructions.held_out),
        ("held-out error", _percent(instructions.held_out_error) or "not measured"),
        ("source", instructions.source),
    ]


def _title(what: Profile) -> str:
    overhead = what.overhead
    return f"Kernels, in ns; a node takes {_ns(overhead.ns_per_node) or 0} more, a run {_ns(overhead.ns_per_run) or 0}"


def _kernels(what: Profile) -> RenderableType:
    prices = [key for key in type(what.kernels[0]).model_fields if key.startswith("ns_")]
    rows = [
        (
            k.kind + (" (maps)" if k.on == "maps" else ""),
            k.precision,
            *(_ns(getattr(k, key)) for key in prices),
            str(k.channel_block) if k.channel_block > 1 else "",
            f"{k.misaligned_factor:g}x off {k.aligned_to}" if k.aligned_to > 1 else "",
            _percent(k.fit_error),
            k.source,
        )
        for k in what.kernels
    ]
    named = [key.removeprefix("ns_").removeprefix("per_") for key in prices]
    heads = ("kernel", "precision", *named, "block", "alignment", "fit error", "source")
    numbers = range(2, 3 + len(prices))
    return used_columns(rows, heads, right=(*numbers, numbers.stop + 1))


def _ns(value: float) -> str:
    return "" if not value else f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _fusions(what: Profile) -> RenderableType:
    rows = [
        (
            f.op,
            f.precision,
            f.side,
            ", ".join(f.absorbs),
            _ns(f.ns_per_element),
            "if its other inputs are constant" if f.constant_operand else "",
        )
        for f in what.fusions
    ]
    return used_columns(rows, ("node", "precision", "side", "takes in", "ns an element", ""), (4,))
