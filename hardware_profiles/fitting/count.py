"""Instructions by class that the Arm build of onnxruntime executes for all of :mod:`onnxcompress.fitting.catalogue`.

    python hardware_profiles/fitting/count.py cortex-a53 counts.csv

Needs the emulator (``setup.sh``). What one link executes is the slope between a chain of three and a chain of
one, less the links it stands on; so whatever both chains share is out. Rows are written as they come, and
links already in the file are left alone, so a run can be interrupted and gone on with. It takes about a quarter
of an hour.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxcompress.emulation import Emulator, Executed, Job
from onnxcompress.errors import EmulatorError
from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.links import Link, unary
from onnxcompress.fitting.measuring import NotFusedError, check_fused, feeds
from onnxcompress.instructions import CLASSES
from onnxcompress.profile import Profile, load_profile

SHORT, LONG = 1, 3
BATCH = 24
"""Links an emulated process runs; starting one takes four seconds."""
MOST_MACS = 60_000_000
"""Larger links are left out: instructions grow with the work, and emulating them takes most of the time."""

HALF = (
    "conv", "conv_pointwise", "conv_depthwise", "conv_grouped", "conv_stem", "matmul", "matmul_rows1", "matmul_dynamic",
    "Add", "Mul", "Sigmoid", "Relu", "HardSwish", "Gelu", "elementwise", "transcendental", "softmax", "normalization",
    "MaxPool", "AveragePool", "GlobalAveragePool", "reduce", "Transpose", "move", "gather",
)  # fmt: skip
"""Kinds that are counted in float16, too."""

WORK = (
    "kind", "precision", "label",
    "nodes", "macs", "in_channels", "out_channels", "elements", "weights", "patches", "on",
)  # fmt: skip
Key = tuple[str, str, str]


def key(link: Link) -> Key:
    return link.kind, link.precision, link.label


def overhead() -> Link:
    """A node that does next to nothing: what is left is dispatch."""
    return dataclasses.replace(unary("per_node", "f32", "Abs", (1, 4)), raw=True)


class Half(Link):
    """A float link in float16, for cores that compute in it."""

    def build(self, count: int, *, drawn: bool = True) -> onnx.ModelProto:
        model = super().build(count, drawn=drawn)
        for value in (*model.graph.input, *model.graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                array = numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model


def half(link: Link) -> Link:
    values = {f.name: getattr(link, f.name) for f in dataclasses.fields(link)}
    below = None if link.baseline is None else half(link.baseline)
    return Half(**{**values, "precision": "f16", "baseline": below, "expect": ()})


def everything(profile: Profile) -> Iterator[Link]:
    """Links the core can run: those anyone can, and float16 ones where it computes in it."""
    has_half = profile.emulation is not None and "asimdhp" in profile.emulation.features
    seen = set()
    for link in (overhead(), *links()):
        seen.add(key(link))
        yield link
    for link in links():
        if has_half and link.precision == "f32" and link.kind in HALF and (link.kind, "f16", link.label) not in seen:
            yield half(link)


def parts(link: Link) -> Iterator[Link]:
    """The link and everything it stands on."""
    one: Link | None = link
    while one is not None:
        yield one
        one = one.baseline


def runs_as_meant(link: Link) -> bool:
    """Whether onnxruntime fuses the link; fusions do not depend on the processor, so it is asked here."""
    try:
        check_fused(link)
    except NotFusedError as error:
        print("not fused:", *key(link), error, file=sys.stderr)
        return False
    return True


def execute(emulator: Emulator, profile: Profile, chains: Sequence[tuple[Link, int]]) -> list[Executed]:
    """Counts of one run of each chain; a chain that takes the emulator down is left out and the rest gone on with."""
    with tempfile.TemporaryDirectory() as name:
        jobs = []
        for i, (link, length) in enumerate(chains):
            model, path = link.build(length), Path(name, f"{i}.onnx")
            onnx.save(model, path)
            types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
            feed = {n: a.astype(np.float16) if types[n] == TensorProto.FLOAT16 else a for n, a in feeds(model).items()}
            jobs.append(Job(path, [feed], runs=1, keep=False, raw=link.raw))
        try:
            return emulator.run(profile, jobs)
        except EmulatorError as error:
            if len(jobs) == 1:
                return [Executed(error=str(error))]
            return [done for job in jobs for done in _alone(emulator, profile, job)]


def _alone(emulator: Emulator, profile: Profile, job: Job) -> list[Executed]:
    try:
        return emulator.run(profile, [job])
    except EmulatorError as error:
        return [Executed(error=str(error))]


def count(emulator: Emulator, profile: Profile, chosen: Iterable[Link]) -> Iterator[tuple[Link, dict[str, float]]]:
    """Instructions and bytes by class of one link each."""
    executed: dict[tuple[str, int], Executed] = {}  # by the text of the chain: many links stand on the same one
    for batch in _batched(chosen):
        meant = [link for link in batch if runs_as_meant(link)]
        chains = {(_name(part), n): (part, n) for link in meant for part in parts(link) for n in (SHORT, LONG)}
        new = [name for name in chains if name not in executed]
        executed |= dict(zip(new, execute(emulator, profile, [chains[name] for name in new]), strict=True))
        for link in meant:
            short, long = ([executed[_name(part), n] for part in parts(link)] for n in (SHORT, LONG))
            errors = [one.error for one in (*short, *long) if one.error]
            if errors:
                print("does not run:", *key(link), errors[0], file=sys.stderr)
                continue
            slopes = [
                {c: (b.counts[c] - a.counts[c]) / (LONG - SHORT) for c in CLASSES}
                for a, b in zip(short, long, strict=True)
            ]
            yield link, {c: slopes[0][c] - sum(s[c] for s in slopes[1:]) for c in CLASSES}
            if link.kind == "per_node":
                run = {c: short[0].counts[c] - slopes[0][c] for c in CLASSES}
                yield dataclasses.replace(link, kind="per_run"), run


def _name(link: Link) -> str:
    """Equal for equal chains."""
    return f"{link.raw} {hashlib.sha256(link.build(1).SerializeToString()).hexdigest()}"


def _batched(chosen: Iterable[Link]) -> Iterator[tuple[Link, ...]]:
    source = iter(chosen)
    while batch := tuple(itertools.islice(source, BATCH)):
        yield batch


def record(link: Link, counts: dict[str, float]) -> dict[str, object]:
    work = {**vars(link), "in_channels": link.channels[0], "out_channels": link.channels[1]}
    return {**{name: work[name] for name in WORK}, **{c: round(counts[c]) for c in CLASSES}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="whose [emulation] table says which core")
    parser.add_argument("file", type=Path, help="CSV to write, or to go on with")
    parser.add_argument("--only", default="", help="kinds to count, separated by commas")
    parser.add_argument("--precision", default="", help="precisions to count, separated by commas")
    chosen = parser.parse_args(arguments)
    kinds, precisions = (set(filter(None, text.split(","))) for text in (chosen.only, chosen.precision))
    profile = load_profile(chosen.profile)
    seen: set[Key] = set()
    columns: Sequence[str] = [*WORK, *CLASSES]
    if chosen.file.exists():
        with chosen.file.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or columns
            seen = {(r["kind"], r["precision"], r["label"]) for r in reader}
    asked = (
        link
        for link in everything(profile)
        if link.macs <= MOST_MACS
        and (not kinds or link.kind in kinds)
        and (not precisions or link.precision in precisions)
    )
    wanted = [link for link in asked if key(link) not in seen]
    with chosen.file.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not seen:
            writer.writeheader()
        for link, counts in count(Emulator(), profile, wanted):
            writer.writerow(record(link, counts))
            file.flush()


if __name__ == "__main__":
    main()
