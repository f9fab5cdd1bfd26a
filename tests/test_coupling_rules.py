"""Rules of others, and what happens where a rule or a wish is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.coupling import Coupler, Coupling, Mender, check_keep, mends, remove, rule
from onnxcompress.coupling import rules as registry
from onnxcompress.errors import CouplingError
from onnxcompress.model import serialize
from onnxcompress.rewrite import Rewriter
from onnxcompress.view import GraphView
from tests.models import normal, text
from tests.removals import coupling_of, parts_of, pruned, reasons

PACKAGE = Path(__file__).parent / "plugin_package"
FLY = """m (float[2, 5, 3] x) => (float[2, 5, 4] y) {
    a = MatMul (x, w1)
    b = com.example.Fly <hops = 2> (a, s)
    c = Reshape (b, shape)
    y = MatMul (c, w2)
}"""


def fly() -> ir.Model:
    weights = {"w1": normal(0, 3, 8), "s": normal(1, 8), "w2": normal(2, 8, 4), "shape": np.array([2, 5, 8])}
    return text(FLY, weights, imports=["com.example"])


def shapes() -> dict[str, tuple[int, ...]]:
    """As a run of an operator nobody has here would give them."""
    return {"x": (2, 5, 3), "a": (2, 5, 8), "b": (2, 5, 8), "c": (2, 5, 8), "y": (2, 5, 4)}


@pytest.fixture
def clean() -> Iterator[None]:
    """Rules registered in a test are gone afterwards."""
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


def test_an_operator_without_a_rule_pins_and_is_named() -> None:
    coupling = Coupling(GraphView(fly()), shapes())
    first = coupling.group("w1")
    assert first.pinned and reasons(first) == {("node_1", "com.example.Fly has no coupling rule")}
    assert "Fly" in first.why_fixed() and "node_1" in first.why_fixed()


def test_a_rule_by_hand(clean: None) -> None:
    @rule("Fly", domain="com.example")
    def couple(node: ir.Node, at: Coupler) -> None:
        x, scale, y = at.data(node), at.data(node, 1), at.output(node)
        at.elementwise(node, [x], y)
        at.same(scale[0], x[2], node)

    seen: list[int] = []

    @mends("Fly", domain="com.example")
    def mend(node: ir.Node, mender: Mender) -> None:
        kept = mender.input(node, 0, 2)
        seen.append(-1 if kept is None else len(kept))

    model = fly()
    coupling = Coupling(GraphView(model), shapes())
    group = coupling.group("s")
    assert parts_of(group) == {"w1[1]", "a[2]", "s[0]", "b[2]", "c[2]", "w2[0]"}
    assert (group.key, group.unit, group.free) == ("node", "neurons", 8)
    after = pruned(model, coupling, {group: np.arange(8) < 3})
    assert seen == [3]
    found = {str(v.name): v.shape.numpy() for v in GraphView(after).weights() if v.shape is not None}
    assert found["w1"] == (3, 3) and found["s"] == (3,) and found["w2"] == (3, 4)


@pytest.mark.parametrize("attribute", ["dims", "op_type"])
def test_a_rule_that_breaks_pins_and_says_so(clean: None, attribute: str) -> None:
    @rule("Fly", domain="com.example")
    def couple(node: ir.Node, at: Coupler) -> None:
        assert getattr(node, attribute)
        at.same(at.data(node)[7], at.output(node)[0], node)

    group = Coupling(GraphView(fly()), shapes()).group("w1")
    assert group.pinned and "its coupling rule broke" in group.why_fixed()


def test_a_mend_without_a_rule() -> None:
    with pytest.raises(CouplingError, match="no coupling rule to complete"):
        mends("Nothing", domain="com.example")(lambda node, mender: None)


SCRIPT = """
import json, sys
from onnxcompress import model as models
from onnxcompress.coupling import Coupling, remove
from onnxcompress.rewrite import Rewriter
from onnxcompress.view import GraphView
model = models.load(sys.argv[1])
coupling = Coupling(GraphView(model), json.loads(sys.argv[2]))
(hops,) = [g for g in coupling.groups if g.unit == "hops"]
found = [(g.key, g.unit, g.free, g.size) for g in coupling.groups]
remove(coupling, {hops: __import__("numpy").array([False, True])}, Rewriter(model))
left = model.graph.all_nodes()
print(json.dumps([found, [n.attributes.get_int("hops") for n in left if n.op_type == "Fly"]]))
"""


def test_rules_of_an_installed_package(tmp_path: Path) -> None:
    source = shutil.copytree(PACKAGE, tmp_path / "source")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", *install, str(source)], check=True, capture_output=True)
    (tmp_path / "fly.onnx").write_bytes(serialize(fly()))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "fly.onnx"), json.dumps(shapes())],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, hops = json.loads(done.stdout)
    assert found[:2] == [["node", "hops", 2, 2], ["node_1", "head widths", 4, 4]]
    assert hops == [1]


def test_a_package_whose_rules_do_not_import(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no wings')\n", encoding="utf-8")
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[onnxcompress.coupling]\nwings = broken\n", encoding="utf-8")
    (tmp_path / "fly.onnx").write_bytes(serialize(fly()))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "fly.onnx"), json.dumps(shapes())],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "coupling rules 'wings' (broken) do not import: no wings" in done.stderr


CHAIN = """m (float[2, 3] x) => (float[2, 4] y) {
    a = MatMul (x, w1)
    b = Concat <axis = 1> (a, s)
    y = MatMul (b, w2)
}"""


def chain() -> tuple[ir.Model, Coupling]:
    model = text(CHAIN, {"w1": normal(0, 3, 8), "s": normal(1, 2, 1), "w2": normal(2, 9, 4)})
    return model, coupling_of(model)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (np.ones(8, bool), "the list is for 8"),
        (np.zeros(9, bool), "would be empty"),
        (np.arange(9) < 8, "number 8 has to stay: Concat puts a single position there"),
    ],
)
def test_wishes_that_cannot_be(keep: np.ndarray, message: str) -> None:
    model, coupling = chain()
    group = coupling.group("w1")
    with pytest.raises(CouplingError, match=message):
        check_keep(group, keep)
    rewriter = Rewriter(model)
    with pytest.raises(CouplingError):
        remove(coupling, {group: keep}, rewriter)
    assert not rewriter.log


def test_nothing_may_be_left_empty() -> None:
    model, coupling = chain()
    with pytest.raises(CouplingError, match=r"nothing would be left of (a|w1)\[1\]"):
        remove(coupling, {coupling.group("w1"): np.arange(9) == 8}, Rewriter(model))


def test_groups_by_name() -> None:
    _, coupling = chain()
    assert coupling.group("node") is coupling.group("w1") is coupling.group("a")
    with pytest.raises(CouplingError, match="no group is called 'b2'"):
        coupling.group("b2")


def test_a_name_in_several_groups() -> None:
    model = text(
        CHAIN.replace("y = MatMul (b, w2)", "c = MatMul (b, w2)\n y = MatMul (c, w3)"),
        {"w1": normal(0, 3, 8), "s": normal(1, 2, 1), "w2": normal(2, 9, 6), "w3": normal(3, 6, 4)},
    )
    with pytest.raises(CouplingError, match=r"'w2' belongs to 2 groups .*'node', 'node_2'"):
        coupling_of(model).group("w2")


def test_the_rule_in_the_documentation_is_the_one_tested() -> None:
    page = (PACKAGE.parent.parent / "docs" / "coupling.md").read_text(encoding="utf-8")
    code = (PACKAGE / "fly_rules.py").read_text(encoding="utf-8")
    for part in code.split('"""')[2].strip().split("\n\n\n"):
        assert part in page
