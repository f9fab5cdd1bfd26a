"""Reading, checking, cloning and writing models. ``onnx_ir.Model`` is the one truth.

Protobuf appears in this file and nowhere else. Weights kept as external data stay memory-mapped
from load to save, so memory follows the edit and not the file.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google.protobuf.message
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    ShapeInferencePass,
)

from onnxcompress.errors import ModelReadError, ModelRunError, OutputError, RewriteError, UnsupportedModelError

__all__ = [
    "EXTERNAL_DATA_THRESHOLD",
    "Shape",
    "all_graphs",
    "bodies",
    "canonicalize",
    "check_external_data",
    "clone",
    "compute",
    "infer_types",
    "inferred_types",
    "load",
    "notes",
    "proto_graphs",
    "raise_opset",
    "read_proto",
    "save",
    "serialize",
    "source",
    "source_files",
    "temporary_file",
    "weight_bytes",
]

logger = logging.getLogger(__name__)

Shape = tuple[int | str | None, ...]
"""Extents of a value: a number, the name of a symbolic dimension, or None where nothing is known."""

EXTERNAL_DATA_THRESHOLD = 1_900_000_000
"""Bytes of weights above which a file must use external data: protobuf ends at 2 GiB."""

_STANDARD = ("", "ai.onnx")
_NOTES = "onnxcompress.notes"
_SOURCE = "onnxcompress.source"


def notes(model: ir.Model) -> tuple[str, ...]:
    """What :func:`load` had to change to keep the model usable; part of the report."""
    return tuple(model.meta.get(_NOTES, ()))


def source(model: ir.Model) -> Path | None:
    """The file the model was loaded from, if it was."""
    path = model.meta.get(_SOURCE)
    return Path(path) if path is not None else None


def source_files(model: ir.Model) -> tuple[Path, ...]:
    """The file the model was loaded from and those its weights are in, each once; empty if it was not loaded."""
    origin = source(model)
    files = [] if origin is None else [origin]
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                files.append(Path(value.const_value.path).resolve())
    return tuple(dict.fromkeys(files))


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Reads a model and brings it to the form every other module relies on.

    Local functions are inlined, weights in Constant nodes become initializers, initializers that
    are also graph inputs stop being inputs, sparse tensors become dense, and every node and
    value gets a unique name. Each such change is in :func:`notes`.

    Args:
        path: an ONNX file; external data is looked for beside it and stays memory-mapped.

    Raises:
        ModelReadError: no such file, not ONNX, truncated, or external data missing or too short.
        UnsupportedModelError: a sparse tensor with external data.
    """
    path = Path(path)
    proto = read_proto(path)
    changed = _densify_sparse_tensors(proto, path)
    if proto.training_info:
        changed.append("training information was left out")
    check_external_data(proto.graph, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir raises many kinds for a malformed proto
        raise ModelReadError(f"cannot be understood: {error}", path=path) from error
    ir.external_data.set_base_dir(model.graph, str(path.parent))
    model.meta[_SOURCE] = str(path.resolve())
    model.meta[_NOTES] = (*changed, *canonicalize(model))
    return model


def canonicalize(model: ir.Model) -> list[str]:
    """Brings an ``ir.Model`` to the form :func:`load` promises; returns what was changed."""
    changed: list[str] = []
    if not _in_order(model.graph):  # onnxruntime loads it (its own quantizer writes such), the standard forbids it
        model.graph.sort()
        changed.append("nodes were not in the order of their inputs and were sorted")
    if model.functions:
        changed.append(f"{len(model.functions)} local functions were inlined")
        InlinePass()(model)
    with_default = [v.name for v in model.graph.inputs if v.is_initializer()]
    if with_default:
        RemoveInitializersFromInputsPass()(model)
        model.ir_version = max(model.ir_version or 0, 4)  # before, initializers had to be inputs
        changed.append(
            f"{len(with_default)} initializers were also graph inputs and can no longer be "
            f"overridden by the caller: {', '.join(str(n) for n in with_default[:5])}"
            + (", ..." if len(with_default) > 5 else "")
        )
    omitted = [v for graph in all_graphs(model) for n in graph for v in n.outputs if not v.name]
    NameFixPass()(model)
    for value in omitted:  # the pass names optional outputs that were left out, which would ask for them
        value.name = ""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.TensorProtoTensor):
                value.const_value.metadata_props.clear()  # onnx-ir writes those of the message and these
    _name_everything(model)
    return changed


