"""A run's output directory: who writes to it now, whose it is, and its checkpoints."""

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from owlore_tune.checkpoints.sealed import remove_leftovers, verify
from owlore_tune.checkpoints.steps import StepCheckpoints
from owlore_tune.distributed.world import ALONE, World
from owlore_tune.errors import ConfigError
from owlore_tune.files import write_json

RUN_FILE = "run.json"  # whose the directory is: id of the run, and what kind it is of
LOCK_FILE = ".owlore.lock"
_ID = re.compile(r"[0-9a-f]{32}")
_HOLDER = re.compile(r"process \d+ on .*\n?")
_held: dict[Path, int] = {}  # locks of this process: directory → file descriptor


class RunDirectory:
    """An output directory that one process writes to at a time, with files of one run.

    What the run has not made is neither removed nor written over. A run is known by the id in `RUN_FILE`; every
    checkpoint has it too.

    Args:
        path: exists.
        kind: ``training`` or ``evaluation``.

    Attributes:
        run_id: of the run that the directory belongs to; of the run to come if it belongs to none.
        parent: of the run that this one went on from in another directory, if it did.
        resumed_from: that run's checkpoint.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self._kind = kind
        self.run_id = uuid4().hex
        self.parent: str | None = None
        self.resumed_from: str | None = None
        self._is_known = False

    def claim(self) -> None:
        """Lock the directory for this process, and read whose it is.

        Raises:
            ConfigError: if another process has it, or it is of another kind of run.
        """
        self._lock()
        self._read()

    @classmethod
    def existing(cls, path: Path, kind: str = "training") -> "RunDirectory":
        """The directory of a run to look at, without a lock."""
        run = cls(path, kind)
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
            known = json.loads(file.read_text())
            kind, self.run_id, self.parent = known["kind"], known["run_id"], known["parent"]
            self.resumed_from = known.get("resumed_from")
            if not _ID.fullmatch(self.run_id):
                raise ValueError(f"run_id {self.run_id!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"output_dir={self.path}: {RUN_FILE} cannot be read ({error!r}); choose another"
            ) from error
        if kind != self._kind:
            raise ConfigError(f"output_dir={self.path} holds the {kind} of {self.run_id[:8]}; choose another directory")
        self._is_known = True

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
        try:
            if content and not _HOLDER.fullmatch(content):
                raise ConfigError(f"output_dir={self.path}: {LOCK_FILE} is no lock of this program; move it away")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(
                f"output_dir={self.path} is in use by {content.strip() or 'another process'}; wait for it to end, or "
                "choose another directory"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(f"output_dir={self.path} cannot be locked ({error}); choose another disk") from error
        except ConfigError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held[path] = descriptor

    def release(self) -> None:
        """Let other processes have the directory."""
        if (descriptor := _held.pop(self.path.resolve(), None)) is not None:
            os.close(descriptor)

    def check_free(self, names: Iterable[str]) -> None:
        """Refuse a directory that has a file which the run would write, or checkpoints.

        Args:
            names: of files; those of a run that the directory is known to belong to are its own.

        Raises:
            ConfigError: naming the first of them.
        """
        steps = self.steps.foreign() if self._is_known else self.steps.all()
        taken = [] if self._is_known else [name for name in names if os.path.lexists(self.path / name)]
        if found := [*(directory.name for directory in steps), *taken]:
            raise ConfigError(
                f"output_dir={self.path} has {found[0]}, which this run did not make; choose another directory"
            )

    @property
    def is_known(self) -> bool:
        """Whether the directory belonged to a run when it was claimed."""
        return self._is_known

    def start(self) -> None:
        """Make the directory this run's own, and clear up what an interruption of it left."""
        if not self._is_known:
            content = {
                "kind": self._kind, "run_id": self.run_id, "parent": self.parent, "resumed_from": self.resumed_from
            }  # fmt: skip
            write_json(self.path / RUN_FILE, content)
            self._is_known = True
        remove_leftovers(self.path, self.run_id)

    def resume_from(self, directory: Path) -> None:
        """Note that the run goes on from a verified checkpoint, which may be another run's.

        Raises:
            ConfigError: if that one is another run's, and this directory already belongs to a third.
        """
        seal = verify(directory)
        if seal["run_id"] == self.run_id:
            return
        if self._is_known and self.parent != seal["run_id"]:
            raise ConfigError(
                f"resume_from_checkpoint={directory} is of run {seal['run_id'][:8]}, and output_dir={self.path} "
                f"belongs to run {self.run_id[:8]}; choose another output_dir"
            )
        self.parent, self.resumed_from = seal["run_id"], str(directory)


def writable_directory(path: str) -> Path:
    """``path`` as an existing directory that files can be made in. It is made if it does not exist.

    Raises:
        ConfigError: if it cannot be made or written to.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir={path} is not writable: {error.strerror}") from error
    return directory


def shared_directory(path: str, world: World = ALONE) -> Path:
    """`writable_directory`, after a check that it is the same directory for all processes of ``world``.

    Raises:
        ConfigError: if it cannot be made or written to, or this process does not see what the first one writes.
        RankError: if that happens on another process.
    """
    directory = world.attempt(lambda: writable_directory(path))
    assert directory is not None
    if world.size == 1:
        return directory
    probe = directory / world.share(f".shared_{uuid4().hex}")  # a new name: a network disk may remember an old one

    def look() -> None:
        if not probe.exists():
            raise ConfigError(f"output_dir={path} is not the directory that rank 0 has; choose one on a shared disk")

    world.attempt(probe.touch, first_alone=True)
    try:
        world.attempt(look)
    finally:
        if world.rank == 0:
            probe.unlink()
    return directory
