"""The files of a model directory: which ones hold the weights, and their tensors."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from owlore_tune.files import read_json

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory: those in its index, else all. Safetensors take precedence.

    Raises:
        ValueError: if the index cannot be read, or there is also a file with all weights that it does not name.
    """
    for pattern, index in (("*.safetensors", "model.safetensors"), ("pytorch_model*.bin", "pytorch_model.bin")):
        if (index_file := directory / f"{index}.index.json").is_file():
            try:
                names = sorted(set(read_json(index_file)["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index_file} has no readable weight_map: {error!r}") from error
            if outside := [name for name in names if Path(str(name)).name != name]:
                raise ValueError(f"{index_file} names {outside[0]}, which is not in the same directory")
            if index not in names and (directory / index).is_file():
                raise ValueError(
                    f"{directory} has {index}, and an index that names other files; choose with "
                    f"checkpointer.checkpoint_files=[{index}]"
                )
            return [directory / name for name in names]
        if files := sorted(directory.glob(pattern)):
            return files
    return []


def leads_outside(file: Path) -> bool:
    """Whether ``file`` links to a place outside its directory. A hub cache's links to its ``blobs`` do not count."""
    directory = file.parent.resolve()
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parent.parent / "blobs")
    return not any(file.resolve().is_relative_to(home) for home in homes)


def check_readable(file: Path, is_weight: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The names of the tensors in a weight file.

    Args:
        is_weight: whether the model has a weight for a name. Other tensors may have any type.

    Raises:
        ValueError: if it cannot be opened or is truncated, or has values that are not weights in full precision.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            if bad := [name for name, dtype in dtypes.items() if dtype not in _WEIGHT_DTYPES and is_weight(name)]:
                raise ValueError(_not_full_precision(bad[0], file, dtypes[bad[0]]))
            return list(dtypes)
        tensors = _load_pickled(file)
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{file} has a {type(tensor).__name__} at {name}, not a tensor; convert it first")
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise ValueError(f"{file} has a tensor without plain values at {name}; convert it first")
            is_whole = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            if not is_whole and is_weight(name):
                raise ValueError(_not_full_precision(name, file, tensor.dtype))
        return list(tensors)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; download it again") from error


def _not_full_precision(name: str, file: Path, dtype: Any) -> str:
    return (
        f"{name} in {file} has the type {dtype}; it is no weight in full precision. Remove it from the file, or use "
        "another copy of the model"
    )


def _load_pickled(file: Path) -> dict[str, Any]:
    """The tensors of a PyTorch file, which stay on the disk until they are used."""
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of pickle, torch or the file's own content
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}; download it again") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} has a {type(loaded).__name__}, not a dict of tensors; convert it first")
    return loaded


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                sizes = {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            # Reopen the file for each tensor, the largest first. Pages of a mapped file count as memory until it is
            # closed, so the peak is the weights and one small tensor.
            for name in sorted(sizes, key=lambda key: -sizes[key]):
                with safe_open(file, framework="pt") as opened:
                    yield name, opened.get_tensor(name)
        else:
            yield from _load_pickled(file).items()