def inferred_types(
    model: ir.Model, given: Mapping[str, tuple[int, ...]] | None = None
) -> dict[ir.Value, tuple[ir.DataType | None, Shape | None]]:
    """Element type and shape of every value, derived from graph inputs and weights alone.

    Shapes written down elsewhere in the file are not believed: the runtime checks only inputs.
    The model is left as it is.

    Args:
        model: the model.
        given: shapes of values of the main graph that are known otherwise, by name.
    """
    copy = clone(model)
    for graph in all_graphs(copy):
        for node in graph:
            for value in node.outputs:
                value.shape = None
    infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    infer(copy)
    if given:
        values = (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))
        for value in values:  # a shape without a type is not listened to
            known = given.get(str(value.name))
            if known is not None and value.dtype is not None:
                value.shape = ir.Shape(known)
        infer(copy)
    found: dict[ir.Value, tuple[ir.DataType | None, Shape | None]] = {}
    for original, inferred in zip(all_graphs(model), all_graphs(copy), strict=True):
        pairs = list(zip(original.inputs, inferred.inputs, strict=True))
        pairs += [
            pair
            for old, new in zip(original, inferred, strict=True)
            for pair in zip(old.outputs, new.outputs, strict=True)
        ]
        for value, twin in pairs:
            shape = None if twin.shape is None else tuple(d if isinstance(d, int) else d.value for d in twin.shape)
            found[value] = (twin.dtype, shape)
        for value in original.initializers.values():
            if value.const_value is not None:
                found[value] = (value.const_value.dtype, tuple(value.const_value.shape.numpy()))
    return found


