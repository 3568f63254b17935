"""Optimizer state of sharded weights: each process writes its rows, and any number of processes read them.

Through torch.distributed.checkpoint. Every tensor has a name of its own, by weight, kind, rank and part (8-bit state
has several): a process finds what it wrote bit for bit, and another number of them finds all rows to divide anew.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from owlore_tune import low_bits
from owlore_tune.world import World

EVERYWHERE = ("basis",)  # the same on all processes, so the first one writes it


def save_sharded(state_dict: dict[str, Any], directory: Path, world: World) -> dict[str, Any]:
    """Write the tensors of an optimizer's ``state_dict``; on all processes together.

    Returns:
        What is not tensors, from which `load_sharded` makes the state again.

    Raises:
        OSError: if a process cannot write.
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
                    tensors[_name(index, key, world.rank, part)] = tensor
    try:
        dcp.save(tensors, checkpoint_id=directory, process_group=world.group)
    except CheckpointException as error:
        reasons = {str(failure[0] if isinstance(failure, tuple) else failure) for failure in error.failures.values()}
        raise OSError("; ".join(sorted(reasons))) from error
    return {"param_groups": state_dict["param_groups"], "state": rest, "num_ranks": world.size}


def load_sharded(rest: dict[str, Any], directory: Path, world: World) -> dict[str, Any]:
    """The ``state_dict`` of this process; reads files alone, so processes need not call it together.

    Where as many processes saved it, it is what this one wrote. Else moments have all rows, in float32, and
    `owlore_tune.optim.OwLoreAdamW.load_state_dict` takes those of the process.
    """
    known: dict[str, Any] = FileSystemReader(directory).read_metadata().state_dict_metadata
    parts: dict[tuple[str, str, int], dict[str, str]] = {}  # (index, key, rank) → part → name
    for name in known:
        index, key, rank, part = name.split(".")
        parts.setdefault((index, key, int(rank)), {})[part] = name

    same_number = rest["num_ranks"] == world.size
    wanted = (
        name
        for (_, key, rank), names in parts.items()
        if not same_number or rank == world.rank or key in EVERYWHERE
        for name in names.values()
    )
    tensors = {name: torch.empty(known[name].size, dtype=known[name].properties.dtype) for name in wanted}
    dcp.load(tensors, checkpoint_id=directory, no_dist=True)  # at once: each call reads what is known of all

    def take(index: str, key: str, rank: int) -> Tensor:
        found = {part: tensors.pop(name) for part, name in parts[index, key, rank].items()}
        return low_bits.from_named_parts(found, signed=key != "exp_avg_sq")

    projected = {index for index, key, _ in parts if key == "basis"}  # on the right, as all sharded weights are
    state: dict[int, dict[str, Any]] = {index: dict(values) for index, values in rest["state"].items()}
    for index, key in sorted({(index, key) for index, key, _ in parts}):
        if key in EVERYWHERE:
            state[int(index)][key] = take(index, key, 0)
        elif same_number:
            state[int(index)][key] = take(index, key, world.rank)
        else:
            pieces = [take(index, key, rank) for rank in range(rest["num_ranks"])]
            rows = [low_bits.restore(piece, torch.float32, by_column=index in projected) for piece in pieces]
            state[int(index)][key] = torch.cat(rows)
    return {"param_groups": rest["param_groups"], "state": state}


def _name(index: int, key: str, rank: int, part: str) -> str:
    return f"{index}.{key}.{rank}.{part}"
