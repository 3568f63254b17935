"""Rows of local files: JSON, JSON lines and Parquet."""

import json
from collections.abc import Sequence
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


def row_prompt(file: Path, number: int, row: dict[str, Any]) -> str:
    """The instruction of a row, with its input below it if there is one.

    Raises:
        ValueError: if the input is not text.
    """
    if not isinstance(row.get("input"), str | None):
        raise ValueError(f"data_files={file}: row {number} has {row['input']!r} in field 'input', which is not text")
    return "\n".join(filter(None, (row["instruction"], row.get("input"))))


def read_rows(file: Path, field_name: str, fields: Sequence[str] = ("instruction", "output")) -> list[dict[str, Any]]:
    """The rows of a file with text in each of ``fields``.

    Raises:
        ValueError: as ``field_name=FILE ...``, naming row and field.
    """
    rows = read_file(file, field_name)
    for number, row in enumerate(rows):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"{field_name}={file}: row {number} has no text in field {field!r}")
    return rows
