"""Accuracy before and after fine-tuning on real tasks, for OwLore and torchtune's full fine-tuning with tuned lr.

    python benchmarks/commonsense.py --data DIR [--steps 300] [--output benchmarks/commonsense.md]

DIR holds ARC-Easy, openbookqa and boolq in LLM-Adapters' format, each with train.json and test.json. Both methods
train on the union of the three train files, with one row in 40 held out. The learning rate with the best held-out
accuracy is selected for each method, and only its checkpoint is evaluated on the test files. Results in --runs are
reused.
"""

import json
import math
import random
import shutil
import statistics
import subprocess
from collections import Counter
from pathlib import Path

from omegaconf import OmegaConf
from report import machine, parser, publish
from steps import recipe_config

from owlore_evals.results import format_score, read_scores
from owlore_tune.config import load_config
from owlore_tune.models.smollm2 import fetch

TASKS = ("ARC-Easy", "openbookqa", "boolq")
LEARNING_RATES = {"OwLore": (3e-4, 1e-3, 3e-3), "torchtune full": (1e-5, 3e-5, 1e-4)}
RECIPES = {"OwLore": "owlore_full_finetune", "torchtune full": "full_finetune_single_device"}


def split(data: Path, runs: Path) -> None:
    """Write train.json for all tasks, and the held-out rows of each task to dev/TASK.json."""
    (runs / "dev").mkdir(parents=True, exist_ok=True)
    train = []
    for task in TASKS:
        rows = json.loads((data / task / "train.json").read_text())
        random.Random(0).shuffle(rows)
        (runs / "dev" / f"{task}.json").write_text(json.dumps(rows[::40]))
        train += [row for number, row in enumerate(rows) if number % 40]
    (runs / "train.json").write_text(json.dumps(train))


def training_config(method: str, lr: float, runs: Path, output: Path, steps: int) -> dict:
    """Build the OwLore config or the torchtune config, with the same data, batches and schedule."""
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
    """Train if there is no checkpoint yet, and return the checkpoint directory."""
    output = runs / f"{method.split()[-1].lower()}_{lr:g}_{steps}_steps"
    checkpoint = output / (f"step_{steps}" if method == "OwLore" else "epoch_0")
    if not checkpoint.is_dir():
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        file = output / "config.yaml"
        OmegaConf.save(OmegaConf.create(training_config(method, lr, runs, output, steps)), file)
        with (output / "log.txt").open("w") as log:
            subprocess.run(["tune", "run", RECIPES[method], "--config", str(file)], stdout=log, stderr=log, check=True)
    return checkpoint


def evaluate(name: str, checkpoint: Path, files: dict[str, Path], runs: Path, limit: int | None) -> Path:
    """Evaluate log-likelihoods with the chat template if not done yet, and return the output directory."""
    output = runs / "eval" / (f"{name}_{limit}" if limit else name)
    if not (output / "manifest.json").is_file():
        command = ["tune", "run", "owlore_eval", "--config", "eval/local_choices", f"output_dir={output}"]
        command += [f"checkpointer.checkpoint_dir={checkpoint}"]
        command += [f"data_files.{task}={file}" for task, file in files.items()]
        command += [f"limit={limit}"] if limit else []
        subprocess.run(command, check=True)
    return output


def score(directory: Path) -> dict[str, tuple[float, float | None]]:
    """Return accuracy and standard error of each task and of the average."""
    scores = {task: value for (task, metric), value in read_scores(directory).items() if metric == "acc"}
    average, _ = scores["average"]
    return scores | {"average": (average, math.hypot(*(scores[task][1] for task in TASKS)) / len(TASKS))}


def commonest(files: dict[str, Path], limit: int | None) -> dict[str, tuple[float, None]]:
    """Return the accuracy of always giving the most common answer of each task."""
    shares = {}
    for task, file in files.items():
        answers = [row["answer"] for row in json.loads(file.read_text())[:limit]]
        shares[task] = Counter(answers).most_common(1)[0][1] / len(answers)
    return {task: (share, None) for task, share in {**shares, "average": statistics.fmean(shares.values())}.items()}


def chosen(method: str, runs: Path, steps: int) -> tuple[float, dict[float, float]]:
    """Return the learning rate with the best held-out average, and the averages of all learning rates."""
    dev = {task: runs / "dev" / f"{task}.json" for task in TASKS}
    averages = {}
    for lr in LEARNING_RATES[method]:
        checkpoint = train(method, lr, runs, steps)
        averages[lr] = score(evaluate(f"dev_{checkpoint.parent.name}", checkpoint, dev, runs, None))["average"][0]
    return max(averages, key=averages.__getitem__), averages


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--runs", type=Path, default=Path("runs/commonsense"))
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--limit", type=int, help="documents per test file (default: all)")
    args = arguments.parse_args()
    runs = args.runs.resolve()
    split(args.data, runs)
    test = {task: (args.data / task / "test.json").resolve() for task in TASKS}
    rows = {"always the most common answer": commonest(test, args.limit)}
    rows["before"] = score(evaluate("test_before", fetch(), test, runs, args.limit))
    tuning = []
    for method in LEARNING_RATES:
        lr, averages = chosen(method, runs, args.steps)
        tried = ", ".join(f"{rate:g}: {average:.4f}" for rate, average in averages.items())
        tuning.append(f"- {method}: {tried}; selected: {lr:g}")
        checkpoint = train(method, lr, runs, args.steps)
        rows[f"{method}, lr {lr:g}"] = score(
            evaluate(f"test_{checkpoint.parent.name}", checkpoint, test, runs, args.limit)
        )
    documents = f"the first {args.limit} documents of each test file" if args.limit else "all test documents"
    limit = f" --limit {args.limit}" if args.limit else ""
    lines = [
        "# Accuracy before and after fine-tuning",
        "",
        f"SmolLM2-135M-Instruct, float32, {args.steps} steps of 8 rows from the combined train files of "
        f"{', '.join(TASKS)}, cosine schedule; log-likelihood accuracy with the chat template on "
        f"{documents}, ± standard error; {machine()}. OwLore: configs/smollm2/135M_owlore.yaml with another lr. "
        f"Command: `python benchmarks/commonsense.py --data DIR --steps {args.steps}{limit}`.",
        "",
        "| model | " + " | ".join([*TASKS, "average"]) + " |",
        "|---|" + "---|" * (len(TASKS) + 1),
        *(
            f"| {name} | " + " | ".join(format_score(scores[task]) for task in [*TASKS, "average"]) + " |"
            for name, scores in rows.items()
        ),
        "",
        "Average accuracy on the held-out rows by learning rate:",
        "",
        *tuning,
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