def compute(
    model: ir.Model, values: Sequence[ir.Value], given: Mapping[str | None, npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """Values that depend on weights and ``given`` only, computed by onnxruntime without optimizations.

    Args:
        model: says which operator sets are meant.
        values: wanted.
        given: values already known, by name.

    Raises:
        ModelRunError: one of them depends on a graph input, or onnxruntime cannot compute it.
    """
    twins: dict[ir.Value, ir.Value] = {}
    feeds: dict[str, npt.NDArray[Any]] = {}
    inputs: list[ir.Value] = []
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def leaf(value: ir.Value) -> ir.Value:
        name = f"v{len(twins)}"
        tensor = ir.tensor(given[value.name]) if value.name in given else value.const_value
        if tensor is None or (value.name not in given and not value.is_initializer()):
            raise ModelRunError("is not constant", tensor=value.name)
        twin = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        if tensor.nbytes > _KEEP_BYTES and tensor.dtype.bitwidth >= 8 and tensor.dtype.numpy().isbuiltin == 1:
            feeds[name] = np.asarray(tensor.numpy())
            inputs.append(twin)
        else:
            twin.const_value = tensor
            weights.append(twin)
        return twin

    def visit(value: ir.Value) -> None:
        stack = [value]
        while stack:
            top = stack[-1]
            producer = None if top.name in given else top.producer()
            if top in twins:
                stack.pop()
            elif producer is None:
                twins[top] = leaf(top)
            else:
                missing = [v for v in producer.inputs if v is not None and v not in twins]
                if missing:
                    stack.extend(missing)
                    continue
                made = [ir.Value(name=f"v{len(twins)}_{i}" if v.name else "") for i, v in enumerate(producer.outputs)]
                node = ir.Node(
                    producer.domain,
                    producer.op_type,
                    [None if v is None else twins[v] for v in producer.inputs],
                    producer.attributes.values(),
                    outputs=made,
                )
                nodes.append(node)
                twins.update(zip(producer.outputs, made, strict=True))

    for value in values:
        visit(value)
    outputs = [twins[v] for v in values]
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=weights, opset_imports=model.graph.opset_imports, name="constants"
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        data = serialize(ir.Model(graph, ir_version=model.ir_version))
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return [np.asarray(a) for a in session.run([str(v.name) for v in outputs], feeds)]
    except Exception as error:  # onnxruntime has a kind of exception for every status, under Exception only
        raise ModelRunError(f"onnxruntime cannot compute {values[0].name!r}: {error}") from error


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, then every subgraph of If, Loop and Scan, outermost first."""
    yield model.graph
    yield from model.graph.subgraphs()


def _in_order(graph: ir.Graph) -> bool:
    """Whether every node comes after what makes its inputs, and those its subgraphs capture."""
    made: set[ir.Value] = set()
    for node in graph:
        readers = (node, *(inner for body in bodies(node) for inner in body.all_nodes()))
        read = [v for reader in readers for v in reader.inputs if v is not None]
        if any((maker := v.producer()) is not None and maker.graph is graph and v not in made for v in read):
            return False
        made.update(node.outputs)
    return True


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """Graphs a node of control flow holds."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def clone(model: ir.Model) -> ir.Model:
    """A copy with its own nodes and values; weights are shared, so it costs little memory."""
    copy = model.clone()
    for key in (_SOURCE, _NOTES):
        if key in model.meta:
            copy.meta[key] = model.meta[key]
    return copy


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included."""
    return sum(
        value.const_value.nbytes
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def serialize(model: ir.Model) -> bytes:
    """The model as one ONNX file in memory.

    Raises:
        RewriteError: it has more than 1.9 GB of weights; use :func:`temporary_file`.
    """
    if weight_bytes(model) > EXTERNAL_DATA_THRESHOLD:
        raise RewriteError("the model is too large for one protobuf message", hint="save it with external data")
    data: bytes = _to_proto(model).SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def temporary_file(model: ir.Model) -> Iterator[Path]:
    """The model as a file (with external data if large) that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        path = Path(folder) / "model.onnx"
        _write(model, path, external=weight_bytes(model) > EXTERNAL_DATA_THRESHOLD)
        yield path


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    protect: Sequence[str | os.PathLike[str]] = (),
    check: Callable[[Path], None] | None = None,
) -> tuple[Path, ...]:
    """Writes the model beside ``path`` and then renames, so nothing is ever half-written.

    Args:
        path: the file to make; an existing one is replaced only when all is written.
        external_data: weights in ``<path>.data``; by default only above 1.9 GB.
        check: called with the finished file before it gets its name; an exception drops it.
        protect: files that must not be overwritten, beside the file the model came from.

    Returns:
        The files written, the model first.

    Raises:
        OutputError: the folder cannot be written, or ``path`` is the input or its weights.
    """
    path = Path(path)
    external = weight_bytes(model) > EXTERNAL_DATA_THRESHOLD if external_data is None else external_data
    targets = [path, path.with_name(path.name + ".data")] if external else [path]
    guarded = {Path(p).resolve() for p in protect} | set(source_files(model))
    for target in targets:
        if target.resolve() in guarded:
            raise OutputError(f"{target} is the input model; it is never overwritten", hint="choose another -o")
        if target.is_dir():
            raise OutputError(f"{target} is a folder", hint="name a file")
    try:
        folder = tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write in {path.parent}: {error.strerror}", hint="choose a folder that exists and is writable"
        ) from error
    try:
        staged = Path(folder) / path.name
        _write(model, staged, external=external)
        if check is not None:
            check(staged)
        for target in reversed(targets):  # weights first: a model never names weights that are not there
            os.replace(staged.with_name(target.name), target)
    except OSError as error:
        raise OutputError(f"writing {path} failed: {error}", hint="is the disk full?") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tuple(targets)


