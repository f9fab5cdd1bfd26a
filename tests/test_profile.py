"""Profiles: the shipped ones are sound, and a wrong file says what is wrong, where."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from onnxcompress.errors import ProfileError, UnknownProfileError
from onnxcompress.profile import INSTRUCTION_CLASSES, list_profiles, load_profile

SMALL = """\
schema = 2
name = "small"
description = "a device made up for tests"

[device]
cpu = "none"
cores = 1
frequency_ghz = 1.0

[provenance]
status = "spec"
method = "made up"
source = "this test"
date = 2026-11-23
notes = '''
[device]
cores = "not a key, but text"
'''

[runtime]
name = "onnxruntime"
version = "1.32.0"
threads = 1
contrib_ops = false

[quantization]
activation = "u8"
weight_bits = 8
per_channel = true
channel_multiple = 8

[overhead]
ns_per_run = 0
ns_per_node = 100

[[kernel]]
kind = "conv"
precision = "f32"
ns_per_mac = 0.1

[[kernel]]
kind = "conv"
precision = "u8s8"
ns_per_mac = 0.05

[[kernel]]
kind = "matmul"
precision = "f32"
ns_per_mac = 0.1

[[kernel]]
kind = "elementwise"
precision = "f32"
ns_per_element = 1

[[kernel]]
kind = "move"
precision = "f32"
ns_per_element = 1

[[kernel]]
kind = "Add"
precision = "u8s8"
ns_per_element = 0.5

[[kernel]]
kind = "free"
precision = "f32"

[[fusion]]
op = "Conv"
absorbs = ["Relu"]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "small.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def line_of(text: str, needle: str) -> int:
    return text[: text.index(needle)].count("\n") + 1


def fails(path: Path) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    return caught.value


# ---- shipped ---------------------------------------------------------------------------------------------


