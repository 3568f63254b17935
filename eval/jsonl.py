"""JSON Lines files that are appended to line by line and survive an interruption."""

import json
import os
from pathlib import Path
from typing import Any


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append ``row`` and sync it to disk."""
    with path.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of ``path``; an empty list if it is missing.

    If the last line has no newline, it is repaired: a complete row gets its newline, a truncated one is removed.

    Raises:
        ValueError: if any other line is not valid JSON.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if last := content[len(whole) :]:
        if _is_object(last):
            with path.open("ab") as file:
                file.write(b"\n")
            whole = content + b"\n"
        else:
            os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.decode().split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return rows


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
