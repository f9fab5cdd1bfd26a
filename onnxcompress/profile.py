"""Hardware profiles: what a device can run and what each kernel costs on it, as TOML.

A profile is data anyone can copy, edit, extend or fit to a device of their own. It says where every number
comes from. :mod:`~onnxcompress.profile_tables` and :mod:`~onnxcompress.profile_schema` say what it holds,
:mod:`~onnxcompress.profile_files` finds, reads and writes it; this module is where all are imported from.
"""

from __future__ import annotations

from onnxcompress.profile_files import list_profiles, load_profile, write
from onnxcompress.profile_schema import Profile
from onnxcompress.profile_tables import (
    INSTRUCTION_CLASSES,
    PRECISIONS,
    Cache,
    Device,
    Emulation,
    Energy,
    Fusion,
    Instructions,
    Kernel,
    Limits,
    Memory,
    Overhead,
    Provenance,
    Quantization,
    Runtime,
)

__all__ = [
    "INSTRUCTION_CLASSES",
    "PRECISIONS",
    "Cache",
    "Device",
    "Emulation",
    "Energy",
    "Fusion",
    "Instructions",
    "Kernel",
    "Limits",
    "Memory",
    "Overhead",
    "Profile",
    "Provenance",
    "Quantization",
    "Runtime",
    "list_profiles",
    "load_profile",
    "write",
]
