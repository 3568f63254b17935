"""A checkpoint of a run: weights in Hugging Face's layout, and the state for an exact resume."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owlore_tune.checkpoints.sealed import sealed_directory
from owlore_tune.checkpoints.sharded import load_sharded, save_sharded
from owlore_tune.distributed.world import ALONE, RankError, World, known_to_all
from owlore_tune.errors import CheckpointError
from owlore_tune.optim import low_bits

STATE_FILE = "recipe_state.pt"
SHARDED = "optimizer"  # directory of the optimizer's state, if several processes saved it


def save_checkpoint(
    directory: Path,
    run_id: str,
    write_weights: Callable[[Path], None],
    num_weight_bytes: int,
    state: dict[str, Any],
    world: World = ALONE,
) -> None:
    """Write a model's weights and ``state`` into ``directory``.

    The directory gets its name only when it is complete, checksummed and on disk. If the model is sharded, all
    processes call this together. Weights are gathered one by one and written by the first process. Each process writes
    its rows of the optimizer's state. An error on one process raises on all.

    Args:
        directory: must not exist.
        write_weights: writes them into the directory that it is given; all processes call it.
        num_weight_bytes: about how many bytes that takes.
        state: tensors, numbers, text, and lists and dicts of them. ``state["optimizer"]`` differs by process.

    Raises:
        CheckpointError: if ``directory`` exists or cannot be written, for example on a full disk.
    """
    num_bytes = num_weight_bytes + sum(world.gather(_tensor_bytes(state)))
    try:
        with ExitStack() as stack:
            writing = sealed_directory(directory, num_bytes, run_id)
            partial_dir = world.share(world.attempt(lambda: stack.enter_context(writing), first_alone=True))
            assert partial_dir is not None
            write_weights(partial_dir)
            if world.size > 1:
                sharded = world.attempt(lambda: save_sharded(state["optimizer"], partial_dir / SHARDED, world))
                state = {**state, "optimizer": sharded}
            world.attempt(lambda: _write_state(state, partial_dir), first_alone=True)
            world.attempt(stack.close, first_alone=True)
    except (OSError, RankError, CheckpointError) as error:  # all of them raised on all processes, by `World.attempt`
        raise known_to_all(CheckpointError(str(error))) from error


def load_state(directory: Path, world: World = ALONE) -> dict[str, Any]:
    """The ``state`` of `save_checkpoint`, with this process's optimizer state.

    Raises:
        CheckpointError: if the checkpoint has no state, or it cannot be read.
    """
    file = directory / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {STATE_FILE}, so a run cannot resume from it")
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of pickle, torch or the file's own content
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("optimizer"), dict) or "identity" not in state:
        raise CheckpointError(f"{file} is not the state of a run of this program")
    if "num_ranks" in state["optimizer"]:
        state["optimizer"] = load_sharded(state["optimizer"], directory / SHARDED, world)
    return state


def _write_state(state: dict[str, Any], directory: Path) -> None:
    try:
        torch.save(state, directory / STATE_FILE)
    except RuntimeError as error:  # torch raises it on a full disk
        raise OSError(str(error)) from error


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return low_bits.num_bytes(state)
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    return sum(map(_tensor_bytes, state)) if isinstance(state, list | tuple) else 0
