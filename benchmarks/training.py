"""Step time and memory of training: OwLore and its peers, LLaMA-2-7B on a CPU, and several ranks.

    python benchmarks/training.py methods [--rounds 1] [--steps 12] [--rows NAME ...] [--output benchmarks/methods.md]
    python benchmarks/training.py llama2_7b [--rows NAME ...] [--output benchmarks/llama2_7b.md]
    python benchmarks/training.py distributed [--rounds 1] [--steps 12] [--output benchmarks/distributed.md]

Each row runs in a process of its own, which logs its steps, see lib/step_logger.py. A round has one run of each row:
with several rounds, noise of the machine affects all rows alike. All rows of a report have the same model, data and
dtype.

Step time is the time from one logged step to the next, without the first two. Methods with draws draw every 10 steps,
and OwLore with all layers makes new bases then. With 12 steps, the mean covers ten steps, one of them with new bases.
With all layers quantized, each step makes some of them. The backward pass ends at the lowest active layer, so a step's
time depends on the draw: OwLore draws uniformly, with the seed whose timed steps come nearest to the expected depth of
backward, and BAdam trains the two layers in the middle of the model. For memory, methods with draws also run with a
draw at every step: its peak is up to the second and the twentieth step. Memory is the resident size of the process on
the CPU, and the allocator's peak on CUDA.

llama2_7b needs 14 GB for random weights in /tmp/random. Each run loads them, scores the layers, trains three steps over
two draws, and saves. distributed measures the first of two ranks: GPUs if there are two, otherwise CPU processes.
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lib.random_weights import write_random
from lib.report import command, machine, parser, publish, table
from lib.tune_run import LIB, run_process
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training

from owlore_evals.jsonl import read_lines
from owlore_tune.config.load import load_config
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.models.smollm2 import fetch
from owlore_tune.training.plots import BLUE, ORANGE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESAMPLE_EVERY, GALORE_GAP = 10, 50  # steps between draws, and between GaLore's refreshes, in runs for time
ALL = {"owlore.num_active_layers": None, "owlore.train_embeddings": True, "owlore.train_output": True,
       "owlore.train_norm": True}  # fmt: skip
GAMMA_2, GAMMA_5 = ({"owlore.num_active_layers": number} for number in (2, 5))
FULL_RANK = {"owlore.rank": None}
INT8 = {"owlore.weights": "int8", "owlore.products": "int8"}
NF4 = {"owlore.weights": "nf4"}
UNIFORM = {"owlore.num_active_layers": None, "owlore.score": "uniform"}
EVERY = UNIFORM | {"owlore.rank": 64, "owlore.update_gap": RESAMPLE_EVERY}
EIGHT_BITS = {"optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 3e-4}}
LISA = UNIFORM | GAMMA_2 | FULL_RANK
OURS = {
    "OwLore, γ=2": GAMMA_2,
    "OwLore, γ=5": GAMMA_5,
    "OwLore, γ=2, full rank": GAMMA_2 | FULL_RANK,
    "OwLore, γ=5, full rank": GAMMA_5 | FULL_RANK,
    "OwLore, γ=2, int8": GAMMA_2 | INT8,
    "OwLore, γ=5, int8": GAMMA_5 | INT8,
    "OwLore, γ=2, NF4": GAMMA_2 | NF4,
    "OwLore, γ=5, NF4": GAMMA_5 | NF4,
    "OwLore, all layers, rank 64": EVERY,
    "OwLore, all layers, rank 64, int8": EVERY | INT8,
    "OwLore, all layers, rank 64, NF4": EVERY | NF4,
    "LISA, γ=2": ALL | LISA,
    "GaLore": ALL | {"owlore.side": "shape", "owlore.update_gap": GALORE_GAP},
    "full": ALL | FULL_RANK,
    "OwLore, γ=5, decoder of transformers": GAMMA_5 | {
        "checkpointer.model_type": "HF",
        "model": {"_component_": "owlore_tune.models.hf_decoder", "path": "${checkpointer.checkpoint_dir}"},
    },
}  # fmt: skip
TORCHTUNE = {"torchtune full": "full_finetune", "torchtune LoRA, r=16": "lora_finetune"}
PEERS = {"galore-torch": "galore", "BAdam": "badam"}  # on the transformers model
METHODS = [*OURS, *TORCHTUNE, *PEERS]
DRAWS = {row for row, changes in OURS.items() if changes["owlore.num_active_layers"]} | {"BAdam"}
ON_RANKS = ["OwLore, γ=2", "OwLore, γ=5", *TORCHTUNE]
ON_A_CPU = {  # rows of llama2_7b
    **{row: OURS[row] for row in ("OwLore, γ=5", "OwLore, γ=5, int8", "OwLore, γ=2, NF4", "OwLore, γ=5, NF4")},
    "OwLore, all layers, NF4, 8-bit moments": UNIFORM | NF4 | EIGHT_BITS,
    "LISA, γ=2, 8-bit moments": LISA | EIGHT_BITS | {"optimizer.bf16_stochastic_round": True},
}


@dataclass(frozen=True)
class Model:
    """A model and its training settings."""

    config: str  # our training config
    module: str  # model builder
    lora: str
    dtype: str
    batch_size: int
    checkpointing: bool
    num_layers: int
    seq_len: int = 512
    device: str = DEVICE

    def directory(self) -> Path:
        """The directory of the weights. Missing weights are created or downloaded."""
        if self.config.startswith("smollm2"):
            return fetch()
        directory = Path("/tmp/random", self.config.replace("/", "_"))
        if not (directory / "config.json").is_file():
            write_random(load_config(self.config), directory)
        return directory


LLAMA = "torchtune.models.llama2"
MODELS = {
    "smollm2": Model("smollm2/135M_owlore", "owlore_tune.models.smollm2_135m", "owlore_tune.models.lora_smollm2_135m",
                     "fp32", 2, False, 30),
    "llama2-7b": Model("llama2/7B_owlore", f"{LLAMA}.llama2_7b", f"{LLAMA}.lora_llama2_7b", "bf16", 1, True, 32),
}  # fmt: skip


@dataclass
class Result:
    """Measurements of one row."""

    seconds: list[float] = field(default_factory=list)  # per step, from the third on
    peak: float = 0.0  # GB
    after: list[float] = field(default_factory=list)  # GB, after 2 draws and after 20
    state: float = 0.0  # GB
    planned: float | None = None  # GB
    manifest: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)  # steps as our recipe records them

    @property
    def mean(self) -> float:
        return statistics.mean(self.seconds)


def run(row: str, model: Model, result: Result, steps: int, every: int = RESAMPLE_EVERY, ranks: int | None = None):
    """Run ``row``, and add its measurements to ``result``."""
    with tempfile.TemporaryDirectory(
        dir=None if model.config.startswith("smollm2") else model.directory().parent
    ) as name:
        scratch = Path(name)
        log = scratch / "steps.jsonl"
        peak = run_process(command_of(row, model, scratch, steps, every, ranks), log=scratch / "log.txt")
        lines, manifest = read_lines(log), scratch / "run" / "manifest.json"
        if manifest.is_file():
            result.manifest = json.loads(manifest.read_text())
            result.records = read_lines(scratch / "run" / "steps.jsonl")
            result.planned = result.manifest["memory_bytes"]["planned"]["total"] / 1e9
    of_training = model.device == "cuda" or ranks  # other processes measure it, or it is not that of one process
    result.peak = max(result.peak, lines[-1]["peak_memory"] if of_training else peak)
    if every == 1:
        result.after = [lines[1]["peak_memory"], lines[19]["peak_memory"]]
    else:
        result.seconds += [after["seconds"] - before["seconds"] for before, after in pairwise(lines[1:])]
    told = lines[-1].get("optimizer_state_gb")
    result.state = max(result.state, torchtune_state(row, model) if told is None else told)
    print(f"{row}: {result.seconds[-1:]} s, peak {result.peak:.2f} GB, after draws {result.after}", flush=True)


def command_of(row: str, model: Model, scratch: Path, steps: int, every: int, ranks: int | None) -> list[str]:
    """The command of a run that logs its steps to steps.jsonl in ``scratch``."""
    if row in PEERS:
        every = GALORE_GAP if row == "galore-torch" else every
        return [
            sys.executable, str(LIB / "peers.py"), PEERS[row], f"--model={model.directory()}", f"--steps={steps}",
            f"--resample-every={every}", f"--batch-size={model.batch_size}", f"--seq-len={model.seq_len}",
            f"--dtype={model.dtype}", f"--output={scratch / 'steps.jsonl'}", "--middle-blocks",
            *(["--checkpointing"] if model.checkpointing else []),
        ]  # fmt: skip
    made = their_config(row, model, ranks) if row in TORCHTUNE else our_config(row, model, every)
    common = {
        "output_dir": str(scratch / "run"),
        "tokenizer": {"_component_": "owlore_tune.data.HFChatTokenizer", "path": str(model.directory()),
                      "max_seq_len": model.seq_len},
        "dataset": {"_component_": "owlore_tune.data.mmlu_dev_dataset", "packed": True},
        "batch_size": model.batch_size, "gradient_accumulation_steps": 1, "shuffle": True, "epochs": 1,
        "max_steps_per_epoch": steps, "device": model.device, "dtype": model.dtype, "compile": False,
        "enable_activation_checkpointing": model.checkpointing,
        "metric_logger": {"_component_": "step_logger.StepLogger", "path": str(scratch / "steps.jsonl")},
    }  # fmt: skip
    cfg = OmegaConf.create(made | common)
    if row in DRAWS and row.startswith("OwLore") and steps > 3:
        set_typical_draws(cfg, model.num_layers, steps, every)
    OmegaConf.save(cfg, scratch / "config.yaml")
    recipe = (
        f"{TORCHTUNE[row]}_{'distributed' if ranks else 'single_device'}"
        if row in TORCHTUNE
        else "owlore_full_finetune"
    )
    if not ranks:
        return ["tune", "run", recipe, "--config", str(scratch / "config.yaml")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    on_gloo = ["torchtune_on_gloo"] if row in TORCHTUNE else []
    return [*torchrun, *on_gloo, recipe, "--config", str(scratch / "config.yaml")]


def our_config(row: str, model: Model, every: int) -> dict[str, Any]:
    made = OmegaConf.create({
        "model": row_model(row, model), "seed": 42,
        "checkpointer": {"_component_": "owlore_tune.checkpoints.HFCheckpointer"} | checkpointer(model),
        "owlore": {"resample_every": every, "calibration_batches": 2, "rank": 128},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-4, "weight_decay": 0.0, "fused": True},
        "loss": {"_component_": "owlore_tune.loss.LinearCrossEntropyLoss"},
    })  # fmt: skip
    for key, value in (OURS | ON_A_CPU)[row].items():
        OmegaConf.update(made, key, value, merge=False)
    return OmegaConf.to_container(made)


def their_config(row: str, model: Model, ranks: int | None) -> dict[str, Any]:
    made = {
        "model": row_model(row, model), "seed": 42,
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "output_dir": "${output_dir}",
            "checkpoint_files": sorted(file.name for file in model.directory().glob("*.safetensors")),
        } | checkpointer(model),
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "resume_from_checkpoint": False, "collate_fn": "torchtune.data.padded_collate_sft", "log_every_n_steps": 1,
        "lr_scheduler": None,
    }  # fmt: skip
    if row != "torchtune full":
        cosine = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
        made["lr_scheduler"] = {"_component_": cosine, "num_warmup_steps": 2}
        return made | {"save_adapter_weights_only": False}
    if DEVICE == "cuda" and not ranks:  # as in torchtune's 7B_full_low_memory; 7B with full AdamW does not fit on a GPU
        eight_bits = {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 2e-5}
        return made | {"optimizer": eight_bits, "optimizer_in_bwd": True}
    return made | {"optimizer_in_bwd": False}


def checkpointer(model: Model) -> dict[str, str]:
    kind = "LLAMA3_2" if model.config.startswith("smollm2") else "LLAMA2"
    return {"checkpoint_dir": str(model.directory()), "model_type": kind}


def row_model(row: str, model: Model) -> dict[str, Any]:
    if row != "torchtune LoRA, r=16":
        return {"_component_": model.module}
    return {
        "_component_": model.lora, "apply_lora_to_mlp": True, "lora_rank": 16, "lora_alpha": 32,
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    }  # fmt: skip


def torchtune_state(row: str, model: Model) -> float:
    """GB of optimizer state of torchtune's recipes, which do not log it, computed from the trained shapes."""
    with torch.device("meta"), training.set_default_dtype(training.get_dtype(model.dtype)):
        built = config.instantiate(OmegaConf.create(row_model(row, model)))
    trained = [p for name, p in built.named_parameters() if "lora" in name or row == "torchtune full"]
    if row == "torchtune full" and DEVICE == "cuda":
        return 2 * sum(p.numel() for p in trained) / 1e9  # 8-bit and paged: not all of it is on the device
    return 2 * sum(p.nbytes for p in trained) / 1e9


