"""The state of every global random generator, as plain tensors and numbers."""

import random
from typing import Any

import numpy as np
import torch

from owlore_tune.distributed.world import World


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
