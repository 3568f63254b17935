"""What a run did: each step and each draw, in files that grow as it goes and in every checkpoint."""

import json
import statistics
from pathlib import Path
from typing import Any

from torchtune.utils import get_logger

from owlore_tune.manifest import to_json

log = get_logger("INFO")

STEPS, DRAWS = "steps.jsonl", "draws.jsonl"
PICTURES = ("scores", "draws", "loss", "memory", "step_times")  # of a run, without their ending


class RunLog:
    """Records of steps, draws, held-out losses and phases of a run.

    A checkpoint holds all of them, so that a resumed run has the records of the whole run; its files are then written
    anew, without what was logged after that checkpoint and is about to happen again.

    Args:
        directory: where ``steps.jsonl`` and ``draws.jsonl`` go; None writes no files.

    Attributes:
        steps: what was measured in each optimizer step, by name, with ``step`` from 1.
        draws: of each draw the ``step`` it was made at, the layers ``active``, and what came of it.
        losses: held-out loss by when it was measured: ``before``, ``step N``, ``after``.
        evaluations: averages of the suite's metrics by when.
        seconds: of whole phases: ``load``, ``score``, ``train``, ``save``.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self.steps: list[dict[str, float]] = []
        self.draws: list[dict[str, Any]] = []
        self.losses: dict[str, float] = {}
        self.evaluations: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Write both files with what is known so far: nothing, or what a checkpoint held."""
        for name, records in ((STEPS, self.steps), (DRAWS, [d for d in self.draws if "changed_layers" in d])):
            if self._directory is not None:
                (self._directory / name).write_text("".join(to_json(record) + "\n" for record in records))

    def add_step(self, record: dict[str, float]) -> None:
        self.steps.append(record)
        self._append(STEPS, record)

    def open_draw(self, record: dict[str, Any]) -> None:
        self.draws.append(record)

    def close_draw(self, outcome: dict[str, Any]) -> None:
        """Complete the last draw's record, and write it."""
        self.draws[-1] |= outcome
        self._append(DRAWS, self.draws[-1])

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
    """The records of a file of `RunLog`; none where there is no file. A last line that is half written is left out."""
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]
