"""The progress of a run."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0  # optimizer steps done, skipped ones included
    skipped_steps: int = 0  # without an update, because the loss or a gradient was not finite
    skipped_in_a_row: int = 0  # up to the current step
    trained_tokens: int = 0

    def is_due(self, every: int | None) -> bool:
        """Whether the number of steps is a multiple of ``every``; False if None."""
        return every is not None and self.step % every == 0

    def validation_due(self, every: int | None, num_steps: int) -> str | None:
        """The name of the held-out loss to measure now: ``before`` or ``step N``; None if none is due. That of the last
        step, ``after``, is not part of it."""
        if self.step == 0:
            return "before"
        return f"step {self.step}" if self.is_due(every) and self.step < num_steps else None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
