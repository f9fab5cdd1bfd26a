"""Codebooks, rounding with feedback, and coding one weight: optimal where that can be counted out, never worse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array

from onnxcompress.passes._codebook import nearest, scalar_codebook, vector_codebook
from onnxcompress.passes._coding import Coding, Subject, coded, estimated_bytes, fits, previews
from onnxcompress.passes._feedback import _factor, lost, rounded
from onnxcompress.passes._linear_maps import LinearMap, Moments

DENSE = (0, 2, 3, 1)
"""Order of a matrix (inputs, outputs) as a map."""


def matrix(inputs: int, outputs: int) -> LinearMap:
    return LinearMap(1, (inputs, outputs), (1, inputs, outputs, 1), DENSE)


def conv(outputs: int, channels: int, taps: int, groups: int = 1) -> LinearMap:
    split = (groups, outputs // groups, channels, taps)
    return LinearMap(1, (outputs, channels, taps), split, (0, 1, 3, 2))


def correlated(seed: int, features: int, rows: int = 400) -> Array:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((features, features)) * np.geomspace(1, 0.05, features)[:, None]
    x = rng.standard_normal((rows, features)) @ mix
    return np.asarray(x.T @ x / rows, np.float64)


def moments(seed: int, features: int, groups: int = 1) -> tuple[Moments, ...]:
    return tuple(Moments(correlated(seed + g, features), np.zeros(features)) for g in range(groups))


def weight(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared(book: Array, values: Array, mass: Array | None = None) -> float:
    errors = (book[nearest(book, values)] - values) ** 2
    return float((errors * (1 if mass is None else mass)).sum())


# --- codebooks ---------------------------------------------------------------------------------


def brute(values: Array, mass: Array, size: int) -> float:
    """The least weighted error of any partition; in one dimension, of runs of sorted values."""
    order = np.argsort(values)
    values, mass = values[order], mass[order]
    best = math.inf
    for cuts in itertools.combinations(range(1, len(values)), size - 1):
        error = 0.0
        for part in np.split(np.arange(len(values)), cuts):
            mean = np.average(values[part], weights=mass[part])
            error += float((mass[part] * (values[part] - mean) ** 2).sum())
        best = min(best, error)
    return best


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(4, 9), st.integers(2, 4), st.booleans())
def test_few_values_get_the_best_codebook(seed: int, count: int, size: int, weighted: bool) -> None:
    """Masses are rounded to 20000 copies, so the first guess may be off by as much; Lloyd's steps do the rest."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count)
    mass = rng.uniform(0.5, 2, count) if weighted else np.ones(count)
    book = scalar_codebook(values, mass if weighted else None, size)
    assert squared(book, values, mass) <= brute(values, mass, min(size, count)) * (1 + 1e-3) + 1e-12


def test_weights_count() -> None:
    values = np.array([0.0, 1.0, 10.0])
    np.testing.assert_allclose(scalar_codebook(values, np.array([3.0, 1.0, 1.0]), 2), [0.25, 10.0])
    np.testing.assert_allclose(scalar_codebook(values, np.array([1.0, 1.0, 1e-4]), 2), [0.0, 1 + 9e-4 / 1.0001])


def test_no_more_entries_than_values() -> None:
    values = np.array([[2.0, -1.0], [2.0, 5.0]])
    np.testing.assert_array_equal(scalar_codebook(values, None, 16), [-1.0, 2.0, 5.0])
    np.testing.assert_array_equal(scalar_codebook(np.full(50, 3.5), None, 4), [3.5])


def test_many_values_are_done_in_bins_as_well_as_alone() -> None:
    values = np.random.default_rng(0).standard_normal(50_000)
    book = scalar_codebook(values, None, 16)
    assert len(book) == 16
    assert (np.diff(book) > 0).all()
    best = 0.009497  # of the normal distribution (Max 1960)
    assert squared(book, values) / squared(np.zeros(1), values) < best * 1.02


@pytest.mark.parametrize("size", [2, 3, 4, 16])
def test_zero_is_kept_and_stands_for_zeros_alone(size: int) -> None:
    values = np.random.default_rng(0).standard_normal(999)
    values[::2] = 0
    book = scalar_codebook(values, None, size, keep_zero=True)
    assert len(book) == size
    assert 0.0 in book


def test_nothing_but_zeros() -> None:
    np.testing.assert_array_equal(scalar_codebook(np.zeros(9), None, 4, keep_zero=True), [0.0])


def test_vectors() -> None:
    centres = np.array([[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0]])
    points = np.repeat(centres, 50, axis=0) + np.random.default_rng(0).standard_normal((150, 2)) * 0.01
    found = vector_codebook(points, None, 3)
    assert np.abs(np.sort(found, axis=0) - np.sort(centres, axis=0)).max() < 0.02
    np.testing.assert_array_equal(vector_codebook(np.repeat(centres, 4, axis=0), None, 256), np.unique(centres, axis=0))
    np.testing.assert_array_equal(vector_codebook(points, None, 3, seed=1), vector_codebook(points, None, 3, seed=1))


