"""Load and save a torchtune model's weights in Hugging Face's layout, one tensor at a time."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.utils import get_logger
from tqdm import tqdm

from owlore_tune.checkpoints.layouts import HF, Convert, StateDict, converters
from owlore_tune.distributed.world import ALONE, World, full, shard_like
from owlore_tune.errors import ConfigError
from owlore_tune.files import files_digest, read_json, read_object, readable_by_others, user_path, way_out
from owlore_tune.models.decoder import init_rope, plain_name
from owlore_tune.models.hf import HFDecoder, check_config
from owlore_tune.models.twin import check_builder

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


SHARD_BYTES = 2 * 10**9
# Files copied into a checkpoint, from the directory of the tokenizer and that of the model. config.json is rewritten.
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
TIED_COPY, TIED_TO = "output.weight", "tok_embeddings.weight"  # torchtune's names

log = get_logger("INFO")


class HFCheckpointer:
    """Reads and writes model directories in Hugging Face's layout.

    torchtune's ``FullModelHFCheckpointer`` reads all files into a second copy of the weights. This one converts tensor
    by tensor into a model initialized on the meta device.

    Args:
        checkpoint_dir: directory with ``config.json`` and weights (safetensors, else PyTorch ``.bin``).
        model_type: torchtune's name of the weight layout, such as ``LLAMA2``, ``LLAMA3_2``, ``MISTRAL``, ``QWEN2``; or
            ``HF`` for a model of `owlore_tune.models.hf_decoder`.
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
        self.checkpoint_dir = user_path(checkpoint_dir)
        if not self.checkpoint_dir.is_dir():
            raise ValueError(
                f"checkpointer.checkpoint_dir={checkpoint_dir} is not a directory; {way_out(self.checkpoint_dir)}"
            )
        try:
            self.config = read_object(self.checkpoint_dir / "config.json")
        except ValueError as error:
            raise ValueError(
                f"no readable config.json in {self.checkpoint_dir}: {error}; {way_out(self.checkpoint_dir)}"
            ) from error
        if (quantization := self.config.get("quantization_config")) is not None:
            kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ValueError(
                f"{self.checkpoint_dir}: config.json has a quantization_config ({kind}), and quantized weights cannot "
                "be trained; use the model in full precision"
            )
        self._model_type = model_type
        self._to_tune, self._to_hf = converters(model_type, self.config)
        self.files = self._weight_files(checkpoint_files)
        self._checked: WeakSet[nn.Module] = WeakSet()  # models that `check_model` has accepted
        self.tokenizer_dir = self.checkpoint_dir
        self.tokenizer_files: list[Path] = []  # of one of torchtune's

    def _weight_files(self, names: list[str] | None) -> list[Path]:
        files = [self.checkpoint_dir / name for name in names or ()] or weight_files(self.checkpoint_dir)
        missing = [str(file) for file in files if not file.is_file()]
        if missing or not files:
            raise ValueError(f"weights missing in {self.checkpoint_dir}: {', '.join(missing) or '*.safetensors'}")
        places: dict[str, Path] = {}
        for file in files:
            for name in check_readable(file, self._is_weight):
                if (other := places.setdefault(name, file)) != file:
                    whole = max(other.name, file.name, key=("model.safetensors", "pytorch_model.bin").__contains__)
                    raise ValueError(
                        f"{name} is in {other.name} and in {file.name} of {self.checkpoint_dir}; choose with "
                        f"checkpointer.checkpoint_files, such as [{whole}]"
                    )
        return files

    def _is_weight(self, name: str) -> bool:
        # Other layouts have no tensors that transformers leaves out.
        return self._model_type != HF or bool(self._to_tune({name: torch.empty(0)}))

    def take_tokenizer(self, path: Path, others: Sequence[Path] = ()) -> None:
        """Write the tokenizer that trains into checkpoints, instead of the model directory's.

        Args:
            path: its directory, or a file of a tokenizer of torchtune.
            others: its other files.
        """
        directory = path if path.is_dir() else path.parent
        if directory.resolve() != self.checkpoint_dir.resolve():
            log.info(f"Checkpoints get the tokenizer and chat template of {directory}, with which the run trains.")
            self.tokenizer_dir = directory
        self.tokenizer_files = [] if path.is_dir() else [path, *others]
        if self.tokenizer_files:
            names = ", ".join(file.name for file in self.tokenizer_files)
            log.info(
                f"The run trains with torchtune's format of conversations. Checkpoints get {names}, but no template."
            )

    def check_model(self, model: nn.Module) -> None:
        """Check that ``model`` computes what ``config.json`` describes. `load_checkpoint` does this as well.

        Args:
            model: on the meta device. Check it before it is sharded.

        Raises:
            ConfigError: naming the difference.
        """
        if model in self._checked:
            return
        try:
            if isinstance(model, HFDecoder):
                check_config(model, self.config)
            elif isinstance(model, TransformerDecoder):
                check_builder(model, self.config, lambda config: converters(self._model_type, config)[0])
        except ValueError as error:
            raise ConfigError(f"{error} (checkpointer.checkpoint_dir={self.checkpoint_dir})") from error
        self._checked.add(model)

    def fingerprint(self) -> str:
        """A digest of all bytes of the weight files."""
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
            directory: a checkpoint of a run to load instead of ``checkpoint_dir``.

        Raises:
            ConfigError: if a weight is not in the model or differs in shape, a weight of the model is missing, or the
                model was built with fields that differ from ``config.json``.
        """
        self.check_model(model)
        files = self.files if directory is None else weight_files(directory)
        directory = directory or self.checkpoint_dir
        wanted = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        missing = set(wanted)
        copies: list[Tensor] = []  # of tied embeddings
        total = sum(file.stat().st_size for file in files)
        hide = dist.is_initialized() and dist.get_rank() > 0
        with tqdm(
            total=total, desc="Loading weights", unit="B", unit_scale=True, leave=False, disable=hide
        ) as progress:
            for name, tensor in read_tensors(files):
                for key, value in _converted(self._to_tune, name, tensor, directory).items():
                    if key == TIED_COPY and key not in wanted:
                        copies.append(value)
                        continue
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
        for copy in copies:
            embeddings = wanted[TIED_TO]
            check_tied_copy(shard_like(copy, embeddings).to(embeddings), embeddings.detach(), directory)
        with torch.device(device):
            init_rope(model)

    def write(
        self,
        model: nn.Module,
        directory: Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        value_of: Callable[[Tensor], Tensor] = Tensor.detach,
        world: World = ALONE,
    ) -> None:
        """Write weights, ``config.json`` and companion files into an existing directory.

        If the model is sharded over ``world``, all processes call this together. Weights are gathered one by one, and
        the first process writes them.

        Args:
            value_of: returns the value to write of a parameter.

        Raises:
            OSError: if a file cannot be written, for example on a full disk.
            RankError: if that happens on another process.
        """
        self._write_shards(model, directory, shard_bytes, value_of, world)
        dtype = next(model.parameters()).dtype
        world.call(lambda: self.copy_companions(directory, dtype), on_rank_zero=True)

    def _write_shards(
        self, model: nn.Module, directory: Path, shard_bytes: int, value_of: Callable[[Tensor], Tensor], world: World
    ) -> None:
        weight_map: dict[str, str] = {}
        pieces = list(shards(model, shard_bytes))
        hide = world.rank > 0
        for number, shard in enumerate(
            tqdm(pieces, desc="Saving weights", unit="shard", leave=False, disable=hide), start=1
        ):
            name = f"model-{number:05}-of-{len(pieces):05}.safetensors" if len(pieces) > 1 else "model.safetensors"
            whole: StateDict = {}
            for key, parameter in shard.items():
                value = full(value_of(parameter))  # a collective; the first process keeps the result
                if world.rank == 0:
                    whole[key] = value.cpu()
                del value
            names = world.call(partial(self.write_tensors, whole, directory / name), on_rank_zero=True)
            weight_map.update(dict.fromkeys(names or (), name))
        if len(pieces) > 1:
            total_size = sum(p.nbytes for p in model.parameters())
            index = json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2)
            world.call(lambda: (directory / "model.safetensors.index.json").write_text(index), on_rank_zero=True)

    def to_tune(self, name: str, tensor: Tensor) -> StateDict:
        """A tensor of a file in torchtune's layout."""
        return _converted(self._to_tune, name, tensor, self.checkpoint_dir)

    def write_tensors(self, weights: StateDict, file: Path) -> list[str]:
        """Write ``weights`` in Hugging Face's layout; returns their names there."""
        tensors = {key: value.contiguous() for key, value in self._to_hf(weights).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        readable_by_others(file)
        return list(tensors)

    def copy_companions(self, directory: Path, dtype: torch.dtype) -> None:
        # torchtune's format of conversations is not that of a template.
        names = [name for name in TOKENIZER_FILES if not (self.tokenizer_files and name.startswith("chat_template"))]
        files = [self.tokenizer_dir / name for name in names]
        for file in [*files, *self.tokenizer_files, *(self.checkpoint_dir / name for name in LICENSES)]:
            if not file.is_file():
                continue
            if leads_outside(file):
                log.warning(f"{file} is a link to {file.resolve()}, outside the model directory; it is not copied.")
                continue
            shutil.copyfile(file, directory / file.name)
        if self.tokenizer_files and (copy := directory / "tokenizer_config.json").is_file():
            copy.write_text(
                json.dumps({k: v for k, v in read_object(copy).items() if k != "chat_template"}, indent=2) + "\n"
            )
        # transformers loads in the dtype that config.json names, which is now the run's.
        key = "dtype" if "dtype" in self.config else "torch_dtype"
        config = {**self.config, key: str(dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_tied_copy(copy: Tensor, embeddings: Tensor, directory: Path) -> None:
    """Raise ConfigError if a head in ``directory`` is not the embeddings that the model has instead of it."""
    if not torch.equal(full(copy), full(embeddings)):
        raise ConfigError(
            f"{directory} has an output head that differs from the embeddings, and the model ties them; choose a model "
            "with a head of its own (tie_word_embeddings=false in config.json)"
        )


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
