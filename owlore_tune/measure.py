"""Time, memory and origin of what this process does."""

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def reuse_freed_memory(device: torch.device) -> None:
    """On a CPU, make glibc keep freed blocks of up to 32 MB for reuse. Does nothing on other devices.

    By default it returns most of them to the system, and each activation then causes page faults. Larger blocks, such
    as the weights of a 7B model, are still returned.
    """
    if device.type == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**28)  # bytes that each thread's heap may keep at its end


def return_freed_memory(device: torch.device) -> None:
    """On a CPU, return all freed blocks to the system, after rare work. Does nothing on other devices."""
    if device.type == "cpu" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


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


MANIFEST = "manifest.json"
PACKAGES = ("owlore-tune", "torchtune", "torch", "torchao", "omegaconf", "lm_eval", "transformers", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The device and machine that ran."""
    facts: dict[str, Any] = {"device": str(device), "platform": platform.platform(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