# --- feedback ----------------------------------------------------------------------------------


def to_grid(step: float):
    def rounding(weights: Array, features: Array) -> tuple[Array, Array]:
        found = np.rint(weights / step).astype(np.int64)
        return found, found * step

    return rounding


@pytest.mark.parametrize("features", [1, 5, 64, 65, 200])
def test_the_factor_is_that_of_the_inverse(features: int) -> None:
    h = correlated(1, features)
    factor = _factor(h)
    damped = h + np.eye(features) * 0.01 * np.trace(h) / features
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(features), atol=1e-8)


@pytest.mark.parametrize("features", [24, 96, 130])
def test_feedback_is_better_than_the_nearest(features: int) -> None:
    worse = []
    for seed in range(20):
        h, w = correlated(seed, features), weight(seed, 8, features).astype(np.float64)
        _, values = rounded(w, h, to_grid(0.5))
        plain = np.rint(w / 0.5) * 0.5
        worse.append(lost(w, values, h) / lost(w, plain, h))
    assert max(worse) < 1.0
    assert np.mean(worse) < 0.7


def test_without_correlation_it_is_the_nearest() -> None:
    w = weight(0, 8, 100).astype(np.float64)
    found, values = rounded(w, np.diag(np.random.default_rng(0).uniform(0.1, 9, 100)), to_grid(0.5))
    np.testing.assert_array_equal(values, np.rint(w / 0.5) * 0.5)
    np.testing.assert_array_equal(found, np.rint(w / 0.5))


@pytest.mark.parametrize("features", [10, 63, 64, 65, 129])
def test_blocks_change_nothing(features: int) -> None:
    """The same, feature by feature, with the plain algebra of the optimal brain surgeon."""
    h, w = correlated(3, features), weight(3, 4, features).astype(np.float64)
    _, values = rounded(w, h, to_grid(0.5))
    order = np.argsort(-np.diag(h), kind="stable")
    damped = h + np.eye(features) * 0.01 * np.trace(h) / features
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    left, expected = w[:, order].copy(), np.empty_like(w)
    for j in range(features):
        expected[:, order[j]] = np.rint(left[:, j] / 0.5) * 0.5
        error = (left[:, j] - expected[:, order[j]]) / inverse[0, 0]
        left[:, j:] -= np.outer(error, inverse[0])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_vectors_are_rounded_together(width: int) -> None:
    h, w = correlated(5, 80), weight(5, 16, 80).astype(np.float64)
    book = vector_codebook(w.reshape(-1, width), None, 64)

    def rounding(weights: Array, features: Array) -> tuple[Array, Array]:
        assert (np.diff(features) == 1).all()
        found = ((weights[:, None] - book) ** 2).sum(2).argmin(1)
        return found, book[found]

    found, values = rounded(w, h, rounding, width=width)
    assert found.shape == (16, 80 // width)
    np.testing.assert_array_equal(book[found].reshape(w.shape), values)
    plain = ((w.reshape(-1, 1, width) - book) ** 2).sum(2).argmin(1)
    assert lost(w, values, h) < lost(w, book[plain].reshape(w.shape), h) or width == 8  # noise as large as the weights


@pytest.mark.parametrize("h", [np.zeros((6, 6)), np.ones((6, 6)), np.diag([1.0, 0, 0, 0, 0, 0])], ids=str)
def test_moments_of_any_rank_will_do(h: Array) -> None:
    w = weight(0, 3, 6).astype(np.float64)
    _, values = rounded(w, h, to_grid(0.5))
    assert np.isfinite(values).all()


# --- one weight --------------------------------------------------------------------------------

CODINGS = [Coding(b) for b in (16, 8, 6, 5, 4, 3, 2, 1.6, 1)] + [
    Coding(4, 2), Coding(2, 4), Coding(1, 8), Coding(4, block=8), Coding(8, block=8), Coding(2, 4, block=8),
    Coding(4, uniform=True), Coding(2, uniform=True), Coding(1, uniform=True), Coding(1.6, uniform=True),
]  # fmt: skip
MAPS = {"matrix": matrix(48, 40), "conv": conv(24, 16, 9), "grouped": conv(16, 16, 3, 2)}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("kind", MAPS)
def test_what_is_stored_is_what_is_said_to_be_lost(kind: str, coding: Coding, known: bool, zeros: bool) -> None:
    linear = MAPS[kind]
    array = weight(1, *linear.shape)
    if zeros:
        array[np.random.default_rng(0).random(array.shape) < 0.5] = 0
    groups, _, features = linear.maps(array).shape
    seen = moments(2, features, groups) if known else None
    fitted = coded(Subject(array, linear, seen), coding)
    decoded = np.asarray(fitted.code.decoded(), np.float32)
    assert decoded.shape == array.shape
    np.testing.assert_allclose(linear.maps(decoded), fitted.values, atol=2e-6)
    pairs = zip(linear.maps(array), fitted.values, strict=True)
    if seen is None:
        assert fitted.lost == pytest.approx(lost(*map(np.concatenate, zip(*pairs, strict=True)), None), rel=1e-9)
    assert fitted.lost < 2.0 ** (-1.3 * min(coding.bits, 12)) * 2
    assert fitted.code.bytes <= estimated_bytes(linear, coding) + 1200
    if zeros and not coding.uniform and coding.width == 1 and coding.entries > 2:
        assert (decoded[array == 0] == 0).all()


@pytest.mark.parametrize("bits", [6, 5, 4, 3, 2, 1.6, 1])
def test_feedback_loses_less_than_without(bits: float) -> None:
    linear = matrix(64, 48)
    for seed in range(5):
        subject = Subject(weight(seed, 64, 48), linear, moments(seed, 64))
        assert coded(subject, Coding(bits)).lost < coded(subject, Coding(bits, feedback=False)).lost


@pytest.mark.parametrize("bits", [4, 3, 2, 1.6, 1])
@pytest.mark.parametrize("known", [False, True])
def test_refits_never_lose_more(bits: float, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = matrix(48, 32)
    for seed in range(10):
        array = weight(seed, 48, 32)
        array[np.random.default_rng(seed).random(array.shape) < 0.1 * (seed % 4)] = 0
        subject = Subject(array, linear, moments(seed, 48) if known else None)
        refitted = coded(subject, Coding(bits)).lost
        with monkeypatch.context() as patch:
            patch.setattr("onnxcompress.passes._coding._REFITS", 0)
            assert refitted <= coded(subject, Coding(bits)).lost * (1 + 1e-12)


def test_more_bits_lose_less() -> None:
    subject = Subject(weight(0, 96, 64), matrix(96, 64), moments(0, 96))
    losses = [coded(subject, Coding(b)).lost for b in (16, 8, 6, 5, 4, 3, 2, 1.6, 1)]
    assert losses == sorted(losses)


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
@pytest.mark.parametrize("known", [False, True])
def test_integers_stay_integers(bits: float, known: bool) -> None:
    linear = matrix(64, 48)
    array = (np.random.default_rng(0).standard_normal((64, 48)) * 40).clip(-127, 127).astype(np.int8)
    scales = np.random.default_rng(1).uniform(0.01, 0.02, (1, 48)).astype(np.float32)
    fitted = coded(Subject(array, linear, moments(1, 64) if known else None, scales), Coding(bits))
    decoded = fitted.code.decoded()
    assert decoded.dtype == np.int8
    assert len(np.unique(decoded)) <= 2**bits
    np.testing.assert_allclose(linear.maps(decoded.astype(np.float32) * scales), fitted.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1.0, -3e-5, 4e4])
@pytest.mark.parametrize("known", [False, True])
def test_weights_that_are_all_the_same(fill: float, known: bool) -> None:
    array = np.full((64, 48), fill, np.float32)
    for bits in (8, 4, 1):
        fitted = coded(Subject(array, matrix(64, 48), moments(1, 64) if known else None), Coding(bits))
        np.testing.assert_allclose(fitted.code.decoded(), array, rtol=2e-3)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12])