def test_shipped_profiles() -> None:
    assert {"cortex-a53", "cortex-a72", "cortex-a76", "host-x86-vnni", "x86-avx2"} <= set(list_profiles())


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profile_is_complete(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.provenance.source and profile.provenance.notes
    doubts = profile.provenance.unverified
    assert doubts or profile.provenance.held_out_error is not None or profile.provenance.error is not None
    if profile.runtime.name != "onnxruntime":
        return  # other runtimes run less
    for kind in (
        "conv",
        "conv_pointwise",
        "conv_depthwise",
        "matmul",
        "matmul_rows1",
        "elementwise",
        "softmax",
        "lstm",
    ):
        assert profile.kernel(kind, "f32") is not None
    for kind in ("quantize", "dequantize"):
        assert profile.kernel(kind, "f32", maps=True) is not None
    target = profile.target()
    assert target.has("Conv", "u8s8") and target.has("MatMul", "dynamic")
    assert target.has("HardSwish", "f32") and not target.has("HardSwish", "u8s8")
    assert target.has("MaxPool", "u8s8") and not target.has("Pad", "u8s8")


def test_weights_are_cut_to_seven_bits_only_where_products_saturate() -> None:
    assert load_profile("x86-avx2").target().weight_bits == 7
    assert load_profile("host-x86-vnni").target().weight_bits == 8


# ---- lookup ----------------------------------------------------------------------------------------------


def test_unknown_name_suggests() -> None:
    with pytest.raises(UnknownProfileError, match="cortex-a53"):
        load_profile("cortex-a35")


def test_profiles_of_the_user(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(SMALL)
    monkeypatch.setenv("ONNXCOMPRESS_PROFILES", f"{tmp_path}{os.pathsep}{tmp_path / 'missing'}")
    assert "small" in list_profiles()
    assert load_profile("small").device.cpu == "none"


def test_the_first_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "small.toml").write_text(SMALL.replace('cpu = "none"', f'cpu = "{folder}"'))
    monkeypatch.setenv("ONNXCOMPRESS_PROFILES", os.pathsep.join(str(tmp_path / f) for f in ("a", "b")))
    assert load_profile("small").device.cpu == "a"


def test_kernel_lookup_goes_from_operator_to_family_and_from_maps_to_any(write) -> None:
    text = SMALL + '\n[[kernel]]\nkind = "Add"\nprecision = "f32"\non = "maps"\nns_per_element = 7\n'
    profile = load_profile(write(text))
    add = {maps: profile.kernel("elementwise", "f32", op_type="Add", maps=maps) for maps in (False, True)}
    assert add[True].ns_per_element == 7
    assert add[False].ns_per_element == 1
    assert profile.kernel("elementwise", "u8s8", op_type="Relu") is None


def test_operators_of_others_have_a_domain_in_the_file_and_none_in_the_lookup(write) -> None:
    profile = load_profile(write(SMALL.replace('"Add"', '"com.example.Fly"') + '[limits]\nops = ["com.example.Fly"]\n'))
    found = profile.kernel("elementwise", "u8s8", op_type="Fly")
    assert found is not None and found.ns_per_element == 0.5
    assert profile.target().has("Fly", "u8s8") and profile.target().allows("Fly")


def test_operators_that_are_not_allowed_do_not_run(write) -> None:
    profile = load_profile(write(SMALL + '[limits]\nops = ["Conv", "Relu"]\n'))
    assert profile.kernel("elementwise", "f32", op_type="Relu") is not None
    assert profile.kernel("elementwise", "f32", op_type="Add") is None
    target = profile.target()
    assert target.has("Relu", "f32") and not target.has("Add", "f32") and target.has("elementwise", "f32")
    assert target.allows("Conv") and not target.allows("Add")


def test_lookups_are_remembered(write) -> None:
    profile = load_profile(write(SMALL))
    first = profile.kernel("conv", "f32", op_type="Conv")
    assert profile.kernel("conv", "f32", op_type="Conv") is first
    started = time.perf_counter()
    for _ in range(10_000):
        profile.kernel("conv", "f32", op_type="Conv")
    assert time.perf_counter() - started < 0.2


ABILITIES = """
[[kernel]]
kind = "matmul"
precision = "w4"
ns_per_mac = 0.1
[[kernel]]
kind = "conv"
precision = "f16"
ns_per_mac = 0.1
"""


def test_what_else_a_target_knows(write) -> None:
    plain = load_profile(write(SMALL)).target()
    assert (plain.float32, plain.float16, plain.weight_only_bits, plain.required) == (True, False, (), False)
    assert not plain.activation_symmetric and plain.max_opset is None and plain.allows("Anything")
    text = SMALL.replace("channel_multiple = 8", "channel_multiple = 8\nactivation_symmetric = true")
    able = load_profile(write(text.replace("threads = 1", "threads = 1\nmax_opset = 17") + ABILITIES)).target()
    assert able.activation_symmetric and able.max_opset == 17
    assert able.float16 and able.weight_only_bits == (4,) and able.has("MatMul", "w4")


def test_a_device_of_integers_needs_no_float_kernels(write) -> None:
    text = SMALL.replace("channel_multiple = 8", "channel_multiple = 8\nrequired = true")
    assert "'elementwise' at u8s8" in str(fails(write(text)))
    kernels = "".join(f'[[kernel]]\nkind = "{k}"\nprecision = "u8s8"\n' for k in ("conv", "matmul", "elementwise",
                      "move", "free"))  # fmt: skip
    integers = text[: text.index("[[kernel]]")] + kernels
    target = load_profile(write(integers)).target()
    assert target.required and not target.float32 and target.has("Conv", "u8s8")


def test_cycles_become_seconds(write) -> None:
    extra = '[instructions]\ncore = "a"\nruntime = "b"\ncycles_int = 0.5\ncycles_bytes_ld = 2\ncycles_per_run = 100\n'
    instructions = load_profile(write(SMALL + extra)).instructions
    assert instructions is not None and set(instructions.cycles) == set(INSTRUCTION_CLASSES)
    assert instructions.seconds({"int": 1000, "bytes_ld": 200, "dot": 5}, 2.0) == pytest.approx(1000 / 2e9)
    with pytest.raises(ProfileError, match="did you mean 'int'"):
        instructions.seconds({"ints": 1}, 1.0)


def test_target_of_a_profile(write) -> None:
    target = load_profile(write(SMALL)).target()
    assert (target.activation, target.weight_bits, target.channel_multiple, target.contrib_ops) == ("u8", 8, 8, False)
    assert target.has("Conv", "u8s8") and target.has("conv", "u8s8")
    assert target.has("Add", "u8s8") and target.has("Relu", "f32")
    assert not target.has("Relu", "u8s8") and not target.has("MatMul", "u8s8") and not target.has("LSTM", "f32")


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("cores = 1", 'cores = "one"', "device.cores"),
        ("cores = 1", "cores = 0", "greater than or equal to 1"),
        ("ns_per_mac = 0.05", "ns_per_mac = -0.05", "kernel.ns_per_mac"),
        ("ns_per_mac = 0.05", "ns_per_mac = nan", "finite"),
        ("ns_per_mac = 0.05", "ns_per_mak = 0.05", "did you mean 'ns_per_mac'"),
        ('activation = "u8"', 'activation = "u16"', "quantization.activation"),
        ('kind = "matmul"', 'kind = "matmull"', "did you mean 'matmul'"),
        ("weight_bits = 8", "weight_bits = true", "quantization.weight_bits"),
        ('absorbs = ["Relu"]', "absorbs = []", "fusion.absorbs"),
        ('absorbs = ["Relu"]', "absorbs = [1]", "fusion.absorbs"),
        ("[runtime]", "[runtimes]", "did you mean 'runtime'"),
        ('kind = "Add"', 'kind = "Ad"', "'Add'"),
        ('kind = "Add"', 'kind = "ReduceLogSumm"', "did you mean 'ReduceLogSum'"),
        ('kind = "Add"', 'kind = "LSTm"', "did you mean"),
        ('kind = "Add"', 'kind = "add it"', "neither a kernel kind nor an operator type"),
        ('kind = "Add"', 'kind = "Xqwvzj"', "com.example.Op"),
        ('kind = "matmul"', 'kind = "xyz"', "matmul_rows1"),
        ('op = "Conv"', 'op = "com.example.Conv"', "not an operator type"),
        ('op = "Conv"', 'op = "Convv"', "did you mean 'Conv'"),
        ('absorbs = ["Relu"]', 'absorbs = ["Rellu"]', "did you mean"),
        ('precision = "u8s8"', 'precision = "u8u8"', "did you mean 'u8s8'"),
        ("frequency_ghz = 1.0", "frequency_ghz = inf", "finite"),
        ("frequency_ghz = 1.0", "frequency_ghz = -1", "greater than 0"),
        ("ns_per_node = 100", "ns_per_node = -inf", "overhead.ns_per_node"),
        ("ns_per_node = 100", 'ns_per_node = "100"', "overhead.ns_per_node"),
        ("date = 2026-11-23", 'date = "yesterday"', "provenance.date"),
    ],
)
def test_schema_error_names_file_and_line(write, good: str, bad: str, message: str) -> None:
    text = SMALL.replace(good, bad, 1)
    path = write(text)
    error = fails(path)
    assert error.path == str(path)
    assert f"{path}:{line_of(text, bad)}: " in str(error)
    assert message in str(error)
    assert error.hint, "and says what to do"


