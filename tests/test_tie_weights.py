"""Nearly equal weights of one model."""

from __future__ import annotations

import numpy as np
import pytest
from models import normal, text

import onnxcompress
from onnxcompress.base import Site, Skipped
from onnxcompress.errors import PassOptionError
from onnxcompress.model import weight_bytes
from onnxcompress.passes.tie_weights import TieWeights
from onnxcompress.view import GraphView

BODY = (
    "net (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, w0) b = Tanh (a) c = MatMul (b, w1) y = MatMul (c, w2) }"
)
FEEDS = [{"x": normal(i, 4, 64)} for i in range(8)]


def weights(apart: float) -> dict[str, np.ndarray]:
    w = normal(1, 64, 64)
    return {"w0": w, "w1": w + np.float32(apart) * normal(2, 64, 64), "w2": normal(3, 64, 64)}


def test_a_near_weight_gives_way_to_the_first() -> None:
    model = text(BODY, weights(1e-3))
    result = onnxcompress.optimize(model, calibration=FEEDS, passes=[TieWeights()], timing=False)
    assert weight_bytes(model) - weight_bytes(result.model) == 64 * 64 * 4
    (site,) = [s for s in result.report.sites if s.decision != "keep"]
    assert site.decision == "as w0"
    assert site.bytes_saved == 64 * 64 * 4
    assert 40 < result.report.totals.comparison.min_sqnr_db < 70


def test_what_is_too_far_apart_or_small_stays() -> None:
    assert not list(TieWeights().sites(GraphView(text(BODY, weights(0.1)))))
    assert not list(TieWeights(min_weights=5000).sites(GraphView(text(BODY, weights(1e-3)))))
    assert any(isinstance(s, Site) for s in TieWeights(min_sqnr=15).sites(GraphView(text(BODY, weights(0.1)))))


def test_equal_weights_are_another_pass_s_job() -> None:
    (found,) = TieWeights().sites(GraphView(text(BODY, weights(0.0))))
    assert isinstance(found, Skipped)
    assert "merge_duplicates" in found.reason


def test_options_are_checked() -> None:
    with pytest.raises(PassOptionError, match="min_sqnr"):
        TieWeights(min_sqnr=0)
