"""Models built from a seed: the same bytes on every machine.

The CNN and the transformer are built with onnx-graphsurgeon; LSTM and If with
``onnx.helper``; the external-data model is written tensor by tensor, in memory that does not
grow with its size. What they share is in ``building``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxcompress.errors import ZooError
from onnxcompress.models_zoo.building import OPSET, SEED, Array, normal, stamp, to_model, to_tensor

__all__ = ["build", "write_external_model"]


def build(name: str, path: Path) -> None:
    """Write the generated model ``name`` to ``path``.

    Raises:
        ZooError: ``name`` is not a generated model.
    """
    if name == "gen-external":
        write_external_model(path, 64 << 20)
    elif name in _BUILDERS:
        _write(_BUILDERS[name](), path)
    else:
        raise ZooError(f"{name!r} is not a generated model")


def _write(model: onnx.ModelProto, path: Path) -> None:
    stamp(model).producer_version = ""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


class _Net:
    """A graph under construction: each call adds one operator and returns what comes out."""

    def __init__(self) -> None:
        self.graph = gs.Graph(opset=OPSET)
        self.count = 0

    def input(self, name: str, dtype: type[np.generic], shape: list[int | str]) -> gs.Variable:
        value = gs.Variable(name, np.dtype(dtype), shape)
        self.graph.inputs.append(value)
        return value

    def weight(self, name: str, shape: tuple[int, ...], std: float) -> gs.Constant:
        return gs.Constant(name, normal(name, shape, std))

    def __call__(self, op: str, *inputs: gs.Tensor | NDArray[np.generic], **attrs: object) -> gs.Tensor:
        self.count += 1
        name = f"{op.lower()}_{self.count}"
        wired = [gs.Constant(f"{name}_in{i}", v) if isinstance(v, np.ndarray) else v for i, v in enumerate(inputs)]
        value = gs.Variable(name)
        self.graph.nodes.append(gs.Node(op=op, name=name, attrs=dict(attrs), inputs=wired, outputs=[value]))
        return value

    def finish(self, value: gs.Tensor, name: str, shape: list[int | str]) -> onnx.ModelProto:
        value.name, value.dtype, value.shape = name, np.dtype(np.float32), shape
        self.graph.outputs = [value]
        model: onnx.ModelProto = gs.export_onnx(self.graph)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _cnn() -> onnx.ModelProto:
    net = _Net()

    def conv(x: gs.Tensor, name: str, size: tuple[int, int], kernel: int, stride: int = 1, group: int = 1) -> gs.Tensor:
        """Convolution and batch norm with statistics that are not trivial."""
        cin, cout = size
        fan_in = cin // group * kernel * kernel
        y = net(
            "Conv",
            x,
            net.weight(f"{name}.weight", (cout, cin // group, kernel, kernel), math.sqrt(2 / fan_in)),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=group,
        )
        gain = 1 + normal(f"{name}.gain", (cout,), 0.2)
        variance = (1 + normal(f"{name}.variance", (cout,), 0.25)) ** 2
        return net(
            "BatchNormalization",
            y,
            gs.Constant(f"{name}.gain", gain),
            net.weight(f"{name}.shift", (cout,), 0.2),
            net.weight(f"{name}.mean", (cout,), 0.2),
            gs.Constant(f"{name}.variance", variance.astype(np.float32)),
            epsilon=1e-5,
        )

    def relu6(x: gs.Tensor) -> gs.Tensor:
        return net("Clip", x, np.array(0, np.float32), np.array(6, np.float32))

    x: gs.Tensor = net.input("image", np.float32, ["batch", 3, 64, 64])
    x = net("Relu", conv(x, "stem", (3, 32), 3, stride=2))
    y = net("Relu", conv(x, "res.a", (32, 32), 3))  # a plain residual block
    x = net("Relu", net("Add", conv(y, "res.b", (32, 32), 3), x))
    y = relu6(conv(x, "inv1.expand", (32, 96), 1))  # an inverted residual, without the skip
    y = relu6(conv(y, "inv1.depthwise", (96, 96), 3, stride=2, group=96))
    x = conv(y, "inv1.project", (96, 48), 1)
    y = relu6(conv(x, "inv2.expand", (48, 192), 1))  # and one with it
    y = relu6(conv(y, "inv2.depthwise", (192, 192), 3, group=192))
    x = net("Add", conv(y, "inv2.project", (192, 48), 1), x)
    x = net("Relu", conv(x, "head", (48, 128), 1))
    x = net("Flatten", net("GlobalAveragePool", x), axis=1)
    x = net(
        "Gemm",
        x,
        net.weight("fc.weight", (10, 128), 0.1),
        net.weight("fc.bias", (10,), 0.1),
        transB=1,
    )
    return net.finish(x, "scores", ["batch", 10])


def _transformer(width: int = 128, heads: int = 4, layers: int = 2) -> onnx.ModelProto:
    net = _Net()
    ids = net.input("input_ids", np.int64, ["batch", "sequence"])
    mask = net.input("attention_mask", np.int64, ["batch", "sequence"])
    # Some channels are much larger than others, as in trained transformers: what makes
    # per-tensor activation scales lose.
    outliers = np.ones(width, np.float32)
    outliers[:: width // 4] = 8

    def linear(x: gs.Tensor, name: str, cin: int, cout: int) -> gs.Tensor:
        y = net("MatMul", x, net.weight(f"{name}.weight", (cin, cout), 1 / math.sqrt(cin)))
        return net("Add", y, net.weight(f"{name}.bias", (cout,), 0.02))

    def layer_norm(x: gs.Tensor, name: str) -> gs.Tensor:
        gain = (1 + normal(f"{name}.gain", (width,), 0.1)) * outliers
        shift = net.weight(f"{name}.shift", (width,), 0.1)
        return net("LayerNormalization", x, gs.Constant(f"{name}.gain", gain), shift, axis=-1)

    def split_heads(x: gs.Tensor, perm: list[int]) -> gs.Tensor:
        shaped = net("Reshape", x, np.array([0, 0, heads, width // heads], np.int64))
        return net("Transpose", shaped, perm=perm)

    hidden = net("Cast", mask, to=TensorProto.FLOAT)
    hidden = net("Mul", net("Sub", np.array(1, np.float32), hidden), np.array(-1e4, np.float32))
    bias = net("Unsqueeze", hidden, np.array([1, 2], np.int64))

    x = net("Gather", net.weight("embedding", (512, width), 1.0), ids)
    positions = net(
        "Slice",
        net.weight("positions", (128, width), 0.3),
        np.array([0], np.int64),
        net("Slice", net("Shape", ids), np.array([1], np.int64), np.array([2], np.int64)),
    )
    x = net("Add", x, positions)
    for i in range(layers):
        y = layer_norm(x, f"{i}.norm1")
        q = split_heads(linear(y, f"{i}.query", width, width), [0, 2, 1, 3])
        k = split_heads(linear(y, f"{i}.key", width, width), [0, 2, 3, 1])
        v = split_heads(linear(y, f"{i}.value", width, width), [0, 2, 1, 3])
        scale = np.array(1 / math.sqrt(width // heads), np.float32)
        a = net("Softmax", net("Add", net("Mul", net("MatMul", q, k), scale), bias), axis=-1)
        a = net("Transpose", net("MatMul", a, v), perm=[0, 2, 1, 3])
        a = net("Reshape", a, np.array([0, 0, width], np.int64))
        x = net("Add", x, linear(a, f"{i}.out", width, width))
        y = linear(layer_norm(x, f"{i}.norm2"), f"{i}.up", width, 4 * width)
        erf = net("Erf", net("Div", y, np.array(math.sqrt(2), np.float32)))
        y = net(
            "Mul",
            net("Mul", y, net("Add", erf, np.array(1, np.float32))),
            np.array(0.5, np.float32),
        )
        x = net("Add", x, linear(y, f"{i}.down", 4 * width, width))
    x = linear(layer_norm(x, "norm"), "head", width, 64)
    return net.finish(x, "scores", ["batch", "sequence", 64])


def _lstm(width: int = 24, hidden: int = 64) -> onnx.ModelProto:
    std = 1 / math.sqrt(hidden)
    weights = [
        to_tensor("W", normal("lstm.W", (2, 4 * hidden, width), std)),
        to_tensor("R", normal("lstm.R", (2, 4 * hidden, hidden), std)),
        to_tensor("B", normal("lstm.B", (2, 8 * hidden), 0.1)),
        to_tensor("head.weight", normal("lstm.head", (2 * hidden, 16), 6 * std)),
        to_tensor("head.bias", normal("lstm.head.bias", (16,), 0.1)),
        to_tensor("joined", np.array([0, 0, 2 * hidden], np.int64)),
    ]
    nodes = [
        helper.make_node("Transpose", ["sequence"], ["by_step"], "by_step", perm=[1, 0, 2]),
        helper.make_node(
            "LSTM",
            ["by_step", "W", "R", "B"],
            ["states"],
            "lstm",
            hidden_size=hidden,
            direction="bidirectional",
        ),
        helper.make_node("Transpose", ["states"], ["by_batch"], "by_batch", perm=[2, 0, 1, 3]),
        helper.make_node("Reshape", ["by_batch", "joined"], ["features"], "features"),
        helper.make_node("MatMul", ["features", "head.weight"], ["linear"], "head"),
        helper.make_node("Add", ["linear", "head.bias"], ["logits"], "head_bias"),
        helper.make_node("Softmax", ["logits"], ["scores"], "softmax", axis=-1),
    ]
    dims = ["batch", "steps"]
    graph = helper.make_graph(
        nodes,
        "gen_lstm",
        [helper.make_tensor_value_info("sequence", TensorProto.FLOAT, [*dims, width])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [*dims, 16])],
        weights,
    )
    return to_model(graph)


def _if(width: int = 32, hidden: int = 128) -> onnx.ModelProto:
    """Both branches end in ``shared.weight`` of the outer graph; each has weights of its own."""

    def branch(name: str, inner: int) -> onnx.GraphProto:
        first = normal(f"if.{name}", (width, inner), 1 / math.sqrt(width))
        fit = normal(f"if.{name}.fit", (inner, hidden), 1 / math.sqrt(inner))
        nodes = [
            helper.make_node("MatMul", ["x", f"{name}.weight"], [f"{name}.up"], f"{name}_up"),
            helper.make_node("Relu", [f"{name}.up"], [f"{name}.act"], f"{name}_act"),
            helper.make_node("MatMul", [f"{name}.act", f"{name}.fit"], [f"{name}.fitted"], f"{name}_fit"),
            helper.make_node("MatMul", [f"{name}.fitted", "shared.weight"], [f"{name}.y"], f"{name}_shared"),
        ]
        value = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["batch", 16])
        weights = [to_tensor(f"{name}.weight", first), to_tensor(f"{name}.fit", fit)]
        return helper.make_graph(nodes, name, [], [value], weights)

    node = helper.make_node(
        "If",
        ["wide"],
        ["y"],
        "branch",
        then_branch=branch("broad", 2 * hidden),
        else_branch=branch("slim", hidden // 2),
    )
    graph = helper.make_graph(
        [node],
        "gen_if",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width]),
            helper.make_tensor_value_info("wide", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])],
        [to_tensor("shared.weight", normal("if.shared", (hidden, 16), 1 / math.sqrt(hidden)))],
    )
    return to_model(graph)


_BUILDERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "gen-cnn": _cnn,
    "gen-transformer": _transformer,
    "gen-lstm": _lstm,
    "gen-if": _if,
}

_PAGE = 4096  # external tensors start on a page, so that they can be memory-mapped
_VALUES_AT_ONCE = 1 << 17


def write_external_model(path: str | os.PathLike[str], size: int, *, width: int = 1024, seed: int = SEED) -> Path:
    """Write a runnable model whose weights lie in ``<path>.data``, at least ``size`` bytes.

    A stack of ``x = x + Relu(x W_i + b_i) / layers`` steps. Weights are made and written a few
    rows at a time: memory stays at a few MB for any ``size``.

    Args:
        path: The ``.onnx`` file; the data file is written beside it.
        size: Bytes of weights wanted; rounded up to whole layers of ``4 * width**2`` bytes.
        width: Rows and columns of each layer.
        seed: Other seed, other weights.

    Returns:
        ``path``.

    Raises:
        ZooError: ``size`` or ``width`` is not positive.
    """
    if size <= 0 or width <= 0:
        raise ZooError(f"size {size} and width {width} have to be positive")
    path = Path(path)
    data = path.with_name(path.name + ".data")
    layers = -(-size // (4 * width * width))
    graph = onnx.GraphProto(name="gen_external")
    last = "x"
    with data.open("wb") as sink:
        for i in range(layers):
            offset = -(-sink.tell() // _PAGE) * _PAGE
            sink.seek(offset)
            for rows in _rows(f"layer{i}.weight", width, seed):
                sink.write(rows.tobytes())
            weight = TensorProto(
                name=f"layer{i}.weight",
                data_type=TensorProto.FLOAT,
                dims=[width, width],
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (
                ("location", data.name),
                ("offset", str(offset)),
                ("length", str(4 * width * width)),
            ):
                weight.external_data.add(key=key, value=value)
            bias = normal(f"layer{i}.bias", (width,), 0.1, seed)
            graph.initializer.extend([weight, to_tensor(f"layer{i}.bias", bias)])
            out = "y" if i == layers - 1 else f"layer{i}.out"
            graph.node.extend(
                [
                    helper.make_node("MatMul", [last, weight.name], [f"layer{i}.linear"], f"layer{i}"),
                    helper.make_node(
                        "Add",
                        [f"layer{i}.linear", f"layer{i}.bias"],
                        [f"layer{i}.sum"],
                        f"layer{i}_bias",
                    ),
                    helper.make_node("Relu", [f"layer{i}.sum"], [f"layer{i}.act"], f"layer{i}_act"),
                    helper.make_node("Mul", [f"layer{i}.act", "step"], [f"layer{i}.step"], f"layer{i}_step"),
                    helper.make_node("Add", [last, f"layer{i}.step"], [out], f"layer{i}_skip"),
                ]
            )
            last = out
    graph.initializer.append(to_tensor("step", np.array(1 / layers, np.float32)))
    for values, name in ((graph.input, "x"), (graph.output, "y")):
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]))
    path.write_bytes(to_model(graph).SerializeToString(deterministic=True))
    return path


def _rows(name: str, width: int, seed: int) -> Iterator[Array]:
    step = max(1, _VALUES_AT_ONCE // width)
    for start in range(0, width, step):
        count = min(step, width - start)
        yield normal(f"{name}.{start}", (count, width), 1 / math.sqrt(width), seed)
