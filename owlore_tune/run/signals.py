"""Stops by SIGTERM and SIGINT: at once, or once what must be complete is."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST = 2.0  # seconds


class Stop(KeyboardInterrupt):
    """A signal that ends the program. A ``KeyboardInterrupt``, since asyncio and others let those through."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)


class StopRequest:
    """Within its block, SIGTERM and SIGINT raise `Stop`, or wait in ``signal`` for the end of a `deferred` block.

    A second signal ends the process at once. One within `ONE_REQUEST` seconds of the first is the same request: a
    scheduler signals torchrun and its processes alike, and torchrun passes its own signal on to them.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_at = 0.0
        self._num_deferred = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block end before a signal takes effect. Its code may look at ``signal`` and end early."""
        self._num_deferred += 1
        try:
            yield
        finally:
            self._num_deferred -= 1
        if self.signal is not None and not self._num_deferred:
            raise Stop(self.signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._received_at = signal.Signals(number), time.monotonic()
            if not self._num_deferred:
                raise Stop(number)
        elif time.monotonic() - self._received_at > ONE_REQUEST:
            os._exit(128 + number)


_stop = StopRequest()


@contextmanager
def obey_signals() -> Iterator[None]:
    """End the program by one line and status 128 + signal, whichever part of the block a signal meets."""
    try:
        with _stop:
            yield
    except Stop as stop:
        print(f"{stop.signal.name}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    finally:
        _stop.signal = None


def stop_request() -> StopRequest:
    """The program's own, for parts that must be complete; without `obey_signals` it never asks to stop."""
    return _stop
