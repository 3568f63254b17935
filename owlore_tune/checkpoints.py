"""HF-format weights in and out of a torchtune model, one tensor at a time."""

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune.models import convert_weights
from torchtune.training.checkpointing import ModelType
from torchtune.utils import get_logger
from tqdm import tqdm

from owlore_tune import low_bits
from owlore_tune.digests import files_digest
from owlore_tune.layers import init_rope, plain_name
from owlore_tune.sealed import CheckpointError, sealed_directory
from owlore_tune.sharded_state import load_sharded, save_sharded
from owlore_tune.world import ALONE, RankError, World, full, shard_like

StateDict = dict[str, Tensor]
STATE_FILE = "recipe_state.pt"
SHARDED = "optimizer"  # directory of the optimizer's state, where several processes saved it
# What goes with weights into a checkpoint, if the model directory has it; its config.json is written anew.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip
# torchtune's weight layouts of causal decoders, and the ``model_type`` of config.json that they are for.
ARCHITECTURES = {
    ModelType.LLAMA2: ("llama",), ModelType.LLAMA3: ("llama",), ModelType.LLAMA3_2: ("llama",),
    ModelType.MISTRAL: ("mistral",), ModelType.QWEN2: ("qwen2",), ModelType.GEMMA: ("gemma",),
    ModelType.GEMMA2: ("gemma2",), ModelType.PHI3_MINI: ("phi3",), ModelType.PHI4: ("phi3",),
}  # fmt: skip

log = get_logger("INFO")


