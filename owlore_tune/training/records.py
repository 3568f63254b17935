"""Records of a run: its steps and draws in files, its held-out losses and the time of its phases in memory."""

import errno
import json
import os
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtune.utils import get_logger

from owlore_tune.files import to_json, write_atomically

STEPS_FILE, DRAWS_FILE = "steps.jsonl", "draws.jsonl"
PICTURES = ("scores", "draws", "loss", "memory", "step_times")  # of a run, without extension

log = get_logger("INFO")


class Records:
    """Records of a run: steps and draws in files, held-out losses and the time of phases in memory.

    Neither memory nor checkpoints grow with the number of steps. A resumed run cuts the files after its checkpoint,
    because it repeats the steps after it. In another directory, it begins new files.

    Args:
        directory: directory of ``steps.jsonl`` and ``draws.jsonl``; None writes no files.

    Attributes:
        draw: the current draw: the ``step`` it was made at, the layers ``active``, the number of ``trainable``
            parameters, and the seconds of its bases. Once it has ended, its record in the file also has the last step
            (``end``) and the layers whose weights ``moved``.
        losses: held-out loss by time of measurement: ``before``, ``step N``, ``after``.
        seconds: seconds of whole phases: ``load``, ``score``, ``train``, ``save``.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.draw: dict[str, Any] | None = None
        self.losses: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def start(self, step: int, run_id: str) -> None:
        """Begin both files, or cut those of this run after ``step``, and before the current draw."""
        begins = step if self.draw is None else self.draw["step"]  # of the current draw
        for name, last, key in ((STEPS_FILE, step, "step"), (DRAWS_FILE, begins, "end")):
            if self._directory is not None:
                file = self._directory / name
                kept = [record for record in read_records(file) if record[key] <= last]
                write_atomically(file, "".join(to_json(record) + "\n" for record in kept), run_id)

    def add_step(self, record: dict[str, float]) -> None:
        self._append(STEPS_FILE, record)
        assert self.draw is not None
        self.draw["refresh_seconds"] += record["refresh_seconds"]
        self.add_seconds("train", record["step_seconds"])

    def open_draw(self, step: int, active: list[int], trainable: int) -> None:
        self.draw = {"step": step, "active": active, "trainable": trainable, "refresh_seconds": 0.0}

    def close_draw(self, step: int, moved: list[int]) -> dict[str, Any] | None:
        """Complete the record of the current draw, which ends at ``step``, and write it. Returns None without one."""
        if (draw := self.draw) is None:
            return None
        self.draw = None
        self._append(DRAWS_FILE, draw := draw | {"end": step, "moved": moved})
        return draw

    @property
    def draws(self) -> list[dict[str, Any]]:
        """All draws, of which the last one may still be in progress."""
        ended = [] if self._directory is None else read_records(self._directory / DRAWS_FILE)
        return ended + ([] if self.draw is None else [self.draw])

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def speed(self) -> dict[str, float | None]:
        """The median time of a step, and the mean number of tokens per second over the time of all steps."""
        steps = [] if self._directory is None else read_records(self._directory / STEPS_FILE)
        seconds = [step["step_seconds"] for step in steps]
        tokens = sum(step["tokens_per_second"] * step["step_seconds"] for step in steps)
        return {
            "median_step_seconds": statistics.median(seconds) if steps else None,
            "tokens_per_second": tokens / sum(seconds) if steps else None,
        }

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
        except OSError as error:  # a full disk does not end the run
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
    """The records in a file of `Records`; empty if there is no file. Lines that a crash of the machine has left
    incomplete are skipped."""
    records = []
    for line in file.read_text(errors="replace").split("\n")[:-1] if file.is_file() else ():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
