"""The tables of a hardware profile, as its file has them: flat, every unit in the key's name or docs/profiles.md."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from onnxcompress.errors import ProfileError, suggest
from onnxcompress.operators import known_operator
from onnxcompress.work import KINDS

__all__ = [
    "INSTRUCTION_CLASSES",
    "LIST",
    "PRECISIONS",
    "Cache",
    "Device",
    "Emulation",
    "Energy",
    "Fusion",
    "Instructions",
    "Kernel",
    "Layout",
    "Limits",
    "Memory",
    "Overhead",
    "Provenance",
    "Quantization",
    "Runtime",
    "Table",
]

Precision = Literal["f32", "u8s8", "dynamic", "f16", "w8", "w4"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
"""Ways to run a node: float32; integers between QuantizeLinear and DequantizeLinear (8-bit activations of the
type ``quantization`` names, s8 weights); float activations quantized on the fly (DynamicQuantizeLinear, or
DynamicQuantizeLSTM); float16; float activations with weights of 8 or 4 bits in blocks (MatMulNBits)."""

Nanoseconds = Annotated[float, Field(ge=0)]
LIST = Field(strict=False)  # a TOML array, kept as a tuple


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Device(Table):
    """The hardware.

    Attributes:
        cpu: processor, by its public name.
        cores: physical cores the device has (kernels are priced on one thread).
        frequency_ghz: clock the numbers hold for.
        isa: instruction set extensions that matter, as the operating system names them.
        host: the profile is of the kind of machine people run the optimizer on, so latency is
            measured where the processor here has ``isa``.
        source: where this is from.
    """

    cpu: str
    cores: int = Field(ge=1)
    frequency_ghz: float = Field(gt=0)
    isa: Annotated[tuple[str, ...], LIST] = ()
    host: bool = False
    source: str = ""

    def is_here(self) -> bool:
        """Whether this process runs on such a device, as far as the operating system tells."""
        if not self.host:
            return False
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
        except OSError:
            return False
        return set(self.isa) <= set(flags)


class Provenance(Table):
    """How the numbers were obtained and how far they can be trusted.

    Attributes:
        status: ``measured`` on the device; ``emulated-ratios``: absolute speed fitted to published
            milliseconds, ratios between precisions from instruction counts; ``published``: derived
            from published measurements; ``spec``: from a data sheet.
        method: what was done.
        source: where the underlying numbers are from.
        date: when.
        error: mean relative error on work the fit had not seen, if that was measured.
        notes: what is not validated.
        fit_set: what the numbers were fitted to.
        held_out: what they were checked on and not fitted to.
        held_out_error: mean relative error there.
        seconds: ``absolute``: seconds hold by themselves; ``ratios``: only relative to each other.
            The weaker is assumed unless the stronger is claimed.
        unverified: what nobody has checked; each entry starts with the dotted key it is about
            ("energy.active_w: from memory").
    """

    status: Literal["measured", "emulated-ratios", "published", "spec"]
    method: str
    source: str
    date: datetime.date
    error: float | None = Field(default=None, ge=0)
    notes: str = ""
    fit_set: str = ""
    held_out: str = ""
    held_out_error: float | None = Field(default=None, ge=0)
    seconds: Literal["absolute", "ratios"] = "ratios"
    unverified: Annotated[tuple[str, ...], LIST] = ()


class Runtime(Table):
    """The runtime the numbers hold for.

    Attributes:
        name: of the runtime.
        version: of the runtime.
        threads: it uses.
        contrib_ops: ``com.microsoft`` operators run.
        max_opset: newest ONNX opset it reads, if that is a limit.
        folds_constants: it computes nodes that read only constants once, when the model is loaded, into memory that
            is not the file's: only then is a weight stored as Cast(int8) * scale smaller at the same speed.
    """

    name: str
    version: str
    threads: int = Field(ge=1)
    contrib_ops: bool
    max_opset: int | None = Field(default=None, ge=1)
    folds_constants: bool = True


class Quantization(Table):
    """What quantized models must look like; see :class:`~onnxcompress.target.Target`."""

    activation: Literal["u8", "s8"]
    weight_bits: int = Field(ge=2, le=8)
    per_channel: bool
    channel_multiple: int = Field(ge=1)
    activation_symmetric: bool = False
    required: bool = False
    source: str = ""


class Limits(Table):
    """What does not fit, and what does not run.

    Attributes:
        flash_bytes: room for the model's file.
        ram_bytes: room for activations.
        ops: operator types the device can run; empty means any.
        source: where this is from.
    """

    flash_bytes: int | None = Field(default=None, ge=1)
    ram_bytes: int | None = Field(default=None, ge=1)
    ops: Annotated[tuple[str, ...], LIST] = ()
    source: str = ""

    @field_validator("ops")
    @classmethod
    def _known_ops(cls, ops: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known_operator(op, qualified=True) for op in ops)


class Layout(Table):
    """Operators that work on feature maps whose channels are cut into blocks; the rest makes them be reordered.

    Attributes:
        block: channels of a block.
        align: channels that are no multiple of this cannot be reordered, and stay in the plain layout.
        starts: operator types that bring about the layout.
        carries: that keep it.
        joins: that keep it if all their inputs have it.
        source: where this is from.
    """

    block: int = Field(ge=1)
    align: int = Field(ge=1)
    starts: Annotated[tuple[str, ...], LIST] = ()
    carries: Annotated[tuple[str, ...], LIST] = ()
    joins: Annotated[tuple[str, ...], LIST] = ()
    source: str = ""

    @field_validator("starts", "carries", "joins")
    @classmethod
    def _known_ops(cls, ops: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known_operator(op) for op in ops)


class Overhead(Table):
    """Cost of running at all: per call of the model and per node that is dispatched."""

    ns_per_run: Nanoseconds
    ns_per_node: Nanoseconds
    source: str = ""


class Memory(Table):
    """What weights cost that do not stay in the cache from one run to the next.

    Attributes:
        cache_bytes: weights that together take no more than this stay; twice as many all come from memory.
        ns_per_byte: for every byte that comes from memory, on top of the kernel.
        bandwidth_gb_per_s: most a thread reads from memory, 1e9 bytes a second.
        source: where the numbers come from.
    """

    cache_bytes: int = Field(ge=0)
    ns_per_byte: Nanoseconds
    bandwidth_gb_per_s: float | None = Field(default=None, gt=0)
    source: str = ""


class Cache(Table):
    """A level of the cache, nearest first; ``shared`` between cores.

    Attributes:
        name: as people call it.
        bytes: how much it holds.
        shared: between cores; then half of it counts.
        ns_per_byte: for a byte of activations it does not hold, on top of the kernel.
        ns_per_weight_byte: for a byte of weights it does not hold.
        source: where the numbers come from.
    """

    name: str
    bytes: int = Field(ge=1)
    shared: bool = False
    ns_per_byte: Nanoseconds = 0.0
    ns_per_weight_byte: Nanoseconds = 0.0
    source: str = ""


class Kernel(Table):
    """Price of a kernel kind, or of one operator type, at a precision.

    Attributes:
        kind: a kind of :data:`~onnxcompress.work.KINDS`, or an operator type ("HardSwish"; one that is not
            of ONNX or onnxruntime with its domain, "com.example.Fly"), which then goes before its family.
        precision: one of :data:`PRECISIONS`.
        on: ``maps``: for feature maps (4-D and more) only; ``blocked``: only for those in the blocked
            layout (see ``layout``).
        ns_fixed: per node, besides ``overhead.ns_per_node``.
        ns_per_mac: per multiply-accumulate.
        ns_per_element: per activation element read or written.
        ns_per_weight: per constant element read.
        ns_per_patch: per element of the unfolded input (what one output channel reads).
        ns_per_segment: per contiguous piece the data is worked through in.
        channel_block: channels are rounded up to this multiple when MACs are counted.
        aligned_to: channel counts that are no multiple of this fall off the fast path ...
        misaligned_factor: ... and cost this many times as much.
        fit_error: mean relative error of the fit on its own points.
        source: where the numbers come from; the file's ``provenance.source`` if empty.
    """

    kind: str
    precision: Precision
    on: Literal["any", "maps", "blocked"] = "any"
    ns_fixed: Nanoseconds = 0.0
    ns_per_mac: Nanoseconds = 0.0
    ns_per_element: Nanoseconds = 0.0
    ns_per_weight: Nanoseconds = 0.0
    ns_per_patch: Nanoseconds = 0.0
    ns_per_segment: Nanoseconds = 0.0
    channel_block: int = Field(default=1, ge=1)
    aligned_to: int = Field(default=1, ge=1)
    misaligned_factor: float = Field(default=1.0, ge=1)
    fit_error: float | None = Field(default=None, ge=0)
    source: str = ""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        return known_operator(kind, besides=KINDS, qualified=True)


class Fusion(Table):
    """Nodes that cost little or nothing because the runtime makes them part of a neighbour.

    Attributes:
        op: operator type of the neighbour.
        absorbs: operator types it takes in, if nothing else reads the value between them.
        side: ``after``: those that read its output; ``before``: those that make its first input.
        precision: how the neighbour runs.
        constant_operand: only if all other inputs of the absorbed node are constant, and as many as channels.
        same_operand: only if its other input is what the neighbour reads: x * Sigmoid(x).
        ns_per_element: what an element of an absorbed node's output still costs.
    """

    op: str
    absorbs: Annotated[tuple[str, ...], LIST] = Field(min_length=1)
    side: Literal["after", "before"] = "after"
    precision: Precision = "f32"
    constant_operand: bool = False
    same_operand: bool = False
    ns_per_element: Nanoseconds = 0.0

    @field_validator("op")
    @classmethod
    def _known_op(cls, op: str) -> str:
        return known_operator(op)

    @field_validator("absorbs")
    @classmethod
    def _known_ops(cls, ops: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known_operator(op) for op in ops)


class Energy(Table):
    """Energy of a run: by the time it takes and the power drawn meanwhile, or by what is computed and moved.

    Attributes:
        active_w: watts the device draws while one thread runs a model.
        idle_w: watts it draws when nothing runs.
        pj_per_mac_f32: picojoules of a multiply-accumulate in float32; likewise f16, int8.
        pj_per_byte: picojoules of a byte from memory.
        source: where the numbers come from.
    """

    active_w: float | None = Field(default=None, gt=0)
    idle_w: float | None = Field(default=None, ge=0)
    pj_per_mac_f32: float | None = Field(default=None, ge=0)
    pj_per_mac_f16: float | None = Field(default=None, ge=0)
    pj_per_mac_int8: float | None = Field(default=None, ge=0)
    pj_per_byte: float | None = Field(default=None, ge=0)
    source: str

    @model_validator(mode="after")
    def _says_something(self) -> Energy:
        if self.active_w is None and self.pj_per_mac_f32 is None and self.pj_per_mac_int8 is None:
            raise ValueError("energy needs active_w, or one of pj_per_mac_f32 and pj_per_mac_int8")
        return self


class Instructions(Table):
    """Cycles that an executed instruction of each class costs, and what that was fitted to.

    Attributes:
        core: the core, by the short name measurement files have ("a53").
        runtime: what was run when they were fitted.
        cycles_per_run: for a call of the model.
        fit_set: what they were fitted to.
        held_out: what they were checked on and not fitted to.
        held_out_error: mean relative error there.
        source: where the counts and times come from.
    """

    core: str
    runtime: str
    cycles_fma_f32: float = Field(default=0.0, ge=0)
    cycles_fma_f16: float = Field(default=0.0, ge=0)
    cycles_fp_other: float = Field(default=0.0, ge=0)
    cycles_dot: float = Field(default=0.0, ge=0)
    cycles_mmla: float = Field(default=0.0, ge=0)
    cycles_imul_long: float = Field(default=0.0, ge=0)
    cycles_imul: float = Field(default=0.0, ge=0)
    cycles_simd_other: float = Field(default=0.0, ge=0)
    cycles_ld_simd: float = Field(default=0.0, ge=0)
    cycles_st_simd: float = Field(default=0.0, ge=0)
    cycles_ld_int: float = Field(default=0.0, ge=0)
    cycles_st_int: float = Field(default=0.0, ge=0)
    cycles_branch: float = Field(default=0.0, ge=0)
    cycles_int: float = Field(default=0.0, ge=0)
    cycles_bytes_ld: float = Field(default=0.0, ge=0)
    cycles_bytes_st: float = Field(default=0.0, ge=0)
    cycles_per_run: float = Field(default=0.0, ge=0)
    fit_set: str = ""
    held_out: str = ""
    held_out_error: float | None = Field(default=None, ge=0)
    source: str = ""

    @cached_property
    def cycles(self) -> Mapping[str, float]:
        """Cycles by instruction class; of bytes, per byte."""
        return {name: getattr(self, f"cycles_{name}") for name in INSTRUCTION_CLASSES}

    def seconds(self, counts: Mapping[str, float], frequency_ghz: float) -> float:
        """Time of a run from how many instructions of each class it executes.

        Args:
            counts: instructions (or bytes) by class; classes left out count as none.
            frequency_ghz: clock.

        Raises:
            ProfileError: there is no such class.
        """
        for name in counts:
            if name not in self.cycles:
                raise ProfileError(f"no instruction class is called {name!r}", hint=suggest(name, self.cycles))
        cycles = self.cycles_per_run + sum(self.cycles[name] * count for name, count in counts.items())
        return cycles / (frequency_ghz * 1e9)


INSTRUCTION_CLASSES: tuple[str, ...] = tuple(
    name.removeprefix("cycles_")
    for name in Instructions.model_fields
    if name.startswith("cycles_") and name != "cycles_per_run"
)
"""Classes of instructions that are counted; ``bytes_ld`` and ``bytes_st`` are bytes loaded and stored."""


class Emulation(Table):
    """How an emulator passes for the core; see :mod:`onnxcompress.emulation`.

    Attributes:
        cpu: the emulator's name of the core, or of the nearest it has.
        midr: what the core's identification register reads, by which runtimes choose kernels ("0x410fd034").
        features: instruction set extensions as Linux names them in /proc/cpuinfo.
        l1_bytes: first-level data cache it says it has.
        l2_bytes: second-level cache it says it has.
    """

    cpu: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    midr: str = Field(pattern=r"^0x[0-9a-f]{8}$")
    features: Annotated[tuple[str, ...], LIST] = Field(min_length=1)
    l1_bytes: int = Field(default=32768, ge=1024)
    l2_bytes: int = Field(default=524288, ge=1024)
