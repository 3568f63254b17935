"""The origin of a result: package versions and the machine."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

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
