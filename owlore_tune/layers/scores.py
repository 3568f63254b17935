"""The seven layer scores, and a file to store them for reuse."""

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.distributed.world import ALONE, World, full
from owlore_tune.files import is_number, read_json
from owlore_tune.layers.outliers import outlier_scores
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.paths import user_path

SCORES = ("outlier", "uniform", "increase", "decrease", "reverse", "weight_norm", "heavy_tail")
NEEDS_DATA = ("outlier", "reverse")
SCORES_FILE = "scores.json"


def layer_scores(
    model: nn.Module,
    score: str = "outlier",
    *,
    batches: Callable[[], Iterable[Mapping[str, Tensor]]] | None = None,
    threshold: float = 13.0,
    world: World = ALONE,
) -> list[float]:
    """One number ≥ 0 per layer of ``model``, bottom first. Layers are sampled in proportion to it.

    Args:
        score: ``outlier``: share of outlier weights (see `outlier_scores`). ``reverse``: max D − D_l, fewest
            outliers first. ``uniform``: equal scores, as in LISA (arXiv 2403.17919). ``increase``, ``decrease``:
            proportional to the layer's position from the bottom or the top. ``weight_norm``: Frobenius norm over all
            Linears of the layer. ``heavy_tail``: the Hill estimate of the tail of the weights' spectra.
        batches: returns the calibration batches; only called for ``outlier`` and ``reverse``.
        threshold: τ of the outlier score.
        world: processes with batches of their own.

    Raises:
        TypeError: if ``model`` is not a decoder of torchtune or transformers.
        ValueError: if ``score`` is unknown, if it needs batches and there are none, or if weights or activations of a
            layer are not finite.
    """
    layers = find_layers(model)
    num_layers = len(layers)
    if score in NEEDS_DATA:
        if batches is None:
            raise ValueError(f"score={score!r} needs calibration batches")
        shares = outlier_scores(model, batches(), threshold, world)
        return shares if score == "outlier" else [max(shares) - share for share in shares]
    progress = tqdm(layers, desc=f"Scoring by {score}", unit="layer", leave=False, disable=world.rank > 0)
    return [score_of_layer(layer, score, index, num_layers) for index, layer in enumerate(progress)]


def score_of_layer(layer: nn.Module, score: str, index: int, num_layers: int) -> float:
    """One number of `layer_scores`, for a score that needs no data.

    Raises:
        ValueError: if ``score`` is unknown, or the weights of the layer are not finite.
    """
    by_position = {"uniform": 1.0, "increase": index + 1.0, "decrease": float(num_layers - index)}
    if score in by_position:
        return by_position[score]
    per_layer = {"weight_norm": weight_norm, "heavy_tail": heavy_tail}.get(score)
    if per_layer is None:
        raise ValueError(f"score={score!r}; choose one of {', '.join(SCORES)}")
    value = per_layer(layer)
    if not math.isfinite(value):
        raise ValueError(f"layer {index}: its weights are not finite; is the checkpoint damaged?")
    return value


@torch.no_grad()
def weight_norm(layer: nn.Module) -> float:
    """Frobenius norm over all Linears of the layer."""
    norms = [torch.linalg.vector_norm(full(m.weight), dtype=torch.float64) for _, m in find_linears(layer)]
    return torch.linalg.vector_norm(torch.stack(norms)).item()


@torch.no_grad()
def heavy_tail(layer: nn.Module) -> float:
    """Mean over the layer's Linears of the Hill estimate of their spectrum's tail; larger means heavier.

    The estimate is the mean of ln(λ_i / λ_k+1) over the k largest of the n eigenvalues λ of WᵀW, k = n/2
    (heavy-tailed self-regularization, arXiv 1810.01075; k as in AlphaPruning, arXiv 2410.10912).
    """
    estimates = []
    for _, linear in find_linears(layer):
        weight = full(linear.weight).to(torch.promote_types(linear.weight.dtype, torch.float32))
        if not weight.isfinite().all():  # the decomposition would not converge
            return math.nan
        logs = 2 * torch.linalg.svdvals(weight).double().clamp_min(1e-30).log()  # descending
        k = len(logs) // 2
        estimates.append((logs[:k] - logs[k]).mean())
    return torch.stack(estimates).mean().item()


@dataclass
class LayerScores:
    """Scores of a model's layers and their provenance, stored as JSON."""

    scores: list[float]
    score: str
    fingerprint: str  # of the model's weights, see `owlore_tune.checkpoints.HFCheckpointer.fingerprint`
    threshold: float | None = None
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
        score: str = "outlier",
        threshold: float | None = None,
    ) -> "LayerScores":
        """Read a score file, and check that it matches the model, the score and, if given, the threshold.

        Raises:
            ValueError: if the file is missing or not a score file, if its scores are not finite numbers ≥ 0, or if
                its number of layers, weights, score or threshold differ.
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
        if loaded.score != score or None not in (threshold, loaded.threshold) and loaded.threshold != threshold:
            raise ValueError(
                f"scores_file={path} holds {loaded.score} scores with threshold {loaded.threshold}, the config asks "
                f"for {score} with {threshold}; set owlore.score and owlore.outlier_threshold to match"
            )
        return loaded
