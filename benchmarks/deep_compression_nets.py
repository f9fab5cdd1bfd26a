"""LeNet-300-100 and LeNet-5 trained on scikit-learn's digits, and written as ONNX.

The digits are real handwriting, 1,797 images of 8 x 8 (MNIST has 70,000 of 28 x 28, and no package brings it). They are
taken as they are; so LeNet-300-100 reads 64 values instead of 784, and LeNet-5 pads its 5 x 5 kernels, for two layers
of them without padding leave nothing of 8 x 8. Both are smaller than in the paper, where the first layers hold most of
what can be left out: 50,200 weights instead of 266,200, and 131,000 instead of 430,500.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["DIGITS", "NETS", "Split", "digits", "trained"]

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

NETS = ("lenet-300-100", "lenet-5")
DIGITS = "scikit-learn digits, 8 x 8"
SIDE, CLASSES = 8, 10
_KERNEL, _CHANNELS, _HIDDEN = 5, (20, 50), 500
_EPOCHS, _BATCH, _RATE, _DECAY = 20, 64, 1e-3, 1e-4


@dataclass(frozen=True)
class Split:
    """Images in 0..1, one to a row of 64, and what they show."""

    images: Array
    labels: Labels


@cache
def digits(seed: int = 0) -> dict[str, Split]:
    """``train`` (897), ``validation`` and ``test`` (450 each), the classes in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    first, test_x, first_y, test_y = train_test_split(images, labels, test_size=450, random_state=seed, stratify=labels)
    train_x, check_x, train_y, check_y = train_test_split(
        first, first_y, test_size=450, random_state=seed, stratify=first_y
    )
    return {
        "train": Split(train_x, train_y),
        "validation": Split(check_x, check_y),
        "test": Split(test_x, test_y),
    }


def trained(net: str, seed: int = 0) -> onnx.ModelProto:
    """A trained network; input ``x``, output ``logits``."""
    train = digits()["train"]
    return _mlp(train, seed) if net == "lenet-300-100" else _lenet5(train, seed)


def _mlp(train: Split, seed: int) -> onnx.ModelProto:
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier((300, 100), alpha=0.1, max_iter=300, random_state=seed).fit(train.images, train.labels)
    nodes, weights, last = [], dict[str, Any](), "x"
    for i, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True), 1):
        weights |= {f"fc{i}.weight": weight, f"fc{i}.bias": bias}
        out = "logits" if i == len(model.coefs_) else f"fc{i}"
        nodes.append(helper.make_node("Gemm", [last, f"fc{i}.weight", f"fc{i}.bias"], [out], name=f"fc{i}"))
        if out != "logits":
            nodes.append(helper.make_node("Relu", [out], [f"relu{i}"], name=f"relu{i}"))
        last = f"relu{i}"
    return _model(nodes, weights, ["N", SIDE * SIDE])


# --- a convolutional network in numpy ------------------------------------------------------------------

Weights = dict[str, Array]


def _windows(x: Array) -> Array:
    """5 x 5 windows around every place: [N, C, H, W] -> [N, H, W, C * 25]."""
    pad = _KERNEL // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    view = np.lib.stride_tricks.sliding_window_view(padded, (_KERNEL, _KERNEL), axis=(2, 3))
    n, c, h, w = x.shape
    return np.ascontiguousarray(view.transpose(0, 2, 3, 1, 4, 5)).reshape(n, h, w, c * _KERNEL**2)


def _scatter(windows: Array, shape: tuple[int, ...]) -> Array:
    """Windows' gradients added where they came from."""
    n, c, h, w = shape
    pad, parts = _KERNEL // 2, windows.reshape(n, h, w, c, _KERNEL, _KERNEL)
    out = np.zeros((n, c, h + 2 * pad, w + 2 * pad), np.float32)
    for i in range(_KERNEL):
        for j in range(_KERNEL):
            out[:, :, i : i + h, j : j + w] += parts[..., i, j].transpose(0, 3, 1, 2)
    return out[:, :, pad : pad + h, pad : pad + w]


def _pooled(x: Array) -> tuple[Array, Labels]:
    """Largest of 2 x 2, and where it was."""
    n, c, h, w = x.shape
    cells = x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
    best = cells.argmax(-1)
    return np.take_along_axis(cells, best[..., None], -1)[..., 0], best


def _unpooled(gradient: Array, best: Labels) -> Array:
    n, c, h, w = gradient.shape
    cells = np.zeros((n, c, h, w, 4), np.float32)
    np.put_along_axis(cells, best[..., None], gradient[..., None], -1)
    return cells.reshape(n, c, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, 2 * h, 2 * w)


