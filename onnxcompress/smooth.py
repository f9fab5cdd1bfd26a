"""Which values of a model are smooth functions of its weights, and which come of a decision.

Each value gets one of four grades, and an operator's outputs the worst of its inputs':

- CONSTANT: made of weights and shapes only;
- EXACT: made of inputs by operators without float weights, so no rewrite changes it;
- SMOOTH: a small change of the weights changes it a little;
- DISCRETE: a small change of the weights may select something else: NonMaxSuppression, ArgMax, the
  indices of TopK, NonZero, a float cast to an integer, a branch taken on a SMOOTH condition, random
  numbers, and all that is computed from these.

Comparisons and ``Where`` count as smooth: they gate elements in place and move none. Bodies of If,
Loop and Scan are graded with what they capture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum

import onnx_ir as ir

from onnxcompress.view import GraphView, body_nodes

__all__ = ["Grade", "grades", "observed"]


class Grade(IntEnum):
    """See the module."""

    CONSTANT = 0
    EXACT = 1
    SMOOTH = 2
    DISCRETE = 3


_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_DECIDES = frozenset(
    {"ArgMax", "ArgMin", "Compress", "Hardmax", "Multinomial", "NonMaxSuppression", "NonZero", "Unique"}
)
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_ARITHMETIC = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})
_COMPARES = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "And", "Or", "Xor"}
)
_MOVES = frozenset(
    {"Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split",
     "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip
_PROBABILITIES = frozenset({"LogSoftmax", "Softmax"})
_NO_TENSOR = frozenset(
    {"Optional", "OptionalGetElement", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
     "SequenceMap", "SplitToSequence", "ZipMap"}
)  # fmt: skip

Grades = dict[ir.Value, Grade]


def observed(view: GraphView) -> tuple[str, ...]:
    """Names of the values to compare, in execution order.

    Graph outputs, except that where an output is DISCRETE (or not floating point), the last SMOOTH
    floating-point values of the main graph it is made of. Such values are followed back through
    pure movement (Slice, Split, Reshape, ...) to the one they are pieces of. An output that is a
    Softmax of scores is looked at before it: probabilities hardly move until a class flips, and then
    they move by all there is, so their SQNR says little about a model and much about one sample. A layer with weights
    that none of these sees (the second stage of a two-stage detector) adds the outputs it leads to.
    Falls back to the graph outputs if there is nothing smooth.
    """
    model = view.model
    grade = grades(model)
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    for output in model.graph.outputs:
        if grade.get(output) is Grade.SMOOTH and _is_float(output):
            found[_scores(output, grade)] = None
        else:
            for value in _frontier(output, grade, seen):
                found[_whole(value, grade)] = None
    covered = _ancestors(found)
    blind = [n for n in model.graph if _has_float_weight(n) and grade.get(n.outputs[0]) is Grade.DISCRETE]
    for output in model.graph.outputs:
        if output not in found and any(
            v in _ancestors([output]) and v not in covered for n in blind for v in n.outputs
        ):
            found[output] = None
    if not found:
        return tuple(str(v.name) for v in model.graph.outputs)
    order = {v: i for i, v in enumerate(v for node in model.graph for v in node.outputs)}
    return tuple(str(v.name) for v in sorted(found, key=lambda v: order.get(v, -1)))


def grades(model: ir.Model) -> Grades:
    """The grade of every value, bodies of If, Loop and Scan included."""
    known: Grades = {}
    for value in model.graph.inputs:
        known[value] = Grade.EXACT
    _grade_graph(model.graph, known)
    return known


def _grade_graph(graph: ir.Graph, known: Grades) -> None:
    for value in graph.initializers.values():
        known[value] = Grade.CONSTANT
    for node in graph:
        given = [known.get(v, Grade.CONSTANT) for v in node.inputs if v is not None]
        for value, grade in zip(node.outputs, _grade_node(node, given, known), strict=True):
            known[value] = grade


def _grade_node(node: ir.Node, given: list[Grade], known: Grades) -> Iterator[Grade]:
    op, worst = node.op_type, max(given, default=Grade.CONSTANT)
    count = len(node.outputs)
    if node.domain in ("", "ai.onnx"):
        if op in _RANDOM:
            yield from [Grade.DISCRETE] * count
            return
        if op in ("If", "Loop", "Scan"):
            yield from _grade_control(node, given, known)
            return
        if op in ("Shape", "Size"):
            yield Grade.DISCRETE if worst is Grade.DISCRETE and not _is_static(node.inputs[0]) else Grade.CONSTANT
            return
        if op == "TopK":
            yield worst
            yield Grade.DISCRETE if worst >= Grade.SMOOTH else worst
            return
        if op in _DECIDES or (op == "Cast" and _to_integer(node)):
            worst = Grade.DISCRETE if worst >= Grade.SMOOTH else worst
        elif op == "Where" and len(given) == 3:
            worst = max(min(given[0], Grade.SMOOTH), given[1], given[2])
        elif worst is Grade.EXACT and (op in _ARITHMETIC or _has_float_weight(node)):
            worst = Grade.SMOOTH
    elif worst is Grade.EXACT:
        worst = Grade.SMOOTH
    yield from [worst] * count


def _grade_control(node: ir.Node, given: list[Grade], known: Grades) -> list[Grade]:
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    result = [Grade.CONSTANT] * len(node.outputs)
    if node.op_type == "If":
        for body in bodies:
            _grade_graph(body, known)
            result = [max(r, known.get(v, Grade.CONSTANT)) for r, v in zip(result, body.outputs, strict=True)]
        return [Grade.DISCRETE if given[0] >= Grade.SMOOTH else max(r, given[0]) for r in result]
    (body,) = bodies
    loop = node.op_type == "Loop"
    inputs = [known.get(v, Grade.CONSTANT) if v is not None else Grade.CONSTANT for v in node.inputs]
    start = [Grade.CONSTANT, Grade.CONSTANT, *inputs[2:]] if loop else inputs
    control = max(inputs[:2], default=Grade.CONSTANT) if loop else Grade.CONSTANT
    carried = len(inputs) - 2 if loop else len(inputs) - node.attributes["num_scan_inputs"].as_int()
    state = start
    for _ in range(4 * max(carried, 0) + 1):  # grades only go up, so this many rounds suffice
        known.update(zip(body.inputs, state, strict=True))
        _grade_graph(body, known)
        ends = [known.get(v, Grade.CONSTANT) for v in body.outputs]
        if loop:
            control, ends = max(control, ends[0]), ends[1:]
        offset = 2 if loop else 0
        after = list(state)
        for i in range(carried):
            after[offset + i] = max(state[offset + i], ends[i])
        result = [max(r, e) for r, e in zip(result, ends, strict=True)]
        if after == state:
            break
        state = after
    if control >= Grade.SMOOTH:
        return [Grade.DISCRETE] * len(result)
    return [max(r, control) for r in result]


# --- walking back ------------------------------------------------------------------------------


def _frontier(value: ir.Value, grade: Grades, seen: set[ir.Value]) -> Iterator[ir.Value]:
    """The nearest SMOOTH floats behind a value."""
    pending = [value]
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        known = grade.get(value, Grade.CONSTANT)
        if known <= Grade.EXACT:
            continue
        if known is Grade.SMOOTH and _is_float(value):
            yield value
            continue
        producer = value.producer()
        if producer is not None:
            pending.extend(_sources(producer))


def _sources(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, captured values included."""
    yield from (v for v in node.inputs if v is not None)
    for inner in body_nodes(node):
        for value in inner.inputs:
            producer = value.producer() if value is not None else None
            if value is not None and producer is not None and producer.graph is node.graph:
                yield value


