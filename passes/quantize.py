"""Fewer bits: int8 by QuantizeLinear/DequantizeLinear, by dynamic quantization, or of weights only.

An integer stands for a real value through r = s (q - z). Four ways to use it at a node:

- **static**: input, weight and output are integers with scales known beforehand:
  y = s_x s_w sum (q_x - z_x) q_w + b, and the bias is stored as int32 in units of s_x s_w;
- **dynamic**: the input's scale is computed at run time; only nodes whose work is a matrix product;
- **blocked**: weights of 8 or 4 bits, a scale for each block of a column, multiplied as they are stored by a
  kernel for matrix products of few rows; see :mod:`onnxcompress.passes._blocked`;
- **weights**: w = s q is multiplied out once when the model is loaded; the node runs as before,
  the file is four times smaller.

Which is used where is not decided here. What onnxruntime can run as integers, and how the graph
must look for that, was measured: scalar activation scales, u8 activations with s8 weights, per
channel weights, and pass-through operators that keep their input's scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.base import Choice, Pass, Precision, Site, Skip, Skipped, Stage, Term
from onnxcompress.errors import PassError
from onnxcompress.passes import _blocked, _blocks, _dynamic, _qdq, _weight_storage
from onnxcompress.passes._int8 import (
    ActivationOptions,
    Int8Options,
    WeightOptions,
    activation_inputs,
    calibrated_name,
    fused_activation,
    weight_indices,
)
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need, RangeMethod, Statistic
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["Quantize"]

STATIC, DYNAMIC, WEIGHTS, SMOOTH, BLOCKED = "static", "dynamic", "weights", "smooth", "blocked"
_MODES = (WEIGHTS, BLOCKED, DYNAMIC, SMOOTH, STATIC)


@dataclass(frozen=True)
class Quantize(Pass):
    """Int8 or less: static QDQ, dynamic, weights in blocks, or stored weights only, each where it pays.

    Attributes:
        modes: which forms may be used: weights (stored as int8 only), blocked (weights of few bits in blocks, read by
            MatMulNBits), dynamic, smooth (dynamic with the input's outlier channels scaled into the weights), static.
        ranges: how activation ranges are read off the histograms.
        percentile: for ``ranges=percentile``: share of values inside the range, in per cent.
        weight_ranges: ``minmax``, or ``mse`` for a search per channel.
        per_channel: a scale per output channel, where the target can.
        bias_correction: add E[(W - Q(W)) x] to the bias of static nodes (Nagel et al. 2019,
            arXiv 1906.04721).
        min_weights: tensors with fewer elements are not worth storing as int8, or in blocks.
        bits: of weights in blocks: 8, 4 or both.
        block: how many weights may share a scale: powers of two from 16 to 256. Weights of 8 bits take the largest.
        feedback: weights of 4 bits in blocks are rounded one after the other, later ones to make up for what earlier
            ones lose (GPTQ); needs calibration data.
        only: just these operator types; all by default.
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    min_opset: ClassVar[int] = 13

    modes: tuple[str, ...] = _MODES
    ranges: RangeMethod = RangeMethod.PERCENTILE
    percentile: float = 99.99
    weight_ranges: RangeMethod = RangeMethod.MINMAX
    per_channel: bool = True
    bias_correction: bool = False
    min_weights: int = 256
    bits: tuple[int, ...] = (8, 4)
    block: tuple[int, ...] = (32, 128)
    feedback: bool = True
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.modes) - set(_MODES)
        if unknown or not self.modes:
            raise ValueError(f"modes must be some of {', '.join(_MODES)}, not {sorted(unknown) or 'none'}")
        if not 50 < self.percentile <= 100:
            raise ValueError("percentile must be above 50 and at most 100")
        if self.weight_ranges not in (RangeMethod.MINMAX, RangeMethod.MSE):
            raise ValueError("weight_ranges must be minmax or mse")
        if not self.bits or not set(self.bits) <= set(_blocks.BITS):
            raise ValueError(f"bits must be some of {_words(_blocks.BITS)}, not {_words(self.bits)}")
        if not self.block or not set(self.block) <= set(_blocks.BLOCKS):
            raise ValueError(f"block must be some of {_words(_blocks.BLOCKS)}, not {_words(self.block)}")

    @classmethod
    def by_default(cls) -> Self:
        """Without feedback: second moments take long, and samples that weights are fitted to flatter their prices."""
        return cls(feedback=False)

    def gentler(self) -> Iterator[Quantize]:
        if not self.bias_correction:
            yield replace(self, bias_correction=True)
        if self.ranges is not RangeMethod.MSE:
            yield replace(self, bias_correction=True, ranges=RangeMethod.MSE)

    # --- finding -------------------------------------------------------------------------------

    def sites(self, view: GraphView) -> Iterator[Site | Skipped]:
        done = view.quantized_nodes
        inside_another: set[str] = set()
        for node in view.nodes():
            if (self.only and node.op_type not in self.only) or str(node.name) in inside_another:
                continue
            try:
                if done:
                    raise Skip(f"the model is already quantized ({done[0]!r} and {len(done) - 1} more nodes)")
                site = self._match(node, view)
                inside_another.update(site.nodes)
                yield site
            except Skip as skip:
                if skip.reason:
                    yield Skipped(str(node.name), skip.reason)

    def _match(self, node: ir.Node, view: GraphView) -> Site:
        if node.domain not in ("", "ai.onnx"):
            raise Skip(f"operator {node.domain}.{node.op_type} is not standard ONNX")
        constants = [view.weight(node.inputs[i]) for i in weight_indices(node)]
        for tensor in constants:
            if tensor is not None and tensor.dtype in _OTHER_FLOATS:
                raise Skip(f"its weight is {tensor.dtype.name.lower()}; only float32 is quantized")
        if not any(t is not None and t.dtype == ir.DataType.FLOAT for t in constants):
            if not any(v is not None and v.dtype in (ir.DataType.FLOAT, None) for v in node.outputs):
                raise Skip("")  # shapes, indices, masks: no float work
            if BLOCKED in self.modes and _blocked.weight_of(node) is not None:  # a table that is turned
                return self._site(node, view)
            if node.op_type not in _qdq.STATIC_OPS:
                raise Skip(_why_float(node))
            if view.in_subgraph(node):
                raise Skip("it is inside a subgraph, where activations cannot be observed")
            problem = _qdq.obstacle(node, view)
            if problem:
                raise Skip(problem)
        return self._site(node, view)

    def _site(self, node: ir.Node, view: GraphView) -> Site:
        extra = fused_activation(node, view)
        return Site.of(node) if extra is None else Site.of(node, extra)

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        node, last = view.node(choice.site.key), view.node(choice.site.nodes[-1])
        if choice.name == SMOOTH and node.inputs[0] is not None:
            yield Need(str(node.inputs[0].name), Statistic.CHANNELS, axis=-1)
        if isinstance(choice.detail, _blocked.Blocking) and choice.detail.gram is not None:
            yield choice.detail.gram
        if choice.name != STATIC:
            return
        for name in _qdq.range_owners(node, last, view):
            yield Need(name, Statistic.HISTOGRAM)
        if self.bias_correction and node.op_type == "Conv":
            yield Need(str(activation_inputs(node, view)[0].name), Statistic.CHANNELS, axis=1)

    # --- choosing ------------------------------------------------------------------------------

    def choices(self, site: Site, view: GraphView, target: Target) -> Iterator[Choice]:
        node, last = view.node(site.key), view.node(site.nodes[-1])
        options = self._options(target)
        weights = [node.inputs[i] for i in weight_indices(node) if view.is_float_weight(node.inputs[i])]
        size = sum(t.size for t in map(view.weight, weights) if t is not None)
        noise = tuple(Term("weight", str(w.name)) for w in weights if w is not None)
        saved = 3 * size if size >= self.min_weights else 0
        offered = bool(saved) and WEIGHTS in self.modes and target.folds_constants
        if offered and node.op_type == "Gather" and any(_turned(w) for w in weights if w is not None):
            raise Skip("a product reads its table, too, for which it would stay in float beside the integers")
        if offered:
            # multiplied out at load, except a table, of which only the rows that are looked up ever are
            resident = None if node.op_type == "Gather" else 0
            yield Choice(
                site,
                WEIGHTS,
                bytes_saved=saved,
                resident_saved=resident,
                stored=True,
                terms=noise,
                detail=options,
                effects=False,
            )
        for choice in self._in_blocks(site, view, target):
            offered = True
            yield choice
        inputs = tuple(str(v.name) for v in activation_inputs(node, view))
        dynamic = bool(noise) and DYNAMIC in self.modes and _dynamic.obstacle(node, view, target) is None
        if dynamic:
            terms = (*noise, Term("dynamic", inputs[0]))
            yield Choice(
                site, DYNAMIC, Precision.DYNAMIC, bytes_saved=saved, terms=terms, detail=options, effects=False
            )
            if SMOOTH in self.modes and node.op_type != "LSTM" and not view.in_subgraph(node):
                yield Choice(
                    site,
                    SMOOTH,
                    Precision.DYNAMIC,
                    bytes_saved=saved,
                    terms=(Term("smooth", site.key),),
                    adds=(("Mul", inputs[0]),),
                    detail=options,
                    calibrated=True,
                    effects=False,
                )
        if STATIC in self.modes and (problem := self._no_static(node, view, target)):
            if not dynamic and not offered:
                raise Skip(problem)
        elif STATIC in self.modes:
            owners = _qdq.range_owners(node, last, view)
            yield Choice(
                site,
                STATIC,
                Precision.STATIC,
                reads=inputs,
                native=_qdq.native_inputs(node, view),
                writes=tuple(str(v.name) for v in last.outputs if v.name),
                bytes_saved=saved,
                terms=(*noise, *(Term("activation", name) for name in owners)),
                detail=options,
                calibrated=True,
                effects=False,
            )

    def _in_blocks(self, site: Site, view: GraphView, target: Target) -> Iterator[Choice]:
        if BLOCKED not in self.modes:
            return
        node, problems = view.node(site.key), []
        weight = _blocked.weight_of(node)
        enough = weight is not None and weight.tensor.size >= self.min_weights
        for form in self._forms():
            problem = _blocked.obstacle(node, target, form)
            if problem is None and enough:
                table = self._options(target).weights
                yield _blocked.choice(site, node, view, form, table, feedback=self.feedback)
            else:
                problems.append(problem or f"it has fewer than {self.min_weights} weights")
        if self.modes == (BLOCKED,) and len(problems) == len(self._forms()):
            raise Skip("; ".join(dict.fromkeys(problems)))

    def _forms(self) -> tuple[_blocks.Form, ...]:
        """From weak to strong."""
        blocks = sorted(set(self.block))
        of = {8: blocks[-1:], 4: blocks}  # 8 bits are fine enough for any block
        return tuple(_blocks.Form(bits, block) for bits in sorted(set(self.bits), reverse=True) for block in of[bits])

    def _no_static(self, node: ir.Node, view: GraphView, target: Target) -> str | None:
        if view.in_subgraph(node):
            return "it is inside a subgraph, where activations cannot be observed"
        problem = _qdq.obstacle(node, view) or _qdq.no_kernel(node, target)
        if problem and weight_indices(node) and not target.folds_constants:
            return f"{problem}, and weights stored as int8 would be multiplied out in every run"
        return problem

    # --- making --------------------------------------------------------------------------------

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
        node = rewriter.node(choice.site.key)
        options = choice.detail
        if isinstance(options, _blocked.Blocking):
            _blocked.apply(node, rewriter, options, _blocked.rounding_with(options.gram, evidence))
            return
        if not isinstance(options, Int8Options):
            raise PassError(f"this choice at {choice.site.key!r} was not made by quantize")
        weights = options.weights
        if choice.name == STATIC:
            static = self._static(rewriter, evidence, options)
            static.apply(node, rewriter.node(choice.site.nodes[-1]), weights)
        elif choice.name == DYNAMIC:
            _dynamic.apply(node, rewriter, weights)
        elif choice.name == SMOOTH:
            _dynamic.smooth(node, rewriter, weights, _absmax(node, evidence))
        else:
            _weight_storage.apply(node, rewriter, weights)

    def simulate(self, term: Term, rewriter: Rewriter, evidence: Evidence, target: Target, switch: ir.Value) -> bool:
        options = self._options(target)
        if term.kind == "smooth":
            node = rewriter.node(term.subject)
            _dynamic.simulate_smooth(node, rewriter, options.weights, _absmax(node, evidence), switch)
            return True
        value = rewriter.value(term.subject)
        blocked = next((form for form in self._forms() if form.name == term.kind), None)
        if blocked is not None:
            _blocked.simulate(value, rewriter, target, blocked, switch, evidence if self.feedback else None)
        elif term.kind == "weight":
            _weight_storage.simulate(value, rewriter, options.weights, switch)
        elif term.kind == "dynamic":
            _dynamic.simulate(value, rewriter, switch)
        else:
            self._static(rewriter, evidence, options).simulate(value, switch)
        return True

    def _static(self, rewriter: Rewriter, evidence: Evidence, options: Int8Options) -> _qdq.Static:
        return _qdq.Static(rewriter, evidence, self.ranges, self.percentile, self.bias_correction, options.activations)

    def _options(self, target: Target) -> Int8Options:
        return Int8Options(
            WeightOptions(self.per_channel and target.per_channel, target.weight_bits, self.weight_ranges),
            ActivationOptions(target.activation == "s8", target.activation_symmetric),
        )


_OTHER_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def _absmax(node: ir.Node, evidence: Evidence) -> npt.NDArray[np.float64]:
    """Largest absolute value of each channel a matrix product reads."""
    value = node.inputs[0]
    need = Need("" if value is None else calibrated_name(value), Statistic.CHANNELS, axis=-1)
    if not evidence.has(need):
        raise Skip(f"{need.value!r} was not observed in calibration")
    return evidence.channels(need.value, -1).absmax


def _turned(weight: ir.Value) -> bool:
    """Whether a table is also read as it is by a Transpose."""
    return any(use.node.op_type == "Transpose" for use in weight.uses())


def _words(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _why_float(node: ir.Node) -> str:
    """A reason for the report; empty for nodes that compute nothing worth a word."""
    if weight_indices(node):
        return "its weight is not a constant"
    if node.op_type in _qdq.SILENT_OPS:
        return ""
    return f"onnxruntime has no int8 kernel for {node.op_type}"
