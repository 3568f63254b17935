"""The time of a step's phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Measures the seconds of a step's phases. On CUDA it uses events, because kernels run asynchronously."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the block's time to ``phase``."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(phase, time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last read. Synchronize the device first."""
        for phase, begin, end in self._events:
            self._add(phase, begin.elapsed_time(end) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
