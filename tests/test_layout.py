"""What the cost model says onnxruntime runs, against the graphs onnxruntime really makes of models."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from onnxcompress.execution import Execution
from onnxcompress.fitting.equations import seen
from onnxcompress.fitting.measuring import forms, session
from onnxcompress.fitting.nets import CHECKED, FITTED, Net
from onnxcompress.fitting.structure import structure
from onnxcompress.profile import Profile

Array = npt.NDArray[np.generic]

SAME = {
    "FusedConv": "Conv", "Upsample": "Resize", "QuickGelu": "Sigmoid", "Gemm": "MatMul", "FusedGemm": "MatMul",
    "BatchNormalization": "Conv",  # a depthwise convolution of one tap, where the layout is blocked
}  # fmt: skip
"""Names onnxruntime and the model have for one kernel."""

FREE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def ones(*shape: int) -> npt.NDArray[np.float32]:
    return np.ones(shape, np.float32)


def model(body: str, x: str = "1,16,8,8", **weights: Array) -> onnx.ModelProto:
    """ONNX text from ``x`` to ``y``; ``w`` and ``v`` differ, or what reads them would be merged."""
    rank = ",".join("nchw"[: x.count(",") + 1])
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[{x}] x) => (float[{rank}] y) {{ {body} }}'
    )
    for i, node in enumerate(proto.graph.node):
        node.name = f"n{i}"
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def optimized(proto: onnx.ModelProto, folder: Path) -> onnx.GraphProto:
    path = folder / "optimized.onnx"
    session(proto, save=str(path))
    return onnx.load(path).graph


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Channels of a block on this machine, as the padding of a convolution with one output channel tells."""
    graph = optimized(model("y = Conv(x, w)", w=ones(1, 16, 1, 1)), tmp_path_factory.mktemp("block"))
    conv = next(n for n in graph.node if n.op_type == "Conv")
    if "nchwc" not in conv.domain:
        pytest.skip("onnxruntime has no blocked layout on this machine")
    return next(int(w.dims[0]) for w in graph.initializer if w.name == conv.input[1])


@pytest.fixture(scope="module")
def profile(block: int) -> Profile:
    return structure([], block=block, precisions=("f32", "u8s8"))


@dataclasses.dataclass(frozen=True)
class Run:
    """What is run: kernels by operator type, and the values brought into and out of the blocked layout."""

    kernels: Counter[str]
    inwards: frozenset[str]
    outwards: frozenset[str]


def real(proto: onnx.ModelProto, folder: Path) -> Run:
    nodes = optimized(proto, folder).node
    kinds = [SAME.get(n.op_type, n.op_type) for n in nodes]
    return Run(
        Counter(k for k in kinds if not k.startswith("Reorder") and k not in FREE),
        frozenset(n.input[0] for n in nodes if n.op_type == "ReorderInput"),
        frozenset(n.output[0] for n in nodes if n.op_type == "ReorderOutput"),
    )


def predicted(proto: onnx.ModelProto, profile: Profile) -> Run:
    feed = {
        v.name: np.zeros([d.dim_value for d in v.type.tensor_type.shape.dim], np.float32) for v in proto.graph.input
    }
    return told(Execution(profile, *seen(proto, feed)))


def told(execution: Execution) -> Run:
    reordered = [(node, value) for node, values in execution.reordered.items() for value in values]
    kinds = [SAME.get(n.op_type, n.op_type) for n in execution.view.nodes() if execution.runs(n)]
    return Run(
        Counter(k for k in kinds if k not in FREE),
        frozenset(str(v.name) for n, v in reordered if v in n.inputs),
        frozenset(str(v.name) for n, v in reordered if v not in n.inputs),
    )


# ---- networks --------------------------------------------------------------------------------------------

SMALL = [n for n in (*FITTED, *CHECKED) if not n.tokens and n.name not in ("residual", "bottleneck", "residual-wide")]


@pytest.mark.parametrize("net", SMALL, ids=lambda net: net.name)
def test_reorders_of_networks(net: Net, profile: Profile, tmp_path: Path) -> None:
    proto = net.build()
    expected = real(proto, tmp_path)
    found = told(Execution(profile, *seen(proto, net.feed())))
    assert (found.inwards, found.outwards) == (expected.inwards, expected.outwards)
    assert found.kernels.total() == expected.kernels.total()


@pytest.mark.parametrize("name", ["mobile-small", "mobile-tiny", "shuffled", "pyramid-relu"])
def test_integer_networks_have_no_blocked_layout(name: str, profile: Profile, tmp_path: Path) -> None:
    net = next(n for n in SMALL if n.name == name)
    proto = forms(net)["wholly"]
    expected = real(proto, tmp_path)
    assert not expected.inwards and not expected.outwards
    assert not Execution(profile, *seen(proto, net.feed())).reordered


