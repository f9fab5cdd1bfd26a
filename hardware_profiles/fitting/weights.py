"""Cycles of each class of instructions, fitted to published milliseconds.

    python hardware_profiles/fitting/weights.py                # errors of every core, and its prices
    python hardware_profiles/fitting/weights.py a53 --toml     # the [instructions] table of a profile

Counts (``counts/ncnn.csv``) are what ncnn executes for its benchmark networks under the emulator, milliseconds
(``measured/ncnn.csv``) what owners of boards have submitted to its README. A row says::

    GHz * 1e6 * ms = board * sum(cycles[c] * count[c])

with one ``board`` for each submission. Classes go together (a kernel that multiplies more loads more), so
least squares alone gives prices no core has: multiply-adds for nothing, one byte as dear as an instruction.
What is minimised is therefore the most probable price given a guess from how the core is built (``cores.toml``)::

    sum_rows rho(log(predicted / measured) / SPREAD)
        + sum_classes (log(cycles / prior) / width)^2 + sum_boards (log(board) / BOARDS)^2

where multiply-adds and products cost no less than the prior, the fastest a core can issue them (``limited``).
rho is scipy's ``soft_l1``, as some submissions are off by a third for some networks. Logarithms make errors
relative and prices positive. Errors are given as they will be judged: for networks the fit has not seen (the
scalar of the board is known from the others), and for boards it has not seen (their scalar is the one that
fits best; "raw" is without).
"""

from __future__ import annotations

import argparse
import csv
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from onnxcompress.instructions import CLASSES
from onnxcompress.validation import best_scalar

HERE = Path(__file__).parent
SPREAD = 0.05
"""Relative error at which a row starts to be taken for an outlier."""
BOARDS = 0.2
"""How much boards of a core differ at the same clock (log)."""

Array = npt.NDArray[np.float64]
Names = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Core:
    """What is known beforehand: profile, whose counts of ncnn and of onnxruntime, boards, prior of the prices."""

    name: str
    profile: str
    counts: str
    runtime_counts: str
    runtime_factor: float
    boards: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    limited: tuple[str, ...]
    prior: Array
    width: Array


@dataclass(frozen=True)
class Data:
    """Rows of one core: counts [row, class], cycles measured at the board's clock, board, network."""

    counts: Array
    cycles: Array
    board: Names
    model: Names

    def where(self, chosen: npt.NDArray[np.bool_]) -> Data:
        return Data(self.counts[chosen], self.cycles[chosen], self.board[chosen], self.model[chosen])

    @property
    def integer(self) -> npt.NDArray[np.bool_]:
        return np.array([name.endswith("_int8") for name in self.model])


def cores() -> dict[str, Core]:
    with (HERE / "cores.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)
    return {
        name: Core(
            name, one["profile"], one["counts"], one["runtime_counts"], one["runtime_factor"],
            tuple(one["boards"]), tuple(map(tuple, one["tied"])), tuple(one["limited"]),
            np.array([one["prior"][c][0] for c in CLASSES]), np.array([one["prior"][c][1] for c in CLASSES]),
        )
        for name, one in found.items()
    }  # fmt: skip


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (HERE / name).open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def data(core: Core, *, fit_set: bool = True) -> Data:
    """Measurements of a core beside the counts of the same networks; of all its boards, if not ``fit_set``."""
    counts = {r["model"]: [float(r[c]) for c in CLASSES] for r in _rows("counts/ncnn.csv") if r["core"] == core.counts}
    rows = [
        (counts[r["model"]], float(r["measured_ms"]) * float(r["ghz"]) * 1e6, r["device"], r["model"])
        for r in _rows("measured/ncnn.csv")
        if r["core"] == core.name and r["model"] in counts and (not fit_set or r["device"] in core.boards)
    ]
    x, y, board, model = zip(*rows, strict=True)
    return Data(np.array(x), np.array(y), np.array(board), np.array(model))


def fit(core: Core, rows: Data) -> Array:
    """Cycles by class."""
    boards = sorted(set(rows.board))
    index = np.searchsorted(boards, rows.board)
    share = list(range(len(CLASSES)))  # the parameter that moves a class
    for group in core.tied:
        for name in group:
            share[list(CLASSES).index(name)] = list(CLASSES).index(group[0])
    n = len(CLASSES)

    def residuals(p: Array) -> Array:
        error = (
            np.log(rows.counts @ (core.prior * np.exp(p[:n][share]))) + p[n:][index] - np.log(rows.cycles)
        ) / SPREAD
        robust = np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error**2) - 1))
        return np.concatenate([robust, p[:n] / core.width, p[n:] / BOARDS])

    least = np.full(n + len(boards), -np.inf)
    least[[list(CLASSES).index(name) for name in core.limited]] = 0
    start = np.full(n + len(boards), 1e-3)  # inside the bounds
    found = least_squares(residuals, start, bounds=(least, np.inf)).x
    cycles: Array = core.prior * np.exp(found[:n][share])
    scalars = [_scalar(cycles, rows.where(rows.board == board)) for board in boards]
    return cycles * float(np.exp(np.mean(np.log(scalars))))  # boards are 1 on average, not merely near it


