"""Single layers of real models, as they are and factored: what is lost of their outputs, and how long they take.

Every layer is cut out as a model of its own. It reads what it reads in the whole model, so its error is measured
and not worked out, and its latency is that of real shapes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from benchmarks.producers import first_line
from benchmarks.tasks import TASKS, Feed, Feeds
from onnxcompress import optimize
from onnxcompress.base import Skip
from onnxcompress.calibrate import calibrate, value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.data import open_data
from onnxcompress.errors import OnnxCompressError
from onnxcompress.fitting.measuring import Stopwatch
from onnxcompress.passes._forms import Form, Ranks, Settings
from onnxcompress.passes._product_forms import joint_forms
from onnxcompress.passes.factorize import FORMS
from onnxcompress.profile import load_profile
from onnxcompress.session import Runner
from onnxcompress.sketch import Drawn, Slot, drawn_model, redrawn, slots
from onnxcompress.statistics import Evidence
from onnxcompress.view import GraphView

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

PLAIN, AWARE = "plain", "aware"
SETTINGS = {PLAIN: Settings(aware=False), AWARE: Settings(aware=True)}
FITTED, HELD_OUT = "fitted", "held_out"
_FEW = 2
"""Feeds that normalising is checked on; it changes no layer that matters here."""
_ROUND_SECONDS = 2e-3
_LEAST_ROUNDS = 8


@dataclass
class Loss:
    """What one form of one layer loses of its output at about half of its weights.

    Attributes:
        share: of the weights that are left.
        errors: by candidate and samples, E|y - y'|^2 / E|y|^2.
        predicted: what the aware form says of the samples it was fitted to.
        seconds: to work out the weights, by candidate.
    """

    layer: str
    form: str
    ranks: Ranks
    share: float
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted: float = math.nan
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Timed:
    """One layer before and after, milliseconds on one thread and as predicted."""

    layer: str
    form: str
    ranks: Ranks
    share: float
    before_ms: float
    after_ms: float
    predicted_before_ms: float
    predicted_after_ms: float


def normalised(task: str) -> ir.Model:
    """A task's model as passes see it."""
    return optimize(TASKS[task].path, passes=[], calibration=TASKS[task].feeds(_FEW), timing=False).model


def found_forms(view: GraphView, wanted: Collection[str] = ()) -> Iterator[tuple[Form, ...]]:
    """The forms of every layer, and of every value that several layers read.

    Args:
        view: the model.
        wanted: names of forms; all by default.
    """
    for node in view.nodes(*FORMS, subgraphs=False):
        try:
            forms = FORMS[node.op_type](node, view)
        except Skip:
            continue
        if kept := tuple(f for f in forms if (not wanted or f.name in wanted) and f.nodes[0] == node.name):
            yield kept
    for form in joint_forms(view):
        if not wanted or form.name in wanted:
            yield (form,)


# --- output errors --------------------------------------------------------------------------------------


@dataclass
class _Cut:
    """A form under test: sessions of the layer as it is and of its candidates, and sums of energies."""

    loss: Loss
    reads: tuple[str, ...]
    results: tuple[str, ...]
    shifts: dict[str, Mapping[str, Array]]
    runners: dict[str, Runner]
    energy: dict[str, Array] = field(default_factory=dict)
    wrong: dict[tuple[str, str], Array] = field(default_factory=dict)


def losses(task: str, samples: int, held_out: int, share: float, wanted: Collection[str]) -> dict[str, Any]:
    """Output errors of every layer, plain and activation-aware, on fitted and on other samples.

    Args:
        task: its name.
        samples: feeds that weights are fitted to; errors are measured on all of them.
        held_out: feeds after those.
        share: of a layer's weights that are left, at most.
        wanted: names of forms; all by default.
    """
    model = normalised(task)
    data = TASKS[task].feeds(samples + held_out)
    shapes = value_shapes(model, dict(next(iter(data))), bodies=True)
    view = GraphView(model, shapes)
    forms = [form for forms in found_forms(view, wanted) for form in forms]
    needs = sorted({need for form in forms for need in form.needs()})
    source = open_data(Feeds(lambda: islice(data, samples)), model)
    evidence = calibrate(model, needs, source, shapes=False)
    left_out: dict[str, str] = {}
    cuts: list[_Cut] = []
    for form in forms:
        ranks = form.at_share(share, 1)
        name = " + ".join(form.nodes)
        if ranks is None:
            left_out[f"{name}: {form.name}"] = f"no rank has {share:.0%} of its weights"
            continue
        try:
            cuts.append(_cut(form, name, ranks, evidence, view, shapes))
        except OnnxCompressError as error:
            left_out[f"{name}: {form.name}"] = error.message
    _measure(model, cuts, data, samples)
    return {"layers": [asdict(c.loss) for c in cuts], "left_out": left_out, "sites": len({f.nodes for f in forms})}