def _gradients(p: Weights, images: Array, labels: Labels) -> Weights:
    """Of the mean cross entropy."""
    x, kept = images.reshape(-1, 1, SIDE, SIDE), []
    for name in ("conv1", "conv2"):
        windows = _windows(x)
        shape, (x, best) = x.shape, _pooled((windows @ p[f"{name}.w"] + p[f"{name}.b"]).transpose(0, 3, 1, 2))
        kept.append((name, windows, shape, best))
    flat = x.reshape(len(x), -1)
    hidden = flat @ p["fc1.w"] + p["fc1.b"]
    active = np.maximum(hidden, 0)
    logits = active @ p["fc2.w"] + p["fc2.b"]
    logits -= logits.max(1, keepdims=True)
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    found: Weights = {"fc2.w": active.T @ error, "fc2.b": error.sum(0)}
    error = (error @ p["fc2.w"].T) * (hidden > 0)
    found |= {"fc1.w": flat.T @ error, "fc1.b": error.sum(0)}
    gradient = (error @ p["fc1.w"].T).reshape(x.shape)
    for name, windows, shape, best in reversed(kept):
        rows = _unpooled(gradient, best).transpose(0, 2, 3, 1).reshape(-1, best.shape[1])
        found |= {f"{name}.w": windows.reshape(len(rows), -1).T @ rows, f"{name}.b": rows.sum(0)}
        gradient = _scatter(rows @ p[f"{name}.w"].T, shape)
    return found


def _lenet5(train: Split, seed: int) -> onnx.ModelProto:
    """As in Caffe, which the paper compressed: no nonlinearity behind convolutions but the pooling."""
    rng, area = np.random.default_rng(seed), _KERNEL**2
    flat = _CHANNELS[1] * (SIDE // 4) ** 2
    shapes = {"conv1": (area, _CHANNELS[0]), "conv2": (_CHANNELS[0] * area, _CHANNELS[1]), "fc1": (flat, _HIDDEN),
              "fc2": (_HIDDEN, CLASSES)}  # fmt: skip
    p: Weights = {}
    for name, (rows, columns) in shapes.items():
        p[f"{name}.w"] = (rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)).astype(np.float32)
        p[f"{name}.b"] = np.zeros(columns, np.float32)
    moments = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in p.items()}
    step = 0
    for _ in range(_EPOCHS):
        order = rng.permutation(len(train.labels))
        for start in range(0, len(order), _BATCH):
            batch, step = order[start : start + _BATCH], step + 1
            for name, gradient in _gradients(p, train.images[batch], train.labels[batch]).items():  # Adam
                mean, square = moments[name]
                mean += 0.1 * (gradient - mean)
                square += 0.001 * (gradient**2 - square)
                change = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
                decay = _DECAY * p[name] if name.endswith(".w") else 0
                p[name] = (p[name] - _RATE * change - decay).astype(np.float32)
    return _lenet5_model(p)


def _lenet5_model(p: Weights) -> onnx.ModelProto:
    nodes, weights, last = [], dict[str, Any](), "x"
    for i, name in enumerate(("conv1", "conv2"), 1):
        kernel = p[f"{name}.w"].T.reshape(_CHANNELS[i - 1], -1, _KERNEL, _KERNEL)
        weights |= {f"{name}.weight": kernel, f"{name}.bias": p[f"{name}.b"]}
        inputs = [last, f"{name}.weight", f"{name}.bias"]
        nodes += [
            helper.make_node("Conv", inputs, [name], name=name, pads=[_KERNEL // 2] * 4),
            helper.make_node("MaxPool", [name], [f"pool{i}"], name=f"pool{i}", kernel_shape=[2, 2], strides=[2, 2]),
        ]
        last = f"pool{i}"
    weights |= {
        f"{n}.{long}": p[f"{n}.{short}"] for n in ("fc1", "fc2") for long, short in (("weight", "w"), ("bias", "b"))
    }
    nodes += [
        helper.make_node("Flatten", [last], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "fc1.weight", "fc1.bias"], ["fc1"], name="fc1"),
        helper.make_node("Relu", ["fc1"], ["relu"], name="relu"),
        helper.make_node("Gemm", ["relu", "fc2.weight", "fc2.bias"], ["logits"], name="fc2"),
    ]
    return _model(nodes, weights, ["N", 1, SIDE, SIDE])


def _model(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Any], shape: Sequence[str | int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "lenet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], CLASSES])],
        [numpy_helper.from_array(np.ascontiguousarray(w, np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model
