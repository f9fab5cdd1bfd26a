"""Keep-lists from elsewhere, what a user may get wrong, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cuts import choices_of, cut, family, named, offered, shape, weights
from models import TARGET, normal, proto_of, run, text

import onnxcompress
from onnxcompress.base import Site, Skipped
from onnxcompress.cli import main
from onnxcompress.errors import CouplingError, PassOptionError
from onnxcompress.models_zoo.families import family_feeds
from onnxcompress.passes.prune_channels import Criterion, PruneChannels
from onnxcompress.registry import parse
from onnxcompress.view import GraphView

HALF = PruneChannels(ratio=0.5, multiple=1, criterion=Criterion.MAGNITUDE, recover=False)
CONV = {"w": normal(1, 8, 3, 3, 3), "b": normal(2, 8), "v": normal(3, 4, 8, 3, 3), "u": normal(4, 2, 4, 1, 1)}
CONV_NET = """g (float[n,3,8,8] x) => (float[n,2,4,4] y) {
  a = Conv (x, w, b)  r = Relu (a)  c = Conv (r, v)  y = Conv (c, u)
}"""
HEADS = """g (float[n,5,16] x) => (float[n,5,16] y) {
  q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
  q4 = Reshape (q, s)  k4 = Reshape (k, t)  v4 = Reshape (v, t)
  qt = Transpose <perm = [0,2,1,3]> (q4)  kt = Transpose <perm = [0,2,3,1]> (k4)  vt = Transpose <perm = [0,2,1,3]> (v4)
  scores = MatMul (qt, kt)  p = Softmax <axis = -1> (scores)  c = MatMul (p, vt)
  ct = Transpose <perm = [0,2,1,3]> (c)  o = Reshape (ct, e)  y = MatMul (o, wo)
}"""
ATTENTION = {
    "wq": normal(1, 16, 32), "wk": normal(2, 16, 32), "wv": normal(3, 16, 32), "wo": normal(4, 32, 16),
    "s": np.array([0, 0, 4, 8]), "t": np.array([0, 0, 4, 8]), "e": np.array([0, 0, 32]),
}  # fmt: skip
JOINED = """g (float[n,3,4,4] x) => (float[n,2,4,4] y) {
  a = Conv (x, wa)  b = Conv (x, wb)  c = Concat <axis = 1> (a, b)  y = Conv (c, wy)
}"""
CHAIN = """g (float[n,4] x) => (float[n,2] y) { m0 = MatMul (x, w0)  m1 = MatMul (m0, w1)  y = MatMul (m1, w2) }"""
NEURONS = {"w0": normal(1, 4, 8), "w1": normal(2, 8, 8), "w2": normal(3, 8, 2)}
BRANCHES = {"wa": normal(1, 4, 3, 1, 1), "wb": normal(2, 6, 3, 1, 1), "wy": normal(3, 2, 10, 1, 1)}


def write(folder: Path, lists: Mapping[str, object], name: str = "keep.json") -> str:
    path = folder / name
    if name.endswith(".npz"):
        np.savez(path, **{k: np.asarray(v) for k, v in lists.items()})  # type: ignore[arg-type]
    else:
        path.write_text(json.dumps(lists), encoding="utf-8")
    return str(path)


def by_list(folder: Path, model: ir.Model, lists: Mapping[str, object], name: str = "keep.json") -> ir.Model:
    return cut(PruneChannels(keep=write(folder, lists, name), recover=False), model)


# --- what a list may look like ---------------------------------------------------------------------

MASK = np.array([True, False, True, False, False, True, False, False])
ELEMENTS = MASK[:, None, None, None] & (normal(9, 8, 3, 3, 3) > -1)


@pytest.mark.parametrize(
    ("name", "key", "entry"),
    [
        ("keep.json", "a", [0, 2, 5]),
        ("keep.json", "a", [5, 0, 2]),
        ("keep.json", "a", MASK.tolist()),
        ("keep.json", "w", [0, 2, 5]),
        ("keep.json", "b", MASK.tolist()),
        ("keep.npz", "a", np.array([0, 2, 5])),
        ("keep.npz", "w", np.array([0, 2, 5], np.uint8)),
        ("keep.npz", "w", MASK),
        ("keep.npz", "b", MASK.astype(np.float32)),
        ("keep.npz", "w", ELEMENTS),
        ("keep.npz", "w", ELEMENTS.astype(np.float64)),
        ("keep.NPZ", "w", ELEMENTS * CONV["w"]),
    ],
)
def test_what_is_kept_is_what_the_list_says(tmp_path: Path, name: str, key: str, entry: object) -> None:
    model = named(CONV_NET, CONV)
    if name == "keep.NPZ":
        Path(write(tmp_path, {key: entry}, "keep.npz")).rename(tmp_path / name)
        after = cut(PruneChannels(keep=str(tmp_path / name), recover=False), model)
    else:
        after = by_list(tmp_path, model, {key: entry}, name)
    found = weights(after)
    np.testing.assert_array_equal(found["w"], CONV["w"][MASK])
    np.testing.assert_array_equal(found["b"], CONV["b"][MASK])
    np.testing.assert_array_equal(found["v"], CONV["v"][:, MASK])
    np.testing.assert_array_equal(found["u"], CONV["u"], "only what is listed goes")


def test_a_weight_names_what_it_makes_not_what_it_reads(tmp_path: Path) -> None:
    after = by_list(tmp_path, named(CONV_NET, CONV), {"v": [1, 3]})
    assert weights(after)["v"].shape == (2, 8, 3, 3) and weights(after)["u"].shape == (2, 2, 1, 1)


def test_two_lists_of_one_group_keep_what_both_keep(tmp_path: Path) -> None:
    after = by_list(tmp_path, named(CONV_NET, CONV), {"w": [0, 1, 2, 3], "b": [2, 3, 4, 5]})
    np.testing.assert_array_equal(weights(after)["w"], CONV["w"][[2, 3]])


@pytest.mark.parametrize(
    "entry",
    [
        [0, 3],
        [True, False, False, True],
        [*range(8), *range(24, 32)],
        [True] * 8 + [False] * 16 + [True] * 8,
    ],
)
@pytest.mark.parametrize("named_by", ["node", "weight"])
def test_heads_by_head_or_by_position(tmp_path: Path, entry: list[object], named_by: str) -> None:
    model = named(HEADS, ATTENTION)
    view = GraphView(model)
    heads = next(s.key for s in HALF.sites(view) if "heads" in HALF.choices(s, view, TARGET)[0].name)
    if named_by == "weight" and len(entry) < 5 and isinstance(entry[0], int) and not isinstance(entry[0], bool):
        with pytest.raises(CouplingError, match=r"'wq' makes 2 groups, and the list fits 2 of them"):
            by_list(tmp_path, model, {"wq": entry})  # two heads, or two positions of each
        return
    after = by_list(tmp_path, model, {heads if named_by == "node" else "wq": entry})
    columns = [*range(8), *range(24, 32)]
    np.testing.assert_array_equal(weights(after)["wq"], ATTENTION["wq"][:, columns])
    np.testing.assert_array_equal(weights(after)["wo"], ATTENTION["wo"][columns])
    assert run(after, {"x": normal(5, 2, 5, 16)})["y"].shape == (2, 5, 16)


def test_a_branch_of_a_concat_leaves_the_other_alone(tmp_path: Path) -> None:
    body = JOINED.replace("y = Conv (c, wy)", "n = BatchNormalization (c, s, t, m, d)  y = Conv (n, wy)")
    ones = np.ones(10, np.float32)
    model = named(body, {**BRANCHES, "s": ones, "t": ones, "m": ones, "d": ones})
    for lists in ({"wa": [0, 2]}, {"wa": [True, False, True, False]}):
        after = by_list(tmp_path, model, lists)
        assert shape(after, "a")[0] == 2 and shape(after, "b")[0] == 6 and shape(after, "y")[1] == 8
        np.testing.assert_array_equal(weights(after)["wa"], BRANCHES["wa"][[0, 2]])
    both = by_list(tmp_path, model, {"wa": [0, 2], "wb": [5]})
    assert shape(both, "a")[0] == 2 and shape(both, "b")[0] == 1
    key = next(iter(offered(HALF, model)))
    with pytest.raises(CouplingError, match=r"group '.' \(10 channels\): nothing would be left of"):
        by_list(tmp_path, model, {key: [4, 5]})


def test_a_list_that_keeps_everything_changes_nothing(tmp_path: Path) -> None:
    pass_ = PruneChannels(keep=write(tmp_path, {"a": list(range(8))}))
    assert choices_of(pass_, named(CONV_NET, CONV)) == []


# --- lists that make no sense ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"a": [True, False]}, r"keep-list 'a' of group 'a' \(8 channels\): the list is for 2"),
        ({"a": [0, 8]}, r"keep-list 'a' of group 'a' \(8 channels\): there is no position 8"),
        ({"a": [-1, 0]}, "-1 is no position"),
        ({"a": [0, 0, 1]}, "position 0 is there twice"),
        ({"a": []}, r"group 'a' \(8 channels\) would be empty"),
        ({"a": [False] * 8}, r"group 'a' \(8 channels\) would be empty"),
        ({"w": [0, 1], "b": [2, 3]}, r"group 'a' \(8 channels\) would be empty"),
        ({"y": [0]}, r"group 'y' \(2 channels\) is pinned: it is an output of the model \(y\[1\]"),
        ({"aa": [0]}, "no group is called 'aa'"),
        ({"x": [0]}, "no group is called 'x'"),
    ],
)
def test_lists_that_do_not_fit_the_model(tmp_path: Path, lists: Mapping[str, object], message: str) -> None:
    with pytest.raises(CouplingError, match=message) as caught:
        by_list(tmp_path, named(CONV_NET, CONV), lists)
    assert "keep.json" in str(caught.value) and caught.value.hint


def test_torn_heads(tmp_path: Path) -> None:
    model = named(HEADS, ATTENTION)
    view = GraphView(model)
    heads = next(s.key for s in HALF.sites(view) if "heads" in HALF.choices(s, view, TARGET)[0].name)
    with pytest.raises(CouplingError, match=r"\(4 heads\): position 4 is to go without others it is tied to"):
        by_list(tmp_path, model, {heads: [0, 1, 2, 3, 31]})
    with pytest.raises(CouplingError, match=r"'wq' makes 2 groups, and the list fits none of them"):
        by_list(tmp_path, model, {"wq": [0, 1, 2, 3, 31]})


def test_a_mask_of_elements_that_fits_no_weight(tmp_path: Path) -> None:
    with pytest.raises(CouplingError, match=r"a mask of shape \[8, 3\] fits no weight of it"):
        by_list(tmp_path, named(CONV_NET, CONV), {"w": np.ones((8, 3))}, "keep.npz")


def test_a_width_below_the_multiple(tmp_path: Path) -> None:
    pass_ = PruneChannels(keep=write(tmp_path, {"a": [1, 2]}), multiple=4)
    with pytest.raises(CouplingError, match=r"group 'a': its keep-list keeps 2 of 8 channels, a width below"):
        choices_of(pass_, named(CONV_NET, CONV))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"not json", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[0, 1]", "are not lists by name"),
        (b'{"a": 3}', "are not lists by name"),
        (b'{"a": [0, 1.5]}', "'a' is neither a list of whole numbers nor"),
        (b'{"a": [NaN]}', "'a' is neither"),
        (b'{"a": [[0], [1, 2]]}', "'a' is neither"),
        (b'{"a": [true, 2]}', "'a' is neither"),
        (b'{"a": ["0"]}', "'a' is neither"),
        (b'{"a": [99999999999999999999]}', "'a' is neither"),
        (b'{"a": [0], "a": [1]}', "'a' is there twice"),
    ],
)
def test_files_that_are_no_keep_lists(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "keep.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PassOptionError, match=message) as caught:
        list(PruneChannels(keep=str(path)).sites(GraphView(named(CONV_NET, CONV))))
    assert "keep.json" in str(caught.value)


def test_archives_that_are_no_keep_lists(tmp_path: Path) -> None:
    model = named(CONV_NET, CONV)
    whole = Path(write(tmp_path, {"a": np.arange(3)}, "good.npz")).read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.arange(3))
    np.savez(tmp_path / "object.npz", a=np.array([{}], object))
    write(tmp_path, {"a": np.array(["x"])}, "text.npz")
    write(tmp_path, {"a": np.array(1)}, "scalar.npz")
    write(tmp_path, {"a": np.where(MASK, 1.0, np.nan)}, "nan.npz")
    (tmp_path / "folder.json").mkdir()
    for name in ("short.npz", "single.npz", "object.npz", "text.npz", "scalar.npz", "nan.npz", "folder.json"):
        with pytest.raises(PassOptionError, match=f"keep-lists '.*{name}'"):
            list(PruneChannels(keep=str(tmp_path / name)).sites(GraphView(model)))


# --- at the shell ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(proto_of(named(CONV_NET, CONV)), path)
    np.savez(tmp_path / "data.npz", x=normal(5, 16, 3, 8, 8))
    return path


def shell(saved: Path, spec: str, *more: str) -> int:
    data = str(saved.parent / "data.npz")
    line = ["optimize", str(saved), "--profile", "cortex-a53", "--calibration", data, "--pass", spec, *more]
    return main([*line, "-o", str(saved.parent / "out.onnx")])


def test_a_keep_list_at_the_shell(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = write(saved.parent, {"a": [0, 1, 2, 3, 4, 5]})
    assert shell(saved, f"prune_channels{{keep={keep}}}", "--min-sqnr", "0") == 0
    assert "6 of 8 channels" in capsys.readouterr().out
    sizes = {tuple(w.dims) for w in onnx.load(saved.parent / "out.onnx").graph.initializer}
    assert {(6, 3, 3, 3), (4, 6, 3, 3), (2, 4, 1, 1)} <= sizes


def test_channels_that_are_zero_already_count(saved: Path) -> None:
    """A training framework sets to zero what its mask removes; the list is of the whole width all the same."""
    zeros = MASK.astype(np.float32)
    onnx.save(
        proto_of(named(CONV_NET, {**CONV, "w": CONV["w"] * zeros[:, None, None, None], "b": CONV["b"] * zeros})), saved
    )
    for lists in ({"a": MASK.tolist()}, {"w": [0, 2, 5]}):
        assert shell(saved, f"prune_channels{{keep={write(saved.parent, lists)}}}") == 0
        assert (3, 3, 3, 3) in {tuple(w.dims) for w in onnx.load(saved.parent / "out.onnx").graph.initializer}
        (saved.parent / "out.onnx").unlink()


def test_weights_keep_their_names_where_a_batch_normalization_is_folded(tmp_path: Path) -> None:
    model = family("resnet_bn")
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv2.weight"]
    masks = {n: weights(model)[n] * (np.arange(len(weights(model)[n])) % 2 == 0)[:, None, None, None] for n in names}
    done = onnxcompress.optimize(
        model,
        profile="host-x86-vnni",
        calibration=[*family_feeds("resnet_bn", 3)],
        passes=[PruneChannels(keep=write(tmp_path, masks, "keep.npz"))],
        budget=onnxcompress.Budget(min_sqnr_db=-1000),
        timing=False,
    )
    changed = {s.key: s.decision for s in done.report.sites if s.decision != "keep"}
    assert changed == {
        "/conv1/Conv": "8 of 16 channels",
        "/layer1.0/conv1/Conv": "8 of 16 channels",
        "/layer2.0/conv2/Conv": "16 of 32 channels",
    }


def test_below_the_budget_it_says_so_and_what_to_do(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = write(saved.parent, {"a": [0, 1]})
    assert shell(saved, f"prune_channels{{keep={keep}}}") == 0
    captured = capsys.readouterr()
    assert "prune_channels was asked for and is not kept: worst output at" in captured.err
    assert "20.0 dB asked for. To allow it, give --min-sqnr DB" in captured.err
    assert (8, 3, 3, 3) in {tuple(w.dims) for w in onnx.load(saved.parent / "out.onnx").graph.initializer}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("keep=none.json", "none.json' cannot be read"),
        ("ratio=1.0", "ratio is 1.0"),
        ("ratio=0.5, groups=[y]", "is pinned: it is an output of the model"),
        ("ratio=0.5, groups=[z]", "no group is called 'z'"),
        ("ratio=0.5, groups=[a], multiple=16", "fewer than the multiple 16"),
        ("keep=short.json", "the list is for 3"),
    ],
)
def test_errors_at_the_shell(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(saved.parent)
    write(saved.parent, {"a": [True, False, True]}, "short.json")
    before = sorted(saved.parent.iterdir())
    assert shell(saved, f"prune_channels{{{spec}}}") == 6
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and "hint: " in captured.err
    assert sorted(saved.parent.iterdir()) == before, "nothing is written"


# --- what is left alone, and bad input -------------------------------------------------------------


def test_pinned_groups_say_why() -> None:
    found = [s for s in HALF.sites(GraphView(named(CHAIN, NEURONS))) if isinstance(s, Skipped)]
    assert found == [] or all("have to stay" in s.reason for s in found)
    body = "g (float[n,4] x) => (float[n,8] y) { a = MatMul (x, w)  y = Relu (a) }"
    (skipped,) = HALF.sites(GraphView(named(body, {"w": normal(1, 4, 8)})))
    assert isinstance(skipped, Skipped) and skipped.reason.startswith("8 neurons have to stay: it is an output")
    with pytest.raises(CouplingError, match=r"group 'a' \(8 neurons\) is pinned: it is an output of the model"):
        list(replace(HALF, groups=("a",)).sites(GraphView(named(body, {"w": normal(1, 4, 8)}))))


def test_only_what_was_asked_for() -> None:
    model = named(CHAIN, NEURONS)
    assert set(offered(replace(HALF, groups=("m1",)), model)) == {"m1"}
    assert set(offered(replace(HALF, groups=("w0",)), model)) == {"m0"}, "by a tensor of it"
    with pytest.raises(CouplingError, match=r"no group is called 'm7'.*did you mean"):
        list(replace(HALF, groups=("m7",)).sites(GraphView(model)))


def test_a_quantized_model_is_left_alone() -> None:
    body = "g (float[2,4] x) => (float[2,4] y) { q, s, z = DynamicQuantizeLinear (x)  y = DequantizeLinear (q, s, z) }"
    (skipped,) = HALF.sites(GraphView(text(body)))
    assert isinstance(skipped, Skipped) and "already quantized" in skipped.reason
    assert not [s for s in HALF.sites(GraphView(text(body))) if isinstance(s, Site)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ratio=1", "ratio is 1"),
        ("ratio=-0.1", "ratio is -0.1"),
        ("ratio=nan", "option 'ratio'.*'nan'"),
        ("multiple=0", "multiple is 0"),
        ("ridge=-1", "ridge is -1"),
        ("ridge=nan", "option 'ridge'.*'nan'"),
        ("ridge=inf", "option 'ridge'.*'inf'"),
        ("seed=-1", "seed is -1"),
        ("keep=a.json, ratio=0.5", "both keep and ratio"),
        ("keep=a.json, groups=[a]", "both keep and groups"),
        ("criterion=taste", "taste"),
        ("ratios=0.5", "has no option 'ratios'"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(PassOptionError, match=message):
        parse(f"prune_channels{{{options}}}")


def test_options_from_the_command_line() -> None:
    found = parse("prune_channels{ratio=0.3, groups=[a, b], criterion=random, recover=false, multiple=8, seed=4}")
    assert found == PruneChannels(0.3, ("a", "b"), None, Criterion.RANDOM, False, 8, seed=4)
