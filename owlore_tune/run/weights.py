"""The weights of a run: how they are loaded, scored on the way, kept on the device, and written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from owlore_tune.checkpoints.checkpointer import weight_files
from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.distributed.world import World
from owlore_tune.layers.grouped import group_experts
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.scores import Score, score_each
from owlore_tune.layers.scores_file import LayerScores
from owlore_tune.models.decoder import Decoder, find_layers, init_rope
from owlore_tune.quantized.background import BackgroundStore
from owlore_tune.quantized.layers import QuantizedLayers
from owlore_tune.quantized.store import OUTSIDE, LayerStore
from owlore_tune.run.build import Inputs
from owlore_tune.run.directory import RunDirectory
from owlore_tune.run.report import Report
from owlore_tune.run.scoring import (
    calibration_batches,
    errors_of_scoring,
    known_scores,
    score_layers,
    score_of,
    with_origin,
)
from owlore_tune.run.settings import TrainingSettings
from owlore_tune.run.stream import loaded_layers

HOST = torch.device("cpu")
STORE = "weights"  # directory of the full-precision layers


@dataclass(frozen=True)
class Loading:
    """The model to fill, and the places of its weights."""

    settings: TrainingSettings
    inputs: Inputs
    model: Decoder  # on the meta device
    run: RunDirectory
    checkpoint: Path | None  # to resume from; None for the model directory
    sharding: Sharding | None  # of FSDP2
    world: World


def load_and_score(
    loading: Loading, report: Report, known: LayerScores | None, fingerprint: str
) -> tuple[QuantizedLayers | None, LayerScores]:
    """Fill the model, and score its layers.

    Args:
        report: gets the times.
        known: existing scores; layers are not scored again. If there are none, those of ``owlore.scores_file`` are.
        fingerprint: of the weights that the run starts from.

    Returns:
        The quantized layers, None if the weights are in full precision; and the scores.

    Raises:
        ConfigError: if the weights do not fit the model, or the file of scores is of another model or score.
        RunError: if weights or activations are not finite.
    """
    settings, inputs, model = loading.settings, loading.inputs, loading.model
    known = known or known_scores(settings, fingerprint, len(find_layers(model)))
    if settings.owlore.weights != "full":
        with report.timed("load"):
            quantized = _open_store(loading)
            values = _load_and_quantize(loading, quantized, None if known else score_of(settings))
            group_experts(model, settings.device)
        return quantized, known or with_origin(settings, values, fingerprint, loading.world)
    with report.timed("load"):
        inputs.checkpointer.load_checkpoint(
            model,
            dtype=settings.dtype,
            device=settings.device,
            weights_device=HOST if loading.sharding and loading.sharding.cpu_offload else settings.device,
            directory=loading.checkpoint,
        )
    with report.timed("score"):
        scores = known or score_layers(settings, model, inputs.data, fingerprint, loading.world)
    group_experts(model, settings.device, sharded=loading.sharding is not None)
    return None, scores


def _open_store(loading: Loading) -> QuantizedLayers:
    """The quantized layers of the run, with a store of full-precision weights, and without weights in the model."""
    settings, checkpointer, world = loading.settings, loading.inputs.checkpointer, loading.world
    files = checkpointer.files if loading.checkpoint is None else weight_files(loading.checkpoint)
    kind = BackgroundStore if settings.device.type == "cuda" else LayerStore
    store = kind(checkpointer, files, loading.run.path / STORE / loading.run.run_id, settings.dtype)
    world.attempt(store.remove_leftovers, first_alone=True)
    if loading.checkpoint is not None:
        world.attempt(store.adopt, first_alone=True)
        store.files = world.share(store.files)
    return QuantizedLayers(loading.model, store, settings.owlore.weights, settings.owlore.products, world)


def _load_and_quantize(loading: Loading, quantized: QuantizedLayers, score: Score | None) -> list[float]:
    """Load, score and quantize the layers one by one, so that one of them at a time is in full precision.

    Returns the scores; none without ``score``.
    """
    settings, model, owlore = loading.settings, loading.model, loading.settings.owlore
    quantized.load(OUTSIDE, settings.device)
    with torch.device(settings.device):
        init_rope(model)
    quantized.quantize_outside(embeddings=False, output=not owlore.train_output)  # scores do not need the head
    needs_inputs = score is not None and score.needs_inputs
    layers = loaded_layers(
        model,
        quantized,
        settings.device,
        list(calibration_batches(settings, loading.inputs.data)) if needs_inputs else [],
        quantize_embeddings=not owlore.train_embeddings,
        world=loading.world,
    )
    if score is None:
        for _ in layers:
            pass
        return []
    with errors_of_scoring():
        return score_each(score, layers, len(find_layers(model)))


def weight_writer(
    inputs: Inputs,
    model: Decoder,
    layers: ProjectedLayers,
    quantized: QuantizedLayers | None,
    world: World,
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
