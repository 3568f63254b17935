"""Imports between files and between folders have no cycles, and evaluation imports no training code."""

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


def imports() -> dict[str, set[str]]:
    """Map each of our modules to its imports of our modules, including imports in functions."""
    files = {}
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            files[".".join(part for part in parts if part and part != "__init__")] = file
    return {name: {found for found in _imported(file) if found in files} for name, file in files.items()}


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_files_import_each_other_one_way():
    graph = {
        # A folder's __init__ imports its files. An import of the folder counts as an import of those files.
        name: {found for found in imported if not name.startswith(f"{found}.")}
        for name, imported in imports().items()
    }
    assert len(graph) > 50
    list(TopologicalSorter(graph).static_order())  # CycleError names the cycle


def test_folders_import_each_other_one_way():
    def folder(module: str) -> str:
        return ".".join(module.split(".")[:2])  # owlore_tune.optim for owlore_tune.optim.adamw

    graph: dict[str, set[str]] = {}
    for name, imported in imports().items():
        graph.setdefault(folder(name), set()).update(folder(found) for found in imported)
    for name, imported in graph.items():
        imported -= {name, "owlore_tune"}
    list(TopologicalSorter(graph).static_order())


def test_no_module_is_too_long_to_hold_in_mind():
    lengths = {
        file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines())
        for folder in ("owlore_tune", "eval", "recipes")
        for file in (ROOT / folder).rglob("*.py")
    }
    most = dict.fromkeys(lengths, 350) | {"recipes/owlore_full_finetune.py": 360}
    assert len(lengths) > 50 and {name: length for name, length in lengths.items() if length > most[name]} == {}


def test_parts_import_neither_recipes_nor_configs():
    for name, imported in imports().items():
        recipes = {module for module in imported if "." not in module and module not in PACKAGES}
        if name in ("owlore_tune.cli", "owlore_eval", "owlore_full_finetune"):
            continue
        assert not recipes, name
        parts = [f"owlore_tune.{folder}." for folder in ("layers", "optim", "models", "data", "memory", "distributed")]
        if name.startswith((*parts, "owlore_tune.checkpoints.")):
            assert not {"owlore_tune.config.components", "owlore_tune.cli"} & imported, name
            assert not any(module.startswith("owlore_tune.run") for module in imported), name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("owlore_eval", ["owlore_tune.optim", "owlore_tune.layers"]),
        ("owlore_tune.config.components", ["owlore_tune.optim", "owlore_tune.layers", "owlore_tune.run"]),
        ("owlore_tune.cli", ["torch", "numpy", "omegaconf"]),
    ],
)
def test_an_import_loads_nothing_that_it_does_not_need(module, absent):
    code = f"import sys, {module}; print(sorted(name for name in {absent} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_benchmarks_import_names_that_exist():
    """Most benchmarks take too long for a test."""
    imported = {
        (node.module, alias.name)
        for file in (ROOT / "benchmarks").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("owlore")
        for alias in node.names
    }
    assert len(imported) > 40

    def exists(module: str, name: str) -> bool:
        found = importlib.import_module(module)
        return hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None

    assert [pair for pair in imported if not exists(*pair)] == []
