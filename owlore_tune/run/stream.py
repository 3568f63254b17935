"""Forward passes with one layer at a time: to score layers while they load, and to measure the loss of all weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from owlore_tune.distributed.world import ALONE, World
from owlore_tune.layers.outliers import InputSquares, outlier_share
from owlore_tune.layers.scores import NEEDS_DATA, score_of_layer
from owlore_tune.models.decoder import Decoder, find_layers, find_linears, layer_inputs
from owlore_tune.quantized.layers import QuantizedLayers

Batch = Mapping[str, Tensor]
Run = Callable[[Callable[[Batch], None] | None], None]


@torch.no_grad()
def forward_by_layer(
    model: Decoder, batches: Sequence[Batch], visit: Callable[[int, Run], None], what: str
) -> list[Tensor]:
    """Run ``batches`` through the layers, all of them through one layer before any goes through the next.

    Args:
        batches: keyword arguments of the model's forward, on its device; other keys are ignored.
        visit: is called with the index of each layer and a function that runs it. The layer needs weights only then.
            The function calls its argument, if there is one, before each batch.
        what: label of the progress bar.

    Returns:
        The hidden states (b, s, d) of each batch before the final norm.
    """
    was_training = model.training
    model.eval()
    hidden, arguments = [], []
    for batch in batches:
        extra = {key: batch[key] for key in ("mask", "input_pos") if key in batch}
        first, of_layers = layer_inputs(model, batch["tokens"], **extra)
        hidden.append(first)
        arguments.append(of_layers)
    for index, layer in enumerate(tqdm(find_layers(model), desc=what, unit="layer", leave=False)):

        def run(before: Callable[[Batch], None] | None = None, layer: Any = layer, index: int = index) -> None:
            for number, batch in enumerate(batches):
                if before is not None:
                    before(batch)
                hidden[number] = layer(hidden[number], **arguments[number][index])

        visit(index, run)
    model.train(was_training)
    return hidden


def load_and_score(
    model: Decoder,
    quantized: QuantizedLayers,
    device: torch.device,
    score: str | None,
    batches: Callable[[], Iterable[Batch]],
    threshold: float,
    *,
    freeze_embeddings: bool,
    world: World = ALONE,
) -> list[float] | None:
    """Load, score and quantize the layers one by one, from the bottom. Embeddings are quantized before.

    The scores equal those of `owlore_tune.layers.scores.layer_scores` on the whole model.

    Args:
        score: a name of `layer_scores`; None only loads and quantizes.
        batches: the calibration batches.
        threshold: of the outlier score.
        freeze_embeddings: quantize the embeddings, once they have embedded the batches.
        world: processes with batches of their own; all get the scores over all batches.

    Raises:
        ValueError: as `layer_scores`.
    """
    scores: list[float] = []
    layers = find_layers(model)
    calibration = list(batches()) if score in NEEDS_DATA else []

    def visit(index: int, run: Run) -> None:
        if index == 0:
            quantized.freeze_outside(embeddings=freeze_embeddings, output=False)
        layer = layers[index]
        quantized.load(index, device)
        if score in NEEDS_DATA:
            inputs = InputSquares(layer)

            def before(batch: Batch) -> None:
                inputs.valid = batch.get("valid")

            run(before)
            inputs.remove()
            norms = inputs.norms(world)
            linears = [(linear.weight, norms[name]) for name, linear in find_linears(layer)]
            try:
                scores.append(outlier_share(linears, threshold))
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from error
        elif score is not None:
            scores.append(score_of_layer(layer, score, index, len(layers)))
        quantized.freeze(index)

    forward_by_layer(model, calibration, visit, "Loading layers" if score is None else "Loading and scoring layers")
    if score == "reverse":
        return [max(scores) - value for value in scores]
    return scores if score is not None else None
