"""Small valid graphs from short programs: lists of (step, number, number), so that a failing one shrinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import model as models

__all__ = ["PICTURE_STEPS", "SEQUENCE_STEPS", "picture_graph", "programs", "sequence_graph"]

Program = Sequence[tuple[str, int, int]]
SIDE = 6
STEPS = 5


class _Graph:
    """Nodes and weights as they come; ``shapes`` has 2 in place of the batch."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.rng = np.random.default_rng(7)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes = {"x": tuple(shape)}
        self.live = ["x"]

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        fan = max(1, int(np.prod(shape[1:])))
        return self.const((gain * self.rng.normal(size=shape) / np.sqrt(fan)).astype(np.float32))

    def const(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def __call__(self, op: str, inputs: Sequence[str], *shapes: Sequence[int], **attributes: Any) -> str:
        return self.many(op, inputs, *shapes, **attributes)[0]

    def many(self, op: str, inputs: Sequence[str], *shapes: Sequence[int], **attributes: Any) -> list[str]:
        number = len(self.nodes)
        outputs = [f"{op.lower()}{number}" + (f"_{i}" if i else "") for i in range(len(shapes))]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, f"{op}{number}", **attributes))
        self.shapes |= {o: tuple(s) for o, s in zip(outputs, shapes, strict=True)}
        return outputs

    def reshape(self, x: str, shape: Sequence[int], style: int) -> str:
        """The target as numbers, with 0 and -1, or worked out from Shape as an exporter does; axis 0 is the batch."""
        if style % 3 == 0:
            target = self.ints(0, *shape[1:-1], -1)
        elif style % 3 == 1:
            target = self.ints(-1, *shape[1:])
        else:
            batch = self("Gather", [self("Shape", [x], (len(self.shapes[x]),)), self.ints(0)], (1,), axis=0)
            rest = [self.ints(n) for n in shape[1:]]
            own = self.shapes[x]
            for k in range(1, min(len(shape), len(own))):
                if shape[k] == own[k] and style % 2:  # a width read back from the tensor itself
                    extents = self("Shape", [x], (len(own),))
                    rest[k - 1] = self("Gather", [extents, self.ints(k)], (1,), axis=0)
            target = self("Concat", [batch, *rest], (len(shape),), axis=0)
        return self("Reshape", [x, target], shape)

    def finish(self, outputs: dict[str, Sequence[int]]) -> ir.Model:
        def named(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape[1:]])

        graph = helper.make_graph(
            self.nodes,
            "random",
            [named("x", self.shapes["x"])],
            [named(n, s) for n, s in outputs.items()],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        found = ir.from_proto(model)
        models.canonicalize(found)
        return found


def _divisor(n: int, choice: int) -> int:
    found = [d for d in range(1, n + 1) if n % d == 0]
    return found[choice % len(found)]


# --- pictures [N, C, H, W] -------------------------------------------------------------------------


def _conv(g: _Graph, x: str, a: int, b: int) -> str:
    cin, cout = g.shapes[x][1], (4, 6, 8, 12)[a % 4]
    kernel = 1 + 2 * (b % 2)
    inputs = [x, g.weight(cout, cin, kernel, kernel), *([g.weight(cout)] if b % 3 else [])]
    return g("Conv", inputs, (2, cout, SIDE, SIDE), kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4)


def _grouped(g: _Graph, x: str, a: int, b: int) -> str:
    cin = g.shapes[x][1]
    groups = _divisor(cin, a)
    cout = groups * (1 + b % 3)
    inputs = [x, g.weight(cout, cin // groups, 3, 3), g.weight(cout)]
    return g("Conv", inputs, (2, cout, SIDE, SIDE), kernel_shape=[3, 3], pads=[1] * 4, group=groups)


def _transposed(g: _Graph, x: str, a: int, b: int) -> str:
    cin = g.shapes[x][1]
    groups = _divisor(cin, a)
    each = 1 + b % 4
    inputs = [x, g.weight(cin, each, 1, 1), g.weight(groups * each)]
    return g("ConvTranspose", inputs, (2, groups * each, SIDE, SIDE), kernel_shape=[1, 1], group=groups)


def _batch_norm(g: _Graph, x: str, a: int, b: int) -> str:
    c = g.shapes[x][1]
    variance = g.const((0.5 + g.rng.random(c)).astype(np.float32))
    return g("BatchNormalization", [x, g.weight(c), g.weight(c), g.weight(c), variance], g.shapes[x])


def _activation(g: _Graph, x: str, a: int, b: int) -> str:
    return g(("Relu", "Sigmoid", "HardSwish", "Softplus")[a % 4], [x], g.shapes[x])


def _join(g: _Graph, x: str, a: int, b: int) -> str:
    y = g.live[b % len(g.live)]
    if g.shapes[y] != g.shapes[x]:
        y = g("Conv", [y, g.weight(g.shapes[x][1], g.shapes[y][1], 1, 1)], g.shapes[x], kernel_shape=[1, 1])
    return g(("Add", "Mul", "Sub", "Max")[a % 4], [x, y], g.shapes[x])


def _concat(g: _Graph, x: str, a: int, b: int) -> str:
    y = g.live[b % len(g.live)]
    total = g.shapes[x][1] + g.shapes[y][1]
    return g("Concat", [x, y] if a % 2 else [y, x], (2, total, *g.shapes[x][2:]), axis=1)


def _split(g: _Graph, x: str, a: int, b: int) -> str:
    c = g.shapes[x][1]
    if c < 2:
        return x
    first = 1 + a % (c - 1) if b % 2 else c // 2
    rest = g.shapes[x][2:]
    left, right = g.many("Split", [x, g.ints(first, c - first)], (2, first, *rest), (2, c - first, *rest), axis=1)
    g.live += [left, right]
    return right if b % 3 else left


def _slice(g: _Graph, x: str, a: int, b: int) -> str:
    c = g.shapes[x][1]
    if c < 3:
        return x
    if b % 4 == 0 and c % 2 == 0:
        return g("Slice", [x, g.ints(a % 2), g.ints(c), g.ints(1), g.ints(2)], (2, c // 2, *g.shapes[x][2:]))
    start = a % (c - 2)
    end = start + 1 + b % (c - start)
    end = min(end, c)
    bounds = [g.ints(start), g.ints(end if end < c else 2**62), g.ints(1), g.ints(1)]
    return g("Slice", [x, *bounds], (2, end - start, *g.shapes[x][2:]))


def _gather(g: _Graph, x: str, a: int, b: int) -> str:
    c = g.shapes[x][1]
    chosen = np.random.default_rng(a).permutation(c)[: max(1, c - b % 3)]
    return g("Gather", [x, g.const(chosen.astype(np.int64))], (2, len(chosen), *g.shapes[x][2:]), axis=1)


def _shuffle(g: _Graph, x: str, a: int, b: int) -> str:
    c = g.shapes[x][1]
    groups = _divisor(c, a)
    y = g.reshape(x, (2, groups, c // groups, SIDE, SIDE), b)
    y = g("Transpose", [y], (2, c // groups, groups, SIDE, SIDE), perm=[0, 2, 1, 3, 4])
    return g.reshape(y, g.shapes[x], b // 3)


def _group_norm(g: _Graph, x: str, a: int, b: int) -> str:
    c = g.shapes[x][1]
    groups = _divisor(c, a)
    y = g("Reshape", [x, g.ints(0, groups, -1)], (2, groups, c // groups * SIDE * SIDE))
    ones, zeros = g.const(np.ones(groups, np.float32)), g.const(np.zeros(groups, np.float32))
    y = g("InstanceNormalization", [y, ones, zeros], g.shapes[y])
    y = g("Reshape", [y, g("Shape", [x], (4,))], g.shapes[x]) if b % 2 else g.reshape(y, g.shapes[x], b)
    return g("Mul", [y, g.weight(c, 1, 1)], g.shapes[x])


def _scale(g: _Graph, x: str, a: int, b: int) -> str:
    shared = [w.name for w in g.weights if list(w.dims) == [1, g.shapes[x][1], 1, 1]]
    weight = shared[0] if shared and a % 2 else g.weight(1, g.shapes[x][1], 1, 1)
    return g("Mul", [x, weight], g.shapes[x])


def _excite(g: _Graph, x: str, a: int, b: int) -> str:
    c, inner = g.shapes[x][1], 2 + a % 4
    y = g("GlobalAveragePool", [x], (2, c, 1, 1))
    y = g("Conv", [y, g.weight(inner, c, 1, 1)], (2, inner, 1, 1), kernel_shape=[1, 1])
    y = g("Conv", [y, g.weight(c, inner, 1, 1)], (2, c, 1, 1), kernel_shape=[1, 1])
    return g("Mul", [x, g("Sigmoid", [y], g.shapes[y])], g.shapes[x])


_PICTURE: dict[str, Callable[[_Graph, str, int, int], str]] = {
    "conv": _conv,
    "grouped": _grouped,
    "transposed": _transposed,
    "batch norm": _batch_norm,
    "activation": _activation,
    "join": _join,
    "concat": _concat,
    "split": _split,
    "slice": _slice,
    "gather": _gather,
    "shuffle": _shuffle,
    "group norm": _group_norm,
    "scale": _scale,
    "excite": _excite,
}
PICTURE_STEPS = tuple(_PICTURE)


def picture_graph(program: Program) -> ir.Model:
    """Conv first, the program, then classes from a mean and from all places of the last tensors."""
    g = _Graph((2, 3, SIDE, SIDE))
    g.live = [_conv(g, "x", 2, 1)]
    for step, a, b in program:
        x = _PICTURE[step](g, g.live[-1 - (a // 7) % min(2, len(g.live))], a, b)
        if g.shapes[x][1] <= 48:
            g.live.append(x)
    last, other = g.live[-1], g.live[len(g.live) // 2]
    y = g("Conv", [last, g.weight(6, g.shapes[last][1], 1, 1)], (2, 6, SIDE, SIDE), kernel_shape=[1, 1])
    pooled = g("Flatten", [g("GlobalAveragePool", [y], (2, 6, 1, 1))], (2, 6))
    flat = g("Flatten", [other], (2, int(np.prod(g.shapes[other][1:]))))
    scores = g("Gemm", [flat, g.weight(4, g.shapes[flat][1]), g.weight(4)], (2, 4), transB=1)
    classes = g("MatMul", [pooled, g.weight(6, 4)], (2, 4))
    return g.finish({scores: (2, 4), classes: (2, 4)})


# --- sequences [N, T, D] ---------------------------------------------------------------------------


def _linear(g: _Graph, x: str, a: int, b: int, width: int | None = None) -> str:
    cin, cout = g.shapes[x][2], width or (4, 8, 12, 16)[a % 4]
    y = g("MatMul", [x, g.weight(cin, cout)], (2, STEPS, cout))
    return g("Add", [g.weight(cout), y], g.shapes[y]) if b % 2 else y


def _layer_norm(g: _Graph, x: str, a: int, b: int) -> str:
    d = g.shapes[x][2]
    return g("LayerNormalization", [x, g.weight(d), g.weight(d)], g.shapes[x], axis=-1)


def _attention(g: _Graph, x: str, a: int, b: int) -> str:
    heads, d = (2, 4)[a % 2], (2, 4)[b % 2]
    kv = heads // 2 if a % 3 == 0 else heads

    def project(count: int, perm: list[int]) -> str:
        y = g.reshape(_linear(g, x, 0, b, count * d), (2, STEPS, count, d), b)
        shape = [g.shapes[y][k] for k in perm]
        return g("Transpose", [y], shape, perm=perm)

    q, k, v = project(heads, [0, 2, 1, 3]), project(kv, [0, 2, 1, 3]), project(kv, [0, 2, 1, 3])
    if kv < heads:
        k, v = (_repeat(g, t, heads, kv, d, b) for t in (k, v))
    k = g("Transpose", [k], (2, heads, d, STEPS), perm=[0, 1, 3, 2])
    y = g("Softmax", [g("MatMul", [q, k], (2, heads, STEPS, STEPS))], (2, heads, STEPS, STEPS), axis=-1)
    y = g("MatMul", [y, v], (2, heads, STEPS, d))
    y = g("Transpose", [y], (2, STEPS, heads, d), perm=[0, 2, 1, 3])
    return _linear(g, g.reshape(y, (2, STEPS, heads * d), a), a, b)


def _repeat(g: _Graph, x: str, heads: int, kv: int, d: int, style: int) -> str:
    y = g("Unsqueeze", [x, g.ints(2)], (2, kv, 1, STEPS, d))
    if style % 2:
        y = g("Tile", [y, g.ints(1, 1, heads // kv, 1, 1)], (2, kv, heads // kv, STEPS, d))
    else:
        y = g("Expand", [y, g.ints(1, kv, heads // kv, 1, d)], (2, kv, heads // kv, STEPS, d))
    return g.reshape(y, (2, heads, STEPS, d), style)


def _packed_attention(g: _Graph, x: str, a: int, b: int) -> str:
    heads, d = (2, 3)[a % 2], (2, 4)[b % 2]
    y = _linear(g, x, 0, 1, 3 * heads * d)
    if a % 3 == 0:
        parts = g.many("Split", [y, g.ints(*[heads * d] * 3)], *[(2, STEPS, heads * d)] * 3, axis=2)
        parts = [g.reshape(t, (2, STEPS, heads, d), b) for t in parts]
    else:
        y = g.reshape(y, (2, STEPS, 3, heads, d), b)
        parts = [g("Gather", [y, g.const(np.array(i))], (2, STEPS, heads, d), axis=2) for i in range(3)]
    q, k, v = (g("Transpose", [t], (2, heads, STEPS, d), perm=[0, 2, 1, 3]) for t in parts)
    scores = g("Einsum", [q, k], (2, heads, STEPS, STEPS), equation="bhsd,bhtd->bhst")
    scores = g("Mul", [scores, g.const(np.float32(0.3))], g.shapes[scores])
    y = g(
        "Einsum",
        [g("Softmax", [scores], g.shapes[scores], axis=-1), v],
        (2, STEPS, heads, d),
        equation="bhst,bhtd->bshd",
    )
    return g.reshape(y, (2, STEPS, heads * d), a)


def _gated(g: _Graph, x: str, a: int, b: int) -> str:
    inner = (4, 6)[a % 2]
    both = _linear(g, x, 0, b, 2 * inner)
    left, right = g.many("Split", [both, g.ints(inner, inner)], *[(2, STEPS, inner)] * 2, axis=2)
    return g("Mul", [left, g("Sigmoid", [right], g.shapes[right])], g.shapes[left])


def _recurrent(g: _Graph, x: str, a: int, b: int) -> str:
    op, gates = (("LSTM", 4), ("GRU", 3), ("RNN", 1))[a % 3]
    cin, units, ways = g.shapes[x][2], (3, 4)[b % 2], 1 + b % 2
    y = g("Transpose", [x], (STEPS, 2, cin), perm=[1, 0, 2])
    weights = [g.weight(ways, gates * units, cin), g.weight(ways, gates * units, units)]
    bias = g.weight(ways, 2 * gates * units)
    extra: dict[str, Any] = {"linear_before_reset": 1} if op == "GRU" and b % 3 else {}
    y = g(op, [y, *weights, bias], (STEPS, ways, 2, units), hidden_size=units,
          direction="bidirectional" if ways == 2 else "forward", **extra)  # fmt: skip
    y = g("Transpose", [y], (2, STEPS, ways, units), perm=[2, 0, 1, 3])
    return g("Reshape", [y, g.ints(0, 0, -1)], (2, STEPS, ways * units))


def _sum(g: _Graph, x: str, a: int, b: int) -> str:
    y = g.live[b % len(g.live)]
    if g.shapes[y] != g.shapes[x]:
        y = _linear(g, y, 0, a, g.shapes[x][2])
    return g(("Add", "Mul", "Min")[a % 3], [x, y], g.shapes[x])


def _beside(g: _Graph, x: str, a: int, b: int) -> str:
    y = g.live[b % len(g.live)]
    return g("Concat", [x, y], (2, STEPS, g.shapes[x][2] + g.shapes[y][2]), axis=-1)


def _half_turn(g: _Graph, x: str, a: int, b: int) -> str:
    d = g.shapes[x][2]
    if d % 2:
        return x
    first = g("Slice", [x, g.ints(0), g.ints(d // 2), g.ints(2)], (2, STEPS, d // 2))
    second = g("Slice", [x, g.ints(d // 2), g.ints(2**62), g.ints(2)], (2, STEPS, d // 2))
    turned = g("Concat", [g("Neg", [second], g.shapes[second]), first], g.shapes[x], axis=-1)
    return g(
        "Add", [g("Mul", [x, g.weight(d)], g.shapes[x]), g("Mul", [turned, g.weight(1, d)], g.shapes[x])], g.shapes[x]
    )


def _smooth(g: _Graph, x: str, a: int, b: int) -> str:
    return g(("Relu", "Tanh", "Erf")[a % 3], [x], g.shapes[x])


def _dense(g: _Graph, x: str, a: int, b: int) -> str:
    d, cout = g.shapes[x][2], 4 + 2 * (a % 3)
    if b % 2:
        return g("Einsum", [x, g.weight(cout, d)], (2, STEPS, cout), equation="bti,oi->bto")
    return g("Einsum", [x, g.weight(d, cout)], (2, STEPS, cout), equation="...i,io->...o")


_SEQUENCE: dict[str, Callable[[_Graph, str, int, int], str]] = {
    "linear": _linear,
    "layer norm": _layer_norm,
    "attention": _attention,
    "packed attention": _packed_attention,
    "gated": _gated,
    "recurrent": _recurrent,
    "sum": _sum,
    "beside": _beside,
    "half turn": _half_turn,
    "smooth": _smooth,
    "dense": _dense,
}
SEQUENCE_STEPS = tuple(_SEQUENCE)


def sequence_graph(program: Program) -> ir.Model:
    """Linear first, the program, then a linear head."""
    g = _Graph((2, STEPS, 5))
    g.live = [_linear(g, "x", 1, 1)]
    for step, a, b in program:
        x = _SEQUENCE[step](g, g.live[-1 - (a // 7) % min(2, len(g.live))], a, b)
        if g.shapes[x][2] <= 48:
            g.live.append(x)
    last = g.live[-1]
    y = g("MatMul", [last, g.weight(g.shapes[last][2], 3)], (2, STEPS, 3))
    return g.finish({y: (2, STEPS, 3)})


def programs(steps: Sequence[str], longest: int = 7) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """Programs of up to so many steps."""
    number = st.integers(0, 41)
    return st.lists(st.tuples(st.sampled_from(steps), number, number), min_size=1, max_size=longest)