def set_typical_draws(cfg: DictConfig, num_layers: int, steps: int, every: int) -> None:
    """Set uniform draws, and the seed whose mean depth of backward, from the third step on, is nearest to the expected.

    The depth is the number of layers from the lowest active one to the top.
    """

    def depths(seed: int, count: int) -> list[int]:
        sampler = LayerSampler([1.0] * num_layers, cfg.owlore.num_active_layers, seed=seed)
        return [num_layers - min(sampler.draw()) for _ in range(count)]

    def error(seed: int) -> float:
        found = depths(seed, -(-steps // every))
        return abs(statistics.mean(found[step // every] for step in range(2, steps)) - expected)

    expected = statistics.mean(depths(0, 3000))
    cfg.owlore.score, cfg.seed = "uniform", min(range(300), key=error)


def ratios(results: dict[str, Result], others: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Columns with the mean step against that of other rows, and their cells by row."""
    others = [other for other in others if other in results]
    cells = {row: [f"{own.mean / results[other].mean:.2f}" for other in others] for row, own in results.items()}
    return [f"step / {other}" for other in others], cells


def methods(args: Any) -> list[str]:
    model = MODELS[args.model]
    fits = [*(row for row in OURS if row.startswith("OwLore")), *TORCHTUNE]  # on one GPU
    results = {row: Result() for row in args.rows or (METHODS if args.model == "smollm2" else fits)}
    for row, result in list(results.items()) * args.rounds:
        run(row, model, result, args.steps)
    for row in DRAWS & results.keys():
        run(row, model, results[row], 20, every=1)
    if args.output:
        draw(args.output.with_suffix(".png"), results)
    columns, against = ratios(results, ["torchtune full", "torchtune LoRA, r=16", "galore-torch"])
    rows = []
    for row, own in results.items():
        low, median, high = statistics.quantiles(own.seconds, n=4)
        cells = [row, f"{own.mean:.2f}", f"{median:.2f} ({low:.2f} to {high:.2f})"]
        cells += [f"{model.batch_size * model.seq_len / own.mean:.0f}", f"{own.peak:.2f}"]
        cells += [f"{memory:.2f}" for memory in own.after] or ["", ""]
        cells += [f"{own.state:.3f}", f"{own.peak / own.planned:.3f}" if own.planned else ""]
        rows.append(cells + against[row])
    return [
        "# OwLore and its peers",
        "",
        f"{args.model}, MMLU dev packed {model.batch_size} × {model.seq_len} tokens, {model.dtype}, rank 128 for "
        f"projected gradients, LoRA on all Linears; {args.rounds} round(s) of {args.steps} steps; {machine()}. The "
        "recipes are unmodified. The mean step includes basis refreshes of OwLore, one in ten steps, but not those of "
        f"GaLore, one in {GALORE_GAP} steps. OwLore's recipe makes malloc keep freed memory; the other programs run as "
        f"their authors ship them. Command: {command()}; its docstring describes the columns.",
        "",
        *table(
            ["run", "mean step, s", "median (quartiles)", "tokens/s", "peak memory, GB", "after 2 draws",
             "after 20 draws", "optimizer state, GB", "measured / planned", *columns], rows,
        ),
    ]  # fmt: skip


def llama2_7b(args: Any) -> list[str]:
    model, rows = replace(MODELS["llama2-7b"], device="cpu"), []
    for row in args.rows or ON_A_CPU:
        own = Result()
        run(row, model, own, steps=3, every=2)
        measured, seconds = own.manifest["memory_bytes"]["measured"], own.manifest["seconds"]
        state = measured["projected"] + measured["moments"] + measured["bases"]
        step = statistics.median(record["step_seconds"] - record["redraw_seconds"] for record in own.records)
        cells = [row, f"{own.peak:.2f}", f"{own.planned:.2f}", f"{own.peak / own.planned:.3f}", f"{state / 1e9:.2f}"]
        cells += [f"{step:.1f}", f"{seconds['load'] + seconds.get('score', 0.0):.0f}"]
        rows.append([*cells, f"{own.records[-1]['redraw_seconds']:.1f}"])
    return [
        "# LLaMA-2-7B on one machine",
        "",
        "Real shape in bfloat16, 1 × 512 tokens, activation checkpointing, embeddings and head frozen; load from disk, "
        f"score, 3 steps over 2 draws, save; {machine()}. Peak memory covers the whole process from start to exit. "
        f"Command: {command()}.",
        "",
        "Rank 128. The time of a step is the median of three without the draw. Two of the three make bases, and with "
        "all layers one of them. Loading includes scoring and quantizing. A redraw writes layers that leave, and "
        "quantizes them anew.",
        "",
        *table(
            ["run", "peak memory, GB", "planned, GB", "measured / planned", "A, bases and moments, GB", "step, s",
             "loading, s", "redraw, s"], rows,
        ),
    ]  # fmt: skip


def distributed(args: Any) -> list[str]:
    model, ranks = replace(MODELS["smollm2"], batch_size=1), 2
    results = {row: Result() for row in args.rows or ON_RANKS}
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    for row, result in list(results.items()) * args.rounds:
        run(row, model, result, args.steps, ranks=ranks)
    columns, against = ratios(results, list(TORCHTUNE))
    timed = [
        [row, f"{own.mean:.2f}", f"{statistics.median(own.seconds):.2f}",
         f"{ranks * model.seq_len / own.mean:.0f}", f"{own.peak:.2f}", *against[row]]
        for row, own in results.items()
    ]  # fmt: skip
    return [
        "# A step on several ranks",
        "",
        f"SmolLM2-135M, {ranks} ranks, MMLU dev packed {model.batch_size} × {model.seq_len} tokens per rank, "
        f"{model.dtype}, rank 128, LoRA on all Linears; {args.rounds} interleaved rounds of {args.steps} steps; "
        f"{machine()}. Command: {command()}.",
        "",
        *table(["run", "mean step, s", "median", "tokens/s", "peak memory per rank, GB", *columns], timed),
    ]


def draw(path: Path, results: dict[str, Result]) -> None:
    """Plot two bars per row: seconds per step, and GB of memory."""
    figure = Figure(figsize=(11, 0.4 * len(results) + 1.2), layout="constrained")
    rows = list(results)[::-1]
    seconds, memory = [results[row].mean for row in rows], [results[row].peak for row in rows]
    parts = ((seconds, "mean step, s", BLUE), (memory, "peak memory, GB", ORANGE))
    for axes, (values, label, colour) in zip(figure.subplots(1, 2, sharey=True), parts, strict=True):
        axes.bar_label(axes.barh(rows, values, color=colour), fmt="%.2f", padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=150)


def main() -> None:
    rows = {methods: METHODS, llama2_7b: ON_A_CPU, distributed: ON_RANKS}
    reports = {report.__name__: report for report in rows}
    arguments = parser(__doc__)
    arguments.add_argument("report", choices=reports)
    arguments.add_argument("--model", choices=MODELS, default="llama2-7b" if DEVICE == "cuda" else "smollm2")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--rows", nargs="+", metavar="NAME", help="rows to run (default: all)")
    args = arguments.parse_args()
    report = reports[args.report]
    if unknown := set(args.rows or []) - set(rows[report]):
        arguments.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(rows[report])}")
    publish(report(args), args.output)


if __name__ == "__main__":
    main()
