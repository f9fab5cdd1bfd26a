"""Deep Compression (Han, Mao, Dally 2016) by this library: prune connections, share weights, code.

    python -m benchmarks.deep_compression [--model lenet-300-100,lenet-5] [--json out.json]

Trains the paper's two small networks on scikit-learn's digits, then takes the form with the fewest compressed bytes
whose accuracy on the validation images falls by at most ``--max-drop``, and reports every stage on test images that
nothing was chosen by. The paper retrains after pruning and trains the shared values; here weights are only refitted to
what calibration saw, without labels. It codes by Huffman; here that is zstd of the whole file, graph included. Two
stages more are not the paper's: whole neurons and channels removed before, and what ``--target download`` makes of it.

Needs scikit-learn and no other data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx

from benchmarks.deep_compression_nets import DIGITS, NETS, Split, digits, trained
from benchmarks.measure import session
from benchmarks.parts import choose, floats, run_parts
from benchmarks.printing import aligned, figure
from benchmarks.zoo import Verdict, note, size_of
from onnxcompress import Budget, optimize, registry

PAPER = {"lenet-300-100": 40.0, "lenet-5": 39.0}
"""Times smaller, of table 1 (MNIST, retrained): 1,070 to 27 kB and 1,720 to 44 kB."""
_NO_FLOOR = -1000.0
_BATCH = 16
_LEVELS = (3, 19)


@dataclass(frozen=True)
class Setting:
    """How far to go.

    Attributes:
        sparsity: share of zeros, of the layers of each type.
        bits: of shared weights; 0 for none.
        removed: share of neurons and channels that are removed before.
    """

    sparsity: tuple[tuple[str, float], ...] = ()
    bits: float = 0
    removed: float = 0

    def __str__(self) -> str:
        gone = f"neurons -{self.removed:.0%}" if self.removed else ""
        zeros = " ".join(f"{op} {share:.1%}" for op, share in self.sparsity if share)
        return (
            ", ".join(filter(None, (gone, zeros and f"zeros: {zeros}", f"{self.bits:g} bits" if self.bits else "")))
            or "fp32"
        )


@dataclass
class Stage:
    """One file."""

    model: str
    stage: str
    setting: str
    validation: float
    test: float
    bytes: int
    zstd: dict[int, int]
    file_ratio: float = 1.0
    zstd_ratio: float = 1.0


class Bench:
    """One network, and what was made of it so far."""

    def __init__(self, net: str, folder: Path, options: str, seed: int) -> None:
        self.net, self.folder, self.options = net, folder, options
        self.source = folder / "fp32" / "model.onnx"
        self.source.parent.mkdir(parents=True)
        model = trained(net, seed)
        onnx.save(model, self.source)
        self.shape = [-1, *(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])]
        self.ops = tuple(dict.fromkeys(n.op_type for n in model.graph.node if n.op_type in ("Conv", "Gemm")))
        self.made: dict[Setting, Path] = {Setting(): self.source}

    def path(self, setting: Setting) -> Path:
        """The model at a setting."""
        if setting in self.made:
            return self.made[setting]
        texts = [f"prune_channels{{ratio={setting.removed:g}}}"] if setting.removed else []
        texts += [
            f"prune_connections{{sparsity={share:g},method=reconstruction,only=[{op}],min_weights=256,min_inputs=16}}"
            for op, share in setting.sparsity
            if share
        ]
        if setting.bits:
            options = ",".join(filter(None, (f"bits={setting.bits:g},min_weights=256", self.options)))
            texts.append(f"share_weights{{{options}}}")
        output = self.folder / str(len(self.made)) / "model.onnx"
        output.parent.mkdir()
        optimize(
            self.source,
            passes=[registry.parse(text) for text in texts],
            budget=Budget(min_sqnr_db=_NO_FLOOR),
            calibration=list(self._feeds()),
            timing=False,
            output=output,
        )
        self.made[setting] = output
        return output

    def _feeds(self) -> Iterator[dict[str, Any]]:
        images = digits()["train"].images.reshape(self.shape)
        for start in range(0, len(images), _BATCH):
            yield {"x": images[start : start + _BATCH]}

    def planned(self, max_drop: float) -> Path:
        """What the planner makes of it, aiming at the download; the validation images are its metric."""
        output = self.folder / "planned" / "model.onnx"
        output.parent.mkdir()
        optimize(
            self.source,
            target="download",
            budget=Budget(max_drop=max_drop),
            metric=lambda path: self.accuracy(Path(path), digits()["validation"]),
            calibration=list(self._feeds()),
            timing=False,
            output=output,
        )
        return output

    def accuracy(self, model: Path, split: Split) -> float:
        """Share of images that are read rightly."""
        (logits,) = session(model).run(None, {"x": split.images.reshape(self.shape)})
        return float(np.mean(logits.argmax(1) == split.labels))

    def stage(self, name: str, setting: str, model: Path) -> Stage:
        """All there is to say of one file."""
        sizes = {level: size_of(model.parent, level) for level in _LEVELS}
        raw, before = sizes[_LEVELS[0]][0], self.source.stat().st_size
        known = digits()
        return Stage(
            self.net, name, setting, self.accuracy(model, known["validation"]), self.accuracy(model, known["test"]),
            raw, {level: packed for level, (_, packed) in sizes.items()}, before / raw, before / sizes[_LEVELS[-1]][1],
        )  # fmt: skip


class Search:
    """The setting with the fewest compressed bytes that keeps an accuracy on the validation images.

    Args:
        bench: the network.
        least: accuracy to keep.
    """

    def __init__(self, bench: Bench, least: float) -> None:
        self._bench, self._least = bench, least
        self.best = Setting()
        self._bytes = _download(bench.source)

    def climb(self, settings: Iterator[Setting]) -> None:
        """Ever stronger ones, until two in a row lose too much; accuracy does not fall evenly."""
        failed = 0
        for setting in settings:
            model = self._bench.path(setting)
            accuracy, size = self._bench.accuracy(model, digits()["validation"]), _download(model)
            note(f"{self._bench.net}: {setting}: {accuracy:.2%}, {size} bytes compressed")
            if accuracy < self._least:
                failed += 1
            elif size < self._bytes:
                self.best, self._bytes = setting, size
            if failed == 2:
                return


def _download(model: Path) -> int:
    """Compressed bytes."""
    return size_of(model.parent, _LEVELS[-1])[1]


def paper(search: Search, ops: Sequence[str], ladder: Sequence[float], bits: Sequence[float]) -> Setting:
    """Zeros and shared weights: one share for all layers first, then as much more as each type of layer bears."""
    for width in bits:
        search.climb(Setting(tuple((op, share) for op in ops), width) for share in ladder)
    for op in ops if search.best.sparsity and len(ops) > 1 else ():
        start = search.best
        more = [share for share in ladder if share > dict(start.sparsity)[op]]
        search.climb(replace(start, sparsity=tuple({**dict(start.sparsity), op: share}.items())) for share in more)
    return search.best


def beyond(search: Search, ops: Sequence[str], ladder: Sequence[float], removed: Sequence[float]) -> Setting:
    """The same with neurons and channels removed before."""
    bits = search.best.bits
    for share in removed:
        search.climb(Setting(tuple((op, zeros) for op in ops), bits, share) for zeros in (0.0, *ladder))
    return search.best


def run_net(net: str) -> Callable[..., tuple[str, list[Verdict]]]:
    """The part of the benchmark for one network."""

    def part(
        arguments: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]
    ) -> tuple[str, list[Verdict]]:
        note(f"{net}: training")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            bench = Bench(net, Path(temporary), arguments.options, arguments.seed)
            base = bench.accuracy(bench.source, digits()["validation"])
            taken = time.perf_counter() - start
            search = Search(bench, base - arguments.max_drop)
            found = paper(search, bench.ops, arguments.ladder, arguments.bits)
            further = beyond(search, bench.ops, arguments.ladder, arguments.removed)
            settings = {"fp32": Setting(), "pruned": replace(found, bits=0), "shared": replace(found, sparsity=())}
            settings["both"] = found
            if further != found:
                settings["neurons, too"] = further
            stages = [bench.stage(name, str(setting), bench.path(setting)) for name, setting in settings.items()]
            planned = bench.planned(arguments.max_drop)
            stages.append(bench.stage("planned", "target download", planned))
        seconds = time.perf_counter() - start - taken
        result[net] = {"stages": [asdict(s) for s in stages], "training": taken, "seconds": seconds}
        save()
        return _table(net, stages, taken, seconds), _verdicts(net, stages)

    return part


HEADER = ("stage", "setting", "validation", "test", "bytes", "file", "zstd -3", "zstd -19", "stored as zstd")


def _table(net: str, stages: Sequence[Stage], training: float, seconds: float) -> str:
    rows = [
        [
            s.stage, s.setting, f"{s.validation:.2%}", f"{s.test:.2%}", s.bytes, figure(s.file_ratio, 1), s.zstd[3],
            s.zstd[19], figure(s.zstd_ratio, 1),
        ]
        for s in stages
    ]  # fmt: skip
    count = {name: len(split.labels) for name, split in digits().items()}
    return "\n".join(
        (
            f"{net} on {DIGITS} ({', '.join(f'{n} {name}' for name, n in count.items())}); trained in",
            f"{training:.0f} s, compressed in {seconds:.0f} s with the search. Ratios are to the plain fp32 file:",
            aligned(HEADER, rows, left=2),
        )
    )


def _verdicts(net: str, stages: Sequence[Stage]) -> list[Verdict]:
    first = stages[0]
    return [
        Verdict(
            f"{net}, {last.stage}: stored, against the paper's {PAPER[net]:g}x (MNIST, retrained; here neither)",
            None,
            f"file {last.file_ratio:.1f}x, zstd {last.zstd_ratio:.1f}x, of the compressed fp32 file "
            f"{first.zstd[19] / last.zstd[19]:.1f}x; test accuracy {first.test:.2%} to {last.test:.2%} "
            f"(one image is {1 / len(digits()['test'].labels):.2%})",
        )
        for last in stages[3:]
    ]


PARTS = {net: run_net(net) for net in NETS}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=",".join(NETS), dest="parts", help="comma list of: " + ", ".join(NETS))
    add("--ladder", default="0.5,0.6,0.65,0.7,0.75,0.8,0.85,0.875,0.9,0.925,0.95", help="shares of zeros to try")
    add("--bits", default="6,5,4,3,2", help="bits of shared weights to try")
    add("--max-drop", type=float, default=0.005, help="validation accuracy that may be lost; one image is 0.0022")
    add("--removed", default="0.3,0.4,0.5,0.6,0.7,0.8", help="shares of neurons and channels to remove before")
    add("--options", default="", help="more options of share_weights, as block=64")
    add("--seed", type=int, default=0, help="of the training")
    add("--json", type=Path, help="write everything measured here")
    arguments = parser.parse_args(argv)
    choose(parser, arguments, {"parts": list(NETS)})
    floats(parser, arguments, "ladder", "bits", "removed")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return run_parts(PARTS, parse(argv))


if __name__ == "__main__":
    raise SystemExit(main())
