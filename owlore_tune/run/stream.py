"""Forward passes with one layer at a time: to score layers while they load, and to measure the loss of all weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.distributed.world import ALONE, World
from owlore_tune.layers.inputs import InputNorms, InputSquares
from owlore_tune.models.decoder import Decoder, find_layers, layer_inputs
from owlore_tune.quantized.layers import QuantizedLayers

Batch = Mapping[str, Tensor]
BeforeBatch = Callable[[Batch], None]
Run = Callable[..., None]  # takes a BeforeBatch, or nothing


class ForwardByLayer:
    """Runs batches through a decoder, all of them through one layer before any goes through the next.

    Iterate over it for the index of each layer and a function that runs the layer. The layer needs weights only in that
    function, which calls its argument, if there is one, before each batch.

    Args:
        batches: keyword arguments of the model's forward, on its device; other keys are ignored.
        what: label of the progress bar.

    Attributes:
        hidden: of each batch, the hidden states (b, s, d) after the layers so far.
    """

    def __init__(self, model: Decoder, batches: Sequence[Batch], what: str) -> None:
        self._model, self._batches, self._what = model, batches, what
        self.hidden: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[int, Run]]:
        model = self._model
        was_training = model.training
        model.eval()
        arguments = []
        for batch in self._batches:
            extra = {key: batch[key] for key in ("mask", "input_pos") if key in batch}
            first, of_layers = layer_inputs(model, batch["tokens"], **extra)
            self.hidden.append(first)
            arguments.append(of_layers)
        for index, layer in enumerate(tqdm(find_layers(model), desc=self._what, unit="layer", leave=False)):
            yield index, partial(self._run, layer, [of_layers[index] for of_layers in arguments])
        model.train(was_training)

    def _run(self, layer: nn.Module, arguments: list[dict[str, Any]], before: BeforeBatch | None = None) -> None:
        for number, batch in enumerate(self._batches):
            if before is not None:
                before(batch)
            self.hidden[number] = layer(self.hidden[number], **arguments[number])


@torch.no_grad()
def loaded_layers(
    model: Decoder,
    quantized: QuantizedLayers,
    device: torch.device,
    batches: Sequence[Batch] = (),
    *,
    quantize_embeddings: bool,
    world: World = ALONE,
) -> Iterator[tuple[nn.Module, InputNorms | None]]:
    """Load the layers one by one, from the bottom, and quantize each one when the next one is asked for.

    Args:
        batches: calibration batches; without any, the norms are None.
        quantize_embeddings: quantize the embeddings, once they have embedded the batches.
        world: processes with batches of their own.

    Yields:
        A layer in full precision, and the norms of its inputs over the batches of all processes.
    """
    for index, run in ForwardByLayer(model, batches, "Loading layers"):
        if index == 0:
            quantized.quantize_outside(embeddings=quantize_embeddings, output=False)
        layer = find_layers(model)[index]
        quantized.load(index, device)
        yield layer, _norms(layer, run, world) if batches else None
        quantized.quantize(index)


def _norms(layer: nn.Module, run: Run, world: World) -> InputNorms:
    inputs = InputSquares(layer)
    run(lambda batch: inputs.mark(batch.get("valid")))
    inputs.remove()
    return inputs.norms(world)
