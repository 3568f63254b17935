"""Records of a run's steps and draws, in files that grow with it and in every checkpoint."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtune.utils import get_logger

from owlore_tune.files import to_json

log = get_logger("INFO")

STEPS, DRAWS = "steps.jsonl", "draws.jsonl"
PICTURES = ("scores", "draws", "loss", "memory", "step_times")  # of a run, without their ending


class Records:
    """Records of steps, draws, held-out losses and phases of a run.

    A checkpoint holds all of them, so that a resumed run has the records of the whole run. Its files are then written
    anew, without the records of steps after that checkpoint, which are about to be repeated.

    Args:
        directory: of ``steps.jsonl`` and ``draws.jsonl``; None writes no files.

    Attributes:
        steps: measurements of each optimizer step by name, with ``step`` from 1.
        draws: for each draw, the ``step`` it was made at, the layers ``active``, the number of ``trainable``
            parameters, and the seconds and captured energy of the bases made until the next draw.
        losses: held-out loss by when it was measured: ``before``, ``step N``, ``after``.
        seconds: of whole phases: ``load``, ``score``, ``train``, ``save``.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.steps: list[dict[str, float]] = []
        self.draws: list[dict[str, Any]] = []
        self.losses: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._energies: list[float] = []  # of the bases made since the last draw

    def start(self) -> None:
        """Write both files with all that is known: nothing, or the records of a checkpoint."""
        for name, records in ((STEPS, self.steps), (DRAWS, [d for d in self.draws if "captured_energy" in d])):
            if self._directory is not None:
                (self._directory / name).write_text("".join(to_json(record) + "\n" for record in records))

    def add_step(self, record: dict[str, float], energies: Sequence[float]) -> None:
        self.steps.append(record)
        self._append(STEPS, record)
        self._energies += energies
        self.draws[-1]["refresh_seconds"] += record["refresh_seconds"]

    def open_draw(self, step: int, active: list[int], trainable: int) -> None:
        self.draws.append({"step": step, "active": active, "trainable": trainable, "refresh_seconds": 0.0})

    def close_draw(self) -> dict[str, Any] | None:
        """Complete the last draw's record and write it. Returns the record; None if there is none to complete."""
        if not self.draws or "captured_energy" in self.draws[-1]:
            return None
        draw, energies, self._energies = self.draws[-1], self._energies, []
        draw["captured_energy"] = statistics.mean(energies) if energies else None
        self._append(DRAWS, draw)
        return draw

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def median_step_seconds(self) -> float | None:
        return statistics.median(step["step_seconds"] for step in self.steps) if self.steps else None

    def tokens_per_second(self) -> float | None:
        """Over all steps together."""
        if not self.steps:
            return None
        tokens = sum(step["tokens_per_second"] * step["step_seconds"] for step in self.steps)
        return tokens / sum(step["step_seconds"] for step in self.steps)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self._directory is None:
            return
        try:
            with (self._directory / name).open("a") as file:
                file.write(to_json(record) + "\n")
        except OSError as error:  # a full disk need not end the run; the records are in the next checkpoint
            log.warning(f"{self._directory / name} cannot be written: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_directory"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a file of `Records`; none if there is no file. A last line that is half-written is left out."""
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]
