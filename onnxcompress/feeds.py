"""What a feed must look like, and the check that it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import DataError, suggest

__all__ = ["Feed", "InputSpec", "checked", "input_specs", "only_input"]

Array = npt.NDArray[Any]
Feed = dict[str, Array]


@dataclass(frozen=True)
class InputSpec:
    """What the model says about one input.

    Attributes:
        name: of the input.
        dtype: numpy type; None where numpy has none or the input is no tensor.
        shape: an int per static axis, a name or None per dynamic one; None if the rank is unknown.
        text: the input holds strings.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
    text: bool = False


def input_specs(model: ir.Model) -> dict[str, InputSpec]:
    """The model's inputs by name, in order."""
    return {str(v.name): _spec(v) for v in model.graph.inputs}


_FEEDABLE = {
    ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
}  # fmt: skip


def _spec(value: ir.Value) -> InputSpec:
    shape = None
    if value.shape is not None:
        shape = tuple(_dim(d if isinstance(d, int) else d.value) for d in value.shape.dims)
    dtype = value.dtype if isinstance(value.type, ir.TensorType) else None
    numpy_type = dtype.numpy() if dtype in _FEEDABLE and dtype is not None else None
    return InputSpec(str(value.name), numpy_type, shape, dtype == ir.DataType.STRING)


def only_input(specs: Mapping[str, InputSpec], kind: str) -> InputSpec:
    if len(specs) != 1:
        raise DataError(
            f"{kind} feed one input, but the model has {len(specs)}: {', '.join(specs)}",
            hint="give .npz files with an array per input",
        )
    return next(iter(specs.values()))


def _dim(dim: int | str | None) -> int | str | None:
    """Exporters write an unknown dimension in several ways: -1, 0, "?" or an invented name."""
    if isinstance(dim, int):
        return dim if dim > 0 else None
    return None if dim is None or dim in ("", "?") or dim.startswith("unk__") else dim


# --- checking ----------------------------------------------------------------------------------


def checked(raw: Any, specs: Mapping[str, InputSpec], sample: int, notes: dict[str, None]) -> Feed:
    if not isinstance(raw, Mapping):
        raise DataError(f"is a {type(raw).__name__}, not a dict of arrays", sample=sample)
    for name in raw:
        if name not in specs:
            raise DataError(
                "the model has no such input", sample=sample, input=str(name), hint=suggest(str(name), specs)
            )
    missing = [name for name in specs if name not in raw]
    if missing:
        raise DataError("is missing", sample=sample, input=missing[0], hint=f"the model reads {', '.join(specs)}")
    return {name: _fitted(raw[name], spec, sample, notes) for name, spec in specs.items()}


def _fitted(value: Any, spec: InputSpec, sample: int, notes: dict[str, None]) -> Any:
    if spec.dtype is None and not spec.text:
        return value  # a sequence, an optional or a type numpy lacks: onnxruntime is the judge
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"cannot be made an array: {error}", sample=sample, input=spec.name) from error
    if array.dtype == object and not spec.text:
        raise DataError("holds Python objects, or rows of unequal length", sample=sample, input=spec.name)
    array = _typed(array, spec, sample, notes)
    _check_shape(array.shape, spec, sample)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        what = "NaN" if np.isnan(array).any() else "infinity"
        raise DataError(f"holds {what}", sample=sample, input=spec.name, hint="remove or repair this sample")
    return array if array.flags.c_contiguous else array.copy(order="C")


def _typed(array: Array, spec: InputSpec, sample: int, notes: dict[str, None]) -> Array:
    if spec.text:
        if array.dtype.kind not in "UOST":
            raise DataError(f"is {array.dtype}, the model reads text", sample=sample, input=spec.name)
        return array.astype(object)
    wanted = spec.dtype
    if wanted is None or array.dtype == wanted:
        return array
    hint = f"convert it to {wanted}, with the model's own preprocessing"
    same_kind = array.dtype.kind == wanted.kind or {array.dtype.kind, wanted.kind} == {"i", "u"}
    if not same_kind:
        raise DataError(f"is {array.dtype}, the model reads {wanted}", sample=sample, input=spec.name, hint=hint)
    with np.errstate(over="ignore"):
        cast = array.astype(wanted)
    if wanted.kind == "f":
        kept = bool(np.array_equal(np.isfinite(array), np.isfinite(cast)))
    else:
        kept = bool(np.array_equal(array, cast))
    if not kept:
        raise DataError(f"is {array.dtype} with values {wanted} cannot hold", sample=sample, input=spec.name, hint=hint)
    notes[f"input {spec.name!r}: {array.dtype} was cast to {wanted}"] = None
    return cast


def _check_shape(shape: tuple[int, ...], spec: InputSpec, sample: int | None) -> None:
    if spec.shape is None:
        return
    wanted = "x".join("?" if not isinstance(d, int) else str(d) for d in spec.shape) or "a scalar"
    given = "x".join(map(str, shape)) or "a scalar"
    if len(shape) != len(spec.shape):
        raise DataError(f"is {given}, the model reads {wanted}", sample=sample, input=spec.name)
    for axis, (have, want) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(want, int) and have != want:
            raise DataError(
                f"is {given}, the model reads {wanted}: axis {axis} must be {want}", sample=sample, input=spec.name
            )
        if have == 0:
            raise DataError(f"is {given}: axis {axis} is empty", sample=sample, input=spec.name)
