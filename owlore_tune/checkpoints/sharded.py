"""Optimizer state of sharded weights: each process writes its rows, and any number of processes can read them.

There is one safetensors file per rank, because reading it executes no code. A tensor is named ``index.key.part``: the
parameter's index in the optimizer, the state's key, and a part, because 8-bit state has several tensors.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from owlore_tune.distributed.world import World
from owlore_tune.errors import CheckpointError
from owlore_tune.optim import low_bits

EVERYWHERE = ("basis",)  # the same on all processes, so only the first one writes it


def save_sharded(state_dict: dict[str, Any], directory: Path, world: World) -> dict[str, Any]:
    """Write the tensors of this process's ``state_dict``; every process of ``world`` calls it.

    Returns:
        The rest of the state, an argument of `load_sharded`.

    Raises:
        OSError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for index, state in state_dict["state"].items():
        rest[index] = {}
        for key, value in state.items():
            if not torch.is_tensor(value):
                rest[index][key] = value
            elif world.rank == 0 or key not in EVERYWHERE:
                for part, tensor in low_bits.named_parts(value).items():
                    tensors[f"{index}.{key}.{part}"] = tensor.contiguous().cpu().clone()  # quantile maps are shared
    directory.mkdir(exist_ok=True)
    try:
        save_file(tensors, _file(directory, world.rank))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return {"param_groups": state_dict["param_groups"], "state": rest, "num_ranks": world.size}


def load_sharded(rest: dict[str, Any], directory: Path, world: World) -> dict[str, Any]:
    """The ``state_dict`` of this process. It only reads files and is not a collective.

    With an unchanged world size, each rank reads back its own tensors. Otherwise moments have all rows, in float32, and
    `owlore_tune.optim.OwLoreAdamW.load_state_dict` selects those of the process.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    num_ranks = rest["num_ranks"]
    ranks = [world.rank] if num_ranks == world.size else range(num_ranks)
    saved = [_read(directory, rank) for rank in ranks]
    first = saved[0] if 0 in ranks else _read(directory, 0)

    projected = {index for index, key in first if key == "basis"}  # on the right, as all sharded weights are
    state: dict[int, dict[str, Any]] = {index: dict(values) for index, values in rest["state"].items()}
    for index, key in first:
        if key in EVERYWHERE:
            state[index][key] = first[index, key]
        elif len(saved) == 1:
            state[index][key] = saved[0][index, key]
        else:
            pieces = [tensors[index, key] for tensors in saved]
            rows = [low_bits.restore(piece, torch.float32, by_column=index in projected) for piece in pieces]
            state[index][key] = torch.cat(rows)
    return {"param_groups": rest["param_groups"], "state": state}


def _file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank}.safetensors"


def _read(directory: Path, rank: int) -> dict[tuple[int, str], Tensor]:
    """The state of one rank by (index, key)."""
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    try:
        for name, tensor in load_file(_file(directory, rank)).items():
            index, key, part = name.split(".")
            parts.setdefault((int(index), key), {})[part] = tensor
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{_file(directory, rank)} cannot be read: {error}") from error
    return {
        (index, key): low_bits.from_named_parts(found, signed=key != "exp_avg_sq")
        for (index, key), found in parts.items()
    }
