"""Names of operator types: which there are, and which is meant by one that is not among them."""

from __future__ import annotations

import re
from collections.abc import Collection

from onnxcompress.errors import suggest
from onnxcompress.work import FAMILY, kinds_of

__all__ = ["known_operator"]

# com.microsoft of onnxruntime 1.32, as far as it runs when a model has been exported or optimized; newer ones
# can be written with their domain. Listed, for asking onnxruntime would load it for every profile.
_CONTRIB = (
    "AttnLSTM", "BeamSearch", "BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "CDist",
    "ComplexMul", "ComplexMulConj", "ConvTransposeWithDynamicPads", "CropAndResize", "DecoderAttention",
    "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "DequantizeBFP", "DequantizeWithOrder",
    "DynamicQuantizeMatMul", "DynamicTimeWarping", "EPContext", "EmbedLayerNormalization", "ExpandDims", "FusedConv",
    "FusedGemm", "FusedMatMul", "FusedMatMulActivation", "GatedAdd", "GatedRelativePositionBias", "GemmFastGelu",
    "GemmFloat8", "GemmaRotaryEmbedding", "GreedySearch", "GroupNorm", "GroupQueryAttention", "Inverse", "Irfft",
    "LongformerAttention", "MRotaryEmbedding", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger16", "MatMulIntegerToFloat",
    "MatMulNBits", "MatMulNBitsMlp", "MatMulNBitsQkv", "MaxpoolWithMask", "MoE", "MulInteger", "MultiHeadAttention",
    "MurmurHash3", "NGramRepeatBlock", "NhwcConv", "NhwcFusedConv", "NhwcMaxPool", "PackedAttention",
    "PackedMultiHeadAttention", "PagedAttention", "QAttention", "QEmbedLayerNormalization", "QGemm", "QLinearAdd",
    "QLinearAveragePool", "QLinearConcat", "QLinearConvTranspose", "QLinearGlobalAveragePool", "QLinearLeakyRelu",
    "QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "QMoE", "QOrderedAttention",
    "QOrderedGelu", "QOrderedLayerNormalization", "QOrderedMatMul", "QuantizeBFP", "QuantizeWithOrder",
    "ReduceSumInteger", "RelativePositionBias", "RemovePadding", "ReorderInput", "ReorderOutput", "RestorePadding",
    "Rfft", "RotaryEmbedding", "Sampling", "SkipGroupNorm", "SkipSimplifiedLayerNormalization", "SparseAttention",
    "SparseToDenseMatMul", "Tokenizer", "TorchEmbedding", "TransposeMatMul", "UnfoldTensor", "WhisperBeamSearch",
    "WordConvEmbedding",
)  # fmt: skip
_QUALIFIED = re.compile(r"[A-Za-z][\w-]*(\.[\w-]+)*\.[A-Z]\w*")


def known_operator(name: str, *, besides: Collection[str] = (), qualified: bool = False) -> str:
    """The name, if there is such an operator type.

    Args:
        name: "Conv", or "com.example.Conv".
        besides: other names that are fine.
        qualified: with a domain any name is fine: plug-ins and runtimes have operators of their own.

    Raises:
        ValueError: there is none; says what may be meant.

    >>> known_operator("com.example.Fly", qualified=True)
    'com.example.Fly'
    """
    if name in besides or name in FAMILY or kinds_of(name) != ("elementwise",):
        return name
    if qualified and _QUALIFIED.fullmatch(name):
        return name
    from onnx.defs import get_all_schemas  # takes a moment, and hardly a profile needs it

    known = {*FAMILY, *_CONTRIB, "Conv", "MatMul", "Gemm", *(schema.name for schema in get_all_schemas())}
    if name in known:
        return name
    meant = suggest(name, {*known, *besides})
    if not meant.startswith("did you mean"):
        parts = [*sorted(besides), "an operator type of ONNX or onnxruntime"]
        meant = f"known: {', '.join(parts)}{', or one of your own with its domain: com.example.Op' * qualified}"
    what = "neither a kernel kind nor an operator type" if besides else "not an operator type"
    raise ValueError(f"{name!r} is {what}; {meant}")