@pytest.mark.parametrize(
    ("added", "wrong", "message"),
    [
        ("held_out_error = -1", 0, "provenance.held_out_error"),
        ('seconds = "real"', 0, "there is no 'real'"),
        ("unverified = [\n'energy.activ_w: a guess'\n]", 1, "did you mean 'active_w'"),
        ("unverified = ['energy: a guess',\n'enrgy.active_w: a guess']", 1, "did you mean 'energy'"),
        ("unverified = ['kernel.cnov: a guess']", 0, "did you mean 'conv'"),
        ("unverified = ['kernel.conv.u8s8: fine', 'kernel.matmul.u8s8: there is none']", 0, "matmul"),
        ("unverified = [3]", 0, "provenance.unverified"),
        ("[limits]\nflash_bytes = 0", 1, "limits.flash_bytes"),
        ('[limits]\nops = ["Relu", "Konv"]', 1, "did you mean 'Conv'"),
        ('[energy]\nactive_w = 0\nsource = "a"', 1, "energy.active_w"),
        ('[energy]\nidle_w = 1\nsource = "a"', 0, "energy needs active_w"),
        ("[energy]\nactive_w = 1", 0, "'energy.source' is missing"),
        ('[energy]\nsource = "a"\npj_per_mac_int4 = 1', 2, "'pj_per_mac_int8'"),
        ("[memory]\ncache_bytes = 1\nns_per_byte = 1\nbandwidth_gb_per_s = nan", 3, "memory.bandwidth_gb_per_s"),
        ('[[cache]]\nname = "L1"\nbytes = 0', 2, "cache.bytes"),
        ('[instructions]\ncore = "a"\nruntime = "b"\ncycles_fm = 1', 3, "did you mean 'cycles_"),
    ],
)
def test_mistakes_in_optional_keys(write, added: str, wrong: int, message: str) -> None:
    """``wrong`` is the line of the mistake in ``added``."""
    date = "date = 2026-11-23\n"
    text = f"{SMALL}{added}\n" if added.startswith("[") else SMALL.replace(date, f"{date}{added}\n", 1)
    error = fails(write(text))
    assert error.line == line_of(text, added.splitlines()[0]) + wrong
    assert message in str(error) and error.hint