def _cut(form: Form, name: str, ranks: Ranks, evidence: Evidence, view: GraphView, shapes: Shapes) -> _Cut:
    before = [redrawn(view.node(n)) for n in form.nodes]
    after = form.drawing(ranks)
    found = Loss(name, form.name, ranks, form.weights(ranks) / form.old_weights)
    whole = _alone(before, view, shapes)
    results = tuple(str(o.name) for o in whole.graph.outputs)
    made = _Cut(found, tuple(str(i.name) for i in whole.graph.inputs), results, {}, {"": Runner(whole)})
    for candidate, settings in SETTINGS.items():
        start = time.perf_counter()
        with threadpool_limits(1, "blas"):
            factors = form.factors(ranks, evidence, settings)
        found.seconds[candidate] = round(time.perf_counter() - start, 3)
        if candidate == AWARE:
            found.predicted = factors.lost
        made.shifts[candidate] = factors.shifts
        made.runners[candidate] = Runner(_alone(after, view, shapes, factors.weights))
    return made


def _alone(
    drawing: Sequence[Drawn], view: GraphView, shapes: Shapes, weights: Mapping[Slot, Array] | None = None
) -> ir.Model:
    """A drawing as a model that runs, for inputs of any size."""
    model, _ = drawn_model(drawing, view, shapes)
    for slot, array in (weights or {}).items():
        model.graph.initializers[slot.name].const_value = ir.tensor(array, name=slot.name)
    for value in model.graph.inputs:
        value.shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    for value in model.graph.outputs:
        value.type, value.shape = value.type or ir.TensorType(ir.DataType.FLOAT), None
    return model


def _measure(model: ir.Model, cuts: Sequence[_Cut], data: Feeds, samples: int) -> None:
    """Runs every feed through the model, and what each layer reads through its candidates."""
    inputs = {str(v.name) for v in model.graph.inputs}
    runner = Runner(model, outputs=sorted({r for c in cuts for r in c.reads} - inputs))
    for number, feed in enumerate(data):
        seen = {**feed, **runner.run(feed)}
        of = FITTED if number < samples else HELD_OUT
        for cut in cuts:
            own = {name: seen[name] for name in cut.reads}
            right = cut.runners[""].run(own)
            cut.energy[of] = cut.energy.get(of, 0.0) + np.array([_power(right[r]) for r in cut.results])
            for candidate in SETTINGS:
                got = cut.runners[candidate].run(own)
                shift = cut.shifts[candidate]
                errors = [_power(right[r] - got[r] - _shift(shift, r)) for r in cut.results]
                cut.wrong[candidate, of] = cut.wrong.get((candidate, of), 0.0) + np.array(errors)
    for cut in cuts:
        for candidate in SETTINGS:
            cut.loss.errors[candidate] = {
                of: float(np.mean(cut.wrong[candidate, of] / np.maximum(energy, 1e-30)))
                for of, energy in cut.energy.items()
            }


def _shift(shifts: Mapping[str, Array], name: str) -> Array | float:
    """What the pass would add to a bias behind the layer."""
    return shifts[name].astype(np.float32) if name in shifts else 0.0


def _power(array: Array) -> float:
    flat = array.reshape(-1)
    return float(np.vdot(flat, flat))


# --- latency --------------------------------------------------------------------------------------------


