"""onnxruntime CPU sessions: the one place that opens them.

A session can show values inside the main graph as extra outputs. The model itself is never
changed: the outputs are added to a clone, which shares the weights.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from onnxcompress.errors import ModelReadError, ModelRunError
from onnxcompress.model import clone, serialize, source, temporary_file, weight_bytes

__all__ = ["Runner", "exposed", "main_values"]

if os.environ.get("ORT_DISABLE_TELEMETRY") != "0":
    ort.disable_telemetry_events()  # if it was imported before us, the variable came too late for it

_IN_MEMORY = 256_000_000
"""Bytes of weights up to which a model is handed to onnxruntime as bytes and not as a file."""


def main_values(model: ir.Model) -> dict[str, ir.Value]:
    """Every value a node of the main graph makes, by name."""
    return {str(v.name): v for node in model.graph for v in node.outputs if v.name}


def exposed(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A clone whose outputs are the model's own plus ``names``; names it does not have are left out."""
    copy = clone(model)
    values = main_values(copy)
    present = {str(v.name) for v in copy.graph.outputs}
    for name in dict.fromkeys(names):
        if name in values and name not in present:
            copy.graph.outputs.append(values[name])
    return copy


class Runner:
    """A model loaded in onnxruntime on the CPU.

    Args:
        model: a model, or the file of one (which is then run exactly as it is on disk).
        threads: intra-op threads; by default as many as this process may use.
        outputs: names of values to return; graph outputs or values of the main graph. By default
            the graph's outputs.
        optimize: let onnxruntime fuse and fold; off it runs the graph node by node.
        spinning: its idle threads wait for work by spinning. That is the faster way on idle cores, and
            the slower one where other threads of ours could use them.

    Raises:
        ModelRunError: onnxruntime cannot load it, or a name in ``outputs`` is not there.
    """

    def __init__(
        self,
        model: ir.Model | str | os.PathLike[str],
        *,
        threads: int | None = None,
        outputs: Collection[str] | None = None,
        optimize: bool = True,
        spinning: bool = True,
    ) -> None:
        self.threads = threads or _available_cores()
        self.path = source(model) if isinstance(model, ir.Model) else Path(model)
        self._model, self._optimize, self._spinning = model, optimize, spinning
        self._session, count = self._open(model, outputs or (), optimize)
        types = {o.name: o.type for o in self._session.get_outputs()}
        self.ends: tuple[str, ...] = tuple(types)[:count]
        """Names of the graph's own outputs."""
        self.outputs: tuple[str, ...] = tuple(outputs if outputs is not None else types)
        missing = [name for name in self.outputs if name not in types]
        if missing:
            raise ModelRunError("there is no such value in the main graph", path=self.path, tensor=missing[0])
        self.types: Mapping[str, str] = {name: types[name] for name in self.outputs}
        """onnxruntime's type of each output, such as ``tensor(float)``."""

    def run(self, feed: Mapping[str, Any], names: Collection[str] | None = None) -> dict[str, Any]:
        """One run.

        Args:
            feed: an array per graph input.
            names: some of ``outputs``; all by default.

        Returns:
            An array per output; a list where the output is a sequence.

        Raises:
            ModelRunError: onnxruntime refuses the feed or fails in a node.
        """
        wanted = list(self.outputs if names is None else names)
        if not wanted:
            return {}
        try:
            return dict(zip(wanted, self._session.run(wanted, dict(feed)), strict=True))
        except Exception as error:  # onnxruntime has a dozen unrelated exception classes
            raise ModelRunError(
                f"onnxruntime cannot run it: {_reason(error)}",
                path=self.path,
                hint="does the data fit the model's inputs?",
            ) from error

    def available(self) -> set[str]:
        """Names of all values it could show: graph outputs and values of the main graph."""
        return {*self.ends, *main_values(self._model if isinstance(self._model, ir.Model) else ir.load(self._model))}

    def showing(self, outputs: Collection[str]) -> Runner:
        """The same model with other outputs, in a session of its own."""
        return Runner(
            self._model, threads=self.threads, outputs=outputs, optimize=self._optimize, spinning=self._spinning
        )

    def _open(
        self, model: ir.Model | str | os.PathLike[str], extra: Collection[str], optimize: bool
    ) -> tuple[ort.InferenceSession, int]:
        """The session, and how many of its outputs are the graph's own."""
        if not isinstance(model, ir.Model):
            if not Path(model).is_file():
                raise ModelReadError("there is no such file", path=Path(model))
            session = self._session_of(str(model), optimize)
            known = {o.name for o in session.get_outputs()}
            if known.issuperset(extra):
                return session, len(known)
            model = ir.load(model)
        count = len(model.graph.outputs)
        model = exposed(model, extra) if extra else model
        if weight_bytes(model) <= _IN_MEMORY:
            return self._session_of(serialize(model), optimize), count
        with temporary_file(model) as file:
            return self._session_of(str(file), optimize), count

    def _session_of(self, model: str | bytes, optimize: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it raises says it all
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        if not self._spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen unrelated exception classes
            raise ModelRunError(f"onnxruntime cannot load it: {_reason(error)}", path=self.path) from error


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reason(error: Exception) -> str:
    """The first line of the message, without onnxruntime's decoration."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0].removeprefix("[ONNXRuntimeError] : ")
