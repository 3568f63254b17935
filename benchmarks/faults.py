"""Kill runs of a small model, or fill their disk, resume them, and compare with an uninterrupted run.

    python benchmarks/faults.py [--runs 100] [--kinds NAME ...] [--output benchmarks/faults.md]

Each run has one fault, right before an operation on a file in its directory: opening a file to write, renaming, linking
or removing a file, making or removing a directory. The faults are spread evenly over all operations of a run. A killed
process gets SIGKILL. On two ranks, only the first is killed, and the other has to exit with an error, if it still has
work. On a full disk, no file can grow over 4 KB from then on: runs may end with an error, or finish if only records or
pictures are lost.

All checkpoints that are left must be readable, one of those from before the fault must be among them, and no temporary
file may be left in the end. Final weights must be bit-identical. Runs have 12 steps with a checkpoint every 2, a draw
every 3 and new bases every 2. They are forked from a process that has already imported everything, which saves seconds
per start.
"""

import io
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lib.random_weights import write_random
from lib.report import command, machine, parser, publish, table
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tqdm import tqdm

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.checkpoints.steps import verify
from owlore_tune.config.load import load_config
from owlore_tune.distributed.launch import process_group
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.output_dir import RunDirectory

EVENTS = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"}
KINDS = {  # format of weights, ranks, and whether the disk fills
    "killed, full weights": ("full", 1, False),
    "killed, int8": ("int8", 1, False),
    "killed, NF4": ("nf4", 1, False),
    "first of two ranks killed": ("full", 2, False),
    "full disk, full weights": ("full", 1, True),
    "full disk, int8": ("int8", 1, True),
}


@dataclass
class Found:
    """A row of the table."""

    runs: int = 0
    in_a_save: int = 0
    unreadable: int = 0
    not_bit_equal: int = 0
    leftovers: int = 0


def try_faults(name: str, scratch: Path, runs: int) -> Found:
    weights_format, num_ranks, fills = KINDS[name]
    config, notes, found = config_for(scratch, weights_format), scratch / "notes", Found()
    assert train(config, scratch / "unbroken", num_ranks, notes) == [0] * num_ranks
    operations, expected = notes.read_text().splitlines(), weights(scratch / "unbroken")
    for number in range(runs):
        place, output_dir = number * len(operations) // runs, scratch / f"run_{number}"
        codes = train(config, output_dir, num_ranks, notes, place, fill_disk if fills else kill)
        if not fills:
            assert codes[0] == -signal.SIGKILL, f"operation {place}: the run ended with {codes}"
            assert 0 not in codes or (output_dir / "step_12").is_dir(), f"a rank did not notice: {codes}"
        found.runs += 1
        found.in_a_save += any(output_dir.glob("step_*.partial"))
        found.unreadable += not readable(output_dir, notes.read_text().splitlines()[-1].split())
        assert train(config, output_dir, num_ranks, notes) == [0] * num_ranks
        last = weights(output_dir)
        found.not_bit_equal += not all(torch.equal(weight, last[key]) for key, weight in expected.items())
        names = [path.name for path in output_dir.rglob("*")]
        found.leftovers += any(part in name for name in names for part in (".partial", ".disc", ".tmp"))
        print(operations[place], found, flush=True)
        shutil.rmtree(output_dir)
    return found


