"""Find the checkpoint to resume from, and check that a resumed run continues the same computation."""

import copy
import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchtune.utils import get_logger

from owlore_tune.checkpoints.steps import step_of
from owlore_tune.config.components import changed_fields
from owlore_tune.config.schema import plain
from owlore_tune.data.checks import dataset_digest
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.distributed.world import World
from owlore_tune.errors import CheckpointError, ConfigError, DivergedError, RunError, is_out_of_memory, message_of
from owlore_tune.files import files_digest
from owlore_tune.measure import versions
from owlore_tune.training.components import Inputs, build_inputs
from owlore_tune.training.config import FIXED, FREE_PATHS, TrainingSettings, tokenizer_files
from owlore_tune.training.output_dir import RunDirectory
from owlore_tune.training.report import OUTPUT_FILES

BASE_WEIGHTS = "base weights (checkpointer.checkpoint_dir)"  # name of their digest, for messages too
HOW_TO_RESUME = "resume with the same command and resume_from_checkpoint=true"

log = get_logger("INFO")


def find_checkpoint(run: RunDirectory, wanted: bool | str, world: World) -> Path | None:
    """Claim the run's directory, and return the verified checkpoint to resume from; None to start from the beginning.

    The first process of ``world`` does this, and shares the result and the run's id.

    Args:
        wanted: the config's ``resume_from_checkpoint``.

    Raises:
        ConfigError: if the directory is in use, belongs to another run or has files that this run would write, or if
            there is no good checkpoint to resume from.
    """
    found = world.share(world.call(lambda: _claim(run, wanted), on_rank_zero=True))
    run.run_id = world.share(run.run_id)
    return found


def _claim(run: RunDirectory, wanted: bool | str) -> Path | None:
    run.claim()
    if not wanted and run.is_known:
        raise ConfigError(
            f"output_dir={run.path} holds run {run.run_id[:8]}; choose another directory, or resume that run with "
            "resume_from_checkpoint=true"
        )
    found = None
    try:
        if isinstance(wanted, str):
            found = Path(wanted).absolute()
            run.resume_from(found)
        elif wanted:
            found = run.steps.newest()
            if found is None and run.parent is not None:
                raise CheckpointError(
                    f"{run.path} has no checkpoint of its own yet; its run began with a checkpoint of run "
                    f"{run.parent[:8]}: give resume_from_checkpoint=PATH again"
                )
    except CheckpointError as error:
        raise ConfigError(f"resume_from_checkpoint={wanted}: {error}") from error
    run.check_free(OUTPUT_FILES)
    if wanted and found is None:
        log.info(f"No checkpoint in {run.path} yet; starting from the beginning.")
    return found


def identity(settings: TrainingSettings, inputs: Inputs, world: World) -> dict[str, Any]:
    """Facts about a run, saved in every checkpoint and compared on resume."""
    digests = world.share(world.call(lambda: _input_digests(settings, inputs), on_rank_zero=True))
    assert digests is not None
    _check_same_data(inputs, digests["dataset"], world)
    return {
        "config": plain(settings.cfg),
        "resolved": _resolved_digest(settings),
        "rows_per_step": inputs.data.rows_per_step,
        "digests": digests,
        "now": getattr(inputs.tokenizer, "now", datetime.now()).isoformat(),
        "versions": versions(),
    }


def _input_digests(settings: TrainingSettings, inputs: Inputs) -> dict[str, str]:
    """Digests of data, tokenizer, chat template and base weights, by name."""
    config = json.dumps(inputs.checkpointer.config, sort_keys=True)
    digests = {
        "dataset": dataset_digest(inputs.data.dataset),
        "config.json": hashlib.sha256(config.encode()).hexdigest()[:16],
        BASE_WEIGHTS: inputs.checkpointer.fingerprint(),
    }
    if isinstance(inputs.tokenizer, HFChatTokenizer):
        return digests | inputs.tokenizer.digests()
    files = tokenizer_files(settings.cfg)
    return digests | ({"tokenizer": files_digest(files)} if files else {})


def _check_same_data(inputs: Inputs, of_first: str, world: World) -> None:
    """Raise ConfigError if processes read different rows, such as those of older files on another machine.

    Args:
        of_first: the digest of rank 0's dataset.
    """
    if world.size == 1:
        return

    def digests() -> dict[str, str]:
        found = {"dataset": of_first if world.rank == 0 else dataset_digest(inputs.data.dataset)}
        return found | ({} if inputs.held_out is None else {"dataset_val": dataset_digest(inputs.held_out.dataset)})

    found = world.call(digests)
    assert found is not None
    for rank, other in enumerate(world.gather(found)):
        for name in (name for name in found if other[name] != found[name]):
            raise ConfigError(f"{name} has other rows on rank {rank}; give all machines the same files")


