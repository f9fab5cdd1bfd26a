"""MatMul, Gemm and Einsum."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.coupling.axes import Axis
from onnxcompress.coupling.coupler import Coupler, Operand
from onnxcompress.coupling.rules import rule


@rule("MatMul")
@rule("FusedMatMul", "TransposeMatMul", domain="com.microsoft")
def matmul(node: ir.Node, at: Coupler) -> None:
    """[..., M, K] x [..., K, N] -> [..., M, N], batches broadcast."""
    a, b, y = at.data(node), at.data(node, 1), at.output(node)
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        at.pin_all(node, "its batches are transposed")
        return
    turned_a, turned_b = (len(v) > 1 and node.attributes.get_int(f"trans{s}", 0) != 0 for v, s in ((a, "A"), (b, "B")))
    rows, columns = multiply(node, at, a, b, y, turned_a, turned_b)
    if b.constant and len(b) == 2 and columns is not None:
        at.sums(node, 1, b[1 - columns.dim], a[-2 if turned_a else -1], columns.dim)
    elif a.constant and len(a) == 2 and rows is not None:
        at.sums(node, 0, a[1 - rows.dim], b[-1 if turned_b else -2] if len(b) > 1 else b[0], rows.dim)
    else:
        at.sums_data(node, a[-2 if turned_a else -1])


def multiply(
    node: ir.Node, at: Coupler, a: Operand, b: Operand, y: Operand, turned_a: bool = False, turned_b: bool = False
) -> tuple[Axis | None, Axis | None]:
    """What any matrix product says; returns the rows of the first and the columns of the second factor."""
    rows, inner_a = (None, a[0]) if len(a) == 1 else (a[-1], a[-2]) if turned_a else (a[-2], a[-1])
    inner_b, columns = (b[0], None) if len(b) == 1 else (b[-1], b[-2]) if turned_b else (b[-2], b[-1])
    at.same(inner_a, inner_b, node)
    ends = list(y.axes)
    if columns is not None:
        at.same(columns, ends.pop(), node)
    if rows is not None:
        at.same(rows, ends.pop(), node)
    for operand in (a, b):
        for k in range(1, min(len(operand) - 2, len(ends)) + 1):
            at.same(operand[-2 - k], ends[-k], node)
    return rows, columns


@rule("Gemm")
def gemm(node: ir.Node, at: Coupler) -> None:
    """A' B' + C."""
    a, b, y = at.data(node), at.data(node, 1), at.output(node)
    turned_a, turned_b = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
    rows, inner_a = (a[1], a[0]) if turned_a else (a[0], a[1])
    inner_b, columns = (b[1], b[0]) if turned_b else (b[0], b[1])
    at.same(inner_a, inner_b, node)
    at.same(rows, y[0], node)
    at.same(columns, y[1], node)
    if b.constant:
        at.sums(node, 1, inner_b, inner_a, columns.dim)
    else:
        at.sums_data(node, inner_a, inner_b)
    at.elementwise(node, [at.input(node, 2)], y)


@rule("Einsum")
def einsum(node: ir.Node, at: Coupler) -> None:
    """A letter is one axis everywhere; "..." stands for the same axes, from the right."""
    text = node.attributes.get_string("equation", "").replace(" ", "")
    left, _, right = text.partition("->")
    terms = left.split(",")
    operands = [at.data(node, i) for i in range(len(terms))]
    y = at.output(node)
    if "->" not in text:
        letters = sorted(c for c in set(left) - {",", "."} if left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    first: dict[str, list[Axis]] = {}
    for term, operand in [*zip(terms, operands, strict=True), (right, y)]:
        for name, axis in _lettered(term, operand):
            for other in first.setdefault(name, []):
                at.same(axis, other, node)
            first[name].append(axis)
    summed = {c for c in "".join(terms) if c.isalpha()} - set(right)
    told: set[str] = set()
    for term, operand in zip(terms, operands, strict=True):
        for letter, axis in _lettered(term, operand):
            if letter in summed and sum(t.count(letter) for t in terms) == 1:
                at.pin(axis, node, "Einsum sums over it")
    for i, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        if len(set(term)) < len(term.replace(".", "")):
            continue  # a diagonal
        if operand.constant and len(terms) == 2 and len(operand) == 2 and len(set(term) & summed) == 1:
            letter = next(iter(set(term) & summed))
            place = term.index(letter)
            opposite = terms[1 - i]
            if "..." not in term and letter in opposite and "..." not in opposite:
                at.sums(node, i, operand[place], operands[1 - i][opposite.index(letter)], 1 - place)
                told.add(letter)
    at.sums_data(node, *(first[letter][0] for letter in sorted(summed - told)))


def _lettered(term: str, operand: Operand) -> list[tuple[str, Axis]]:
    """Axes with their letters; those under the ellipsis count from the right."""
    before, dots, after = term.partition("...")
    many = len(operand) - len(before) - len(after) if dots else 0
    names = [*before, *(f"...{many - k}" for k in range(many)), *after]
    return list(zip(names, operand.axes, strict=True))
