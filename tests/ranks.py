"""Several processes on this machine that train together."""

import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import distributed_programs
from forks import Command, fork

from runs import variant, weights, write

SECONDS = 400


class Ranks(NamedTuple):
    """Processes that have ended."""

    codes: list[int]  # by rank
    output: str  # all processes, by rank


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def run_ranks(num_ranks: int, program: str, *arguments: object) -> Ranks:
    """Run a program of distributed_programs.py on several ranks. Kill those that go on 20 seconds after one failed."""
    places = places_of(num_ranks)
    with tempfile.TemporaryDirectory() as logs:
        files = [Path(logs) / str(rank) for rank in range(num_ranks)]
        ranks = [
            fork(getattr(distributed_programs, program), *map(str, arguments), output=file, environment=place)
            for place, file in zip(places, files, strict=True)
        ]
        end = time.monotonic() + SECONDS
        while any(process.is_alive() for process in ranks) and time.monotonic() < end:
            if any(process.exitcode for process in ranks):
                end = min(end, time.monotonic() + 20)
            time.sleep(0.02)
        for process in ranks:
            process.kill()
            process.join()
        return Ranks([process.exitcode for process in ranks], "\n".join(file.read_text() for file in files))


def places_of(num_ranks: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun sets it."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def torchrun(config: dict, *options: str) -> Command:
    """Start torchrun, which trains ``config`` on the ranks that ``options`` describe."""
    return Command("torchrun", *options, "-m", "owlore_full_finetune", "--config", str(write(config)))


def train_together(num_ranks: int, *configs: dict) -> None:
    """Train each of ``configs`` on ``num_ranks`` ranks, one after the other."""
    codes, output = run_ranks(num_ranks, "train", *map(write, configs))
    assert not any(codes), output[-3000:]


def furthest(one: dict, other: dict) -> float:
    """Return the largest difference between the final weights of two runs."""
    theirs = weights(other)
    return max((weight - theirs[name]).abs().max().item() for name, weight in weights(one).items())


def on_ranks(num_ranks: int, config: dict, name: str, **changes) -> dict:
    return variant(config, name, **{"batch_size": 6 // num_ranks, "batch_size_val": 2, **changes})
