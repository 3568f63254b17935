"""Accuracy before and after fine-tuning on real tasks: OwLore and torchtune's full fine-tuning, with a tuned lr each.

    python benchmarks/commonsense.py --data DIR [--steps 300] [--output benchmarks/commonsense.md]

DIR holds ARC-Easy, openbookqa and boolq in LLM-Adapters' form, each with train.json and test.json. Both methods train on
the three train files together, one row in 40 left out; for each method the learning rate with the best accuracy on the
rows left out is taken, and only its checkpoint meets the test files. What is there in --runs already is not done again.
"""

import json
import random
import shutil
import subprocess
from pathlib import Path

from omegaconf import OmegaConf
from steps import recipe_config

from owlore_tune.config import load_config
from owlore_tune.smollm2 import fetch

TASKS = ("ARC-Easy", "openbookqa", "boolq")
LEARNING_RATES = {"OwLore": (3e-4, 1e-3, 3e-3), "torchtune full": (3e-5, 1e-4, 3e-4)}
RECIPES = {"OwLore": "owlore_full_finetune", "torchtune full": "full_finetune_single_device"}


def split(data: Path, runs: Path) -> None:
    """train.json of all tasks, and dev/TASK.json of the rows that are left out of it."""
    (runs / "dev").mkdir(parents=True, exist_ok=True)
    train = []
    for task in TASKS:
        rows = json.loads((data / task / "train.json").read_text())
        random.Random(0).shuffle(rows)
        (runs / "dev" / f"{task}.json").write_text(json.dumps(rows[::40]))
        train += [row for number, row in enumerate(rows) if number % 40]
    (runs / "train.json").write_text(json.dumps(train))


def training_config(method: str, lr: float, runs: Path, output: Path, steps: int) -> dict:
    """The shipped OwLore config, or torchtune's recipe, on the same data, batches and schedule."""
    shared = {
        "output_dir": str(output),
        "dataset": {
            "_component_": "owlore_tune.data.instruction_dataset", "data_files": str(runs / "train.json")
        },
        "batch_size": 8, "max_steps_per_epoch": steps, "clip_grad_norm": 1.0,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 10,
        },
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(output / "logs")
        },
    }  # fmt: skip
    if method == "OwLore":
        config = OmegaConf.to_container(load_config("smollm2/135M_owlore"), resolve=False)
        return config | shared | {"dataset_val": None, "optimizer": config["optimizer"] | {"lr": lr}}
    config = recipe_config(RECIPES[method], fetch(), runs, steps)
    return config | shared | {"optimizer": config["optimizer"] | {"lr": lr}}


def train(method: str, lr: float, runs: Path, steps: int) -> Path:
    """The checkpoint directory of one run; the run itself only if that is not there."""
    output = runs / f"{method.split()[-1].lower()}_{lr:g}"
    checkpoint = output / (f"step_{steps}" if method == "OwLore" else "epoch_0")
    if not checkpoint.is_dir():
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        file = output / "config.yaml"
        OmegaConf.save(OmegaConf.create(training_config(method, lr, runs, output, steps)), file)
        with (output / "log.txt").open("w") as log:
            subprocess.run(["tune", "run", RECIPES[method], "--config", str(file)], stdout=log, stderr=log, check=True)
    return checkpoint
