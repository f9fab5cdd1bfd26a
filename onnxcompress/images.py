"""Images as model inputs, by a stated preprocessing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from onnxcompress.errors import DataError, suggest

__all__ = ["IMAGE_SUFFIXES", "Preprocess", "read_image"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_RESIZE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_EXAMPLE = "size=224,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225"


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input: resize, crop, channels, then ``(pixel * scale - mean) / std``.

    Written ``key=value`` with commas, for example
    ``size=224,layout=NCHW,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,crop=center:0.875``.

    Attributes:
        size: ``224`` or ``HEIGHTxWIDTH``; by default the model's static size, or else the picture's own.
        layout: ``NCHW`` or ``NHWC``; by default what the model's input looks like.
        scale: a number or a fraction such as ``1/255``.
        mean: one number, or one per channel with colons.
        std: the same.
        resize: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos`` or ``box``.
        crop: ``none`` squeezes the picture to size; ``center`` resizes its short side to size and
            cuts out the middle; ``center:0.875`` resizes it to size / 0.875 first.
        channels: ``RGB``, ``BGR`` or ``L`` (grey).
    """

    size: tuple[int, int] | None = None
    layout: str = "NCHW"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: str = "bilinear"
    crop: float | None = None
    channels: str = "RGB"
    dtype: str = "float32"

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown["size"] = "x".join(map(str, self.size)) if self.size else "own"
        shown["mean"], shown["std"] = (":".join(f"{v:g}" for v in part) for part in (self.mean, self.std))
        shown["scale"] = f"{self.scale:g}"
        shown["crop"] = "none" if self.crop is None else f"center:{self.crop:g}"
        return ",".join(f"{key}={value}" for key, value in shown.items())

    @classmethod
    def parse(
        cls,
        text: str | None,
        shape: tuple[int | str | None, ...] | None,
        dtype: np.dtype[Any] | None,
        *,
        name: str = "",
    ) -> Preprocess:
        """Reads the text form; what it leaves open comes from the input's shape and type.

        Raises:
            DataError: a key or value is wrong, the input is no picture, or a float input comes with
                no preprocessing at all (guessing it would calibrate on wrong ranges).
        """
        if shape is None or len(shape) != 4 or dtype is None:
            raise DataError("pictures need an input of rank 4 with a known type", input=name)
        if text is None and dtype.kind == "f":
            raise DataError(
                "pictures need a stated preprocessing, or the value ranges are wrong",
                input=name,
                hint=f"for example preprocess={_EXAMPLE!r}",
            )
        given = _pairs(text or "")
        layout = _one_of("layout", given.get("layout"), ("NCHW", "NHWC"), _layout(shape))
        channel, spatial = (1, shape[2:4]) if layout == "NCHW" else (3, shape[1:3])
        grey = shape[channel] == 1
        how = cls(
            size=_size(given.get("size"), spatial),
            layout=layout,
            scale=_number("scale", given.get("scale", "1")),
            mean=_numbers("mean", given.get("mean", "0")),
            std=_numbers("std", given.get("std", "1")),
            resize=_one_of("resize", given.get("resize"), tuple(_RESIZE), "bilinear"),
            crop=_crop(given.get("crop", "none")),
            channels=_one_of("channels", given.get("channels"), ("RGB", "BGR", "L"), "L" if grey else "RGB"),
            dtype=dtype.name,
        )
        count = 1 if how.channels == "L" else 3
        for key, values in (("mean", how.mean), ("std", how.std)):
            if len(values) not in (1, count):
                raise DataError(f"preprocess: {key} has {len(values)} values for {count} channels")
        if any(v == 0 for v in how.std):
            raise DataError("preprocess: std is zero")
        return how


def read_image(path: Path, how: Preprocess) -> npt.NDArray[Any]:
    """One picture as an input of batch size 1, ``(1, C, H, W)`` or ``(1, H, W, C)``."""
    try:
        with Image.open(path) as file:
            image = file.convert("L" if how.channels == "L" else "RGB")
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large a picture: {error}") from error
    if how.size is not None:
        image = _resized(image, how.size, how)
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if how.channels == "BGR":
        array = array[:, :, ::-1]
    if (how.scale, how.mean, how.std) != (1.0, (0.0,), (1.0,)):
        scaled = array.astype(np.float32) * np.float32(how.scale)
        array = (scaled - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    dtype = np.dtype(how.dtype)
    if dtype.kind in "iu" and array.dtype.kind == "f":
        array = np.clip(np.rint(array), np.iinfo(dtype).min, np.iinfo(dtype).max)
    if how.layout == "NCHW":
        array = array.transpose(2, 0, 1)
    return np.ascontiguousarray(array, dtype)[None]


def _resized(image: Image.Image, size: tuple[int, int], how: Preprocess) -> Image.Image:
    height, width = size
    method = _RESIZE[how.resize]
    if how.crop is None:
        return image.resize((width, height), method)
    factor = max(height / image.height, width / image.width) / how.crop
    scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.resize(scaled, method).crop((left, top, left + width, top + height))


# --- the text form -----------------------------------------------------------------------------


def _pairs(text: str) -> dict[str, str]:
    known = [f.name for f in fields(Preprocess) if f.name != "dtype"]
    pairs: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or key not in known:
            raise DataError(f"preprocess: {part!r} is not understood", hint=suggest(key, known))
        pairs[key] = value.strip()
    return pairs


def _layout(shape: tuple[int | str | None, ...]) -> str:
    return "NHWC" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "NCHW"


def _one_of(key: str, value: str | None, known: tuple[str, ...], default: str) -> str:
    if value is None:
        return default
    for option in known:
        if value.lower() == option.lower():
            return option
    raise DataError(f"preprocess: {key}={value} is not known", hint=suggest(value, known))


def _number(key: str, value: str) -> float:
    top, slash, bottom = value.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"preprocess: {key}={value} is not a number", hint="write 0.5 or 1/255") from error


def _numbers(key: str, value: str) -> tuple[float, ...]:
    return tuple(_number(key, part) for part in value.split(":"))


def _size(value: str | None, spatial: tuple[int | str | None, ...]) -> tuple[int, int] | None:
    height, width = spatial
    if value is None:
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise DataError(f"preprocess: size={value} is not understood", hint="write 224 or 224x320 (height x width)")
    return int(parts[0]), int(parts[-1])


def _crop(value: str) -> float | None:
    kind, colon, fraction = value.partition(":")
    if kind == "none" and not colon:
        return None
    if kind != "center":
        raise DataError(f"preprocess: crop={value} is not known", hint="none, center or center:0.875")
    number = _number("crop", fraction) if colon else 1.0
    if not 0 < number <= 1:
        raise DataError(f"preprocess: crop={value}: the fraction must be above 0 and at most 1")
    return number
