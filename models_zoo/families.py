"""Model families for structured pruning: the ways channels are tied together, each in a small graph.

Random weights, the same bytes on every machine. ``width`` sets the size; with the default a
model runs in milliseconds.

    >>> from onnxcompress.models_zoo.families import FAMILIES, family_feeds
    >>> model = FAMILIES["resnet"](32)
    >>> [feed["image"].shape for feed in family_feeds("resnet", 2)]
    [(1, 3, 32, 32), (1, 3, 32, 32)]
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
from numpy.random import Generator
from numpy.typing import NDArray

from onnxcompress.errors import ZooError, suggest
from onnxcompress.models_zoo import families_cnn as cnn
from onnxcompress.models_zoo import families_dense as dense
from onnxcompress.models_zoo import families_transformers as transformers
from onnxcompress.models_zoo.building import SEED
from onnxcompress.models_zoo.feeds import Feed, smooth_image

__all__ = ["FAMILIES", "Family", "family_feeds"]


class Family(Protocol):
    """Builds one model of the family; ``width`` is a positive multiple of 8.

    Some take ``depth`` or ``side``, too: see the functions themselves.
    """

    def __call__(self, width: int = ..., *, seed: int = SEED) -> onnx.ModelProto: ...


FAMILIES: dict[str, Family] = {
    "resnet": cnn.resnet,
    "resnet_bn": cnn.resnet_bn,
    "densenet": cnn.densenet,
    "mobilenet_v2": cnn.mobilenet_v2,
    "mobilenet_v3": cnn.mobilenet_v3,
    "shufflenet_v2": cnn.shufflenet_v2,
    "c2f_detector": dense.c2f_detector,
    "unet": dense.unet,
    "vit": transformers.vit,
    "gpt_gqa": transformers.gpt_gqa,
    "bilstm": dense.bilstm,
    "shared_biases": cnn.shared_biases,
    "vgg": cnn.vgg,
    "grouped": cnn.grouped,
    "wavenet1d": dense.wavenet1d,
    "bert": transformers.bert,
}


class _Input(NamedTuple):
    kind: str
    size: int
    """Pixels a side, steps or tokens."""
    fixed: bool = False
    multiple: int = 1
    largest: int | None = None


_IMAGE = _Input("image", 32)
_INPUTS: dict[str, _Input] = {
    "mobilenet_v2": _Input("image", 64),
    "c2f_detector": _Input("image", 64, multiple=16),
    "unet": _Input("image", 32, multiple=4),
    "vit": _Input("image", 32, fixed=True),
    "vgg": _Input("image", 56, fixed=True),
    "gpt_gqa": _Input("tokens", 24, largest=transformers.LONGEST),
    "bert": _Input("masked tokens", 24, largest=transformers.LONGEST),
    "bilstm": _Input("features", 24),
    "wavenet1d": _Input("signal", 64),
}


def family_feeds(name: str, samples: int, seed: int = 0, *, batch: int = 1, size: int | None = None) -> Iterator[Feed]:
    """``samples`` feeds for the models of family ``name``, whatever their width.

    The i-th feed depends on the arguments other than ``samples`` and on ``i`` only.

    Args:
        name: One of ``FAMILIES``.
        samples: How many feeds.
        seed: Other seed, other feeds.
        batch: Examples in one feed.
        size: Pixels a side, steps or tokens where the family leaves that open; each has a default.
            For a model built with another ``side``, that.

    Raises:
        ZooError: Unknown family, ``samples`` is negative, ``batch`` is not positive, or the family
            cannot take ``size``.
    """
    if name not in FAMILIES:
        raise ZooError(f"no model family is called {name!r}", hint=suggest(name, FAMILIES))
    if samples < 0 or batch <= 0:
        raise ZooError(f"cannot make {samples} feeds of batch {batch}")
    made = _INPUTS.get(name, _IMAGE)
    size = made.size if size is None else size
    if made.fixed and size != made.size:
        raise ZooError(f"{name} takes size {made.size} only, not {size}", hint="leave size out")
    if size <= 0 or size % made.multiple or size > (made.largest or size):
        limit = f" up to {made.largest}" if made.largest else ""
        raise ZooError(f"{name} cannot take size {size}", hint=f"give a positive multiple of {made.multiple}{limit}")
    return (
        _feed(np.random.default_rng([seed, i, zlib.crc32(name.encode())]), made.kind, batch, size)
        for i in range(samples)
    )


def _feed(rng: Generator, kind: str, batch: int, size: int) -> Feed:
    if kind == "image":
        # Light and colour differ too: all that is left of a picture behind a random network's mean.
        light = rng.uniform(0.3, 1, (batch, 1, 1, 1)) * np.stack([smooth_image(rng, 3, size) for _ in range(batch)])
        return {"image": (light + rng.normal(0, 0.4, (batch, 3, 1, 1))).astype(np.float32)}
    if kind in ("features", "signal"):
        channels = 24 if kind == "features" else 8
        walk = np.cumsum(rng.normal(0, 0.4, (batch, channels, size)), axis=2)
        return {kind: np.clip(walk, -3, 3).astype(np.float32)}
    ids: NDArray[Any] = rng.integers(1, transformers.VOCABULARY, (batch, size))
    if kind == "tokens":
        return {"input_ids": ids}
    lengths = rng.integers(size // 2 + 1, size + 1, batch)
    mask = (np.arange(size)[None] < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}
