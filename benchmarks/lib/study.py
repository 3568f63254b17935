"""Runs of the accuracy study: how each method trains, what the model has learned then, and what it has forgotten.

All methods train on the same packed rows in the same order: 512 tokens per step, cosine schedule with a warmup of 10
steps, gradients clipped to 1 (OwLore: after projection), no weight decay. On CPUs with AMX, all products are in
bfloat16, see bf16_products.py. The seed shuffles the data and seeds the draws. OwLore draws layers every 50 steps, or
makes new bases if all layers train. BAdam trains one of the 30 layers at a time, and no embeddings. It changes the
layer so that every layer trains once and a few twice, but at most every 3 steps. GaLore refreshes its projections every
50 steps.

Losses are of the saved weights in float32, one row a sample.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lib.tune_run import LIB, run_process
from omegaconf import OmegaConf
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_sft

from owlore_evals.jsonl import read_lines
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.config.load import load_config
from owlore_tune.data.datasets import instruction_dataset, mmlu_dev_rows
from owlore_tune.data.loader import HeldOutData
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.distributed.world import ALONE
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.models.smollm2 import fetch, smollm2_135m
from owlore_tune.training import validation

SEQ_LEN, BATCH_SIZE = 512, 1
RESAMPLE_EVERY = 50
BADAM_TURNS = 32  # turns of a layer in a run; the model has 30 layers
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as in peers.py
Sample = dict[str, list[int]]  # tokens and labels


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
class Trained:
    config: Any  # as it is reported
    weights: Path  # their directory
    steps: list[dict[str, Any]]  # see step_logger.py


def train(run: Run, method: Method, rows: list[dict[str, Any]], scratch: Path, threads: int) -> Trained:
    """Train on ``rows`` in a process of its own. It writes to the directory ``scratch``."""
    data, log = scratch / "train.json", scratch / "steps.jsonl"
    data.write_text(json.dumps(rows))
    command, weights = (_of_peer if method.runner == "peer" else _of_recipe)(run, method, data, scratch)
    run_process([sys.executable, str(LIB / "bf16_products.py"), *command], scratch / "log.txt", threads)
    config: Any = {"command": [part for part in command[1:] if str(scratch) not in part]}
    if method.runner != "peer":
        config = OmegaConf.to_container(OmegaConf.load(scratch / "config.yaml"), resolve=False)
    return Trained(json.loads(json.dumps(config).replace(str(scratch), "SCRATCH")), weights, read_lines(log))


def _of_peer(run: Run, method: Method, data: Path, scratch: Path) -> tuple[list[str], Path]:
    settings, output = method.settings, scratch / "run"
    every = settings.get("every", max(3, run.steps // BADAM_TURNS))
    command = [
        str(LIB / "peers.py"), settings["method"], f"--model={fetch()}", f"--data={data}", f"--lr={run.lr}",
        f"--steps={run.steps}", f"--seed={run.seed}", f"--save={output}", "--warmup=10", "--clip=1.0",
        f"--batch-size={BATCH_SIZE}", f"--seq-len={SEQ_LEN}", f"--resample-every={every}",
        f"--output={scratch / 'steps.jsonl'}", f"--dtype={settings.get('dtype', 'fp32')}",
    ]  # fmt: skip
    return command, output


def _of_recipe(run: Run, method: Method, data: Path, scratch: Path) -> tuple[list[str], Path]:
    file, output, settings = scratch / "config.yaml", scratch / "run", dict(method.settings)
    recipe = settings.pop("recipe", "owlore_full_finetune")
    if method.runner == "owlore":
        config = OmegaConf.merge(load_config("smollm2/135M_owlore"), {"dataset_val": None})
        settings = {"owlore.resample_every": RESAMPLE_EVERY, **settings}
    else:
        config = load_config("smollm2/135M_lora")
        if recipe.startswith("full"):
            config.pop("save_adapter_weights_only")
            config.model = {"_component_": "owlore_tune.models.smollm2_135m"}
            config.optimizer_in_bwd = False
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False) | _common(run, data, output))
    for key, value in {"optimizer.lr": run.lr, **settings}.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, file)
    weights = output / (f"step_{run.steps}" if method.runner == "owlore" else "epoch_0")
    return ["tune", "run", recipe, "--config", str(file)], weights


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
        "metric_logger": {"_component_": "step_logger.StepLogger", "path": str(output.with_name("steps.jsonl"))},
    }  # fmt: skip


def held_out_loss(weights: Path, rows: list[dict[str, Any]]) -> float:
    """The mean loss over the tokens of the answers."""
    return _mean_loss(weights, _samples(rows))


def general_loss(weights: Path) -> float:
    """The mean loss over all tokens of 45 MMLU dev questions and their worked answers, which no run trains on."""
    tokenizer = HFChatTokenizer(str(fetch()), SEQ_LEN)
    texts = [f"{row['instruction']}\n{row['output']}" for row in mmlu_dev_rows("held_out")]
    return _mean_loss(weights, [_text(tokenizer.encode(text)[:SEQ_LEN]) for text in texts])


@torch.no_grad()
def divergence(weights: Path, rows: list[dict[str, Any]]) -> float:
    """KL(p₀ ‖ p) in nats, where p₀ is the model before training: the mean over the tokens of the prompts, which no run
    trains on."""
    models = [_model(directory) for directory in (fetch(), weights)]
    total, count = 0.0, 0
    for batch in _data([_prompt(sample) for sample in _samples(rows)]):
        tokens, is_token = batch["tokens"].to(DEVICE), batch["labels"].to(DEVICE) != CROSS_ENTROPY_IGNORE_IDX
        before, after = (F.log_softmax(model(tokens)[is_token].float(), dim=-1) for model in models)
        total += F.kl_div(after, before, reduction="sum", log_target=True).item()
        count += len(before)
    return total / count


def _samples(rows: list[dict[str, Any]]) -> list[Sample]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rows, file)
        file.flush()
        dataset = instruction_dataset(HFChatTokenizer(str(fetch()), SEQ_LEN), data_files=file.name)
    return [dataset[i] for i in range(len(dataset))]


def _text(tokens: list[int]) -> Sample:
    """A sample with a label at every token."""
    return {"tokens": tokens, "labels": tokens}


def _prompt(sample: Sample) -> Sample:
    """The tokens before the first label."""
    return _text(sample["tokens"][: [label != CROSS_ENTROPY_IGNORE_IDX for label in sample["labels"]].index(True)])


def _data(samples: list[Sample]) -> HeldOutData:
    """Batches of rows of similar lengths."""
    return HeldOutData(sorted(samples, key=lambda sample: len(sample["tokens"])), padded_collate_sft, batch_size=8)


def _model(weights: Path) -> Any:
    with torch.device("meta"):
        model = smollm2_135m()
    HFCheckpointer(str(weights), "LLAMA3_2").load_checkpoint(model, dtype=torch.float32, device=torch.device(DEVICE))
    return model.eval()


def _mean_loss(weights: Path, samples: list[Sample]) -> float:
    model, loss_fn = _model(weights), LinearCrossEntropyLoss()  # applies the head only to positions with a label
    loss_fn.set_model_output(model)
    return validation.held_out_loss(model, loss_fn, _data(samples), torch.device(DEVICE), ALONE)[0]
