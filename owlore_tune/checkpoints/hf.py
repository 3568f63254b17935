"""Load and save a torchtune model's weights in Hugging Face's layout, one tensor at a time."""

import json
import math
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune.utils import get_logger
from tqdm import tqdm

from owlore_tune.checkpoints.layouts import Convert, StateDict, converters
from owlore_tune.checkpoints.sealed import sealed_directory
from owlore_tune.distributed.world import ALONE, World, full, shard_like
from owlore_tune.errors import ConfigError
from owlore_tune.files import files_digest
from owlore_tune.models.decoder import init_rope, plain_name
from owlore_tune.models.hf import HFDecoder, check_config

SHARD_BYTES = 2 * 10**9
# Files copied into a checkpoint, if the model directory has them. config.json is rewritten.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip

log = get_logger("INFO")


class HFCheckpointer:
    """Reads and writes model directories in Hugging Face's layout.

    torchtune's ``FullModelHFCheckpointer`` reads all files into a second copy of the weights. This one converts tensor
    by tensor into a model initialized on the meta device.

    Args:
        checkpoint_dir: directory with ``config.json`` and weights (safetensors, else PyTorch ``.bin``).
        model_type: torchtune's name of the weight layout, such as ``LLAMA2``, ``LLAMA3_2``, ``MISTRAL``, ``QWEN2``.
        checkpoint_files: names in ``checkpoint_dir``; all its weights if omitted.

    Raises:
        ValueError: if the directory, its ``config.json`` or its weights are missing or cannot be read, or
            ``model_type`` is unknown, not a causal decoder, or does not match ``config.json``.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        model_type: str,
        checkpoint_files: list[str] | None = None,
    ) -> None:
        self.checkpoint_dir = Path(str(checkpoint_dir)).expanduser()
        if not self.checkpoint_dir.is_dir():
            raise ValueError(
                f"checkpointer.checkpoint_dir={checkpoint_dir} is not a directory; "
                "download the model first (see the top of the config)"
            )
        try:
            self.config = json.loads((self.checkpoint_dir / "config.json").read_text())
            if not isinstance(self.config, dict):
                raise ValueError("it is not a JSON object")
        except (OSError, ValueError) as error:
            raise ValueError(f"no readable config.json in {self.checkpoint_dir}: {error}") from error
        self.files = self._weight_files(checkpoint_files)
        self._to_tune, self._to_hf = converters(model_type, self.config)

    def _weight_files(self, names: list[str] | None) -> list[Path]:
        files = [self.checkpoint_dir / name for name in names or ()] or weight_files(self.checkpoint_dir)
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            raise ValueError(f"weights missing in {self.checkpoint_dir}: {', '.join(missing) or '*.safetensors'}")
        for file in files:
            _check_readable(file)
        return files

    def fingerprint(self) -> str:
        """A digest of all bytes of the weight files. Files unchanged since an earlier digest are not read again."""
        return files_digest(self.files)

    def load_checkpoint(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weights_device: torch.device | None = None,
        directory: Path | None = None,
    ) -> None:
        """Load the weights into ``model``, initialized on the meta device, in ``dtype`` on ``device``.

        Args:
            weights_device: device of the weights instead, for a model that moves them to ``device`` itself.
            directory: a checkpoint of `save_checkpoint` to load instead of ``checkpoint_dir``.

        Raises:
            ConfigError: if a weight is not in the model or differs in shape, a weight of the model is missing, or the
                model was built with fields that differ from ``config.json``.
        """
        check_same_model(model, self.config)
        files = self.files if directory is None else weight_files(directory)
        directory = directory or self.checkpoint_dir
        wanted = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        missing = set(wanted)
        total = sum(file.stat().st_size for file in files)
        hide = dist.is_initialized() and dist.get_rank() > 0
        with tqdm(
            total=total, desc="Loading weights", unit="B", unit_scale=True, leave=False, disable=hide
        ) as progress:
            for name, tensor in _read_tensors(files):
                for key, value in _converted(self._to_tune, name, tensor, directory).items():
                    if key == "output.weight" and key not in wanted:
                        continue  # a copy of tied embeddings
                    if key not in wanted or wanted[key].shape != value.shape:
                        expected = tuple(wanted[key].shape) if key in wanted else "no such parameter"
                        raise ConfigError(
                            f"{name} in {directory} has shape {tuple(value.shape)}, the model has "
                            f"{expected} at {key}; check that model and checkpointer.checkpoint_dir match"
                        )
                    own = shard_like(value, wanted[key])
                    loaded = own.to(weights_device or device, dtype, copy=True, memory_format=torch.contiguous_format)
                    # Swapped in place, so references to the parameter, such as the optimizer's, stay valid.
                    torch.utils.swap_tensors(wanted[key], nn.Parameter(loaded, wanted[key].requires_grad))
                    missing.discard(key)
                progress.update(tensor.nbytes)
        if missing:
            raise ConfigError(f"{directory} lacks weights of the model: {', '.join(sorted(missing)[:5])}")
        with torch.device(device):
            init_rope(model)

    def save_checkpoint(self, model: nn.Module, directory: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Write ``model`` in Hugging Face's layout, with the tokenizer and config files of ``checkpoint_dir``.

        The directory gets its name only when it is complete, checksummed and on disk.

        Args:
            directory: must not exist.
            shard_bytes: split the weights into files of about this size.

        Raises:
            CheckpointError: if ``directory`` exists or cannot be written, for example on a full disk.
        """
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        with sealed_directory(Path(directory), num_bytes, run_id=uuid4().hex) as partial_dir:
            self.write(model, partial_dir, shard_bytes=shard_bytes)

    def write(self, model: nn.Module, directory: Path, *, shard_bytes: int = SHARD_BYTES, world: World = ALONE) -> None:
        """Write weights, ``config.json`` and companion files into an existing directory.

        If the model is sharded over ``world``, all processes call this together. Weights are gathered one by one, and
        the first process writes them.

        Raises:
            OSError: if a file cannot be written, for example on a full disk.
            RankError: if that happens on another process.
        """
        self._write_shards(model, directory, shard_bytes, world)
        dtype = next(model.parameters()).dtype
        world.attempt(lambda: self.copy_companions(directory, dtype), first_alone=True)

    def _write_shards(self, model: nn.Module, directory: Path, shard_bytes: int, world: World) -> None:
        weight_map: dict[str, str] = {}
        pieces = list(shards(model, shard_bytes))
        hide = world.rank > 0
        for number, shard in enumerate(
            tqdm(pieces, desc="Saving weights", unit="shard", leave=False, disable=hide), start=1
        ):
            name = f"model-{number:05}-of-{len(pieces):05}.safetensors" if len(pieces) > 1 else "model.safetensors"
            whole: StateDict = {}
            for key, parameter in shard.items():
                value = full(parameter.detach())  # a collective; the first process keeps the result
                if world.rank == 0:
                    whole[key] = value.cpu()
                del value
            names = world.attempt(partial(self.write_tensors, whole, directory / name), first_alone=True)
            weight_map.update(dict.fromkeys(names or (), name))
        if len(pieces) > 1:
            total_size = sum(p.nbytes for p in model.parameters())
            index = json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2)
            world.attempt(lambda: (directory / "model.safetensors.index.json").write_text(index), first_alone=True)

    def to_tune(self, name: str, tensor: Tensor) -> StateDict:
        """A tensor of a file in torchtune's layout."""
        return _converted(self._to_tune, name, tensor, self.checkpoint_dir)

    def write_tensors(self, weights: StateDict, file: Path) -> list[str]:
        """Write ``weights`` in Hugging Face's layout; returns their names there."""
        tensors = {key: value.contiguous() for key, value in self._to_hf(weights).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        return list(tensors)

    def copy_companions(self, directory: Path, dtype: torch.dtype) -> None:
        for file in (self.checkpoint_dir / name for name in COMPANIONS):
            if not file.is_file():
                continue
            if leads_outside(file):
                log.warning(f"{file} is a link to {file.resolve()}, outside the model directory; it is not copied.")
                continue
            shutil.copyfile(file, directory / file.name)
        # transformers loads in the dtype that config.json names, which is now the run's.
        key = "dtype" if "dtype" in self.config else "torch_dtype"
        config = {**self.config, key: str(dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_same_model(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ConfigError if ``model`` is of transformers, and was built with a field that differs in ``config``."""
    if isinstance(model, HFDecoder):
        try:
            check_config(model, config)
        except ValueError as error:
            raise ConfigError(f"{error}; check that model and checkpointer.checkpoint_dir match") from error


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory: those in its index, else all. Safetensors take precedence."""
    for pattern, index in (("*.safetensors", "model.safetensors"), ("pytorch_model*.bin", "pytorch_model.bin")):
        if (index_file := directory / f"{index}.index.json").is_file():
            try:
                names = sorted(set(json.loads(index_file.read_text())["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index_file} has no readable weight_map: {error!r}") from error
            if outside := [name for name in names if Path(str(name)).name != name]:
                raise ValueError(f"{index_file} names {outside[0]}, which is not in the same directory")
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


def _check_readable(file: Path) -> None:
    """Raise ValueError if a weight file cannot be opened or is truncated."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return
        with file.open("rb"):
            return
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; download it again") from error


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
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
            try:
                yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()
            except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
                raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}; download it again") from error


def _converted(to_tune: Convert, name: str, tensor: Tensor, directory: Path) -> StateDict:
    """Convert a tensor of the file to torchtune's layout.

    Raises:
        ConfigError: if the layout has no such tensor, or the shape does not fit.
    """
    try:
        return to_tune({name: tensor})
    except Exception as error:  # torchtune raises no narrower type
        raise ConfigError(
            f"{name} in {directory}, of shape {tuple(tensor.shape)}, does not fit checkpointer.model_type and "
            f"config.json: {str(error).splitlines()[0]}"
        ) from error


def shards(model: nn.Module, shard_bytes: int) -> Iterator[StateDict]:
    """The model's parameters in shards of about ``shard_bytes``. A layer is never split, because some layouts fuse
    several of its weights into one."""
    shard: StateDict = {}
    last_unit = None
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        unit = name.split(".")[:2]
        if unit != last_unit and sum(p.nbytes for p in shard.values()) >= shard_bytes:
            yield shard
            shard = {}
        shard[name] = parameter
        last_unit = unit
    yield shard
