"""Tables and picture of the accuracy study, from the rows that quality.py has finished so far.

    python benchmarks/quality_report.py

Reads quality.jsonl and, for step time and memory, methods.md. Writes quality.md and quality.png beside them.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from quality import METHODS, ROWS, SEEDS, SEQ_LEN, STEPS, TUNING_STEPS

from owlore_evals.jsonl import read_lines
from owlore_tune.run.plots import BLUE, ORANGE

Row = dict[str, Any]
# Rows of methods.md whose step time and memory are those of a method here.
MEASURED_AS = {
    "galore-torch, r=128": "galore-torch",
    "OwLore, γ=5, r=128": "OwLore, γ=5",
    "OwLore, all layers, r=64": "OwLore, all layers, rank 64",
    "OwLore, all layers, r=64, int8": "OwLore, all layers, rank 64, int8",
}


def report(rows: list[Row], measured: dict[str, dict[str, str]]) -> list[str]:
    """The lines of quality.md.

    Args:
        measured: rows of methods.md by name, see `read_table`.
    """
    lines = [
        "# Accuracy of OwLore and other methods",
        "",
        f"SmolLM2-135M-Instruct, {STEPS} steps of {SEQ_LEN} packed tokens, float32 with products in bfloat16. (The "
        "final runs of all layers with r=64 in int8, and those with r=128 and the first seed, were on a machine "
        "without instructions for them, where products are in float32. Rows of OwLore were made before a change in the "
        "rounding of bases: after it, all layers with r=64 in int8 ended at 0.5384 and 0.5364 with the first two "
        "seeds, before at 0.5399 and 0.5347.) Learning "
        f"rates are tuned with runs of {TUNING_STEPS} steps on held-out problems. For losses, ± is the standard "
        "deviation over seeds. For correct answers, it is the standard error of the share; all runs answer the same "
        "242 problems, and those of OwLore have not done so yet. Step time and peak memory are from "
        "[methods.md](methods.md), with 2 × 512 tokens per step, float32 products and draws every 10 steps. Command: "
        "`make quality DATA=DIR`. The docstring of [quality.py](quality.py) describes the method, and "
        f"[quality.jsonl](quality.jsonl) has a row for each run, {len(rows)} in all.",
    ]
    finals = [row for row in rows if row["key"] == "before" or row["steps"] == STEPS]
    lines += _section("Methods", _methods_table(finals, measured))
    lines += _section("Tuning of learning rates: held-out loss, and the best one in bold", _tuning_table(rows))
    return lines


def _section(title: str, table: list[str]) -> list[str]:
    return ["", f"## {title}", "", *table] if table else []


def loss_of(rows: list[Row]) -> str:
    return mean_of([row["held_out_loss"] for row in rows])


def mean_of(losses: list[float]) -> str:
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{spread}"


def correct_of(rows: list[Row]) -> str:
    """Correct answers of all test files and seeds together, and their share with its standard error."""
    counts = [count for row in rows for count in row.get("correct", {}).values()]
    if not counts:
        return ""
    correct, total = (sum(numbers) for numbers in zip(*counts, strict=True))
    share = correct / total
    return f"{correct} of {total}: {100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / total):.1f} %"


_SUMMARY: dict[str, Callable[[list[Row]], str]] = {
    "seeds": lambda rows: str(len(rows)),
    "held-out loss": loss_of,
    "correct answers": correct_of,
}


def _table(groups: dict[str, list[Row]], columns: dict[str, Callable[[list[Row]], str]]) -> list[str]:
    """One line for each group that has rows."""
    lines = [" | ".join(["|", *columns, ""]).strip(), "|---" * (len(columns) + 1) + "|"]
    for name, rows in groups.items():
        if rows:
            lines.append(f"| {name} | " + " | ".join(column(rows) for column in columns.values()) + " |")
    return lines


def _by_method(rows: list[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row["method"] == name] for name in ("before", *METHODS)}


def _methods_table(rows: list[Row], measured: dict[str, dict[str, str]]) -> list[str]:
    def figure(column: str) -> Callable[[list[Row]], str]:
        return lambda rows: measured.get(measured_name(rows[0]["method"]), {}).get(column, "")

    columns: dict[str, Callable[[list[Row]], str]] = {
        "lr": lambda rows: f"{rows[0]['lr']:g}" if "lr" in rows[0] else "",
        **_SUMMARY,
        "step, s": figure("mean step, s"),
        "peak memory, GB": figure("peak memory, GB"),
    }
    return _table(_by_method(rows), columns)


def measured_name(method: str) -> str:
    return MEASURED_AS.get(method, method)


def _tuning_table(rows: list[Row]) -> list[str]:
    tuning = [row for row in rows if row.get("steps") == TUNING_STEPS]
    if not tuning:
        return []
    lrs = sorted({row["lr"] for row in tuning})
    lines = [" | ".join(["|", *(f"{lr:g}" for lr in lrs), ""]).strip(), "|---" * (len(lrs) + 1) + "|"]
    for method, found in _by_method(tuning).items():
        losses = {row["lr"]: row["held_out_loss"] for row in found}
        best = min(losses, key=lambda lr: losses[lr], default=None)
        cells = (f"{losses[lr]:.4f}" if lr in losses else "" for lr in lrs)
        is_inside = bool(losses) and best not in (min(losses), max(losses))
        marked = (f"**{cell}**" if lr == best and is_inside else cell for lr, cell in zip(lrs, cells, strict=True))
        if found:
            lines.append(f"| {method} | {' | '.join(marked)} |")
    return lines


def read_table(file: Path) -> dict[str, dict[str, str]]:
    """The rows of the first Markdown table in ``file``, first cell → column → cell."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in file.read_text().splitlines() if "|" in line]
    head, _, *body = [row for row in cells if row]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other point beats in both coordinates, by the first one."""
    front = [
        name
        for name, (x, y) in points.items()
        if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points.values())
    ]
    return sorted(front, key=lambda name: points[name])


def draw(rows: list[Row], measured: dict[str, dict[str, str]]) -> Figure | None:
    """Held-out loss against step time and against peak memory. None while there are no final runs."""
    finals = [row for row in rows if row.get("steps") == STEPS]
    losses = {
        name: statistics.fmean(row["held_out_loss"] for row in found)
        for name, found in _by_method(finals).items()
        if found
    }
    known = [name for name in losses if measured_name(name) in measured]
    if not known:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2, sharey=True), ("mean step, s", "peak memory, GB"), strict=True):
        points = {name: (float(measured[measured_name(name)][column]), losses[name]) for name in known}
        front = pareto(points)
        axes.plot(*zip(*(points[name] for name in front), strict=True), "--", color="gray", label="Pareto front")
        for (name, point), marker in zip(points.items(), itertools.cycle("os^DvPX*<>h"), strict=False):
            axes.plot(*point, marker, color=ORANGE if name.startswith("OwLore") else BLUE, label=name)
        axes.set_xlabel(column)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.axes[0].set_ylabel(f"held-out loss, mean of up to {len(SEEDS)} seeds")
    return figure


def main() -> None:
    rows, measured = read_lines(ROWS), read_table(ROWS.with_name("methods.md"))
    ROWS.with_suffix(".md").write_text("\n".join(report(rows, measured)) + "\n")
    if figure := draw(rows, measured):
        figure.savefig(ROWS.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