def latencies(task: str, profile: str, share: float, budget: float, wanted: Collection[str]) -> dict[str, Any]:
    """Every distinct layer of a model before and after, timed in turns and predicted.

    Args:
        task: its name.
        profile: of this machine.
        share: of a layer's weights that are left, at most; ranks are in the profile's steps.
        budget: seconds of timing for each model.
        wanted: names of forms; all by default.
    """
    model = normalised(task)
    feed = next(iter(TASKS[task].feeds(1)))
    shapes = value_shapes(model, dict(feed), bodies=True)
    view = GraphView(model, shapes)
    step = load_profile(profile).target().channel_multiple
    seen: set[tuple[object, ...]] = set()
    rows: list[Timed] = []
    left_out: dict[str, str] = {}
    values = _Values(model, feed)
    for forms in found_forms(view, wanted):
        before = [redrawn(view.node(n)) for n in forms[0].nodes]
        if (key := _signature(before, view, shapes)) in seen:
            continue
        seen.add(key)
        name = " + ".join(forms[0].nodes)
        ranked = [(f, r) for f in forms if (r := _ranks(f, share, step)) is not None]
        try:
            watches = [_watch(before, view, shapes, values, profile)]
            watches += [_watch(f.drawing(r), view, shapes, values, profile) for f, r in ranked]
        except Exception as error:  # one layer onnxruntime cannot run by itself is no end of the others
            left_out[name] = first_line(error)
            continue
        _in_turns([w for w, _ in watches], budget)
        (whole, predicted), *others = watches
        rows += [
            Timed(
                name, form.name, ranks, form.weights(ranks) / form.old_weights,
                *(1e3 * s for s in (whole.seconds(), watch.seconds(), predicted, expected)),
            )
            for (form, ranks), (watch, expected) in zip(ranked, others, strict=True)
        ]  # fmt: skip
    return {"layers": [asdict(r) for r in rows], "left_out": left_out, "distinct": len(seen)}


def _ranks(form: Form, share: float, step: int) -> Ranks | None:
    """In the profile's steps, or in smaller ones where the layer is narrow; None for what is in the file only."""
    while not form.stored:
        if (ranks := form.at_share(share, step)) is not None or step == 1:
            return ranks
        step = max(step // 2, 1)
    return None


def _signature(nodes: Sequence[Drawn], view: GraphView, shapes: Shapes) -> tuple[object, ...]:
    """Equal for layers that take equally long."""

    def extents(read: object) -> object:
        value = view.value(str(read))
        tensor = None if value is None else value.const_value
        return shapes.get(str(read)) if tensor is None else tuple(tensor.shape)

    return tuple((n.op, n.attributes, *map(extents, n.inputs), *map(extents, n.outputs)) for n in nodes)


class _Values:
    """What layers read in one run of the model."""

    def __init__(self, model: ir.Model, feed: Feed) -> None:
        self._model, self._feed = model, feed

    def __call__(self, names: Sequence[str]) -> dict[str, Array]:
        missing = [n for n in names if n not in self._feed]
        found = Runner(self._model, outputs=missing).run(self._feed) if missing else {}
        return {n: self._feed[n] if n in self._feed else found[n] for n in names}


def _watch(
    drawing: Sequence[Drawn], view: GraphView, shapes: Shapes, values: _Values, profile: str
) -> tuple[Stopwatch, float]:
    """A drawing as a model of its own, and the seconds predicted of it."""
    model, known = drawn_model(drawing, view, shapes)
    predicted = CostModel(load_profile(profile)).model(GraphView(model), known).seconds
    rng = np.random.default_rng(0)
    random = {s: (0.1 * rng.standard_normal(s.shape)).astype(np.float32) for s in slots(drawing)}
    inputs = values([str(i.name) for i in model.graph.inputs])
    return Stopwatch(ir.to_proto(_alone(drawing, view, shapes, random)), inputs=inputs), predicted


def _in_turns(watches: Sequence[Stopwatch], budget: float) -> None:
    repeats = []
    for watch in watches:
        watch.run()
        repeats.append(max(1, int(_ROUND_SECONDS / max(watch.times.pop(), 1e-7))))
    end = time.perf_counter() + budget * len(watches)
    while time.perf_counter() < end or len(watches[0].times) < _LEAST_ROUNDS:
        for watch, count in zip(watches, repeats, strict=True):
            watch.run(count)
