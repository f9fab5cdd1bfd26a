"""CREPE has no labelled audio here, so it hears tones whose pitch is known: harmonics in noise, made from a seed.

A tone has 4 to 12 harmonics with random phases; their amplitudes fall with the frequency at a random rate and
scatter. White noise is added at a random one of :data:`NOISE_DB` decibels below it. Frames are normalised as CREPE
wants them. The score is the raw pitch accuracy: the share of frames whose pitch is at most 50 cents off. It has a
known truth, so it tells how much of the network's skill is left; it says nothing of real voices or instruments.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from benchmarks.measure import session

Array = npt.NDArray[Any]

RATE, FRAME = 16000, 1024
NOISE_DB = (20.0, 5.0, 0.0, -5.0)
"""Tone over noise: easy, and three where something is lost already, so that there is room to fall."""
PITCHES = (60.0, 800.0)
"""Hz, drawn evenly in cents."""
RIGHT_CENTS = 50.0
BATCH = 16
"""Frames of a calibration feed."""
EVALUATED = 4096

_CALIBRATION, _EVALUATION = 1, 2  # seeds
_BINS = 20 * np.arange(360) + 1997.3794084376191  # cents over 10 Hz
_AROUND = 4


def cents(hertz: Array) -> Array:
    """Over 10 Hz."""
    return np.asarray(1200 * np.log2(hertz / 10))


def tones(count: int, seed: int, first: int = 0) -> tuple[Array, Array, Array]:
    """Frames, the pitch of each in cents over 10 Hz, and by how many dB it is louder than its noise.

    Args:
        count: how many.
        seed: of all of them.
        first: number of the first; frame n is the same whatever comes with it.
    """
    frames = np.empty((count, FRAME), np.float32)
    pitches, ratios = np.empty(count), np.empty(count)
    low, high = cents(np.array(PITCHES))
    time = np.arange(FRAME) / RATE
    for i in range(count):
        rng = np.random.default_rng((seed, first + i))
        pitches[i] = rng.uniform(low, high)
        ratios[i] = NOISE_DB[(first + i) % len(NOISE_DB)]
        hertz = 10 * 2 ** (pitches[i] / 1200)
        harmonics = np.arange(1, int(rng.integers(4, 13)) + 1)
        harmonics = harmonics[harmonics * hertz < 0.45 * RATE]
        sizes = harmonics ** -rng.uniform(0.5, 1.5) * rng.uniform(0.3, 1, len(harmonics))
        phases = rng.uniform(0, 2 * np.pi, len(harmonics))
        tone = sizes @ np.sin(2 * np.pi * hertz * np.outer(harmonics, time) + phases[:, None])
        noise = rng.standard_normal(FRAME)
        heard = tone / np.sqrt(np.mean(tone**2)) + noise * 10 ** (-ratios[i] / 20)
        frames[i] = (heard - heard.mean()) / heard.std()
    return frames, pitches, ratios


def heard_cents(activation: Array) -> Array:
    """The pitch of each row of 360 bins: their mean around the largest, weighed by the activation."""
    best = activation.argmax(1)
    near = np.abs(np.arange(activation.shape[1]) - best[:, None]) <= _AROUND
    weights = np.where(near, activation.astype(np.float64), 0.0)
    return np.asarray(weights @ _BINS / np.maximum(weights.sum(1), 1e-30))


def load_calibration(count: int, model: str) -> Iterator[dict[str, Array]]:
    """Feeds of :data:`BATCH` frames; their seed is not that of the evaluation."""
    for i in range(count):
        yield {"frames": tones(BATCH, _CALIBRATION, i * BATCH)[0]}


def evaluate(path: str | ort.InferenceSession, limit: int | None = None) -> dict[str, float]:
    """Raw pitch accuracy over all frames and by their noise."""
    runner = path if isinstance(path, ort.InferenceSession) else session(Path(path), threads=2)
    frames, pitches, ratios = tones(limit or EVALUATED, _EVALUATION)
    found = np.concatenate([heard_cents(runner.run(None, {"frames": part})[0]) for part in _batches(frames)])
    right = np.abs(found - pitches) <= RIGHT_CENTS
    by_noise = {f"at_{d:g}_db": round(float(right[ratios == d].mean()), 4) for d in NOISE_DB if (ratios == d).any()}
    return {"pitch_accuracy": round(float(right.mean()), 4), **by_noise, "n": len(right)}


def _batches(frames: Array, size: int = 64) -> Iterator[Array]:
    for start in range(0, len(frames), size):
        yield frames[start : start + size]
