"""Ranks that are killed, hang or get signals: the others end, and the run goes on."""

import ctypes
import json
import os
import random
import re
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import Command
from ranks import free_port, furthest, on_ranks, places_of, torchrun, train_together
from torch.distributed import HashStore

from owlore_tune.distributed.launch import let_gloo_finish
from owlore_tune.training.output_dir import RunDirectory
from runs import start

TWO_RANKS = ("--standalone", "--nproc_per_node=2")  # options for torchrun


def start_ranks(*configs: dict) -> list[Command]:
    """Start one rank per config without torchrun, so no agent stops the other ranks."""
    places = places_of(len(configs))
    return [start(config, environment=place) for config, place in zip(configs, places, strict=True)]


def ranks_of(agent: Command) -> list[int]:
    """Return the process ids of torchrun's ranks."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def wait_for(path: Path, pattern: str, seconds: float = 120) -> None:
    started = time.monotonic()
    while not any(path.glob(pattern)):
        assert time.monotonic() - started < seconds, f"no {pattern} in {path}"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed between saves", "killed in a save", "hung"])
def test_when_a_rank_is_lost_the_others_end_and_the_run_goes_on(how, config):
    """Rank 1 dies or hangs. Rank 0 reports it before the timeout, and the newest checkpoint is readable."""
    config = on_ranks(2, config, "lost", save_every_n_steps=2, dist_timeout_s=15, epochs=12)
    output_dir = Path(config["output_dir"])
    ranks = start_ranks(config, config)
    wait_for(output_dir, "step_4")
    if how == "killed in a save":
        wait_for(output_dir, "step_*.partial")
    ranks[1].send_signal(signal.SIGSTOP if how == "hung" else signal.SIGKILL)
    stopped = time.monotonic()
    _, errors = ranks[0].communicate(timeout=60)
    assert time.monotonic() - stopped < 15 + 10
    assert ranks[0].returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and "resume_from_checkpoint=true" in last, errors[-2000:]
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate()
    newest = RunDirectory.existing(output_dir).steps.newest()
    assert newest is not None
    train_together(2, config | {"resume_from_checkpoint": True})
    assert json.loads((output_dir / "manifest.json").read_text())["finished"]


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(config):
    """A rank kills itself once. `--max-restarts` restarts both ranks, and the final weights are unchanged."""
    unbroken = on_ranks(2, config, "unbroken")
    train_together(2, unbroken)
    restarted = on_ranks(2, config, "restarted", save_every_n_steps=1, resume_from_checkpoint=True)
    agent = torchrun(restarted, *TWO_RANKS, "--max-restarts=2")
    wait_for(Path(restarted["output_dir"]), "step_[3-9]")
    os.kill(random.choice(ranks_of(agent)), signal.SIGKILL)
    _, errors = agent.communicate(timeout=120)
    assert agent.returncode == 0, errors[-3000:]
    assert re.search(r"Resumed from .*step_\d", errors)
    assert furthest(unbroken, restarted) == 0


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_and_stops_all(config):
    config = on_ranks(2, config, "stopped", epochs=40, save_every_n_steps=3)
    ranks = start_ranks(config, config)
    wait_for(Path(config["output_dir"]), "step_3")
    ranks[1].send_signal(signal.SIGTERM)
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 128 + signal.SIGTERM, errors[-2000:]
    saved = RunDirectory.existing(Path(config["output_dir"])).steps.newest()
    assert saved is not None and f"SIGTERM: stopped after step {saved.name[5:]}, saved in {saved}" in errors


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one(config):
    """Two torchruns with one rank each, like two machines with a shared disk."""
    together, apart = (on_ranks(2, config, name) for name in ("together", "apart"))
    train_together(2, together)
    port = free_port()
    nodes = [
        torchrun(apart, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}", f"--master_port={port}")
        for rank in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors[-3000:]
    assert furthest(together, apart) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_and_its_ranks_alike_is_one_request(number, config):
    """Like a scheduler's signal: torchrun forwards it, so each rank gets it twice."""
    config = on_ranks(2, config, "stopped", epochs=400, save_every_n_steps=3)
    agent = torchrun(config, *TWO_RANKS)
    wait_for(Path(config["output_dir"]), "step_3")
    for pid in (*ranks_of(agent), agent.pid):
        os.kill(pid, number)
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode != 0
    saved = RunDirectory.existing(Path(config["output_dir"])).steps.newest()
    assert saved is not None and f"{number.name}: stopped after step {saved.name[5:]}, saved in {saved}" in errors


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_with_its_message(config, small_disk):
    config["output_dir"] = str(small_disk / "run")
    agent = torchrun(on_ranks(2, config, "full", save_every_n_steps=1, dataset_val=None), *TWO_RANKS)
    _, errors = agent.communicate(timeout=100)
    assert agent.returncode == 1
    assert re.search(r"error: cannot save .*step_\d+, which needs .* bytes", errors), errors[-2000:]
    assert "another process" not in errors


@pytest.mark.slow
def test_ranks_with_output_directories_of_their_own_are_refused(config):
    """Without a shared disk, a checkpoint would lack the files of the other ranks."""
    ranks = start_ranks(on_ranks(2, config, "here"), on_ranks(2, config, "there"))
    errors = [rank.communicate(timeout=60)[1].strip().splitlines()[-1] for rank in ranks]
    assert re.match(r"error: output_dir=.*_there is not the same directory as on rank 0; choose one on a", errors[1])
    assert re.match(r"error: rank 1 failed: ConfigError: output_dir=.*_there is not", errors[0])
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert not any(Path(f"{config['output_dir']}").glob("**/.shared*"))


def test_gloo_has_freed_its_tensors_before_python_shuts_down():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD  # as DTensor's caches do
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(10)  # seconds for which gloo's thread waits for the GIL, unless this thread releases it
        for _ in range(100):  # until the thread does not free a tensor before this one lets go of it
            tensor = torch.ones(1000)
            freed = weakref.ref(tensor)
            group.allreduce([tensor])
            del tensor
            ctypes.PyDLL(None).usleep(20_000)  # in which the thread is done, but for the GIL
            if freed() is not None:
                break
        assert freed() is not None
        let_gloo_finish()
        assert freed() is None
    finally:
        sys.setswitchinterval(interval)
        dist.destroy_process_group()
