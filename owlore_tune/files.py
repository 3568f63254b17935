"""Paths that a user writes, atomic writes of files, and digests of files."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from owlore_tune.errors import ConfigError


def way_out(directory: Path) -> str:
    """What to do about a model directory that lacks a file: choose a checkpoint if it is that of a run."""
    steps = [path for path in directory.glob("step_*") if path.name[5:].isdigit()]
    if steps:
        return f"name a checkpoint in it, such as {max(steps, key=lambda path: int(path.name[5:]))}"
    return "download the model first (see the top of the config)"


def user_path(text: str | Path) -> Path:
    """The path that ``text`` names, with ``~`` replaced by the home directory.

    Raises:
        ConfigError: if it has a character that no path can have, or names the home of a user who does not exist.
    """
    if "\0" in str(text):
        raise ConfigError(f"{str(text)!r} has a NUL character, which no path or name can have")
    path = os.path.expanduser(str(text))
    if path.startswith("~") and "/" in path:
        name = path[1:].split("/")[0]
        raise ConfigError(f"{path}: there is no user {name}; a file name that begins with ~ is written ./~{name}")
    return Path(path)


LARGEST_NUMBER = 1e18  # of a file that a person may have edited: 64-bit integers and sums hold it

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it, which is not safe once there are threads
_checksums: dict[tuple[int, ...], str] = {}  # by identity of a file


def write_json(path: Path, content: Any, owner: str) -> None:
    """Write ``content`` as JSON, atomically; see `write_atomically`.

    Numbers that are not finite become null, because JSON cannot represent them.
    """
    write_atomically(path, to_json(content, indent=2) + "\n", owner)


def write_atomically(path: Path, text: str, owner: str) -> None:
    """Write ``text``: the file is either the old or the new one.

    Args:
        owner: part of the temporary name, `partial_name`. Whoever knows it can remove the leftover of a killed process.
    """
    partial = path.with_name(partial_name(path.name, owner))
    try:
        with partial.open("x") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def readable_by_others(file: Path, mode: int = 0o666) -> None:
    """Give a file that safetensors wrote, for its owner alone, the ``mode`` that others have with this umask."""
    file.chmod(mode & ~_UMASK)


def partial_name(name: str, owner: str) -> str:
    """An unused, hidden name for an unfinished file or directory."""
    return f".{name}.{owner}.{uuid4().hex[:8]}.partial"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that is an object.

    Raises:
        ValueError: if it cannot be read, or is none.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that float64 holds. A bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def to_json(content: Any, indent: int | None = None) -> str:
    """``content`` as valid JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def checksum(file: Path) -> str:
    """The xxh3_128 digest of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(2**22)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def known_checksum(file: Path) -> str:
    """The `checksum` of a file, read only once by this process while the file, under any name, does not change."""
    status = file.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if identity not in _checksums:
        _checksums[identity] = checksum(file)
    return _checksums[identity]


def files_digest(files: Iterable[Path]) -> str:
    """A digest of the names and contents of ``files``."""
    digests = {file.name: known_checksum(file) for file in files}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def cache_directory() -> Path:
    """``owlore`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ConfigError: for a user without a home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # itself without a home
    if base.startswith("~"):
        raise ConfigError("this user has no home directory for a cache; set XDG_CACHE_HOME=DIR")
    return Path(base) / "owlore"
