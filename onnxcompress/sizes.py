"""How many bytes a model takes on disk and over the wire."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import zstandard

from onnxcompress import model as models

__all__ = ["ZSTD_LEVEL", "FileSize", "file_size", "model_size"]

ZSTD_LEVEL = 3
_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileSize:
    """Bytes of a model with its external data.

    Attributes:
        raw: on disk.
        zstd: compressed with zstd at level 3.
    """

    raw: int
    zstd: int


def file_size(*files: Path) -> FileSize:
    """Sizes of files that make up one model; read in pieces."""
    raw = packed = 0
    for file in files:
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                raw += len(chunk)
                packed += len(compressor.compress(chunk))
        packed += len(compressor.flush())
    return FileSize(raw, packed)


def model_size(model: ir.Model) -> FileSize:
    """Sizes the model would have as files."""
    with models.temporary_file(model) as path:  # with its external data, if it needs any
        return file_size(*sorted(path.parent.iterdir()))
