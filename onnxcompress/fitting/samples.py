"""What was measured on a device, as numbers that can be carried to where a profile is fitted.

Samples name what they are of (:mod:`onnxcompress.fitting.catalogue`, :mod:`onnxcompress.fitting.nets`); how much work
that is follows from the name, so a file of them is small and fits of tomorrow can use measurements of today.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxcompress.errors import DataError

__all__ = ["VERSION", "LinkTime", "Measurements", "NetTime", "NodeTime"]

VERSION = 1
"""Of the links and nets that names refer to."""


@dataclass(frozen=True)
class LinkTime:
    """A link of a chain.

    Attributes:
        name: of the link.
        seconds: slope between a long and a short chain.
        spread: of the long chain's rounds: (90th - 10th percentile) / median.
    """

    name: str
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True)
class NodeTime:
    """A node of a network as onnxruntime's profiler saw it.

    Attributes:
        node: name onnxruntime gave it.
        op_type: operator that ran.
        seconds: of one run of the network.
        elements: size of its first output.
    """

    node: str
    op_type: str
    seconds: float
    elements: int


@dataclass(frozen=True)
class NetTime:
    """A whole network.

    Attributes:
        name: of the network and its form.
        seconds: of a run, without the profiler.
        spread: (90th - 10th percentile) / median of the runs.
        nodes: what the profiler says of its nodes.
    """

    name: str
    seconds: float
    spread: float = 0.0
    nodes: tuple[NodeTime, ...] = ()


@dataclass(frozen=True)
class Measurements:
    """Everything measured on a device.

    Attributes:
        onnxruntime: its version there.
        machine: processor, cores, clock, flags and caches as far as they can be told.
        per_run: seconds of a call.
        per_node: seconds of dispatching a node.
        links: chains.
        nets: networks.
        left_out: links that do not run there as meant, and why.
        version: :data:`VERSION` of the links and nets.
    """

    onnxruntime: str
    machine: Mapping[str, Any]
    per_run: float
    per_node: float
    links: tuple[LinkTime, ...]
    nets: tuple[NetTime, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """As a JSON document."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, *, path: str = "") -> Measurements:
        """Reads what :meth:`to_json` wrote.

        Args:
            text: the document.
            path: of its file, for messages.

        Raises:
            DataError: it is not such a document, or of another version.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path or 'results'}: not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else None
            raise DataError(
                f"{path or 'results'}: results of version {found}, not {VERSION}",
                hint="write the kit again with this onnxcompress and run it again",
            )
        try:
            return cls(
                onnxruntime=str(data["onnxruntime"]),
                machine=dict(data["machine"]),
                per_run=_positive(data["per_run"]),
                per_node=_positive(data["per_node"]),
                links=tuple(
                    LinkTime(str(d["name"]), _positive(d["seconds"]), float(d["spread"])) for d in data["links"]
                ),
                nets=tuple(
                    NetTime(
                        str(d["name"]), _positive(d["seconds"]), float(d["spread"]),
                        tuple(NodeTime(str(n["node"]), str(n["op_type"]), _positive(n["seconds"]), int(n["elements"]))
                              for n in d["nodes"]),
                    )
                    for d in data["nets"]
                ),
                left_out={str(k): str(v) for k, v in data.get("left_out", {}).items()},
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            detail = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path or 'results'}: {detail}", hint="run the kit again") from error


def _positive(number: Any) -> float:
    value = float(number)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{number!r} is no time in seconds")
    return value
