"""What a run was: enough to say where its numbers come from, and to run it again."""

import importlib.metadata
import json
import math
import os
import platform
import tempfile
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
    """Write ``content`` so that the file is either the old or the new one, never half of it.

    Numbers that are not finite become null, since JSON has none.
    """
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}", delete=False) as partial:
        try:
            partial.write(to_json(content, indent=2) + "\n")
            partial.close()
            os.chmod(partial.name, 0o644)
            os.replace(partial.name, path)
        except BaseException:
            os.unlink(partial.name)
            raise


def to_json(content: Any, indent: int | None = None) -> str:
    """``content`` as valid JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def cache_directory() -> Path:
    """``owlore`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "owlore"