def _whole(value: ir.Value, grade: Grades) -> ir.Value:
    """What a moved piece is a piece of, as far as that is SMOOTH and floating point."""
    while True:
        producer = value.producer()
        if producer is None or producer.op_type not in _MOVES or producer.domain not in ("", "ai.onnx"):
            return value
        before = producer.inputs[0]
        if (
            before is None
            or grade.get(before) is not Grade.SMOOTH
            or not _is_float(before)
            or before.producer() is None
        ):
            return value
        value = before


def _scores(output: ir.Value, grade: Grades) -> ir.Value:
    """What a final Softmax was taken of; the output itself where there is none."""
    value: ir.Value | None = output
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type in _PROBABILITIES and producer.domain in ("", "ai.onnx"):
            before = producer.inputs[0]
            smooth = before is not None and grade.get(before) is Grade.SMOOTH and before.producer() is not None
            return before if before is not None and smooth and _is_float(before) else output
        value = producer.inputs[0] if producer.op_type in _MOVES and producer.op_type != "Cast" else None
    return output


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Value]:
    found: set[ir.Value] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value not in found:
            found.add(value)
            producer = value.producer()
            if producer is not None:
                pending.extend(_sources(producer))
    return found


# --- types -------------------------------------------------------------------------------------


def _is_float(value: ir.Value) -> bool:
    """Whether the value is a float tensor; where no type is given, guessed from what made it."""
    for _ in range(1000):
        if value.type is not None:
            return isinstance(value.type, ir.TensorType) and value.dtype in _FLOATS
        node = value.producer()
        if node is None or node.op_type in _NO_TENSOR:
            return False
        if node.op_type in _COMPARES or node.op_type in _DECIDES or node.op_type in ("Shape", "Size"):
            return False
        if node.op_type == "TopK" and value is node.outputs[1]:
            return False
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int()) in _FLOATS
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"):
            return False
        if node.op_type in ("If", "Loop", "Scan"):
            body = next(a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH)
            index = node.outputs.index(value) + (1 if node.op_type == "Loop" else 0)
            following: ir.Value | None = body.outputs[index]
        else:
            following = node.inputs[1 if node.op_type in ("Where", "DequantizeLinear") else 0] if node.inputs else None
        if following is None:
            return False
        value = following
    return False


def _is_static(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and all(isinstance(d, int) for d in value.shape.dims)


def _to_integer(node: ir.Node) -> bool:
    """Whether a Cast cuts fractions off."""
    target = ir.DataType(node.attributes["to"].as_int())
    before = node.inputs[0]
    return target not in _FLOATS and target is not ir.DataType.BOOL and before is not None and _is_float(before)


def _has_float_weight(node: ir.Node) -> bool:
    """Whether a float constant of more than one element goes in: something a pass may change."""
    return any(
        v is not None and v.const_value is not None and v.const_value.dtype in _FLOATS and v.const_value.size > 1
        for v in node.inputs
    )
