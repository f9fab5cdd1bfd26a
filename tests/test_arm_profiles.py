"""Profiles of Arm cores: what their scripts say about errors, and that a refit from cached counts gives them."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from onnxcompress.instructions import CLASSES
from onnxcompress.profile import load_profile

FITTING = Path(__file__).parent.parent / "hardware_profiles" / "fitting"


@pytest.fixture(scope="module")
def weights() -> ModuleType:
    return _script("weights")


@pytest.fixture(scope="module")
def refit() -> ModuleType:
    return _script("refit")


def _script(name: str) -> ModuleType:
    sys.path.insert(0, str(FITTING))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(FITTING))


def profiles() -> list[tuple[str, str]]:
    with (FITTING / "cores.toml").open("rb") as file:
        return [(core, one["profile"]) for core, one in tomllib.load(file).items() if one["profile"]]


@pytest.mark.parametrize(("core", "model", "board"), [("a53", 0.08, 0.09), ("a72", 0.07, 0.09), ("a55", 0.09, 0.09)])
def test_prices_hold_for_networks_and_boards_they_were_not_fitted_to(
    weights: ModuleType, core: str, model: float, board: float
) -> None:
    known = weights.cores()[core]
    rows = weights.data(known)
    assert weights.unseen_models(known, rows).mean() <= model
    assert np.mean([error for error, _ in weights.unseen_boards(known, rows).values()]) <= board


@pytest.mark.parametrize("core", ["a53", "a55", "a72", "a76"])
def test_classes_say_more_than_one_price_for_all(weights: ModuleType, core: str) -> None:
    """On float networks alone, too: there the mix of classes hardly changes."""
    known = weights.cores()[core]
    rows = weights.data(known)
    assert weights.float_only(weights.fit(known, rows), rows) < weights.float_only(weights.flat(known), rows)


@pytest.mark.parametrize(("core", "name"), profiles())
def test_shipped_prices_are_the_fitted_ones(weights: ModuleType, core: str, name: str) -> None:
    shipped = load_profile(name).instructions
    assert shipped is not None
    assert shipped.core == core
    known = weights.cores()[core]
    fitted = dict(zip(CLASSES, weights.fit(known, weights.data(known)), strict=True))
    assert shipped.cycles == pytest.approx(fitted, rel=0.02)


@pytest.mark.parametrize(("core", "name"), profiles())
def test_shipped_kernels_are_those_of_a_refit(refit: ModuleType, core: str, name: str) -> None:
    shipped = load_profile(name)
    kernels, per_run, per_node = refit.refit(refit.weights.cores()[core], shipped.device.frequency_ghz)
    assert shipped.overhead.ns_per_run == pytest.approx(1e9 * per_run, rel=0.02)
    assert shipped.overhead.ns_per_node == pytest.approx(1e9 * per_node, rel=0.02)
    for fit in kernels:
        found = shipped.kernel(fit.kind, fit.precision, op_type=fit.kind, maps=fit.on == "maps")
        if found is not None and found.kind == fit.kind:  # some links stand for kernels of another name
            assert found.ns_per_mac == pytest.approx(fit.per_mac, rel=0.02, abs=1e-6)
            assert found.ns_per_element == pytest.approx(fit.per_element, rel=0.02, abs=1e-4)


def test_rewriting_keeps_what_was_not_fitted(refit: ModuleType) -> None:
    text = "a = 1\n\n[overhead]\nold = 1\n\n[energy]\nw = 2\n\n[[kernel]]\nk = 1\n\n[[kernel]]\nk = 2\n\n"
    new = {"overhead": "[overhead]\nnew = 1\n", "kernel": "[[kernel]]\nk = 3\n"}
    expected = "a = 1\n\n[overhead]\nnew = 1\n\n[energy]\nw = 2\n\n[[kernel]]\nk = 3\n\n"
    last = "[[fusion]]\nf = 1\n"
    assert refit.rewrite(text + last, new) == expected + last
