"""The weights of a run: how they are loaded, scored on the way, kept on the device, and written."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from owlore_tune.checkpoints.hf import weight_files
from owlore_tune.distributed.world import ALONE, World
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.scores import LayerScores
from owlore_tune.models.decoder import Decoder, init_rope
from owlore_tune.quantized.layers import QuantizedLayers
from owlore_tune.quantized.store import OUTSIDE, LayerStore
from owlore_tune.run.build import Inputs
from owlore_tune.run.directory import RunDirectory
from owlore_tune.run.report import Report
from owlore_tune.run.scoring import calibration_batches, score_layers, scores_of
from owlore_tune.run.settings import TrainingSettings
from owlore_tune.run.stream import load_and_score

STORE = "weights"  # directory of the full-precision layers


@dataclass(frozen=True)
class Source:
    """Where a run's weights are, and where they go."""

    run: RunDirectory
    checkpoint: Path | None  # to resume from; None for the model directory
    weights_device: torch.device  # where they are kept


def load_weights(
    settings: TrainingSettings,
    inputs: Inputs,
    model: Decoder,
    report: Report,
    source: Source,
    known: LayerScores | None,
    fingerprint: str,
    world: World = ALONE,
) -> tuple[QuantizedLayers | None, LayerScores]:
    """Fill ``model``, on the meta device, and score its layers.

    Args:
        known: scores, which are then not made anew.
        fingerprint: of the weights, for new scores.

    Returns:
        The quantized layers, None if the weights are in full precision; and the scores.

    Raises:
        ConfigError: if the weights do not fit the model.
        RunError: if weights or activations are not finite.
    """
    if settings.owlore.weights != "full":
        with report.timed("load"):
            return _load_quantized(settings, inputs, model, source, known, fingerprint, world)
    with report.timed("load"):
        inputs.checkpointer.load_checkpoint(
            model,
            dtype=settings.dtype,
            device=settings.device,
            weights_device=source.weights_device,
            directory=source.checkpoint,
        )
    with report.timed("score"):
        return None, known or score_layers(settings, model, inputs.data, fingerprint, world)


def _load_quantized(
    settings: TrainingSettings,
    inputs: Inputs,
    model: Decoder,
    source: Source,
    known: LayerScores | None,
    fingerprint: str,
    world: World,
) -> tuple[QuantizedLayers, LayerScores]:
    """Load, score and quantize the layers one by one, so that one of them at a time is in full precision."""
    owlore, checkpointer = settings.owlore, inputs.checkpointer
    checkpointer.check_model(model)
    files = checkpointer.files if source.checkpoint is None else weight_files(source.checkpoint)
    store = LayerStore(checkpointer, files, source.run.path / STORE / source.run.run_id, settings.dtype)
    world.attempt(store.remove_leftovers, first_alone=True)
    if source.checkpoint is not None:
        world.attempt(store.adopt, first_alone=True)
        store.files = world.share(store.files)
    quantized = QuantizedLayers(model, store, owlore.weights, owlore.products, world)
    quantized.load(OUTSIDE, settings.device)
    with torch.device(settings.device):
        init_rope(model)
    batches = partial(calibration_batches, settings, inputs.data)
    score = None if known else owlore.score
    quantized.freeze_outside(embeddings=False, output=not owlore.train_output)  # scores do not need the head
    embeddings = not owlore.train_embeddings
    try:
        made = load_and_score(
            model, quantized, settings.device, score, batches, owlore.outlier_threshold,
            freeze_embeddings=embeddings, world=world,
        )  # fmt: skip
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise RunError(f"the layers cannot be scored: {error}") from error
    return quantized, known or scores_of(settings, made or [], fingerprint, world)


def weight_writer(
    inputs: Inputs,
    model: Decoder,
    layers: ProjectedLayers,
    quantized: QuantizedLayers | None,
    world: World = ALONE,
) -> tuple[Callable[[Path], None], int]:
    """The function that writes the weights of a checkpoint, and about how many bytes it writes.

    It writes the weights with the updates so far, without changing those on the device.
    """
    checkpointer = inputs.checkpointer
    dtype = next(model.parameters()).dtype

    def write(directory: Path) -> None:
        if quantized is None:
            checkpointer.write(model, directory, value_of=layers.merged, world=world)
            return

        def write_layers() -> None:
            quantized.write_checkpoint(directory, layers.merged_layer, layers.active)
            checkpointer.copy_companions(directory, dtype)

        world.attempt(write_layers, first_alone=True)

    if quantized is None:
        return write, sum(parameter.nbytes for parameter in model.parameters())
    return write, quantized.store.nbytes([OUTSIDE, *layers.active])
