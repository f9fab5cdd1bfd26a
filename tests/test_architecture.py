"""The direction of imports, read from the source with ast.

A module may import from layers below its own only; so there can be no cycle, and adding a module
means saying here where it belongs.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import onnxcompress

PACKAGE = Path(onnxcompress.__file__).parent
FOLDERS = ("passes", "models_zoo", "hardware_profiles")

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors guest likeness fitting.machine",
        "model report statistics images feeds findings",
        "view session sizes ranges origins synthetic profile_text pieces moments notes",
        "rewrite smooth data work target external loading coupling.axes",
        "sketch",
        "coupling.groups coupling.statements",
        "coupling.coupler",
        "coupling.mending",
        "coupling.rules",
        "coupling.convolution coupling.elementwise coupling.movement coupling.normalization coupling.products "
        "coupling.attention coupling.indexing coupling.recurrent coupling.reduction coupling.reshaping",
        "coupling.quantized coupling.shapes",
        "coupling.analysis",
        "coupling.removal",
        "coupling",
        "operators profile_merge",
        "profile_tables",
        "profile_schema",
        "profile_files layout",
        "execution",
        "base profile calibrate paired evaluate interop liveness",
        "objective",
        "registry cost planner instructions",
        "sensitivity trial settling measurements emulation alternatives regions suitability",
        "fitting fitting.links fitting.nets fitting.samples fitting.structure fitting.kit_run",
        "fitting.catalogue",
        "fitting.measuring",
        "fitting.own fitting.kit fitting.equations",
        "fitting.regression",
        "fitting.making",
        "alone footprint",
        "questions",
        "search forms",
        "judge",
        "turn packing",
        "course",
        "job inspection emulated bundling",
        "pipeline validation explanation prunable",
        "onnxcompress testing",
        "tables",
        "render_profile render_load",
        "render render_explain render_fit render_groups render_multiplex shell",
        "render_validation",
        "cli_profile cli_multiplex",
        "cli",
        "__main__",
    )
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

FOR_PASSES = frozenset(
    {
        "base",
        "rewrite",
        "model",
        "view",
        "coupling",
        "sketch",
        "statistics",
        "ranges",
        "target",
        "errors",
        "likeness",
        "sizes",
        "notes",
        "passes",
    }
)
FOR_ZOO = frozenset({"errors", "models_zoo"})
ZOO_READERS = frozenset({"cli", "render"})
PROTOBUF = frozenset({"model", "external", "interop", "evaluate", "models_zoo", "fitting"})


def modules() -> Iterator[tuple[str, Path]]:
    """Module names below ``onnxcompress`` ("" for the package itself) and their files."""
    for path in sorted(PACKAGE.glob("*.py")):
        yield ("onnxcompress" if path.stem == "__init__" else path.stem), path
    for part in ("coupling", "fitting"):
        for path in sorted((PACKAGE / part).glob("*.py")):
            yield (part if path.stem == "__init__" else f"{part}.{path.stem}"), path
    for folder in FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            inside = path.relative_to(PACKAGE / folder).with_suffix("").parts
            if (folder, inside[0]) == ("hardware_profiles", "fitting"):  # scripts that made the data
                continue
            yield ".".join((folder, *(p for p in inside if p != "__init__"))), path


MODULES = dict(modules())


def imports(source: str, package: str = "onnxcompress") -> set[str]:
    """Every module named by an import statement, inside functions and type checks too.

    ``from onnxcompress import view`` counts as ``onnxcompress.view``, for it may be a module.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*parents, *([base] if base else [])))
            found |= {
                f"{base}.{a.name}" if f"{base}.{a.name}".removeprefix("onnxcompress.") in MODULES else base
                for a in node.names
            }
    return found


def inner(name: str) -> set[str]:
    """Modules of onnxcompress that module ``name`` imports."""
    package = "onnxcompress" if "." not in name else f"onnxcompress.{name.rpartition('.')[0]}"
    found = imports(MODULES[name].read_text(encoding="utf-8"), package)
    return {f.removeprefix("onnxcompress.") for f in found if f == "onnxcompress" or f.startswith("onnxcompress.")} - {
        name
    }


def family(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", [n for n in MODULES if family(n) not in FOLDERS])
def test_imports_point_downwards(name: str) -> None:
    assert name in RANK, f"say in LAYERS where {name} belongs"
    for other in inner(name):
        if family(other) == "models_zoo":
            assert name in ZOO_READERS, f"{name} imports the zoo"
        else:
            assert family(other) not in FOLDERS, f"{name} imports {other}: the library knows no particular pass"
            assert RANK[other] < RANK[name], f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", [n for n in MODULES if family(n) == "passes"])
def test_a_pass_sees_no_planner_and_no_profile(name: str) -> None:
    assert {family(o) for o in inner(name)} <= FOR_PASSES


@pytest.mark.parametrize("name", [n for n in MODULES if family(n) == "models_zoo"])
def test_the_zoo_stands_alone(name: str) -> None:
    assert {family(o) for o in inner(name)} <= FOR_ZOO


def test_hardware_profiles_are_data() -> None:
    for name in MODULES:
        if family(name) == "hardware_profiles":
            assert imports(MODULES[name].read_text(encoding="utf-8")) <= {"__future__"}


@pytest.mark.parametrize("name", list(MODULES))
def test_protobuf_stays_where_files_are_read_and_written(name: str) -> None:
    if family(name) not in PROTOBUF:
        found = {i for i in imports(MODULES[name].read_text(encoding="utf-8")) if i.partition(".")[0] == "onnx"}
        assert not found - {"onnx.defs", "onnx.version"}, f"{name} imports {sorted(found)}"


@pytest.mark.parametrize("name", list(MODULES))
def test_no_profile_is_named_in_code(name: str) -> None:
    """Hardware is data: no ``if profile == "..."``. The command line may have a default."""
    known = {p.stem for p in (PACKAGE / "hardware_profiles").glob("*.toml")}
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
            assert not words & known, f"{name}:{node.lineno} compares with a profile's name"


def test_no_cycles() -> None:
    graph = nx.DiGraph((a, b) for a in MODULES for b in inner(a))
    graph.remove_edges_from([(a, "models_zoo") for a in MODULES if family(a) == "models_zoo"])
    assert not list(itertools.islice(nx.simple_cycles(graph), 3))


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import onnxcompress.view as v
from onnxcompress import model
from . import base
from .errors import Skip
def f():
    from onnxcompress.planner import plan
"""
    assert imports(source) == {
        "onnxcompress.view",
        "onnxcompress.model",
        "onnxcompress.base",
        "onnxcompress.errors",
        "onnxcompress.planner",
    }
