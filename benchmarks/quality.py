"""Held-out loss and accuracy of OwLore and other methods on SmolLM2, with tuned learning rates and several seeds.

    python benchmarks/quality.py --data DIR [--workers N] [--losses-only]

DIR holds math/ in LLM-Adapters' format. All methods train on the same packed rows in the same order:
512 tokens per step, cosine schedule with a warmup of 10 steps, gradients clipped to 1 (OwLore: after projection), no
weight decay, float32 weights with products in bfloat16 (see lib/bf16_products.py). The seed shuffles the data and
seeds the draws. OwLore draws layers every 50 steps; with all layers, it makes new bases every 50 steps. BAdam changes
its layer so that every layer trains once, which is its authors' rule, but at most every 3 steps. GaLore refreshes its
projections every 50 steps.

Learning rates are tuned on 100 held-out arithmetic problems in runs of 40 steps with one seed. The grid is extended
until its best value is not at the edge. With γ=5, OwLore has the learning rate of its config. Final runs take 100
steps, all methods with one seed, then with the next.
Held-out loss is computed from the saved weights with the same function for all methods. After final runs it is over 300
problems, which include those of the tuning. Accuracy is exact match of the last number in answers to the test problems,
which are decoded greedily in bfloat16.

Every finished run is a line of quality.jsonl and is not repeated. After a change of a method's settings, delete its
lines.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from methods import INT8, NF4
from omegaconf import OmegaConf
from tqdm import tqdm

from owlore_evals.jsonl import append_line, read_lines
from owlore_tune.checkpoints.checkpointer import HFCheckpointer
from owlore_tune.config_files import load_config
from owlore_tune.data.builders import instruction_dataset, read_file
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.models.smollm2 import fetch, smollm2_135m
from owlore_tune.run.manifest import versions

ROWS = Path(__file__).with_name("quality.jsonl")
HELD_OUT, HELD_OUT_OF_TUNING = 300, 100  # problems; the latter are the first of the former
SEQ_LEN, BATCH_SIZE = 512, 1
TUNING_STEPS, STEPS = 40, 100
RESAMPLE_EVERY = 50
BADAM_BLOCKS = 32  # the model's layers, and what is outside them
SEEDS = (0, 1, 2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as in lib/peers.py
MATH_TESTS = ("AddSub_test", "SingleEq_test", "MultiArith_test")
STEP_OF_GRID = 10**0.5


@dataclass(frozen=True)
class Method:
    """A way to train, with the learning rates to begin its tuning with."""

    runner: str  # torchtune: a recipe of torchtune; peer: lib/peers.py; owlore: our recipe
    settings: dict[str, Any]  # overrides of the config, or arguments of the runner
    lrs: tuple[float, ...] = ()  # a single one is not tuned
    tuned_as: str | None = None  # the method whose tuned learning rate is used instead


ALL_LAYERS = "OwLore, all layers, r=64, int8"
_ALL = {"owlore.num_active_layers": None, "owlore.score": "uniform", "owlore.update_gap": 50}
METHODS = {
    "torchtune full": Method("torchtune", {"recipe": "full_finetune_single_device"}, (1e-5, 3e-5, 1e-4, 3e-4)),
    "torchtune LoRA, r=16": Method("torchtune", {"recipe": "lora_finetune_single_device"}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "galore-torch, r=128": Method("peer", {"method": "galore", "every": 50}, (1e-5, 3e-5, 1e-4, 3e-4)),
    "BAdam": Method("peer", {"method": "badam"}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "OwLore, γ=5, r=128": Method("owlore", {}, (1e-3,)),
    ALL_LAYERS: Method("owlore", _ALL | INT8 | {"owlore.rank": 64}, (1e-4, 3e-4, 1e-3)),
    "OwLore, all layers, r=64": Method("owlore", _ALL | {"owlore.rank": 64}, tuned_as=ALL_LAYERS),
    "OwLore, all layers, r=128, int8": Method("owlore", _ALL | INT8, tuned_as=ALL_LAYERS),
    "OwLore, all layers, r=128, NF4": Method("owlore", _ALL | NF4, tuned_as=ALL_LAYERS),
}


@dataclass(frozen=True)
class Run:
    """The values that identify a run, together with the settings of its method."""

    method: str
    lr: float
    seed: int
    steps: int = STEPS

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


class Study:
    """Executes runs that are not in the results file yet.

    Args:
        data: directory with math/.
        threads: threads per run.
        answers: whether final runs answer the test problems.
        methods: by name.
        results: the results file.
    """

    def __init__(
        self, data: Path, threads: int, answers: bool, methods: dict[str, Method] = METHODS, results: Path = ROWS
    ) -> None:
        self._data = data
        self._methods = methods
        self._answers = answers
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).with_name("lib")), os.environ.get("PYTHONPATH", "")]
        )
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("medium")  # as in lib/bf16_products.py
        self._results = results
        self.rows = {row["key"]: row for row in read_lines(results)}

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of ``run``. Execute the run if there is none."""
        if not self._has(run):
            print(f"{time.strftime('%H:%M:%S')} {run.key}", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                self.rows[run.key] = self._run(run, Path(scratch))
            append_line(self._results, self.rows[run.key])
        return self.rows[run.key]

    def _has(self, run: Run) -> bool:
        return run.key in self.rows

    def _run(self, run: Run, scratch: Path) -> dict[str, Any]:
        started = time.perf_counter()
        train, held_out = self._split(run.seed, run.steps, scratch)
        config, weights = self._train(run, train, scratch)
        seconds = time.perf_counter() - started
        row = {"key": run.key, **asdict(run), "config": config, "train_seconds": seconds, "versions": versions()}
        row["held_out_loss"] = held_out_loss(weights, held_out)
        if run.steps != TUNING_STEPS and self._answers:
            row["correct"] = self._accuracy(weights, scratch)
        return row

    def _split(self, seed: int, steps: int, scratch: Path) -> tuple[Path, list[dict[str, Any]]]:
        """Return a file of training rows, shuffled by the seed, and the held-out rows."""
        rows = read_file(self._data / "math" / "train.json", "--data")
        random.Random(0).shuffle(rows)
        train = rows[HELD_OUT:]
        random.Random(seed).shuffle(train)
        file = scratch / "train.json"
        file.write_text(json.dumps(train))
        return file, rows[: HELD_OUT_OF_TUNING if steps == TUNING_STEPS else HELD_OUT]

    def _train(self, run: Run, train: Path, scratch: Path) -> tuple[Any, Path]:
        """Train, and return the config and the directory of the weights."""
        command, config, weights = self._prepare(run, train, scratch)
        self._call(command, scratch)
        return config, weights

    def _prepare(self, run: Run, train: Path, scratch: Path) -> tuple[list[str], Any, Path]:
        """The command of a run, its config, and the directory for the weights. The log is scratch/steps.jsonl."""
        method = self._methods[run.method]
        settings, output = method.settings, scratch / "run"
        if method.runner == "peer":
            every = settings.get("every", max(3, run.steps // BADAM_BLOCKS))
            command = [
                str(Path(__file__).with_name("lib") / "peers.py"), settings["method"], f"--model={fetch()}",
                f"--data={train}", f"--lr={run.lr}", f"--steps={run.steps}", f"--seed={run.seed}", f"--save={output}",
                "--warmup=10", "--clip=1.0", f"--batch-size={BATCH_SIZE}", f"--seq-len={SEQ_LEN}",
                f"--resample-every={every}", f"--output={scratch / 'steps.jsonl'}",
                f"--dtype={settings.get('dtype', 'fp32')}",
            ]  # fmt: skip
            shown = command[1:2] + [part for part in command[3:] if str(scratch) not in part]
            return command, {"command": shown}, output
        make = owlore_config if method.runner == "owlore" else torchtune_config
        config = make(run, settings, train, output)
        OmegaConf.save(OmegaConf.create(config), scratch / "config.yaml")
        recipe = settings.get("recipe", "owlore_full_finetune")
        command = ["tune", "run", recipe, "--config", str(scratch / "config.yaml")]
        weights = output / (f"step_{run.steps}" if method.runner == "owlore" else "epoch_0")
        return command, json.loads(json.dumps(config).replace(str(scratch), "SCRATCH")), weights

    def _accuracy(self, weights: Path, scratch: Path) -> dict[str, list[int]]:
        """Return [correct, total] for each test file."""
        output = scratch / "eval"
        command = ["tune", "run", "owlore_eval", "--config", "eval/local_math", f"output_dir={output}", "dtype=bf16"]
        command += [f"checkpointer.checkpoint_dir={weights}", f"tokenizer.path={fetch()}", "batch_size=64"]
        command += [f"data_files.{name}={self._data / 'math' / name}.json" for name in MATH_TESTS]
        self._call(command, scratch)
        (file,) = output.glob("results_*.json")
        results = json.loads(file.read_text())
        counts = {}
        for name in MATH_TESTS:
            total = results["n-samples"][name]["effective"]
            counts[name] = [round(results["results"][name]["acc,none"] * total), total]
        return counts

    def _call(self, command: list[str], scratch: Path) -> None:
        process = self._start(command, scratch)
        process.wait()
        self._check(process, scratch)

    def _start(self, command: list[str], scratch: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).with_name("lib") / "bf16_products.py"), *command]
        with (scratch / "log.txt").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)

    def _check(self, process: subprocess.Popen[bytes], scratch: Path) -> None:
        if process.returncode:
            command = " ".join(map(str, process.args))
            sys.exit(f"{command} failed:\n{(scratch / 'log.txt').read_text()[-3000:]}")

    def before(self) -> None:
        """Add a row for the model before training."""
        key = "before"
        if key in self.rows:
            return
        row: dict[str, Any] = {"key": key, "method": "before", "versions": versions()}
        with tempfile.TemporaryDirectory() as scratch:
            _, held_out = self._split(0, STEPS, Path(scratch))
            row["held_out_loss"] = held_out_loss(fetch(), held_out)
            row["correct"] = self._accuracy(fetch(), Path(scratch))
        self.rows[key] = row
        append_line(ROWS, row)

    def tuned(self, method: str) -> float:
        """Return the learning rate with the lowest held-out loss."""
        lrs = METHODS[method].lrs
        if len(lrs) == 1:
            return lrs[0]
        return best_of_grid(lrs, lambda lr: self.row(Run(method, lr, 0, steps=TUNING_STEPS))["held_out_loss"])


