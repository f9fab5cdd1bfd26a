"""What would make each layer faster on a device, by how much, and why not, before anything is rewritten.

Every figure is the cost model's word on the same layer done otherwise. No data is needed, and nothing is
said about accuracy: that a form is fast does not mean that the model survives it. What can run at all
is asked of the installed passes, so it is what `optimize` could do, and the model is looked at as `optimize`
does: a copy in memory, with constants folded and batch normalizations fused.

- A **layer** is a node with all that runs in its kernel; ``ratio`` is its seconds now over then.
- **int8, f16** hold data in another form, so both ends have to be converted where neighbours do not. ``alone``
  pays for both; ``region of N layers`` for its own share at the border of the largest connected set of
  layers that have such a kernel. What pays in the end is a part of a region; the summary counts that.
- **dynamic, w8, w4** take and give float; what they convert is part of the kernel.
- **channels**: the layer with fewer outputs, its readers as they are (they gain, too).
- **rank**: the layer as two factors, see :mod:`onnxcompress.alternatives`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.alternatives import (
    LOSES,
    channel_options,
    duration,
    impossible,
    option,
    rank_options,
    spent_on,
    times,
)
from onnxcompress.base import Pass, Precision, Stage
from onnxcompress.calibrate import value_shapes
from onnxcompress.data import open_data
from onnxcompress.findings import Explanation, Family, ModelExplanation, Option, RegionReport
from onnxcompress.forms import Forms
from onnxcompress.inspection import ModelLike, with_shapes
from onnxcompress.profile import Profile, load_profile
from onnxcompress.regions import Form, Layer, Region
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import tidy
from onnxcompress.view import GraphView
from onnxcompress.work import FAMILY, NodeWork, Shapes

__all__ = ["explain"]

_MOST = 0.5
"""What takes this share of a layer's time decides it; the least of channels and rank that is proposed."""
_MATTER = 5
_KINDS = ("int8", "dynamic", "f16", "w8", "w4", "channels", "rank")
_CARRY = ("elementwise", "transcendental", "softmax", "pool", "normalization", "move", "free")
"""Families whose outputs have the channels of their inputs."""