# ---- graphs by hand --------------------------------------------------------------------------------------

W, V = ones(16, 16, 1, 1), 2 * ones(16, 16, 1, 1)
C = ones(16, 1, 1)
TWO = np.array([1, 1, 2, 2], np.float32)
UP = 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'

LAYOUTS: dict[str, onnx.ModelProto] = {
    "first layer": model("t = Conv(x, w) u = Relu(t) y = Conv(u, v)", "1,3,8,8", w=ones(16, 3, 1, 1), v=V),
    "residual": model("a = Conv(x, w) b = Conv(a, v) t = Add(a, b) y = Relu(t)", w=W, v=V),
    "residual of a plain map": model("a = Conv(x, w) t = Add(a, x) y = Relu(t)", w=W),
    "residual of a plain convolution": model(
        "a = Conv(x, w) t = Add(a, x) y = Relu(t)", "1,18,8,8", w=ones(18, 18, 1, 1)
    ),
    "sum of what is active already": model(
        "a = Conv(x, w) b = Relu(a) c = Conv(x, v) d = Relu(c) t = Add(b, d) y = Relu(t)", w=W, v=V
    ),
    "two sums": model("i = Conv(x, w) a = Conv(i, v) b = Add(a, i) y = Add(b, i)", w=W, v=V),
    "sum with a pooled map": model("a = Conv(x, w) p = GlobalAveragePool(a) y = Add(a, p)", w=W),
    "product of maps": model("a = Conv(x, w) b = Conv(x, v) y = Mul(a, b)", w=W, v=V),
    "squeeze and excite": model(
        "a = Conv(x, w) p = GlobalAveragePool(a) q = Conv(p, v) r = Relu(q) s = Conv(r, u) t = HardSigmoid(s)"
        "m = Mul(a, t) y = Conv(m, w)", w=W, v=ones(8, 16, 1, 1), u=ones(16, 8, 1, 1),
    ),
    "its gate as it was exported once": model(
        "a = Conv(x, w) p = GlobalAveragePool(a) q = Conv(p, v) r = Add(q, t) s = Clip(r, l, h) u = Div(s, h)"
        "m = Mul(a, u) y = Conv(m, w)", w=W, v=V, t=3 * ones(), l=0 * ones(), h=6 * ones(),
    ),
    "concat of whole blocks": model(
        "a = Conv(x, w) b = Conv(x, v) y = Concat<axis=1>(a, b)", w=W, v=ones(32, 16, 1, 1)
    ),
    "concat of 24 channels": model(
        "a = Conv(x, w) b = Conv(x, v) t = Concat<axis=1>(a, b) y = Conv(t, u)",
        w=ones(20, 16, 1, 1), v=2 * ones(20, 16, 1, 1), u=ones(16, 40, 1, 1),
    ),
    "concat by a negative axis": model(
        "a = Conv(x, w) b = Conv(x, v) y = Concat<axis=-3>(a, b)", w=W, v=ones(32, 16, 1, 1)
    ),
    "split": model(
        "a = Conv(x, w) l, r = Split<axis=1, num_outputs=2>(a) y = Conv(l, v)", "1,32,8,8", w=ones(32, 32, 1, 1), v=V
    ),
    "groups of whole blocks": model("y = Conv<group=2>(x, w)", "1,32,8,8", w=ones(32, 16, 1, 1)),
    "groups of less": model("y = Conv<group=8>(x, w)", "1,32,8,8", w=ones(32, 4, 1, 1)),
    "groups with less to write": model("y = Conv<group=2>(x, w)", "1,32,8,8", w=ones(8, 16, 1, 1)),
    "depthwise": model("a = Conv(x, w) y = Conv<group=20>(a, v)", w=ones(20, 16, 1, 1), v=ones(20, 1, 1, 1)),
    "depthwise that multiplies channels": model("y = Conv<group=16>(x, w)", w=ones(32, 1, 1, 1)),
    "18 channels read": model("y = Conv(x, w)", "1,18,8,8", w=ones(16, 18, 1, 1)),
    "20 channels read": model("y = Conv(x, w)", "1,20,8,8", w=ones(16, 20, 1, 1)),
    "6 channels between": model("a = Conv(x, w) y = Conv(a, v)", w=ones(6, 16, 1, 1), v=ones(16, 6, 1, 1)),
    "17 channels between": model("a = Conv(x, w) y = Conv(a, v)", w=ones(17, 16, 1, 1), v=ones(16, 17, 1, 1)),
    "one dimension": model("y = Conv(x, w)", "1,16,8", w=ones(32, 16, 1)),
    "max pooling by itself": model("y = MaxPool<kernel_shape=[2,2]>(x)"),
    "max pooling of unaligned channels": model("y = MaxPool<kernel_shape=[2,2]>(x)", "1,20,8,8"),
    "and behind a convolution": model("a = Conv(x, w) y = MaxPool<kernel_shape=[2,2]>(a)", w=ones(20, 16, 1, 1)),
    "average pooling of unaligned channels": model("y = AveragePool<kernel_shape=[2,2]>(x)", "1,12,8,8"),
    "global pooling of a plain map": model("t = Abs(x) y = GlobalAveragePool(t)"),
    "global pooling behind a convolution": model("a = Conv(x, w) y = GlobalAveragePool(a)", w=W),
    "global pooling of unaligned channels": model("a = Conv(x, w) y = GlobalMaxPool(a)", w=ones(20, 16, 1, 1)),
    "normalization of a blocked map": model(
        "a = Conv(x, w) r = Relu(a) t = BatchNormalization(r, b, b, b, b) y = Abs(t)", w=W, b=ones(16)
    ),
    "upsampling": model(f"a = Conv(x, w) y = Resize<{UP}>(a, , s)", w=W, s=TWO),
    "upsampling by linear interpolation": model('a = Conv(x, w) y = Resize<mode="linear">(a, , s)', w=W, s=TWO),
    "upsampling with other rounding": model('a = Conv(x, w) y = Resize<mode="nearest">(a, , s)', w=W, s=TWO),
    "upsampling by cubes": model('a = Conv(x, w) y = Resize<mode="cubic">(a, , s)', w=W, s=TWO),
    "upsampling by half": model(f"a = Conv(x, w) y = Resize<{UP}>(a, , s)", w=W, s=np.array([1, 1, 1.5, 1.5], "f4")),
    "weights that are dequantized": model(
        "u = DequantizeLinear(w, s, z) y = Conv(x, u)", w=np.ones((16, 16, 1, 1), np.int8), s=ones(), z=np.int8(0)
    ),
    "weights that are cast": model("u = Cast<to=1>(w) y = Conv(x, u)", w=np.ones((16, 16, 1, 1), np.int8)),
    "Gelu": model("a = Conv(x, w) b = Gelu(a) y = Conv(b, v)", w=W, v=V),
    "Elu": model("a = Conv(x, w) b = Elu(a) y = Conv(b, v)", w=W, v=V),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_reorders_of_graphs(name: str, profile: Profile, tmp_path: Path) -> None:
    expected = real(LAYOUTS[name], tmp_path)
    found = predicted(LAYOUTS[name], profile)
    assert (found.inwards, found.outwards) == (expected.inwards, expected.outwards)
    assert found.kernels == expected.kernels


FUSIONS: dict[str, onnx.ModelProto] = {
    **{f"{op} in a convolution": model(f"a = Conv(x, w) b = {op}(a) y = Conv(b, v)", w=W, v=V)
       for op in ("Relu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "LeakyRelu")},
    **{f"{op} in a plain convolution": model(f"a = Conv(x, w) b = {op}(a) y = Abs(b)", "1,18,8,8", w=ones(18, 18, 1, 1))
       for op in ("Relu", "Sigmoid", "Tanh", "HardSigmoid", "LeakyRelu")},
    "Clip": model("a = Conv(x, w) y = Clip(a, l, h)", w=W, l=0 * ones(), h=ones()),
    "one activation only": model("a = Conv(x, w) b = Relu(a) y = Sigmoid(b)", w=W),
    "Clip after another activation": model(
        "a = Conv(x, w) b = Sigmoid(a) y = Clip(b, l, h)", w=W, l=0 * ones(), h=ones()
    ),
    "Clip after a sum": model(
        "a = Conv(x, w) b = Conv(x, v) t = Add(a, b) y = Clip(t, l, h)", w=W, v=V, l=0 * ones(), h=ones()
    ),
    "LeakyRelu after a sum": model("a = Conv(x, w) b = Conv(x, v) t = Add(a, b) y = LeakyRelu(t)", w=W, v=V),
    "SiLU": model("a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) y = Conv(m, v)", w=W, v=V),
    "SiLU the other way round": model("a = Conv(x, w) s = Sigmoid(a) y = Mul(s, a)", w=W),
    "Mul by channel": model("a = Conv(x, w) y = Mul(a, b)", w=W, b=C),
    "Mul by channel of a batch": model("a = Conv(x, w) y = Mul(a, b)", w=W, b=ones(1, 16, 1, 1)),
    "Mul by a number": model("a = Conv(x, w) y = Mul(a, b)", w=W, b=ones()),
    "Mul by one number in a list": model("a = Conv(x, w) y = Mul(a, b)", w=W, b=ones(1)),
    "Mul along the last axis": model("a = Conv(x, w) y = Mul(a, b)", w=ones(8, 16, 1, 1), b=ones(8)),
    "Mul by pixel": model("a = Conv(x, w) y = Mul(a, b)", w=W, b=ones(1, 16, 8, 8)),
    "Mul by channel after an activation": model("a = Conv(x, w) r = Relu(a) y = Mul(r, b)", w=W, b=C),
    "Add by channel": model("a = Conv(x, w) y = Add(a, b)", w=W, b=C),
    "Add by channel, constant first": model("a = Conv(x, w) y = Add(b, a)", w=W, b=C),
    "Add of a number": model("a = Conv(x, w) y = Add(a, b)", w=W, b=ones()),
    "Add along the last axis": model("a = Conv(x, w) y = Add(a, b)", w=ones(8, 16, 1, 1), b=ones(8)),
    "Add by pixel": model("a = Conv(x, w) y = Add(a, b)", w=W, b=ones(1, 16, 8, 8)),
    "scaled, shifted, summed, active": model(
        "i = Conv(x, v) a = Conv(x, w) b = Mul(a, c) d = Add(b, c) e = Add(d, i) y = Relu(e)", w=W, v=V, c=C
    ),
    "normalized": model("a = Conv(x, w) y = BatchNormalization(a, b, b, b, b)", w=W, b=ones(16)),
    "normalized after a transposed convolution": model(
        "a = ConvTranspose(x, w) y = BatchNormalization(a, b, b, b, b)", w=W, b=ones(16)
    ),
    "active after a transposed convolution": model("a = ConvTranspose(x, w) y = Relu(a)", w=W),
    "bias of a product": model("t = MatMul(x, w) y = Add(t, b)", "4,8", w=ones(8, 6), b=ones(6)),
    "bias first": model("t = MatMul(x, w) y = Add(b, t)", "4,8", w=ones(8, 6), b=ones(6)),
    "bias of one row": model("t = MatMul(x, w) y = Add(t, b)", "4,8", w=ones(8, 6), b=ones(1, 6)),
    "bias of batches": model("t = MatMul(x, w) y = Add(t, b)", "2,4,8", w=ones(8, 6), b=ones(6)),
    "a number added to a product": model("t = MatMul(x, w) y = Add(t, b)", "4,8", w=ones(8, 6), b=ones()),
    "a whole map added to products": model("t = MatMul(x, w) y = Add(t, b)", "2,4,8", w=ones(8, 6), b=ones(2, 4, 6)),
    "Gemm and Relu": model("t = Gemm(x, w, b) y = Relu(t)", "4,8", w=ones(8, 6), b=ones(6)),
    "Gemm and Clip": model(
        "t = Gemm(x, w, b) y = Clip(t, l, h)", "4,8", w=ones(8, 6), b=ones(6), l=0 * ones(), h=ones()
    ),
}  # fmt: skip
TO_CONV = {"Mul by channel after an activation"}  # onnxruntime makes such a product a convolution


@pytest.mark.parametrize("name", FUSIONS)
def test_what_vanishes(name: str, profile: Profile, tmp_path: Path) -> None:
    expected, found = real(FUSIONS[name], tmp_path), predicted(FUSIONS[name], profile)
    assert (found.inwards, found.outwards) == (expected.inwards, expected.outwards)
    if name in TO_CONV:
        assert found.kernels.total() == expected.kernels.total()
    else:
        assert found.kernels == expected.kernels


def test_a_pad_goes_into_the_convolution_behind_it(profile: Profile, tmp_path: Path) -> None:
    proto = model("p = Pad(x, n) y = Conv(p, w)", w=ones(16, 16, 3, 3), n=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    expected, found = real(proto, tmp_path), predicted(proto, profile)
    assert found.kernels == expected.kernels == Counter({"Conv": 1})
    # The model reorders what comes out of the Pad, onnxruntime what goes into it.
    assert len(found.inwards) == len(expected.inwards) == 1


def test_weights_that_are_computed_stay_plain(profile: Profile, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[1,16,8,8] x, float[16,16,1,1] w) => (float[n,c,h,q] y)'
        "{ y = Conv(x, w) }"
    )
    proto.graph.node[0].name = "n0"
    assert predicted(proto, profile) == real(proto, tmp_path)


def test_pooling_that_tells_where_stays_plain(profile: Profile, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[1,16,8,8] x) => (float[n,c,h,q] y, int64[n,c,h,q] i)'
        "{ y, i = MaxPool<kernel_shape=[2,2]>(x) }"
    )
    proto.graph.node[0].name = "n0"
    assert predicted(proto, profile) == real(proto, tmp_path)


def test_the_check_can_fail(profile: Profile, tmp_path: Path) -> None:
    assert profile.layout is not None
    wrong = profile.layout.model_copy(update={"starts": ()})
    proto = LAYOUTS["residual"]
    assert predicted(proto, profile.model_copy(update={"layout": wrong})) != real(proto, tmp_path)
