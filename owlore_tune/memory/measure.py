"""Measured memory of a run."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from owlore_tune.heap import return_freed_memory


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage's peak is at least that of the process that started this one, because Linux keeps it across exec.
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


class PeakMemory:
    """Peak memory of training on a device. It excludes loading and evaluation, except on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._earlier = 0

    def start(self) -> None:
        """Forget the peak so far, for example that of loading."""
        self._earlier = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block. On a CPU, where that is not possible, the block gets memory that training has freed."""
        earlier = self.read()
        return_freed_memory(self._device)
        yield
        self.start()
        self._earlier = earlier

    def read(self) -> int:
        """Bytes, as `peak_memory_bytes`."""
        return max(self._earlier, peak_memory_bytes(self._device))

    def metrics(self) -> dict[str, float]:
        """The peak in GB. On CUDA also what torch has reserved, which includes fragmentation."""
        if self._device.type != "cuda":
            return {"peak_memory_gb": self.read() / 1e9}
        reserved = torch.cuda.max_memory_reserved(self._device)
        return {"peak_memory_gb": self.read() / 1e9, "reserved_memory_gb": reserved / 1e9}


def resident_bytes() -> int:
    """Current resident memory of this process, or its peak if the system has no ``/proc``."""
    resident = _status_bytes("VmRSS")
    return peak_memory_bytes(torch.device("cpu")) if resident is None else resident


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, with what torch has reserved and not allocated; None for other devices.

    It is without the CUDA context, NCCL's buffers and other processes.
    """
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def _status_bytes(field: str) -> int | None:
    """A size in ``/proc/self/status``. None if the system does not give it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
