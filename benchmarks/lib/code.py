"""A digest of the code that a measurement depends on."""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path


def digest_of_code(files: Iterable[Path]) -> str:
    """A digest of Python files that comments and docstrings do not change."""
    return hashlib.sha256("\n".join(sorted(map(_code, files))).encode()).hexdigest()[:12]


def _code(file: Path) -> str:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
