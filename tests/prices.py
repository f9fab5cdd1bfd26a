"""Profiles whose prices are chosen, so that what is made of them is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcompress.fitting.regression import Solution, rebuilt
from onnxcompress.fitting.structure import structure
from onnxcompress.profile import Profile
from onnxcompress.profile_tables import Cache, Kernel

__all__ = ["CACHES", "coefficients", "priced"]

CACHES = (Cache(name="L2", bytes=256 << 10), Cache(name="L3", bytes=4 << 20, shared=True))
PRECISIONS = ("f32", "u8s8", "dynamic", "f16", "w8", "w4")
_MACS = ("conv", "matmul", "lstm", "gru")
_USUAL = {"fixed": 400.0, "mac": 0.05, "element": 0.1, "weight": 0.05, "patch": 0.05, "segment": 1.0}
"""Nanoseconds a unit costs on a laptop, about."""


def coefficients(kernel: Kernel, rng: np.random.Generator, terms: Sequence[str] = ()) -> dict[str, float]:
    """Seconds of every term of a kernel: about what is usual, never none."""
    macs = kernel.kind.startswith(_MACS)
    chosen = terms or (*_USUAL,)
    return {t: 1e-9 * _USUAL[t] * float(rng.uniform(0.5, 2)) for t in chosen if macs or t != "mac"}


def priced(
    seed: int = 0, *, block: int = 16, caches: Sequence[Cache] = CACHES, precisions: Sequence[str] = PRECISIONS,
    per_run: float = 3e-6, per_node: float = 2e-7, misses: bool = True,
) -> Profile:  # fmt: skip
    """The structure of a fit with every price above zero, blocks of channels and misalignment included."""
    rng = np.random.default_rng(seed)
    shell = structure(caches, block=block, precisions=precisions)
    kernels = {}
    for kernel in shell.kernels_:
        more = {"channel_block": 4, "aligned_to": 8, "misaligned_factor": 1.5} if kernel.kind.startswith("conv") else {}
        kernels[kernel.kind, kernel.precision, kernel.on] = (
            kernel.model_copy(update=more), coefficients(kernel, rng)
        )  # fmt: skip
    fused = {(f.precision, op): 1e-9 * float(rng.uniform(0.02, 0.2)) for f in shell.fusions_ for op in f.absorbs}
    missed = tuple((5e-12 * (i + 1), 2e-11 * (i + 1)) if misses else (0.0, 0.0) for i in range(len(caches)))
    solution = Solution(kernels, fused, missed, dict.fromkeys(kernels, 0.0), dict.fromkeys(kernels, 1))
    return rebuilt(shell, solution, per_run, per_node)
