"""Held-out loss of OwLore and other methods on SmolLM2 after the same training time, and after the same steps.

    python benchmarks/quality.py --data DIR --costs [--against NAME] [--methods NAME ...]
    python benchmarks/quality.py --data DIR [--budgets 100 ...] [--workers N] [--methods NAME ...]
    python benchmarks/quality.py --data DIR --row NAME LR SEED STEPS
    python benchmarks/quality_report.py

DIR holds math/ in LLM-Adapters' format. A budget is the time of so many steps of torchtune's full fine-tuning in
float32. Each method trains as many steps as it takes in this time, and also as many as the budget. No row of data
repeats. lib/study.py has the schedule and the settings that all methods share. OwLore has weights in bfloat16 or
int8. --methods chooses from all methods; without it, those run whose costs are measured.

--costs measures the mean step and the memory of each method, with all cores. The reference runs before each method, so
that slow changes of the machine's speed do not change the ratio of their mean steps. With --against, OwLore's first
setting runs instead, for other settings of OwLore. OwLore's recipe makes malloc keep freed memory; the other programs
run as their authors ship them.

Three sets of problems are disjoint, and none has a problem of the training data: learning rates are tuned on the first
with seed 0, the second is for a choice of other settings, and the third is reported. A learning rate is tuned with runs
of the same number of steps, and the grid is extended until its best value is not at the edge. Each run also measures in
two ways what the model forgets, see lib/study.py. The first rows do not have these measures.

Every finished run is a line of quality.jsonl, and is not repeated. --row trains one run, if it has no line yet, and
prints its losses.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lib.study import RESAMPLE_EVERY, Method, Run, divergence, general_loss, held_out_loss, train
from training import INT8

from owlore_evals.jsonl import append_line, read_lines
from owlore_tune.data.datasets import read_file
from owlore_tune.measure import versions

ROWS = Path(__file__).with_name("quality.jsonl")
BUDGETS = (100,)
SEEDS = (0, 1, 2)
STEPS_WITHOUT_REFRESH = 22  # in which costs are measured if no step takes longer than the others
SETS = {"tuning": 100, "choosing": 100, "reported": 300}  # problems
STEP_OF_GRID = 10**0.5
BF16 = {"dtype": "bf16"}


def ours(num_active: int | None, rank: int, lrs: tuple[float, ...], **settings: Any) -> Method:
    """OwLore with uniform draws, unless the settings say otherwise."""
    chosen = {"owlore.num_active_layers": num_active, "owlore.rank": rank, "owlore.update_gap": RESAMPLE_EVERY}
    chosen["loss.chunk_size"] = 128  # less memory than with 256 positions at a time
    return Method("owlore", BF16 | {"owlore.score": "uniform"} | chosen | settings, lrs)


REFERENCE, OURS = "torchtune full, fp32", "OwLore, all layers, r=64"
FULL = {"recipe": "full_finetune_single_device"}
GALORE = {"method": "galore", "every": RESAMPLE_EVERY}
METHODS = {
    REFERENCE: Method("torchtune", FULL, (3e-5, 1e-4, 3e-4)),
    "torchtune full, bf16": Method("torchtune", FULL | BF16, (3e-5, 1e-4, 3e-4)),
    "torchtune LoRA, r=16, bf16": Method(
        "torchtune", {"recipe": "lora_finetune_single_device"} | BF16, (3e-4, 1e-3, 3e-3)
    ),
    "galore-torch, r=128, fp32": Method("peer", GALORE, (1e-5, 3e-5, 1e-4)),
    "BAdam, fp32": Method("peer", {"method": "badam"}, (1e-4, 3e-4, 1e-3)),
    OURS: ours(None, 64, (1e-4, 3e-4, 1e-3)),
    "OwLore, all layers, r=64, int8": ours(None, 64, (1e-4, 3e-4, 1e-3), **INT8),
    "OwLore, γ=5, r=128, K=10": ours(5, 128, (3e-4, 1e-3), **{"owlore.resample_every": 10}),
    "OwLore, γ=5, r=128, K=10, outlier scores": ours(
        5, 128, (3e-4, 1e-3), **{"owlore.resample_every": 10, "owlore.score": "outlier"}
    ),
}


def processor() -> str:
    """The name of the processor, which decides how products are rounded."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(": ")[2] for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def costs_of(rows: Iterable[dict[str, Any]], against: str = REFERENCE) -> dict[str, dict[str, Any]]:
    """The newest costs by method, of those that were measured against ``against``."""
    costs = (row for row in rows if "losses" not in row)
    return {row["method"]: row for row in costs if row.get("against", REFERENCE) == against}


def steps_in(budget: int, method: str, costs: dict[str, dict[str, Any]]) -> int:
    """The steps that a method takes in the time of ``budget`` steps of the reference."""
    return budget if method == REFERENCE else round(budget / costs[method]["ratio"])


