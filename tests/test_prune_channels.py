"""Structured pruning by ratio: what goes, how wide things are afterwards, and that it repeats."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cuts import choices_of, cut, family, groups_of, named, offered, reasons_of, shape, weights
from models import Array, check, learn, normal, run

import onnxcompress
from onnxcompress.errors import CouplingError
from onnxcompress.model import serialize
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.passes.prune_channels import Criterion, PruneChannels
from onnxcompress.statistics import Evidence
from onnxcompress.target import Target
from onnxcompress.trial import build

HALF = PruneChannels(ratio=0.5, multiple=1, criterion=Criterion.MAGNITUDE, recover=False)
"""Needs no data."""


def chain(*widths: int) -> ir.Model:
    """MatMul after MatMul."""
    body, parts, last = "", dict[str, Array](), "x"
    for k, (a, b) in enumerate(itertools.pairwise(widths)):
        out = "y" if k == len(widths) - 2 else f"m{k}"
        parts[f"w{k}"] = normal(k, a, b)
        body += f"  {out} = MatMul ({last}, w{k})\n"
        last = out
    return named(f"g (float[n,{widths[0]}] x) => (float[n,{widths[-1]}] y) {{\n{body}}}", parts)


# --- how many --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 10, 16, 64, 100])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_multiple_1_takes_a_ratio_to_the_letter(size: int, ratio: float) -> None:
    (names,) = offered(PruneChannels(ratio=ratio, multiple=1), chain(4, size, 2)).values()
    gone = int(ratio * size + 1e-9)  # what goes is never more than asked for
    assert names == ([f"{max(size - gone, 1)} of {size} neurons"] if gone else [])


@pytest.mark.parametrize(
    ("size", "multiple", "kept"),
    [(64, 16, "32"), (48, 16, "32"), (40, 16, "32"), (24, 16, "16"), (20, 4, "12"), (16, 16, ""), (12, 16, "")],
)
def test_widths_are_multiples_rounded_up(size: int, multiple: int, kept: str) -> None:
    """A width below the multiple is a reason to leave the group alone, not an error, unless it was asked for."""
    pass_, model = PruneChannels(ratio=0.5, multiple=multiple), chain(4, size, 2)
    assert offered(pass_, model)["m0"] == ([f"{kept} of {size} neurons"] if kept else [])
    if not kept:
        expected = "fewer than the multiple 16" if size < multiple else "no smaller multiple of 16"
        assert expected in reasons_of(pass_, model)["m0"]


def test_the_multiple_is_the_devices() -> None:
    model, data = chain(4, 64, 24, 6, 2), ()
    by_16 = offered(PruneChannels(ratio=0.4), model, data, Target("t", channel_multiple=16))
    assert by_16 == {"m0": ["48 of 64 neurons"], "m1": ["16 of 24 neurons"], "m2": ["4 of 6 neurons"]}
    ladder = offered(PruneChannels(), model, data, Target("t", channel_multiple=16))
    assert ladder["m0"] == ["48 of 64 neurons", "32 of 64 neurons", "16 of 64 neurons"]


def test_a_multiple_wider_than_a_group_asked_for_by_name_is_an_error() -> None:
    with pytest.raises(CouplingError, match=r"group 'm0': its 12 neurons are fewer than the multiple 16"):
        choices_of(PruneChannels(ratio=0.5, multiple=16, groups=("m0",)), chain(4, 12, 2))


# --- what goes -------------------------------------------------------------------------------------

HEADS = """g (float[n,5,16] x) => (float[n,5,16] y) {
  q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
  q4 = Reshape (q, s)  k4 = Reshape (k, t)  v4 = Reshape (v, t)
  qt = Transpose <perm = [0,2,1,3]> (q4)  kt = Transpose <perm = [0,2,3,1]> (k4)  vt = Transpose <perm = [0,2,1,3]> (v4)
  scores = MatMul (qt, kt)  p = Softmax <axis = -1> (scores)  c = MatMul (p, vt)
  ct = Transpose <perm = [0,2,1,3]> (c)  o = Reshape (ct, u)  y = MatMul (o, wo)
}"""
ATTENTION = {
    "wq": normal(1, 16, 32), "wk": normal(2, 16, 32), "wv": normal(3, 16, 32), "wo": normal(4, 32, 16),
    "s": np.array([0, 0, 4, 8]), "t": np.array([0, 0, 4, 8]), "u": np.array([0, 0, 32]),
}  # fmt: skip


def test_heads_and_their_widths() -> None:
    model = named(HEADS, ATTENTION)
    assert sorted(groups_of(model).values()) == [("head widths", 8), ("head widths", 8), ("heads", 4)]
    heads = next(k for k, v in groups_of(model).items() if v[0] == "heads")
    after = cut(HALF, model, only=[heads])
    assert [shape(after, n) for n in ("q", "k", "v", "y")] == [(16, 16), (16, 16), (16, 16), (16, 16)]
    kept = [h for h in range(4) if any((weights(after)["wq"] == ATTENTION["wq"][:, 8 * h : 8 * h + 8][:, :1]).all(0))]
    columns = [c for h in kept for c in range(8 * h, 8 * h + 8)]
    for name in ("wq", "wk", "wv"):  # whole heads
        np.testing.assert_array_equal(weights(after)[name], ATTENTION[name][:, columns])
    np.testing.assert_array_equal(weights(after)["wo"], ATTENTION["wo"][columns])
    everything = cut(HALF, model)
    assert [shape(everything, n) for n in ("q", "k", "v", "y")] == [(16, 8), (16, 8), (16, 8), (8, 16)]
    assert run(everything, {"x": normal(9, 2, 5, 16)})["y"].shape == (2, 5, 16)


def test_heads_that_share_keys_go_with_them() -> None:
    """Four queries, two to a key: what can go is a key head with both of its queries, or one query of each key."""
    (feed,) = family_feeds("gpt_gqa", 1)
    model, place = family("gpt_gqa"), "/layers.0/self_attn/{}_proj/MatMul"
    found = groups_of(model, feed)
    assert found[place.format("q")] == found[place.format("k")] == ("heads", 2)
    expected = {  # columns of q, k, v, rows of o, where heads are 8 wide and there are 4 queries to 2 keys
        "q": [16, 16, 16, 16],
        "k": [16, 8, 8, 16],
    }
    for name, sizes in expected.items():
        after = cut(HALF, model, [feed], only=[place.format(name)])
        assert [shape(after, place.format(n))[n != "o"] for n in "qkvo"] == sizes
        assert run(after, feed).keys() == run(model, feed).keys()
    both = cut(HALF, model, [feed], only=[place.format(n) for n in expected])
    assert [shape(both, place.format(n))[n != "o"] for n in "qkvo"] == [8, 8, 8, 8]
    assert np.isfinite(next(iter(run(both, feed).values()))).all()


def test_hidden_units_of_both_directions() -> None:
    body = """g (float[6,2,3] x) => (float[6,2,2,5] y) {
  a = LSTM <hidden_size = 8, direction = "bidirectional"> (x, W, R, B)
  y = MatMul (a, v)
}"""
    parts = {"W": normal(1, 2, 32, 3), "R": normal(2, 2, 32, 8), "B": normal(3, 2, 64), "v": normal(4, 8, 5)}
    model = named(body, parts)
    assert groups_of(model) == {"a": ("hidden units", 8)}
    after = cut(HALF, model)
    assert [shape(after, "a", i) for i in (1, 2, 3)] == [(2, 16, 3), (2, 16, 4), (2, 32)]
    assert shape(after, "y") == (4, 5) and run(after, {"x": normal(5, 6, 2, 3)})["y"].shape == (6, 2, 2, 5)


def test_branches_of_a_concat_are_never_empty() -> None:
    body = """g (float[1,3,4,4] x) => (float[1,2,4,4] y) {
  a = Conv (x, wa)  b = Conv (x, wb)  c = Concat <axis = 1> (a, b)
  n = BatchNormalization (c, s, t, m, v)  y = Conv (n, wy)
}"""
    ones, small = np.ones(18, np.float32), np.float32(1e-3)
    parts = {
        "wa": normal(1, 2, 3, 1, 1) * small, "wb": normal(2, 16, 3, 1, 1), "wy": normal(3, 2, 18, 1, 1),
        "s": ones, "t": 0 * ones, "m": 0 * ones, "v": ones,
    }  # fmt: skip
    model = named(body, parts)
    for ratio in (0.5, 0.9, 0.99):
        after = cut(replace(HALF, ratio=ratio), model)
        assert shape(after, "a")[0] >= 1 and shape(after, "b")[0] >= 1
        assert shape(after, "a")[0] + shape(after, "b")[0] == shape(after, "y")[1] == max(18 - int(18 * ratio), 2)


INSIDE = """g (float[2,4] x, bool c) => (float[2,3] y) {
  a = MatMul (x, w)
  y = If (c) <then_branch = t () => (float[2,3] p) { p = MatMul (a, v) },
              else_branch = e () => (float[2,3] q) { r = Relu (a)  q = MatMul (r, u) }>
}"""


def test_readers_inside_the_bodies_of_an_if() -> None:
    parts = {"w": normal(1, 4, 8), "v": normal(2, 8, 3), "u": normal(3, 8, 3)}
    model = named(INSIDE, parts)
    for pass_ in (HALF, PruneChannels(ratio=0.5, multiple=1)):
        data = [{"x": normal(4, 2, 4), "c": np.array(c)} for c in (True, False)]
        after = cut(pass_, model, data)
        assert [weights(after)[n].shape for n in ("w", "v", "u")] == [(4, 4), (4, 3), (4, 3)]
        for feed in data:
            assert run(after, feed)["y"].shape == (2, 3)


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 15, 18, 21])
def test_split_slice_and_squeeze_of_every_opset(opset: int) -> None:
    """Lists are attributes in old opsets and inputs in new ones."""
    old_slice, old_lists = opset < 10, opset < 13
    split = "<axis = 1, split = [6,2]> (a)" if old_lists else "<axis = 1> (a, sizes)"
    slice_ = "<axes = [1], starts = [1], ends = [5]> (b)" if old_slice else "(b, from, to, along)"
    squeeze = "<axes = [2]> (f)" if old_lists else "(f, two)"
    unsqueeze = "<axes = [2]> (d)" if old_lists else "(d, two)"
    body = f"""g (float[3,4] x) => (float[3,2] y) {{
  a = MatMul (x, w)  b, c = Split {split}
  d = Slice {slice_}
  f = Unsqueeze {unsqueeze}  h = Squeeze {squeeze}
  y0 = MatMul (h, v)  y1 = MatMul (c, u)  y = Add (y0, y1)
}}"""
    parts: dict[str, Array] = {"w": normal(1, 4, 8), "v": normal(2, 4, 2), "u": normal(3, 2, 2)}
    lists = {"from": np.array([1]), "to": np.array([5]), "along": np.array([1])}
    parts |= {} if old_slice else lists
    parts |= {} if old_lists else {"sizes": np.array([6, 2]), "two": np.array([2])}
    model, data = named(body, parts, opset=opset), [{"x": normal(5 + i, 3, 4)} for i in range(4)]
    after = cut(PruneChannels(ratio=0.5, multiple=1), model, data)
    assert shape(after, "a")[1] == 4
    assert shape(after, "y0")[0] + shape(after, "y1")[0] <= 4
    assert run(after, data[0])["y"].shape == (3, 2)


@pytest.mark.parametrize("criterion", [Criterion.AUTO, Criterion.RANDOM])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_at_half(name: str, criterion: Criterion) -> None:
    """It loads, runs, keeps its signature, and is as small as was said."""
    model, data = family(name), [*family_feeds(name, 2, batch=2)]
    pass_ = PruneChannels(ratio=0.5, multiple=1, criterion=criterion)
    choices = choices_of(pass_, model, data)
    assert choices
    built = build(model, pass_, choices, learn(pass_, model, data))
    check(built.model)
    before, after = run(model, data[0]), run(built.model, data[0])
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    assert all(np.isfinite(v).all() for v in after.values())
    sizes = [sum(v.nbytes for v in weights(m).values()) for m in (model, built.model)]
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if n not in ("densenet", "shufflenet_v2", "c2f_detector", "unet")]
)
def test_sizes_and_bytes_are_what_was_said(name: str) -> None:
    """But for new biases and copies of shared ones; where branches are joined, it depends on whose atoms go."""
    model, data = family(name), [*family_feeds(name, 1)]
    old = weights(model)
    for choice in choices_of(HALF, model, data):
        built = build(model, HALF, [choice], Evidence()).model
        new = weights(built)
        for weight, axis, size in choice.resizes:
            if weight in new and new[weight].size < old[weight].size:
                assert new[weight].shape[axis] == size, (choice.site.key, weight)
        saved = sum(v.nbytes for v in old.values()) - sum(v.nbytes for v in new.values())
        assert abs(saved - choice.bytes_saved) <= 0.15 * choice.bytes_saved, choice.site.key


def test_without_names_in_the_file_only_planned_widths_are_offered_that_are_smaller() -> None:
    model = chain(4, 8, 2)
    assert PruneChannels().planned and not HALF.planned
    assert offered(PruneChannels(multiple=4), model)["m0"] == ["4 of 8 neurons"]
    assert reasons_of(replace(HALF, ratio=0.0), model)["m0"] == "nothing is to be removed"


# --- which -----------------------------------------------------------------------------------------


def _kept(model: ir.Model, after: ir.Model) -> set[int]:
    whole, part = weights(model)["w"], weights(after)["w"]
    return {int(np.flatnonzero((whole == c[:, None]).all(0))[0]) for c in part.T}


PICKY = """g (float[64,6] x) => (float[64,4] y) { a = MatMul (x, w)  r = Relu (a)  y = MatMul (r, v) }"""


def picky() -> tuple[ir.Model, list[dict[str, Array]]]:
    """Neuron 0 has the smallest weights, 1 is read least, 2 is twice 3."""
    w, v = normal(1, 6, 8), normal(2, 8, 4)
    w[:, 0] *= 0.05
    v[0] *= 100
    v[1] *= 1e-3
    w[:, 2] = 2 * w[:, 3]
    return named(PICKY, {"w": w, "v": v}), [{"x": normal(10 + i, 64, 6)} for i in range(4)]


@pytest.mark.parametrize(
    ("criterion", "gone"),
    [
        (Criterion.MAGNITUDE, {0}),
        (Criterion.ACTIVATION, {1}),
        (Criterion.REDUNDANCY, {1, 2, 3}),
        (Criterion.RECONSTRUCTION, {1, 2, 3}),
        (Criterion.AUTO, {1, 2, 3}),
    ],
)
def test_each_criterion_takes_what_it_says(criterion: Criterion, gone: set[int]) -> None:
    model, data = picky()
    after = cut(PruneChannels(ratio=0.125, multiple=1, criterion=criterion), model, data)
    assert len(set(range(8)) - _kept(model, after)) == 1
    assert set(range(8)) - _kept(model, after) <= gone


def test_auto_loses_no_more_than_any_other() -> None:
    model, data = picky()
    lost = {}
    for criterion in Criterion:
        after = cut(PruneChannels(ratio=0.5, multiple=1, criterion=criterion, seed=1), model, data)
        lost[criterion] = sum(float(np.square(run(after, f)["y"] - run(model, f)["y"]).sum()) for f in data)
    assert lost[Criterion.AUTO] <= 1.001 * min(lost.values())
    assert lost[Criterion.AUTO] < 0.5 * lost[Criterion.RANDOM]


def test_random_is_another_choice_for_another_seed() -> None:
    model = chain(4, 64, 2)
    first, again, other = (
        weights(cut(PruneChannels(ratio=0.5, multiple=1, criterion=Criterion.RANDOM, recover=False, seed=s), model))
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first["w0"], again["w0"])
    assert not np.array_equal(first["w0"], other["w0"])


SCRIPT = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_prune_channels import everything
print(hashlib.sha256(everything(sys.argv[2])).hexdigest())
"""


