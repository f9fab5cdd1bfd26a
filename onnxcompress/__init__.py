"""Makes an ONNX model smaller and faster on a named piece of hardware, and proves it.

import onnxcompress

result = onnxcompress.optimize("model.onnx", profile="cortex-a53", calibration="samples/")
print(result.report.totals)
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxcompress.base import Choice, Pass, Precision, Site, Skip, Skipped, Stage, Term
    from onnxcompress.bundling import Bundle, multiplex
    from onnxcompress.errors import OnnxCompressError
    from onnxcompress.explanation import explain
    from onnxcompress.inspection import compare, inspect, verify
    from onnxcompress.objective import Objective
    from onnxcompress.pipeline import Result, optimize
    from onnxcompress.report import Budget, Report
    from onnxcompress.rewrite import Rewriter
    from onnxcompress.statistics import Evidence, Need, Statistic
    from onnxcompress.target import Target
    from onnxcompress.view import GraphView

__all__ = [
    "Budget",
    "Bundle",
    "Choice",
    "Evidence",
    "GraphView",
    "Need",
    "Objective",
    "OnnxCompressError",
    "Pass",
    "Precision",
    "Report",
    "Result",
    "Rewriter",
    "Site",
    "Skip",
    "Skipped",
    "Stage",
    "Statistic",
    "Target",
    "Term",
    "compare",
    "explain",
    "inspect",
    "multiplex",
    "optimize",
    "verify",
]

__version__ = "0.1.0"

# onnxruntime reports to its maker about every model it loads, and keeps files for that, unless this
# is set before it is imported. Whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Names are loaded when they are first asked for (PEP 562): the whole takes a second to import,
# and most commands need little of it.
_HOMES = {
    "base": ("Choice", "Pass", "Precision", "Site", "Skip", "Skipped", "Stage", "Term"),
    "bundling": ("Bundle", "multiplex"),
    "errors": ("OnnxCompressError",),
    "explanation": ("explain",),
    "inspection": ("compare", "inspect", "verify"),
    "objective": ("Objective",),
    "pipeline": ("Result", "optimize"),
    "report": ("Budget", "Report"),
    "rewrite": ("Rewriter",),
    "statistics": ("Evidence", "Need", "Statistic"),
    "target": ("Target",),
    "view": ("GraphView",),
}


if not TYPE_CHECKING:  # or a type checker would take any name for granted

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                found = getattr(import_module(f"{__name__}.{home}"), name)
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
