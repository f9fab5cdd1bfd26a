"""A benchmark of several parts: choosing them, saving what is measured, and the end of the report."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.zoo import Verdict, machine

__all__ = ["Part", "choose", "floats", "run_parts"]

Part = Callable[[argparse.Namespace, dict[str, Any], Callable[[], None]], tuple[str, list[Verdict]]]
"""Measures into the dict, saves after every step; returns its tables and verdicts."""


def choose(parser: argparse.ArgumentParser, arguments: argparse.Namespace, known: Mapping[str, Sequence[str]]) -> None:
    """Turns comma lists into lists of names that are known.

    Args:
        parser: says what is wrong.
        arguments: changed in place.
        known: all names by option.
    """
    for name, all_names in known.items():
        chosen = [v for v in getattr(arguments, name).split(",") if v]
        setattr(arguments, name, chosen)
        if unknown := [v for v in chosen if v not in all_names]:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; there are {', '.join(all_names)}")


def floats(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str) -> None:
    """Turns comma lists into lists of numbers."""
    for name in names:
        try:
            setattr(arguments, name, [float(v) for v in getattr(arguments, name).split(",") if v])
        except ValueError as error:
            parser.error(f"--{name} takes numbers: {error}")


def run_parts(
    parts: Mapping[str, Part], arguments: argparse.Namespace, earlier: Mapping[str, Any] | None = None
) -> int:
    """Runs the parts of ``arguments.parts`` and prints; 0 when every target that could be judged was met.

    Args:
        parts: all there are.
        arguments: of the command line; everything measured goes to its ``json`` after every step.
        earlier: what the result starts from.
    """
    options = {k: v if isinstance(v, (int, float, list, dict)) else str(v) for k, v in vars(arguments).items()}
    options.pop("zoo", None)
    result: dict[str, Any] = {**(earlier or {}), "machine": machine(), "options": options}
    load, verdicts, tables = os.getloadavg()[0], list[Verdict](), list[str]()

    def save() -> None:
        result["verdicts"] = [asdict(v) for v in verdicts]
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    for part in arguments.parts:
        table, found = parts[part](arguments, result, save)
        verdicts += found
        tables.append(table)
        save()
    print("\n\n".join(tables), end="\n\n")
    if load > 0.3:
        print(f"* the machine was busy when this began (load {load:.1f}): seconds and latency are worth less")
    print("\n".join(map(str, verdicts)))
    return int(any(v.met is False for v in verdicts))
