"""How modules depend on each other: one way, without a ring, and each part without the programs that use it."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"owlore_tune": "owlore_tune", "owlore_evals": "eval", "": "recipes"}  # as imported: folder


def imports() -> dict[str, set[str]]:
    """Our modules and those of ours that each of them imports, inside functions too."""
    files = {}
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).glob("*.py")):
            files[f"{package}.{file.stem}".strip(".") if file.stem != "__init__" else package] = file
    return {name: {found for found in _imported(file) if found in files} for name, file in files.items()}


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_imports_itself_by_way_of_others():
    graph = imports()
    assert len(graph) > 30
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the ring


def test_parts_import_no_recipe_and_evaluation_no_training():
    for name, imported in imports().items():
        recipes = {module for module in imported if "." not in module and module not in PACKAGES}
        if name.startswith("owlore_evals"):
            assert not recipes
            assert not imported & {"owlore_tune.optim.adamw", "owlore_tune.layers.sampler", "owlore_tune.layers.active"}
        elif name.startswith("owlore_tune") and name != "owlore_tune.cli":  # which is a program
            assert not recipes
            assert not any(module.startswith("owlore_evals") for module in imported)
