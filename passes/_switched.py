"""A weight as another one where a switch is on: what pricing a weight's distortion takes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.passes._int8 import gate
from onnxcompress.rewrite import Rewriter

__all__ = ["read_instead"]

_SUMS = ("ConvInteger", "MatMulInteger")
"""Their outputs are int32."""
_BESIDE = "onnxcompress.beside"
"""Marks nodes of which there are two: of what they make a switch decides already."""


def read_instead(
    value: ir.Value,
    array: npt.NDArray[Any],
    rewriter: Rewriter,
    switch: ir.Value,
    *,
    at: Collection[tuple[ir.Node, int]],
) -> None:
    """Where the switch is on, some readers of a value run on another array.

    Args:
        value: a weight, or what is made of weights alone.
        array: of its type and shape.
        rewriter: of the model.
        switch: boolean scalar.
        at: readers and their inputs.
    """
    for node, index in at:
        other = rewriter.constant(np.ascontiguousarray(array), f"{value.name}_instead", like=node)
        edits = len(rewriter.log)
        if node.op_type in _SUMS:  # whoever made them may not have said so
            node.outputs[0].dtype = ir.DataType.INT32
        if len(node.outputs) == 1 and node.outputs[0].dtype is not None and _BESIDE not in node.meta:
            # a second node beside the first: the weights need no copy in each run
            inputs = [other if i == index else v for i, v in enumerate(node.inputs)]
            (output,) = rewriter.insert(
                node.op_type,
                inputs,
                attributes=node.attributes,
                after=node,
                domain=node.domain,
                dtype=node.outputs[0].dtype,
            )
            for one in (node, *rewriter.nodes_since(edits)):
                one.meta[_BESIDE] = True
            gate(rewriter, node.outputs[0], output, switch, edits)
        else:  # of a node with two weights that are switched, or of several outputs, the weight itself
            (same,) = rewriter.insert("Identity", [other], before=node, dtype=value.dtype)
            mixed = rewriter.only_if(switch, same, rewriter.nodes_since(edits), value)
            rewriter.set_input(node, index, mixed)
