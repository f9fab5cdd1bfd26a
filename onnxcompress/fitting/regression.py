"""From measured times to the prices of a profile.

What a link or a network multiplies the coefficients of a profile with, :meth:`CostModel.usage` tells; its seconds
are known. So every measurement is a linear equation, and one fit over all of them finds all coefficients: none
negative, on *relative* errors, and with outliers counting less (iteratively reweighted, the weights of a
soft-L1 loss). Where measurements leave a choice (elements or pieces, weights or multiply-accumulates) a small
penalty prefers the plainer term. Networks enter twice: by their nodes, as the profiler shares them out, and not at
all in the other half, on which the fit is checked.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import scipy.optimize

from onnxcompress.cost import CostModel, quantities
from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.equations import Row, link_row, net_rows, seen
from onnxcompress.fitting.measuring import FORMS, forms
from onnxcompress.fitting.nets import CHECKED, FITTED, Net
from onnxcompress.fitting.samples import Measurements, NetTime
from onnxcompress.fitting.structure import CAREFUL, STANDS_FOR, structure
from onnxcompress.profile_schema import Profile
from onnxcompress.profile_tables import Cache, Device, Kernel, Provenance

__all__ = ["Checked", "Fitted", "Solution", "fit", "rebuilt", "solve"]

Key = tuple[str, str, str]
Array = npt.NDArray[np.float64]

_TERMS = ("fixed", "mac", "element", "weight", "patch", "segment")
_PENALTY = {"fixed": 0.06, "mac": 1e-3, "element": 5e-3, "weight": 5e-2, "patch": 2e-2, "segment": 5e-2, "miss": 2e-2}
_MOST = {"fixed": 20e-6, "segment": 12e-9, "weight": 2e-9, "patch": 12e-9, "element": 12e-9}
"""Seconds no coefficient of these terms can be above, on any processor of a phone or better."""

_SOFT = 0.15  # relative errors beyond this count less


# --- solving --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """Coefficients in seconds.

    Attributes:
        kernels: structure of every kernel (channel block, alignment) and its coefficients by term.
        fused: seconds an element of an absorbed node costs, by (precision, operator type).
        missed: by level of the cache: seconds of a byte of activations and of weights.
        errors: mean relative error on the rows a kernel makes most of, by key.
        points: how many those are.
    """

    kernels: Mapping[Key, tuple[Kernel, Mapping[str, float]]]
    fused: Mapping[tuple[str, str], float]
    missed: tuple[tuple[float, float], ...]
    errors: Mapping[Key, float]
    points: Mapping[Key, int]


def solve(rows: Sequence[Row], profile: Profile, per_node: float) -> Solution:
    """All coefficients at once.

    Args:
        rows: equations.
        profile: the structure.
        per_node: seconds of dispatching a node.
    """
    kernels: dict[Key, Kernel] = {(k.kind, k.precision, k.on): k for k in profile.kernels_}
    for key in kernels:
        if key[0] in CAREFUL:
            kernels[key] = _careful(key, kernels[key], rows, per_node)
    columns, matrix, seconds, own = _equations(rows, kernels, per_node)
    weights = np.array([row.weight for row in rows])
    found = _fitted(columns, matrix, seconds, own, weights)
    predicted = matrix @ found + per_node * _dispatched(rows)
    errors, points = _errors(rows, columns, matrix, found, np.abs(predicted / seconds - 1))
    values = dict(zip(columns, found, strict=True))
    levels = len(profile.caches_)
    return Solution(
        kernels={k: (kernels[k], {t: values[k, t] for t in _TERMS if (k, t) in values}) for k in kernels
                 if k in points},
        fused={(k[1], k[2]): values[k, "element"] for k, t in columns if k[0] == "fused" and t == "element"},
        missed=tuple((values.get((("miss", str(i), "activations"), "miss"), 0.0),
                      values.get((("miss", str(i), "weights"), "miss"), 0.0)) for i in range(levels)),
        errors=errors,
        points=points,
    )  # fmt: skip


def _amounts(row: Row, kernels: Mapping[Key, Kernel]) -> dict[tuple[Key, str], float]:
    """What a row multiplies each coefficient with."""
    found: dict[tuple[Key, str], float] = {}

    def add(key: Key, term: str, amount: float) -> None:
        if amount:
            found[key, term] = found.get((key, term), 0.0) + amount

    for factor, use in row.uses:
        if use.key[0] == "fused":
            add(use.key, "element", factor * use.work.elements_out)
            continue
        for term, amount in quantities(kernels[use.key], use.work)._asdict().items():
            add(use.key, term, factor * amount)
        for level, missed in enumerate(use.missed):
            add(("miss", str(level), "activations"), "miss", factor * missed.activations)
            add(("miss", str(level), "weights"), "miss", factor * missed.weights)
    size = max((abs(v) for v in found.values()), default=0.0)
    return {k: v for k, v in found.items() if abs(v) > 1e-9 * size}


def _dispatched(rows: Sequence[Row]) -> Array:
    return np.array([sum(factor * use.dispatched for factor, use in row.uses) for row in rows])


def _equations(
    rows: Sequence[Row], kernels: Mapping[Key, Kernel], per_node: float
) -> tuple[list[tuple[Key, str]], Array, Array, Array]:
    """Columns, matrix, seconds of the rows, and those less dispatch."""
    amounts = [_amounts(row, kernels) for row in rows]
    columns = sorted({column for row in amounts for column in row})
    place = {column: i for i, column in enumerate(columns)}
    matrix = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(amounts):
        for column, amount in row.items():
            matrix[i, place[column]] = amount
    seconds = np.array([row.seconds for row in rows])
    own = np.maximum(seconds - per_node * _dispatched(rows), 0.05 * seconds)
    return columns, matrix, seconds, own


def _fitted(
    columns: Sequence[tuple[Key, str]], matrix: Array, seconds: Array, own: Array, weights: Array, rounds: int = 6
) -> Array:
    """Non-negative least squares on relative errors, outliers counting less, some coefficients bounded above."""
    scaled, target = matrix / seconds[:, None], own / seconds
    reach = np.maximum(np.abs(scaled * weights[:, None]).max(axis=0, initial=0.0), 1e-30)
    penalty = np.diag(np.array([_PENALTY[term] for _, term in columns])) if columns else np.zeros((0, 0))
    held: dict[int, float] = {}
    trust = np.ones(len(target))
    found = np.zeros(len(columns))
    for _ in range(rounds):
        free = [i for i in range(len(columns)) if i not in held]
        if not free:  # nothing was measured, or nothing is left to choose; an empty problem ends the process in scipy
            break
        rest = target - sum((scaled[:, i] * value for i, value in held.items()), np.zeros(len(target)))
        counts = weights * trust
        left = np.vstack([scaled[:, free] / reach[free] * counts[:, None], penalty[np.ix_(free, free)]])
        right = np.concatenate([rest * counts, np.zeros(len(free))])
        solution, _ = scipy.optimize.nnls(left, right, maxiter=100 * max(len(columns), 10))
        found = np.zeros(len(columns))
        found[free] = solution / reach[free]
        for i, value in held.items():
            found[i] = value
        for i, (_, term) in enumerate(columns):
            if found[i] > _MOST.get(term, np.inf):
                held[i] = found[i] = _MOST[term]
        trust = 1.0 / np.sqrt(1.0 + ((scaled @ found - target) / _SOFT) ** 2)
    return found


def _careful(key: Key, kernel: Kernel, rows: Sequence[Row], per_node: float) -> Kernel:
    """The kernel with the channel block and the alignment that fit its own chains best.

    More structure is believed only where it takes a tenth off the mean error, and tried only with enough points.
    """
    own_key = [r for r in rows if ":" not in r.name and any(u.key == key for _, u in r.uses)]
    kernels = {u.key: kernel for r in own_key for _, u in r.uses if u.key[0] != "fused"}
    alone = [r for r in own_key if {k for k, _ in _amounts(r, kernels) if k[0] != "miss"} == {key}]
    if len(alone) < 7:
        return kernel
    blocks = (1, 4, 8, 16) if key[0].startswith("conv") else (1,)
    factors = (1.3, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0, 20.0, 80.0)
    grid: list[tuple[int, int, float]] = [(block, 1, 1.0) for block in blocks]
    grid += list(itertools.product(blocks, [to for to in (4, 8, 16) if _told_apart(alone, key, to)], factors))
    best, least = kernel, np.inf
    for block, to, factor in grid:
        tried = kernel.model_copy(update={"channel_block": block, "aligned_to": to, "misaligned_factor": factor})
        columns, matrix, seconds, own = _equations(alone, {**kernels, key: tried}, per_node)
        found = _fitted(columns, matrix, seconds, own, np.ones(len(alone)), rounds=4)
        # An outlier must not be what structure is found in, so it counts for no more than being half off.
        error = float(np.minimum(np.abs((matrix @ found - own) / seconds), 0.5).mean())
        if error < 0.9 * least:
            best, least = tried, error
    return best


def _told_apart(rows: Sequence[Row], key: Key, to: int) -> bool:
    """Whether there are three rows of each: all channels multiples of that, and not."""
    works = ([use.work for _, use in row.uses if use.key == key] for row in rows)
    aligned = sum(all(c <= 1 or c % to == 0 for w in each for c in (w.in_channels, w.out_channels)) for each in works)
    return 3 <= aligned <= len(rows) - 3


def _errors(
    rows: Sequence[Row], columns: Sequence[tuple[Key, str]], matrix: Array, found: Array, error: Array
) -> tuple[dict[Key, float], dict[Key, int]]:
    """Mean error of the rows each kernel makes most of, and how many those are."""
    by_key: dict[Key, list[float]] = {}
    keys = [key for key, _ in columns]
    for i, row in enumerate(rows):
        shares: dict[Key, float] = {}
        for key, part in zip(keys, np.abs(matrix[i] * found), strict=True):
            shares[key] = shares.get(key, 0.0) + float(part)
        for _, use in row.uses:
            if use.key[0] != "fused":
                by_key.setdefault(use.key, [])
        main = max(shares, key=lambda k: shares[k], default=None)
        if main is not None and main[0] not in ("fused", "miss"):
            by_key.setdefault(main, []).append(float(error[i]))
    means = {key: float(np.mean(errors)) if errors else 0.0 for key, errors in by_key.items()}
    return means, {key: len(errors) for key, errors in by_key.items()}


# --- the profile ----------------------------------------------------------------------------------------


def rebuilt(profile: Profile, solution: Solution, per_run: float, per_node: float) -> Profile:
    """The structure with prices: nanoseconds, to four significant digits."""
    kernels = []
    for key, (kernel, terms) in solution.kernels.items():
        prices = {f"ns_{'fixed' if t == 'fixed' else f'per_{t}'}": _ns(v) for t, v in terms.items()}
        error = round(solution.errors[key], 3) if solution.points[key] else None
        kernels.append(kernel.model_copy(update={**prices, "fit_error": error}))
    caches = [
        cache.model_copy(update={"ns_per_byte": _ns(a), "ns_per_weight_byte": _ns(w)})
        for cache, (a, w) in zip(profile.caches_, solution.missed, strict=True)
    ]
    fusions = []
    for fusion in profile.fusions_:
        for op in fusion.absorbs:
            cost = 0.0 if fusion.constant_operand else _ns(solution.fused.get((fusion.precision, op), 0.0))
            fusions.append(fusion.model_copy(update={"absorbs": (op,), "ns_per_element": cost}))
    overhead = profile.overhead_.model_copy(update={"ns_per_run": _ns(per_run), "ns_per_node": _ns(per_node)})
    tables: dict[str, Any] = {name: getattr(profile, name) for name in type(profile).model_fields}
    tables |= {
        "kernels_": tuple(kernels), "caches_": tuple(caches), "fusions_": tuple(fusions),
        "overhead_": overhead,
    }  # fmt: skip
    # Made anew and not copied, for a copy would take over what the other has looked up already.
    return Profile.model_validate({_alias(name): value for name, value in tables.items()})


def _alias(name: str) -> str:
    return Profile.model_fields[name].alias or name


def _ns(seconds: float) -> float:
    return float(f"{1e9 * seconds:.4g}")


# --- all of it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A network the prices were not fitted to.

    Attributes:
        name: of the network and its form.
        seconds: measured.
        predicted: seconds, by the profile.
    """

    name: str
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative, above zero if predicted too slow."""
        return self.predicted / self.seconds - 1


@dataclass(frozen=True)
class Fitted:
    """A profile and how well it does.

    Attributes:
        profile: the profile.
        checked: networks held out.
        errors: mean relative error on the measurements a kernel makes most of, by (kind, precision, on).
        points: how many those are.
    """

    profile: Profile
    checked: tuple[Checked, ...]
    errors: Mapping[Key, float]
    points: Mapping[Key, int]

    @property
    def median_error(self) -> float:
        """Of the networks held out, without sign."""
        return float(np.median([abs(c.error) for c in self.checked])) if self.checked else float("nan")

    @property
    def mean_error(self) -> float:
        """Of the networks held out, without sign."""
        return float(np.mean([abs(c.error) for c in self.checked])) if self.checked else float("nan")


def fit(
    measurements: Measurements,
    *,
    name: str,
    description: str = "",
    notes: Sequence[str] = (),
    host: bool = True,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Fitted:
    """A profile from measurements of a device.

    Args:
        measurements: of its links and networks.
        name: of the profile.
        description: a line about the device.
        notes: doubts for the profile to state.
        host: the device is one people run the optimizer on.
        progress: called with what is worked on.
    """
    machine = measurements.machine
    caches = _caches(machine)
    precisions = {link.name.split(" ")[1] for link in measurements.links}
    # Blocked layouts are as wide as the widest vectors; without one nothing is ever reordered.
    reordered = any(n.op_type.startswith("Reorder") for net in measurements.nets for n in net.nodes)
    wide = "avx512f" in machine.get("isa", ())
    shell = structure(caches, block=(16 if wide else 8) if reordered else 0, precisions=sorted(precisions))
    chosen = {link.name: link for link in links()}
    times = [t for t in measurements.links if t.name in chosen]
    rows = []
    for done, time in enumerate(times):
        progress(time.name, done, len(times))
        rows.append(link_row(chosen[time.name], time.seconds, shell))
    by_name = {time.name: time for time in measurements.nets}
    for model, feed, found in _timed(FITTED, by_name):
        rows += net_rows(model, feed, found, shell)
    solution = solve(rows, shell, measurements.per_node)
    priced = rebuilt(shell, solution, measurements.per_run, measurements.per_node)
    checked = tuple(_checked(priced, by_name))
    return Fitted(
        _complete(priced, measurements, name, description, notes, host, checked, len(rows)), checked, solution.errors,
        solution.points,
    )  # fmt: skip


def _caches(machine: Mapping[str, Any]) -> list[Cache]:
    """Levels that matter: what is behind the first, which every kernel works in."""
    found = [Cache(name=str(c["name"]), bytes=int(c["bytes"]), shared=bool(c["shared"])) for c in machine["caches"]]
    return found[-2:] if len(found) > 2 else found[1:]


def _timed(
    nets: Sequence[Net], times: Mapping[str, NetTime]
) -> Iterator[tuple[onnx.ModelProto, dict[str, Any], NetTime]]:
    """Forms of networks that were measured, with an input and the time; others are not built."""
    for net in nets:
        if any(f"{net.name} {form}" in times for form in FORMS):
            for form, model in forms(net).items():
                if (time := times.get(f"{net.name} {form}")) is not None:
                    yield model, net.feed(), time


def _checked(profile: Profile, times: Mapping[str, NetTime]) -> Iterator[Checked]:
    for model, feed, time in _timed(CHECKED, times):
        yield Checked(time.name, time.seconds, CostModel(profile).model(*seen(model, feed)).seconds)


def _complete(
    priced: Profile, measurements: Measurements, name: str, description: str, notes: Sequence[str], host: bool,
    checked: Sequence[Checked], equations: int,
) -> Profile:  # fmt: skip
    """The prices with all that says whose they are and how far to trust them."""
    machine = measurements.machine
    errors = [abs(c.error) for c in checked]
    nets = [t for t in measurements.nets if t.name.rpartition(" ")[0] in {n.name for n in FITTED}]
    provenance = Provenance(
        status="measured",
        method="chain slope (t10 - t2) / 8 of operators and profiled nodes of made-up networks, one thread; "
        "one non-negative robust fit of relative errors over all (onnxcompress profile fit)",
        source=f"profile fit on this device: {len(measurements.links)} links, {len(nets)} networks, "
        f"{equations} equations",
        date=datetime.date.today(),
        fit_set=f"{len(measurements.links)} links, {len(nets)} networks",
        held_out=f"{len(checked)} made-up networks of other sizes, float and int8",
        held_out_error=round(float(np.mean(errors)), 3) if errors else None,
        seconds="absolute",
        notes="\n".join(notes),
    )
    device = Device(
        cpu=str(machine.get("cpu", "unknown")),
        cores=int(machine.get("cores", 1)),
        frequency_ghz=float(machine.get("frequency_ghz") or machine.get("current_ghz") or 1.0),
        isa=tuple(machine.get("isa", ())),
        host=host,
        source="as the operating system tells",
    )
    kernels = []
    for kernel in priced.kernels_:
        for kind in STANDS_FOR.get((kernel.kind, kernel.precision), (kernel.kind,)):
            kernels.append(kernel.model_copy(update={"kind": kind}))
    saturates = "u8s8" in {k.precision for k in kernels} and not {"avx512_vnni", "avx_vnni"} & set(device.isa)
    quantization = priced.quantization.model_copy(
        update={"weight_bits": 7 if saturates and "avx2" in device.isa else 8, "source": "types onnxruntime fuses"}
    )
    tables: dict[str, Any] = {_alias(field): getattr(priced, field) for field in type(priced).model_fields}
    tables |= {
        "name": name, "description": description or device.cpu, "device": device, "provenance": provenance,
        "kernel": kernels, "quantization": quantization,
        "runtime": priced.runtime.model_copy(update={"version": measurements.onnxruntime}),
    }  # fmt: skip
    return Profile.model_validate(tables)