def infer_types(model: ir.Model) -> ir.Model:
    """A copy in which every value has the type, and where possible the shape, that ONNX infers.

    Values whose type stays unknown (behind custom operators) are left without one.
    """
    copy = clone(model)
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    return copy


def raise_opset(model: ir.Model, version: int) -> ir.Model:
    """A copy of the model at ONNX opset ``version`` or above; the model itself if it is there already.

    Uses onnx's own version converter with the weights left out, so large models convert too.

    Raises:
        RewriteError: the converter does not know how.
    """
    current = model.graph.opset_imports.get("", model.opset_imports.get("", 1))
    if current >= version:
        return model
    stripped = clone(model)
    proto = _to_proto(_without_weights(stripped))
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(proto, version))
    except Exception as error:  # the converter reports every refusal as RuntimeError or ConvertError
        raise RewriteError(
            f"opset {current} cannot be raised to {version}: {error}", hint="re-export the model with a newer opset"
        ) from error
    _restore_weights(converted, model)
    for key in (_SOURCE, _NOTES):
        if key in model.meta:
            converted.meta[key] = model.meta[key]
    canonicalize(converted)
    return converted


# --- reading -----------------------------------------------------------------------------------


def read_proto(path: Path) -> onnx.ModelProto:
    """The message in a file, without the weights that lie elsewhere.

    Raises:
        ModelReadError: no such file, not ONNX, or cut off.
    """
    if not path.is_file():
        raise ModelReadError("there is no such file", path=path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise ModelReadError(
            "is not an ONNX model, or is cut off", path=path, hint="download or export it again"
        ) from error
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ModelReadError(f"cannot be read: {error}", path=path) from error
    if not proto.HasField("graph"):
        raise ModelReadError("holds no graph, so it is not an ONNX model", path=path)
    return proto


def proto_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all bodies in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from proto_graphs(inner)


def _densify_sparse_tensors(proto: onnx.ModelProto, path: Path) -> list[str]:
    """onnx-ir drops sparse initializers without a word, so they are made dense before it sees them."""
    changed = []
    for graph in proto_graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, sparse.values.name, path))
            changed.append(f"sparse initializer {sparse.values.name!r} was made dense")
        del graph.sparse_initializer[:]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                    attribute.t.CopyFrom(_dense(attribute.sparse_tensor, node.output[0], path))
                    attribute.ClearField("sparse_tensor")
                    attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                    changed.append(f"sparse constant {node.output[0]!r} was made dense")
    return changed


def _dense(sparse: onnx.SparseTensorProto, name: str, path: Path) -> onnx.TensorProto:
    if onnx.TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
        raise UnsupportedModelError("a sparse tensor with external data", path=path, tensor=name)
    try:
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
    except (IndexError, TypeError, ValueError) as error:
        raise ModelReadError(f"its sparse form is not valid: {error}", path=path, tensor=name) from error
    return onnx.numpy_helper.from_array(dense, name)


