"""Kill runs right before an operation on a file, resume them, and compare with an uninterrupted run.

    python benchmarks/faults_files.py [--kills 102] [--output FILE]

The operations are those in the run's directory: opening a file to write, renaming, linking and removing files, making
and removing directories. The kills are spread evenly over all operations of a run, for weights in full precision,
int8 and NF4. After each kill, the newest checkpoint must be readable. The resumed run must end with the same bits, and
leave no temporary file.
"""

import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import transformers
from faults import config_for, weights
from omegaconf import OmegaConf
from report import command, machine, parser, publish
from tqdm import tqdm

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.checkpoints.sealed import verify
from owlore_tune.run.directory import RunDirectory
from owlore_tune.run.settings import TrainingSettings

FORMATS = ("full", "int8", "nf4")
EVENTS = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"}


def train(config: dict, output_dir: Path, kill_before: int | None, counter: Path) -> int:
    """Train in a forked child, which kills itself before operation ``kill_before``. Returns its exit code.

    The child writes the name of each operation to ``counter``.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log, status = io.StringIO(), 1
    told = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def before(event: str, args: tuple) -> None:
        nonlocal count
        if not _concerns(event, args, str(output_dir)):
            return
        if count == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(told, f"{event}\n".encode())

    try:
        with redirect_stdout(log), redirect_stderr(log):
            sys.addaudithook(before)
            cfg = OmegaConf.create(config | {"output_dir": str(output_dir)})
            recipe = OwLoreFullFinetuneRecipe(TrainingSettings.from_config(cfg))
            recipe.setup()
            recipe.train()
            recipe.cleanup()
        status = 0
    except BaseException as error:
        sys.__stderr__.write(f"{log.getvalue()[-2000:]}\n{error!r}\n")
    os._exit(status)


def _concerns(event: str, args: tuple, directory: str) -> bool:
    """Whether an event of Python's audit is an operation that changes files in ``directory``."""
    if event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and str(path).startswith(directory)
    if event not in EVENTS:
        return False
    in_open_directory = any(isinstance(arg, int) and arg >= 0 for arg in args[1:] if event in ("os.remove", "os.rmdir"))
    return in_open_directory or any(str(arg).startswith(directory) for arg in args)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=102)
    args = arguments.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # the default lock is shared by all processes, and a killed child may hold it
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        counter = scratch / "operations"
        for format_ in FORMATS:
            config = config_for("small", scratch / format_, format_)
            assert train(config, scratch / format_ / "unbroken", None, counter) == 0
            operations = counter.read_text().split()
            expected = weights(scratch / format_ / "unbroken")
            kinds: Counter[str] = Counter()
            found = dict.fromkeys(("unreadable checkpoints", "not bit-equal", "leftovers"), 0)
            kills = args.kills // len(FORMATS)
            for number in range(kills):
                place = number * len(operations) // kills
                output_dir = scratch / format_ / f"run_{number}"
                code = train(config, output_dir, place, counter)
                assert code == -signal.SIGKILL, f"operation {place}: the run ended with {code}"
                kinds[operations[place]] += 1
                for directory in RunDirectory.existing(output_dir).steps.own()[-1:]:
                    try:
                        verify(directory)
                    except Exception as error:
                        print(error)
                        found["unreadable checkpoints"] += 1
                assert train(config, output_dir, None, counter) == 0
                got = weights(output_dir)
                same = all(torch.equal(weight, got[key]) for key, weight in expected.items())
                found["not bit-equal"] += not same
                left = [str(path) for path in output_dir.rglob("*") if ".partial" in path.name or ".disc" in path.name]
                found["leftovers"] += bool(left)
                print(f"{format_}: before operation {place} ({operations[place]}): {same} {left}", flush=True)
                shutil.rmtree(output_dir)
            bad += sum(found.values())
            told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            rows.append([format_, len(operations), kills, told, *found.values()])
    lines = [
        "# Kills before operations on files",
        "",
        f"Runs of 12 steps with 6 checkpoints, killed with SIGKILL and resumed; {machine()}. Command: {command()}.",
        "",
        "| weights | operations of a run | kills | before | unreadable checkpoints | not bit-equal | leftovers |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
    publish(lines, args.output)
    sys.exit(json.dumps(rows) if bad else 0)


if __name__ == "__main__":
    main()
