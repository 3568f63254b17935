"""A metric logger that notes when each step was logged: the same clock for every recipe."""

import json
import time
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torchtune.training.metric_logging import MetricLoggerInterface


class StepLogger(MetricLoggerInterface):
    """Appends one JSON line, step and seconds, for each step that logs a loss."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1)  # noqa: SIM115

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        if "loss" in payload:
            line = {"step": step, "seconds": time.perf_counter(), "loss": float(payload["loss"])}
            self._file.write(json.dumps(line) + "\n")

    def log(self, name: str, data: Any, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_config(self, config: DictConfig) -> None:
        pass

    def close(self) -> None:
        self._file.close()
