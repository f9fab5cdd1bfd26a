"""Notes a rewrite leaves on nodes and values for what settles it afterwards.

Clones have them too; nothing of them is written to the file.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

__all__ = ["forget_notes", "note", "noted"]

_PREFIX = "onnxcompress.note."


def note(subject: ir.Node | ir.Value, what: str, content: Any) -> None:
    """Leaves a note in place of an earlier one of the same kind; clones share the content, so it must not change."""
    subject.meta[_PREFIX + what] = content


def noted(subject: ir.Node | ir.Value, what: str) -> Any:
    """The note of a kind; None if there is none."""
    return subject.meta.get(_PREFIX + what)


def forget_notes(model: ir.Model) -> None:
    """Takes all notes away: from now on they are of rewrites of the model as it is."""
    nodes = tuple(model.graph.all_nodes())
    subjects: list[ir.Node | ir.Value] = [*nodes, *(v for node in nodes for v in node.outputs), *model.graph.inputs]
    for subject in subjects:
        for key in [k for k in subject.meta if k.startswith(_PREFIX)]:
            del subject.meta[key]
