"""One small graph for each coupling rule: ONNX text and the shapes of its weights.

Every graph has something to remove unless the case is about why nothing can be: projections in front and
behind make the axes free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A graph.

    Attributes:
        body: ONNX text of the graph.
        weights: shapes of random float weights.
        ints: constant integers.
        opset: of the standard operators.
        domain: another one it uses.
        runs: whether onnxruntime has the operators.
    """

    body: str
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ints: dict[str, list[int]] = field(default_factory=dict)
    opset: int = 17
    domain: str = ""
    runs: bool = True


def _picture(
    middle: str,
    weights: dict[str, tuple[int, ...]],
    ints: dict[str, list[int]] | None = None,
    left: int = 8,
    right: int = 8,
    side: int = 6,
    opset: int = 17,
    runs: bool = True,
) -> Case:
    """Conv, something on ``a`` that gives ``b``, Conv."""
    body = f"""m (float[2, 3, 6, 6] x) => (float[2, 4, {side}, {side}] y) {{
        a = Conv (x, w1)
        {middle}
        y = Conv (b, w2)
    }}"""
    ends = {"w1": (left, 3, 1, 1), "w2": (4, right, 1, 1)}
    return Case(body, ends | weights, ints or {}, opset, runs=runs)


def _rows(
    middle: str,
    weights: dict[str, tuple[int, ...]] | None = None,
    ints: dict[str, list[int]] | None = None,
    left: int = 8,
    right: int = 8,
    opset: int = 17,
    domain: str = "",
    runs: bool = True,
) -> Case:
    """MatMul, something on ``a`` [2, 5, left] that gives ``b`` [2, 5, right], MatMul."""
    body = f"""m (float[2, 5, 3] x) => (float[2, 5, 4] y) {{
        a = MatMul (x, w1)
        {middle}
        y = MatMul (b, w2)
    }}"""
    return Case(body, {"w1": (3, left), "w2": (right, 4)} | (weights or {}), ints or {}, opset, domain, runs)


def _three(
    middle: str,
    weights: dict[str, tuple[int, ...]],
    q: int = 8,
    k: int = 8,
    v: int = 8,
    out: int = 8,
    ints: dict[str, list[int]] | None = None,
    opset: int = 17,
    domain: str = "",
    runs: bool = True,
) -> Case:
    """Query, key and value ``q k v`` from one input, something that gives ``b``."""
    body = f"""m (float[2, 5, 3] x) => (float[2, 5, 4] y) {{
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        {middle}
        y = MatMul (b, w2)
    }}"""
    ends = {"wq": (3, q), "wk": (3, k), "wv": (3, v), "w2": (out, 4)}
    return Case(body, ends | weights, ints or {}, opset, domain, runs)


