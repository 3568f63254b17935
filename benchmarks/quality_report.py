"""Tables and picture of the accuracy study, from the rows that quality.py has finished so far.

    python benchmarks/quality_report.py

Reads quality.jsonl. Writes quality.md and quality.png beside it. Of several rows of a run, the last one counts. Methods
whose learning rate is not tuned yet are left out.
"""

import itertools
import statistics
from typing import Any

from lib.report import table
from matplotlib.figure import Figure
from quality import METHODS, OURS, REFERENCE, ROWS, SEEDS, costs_of, steps_in

from owlore_evals.jsonl import read_lines
from owlore_tune.training.plots import BLUE, ORANGE

Row = dict[str, Any]
COLUMNS = ["", "step time", "steps", "lr", "seeds", "held-out loss", "difference", "peak memory, GB"]
MEMORIES = (2.3, 2.7, 3.2, 4.0)  # GB


def report(rows: list[Row]) -> list[str]:
    """The lines of quality.md."""
    costs, runs = costs_of(rows), runs_that_count(rows)
    processors = sorted({row["machine"] for row in runs})
    lines = [
        "# Held-out loss after the same training time",
        "",
        "SmolLM2-135M-Instruct on arithmetic problems, 512 packed tokens per step. fp32 and bf16 are the types of "
        "weights; OwLore has them in bf16, and trains A in float32. OwLore, LoRA and BAdam train no embeddings. On "
        "CPUs with AMX, products of fp32 weights are in bfloat16 too. The runs used these CPUs: "
        f"{'; '.join(processors)}. A step time of 1 is that of {REFERENCE}, which was measured together with each "
        f"method on one machine ({_machines(costs)}). Its own value shows the noise.{_earlier_code(costs, runs)} "
        f"± is the standard deviation over seeds. Differences are to {OURS}, on the same seeds and "
        "problems, ± their standard error. A method is in a table once its learning rate is tuned for its number of "
        "steps. Commands: `python benchmarks/quality.py --data DIR`, whose docstring "
        "describes the study, and `python benchmarks/quality_report.py`.",
        "",
        "![Loss by steps and by time](quality.png)",
    ]
    for budget in budgets(runs):
        in_time = {name: final_rows(name, steps_in(budget, name, costs), runs) for name in METHODS if name in costs}
        lines += _section(f"In the time of {budget} steps of torchtune's full fine-tuning", in_time, costs)
        lines += _memory_table(in_time, costs)
        lines += _section(f"After {budget} steps", {name: final_rows(name, budget, runs) for name in METHODS}, costs)
        lines += _other_settings(budget, costs, costs_of(rows, OURS), runs)
    return lines + _tuning_table(runs) + _forgetting_table(runs)


def _machines(costs: dict[str, Row]) -> str:
    return "; ".join(sorted({f"{row['machine']}, {row['cores']} cores" for row in costs.values()}))


def _earlier_code(costs: dict[str, Row], runs: list[Row]) -> str:
    """Say of which methods the step was measured with other code than that of the runs. New rows do not record it."""
    codes = {row["method"]: row.get("code") for row in runs}
    names = [name for name, cost in costs.items() if cost.get("code") != codes.get(name, cost.get("code"))]
    return f" Step time and memory were measured with earlier code for: {'; '.join(names)}." if names else ""


def budgets(runs: list[Row]) -> list[int]:
    """The steps of the reference, ascending, for which it is tuned. Without it there is nothing to compare with."""
    return [steps for steps in _steps_of(REFERENCE, runs) if final_rows(REFERENCE, steps, runs)]


def runs_that_count(rows: list[Row]) -> list[Row]:
    """The last row of each run."""
    return list({row["key"]: row for row in rows if "losses" in row}.values())


