"""Two processes that run in turn, so that both meet the same changes of a shared machine's speed."""

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Turns:
    """The times in which a process ran, from `time.perf_counter`, which all processes of a machine share."""

    of_process: list[tuple[float, float]] = field(default_factory=list)
    of_other: list[tuple[float, float]] = field(default_factory=list)


def run_in_turn(process: subprocess.Popen[bytes], other: subprocess.Popen[bytes], seconds: float = 10) -> Turns:
    """Wait for ``process``, and let ``other`` run in turn with it. ``other`` is stopped before and afterwards.

    Turns are equally long, because a process is slow when its turn begins.
    """
    turns = Turns()
    while process.poll() is None:
        started = time.perf_counter()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGSTOP)
        turns.of_process.append((started, time.perf_counter()))
        if process.returncode is None:
            turns.of_other.append(run_for(seconds, other))
            process.send_signal(signal.SIGCONT)
    return turns


def run_for(seconds: float, process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Let a stopped process run for so many seconds, and return when it did."""
    process.send_signal(signal.SIGCONT)
    started = time.perf_counter()
    time.sleep(seconds)
    process.send_signal(signal.SIGSTOP)
    return started, time.perf_counter()


def step_times(ends: Sequence[float], turns: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds that each step took, without the time in which its process was stopped.

    Args:
        ends: when steps ended. The first one only begins the next step.
        turns: when the process ran.
    """
    return [
        sum(max(0.0, min(end, stopped) - max(start, started)) for started, stopped in turns)
        for start, end in pairwise(ends)
    ]