def common_config(run: Run, train: Path, output: Path) -> dict[str, Any]:
    """Return the fields that our config and torchtune's config share."""
    return {
        "output_dir": str(output),
        "tokenizer": {
            "_component_": "owlore_tune.data.HFChatTokenizer", "path": "${checkpointer.checkpoint_dir}",
            "max_seq_len": SEQ_LEN,
        },
        "dataset": {"_component_": "owlore_tune.data.instruction_dataset", "data_files": str(train), "packed": True},
        "batch_size": BATCH_SIZE, "gradient_accumulation_steps": 1, "shuffle": False, "seed": run.seed, "epochs": 1,
        "max_steps_per_epoch": run.steps, "clip_grad_norm": 1.0, "device": DEVICE, "dtype": "fp32",
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 10,
        },
        "metric_logger": {"_component_": "step_logger.StepLogger", "path": str(output.with_name("steps.jsonl"))},
    }  # fmt: skip


def owlore_config(run: Run, settings: dict[str, Any], train: Path, output: Path) -> dict[str, Any]:
    config = OmegaConf.merge(load_config("smollm2/135M_owlore"), {"dataset_val": None})
    plain = OmegaConf.to_container(config, resolve=False) | common_config(run, train, output)
    changed = OmegaConf.create(plain)
    for key, value in {"optimizer.lr": run.lr, "owlore.resample_every": RESAMPLE_EVERY, **settings}.items():
        OmegaConf.update(changed, key, value)
    return OmegaConf.to_container(changed, resolve=False)


