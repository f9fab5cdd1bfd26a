"""onnx-graphsurgeon graphs in and out, through protobuf messages in memory.

What graphsurgeon 0.6 does to a model, and what follows here:

- types below 8 bits: once a weight was looked at, the bytes of the unpacked array are written under
  the packed type, which no one can read: refused;
- float8: a weight of type e4m3fnuz that was looked at comes back as e4m3fn, another number: refused;
- optional and map types come back as tensors: refused;
- more than 1.9 GB of weights do not fit one message: refused;
- metadata of nodes, values and graphs, quantization annotations and training information are dropped:
  logged;
- local functions survive, but our models never have any (they are inlined at load).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir

from onnxcompress.errors import ModelReadError, UnsupportedModelError
from onnxcompress.model import EXTERNAL_DATA_THRESHOLD, all_graphs, canonicalize, weight_bytes

__all__ = ["from_graphsurgeon", "to_graphsurgeon"]

logger = logging.getLogger(__name__)

_KEPT = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.BOOL,
        ir.DataType.COMPLEX64,
        ir.DataType.COMPLEX128,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.STRING,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)


def to_graphsurgeon(model: ir.Model) -> gs.Graph:
    """The model as a ``gs.Graph`` of its own; the model is not changed.

    Raises:
        UnsupportedModelError: it holds something graphsurgeon would lose or corrupt; see the module.
    """
    if weight_bytes(model) > EXTERNAL_DATA_THRESHOLD:
        raise UnsupportedModelError(
            f"{weight_bytes(model) / 1e9:.1f} GB of weights do not fit a graphsurgeon graph",
            hint="edit the onnx_ir model with a Rewriter",
        )
    for value in _values(model):
        _refuse(value)
    if any(_has_metadata(graph) for graph in all_graphs(model)):
        logger.warning("graphsurgeon drops the metadata of nodes, values and graphs")
    return gs.import_onnx(ir.to_proto(model))


def from_graphsurgeon(graph: gs.Graph) -> ir.Model:
    """A ``gs.Graph`` as a model in the form :func:`onnxcompress.model.load` gives.

    Raises:
        UnsupportedModelError: it holds a type that graphsurgeon does not write as it is.
        ModelReadError: graphsurgeon cannot export it (an output without a type, for example).
    """
    try:
        proto: onnx.ModelProto = gs.export_onnx(graph)
    except Exception as error:  # graphsurgeon raises its own, numpy's, onnx's and AssertionError
        raise ModelReadError(f"graphsurgeon cannot export the graph: {type(error).__name__}: {error}") from error
    if proto.graph.sparse_initializer:
        raise UnsupportedModelError("sparse initializers", hint="make them dense in the graphsurgeon graph")
    model = ir.from_proto(proto)
    for change in canonicalize(model):
        logger.info("%s", change)
    for value in _values(model):
        _refuse(value)
    return model


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _refuse(value: ir.Value) -> None:
    tensor = value.const_value
    dtype = tensor.dtype if tensor is not None else value.dtype
    if value.type is not None and not isinstance(value.type, (ir.TensorType, ir.SequenceType)):
        raise UnsupportedModelError(
            f"graphsurgeon does not keep the type {value.type}", tensor=value.name, hint="edit the onnx_ir model"
        )
    if dtype is not None and dtype is not ir.DataType.UNDEFINED and dtype not in _KEPT:
        raise UnsupportedModelError(
            f"graphsurgeon does not keep {dtype.name}", tensor=value.name, hint="edit the onnx_ir model with a Rewriter"
        )


def _has_metadata(graph: ir.Graph) -> bool:
    return bool(
        graph.metadata_props
        or any(node.metadata_props or any(v.metadata_props for v in node.outputs) for node in graph)
        or any(v.metadata_props for v in graph.initializers.values())
    )
