"""The checkpoints ``step_N`` of one run. Each is complete or absent: written under another name, checksummed, synced,
then renamed."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from torchtune.utils import get_logger

from owlore_tune.errors import CheckpointError
from owlore_tune.files import checksum, known_checksum, read_json

SEAL = "checkpoint.json"  # the run's id; the directory's name; size and checksum of every other file; written last
_PARTIAL, _DISCARDED = ".partial", ".discarded"
_STEP = re.compile(r"step_[0-9]+")

log = get_logger("INFO")


@contextmanager
def sealed_directory(directory: Path, num_bytes: int, run_id: str) -> Iterator[Path]:
    """Write a directory that gets its name only when it is complete and on disk.

    Yields a temporary directory next to it. When the block ends, its files are checksummed and synced, and it is
    renamed. If the block fails, it is removed. Existing files are never replaced.

    Args:
        num_bytes: approximate bytes to write. Fails at once if the disk has less space.
        run_id: id of the run that writes it. It is in the seal and in the temporary name.

    Raises:
        CheckpointError: if ``directory`` exists or cannot be written, for example on a full disk. The message names
            the path and the bytes needed.
    """
    partial = _beside(directory, run_id, _PARTIAL)
    try:
        if os.path.lexists(directory):
            raise FileExistsError("it exists already")
        partial.mkdir()  # its parent belongs to a run; if it is gone, the user moved it
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            raise OSError(f"only {free:,} bytes are free")
        yield partial
        _seal(partial, directory.name, run_id)
        os.rename(partial, directory)
        _sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(
                f"cannot save {directory}, which needs {num_bytes:,} bytes: {error}; earlier checkpoints are intact"
            ) from error
        raise


def _beside(directory: Path, run_id: str, ending: str) -> Path:
    """An unused name next to ``directory``, from its name, the run's id and a random part."""
    return directory.with_name(f"{directory.name}.{run_id}.{uuid4().hex[:8]}{ending}")


def _seal(directory: Path, name: str, run_id: str) -> None:
    files = {}
    with ThreadPoolExecutor(1) as syncing:  # sync to disk while checksums are computed
        synced = []
        for file in sorted(directory.rglob("*")):
            synced.append(syncing.submit(_sync, file))
            if file.is_file():
                path = file.relative_to(directory).as_posix()
                files[path] = {"bytes": file.stat().st_size, "xxh3_128": known_checksum(file)}
        for sync in synced:
            sync.result()
    content = {"format": 1, "run_id": run_id, "name": name, "files": files}
    (directory / SEAL).write_text(json.dumps(content, indent=2) + "\n")
    _sync(directory / SEAL)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_seal(directory: Path) -> dict[str, Any]:
    """The seal of a directory, unverified; see `verify`.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    try:
        seal = read_json(directory / SEAL)
        expected = {name: (int(f["bytes"]), str(f["xxh3_128"])) for name, f in seal["files"].items()}
        return {"run_id": str(seal["run_id"]), "name": str(seal["name"]), "files": expected}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{directory / SEAL} cannot be read: {reason}; a checkpoint is named step_N") from error


def verify(directory: Path) -> dict[str, Any]:
    """Check every file of a sealed directory against its seal, and that there are no others; returns the seal.

    Raises:
        CheckpointError: naming the first file that is missing, not in the seal, or of another size or content.
    """
    seal = read_seal(directory)
    if not seal["files"]:
        raise CheckpointError(f"{directory / SEAL} names no files")
    if extra := files_outside_seal(directory):
        raise CheckpointError(f"{directory / extra[0]} is not in {SEAL}: it was added later")
    for name, (num_bytes, digest) in seal["files"].items():
        file = directory / name
        try:
            if file.stat().st_size != num_bytes:
                raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes, not {num_bytes:,}")
            if checksum(file) != digest:
                raise CheckpointError(f"{file} is damaged: its checksum differs from the saved one")
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    return seal


def files_outside_seal(directory: Path) -> list[str]:
    """Files in a sealed directory that its seal does not name."""
    known = {*read_seal(directory)["files"], SEAL}
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()}
    return sorted(found - known)


def remove_leftovers(parent: Path, run_id: str) -> None:
    """Remove leftovers of interrupted writes and removals in ``parent``, which have the run's id in their names."""
    for leftover in (*parent.glob(f"*.{run_id}.*{_PARTIAL}"), *parent.glob(f"*.{run_id}.*{_DISCARDED}")):
        if leftover.is_symlink():
            continue
        if leftover.is_file():  # of `owlore_tune.files.write_json`
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)


