"""Moments of what one model reads and how far off it is from another, against numpy on stored activations."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from cuts import named
from models import Array, Feeds, normal, run, text

from onnxcompress import model as models
from onnxcompress import paired
from onnxcompress.data import open_data
from onnxcompress.errors import DataError, PassError
from onnxcompress.moments import HalvedCross
from onnxcompress.paired import cross_moments
from onnxcompress.session import Runner, exposed
from onnxcompress.statistics import CrossMoments, Evidence, Need, Pair, Patches, Statistic

BODY = """g (float[N,3,7,6] x) => (float[N,5,4,6] y) {
  a = Conv <kernel_shape = [1,1]> (x, wa, ba)
  r = Relu (a)
  y = Conv <kernel_shape = [3,2], strides = [2,1], pads = [1,1,1,0]> (r, wb, bb)
}"""
PARTS: dict[str, Array] = {
    "wa": normal(1, 4, 3, 1, 1), "ba": normal(2, 4), "wb": normal(3, 5, 4, 3, 2), "bb": 100 + normal(4, 5),
}  # fmt: skip
WINDOWS = Patches((3, 2), (2, 1), (1, 1), (1, 1), (1, 0))
FEEDS: Feeds = [{"x": normal(10 + i, 2, 3, 7, 6)} for i in range(5)]


def gram(value: str, axis: int = 1, axes: tuple[int, ...] = (), patches: Patches | None = None) -> Need:
    return Need(value, Statistic.GRAM, axis, axes, patches)


def then() -> ir.Model:
    return named(BODY, PARTS)


def now() -> ir.Model:
    """The same with another first layer."""
    return named(BODY, {**PARTS, "wa": PARTS["wa"] + np.float32(0.1)})


def collect(pairs: Sequence[Pair], left: ir.Model, right: ir.Model, feeds: Feeds = FEEDS) -> dict[Pair, CrossMoments]:
    return dict(cross_moments(left, right, pairs, open_data([dict(f) for f in feeds], right)))


def rows(model: ir.Model, value: str, axis: int, feeds: Feeds) -> npt.NDArray[np.float64]:
    shown = exposed(model, [value])
    arrays = [np.moveaxis((run(shown, f) | dict(f))[value], axis, -1).astype(np.float64) for f in feeds]
    return np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays])


def windows(model: ir.Model, value: str, feeds: Feeds) -> npt.NDArray[np.float64]:
    """Windows of the second Conv, tap by tap."""
    found = []
    for feed in feeds:
        array = np.pad(run(exposed(model, [value]), feed)[value], ((0, 0), (0, 0), (1, 1), (1, 0))).astype(np.float64)
        for image in array:
            found += [image[:, 2 * i : 2 * i + 3, j : j + 2].reshape(-1) for i in range(4) for j in range(6)]
    return np.array(found)


def errors(value: str, axis: int, feeds: Feeds) -> npt.NDArray[np.float64]:
    return rows(then(), value, axis, feeds) - rows(now(), value, axis, feeds)


def assert_equal(found: CrossMoments, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> None:
    """The bound: float32 sums of a few hundred products are off by less than 1e-6 of the sum of their sizes.

    Errors are differences of float32 numbers of which the largest are about 100.
    """
    size_x, size_y = np.sqrt(np.square(x).mean(0)), np.sqrt(np.square(y).mean(0)) + 10
    assert found.count == len(x) == len(y)
    assert np.all(np.abs(found.matrix - x.T @ x / len(x)) <= 1e-6 * np.outer(size_x, size_x))
    assert np.all(np.abs(found.cross - y.T @ x / len(x)) <= 1e-6 * np.outer(size_y, size_x))
    np.testing.assert_array_equal(found.matrix, found.matrix.T)
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-6 * size_x.max())
    np.testing.assert_allclose(found.error, y.mean(0), atol=1e-6 * size_y.max())


# --- against numpy ---------------------------------------------------------------------------------


def test_channels_go_with_channels() -> None:
    pair = Pair(gram("r"), gram("a"))
    found = collect([pair], now(), then())[pair]
    assert_equal(found, rows(now(), "r", 1, FEEDS), errors("a", 1, FEEDS))


def test_windows_go_with_the_positions_they_make() -> None:
    pair = Pair(gram("r", patches=WINDOWS), gram("y"))
    found = collect([pair], now(), then())[pair]
    assert_equal(found, windows(now(), "r", FEEDS), errors("y", 1, FEEDS))


def test_what_a_weight_changes_is_what_moments_say() -> None:
    """Only the last weight differs, so the error is its change times what it reads."""
    changed = named(BODY, {**PARTS, "wb": PARTS["wb"] + normal(9, 5, 4, 3, 2), "bb": PARTS["bb"] - 1})
    pair = Pair(gram("r", patches=WINDOWS), gram("y"))
    found = collect([pair], changed, then())[pair]
    weight = -normal(9, 5, 4, 3, 2).reshape(5, -1).astype(np.float64)
    np.testing.assert_allclose(found.cross, weight @ found.matrix + found.mean, atol=2e-5)
    np.testing.assert_allclose(found.error, weight @ found.mean + 1, atol=2e-5)


def test_graph_inputs_and_negative_axes_do_as_well() -> None:
    pair = Pair(gram("x", -3), gram("a", -3))
    assert_equal(collect([pair], now(), then())[pair], rows(then(), "x", 1, FEEDS), errors("a", 1, FEEDS))


def test_the_halves_are_every_second_sample() -> None:
    pair = Pair(gram("r"), gram("a"))
    halves = collect([pair], now(), then())[pair].halves
    assert halves is not None
    for half, part in zip(halves, (FEEDS[::2], FEEDS[1::2]), strict=True):
        expected = rows(now(), "r", 1, part), errors("a", 1, part)
        np.testing.assert_allclose(half.cross, expected[1].T @ expected[0] / len(expected[0]), atol=1e-4)
        np.testing.assert_allclose(half.matrix, expected[0].T @ expected[0] / len(expected[0]), atol=1e-4)
        np.testing.assert_allclose(half.error, expected[1].mean(0), atol=1e-5)
        assert half.count == len(expected[0])
    assert collect([pair], now(), then(), FEEDS[:1])[pair].halves is None


def test_large_means_do_not_drown_what_varies() -> None:
    x = (np.random.default_rng(0).standard_normal((5000, 3)) + 1e4).astype(np.float32)
    y = (2 * x[:, :2] - np.float32(3e4)).astype(np.float32)
    moments = HalvedCross(Pair(gram("v", -1), gram("w", -1)))
    moments.add(x, y)
    found = moments.result()
    assert found is not None
    covariance = found.cross - np.outer(found.error, found.mean)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(covariance, np.cov(y.T.astype(float), wide.T, bias=True)[:2, 2:], atol=2e-3)


def test_rows_left_out_are_the_same_of_both() -> None:
    x = normal(1, 200_000, 2)
    moments = HalvedCross(Pair(gram("v", -1), gram("w", -1)), samples=1)
    moments.add(x, x @ np.array([[1.0, 2.0], [0.5, -1.0]], np.float32))
    found = moments.result()
    assert found is not None and found.count == 16384
    np.testing.assert_allclose(found.cross, np.array([[1, 0.5], [2, -1]]) @ found.matrix, atol=1e-5)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_sizes_whose_squares_float32_does_not_hold(size: float) -> None:
    x, y = normal(1, 50, 3) * np.float32(size), normal(2, 50, 2)
    moments = HalvedCross(Pair(gram("v", -1), gram("w", -1)))
    moments.add(x, y)
    found = moments.result()
    assert found is not None
    np.testing.assert_allclose(found.matrix, x.T.astype(float) @ x.astype(float) / 50, rtol=1e-4, atol=1e-4 * size**2)
    np.testing.assert_allclose(found.cross, y.T.astype(float) @ x.astype(float) / 50, rtol=1e-4, atol=1e-4 * size)


# --- what it costs ---------------------------------------------------------------------------------


def test_the_same_bytes_twice() -> None:
    pairs = [Pair(gram("r"), gram("a")), Pair(gram("r", patches=WINDOWS), gram("y"))]
    assert pickle.dumps(collect(pairs, now(), then())) == pickle.dumps(collect(pairs[::-1], now(), then()))


def test_memory_does_not_grow_with_the_samples() -> None:
    arrays = [(normal(i, 512, 32), normal(100 + i, 512, 48)) for i in range(4)]

    def peak(samples: int) -> int:
        moments = HalvedCross(Pair(gram("v", -1), gram("w", -1)), samples)
        tracemalloc.start()
        for i in range(samples):
            moments.add(*arrays[i % 4])
        moments.result()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(64) <= 1.1 * peak(4)


def test_a_model_runs_only_as_far_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[ir.Model] = []

    def runner(model: ir.Model, **options: Any) -> Runner:
        opened.append(model)
        return Runner(model, **options)

    monkeypatch.setattr(paired, "Runner", runner)
    left, right = now(), then()
    before = models.serialize(left), models.serialize(right)
    collect([Pair(gram("a"), gram("r"))], left, right)
    collect([Pair(gram("x"), gram("a"))], left, right)
    assert [[n.op_type for n in m.graph] for m in opened] == [["Conv", "Relu"]] * 2 + [["Conv"]] * 2
    assert all(set(m.graph.initializers) == {"wa", "ba"} for m in opened)
    assert (models.serialize(left), models.serialize(right)) == before


# --- what is left out ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        Pair(gram("nothing"), gram("a")),
        Pair(gram("r"), gram("nothing")),
        Pair(gram("r"), gram("y")),  # 42 positions against 24
        Pair(gram("r", 7), gram("a")),
        Pair(gram("r", axes=(1, 2)), gram("a")),
        Pair(gram("wa", 0), gram("a")),
    ],
)
def test_what_does_not_go_together_is_left_out(pair: Pair) -> None:
    good = Pair(gram("r"), gram("a"))
    assert set(collect([pair, good], now(), then())) == {good}


def test_infinite_and_whole_numbers_are_left_out() -> None:
    body = """g (float[N,3] x, int64[N,3] i) => (float[N,3] y) {
      a = Log (x)
      j = Add (i, i)
      f = Cast <to = 1> (j)
      y = Add (a, f)
    }"""
    model = text(body)
    feeds = [{"x": np.zeros((2, 3), np.float32), "i": np.ones((2, 3), np.int64)}]
    good = Pair(gram("f"), gram("f"))
    wanted = [good, *(Pair(gram(a), gram(b)) for a, b in (("a", "f"), ("f", "a"), ("f", "j"), ("i", "f")))]
    assert set(collect(wanted, model, model, feeds)) == {good}


def test_nan_is_named() -> None:
    body = """g (float[N,3] x) => (float[N,3] y) {
      a = Sqrt (x)
      y = Neg (a)
    }"""
    model = text(body)
    feeds = [{"x": np.ones((2, 3), np.float32)}, {"x": -np.ones((2, 3), np.float32)}]
    for pair in (Pair(gram("a"), gram("y")), Pair(gram("x"), gram("a"))):
        with pytest.raises(DataError, match=r"sample 1: .*NaN in .*'a'"):
            collect([pair], model, model, feeds)


def test_pairs_are_of_second_moments() -> None:
    with pytest.raises(PassError, match="paired by its channels"):
        Pair(gram("a"), Need("b", Statistic.CHANNELS))


def test_evidence_gives_what_was_asked_for_and_nothing_else() -> None:
    pair, other = Pair(gram("r"), gram("a")), Pair(gram("r"), gram("y"))
    found = CrossMoments(np.eye(2), np.eye(2), np.zeros(2), np.zeros(2), 4)
    evidence = Evidence().joined(Evidence(crosses={pair: found}))
    assert evidence.has(pair) and evidence.cross_moments(pair) is found
    assert not evidence.has(other)
    with pytest.raises(PassError, match="settling"):
        evidence.cross_moments(other)