def _section(title: str, finals: dict[str, dict[int, Row]], costs: dict[str, Any], text: str = "") -> list[str]:
    """A table with a line for each method that has final rows, by method and seed; none for a single method."""
    found = {name: own for name, own in finals.items() if own}
    if len(found) < 2:
        return []
    cells = [_cells(name, own, found.get(OURS, {}), costs.get(name)) for name, own in found.items()]
    seeds: dict[str, set[int]] = {}
    for seed, row in (pair for own in found.values() for pair in own.items()):
        seeds.setdefault(row["machine"], set()).add(seed)
    cpus = "; ".join(f"{name}: {', '.join(map(str, sorted(own)))}" for name, own in sorted(seeds.items()))
    head = ["", f"## {title}", "", *([text, ""] if text else [])]
    return [*head, *table(COLUMNS, cells), "", f"Seeds by CPU: {cpus}."]


def _cells(name: str, found: dict[int, Row], first: dict[int, Row], cost: Row | None) -> list[str]:
    """A line of a table. Differences are to the rows of ``first``."""
    one, losses = next(iter(found.values())), [row["losses"]["reported"] for row in found.values()]
    paired = [found[seed]["losses"]["reported"] - first[seed]["losses"]["reported"] for seed in found if seed in first]
    loss, difference = f"{statistics.fmean(losses):.4f}", ""
    if len(losses) > 1:
        loss += f" ± {statistics.stdev(losses):.4f}"
    if paired and name != OURS:
        error = f" ± {statistics.stdev(paired) / len(paired) ** 0.5:.4f}" if len(paired) > 1 else ""
        difference = f"{statistics.fmean(paired):+.4f}{error}"
    time, memory = (f"{cost['ratio']:.2f}", f"{cost['memory']:.2f}") if cost else ("", "")
    return [name, time, str(one["steps"]), f"{one['lr']:g}", str(len(found)), loss, difference, memory]


def _other_settings(budget: int, costs: dict[str, Row], others: dict[str, Row], runs: list[Row]) -> list[str]:
    """A table of the settings of OwLore whose step was measured against that of `OURS`."""
    if not others:
        return []
    known = {name: cost for name, cost in ({OURS: costs[OURS]} | others).items() if METHODS[name].runner == "owlore"}
    in_time = {name: final_rows(name, steps_in(budget, name, known), runs) for name in known}
    title = f"OwLore with other settings, in the time of {budget} steps of torchtune's full fine-tuning"
    text = f"The steps of the other settings were measured together with {OURS}, on {_machines(others)}."
    if full := others.get(REFERENCE):
        text += f" There, its step takes {costs[OURS]['ratio'] / full['ratio']:.2f} of that of {REFERENCE}."
    return _section(title, in_time, known, text)


def _memory_table(finals: dict[str, dict[int, Row]], costs: dict[str, Any]) -> list[str]:
    """For each memory of the whole process, the methods that fit, the one with the lowest loss first.

    None before all methods have final rows.
    """
    if not all(finals.values()):
        return []
    losses = {name: _mean_loss(found) for name, found in finals.items()}
    rows = []
    for most in MEMORIES:
        fitting = sorted((loss, name) for name, loss in losses.items() if costs[name]["memory"] <= most)
        rows.append([str(most), "; ".join(f"{name}: {loss:.4f}" for loss, name in fitting)])
    return ["", *table(["whole process, GB", "held-out loss of the methods that fit"], rows)]


def _mean_loss(found: dict[int, Row]) -> float:
    return statistics.fmean(row["losses"]["reported"] for row in found.values())


def _tuning_table(runs: list[Row]) -> list[str]:
    rows = []
    for name in METHODS:
        for steps in _steps_of(name, runs):
            losses = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in _tuning(name, steps, runs).items())
            rows.append([name, str(steps), losses])
    title = "## Tuning: losses on the first set with seed 0"
    return ["", title, "", *table(["", "steps", "lr: loss"], rows)]


