"""What couples with what: groups, units and reasons for every rule, on graphs small enough to check by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.coupling import Coupling
from tests.coupling_cases import CASES, Case
from tests.models import Array, text
from tests.removals import check_removal, coupling_of, half, parts_of, some


def built(case: Case) -> tuple[ir.Model, dict[str, Array]]:
    """The model and something to feed it."""
    rng = np.random.default_rng(3)
    weights: dict[str, Array] = {
        n: rng.normal(size=s).astype(np.float32) for n, s in case.weights.items() if -1 not in s
    }
    for name, shape in case.weights.items():
        if shape == (-1,):  # scales of a Resize
            weights[name] = np.array([1, 1, 2, 2], np.float32)
        elif shape[0] == -1:  # positive; a scalar for no positions
            weights[name] = (0.5 + rng.random(shape[1] or ())).astype(np.float32)
    for name, values in case.ints.items():
        weights[name] = np.zeros([-values[0], *values[1:]], np.int64) if values[0] < 0 else np.array(values, np.int64)
    model = text(case.body, weights, opset=case.opset, imports=[case.domain] if case.domain else [])
    feed: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        dtype = value.dtype.numpy()
        feed[str(value.name)] = (rng.normal(size=shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(
            dtype
        )
    return model, feed


def summary(coupling: Coupling) -> str:
    """A line for each group: key, free of all, unit, axes; indented, who sums over it, why positions have to stay."""
    lines = []
    for group in coupling.groups:
        lines.append(f"{group.key}: {group.free}/{group.size} {group.unit}: {' '.join(sorted(parts_of(group)))}")
        if group.readers or group.unweighted:
            made_up_for = [f"{r.node} ({r.weight} x {r.data})" for r in group.readers]
            lines.append("  summed by " + ", ".join([*made_up_for, *(f"{n} (values)" for n in group.unweighted)]))
        lines += [f"  {line}" for line in dict.fromkeys(f"{pin.node}: {pin.reason}" for pin in group.pins)]
    return "\n".join(lines)


EXPECTED = Path(__file__).with_name("coupling_groups.txt")


def expected() -> dict[str, str]:
    """What the groups of each case are, written out."""
    parts = EXPECTED.read_text().split("== ")[1:]
    return {name.strip(): groups.strip() for name, _, groups in (part.partition("\n") for part in parts)}


def test_every_case_is_written_out() -> None:
    assert list(expected()) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    model, feed = built(CASES[name])
    assert summary(coupling_of(model, feed if CASES[name].runs else None)) == expected()[name]


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.runs])
def test_what_is_left_gives_the_same(name: str) -> None:
    model, feed = built(CASES[name])
    coupling = coupling_of(model, feed)
    for keeps in (half(coupling), some(coupling, 1), some(coupling, 2)):
        if keeps:
            check_removal(model, coupling, keeps, [feed])
