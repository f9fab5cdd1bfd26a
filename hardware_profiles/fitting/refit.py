"""Kernels of a profile from counted instructions: needs no emulator and no device.

    python hardware_profiles/fitting/refit.py a53            # how well kernels fit
    python hardware_profiles/fitting/refit.py a53 --write    # and rewrite the profile's fitted tables
    python hardware_profiles/fitting/refit.py --write        # all cores

The instructions of every link (``counts/onnxruntime_*.csv``) are priced by class (``weights.py``), which gives it
seconds; those are fitted by linear forms (``forms.py``) as if they had been measured.
Of a profile ``[overhead]``, ``[instructions]`` and all ``[[kernel]]`` tables are rewritten and the rest is left alone.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import weights  # type: ignore[import-not-found]  # a script beside this one
from forms import Fit, Row, fits, toml  # type: ignore[import-not-found]

from onnxcompress.instructions import CLASSES

PROFILES = weights.HERE.parent


def rows(core: weights.Core, cycles: weights.Array, ghz: float) -> Iterator[Row]:
    """Links with the seconds their instructions take."""
    path = weights.HERE / "counts" / f"onnxruntime_{core.runtime_counts}.csv"
    types = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in dataclasses.fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            seconds = sum(float(record[c]) * price for c, price in zip(CLASSES, cycles, strict=True)) / (ghz * 1e9)
            if seconds <= 0:  # less than what it stands on: lost between two larger numbers
                continue
            work = {name: types[name](record[name]) for name in types if name != "seconds"}
            one = Row(**work, seconds=seconds)
            yield from _halves(one) if one.kind == "boundary" else (one,)


def _halves(pair: Row) -> Iterator[Row]:
    """A quantize and a dequantize; which of the two pays for the layout cannot be told."""
    for kind in ("quantize", "dequantize"):
        values = {**vars(pair), "kind": kind, "nodes": 1, "elements": pair.elements // 2, "seconds": pair.seconds / 2}
        yield Row(**values)


def refit(core: weights.Core, ghz: float) -> tuple[list[Fit], float, float]:
    """Kernels, and seconds of a run and of a node."""
    cycles = core.runtime_factor * weights.fit(core, weights.data(core))
    found = list(rows(core, cycles, ghz))
    per_run, per_node = (next(r.seconds for r in found if r.kind == kind) for kind in ("per_run", "per_node"))
    kernels = fits([r for r in found if not r.kind.startswith("per_")], per_node)
    return kernels, per_run, per_node


def tables(core: weights.Core, kernels: Sequence[Fit], per_run: float, per_node: float) -> dict[str, str]:
    """The tables of a profile that are fitted, by name."""
    return {
        "overhead": f"[overhead]\nns_per_run = {per_run * 1e9:.0f}\nns_per_node = {per_node * 1e9:.0f}\n",
        "instructions": weights.table(core),
        "kernel": toml(kernels).strip() + "\n",
    }


def rewrite(text: str, new: dict[str, str]) -> str:
    """A profile with tables replaced where the first of each name stands."""
    parts = re.split(r"(?m)^(?=\[)", text)
    names = [(re.match(r"\[\[?(\w+)", part) or [""] * 2)[1] for part in parts]
    kept = []
    for name, part in zip(names, parts, strict=True):
        if name in new:
            part = new.pop(name) + "\n"
        elif name in ("overhead", "instructions", "kernel"):
            continue
        kept.append(part)
    return "".join(kept)


def main(arguments: Sequence[str] | None = None) -> None:
    known = weights.cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cores", nargs="*", metavar="CORE", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--write", action="store_true", help="rewrite the profiles")
    chosen = parser.parse_args(arguments)
    for name in chosen.cores or known:
        core = known[name]
        if not core.profile:
            continue
        path: Path = PROFILES / f"{core.profile}.toml"
        text = path.read_text(encoding="utf-8")
        kernels, per_run, per_node = refit(core, tomllib.loads(text)["device"]["frequency_ghz"])
        print(f"== {name}: {per_run * 1e9:.0f} ns per run, {per_node * 1e9:.0f} ns per node")
        for f in kernels:
            print(f"   {f.kind:18}{f.on:5}{f.precision:10}{f.points:3}{f.mean_error:7.0%}{f.worst_error:7.0%}")
        if chosen.write:
            path.write_text(rewrite(text, tables(core, kernels, per_run, per_node)), encoding="utf-8")


if __name__ == "__main__":
    main()
