"""Inputs for zoo models, made from a seed; nothing is downloaded and no data set is included.

None of the packages the zoo knows carries test images or recordings, so these stand in:
fitting for ranges and smoke tests, not for accuracy claims. Magika is the exception: it
reads real files, those of the Python installation in use.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from onnxcompress.errors import ZooError
from onnxcompress.models_zoo.recipes import find_model

__all__ = ["Feed", "sample_feeds", "smooth_image"]

Feed = dict[str, NDArray[Any]]
Pixels = NDArray[np.uint8]

_WORDS = str.split(
    "invoice total river seven Boulder market 2048 winter the quiet engine Table of reading "
    "copper 19.50 figure Lisbon answer north window paper 7731 planet under garden School early"
)


def sample_feeds(name: str, n: int, seed: int = 0) -> Iterator[Feed]:
    """``n`` feed dictionaries for the zoo model ``name``, one run each.

    The i-th feed depends on ``name``, ``seed`` and ``i`` only, except for recurrent models,
    whose feeds follow on from each other.

    Raises:
        ZooError: Unknown model, a model without feeds, or ``n`` is negative.
    """
    model = find_model(name)
    if model.name not in _FEEDS:
        raise ZooError(
            f"the zoo has no sample inputs for {name}",
            hint=f"it takes {'; '.join(map(str, model.inputs))}: {model.preprocessing}",
        )
    if n < 0:
        raise ZooError(f"cannot make {n} feeds")
    return _feeds(model.name, n, seed)


def _feeds(name: str, n: int, seed: int) -> Iterator[Feed]:
    make = _FEEDS[name]
    state = np.zeros((2, 1, 128), np.float32)
    for i in range(n):
        feed = make(np.random.default_rng([seed, i, zlib.crc32(name.encode())]), i)
        if "state" in feed:
            # Without running the model there is no true state; one that fades in from zero
            # keeps to the range a trained cell stays in.
            state = np.tanh(0.9 * state + feed["state"]).astype(np.float32)
            feed["state"] = state
        yield feed


def smooth_image(rng: Generator, channels: int, side: int) -> NDArray[np.float32]:
    """An image of slow waves with a little noise, in [-1, 1], as CHW."""
    y, x = np.mgrid[0:side, 0:side] / side
    image = np.zeros((channels, side, side))
    for _ in range(6):
        fy, fx, phase = rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0, 6.3)
        image += rng.normal(0, 0.4, (channels, 1, 1)) * np.sin(6.28 * (fy * y + fx * x) + phase)
    return np.clip(image + rng.normal(0, 0.05, image.shape), -1, 1).astype(np.float32)


def _cnn(rng: Generator, i: int) -> Feed:
    return {"image": smooth_image(rng, 3, 64)[None]}


def _transformer(rng: Generator, i: int) -> Feed:
    lengths = rng.integers(4, 33, 4)
    mask = (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(1, 512, mask.shape) * mask, "attention_mask": mask}


def _lstm(rng: Generator, i: int) -> Feed:
    steps = int(rng.integers(8, 33))
    walk = np.cumsum(rng.normal(0, 0.4, (1, steps, 24)), axis=1)
    return {"sequence": np.clip(walk, -3, 3).astype(np.float32)}


def _if(rng: Generator, i: int) -> Feed:
    return {"x": rng.normal(0, 1, (4, 32)).astype(np.float32), "wide": np.array(i % 2 == 0)}


def _external(rng: Generator, i: int) -> Feed:
    return {"x": rng.normal(0, 1, (1, 1024)).astype(np.float32)}


def _magika(rng: Generator, i: int) -> Feed:
    files = _stdlib_files()
    content = files[int(rng.integers(len(files)))].read_bytes()
    block = min(4096, len(content))
    head, tail = content[:block].lstrip()[:1024], content[len(content) - block :].rstrip()[-1024:]
    row = np.full(2048, 256, np.int32)
    row[: len(head)] = list(head)
    row[2048 - len(tail) :] = list(tail)
    return {"bytes": row[None]}


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    kinds = (".py", ".pyc", ".so", ".txt", ".pyi", ".toml", ".a", ".h")
    shallow = [*root.glob("*"), *root.glob("*/*")]
    found = sorted(p for p in shallow if p.suffix in kinds and p.is_file() and p.stat().st_size > 64)
    if not found:
        raise ZooError(f"no files to sample under {root}", hint="pass calibration data of your own")
    return found


def _vad(rng: Generator, i: int) -> Feed:
    n, rate = 576, 16000
    t = np.arange(n) / rate + i * 512 / rate
    loud = 0.5 * (1 + np.sin(2 * np.pi * 3 * t)) * (np.sin(2 * np.pi * 0.4 * t) > 0)
    voice = sum(
        np.exp(-(((k * 140 - formant) / 350) ** 2)) * np.sin(2 * np.pi * 140 * k * t)
        for k in range(1, 25)
        for formant in (600, 1700, 2600)
    )
    sound = 0.1 * loud * voice + rng.normal(0, 0.01, n)
    return {
        "input": np.clip(sound, -1, 1).astype(np.float32)[None],
        "state": rng.normal(0, 0.1, (2, 1, 128)).astype(np.float32),
        "sr": np.array(rate, np.int64),
    }


def _music(rng: Generator, i: int) -> Feed:
    t = np.arange(43844) / 22050
    sound = rng.normal(0, 0.002, t.shape)
    for _ in range(6):
        start, pitch = rng.uniform(0, 1.6), 110 * 2 ** (rng.integers(0, 37) / 12)
        since = np.maximum(t - start, 0)
        for k in range(1, 6):
            sound += (since > 0) * np.exp(-3 * k * since) * np.sin(2 * np.pi * k * pitch * since) / 8 / k
    return {"serving_default_input_2:0": np.clip(sound, -1, 1).astype(np.float32)[None, :, None]}


def _page(rng: Generator, height: int, width: int, lines: int) -> Pixels:
    """``lines`` lines of words in a shaded RGB image of ``height`` x ``width``."""
    from PIL import Image, ImageDraw, ImageFont  # only these feeds need it

    ground = tuple(int(v) for v in rng.integers(150, 256, 3))
    picture = Image.new("RGB", (width, height), ground)
    pen, pitch = ImageDraw.Draw(picture), height / lines
    for line in range(lines):
        size = float(rng.uniform(0.45, 0.75) * pitch)
        text = " ".join(rng.choice(_WORDS, int(rng.integers(1, 5))))
        ink = tuple(int(v) for v in rng.integers(0, 100, 3))
        at = (float(rng.uniform(0.01, 0.2) * width), (line + 0.1) * pitch)
        pen.text(at, text, font=ImageFont.load_default(size), fill=ink)
    shade = np.linspace(0, rng.uniform(-40, 20), width)[None, :, None]
    noisy = np.asarray(picture) + shade + rng.normal(0, rng.uniform(0, 8), (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _nchw(image: Pixels, mean: float | list[float], std: float | list[float]) -> NDArray[np.float32]:
    scaled = (image.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)


def _det(rng: Generator, i: int) -> Feed:
    page = _page(rng, 480, 640, int(rng.integers(6, 14)))
    return {"x": _nchw(page, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}


def _rec(rng: Generator, i: int) -> Feed:
    return {"x": _nchw(_page(rng, 48, 320, 1), 0.5, 0.5)}


def _cls(rng: Generator, i: int) -> Feed:
    line = _page(rng, 48, 192, 1)
    return {"x": _nchw(line[::-1, ::-1] if i % 2 else line, 0.5, 0.5)}


_FEEDS: dict[str, Callable[[Generator, int], Feed]] = {
    "ppocr-v4-det": _det,
    "ppocr-v4-rec": _rec,
    "ppocr-cls": _cls,
    "silero-vad": _vad,
    "silero-vad-op15": _vad,
    "magika": _magika,
    "basic-pitch": _music,
    "gen-cnn": _cnn,
    "gen-transformer": _transformer,
    "gen-lstm": _lstm,
    "gen-if": _if,
    "gen-external": _external,
}
