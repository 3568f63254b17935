"""The weights of a run: how they are loaded, scored on the way, kept on the device, and written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.checkpoints.hf_weights import weight_files
from owlore_tune.config.schema import plain
from owlore_tune.data.loader import Batch, TrainingData, batch_to_device
from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.distributed.world import ALONE, World
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.scores import SCORES, InputNorms, InputSquares, LayerScores, Score, layer_scores, score_each
from owlore_tune.models.decoder import Decoder, find_layers, init_rope, layer_inputs
from owlore_tune.quantized.layers import QuantizedLayers
from owlore_tune.quantized.store import OUTSIDE, BackgroundStore, LayerStore
from owlore_tune.training.components import Inputs, build_inputs, build_model, check_model
from owlore_tune.training.config import TrainingSettings

STORE = "weights"  # directory of the full-precision layers
Run = Callable[..., None]  # takes a function to call before each batch, or nothing


def load_full(
    settings: TrainingSettings, inputs: Inputs, model: Decoder, checkpoint: Path | None, sharding: Sharding | None
) -> None:
    """Fill a model on the meta device with weights in full precision.

    Args:
        checkpoint: to resume from; None for the model directory.
        sharding: of FSDP2, which may keep weights in host memory.

    Raises:
        ConfigError: if the weights do not fit the model.
    """
    in_host_memory = sharding is not None and sharding.cpu_offload
    inputs.checkpointer.load_checkpoint(
        model,
        dtype=settings.dtype,
        device=settings.device,
        weights_device=torch.device("cpu") if in_host_memory else settings.device,
        directory=checkpoint,
    )


def open_quantized(
    settings: TrainingSettings, inputs: Inputs, model: Decoder, checkpoint: Path | None, directory: Path, world: World
) -> QuantizedLayers:
    """The quantized layers of a run, with a store of full-precision weights; the model has no weights yet.

    Args:
        checkpoint: to resume from; None for the model directory.
        directory: of the store's files.
    """
    files = inputs.checkpointer.files if checkpoint is None else weight_files(checkpoint)
    kind = BackgroundStore if settings.device.type == "cuda" else LayerStore
    store = kind(inputs.checkpointer, files, directory, settings.dtype)
    world.call(store.remove_leftovers, on_rank_zero=True)
    if checkpoint is not None:
        world.call(store.adopt, on_rank_zero=True)
        store.files = world.share(store.files)
    return QuantizedLayers(model, store, settings.owlore.weights, settings.owlore.products, world)


def load_quantized(
    quantized: QuantizedLayers,
    settings: TrainingSettings,
    inputs: Inputs,
    model: Decoder,
    world: World,
    *,
    scores: bool,
) -> list[float] | None:
    """Load, score and quantize the layers one by one, so that one of them at a time is in full precision.

    Args:
        scores: whether to score them.

    Raises:
        ConfigError: if the weights do not fit the model.
        RunError: if weights or activations are not finite.
    """
    owlore, score = settings.owlore, score_of(settings) if scores else None
    quantized.load(OUTSIDE, settings.device)
    with torch.device(settings.device):
        init_rope(model)
    quantized.quantize_outside(embeddings=False, output=not owlore.train_output)  # scores do not need the head
    layers = loaded_layers(
        model,
        quantized,
        settings.device,
        list(calibration_batches(settings, inputs.data)) if score is not None and score.needs_inputs else [],
        quantize_embeddings=not owlore.train_embeddings,
        world=world,
    )
    if score is None:
        for _ in layers:
            pass
        return None
    with errors_of_scoring():
        return score_each(score, layers, len(find_layers(model)))


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

    def __init__(self, model: Decoder, batches: Sequence[Mapping[str, Tensor]], what: str) -> None:
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

    def _run(self, layer: nn.Module, arguments: list[dict[str, Any]], before: Any = None) -> None:
        for number, batch in enumerate(self._batches):
            if before is not None:
                before(batch)
            self.hidden[number] = layer(self.hidden[number], **arguments[number])


def score_of(settings: TrainingSettings) -> Score:
    """The score of the config, with its options."""
    return SCORES[settings.owlore.score].from_config(settings.owlore)


def known_scores(
    settings: TrainingSettings, fingerprint: str, num_layers: int, saved: dict[str, Any] | None = None
) -> LayerScores | None:
    """The scores ``saved`` in a checkpoint, else those of ``owlore.scores_file``; None if there are none.

    Args:
        fingerprint: of the model's weights.

    Raises:
        ConfigError: if the file cannot be read, or belongs to another model or score.
    """
    file = settings.owlore.scores_file
    if saved is not None:
        return LayerScores(**saved)
    if file is None:
        return None
    try:
        return LayerScores.load(file, num_layers=num_layers, fingerprint=fingerprint, score=score_of(settings))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def score_layers(
    settings: TrainingSettings,
    model: Decoder,
    data: TrainingData,
    fingerprint: str,
    world: World = ALONE,
    values: list[float] | None = None,
) -> LayerScores:
    """The scores of the layers of ``model`` with their origin, which a file of scores has.

    Args:
        data: training data, of which the first batches are used if the score needs data.
        values: scores; computed if omitted.

    Raises:
        RunError: if weights or activations are not finite.
    """
    owlore, cfg, score = settings.owlore, settings.cfg, score_of(settings)
    if values is None:
        with errors_of_scoring():
            values = layer_scores(model, score, calibration_batches(settings, data), world)
    origin = {
        "dataset": plain(cfg.dataset),
        "batches": owlore.calibration_batches,
        "batch_size": cfg.batch_size * world.size,
        "seed": cfg.seed,
    }
    return LayerScores(values, score.name, fingerprint, score.options(), origin if score.needs_inputs else None)


@contextmanager
def errors_of_scoring() -> Iterator[None]:
    """Raise RunError for weights or activations that are not finite."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise RunError(f"the layers cannot be scored: {error}") from error


def calibration_batches(settings: TrainingSettings, data: TrainingData) -> Iterator[Batch]:
    """The calibration batches of the config, on the device of the run."""
    for batch in data.calibration_batches(settings.owlore.calibration_batches):
        yield batch_to_device(batch, settings.device)


def score_model(settings: TrainingSettings) -> LayerScores:
    """Load the config's model on one device and score its layers, without training."""
    inputs = build_inputs(settings)
    _, model = build_model(settings)
    check_model(inputs, model)
    load_full(settings, inputs, model, None, None)
    return score_layers(settings, model, inputs.data, inputs.checkpointer.fingerprint())


def weight_writer(
    inputs: Inputs, model: Decoder, layers: ProjectedLayers, quantized: QuantizedLayers | None, world: World
) -> tuple[Callable[[Path], None], int]:
    """The function that writes the weights of a checkpoint, and about how many bytes it writes.

    It writes the weights with the updates so far, without changing those on the device.
    """
    checkpointer = inputs.checkpointer
    if quantized is None:
        write = partial(checkpointer.write, model, value_of=layers.merged, world=world)
        return write, sum(parameter.nbytes for parameter in model.parameters())
    dtype = next(model.parameters()).dtype

    def write_layers(directory: Path) -> None:
        quantized.write_checkpoint(directory, layers.merged_layer, layers.active)
        checkpointer.copy_companions(directory, dtype)

    return (
        lambda directory: world.call(partial(write_layers, directory), on_rank_zero=True),
        quantized.store.nbytes([OUTSIDE, *layers.active]),
    )
