"""The scores of a run's layers, read from a file or computed."""

from collections.abc import Iterator
from functools import partial

from torchtune import utils

from owlore_tune.config import plain
from owlore_tune.data.loader import Batch, TrainingData
from owlore_tune.distributed.world import ALONE, World
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.layers.scores import NEEDS_DATA, LayerScores, layer_scores
from owlore_tune.models.decoder import Decoder
from owlore_tune.run.build import build_inputs, build_model
from owlore_tune.run.settings import TrainingSettings


def read_scores(settings: TrainingSettings, fingerprint: str, num_layers: int) -> LayerScores | None:
    """The scores of ``owlore.scores_file``; None if it is not set.

    Args:
        fingerprint: fingerprint of the model's weights.

    Raises:
        ConfigError: if the file cannot be read, or belongs to another model or score.
    """
    owlore = settings.owlore
    if owlore.scores_file is None:
        return None
    try:
        return LayerScores.load(
            owlore.scores_file,
            num_layers=num_layers,
            fingerprint=fingerprint,
            score=owlore.score,
            threshold=owlore.outlier_threshold,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def score_layers(
    settings: TrainingSettings,
    model: Decoder,
    data: TrainingData,
    fingerprint: str,
    world: World = ALONE,
) -> LayerScores:
    """Score the layers of ``model``, using the first batches of the training data if the score needs data.

    Raises:
        RunError: if weights or activations are not finite.
    """
    owlore = settings.owlore

    batches = partial(calibration_batches, settings, data)
    try:
        scores = layer_scores(model, owlore.score, batches=batches, threshold=owlore.outlier_threshold, world=world)
    except ValueError as error:
        raise RunError(f"the layers cannot be scored: {error}") from error
    return scores_of(settings, scores, fingerprint, world)


def calibration_batches(settings: TrainingSettings, data: TrainingData) -> Iterator[Batch]:
    """The calibration batches of the config, on the device of the run."""
    for batch in data.calibration_batches(settings.owlore.calibration_batches):
        utils.batch_to_device(batch, settings.device)
        yield batch


def scores_of(settings: TrainingSettings, scores: list[float], fingerprint: str, world: World = ALONE) -> LayerScores:
    """``scores`` with their origin."""
    owlore, cfg = settings.owlore, settings.cfg
    origin = {
        "dataset": plain(cfg.dataset),
        "batches": owlore.calibration_batches,
        "batch_size": cfg.batch_size * world.size,
        "seed": cfg.seed,
    }
    needs_data = owlore.score in NEEDS_DATA
    return LayerScores(
        scores=scores,
        score=owlore.score,
        fingerprint=fingerprint,
        threshold=owlore.outlier_threshold if needs_data else None,
        data=origin if needs_data else None,
    )


def score_model(settings: TrainingSettings) -> LayerScores:
    """Load the config's model on one device and score its layers, without training."""
    inputs = build_inputs(settings)
    _, model = build_model(settings)
    inputs.checkpointer.check_model(model)
    inputs.checkpointer.load_checkpoint(model, dtype=settings.dtype, device=settings.device)
    return score_layers(settings, model, inputs.data, inputs.checkpointer.fingerprint())
