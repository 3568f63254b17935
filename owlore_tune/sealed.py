"""Directories that are whole or not there: written beside, checksummed, synced, and renamed into place."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash
from safetensors import SafetensorError

SEAL = "checkpoint.json"  # name, size and checksum of every other file; written last
_PARTIAL = ".partial"
_OLD = ".old"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and the reason, in one line."""


@contextmanager
def sealed_directory(directory: Path, num_bytes: int) -> Iterator[Path]:
    """Write a directory that appears under its name only when it is complete and on disk.

    Yields a directory beside it to write into. When the block ends, its files are checksummed and synced, and the
    directory takes the place of any older one of its name. If the block fails, nothing is left of it.

    Args:
        num_bytes: about how much will be written; refused at once where the disk has less.

    Raises:
        CheckpointError: if the disk is full or refuses; it names the path and the bytes needed.
    """
    partial = directory.with_name(directory.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise OSError(f"only {free:,} bytes are free")
        yield partial
        _seal(partial)
        replaced = directory.with_name(directory.name + _OLD + _PARTIAL)
        if directory.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(directory, replaced)
        os.rename(partial, directory)
        _sync(directory.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot save {directory}, which needs {num_bytes:,} bytes: {error}; earlier checkpoints are intact"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _seal(directory: Path) -> None:
    files = {}
    with ThreadPoolExecutor(1) as syncing:  # the disk is waited for while checksums are made
        synced = []
        for file in sorted(directory.rglob("*")):
            synced.append(syncing.submit(_sync, file))
            if file.is_file():
                name = file.relative_to(directory).as_posix()
                files[name] = {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
        for sync in synced:
            sync.result()
    (directory / SEAL).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")
    _sync(directory / SEAL)
    _sync(directory)


def verify(directory: Path) -> None:
    """Check every file of a sealed directory against its seal.

    Raises:
        CheckpointError: naming the first file that is missing, of another size, or of other content.
    """
    try:
        files = json.loads((directory / SEAL).read_text())["files"]
        expected = {name: (int(sealed["bytes"]), str(sealed["xxh3_128"])) for name, sealed in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / SEAL} cannot be read: {error!r}") from error
    for name, (num_bytes, checksum) in expected.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != num_bytes:
            raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes, not {num_bytes:,}")
        if _checksum(file) != checksum:
            raise CheckpointError(f"{file} is damaged: its checksum is not the one it was saved with")


def discard(directory: Path) -> None:
    """Remove a directory; its name is gone at once, so that no half of it is ever found under it."""
    doomed = directory.with_name(directory.name + _OLD + _PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    (directory / SEAL).unlink(missing_ok=True)  # from here on nothing takes it for a checkpoint
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Clear up after interrupted writes and removals in ``parent``.

    What a write was stopped from moving to its name, complete as it was, moves there now; the rest is removed.
    """
    for leftover in sorted(parent.glob(f"*{_PARTIAL}"), key=lambda path: _OLD in path.suffixes):  # new ones first
        name = leftover.name.removesuffix(_PARTIAL).removesuffix(_OLD)
        try:
            verify(leftover)
        except CheckpointError:
            complete = False
        else:
            complete = True
        if complete and not (parent / name).exists():
            os.rename(leftover, parent / name)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(2**22)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
