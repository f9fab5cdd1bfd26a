"""Ways to make a smaller model out of an fp32 one, each as its own documentation advises."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.tasks import Feed, Feeds

Producer = Callable[[Path, Path, Feeds, str], str]
"""``(fp32 model, output, calibration, profile) -> remark``."""


def ort_static(model: Path, output: Path, feeds: Feeds, profile: str) -> str:
    """Static, by onnxruntime: MinMax, QDQ, u8 activations, s8 weights, per channel where it can, pre-processed."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[Feed] = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared, remark = prepare(model, Path(folder))

        def quantize(per_channel: bool) -> None:
            quantize_static(
                str(prepared),
                str(output),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )

        try:
            quantize(per_channel=True)
        except Exception as error:  # the rival's own failure; its user would try the simpler form
            quantize(per_channel=False)
            remark = "; ".join(filter(None, [remark, f"per tensor, as per channel raised {first_line(error)}"]))
    return remark


def ort_dynamic(model: Path, output: Path, feeds: Feeds, profile: str) -> str:
    """Dynamic, by onnxruntime, its defaults, on the file as it is."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(model), str(output), weight_type=QuantType.QInt8)
    return ""


def ort_dynamic_prepared(model: Path, output: Path, feeds: Feeds, profile: str) -> str:
    """Dynamic, by onnxruntime, pre-processed as it advises; better on some models, worse on others."""
    with tempfile.TemporaryDirectory() as folder:
        prepared, remark = prepare(model, Path(folder))
        ort_dynamic(prepared, output, feeds, profile)
    return remark


def prepare(model: Path, folder: Path) -> tuple[Path, str]:
    """Opset 13 or later (per-channel needs it), then onnxruntime's own preparation."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    remarks = []
    proto = onnx.load(model)
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < 13:
        proto = onnx.version_converter.convert_version(proto, 17)
        onnx.save(proto, folder / "converted.onnx")
        model = folder / "converted.onnx"
        remarks.append(f"opset {opset} to 17")
    del proto
    prepared = folder / "prepared.onnx"
    attempts: tuple[dict[str, Any], ...] = ({}, {"skip_symbolic_shape": True})
    for options in attempts:
        try:
            quant_pre_process(str(model), str(prepared), **options)
        except Exception as error:  # onnxruntime's symbolic inference gives up on many graphs
            remarks.append(f"pre-process{options or ''}: {first_line(error)}")
        else:
            return prepared, "; ".join(remarks)
    return model, "; ".join([*remarks, "not pre-processed"])


def onnxcompress(model: Path, output: Path, feeds: Feeds, profile: str) -> str:
    """This project, with the default budget."""
    import onnxcompress as library

    library.optimize(model, profile=profile, calibration=feeds, output=output)
    return ""


def first_line(error: BaseException) -> str:
    """Type and first line of what an exception says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]


PRODUCERS: dict[str, Producer] = {
    "ort-static": ort_static,
    "ort-dynamic": ort_dynamic,
    "ort-dynamic-prepared": ort_dynamic_prepared,
    "onnxcompress": onnxcompress,
}
