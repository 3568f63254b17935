"""Offload the optimizer state of inactive layers to host memory."""

from typing import Any

import torch
from torch import Tensor

from owlore_tune.optim.low_bits import map_parts


class Offload:
    """Moves the tensors of a parameter's state between its device and host memory.

    Copies from a CUDA device go to pinned memory on a separate stream and overlap with training.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_host(self, state: dict[str, Any]) -> None:
        """Replace the tensors of ``state`` with copies in host memory. The copies are complete after `wait`."""
        for key, value in state.items():
            if not torch.is_tensor(value) or value.device.type == "cpu":
                continue
            state[key] = self._to_pinned(value) if value.device.type == "cuda" else value.to("cpu")

    def to_device(self, state: dict[str, Any], device: torch.device) -> None:
        """Replace the tensors of ``state`` with copies on ``device``."""
        if device.type == "cuda" and device in self._streams:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
        for key, value in state.items():
            if torch.is_tensor(value):
                state[key] = value.to(device, non_blocking=True)

    def wait(self) -> None:
        """Wait until all copies are complete. Call it before host code reads them."""
        for stream in self._streams.values():
            stream.synchronize()

    def _to_pinned(self, value: Tensor) -> Tensor:
        if value.device not in self._streams:
            self._streams[value.device] = torch.cuda.Stream(value.device)
        stream = self._streams[value.device]
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            return map_parts(lambda part: _pinned_copy(part, stream), value)


def _pinned_copy(part: Tensor, stream: torch.cuda.Stream) -> Tensor:
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
    part.record_stream(stream)  # its memory is not reused before the copy is done
    return host
