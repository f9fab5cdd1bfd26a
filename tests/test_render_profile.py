"""Profiles as a person sees them: what is not verified is said plainly, and nothing the file has is left out."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from test_profile import SMALL

from onnxcompress import render, tables
from onnxcompress.profile import Profile, list_profiles, load_profile
from onnxcompress.profile_schema import TABLES

FULL = (
    SMALL.replace("date = 2026-11-23", 'date = 2026-11-23\nunverified = ["energy.active_w: a guess"]')
    .replace("threads = 1", "threads = 1\nmax_opset = 17")
    .replace("channel_multiple = 8", "channel_multiple = 8\nactivation_symmetric = true")
    + """
[limits]
flash_bytes = 1000000
ram_bytes = 320000
ops = ["Conv", "Relu"]
source = "a data sheet"
[memory]
cache_bytes = 4096
ns_per_byte = 0.25
bandwidth_gb_per_s = 2.5
[[cache]]
name = "L1"
bytes = 32768
ns_per_byte = 0.125
[[cache]]
name = "L2"
bytes = 512000
shared = true
[energy]
active_w = 1.5
pj_per_mac_int8 = 0.23
source = "a paper"
[instructions]
core = "m7"
runtime = "tiny"
cycles_fma_f32 = 1.25
held_out_error = 0.074
[[kernel]]
kind = "matmul"
precision = "w4"
ns_fixed = 65900
"""
)


@pytest.fixture(autouse=True)
def no_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def shown(*profiles: Profile, many: bool = False) -> str:
    buffer = io.StringIO()
    tables.show(render.profiles(profiles) if many else render.profile(profiles[0]), buffer)
    return re.sub(r"\s+", " ", buffer.getvalue()) if not many else buffer.getvalue()


def loaded(folder: Path, text: str, name: str = "small") -> Profile:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return load_profile(path)


def test_everything_is_shown(tmp_path: Path) -> None:
    text = shown(loaded(tmp_path, FULL))
    for part in (
        "UNVERIFIED energy.active_w a guess",
        "status spec, 2026-11-23",
        "ratios: seconds hold relative to each other",
        "held out nothing held-out error not measured",
        "fitted to not stated",
        "u8 activations, symmetric; 8-bit weights; per channel; channels in multiples of 8",
        "block weights 4 bits (MatMulNBits)",
        "flash 1 MB RAM 320 kB operators Conv, Relu limits from a data sheet",
        "1.5 W active, 0.23 pJ a mac in int8 (a paper)",
        "L1 32.8 kB (misses 0.125, of weights 0 ns a byte), L2 512 kB shared",
        "weights beyond 4.1 kB cost 0.25 ns a byte, 2.5 GB/s",
        "standard operators only, up to opset 17",
        "m7, tiny cycles fma_f32 1.25",
        "held-out error 7.4%",
        "a node takes 100 more, a run 0",
        "matmul w4 65900",
        "Conv f32 after Relu",
    ):
        assert part in text, part


def test_a_device_of_integers_says_so(tmp_path: Path) -> None:
    text = SMALL.replace("channel_multiple = 8", "channel_multiple = 8\nrequired = true")
    text = re.sub(
        r'precision = "f32"\n(?=ns|\n\[\[fusion)', 'precision = "u8s8"\n', text.replace('"u8s8"', '"dynamic"')
    )
    found = shown(loaded(tmp_path, text))
    assert "required: what is not quantized does not run" in found and "float none" in found


def test_what_a_board_extends_is_shown(tmp_path: Path) -> None:
    loaded(tmp_path, FULL)
    board = 'schema = 2\nname = "board"\ndescription = "b"\nextends = "./small.toml"\ntime_scale = 2\n[provenance]\n'
    origin = 'status = "measured"\nmethod = "m"\nsource = "s"\ndate = 2026-11-24\n'
    origin += 'seconds = "absolute"\nheld_out_error = 0.05\n'
    found = shown(loaded(tmp_path, board + origin, "board"))
    assert "extends small time scale all times x 2" in found
    assert "UNVERIFIED energy.active_w a guess (of small)" in found
    assert "absolute: seconds hold by themselves" in found and "held-out error 5%" in found
    assert "a node takes 200 more" in found and "131800 see small" in found


@pytest.mark.parametrize("name", list_profiles())
def test_every_doubt_of_a_shipped_profile_is_shown(name: str) -> None:
    profile = load_profile(name)
    text = shown(profile)
    assert text.count("UNVERIFIED") == len(profile.provenance.unverified)
    document = json.loads(tables.as_json(profile))
    assert document.get("provenance", {}).get("unverified", []) == list(profile.provenance.unverified)
    assert document["provenance"]["seconds"] in text


def test_the_list_has_a_line_a_profile() -> None:
    found = [load_profile(name) for name in list_profiles()]
    lines = shown(*found, many=True).splitlines()
    assert len(lines) == 1 + len(found)
    for profile, line in zip(found, lines[1:], strict=True):
        assert line.startswith(profile.name) and profile.provenance.status in line


def test_the_documentation_has_every_key() -> None:
    path = Path(__file__).parent.parent / "docs" / "profiles.md"
    if not path.exists():
        pytest.skip("installed without its documentation")
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = set(re.findall(r"`([^`\n]+)`", text))
    keys = {f.alias or name for name, f in Profile.model_fields.items()} - {"lineage"} - set(TABLES)
    for table, model in TABLES.items():
        assert {f"[{table}]", f"[[{table}]]"} & words, table
        keys |= set(model.model_fields)
    assert keys <= words, keys - words
