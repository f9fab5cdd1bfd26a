"""Peak memory of the steps that must not grow: editing and saving a large model, calibrating long.

    python -m benchmarks.memory [--size 2600000000] [--json out.json]

Each step runs in a process of its own; the figure is its largest resident set, the Python
interpreter and imports (the ``import`` row) included.
"""

from __future__ import annotations

import argparse
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


STEPS: dict[str, Callable[..., dict[str, Any]]] = {"import": only_import, "copy": copy, "edit": edit}


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


def line(name: str, run: Run, limit: float | None = None) -> str:
    """One row of the table."""
    if run.error or run.peak_mb is None:
        return f"{name:<44} FAILED: {run.error}"
    verdict = "" if limit is None else f"   {'PASS' if run.peak_mb < limit else 'MISS'} (under {limit:.0f} MB)"
    return f"{name:<44} {run.peak_mb:>8.0f} MB  {run.seconds:>6.1f} s{verdict}"


def large_model(size: int, folder: Path) -> list[dict[str, Any]]:
    """The steps on a model of ``size`` bytes of weights."""
    from onnxcompress.models_zoo import write_external_model

    model = write_external_model(folder / "large.onnx", size, width=4096)
    rows = []
    for name, limit in (("import", None), ("copy", EDIT_LIMIT_MB), ("edit", EDIT_LIMIT_MB)):
        (out := folder / name).mkdir()
        paths = [] if name == "import" else [str(model), str(out / "model.onnx")]
        run = run_worker("benchmarks.memory", "--step", name, *paths)
        written = sum(f.stat().st_size for f in out.iterdir())
        for file in out.iterdir():
            file.unlink()
        print(line(f"{name} ({written / 1e9:.2f} GB written)", run, limit), flush=True)
        rows.append({"step": name, "peak_mb": run.peak_mb, "seconds": run.seconds, "written": written, **run.result})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 when every limit was kept."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--step"]:
        return step(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=2.6e9, help="bytes of weights of the large model")
    parser.add_argument("--folder", type=Path, help="where the large files may lie for a while")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = large_model(int(options.size), Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("error" in r or (r["step"] != "import" and (r["peak_mb"] or 0) >= EDIT_LIMIT_MB) for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
