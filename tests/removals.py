"""Removal against silence: a model without some positions gives what it gives with zeros at them.

Zeros are put at the removed positions of every weight, and of every value as soon as it is made, so that no
operator further on sees what an activation makes of a zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress.calibrate import value_shapes
from onnxcompress.coupling import Axis, Coupling, Group, kept_positions, remove
from onnxcompress.evaluate import compare, is_lossless, rounding_noise
from onnxcompress.rewrite import Rewriter
from onnxcompress.view import GraphView
from tests.models import Feeds, proto_of

__all__ = ["check_removal", "coupling_of", "half", "parts_of", "pruned", "reasons", "shapes_in", "silenced", "some"]

Indices = npt.NDArray[np.int64]
Keeps = Mapping[Group, npt.NDArray[np.bool_]]


def coupling_of(model: ir.Model, feed: Mapping[str, npt.NDArray[np.generic]] | None = None) -> Coupling:
    """Groups of a model; shapes are those of a run where there is a feed."""
    return Coupling(GraphView(model), None if feed is None else value_shapes(model, dict(feed), bodies=True))


def half(coupling: Coupling, seed: int = 0) -> Keeps:
    """Keeps any half of what is free in every group."""
    return some(coupling, seed, 0.5)


def some(coupling: Coupling, seed: int, share: float | None = None) -> Keeps:
    """Keeps this share of what is free in every group, or one drawn for each."""
    rng = np.random.default_rng(seed)
    keeps: dict[Group, npt.NDArray[np.bool_]] = {}
    for group in coupling.groups:
        free = np.flatnonzero(~group.fixed)
        count = round((rng.random() if share is None else 1 - share) * len(free))
        keep = np.ones(group.size, bool)
        keep[rng.permutation(free)[:count]] = False
        for part in group.parts:  # no tensor may be left empty
            if not keep[part.atoms].any():
                keep[rng.choice(part.atoms)] = True
        if not keep.all():
            keeps[group] = keep
    return keeps


def parts_of(group: Group) -> set[str]:
    """Axes of a group, "w[0]"; "w[0]/1" where it is the second factor of the axis."""
    return {f"{p.factor.axis}" + (f"/{p.factor.place}" if p.factor.place else "") for p in group.parts}


def reasons(group: Group) -> set[tuple[str, str]]:
    """Nodes that pin it and why."""
    return {(pin.node, pin.reason) for pin in group.pins}


def pruned(model: ir.Model, coupling: Coupling, keeps: Keeps) -> ir.Model:
    """A clone without the rest."""
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    remove(coupling, keeps, rewriter)
    rewriter.drop_unused_weights()
    return copy


def check_removal(model: ir.Model, coupling: Coupling, keeps: Keeps, feeds: Feeds) -> ir.Model:
    """Removes, and compares in every way; returns what is left."""
    kept = kept_positions(coupling, keeps)
    after = pruned(model, coupling, keeps)
    onnx.checker.check_model(proto_of(after), full_check=True)
    assert _signature(after) == _signature(model)
    _check_sizes(after, kept, model)
    reference = silenced(model, coupling, kept)
    noise = rounding_noise(reference, feeds)
    found = compare(reference, after, feeds)
    assert is_lossless(found, len(GraphView(model).nodes()), noise), (found, noise)
    return after


def _signature(model: ir.Model) -> list[tuple[str, str, str]]:
    return [(str(v.name), str(v.dtype), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def shapes_in(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, lists of extents and positions left out."""
    found = {}
    for value in GraphView(model).weights():
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT:
            found[str(value.name)] = tuple(int(d) for d in value.const_value.shape.numpy())
    return found


def _check_sizes(after: ir.Model, kept: Mapping[Axis, Indices], before: ir.Model) -> None:
    """Weights all of whose readers see the same have just the size that was said."""
    sizes, old = shapes_in(after), shapes_in(before)
    for axis, positions in kept.items():
        if axis.dim >= 0 and not axis.use and axis.value in old and axis.value in sizes:
            assert sizes[axis.value][axis.dim] == len(positions), axis
    for name, shape in sizes.items():
        cut = {a.dim for a in kept if a.value == name}
        if name in old:
            assert [s for k, s in enumerate(shape) if k not in cut] == [
                s for k, s in enumerate(old[name]) if k not in cut
            ]


def silenced(model: ir.Model, coupling: Coupling, kept: Mapping[Axis, Indices]) -> ir.Model:
    copy = models.clone(model)
    rewriter = Rewriter(copy)
    view = GraphView(copy)
    types = {str(v.name): view.dtype(v) for n in view.nodes() for v in n.outputs if v.name}
    by_tensor: dict[tuple[str, str], dict[int, Indices]] = defaultdict(dict)
    for axis, positions in kept.items():
        if axis.dim >= 0:
            by_tensor[axis.value, axis.use][axis.dim] = positions
    for (name, use), cuts in by_tensor.items():
        value = rewriter.value(name)
        tensor = value.const_value if value.is_initializer() else None
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            array = np.where(_mask(tensor.numpy().shape, cuts), tensor.numpy(), np.float32(0))
            if use:
                node, _, index = use.rpartition(":")
                rewriter.set_weight(rewriter.node(node), int(index), array)
            else:
                rewriter.replace_weight(value, array)
        elif tensor is None and types.get(name) == ir.DataType.FLOAT:
            shape = _shape(name, coupling.sizes)
            _silence(value, _mask([n if k in cuts else 1 for k, n in enumerate(shape)], cuts), rewriter)
    return copy


def _shape(name: str, sizes: Mapping[Axis, int]) -> list[int]:
    found: list[int] = []
    while (size := sizes.get(Axis(name, len(found)))) is not None:
        found.append(size)
    return found


def _mask(shape: Sequence[int], cuts: Mapping[int, Indices]) -> npt.NDArray[np.bool_]:
    mask = np.ones(tuple(shape), bool)
    for dim, positions in cuts.items():
        along = np.zeros(shape[dim], bool)
        along[positions] = True
        mask &= along.reshape([-1 if k == dim else 1 for k in range(len(shape))])
    return mask


def _silence(value: ir.Value, mask: npt.NDArray[np.bool_], rewriter: Rewriter) -> None:
    """Everybody reads zeros where the mask is false."""
    producer = value.producer()
    assert producer is not None, f"{value.name} is an input and has to stay"
    chosen = rewriter.constant(mask, f"{value.name}_kept", like=producer)
    zero = rewriter.constant(np.zeros((), np.float32), f"{value.name}_silence", like=producer)
    (quiet,) = rewriter.insert("Where", [chosen, value, zero], after=value, dtype=ir.DataType.FLOAT)
    rewriter.replace_uses(value, quiet, keep=[n for n in (quiet.producer(),) if n is not None])
