"""``onnxcompress profile``: what is known about devices, and how true it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import click

from onnxcompress import render, render_fit, render_validation, shell
from onnxcompress.errors import MeasurementError, OutputError, UsageError
from onnxcompress.shell import Answer, command

__all__ = ["profile", "profiles"]


_FILE = click.Path(path_type=Path)


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


@command(
    profile,
    "fit",
    "onnxcompress profile fit --name mybox",
    "onnxcompress profile fit --emit-kit kit/",
    "onnxcompress profile fit --from-results results.json --name my-board -o my-board.toml",
)
@click.option("--name", metavar="NAME", help="What the profile is called: a-z, 0-9, dots, dashes, underscores.")
@click.option("-o", "--output", type=_FILE, metavar="FILE.toml", help="Where it goes; ./NAME.toml if not given.")
@click.option(
    "--budget",
    type=click.FloatRange(0, 3600, min_open=True),
    default=0.1,
    show_default=True,
    metavar="SECONDS",
    help="Of timing for each chain of operators; a network gets four times as much.",
)
@click.option("--emit-kit", type=_FILE, metavar="FOLDER", help="Measure nothing; write what another device runs.")
@click.option("--from-results", type=_FILE, metavar="FILE.json", help="Measure nothing; fit what a kit measured.")
@click.option(
    "--save-results", type=_FILE, metavar="FILE.json", help="Keep what was measured; fits with --from-results."
)
@click.option("--force", is_flag=True, help="Go on though the machine is busy, times scatter, or versions differ.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.toml if there is one.")
def fit_profile(
    name: str | None,
    output: Path | None,
    budget: float,
    emit_kit: Path | None,
    from_results: Path | None,
    save_results: Path | None,
    force: bool,
    overwrite: bool,
    verbose: bool,
) -> Answer:
    """Measure a machine and write its profile.

    Times chains of operators and made-up networks with onnxruntime on one thread, a few minutes; leave the machine
    alone meanwhile. A run that is interrupted goes on where it was. For a device that only has onnxruntime, write
    a kit, run it there, and bring its results back.
    """
    if emit_kit is not None:
        if name or output or from_results or save_results or force or overwrite:
            raise UsageError("--emit-kit stands alone", hint="a kit has no name yet; give one with --from-results")
        from onnxcompress.fitting.kit import emit

        with shell.progress() as show:
            kit = emit(emit_kit, progress=_steps("writing", show))
        return Answer(kit, render_fit.kit(kit))
    if not name:
        raise UsageError("the profile needs a name", hint="give one: --name my-board")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise UsageError(f"--name {name!r} is no name", hint="a-z, 0-9, dots, dashes and underscores: --name my-board")
    output = output or Path(f"{name}.toml")
    for path, what in ((output, "-o"), (save_results, "--save-results")):
        if path is not None:
            shell.writable(path, what=what)
    if output.exists() and not overwrite:
        raise OutputError(f"-o: {output} is there already", hint="choose another name, or give --overwrite")
    if save_results is not None and save_results.exists() and not overwrite:
        raise OutputError(
            f"--save-results: {save_results} is there already", hint="choose another name, or --overwrite"
        )
    if from_results is not None and save_results is not None:
        raise UsageError("--save-results keeps what is measured, but --from-results measures nothing")
    from onnxcompress.fitting import machine, making, own

    kept = None
    with shell.progress() as show:
        if from_results is not None:
            measurements, notes = own.read_results(from_results, force=force)
            # Noted only: what counts as load differs between systems, and the scatter was measured.
            notes += own.busy(measurements.machine, force=True)
        else:
            about = machine.describe()
            notes = own.busy(about, force=force)
            kept = own.Kept(name, about, budget)
            if kept.known:
                shell.warn(f"going on with {len(kept.known)} results of a run that was interrupted")
            try:
                measurements = own.measured_here(about=about, budget=budget, kept=kept, progress=_steps("", show))
            except BaseException:  # interrupted, terminated, out of memory: all the same to what is kept
                shell.warn("what was measured is kept; the same command goes on")
                raise
        if save_results is not None:
            keep = measurements.to_json()
            own.write_new(save_results, lambda path: _text(path, keep), overwrite=overwrite)
        try:
            made = making.make(
                measurements, name, output,
                notes=notes, force=force, overwrite=overwrite, progress=_steps("fitting", show),
            )  # fmt: skip
        except MeasurementError:
            if kept is not None:
                kept.drop()  # or the next run would take them for its own and be refused, too
            raise
    if kept is not None:
        kept.drop()
    return Answer(made, render_fit.fitted(made, every_row=verbose))


def _steps(stage: str, show: Callable[[str, int, int | None], None] | None) -> Callable[[str, int, int], None]:
    """Progress of measuring as a line on the terminal, if there is one."""

    def step(what: str, done: int, total: int) -> None:
        if show is not None:
            show(f"{stage} {what}".strip(), done, total)

    return step


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


profiles = copy.copy(profile)
"""The group's former name, kept for scripts."""
profiles.name, profiles.hidden = "profiles", True
