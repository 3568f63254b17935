"""The state of every global random generator, as plain tensors and numbers."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owlore_tune.checkpoints.steps import sealed_directory
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
            partial_dir = world.share(world.call(lambda: stack.enter_context(writing), on_rank_zero=True))
            assert partial_dir is not None
            write_weights(partial_dir)
            world.call(lambda: _write_state(state, partial_dir), on_rank_zero=True)
            world.call(stack.close, on_rank_zero=True)
    except (OSError, RankError, CheckpointError) as error:  # all of them raised on all processes, by `World.call`
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


class RngState:
    """The random generators of all processes of ``world``, as part of a run's state."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._marked: dict[str, Any] | None = None

    def mark(self) -> None:
        """Remember this state, for `rewind`."""
        self._marked = get_rng_state()

    def rewind(self) -> None:
        """Go back to the last `mark`, if there is one."""
        if self._marked is not None:
            set_rng_state(self._marked)

    def state_dict(self) -> dict[str, Any]:
        return {"by_rank": self._world.gather(get_rng_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        by_rank = state_dict["by_rank"]
        set_rng_state(by_rank[self._world.rank % len(by_rank)])
        self.mark()


def get_rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, on the CPU and CUDA; loadable with ``weights_only=True``."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states of `get_rng_state`. CUDA states are skipped if the number of devices has changed."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