def test_missing_key_names_its_table(write) -> None:
    text = SMALL.replace("cores = 1\n", "", 1)
    error = fails(write(text))
    assert error.line == line_of(text, "[device]")
    assert "'device.cores' is missing" in str(error)


def test_missing_table(write) -> None:
    assert "'schema' is missing" in str(fails(write(SMALL.replace("schema = 2\n", ""))))


@pytest.mark.parametrize("version", ["3", "0", "true", "2.0", '"2"', "[2]"])
def test_other_schema_version(write, version: str) -> None:
    error = fails(write(SMALL.replace("schema = 2", f"schema = {version}")))
    assert error.line == 1 and "reads 2 (and 1" in str(error) and "schema = 2" in error.hint


def test_a_profile_of_schema_1_is_one_of_schema_2(write) -> None:
    """Schema 2 only has more keys, all optional; seconds nobody vouched for count as ratios."""
    profile = load_profile(write(SMALL.replace("schema = 2", "schema = 1")))
    assert profile.provenance.seconds == "ratios" and profile.limits is None


def test_syntax_error_names_line(write) -> None:
    text = SMALL.replace("ns_per_mac = 0.05", "ns_per_mac = 0.05 GMAC")
    error = fails(write(text))
    assert error.line == line_of(text, "0.05 GMAC")
    assert "not TOML" in str(error)


def test_unclosed_file_names_last_line(write) -> None:
    assert fails(write(SMALL + "more = [1,\n")).line is not None


def test_several_errors_are_all_told_in_order(write) -> None:
    text = SMALL.replace("cores = 1", "cores = 0").replace("threads = 1", "threads = 0")
    error = fails(write(text))
    assert error.line == line_of(text, "cores = 0")
    assert f":{line_of(text, 'threads = 0')}:" in str(error)


def test_duplicate_kernel_names_both_lines(write) -> None:
    text = SMALL + '\n[[kernel]]\nkind = "conv"\nprecision = "f32"\n'
    error = fails(write(text))
    assert error.line == text.count("\n") - 2
    assert f"first in line {line_of(text, '[[kernel]]')}" in str(error)


def test_kernels_no_model_can_do_without(write) -> None:
    text = SMALL.replace('kind = "elementwise"', 'kind = "softmax"')
    assert "'elementwise'" in str(fails(write(text)))


def test_files_of_other_editors_are_read(tmp_path: Path) -> None:
    """With a mark at the start, other ends of lines, and a form feed in a comment: lines are still right."""
    path = tmp_path / "small.toml"
    text = SMALL.replace("made up for", "m\u2028de up for")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_profile(path).name == "small"
    path.write_bytes(text.replace("cores = 1", "cores = 0").replace("\n", "\r\n").encode())
    assert fails(path).line == line_of(SMALL, "cores = 1")


def test_what_no_profile_has(write) -> None:
    assert "nested too deeply" in str(fails(write("a = " + 5000 * "[" + 5000 * "]")))
    error = fails(write(SMALL.replace("ns_per_node = 100", "ns_per_node = 1" + 400 * "0")))
    assert "overhead.ns_per_node" in str(error) and len(str(error)) < 400


def test_unreadable_files(write, tmp_path: Path) -> None:
    assert "cannot be read" in str(fails(tmp_path / "missing.toml"))
    path = tmp_path / "latin.toml"
    path.write_bytes(SMALL.replace("made up for", "f\xfcr").encode("latin-1"))
    assert "not UTF-8" in str(fails(path))
