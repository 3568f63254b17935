"""Scores of a model's layers in a file, for reuse."""

import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from owlore_tune.files import is_number, read_json
from owlore_tune.layers.scores import Score
from owlore_tune.paths import user_path

SCORES_FILE = "scores.json"


@dataclass
class LayerScores:
    """Scores of a model's layers and their provenance, stored as JSON."""

    scores: list[float]
    score: str
    fingerprint: str  # of the model's weights, see `owlore_tune.checkpoints.HFCheckpointer.fingerprint`
    options: dict[str, Any] = field(default_factory=dict)  # of the score
    data: dict[str, Any] | None = None
    versions: dict[str, str] = field(
        default_factory=lambda: {
            name: importlib.metadata.version(name) for name in ("owlore-tune", "torchtune", "torch")
        }
    )
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        num_layers: int,
        fingerprint: str,
        score: Score,
    ) -> "LayerScores":
        """Read a score file, and check that it matches the model and the score.

        Raises:
            ValueError: if the file is missing or not a score file, if its scores are not finite numbers ≥ 0, or if
                its number of layers, weights, score or options differ.
        """
        try:
            loaded = cls(**read_json(user_path(path)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"scores_file={path} cannot be read ({error}); create one with `owlore score`") from error
        if not isinstance(loaded.scores, list):
            raise ValueError(f"scores_file={path} has no list of scores; create one with `owlore score`")
        for layer, value in enumerate(loaded.scores):
            if not is_number(value) or value < 0:
                shown = str(value)[:40]
                raise ValueError(f"scores_file={path}: the score of layer {layer} is {shown}; recreate the file")
        if len(loaded.scores) != num_layers:
            raise ValueError(
                f"scores_file={path} is for a model with {len(loaded.scores)} layers; this one has {num_layers}"
            )
        if loaded.fingerprint != fingerprint:
            raise ValueError(
                f"scores_file={path} was made for other weights ({loaded.fingerprint}, these are {fingerprint}); "
                "create one for this checkpoint with `owlore score`, or omit scores_file"
            )
        if (loaded.score, loaded.options) != (score.name, score.options()):
            raise ValueError(
                f"scores_file={path} holds {loaded.score} scores with {loaded.options}, the config asks for "
                f"{score.name} with {score.options()}; change the owlore block to match, or create another file"
            )
        return loaded