class HFCheckpointer:
    """Reads and writes model directories in Hugging Face's layout.

    Where torchtune's ``FullModelHFCheckpointer`` reads all files into a second copy of the weights, this one converts
    tensor by tensor into a model initialized on the meta device.

    Args:
        checkpoint_dir: directory with ``config.json`` and weights (safetensors, else PyTorch ``.bin``).
        model_type: torchtune's name of the weight layout, such as ``LLAMA2``, ``LLAMA3_2``, ``MISTRAL``, ``QWEN2``.
        checkpoint_files: names in ``checkpoint_dir``; all its weights where left out.

    Raises:
        ValueError: if the directory, its ``config.json`` or its weights are missing or cannot be read, or
            ``model_type`` is unknown, no causal decoder's, or not that of ``config.json``.
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
                "download the model first, the top of the config says how"
            )
        try:
            self.config = json.loads((self.checkpoint_dir / "config.json").read_text())
            if not isinstance(self.config, dict):
                raise ValueError("it is not a JSON object")
        except (OSError, ValueError) as error:
            raise ValueError(f"no readable config.json in {self.checkpoint_dir}: {error}") from error
        self.files = self._weight_files(checkpoint_files)
        self._to_tune, self._to_hf = _converters(model_type, self.config)

    def _weight_files(self, names: list[str] | None) -> list[Path]:
        files = [self.checkpoint_dir / name for name in names or ()] or weight_files(self.checkpoint_dir)
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            raise ValueError(f"weights missing in {self.checkpoint_dir}: {', '.join(missing) or '*.safetensors'}")
        for file in files:
            _check_readable(file)
        return files

    def fingerprint(self) -> str:
        """A digest of every byte of the weights' files; those read before, and unchanged since, are not read again."""
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
        """Fill ``model``, initialized on the meta device, with the weights, in ``dtype`` on ``device``.

        Args:
            weights_device: where weights go instead, of a model that takes them to ``device`` itself.
            directory: a checkpoint of `save_checkpoint` to load instead of ``checkpoint_dir``.

        Raises:
            ValueError: if a weight has no place in the model or another shape, or the model wants one that is missing.
        """
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
                        raise ValueError(
                            f"{name} in {directory} has shape {tuple(value.shape)}, the model has "
                            f"{expected} at {key}: do model and checkpointer.checkpoint_dir belong together?"
                        )
                    own = shard_like(value, wanted[key])
                    loaded = own.to(weights_device or device, dtype, copy=True, memory_format=torch.contiguous_format)
                    # Swapped in place: whoever holds the parameter, such as an optimizer, keeps holding it.
                    torch.utils.swap_tensors(wanted[key], nn.Parameter(loaded, wanted[key].requires_grad))
                    missing.discard(key)
                progress.update(tensor.nbytes)
        if missing:
            raise ValueError(f"{directory} lacks weights of the model: {', '.join(sorted(missing)[:5])}")
        with torch.device(device):
            init_rope(model)

    def save_checkpoint(
        self,
        model: nn.Module,
        directory: str | Path,
        recipe_state: dict[str, Any] | None = None,
        *,
        shard_bytes: int = 2 * 10**9,
        run_id: str | None = None,
        world: World = ALONE,
    ) -> None:
        """Write ``model`` in HF format, with the tokenizer and config files it was loaded with, and the recipe's state.

        The directory appears under its name when it is complete, checksummed and on disk. Where the model is sharded,
        all processes call this together: weights are gathered one by one, and the first process writes them; each one
        writes its rows of the optimizer's state. What fails on one fails on all.

        Args:
            recipe_state: tensors, numbers, text, and lists and dicts of them; written beside the weights. Of a sharded
                model, its ``optimizer`` is each process's own.
            shard_bytes: split the weights into files of about this size.
            run_id: of the run that saves, see `owlore_tune.run_dir`; one of its own where left out.
            world: the processes that the model is sharded over.

        Raises:
            CheckpointError: if the disk is full or refuses.
        """
        recipe_state = dict(recipe_state or {})
        num_bytes = sum(p.nbytes for p in model.parameters()) + sum(world.gather(_tensor_bytes(recipe_state)))
        try:
            with ExitStack() as stack:
                writing = sealed_directory(Path(directory), num_bytes, run_id or uuid4().hex)
                partial_dir = world.share(world.attempt(lambda: stack.enter_context(writing), first_alone=True))
                assert partial_dir is not None
                self._save_weights(model, partial_dir, shard_bytes, world)
                if world.size > 1:
                    recipe_state["optimizer"] = world.attempt(
                        lambda: save_sharded(recipe_state["optimizer"], partial_dir / SHARDED, world)
                    )
                world.attempt(lambda: self._save_rest(model, partial_dir, recipe_state), first_alone=True)
                world.attempt(stack.close, first_alone=True)
        except (OSError, RankError) as error:
            raise CheckpointError(str(error)) from error

    def _save_weights(self, model: nn.Module, directory: Path, shard_bytes: int, world: World) -> None:
        weight_map: dict[str, str] = {}
        pieces = list(shards(model, shard_bytes))
        hide = world.rank > 0
        for number, shard in enumerate(
            tqdm(pieces, desc="Saving weights", unit="shard", leave=False, disable=hide), start=1
        ):
            name = f"model-{number:05}-of-{len(pieces):05}.safetensors" if len(pieces) > 1 else "model.safetensors"
            whole: StateDict = {}
            for key, parameter in shard.items():
                value = full(parameter.detach())  # all processes help, and the first one keeps it
                if world.rank == 0:
                    whole[key] = value.cpu()
                del value
            names = world.attempt(partial(self._write_weights, whole, directory / name), first_alone=True)
            weight_map.update(dict.fromkeys(names or (), name))
        if len(pieces) > 1:
            total_size = sum(p.nbytes for p in model.parameters())
            index = json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2)
            world.attempt(lambda: (directory / "model.safetensors.index.json").write_text(index), first_alone=True)

    def _write_weights(self, weights: StateDict, file: Path) -> list[str]:
        """Write ``weights`` in HF's layout; returns their names there."""
        tensors = {key: value.contiguous() for key, value in self._to_hf(weights).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        return list(tensors)

    def _save_rest(self, model: nn.Module, directory: Path, recipe_state: dict[str, Any]) -> None:
        self._copy_companions(directory, next(model.parameters()).dtype)
        if recipe_state:
            try:
                torch.save(recipe_state, directory / STATE_FILE)
            except RuntimeError as error:  # which is how torch reports a full disk
                raise OSError(str(error)) from error

    def _copy_companions(self, directory: Path, dtype: torch.dtype) -> None:
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


def weight_files(directory: Path) -> list[Path]:
    """The files with a model directory's weights: those its index names, else all there are; safetensors first."""
    for pattern, index in (("*.safetensors", "model.safetensors"), ("pytorch_model*.bin", "pytorch_model.bin")):
        if (index_file := directory / f"{index}.index.json").is_file():
            try:
                names = sorted(set(json.loads(index_file.read_text())["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index_file} has no readable weight_map: {error!r}") from error
            if outside := [name for name in names if Path(str(name)).name != name]:
                raise ValueError(f"{index_file} names {outside[0]}, which is not a file beside it")
            return [directory / name for name in names]
        if files := sorted(directory.glob(pattern)):
            return files
    return []


def leads_outside(file: Path) -> bool:
    """Whether ``file`` is a link out of its directory; a hub cache's links to its own ``blobs`` are not."""
    directory = file.parent.resolve()
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parent.parent / "blobs")
    return not any(file.resolve().is_relative_to(home) for home in homes)


def _check_readable(file: Path) -> None:
    """Raise ValueError if a weights file cannot be opened, or is cut short."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return
        with file.open("rb"):
            return
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; download it again") from error


def load_recipe_state(directory: Path) -> dict[str, Any]:
    """What `HFCheckpointer.save_checkpoint` was given as ``recipe_state``.

    Raises:
        CheckpointError: if the checkpoint has none.
    """
    file = directory / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {STATE_FILE}, so a run cannot resume from it")
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def saved_optimizer_state(directory: Path, recipe_state: dict[str, Any], world: World = ALONE) -> dict[str, Any]:
    """The optimizer's ``state_dict`` in a checkpoint, however many processes saved it; see `load_sharded`."""
    saved = recipe_state["optimizer"]
    return load_sharded(saved, directory / SHARDED, world) if "num_ranks" in saved else saved


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                sizes = {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            # Opened anew for each tensor, and the largest first: pages of a mapped file count as memory until it is
            # closed, so the peak is the weights and one small tensor.
            for name in sorted(sizes, key=lambda key: -sizes[key]):
                with safe_open(file, framework="pt") as opened:
                    yield name, opened.get_tensor(name)
        else:
            try:
                yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()
            except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
                raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}; download it again") from error


def _converted(to_tune: Callable[[StateDict], StateDict], name: str, tensor: Tensor, directory: Path) -> StateDict:
    """A tensor of the file in torchtune's layout.

    Raises:
        ValueError: if the layout has no such tensor, or not of this shape.
    """
    try:
        return to_tune({name: tensor})
    except Exception as error:  # torchtune raises nothing narrower
        raise ValueError(
            f"{name} in {directory}, of shape {tuple(tensor.shape)}, does not fit checkpointer.model_type and "
            f"config.json: {str(error).splitlines()[0]}"
        ) from error


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return low_bits.num_bytes(state)
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    return sum(map(_tensor_bytes, state)) if isinstance(state, list | tuple) else 0


def shards(model: nn.Module, shard_bytes: int) -> Iterator[StateDict]:
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
    kind = ModelType.__members__.get(str(model_type))
    if kind not in ARCHITECTURES:
        names = ", ".join(known.name for known in ARCHITECTURES)
        raise ValueError(f"checkpointer.model_type={model_type}; choose one of the causal decoders {names}")
    if (found := config.get("model_type")) not in ARCHITECTURES[kind]:
        fitting = ", ".join(known.name for known, types in ARCHITECTURES.items() if found in types)
        raise ValueError(
            f"checkpointer.model_type={model_type} is for config.json's model_type {ARCHITECTURES[kind][0]}, and the "
            f"model's is {found}; " + (f"choose {fitting}" if fitting else "torchtune has no such decoder")
        )
    try:
        heads = {
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "dim": config["hidden_size"],
            "head_dim": config.get("head_dim"),
        }
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}; is it a model of type {model_type}?") from error
    for name in ("num_heads", "num_kv_heads", "dim", "head_dim"):
        if not (heads[name] is None and name == "head_dim") and not (type(heads[name]) is int and heads[name] > 0):
            raise ValueError(f"config.json: {heads[name]!r} for {name} is not a whole number above 0")
    if heads["num_heads"] % heads["num_kv_heads"] or (heads["head_dim"] is None and heads["dim"] % heads["num_heads"]):
        raise ValueError(f"config.json: its numbers of heads do not divide: {heads}")
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
        from owlore_tune import gemma2

        return partial(gemma2.hf_to_tune, **heads), partial(gemma2.tune_to_hf, **heads)
    return partial(convert_weights.hf_to_tune, **heads), partial(convert_weights.tune_to_hf, **heads)
