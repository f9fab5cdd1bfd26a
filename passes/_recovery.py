"""Cutting groups down and making the weights that read them up for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from onnxcompress.coupling import Axis, Coupling, Group, Reader, remove
from onnxcompress.coupling.removal import kept_positions
from onnxcompress.passes._constant_sum import absorb
from onnxcompress.passes._int8 import gate_on_top
from onnxcompress.passes._readers import bias_place, linears, need_of
from onnxcompress.passes._refit import refit, refit_with_bias
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need
from onnxcompress.view import GraphView

__all__ = ["behind_switch", "can_simulate", "cut_down", "needs"]

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def needs(group: Group, view: GraphView) -> Iterable[Need]:
    """What has to be observed to refit the readers of a group."""
    found = (need_of(view.node(r.node), r) for r in group.readers)
    return tuple(n for n in found if n is not None)


def can_simulate(group: Group, view: GraphView) -> bool:
    """Whether zeros in the weights of its readers are all that removal does."""
    nodes = [view.node(r.node) for r in group.readers]
    single = all(not v.uses() and not v.is_graph_output() for node in nodes for v in node.outputs[1:])
    return (
        bool(nodes) and single and not group.unweighted and not any(view.in_subgraph(view.node(n)) for n in group.nodes)
    )


def refitted(
    node: ir.Node, reader: Reader, kept: Indices, evidence: Evidence, ridge: float | None
) -> tuple[npt.NDArray[np.float32], Array | None]:
    """The weight of a reader, full size, with zeros where it reads what is gone.

    Args:
        node: the reader.
        reader: how it reads.
        kept: positions kept of the axis it sums over.
        evidence: second moments of its data, where they were observed.
        ridge: see :mod:`onnxcompress.passes._refit`; None to leave the weights that stay as they are.

    Returns:
        The weight, and what has to be added to the bias per output; None for nothing. A weight that other nodes
        read, too, stays as it is where it stays at all; the bias is corrected all the same.
    """
    value = node.inputs[reader.index]
    if value is None or value.const_value is None:
        raise ValueError(f"input {reader.index} of {node.name!r} is no weight")
    array = np.array(value.const_value.numpy())
    stay = np.zeros(array.shape[reader.weight.dim], bool)
    stay[kept] = True
    np.moveaxis(array, reader.weight.dim, 0)[~stay] = 0
    shift: Array | None = None
    if ridge is None:
        return array, None
    tied = _tied(value, reader)
    for linear in linears(node, reader, evidence):
        features = np.flatnonzero(stay[linear.positions])
        new = np.zeros_like(linear.weight)
        if tied:
            gone = np.where(stay[linear.positions], 0.0, linear.moments.mean)
            shift = None if linear.bias is None else linear.bias(linear.weight @ gone)
            continue
        if linear.bias is None:
            new[:, features] = refit(linear.weight, linear.moments.matrix, features, ridge=linear.ridge(ridge))
        else:
            found = refit_with_bias(
                linear.weight, linear.moments.matrix, linear.moments.mean, features, ridge=linear.ridge(ridge)
            )
            new[:, features] = found.weight
            shift = linear.bias(found.bias)
        linear.write(array, new)
    return array, shift


def _tied(value: ir.Value, reader: Reader) -> bool:
    """Whether several nodes read one large weight: refitted for one it would be wrong for the others."""
    return not reader.weight.use and len(value.uses()) > 1


def cut_down(
    coupling: Coupling,
    keeps: Mapping[Group, npt.NDArray[np.bool_]],
    rewriter: Rewriter,
    evidence: Evidence,
    *,
    ridge: float | None,
) -> None:
    """Refits every reader of the groups, once, and removes what goes.

    Args:
        coupling: of the model as it is.
        keeps: by group, which atoms stay.
        rewriter: of the model.
        evidence: second moments.
        ridge: see :func:`refitted`.
    """
    kept = kept_positions(coupling, keeps)
    with threadpool_limits(1, "blas"):
        later = _refit_readers(keeps, kept, rewriter, evidence, ridge)
    remove(coupling, keeps, rewriter)
    for name, shift, outputs in later:  # a bias that was not there before is made at its final size
        node = rewriter.node(name)
        place = bias_place(node)
        if place is not None:
            absorb(rewriter, place, shift if outputs is None else shift[outputs], -1 if node.op_type == "MatMul" else 1)


def _refit_readers(
    keeps: Iterable[Group],
    kept: Mapping[Axis, Indices],
    rewriter: Rewriter,
    evidence: Evidence,
    ridge: float | None,
) -> list[tuple[str, Array, Indices | None]]:
    """Writes the new weights; tells node, shift of the bias, and the outputs kept, for later."""
    readers = dict.fromkeys(r for group in keeps for r in group.readers if r.weight in kept)
    later: list[tuple[str, Array, Indices | None]] = []
    for reader in readers:
        node = rewriter.node(reader.node)
        array, shift = refitted(node, reader, kept[reader.weight], evidence, ridge)
        value = node.inputs[reader.index]
        if value is not None and not _tied(value, reader):  # else it is only cut, with the others that read it
            rewriter.set_weight(node, reader.index, array)
        if shift is not None:
            outputs = kept.get(Axis(reader.weight.value, reader.outputs, reader.weight.use))
            later.append((reader.node, shift, outputs))
    return later


def behind_switch(
    group: Group,
    kept: Mapping[Axis, Indices],
    rewriter: Rewriter,
    evidence: Evidence,
    switch: ir.Value,
    *,
    ridge: float | None,
) -> None:
    """Where the switch is on, readers of a group do without what is gone."""
    by_node: dict[str, list[Reader]] = {}
    for reader in group.readers:
        if reader.weight in kept:
            by_node.setdefault(reader.node, []).append(reader)
    for name, readers in by_node.items():
        node = rewriter.node(name)
        shifts: list[Array] = []
        inputs = list(node.inputs)
        for reader in readers:
            with threadpool_limits(1, "blas"):
                array, shift = refitted(node, reader, kept[reader.weight], evidence, ridge)
            inputs[reader.index] = rewriter.constant(array, f"{name}_pruned", like=node)
            if shift is not None:
                shifts.append(shift)
        copy = partial(_copy, rewriter, node, inputs, sum(shifts[1:], shifts[0]) if shifts else None)
        gate_on_top(rewriter, node.outputs[0], switch, copy)


def _copy(
    rewriter: Rewriter, node: ir.Node, inputs: Sequence[ir.Value | None], shift: Array | None, top: ir.Value, _: str
) -> ir.Value:
    """A node like another, with these inputs and something added to its output, behind ``top``."""
    last = node.outputs[0]
    new = rewriter.insert(
        node.op_type, inputs, dict(node.attributes.items()), after=top, domain=node.domain,
        outputs=len(node.outputs), dtype=last.dtype, shape=last.shape,
    )[0]  # fmt: skip
    if shift is None:
        return new
    wide = node.op_type in ("MatMul", "Gemm")
    dims = 0 if wide or inputs[1] is None or inputs[1].const_value is None else len(inputs[1].const_value.shape) - 2
    total = np.asarray(shift, np.float32).reshape(-1, *(1,) * dims)
    constant = rewriter.constant(total, f"{node.name}_shift", like=node)
    return rewriter.insert("Add", [new, constant], after=new.producer(), dtype=last.dtype, shape=last.shape)[0]
