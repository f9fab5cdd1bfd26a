"""Every kind of calibration source, and every way it can be wrong."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from PIL import Image

from onnxcompress import data as data_module
from onnxcompress.data import Source, Spool, open_data
from onnxcompress.errors import DataError, UsageError
from onnxcompress.images import Preprocess
from onnxcompress.model import canonicalize

Array = npt.NDArray[Any]


def model_of(inputs: str, body: str = "y = Identity (x)", output: str = "float[?] y") -> ir.Model:
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> net ({inputs}) => ({output}) {{ {body} }}'.replace("?", "K")
    )
    canonicalize(model)
    return model


@pytest.fixture
def one() -> ir.Model:
    return model_of("float[N, 4] x")


@pytest.fixture
def two() -> ir.Model:
    return model_of("float[N, 4] x, int64[N, S] ids")


@pytest.fixture
def picture() -> ir.Model:
    return model_of("float[N, 3, 8, 6] x")


def rows(count: int) -> Array:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


def first_values(source: Source) -> list[float]:
    return [float(feed["x"].flat[0]) for feed in source]


# --- stacked files -------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_a_row_a_sample(two: ir.Model, tmp_path: Path, save: Any) -> None:
    ids = np.arange(6 * 5).reshape(6, 1, 5)
    save(tmp_path / "a.npz", x=rows(6), ids=ids)
    source = open_data(tmp_path / "a.npz", two)
    assert len(source) == 6
    for _ in range(2):
        for i, feed in enumerate(source):
            np.testing.assert_array_equal(feed["x"], rows(6)[i : i + 1])
            np.testing.assert_array_equal(feed["ids"], ids[i])


def test_a_lone_array_feeds_a_lone_input(one: ir.Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", anything=rows(3))
    np.save(tmp_path / "b.npy", rows(3)[:, None])
    for name in ("a.npz", "b.npy"):
        assert first_values(open_data(str(tmp_path / name), one)) == [0, 4, 8]


def test_rows_fill_a_static_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(7))
    source = open_data(tmp_path / "a.npy", model_of("float[3, 4] x"))
    assert [feed["x"].shape for feed in source] == [(3, 4)] * 2


def test_a_scalar_serves_every_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(3), rate=np.int64(16000))
    source = open_data(tmp_path / "a.npz", model_of("float[N, 4] x, int64 rate"))
    assert [int(feed["rate"]) for feed in source] == [16000] * 3
    assert first_values(source) == [0, 4, 8]


def test_fortran_order(one: ir.Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(rows(5)))
    np.save(tmp_path / "b.npy", np.asfortranarray(rows(5)))
    for name in ("a.npz", "b.npy"):
        assert first_values(open_data(tmp_path / name, one)) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_is_read_a_sample_at_a_time(one: ir.Model, tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", x=np.ones((400, 64, 4), np.float32).repeat(20, 1))  # 8 MB, 20 kB a sample
    source = open_data(tmp_path / "a.npz", one)
    list(open_data([{"x": rows(1)}], one))
    tracemalloc.start()
    assert sum(1 for _ in source) == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000


# --- folders -------------------------------------------------------------------------------------


def test_folder_of_npz(two: ir.Model, tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=rows(3)[i], ids=np.zeros((1, 2 + i), np.int64))
    source = open_data(tmp_path, two)
    assert [feed["ids"].shape for feed in source] == [(1, 2), (1, 3), (1, 4)]
    assert first_values(source) == [0, 4, 8]


def test_folder_of_npy(one: ir.Model, two: ir.Model, tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", rows(3)[i : i + 1])
    assert first_values(open_data(tmp_path, one)) == [0, 4, 8]
    with pytest.raises(DataError, match="one input, but the model has 2"):
        open_data(tmp_path, two)


def test_folders_that_hold_nothing_usable(one: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").touch()
    with pytest.raises(DataError, match=r"holds no \.npz"):
        open_data(tmp_path, one)
    np.save(tmp_path / "a.npy", rows(1))
    np.savez(tmp_path / "a.npz", x=rows(1))
    with pytest.raises(DataError, match=r"\.npz files and \.npy files"):
        open_data(tmp_path, one)


# --- images --------------------------------------------------------------------------------------


def draw(path: Path, height: int = 16, width: int = 12, seed: int = 0) -> Array:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_folder_of_images_by_the_formula(picture: ir.Model, tmp_path: Path) -> None:
    pixels = [draw(tmp_path / f"{i}.png", 8, 6, i) for i in range(3)]
    how = "scale=1/255,mean=0.4:0.5:0.6,std=0.2:0.3:0.4,channels=BGR"
    source = open_data(tmp_path, picture, preprocess=how)
    assert len(source) == 3
    assert "0.4:0.5:0.6" in source.description
    for feed, image in zip(source, pixels, strict=True):
        wanted = (image[:, :, ::-1] / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
        np.testing.assert_allclose(feed["x"], wanted.transpose(2, 0, 1)[None], rtol=1e-5, atol=1e-6)


def test_size_layout_and_type_come_from_the_model(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 20, 30)
    for inputs, shape in (
        ("float[N, 3, 8, 6] x", (1, 3, 8, 6)),
        ("float[N, 8, 6, 3] x", (1, 8, 6, 3)),
        ("float[N, 1, 8, 6] x", (1, 1, 8, 6)),
    ):
        (feed,) = open_data(tmp_path, model_of(inputs), preprocess="scale=1/255")
        assert feed["x"].shape == shape
        assert 0 <= feed["x"].min() < feed["x"].max() <= 1
    (feed,) = open_data(tmp_path, model_of("uint8[N, H, W, 3] x", "y = Cast <to = 1> (x)"))
    assert feed["x"].shape == (1, 20, 30, 3)
    assert feed["x"].dtype == np.uint8


def test_center_crop_keeps_the_middle(picture: ir.Model, tmp_path: Path) -> None:
    pixels = np.zeros((16, 60, 3), np.uint8)
    pixels[:, 24:36] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (cropped,) = open_data(tmp_path, picture, preprocess="crop=center,resize=box")
    assert (cropped["x"] == 255).all()
    (squeezed,) = open_data(tmp_path, picture, preprocess="crop=none")
    assert (squeezed["x"] == 0).any()
    (half,) = open_data(tmp_path, picture, preprocess="crop=center:0.5,size=8x6")
    assert half["x"].shape == (1, 3, 8, 6)


def test_floats_want_a_stated_preprocessing(picture: ir.Model, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(DataError, match="stated preprocessing") as caught:
        open_data(tmp_path, picture)
    assert "scale=1/255" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("siez=224", "did you mean 'size'"),
        ("size=big", "size=big"),
        ("size=0", "size=0"),
        ("size", "'size' is not understood"),
        ("scale=1/0", "scale=1/0 is not a number"),
        ("mean=0.5:0.5", "mean has 2 values for 3 channels"),
        ("std=0", "std is zero"),
        ("resize=bicubik", "did you mean 'bicubic'"),
        ("layout=CHWN", "layout=CHWN"),
        ("crop=left", "crop=left"),
        ("crop=center:1.5", "at most 1"),
        ("channels=CMYK", "channels=CMYK"),
    ],
)
def test_wrong_preprocessing(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Preprocess.parse(text, ("N", 3, 8, 6), np.dtype(np.float32), name="x")


def test_pictures_need_a_picture_input(one: ir.Model, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(DataError, match="rank 4"):
        open_data(tmp_path, one, preprocess="scale=1")


def test_a_damaged_picture_is_named(picture: ir.Model, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"sample 1: .*b\.png cannot be read"):
        list(open_data(tmp_path, picture, preprocess="scale=1"))


# --- Python --------------------------------------------------------------------------------------


def test_module_and_function_from_the_current_folder(
    one: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_calibration_data.py").write_text(
        "import numpy as np\ndef feeds():\n    for i in range(3):\n        yield {'x': np.full((1, 4), i, 'float32')}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert first_values(open_data("my_calibration_data:feeds", one)) == [0, 1, 2]
    with pytest.raises(DataError, match="did you mean 'feeds'"):
        open_data("my_calibration_data:feed", one)
    with pytest.raises(DataError, match="cannot be imported"):
        open_data("no_such_module_here:feeds", one)
    assert os.fspath(tmp_path) not in __import__("sys").path


def test_a_generator_can_be_read_twice(one: ir.Model) -> None:
    source = open_data(({"x": rows(3)[i : i + 1]} for i in range(3)), one)
    assert first_values(source) == first_values(source) == [0, 4, 8]


def test_what_code_yields_is_taken_once(one: ir.Model) -> None:
    """A shuffling loader must not show other data to the reference than to the candidate."""
    rng = np.random.default_rng()
    source = open_data(lambda: ({"x": rng.standard_normal((1, 4)).astype(np.float32)} for _ in range(3)), one)
    assert first_values(source) == first_values(source)


def test_an_endless_generator_is_cut_off(one: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[dict[str, Array]]:
        while True:
            yield {"x": rows(1)}

    assert len(open_data(endless, one, limit=5)) == 5
    monkeypatch.setattr(data_module, "SPOOL_SAMPLES", 7)
    source = open_data(endless, one)
    assert len(source) == 7
    assert "more than 7 samples" in source.notes[0]


def test_a_reused_buffer_is_copied(one: ir.Model) -> None:
    def reusing() -> Iterator[dict[str, Array]]:
        buffer = np.zeros((1, 4), np.float32)
        for i in range(3):
            buffer[:] = i
            yield {"x": buffer}

    assert first_values(open_data(reusing, one)) == [0, 1, 2]


def test_code_that_fails_or_gives_nonsense(one: ir.Model) -> None:
    def broken() -> Iterator[dict[str, Array]]:
        yield {"x": rows(1)}
        raise RuntimeError("disk on fire")

    with pytest.raises(DataError, match=r"sample 1: .*broken raised RuntimeError: disk on fire"):
        open_data(broken, one)
    with pytest.raises(DataError, match="gives a dict"):
        open_data(lambda: {"x": rows(1)}, one)
    with pytest.raises(DataError, match="not a dict"):
        open_data([rows(1)], one)
    with pytest.raises(DataError, match="a int is no calibration data"):
        open_data(3, one)


# --- made up -------------------------------------------------------------------------------------


def test_made_up_feeds_are_loud_and_repeatable(one: ir.Model) -> None:
    source = open_data(None, one, limit=4, seed=7)
    assert source.synthetic
    assert "MADE UP" in source.warning
    assert len(source) == 4
    again = open_data(None, one, limit=4, seed=7)
    other = open_data(None, one, limit=4, seed=8)
    assert first_values(source) == first_values(again) != first_values(other)
    assert not open_data([{"x": rows(1)}], one).warning


def test_made_up_shapes_and_types() -> None:
    model = model_of(
        "float[batch, 3, h, w] x, int64[batch, seq] input_ids, int64[batch, seq] attention_mask,"
        "int32[batch, seq] position_ids, bool flag, uint8[N, H, W, 3] raw, float16[2] half, int64 sr,"
        "float[b, n] audio",
        "rate = Constant <value = int64 {8000}> () e = Equal (sr, rate)"
        "t = Constant <value = float[5, 2] {1,2,3,4,5,6,7,8,9,10}> () g = Gather (t, input_ids)  y = Identity (x)",
    )
    (feed,) = open_data(None, model, limit=1)
    assert {name: array.shape for name, array in feed.items()} == {
        "x": (1, 3, 224, 224),
        "input_ids": (1, 32),
        "attention_mask": (1, 32),
        "position_ids": (1, 32),
        "flag": (),
        "raw": (1, 224, 224, 3),
        "half": (2,),
        "sr": (),
        "audio": (1, 512),
    }
    assert 0 <= feed["input_ids"].min() <= feed["input_ids"].max() <= 4, "inside the table"
    assert (feed["attention_mask"] == 1).all()
    np.testing.assert_array_equal(feed["position_ids"][0], np.arange(32))
    assert int(feed["sr"]) == 8000
    assert feed["half"].dtype == np.float16
    assert feed["raw"].max() > 100


def test_sizes_left_open_are_tried_until_the_model_runs() -> None:
    lines = model_of("float[N, 3, H, W] x", "t = Constant <value = int64[4] {1, 3, 48, 1}> ()  y = Expand (x, t)")
    (feed,) = open_data(None, lines, limit=1)
    assert feed["x"].shape == (1, 3, 48, 320)
    never = model_of(
        "float[N, 3, H, W] x", "t = Constant <value = int64[4] {1, 3, 7, 5}> ()  y = Expand (x, t)", "float[K] y"
    )
    with pytest.raises(DataError, match="runs with none of those tried"):
        open_data(None, never)


@pytest.mark.parametrize("written", ["-1", "0"])
def test_negative_and_zero_sizes_are_unknown_ones(written: str) -> None:
    model = model_of("float[2, 4] x")
    model.graph.inputs[0].shape = ir.Shape([int(written), 4])
    assert [f["x"].shape for f in open_data([{"x": rows(3)}], model)] == [(3, 4)]


# --- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "sample 0, input 'x': is missing"),
        ({"x": rows(1), "y": 1}, "input 'y': the model has no such input"),
        ({"X": rows(1)}, "the model has no such input .known: x"),
        ({"x": rows(1)[0]}, r"is 4, the model reads \?x4"),
        ({"x": np.ones((1, 5), np.float32)}, "axis 1 must be 4"),
        ({"x": np.ones((0, 4), np.float32)}, "axis 0 is empty"),
        ({"x": np.ones((1, 4), np.int64)}, "is int64, the model reads float32"),
        ({"x": np.ones((1, 4), np.uint8)}, "is uint8, the model reads float32"),
        ({"x": np.full((1, 4), np.nan, np.float32)}, "holds NaN"),
        ({"x": np.full((1, 4), np.inf, np.float32)}, "holds infinity"),
        ({"x": np.full((1, 4), 1e300)}, "values float32 cannot hold"),
        ({"x": [[1, 2], [3]]}, "cannot be made an array"),
        ({"x": np.array([[None] * 4])}, "Python objects"),
    ],
)
def test_feeds_that_do_not_fit(one: ir.Model, feed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data([feed], one)


def test_a_bad_sample_is_named_by_its_number(one: ir.Model) -> None:
    feeds = [{"x": rows(1)}, {"x": rows(1)}, {"x": rows(1) * np.float32(np.nan)}]
    source = open_data(feeds, one)
    with pytest.raises(DataError, match="sample 2, input 'x': holds NaN") as caught:
        list(source)
    assert (caught.value.sample, caught.value.input) == (2, "x")


def test_casts_that_lose_nothing_are_made_and_noted() -> None:
    model = model_of("float[4] x, int64[2] a, int32[2] b")
    feed = {"x": np.ones(4), "a": np.ones(2, np.int32), "b": np.array([1, -5])}
    source = open_data([feed], model)
    (fitted,) = source
    assert [array.dtype for array in fitted.values()] == [np.float32, np.int64, np.int32]
    assert source.notes == (
        "input 'x': float64 was cast to float32",
        "input 'a': int32 was cast to int64",
        "input 'b': int64 was cast to int32",
    )
    with pytest.raises(DataError, match="values int32 cannot hold"):
        open_data([{**feed, "b": np.array([1, 1 << 40])}], model)


def test_arrays_are_made_contiguous_and_scalars_stay_scalars() -> None:
    (feed,) = open_data([{"x": rows(4).T, "s": 3}], model_of("float[4, 4] x, int64 s"))
    assert feed["x"].flags.c_contiguous
    assert feed["s"].shape == ()


def test_text_inputs() -> None:
    (feed,) = open_data([{"x": np.array(["a", "b"])}], model_of("string[N] x", output="string[N] y"))
    assert feed["x"].dtype == object
    with pytest.raises(DataError, match="the model reads text"):
        open_data([{"x": np.ones(2)}], model_of("string[N] x", output="string[N] y"))


@pytest.mark.parametrize("empty", [[], lambda: iter(())])
def test_empty_data(one: ir.Model, empty: Any) -> None:
    with pytest.raises(DataError, match="holds no samples"):
        open_data(empty, one)


def test_files_that_are_wrong(one: ir.Model, two: ir.Model, tmp_path: Path) -> None:
    def refused(name: str, message: str, model: ir.Model = one) -> None:
        with pytest.raises(DataError, match=message):
            list(open_data(tmp_path / name, model))

    refused("missing.npz", "there is no file or folder")
    (tmp_path / "a.csv").write_text("1,2")
    refused("a.csv", "not of a known kind")
    (tmp_path / "b.npz").write_bytes(b"PK nonsense")
    refused("b.npz", "cannot be read")
    (tmp_path / "c.npy").write_bytes(b"nonsense")
    refused("c.npy", "cannot be read")
    np.save(tmp_path / "d.npy", rows(100))
    (tmp_path / "d.npy").write_bytes((tmp_path / "d.npy").read_bytes()[:-4])
    refused("d.npy", "sample 99: .*cut off")
    np.savez(tmp_path / "e.npz", x=np.zeros((0, 4), np.float32))
    refused("e.npz", "holds no samples")
    np.savez(tmp_path / "f.npz", x=rows(3), ids=np.zeros((4, 1, 2), np.int64))
    refused("f.npz", "different numbers of samples: ids 4, x 3", two)
    np.savez(tmp_path / "g.npz", x=rows(3))
    refused("g.npz", "'ids': .*is missing", two)
    np.savez(tmp_path / "h.npz", x=rows(3), idz=rows(3))
    refused("h.npz", "did you mean 'ids'", two)
    np.savez(tmp_path / "i.npz", x=np.zeros((3, 1, 1, 4), np.float32))
    refused("i.npz", "4 axes; 3 are expected")
    np.save(tmp_path / "j.npy", np.array([None, 1]), allow_pickle=True)
    refused("j.npy", "axes|pickled")


def test_limits_and_misplaced_options(one: ir.Model, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(10))
    assert first_values(open_data(tmp_path / "a.npy", one, limit=3)) == [0, 12, 24]
    for bad in (0, -1):
        with pytest.raises(UsageError, match="limit"):
            open_data(tmp_path / "a.npy", one, limit=bad)
    for misplaced in (tmp_path / "a.npy", tmp_path, [{"x": rows(1)}]):
        with pytest.raises(DataError, match="preprocess"):
            open_data(misplaced, one, preprocess="scale=1")


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 5, 17, 64])
def test_splits_are_disjoint_complete_and_repeatable(one: ir.Model, count: int) -> None:
    source = open_data([{"x": rows(count)[i : i + 1]} for i in range(count)], one)
    calibration, holdout = source.split()
    a, b = first_values(calibration), first_values(holdout)
    assert a
    assert b
    assert sorted(a + b) == first_values(source)
    assert first_values(source.split()[1]) == b
    assert len(holdout) == max(1, count // 4)


def test_a_single_sample_is_on_both_sides_and_says_so(one: ir.Model) -> None:
    calibration, holdout = open_data([{"x": rows(1)}], one).split()
    assert first_values(calibration) == first_values(holdout) == [0]
    assert "one sample" in calibration.notes[0]
    with pytest.raises(UsageError, match="holdout_fraction"):
        calibration.split(1.5)


def test_a_cached_source_reads_its_origin_once(one: ir.Model, tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", rows(3)[i : i + 1])
    cached = open_data(tmp_path, one).cached()
    for file in tmp_path.iterdir():
        file.unlink()
    assert first_values(cached) == [0, 4, 8]


def test_a_spool_goes_to_disk_and_cleans_up() -> None:
    spool = Spool(limit=100)
    feeds = [
        {"a": np.full(10, i, np.float32), "t": np.array(["x"], object), "l": [np.ones(2), np.ones(3)]} for i in range(9)
    ]
    for feed in feeds:
        spool.append(feed)
    assert spool.memory_bytes <= 100
    assert len(spool) == 9
    for _ in range(2):
        for feed, kept in zip(feeds, spool, strict=True):
            np.testing.assert_array_equal(kept["a"], feed["a"])
            assert list(kept["t"]) == ["x"]
            assert [len(part) for part in kept["l"]] == [2, 3]
    folder = spool._folder
    assert folder is not None
    assert folder.exists()
    del spool, kept
    gc.collect()
    assert not folder.exists()


def test_samples_to_price_on_are_not_those_to_fit_on(one: ir.Model) -> None:
    name = str(one.graph.inputs[0].name)
    feed = next(iter(open_data(None, one)))[name]
    source = open_data([{name: np.full_like(feed, k)} for k in range(30)], one)
    few, rest = source.apart(8)
    numbers = [set(first_values(part)) for part in (few, rest)]
    assert (len(few), len(rest)) == (8, 22)
    assert numbers[0] | numbers[1] == set(range(30))
    small = source.take(20)
    assert small.apart(8) == (small, small), "too few are left"
