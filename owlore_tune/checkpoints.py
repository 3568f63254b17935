"""HF-format weights in and out of a torchtune model, one tensor at a time."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune.models import convert_weights
from torchtune.training.checkpointing import ModelType
from tqdm import tqdm

from owlore_tune.layers import plain_name

StateDict = dict[str, Tensor]
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json")


class HFCheckpointer:
    """Reads and writes model directories in Hugging Face's layout.

    Where torchtune's ``FullModelHFCheckpointer`` reads all files into a second copy of the weights, this one converts
    tensor by tensor into a model initialized on the meta device.

    Args:
        checkpoint_dir: directory with ``config.json`` and weights (safetensors, else PyTorch ``.bin``).
        model_type: torchtune's name of the weight layout, such as ``LLAMA2``, ``LLAMA3_2``, ``MISTRAL``, ``QWEN2``.
        output_dir: where a run puts its checkpoints.
        checkpoint_files: names in ``checkpoint_dir``; all its weights where left out.

    Raises:
        ValueError: if the directory, its ``config.json`` or its weights are missing, or ``model_type`` is unknown.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        model_type: str,
        output_dir: str,
        checkpoint_files: list[str] | None = None,
    ) -> None:
        self.checkpoint_dir = Path(checkpoint_dir).expanduser()
        self.output_dir = Path(output_dir).expanduser()
        if not self.checkpoint_dir.is_dir():
            raise ValueError(
                f"checkpointer.checkpoint_dir={checkpoint_dir} is not a directory; "
                "download the model first, the top of the config says how"
            )
        try:
            self.config = json.loads((self.checkpoint_dir / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"no readable config.json in {self.checkpoint_dir}: {error}") from error
        self.files = self._weight_files(checkpoint_files)
        self._to_tune, self._to_hf = _converters(model_type, self.config)

    def _weight_files(self, names: list[str] | None) -> list[Path]:
        if names:
            files = [self.checkpoint_dir / name for name in names]
        else:
            files = sorted(self.checkpoint_dir.glob("*.safetensors"))
            files = files or sorted(self.checkpoint_dir.glob("pytorch_model*.bin"))
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            raise ValueError(f"weights missing in {self.checkpoint_dir}: {', '.join(missing) or '*.safetensors'}")
        return files

    def fingerprint(self) -> str:
        """A digest of the weights: of every tensor's name, shape and dtype and a few of its values, not of its all."""
        digest = hashlib.sha256()
        for name, tensor in sorted(_read_tensors(self.files), key=lambda item: item[0]):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            sample = tensor.flatten()[:: max(1, tensor.numel() // 64)][:64]
            digest.update(sample.double().numpy().tobytes())
        return digest.hexdigest()[:16]

    def load_checkpoint(self, model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """Fill ``model``, initialized on the meta device, with the weights, in ``dtype`` on ``device``.

        Raises:
            ValueError: if a weight has no place in the model or another shape, or the model wants one that is missing.
        """
        wanted = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        missing = set(wanted)
        total = sum(file.stat().st_size for file in self.files)
        with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, leave=False) as progress:
            for name, tensor in _read_tensors(self.files):
                for key, value in self._to_tune({name: tensor}).items():
                    if key == "output.weight" and key not in wanted:
                        continue  # a copy of tied embeddings
                    if key not in wanted or wanted[key].shape != value.shape:
                        expected = tuple(wanted[key].shape) if key in wanted else "no such parameter"
                        raise ValueError(
                            f"{name} in {self.checkpoint_dir} has shape {tuple(value.shape)}, the model has "
                            f"{expected} at {key}: do model and checkpointer.checkpoint_dir belong together?"
                        )
                    loaded = value.to(device=device, dtype=dtype, copy=True)
                    # Swapped in place: whoever holds the parameter, such as an optimizer, keeps holding it.
                    torch.utils.swap_tensors(wanted[key], nn.Parameter(loaded, wanted[key].requires_grad))
                    missing.discard(key)
                progress.update(tensor.nbytes)
        if missing:
            raise ValueError(f"{self.checkpoint_dir} lacks weights of the model: {', '.join(sorted(missing)[:5])}")
        with torch.device(device):
            for module in model.modules():
                if hasattr(module, "rope_init"):
                    module.rope_init()

    def save_checkpoint(self, model: nn.Module, directory: str | Path, *, shard_bytes: int = 2 * 10**9) -> None:
        """Write ``model`` into ``directory`` in HF format, with the tokenizer and config files it was loaded with.

        The directory appears under its name when it is complete.

        Args:
            shard_bytes: split the weights into files of about this size.
        """
        directory = Path(directory)
        partial_dir = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial_dir, ignore_errors=True)
        partial_dir.mkdir(parents=True)
        weight_map: dict[str, str] = {}
        shards = list(_shards(model, shard_bytes))
        for number, shard in enumerate(tqdm(shards, desc="Saving weights", unit="shard", leave=False), start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {key: value.detach().cpu().contiguous() for key, value in self._to_hf(shard).items()}
            save_file(tensors, partial_dir / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(p.nbytes for p in model.parameters())},
                "weight_map": weight_map,
            }
            (partial_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        self._copy_companions(partial_dir, next(model.parameters()).dtype)
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(partial_dir, directory)

    def _copy_companions(self, directory: Path, dtype: torch.dtype) -> None:
        for file in self.checkpoint_dir.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(file, directory / file.name)
        # transformers loads in the dtype that config.json names, which is now the run's.
        key = "dtype" if "dtype" in self.config else "torch_dtype"
        config = {**self.config, key: str(dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
            for name in names:
                # Opened anew for each tensor: pages of a mapped file count as memory until it is closed.
                with safe_open(file, framework="pt") as opened:
                    yield name, opened.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()


def _shards(model: nn.Module, shard_bytes: int) -> Iterator[StateDict]:
    """The model's parameters in pieces of about ``shard_bytes``; a layer is never split, since some layouts fuse
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


def _converters(
    model_type: str, config: dict[str, Any]
) -> tuple[Callable[[StateDict], StateDict], Callable[[StateDict], StateDict]]:
    """torchtune's conversions from and to HF's layout for one model type."""
    try:
        kind = ModelType[model_type]
    except KeyError:
        names = ", ".join(ModelType.__members__)
        raise ValueError(f"checkpointer.model_type={model_type}; choose one of {names}") from None
    heads = {
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "dim": config["hidden_size"],
        "head_dim": config.get("head_dim"),
    }
    if kind in (ModelType.PHI3_MINI, ModelType.PHI4):
        from torchtune.models.phi3._convert_weights import phi3_hf_to_tune, phi3_tune_to_hf

        del heads["head_dim"]
        if heads["num_heads"] == heads["num_kv_heads"]:
            heads = dict.fromkeys(heads)
        return partial(phi3_hf_to_tune, **heads), phi3_tune_to_hf
    if kind == ModelType.QWEN2:
        from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf

        heads["tie_word_embeddings"] = config["tie_word_embeddings"]
        return partial(qwen2_hf_to_tune, **heads), partial(qwen2_tune_to_hf, **heads)
    if kind == ModelType.GEMMA2:
        from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune, gemma2_tune_to_hf

        return partial(gemma2_hf_to_tune, **heads), partial(gemma2_tune_to_hf, **heads)
    return partial(convert_weights.hf_to_tune, **heads), partial(convert_weights.tune_to_hf, **heads)