def readable(output_dir: Path, before: list[str]) -> bool:
    """Whether all checkpoints are readable, and the newest from before the fault is still there or has a successor."""
    left = RunDirectory.existing(output_dir).steps.own() if output_dir.is_dir() else []
    try:
        for directory in left:
            verify(directory)
    except Exception as error:
        print(error)
        return False
    steps = {int(directory.name.removeprefix("step_")) for directory in left}
    return not before or any(step >= int(before[-1].removeprefix("step_")) for step in steps)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """Let no file of this process grow over 4 KB. Python ignores the signal that comes with the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def train(
    config: dict[str, Any], output_dir: Path, num_ranks: int, notes: Path, place: int | None = None,
    fault: Callable[[], None] = kill,
) -> list[int]:  # fmt: skip
    """Train in a forked child for each rank. Returns their exit codes.

    The first rank calls ``fault`` before its operation number ``place``. It writes the names of its operations to
    ``notes``, and then those of the checkpoints before the fault.
    """
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    children = []
    for rank in range(num_ranks):
        if not (child := os.fork()):
            if num_ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if rank == 0:
                call_before_operation(output_dir, notes, place, fault)
            train_here(config, output_dir)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def call_before_operation(output_dir: Path, notes: Path, place: int | None, fault: Callable[[], None]) -> None:
    told, count = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0

    def before(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if not concerns(event, args, str(output_dir)):
            return
        count += 1
        if count - 1 == place:
            steps = RunDirectory.existing(output_dir).steps.own() if output_dir.is_dir() else []
            os.write(told, f"{' '.join(path.name for path in steps)}\n".encode())
            fault()
        elif place is None or count <= place:
            os.write(told, f"{event}\n".encode())

    sys.addaudithook(before)


def concerns(event: str, args: tuple[Any, ...], directory: str) -> bool:
    """Whether an event of Python's audit is an operation that changes files in ``directory``."""
    if event == "open":
        path, _, flags = args
        return isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) > 0 and str(path).startswith(directory)
    in_open_directory = event in ("os.remove", "os.rmdir") and any(
        isinstance(arg, int) and arg >= 0 for arg in args[1:]
    )
    return event in EVENTS and (in_open_directory or any(str(arg).startswith(directory) for arg in args))


def train_here(config: dict[str, Any], output_dir: Path) -> None:
    """Train quietly, and end this process. Its exit code is 0 if the run completed."""
    status = 1
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            settings = TrainingSettings.from_config(OmegaConf.create(config | {"output_dir": str(output_dir)}))
            with process_group(settings.device, settings.cfg.dist_timeout_s):
                recipe = OwLoreFullFinetuneRecipe(settings)
                recipe.setup()
                recipe.train()
                recipe.cleanup()
        status = 0
    except BaseException as error:
        print(f"the run ended: {error!r:.300}", flush=True)
    finally:
        os._exit(status)


def config_for(scratch: Path, weights_format: str) -> dict[str, Any]:
    """A config for a random 4-layer LLaMA of 1 MB, which is saved below ``scratch``."""
    overrides = [
        "model._component_=torchtune.models.llama2.llama2", "model.vocab_size=2000", "model.num_layers=4",
        "model.num_heads=4", "model.num_kv_heads=2", "model.embed_dim=64", "model.intermediate_dim=96",
        "model.max_seq_len=512", "dataset=owlore_tune.data.mmlu_dev_dataset", "~dataset.source", "~dataset.data_files",
        "gradient_accumulation_steps=2", "max_steps_per_epoch=6", "epochs=2", "tokenizer.max_seq_len=128",
        "owlore.resample_every=3", "owlore.outlier_threshold=5", "owlore.calibration_batches=2",
        "owlore.update_gap=2", "owlore.rank=8", "owlore.num_active_layers=2", f"owlore.weights={weights_format}",
        "save_every_n_steps=2", "keep_last_n=2", "device=cpu", "dtype=fp32", "dist_timeout_s=30",
        "resume_from_checkpoint=true", f"checkpointer.checkpoint_dir={scratch / 'model'}",
    ]  # fmt: skip
    cfg = load_config("llama2/7B_owlore", overrides)
    write_random(cfg, scratch / "model")
    return OmegaConf.to_container(cfg, resolve=False)


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted(RunDirectory.existing(output_dir).steps.own()[-1].glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=100)
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = arguments.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # the default lock is shared by all processes, and a killed child may hold it
    columns = ["", "runs", "in a save", "unreadable checkpoints", "not bit-equal", "leftovers"]
    head = ["# Runs that are killed and resumed", "", f"{machine()}. Command: {command()}.", ""]
    rows, bad = [], 0
    for name in args.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            found = try_faults(name, Path(scratch).resolve(), args.runs)
        rows.append([name, *map(str, vars(found).values())])
        publish([*head, *table(columns, rows)], args.output)  # after every row, because each takes minutes
        bad += found.unreadable + found.not_bit_equal + found.leftovers
    sys.exit(f"{bad} faults" if bad else 0)


if __name__ == "__main__":
    main()
