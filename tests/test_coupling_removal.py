"""Removing positions for good equals silencing them: every family, and graphs nobody wrote."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import model as models
from onnxcompress.coupling import Coupling, kept_positions
from onnxcompress.evaluate import compare, is_lossless, rounding_noise
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from tests.models import Array, Feeds, normal
from tests.random_graphs import PICTURE_STEPS, SEQUENCE_STEPS, picture_graph, programs, sequence_graph
from tests.removals import check_removal, coupling_of, half, pruned, silenced, some

OPEN = {"resnet": 40, "unet": 20, "gpt_gqa": 5, "bert": 7, "bilstm": 9, "wavenet1d": 11, "shufflenet_v2": 48}
"""Sizes other than the one seen, for families whose inputs have an open axis."""


@cache
def family(name: str) -> tuple[ir.Model, Coupling, Feeds]:
    model = ir.from_proto(FAMILIES[name]())
    models.canonicalize(model)
    feeds = [*family_feeds(name, 2, batch=2)]
    if name in OPEN:
        feeds += [*family_feeds(name, 1, batch=1, size=OPEN[name])]
    return model, coupling_of(model, feeds[0]), feeds


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_everything(name: str) -> None:
    model, coupling, feeds = family(name)
    keeps = half(coupling)
    assert keeps
    after = check_removal(model, coupling, keeps, feeds)
    assert models.weight_bytes(after) < 0.8 * models.weight_bytes(model)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAMILIES)
def test_any_share_of_each_group(name: str, seed: int) -> None:
    model, coupling, feeds = family(name)
    check_removal(model, coupling, some(coupling, seed), feeds[:1])


@settings(max_examples=40, deadline=None)
@given(programs(PICTURE_STEPS), st.integers(0, 5))
def test_random_graphs_of_pictures(program: list[tuple[str, int, int]], seed: int) -> None:
    check_random(picture_graph(program), {"x": normal(1, 2, 3, 6, 6)}, seed)


@settings(max_examples=40, deadline=None)
@given(programs(SEQUENCE_STEPS), st.integers(0, 5))
def test_random_graphs_of_sequences(program: list[tuple[str, int, int]], seed: int) -> None:
    check_random(sequence_graph(program), {"x": normal(1, 2, 5, 5)}, seed)


def check_random(model: ir.Model, feed: dict[str, Array], seed: int) -> None:
    """With shapes of a run, and without."""
    measured = coupling_of(model, feed if seed % 2 else None)
    check_removal(model, measured, half(measured) if seed == 0 else some(measured, seed), [feed])


def test_the_check_can_fail() -> None:
    model, coupling, feeds = family("resnet")
    group = next(g for g in coupling.groups if not g.pinned)
    kept, other = np.arange(group.size) % 2 == 0, np.arange(group.size) % 2 == 1
    reference = silenced(model, coupling, kept_positions(coupling, {group: kept}))
    wrong = pruned(model, coupling, {group: other})
    assert not is_lossless(compare(reference, wrong, feeds), 37, rounding_noise(reference, feeds))
