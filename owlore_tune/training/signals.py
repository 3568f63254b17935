"""Stop on SIGTERM and SIGINT: at once, or at the end of a block that must be complete."""

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
    """A signal that ends the program. It is a ``KeyboardInterrupt``, because asyncio and others do not catch those."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)


class StopRequest:
    """In its block, SIGTERM and SIGINT raise `Stop`. In a `deferred` block they are kept in ``signal`` until its end.

    A second signal ends the process at once. One within `ONE_REQUEST` seconds of the first counts as the same request,
    because a scheduler signals both torchrun and its processes, and torchrun forwards its signal to them.
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
        """Delay a signal until the block ends. Code in the block can check ``signal`` and end early."""
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
    """On a signal in the block, print one line and exit with status 128 + signal."""
    try:
        with _stop:
            yield
    except Stop as stop:
        print(f"{stop.signal.name}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    finally:
        _stop.signal = None


def stop_request() -> StopRequest:
    """The program's `StopRequest`, for blocks that must be complete. It is inactive outside `obey_signals`."""
    return _stop
