"""The whole of a hardware profile, and the questions asked of it.

A price is linear in the work of a node and no coefficient is negative, so more work never costs less::

    t = ns_fixed + ns_per_mac * macs + ns_per_element * elements + ns_per_weight * weights
        + ns_per_patch * patches

with ``macs`` counted at channels rounded up to ``channel_block``, the whole times ``misaligned_factor``
where a channel count is no multiple of ``aligned_to``; and ``memory`` prices weights that have to come
from memory because the model as a whole does not fit into the cache.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

from onnxcompress.profile_tables import (
    LIST,
    PRECISIONS,
    Cache,
    Device,
    Emulation,
    Energy,
    Fusion,
    Instructions,
    Kernel,
    Layout,
    Limits,
    Memory,
    Overhead,
    Provenance,
    Quantization,
    Runtime,
    Table,
)
from onnxcompress.target import Target
from onnxcompress.work import FAMILY, KINDS, kinds_of

__all__ = ["TABLES", "Profile"]


class Profile(Table):
    """A device as a cost model sees it. Load one with :func:`~onnxcompress.profile_files.load_profile`.

    ``overhead_``, ``memory_``, ``caches_``, ``kernels_`` and ``fusions_`` are as in the file; the same names
    without the underscore are what counts, with ``time_scale`` in them.

    Attributes:
        extends: the profile this one was merged into, by name or path.
        lineage: names of the profiles this one goes back to, the nearest first; filled in when it is loaded.
        time_scale: every time of the file is this many times as long.
    """

    schema_: Literal[1, 2] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    extends: str | None = None
    lineage: Annotated[tuple[str, ...], LIST] = ()
    time_scale: float = Field(default=1.0, gt=0)
    device: Device
    provenance: Provenance
    runtime: Runtime
    quantization: Quantization
    limits: Limits | None = None
    layout: Layout | None = None
    overhead_: Overhead = Field(alias="overhead")
    memory_: Memory | None = Field(default=None, alias="memory")
    energy: Energy | None = None
    instructions: Instructions | None = None
    emulation: Emulation | None = None
    caches_: Annotated[tuple[Cache, ...], LIST] = Field(default=(), alias="cache")
    kernels_: Annotated[tuple[Kernel, ...], LIST] = Field(alias="kernel", min_length=1)
    fusions_: Annotated[tuple[Fusion, ...], LIST] = Field(default=(), alias="fusion")

    @cached_property
    def overhead(self) -> Overhead:
        """Cost of a run and of a node, ``time_scale`` included."""
        return _scaled(self.overhead_, self.time_scale)

    @cached_property
    def memory(self) -> Memory | None:
        """Cost of weights from memory, ``time_scale`` included."""
        return None if self.memory_ is None else _scaled(self.memory_, self.time_scale)

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """Prices, ``time_scale`` included."""
        return tuple(_scaled(kernel, self.time_scale) for kernel in self.kernels_)

    @cached_property
    def caches(self) -> tuple[Cache, ...]:
        """Levels of the cache, ``time_scale`` included."""
        return tuple(_scaled(cache, self.time_scale) for cache in self.caches_)

    @cached_property
    def fusions(self) -> tuple[Fusion, ...]:
        """What vanishes into what, ``time_scale`` included."""
        return tuple(_scaled(fusion, self.time_scale) for fusion in self.fusions_)

    @cached_property
    def _table(self) -> dict[tuple[str, str, str], Kernel]:
        return {(_bare(k.kind), k.precision, k.on): k for k in self.kernels}

    @cached_property
    def _found(self) -> dict[tuple[str, str, str, bool, bool], Kernel | None]:
        return {}

    @cached_property
    def _ops(self) -> frozenset[str]:
        return frozenset() if self.limits is None else frozenset(map(_bare, self.limits.ops))

    def kernel(
        self, kind: str, precision: str, *, op_type: str = "", maps: bool = False, blocked: bool = False
    ) -> Kernel | None:
        """The kernel that prices a node; None if the runtime cannot run it at this precision.

        An entry for the operator type goes before one for its kind, one for blocked feature maps before one
        for any, and that before one for anything. ``resize_linear`` has no family to fall back on.

        Args:
            kind: kernel kind.
            precision: one of :data:`PRECISIONS`.
            op_type: operator type of the node.
            maps: it works on feature maps.
            blocked: they are in the blocked layout.
        """
        asked = (kind, precision, op_type, maps, blocked)
        if asked not in self._found:
            self._found[asked] = self._look_up(kind, precision, op_type, maps, blocked)
        return self._found[asked]

    def _look_up(self, kind: str, precision: str, op_type: str, maps: bool, blocked: bool) -> Kernel | None:
        if self._ops and op_type and op_type not in self._ops:
            return None
        names = [kind] if kind == "resize_linear" else [op_type, kind]
        places = (*(("blocked",) if blocked else ()), *(("maps",) if maps else ()), "any")
        for name, on in itertools.product(names, places):
            found = self._table.get((name, precision, on))
            if found is not None:
                return found
        return None

    def target(self) -> Target:
        """What passes may know."""
        own = {_bare(k.kind) for k in self.kernels_ if k.kind not in KINDS}
        runs: set[tuple[str, str]] = {(k.kind, k.precision) for k in self.kernels_ if k.kind in KINDS}
        for op, precision in itertools.product({*FAMILY, "Conv", "Gemm", "MatMul", *own}, PRECISIONS):
            kinds = itertools.product(kinds_of(op), (False, True))
            if any(self.kernel(kind, precision, op_type=op, maps=maps) for kind, maps in kinds):
                runs.add((op, precision))
        computes = {k.precision for k in self.kernels_ if k.kind not in ("free", "quantize", "dequantize")}
        return Target(
            name=self.name,
            activation=self.quantization.activation,
            activation_symmetric=self.quantization.activation_symmetric,
            weight_bits=self.quantization.weight_bits,
            per_channel=self.quantization.per_channel,
            channel_multiple=self.quantization.channel_multiple,
            contrib_ops=self.runtime.contrib_ops,
            max_opset=self.runtime.max_opset,
            required=self.quantization.required,
            folds_constants=self.runtime.folds_constants,
            float32="f32" in computes,
            float16="f16" in computes,
            weight_only_bits=tuple(bits for bits in (4, 8) if f"w{bits}" in computes),
            ops=self._ops,
            kernels=frozenset(runs),
        )


TABLES: dict[str, type[BaseModel]] = {
    "device": Device, "provenance": Provenance, "runtime": Runtime, "quantization": Quantization, "limits": Limits,
    "layout": Layout, "overhead": Overhead, "memory": Memory, "energy": Energy, "instructions": Instructions,
    "cache": Cache, "emulation": Emulation, "kernel": Kernel, "fusion": Fusion,
}  # fmt: skip
"""Tables a file may have, by name."""


def _bare(op_type: str) -> str:
    """The operator type without its domain, as nodes have it."""
    return op_type.rpartition(".")[2]


_Timed = TypeVar("_Timed", Overhead, Memory, Cache, Kernel, Fusion)


def _scaled(table: _Timed, factor: float) -> _Timed:
    if factor == 1:
        return table
    times = (name for name in type(table).model_fields if name.startswith("ns_"))
    return table.model_copy(update={name: factor * getattr(table, name) for name in times})
