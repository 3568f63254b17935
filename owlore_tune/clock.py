"""The time of parts of a step."""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch


class Clock:
    """Measures the seconds of each part. On CUDA it uses events, because kernels run asynchronously."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[Hashable, float] = {}
        self._events: list[tuple[Hashable, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: Hashable) -> Iterator[None]:
        """Add the block's time to ``part``."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(part, time.perf_counter() - started)

    def read(self) -> dict[Hashable, float]:
        """Seconds by part since the last read. Parts that a GPU has not finished are left for the next read."""
        done = list(takewhile(lambda event: event[2].query(), self._events))
        for part, begin, end in done:
            self._add(part, begin.elapsed_time(end) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, self._events[len(done) :]
        return seconds

    def _add(self, part: Hashable, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
