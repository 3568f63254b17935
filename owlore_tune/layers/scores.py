"""Scores of layers: a layer is drawn in proportion to its score.

A new score is one subclass of `Score` with a name, which `owlore.score` then takes. Scores with data use the norms of
the inputs of a layer's Linears (`InputSquares`). A file of scores can be used again (`LayerScores`).
"""

import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.distributed.fsdp import reshard
from owlore_tune.distributed.world import ALONE, World, full, local
from owlore_tune.files import is_number, read_json, user_path
from owlore_tune.models.decoder import find_layers, find_linears, plain_name
from owlore_tune.models.experts import Experts

InputNorms: TypeAlias = dict[str, Tensor]  # by a Linear's name in its layer: ‖X_:,j‖₂ (in,), float64


@torch.no_grad()
def input_norms(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], world: World) -> list[InputNorms | None]:
    """The `InputNorms` of each layer over the batches of all processes, in one forward pass per batch.

    Args:
        batches: as `owlore_tune.layers.scores.layer_scores`. Without any, the norms are None.
    """
    layers = [InputSquares(layer) for layer in find_layers(model)]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    num_batches = 0
    try:
        for batch in tqdm(batches, desc="Scoring layers", unit="batch", leave=False, disable=world.rank > 0):
            inputs = dict(batch)
            valid = inputs.pop("valid", None)
            for layer in layers:
                layer.mark(valid)
            model(**inputs)
            num_batches += 1
    finally:
        for module, is_training in modes.items():
            module.training = is_training
        reshard(model)
        for layer in layers:
            layer.remove()
    return [layer.norms(world) if num_batches else None for layer in layers]


class InputSquares:
    """Sums the squared inputs of a layer's Linears over the forward passes of the layer, until `remove`."""

    def __init__(self, layer: nn.Module) -> None:
        self._linears = dict(find_linears(layer))
        self._experts = _experts_by_linear(layer)
        self._squares: dict[str, Tensor] = {}
        self._positions: Tensor | None = None  # (b · s,)
        # The query, key and value projections share an input, as do gate and up. Each input is measured once.
        self._last_input: Tensor | None = None
        self._last_squares: Tensor | None = None
        self._handles = [
            linear.register_forward_pre_hook(partial(self._measure, name)) for name, linear in self._linears.items()
        ]
        self._handles.append(layer.register_forward_hook(self._forget))

    def mark(self, valid: Tensor | None) -> None:
        """Measure only these positions of the next forward pass, (b, s) bool; None for all."""
        self._positions = None if valid is None or valid.all() else valid.flatten()

    def _measure(self, name: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0] is not self._last_input:
            x = args[0].reshape(-1, args[0].shape[-1])
            if self._positions is not None:
                experts = self._experts.get(name)
                x = x[self._positions if experts is None else self._positions[experts.tokens]]
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._last_input = args[0]
            self._last_squares = torch.linalg.vector_norm(x, dim=0, dtype=dtype).double().square()
        assert self._last_squares is not None
        known = self._squares.get(name)
        self._squares[name] = self._last_squares if known is None else known + self._last_squares

    def _forget(self, *_: object) -> None:
        self._last_input = self._last_squares = None

    def norms(self, world: World) -> InputNorms:
        """‖X_:,j‖₂ of each Linear by its name, (in,) float64, over all processes. 0 for an expert without tokens."""
        norms = {}
        for name, linear in self._linears.items():
            total = self._squares.get(name)
            if total is None:
                device = next(iter(self._squares.values())).device
                total = torch.zeros(linear.in_features, dtype=torch.float64, device=device)
            norms[name] = world.sum_(total.clone()).sqrt()
        return norms

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _experts_by_linear(layer: nn.Module) -> dict[str, Experts]:
    """The mixture of experts that each Linear belongs to, by its name in ``layer``."""
    found = [(plain_name(name), module) for name, module in layer.named_modules() if isinstance(module, Experts)]
    return {f"{path}.{name}": experts for path, experts in found for name, _ in find_linears(experts)}


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
