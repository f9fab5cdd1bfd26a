"""``onnxcompress profile``: what is known about devices, and how true it is."""

from __future__ import annotations

import copy
from pathlib import Path

import click

from onnxcompress import render, render_validation
from onnxcompress.shell import Answer, command

__all__ = ["profile", "profiles"]


@click.group(no_args_is_help=False)
def profile() -> None:
    """Hardware profiles: what is known about each device, and how true it is."""


@command(profile, "list")
def list_profiles(verbose: bool) -> Answer:
    """List the hardware profiles."""
    from onnxcompress.profile import list_profiles as names
    from onnxcompress.profile import load_profile

    found = [load_profile(name) for name in names()]
    return Answer(found, render.profiles(found))


@command(
    profile,
    "show",
    "onnxcompress profile show cortex-a53",
    "onnxcompress profile show ./my-board.toml",
)
@click.argument("name")
def show_profile(name: str, verbose: bool) -> Answer:
    """Show one profile: NAME, or a TOML file of your own."""
    from onnxcompress.profile import load_profile

    loaded = load_profile(name)
    return Answer(loaded, render.profile(loaded))


@command(
    profile,
    "validate",
    "onnxcompress profile validate cortex-a53 --against boards.csv",
    "onnxcompress profile validate ./my-board.toml --against models.csv --json",
)
@click.argument("name")
@click.option(
    "--against",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Measured times: columns model (an .onnx file) and measured_ms; or device, model, measured_ms and "
    "counts of executed instructions by class.",
)
def validate_profile(name: str, against: Path, verbose: bool) -> Answer:
    """Compare a profile with measured milliseconds.

    NAME is a profile, or a TOML file of your own. Errors are given as predicted, and after one scalar for
    each device, which takes out clock, memory and version of a board. -v lists every row.
    """
    from onnxcompress.profile import load_profile
    from onnxcompress.validation import validate

    found = validate(load_profile(name), against)
    return Answer(found, render_validation.validation(found, every_row=verbose))


profiles = copy.copy(profile)
"""The group's former name, kept for scripts."""
profiles.name, profiles.hidden = "profiles", True
