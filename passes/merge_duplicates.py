"""Duplicates: weights with equal bytes, and nodes that compute the same thing, become one.

Two weights are equal if type, shape and bytes are; bytes are compared by SHA-256, read in pieces, and
only where type, shape and a sample of the bytes agree already, so memory does not grow with the model.
Two nodes of one graph are equal if operator, attributes and inputs (after merging) are, and the
operator is a function of these: nothing that draws random numbers, holds a body, belongs to another
domain, or marks where a value is quantized. Outputs are equal bit for bit. A rewrite that wants its own
copy of a weight gets it from ``Rewriter.own_weight``.

onnx-ir's pass merges Bernoulli, Dropout in training and operators of other domains, and mixes up
outputs that were left out, so it is not used.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Stage
from onnxcompress.passes._constants import RANDOM_OPS
from onnxcompress.rewrite import Rewriter, can_be_output
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.view import QUANTIZED_OPS, GraphView

__all__ = ["MergeDuplicates"]

_WEIGHT = "weight: "  # marks the key of a site that is no node
_PIECE = 1 << 20
_SAMPLE = 4096


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Shares equal weights and computes common subexpressions once."""

    name: ClassVar[str] = "merge_duplicates"
    stage: ClassVar[Stage] = Stage.NORMALISE
    place: ClassVar[int] = 4
    lossless: ClassVar[bool] = True

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        same: dict[ir.Value, ir.Value] = {}
        for group in _equal_weights(view):
            same |= dict.fromkeys(group[1:], group[0])
            yield Site(_WEIGHT + str(group[0].name), tuple(str(v.name) for v in group))
        seen: dict[Hashable, ir.Node] = {}
        for node in view.nodes():
            signature = _signature(node, same)
            if signature is None:
                continue
            kept = seen.setdefault(signature, node)
            if kept is node:
                continue
            pairs = list(zip(node.outputs, kept.outputs, strict=True))
            if any(v.is_graph_output() and not can_be_output(k, node.graph) for v, k in pairs):
                yield Skipped(str(node.name), f"it and {kept.name!r} are both outputs")
                continue
            same |= dict(pairs)
            yield Site.of(node, kept)

    def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
        return [Choice(site, "merge", effects=False)]

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        if choice.site.key.startswith(_WEIGHT):
            kept, *others = (rewriter.value(name) for name in choice.site.nodes)
            if any(v.graph is not kept.graph for v in others) and kept.graph is not rewriter.model.graph:
                kept = _lift(kept, rewriter)
            for value in others:
                rewriter.replace_uses(value, kept)
            rewriter.drop_unused_weights()
            return
        node, original = (rewriter.node(name) for name in choice.site.nodes)
        if list(node.inputs) != list(original.inputs):
            raise Skip("their inputs were not merged")
        for old, new in zip(node.outputs, original.outputs, strict=True):
            rewriter.replace_uses(old, new)
        rewriter.remove(node)


def _lift(weight: ir.Value, rewriter: Rewriter) -> ir.Value:
    """The same weight in the main graph, where every body sees it."""
    tensor = weight.const_value
    if tensor is None:
        raise Skip("a weight has no value")
    lifted = rewriter.constant(tensor, f"{weight.name}_shared")
    rewriter.replace_uses(weight, lifted)
    return lifted


def _equal_weights(view: GraphView) -> Iterator[list[ir.Value]]:
    groups: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in view.weights():
        tensor = view.weight(value)
        if tensor is not None and not value.is_graph_output() and tensor.dtype != ir.DataType.STRING:
            groups[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
    for digest in (_sample, _whole):
        finer: dict[Hashable, list[ir.Value]] = defaultdict(list)
        for key, group in groups.items():
            for value in group if len(group) > 1 else ():
                tensor = view.weight(value)
                if tensor is not None:
                    finer[key, digest(tensor)].append(value)
        groups = finer
    yield from (group for group in groups.values() if len(group) > 1)


def _sample(tensor: ir.TensorProtocol) -> bytes:
    """Digest of the first, middle and last bytes."""
    return _digest(tensor, [(0, _SAMPLE), (tensor.nbytes // 2, _SAMPLE), (max(0, tensor.nbytes - _SAMPLE), _SAMPLE)])


def _whole(tensor: ir.TensorProtocol) -> bytes:
    return _digest(tensor, [(start, _PIECE) for start in range(0, tensor.nbytes, _PIECE)])


def _digest(tensor: ir.TensorProtocol, pieces: Iterable[tuple[int, int]]) -> bytes:
    digest = hashlib.sha256()
    if isinstance(tensor, ir.ExternalTensor):  # plain reads: mapped pages would count as memory in use
        with Path(tensor.path).open("rb") as file:
            for start, length in pieces:
                file.seek((tensor.offset or 0) + start)
                digest.update(file.read(min(length, tensor.nbytes - start)))
        return digest.digest()
    if tensor.dtype.bitwidth < 8:
        data = memoryview(tensor.tobytes())
    else:
        data = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
    for start, length in pieces:
        digest.update(data[start : start + length])
    return digest.digest()


def _signature(node: ir.Node, same: dict[ir.Value, ir.Value]) -> Hashable | None:
    """Equal for nodes that compute the same; None for a node that must stay on its own."""
    if node.domain != "" or node.op_type in RANDOM_OPS or node.op_type in QUANTIZED_OPS:
        return None
    if node.op_type == "Dropout" and len(node.inputs) > 2:
        return None  # it may be training
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            attributes.append((name, (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())))
        else:
            value = attribute.value
            attributes.append((name, tuple(value) if isinstance(value, (list, tuple)) else value))
    return (
        node.graph,
        node.op_type,
        tuple(attributes),
        tuple(None if v is None else same.get(v, v) for v in node.inputs),
        tuple(bool(v.name) for v in node.outputs),
    )
