"""Removing positions for good equals silencing them: every family, and graphs nobody wrote."""

from __future__ import annotations

from functools import cache

import onnx_ir as ir
import pytest

from onnxcompress import model as models
from onnxcompress.coupling import Coupling
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from tests.models import Feeds
from tests.removals import check_removal, coupling_of, half, some

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
