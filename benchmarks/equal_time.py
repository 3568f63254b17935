"""Held-out loss of OwLore and other methods on SmolLM2 after the same training time.

    python benchmarks/equal_time.py --data DIR [--workers N] [--methods NAME ...]
    python benchmarks/equal_time.py --report

DIR holds math/ in LLM-Adapters' format. A budget is the time of BUDGET steps of torchtune's full fine-tuning. Each
method gets the steps that it takes in this time, by the mean steps of methods.md, which include draws and bases. No row
repeats before the last step. Data, schedule and settings are otherwise those of quality.py.

Three sets of problems are disjoint, and none has a problem of the training data: learning rates are tuned on the first,
other settings are chosen on the second, and the third is reported. A learning rate is tuned with runs of the same
number of steps, with seed 0, and the grid is extended until its best value is not at the edge.

Every finished run is a line of equal_time.jsonl. It is repeated only if the code that it depends on has changed.
--report writes equal_time.md from the lines.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.code import digest_of_code
from quality import ALL_LAYERS, METHODS, SEEDS, Run, Study, best_of_grid, held_out_loss
from quality_report import mean_of, measured_name, read_table

from owlore_evals.jsonl import read_lines
from owlore_tune.data.builders import read_file
from owlore_tune.run.manifest import versions

ROOT = Path(__file__).parents[1]
ROWS = Path(__file__).with_name("equal_time.jsonl")
BUDGET = 100  # steps of torchtune's full fine-tuning
REFERENCE = "torchtune full"
SETS = {"tuning": 100, "choosing": 100, "reported": 300}  # problems
COMPARED = (ALL_LAYERS, REFERENCE, "torchtune LoRA, r=16", "galore-torch, r=128", "BAdam")
# Folders and files of the training code. Peers only use the first.
CODE_OF_DATA = ("owlore_tune/data", "owlore_tune/models/smollm2.py", "benchmarks/lib/peers.py")
CODE = (
    "owlore_tune/kernels", "owlore_tune/layers", "owlore_tune/models", "owlore_tune/optim", "owlore_tune/quantized",
    "owlore_tune/loss.py", "owlore_tune/run/build.py", "recipes/owlore_full_finetune.py",
)  # fmt: skip


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


def steps_in_budget(method: str, measured: dict[str, dict[str, str]]) -> int:
    """The steps that a method takes in the time of ``BUDGET`` steps of the reference."""
    seconds = {name: float(measured[measured_name(name)]["mean step, s"]) for name in (method, REFERENCE)}
    return round(BUDGET * seconds[REFERENCE] / seconds[method])


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
        super().__init__(data, threads, answers=False, results=ROWS)
        self._problems = read_file(data / "math" / "train.json", "--data")

    def _has(self, run: Run) -> bool:
        return self.rows.get(run.key, {}).get("code") == code_of(run.method)

    def _run(self, run: Run, scratch: Path) -> dict[str, Any]:
        code, started = code_of(run.method), time.perf_counter()
        train, sets = split(self._problems, run.seed)
        file = scratch / "train.json"
        file.write_text(json.dumps(train))
        config, weights = self._train(run, file, scratch)
        row = {"key": run.key, **asdict(run), "budget": BUDGET, "code": code, "config": config}
        row["seconds_of_this_run"] = time.perf_counter() - started
        row |= {"machine": processor(), "versions": versions()}
        return row | {"losses": {name: held_out_loss(weights, rows) for name, rows in sets.items()}}

    def tuned_at(self, method: str, steps: int) -> float:
        """The learning rate with the lowest loss on the first set."""
        return best_of_grid(
            METHODS[method].lrs, lambda lr: self.row(Run(method, lr, SEEDS[0], steps))["losses"]["tuning"]
        )


def report(rows: Iterable[dict[str, Any]], measured: dict[str, dict[str, str]]) -> list[str]:
    """The lines of equal_time.md. Of each method, rows of its last code count."""
    newest = {row["method"]: row["code"] for row in rows}
    latest = {row["key"]: row for row in rows if row["code"] == newest[row["method"]]}
    machines = sorted({row["machine"] for row in latest.values()})
    lines = [
        "# Held-out loss after the same training time",
        "",
        f"SmolLM2-135M-Instruct on arithmetic problems, in the time of {BUDGET} steps of torchtune's full fine-tuning. "
        "Steps are those that a method takes in this time by [methods.md](methods.md), measured on one machine. Losses "
        f"are the same on any machine, but for rounding; these are from: {', '.join(machines)}. ± is the standard "
        "deviation over seeds. Differences are to the first row, on the same seeds and problems, ± their standard "
        "error. Command: `python benchmarks/equal_time.py --data DIR`; its docstring describes the study.",
        "",
        "| | steps | lr | seeds | held-out loss | difference | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    finals = {name: _final(name, latest.values()) for name in COMPARED}
    first = next((found for found in finals.values() if found), {})
    for name, found in finals.items():
        if found:
            losses = [row["losses"]["reported"] for row in found.values()]
            one = next(iter(found.values()))
            memory = measured[measured_name(name)]["peak memory, GB"]
            lines.append(
                f"| {name} | {one['steps']} | {one['lr']:g} | {len(losses)} | {mean_of(losses)} | "
                f"{'' if found is first else _difference(found, first)} | {memory} |"
            )
    lines += ["", "## Tuning: losses on the first set with seed 0", "", "| | lr: loss |", "|---|---|"]
    for name in COMPARED:
        tuning = {row["lr"]: row for row in latest.values() if row["method"] == name and row["seed"] == SEEDS[0]}
        if tuning:
            cells = (f"{lr:g}: {tuning[lr]['losses']['tuning']:.4f}" for lr in sorted(tuning))
            lines.append(f"| {name} | {', '.join(cells)} |")
    return lines


def _final(method: str, rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The rows by seed with the learning rate that has the lowest loss on the first set."""
    own = [row for row in rows if row["method"] == method]
    tuning = [row for row in own if row["seed"] == SEEDS[0]]
    if not tuning:
        return {}
    best = min(tuning, key=lambda row: row["losses"]["tuning"])["lr"]
    return {row["seed"]: row for row in sorted(own, key=lambda row: row["seed"]) if row["lr"] == best}


