"""The zoo's models, each with its calibration feeds and its task score.

The data cannot be redistributed, so it lies outside this repository: ``ONNXCOMPRESS_ZOO``
names a folder with ``eval/``, ``models/``, ``x/`` (unpacked wheels) and ``data/``. Its
``eval/eval_<name>.py`` scripts define ``MODEL``, ``load_calibration(n)`` and
``evaluate(path, limit)``; nothing here re-implements a score they give.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feed = dict[str, NDArray[Any]]


class BenchmarkError(Exception):
    """The benchmark cannot run as asked."""


@dataclass(frozen=True)
class Task:
    """One model of the zoo.

    Attributes:
        name: As on the command line.
        script: Module under ``eval/``, or of this package.
        metrics: Keys of what ``evaluate`` returns; the first is the score.
        model: Glob under the zoo folder when it is not the script's own ``MODEL``.
        lower_is_better: True for perplexity.
        feeds_per_sample: Feeds that make one calibration sample; a frame of audio is little.
        headline: Counts in the geometric mean of speed-ups.
    """

    name: str
    script: str
    metrics: tuple[str, ...]
    model: str = ""
    lower_is_better: bool = False
    feeds_per_sample: int = 1
    headline: bool = False

    @property
    def script_module(self) -> ModuleType:
        """What computes feeds and scores."""
        folder = str(zoo_folder() / "eval")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        return importlib.import_module(self.script)

    @property
    def path(self) -> Path:
        """The fp32 model."""
        if not self.model:
            return Path(self.script_module.MODEL)
        found = sorted(zoo_folder().glob(self.model))
        if not found:
            raise BenchmarkError(f"no {self.model} in the zoo folder: run its fetch.sh")
        return found[0]

    def feeds(self, samples: int) -> Feeds:
        """``samples`` calibration samples, disjoint from what :meth:`score` uses."""
        count = samples * self.feeds_per_sample
        if self.name == "cls":
            return Feeds(lambda: (_cls_feed(self.script_module, i, True)[0] for i in range(count)))
        return Feeds(lambda: self.script_module.load_calibration(count, str(self.path)))

    def score(self, path: Path, limit: int | None) -> dict[str, float]:
        """Every number the task's evaluation gives for the model at ``path``."""
        if self.name == "cls":
            return _cls_score(self.script_module, path, limit)
        result: dict[str, float] = self.script_module.evaluate(str(path), limit)
        return result

    def ratio(self, score: float, reference: float) -> float:
        """``score`` over ``reference``, above 1 when better."""
        return reference / score if self.lower_is_better else score / reference


@dataclass(frozen=True)
class Feeds:
    """Feed dictionaries that can be gone through again without being held in memory."""

    make: Callable[[], Iterator[Feed]]

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.make())


def zoo_folder() -> Path:
    """The folder ``ONNXCOMPRESS_ZOO`` names."""
    named = os.environ.get("ONNXCOMPRESS_ZOO")
    if not named or not (Path(named) / "eval" / "common.py").is_file():
        raise BenchmarkError("set ONNXCOMPRESS_ZOO to the zoo folder (with eval/, models/, x/ and data/)")
    return Path(named).resolve()


def _cls_feed(ocr: ModuleType, i: int, calibration: bool) -> tuple[Feed, int]:
    """A rendered line, every second one upside down, prepared as rapidocr does."""
    from PIL import Image

    line, _ = ocr.line(i, calibration)
    turned = i % 2
    if turned:
        line = line[::-1, ::-1]
    width = min(192, max(1, -(-48 * line.shape[1] // line.shape[0])))
    scaled = np.asarray(Image.fromarray(line).resize((width, 48), Image.Resampling.BILINEAR), np.float32)
    x = np.zeros((1, 3, 48, 192), np.float32)
    x[..., :width] = (scaled / 255 - 0.5) / 0.5
    return {"x": x}, turned


def _cls_score(ocr: ModuleType, path: Path, limit: int | None) -> dict[str, float]:
    session = ocr.sess(str(path))
    count = limit or 1000
    right = 0
    for i in range(count):
        feed, turned = _cls_feed(ocr, i, False)
        right += int(session.run(None, feed)[0].argmax()) == turned
    return {"accuracy": round(right / count, 4), "n": count}


_OCR_MODELS = "x/rapidocr_onnxruntime-*/rapidocr_onnxruntime/models/"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lite0", "eval_imagenet", ("top1", "top5"), headline=True),
        Task("minilm", "eval_sts", ("spearman",), headline=True),
        Task("det", "eval_textdet", ("hmean", "recall", "precision"), headline=True),
        Task("cls", "eval_ocr", ("accuracy",), model=_OCR_MODELS + "ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        Task("rec", "eval_ocr", ("char_acc", "line_acc"), model=_OCR_MODELS + "ch_PP-OCRv4_rec_infer.onnx"),
        Task("crnn", "eval_ocr", ("char_acc", "line_acc"), headline=True),
        Task("vad", "eval_vad", ("auc", "f1"), feeds_per_sample=16),
        Task("magika", "eval_magika", ("acc",)),
        Task("ssd", "eval_coco", ("map50",)),
        Task("lm", "eval_lm", ("ppl", "top1"), lower_is_better=True),
        Task("crepe", "benchmarks.crepe", ("pitch_accuracy",), model="models/crepe_tiny.onnx"),
    )
}
