"""What operators say about their axes, and the register of those who say it.

A rule is a function that tells a :class:`~onnxcompress.coupling.coupler.Coupler` which axes of its node
are the same positions; a second, where needed, mends what the node says of sizes (attributes, constants)
after positions were removed. An operator without a rule pins everything it touches.

    @rule("MyScale", domain="com.example")
    def my_scale(node: ir.Node, at: Coupler) -> None:
        x, scale, y = at.input(node, 0), at.input(node, 1), at.output(node)
        at.elementwise(node, [x], y)
        at.same(scale[0], y[1])

Packages install theirs through the entry point group ``onnxcompress.coupling``; each names a module that
registers when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

import onnx_ir as ir

from onnxcompress.coupling.coupler import Coupler
from onnxcompress.coupling.mending import Mender
from onnxcompress.errors import CouplingError

__all__ = ["GROUP", "Couple", "Mend", "Rule", "mends", "rule", "rule_of"]

GROUP = "onnxcompress.coupling"

Couple = Callable[[ir.Node, Coupler], None]
Mend = Callable[[ir.Node, Mender], None]


@dataclass
class Rule:
    """Of one operator.

    Attributes:
        couple: tells which axes go together.
        mend: sets attributes and constants right after removal; None if there are none.
    """

    couple: Couple
    mend: Mend | None = None


_RULES: dict[tuple[str, str], Rule] = {}
_BUILT_IN = (
    "attention",
    "convolution",
    "elementwise",
    "indexing",
    "movement",
    "normalization",
    "products",
    "quantized",
    "recurrent",
    "reduction",
    "reshaping",
)


def rule(*ops: str, domain: str = "") -> Callable[[Couple], Couple]:
    """Registers how operators couple their axes; the last one to register wins."""

    def register(couple: Couple) -> Couple:
        for op in ops:
            _RULES[_domain(domain), op] = Rule(couple)
        return couple

    return register


def mends(*ops: str, domain: str = "") -> Callable[[Mend], Mend]:
    """Registers how operators with a rule mend attributes and constants.

    Raises:
        CouplingError: an operator has no rule yet.
    """

    def register(mend: Mend) -> Mend:
        for op in ops:
            if (_domain(domain), op) not in _RULES:
                raise CouplingError(f"operator {op!r} has no coupling rule to complete", hint="register rule() first")
            _RULES[_domain(domain), op].mend = mend
        return mend

    return register


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of a node's operator, if somebody registered one."""
    _load()
    return _RULES.get((_domain(node.domain), node.op_type))


@cache
def _load() -> None:
    own = dict(_RULES)  # whoever registered by hand keeps the last word
    for name in _BUILT_IN:
        import_module(f"onnxcompress.coupling.{name}")
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        try:
            entry.load()
        except Exception as error:  # a plug-in may fail to import in any way; say which one it was
            raise CouplingError(
                f"coupling rules {entry.name!r} ({entry.value}) do not import: {error}", hint="repair or uninstall them"
            ) from error
    _RULES.update(own)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
