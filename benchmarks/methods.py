"""Step time, memory and optimizer state of OwLore, its settings and its peers, on the same model, data and dtype.

    python benchmarks/methods.py [--rounds 1] [--steps 12] [--output benchmarks/methods.md] [--model llama2-7b]

Each row runs in a separate process. A round has one run of each row: with several rounds, noise of the machine affects
all rows alike. There are two kinds of runs:

- time: seconds between two logged steps, without the first two. Methods with draws draw every 10 steps, and OwLore with
  all layers makes new bases then. With 12 steps, the mean covers ten steps, one of them with new bases. With all layers
  quantized, each step makes some of them. The backward pass ends at the lowest active layer, so a step's time depends
  on the draw: OwLore has the seed whose timed steps come nearest to the expected depth of backward, and BAdam trains
  the two layers in the middle of the model.
- memory, only for methods with draws: a draw at every step; peak memory up to the second and the twentieth step.

Memory is the resident size of the process on the CPU, and the allocator's peak on CUDA.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lib.report import command, machine, parser, publish
from lib.tune_run import run_process, tune_run
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training

from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.models.smollm2 import fetch
from owlore_tune.training.plots import BLUE, ORANGE

ALL = {"owlore.num_active_layers": None, "owlore.train_embeddings": True, "owlore.train_output": True,
       "owlore.train_norm": True}  # fmt: skip
LISA = ALL | {"owlore.num_active_layers": 2, "owlore.score": "uniform", "owlore.rank": None}
INT8 = {"owlore.weights": "int8", "owlore.products": "int8"}
NF4 = {"owlore.weights": "nf4"}
RESAMPLE_EVERY = 10  # in runs for time
EVERY = {"owlore.num_active_layers": None, "owlore.score": "uniform", "owlore.rank": 64,
         "owlore.update_gap": RESAMPLE_EVERY}  # fmt: skip
GALORE_GAP = 50  # steps between refreshes
OURS = {
    "OwLore, γ=2": {"owlore.num_active_layers": 2},
    "OwLore, γ=5": {"owlore.num_active_layers": 5},
    "OwLore, γ=2, full rank": {"owlore.num_active_layers": 2, "owlore.rank": None},
    "OwLore, γ=5, full rank": {"owlore.num_active_layers": 5, "owlore.rank": None},
    "OwLore, γ=2, int8": {"owlore.num_active_layers": 2, **INT8},
    "OwLore, γ=5, int8": {"owlore.num_active_layers": 5, **INT8},
    "OwLore, γ=2, NF4": {"owlore.num_active_layers": 2, **NF4},
    "OwLore, γ=5, NF4": {"owlore.num_active_layers": 5, **NF4},
    "OwLore, all layers, rank 64": EVERY,
    "OwLore, all layers, rank 64, int8": EVERY | INT8,
    "OwLore, all layers, rank 64, NF4": EVERY | NF4,
    "LISA, γ=2": LISA,
    "GaLore": ALL | {"owlore.side": "shape", "owlore.update_gap": GALORE_GAP},
    "full": ALL | {"owlore.rank": None},
    "OwLore, γ=5, decoder of transformers": {
        "owlore.num_active_layers": 5, "checkpointer.model_type": "HF",
        "model": {"_component_": "owlore_tune.models.hf_decoder", "path": "${checkpointer.checkpoint_dir}"},
    },
}  # fmt: skip
TORCHTUNE = {"torchtune full": "full_finetune_single_device", "torchtune LoRA, r=16": "lora_finetune_single_device"}
# These run on the transformers model. The last is our reimplementation of LISA's published code.
PEERS = {"galore-torch": "galore", "BAdam": "badam", "LISA as published, reimplemented": "lisa"}
ROWS = [*OURS, *TORCHTUNE, *PEERS]
DRAWS = {row for row, changes in OURS.items() if changes["owlore.num_active_layers"]}
DRAWS |= {"BAdam", "LISA as published, reimplemented"}


@dataclass(frozen=True)
class Model:
    """A model and its training settings."""

    config: str  # our training config
    module: str  # model builder
    lora: str
    model_type: str
    tokenizer: dict
    dtype: str
    batch_size: int
    seq_len: int
    checkpointing: bool

    def directory(self) -> Path:
        """Return the directory of the weights. Missing weights are created or downloaded."""
        if self.config.startswith("smollm2"):
            return fetch()
        directory = Path("/tmp/random/Llama-2-7b-hf")
        if not (directory / "config.json").is_file():
            subprocess.run(["owlore", "random", "--config", self.config, "--output", directory], check=True)
        return directory


MODELS = {
    "smollm2": Model(
        "smollm2/135M_owlore", "owlore_tune.models.smollm2_135m", "owlore_tune.models.lora_smollm2_135m", "LLAMA3_2",
        {"_component_": "owlore_tune.data.HFChatTokenizer", "path": "${checkpointer.checkpoint_dir}"},
        "fp32", 2, 512, False,
    ),
    "llama2-7b": Model(
        "llama2/7B_owlore", "torchtune.models.llama2.llama2_7b", "torchtune.models.llama2.lora_llama2_7b", "LLAMA2",
        {"_component_": "owlore_tune.data.HFChatTokenizer", "path": "${checkpointer.checkpoint_dir}",
         "chat_template": "plain"},
        "bf16", 1, 512, True,
    ),
}  # fmt: skip


@dataclass
class Result:
    """Measurements of one row."""

    tokens: int  # per step
    seconds: list[float] = field(default_factory=list)  # per step
    peak: float = 0.0  # GB
    after: tuple[float, float] | None = None  # GB, after 2 draws and after 20
    state: float = 0.0  # GB
    planned: float | None = None  # GB

    def summary(self) -> str:
        median = statistics.median(self.seconds) if self.seconds else float("nan")
        return f"{median:.2f} s, peak {self.peak:.2f} GB, after draws {self.after}"


def row_config(row: str, model: Model, scratch: Path, steps: int, resample_every: int) -> dict:
    """Build the config of a row that runs a recipe."""
    checkpointer = {"checkpoint_dir": str(model.directory()), "model_type": model.model_type}
    common = {
        "output_dir": str(scratch / "run"),
        "tokenizer": model.tokenizer | {"max_seq_len": model.seq_len},
        "dataset": {"_component_": "owlore_tune.data.mmlu_dev_dataset", "packed": True},
        "batch_size": model.batch_size,
        "gradient_accumulation_steps": 1,
        "shuffle": True,
        "seed": 42,
        "epochs": 1,
        "max_steps_per_epoch": steps,
        "device": device(),
        "dtype": model.dtype,
        "compile": False,
        "enable_activation_checkpointing": model.checkpointing,
        "metric_logger": {"_component_": "step_logger.StepLogger", "path": str(scratch / "steps.jsonl")},
    }
    if row in OURS:
        ours = OmegaConf.create(common | {
            "model": row_model(row, model),
            "checkpointer": {"_component_": "owlore_tune.checkpoints.HFCheckpointer", **checkpointer},
            "owlore": {"resample_every": resample_every, "calibration_batches": 2, "rank": 128},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-4, "weight_decay": 0.0, "fused": True},
            "loss": {"_component_": "owlore_tune.loss.LinearCrossEntropyLoss"},
        })  # fmt: skip
        for key, value in OURS[row].items():
            OmegaConf.update(ours, key, value)
        if ours.owlore.num_active_layers is not None and row.startswith("OwLore"):
            set_typical_draws(ours, scratch, steps, resample_every)
        return OmegaConf.to_container(ours)
    weights = sorted(file.name for file in model.directory().glob("*.safetensors"))
    theirs = common | {
        "model": row_model(row, model),
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_files": weights,
            "output_dir": "${output_dir}", **checkpointer,
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "resume_from_checkpoint": False,
        "collate_fn": "torchtune.data.padded_collate_sft",
        "lr_scheduler": None,
        "log_every_n_steps": 1,
    }  # fmt: skip
    if row == "torchtune full":
        if device() == "cuda":  # as in torchtune's 7B_full_low_memory; 7B with full AdamW does not fit on a GPU
            theirs["optimizer"] = {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 2e-5}
        return theirs | {"optimizer_in_bwd": device() == "cuda"}
    return theirs | {
        "save_adapter_weights_only": False,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2,
        },
    }  # fmt: skip


def set_typical_draws(ours: DictConfig, scratch: Path, steps: int, resample_every: int) -> None:
    """Set a seed whose draws are typical, and the scores that it depends on."""
    key = (ours.checkpointer.checkpoint_dir, ours.batch_size)
    if key not in _scores:
        OmegaConf.save(ours, scratch / "score.yaml")
        file = scratch / "scores.json"
        run_process(
            ["owlore", "score", "--config", str(scratch / "score.yaml"), "--output", str(file)], scratch / "score.log"
        )
        _scores[key] = file.read_text()
    (scratch / "known_scores.json").write_text(_scores[key])
    ours.owlore.scores_file = str(scratch / "known_scores.json")
    scores = json.loads(_scores[key])["scores"]
    ours.seed = typical_seed(scores, ours.owlore.num_active_layers, steps, resample_every)


_scores: dict[tuple[str, int], str] = {}  # files of scores by model and calibration data


def typical_seed(scores: list[float], num_active: int, steps: int, resample_every: int) -> int:
    """The seed for which the mean depth of backward, in the steps from the third on, is nearest to its expectation.

    The depth is the number of layers from the lowest active one to the top.
    """

    def depths(seed: int, count: int) -> list[int]:
        sampler = LayerSampler(scores, num_active, seed=seed)
        return [len(scores) - min(sampler.draw()) for _ in range(count)]

    expected = statistics.mean(depths(0, 3000))
    draws = range(-(-steps // resample_every))

    def error(seed: int) -> float:
        found = depths(seed, len(draws))
        return abs(statistics.mean(found[step // resample_every] for step in range(2, steps)) - expected)

    return min(range(300), key=error)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(row: str, model: Model, steps: int, resample_every: int) -> tuple[list[dict], float, dict]:
    """Return the step log, the peak memory in GB, and the manifest (our rows only)."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if row in PEERS:
            every = GALORE_GAP if row == "galore-torch" else resample_every
            peak = run_process(
                [sys.executable, str(Path(__file__).with_name("lib") / "peers.py"), PEERS[row],
                 f"--model={model.directory()}", f"--steps={steps}", f"--resample-every={every}",
                 f"--batch-size={model.batch_size}", f"--seq-len={model.seq_len}", f"--dtype={model.dtype}",
                 f"--output={scratch / 'steps.jsonl'}", "--middle-blocks",
                 *(["--checkpointing"] if model.checkpointing else [])],
                log=scratch / "log.txt",
            )  # fmt: skip
        else:
            config = scratch / "config.yaml"
            OmegaConf.save(OmegaConf.create(row_config(row, model, scratch, steps, resample_every)), config)
            peak = tune_run(TORCHTUNE.get(row, "owlore_full_finetune"), config, log=scratch / "log.txt")
        lines = [json.loads(line) for line in (scratch / "steps.jsonl").read_text().splitlines()]
        manifest = scratch / "run" / "manifest.json"
        content = json.loads(manifest.read_text()) if manifest.is_file() else {}
    return lines, lines[-1]["peak_memory"] if device() == "cuda" else peak, content


