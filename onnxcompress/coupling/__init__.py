"""Axis coupling: which positions of which tensors must shrink together, and removing them."""

from __future__ import annotations

from onnxcompress.coupling.analysis import Coupling
from onnxcompress.coupling.axes import Axis, Factor
from onnxcompress.coupling.coupler import Coupler, Operand
from onnxcompress.coupling.groups import Group, Part, Pin, Reader
from onnxcompress.coupling.mending import Mender
from onnxcompress.coupling.removal import check_keep, kept_positions, remove
from onnxcompress.coupling.rules import mends, rule
from onnxcompress.coupling.shapes import made_up_shapes

__all__ = [
    "Axis",
    "Coupler",
    "Coupling",
    "Factor",
    "Group",
    "Mender",
    "Operand",
    "Part",
    "Pin",
    "Reader",
    "check_keep",
    "kept_positions",
    "made_up_shapes",
    "mends",
    "remove",
    "rule",
]
