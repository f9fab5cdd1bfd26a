"""Which channels go, and what is left after refitting: against brute force on small problems."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes._importance import (
    LEAST_RIDGE,
    Consumer,
    Order,
    activation,
    along,
    geometric_median,
    magnitude,
    reconstruction,
    redundancy,
)
from onnxcompress.passes._refit import lost, refit, refit_with_bias, scale_of

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


def samples(rng: np.random.Generator, rows: int, n: int) -> Array:
    """Correlated, off centre, of uneven scale."""
    mix = rng.standard_normal((n, n)) * np.exp(rng.uniform(-1, 1, n))
    return rng.standard_normal((rows, n)) @ mix + rng.standard_normal(n)


def moments(x: Array) -> Array:
    return np.asarray(x.T @ x / len(x))


def consumer(rng: np.random.Generator, labels: Indices, outputs: int = 5) -> Consumer:
    n = len(labels)
    return Consumer(rng.standard_normal((outputs, n)), moments(samples(rng, 8 * n, n)), labels)


def objective(c: Consumer, gone: list[int], ridge: float) -> float:
    """Least J over V, relative to the output energy, by lstsq on a square root of the moments."""
    n = len(c.labels)
    root = np.linalg.cholesky(c.matrix + ridge * scale_of(c.matrix) * np.eye(n)).T
    stay = ~np.isin(c.labels, gone)
    target = root @ c.weight.T
    v = np.linalg.lstsq(root[:, stay], target, rcond=None)[0]
    error = ((target - root[:, stay] @ v) ** 2).sum()
    return float(error / np.vdot(c.weight @ c.matrix, c.weight))


def brute_force(consumers: list[Consumer], atoms: int, ridge: float, count: int) -> Order:
    gone: list[int] = []
    losses = []
    for _ in range(count):
        left = [a for a in range(atoms) if a not in gone]
        each = [sum(objective(c, [*gone, a], ridge) for c in consumers) for a in left]
        best = int(np.argmin(each))
        losses.append(each[best])
        gone.append(left[best])
    return Order(np.array(gone), np.array(losses))


GROUPS = {
    "single": [np.arange(9)],
    "grouped": [np.repeat(np.arange(6), 3)],
    "interleaved, and some that stay": [np.array([0, 1, 2, -1, 0, 1, 2, 3, 3, -1, 4])],
    "uneven": [np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4])],
    "two consumers": [np.arange(7), np.tile(np.arange(7), 2)],
    "an atom that one does not read": [np.array([0, 1, 3, 4]), np.array([0, 2, 2, 3, 4, -1])],
}


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("labels", GROUPS.values(), ids=GROUPS)
def test_greedy_takes_what_brute_force_takes(labels: list[Indices], ridge: float) -> None:
    rng = np.random.default_rng(5)
    consumers = [consumer(rng, one) for one in labels]
    atoms = 1 + max(int(one.max()) for one in labels)
    found = reconstruction(consumers, atoms, ridge=ridge)
    expected = brute_force(consumers, atoms, ridge, atoms)
    assert found.atoms.tolist() == expected.atoms.tolist()
    assert found.loss is not None
    assert expected.loss is not None
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-8)


@given(seed=st.integers(0, 10_000), n=st.integers(3, 8), groups=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_greedy_on_random_problems(seed: int, n: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    atoms = n // groups
    consumers = [consumer(rng, rng.integers(-1, atoms, n), outputs) for outputs in (2, 6)]
    found = reconstruction(consumers, atoms, ridge=1e-3)
    expected = brute_force(consumers, atoms, 1e-3, atoms)
    assert found.loss is not None
    assert expected.loss is not None
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 48])
def test_the_predicted_loss_is_what_refitting_leaves(width: int) -> None:
    """Over several blocks of gathered updates, to 1e-8 at ridge 0."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(288 // width), width)
    c = consumer(rng, labels, outputs=12)
    order = reconstruction([c], int(labels[-1]) + 1, ridge=0.0, stop=200 // width)
    assert order.loss is not None
    for step in (1, len(order.atoms) // 2, len(order.atoms)):
        kept = np.flatnonzero(~np.isin(labels, order.atoms[:step]))
        new = refit(c.weight, c.matrix, kept, ridge=0.0)
        assert order.loss[step - 1] == pytest.approx(lost(c.weight, c.matrix, kept, new), abs=1e-8)


def test_with_a_ridge_the_predicted_loss_counts_what_the_weights_changed_by() -> None:
    rng = np.random.default_rng(2)
    c = consumer(rng, np.arange(20))
    order = reconstruction([c], 20, ridge=1e-2, stop=10)
    kept = np.setdiff1d(np.arange(20), order.atoms)
    new = refit(c.weight, c.matrix, kept, ridge=1e-2)
    change = c.weight.copy()
    change[:, kept] -= new
    paid = 1e-2 * scale_of(c.matrix) * (change**2).sum() / np.vdot(c.weight @ c.matrix, c.weight)
    assert order.loss is not None
    assert order.loss[-1] == pytest.approx(lost(c.weight, c.matrix, kept, new) + paid, rel=1e-9)


def test_along_gives_the_loss_of_any_order() -> None:
    rng = np.random.default_rng(3)
    consumers = [consumer(rng, np.arange(8)), consumer(rng, np.repeat(np.arange(8), 2))]
    given_order = rng.permutation(8)[:5]
    found = along(consumers, 8, given_order, ridge=0.0)
    expected = [sum(objective(c, given_order[: k + 1].tolist(), 0.0) for c in consumers) for k in range(5)]
    assert found.atoms.tolist() == given_order.tolist()
    assert found.loss is not None
    np.testing.assert_allclose(found.loss, expected, rtol=1e-8)
    greedy = reconstruction(consumers, 8, ridge=0.0)
    assert greedy.loss is not None
    again = along(consumers, 8, greedy.atoms, ridge=0.0).loss
    assert again is not None
    np.testing.assert_allclose(again, greedy.loss, rtol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_dead_features_go_first_at_no_cost_and_a_duplicate_once(ridge: float) -> None:
    rng = np.random.default_rng(4)
    x = samples(rng, 200, 10)
    x[:, 6] = 0
    x[:, 8] = x[:, 3]
    c = Consumer(rng.standard_normal((4, 10)), moments(x), np.arange(10))
    order = reconstruction([c], 10, ridge=ridge)
    assert order.loss is not None
    assert sorted(order.atoms[:2].tolist()) in ([3, 6], [6, 8])
    w, damping = (c.weight**2).sum(axis=0), max(ridge, LEAST_RIDGE) * scale_of(c.matrix)
    energy = np.vdot(c.weight @ c.matrix, c.weight)
    free = damping * (w[6] + 2 * max(w[3], w[8])) / energy  # the weight that goes, and moves to its twin
    assert order.loss[1] <= free * 1.001
    assert order.loss[2] > 10 * free  # the other of the two is needed now
    assert order.loss[-1] == pytest.approx(1 + damping * w.sum() / energy, rel=1e-6)  # nothing left: all is lost


def test_singular_moments_of_few_samples() -> None:
    """Fewer rows than features: as many as the rank leaves over cost nothing, and refitting is finite."""
    rng = np.random.default_rng(6)
    x = samples(rng, 12, 30)
    c = Consumer(rng.standard_normal((4, 30)), moments(x), np.arange(30))
    order = reconstruction([c], 30, ridge=0.0)
    assert order.loss is not None
    assert order.loss[17] < 1e-5
    assert order.loss[18] > 1e-5
    kept = np.setdiff1d(np.arange(30), order.atoms[:18])
    assert lost(c.weight, c.matrix, kept, refit(c.weight, c.matrix, kept, ridge=0.0)) < 1e-12
    doubled = np.concatenate([kept, order.atoms[:1]])  # 13 of rank 12: the pseudo-inverse
    assert lost(c.weight, c.matrix, doubled, refit(c.weight, c.matrix, doubled, ridge=0.0)) < 1e-12


def test_refit_is_the_minimum_it_claims() -> None:
    """Against least squares on the samples themselves, the ridge as rows of data."""
    rng = np.random.default_rng(7)
    x, w, kept = samples(rng, 90, 8), rng.standard_normal((3, 8)), np.array([5, 0, 2, 7])
    s = moments(x)
    for ridge in (0.0, 1e-2, 10.0):
        more = np.sqrt(ridge * scale_of(s) * len(x)) * np.eye(4)
        rows, target = np.vstack([x[:, kept], more]), np.vstack([x @ w.T, more @ w[:, kept].T])
        expected = np.linalg.lstsq(rows, target, rcond=None)[0].T
        np.testing.assert_allclose(refit(w, s, kept, ridge=ridge), expected, rtol=1e-8)
        error = ((x @ w.T - x[:, kept] @ expected.T) ** 2).sum() / ((x @ w.T) ** 2).sum()
        assert lost(w, s, kept, expected) == pytest.approx(error, rel=1e-9)


def test_with_bias_the_mean_is_kept_and_the_variance_is_least() -> None:
    rng = np.random.default_rng(8)
    x, w, kept = samples(rng, 90, 8), rng.standard_normal((3, 8)), np.array([0, 1, 3, 6])
    mean = x.mean(axis=0)
    new, bias = refit_with_bias(w, moments(x), mean, kept, ridge=0.0)
    error = x @ w.T - x[:, kept] @ new.T - bias
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=1e-12)
    rows = np.hstack([x[:, kept], np.ones((90, 1))])
    expected = np.linalg.lstsq(rows, x @ w.T, rcond=None)[0].T
    np.testing.assert_allclose(np.column_stack([new, bias]), expected, rtol=1e-7)
    spread = ((x - mean) @ w.T) ** 2
    assert lost(w, moments(x), kept, new, mean=mean) == pytest.approx((error**2).sum() / spread.sum(), rel=1e-9)


def test_nothing_kept_and_nothing_removed() -> None:
    rng = np.random.default_rng(9)
    w, s = rng.standard_normal((3, 5)), moments(samples(rng, 40, 5))
    assert refit(w, s, np.arange(5), ridge=1e-2).tobytes() == w.tobytes()
    none = refit(w, s, [], ridge=1e-2)
    assert none.shape == (3, 0)
    assert lost(w, s, [], none) == pytest.approx(1)
    assert lost(np.zeros((3, 5)), s, [], none) == 0.0


def test_magnitude_activation_and_geometric_median() -> None:
    weights = np.array([[3.0, 4.0], [1.0, 0.0], [3.0, 4.1], [0.0, -9.0]])
    assert magnitude(weights).atoms.tolist() == [1, 0, 2, 3]
    assert magnitude(weights, fixed=[1], stop=2).atoms.tolist() == [0, 2]
    assert geometric_median(weights).atoms.tolist()[0] == 0
    c = Consumer(np.array([[1.0, 2.0, 1.0]]), np.diag([1.0, 0.1, 5.0]), np.array([0, 1, 1]))
    order = activation([c, c], 2)
    assert order.atoms.tolist() == [0, 1]
    assert order.loss is not None
    np.testing.assert_allclose(order.loss, [2 * 1.0 / 6.4, 2.0])


def test_redundancy_is_the_cost_of_going_alone() -> None:
    rng = np.random.default_rng(10)
    c = consumer(rng, np.repeat(np.arange(5), 2))
    alone = [objective(c, [a], 1e-3) for a in range(5)]
    assert redundancy([c], 5, ridge=1e-3).atoms.tolist() == np.argsort(alone).tolist()


def test_ties_go_to_the_lowest_index_whatever_the_rounding() -> None:
    """Features that are equal up to a shift of bits in the sums that made their moments."""
    rng = np.random.default_rng(11)
    c = Consumer(np.ones((2, 6)), np.eye(6) * (1 + 1e-15 * rng.standard_normal(6)), np.arange(6))
    assert reconstruction([c], 6, ridge=0.0).atoms.tolist() == list(range(6))
    assert magnitude(np.ones((4, 3))).atoms.tolist() == [0, 1, 2, 3]


def test_fixed_atoms_stay_and_stop_is_kept() -> None:
    rng = np.random.default_rng(12)
    c = consumer(rng, np.arange(8))
    full = reconstruction([c], 8, ridge=1e-4)
    part = reconstruction([c], 8, ridge=1e-4, stop=3)
    assert part.atoms.tolist() == full.atoms[:3].tolist()
    first = int(full.atoms[0])
    without = reconstruction([c], 8, ridge=1e-4, fixed=[first])
    assert first not in without.atoms
    assert len(without.atoms) == 7
    assert without.loss is not None
    assert all(a <= b for a, b in pairwise(without.loss))
    assert reconstruction([c], 8, fixed=range(8)).atoms.tolist() == []


def test_a_consumer_without_output_costs_nothing() -> None:
    rng = np.random.default_rng(13)
    c = consumer(rng, np.arange(4))
    silent = Consumer(np.zeros((2, 4)), c.matrix, np.arange(4))
    dead = Consumer(np.ones((2, 4)), np.zeros((4, 4)), np.arange(4))
    both, one = reconstruction([silent, c, dead], 4), reconstruction([c], 4)
    assert both.atoms.tolist() == one.atoms.tolist()


def test_what_does_not_fit_is_refused() -> None:
    w, s = np.ones((2, 3)), np.eye(3)
    with pytest.raises(ValueError, match="do not fit"):
        refit(w, np.eye(4), [0])
    with pytest.raises(ValueError, match="different indices"):
        refit(w, s, [0, 0])
    with pytest.raises(ValueError, match="ridge"):
        refit(w, s, [0], ridge=-1)
    with pytest.raises(ValueError, match="do not fit"):
        reconstruction([Consumer(w, np.eye(4), np.arange(3))], 3)
    with pytest.raises(ValueError, match="labels"):
        reconstruction([Consumer(w, s, np.arange(3))], 2)
    with pytest.raises(ValueError, match="semidefinite"):
        reconstruction([Consumer(w, -s, np.arange(3))], 3)
    with pytest.raises(ValueError, match="different atoms"):
        along([Consumer(w, s, np.arange(3))], 3, [1, 1])