def step_seconds(lines: list[dict]) -> list[float]:
    """Return the seconds of each step from the third on."""
    clock = [line["seconds"] for line in lines]
    return [after - before for before, after in zip(clock, clock[1:], strict=False)][1:]


def time_row(row: str, model: Model, steps: int, result: Result) -> None:
    lines, peak, manifest = run(row, model, steps, resample_every=RESAMPLE_EVERY)
    result.seconds += step_seconds(lines)
    result.peak = max(result.peak, peak)
    note_state(row, model, lines, manifest, result)


def weigh_row(row: str, model: Model, result: Result) -> None:
    lines, peak, manifest = run(row, model, steps=20, resample_every=1)
    result.after = lines[1]["peak_memory"], lines[19]["peak_memory"]
    result.peak = max(result.peak, peak)
    note_state(row, model, lines, manifest, result)


def note_state(row: str, model: Model, lines: list[dict], manifest: dict, result: Result) -> None:
    """Record the largest optimizer state, and the memory plan of our rows."""
    if row in OURS:
        result.planned = manifest["memory_bytes"]["planned"]["total"] / 1e9
    told = lines[-1].get("optimizer_state_gb")
    result.state = max(result.state, torchtune_state(row, model) if told is None else told)


def torchtune_state(row: str, model: Model) -> float:
    """GB of optimizer state of torchtune's recipes, which do not log it, computed from the trained shapes."""
    with torch.device("meta"), training.set_default_dtype(training.get_dtype(model.dtype)):
        built = config.instantiate(OmegaConf.create(row_model(row, model)))
    trained = [p for name, p in built.named_parameters() if "lora" in name or row == "torchtune full"]
    if row == "torchtune full" and device() == "cuda":
        return 2 * sum(p.numel() for p in trained) / 1e9  # 8-bit and paged: not all of it is on the device
    return 2 * sum(p.nbytes for p in trained) / 1e9


