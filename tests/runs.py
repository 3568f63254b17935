"""Helpers to run, break and inspect training on a tiny model."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from forks import Command
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.training.metric_logging import save_config

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.output_dir import RunDirectory


def recipe_of(config: dict) -> OwLoreFullFinetuneRecipe:
    return OwLoreFullFinetuneRecipe(TrainingSettings.from_config(OmegaConf.create(config)))


class SavingLogger:
    """A logger that writes the config to its output_dir."""

    def log_config(self, config) -> None:
        save_config(config)

    def log_dict(self, payload, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def prepare(config: dict) -> OwLoreFullFinetuneRecipe:
    """Build the recipe and set it up."""
    recipe = recipe_of(config)
    recipe.setup()
    return recipe


def finetune(config: dict) -> OwLoreFullFinetuneRecipe:
    recipe = prepare(config)
    recipe.train()
    recipe.cleanup()
    return recipe


def write(config: dict) -> Path:
    file = Path(f"{config['output_dir']}.yaml")
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return file


def start(config: dict, *overrides: str, environment: Mapping[str, str] | None = None) -> Command:
    """Train in a process of its own."""
    command = ("tune", "run", "owlore_full_finetune", "--config", str(write(config)), *overrides)
    return Command(*command, environment=environment)


def save(checkpointer: HFCheckpointer, model: torch.nn.Module, directory: Path, **options) -> None:
    directory.mkdir()
    checkpointer.write(model, directory, **options)


class Killed(BaseException):
    """Ends a run like SIGKILL: nothing catches it, so nothing more is saved."""


_UNBROKEN: dict[str, dict[str, torch.Tensor]] = {}


def unbroken_weights(config: dict, **changes) -> dict[str, torch.Tensor]:
    """The weights after an uninterrupted run, which is made once for all tests with the same config."""
    run = variant(config, "unbroken", **changes)
    key = json.dumps(run | {"output_dir": None}, sort_keys=True)
    if key not in _UNBROKEN:
        finetune(run)
        _UNBROKEN[key] = weights(run)
    return _UNBROKEN[key]


def assert_weights(config: dict, expected: dict[str, torch.Tensor]) -> None:
    """Assert that the weights of the last checkpoint are ``expected``, bit for bit."""
    got = weights(config)
    for name, weight in expected.items():
        assert torch.equal(weight, got[name]), name


def assert_resumes_exactly(config: dict) -> OwLoreFullFinetuneRecipe:
    """Resume a run, and assert that its final weights are those of an uninterrupted one, bit for bit."""
    recipe = finetune(config | {"resume_from_checkpoint": True})
    free = {"save_every_n_steps": None, "keep_last_n": None, "resume_from_checkpoint": False}
    assert_weights(config, unbroken_weights(config, **free))
    return recipe


def finetune_until(config: dict, step: int) -> None:
    """Train, and raise `Killed` right after step ``step``."""
    kill_after(prepare(config), step)


def kill_after(recipe: OwLoreFullFinetuneRecipe, step: int) -> None:
    def die():
        raise Killed

    after_step(recipe, step, die)
    with pytest.raises(Killed):
        recipe.train()
    recipe.cleanup()


def after_step(recipe: OwLoreFullFinetuneRecipe, step: int, action: Callable[[], None]) -> None:
    """Call ``action`` after step ``step`` is reported."""
    report = recipe.report.step

    def report_and_act(progress, metrics):
        report(progress, metrics)
        if progress.step == step:
            action()

    recipe.report.step = report_and_act


def scale_loss(recipe: OwLoreFullFinetuneRecipe, factor: Callable[[], float]) -> None:
    """Multiply each training and validation loss by ``factor()``."""
    forward = recipe.loss_fn.forward
    recipe.loss_fn.forward = lambda *args: forward(*args) * factor()


def poison(recipe: OwLoreFullFinetuneRecipe, steps: set[int]) -> None:
    """Make the training loss and all gradients NaN at ``steps``, counted from 0."""
    scale_loss(recipe, lambda: float("nan") if recipe.progress.step in steps and torch.is_grad_enabled() else 1.0)


def checkpoints(config: dict) -> list[Path]:
    """Return the checkpoints in the config's output_dir, oldest first."""
    return RunDirectory.existing(Path(config["output_dir"])).steps.own()


def weights(config: dict) -> dict[str, torch.Tensor]:
    """Return the weights of the last checkpoint."""
    return read_weights(checkpoints(config)[-1])


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    loaded = {name: w for file in sorted(directory.glob("*.safetensors")) for name, w in load_file(file).items()}
    return {name: weight.clone() for name, weight in loaded.items()}  # detach from the memory-mapped file


def changed(before: Path, after: Path) -> tuple[list[int], list[str]]:
    """Return the layers and the other weights that differ between two model directories."""
    old, new = read_weights(before), read_weights(after)
    names = [name for name, weight in new.items() if not torch.equal(weight, old[name].to(weight.dtype))]
    layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    return sorted(layers), sorted(name for name in names if not name.startswith("model.layers."))


def changed_by_draw(config: dict) -> list[tuple[list[int], list[str]]]:
    """Apply `changed` to each draw of a run that saved a checkpoint at every redraw and at the end."""
    directories = [Path(config["checkpointer"]["checkpoint_dir"]), *checkpoints(config)]
    return [changed(before, after) for before, after in zip(directories, directories[1:], strict=False)]


def variant(config: dict, path: str, **changes) -> dict:
    """Copy ``config`` with another output directory and changed top-level or ``block__key`` values."""
    other = json.loads(json.dumps(config))
    other["output_dir"] = f"{config['output_dir']}_{path}"
    for key, value in changes.items():
        block, _, leaf = key.partition("__")
        if leaf:
            other[block][leaf] = value
        else:
            other[block] = value
    return other


def other_model(config: dict, directory: Path, **sizes: int) -> dict:
    """Return ``config`` with other model sizes and the same tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = config["model"] | sizes
    shape = LlamaConfig(
        vocab_size=model["vocab_size"], hidden_size=model["embed_dim"], intermediate_size=model["intermediate_dim"],
        num_hidden_layers=4, num_attention_heads=model["num_heads"], num_key_value_heads=model["num_kv_heads"],
        max_position_embeddings=256, rms_norm_eps=1e-5, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(directory)
    for file in Path(config["checkpointer"]["checkpoint_dir"]).iterdir():
        if "token" in file.name:
            shutil.copy(file, directory)
    return config | {"model": model, "checkpointer": config["checkpointer"] | {"checkpoint_dir": str(directory)}}
