"""Digests of files, each read once."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from torchtune.utils import get_logger

from owlore_tune.manifest import cache_directory, write_json
from owlore_tune.sealed import checksum

log = get_logger("INFO")


def files_digest(files: Iterable[Path], *, use_cache: bool = True) -> str:
    """A digest of the content of ``files``, and of their names.

    Each file's is kept in the user's cache with its size and time of change, since reading 7B weights takes seconds.
    """
    cache = cache_directory() / "digests.json"
    known = _read_cache(cache) if use_cache else {}
    digests, is_new = {}, False
    for file in files:
        status = file.stat()
        key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
        if key not in known:
            known[key], is_new = checksum(file), True
        digests[file.name] = known[key]
    if is_new and use_cache:
        _write_cache(cache, known)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _read_cache(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_text())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_cache(file: Path, known: dict[str, str]) -> None:
    newest = dict(list(known.items())[-1000:])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, newest)
    except OSError as error:  # it only saves time
        log.debug(f"{file} cannot be written: {error}")
