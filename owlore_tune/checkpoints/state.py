"""A checkpoint of a run: weights in Hugging Face's layout, and the state for an exact resume."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owlore_tune.checkpoints.sealed import sealed_directory
from owlore_tune.distributed.world import ALONE, RankError, World, known_to_all
from owlore_tune.errors import CheckpointError
from owlore_tune.optim.moments import num_bytes

STATE_FILE = "recipe_state.pt"
ENTRY = 512  # bytes that a tensor takes in the file besides its values
OTHER_FILES = 2**16  # about the bytes of config, tokenizer and seal on a disk


def save_checkpoint(
    directory: Path,
    run_id: str,
    write_weights: Callable[[Path], None],
    num_weight_bytes: int,
    state: dict[str, Any],
    world: World = ALONE,
) -> None:
    """Write a model's weights and ``state`` into ``directory``.

    The directory gets its name only when it is complete, checksummed and on disk. All processes call this together, and
    the first one writes ``state``. An error on one process raises on all.

    Args:
        directory: must not exist.
        write_weights: writes them into the directory that it is given; all processes call it.
        num_weight_bytes: about how many bytes that takes.
        state: tensors, numbers, text, and lists and dicts of them.

    Raises:
        CheckpointError: if ``directory`` exists or cannot be written, for example on a full disk.
    """
    total = num_weight_bytes + _tensor_bytes(state) + OTHER_FILES
    try:
        with ExitStack() as stack:
            writing = sealed_directory(directory, total, run_id)
            partial_dir = world.share(world.attempt(lambda: stack.enter_context(writing), first_alone=True))
            assert partial_dir is not None
            write_weights(partial_dir)
            world.attempt(lambda: _write_state(state, partial_dir), first_alone=True)
            world.attempt(stack.close, first_alone=True)
    except (OSError, RankError, CheckpointError) as error:  # all of them raised on all processes, by `World.attempt`
        raise known_to_all(CheckpointError(str(error))) from error


def load_state(directory: Path) -> dict[str, Any]:
    """The ``state`` of `save_checkpoint`.

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
    return state


def _write_state(state: dict[str, Any], directory: Path) -> None:
    try:
        torch.save(state, directory / STATE_FILE)
    except RuntimeError as error:  # torch raises it on a full disk
        raise OSError(str(error)) from error


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return num_bytes(state) + ENTRY
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    return sum(map(_tensor_bytes, state)) if isinstance(state, list | tuple) else 0
