"""What a run was: enough to say where its numbers come from, and to run it again."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
PACKAGES = (
    "owlore-tune",
    "torchtune",
    "torch",
    "torchao",
    "omegaconf",
    "lm_eval",
    "transformers",
    "tokenizers",
)


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
    """The device and processor that ran."""
    facts: dict[str, Any] = {"device": str(device), "platform": platform.platform(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` so that the file is either the old or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