class StepCheckpoints:
    """The directories ``step_N`` in a run's output directory. No other code uses that name.

    A directory belongs to the run if the run's id and its name are in its seal. Other directories are never removed or
    renamed.

    Args:
        directory: the run's output directory.
        run_id: the run's id.
    """

    def __init__(self, directory: Path, run_id: str) -> None:
        self._directory = directory
        self._run_id = run_id

    def path(self, step: int) -> Path:
        return self._directory / f"step_{step}"

    def all(self) -> list[Path]:
        """All directories named ``step_N``, of this run or not, oldest first."""
        return sorted((path for path in self._directory.glob("step_*") if _STEP.fullmatch(path.name)), key=step_of)

    def own(self) -> list[Path]:
        """The run's checkpoints, oldest first, unverified."""
        return [directory for directory in self.all() if self._is_own(directory)]

    def foreign(self) -> list[Path]:
        """Directories that the run did not make, or of which only a part is left. A damaged seal with the run's id is
        the run's."""
        return [directory for directory in self.all() if not self._is_own(directory, allow_damage=True)]

    def _is_own(self, directory: Path, *, allow_damage: bool = False) -> bool:
        try:
            seal = read_seal(directory)
        except CheckpointError:
            try:
                return allow_damage and self._run_id in (directory / SEAL).read_text(errors="replace")
            except OSError:
                return False
        return (seal["run_id"], seal["name"]) == (self._run_id, directory.name) and not directory.is_symlink()

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint of the run; None if the run has saved none yet.

        Raises:
            CheckpointError: if there are checkpoints, but none is usable.
        """
        directories = self.all()
        for directory in reversed(directories):
            try:
                verify(directory)
                if self._is_own(directory):
                    return directory
                raise CheckpointError(f"{directory} is not of this run")
            except CheckpointError as error:
                log.warning(f"Skipping {directory.name}: {error}")
        if directories:
            raise CheckpointError(
                f"none of the {len(directories)} checkpoints in {self._directory} is undamaged and of this run"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename the run's checkpoints after ``step`` to ``abandoned_step_N``."""
        for directory in self.all():
            if step_of(directory) <= step or not self._is_own(directory, allow_damage=True):
                continue
            name, number = f"abandoned_{directory.name}", 1
            while os.path.lexists(directory.with_name(name)):
                number += 1
                name = f"abandoned_{directory.name}_{number}"
            os.rename(directory, directory.with_name(name))
            log.warning(f"Renamed {directory.name} to {name}: it is later than the checkpoint to resume from.")

    def keep_last(self, count: int | None) -> None:
        """Remove the run's checkpoints except the newest ``count``; None keeps all.

        A checkpoint with a file that the run did not make is kept. The others are renamed first, so that no directory
        with a part of the files has the name of a checkpoint.
        """
        for directory in [] if count is None else self.own()[:-count]:
            if extra := files_outside_seal(directory):
                log.warning(f"Keeping {directory}, because the run did not make {extra[0]} in it.")
                continue
            doomed = _beside(directory, self._run_id, _DISCARDED)
            os.rename(directory, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def step_of(directory: Path) -> int:
    """The step of a directory ``step_N``."""
    return int(directory.name[5:])
