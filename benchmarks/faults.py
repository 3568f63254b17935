"""Kill runs at random moments, resume them until they finish, and compare with an uninterrupted run.

    python benchmarks/faults.py [--runs 30] [--signal KILL] [--model small|smollm2] [--weights FORMAT] [--output FILE]

Half of the kills come at a random time, half during a save. Final weights must be bit-identical, and the newest
checkpoint must be readable after every kill. Runs are forked from a process that has already imported everything, which
saves seconds per start. They run the recipe like `tune run` does.
"""

import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import transformers
from omegaconf import OmegaConf
from report import command, machine, parser, publish
from safetensors.torch import load_file
from tqdm import tqdm

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.checkpoints.sealed import verify
from owlore_tune.config import load_config
from owlore_tune.models.smollm2 import fetch
from owlore_tune.run.directory import RunDirectory
from owlore_tune.run.settings import TrainingSettings


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


def start(config: dict, output_dir: Path) -> int:
    """Fork a child that trains. Exit code: 0 if the run completed, 143 if SIGTERM stopped it, otherwise 1."""
    child = os.fork()
    if child:
        return child
    log = io.StringIO()
    status = 1
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


def kill_somewhere(child: int, output_dir: Path, seconds: float, number: int, rng: random.Random) -> str:
    """Kill at a random moment, or at a random moment during a save. Returns which of the two."""
    started = time.monotonic()
    if rng.random() < 0.5:
        moment, wait = "any", rng.uniform(0, seconds)
        while time.monotonic() - started < wait and not exited(child):
            time.sleep(0.002)
    else:
        moment, skip = "in a save", rng.randrange(3)
        seen: set[float] = set()
        while not exited(child):
            for partial in output_dir.glob("step_*.partial"):
                try:
                    seen.add(partial.stat().st_ino)
                except FileNotFoundError:
                    continue
            if len(seen) > skip:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.0005)
    if not exited(child):
        os.kill(child, number)
    return moment


def exited(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted(RunDirectory.existing(output_dir).steps.own()[-1].glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=30)
    arguments.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    arguments.add_argument("--model", choices=["small", "smollm2"], default="small")
    arguments.add_argument("--weights", choices=["full", "int8", "nf4"], default="full", help="format on the device")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    number = signal.Signals[f"SIG{args.signal}"]
    rng = random.Random(args.seed)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # the default lock is shared by all processes, and a killed child may hold it
    counts = {"kills": 0, "kills in a save": 0, "unreadable newest checkpoints": 0, "runs not bit-equal": 0}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = config_for(args.model, scratch, args.weights)
        started = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(start(config, scratch / "unbroken"), 0)[1]) == 0
        seconds = time.monotonic() - started
        expected = weights(scratch / "unbroken")
        for run in range(args.runs):
            output_dir = scratch / f"run_{run}"
            kills = 0
            while True:
                child = start(config, output_dir)
                moment = kill_somewhere(child, output_dir, seconds, number, rng) if kills < 4 else "not"
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if code == 0:
                    break
                assert code in (-number, 128 + number), f"a run failed with {code}"
                kills += 1
                counts["kills"] += 1
                # SIGKILL leaves the directory of an interrupted save; SIGTERM lets the save finish.
                partial = any(output_dir.glob("step_*.partial"))
                counts["kills in a save"] += partial or (number != signal.SIGKILL and moment == "in a save")
                for directory in RunDirectory.existing(output_dir).steps.own()[-1:]:
                    try:
                        verify(directory)
                    except Exception as error:
                        print(error)
                        counts["unreadable newest checkpoints"] += 1
            got = weights(output_dir)
            same = all(torch.equal(weight, got[key]) for key, weight in expected.items())
            counts["runs not bit-equal"] += not same
            print(f"run {run}: {kills} kills, {'bit-equal' if same else 'DIFFERENT'}", flush=True)
            shutil.rmtree(output_dir)
    lines = [
        f"# {args.runs} runs of a {args.model} model under SIG{args.signal}",
        "",
        f"Weights on the device: {args.weights}. Seed {args.seed}, up to 4 kills per run; {machine()}. "
        f"Command: {command()}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in counts.items()),
    ]
    publish(lines, args.output)
    sys.exit(json.dumps(counts) if counts["runs not bit-equal"] or counts["unreadable newest checkpoints"] else 0)


if __name__ == "__main__":
    main()
