"""What executed instructions cost: counts by class, times cycles of a core, over its clock.

An emulator says how many instructions of each class a model executes, not how long they take. The
``[instructions]`` table of a profile gives every class a price in cycles, fitted to published
milliseconds, and::

    seconds = (cycles_per_run + sum(cycles_<class> * count of the class)) / (1e9 * GHz)

The sum is linear on purpose: it can be fitted to few points, and more work never costs less. Classes
are priced as they turn out on average, so caches and the order of instructions are in the prices.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxcompress.errors import ProfileError
from onnxcompress.profile import Instructions, Profile

__all__ = ["CLASSES", "instructions_of", "seconds", "total"]

CLASSES: dict[str, str] = {
    "fma_f32": "multiply-add of float32 (fmla, fmadd; scalar, vector, by element)",
    "fma_f16": "multiply-add of float16",
    "fp_other": "other floating-point arithmetic, conversions and comparisons on vectors",
    "dot": "dot product of int8 (sdot, udot, usdot)",
    "mmla": "matrix product of int8 (smmla, ummla, usmmla)",
    "imul_long": "widening integer multiply(-add) on vectors (smull, smlal)",
    "imul": "other integer multiply(-add) on vectors",
    "simd_other": "everything else of the vector and floating-point unit (moves, shuffles, integer sums)",
    "ld_simd": "load into vector registers",
    "st_simd": "store from vector registers",
    "ld_int": "load into general registers",
    "st_int": "store from general registers",
    "branch": "branch, call, return, system",
    "int": "everything else on general registers",
    "bytes_ld": "bytes read by loads of either kind",
    "bytes_st": "bytes written by stores of either kind",
}
"""Classes of instructions, and bytes they move: names of columns and what they hold."""

_BYTES = ("bytes_ld", "bytes_st")


def instructions_of(profile: Profile) -> Instructions:
    """The ``[instructions]`` table of a profile.

    Raises:
        ProfileError: it has none.
    """
    if profile.instructions is None:
        raise ProfileError(
            f"{profile.name} has no [instructions] table, so counts of instructions cannot be priced",
            hint="profiles of Arm cores that were fitted by emulation have one, such as cortex-a53",
        )
    return profile.instructions


def total(counts: Mapping[str, float]) -> float:
    """Instructions executed: all classes, without the bytes."""
    return sum(counts.get(name, 0.0) for name in CLASSES if name not in _BYTES)


def seconds(profile: Profile, counts: Mapping[str, float], *, ghz: float | None = None) -> float:
    """Seconds of one run on the device of a profile.

    Args:
        profile: the device.
        counts: instructions (or bytes) of one run by class.
        ghz: clock of the device that ran; the profile's if None.

    Raises:
        ProfileError: the profile does not price instructions.

    Example:
        >>> from onnxcompress.profile import load_profile
        >>> core = load_profile("cortex-a53")
        >>> seconds(core, {"fma_f32": 2e9}) > seconds(core, {"fma_f32": 1e9}) > 0
        True
    """
    clock = profile.device.frequency_ghz if ghz is None else ghz
    executed = {name: counts.get(name, 0.0) for name in CLASSES}
    return instructions_of(profile).seconds(executed, clock)