def torchtune_config(run: Run, settings: dict[str, Any], train: Path, output: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(load_config("smollm2/135M_lora"), resolve=False)
    if settings["recipe"].startswith("full"):
        del config["save_adapter_weights_only"]
        config["model"] = {"_component_": "owlore_tune.models.smollm2_135m"}
        config["optimizer_in_bwd"] = False
    config |= common_config(run, train, output)
    config["dtype"] = settings.get("dtype", config["dtype"])
    config["optimizer"]["lr"] = run.lr
    return config


@torch.no_grad()
def held_out_loss(weights: Path, rows: list[dict[str, Any]], batch_size: int = 8) -> float:
    """Return the mean loss over the trained tokens of ``rows``, with one sample per row."""
    tokenizer = HFChatTokenizer(str(fetch()), SEQ_LEN)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rows, file)
        file.flush()
        dataset = instruction_dataset(tokenizer, data_files=file.name)
    samples = sorted((dataset[i] for i in range(len(dataset))), key=lambda sample: len(sample["tokens"]))
    with torch.device("meta"):
        model = smollm2_135m()
    HFCheckpointer(str(weights), "LLAMA3_2").load_checkpoint(model, dtype=torch.float32, device=torch.device(DEVICE))
    model.eval()
    loss_fn = LinearCrossEntropyLoss()  # applies the head only to trained positions
    loss_fn.set_model_output(model)
    total = count = 0.0
    for start in tqdm(range(0, len(samples), batch_size), desc="Held-out loss", leave=False):
        some = samples[start : start + batch_size]
        longest = max(len(sample["tokens"]) for sample in some)
        tokens = torch.tensor([sample["tokens"] + [0] * (longest - len(sample["tokens"])) for sample in some])
        labels = torch.tensor([sample["labels"] + [-100] * (longest - len(sample["labels"])) for sample in some])
        tokens, labels = tokens.to(DEVICE), labels.to(DEVICE)
        num_trained = (labels[:, 1:] != -100).sum().item()
        total += loss_fn(model(tokens)[:, :-1], labels[:, 1:]).item() * num_trained
        count += num_trained
    return total / count


