"""`profile fit`: measurements that are judged, kept, read back, and become a profile."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from onnxcompress.cli import main
from onnxcompress.errors import MeasurementError, OutputError
from onnxcompress.fitting import machine, making, own
from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.kit import emit
from onnxcompress.fitting.links import Link
from onnxcompress.fitting.nets import CHECKED, FITTED
from onnxcompress.fitting.samples import VERSION, LinkTime, Measurements, NetTime, NodeTime
from onnxcompress.profile import load_profile

QUIET: dict[str, Any] = {
    "cpu": "Test CPU", "cores": 4, "usable": 4, "load": 0.1, "frequency_ghz": 2.0, "isa": ["avx2"], "caches": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def some_links() -> tuple[Link, ...]:
    """Eight small ones of each kind that every profile needs."""
    chosen: list[Link] = []
    for kind in making.NEEDED:
        mine = [link for link in links() if (link.kind, link.precision) == (kind, "f32")]
        chosen += sorted(mine, key=lambda link: link.macs + link.elements + link.weights)[: making.FEWEST]
    return tuple(chosen)


def measurements(chosen: tuple[Link, ...], spread: float = 0.02, **more: Any) -> Measurements:
    """Made-up times."""
    times = [LinkTime(k.name, 1e-6 + k.macs / 2e10 + k.elements / 5e9 + k.weights / 2e10, spread) for k in chosen]
    nets = tuple(NetTime(f"{net.name} f32", 2e-3, 0.02, (NodeTime("n0", "Conv", 1e-4, 100),)) for net in CHECKED[:3])
    found = Measurements(ort.__version__, QUIET, 2e-6, 3e-7, tuple(times), nets)
    return dataclasses.replace(found, **more)


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `profile fit` in this process, in a folder and with a cache of its own, on a quiet machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.setattr(machine, "describe", lambda: dict(QUIET))

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        status = main(["profile", "fit", *map(str, arguments)])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def measuring(monkeypatch: pytest.MonkeyPatch, found: Measurements, stop_after: int = 10**6) -> list[str]:
    """Makes measuring a matter of no time; the list gets what was measured and not known."""
    timed: list[str] = []

    def measure(*, known: Any, keep: Any, progress: Any, machine: Any, **other: Any) -> Measurements:
        for done, item in enumerate((*found.links, *found.nets)):
            progress(item.name, done, len(found.links))
            if item.name in known:
                assert known[item.name] == item
                continue
            if len(timed) >= stop_after:
                raise KeyboardInterrupt
            timed.append(item.name)
            keep(item)
        for pair in found.left_out.items():
            if pair[0] not in known:
                keep(pair)
        return dataclasses.replace(found, machine=machine)

    monkeypatch.setattr(own, "measure", measure)
    return timed


# --- is it quiet enough -------------------------------------------------------------------------------------


def test_a_busy_machine_is_refused_before_anything_is_measured(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "describe", lambda: {**QUIET, "load": 3.5})
    monkeypatch.setattr(own, "measure", lambda **other: pytest.fail("measured"))
    made = call("--name", "mine")
    assert made.status == 5 and "busy: load 3.50 on 4 processors" in made.err and "--force" in made.err


@pytest.mark.parametrize(("load", "noted"), [(None, False), (0.0, False), (3.0, False), (3.1, True)])
def test_load(load: float | None, noted: bool) -> None:
    about = {**QUIET, "load": load}
    if noted:
        with pytest.raises(MeasurementError, match="busy"):
            own.busy(about, force=False)
    assert bool(own.busy(about, force=True)) == noted
    assert own.busy({"cores": 1, "load": 0.5}, force=False) == []


def test_scatter(some_links: tuple[Link, ...]) -> None:
    steady, flagged, wild = (measurements(some_links, spread) for spread in (0.04, 0.08, 0.3))
    assert own.scatter(steady, force=False) == []
    assert own.scatter(flagged, force=False) == ["measured on an unsteady machine: rounds scatter by 8% (median)"]
    with pytest.raises(MeasurementError, match=r"scatter too much to be fitted: 30% .*15% at most") as error:
        own.scatter(wild, force=False)
    assert "--force" in error.value.hint and error.value.exit_code == 5
    assert "30%" in own.scatter(wild, force=True)[0]
    assert own.spread(dataclasses.replace(wild, links=())) == 0.0


# --- interrupted measuring ----------------------------------------------------------------------------------


ITEMS: tuple[LinkTime | NetTime | tuple[str, str], ...] = (
    LinkTime("a", 1e-6, 0.01),
    ("b", "does not run"),
    NetTime("c f32", 1e-3, 0.02, (NodeTime("n", "Conv", 1e-4, 12),)),
)


def test_what_was_measured_is_kept_as_it_was(tmp_path: Path) -> None:
    kept = own.Kept("mine", QUIET, 0.1, tmp_path)
    kept.start()
    for item in ITEMS:
        kept(item)
    again = own.Kept("mine", QUIET, 0.1, tmp_path)
    assert again.known == {"a": ITEMS[0], "b": "does not run", "c f32": ITEMS[2]}
    assert own.Kept("mine", {**QUIET, "cpu": "another"}, 0.1, tmp_path).known == {}
    assert own.Kept("mine", QUIET, 0.2, tmp_path).known == {}
    assert own.Kept("other", QUIET, 0.1, tmp_path).known == {}
    again.drop()
    again.drop()
    assert own.Kept("mine", QUIET, 0.1, tmp_path).known == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ['{"link": {"name": "d", "sec', '{"link": {"name": "d"}}', "[]", '{"net": 3}', "\0"])
def test_a_line_that_was_being_written_is_forgotten(end: str, tmp_path: Path) -> None:
    kept = own.Kept("mine", QUIET, 0.1, tmp_path)
    kept.start()
    kept(ITEMS[0])
    kept.path.write_text(kept.path.read_text() + end)
    again = own.Kept("mine", QUIET, 0.1, tmp_path)
    assert again.known == {"a": ITEMS[0]}
    again.start()
    again(("b", "no"))
    assert set(own.Kept("mine", QUIET, 0.1, tmp_path).known) == {"a", "b"}


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot keep measurements"):
        own.Kept("mine", QUIET, 0.1, tmp_path / "file").start()


def test_an_interrupted_fit_goes_on_and_leaves_nothing(
    call: Call, some_links: tuple[Link, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measurements(some_links)
    with monkeypatch.context() as patched:
        timed = measuring(patched, found, stop_after=5)
        first = call("--name", "mine")
        assert first.status == 130 and "the same command goes on" in first.err and len(timed) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    timed = measuring(monkeypatch, found)
    second = call("--name", "mine")
    assert second.status == 0, second.err
    assert "going on with 5 results" in second.err and len(timed) == len(found.links) + len(found.nets) - 5
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "mine.toml"]


# --- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "needs a name"),
        (("--name", "My Box"), 2, "is no name"),
        (("--name", "../x"), 2, "is no name"),
        (("--name", "mine", "--budget", "0"), 2, "--budget"),
        (("--name", "mine", "-o", "no/such/mine.toml"), 7, "there is no folder no/such"),
        (("--name", "mine", "-o", "there.toml"), 7, "there.toml is there already"),
        (("--name", "mine", "--save-results", "there.toml"), 7, "there.toml is there already"),
        (("--name", "mine", "--from-results", "none.json"), 5, "none.json"),
        (("--name", "mine", "--from-results", "r.json", "--save-results", "s.json"), 2, "measures nothing"),
        (("--emit-kit", "kit", "--name", "mine"), 2, "stands alone"),
        (("--emit-kit", "there.toml"), 7, "is there already"),
    ],
)
def test_command_lines_that_are_wrong(
    arguments: tuple[str, ...], status: int, words: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "measure", lambda **other: pytest.fail("measured"))
    Path("there.toml").write_text("mine")
    made = call(*arguments)
    assert made.status == status and words in made.err and not made.out
    assert [p.name for p in Path().iterdir()] == ["there.toml"] and Path("there.toml").read_text() == "mine"
    as_json = call(*arguments, "--json")
    assert as_json.status == status and words in json.dumps(json.loads(as_json.out))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: "", "not JSON"),
        (lambda d: "[]", "version None"),
        (lambda d: json.dumps({**d, "version": VERSION + 1}), f"version {VERSION + 1}, not {VERSION}"),
        (lambda d: json.dumps({**d, "links": [{"name": "x", "seconds": -1, "spread": 0}]}), "no time in seconds"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "per_node"}), "'per_node' is missing"),
        (lambda d: json.dumps({**d, "onnxruntime": "1.9.0"}), "measured with onnxruntime 1.9.0, but here is"),
        (lambda d: json.dumps({**d, "machine": {**QUIET, "kit_onnxruntime": "1.8.1"}}), "its kit is for 1.8.1"),
        (lambda d: json.dumps({**d, "links": [{**k, "spread": 0.2} for k in d["links"]]}), "scatter too much"),
        (lambda d: json.dumps({**d, "links": d["links"][:9]}), "missing: elementwise f32 (1 of"),
        (lambda d: json.dumps({**d, "machine": {"caches": ["L1"]}}), "no description"),
        (lambda d: json.dumps({**d, "machine": {"caches": 3}}), "no description"),
        (lambda d: json.dumps({**d, "nets": []}), "networks to check it on (0 of at least 3)"),
    ],
)  # fmt: skip
def test_results_that_are_wrong(
    change: Callable[[dict[str, Any]], str], words: str, call: Call, some_links: tuple[Link, ...]
) -> None:
    Path("results.json").write_text(change(json.loads(measurements(some_links).to_json())))
    made = call("--from-results", "results.json", "--name", "mine")
    assert made.status == 5 and words in made.err, made.err
    assert [p.name for p in Path().iterdir()] == ["results.json"]


def test_results_that_are_no_text(call: Call) -> None:
    Path("results.json").write_bytes(b"\xff\xfe\x00")
    made = call("--from-results", "results.json", "--name", "mine")
    assert made.status == 5 and "is no text" in made.err


# --- the profile --------------------------------------------------------------------------------------------


def test_what_is_printed_and_written(call: Call, some_links: tuple[Link, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, measurements(some_links, 0.08, left_out={"odd chain": "runs as Cast"}))
    made = call("--name", "mine", "--save-results", "results.json", "-v")
    assert made.status == 0, made.err
    for words in ("mine: Test CPU, onnxruntime", "held-out error", "rounds scatter by 8.0%", "unsteady machine",
                  "few measurements of", "conv", "odd chain", "--profile ./mine.toml"):  # fmt: skip
        assert words in made.out, words
    profile = load_profile("./mine.toml")
    assert profile.name == "mine" and profile.device.cpu == "Test CPU" and profile.device.host
    assert "unsteady machine" in profile.provenance.notes
    assert profile.runtime.version == ort.__version__

    again = call("--from-results", "results.json", "--name", "mine", "-o", "again.toml", "--json")
    document = json.loads(again.out)
    assert load_profile("again.toml") == profile
    held_out = [abs(net["error"]) for net in document["held_out"]]
    assert document["mean_error"] == pytest.approx(sum(held_out) / len(held_out)) and document["spread"] == 0.08
    assert {k["kind"] for k in document["kernels"]} >= set(making.NEEDED)
    assert document["left_out"] == {"odd chain": "runs as Cast"} and document["path"] == "again.toml"
    assert {"name", "cpu", "onnxruntime", "links", "nets", "median_error", "notes", "use"} <= set(document)


def test_a_profile_is_replaced_only_where_that_is_asked_for(
    call: Call, some_links: tuple[Link, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring(monkeypatch, measurements(some_links))
    Path("mine.toml").write_text("older")
    assert call("--name", "mine").status == 7 and Path("mine.toml").read_text() == "older"
    assert call("--name", "mine", "--force").status == 7
    assert call("--name", "mine", "--overwrite").status == 0 and load_profile("./mine.toml").name == "mine"


def test_what_was_forced_stands_in_the_profile(
    call: Call, some_links: tuple[Link, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "describe", lambda: {**QUIET, "load": 3.5})
    measuring(monkeypatch, measurements(some_links, 0.4))
    assert call("--name", "mine").status == 5 and not Path("mine.toml").exists()
    monkeypatch.setattr(machine, "describe", lambda: dict(QUIET))
    refused = call("--name", "mine")
    assert refused.status == 5 and "scatter too much" in refused.err and not Path("mine.toml").exists()
    assert not own.Kept("mine", QUIET, 0.1).known  # measured anew by the next run
    monkeypatch.setattr(machine, "describe", lambda: {**QUIET, "load": 3.5})
    assert call("--name", "mine", "--force").status == 0
    notes = load_profile("./mine.toml").provenance.notes
    assert "busy: load 3.50 on 4 processors" in notes and "scatter by 40%" in notes


def test_results_of_another_device(call: Call, some_links: tuple[Link, ...]) -> None:
    about = {"cpu": "Board CPU", "kit": "x", "kit_onnxruntime": "1.9.1", "complete": False, "load": 9.0, "cores": 2}
    found = measurements(some_links, machine=about, onnxruntime="1.8.0")
    Path("results.json").write_text(found.to_json())
    made = call("--from-results", "results.json", "--name", "board", "--force")
    assert made.status == 0, made.err
    profile = load_profile("./board.toml")
    for words in ("with onnxruntime 1.8.0, but its kit is for 1.9.1", "but here is", "not run to its end", "load 9.00",
                  "clock could not be told"):  # fmt: skip
        assert words in profile.provenance.notes, words
    assert not profile.device.host and profile.runtime.version == "1.8.0"


def test_a_fit_that_fails_keeps_what_was_measured(
    call: Call, some_links: tuple[Link, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measurements(some_links)
    measuring(monkeypatch, found)
    monkeypatch.setattr(making, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call("--name", "mine").status == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]
    assert len(own.Kept("mine", QUIET, 0.1).known) == len(found.links) + len(found.nets)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.write_new(tmp_path / "a.toml", half)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="cannot write"):
        own.write_new(tmp_path / "no" / "a.toml", half)


def test_a_kit_from_the_command_line(call: Call, some_links: tuple[Link, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.fitting.kit.emit", functools.partial(emit, selected=some_links[:1], nets=()))
    made = call("--emit-kit", "kit")
    assert made.status == 0 and "kit: 1 chain, 0 networks" in made.out and "python3 run.py" in made.out
    assert json.loads(call("--emit-kit", "other", "--json").out)["chains"] == 1


def test_kinds_of_which_little_was_measured_are_noted(some_links: tuple[Link, ...]) -> None:
    noted = making.enough(measurements(some_links))
    assert noted and noted[0].startswith("few measurements of ") and "conv f32 (8 of" in noted[0]
    everything = tuple(links())
    assert making.enough(measurements(everything)) == []
    with pytest.raises(MeasurementError, match="move f32") as error:
        making.enough(measurements(some_links[:-4], left_out={"x": "lost", "y": "lost"}))
    assert "Most often left out because: lost." in error.value.hint


def test_names_are_of_one_link_each() -> None:
    names = [link.name for link in links()]
    assert len(set(names)) == len(names)
    nets = [net.name for net in (*FITTED, *CHECKED)]
    assert len(set(nets)) == len(nets)


@pytest.mark.slow
def test_from_a_kit_to_a_profile(call: Call, some_links: tuple[Link, ...]) -> None:
    """All the way with a part of the links: the kit, its script in a process of its own, and the fit."""
    few = [net for net in (*FITTED, *CHECKED) if net.name in ("mobile-small", "signal", *(n.name for n in CHECKED[:3]))]
    emit(Path("kit"), selected=some_links, nets=few)
    command = [sys.executable, "kit/run.py", "--budget", "0.02"]
    subprocess.run(command, check=True, timeout=600)
    made = call("--from-results", "results.json", "--name", "mine", "--force", "--json")
    assert made.status == 0, made.err
    document = json.loads(made.out)
    assert document["links"] >= 0.9 * len(some_links) and len(document["held_out"]) >= 3
    profile = load_profile("mine.toml")
    assert profile.provenance.held_out_error == pytest.approx(document["mean_error"], abs=0.01)
    # Prices of a part of what there is, on a machine that may be busy: right within a factor, and not by chance.
    errors = [abs(net["error"]) for net in document["held_out"] if net["name"].endswith(" f32")]
    assert min(errors) < 0.5