CASES: dict[str, Case] = {
    # convolution
    "conv": _picture("b = Relu (a)", {}),
    "conv with bias": _picture("c = Conv (a, w, bias)\n b = Relu (c)", {"w": (8, 8, 1, 1), "bias": (8,)}),
    "depthwise conv": _picture("b = Conv <group = 8> (a, w, bias)", {"w": (8, 1, 1, 1), "bias": (8,)}),
    "grouped conv": _picture("b = Conv <group = 2> (a, w)", {"w": (8, 4, 1, 1)}),
    "conv transpose": _picture("b = ConvTranspose (a, w, bias)", {"w": (8, 6, 1, 1), "bias": (6,)}, right=6),
    "grouped conv transpose": _picture("b = ConvTranspose <group = 2> (a, w)", {"w": (8, 3, 1, 1)}, right=6),
    "pool": _picture("b = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)", {}),
    "pool and unpool": _picture(
        "c, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)\n"
        "b = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (c, i)",
        {},
    ),
    "positions of a pool are read": _picture(
        "c, i = MaxPool <kernel_shape = [1, 1]> (a)\n f = Cast <to = 1> (i)\n b = Add (c, f)", {}
    ),
    "resize by scales": _picture('b = Resize <mode = "nearest"> (a, , s)', {"s": (-1,)}, side=12),
    "resize to sizes": _picture('b = Resize <mode = "nearest"> (a, , , s)', {}, {"s": [2, 8, 12, 12]}, side=12),
    "depth to space": _picture("b = DepthToSpace <blocksize = 2> (a)", {}, right=2, side=12),
    "depth to space, columns first": _picture(
        'b = DepthToSpace <blocksize = 2, mode = "CRD"> (a)', {}, right=2, side=12
    ),
    "space to depth": _picture("b = SpaceToDepth <blocksize = 2> (a)", {}, right=32, side=3),
    "local response": _picture("b = LRN <size = 3> (a)", {}),
    "grid sample": _picture("b = GridSample (a, grid)", {"grid": (2, 6, 6, 2)}),
    "regions": Case(
        """m (float[2, 3, 6, 6] x, float[3, 4] rois, int64[3] which) => (float[3, 4, 2, 2] y) {
            a = Conv (x, w1)
            b = RoiAlign <output_height = 2, output_width = 2> (a, rois, which)
            y = Conv (b, w2)
        }""",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
    ),
    "columns to image": Case(
        """m (float[2, 3, 9] x) => (float[2, 4, 4, 4] y) {
            a = Conv (x, w1)
            b = Col2Im (a, size, block)
            y = Conv (b, w2)
        }""",
        {"w1": (24, 3, 1), "w2": (4, 6, 1, 1)},
        {"size": [4, 4], "block": [2, 2]},
        opset=18,
    ),
    # element by element
    "broadcast": _picture("c = Mul (a, s)\n b = Add (c, t)", {"s": (1, 8, 1, 1), "t": (8, 1, 1)}),
    "a weight of two readers": _picture(
        "c = Mul (a, s)\n d = Conv (c, w)\n b = Mul (d, s)", {"s": (8, 1, 1), "w": (8, 8, 1, 1)}
    ),
    "residual": _picture("c = Conv (a, w)\n b = Add (a, c)", {"w": (8, 8, 1, 1)}),
    "where": _picture("c = Greater (a, zero)\n b = Where (c, a, s)", {"s": (8, 1, 1), "zero": (1,)}),
    "quantize": _picture("c = QuantizeLinear (a, one)\n b = DequantizeLinear (c, one)", {"one": (-1, 0)}),
    # movement
    "concat": _picture("c = Conv (x, w)\n b = Concat <axis = 1> (c, a)", {"w": (5, 3, 1, 1)}, right=13),
    "split": _picture("c, d = Split <axis = 1> (a, s)\n b = Relu (d)", {}, {"s": [3, 5]}, right=5),
    "split of one": _picture("c, d = Split <axis = 1> (a, s)\n b = Add (c, d)", {}, {"s": [1, 7]}, right=7),
    "slice": _picture("b = Slice (a, s, e, one)", {}, {"s": [2], "e": [7], "one": [1]}, right=5),
    "slice in steps": _picture(
        "b = Slice (a, s, e, one, two)", {}, {"s": [1], "e": [8], "one": [1], "two": [2]}, right=4
    ),
    "gather of constants": _picture("b = Gather <axis = 1> (a, i)", {}, {"i": [5, 0, -2, 3]}, right=4),
    "embedding": Case(
        """m (int64[2, 5] x) => (float[2, 5, 4] y) {
            b = Gather (table, x)
            y = MatMul (b, w2)
        }""",
        {"table": (11, 8), "w2": (8, 4)},
    ),
    "pad": _picture("c = Pad (a, p)\n b = MaxPool <kernel_shape = [3, 3]> (c)", {}, {"p": [0, 0, 1, 1, 0, 0, 1, 1]}),
    "padded channels": _picture("b = Pad (a, p)", {}, {"p": [0, 1, 0, 0, 0, 1, 0, 0]}, right=10),
    # normalization
    "batch norm": _picture(
        "b = BatchNormalization (a, s, t, mean, var)", dict.fromkeys(("s", "t", "mean"), (8,)) | {"var": (-1, 8)}
    ),
    "instance norm": _picture("b = InstanceNormalization (a, s, t)", {"s": (8,), "t": (8,)}),
    "layer norm": _rows("b = LayerNormalization (a, s, t)", {"s": (8,), "t": (8,)}),
    "layer norm of two axes": _rows("b = LayerNormalization <axis = 1> (a, s)", {"s": (5, 8)}),
    "rms norm": _rows("b = RMSNormalization (a, s)", {"s": (8,)}, opset=23, runs=False),
    "group norm": _picture("b = GroupNormalization <num_groups = 4> (a, s, t)", {"s": (8,), "t": (8,)}, opset=21),
    "group norm by reshape": _picture(
        "c = Reshape (a, groups)\n d = InstanceNormalization (c, s, t)\n shape = Shape (a)\n b = Reshape (d, shape)",
        {"s": (4,), "t": (4,)},
        {"groups": [0, 4, -1]},
    ),
    "mean and variance": _picture("b = MeanVarianceNormalization <axes = [0, 2, 3]> (a)", {}),
    "skip layer norm": _rows(
        "c = MatMul (x, w)\n b = com.microsoft.SkipLayerNormalization (a, c, s)",
        {"w": (3, 8), "s": (8,)},
        domain="com.microsoft",
    ),
    # reduction
    "mean of places": _picture(
        "c = ReduceMean <axes = [2, 3], keepdims = 0> (a)\n d = Unsqueeze (c, ax)\n b = Mul (a, d)", {}, {"ax": [2, 3]}
    ),
    "sum of channels": _picture("c = ReduceSum (a, one)\n b = Mul (a, c)", {}, {"one": [1]}),
    "softmax": _rows("b = Softmax (a)", {}),
    "softmax of others": _rows("b = Softmax <axis = 1> (a)", {}),
    "top k": _rows("b, i = TopK (a, k)", {}, {"k": [4]}, right=4),
    "running sum": _rows("b = CumSum (a, one)", {}, {"one": [1]}),
    # shape
    "flatten": Case(
        """m (float[2, 3, 2, 2] x) => (float[2, 4] y) {
            a = Conv (x, w1)
            f = Flatten (a)
            y = Gemm <transB = 1> (f, w2)
        }""",
        {"w1": (8, 3, 1, 1), "w2": (4, 32)},
    ),
    "shuffle": _picture(
        "c = Reshape (a, s)\n d = Transpose <perm = [0, 2, 1, 3, 4]> (c)\n b = Reshape (d, t)",
        {},
        {"s": [2, 2, 4, 6, 6], "t": [0, -1, 6, 6]},
    ),
    "reshape that mixes": _picture(
        "c = Reshape (a, s)\n d = Reshape (c, t)\n b = Relu (d)", {}, {"s": [2, 12, 4, 6], "t": [2, 8, 6, 6]}
    ),
    "expand": _rows("c = Expand (s, to)\n b = Add (a, c)", {"s": (1, 8)}, {"to": [5, 8]}),
    "tile": _rows("b = Tile (a, r)", {}, {"r": [1, 1, 2]}, right=16),
    "constant of a computed shape": _rows("n = Shape (a)\n c = ConstantOfShape (n)\n b = Add (a, c)", {}),
    "squeeze": _rows("c = Unsqueeze (a, one)\n d = Squeeze (c, one)\n b = Relu (d)", {}, {"one": [1]}),
    "extent read for a number": _rows(
        "n = Shape <start = 2> (a)\n f = Cast <to = 1> (n)\n r = Sqrt (f)\n b = Div (a, r)", {}
    ),
    "size": _rows("n = Size (a)\n f = Cast <to = 1> (n)\n b = Div (a, f)", {}),
    # products
    "matmul of two values": _rows(
        "c = MatMul (x, w)\n t = Transpose <perm = [0, 2, 1]> (c)\n b = MatMul (a, t)", {"w": (3, 8)}, right=5
    ),
    "gemm": Case(
        """m (float[2, 3] x) => (float[2, 4] y) {
            a = Gemm <transB = 1> (x, w1, b1)
            b = Relu (a)
            y = Gemm (b, w2)
        }""",
        {"w1": (8, 3), "b1": (8,), "w2": (8, 4)},
    ),
    "einsum": _rows('b = Einsum <equation = "bti,hi->bth"> (a, w)', {"w": (6, 8)}, right=6),
    "einsum into heads": _rows(
        'c = Einsum <equation = "...i,ihd->...hd"> (a, w)\n b = Reshape (c, s)',
        {"w": (8, 3, 4)},
        {"s": [0, 0, -1]},
        right=12,
    ),
    "einsum of a sum": _rows(
        'c = Einsum <equation = "bti->bt"> (a)\n d = Unsqueeze (c, two)\n b = Mul (a, d)', {}, {"two": [2]}
    ),
    # recurrent
    "lstm": _rows(
        "t = Transpose <perm = [1, 0, 2]> (a)\n h = LSTM <hidden_size = 6> (t, w, r, bias)\n s = Squeeze (h, one)\n"
        "b = Transpose <perm = [1, 0, 2]> (s)",
        {"w": (1, 24, 8), "r": (1, 24, 6), "bias": (1, 48)},
        {"one": [1]},
        right=6,
    ),
    "gru in both directions": _rows(
        "t = Transpose <perm = [1, 0, 2]> (a)\n"
        'h = GRU <hidden_size = 6, direction = "bidirectional", linear_before_reset = 1> (t, w, r, bias)\n'
        "s = Transpose <perm = [2, 0, 1, 3]> (h)\n b = Reshape (s, both)",
        {"w": (2, 18, 8), "r": (2, 18, 6), "bias": (2, 36)},
        {"both": [0, 0, -1]},
        right=12,
    ),
    # indexing
    "scatter elements": _rows("b = ScatterElements <axis = 1> (a, i, u)", {"u": (2, 1, 8)}, {"i": [-2, 1, 8]}),
    "scatter nd": _rows("b = ScatterND (a, i, u)", {"u": (1, 8)}, {"i": [-1, 2]}),
    "gather nd": _rows(
        "c = GatherND <batch_dims = 1> (a, i)\n d = Unsqueeze (c, one)\n b = Add (a, d)", {}, {"i": [-2, 1], "one": [1]}
    ),
    "gather elements": _rows("c = GatherElements <axis = 1> (a, i)\n b = Add (a, c)", {}, {"i": [-2, 1, 8]}),
    "one hot": _rows(
        "i = Cast <to = 7> (a)\n h = OneHot (i, depth, values)\n c = ReduceSum <keepdims = 0> (h, last)\n"
        "b = Mul (a, c)",
        {"values": (2,)},
        {"depth": [3], "last": [3]},
    ),
    "triangle": _rows("b = Trilu (a)", {}),
    "reverse sequence": _rows("b = ReverseSequence <time_axis = 1, batch_axis = 0> (a, n)", {}, {"n": [2, 5]}),
    "compress": _rows(
        "t = Cast <to = 9> (some)\n c = Compress <axis = 1> (a, t)\n d = ReduceMax <axes = [1]> (c)\n b = Add (a, d)",
        {},
        {"some": [1, 0, 1, 1, 0]},
    ),
    "non zero": _rows(
        "i = NonZero (a)\n f = Cast <to = 1> (i)\n c = ReduceSum <keepdims = 0> (f)\n b = Add (a, c)", {}
    ),
    # attention
    "attention": _three("b = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)", {}, q=16, out=16, opset=23),
    "multi head attention": _three(
        "b = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, bias)", {"bias": (24,)}, domain="com.microsoft"
    ),
    "multi head attention without bias": _three(
        "b = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)", {}, v=12, out=12, domain="com.microsoft"
    ),
    "attention that projects": _rows(
        "b = com.microsoft.Attention <num_heads = 2> (a, w, bias)",
        {"w": (8, 24), "bias": (24,)},
        domain="com.microsoft",
    ),
    "rotary embedding": _three(
        "r = com.microsoft.RotaryEmbedding <num_heads = 2> (q, i, cos, sin)\n"
        "s = com.microsoft.RotaryEmbedding <num_heads = 2> (k, i, cos, sin)\n"
        "b = com.microsoft.MultiHeadAttention <num_heads = 2> (r, s, v)",
        {"cos": (9, 4), "sin": (9, 4)},
        q=16,
        k=16,
        v=16,
        out=16,
        ints={"i": [-2, 5]},
        domain="com.microsoft",
    ),
    "group query attention": _three(
        "l = Cast <to = 6> (lengths)\n t = Cast <to = 6> (total)\n"
        "b, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, , , l, t)",
        {},
        q=32,
        k=16,
        v=16,
        out=32,
        ints={"lengths": [4, 4], "total": [5]},
        domain="com.microsoft",
    ),
    "rotary embedding of onnx": _three(
        "r = RotaryEmbedding <num_heads = 2> (q, cos, sin, i)\n"
        "s = RotaryEmbedding <num_heads = 2> (k, cos, sin, i)\n"
        "b = Attention <q_num_heads = 2, kv_num_heads = 2> (r, s, v)",
        {"cos": (9, 2), "sin": (9, 2)},
        ints={"i": [-2, 5]},
        opset=23,
    ),
    "rotary embedding of pairs side by side": _three(
        "r = com.microsoft.RotaryEmbedding <interleaved = 1> (q, i, cos, sin)\n"
        "s = com.microsoft.RotaryEmbedding <interleaved = 1> (k, i, cos, sin)\n"
        "b = com.microsoft.MultiHeadAttention <num_heads = 2> (r, s, v)",
        {"cos": (9, 4), "sin": (9, 4)},
        q=16,
        k=16,
        v=16,
        out=16,
        ints={"i": [-2, 5]},
        domain="com.microsoft",
    ),
    "embeddings with layer norm": Case(
        """m (int32[2, 5] x) => (float[2, 5, 4] y) {
            b, mask = com.microsoft.EmbedLayerNormalization (x, , words, places, , gamma, beta)
            y = MatMul (b, w2)
        }""",
        {"words": (11, 8), "places": (9, 8), "gamma": (8,), "beta": (8,), "w2": (8, 4)},
        domain="com.microsoft",
    ),
    # quantized
    "quantized conv": _picture(
        "one = Constant <value = float {0.1}> ()\n zero = Constant <value = uint8 {3}> ()\n"
        "aq = QuantizeLinear (a, one, zero)\n zs = Constant <value = int8 {0}> ()\n"
        "wq = QuantizeLinear (w, one, zs)\n"
        "cq = QLinearConv (aq, one, zero, wq, one, zs, one, zero)\n b = DequantizeLinear (cq, one, zero)",
        {"w": (6, 8, 1, 1)},
        right=6,
    ),
    "integer conv": _picture(
        "one = Constant <value = float {0.1}> ()\n zero = Constant <value = uint8 {3}> ()\n"
        "aq = QuantizeLinear (a, one, zero)\n zs = Constant <value = uint8 {0}> ()\n"
        "wq = QuantizeLinear (w, one, zs)\n ci = ConvInteger (aq, wq, zero, zs)\n b = Cast <to = 1> (ci)",
        {"w": (6, 8, 1, 1)},
        right=6,
    ),
    "integer matmul": _rows(
        "one = Constant <value = float {0.1}> ()\n zero = Constant <value = int8 {0}> ()\n"
        "aq, scale, zp = DynamicQuantizeLinear (a)\n wq = QuantizeLinear (w, one, zero)\n"
        "ci = MatMulInteger (aq, wq, zp, zero)\n b = Cast <to = 1> (ci)",
        {"w": (8, 6)},
        right=6,
    ),
    "quantized matmul": _rows(
        "one = Constant <value = float {0.1}> ()\n zero = Constant <value = int8 {0}> ()\n"
        "aq = QuantizeLinear (a, one, zero)\n wq = QuantizeLinear (w, one, zero)\n"
        "cq = QLinearMatMul (aq, one, zero, wq, one, zero, one, zero)\n b = DequantizeLinear (cq, one, zero)",
        {"w": (8, 6)},
        right=6,
    ),
    # another operator's
    "no rule": _rows("b = com.example.Fly (a)", {}, domain="com.example", runs=False),
    # control flow
    "if": _rows(
        """s = ReduceSum <keepdims = 0> (x)
        c = Greater (s, zero)
        b = If (c) <then_branch = yes () => (p) { p = Relu (a) }, else_branch = no () => (n) { n = Mul (a, g) }>""",
        {"zero": (-1, 0), "g": (8,)},
    ),
    "loop": _rows(
        """b = Loop (n, , a) <body = go (int64 i, bool c, float[2, 5, 8] s) => (d, t) {
            d = Identity (c)
            t = Mul (s, g)
        }>""",
        {"g": (8,)},
        {"n": [3]},
    ),
    "captured by a loop": _rows(
        """z = ReduceMax <axes = [2]> (x)
        v = Loop (n, , z) <body = go (int64 i, bool c, float[2, 5, 1] s) => (d, t) {
            d = Identity (c)
            h = MatMul (a, g)
            r = Relu (h)
            e = MatMul (r, k)
            t = Add (s, e)
        }>
        b = Add (a, v)""",
        {"g": (8, 6), "k": (6, 1)},
        {"n": [3]},
    ),
    "dropout with its mask": _rows("c, mask = Dropout (a)\n f = Cast <to = 1> (mask)\n b = Mul (c, f)"),
}