def explain(
    model: ModelLike,
    *,
    profile: str | os.PathLike[str] | Profile = "host-x86-vnni",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> ModelExplanation:
    """What would make each layer of a model faster on a device, by how much, and why not.

    Args:
        model: a file or an ``ir.Model``; it is not changed.
        profile: the device.
        shapes: concrete shapes of inputs by name; dynamic dimensions get defaults without them.

    Raises:
        DataError: ``shapes`` names an input the model does not have.
    """
    device = profile if isinstance(profile, Profile) else load_profile(os.fspath(profile))
    bound = with_shapes(model, shapes or {})
    tidied = models.infer_types(_tidied(bound, device.target()))
    seen = value_shapes(tidied, open_data(None, bound).first(), bodies=True)
    return _Explainer(GraphView(tidied), device, seen).result(len(GraphView(bound).nodes()))


def _tidied(model: ir.Model, target: Target) -> ir.Model:
    """The model as `optimize` looks at it: after the lossless passes that need no data."""
    for cls in registry.available().values():
        if cls.lossless and cls.stage is Stage.NORMALISE and cls.needs is Pass.needs:
            model = tidy(model, cls(), target, lambda view, choices: Evidence(synthetic=True)).model
    return model


class _Explainer:
    """One model on one device."""

    def __init__(self, view: GraphView, profile: Profile, shapes: Shapes) -> None:
        self.view, self.forms = view, Forms(view, profile, shapes)
        self.cost, self.total, self.work, self.rows = (
            self.forms.cost, self.forms.total, self.forms.work, self.forms.rows,
        )  # fmt: skip
        int8 = self.forms.both[0].seconds
        no_float = [
            n for n in self.forms.layers if not n.seconds and self._price(n, self.rows[n.name].precision) is None
        ]
        self.only_int8 = {layer.name: int8[layer.name] for layer in no_float if layer.name in int8}
        self.seconds = self.total.seconds + sum(self.only_int8.values())
        self._seen: dict[tuple[NodeWork, str, float], list[Option]] = {}

    def _price(self, layer: Layer, precision: str) -> float | None:
        return self.cost.node(self.work[layer.name], precision)

    def _now(self, layer: Layer) -> tuple[str, float]:
        """How a layer runs and for how long; as int8 where the device runs nothing else."""
        if layer.name in self.only_int8:
            return Precision.STATIC, self.only_int8[layer.name]
        return self.rows[layer.name].precision, layer.seconds

    def result(self, nodes: int) -> ModelExplanation:
        layers = tuple(
            self._explained(layer)
            for layer in self.forms.layers
            if layer.seconds > 0 or layer.name in self.total.unknown
        )
        spent: dict[str, float] = {}
        for layer in layers:
            for part, share in layer.spent.items():
                spent[part] = spent.get(part, 0.0) + share * layer.share
        dearest = sorted(layers, key=lambda layer: -layer.seconds)[:_MATTER]
        return ModelExplanation(
            profile=self.total.profile,
            nodes=(nodes, len(self.rows)),
            seconds=self.seconds,
            spent=dict(sorted(spent.items(), key=lambda item: -item[1])),
            matters=tuple(layer.name for layer in dearest),
            families=tuple(self._family(kind, layers) for kind in _KINDS),
            regions=tuple(
                RegionReport(
                    tuple(layer.name for layer in r.layers), r.seconds_float, r.seconds_all,
                    tuple(layer.name for layer in r.layers if layer.name in r.best), r.seconds_best,
                )
                for r in self.forms.regions["int8"]
            ),
            layers=layers,
            unknown=tuple(name for name in self.total.unknown if name not in self.only_int8),
        )  # fmt: skip

    def _family(self, kind: str, layers: Sequence[Explanation]) -> Family:
        touched = gaining = 0.0
        possible = False
        then = self.seconds
        for layer in layers:
            found = [o for o in layer.options if o.kind == kind and o.seconds is not None and o.keeps >= 0.99 * _MOST]
            touched += layer.share if found else 0.0
            possible |= bool(found)
            gains = [o.seconds for o in found if o.verdict == "gains" and o.seconds is not None]
            gaining += layer.share if gains else 0.0
            then -= layer.seconds - min(gains) if gains else 0.0
        if kind in self.forms.regions:
            then = self.seconds - sum(r.seconds_float - r.seconds_best for r in self.forms.regions[kind])
        reasons = {
            o.why: None for layer in layers for o in layer.options if o.kind == kind and o.verdict == "impossible"
        }
        why = "" if possible else next(iter(reasons), "") if len(reasons) == 1 else "possible nowhere"
        return Family(kind, touched, gaining, self.seconds / then if then > 0 else 1.0, why)

    # --- one layer ------------------------------------------------------------------------------

    def _explained(self, layer: Layer) -> Explanation:
        row, (precision, seconds) = self.rows[layer.name], self._now(layer)
        spent = spent_on(self.cost, self.work[layer.name], precision)
        options = tuple(self._options(layer))
        sensible = [o for o in options if o.verdict == "gains" and o.keeps >= 0.99 * _MOST and self._stands(layer, o)]
        helps = max(sensible, key=lambda o: o.ratio or 0.0, default=None)
        return Explanation(
            name=layer.name,
            op=row.op_type,
            kind=row.kind,
            nodes=tuple(str(n.name) for n in layer.nodes[1:]),
            precision=precision,
            seconds=seconds,
            share=seconds / self.seconds if self.seconds else 0.0,
            spent=spent,
            note=_note(spent)
            if row.known or layer.name in self.only_int8
            else "its shapes or its kernel are not known, so this is too low",
            region=self._numbers.get(layer.name),
            options=options,
            helps="" if helps is None else _helps(helps),
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, r in enumerate(self.forms.regions["int8"]) for name in r.border}

    def _stands(self, layer: Layer, option: Option) -> bool:
        """Whether the cheapest mix of a region agrees with an option that rests on the region."""
        region = self.forms.region_of.get((option.kind, layer.name))
        return not option.detail.startswith("region") or (region is not None and layer.name in region.best)

    def _options(self, layer: Layer) -> Iterator[Option]:
        for form in self.forms.both:
            yield from self._form_options(layer, form)
        work, (precision, now) = self.work[layer.name], self._now(layer)
        if not (work.macs and work.params):
            return
        yield self._dynamic_option(layer)
        for kind in ("w8", "w4"):
            yield self._swapped(kind, layer, 0.0)
        if self._price(layer, precision) is None:
            return
        if obstacle := self._keeps_channels(layer):
            yield impossible("channels", "", obstacle)
        elif work.out_channels > 1:
            key = (replace(work, name=""), precision, now)
            if key not in self._seen:
                self._seen[key] = channel_options(self.cost, work, precision, now)
            yield from self._seen[key]
        yield from rank_options(self.cost, work, precision, now)

    def _swapped(self, kind: str, layer: Layer, more: float, why: str = "") -> Option:
        """The layer's own node at another precision, everything around it as it is."""
        precision, now = self._now(layer)
        here, there = self._price(layer, precision), self._price(layer, kind)
        if there is None or here is None:
            return impossible(kind, "", "no such kernel on this profile")
        return option(kind, "", now, now - here + there + more, why)

    def _dynamic_option(self, layer: Layer) -> Option:
        if layer.name not in self.forms.dynamic:
            why = self.forms.refused.get(layer.name)
            return impossible("dynamic", "", why or f"no dynamic int8 form of {layer.nodes[0].op_type} is on offer")
        # what runs in a float or integer kernel but not in the dynamic one becomes a node of its own
        apart = [
            str(n.name) for n in layer.nodes if str(n.name) in self.forms.covered and self.rows[str(n.name)].inside
        ]
        more = sum((self.cost.node(self.work[name]) or 0.0) - self.rows[name].seconds for name in apart)
        return self._swapped(Precision.DYNAMIC, layer, more, "its conversions included")

    @cached_property
    def _reach_output(self) -> Mapping[str, str]:
        """By value: the graph output that has its channels."""
        found = {str(v.name): str(v.name) for v in self.view.model.graph.outputs}
        for node in reversed(self.view.nodes(subgraphs=False)):
            ends = [found[str(v.name)] for v in node.outputs if v.name in found]
            if ends and FAMILY.get(node.op_type) in _CARRY:
                for value in node.inputs:
                    if value is not None and value.dtype == ir.DataType.FLOAT:
                        found.setdefault(str(value.name), ends[0])
        return found

    def _keeps_channels(self, layer: Layer) -> str:
        """A plain reason why its channels cannot become fewer; empty if none is seen."""
        for value in layer.writes:
            if value in layer.leaves:
                return "cannot be pruned: its output is a graph output"
            if value in self._reach_output:
                return f"cannot be pruned: its channels reach the graph output {self._reach_output[value]!r}"
        for weight in layer.nodes[0].inputs:
            tensor = self.view.weight(weight)
            if weight is not None and tensor is not None and len(tensor.shape) > 1:
                others = {str(n.name) for n, _ in self.view.consumers(weight)} - {layer.name}
                if others:
                    return f"cannot be pruned alone: its weight is shared with {min(others)!r}"
        return ""

    # --- int8 and f16 ---------------------------------------------------------------------------

    def _form_options(self, layer: Layer, form: Form) -> Iterator[Option]:
        seconds = form.seconds.get(layer.name)
        if seconds is None:
            why = self._why_not(layer, form)
            yield from [impossible(form.kind, "", why)] if why else []
            return
        into, out_of = sum(map(form.into, layer.reads)), sum(map(form.out_of, layer.writes))
        if layer.name in self.only_int8:
            yield option(form.kind, "", seconds, seconds, "the only way it runs on this device")
            return
        kernel = layer.seconds / seconds
        itself = f"{times(kernel)} by itself" + (f": the {form.kind} kernel is slower" if kernel <= LOSES else "")
        if form.kind == "int8" and self.forms.static[layer.name].native:
            yield impossible(form.kind, "alone", f"{itself}, but it needs an integer kernel in front of it")
        else:
            then = seconds + into + out_of
            paid = f", {times(layer.seconds / then)} with its conversions ({_conversions(form, into, out_of)})"
            yield option(form.kind, "alone", layer.seconds, then, itself + (paid if then > seconds else ""))
        region = self.forms.region_of[form.kind, layer.name]
        if len(region.layers) > 1:
            yield _in_region(layer, form, region, seconds)

    def _why_not(self, layer: Layer, form: Form) -> str:
        if form.kind != "int8":
            work = self.work[layer.name]
            return "no such kernel on this profile" if work.macs else ""
        op = layer.nodes[0].op_type
        why = self.forms.refused.get(layer.name, "") or self.forms.stranded.get(layer.name, "")
        if layer.name in self.forms.static and not why:
            why = f"the profile has no int8 kernel for this {op}"
        if not why:
            return f"no int8 form of {op} is on offer" if self.work[layer.name].macs else ""
        able = form.seconds
        before = [v for v in layer.reads if self.forms.writers.get(v) in able]
        after = [v for v in layer.writes if any(r in able for r in self.forms.readers.get(v, ()))]
        if before and after:
            spent = sum(map(form.out_of, before)) + sum(map(form.into, after))
            return f"{why}: it stays float and splits the region ({duration(spent)} of conversions)"
        return why


def _in_region(layer: Layer, form: Form, region: Region, seconds: float) -> Option:
    into, out_of = region.border[layer.name]
    then, name = seconds + into + out_of, layer.name
    paid = f", where it pays {_conversions(form, into, out_of)}" if into + out_of else ""
    why = f"{times(layer.seconds / then)} in its region of {len(region.layers)} layers{paid}"
    around = f"{duration(region.middle[name])} of conversions"
    if name in region.best and then > layer.seconds:
        why += f"; as float amid the others it would cause {around}"
    elif name not in region.best:
        why += "; in the cheapest mix it stays float" + (f", for all the {around}" if region.middle[name] else "")
    return option(form.kind, f"region of {len(region.layers)} layers", layer.seconds, then, why)


def _helps(best: Option) -> str:
    what = f"{best.kind}, {best.detail}" if best.detail else best.kind
    return f"{what}: {times(best.ratio)}" if best.ratio is not None else what


def _conversions(form: Form, into: float, out_of: float) -> str:
    ends = zip(form.names, (into, out_of), strict=True)
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in ends if seconds)


def _note(spent: Mapping[str, float]) -> str:
    """What decides a layer's time, where one thing does."""
    part, share = next(iter(spent.items()), ("", 0.0))
    if share < _MOST:
        return ""
    return {
        "arithmetic": "",
        "activations": f"moving data is {share:.0%} of its time",
        "weights": f"reading its weights is {share:.0%} of its time",
        "memory": "weights come from memory: bytes decide",
        "dispatch": f"too small: dispatch is {share:.0%} of its time",
    }[part]
