"""The checkpoints ``step_N`` of one run: find, verify and remove them."""

import os
import re
from pathlib import Path

from torchtune.utils import get_logger

from owlore_tune.checkpoints.sealed import SEAL, discard, files_outside_seal, is_of_run, read_seal, verify
from owlore_tune.errors import CheckpointError

_STEP = re.compile(r"step_[0-9]+")

log = get_logger("INFO")


class StepCheckpoints:
    """The directories ``step_N`` in a run's output directory. No other code uses that name.

    A directory belongs to the run if the run's id is in its seal. Other directories are never removed or renamed.

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
        """The run's checkpoints, oldest first, unverified. Some may be links. Copies with other names do not count."""
        return [directory for directory in self.all() if is_of_run(directory, self._run_id)]

    def foreign(self) -> list[Path]:
        """Directories that another run or the user made. A truncated seal that contains the run's id is the run's."""
        return [directory for directory in self.all() if not self._may_set_aside(directory)]

    def unsealed(self) -> list[Path]:
        """Directories without a seal, or with an empty one, such as the rest of a checkpoint that is partly removed."""
        return [directory for directory in self.all() if not _has_seal(directory)]

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint of the run; None if the run has saved none yet.

        Raises:
            CheckpointError: if there are checkpoints, but none is usable.
        """
        directories = self.all()
        for directory in reversed(directories):
            try:
                seal = verify(directory)
                if seal["run_id"] != self._run_id:
                    raise CheckpointError(f"{directory} belongs to another run")
                if seal["name"] != directory.name:
                    raise CheckpointError(f"{directory} is a copy of {seal['name']}")
            except CheckpointError as error:
                log.warning(f"Skipping {directory.name}: {error}")
            else:
                return directory
        if directories:
            raise CheckpointError(
                f"none of the {len(directories)} checkpoints in {self._directory} is undamaged and of this run"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename the run's checkpoints after ``step`` to ``abandoned_step_N``."""
        for directory in filter(self._may_set_aside, self.all()):
            if step_of(directory) > step:
                name, number = f"abandoned_{directory.name}", 1
                while os.path.lexists(directory.with_name(name)):
                    number += 1
                    name = f"abandoned_{directory.name}_{number}"
                os.rename(directory, directory.with_name(name))
                log.warning(f"Renamed {directory.name} to {name}: it is later than the checkpoint to resume from.")

    def keep_last(self, count: int | None) -> None:
        """Remove the run's checkpoints except the newest ``count``; None keeps all.

        A checkpoint with a file that the run did not make is kept.
        """
        if count is None:
            return
        for directory in [d for d in self.own() if not d.is_symlink()][:-count]:
            if extra := files_outside_seal(directory):
                log.warning(f"Keeping {directory}, because the run did not make {extra[0]} in it.")
            else:
                discard(directory, self._run_id)

    def _may_set_aside(self, directory: Path) -> bool:
        """Whether the checkpoint is the run's. A truncated seal must contain the run's id."""
        try:
            read_seal(directory)
        except CheckpointError:
            try:
                return self._run_id in (directory / SEAL).read_text(errors="replace")
            except OSError:
                return False
        return is_of_run(directory, self._run_id)


def _has_seal(directory: Path) -> bool:
    try:
        return (directory / SEAL).stat().st_size > 0
    except OSError:
        return False


def step_of(directory: Path) -> int:
    """The step of a directory ``step_N``."""
    return int(directory.name[5:])
