"""Writing a kit: what :func:`~onnxcompress.fitting.measuring.measure` times, for a device that only has onnxruntime.

A kit holds the graphs of all chains and networks, a manifest, and the script that runs them. Their weights, some
gigabytes of random numbers, are not in it: of each tensor the manifest has the quantiles of its values, and the
script draws others from these. So what runs on the device has weights of the same size and spread, each in memory
of its own, as it would have here, and the kit stays small.

Whether onnxruntime runs a link as meant depends on the processor, too (blocked layouts, integer kernels), so that
is checked on the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnxcompress.errors import OutputError
from onnxcompress.fitting import kit_run, machine
from onnxcompress.fitting.catalogue import links
from onnxcompress.fitting.links import Link, unary
from onnxcompress.fitting.measuring import LONG, SHORT, feeds, forms
from onnxcompress.fitting.nets import CHECKED, FITTED, Net
from onnxcompress.fitting.samples import VERSION

__all__ = ["Kit", "emit"]

Array = npt.NDArray[Any]

_SMALLEST = 1024
"""Bytes of the smallest initializers that are left out, of two axes or more.

What decides fusions stays as it is: shapes, axes, scalars are small; scales have one axis, and the runtime takes a
quantized bias only if its scales are those of the weight times that of the input.
"""

_AT = np.linspace(0.01, 0.99, 17)
"""Where quantiles are taken; without the rare far ends, which would be drawn too often."""

_TOLERANCE = 0.1
"""Spreads this near, as a share of their range, are one: 20 layers in a row change by 1.1**20 at most."""

_FORM = 1
"""Of the manifest."""


@dataclasses.dataclass(frozen=True)
class Kit:
    """A kit that was written.

    Attributes:
        folder: where it is.
        chains: links in it.
        nets: networks, each form counted.
        file_bytes: size of all its files.
    """

    folder: Path
    chains: int
    nets: int
    file_bytes: int


def emit(
    folder: Path,
    *,
    selected: Iterable[Link] | None = None,
    nets: Iterable[Net] = (*FITTED, *CHECKED),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Kit:
    """Writes a kit.

    Args:
        folder: where to; made here, nothing may be in it.
        selected: links; all by default.
        nets: networks.
        progress: called before each model with its name, how many are done and how many there are.

    Raises:
        OutputError: ``folder`` is there already and not empty, or cannot be written.
    """
    chosen, wanted = list(links() if selected is None else selected), list(nets)
    total = len(chosen) + len(wanted)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already", hint="name a folder that does not exist, or an empty one")
    try:
        with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".kit-") as staged:
            made = Path(staged, "kit")
            made.mkdir()
            with zipfile.ZipFile(made / "models.zip", "w", zipfile.ZIP_DEFLATED) as models:
                writer = _Writer(models)
                for done, link in enumerate(chosen):
                    progress(link.name, done, total)
                    writer.chain(link)
                for done, net in enumerate(wanted, len(chosen)):
                    progress(net.name, done, total)
                    for form, model in forms(net).items():
                        writer.net(f"{net.name} {form}", model, net.feed())
                manifest = writer.manifest()
            (made / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")), encoding="utf-8")
            for module, name in ((kit_run, "run.py"), (machine, "machine.py")):
                shutil.copyfile(str(module.__file__), made / name)
            (made / "README.txt").write_text(_readme(len(chosen), len(wanted)), encoding="utf-8")
            size = sum(path.stat().st_size for path in made.iterdir())
            if folder.exists():
                folder.rmdir()
            os.replace(made, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", hint="choose another place") from error
    progress("", total, total)
    return Kit(folder, len(manifest["chains"]), len(manifest["nets"]), size)


class _Writer:
    """Collects models and what the manifest says of them."""

    def __init__(self, models: zipfile.ZipFile) -> None:
        self.models = models
        self.about: dict[str, Any] = {}
        self.spreads: list[list[float]] = []
        self.kinds: dict[str, list[int]] = {}
        """Numbers of the spreads there are, by numpy type."""
        self.chains: list[dict[str, Any]] = []
        self.bases: dict[str, dict[str, Any]] = {}
        self.nets: list[dict[str, Any]] = []

    def manifest(self) -> dict[str, Any]:
        trivial = dataclasses.replace(unary("overhead", "f32", "Abs", (1, 4)), raw=True)
        found: dict[str, Any] = {
            "form": _FORM,
            "version": VERSION,
            "onnxruntime": ort.__version__,
            "short": SHORT,
            "long": LONG,
            "overhead": {**self._pair(trivial), "one": self._model(trivial.build(1))},
            "chains": self.chains,
            "bases": self.bases,
            "nets": self.nets,
            "models": self.about,
            "spreads": self.spreads,
        }
        found["kit"] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
        return found

    def chain(self, link: Link) -> None:
        """A link, and the chains of what it stands on."""
        entry = self._pair(link)
        integer = link.precision == "u8s8" and not link.raw
        if link.expect or integer:
            entry["check"] = {
                "expect": list(link.expect), "nodes": link.nodes, "integer": integer, "parallel": link.parallel,
                "half": link.precision == "f16",
            }  # fmt: skip
        bases, base = [], link.baseline
        while base is not None:
            pair = self._pair(base)
            bases.append(pair["files"][1])
            self.bases.setdefault(bases[-1], pair)  # many links stand on the same
            base = base.baseline
        self.chains.append({"name": link.name, **entry, "bases": bases})

    def net(self, name: str, model: onnx.ModelProto, feed: dict[str, Array]) -> None:
        """A network in one form."""
        self.nets.append({"name": name, "file": self._model(model, feed)})

    def _pair(self, link: Link) -> dict[str, Any]:
        return {"files": [self._model(link.build(count)) for count in (SHORT, LONG)], "raw": link.raw}

    def _model(self, model: onnx.ModelProto, feed: dict[str, Array] | None = None) -> str:
        """Stores a graph without its weights and returns its name, the same for the same graph."""
        weights, kept = [], []
        for tensor in model.graph.initializer:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            small = len(tensor.raw_data) < _SMALLEST or len(tensor.dims) < 2
            if small or dtype not in (np.float32, np.float16, np.int8, np.uint8, np.int32):
                kept.append(tensor)
                continue
            spread = self._spread(numpy_helper.to_array(tensor))
            weights.append([tensor.name, list(tensor.dims), tensor.data_type, dtype.name, spread])
        size = sum(len(t.raw_data) for t in model.graph.initializer)
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        del bare.graph.initializer[:]
        bare.graph.initializer.extend(kept)
        data = bare.SerializeToString(deterministic=True)
        values = feeds(model) if feed is None else feed
        inputs = [[name, list(array.shape), array.dtype.name, self._spread(array)] for name, array in values.items()]
        about = {"weights": weights, "inputs": inputs, "bytes": size}
        name = hashlib.sha256(data + json.dumps(about).encode()).hexdigest()[:12]
        if name not in self.about:
            self.about[name] = about
            self.models.writestr(name, data)
        return name

    def _spread(self, array: Array) -> int:
        """Number of the quantiles that tell how an array's values are spread; near ones are one."""
        kind = array.dtype.name
        flat = np.asarray(array, np.float64).reshape(-1)
        few = flat if flat.size <= 100_000 else flat[:: flat.size // 50_000]
        found = np.quantile(few, _AT)
        mine = self.kinds.setdefault(kind, [])
        if mine:
            known = np.array([self.spreads[i] for i in mine])
            reach = _TOLERANCE * np.minimum(np.ptp(known, axis=1), np.ptp(found)) + 1e-6 * np.abs(known).max(axis=1)
            near = np.flatnonzero((np.abs(known - found) <= reach[:, None]).all(axis=1))
            if near.size:
                return mine[int(near[0])]
        self.spreads.append([float(f"{q:.4g}") for q in found])
        mine.append(len(self.spreads) - 1)
        return mine[-1]


def _readme(chains: int, nets: int) -> str:
    return f"""\
What this is
    {chains} chains of operators and {nets} networks, to find out what each kind of work costs on a device.
    They hold no data of anyone: shapes and random numbers.

What the device needs
    Python 3.8 or newer with numpy and onnxruntime {ort.__version__} (any {".".join(ort.__version__.split(".")[:2])}.x).
    No network, no compiler, nothing to install.

What to do
    1. Copy this folder to the device. Close what else runs there, fix the clock if you can, let it cool.
    2. python3 run.py
       It says what it times and how long is left, and writes results.json as it goes. Ctrl-C is safe: run it
       again and it goes on. So it does after a crash; what crashed it is left out. --budget 0.3 takes longer
       and is steadier.
    3. Copy results.json back and run, where the kit was made:
       onnxcompress profile fit --from-results results.json --name my-device -o my-device.toml
"""