def _difference(found: dict[int, dict[str, Any]], first: dict[int, dict[str, Any]]) -> str:
    """The mean paired difference, with its standard error if there are several pairs."""
    paired = [found[seed]["losses"]["reported"] - first[seed]["losses"]["reported"] for seed in found if seed in first]
    error = f" ± {statistics.stdev(paired) / len(paired) ** 0.5:.4f}" if len(paired) > 1 else ""
    return f"{statistics.fmean(paired):+.4f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with math/")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--methods", nargs="+", choices=COMPARED, default=COMPARED, metavar="NAME")
    parser.add_argument("--report", action="store_true", help="write equal_time.md, and train nothing")
    args = parser.parse_args()
    measured = read_table(ROWS.with_name("methods.md"))
    if args.report:
        ROWS.with_suffix(".md").write_text("\n".join(report(read_lines(ROWS), measured)) + "\n")
        return
    if args.data is None:
        parser.error("--data is needed to train")
    study = EqualTime(args.data.resolve(), args.threads)
    steps = {method: steps_in_budget(method, measured) for method in args.methods}
    with ThreadPoolExecutor(args.workers) as pool:
        lrs = dict(
            zip(args.methods, pool.map(lambda method: study.tuned_at(method, steps[method]), args.methods), strict=True)
        )
        runs = [Run(method, lrs[method], seed, steps[method]) for seed in SEEDS for method in args.methods]
        list(pool.map(study.row, runs))


if __name__ == "__main__":
    main()
