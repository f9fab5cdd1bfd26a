"""Profiles as files: what extends what, mistakes with the line of the file that holds them, writing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_profile import SMALL, fails, line_of

from onnxcompress.errors import OutputError, ProfileError
from onnxcompress.profile import PRECISIONS, Profile, list_profiles, load_profile, write
from onnxcompress.profile_text import dumps
from onnxcompress.profile_text import line_of as found_line

Write = Callable[..., Path]

BOARD = """\
schema = 2
name = "board"
description = "a board with the made-up core"
extends = "./small.toml"

[provenance]
status = "published"
method = "one scalar"
source = "a table"
date = 2026-11-24
seconds = "absolute"
"""


@pytest.fixture
def save(tmp_path: Path) -> Write:
    def save(text: str, name: str = "board.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    save(SMALL, "small.toml")
    return save


# ---- extends ---------------------------------------------------------------------------------------------


def test_a_board_is_its_core_with_a_provenance_of_its_own(save: Write) -> None:
    core, board = load_profile(save(SMALL, "small.toml")), load_profile(save(BOARD))
    assert (board.name, board.description, board.provenance.status) == (
        "board",
        "a board with the made-up core",
        "published",
    )
    assert board.lineage == ("small",) and core.lineage == ()
    assert board.provenance.notes == "" and core.provenance.notes != ""
    assert board.device == core.device and board.fusions == core.fusions and board.overhead == core.overhead
    assert [k.model_copy(update={"source": ""}) for k in board.kernels] == list(core.kernels)
    assert {k.source for k in board.kernels} == {"see small"}  # the source of the board is not theirs


def test_tables_merge_key_by_key_and_kernels_by_what_they_price(save: Write) -> None:
    more = """