def everything(name: str) -> bytes:
    model, data = family(name), [*family_feeds(name, 3)]
    return serialize(cut(PruneChannels(ratio=0.5), model, data))


@pytest.mark.parametrize("name", ["mobilenet_v3", "bert"])
def test_the_same_bytes_in_another_process(name: str) -> None:
    here = hashlib.sha256(everything(name)).hexdigest()
    line = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), name]
    there = subprocess.run(line, capture_output=True, text=True, check=True)
    assert there.stdout.split() == [here] == [hashlib.sha256(everything(name)).hexdigest()]


# --- the whole way ---------------------------------------------------------------------------------


def test_planned_widths_are_only_those_that_gain() -> None:
    """Where every site is priced: what is taken is predicted to be faster or smaller, and the report says why not."""
    model, data = family("resnet"), [*family_feeds("resnet", 8)]
    result = onnxcompress.optimize(
        model,
        profile="host-x86-vnni",
        calibration=data,
        passes=[PruneChannels()],
        budget=onnxcompress.Budget(min_sqnr_db=12),
        timing=False,
    )
    sites = [s for s in result.report.sites if s.pass_name == "prune_channels"]
    taken = [s for s in sites if s.decision != "keep"]
    assert taken and all(s.gain_ms > 0 or s.bytes_saved > 0 for s in taken)
    assert all(s.reason for s in sites if s.decision == "keep")
    assert result.report.totals.comparison.min_sqnr_db >= 11
