"""Kill runs at random moments, half of them during a save, and resume them until they finish."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

from lib.fault_runs import Found, config_for, train_here, weights

MOST_KILLS = 4  # of a run


def kill_at_random(
    scratch: Path, *, runs: int, signal_name: str = "SIGKILL", model: str = "small", format: str = "full"
) -> Found:
    number, rng, found = signal.Signals[signal_name], random.Random(0), Found()
    config = config_for(model, scratch, format)
    started = time.monotonic()
    assert exit_code(start(config, scratch / "unbroken")) == 0
    seconds = time.monotonic() - started
    expected = weights(scratch / "unbroken")
    for run in range(runs):
        output_dir = scratch / f"run_{run}"
        for kills in range(MOST_KILLS + 1):
            child = start(config, output_dir)
            moment = kill_somewhere(child, output_dir, seconds, number, rng) if kills < MOST_KILLS else "not"
            code = exit_code(child)
            if code == 0:
                break
            assert code in (-number, 128 + number), f"a run failed with {code}"
            found.kills += 1
            # SIGKILL leaves the directory of an interrupted save; SIGTERM lets the save finish.
            partial = any(output_dir.glob("step_*.partial"))
            found.in_a_save += partial or (number != signal.SIGKILL and moment == "in a save")
            found.check_newest(output_dir)
        found.check_weights(output_dir, expected)
        print(found, flush=True)
        shutil.rmtree(output_dir)
    return found


def start(config: dict, output_dir: Path) -> int:
    """Fork a child that trains, and return its process id."""
    child = os.fork()
    if not child:
        train_here(config, output_dir)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_somewhere(child: int, output_dir: Path, seconds: float, number: int, rng: random.Random) -> str:
    """Kill at a random moment, or at a random moment during a save. Returns which of the two."""
    started = time.monotonic()
    if rng.random() < 0.5:
        moment, wait = "any", rng.uniform(0, seconds)
        while time.monotonic() - started < wait and not exited(child):
            time.sleep(0.002)
    else:
        moment, skip = "in a save", rng.randrange(3)
        seen: set[float] = set()
        while not exited(child):
            for partial in output_dir.glob("step_*.partial"):
                try:
                    seen.add(partial.stat().st_ino)
                except FileNotFoundError:
                    continue
            if len(seen) > skip:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.0005)
    if not exited(child):
        os.kill(child, number)
    return moment


def exited(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
