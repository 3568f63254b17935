"""A metric logger that records the time and peak memory of each step in the same way for all recipes."""

import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune.training.metric_logging import MetricLoggerInterface

from owlore_tune.measure import peak_memory_bytes

KEPT = ("loss", "optimizer_state_gb")


class StepLogger(MetricLoggerInterface):
    """Writes a JSON line per step that logs a loss: step, seconds, peak memory in GB, and the metrics in KEPT."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1)  # noqa: SIM115
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        if "loss" in payload:
            line = {"step": step, "seconds": time.perf_counter(), "peak_memory": peak_memory_bytes(self._device) / 1e9}
            line |= {key: float(payload[key]) for key in KEPT if key in payload}
            self._file.write(json.dumps(line) + "\n")

    def log(self, name: str, data: Any, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_config(self, config: DictConfig) -> None:
        pass

    def close(self) -> None:
        self._file.close()
