"""Kill one rank of a run at random moments, half of them during a save, and resume it until it finishes.

Ranks run without torchrun, so no agent stops the other ranks. They must exit with an error within dist_timeout_s.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from lib.fault_runs import Found, config_for, weights
from omegaconf import OmegaConf

from owlore_tune.training.output_dir import RunDirectory

TIMEOUT = 30  # dist_timeout_s, in seconds


def kill_one_rank(scratch: Path, *, runs: int, num_ranks: int = 2) -> Found:
    rng, found = random.Random(0), Found()
    config = config_for("small", scratch) | {"dist_timeout_s": TIMEOUT, "keep_last_n": 3}

    def written(output_dir: Path) -> Path:
        file = output_dir.with_suffix(".yaml")
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(config | {"output_dir": str(output_dir)})))
        return file

    assert all(rank.wait() == 0 for rank in start(written(scratch / "unbroken"), num_ranks))
    steps = [json.loads(line) for line in (scratch / "unbroken" / "steps.jsonl").read_text().splitlines()]
    seconds = sum(step["step_seconds"] for step in steps)
    expected = weights(scratch / "unbroken")
    for run in range(runs):
        output_dir = scratch / f"run_{run}"
        for _ in range(2):
            ranks = start(written(output_dir), num_ranks)
            found.in_a_save += kill_somewhere(ranks, output_dir, seconds / 2, rng)
            found.kills += 1
            for rank in ranks:
                code = rank.wait(TIMEOUT + 10)
                # After the last save, only the first rank still has work: it draws the plots.
                assert code != 0 or json.loads((output_dir / "manifest.json").read_text())["finished"]
            found.check_newest(output_dir)
        assert all(rank.wait() == 0 for rank in start(written(output_dir), num_ranks))
        found.check_weights(output_dir, expected)
        print(found, flush=True)
    return found


def start(config: Path, num_ranks: int) -> list[subprocess.Popen]:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    ranks = []
    for rank in range(num_ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_PORT": port}
        environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "owlore_full_finetune", "--config", str(config)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return ranks


def kill_somewhere(ranks: list[subprocess.Popen], output_dir: Path, seconds: float, rng: random.Random) -> bool:
    """Kill a rank after the next checkpoint, at a random moment or during a save. Returns whether during a save."""
    before = set(RunDirectory.existing(output_dir).steps.own())
    while set(RunDirectory.existing(output_dir).steps.own()) == before and all(rank.poll() is None for rank in ranks):
        time.sleep(0.002)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, seconds))
    else:
        while not any(output_dir.glob("step_*.partial")) and all(rank.poll() is None for rank in ranks):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    victim = rng.choice(ranks)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    return any(output_dir.glob("step_*.partial"))
