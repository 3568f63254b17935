"""Runs of a small model that kills are tried on, and their final weights."""

import io
import os
import shutil
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tqdm import tqdm

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.checkpoints.steps import verify
from owlore_tune.config.load import load_config
from owlore_tune.models.smollm2 import fetch
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.output_dir import RunDirectory


@dataclass
class Found:
    """A row of the table."""

    runs: int = 0
    kills: int = 0
    in_a_save: int = 0
    unreadable: int = 0
    not_bit_equal: int = 0
    leftovers: int = 0

    def check_newest(self, output_dir: Path) -> None:
        """Count the newest checkpoint if it is not readable."""
        for directory in RunDirectory.existing(output_dir).steps.own()[-1:]:
            try:
                verify(directory)
            except Exception as error:
                print(error)
                self.unreadable += 1

    def check_weights(self, output_dir: Path, expected: dict[str, torch.Tensor]) -> None:
        """Count the run if its final weights are others, and what it left behind."""
        got = weights(output_dir)
        self.runs += 1
        self.not_bit_equal += not all(torch.equal(weight, got[key]) for key, weight in expected.items())
        names = {path.name for path in output_dir.rglob("*")}
        self.leftovers += any(part in name for name in names for part in (".partial", ".disc", ".tmp"))


def small_model(directory: Path) -> None:
    """Save a random 4-layer LLaMA with SmolLM2's tokenizer, 13 MB."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    for file in fetch().iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, directory)


def config_for(model: str, scratch: Path, weights: str = "full") -> dict:
    """Config of 12 steps with gradient accumulation: checkpoint every 2, draw every 3, basis refresh every 2."""
    overrides = [
        "dataset_val=null", "batch_size=1", "gradient_accumulation_steps=2", "max_steps_per_epoch=6", "epochs=2",
        "owlore.resample_every=3", "owlore.outlier_threshold=5", "owlore.calibration_batches=2",
        "owlore.update_gap=2", "save_every_n_steps=2", "keep_last_n=2", "device=cpu", "tokenizer.max_seq_len=128",
        "resume_from_checkpoint=true",
    ]  # fmt: skip
    config = OmegaConf.to_container(load_config("smollm2/135M_owlore", overrides), resolve=False)
    if model == "small":
        small_model(scratch / "model")
        config["checkpointer"]["checkpoint_dir"] = str(scratch / "model")
        config["model"] = {
            "_component_": "torchtune.models.llama3_2.llama3_2", "vocab_size": 49_152, "num_layers": 4,
            "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 96, "max_seq_len": 512,
            "rope_base": 10_000, "scale_factor": 1, "norm_eps": 1e-6,
        }  # fmt: skip
        config["owlore"]["rank"] = 8
        config["owlore"]["num_active_layers"] = 2
    config["owlore"]["weights"] = weights
    return config


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted(RunDirectory.existing(output_dir).steps.own()[-1].glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def train_here(config: dict, output_dir: Path) -> None:
    """Train in a forked child, quietly, and end it. Exit code: 0 if the run completed, 143 if SIGTERM stopped it."""
    log, status = io.StringIO(), 1
    try:
        with redirect_stdout(log), redirect_stderr(log):
            cfg = OmegaConf.create(config | {"output_dir": str(output_dir)})
            recipe = OwLoreFullFinetuneRecipe(TrainingSettings.from_config(cfg))
            recipe.setup()
            recipe.train()
            recipe.cleanup()
        status = 0
    except SystemExit as stop:
        status = int(stop.code)
    except BaseException as error:
        sys.__stderr__.write(f"{log.getvalue()[-2000:]}\n{error!r}\n")
    os._exit(status)


def prepare_to_fork() -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # the default lock is shared by all processes, and a killed child may hold it
