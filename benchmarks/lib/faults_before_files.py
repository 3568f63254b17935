"""Kill runs right before an operation on a file in their directory, and resume them.

The operations are opening a file to write, renaming, linking and removing files, making and removing directories. Kills
are spread evenly over all operations of a run.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from lib.fault_runs import Found, config_for, train_here, weights

EVENTS = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"}


def kill_before_files(scratch: Path, *, kills: int, format: str) -> Found:
    config, counter, found = config_for("small", scratch, format), scratch / "operations", Found()
    assert train(config, scratch / "unbroken", None, counter) == 0
    operations = counter.read_text().split()
    expected = weights(scratch / "unbroken")
    for number in range(kills):
        place = number * len(operations) // kills
        output_dir = scratch / f"run_{number}"
        code = train(config, output_dir, place, counter)
        assert code == -signal.SIGKILL, f"operation {place}: the run ended with {code}"
        found.kills += 1
        found.in_a_save += any(output_dir.glob("step_*.partial"))
        found.check_newest(output_dir)
        assert train(config, output_dir, None, counter) == 0
        found.check_weights(output_dir, expected)
        print(operations[place], found, flush=True)
        shutil.rmtree(output_dir)
    return found


def train(config: dict, output_dir: Path, kill_before: int | None, counter: Path) -> int:
    """Train in a forked child, which kills itself before operation ``kill_before``. Returns its exit code.

    The child writes the name of each operation to ``counter``.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
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

    sys.addaudithook(before)
    train_here(config, output_dir)
    return 0


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
