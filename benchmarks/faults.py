"""Kill runs of a small model, resume them until they finish, and compare with an uninterrupted run.

    python benchmarks/faults.py [--runs 20] [--kinds NAME ...] [--output benchmarks/faults.md]

Final weights must be bit-identical, the newest checkpoint must be readable after every kill, and no temporary file may
be left. Runs have 12 steps with a checkpoint every 2, a draw every 3 and new bases every 2. Most are forked from a
process that has already imported everything, which saves seconds per start. They run the recipe like `tune run` does.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.fault_runs import Found, prepare_to_fork
from lib.faults_at_random import kill_at_random
from lib.faults_before_files import kill_before_files
from lib.faults_of_ranks import kill_one_rank
from lib.report import command, machine, parser, publish


def kinds(runs: int) -> dict[str, Callable[[Path], Found]]:
    """Each kind, with the function that tries it in a directory."""
    few = max(1, runs // 7)
    return {
        "SIGKILL, full weights": partial(kill_at_random, runs=runs),
        "SIGKILL, int8": partial(kill_at_random, runs=runs, format="int8"),
        "SIGKILL, NF4": partial(kill_at_random, runs=runs, format="nf4"),
        "SIGTERM, full weights": partial(kill_at_random, runs=few, signal_name="SIGTERM"),
        "SIGKILL, SmolLM2": partial(kill_at_random, runs=few, model="smollm2"),
        "SIGKILL to one of two ranks": partial(kill_one_rank, runs=few),
        "before file operations, full weights": partial(kill_before_files, kills=runs, format="full"),
        "before file operations, int8": partial(kill_before_files, kills=runs, format="int8"),
        "before file operations, NF4": partial(kill_before_files, kills=runs, format="nf4"),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=20)
    arguments.add_argument("--kinds", nargs="+", choices=kinds(1), default=list(kinds(1)))
    args = arguments.parse_args()
    prepare_to_fork()
    lines = [
        "# Runs that are killed and resumed",
        "",
        f"{machine()}. Command: {command()}; its docstring describes the runs.",
        "",
        "| | runs | kills | in a save | unreadable checkpoints | not bit-equal | leftovers |",
        "|---|---|---|---|---|---|---|",
    ]
    bad = 0
    for name in args.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            found = kinds(args.runs)[name](Path(scratch).resolve())
        lines.append(f"| {name} | " + " | ".join(map(str, vars(found).values())) + " |")
        publish(lines, args.output)  # after every row, because each takes minutes
        bad += found.unreadable + found.not_bit_equal + found.leftovers
    sys.exit(f"{bad} faults" if bad else 0)


if __name__ == "__main__":
    main()