def row_model(row: str, model: Model) -> dict:
    if row != "torchtune LoRA, r=16":
        return {"_component_": model.module}
    return {
        "_component_": model.lora, "apply_lora_to_mlp": True, "lora_rank": 16, "lora_alpha": 32,
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    }  # fmt: skip


def table(results: dict[str, Result]) -> list[str]:
    mean = {row: statistics.mean(result.seconds) for row, result in results.items()}
    against = [row for row in ("torchtune full", "torchtune LoRA, r=16", "galore-torch") if row in results]
    lines = [
        "| run | mean step, s | median (quartiles) | tokens/s | peak memory, GB | after 2 draws | after 20 draws "
        "| optimizer state, GB | measured / planned | " + " | ".join(f"step / {row}" for row in against) + " |",
        "|---" * (9 + len(against)) + "|",
    ]
    for row, result in results.items():
        low, median, high = statistics.quantiles(result.seconds, n=4)
        planned = f"{result.peak / result.planned:.3f}" if result.planned else ""
        after = [f"{memory:.2f}" for memory in result.after] if result.after else ["", ""]
        lines.append(
            f"| {row} | {mean[row]:.2f} | {median:.2f} ({low:.2f} to {high:.2f}) | {result.tokens / mean[row]:.0f} "
            f"| {result.peak:.2f} | {after[0]} | {after[1]} | {result.state:.3f} | {planned} | "
            + " | ".join(f"{mean[row] / mean[other]:.2f}" for other in against)
            + " |"
        )
    return lines