def check_external_data(graph: onnx.GraphProto, path: Path) -> None:
    """Looks whether the weights that lie elsewhere are there, and are as long as they must be.

    Raises:
        ModelReadError: they are not.
    """
    sizes: dict[str, int] = {}
    folder = path.parent.resolve()
    for inner in proto_graphs(graph):
        for tensor in inner.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entries = {e.key: e.value for e in tensor.external_data}
            location = entries.get("location", "")
            file = path.parent / location
            if location not in sizes:
                if not file.is_file():
                    raise ModelReadError(
                        f"its weights are in {location!r}, which is not there",
                        path=path,
                        tensor=tensor.name,
                        hint=f"put {location!r} beside the model",
                    )
                if not file.resolve().is_relative_to(folder):
                    raise ModelReadError(
                        f"its weights are in {location!r}, outside the folder of the model",
                        path=path,
                        tensor=tensor.name,
                        hint="copy them beside the model; ONNX allows no other place",
                    )
                sizes[location] = file.stat().st_size
            try:
                offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
                needed = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
            except (TypeError, ValueError) as error:
                raise ModelReadError(
                    f"where its weights are is not valid: {error}", path=path, tensor=tensor.name
                ) from error
            if length not in (0, needed):
                raise ModelReadError(
                    f"has {length} bytes of weights where its type and shape need {needed}",
                    path=path,
                    tensor=tensor.name,
                    hint="export it again",
                )
            if offset + needed > sizes[location]:
                raise ModelReadError(
                    f"{location!r} has {sizes[location]} bytes but the tensor ends at {offset + needed}: it is cut off",
                    path=path,
                    tensor=tensor.name,
                    hint="download or export it again",
                )


# --- writing -----------------------------------------------------------------------------------


def _to_proto(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    outside = {
        name: value.const_value
        for graph in all_graphs(model)
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for graph in proto_graphs(proto.graph):
        for tensor in graph.initializer if outside else ():
            if tensor.data_location == onnx.TensorProto.EXTERNAL:  # the message must stand alone
                del tensor.external_data[:]
                tensor.ClearField("data_location")
                tensor.raw_data = outside[tensor.name].tobytes()
        custom = {name for node in graph.node if node.domain not in _STANDARD for name in node.output}
        kept = [info for info in graph.value_info if info.name in custom]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    return proto


def _without_inferred(model: ir.Model) -> ir.Model:
    """A clone without the types and shapes of inner values that ONNX can infer.

    Rewrites make them stale, and they are not neutral: with symbolic shapes written out,
    onnxruntime 1.32 fuses Add and LayerNormalization into a SkipLayerNormalization that is slower
    than the two (a MiniLM quantized dynamically ran 17.6 ms with them and 13.4 ms without).
    """
    copy = clone(model)
    for node in copy.graph.all_nodes():
        for value in node.outputs:
            if node.domain in _STANDARD and not value.is_graph_output():
                value.type = value.shape = None
    return copy


def _write(model: ir.Model, path: Path, *, external: bool) -> None:
    if external:
        ir.save(_without_inferred(model), path, external_data=path.name + ".data")
    else:
        path.write_bytes(_to_proto(model).SerializeToString(deterministic=True))


# --- opset -------------------------------------------------------------------------------------

_KEEP_BYTES = 1024  # small tensors are shapes, axes, limits: the converter wants to see them


def _without_weights(model: ir.Model) -> ir.Model:
    for graph in all_graphs(model):
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _KEEP_BYTES and graph is model.graph:
                value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
                value.const_value = None
                del graph.initializers[str(value.name)]
                graph.inputs.append(value)
    return model


def _restore_weights(converted: ir.Model, original: ir.Model) -> None:
    inputs = {str(v.name) for v in original.graph.inputs}
    for value in [v for v in converted.graph.inputs if str(v.name) not in inputs]:
        converted.graph.inputs.remove(value)
        value.const_value = original.graph.initializers[str(value.name)].const_value
        converted.graph.register_initializer(value)


# --- names -------------------------------------------------------------------------------------


def _name_everything(model: ir.Model) -> None:
    """Names become unique over the whole model: sites are found again by name on a clone.

    Branches of an If may share names with each other until one of them is inlined.
    """
    nodes: set[str] = set()
    values: set[str] = set()
    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)):
            if value.name:
                value.name = _unique(value.name, values)
        for node in graph:
            node.name = _unique(
                node.name or f"{node.op_type}_{node.outputs[0].name if node.outputs else 'node'}", nodes
            )


def _unique(base: str, taken: set[str]) -> str:
    name, n = base, 1
    while name in taken:
        name, n = f"{base}_{n}", n + 1
    taken.add(name)
    return name