def _scalar(cycles: Array, rows: Data) -> float:
    return best_scalar((rows.counts @ cycles).tolist(), rows.cycles.tolist())


def unseen_models(core: Core, rows: Data) -> Array:
    """Relative error of each row by a fit that has not seen its network, on any board."""
    predicted = np.empty(len(rows.cycles))
    for model in sorted(set(rows.model)):
        out = rows.model == model
        work = rows.counts @ fit(core, rows.where(~out))
        for board in set(rows.board[out]):
            seen, here = ~out & (rows.board == board), out & (rows.board == board)
            predicted[here] = work[here] * best_scalar(work[seen].tolist(), rows.cycles[seen].tolist())
    return np.abs(predicted / rows.cycles - 1)


def unseen_boards(core: Core, rows: Data) -> dict[str, tuple[float, float]]:
    """Mean relative error on each board by a fit that has not seen it: after one scalar, and without."""
    found = {}
    for board in sorted(set(rows.board)):
        out = rows.board == board
        if not out.all():
            found[board] = board_error(fit(core, rows.where(~out)), rows.where(out))
    return found


def board_error(cycles: Array, rows: Data) -> tuple[float, float]:
    """Mean relative error on the rows of one board, after one scalar and without."""
    work = rows.counts @ cycles
    scalar = best_scalar(work.tolist(), rows.cycles.tolist())
    return float(np.abs(scalar * work / rows.cycles - 1).mean()), float(np.abs(work / rows.cycles - 1).mean())


def flat(core: Core) -> Array:
    """One price for every instruction: what counting without classes would give."""
    return np.array([0.0 if name.startswith("bytes_") else 1.0 for name in CLASSES])


def float_only(cycles: Array, rows: Data) -> float:
    """Mean error over boards of the float networks alone, after one scalar: an int8 kernel is no reference."""
    chosen = rows.where(~rows.integer)
    return float(np.mean([board_error(cycles, chosen.where(chosen.board == b))[0] for b in sorted(set(chosen.board))]))


def show(core: Core) -> None:
    rows = data(core)
    cycles = fit(core, rows)
    models, unseen = unseen_models(core, rows), unseen_boards(core, rows)
    print(f"== {core.name}: {len(rows.cycles)} rows, {len(set(rows.board))} boards")
    print("   " + " ".join(f"{name}={value:.3g}" for name, value in zip(CLASSES, cycles, strict=True)))
    print(f"   network left out {models.mean():.1%} (float {models[~rows.integer].mean():.1%}, "
          f"int8 {models[rows.integer].mean():.1%})")  # fmt: skip
    if unseen:
        print(f"   board left out {np.mean([e for e, _ in unseen.values()]):.1%} after one scalar, "
              f"{np.mean([e for _, e in unseen.values()]):.1%} raw: "
              + ", ".join(f"{b} {e:.1%}" for b, (e, _) in unseen.items()))  # fmt: skip
    tries = {"float networks only": cycles, "with the prior": core.prior, "with one price for all": flat(core)}
    print("   " + ", ".join(f"{what} {float_only(prices, rows):.1%}" for what, prices in tries.items()))
    others = data(core, fit_set=False)
    for board in sorted(set(others.board) - set(core.boards)):
        after, raw = board_error(cycles, others.where(others.board == board))
        print(f"   never fitted to: {board} {after:.1%} after one scalar, {raw:.1%} raw")


def table(core: Core) -> str:
    """The ``[instructions]`` table of the core's profile."""
    rows = data(core)
    cycles = fit(core, rows)
    models, boards = unseen_models(core, rows), unseen_boards(core, rows)
    held_out = f"a network at a time, on the same boards ({models.mean():.1%})"
    if boards:
        mean = np.mean([error for error, _ in boards.values()])
        held_out += f"; a board at a time, after one scalar ({mean:.1%})"
    lines = ["[instructions]", f'core = "{core.name}"', 'runtime = "ncnn"']
    lines += [f"cycles_{name} = {float(f'{value:.3g}')}" for name, value in zip(CLASSES, cycles, strict=True)]
    lines += [
        f'fit_set = "ncnn benchmark networks, float and int8, one thread: {len(rows.cycles)} times on '
        f'{", ".join(core.boards)}"',
        f'held_out = "{held_out}"',
        f"held_out_error = {models.mean():.3f}",
        'source = "hardware_profiles/fitting/weights.py: counts of instructions under qemu-user, times of the ncnn '
        'benchmark README (BSD-3)"',
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    known = cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cores", nargs="*", metavar="CORE", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--toml", action="store_true", help="print [instructions] tables")
    chosen = parser.parse_args(arguments)
    for name in chosen.cores or known:
        if chosen.toml:
            print(table(known[name]))
        else:
            show(known[name])


if __name__ == "__main__":
    main()
