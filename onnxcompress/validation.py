"""How far a profile is from measured milliseconds.

Errors are relative: ``|predicted / measured - 1|``. Each is given twice: as predicted (``mape_raw``), and
after one scalar for each device (``mape``), which takes out what the profile cannot know about a board:
its clock under load, memory, cooling, version of the runtime. The scalar is the one with the least mean
relative error over the rows of its device. That is a weighted median of ``measured / predicted`` with
weights ``predicted / measured``, for ``|s p / m - 1| = (p / m) |s - m / p|``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcompress.errors import MeasurementError, OnnxCompressError
from onnxcompress.inspection import inspect
from onnxcompress.instructions import instructions_of, seconds
from onnxcompress.measurements import Measurement, Measurements, read_measurements
from onnxcompress.model import load
from onnxcompress.profile import Profile

__all__ = ["DeviceError", "RowError", "Validation", "best_scalar", "validate"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowError:
    """One measurement and its prediction.

    Attributes:
        line: of the file.
        device: what was measured.
        model: which model.
        precision: how, if the file says.
        measured_ms: milliseconds measured.
        predicted_ms: milliseconds predicted, without the scalar.
        error: signed relative error after the scalar; above 0 is predicted too slow.
        error_raw: the same without.
    """

    line: int
    device: str
    model: str
    precision: str
    measured_ms: float
    predicted_ms: float
    error: float
    error_raw: float


@dataclass(frozen=True)
class DeviceError:
    """The rows of one device.

    Attributes:
        device: its name in the file.
        n: rows.
        scalar: measured over predicted that fits the rows best.
        mape: mean absolute relative error after the scalar.
        mape_raw: the same without.
        worst: the model with the largest error after the scalar.
        worst_error: that error, signed.
    """

    device: str
    n: int
    scalar: float
    mape: float
    mape_raw: float
    worst: str
    worst_error: float


@dataclass(frozen=True)
class Validation:
    """A profile against a file of measurements.

    Attributes:
        profile: name of the profile.
        against: the file.
        kind: ``instructions`` or ``models``.
        n: rows compared.
        mape: mean absolute relative error over all rows, after one scalar for each device.
        mape_raw: the same without scalars.
        devices: by device.
        rows: in the order of the file.
        other_cores: rows left out because they name another core.
        ignored_columns: columns that were not used.
        guessed_shapes: models with inputs of open extent and no shapes in the file; made-up ones were taken.
    """

    profile: str
    against: Path
    kind: str
    n: int
    mape: float
    mape_raw: float
    devices: tuple[DeviceError, ...]
    rows: tuple[RowError, ...]
    other_cores: int = 0
    ignored_columns: tuple[str, ...] = ()
    guessed_shapes: tuple[str, ...] = ()


def validate(profile: Profile, against: Path) -> Validation:
    """Compares a profile with measured milliseconds.

    Args:
        profile: the device.
        against: a CSV; :mod:`onnxcompress.measurements` says which columns it has.

    Raises:
        MeasurementError: the file is wrong, or has no row for this profile.
        ProfileError: counts of instructions are to be priced and the profile has no prices for them.
    """
    found = read_measurements(against)
    rows = _of_core(profile, found) if found.instructions else found.rows
    predicted = [
        _by_counts(profile, row, against) if found.instructions else _by_nodes(profile, row, against) for row in rows
    ]
    names = list(dict.fromkeys(row.device for row in rows))
    scalars = {
        name: best_scalar(
            [p for p, row in zip(predicted, rows, strict=True) if row.device == name],
            [row.measured_ms for row in rows if row.device == name],
        )
        for name in names
    }
    errors = tuple(
        RowError(
            row.line, row.device, row.model, row.precision, row.measured_ms, p,
            scalars[row.device] * p / row.measured_ms - 1, p / row.measured_ms - 1,
        )
        for p, row in zip(predicted, rows, strict=True)
    )  # fmt: skip
    return Validation(
        profile=profile.name,
        against=against,
        kind="instructions" if found.instructions else "models",
        n=len(errors),
        mape=_mean(errors),
        mape_raw=_mean(errors, raw=True),
        devices=tuple(_device(name, scalars[name], [e for e in errors if e.device == name]) for name in names),
        rows=errors,
        other_cores=len(found.rows) - len(rows),
        ignored_columns=found.ignored,
        guessed_shapes=() if found.instructions else tuple(r.model for r in rows if _guessed(r, against)),
    )


def best_scalar(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """The factor on predictions with the least mean relative error.

    Args:
        predicted: positive, one for each measurement.
        measured: positive.

    Example:
        >>> best_scalar([1.0, 2.0, 4.0], [3.0, 6.0, 100.0])
        3.0
    """
    ratios = np.asarray(measured, float) / np.asarray(predicted, float)
    order = np.argsort(ratios, kind="stable")
    weights = np.cumsum(1 / ratios[order])
    return float(ratios[order][np.searchsorted(weights, weights[-1] / 2)])


def _of_core(profile: Profile, found: Measurements) -> tuple[Measurement, ...]:
    core = instructions_of(profile).core
    rows = tuple(row for row in found.rows if row.core in ("", core))
    if not rows:
        others = ", ".join(sorted({row.core for row in found.rows}))
        raise MeasurementError(
            f"has no row of core {core}, which {profile.name} prices, only of {others}",
            path=found.path,
            hint="the column core says which rows belong to which core",
        )
    return rows


def _by_counts(profile: Profile, row: Measurement, path: Path) -> float:
    predicted = 1e3 * seconds(profile, row.counts, ghz=row.ghz)
    if predicted <= 0:
        raise MeasurementError(
            f"{row.model} has no instruction that {profile.name} gives a price", path=path, line=row.line
        )
    return predicted


def _by_nodes(profile: Profile, row: Measurement, against: Path) -> float:
    path = Path(row.model)
    path = path if path.is_absolute() else against.parent / path
    logger.info("predicting %s", path)
    try:
        predicted = 1e3 * inspect(path, profile=profile, shapes=row.shapes).seconds
    except OnnxCompressError as error:
        raise MeasurementError(error.message, path=against, line=row.line, hint=error.hint) from error
    if predicted <= 0:
        raise MeasurementError(f"{row.model} has no node that costs anything", path=against, line=row.line)
    return predicted


def _guessed(row: Measurement, against: Path) -> bool:
    """Whether a model has inputs of open extent that the file says nothing about."""
    inputs = load(against.parent / row.model).graph.inputs  # an absolute path stays what it is
    open_ended = (v.name for v in inputs if v.shape is None or not all(isinstance(d, int) for d in v.shape))
    return any(name not in row.shapes for name in open_ended)


def _mean(errors: Sequence[RowError], *, raw: bool = False) -> float:
    return float(np.mean([abs(e.error_raw if raw else e.error) for e in errors]))


def _device(name: str, scalar: float, errors: Sequence[RowError]) -> DeviceError:
    worst = max(errors, key=lambda e: abs(e.error))
    return DeviceError(name, len(errors), scalar, _mean(errors), _mean(errors, raw=True), worst.model, worst.error)
