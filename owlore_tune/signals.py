"""A stop that waits for the step to end."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST = 2.0  # seconds


class StopRequest:
    """Within its block, the first SIGTERM or SIGINT only sets ``signal``; a later one ends the process at once.

    One within `ONE_REQUEST` of the first is the same request: a scheduler signals torchrun and its processes alike, and
    torchrun passes its own signal on to them.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_at = 0.0

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._received_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received_at > ONE_REQUEST:
            os._exit(128 + number)
