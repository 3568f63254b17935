"""The scores of a run's layers, read from a file or computed."""

from collections.abc import Iterator
from contextlib import contextmanager

from owlore_tune.config import plain
from owlore_tune.data.batches import Batch, batch_to_device
from owlore_tune.data.loader import TrainingData
from owlore_tune.distributed.world import ALONE, World
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.layers.scores import SCORES, Score, layer_scores
from owlore_tune.layers.scores_file import LayerScores
from owlore_tune.models.decoder import Decoder
from owlore_tune.run.build import build_inputs, build_model, check_model
from owlore_tune.run.settings import TrainingSettings


def score_of(settings: TrainingSettings) -> Score:
    """The score of the config, with its options."""
    return SCORES[settings.owlore.score].from_config(settings.owlore)


def known_scores(settings: TrainingSettings, fingerprint: str, num_layers: int) -> LayerScores | None:
    """The scores of ``owlore.scores_file``; None if it is not set.

    Args:
        fingerprint: of the model's weights.

    Raises:
        ConfigError: if the file cannot be read, or belongs to another model or score.
    """
    file = settings.owlore.scores_file
    if file is None:
        return None
    try:
        return LayerScores.load(file, num_layers=num_layers, fingerprint=fingerprint, score=score_of(settings))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def score_layers(
    settings: TrainingSettings, model: Decoder, data: TrainingData, fingerprint: str, world: World = ALONE
) -> LayerScores:
    """Score the layers of ``model``, using the first batches of the training data if the score needs data.

    Raises:
        RunError: if weights or activations are not finite.
    """
    with errors_of_scoring():
        values = layer_scores(model, score_of(settings), calibration_batches(settings, data), world)
    return with_origin(settings, values, fingerprint, world)


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


def with_origin(settings: TrainingSettings, values: list[float], fingerprint: str, world: World) -> LayerScores:
    """Scores of the config's model and data, with what they depend on."""
    owlore, cfg, score = settings.owlore, settings.cfg, score_of(settings)
    origin = {
        "dataset": plain(cfg.dataset),
        "batches": owlore.calibration_batches,
        "batch_size": cfg.batch_size * world.size,
        "seed": cfg.seed,
    }
    return LayerScores(values, score.name, fingerprint, score.options(), origin if score.needs_inputs else None)


def score_model(settings: TrainingSettings) -> LayerScores:
    """Load the config's model on one device and score its layers, without training."""
    inputs = build_inputs(settings)
    _, model = build_model(settings)
    check_model(inputs, model)
    inputs.checkpointer.load_checkpoint(model, dtype=settings.dtype, device=settings.device)
    return score_layers(settings, model, inputs.data, inputs.checkpointer.fingerprint())
