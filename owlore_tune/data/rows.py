"""Rows of local files: JSON, JSON lines and Parquet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet


def read_file(file: Path, field_name: str) -> list[Any]:
    """The rows of a JSON, JSON-lines or Parquet file.

    Raises:
        ValueError: as ``field_name=FILE ...``, if it is missing, empty or malformed.
    """
    if not file.exists():
        raise ValueError(f"{field_name}={file} does not exist")
    if not file.is_file():
        raise ValueError(f"{field_name}={file} is not a file")
    try:
        if file.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            text = file.read_text(encoding="utf-8-sig")
            rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
    except OSError as error:
        raise ValueError(f"{field_name}={file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # pyarrow's errors are ValueErrors too
        kind = "Parquet" if file.suffix == ".parquet" else "JSON"
        raise ValueError(f"{field_name}={file} is not {kind}: {error}") from error
    if not rows:
        raise ValueError(f"{field_name}={file} is empty")
    return rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number}: {error.msg} at column {error.colno}; a file is a JSON list, or one object per line"
                ) from error
    return rows


def read_questions(file: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Number and content of each row of an evaluation's file, and its prompt: the instruction, and below it the input.

    Raises:
        ValueError: as ``data_files=FILE ...``, naming row and field, if an instruction is missing or an input no text.
    """
    for number, row in enumerate(read_file(file, "data_files")):
        place = f"data_files={file}: row {number} has"
        instruction = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"{place} no text in field 'instruction'")
        if not isinstance(row.get("input"), str | None):
            raise ValueError(f"{place} {row['input']!r} in field 'input', which is not text")
        yield number, row, "\n".join(filter(None, (instruction, row.get("input"))))