[device]
frequency_ghz = 2.0
[[kernel]]
kind = "conv"
precision = "u8s8"
ns_per_element = 3
[[kernel]]
kind = "conv"
precision = "u8s8"
on = "maps"
ns_per_element = 4
[[fusion]]
op = "Gemm"
absorbs = ["Relu"]
"""
    core, board = load_profile(save(SMALL, "small.toml")), load_profile(save(BOARD + more))
    assert (board.device.frequency_ghz, board.device.cpu) == (2.0, "none")
    conv, maps = (board.kernel("conv", "u8s8", maps=on) for on in (False, True))
    assert conv is not None and (conv.ns_per_element, conv.ns_per_mac) == (3, 0)  # an entry replaces an entry
    assert maps is not None and maps.ns_per_element == 4
    assert len(board.kernels) == len(core.kernels) + 1
    assert [f.op for f in board.fusions] == ["Gemm"]


def test_time_scale_is_in_every_time_and_nothing_else(save: Write) -> None:
    memory = "[memory]\ncache_bytes = 1000\nns_per_byte = 0.5\n"
    core = load_profile(save(SMALL + memory, "small.toml"))
    slow = load_profile(save(BOARD.replace("\n\n", "\ntime_scale = 1.5\n\n", 1)))
    assert slow.overhead.ns_per_node == 1.5 * core.overhead.ns_per_node == 150
    assert slow.memory is not None and (slow.memory.ns_per_byte, slow.memory.cache_bytes) == (0.75, 1000)
    for one, other in zip(core.kernels, slow.kernels, strict=True):
        assert other.ns_per_mac == 1.5 * one.ns_per_mac and other.ns_per_element == 1.5 * one.ns_per_element
        assert (other.channel_block, other.misaligned_factor) == (one.channel_block, one.misaligned_factor)
    assert slow.kernel("conv", "f32") in slow.kernels
    text = BOARD.replace("./small.toml", "./board.toml").replace('"board"', '"slower"')
    slower = load_profile(save(text.replace("\n\n", "\ntime_scale = 2\n\n", 1), "slower.toml"))
    assert slower.overhead.ns_per_node == 300, "each says how it differs from what it extends"
    assert slower.lineage == ("board", "small")


def test_a_parent_by_name(save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = load_profile(save(BOARD.replace("./small.toml", "cortex-a53")))
    assert board.device.cpu == load_profile("cortex-a53").device.cpu
    monkeypatch.setenv("ONNXCOMPRESS_PROFILES", str(tmp_path))
    save(BOARD.replace("./small.toml", "small"))
    assert load_profile("board").lineage == ("small",)


def test_a_path_is_relative_to_the_file(save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boards").mkdir()
    path = save(BOARD.replace("./small.toml", "../small.toml"), "boards/board.toml")
    monkeypatch.chdir(tmp_path / "boards")
    assert load_profile("./board.toml").lineage == load_profile(path).lineage == ("small",)


def test_what_nobody_verified_stays_so_unless_it_is_replaced(save: Write) -> None:
    doubts = '["device.frequency_ghz: a guess", "kernel.conv: a guess", "overhead: never seen"]'
    save(SMALL.replace("date = 2026-11-23", f"date = 2026-11-23\nunverified = {doubts}"), "small.toml")
    assert load_profile(save(BOARD)).provenance.unverified == (
        "device.frequency_ghz: a guess (of small)",
        "kernel.conv: a guess (of small)",
        "overhead: never seen (of small)",
    )
    own = 'unverified = ["quantization: odd"]\n[device]\nfrequency_ghz = 2.0\n'
    own += '[[kernel]]\nkind = "conv"\nprecision = "f32"\n'
    found = load_profile(save(BOARD + own))
    assert found.provenance.unverified == ("quantization: odd", "overhead: never seen (of small)")
    text = BOARD.replace("./small.toml", "./board.toml").replace('"board"', '"third"')
    third = load_profile(save(text, "third.toml")).provenance.unverified
    assert third == ("quantization: odd (of board)", "overhead: never seen (of small)")


def test_a_circle_is_told_with_its_names(save: Write) -> None:
    save(SMALL.replace("schema = 2", 'schema = 2\nextends = "./board.toml"'), "small.toml")
    error = fails(save(BOARD))
    assert "goes in a circle: board -> small -> ./board.toml" in str(error)
    assert str(error.path).endswith("small.toml") and error.line == 2 and error.hint
    itself = fails(save(BOARD.replace("./small.toml", "./board.toml")))
    assert "circle" in str(itself) and itself.line == 4


def test_a_profile_cannot_extend_another_of_its_own_name(
    save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXCOMPRESS_PROFILES", str(tmp_path))
    save(BOARD.replace("./small.toml", "cortex-a53").replace('"board"', '"cortex-a53"'), "cortex-a53.toml")
    with pytest.raises(ProfileError, match="another name"):
        load_profile("cortex-a53")


def test_a_parent_that_is_not_there_is_told_with_the_chain(save: Write) -> None:
    error = fails(save(BOARD.replace("./small.toml", "cortex-a35")))
    assert error.line == 4 and "'cortex-a35' (board -> cortex-a35)" in str(error) and "cortex-a53" in error.hint
    save(SMALL.replace("schema = 2", 'schema = 2\nextends = "./core.toml"'), "small.toml")
    error = fails(save(BOARD))
    assert str(error.path).endswith("small.toml") and error.line == 2
    assert "cannot be read" in str(error) and "board -> small -> ./core.toml" in str(error)


@pytest.mark.parametrize("named", ["3", '""', "['a']"])
def test_extends_is_a_name_or_a_path(save: Write, named: str) -> None:
    error = fails(save(BOARD.replace('"./small.toml"', named)))
    assert error.line == 4 and "extends" in str(error)


def test_a_mistake_of_the_parent_is_told_of_the_parent(save: Write) -> None:
    for good, bad in (
        ("cores = 1", "cores = 0"),
        ("ns_per_mac = 0.05", "ns_per_mac = -0.05"),
        ('absorbs = ["Relu"]', "absorbs = []"),
        ("ns_per_node = 100", "ns_per_node = 100\nns_per_nod = 100"),
    ):
        text = SMALL.replace(good, bad, 1)
        save(text, "small.toml")
        error = fails(save(BOARD + '[[kernel]]\nkind = "reduce"\nprecision = "f32"\n[device]\ncpu = "other"\n'))
        assert str(error.path).endswith("small.toml")
        assert error.line == line_of(text, bad.splitlines()[-1])


def test_a_mistake_of_the_board_is_told_of_the_board(save: Write) -> None:
    for bad in (
        "[device]\ncores = 0\n",
        '[[kernel]]\nkind = "reduce"\nprecision = "f32"\nns_per_mac = -1\n',
        "[overhead]\nns_per_run = nan\n",
        "[device]\ncorse = 4\n",
        "[limit]\nflash_bytes = 3\n",
    ):
        text = BOARD + bad
        error = fails(save(text))
        assert str(error.path).endswith("board.toml")
        last = text.count("\n")
        assert error.line == (last - 1 if "[limit]" in bad else last), error


def test_mistakes_in_both_files_are_all_told(save: Write) -> None:
    save(SMALL.replace("threads = 1", "threads = 0"), "small.toml")
    error = fails(save(BOARD + "[device]\ncores = 0\n"))
    assert str(error.path).endswith("board.toml")
    assert f"small.toml:{line_of(SMALL, 'threads = 1')}: runtime.threads" in str(error)


@pytest.mark.parametrize("bad", ["kernel = 3", "[kernel]\nkind = 1", "kernel = [1]", "device = 3", "fusion = {}"])
def test_tables_of_another_shape_do_not_break_the_merge(save: Write, bad: str) -> None:
    text = BOARD.replace("\n\n", f"\n{bad}\n\n", 1) if "[k" not in bad[:2] else BOARD + bad
    error = fails(save(text))
    assert str(error.path).endswith("board.toml") and error.line == line_of(text, bad)


def test_a_board_needs_a_provenance(save: Write) -> None:
    error = fails(save(BOARD[: BOARD.index("[provenance]")]))
    assert "'provenance' is missing" in str(error) and str(error.path).endswith("board.toml")


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", '"fast"', "true"])
def test_time_scale_is_a_positive_number(save: Write, value: str) -> None:
    error = fails(save(BOARD.replace("\n\n", f"\ntime_scale = {value}\n\n", 1)))
    assert error.line == 5 and "time_scale" in str(error) and error.hint


def test_lineage_is_no_key(save: Write) -> None:
    assert "unknown key 'lineage'" in str(fails(save(BOARD.replace("\n\n", "\nlineage = []\n\n", 1))))


# ---- where a key stands ----------------------------------------------------------------------------------


def test_keys_inside_strings_and_arrays_are_not_keys() -> None:
    text = '[a]\nx = """\n[b]\ny = 1\n"""\nlist = [\n  "y = 2", # [\n  "z",\n]\ny = 3\n[b]\ny = 4\n'
    assert found_line(text, ("a", "y")) == 10
    assert found_line(text, ("b", "y")) == 12
    assert found_line(text, ("a", "list")) == 6
    assert found_line("a = \"odd ''' text\"\nb = 1\n", ("b",)) == 2
    assert found_line(text, ("b", "q")) == 11 and found_line(text, ("c",)) is None


# ---- writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_profiles())
def test_a_written_profile_reads_the_same(name: str, tmp_path: Path) -> None:
    before = load_profile(name)
    write(before, tmp_path / "copy.toml")
    after = load_profile(tmp_path / "copy.toml")
    skip = {"lineage", "extends"}  # what was inherited is in it
    assert rounded(after.model_dump(exclude=skip)) == rounded(before.model_dump(exclude=skip))
    again = tmp_path / "again.toml"
    write(after, again)
    assert again.read_bytes() == (tmp_path / "copy.toml").read_bytes()


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def test_a_board_is_written_whole(save: Write, tmp_path: Path) -> None:
    board = load_profile(save(BOARD.replace("\n\n", "\ntime_scale = 1.5\n\n", 1)))
    write(board, tmp_path / "whole.toml")
    (tmp_path / "small.toml").unlink()
    whole = load_profile(tmp_path / "whole.toml")
    assert whole.lineage == () and whole.overhead == board.overhead
    assert whole.kernels == board.kernels and whole.time_scale == 1.5


def test_tables_are_written_as_given(save: Write, tmp_path: Path) -> None:
    provenance = load_profile(save(BOARD)).provenance.model_dump()
    tables = {
        "provenance": provenance,
        "time_scale": 1.23456,
        "extends": "./small.toml",
        "description": 'a "b" \\ c\x7f',
        "name": "mine",
        "schema": 2,
    }
    write(tables, tmp_path / "mine.toml")
    lines = (tmp_path / "mine.toml").read_text().splitlines()
    assert lines[:5] == [
        "schema = 2",
        'name = "mine"',
        r'description = "a \"b\" \\ c\u007f"',
        'extends = "./small.toml"',
        "time_scale = 1.235",
    ]
    assert load_profile(tmp_path / "mine.toml").description == tables["description"]


def test_nothing_is_written_that_could_not_be_read(save: Write, tmp_path: Path) -> None:
    good = load_profile(save(BOARD)).model_dump(by_alias=True, exclude_none=True, exclude_defaults=True)
    path = tmp_path / "new.toml"
    for bad in ({"colour": "red"}, {"time_scale": float("nan")}, {"device": {"cores": 3}}, {"name": object()}):
        with pytest.raises(ProfileError):
            write({**good, **bad}, path)
    assert not path.exists()
    with pytest.raises(OutputError, match="cannot write"):
        write(load_profile("cortex-a53"), tmp_path / "nowhere" / "x.toml")


@pytest.mark.parametrize(
    "text", ["a\nb", 'x\n"""quoted"""', 'ends with "\n"', "back\\slash\n\\", "tab\t\r\n\x00", "\nü"]
)
def test_text_survives(text: str, save: Write, tmp_path: Path) -> None:
    profile = load_profile(save(SMALL, "small.toml"))
    changed = profile.model_copy(
        update={"provenance": profile.provenance.model_copy(update={"notes": text, "unverified": (f"name: {text}",)})}
    )
    write(changed, tmp_path / "out.toml")
    found = load_profile(tmp_path / "out.toml").provenance
    assert found.notes == text and found.unverified == (f"name: {text}",)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (2.0, "2"),
        (0.123456, "0.1235"),
        (65912.7, "65910"),
        (999.96, "1000"),
        (1.2e-7, "1.2e-07"),
        (16777216, "16777216"),
        (True, "true"),
    ],
)
def test_numbers_have_four_digits(value: float, shown: str) -> None:
    assert dumps({"x": value}) == f"x = {shown}\n"


def test_a_profile_of_every_table_survives(save: Write, tmp_path: Path) -> None:
    extra = """
[limits]
flash_bytes = 1000000
ram_bytes = 320000
ops = ["Conv", "Relu", "Add", "MatMul"]
[memory]
cache_bytes = 0
ns_per_byte = 1
bandwidth_gb_per_s = 2.5
[[cache]]
name = "L1"
bytes = 32768
[energy]
pj_per_mac_int8 = 0.23
source = "a paper"
[instructions]
core = "m7"
runtime = "tiny"
cycles_int = 1
[[kernel]]
kind = "matmul"
precision = "w4"
ns_per_mac = 0.2
"""
    before = load_profile(save(SMALL + extra))
    write(before, tmp_path / "out.toml")
    assert load_profile(tmp_path / "out.toml") == before
    assert isinstance(before, Profile) and set(PRECISIONS) > {k.precision for k in before.kernels}


def test_folders_of_the_user_are_searched_for_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, text in (("a", BOARD.replace("./small.toml", "small")), ("b", SMALL)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ("board.toml" if folder == "a" else "small.toml")).write_text(text)
    monkeypatch.setenv("ONNXCOMPRESS_PROFILES", os.pathsep.join(str(tmp_path / f) for f in ("a", "b")))
    assert load_profile("board").lineage == ("small",)
