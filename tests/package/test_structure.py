"""Modules import each other in one direction, and commands load only the packages that they need."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"owlore_tune": "owlore_tune", "owlore_evals": "eval", "": "recipes"}  # import name: folder
LAZY = {"owlore_tune.cli"}  # what its functions import does not count
# A part imports only from itself and from those after it, so folders have no circles either.
PARTS = [
    "owlore_full_finetune", "owlore_eval", "owlore_tune.doctor", "owlore_tune.cli", "owlore_evals",
    "owlore_tune.training", "owlore_tune.config", "owlore_tune.trainer", "owlore_tune.memory", "owlore_tune.layers",
    "owlore_tune.quantized", "owlore_tune.checkpoints", "owlore_tune.optim", "owlore_tune.loss", "owlore_tune.data",
    "owlore_tune.models", "owlore_tune.distributed", "owlore_tune.kernels", "owlore_tune.files", "owlore_tune.measure",
    "owlore_tune.errors",
]  # fmt: skip


def part_of(module: str) -> str:
    """The part of `PARTS` that has ``module``."""
    return module.split(".")[0] if module.startswith("owlore_evals") else ".".join(module.split(".")[:2])


def imports() -> dict[str, set[str]]:
    """Map each of our modules to its imports of our modules, including imports in functions."""
    files = {}
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            files[".".join(part for part in parts if part and part != "__init__")] = file
    graph = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text())
        nodes = iter(tree.body) if name in LAZY else ast.walk(tree)
        graph[name] = {found for found in imported(nodes) if found in files} - {name, "owlore_tune"}
    return graph


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_modules_import_each_other_without_circles():
    # A folder's __init__ imports its files. An import of the folder counts as an import of those files.
    graph = {name: {m for m in found if not name.startswith(f"{m}.")} for name, found in imports().items()}
    assert len(graph) > 50
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_parts_import_only_from_those_after_them():
    graph = imports()
    arrows = {(part_of(name), part_of(found), name, found) for name in graph for found in graph[name]}
    assert {part_of(name) for name in graph} - {"owlore_tune"} == set(PARTS)
    upward = [f"{name} -> {found}" for a, b, name, found in arrows if PARTS.index(a) > PARTS.index(b)]
    assert sorted(upward) == []


def test_the_training_recipe_imports_few_of_our_modules():
    packages = {"owlore_tune.training"}  # of which it imports modules
    assert len(imports()["owlore_full_finetune"] - packages) <= 15


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("owlore_tune.cli; owlore_tune.cli.ls(None)", ["torch", "numpy"]),
        ("owlore_eval", ["owlore_tune.optim", "owlore_tune.layers"]),
        ("owlore_tune.config.components", ["owlore_tune.optim", "owlore_tune.layers", "owlore_tune.training"]),
    ],
)
def test_an_import_loads_nothing_that_it_does_not_need(module, absent):
    code = f"import sys, {module}; print(sorted(name for name in {absent} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_benchmarks_import_names_that_exist():
    """Most benchmarks take too long for a test."""
    names = {
        (node.module, alias.name)
        for file in (ROOT / "benchmarks").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("owlore")
        for alias in node.names
    }
    assert len(names) > 40

    def exists(module: str, name: str) -> bool:
        found = importlib.import_module(module)
        return hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None

    assert [pair for pair in names if not exists(*pair)] == []
