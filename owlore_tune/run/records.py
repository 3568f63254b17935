"""Records of a run's steps and draws, appended to files and saved in every checkpoint."""

import errno
import json
import os
import statistics
from pathlib import Path
from typing import Any

from torchtune.utils import get_logger

from owlore_tune.files import to_json

log = get_logger("INFO")

STEPS, DRAWS = "steps.jsonl", "draws.jsonl"
PICTURES = ("scores", "draws", "loss", "memory", "step_times")  # of a run, without extension


class Records:
    """Records of steps, draws, held-out losses and phases of a run.

    A checkpoint contains all of them, so a resumed run has the records of the whole run. It rewrites the files without
    the steps after that checkpoint, because it repeats those.

    Args:
        directory: directory of ``steps.jsonl`` and ``draws.jsonl``; None writes no files.

    Attributes:
        steps: measurements of each optimizer step by name, with ``step`` from 1.
        draws: for each draw, the ``step`` it was made at, the layers ``active``, the number of ``trainable``
            parameters, and once it has ended: the last step (``end``), the layers whose weights ``moved``, and the
            seconds of the bases.
        losses: held-out loss by time of measurement: ``before``, ``step N``, ``after``.
        seconds: seconds of whole phases: ``load``, ``score``, ``train``, ``save``.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.steps: list[dict[str, float]] = []
        self.draws: list[dict[str, Any]] = []
        self.losses: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Write both files: empty ones, or with the records of a checkpoint."""
        for name, records in ((STEPS, self.steps), (DRAWS, [d for d in self.draws if "moved" in d])):
            if self._directory is not None:
                (self._directory / name).write_text("".join(to_json(record) + "\n" for record in records))

    def add_step(self, record: dict[str, float]) -> None:
        self.steps.append(record)
        self._append(STEPS, record)
        self.draws[-1]["refresh_seconds"] += record["refresh_seconds"]
        self.add_seconds("train", record["step_seconds"])

    def open_draw(self, step: int, active: list[int], trainable: int) -> None:
        self.draws.append({"step": step, "active": active, "trainable": trainable, "refresh_seconds": 0.0})

    def close_draw(self, moved: list[int]) -> dict[str, Any] | None:
        """Complete the last draw's record and write it. Returns the record; None if there is none to complete."""
        if not self.draws or "moved" in self.draws[-1]:
            return None
        draw = self.draws[-1]
        draw |= {"end": len(self.steps), "moved": moved}
        self._append(DRAWS, draw)
        return draw

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def median_step_seconds(self) -> float | None:
        return statistics.median(step["step_seconds"] for step in self.steps) if self.steps else None

    def tokens_per_second(self) -> float | None:
        """The mean over the time of all steps."""
        if not self.steps:
            return None
        tokens = sum(step["tokens_per_second"] * step["step_seconds"] for step in self.steps)
        return tokens / sum(step["step_seconds"] for step in self.steps)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self._directory is None:
            return
        line = (to_json(record) + "\n").encode()
        try:
            with open(self._directory / name, "ab", buffering=0, opener=_existing) as file:
                size = file.seek(0, os.SEEK_END)
                if (written := file.write(line)) < len(line):
                    file.truncate(size)  # the next line must not begin behind a half one
                    raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written")
        except OSError as error:  # a full disk does not end the run; the next checkpoint has the records
            log.warning(f"{self._directory / name} cannot be written: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_directory"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        since = self.seconds  # of this process, which has loaded already
        vars(self).update(state_dict)
        for phase, seconds in since.items():
            self.add_seconds(phase, seconds)


def _existing(path: str, flags: int) -> int:
    """Open a file that exists. Without it, a directory that took the run's place would get files of the run."""
    return os.open(path, flags & ~os.O_CREAT)


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records in a file of `Records`; empty if there is no file. An incomplete last line is skipped."""
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply") from error