def draw(path: Path, results: dict[str, Result]) -> None:
    """Plot two bars per row: seconds per step, and GB of memory."""
    figure = Figure(figsize=(11, 0.4 * len(results) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = list(results)[::-1]
    for axes, values, label, colour in (
        (left, [statistics.mean(results[row].seconds) for row in rows], "mean step, s", BLUE),
        (right, [results[row].peak for row in rows], "peak memory, GB", ORANGE),
    ):
        bars = axes.barh(rows, values, color=colour)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=MODELS, default="llama2-7b" if torch.cuda.is_available() else "smollm2")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--rows", nargs="*", choices=ROWS, help="rows to run (default: all that fit on one GPU)")
    args = arguments.parse_args()
    model = MODELS[args.model]
    fits = [*(row for row in OURS if row.startswith("OwLore")), *TORCHTUNE]
    rows = args.rows or (ROWS if args.model == "smollm2" else fits)
    results = {row: Result(tokens=model.batch_size * model.seq_len) for row in rows}
    for number in range(args.rounds):
        for row, result in results.items():
            time_row(row, model, args.steps, result)
            print(f"round {number + 1}: {row}: {result.summary()}", flush=True)
    for row, result in results.items():
        if row in DRAWS:
            weigh_row(row, model, result)
        print(f"{row}: {result.summary()}", flush=True)
    lines = [
        "# OwLore and its peers",
        "",
        f"{args.model}, MMLU dev packed {model.batch_size} × {model.seq_len} tokens, {model.dtype}, rank 128 for "
        f"projected gradients, LoRA on all Linears; {args.rounds} round(s) of {args.steps} steps; {machine()}. The "
        "recipes are unmodified. The mean step includes basis refreshes of OwLore, one in ten steps, but not those of "
        f"GaLore, one in {GALORE_GAP} steps. OwLore's recipe makes malloc keep freed memory; the other programs run as "
        "their authors ship them. "
        f"Command: {command()}; its docstring describes the columns.",
        "",
        *table(results),
    ]
    publish(lines, args.output)
    if args.output:
        draw(args.output.with_suffix(".png"), results)


if __name__ == "__main__":
    main()
