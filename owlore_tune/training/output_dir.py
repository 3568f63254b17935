"""A run's output directory: its lock, the run that owns it, and its checkpoints."""

import fcntl
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from owlore_tune.checkpoints.steps import StepCheckpoints, remove_leftovers, verify
from owlore_tune.distributed.world import World
from owlore_tune.errors import ConfigError
from owlore_tune.files import read_json, write_json

RUN_FILE = "run.json"  # id and kind of the run that owns the directory
LOCK_FILE = ".owlore.lock"
_ID = re.compile(r"[0-9a-f]{32}")
_PARTIAL_RUN_FILE = re.compile(r"\.run\.json\.[0-9a-f]{32}\.[0-9a-f]{8}\.partial")  # see `partial_name`
_HOLDER = re.compile(r"process \d+ on .*\n?")
_held: dict[Path, int] = {}  # locks of this process: directory → file descriptor


class RunDirectory:
    """The output directory of one run. One process writes to it at a time.

    Files that the run did not make are never removed or overwritten. The run's id is in `RUN_FILE` and in every
    checkpoint.

    Args:
        path: an existing directory.
        kind: ``training`` or ``evaluation``.

    Attributes:
        run_id: id of the run that owns the directory; a new id if none does.
        parent: id of the run that this one resumed from in another directory, if any.
        is_known: whether the directory belongs to a run already.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self._kind = kind
        self.run_id = uuid4().hex
        self.parent: str | None = None
        self.is_known = False

    def claim(self) -> None:
        """Lock the directory for this process, and read which run owns it.

        Raises:
            ConfigError: if another process has locked it, or it belongs to another kind of run.
        """
        self._lock()
        self._read()
        if self.is_known:
            remove_leftovers(self.path, self.run_id)

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """The directory of a training run for reading, without a lock."""
        run = cls(path, "training")
        run._read()
        return run

    @property
    def steps(self) -> StepCheckpoints:
        """The run's checkpoints."""
        return StepCheckpoints(self.path, self.run_id)

    def _read(self) -> None:
        file = self.path / RUN_FILE
        if not os.path.lexists(file):
            return
        try:
            known = read_json(file)
            kind, self.run_id, self.parent = known["kind"], known["run_id"], known["parent"]
            if not _ID.fullmatch(self.run_id):
                raise ValueError(f"run_id {self.run_id!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"output_dir={self.path}: {RUN_FILE} cannot be read ({error!r}); choose another directory"
            ) from error
        if kind != self._kind:
            raise ConfigError(f"output_dir={self.path} holds the {kind} of {self.run_id[:8]}; choose another directory")
        self.is_known = True

    def _lock(self) -> None:
        """The kernel frees the lock when the process ends, however it ends."""
        path = self.path.resolve()
        if path in _held:
            return
        try:
            descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ConfigError(f"output_dir={self.path}: {LOCK_FILE} cannot be opened: {error.strerror}") from error
        content = os.read(descriptor, 1000).decode(errors="replace")
        problem = None
        try:
            if content and not _HOLDER.fullmatch(content):
                problem = f"its {LOCK_FILE} is not a lock of this program; move it away"
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = content.strip() or "another process"
            problem = f"it is in use by {holder}; wait for it to end, or choose another directory"
        except OSError as error:
            problem = f"it cannot be locked ({error}); choose another disk"
        if problem is not None:
            os.close(descriptor)
            raise ConfigError(f"output_dir={self.path}: {problem}")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held[path] = descriptor

    def release(self) -> None:
        """Unlock the directory."""
        if (descriptor := _held.pop(self.path.resolve(), None)) is not None:
            os.close(descriptor)

    def check_free(self, names: Iterable[str]) -> None:
        """Check that the run overwrites no files of others.

        Args:
            names: files that the run writes. They may exist if the directory belongs to the run.

        Raises:
            ConfigError: naming the first checkpoint or file that the run did not make, or the rest of a checkpoint.
        """
        if self.is_known:
            found = [directory.name for directory in self.steps.foreign()]
        else:
            found = [name for name in names if os.path.lexists(self.path / name)]
            found += [directory.name for directory in self.steps.all()]
        if found:
            raise ConfigError(
                f"output_dir={self.path} has {found[0]}, which this run did not make; choose another directory, or "
                "remove it if it is what is left of a checkpoint"
            )

    def start(self) -> None:
        """Mark the directory as this run's."""
        if self.is_known:
            return
        for leftover in self.path.glob(f".{RUN_FILE}.*"):  # of a process that was killed in `write_json`
            if _PARTIAL_RUN_FILE.fullmatch(leftover.name):
                leftover.unlink()
        content = {"kind": self._kind, "run_id": self.run_id, "parent": self.parent}
        write_json(self.path / RUN_FILE, content, self.run_id)
        self.is_known = True

    def resume_from(self, directory: Path) -> None:
        """Verify a checkpoint, of this or another run, and record that the run resumes from it.

        Raises:
            ConfigError: if it belongs to another run, and this directory already belongs to a third.
        """
        run_id = verify(directory)["run_id"]
        if run_id == self.run_id:
            return
        if self.is_known and self.parent != run_id:
            raise ConfigError(
                f"resume_from_checkpoint={directory} is of run {run_id[:8]}, and output_dir={self.path} belongs to run "
                f"{self.run_id[:8]}; choose another output_dir"
            )
        self.parent = run_id


def check_creatable(field: str, path: str) -> None:
    """Raise ConfigError if a directory can neither be written to nor be created."""
    directory = Path(path).absolute()
    nearest = next(parent for parent in (directory, *directory.parents) if os.path.lexists(parent))
    _check_writable(field, path, nearest)


def writable_directory(path: str) -> Path:
    """``path`` as an existing, writable directory. It is created if it does not exist.

    Raises:
        ConfigError: if it cannot be created or written to.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={path} is not writable: {error.strerror}") from error
    _check_writable("output_dir", path, directory)
    return directory


def _check_writable(field: str, path: str, directory: Path) -> None:
    try:
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"{field}={path} is not writable: {directory}: {error.strerror}") from error


def shared_directory(path: str, world: World) -> Path:
    """`writable_directory`, with a check that all processes of ``world`` see the same directory.

    Raises:
        ConfigError: if it cannot be created or written to, or this process does not see the first one's files.
        RankError: if that happens on another process.
    """
    directory = world.call(lambda: writable_directory(path))
    assert directory is not None
    if world.size == 1:
        return directory
    probe = directory / world.share(f".shared_{uuid4().hex}")  # a new name, because network disks cache old ones

    def look() -> None:
        if not probe.exists():
            raise ConfigError(f"output_dir={path} is not the same directory as on rank 0; choose one on a shared disk")

    world.call(probe.touch, on_rank_zero=True)
    try:
        world.call(look)
    finally:
        if world.rank == 0:
            probe.unlink()
    return directory
