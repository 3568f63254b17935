"""Training runs of the accuracy study: how each method is configured, started and checked.

All methods train on the same packed rows in the same order: 512 tokens per step, cosine schedule with a warmup of 10
steps, gradients clipped to 1 (OwLore: after projection), no weight decay. On CPUs with AMX, all products are in
bfloat16, see bf16_products.py. The seed shuffles the data and seeds the draws. OwLore draws layers every 50 steps, or
makes new bases if all layers train. BAdam trains one of the 30 layers at a time, and no embeddings. It changes the
layer so that every layer trains once and a few twice, but at most every 3 steps. GaLore refreshes its projections every
50 steps.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from owlore_tune.config.load import load_config
from owlore_tune.models.smollm2 import fetch

LIB = Path(__file__).parent
LOG = "steps.jsonl"
SEQ_LEN, BATCH_SIZE = 512, 1
RESAMPLE_EVERY = 50
BADAM_TURNS = 32  # turns of a layer in a run; the model has 30 layers
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as in peers.py


@dataclass(frozen=True)
class Method:
    """A way to train, with the learning rates to begin its tuning with."""

    runner: str  # torchtune: a recipe of torchtune; peer: peers.py; owlore: our recipe
    settings: dict[str, Any]  # overrides of the config, or arguments of the runner
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """The values that identify a run, together with the settings of its method."""

    method: str
    lr: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    command: list[str]
    config: Any  # as it is reported
    weights: Path  # the directory that they will be in
    scratch: Path
    threads: int

    @property
    def log(self) -> Path:
        """A line for each step, see step_logger.py."""
        return self.scratch / LOG

    def start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(LIB), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(LIB / "bf16_products.py"), *self.command]
        with (self.scratch / "log.txt").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def check(self, process: subprocess.Popen[bytes]) -> None:
        """End this program if the run has failed."""
        if process.returncode:
            sys.exit(f"{' '.join(self.command)} failed:\n{(self.scratch / 'log.txt').read_text()[-3000:]}")


def prepare(run: Run, method: Method, rows: list[dict[str, Any]], scratch: Path, threads: int) -> Prepared:
    """Write what a run needs to the directory ``scratch``."""
    data = scratch / "train.json"
    data.write_text(json.dumps(rows))
    make = _of_peer if method.runner == "peer" else _of_recipe
    return Prepared(*make(run, method, data, scratch), scratch, threads)


def _of_peer(run: Run, method: Method, data: Path, scratch: Path) -> tuple[list[str], Any, Path]:
    settings, output = method.settings, scratch / "run"
    every = settings.get("every", max(3, run.steps // BADAM_TURNS))
    command = [
        str(LIB / "peers.py"), settings["method"], f"--model={fetch()}", f"--data={data}", f"--lr={run.lr}",
        f"--steps={run.steps}", f"--seed={run.seed}", f"--save={output}", "--warmup=10", "--clip=1.0",
        f"--batch-size={BATCH_SIZE}", f"--seq-len={SEQ_LEN}", f"--resample-every={every}",
        f"--output={scratch / LOG}", f"--dtype={settings.get('dtype', 'fp32')}",
    ]  # fmt: skip
    return command, {"command": command[1:2] + [part for part in command[3:] if str(scratch) not in part]}, output


def _of_recipe(run: Run, method: Method, data: Path, scratch: Path) -> tuple[list[str], Any, Path]:
    make: Callable[..., dict[str, Any]] = _owlore_config if method.runner == "owlore" else _torchtune_config
    file, output = scratch / "config.yaml", scratch / "run"
    config = make(run, method.settings, data, output)
    OmegaConf.save(OmegaConf.create(config), file)
    recipe = method.settings.get("recipe", "owlore_full_finetune")
    weights = output / (f"step_{run.steps}" if method.runner == "owlore" else "epoch_0")
    shown = json.loads(json.dumps(config).replace(str(scratch), "SCRATCH"))
    return ["tune", "run", recipe, "--config", str(file)], shown, weights


def _common(run: Run, data: Path, output: Path) -> dict[str, Any]:
    """The fields that our config and torchtune's config share."""
    return {
        "output_dir": str(output),
        "tokenizer": {
            "_component_": "owlore_tune.data.HFChatTokenizer", "path": "${checkpointer.checkpoint_dir}",
            "max_seq_len": SEQ_LEN,
        },
        "dataset": {"_component_": "owlore_tune.data.instruction_dataset", "data_files": str(data), "packed": True},
        "batch_size": BATCH_SIZE, "gradient_accumulation_steps": 1, "shuffle": False, "seed": run.seed, "epochs": 1,
        "max_steps_per_epoch": run.steps, "clip_grad_norm": 1.0, "device": DEVICE, "dtype": "fp32",
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 10,
        },
        "metric_logger": {"_component_": "step_logger.StepLogger", "path": str(output.with_name(LOG))},
    }  # fmt: skip


def _owlore_config(run: Run, settings: dict[str, Any], data: Path, output: Path) -> dict[str, Any]:
    config = OmegaConf.merge(load_config("smollm2/135M_owlore"), {"dataset_val": None})
    plain = OmegaConf.to_container(config, resolve=False) | _common(run, data, output)
    changed = OmegaConf.create(plain)
    for key, value in {"optimizer.lr": run.lr, "owlore.resample_every": RESAMPLE_EVERY, **settings}.items():
        OmegaConf.update(changed, key, value)
    return OmegaConf.to_container(changed, resolve=False)  # type: ignore[return-value]


def _torchtune_config(run: Run, settings: dict[str, Any], data: Path, output: Path) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(load_config("smollm2/135M_lora"), resolve=False)
    if settings["recipe"].startswith("full"):
        del config["save_adapter_weights_only"]
        config["model"] = {"_component_": "owlore_tune.models.smollm2_135m"}
        config["optimizer_in_bwd"] = False
    config |= _common(run, data, output)
    config["dtype"] = settings.get("dtype", config["dtype"])
    config["optimizer"]["lr"] = run.lr
    return config