def split(rows: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Training rows in the order of ``seed``, and the held-out sets. All rows of a problem are in one of them."""
    of_problem: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_problem.setdefault(row["instruction"], []).append(row)
    problems = list(of_problem.values())
    random.Random(0).shuffle(problems)
    sets, first = {}, 0
    for name, count in SETS.items():
        sets[name] = [rows_of[0] for rows_of in problems[first : first + count]]
        first += count
    train = [row for rows_of in problems[first:] for row in rows_of]
    random.Random(seed).shuffle(train)
    return train, sets


class Study:
    """Executes runs that are not in the results file yet.

    Args:
        data: directory with math/.
        threads: threads per run.
    """

    def __init__(self, data: Path, threads: int) -> None:
        self._problems = read_file(data / "math" / "train.json", "--data")
        self._threads = threads
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("medium")  # as in lib/bf16_products.py
        self.rows = {row["key"]: row for row in read_lines(ROWS)}
        self.costs = costs_of(self.rows.values(), OURS) | costs_of(self.rows.values())

    def row(self, run: Run) -> dict[str, Any]:
        """Return the row of ``run``. Execute the run if there is none."""
        if run.key not in self.rows:
            self.rows[run.key] = self.execute(run)
            append_line(ROWS, self.rows[run.key])
        return self.rows[run.key]

    def execute(self, run: Run) -> dict[str, Any]:
        print(f"{time.strftime('%H:%M:%S')} {run.key}", flush=True)
        started = time.perf_counter()
        rows, sets = split(self._problems, run.seed)
        used = sets if run.seed == SEEDS[0] else {"reported": sets["reported"]}
        with tempfile.TemporaryDirectory() as scratch:
            trained = train(run, METHODS[run.method], rows, Path(scratch), self._threads)
            row = {"key": run.key, **asdict(run), "config": trained.config}
            row["seconds_of_this_run"] = time.perf_counter() - started
            row |= {"machine": processor(), "versions": versions()}
            row["losses"] = {name: held_out_loss(trained.weights, rows) for name, rows in used.items()}
            row["general_loss"] = general_loss(trained.weights)
            return row | {"divergence": divergence(trained.weights, sets["tuning"][:50])}

    def tuned(self, method: str, steps: int) -> float:
        """The learning rate with the lowest loss on the first set."""
        return best_of_grid(
            METHODS[method].lrs, lambda lr: self.row(Run(method, lr, SEEDS[0], steps))["losses"]["tuning"]
        )

    def measure(self, methods: Iterable[str], against: str) -> None:
        """Add a row with the mean step, in steps of the reference, and the peak memory of each method.

        The step is compared with that of ``against``, whose own step is known.
        """
        for method in methods:
            other, steps = self._steps(against), self._steps(method)
            seconds = seconds_of(steps)
            ratio = statistics.fmean(seconds) / statistics.fmean(seconds_of(other))
            ratio *= 1.0 if against == REFERENCE else self.costs[against]["ratio"]
            row = {"key": f"cost of {method}, against {against}", "method": method, "against": against, "ratio": ratio}
            row |= {"seconds": statistics.fmean(seconds), "quartiles": statistics.quantiles(seconds, n=4)}
            row |= {"memory": steps[-1]["peak_memory"], "cores": os.cpu_count()}
            append_line(ROWS, row | {"machine": processor(), "versions": versions()})
            print(f"{method}: {ratio:.3f}, {row['seconds']:.3f} s, {row['memory']:.2f} GB", flush=True)

    def _steps(self, method: str) -> list[dict[str, Any]]:
        """The log of a run from one refresh to after the next."""
        refreshes = METHODS[method].runner == "owlore" or "every" in METHODS[method].settings
        steps = RESAMPLE_EVERY + 2 if refreshes else STEPS_WITHOUT_REFRESH
        run = Run(method, METHODS[method].lrs[0], SEEDS[0], steps)
        with tempfile.TemporaryDirectory() as scratch:
            rows = split(self._problems, run.seed)[0]
            return train(run, METHODS[method], rows, Path(scratch), self._threads).steps


def seconds_of(steps: list[dict[str, Any]]) -> list[float]:
    """The seconds of each step from the third on."""
    return [after["seconds"] - before["seconds"] for before, after in pairwise(steps[1:])]


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


def run_all(study: Study, methods: list[str], budgets: list[int], workers: int) -> None:
    """Tune all methods and numbers of steps, then train the other seeds."""
    in_time = [(method, steps_in(budget, method, study.costs)) for budget in budgets for method in methods]
    wanted = list(dict.fromkeys(in_time + [(method, budget) for budget in budgets for method in methods]))
    with ThreadPoolExecutor(workers) as pool:
        lrs = dict(zip(wanted, pool.map(lambda pair: study.tuned(*pair), wanted), strict=True))
        runs = [Run(method, lrs[method, steps], seed, steps) for seed in SEEDS for method, steps in wanted]
        list(pool.map(study.row, runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with math/")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="STEPS")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME")
    parser.add_argument("--costs", action="store_true", help="measure step times and memory, and no losses")
    parser.add_argument("--against", choices=(REFERENCE, OURS), default=REFERENCE, metavar="NAME", help="with --costs")
    parser.add_argument("--row", nargs=4, metavar=("NAME", "LR", "SEED", "STEPS"), help="train this run alone")
    args = parser.parse_args()
    if args.row and args.row[0] not in METHODS:
        parser.error(f"{args.row[0]!r} is not one of {', '.join(METHODS)}")
    study = Study(args.data.resolve(), (os.cpu_count() or 1) if args.costs else args.threads)
    methods = args.methods or [name for name in METHODS if args.costs or name in study.costs]
    if args.costs and args.against not in {REFERENCE, *study.costs}:
        parser.error(f"run --costs for {args.against} first")
    elif args.costs:
        study.measure(methods, args.against)
    elif args.row:
        name, lr, seed, steps = args.row
        print(json.dumps(study.row(Run(name, float(lr), int(seed), int(steps)))["losses"]))
    elif unknown := {REFERENCE, *methods} - study.costs.keys():
        parser.error(f"run it with --costs first, for {', '.join(sorted(unknown))}")
    else:
        run_all(study, methods, args.budgets, args.workers)


if __name__ == "__main__":
    main()
