"""Peak memory of the steps that must not grow: editing and saving a large model, calibrating long.

    python -m benchmarks.memory [--parts calibrate,edit] [--size 2600000000] [--json out.json]

Each step runs in a process of its own; the figure is its largest resident set, the Python
interpreter and imports (the ``import`` row) included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Run, run_worker, write_result
from benchmarks.producers import first_line

EDIT_LIMIT_MB = 600.0


def only_import() -> dict[str, Any]:
    """What every other step pays: interpreter, onnx, onnx-ir, numpy."""
    import onnxcompress.model
    import onnxcompress.rewrite  # noqa: F401

    return {}


def copy(model: str, output: str) -> dict[str, Any]:
    """Load, bring to canonical form, save with external data; nothing edited."""
    from onnxcompress.model import load, save

    return {"files": [p.name for p in save(load(model), output, external_data=True)]}


def edit(model: str, output: str) -> dict[str, Any]:
    """Load, replace the weight of the first layer by one of half the magnitude, save."""
    from onnxcompress.model import load, save
    from onnxcompress.rewrite import Rewriter

    loaded = load(model)
    rewriter = Rewriter(loaded)
    (first, *_) = rewriter.view().nodes("MatMul")
    weight = rewriter.view().array(first.inputs[1])
    if weight is None:
        raise TypeError(f"{first.name} has no weight")
    rewriter.set_weight(first, 1, weight * weight.dtype.type(0.5))
    rewriter.drop_unused_weights()
    save(loaded, output, external_data=True)
    return {}


def quantize(model: str, output: str) -> dict[str, Any]:
    """Load, normalise, store every weight as int8, save; nothing is run, as that needs the whole model."""
    from onnxcompress import registry
    from onnxcompress.base import Pass, Skip, Skipped, Stage
    from onnxcompress.model import load, save
    from onnxcompress.passes.quantize import Quantize
    from onnxcompress.profile import load_profile
    from onnxcompress.statistics import Evidence
    from onnxcompress.trial import build
    from onnxcompress.view import GraphView

    loaded, target, done = load(model), load_profile("host-x86-vnni").target(), {}
    tidy: list[Pass] = [cls() for cls in registry.available().values() if cls.stage is Stage.NORMALISE]
    for pass_ in [*tidy, Quantize(modes=("weights",))]:
        view, choices = GraphView(loaded), []
        for site in pass_.sites(view):
            if not isinstance(site, Skipped):
                with contextlib.suppress(Skip):
                    choices += list(pass_.choices(site, view, target))[-1:]
        built = build(loaded, pass_, choices, Evidence())
        loaded, done[pass_.name] = built.model, len(built.made)
    save(loaded, output, external_data=True)
    return {"sites": done}


def calibrate(folder: str, samples: str, method: str) -> dict[str, Any]:
    """One sweep over the feeds in ``folder`` for a histogram of every value, then the ranges."""
    from onnxcompress.calibrate import calibrate as sweep
    from onnxcompress.data import open_data
    from onnxcompress.model import load
    from onnxcompress.models_zoo import get_model, sample_feeds
    from onnxcompress.ranges import clip_range
    from onnxcompress.session import main_values
    from onnxcompress.statistics import Need, RangeMethod

    model = load(get_model(CALIBRATED))
    count = int(samples)
    source = open_data(folder or (lambda: sample_feeds(CALIBRATED, count)), model, limit=count)
    evidence = sweep(model, [Need(name) for name in main_values(model)], source)
    ranges = [clip_range(h, RangeMethod(method)) for h in evidence.histograms.values()]
    return {"samples": evidence.samples, "values": len(ranges)}


CALIBRATED = "gen-cnn"
CALIBRATION_GROWTH = 1.1
FEW, MANY = 32, 512

STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "import": only_import,
    "copy": copy,
    "edit": edit,
    "quantize": quantize,
    "calibrate": calibrate,
}


def step(arguments: Sequence[str]) -> int:
    """Inside the worker: run one step, hand its result back."""
    name, *rest = arguments
    try:
        write_result(STEPS[name](*rest))
    except Exception as error:  # the row tells it
        traceback.print_exc()
        write_result({"error": first_line(error)})
        return 1
    return 0


def line(name: str, run: Run, verdict: str = "") -> str:
    """One row of the table."""
    if run.error or run.peak_mb is None:
        return f"{name:<48} FAILED: {run.error}"
    return f"{name:<48} {run.peak_mb:>8.0f} MB  {run.seconds:>6.1f} s   {verdict}"


def large_model(size: int, folder: Path) -> list[dict[str, Any]]:
    """Editing and saving a model of ``size`` bytes of weights."""
    from onnxcompress.models_zoo import write_external_model

    model = write_external_model(folder / "large.onnx", size, width=4096)
    rows = []
    for name in ("import", "copy", "edit", "quantize"):
        (out := folder / name).mkdir()
        paths = [] if name == "import" else [str(model), str(out / "model.onnx")]
        run = run_worker("benchmarks.memory", "--step", name, *paths)
        written = sum(f.stat().st_size for f in out.iterdir())
        for file in out.iterdir():
            file.unlink()
        met = run.peak_mb is not None and not run.error and (name == "import" or run.peak_mb < EDIT_LIMIT_MB)
        verdict = "" if name == "import" else f"{'PASS' if met else 'MISS'} (under {EDIT_LIMIT_MB:.0f} MB)"
        print(line(f"{name} ({written / 1e9:.2f} GB written)", run, verdict), flush=True)
        rows.append({"step": name, "peak_mb": run.peak_mb, "seconds": run.seconds, "met": met, **run.result})
    return rows


def calibration(folder: Path) -> list[dict[str, Any]]:
    """Peak memory with few and with many samples, for every way to read off ranges."""
    import numpy as np

    from onnxcompress.models_zoo import sample_feeds
    from onnxcompress.statistics import RangeMethod

    for i, feed in enumerate(sample_feeds(CALIBRATED, MANY)):
        np.savez(folder / f"{i:04}.npz", **feed)  # type: ignore[arg-type]  # names may be any
    rows = []
    for where, path in (("folder", str(folder)), ("function", "")):
        for method in RangeMethod:
            few, many = (
                run_worker("benchmarks.memory", "--step", "calibrate", path, str(n), method.value) for n in (FEW, MANY)
            )
            failed = few.error or many.error or few.peak_mb is None or many.peak_mb is None
            growth = 0.0 if failed else (many.peak_mb or 0) / (few.peak_mb or 1)
            met = not failed and growth <= CALIBRATION_GROWTH
            verdict = f"{growth:.3f}x of {few.peak_mb} MB with {FEW}  {'PASS' if met else 'MISS'}"
            print(line(f"calibrate {method.value}, {MANY} samples from a {where}", many, verdict), flush=True)
            rows.append(
                {"step": f"calibrate {method.value} {where}", "few_mb": few.peak_mb, "many_mb": many.peak_mb,
                 "growth": round(growth, 4), "met": met, "error": few.error or many.error}
            )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 when every limit was kept."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--step"]:
        return step(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="calibrate,edit", help="what to measure")
    parser.add_argument("--size", type=float, default=2.6e9, help="bytes of weights of the large model")
    parser.add_argument("--folder", type=Path, help="where the large files may lie for a while")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    if "calibrate" in options.parts:
        with tempfile.TemporaryDirectory(dir=options.folder and options.folder.resolve()) as folder:
            rows += calibration(Path(folder))
    if "edit" in options.parts:
        with tempfile.TemporaryDirectory(dir=options.folder and options.folder.resolve()) as folder:
            rows += large_model(int(options.size), Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(not all(r["met"] for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