def best_of_grid(lrs: Sequence[float], loss_of: Callable[[float], float]) -> float:
    """The learning rate with the lowest loss. The grid is extended until it is not at an edge."""
    losses = {lr: loss_of(lr) for lr in lrs}
    while (best := min(losses, key=lambda lr: losses[lr])) in (lowest := min(losses), max(losses)):
        further = rounded(best / STEP_OF_GRID if best == lowest else best * STEP_OF_GRID)
        losses[further] = loss_of(further)
    return best


def rounded(lr: float) -> float:
    """Round to 1 or 3 times a power of ten."""
    half_decades = round(2 * math.log10(lr))
    return float(f"{3 if half_decades % 2 else 1}e{half_decades // 2}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with math/")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--losses-only", action="store_true", help="do not answer the test problems")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    study = Study(args.data.resolve(), args.threads, not args.losses_only)
    study.before()
    with ThreadPoolExecutor(args.workers) as pool:
        tuned = [name for name, method in METHODS.items() if not method.tuned_as]
        lrs = dict(zip(tuned, pool.map(study.tuned, tuned), strict=True))
        lrs |= {name: lrs[method.tuned_as] for name, method in METHODS.items() if method.tuned_as}
        list(pool.map(study.row, [Run(method, lrs[method], seed) for seed in SEEDS for method in METHODS]))


if __name__ == "__main__":
    main()
