"""Scores of layers: a layer is drawn in proportion to its score.

A new score is one subclass of `Score` with a name, which `owlore.score` then takes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.distributed.world import ALONE, World, full, local
from owlore_tune.layers.inputs import InputNorms, input_norms
from owlore_tune.models.decoder import find_layers, find_linears

SCORES: dict[str, type["Score"]] = {}


@dataclass(frozen=True)
class Place:
    """The position of a layer, from the bottom."""

    index: int
    num_layers: int


class Score:
    """Gives each layer a number ≥ 0.

    Attributes:
        name: of the score in a config.
        needs_inputs: whether it needs the norms of the layers' inputs on calibration data.
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        SCORES[cls.name] = cls

    @classmethod
    def from_config(cls, config: Any) -> "Score":
        """The score with the options of the ``owlore`` block of a training config."""
        return cls()

    def options(self) -> dict[str, Any]:
        """The values that the scores depend on beside the model and the data, for a file of scores."""
        return vars(self)

    def of_layer(self, layer: nn.Module, place: Place, norms: InputNorms | None) -> float:
        """The score of one layer, in full precision.

        Args:
            norms: of the inputs of its Linears; None if the score does not need them.

        Raises:
            ValueError: if weights or inputs are not finite.
        """
        raise NotImplementedError

    def of_all(self, values: list[float]) -> list[float]:
        """The scores from the values of all layers, bottom first."""
        return values


class Outlier(Score):
    """The share of outlier weights.

    OWL (arXiv 2310.05175), as OwLore (arXiv 2405.18380, section 3.1) uses it: for each Linear with weight W (out, in)
    and calibration inputs X (tokens, in), A_ij = |W_ij| · ‖X_:,j‖₂; then over all Linears of the layer together,
    D = share of entries with A_ij > τ · mean(A).

    Args:
        threshold: τ; 13 as for the paper's released scores.

    Raises:
        ValueError: if ``threshold`` is not positive.
    """

    name = "outlier"
    needs_inputs = True

    def __init__(self, threshold: float = 13.0) -> None:
        if not threshold > 0:
            raise ValueError(f"outlier_threshold={threshold}; it must be above 0")
        self.threshold = threshold

    @classmethod
    def from_config(cls, config: Any) -> "Outlier":
        return cls(config.outlier_threshold)

    def of_layer(self, layer: nn.Module, place: Place, norms: InputNorms | None) -> float:
        """Streamed: at most one Linear's A is alive at a time."""
        assert norms is not None
        weights = {name: linear.weight for name, linear in find_linears(layer)}
        world = World.of(next(iter(weights.values())))  # processes that have rows of their own, and not copies
        num_entries = sum(weight.numel() for weight in weights.values())
        own = [(local(weight), norms[name].to(weight.device)) for name, weight in weights.items()]
        sums = [torch.dot(weight.abs().sum(0, dtype=torch.float64), norm.double()) for weight, norm in own]
        limit = self.threshold * world.sum_(torch.stack(sums).sum()) / num_entries
        if not limit.isfinite():  # every comparison with it would be false
            raise ValueError("its weights or input activations are not finite; is the checkpoint damaged?")
        counts = [(weight.abs() * norm.to(_compute_dtype(weight)) > limit).sum() for weight, norm in own]
        return int(world.sum_(torch.stack(counts).sum())) / num_entries


class Uniform(Score):
    """Equal scores, as in LISA (arXiv 2403.17919)."""

    name = "uniform"

    def of_layer(self, layer: nn.Module, place: Place, norms: InputNorms | None) -> float:
        return 1.0


class Increase(Score):
    """The position from the bottom."""

    name = "increase"

    def of_layer(self, layer: nn.Module, place: Place, norms: InputNorms | None) -> float:
        return place.index + 1.0


class Decrease(Score):
    """The position from the top."""

    name = "decrease"

    def of_layer(self, layer: nn.Module, place: Place, norms: InputNorms | None) -> float:
        return float(place.num_layers - place.index)


