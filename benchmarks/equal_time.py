"""Held-out loss of OwLore and other methods on SmolLM2 after the same training time, and after the same steps.

    python benchmarks/equal_time.py --data DIR --costs [--methods NAME ...]
    python benchmarks/equal_time.py --data DIR [--budgets 100 ...] [--workers N] [--methods NAME ...]
    python benchmarks/equal_time.py --report

DIR holds math/ in LLM-Adapters' format. A budget is the time of so many steps of torchtune's full fine-tuning in
float32. Each method trains as many steps as it takes in this time, and also as many as the budget. No row of data
repeats. Data, schedule and settings are otherwise those of quality.py, and so are products in bfloat16. OwLore has
weights in bfloat16 or int8.

--costs measures the mean step and the memory of each method, with all cores. It runs in turn with the reference: ten
seconds of one, then of the other, so that changes of the machine's speed do not change the ratio of their mean steps.

Three sets of problems are disjoint, and none has a problem of the training data: learning rates are tuned on the first,
other settings are chosen on the second, and the third is reported. A learning rate is tuned with runs of the same
number of steps, with seed 0, and the grid is extended until its best value is not at the edge.

Every finished run is a line of equal_time.jsonl. It is repeated only if the code that it depends on has changed.
--report writes equal_time.md from the lines, without methods that are not tuned yet.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.code import digest_of_code
from lib.turns import run_for, run_in_turn, step_times
from methods import INT8
from quality import RESAMPLE_EVERY, SEEDS, Method, Run, Study, best_of_grid, held_out_loss
from quality_report import mean_of

from owlore_evals.jsonl import append_line, read_lines
from owlore_tune.data.builders import read_file
from owlore_tune.run.manifest import versions

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).with_name("equal_time.jsonl")
BUDGETS = (100,)
LONG = 1000  # steps of the reference, which ends only when costs of all methods are measured
STEPS_WITHOUT_REFRESH = 22  # in which costs are measured if no step takes longer than the others
SETS = {"tuning": 100, "choosing": 100, "reported": 300}  # problems
# Folders and files of the training code. Peers only use the first.
CODE_OF_DATA = ("owlore_tune/data", "owlore_tune/models/smollm2.py", "benchmarks/lib/peers.py")
CODE = (
    "owlore_tune/kernels", "owlore_tune/layers", "owlore_tune/models", "owlore_tune/optim", "owlore_tune/quantized",
    "owlore_tune/loss.py", "owlore_tune/run/build.py", "recipes/owlore_full_finetune.py",
)  # fmt: skip


BF16 = {"dtype": "bf16"}


def ours(num_active: int | None, rank: int, lrs: tuple[float, ...], **settings: Any) -> Method:
    """OwLore with uniform draws."""
    chosen = {"owlore.num_active_layers": num_active, "owlore.rank": rank, "owlore.update_gap": RESAMPLE_EVERY}
    chosen["loss.chunk_size"] = 128  # less memory than with 256 positions at a time
    return Method("owlore", BF16 | {"owlore.score": "uniform"} | chosen | settings, lrs)


REFERENCE, OURS = "torchtune full, fp32", "OwLore, all layers, r=64"
FULL, LORA = {"recipe": "full_finetune_single_device"}, {"recipe": "lora_finetune_single_device"}
GALORE = {"method": "galore", "every": RESAMPLE_EVERY}
METHODS = {
    REFERENCE: Method("torchtune", FULL, (3e-5, 1e-4, 3e-4)),
    "torchtune full, bf16": Method("torchtune", FULL | BF16, (3e-5, 1e-4, 3e-4)),
    "torchtune LoRA, r=16, fp32": Method("torchtune", LORA, (3e-4, 1e-3, 3e-3)),
    "torchtune LoRA, r=16, bf16": Method("torchtune", LORA | BF16, (3e-4, 1e-3, 3e-3)),
    "galore-torch, r=128, fp32": Method("peer", GALORE, (1e-5, 3e-5, 1e-4)),
    "galore-torch, r=128, bf16": Method("peer", GALORE | BF16, (1e-5, 3e-5, 1e-4)),
    "BAdam, fp32": Method("peer", {"method": "badam"}, (3e-4, 1e-3, 3e-3)),
    "BAdam, bf16": Method("peer", {"method": "badam"} | BF16, (3e-4, 1e-3, 3e-3)),
    OURS: ours(None, 64, (1e-4, 3e-4, 1e-3)),
    "OwLore, all layers, r=64, int8": ours(None, 64, (1e-4, 3e-4, 1e-3), **INT8),
    "OwLore, γ=15, r=128": ours(15, 128, (3e-4, 1e-3)),
    "OwLore, γ=10, r=128": ours(10, 128, (3e-4, 1e-3)),
    "OwLore, γ=5, r=128": ours(5, 128, (3e-4, 1e-3)),
}
HEAD = (
    "| | step time | steps | lr | seeds | held-out loss | difference | peak memory, GB |",
    "|---|---|---|---|---|---|---|---|",
)


def code_of(method: str) -> str:
    """The digest of the code that a method's losses depend on."""
    paths = CODE_OF_DATA + (CODE if METHODS[method].runner == "owlore" else ())
    found = [[ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("*.py") for path in paths]
    return digest_of_code({file for files in found for file in files})


def processor() -> str:
    """The name of the processor, which decides how products are rounded."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(": ")[2] for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


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


class EqualTime(Study):
    """The runs of this study."""

    def __init__(self, data: Path, threads: int) -> None:
        super().__init__(data, threads, answers=False, methods=METHODS, results=ROWS)
        self._problems = read_file(data / "math" / "train.json", "--data")
        self.costs = costs_of(self.rows.values())

    def _has(self, run: Run) -> bool:
        return self.rows.get(run.key, {}).get("code") == code_of(run.method)

    def _run(self, run: Run, scratch: Path) -> dict[str, Any]:
        code, started = code_of(run.method), time.perf_counter()
        train, sets = split(self._problems, run.seed)
        config, weights = self._train(run, self._written(train, scratch), scratch)
        row = {"key": run.key, **asdict(run), "code": code, "config": config}
        row["seconds_of_this_run"] = time.perf_counter() - started
        row |= {"machine": processor(), "versions": versions()}
        return row | {"losses": {name: held_out_loss(weights, rows) for name, rows in sets.items()}}

    def _written(self, train: list[dict[str, Any]], scratch: Path) -> Path:
        file = scratch / "train.json"
        file.write_text(json.dumps(train))
        return file

    def tuned_at(self, method: str, steps: int) -> float:
        """The learning rate with the lowest loss on the first set."""
        return best_of_grid(
            METHODS[method].lrs, lambda lr: self.row(Run(method, lr, SEEDS[0], steps))["losses"]["tuning"]
        )

    def measure(self, methods: Iterable[str]) -> None:
        """Add a row with the mean step and the peak memory of each method, from one refresh to after the next."""
        with self._started(REFERENCE, LONG) as (reference, scratch):
            run_for(40, reference)  # until it trains
            for method in methods:
                row = self._cost(method, reference, scratch / "steps.jsonl")
                append_line(ROWS, row)
                print(f"{method}: {row['ratio']:.3f}, {row['seconds']:.3f} s, {row['memory']:.2f} GB", flush=True)

    def _cost(self, method: str, reference: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
        refreshes = METHODS[method].runner == "owlore" or "every" in METHODS[method].settings
        with self._started(method, RESAMPLE_EVERY + 2 if refreshes else STEPS_WITHOUT_REFRESH) as (process, scratch):
            turns = run_in_turn(process, reference)
            self._check(process, scratch)
            lines = list(read_lines(scratch / "steps.jsonl"))
        ends, since = [line["seconds"] for line in lines[1:]], turns.of_other[0][0]
        seconds = step_times(ends, turns.of_process)
        ends_of_reference = [line["seconds"] for line in read_lines(log) if line["seconds"] > since]
        own, full = (statistics.fmean(times) for times in (seconds, step_times(ends_of_reference, turns.of_other)))
        row = {"key": f"cost of {method}", "method": method, "ratio": own / full, "seconds": own, "reference": full}
        row |= {"quartiles": statistics.quantiles(seconds, n=4), "memory": lines[-1]["peak_memory"]}
        return row | {"code": code_of(method), "cores": os.cpu_count(), "machine": processor(), "versions": versions()}

    @contextmanager
    def _started(self, method: str, steps: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """A process that trains so many steps, and its directory. It is killed in the end."""
        with tempfile.TemporaryDirectory() as directory:
            scratch, run = Path(directory), Run(method, METHODS[method].lrs[0], SEEDS[0], steps)
            file = self._written(split(self._problems, run.seed)[0], scratch)
            process = self._start(self._prepare(run, file, scratch)[0], scratch)
            try:
                yield process, scratch
            finally:
                process.kill()
                process.wait()


def costs_of(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The newest costs by method."""
    return {row["method"]: row for row in rows if "losses" not in row}


def report(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of equal_time.md. Only rows of a method's last code count."""
    costs = costs_of(rows)
    runs = [row for row in rows if "losses" in row]
    newest = {row["method"]: row["code"] for row in runs}
    runs = list({row["key"]: row for row in runs if row["code"] == newest[row["method"]]}.values())
    machines = sorted({f"{row['machine']}, {row['cores']} cores" for row in costs.values()})
    lines = [
        "# Held-out loss after the same training time",
        "",
        "SmolLM2-135M-Instruct on arithmetic problems, 512 packed tokens per step, products in bfloat16. fp32 and bf16 "
        "are the types of weights; OwLore has them in bf16 or int8, and trains A in float32. A step time of 1 is that "
        f"of {REFERENCE}, which ran in turn with each method on one machine ({'; '.join(machines)}). Its own value "
        f"shows the noise. ± is the standard deviation over seeds. Differences are to {OURS}, on the same seeds and "
        "problems, ± their standard error. Command: `python benchmarks/equal_time.py --data DIR`; its docstring "
        "describes the study.",
    ]
    for budget in sorted({row["steps"] for row in runs if row["method"] == REFERENCE}):
        in_time = {name: steps_in(budget, name, costs) for name in METHODS if name in costs}
        lines += _section(f"In the time of {budget} steps of torchtune's full fine-tuning", in_time, runs, costs)
        lines += _section(f"After {budget} steps", dict.fromkeys(METHODS, budget), runs, costs)
    lines += ["", "## Tuning: losses on the first set with seed 0", "", "| | steps | lr: loss |", "|---|---|---|"]
    for name in METHODS:
        for steps in sorted({row["steps"] for row in runs if row["method"] == name}):
            cells = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in _tuning(name, steps, runs).items())
            lines.append(f"| {name} | {steps} | {cells} |")
    return lines


def _section(title: str, steps: dict[str, int], runs: list[dict[str, Any]], costs: dict[str, Any]) -> list[str]:
    """A table with a line for each method that has rows after its number of steps."""
    finals = {name: _final(name, count, runs) for name, count in steps.items()}
    first, lines = finals.get(OURS, {}), ["", f"## {title}", "", *HEAD]
    for name, found in finals.items():
        if found:
            cost, one = costs.get(name), next(iter(found.values()))
            cells = [name, f"{cost['ratio']:.2f}" if cost else "", str(one["steps"]), f"{one['lr']:g}"]
            cells += [str(len(found)), mean_of([row["losses"]["reported"] for row in found.values()])]
            cells += ["" if name == OURS else _difference(found, first), f"{cost['memory']:.2f}" if cost else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if any(finals.values()) else []


def _tuning(method: str, steps: int, runs: list[dict[str, Any]]) -> dict[float, float]:
    """Losses on the first set by learning rate."""
    own = (row for row in runs if (row["method"], row["steps"], row["seed"]) == (method, steps, SEEDS[0]))
    return {row["lr"]: row["losses"]["tuning"] for row in sorted(own, key=lambda row: row["lr"])}


def _final(method: str, steps: int, runs: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The rows by seed with the learning rate that has the lowest loss on the first set. Empty if it is not tuned yet:
    there has to be a higher and a lower one."""
    losses = _tuning(method, steps, runs)
    best = min(losses, key=lambda lr: losses[lr], default=None)
    if best in (min(losses, default=None), max(losses, default=None)):
        return {}
    own = [row for row in runs if (row["method"], row["steps"], row["lr"]) == (method, steps, best)]
    return {row["seed"]: row for row in sorted(own, key=lambda row: row["seed"])}


def _difference(found: dict[int, dict[str, Any]], first: dict[int, dict[str, Any]]) -> str:
    """The mean paired difference, with its standard error if there are several pairs."""
    paired = [found[seed]["losses"]["reported"] - first[seed]["losses"]["reported"] for seed in found if seed in first]
    if not paired:
        return ""
    error = f" ± {statistics.stdev(paired) / len(paired) ** 0.5:.4f}" if len(paired) > 1 else ""
    return f"{statistics.fmean(paired):+.4f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with math/")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="STEPS")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--costs", action="store_true", help="measure step times and memory, and no losses")
    parser.add_argument("--report", action="store_true", help="write equal_time.md, and train nothing")
    args = parser.parse_args()
    if args.report:
        ROWS.with_suffix(".md").write_text("\n".join(report(list(read_lines(ROWS)))) + "\n")
        return
    if args.data is None:
        parser.error("--data is needed to train")
    study = EqualTime(args.data.resolve(), (os.cpu_count() or 1) if args.costs else args.threads)
    if args.costs:
        study.measure(args.methods)
        return
    if unknown := {REFERENCE, *args.methods} - study.costs.keys():
        parser.error(f"run it with --costs first, for {', '.join(sorted(unknown))}")
    wanted = [(method, steps_in(budget, method, study.costs)) for budget in args.budgets for method in args.methods]
    wanted += [(method, budget) for budget in args.budgets for method in args.methods]
    wanted = list(dict.fromkeys(wanted))
    with ThreadPoolExecutor(args.workers) as pool:
        lrs = dict(zip(wanted, pool.map(lambda pair: study.tuned_at(*pair), wanted), strict=True))
        runs = [Run(method, lrs[method, steps], seed, steps) for seed in SEEDS for method, steps in wanted]
        list(pool.map(study.row, runs))


if __name__ == "__main__":
    main()
