"""Makes an ONNX model smaller and faster on a named piece of hardware, and proves it.

import onnxcompress

result = onnxcompress.optimize("model.onnx", profile="cortex-a53", calibration="samples/")
print(result.report.totals)
"""

from __future__ import annotations

from onnxcompress.base import Choice, Pass, Precision, Site, Skip, Skipped, Stage, Term
from onnxcompress.errors import OnnxCompressError
from onnxcompress.inspection import compare, inspect, verify
from onnxcompress.pipeline import Result, optimize
from onnxcompress.report import Budget, Report
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need, Statistic
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = [
    "Budget",
    "Choice",
    "Evidence",
    "GraphView",
    "Need",
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
    "inspect",
    "optimize",
    "verify",
]

__version__ = "0.1.0"