def _forgetting_table(runs: list[Row]) -> list[str]:
    """All methods, rates and steps, by their loss: an advantage counts only at the same loss."""
    groups: dict[tuple[str, int, float], list[tuple[float, float, float]]] = {}
    for row in runs:
        if "divergence" in row:
            figures = row["losses"]["reported"], row["general_loss"], row["divergence"]
            groups.setdefault((row["method"], row["steps"], row["lr"]), []).append(figures)
    if not groups:
        return []
    means = {group: [statistics.fmean(some) for some in zip(*own, strict=True)] for group, own in groups.items()}
    rows = [
        [name, str(steps), f"{lr:g}", str(len(groups[name, steps, lr])), *(f"{figure:.4f}" for figure in mean)]
        for (name, steps, lr), mean in sorted(means.items(), key=lambda item: item[1])
    ]
    return [
        "", "## Forgetting, by held-out loss",
        "",
        "Means over the seeds that have these measures. Loss on MMLU: over all tokens of 45 questions of MMLU dev and "
        "their worked answers. KL: from the model before training to the trained one, over the tokens of 50 prompts. "
        "No run trains on these tokens.",
        "", *table(["", "steps", "lr", "seeds", "held-out loss", "loss on MMLU", "KL, nats"], rows),
    ]  # fmt: skip


def _steps_of(method: str, runs: list[Row]) -> list[int]:
    return sorted({row["steps"] for row in runs if row["method"] == method})


def _tuning(method: str, steps: int, runs: list[Row]) -> dict[float, float]:
    """Losses on the first set by learning rate."""
    own = (row for row in runs if (row["method"], row["steps"], row["seed"]) == (method, steps, SEEDS[0]))
    return {row["lr"]: row["losses"]["tuning"] for row in sorted(own, key=lambda row: row["lr"])}


def final_rows(method: str, steps: int, runs: list[Row]) -> dict[int, Row]:
    """The rows by seed with the learning rate that has the lowest loss on the first set. Empty if it is not tuned yet:
    there has to be a higher and a lower one."""
    losses = _tuning(method, steps, runs)
    best = min(losses, key=lambda lr: losses[lr], default=None)
    if best in (min(losses, default=None), max(losses, default=None)):
        return {}
    own = [row for row in runs if (row["method"], row["steps"], row["lr"]) == (method, steps, best)]
    return {row["seed"]: row for row in sorted(own, key=lambda row: row["seed"])}


def points(rows: list[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """For each tuned method with a measured step: (steps, their time in steps of the reference, mean loss).

    The steps are those of the tables: of each of the `budgets`, and in its time.
    """
    costs, runs = costs_of(rows), runs_that_count(rows)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for name in (name for name in METHODS if name in costs):
        for steps in sorted({steps for budget in budgets(runs) for steps in (budget, steps_in(budget, name, costs))}):
            if finals := final_rows(name, steps, runs):
                time = steps * (1.0 if name == REFERENCE else costs[name]["ratio"])
                found.setdefault(name, []).append((steps, time, _mean_loss(finals)))
    return found


def draw(rows: list[Row]) -> Figure:
    """Held-out loss against steps and against time."""
    figure, of_method = Figure(figsize=(10, 4), layout="constrained"), points(rows)
    labels = ("steps of 512 tokens", "time, in steps of torchtune's full fine-tuning")
    for index, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), labels, strict=True)):
        for (name, own), marker in zip(of_method.items(), itertools.cycle("os^DvPX*<>h"), strict=False):
            color = ORANGE if name.startswith("OwLore") else BLUE
            line = [(point[index], point[2]) for point in own]
            axes.plot(*zip(*line, strict=True), f"{marker}-", color=color, label=name)
        axes.set_xlabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.axes[0].set_ylabel("held-out loss, mean over seeds")
    return figure


def main() -> None:
    rows = list(read_lines(ROWS))
    ROWS.with_suffix(".md").write_text("\n".join(report(rows)) + "\n")
    draw(rows).savefig(ROWS.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
