"""The checkpoints ``step_N`` of one run: which there are, which are good, and which may go."""

import os
import re
from pathlib import Path

from torchtune.utils import get_logger

from owlore_tune.checkpoints.sealed import SEAL, discard, files_outside_seal, is_of_run, read_seal, verify
from owlore_tune.errors import CheckpointError

_STEP = re.compile(r"step_[0-9]+")

log = get_logger("INFO")


class StepCheckpoints:
    """The directories ``step_N`` in a run's output directory. No other code knows that name.

    A directory belongs to the run if the run's id is in its seal. Others are neither removed nor renamed.

    Args:
        directory: of the run.
        run_id: of the run.
    """

    def __init__(self, directory: Path, run_id: str) -> None:
        self._directory = directory
        self._run_id = run_id

    def path(self, step: int) -> Path:
        return self._directory / f"step_{step}"

    def all(self) -> list[Path]:
        """All directories named ``step_N``, whoever made them, oldest first."""
        return sorted((path for path in self._directory.glob("step_*") if _STEP.fullmatch(path.name)), key=step_of)

    def own(self) -> list[Path]:
        """The run's checkpoints, oldest first, unverified. One that was moved may be a link now."""
        return [directory for directory in self.all() if self._is_own(directory)]

    def foreign(self) -> list[Path]:
        """Directories that another run or the user made. One with a seal cut short in which the id is left is not."""
        return [directory for directory in self.all() if not self._may_set_aside(directory)]

    def newest(self) -> Path | None:
        """The newest checkpoint of the run that is complete and undamaged; None if the run has saved none yet.

        Raises:
            CheckpointError: if there are checkpoints, and none of them is good.
        """
        directories = self.all()
        for directory in reversed(directories):
            try:
                if verify(directory)["run_id"] != self._run_id:
                    raise CheckpointError(f"{directory} belongs to another run")
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
        """Rename the run's checkpoints later than ``step``, which it abandons, to ``abandoned_step_N``."""
        for directory in filter(self._may_set_aside, self.all()):
            if step_of(directory) > step:
                name, number = f"abandoned_{directory.name}", 1
                while os.path.lexists(directory.with_name(name)):
                    number += 1
                    name = f"abandoned_{directory.name}_{number}"
                os.rename(directory, directory.with_name(name))
                log.warning(f"{directory.name} is later than the checkpoint to resume from; it is now {name}.")

    def keep_last(self, count: int | None) -> None:
        """Remove the run's checkpoints except the newest ``count``; None keeps all.

        A checkpoint with a file that the run did not make stays.
        """
        if count is None:
            return
        for directory in [d for d in self.all() if is_of_run(d, self._run_id)][:-count]:
            if extra := files_outside_seal(directory):
                log.warning(f"{directory} is kept, because the run did not make {extra[0]} in it.")
            else:
                discard(directory, self._run_id)

    def _is_own(self, directory: Path) -> bool:
        try:
            return read_seal(directory)["run_id"] == self._run_id
        except CheckpointError:
            return False

    def _may_set_aside(self, directory: Path) -> bool:
        """Whether the checkpoint is the run's by its seal, or by the id in a seal that is cut short."""
        try:
            return self._is_own(directory) or self._run_id in (directory / SEAL).read_text(errors="replace")
        except OSError:
            return False


def step_of(directory: Path) -> int:
    """The step of a directory ``step_N``."""
    return int(directory.name[5:])
