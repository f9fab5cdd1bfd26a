"""``onnxcompress multiplex``: several models, one file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from onnxcompress import shell
from onnxcompress.errors import UsageError
from onnxcompress.shell import Answer, command

__all__ = ["multiplex"]

_FILE = click.Path(path_type=Path)


def _named(context: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    """NAME=WHAT, repeated."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, what = text.partition("=")
        if not equals or not name or not what:
            raise click.BadParameter(f"{text!r} names no model; write NAME=... for each", context, parameter)
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice", context, parameter)
        found[name] = what
    return found


_here = click.Group()


@command(
    _here,
    "multiplex",
    "onnxcompress multiplex detector.onnx recognizer.onnx -o bundle/",
    "onnxcompress multiplex v1.onnx v2.onnx -o bundle/ --near 40 \\",
    "    --calibration v1=feeds/ --calibration v2=feeds/",
)
@click.argument("models", type=_FILE, nargs=-1, metavar="A B ...")
@click.option("-o", "--output", type=_FILE, required=True, metavar="FOLDER", help="The folder to make.")
@click.option(
    "--near",
    type=float,
    metavar="DB",
    help="Also merge float32 tensors that are not equal but this much alike, as an SQNR; 40 is 1 % apart.",
)
@click.option(
    "--calibration",
    callback=_named,
    multiple=True,
    metavar="NAME=DATA",
    help="Real inputs of a model to check it on, as for `optimize`; repeatable. Made up without.",
)
@click.option(
    "--preprocess",
    callback=_named,
    multiple=True,
    metavar="NAME=SPEC",
    help="How images become inputs of a model; repeatable.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Of the worst output where --near merged something.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Check on at most N samples a model.")
@click.option("--seed", type=int, default=0, show_default=True, help="For made-up inputs.")
def multiplex(
    models: tuple[Path, ...],
    output: Path,
    near: float | None,
    calibration: dict[str, str],
    preprocess: dict[str, str],
    min_sqnr: float | None,
    samples: int | None,
    seed: int,
    verbose: bool,
) -> Answer:
    """Write several models into one folder, with one file for all their weights.

    Equal tensors are stored once. Each model still loads by itself in plain onnxruntime; each is loaded, run
    and compared with its original before the folder gets its name. The inputs never change.
    """
    from onnxcompress import bundling, render_multiplex

    if min_sqnr is not None and near is None:
        raise UsageError("--min-sqnr is for --near", hint="without it only equal tensors are merged")
    if near is not None and (bare := [m.name for m in models if not {m.name, m.stem} & calibration.keys()]):
        shell.warn(f"no --calibration data for {', '.join(bare)}: what --near merges is checked on made-up inputs")
    with shell.progress() as progress:
        made = bundling.multiplex(
            models, output, near=near, calibration=calibration, preprocess=preprocess,
            min_sqnr=min_sqnr, samples=samples, seed=seed, progress=progress,
        )  # fmt: skip
    return Answer(made, render_multiplex.bundle(made, verbose=verbose))