def test_weights_of_any_size(size: float) -> None:
    array = weight(0, 64, 48) * np.float32(size)
    plain, small = (coded(Subject(a, matrix(64, 48)), Coding(4)) for a in (weight(0, 64, 48), array))
    assert small.lost == pytest.approx(plain.lost, rel=0.05)


@pytest.mark.parametrize("large", [1e-3, 1e3, 1e6, 1e9])
def test_rows_that_are_far_apart(large: float) -> None:
    """Scales are float16: where they do not reach, something is lost, but nothing becomes infinite."""
    array = weight(0, 64, 48)
    array[:, :5] *= np.float32(large)
    for seen in (None, moments(0, 64)):
        fitted = coded(Subject(array, matrix(64, 48), seen), Coding(4))
        assert np.isfinite(fitted.code.decoded()).all()
        assert fitted.lost < 0.1 if large < 1e4 else fitted.lost < 0.6


def test_vectors_have_to_fill_the_rows() -> None:
    assert fits(matrix(48, 40), Coding(2, 4))
    assert not fits(matrix(50, 40), Coding(2, 4))
    assert fits(matrix(50, 40), Coding(4, 2))


def test_previews_are_about_what_rounding_loses() -> None:
    subject = Subject(weight(0, 128, 128), matrix(128, 128))
    codings = [Coding(b) for b in (16, 8, 6, 5, 4, 3, 2)] + [Coding(4, 2)]
    for (share, entropy), coding in zip(previews(subject, codings), codings, strict=True):
        assert 0 < entropy <= coding.bits
        made = coded(subject, coding).lost
        assert made / 4 < share < made * 4 or coding.bits >= 8


def test_the_same_weight_is_coded_the_same() -> None:
    for coding in CODINGS:
        subject = Subject(weight(0, 48, 40), matrix(48, 40), moments(0, 48))
        first, second = (coded(subject, coding).code.decoded() for _ in range(2))
        np.testing.assert_array_equal(first, second)