def matching_inputs(
    settings: TrainingSettings, saved: dict[str, Any] | None, checkpoint: Path | None, world: World
) -> tuple[Inputs, dict[str, Any]]:
    """The inputs of a run and its `identity`, which must be that of the state ``saved`` in ``checkpoint``, if any.

    Raises:
        ConfigError: if an input cannot be used, or if a setting or an input differs from the checkpoint's.
    """
    now = None
    if saved is not None:
        _check_settings(saved["identity"], settings, checkpoint)
        now = datetime.fromisoformat(saved["identity"]["now"])
    inputs = build_inputs(settings, world, now)
    found = identity(settings, inputs, world)
    if saved is not None:
        _check_inputs(saved["identity"], found, checkpoint)
    return inputs, found


def _check_settings(saved: dict[str, Any], settings: TrainingSettings, checkpoint: Path | None) -> None:
    """Raise ConfigError if a field that affects the result differs from the checkpoint's `identity`."""
    old, new = _fixed_fields(saved["config"]), _fixed_fields(plain(settings.cfg))
    _refuse(changed_fields(old, new), checkpoint)
    if saved["resolved"] != _resolved_digest(settings):  # values may be secret
        names = ", ".join(_interpolated(new))
        _refuse([f"the value of {names}, which comes from elsewhere, such as the environment, changed"], checkpoint)
    if changes := changed_fields(saved["versions"], versions()):
        log.warning(f"Versions changed, so the resumed run may not be bit-identical: {'; '.join(changes)}")


def _fixed_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that a resumed run must share, without paths whose content is compared instead."""
    fixed: dict[str, Any] = copy.deepcopy({key: config.get(key) for key in FIXED})
    for block, field in FREE_PATHS:
        for node in fixed[block] if isinstance(fixed[block], list) else [fixed[block]]:
            node.pop(field, None)
    return fixed


def _resolved_digest(settings: TrainingSettings) -> str:
    """A digest of the values that a resumed run must share, with environment variables filled in."""
    resolved = _fixed_fields(OmegaConf.to_container(settings.cfg, resolve=True))  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:16]


def _interpolated(node: Any, path: str = "") -> list[str]:
    """The fields of a config whose values are filled in from elsewhere."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [found for key, value in items for found in _interpolated(value, f"{path}.{key}" if path else str(key))]
    return [path] if isinstance(node, str) and "${" in node else []


def _check_inputs(saved: dict[str, Any], found: dict[str, Any], checkpoint: Path | None) -> None:
    """Raise ConfigError if data, tokenizer, weights or rows per step differ between two results of `identity`."""
    old, new = ({"rows per step": facts["rows_per_step"]} for facts in (saved, found))
    _refuse(changed_fields(old, new), checkpoint)
    old, new = saved["digests"], found["digests"]
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        raise ConfigError(
            f"{' and '.join(changed)} changed since {checkpoint} was saved, so the run cannot continue exactly; "
            f"restore them, or {_new_run(checkpoint)}"
        )


def _refuse(changes: list[str], checkpoint: Path | None) -> None:
    if changes:
        raise ConfigError(
            f"the config differs from that of {checkpoint}: {'; '.join(changes)}; set them back, or "
            f"{_new_run(checkpoint)}"
        )


def _new_run(checkpoint: Path | None) -> str:
    return (
        f"start a new run from its weights: checkpointer.checkpoint_dir={checkpoint}, another output_dir, "
        "resume_from_checkpoint=false"
    )


def raise_with_advice(error: Exception, run: RunDirectory) -> None:
    """Say where the newest checkpoint is after an error in training. Nothing is saved.

    Raises:
        RunError: for an error that a user can solve, with its message. Another one is a bug, whose traceback shows.
    """
    own = run.steps.own()
    if isinstance(error, DivergedError):
        names = ", ".join(directory.name for directory in own) or "none"
        advice = f"Checkpoints in {run.path}: {names}; a new run can start from the weights of an earlier one"
    elif newest := max(own, key=step_of, default=None):
        # A row of the data that cannot be used would end a resumed run too, and cannot change in it.
        how = _new_run(newest) if isinstance(error, ValueError) else HOW_TO_RESUME
        advice = f"The newest checkpoint is {newest}: {how}"
    else:
        advice = "No checkpoint was saved."
    if isinstance(error, ValueError | OSError | RunError | CheckpointError) or is_out_of_memory(error):
        raise RunError(f"{message_of(error)}. {advice}") from error
    print(advice, file=sys.stderr)