class Reverse(Outlier):
    """max D − D_l: layers with the fewest outliers first."""

    name = "reverse"

    def of_all(self, values: list[float]) -> list[float]:
        return [max(values) - value for value in values]


class WeightNorm(Score):
    """The Frobenius norm over all Linears of the layer."""

    name = "weight_norm"

    def of_layer(self, layer: nn.Module, place: Place, norms: InputNorms | None) -> float:
        parts = [torch.linalg.vector_norm(full(m.weight), dtype=torch.float64) for _, m in find_linears(layer)]
        return torch.linalg.vector_norm(torch.stack(parts)).item()


class HeavyTail(Score):
    """Mean over the layer's Linears of the Hill estimate of their spectrum's tail; larger means heavier.

    The estimate is the mean of ln(λ_i / λ_k+1) over the k largest of the n eigenvalues λ of WᵀW, k = n/2
    (heavy-tailed self-regularization, arXiv 1810.01075; k as in AlphaPruning, arXiv 2410.10912).
    """

    name = "heavy_tail"

    def of_layer(self, layer: nn.Module, place: Place, norms: InputNorms | None) -> float:
        estimates = []
        for _, linear in find_linears(layer):
            if min(linear.weight.shape) < 2:
                continue  # a single eigenvalue has no tail
            weight = full(linear.weight).to(_compute_dtype(linear.weight))
            if not weight.isfinite().all():  # the decomposition would not converge
                return math.nan
            logs = 2 * torch.linalg.svdvals(weight).double().clamp_min(1e-30).log()  # descending
            k = len(logs) // 2
            estimates.append((logs[:k] - logs[k]).mean())
        return torch.stack(estimates).mean().item()


def layer_scores(
    model: nn.Module,
    score: str | Score = "outlier",
    batches: Iterable[Mapping[str, Tensor]] = (),
    world: World = ALONE,
) -> list[float]:
    """One number ≥ 0 for each layer of ``model``, bottom first.

    Args:
        model: a decoder of torchtune or transformers.
        score: a `Score`, or the name of one with default options.
        batches: calibration inputs, keyword arguments of the model's forward, on its device: ``tokens`` (b, s), and as
            needed ``mask``, ``input_pos``, for torchtune's; such as ``input_ids`` (b, s) for transformers' own. The
            optional key ``valid`` (b, s), bool, is False for padding, which does not count. It is not passed to the
            model. They are only read if the score needs inputs.
        world: processes with batches of their own; all get the scores over all batches.

    Raises:
        TypeError: if ``model`` is not such a decoder.
        ValueError: if ``score`` is unknown, if it needs batches and there are none, or if weights or activations of a
            layer are not finite.
    """
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"score={score!r}; choose one of {', '.join(SCORES)}")
        score = SCORES[score]()
    layers = find_layers(model)
    norms = input_norms(model, batches, world) if score.needs_inputs else repeat(None)
    progress = tqdm(layers, desc=f"Scoring by {score.name}", unit="layer", leave=False, disable=world.rank > 0)
    return score_each(score, zip(progress, norms, strict=False), len(layers))


@torch.no_grad()
def score_each(score: Score, layers: Iterable[tuple[nn.Module, InputNorms | None]], num_layers: int) -> list[float]:
    """`layer_scores` of ``layers``, which come one by one with the norms of their inputs.

    Raises:
        ValueError: as `layer_scores`.
    """
    values = []
    for index, (layer, norms) in enumerate(layers):
        if score.needs_inputs and norms is None:
            raise ValueError(f"no calibration batches; score={score.name!r} needs at least one")
        try:
            value = score.of_layer(layer, Place(index, num_layers), norms)
            if not math.isfinite(value):
                raise ValueError("its weights are not finite; is the checkpoint damaged?")
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        values.append(value)
    return score.of_all(values)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
