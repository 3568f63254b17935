"""Pictures of a run. Colours are Okabe and Ito's, told apart by colour-blind people and in grey."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#BBBBBB"
# With hatches, so that nine neighbours are told apart in grey too.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#BBBBBB", "#000000")
HATCHES = ("", "//", "", "\\\\", "", "xx", "..", "", "")


def plot_scores(path: Path, scores: Sequence[float], score: str, probabilities: Sequence[float] | None = None) -> None:
    """A bar for each layer's score, with its inclusion probability on a second axis where given."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    percent = score == "outlier"
    axes.bar(range(len(scores)), [100 * s if percent else s for s in scores], color=BLUE, label="score")
    axes.set_xlabel("layer (0 is the lowest)")
    axes.set_ylabel("outlier weights, %" if percent else f"{score} score")
    axes.set_title(f"Layer scores: {score}")
    if probabilities is not None:
        right = axes.twinx()
        right.plot(range(len(scores)), probabilities, color=ORANGE, marker="o", markersize=4, label="probability")
        right.set_ylabel("probability of being active")
        right.set_ylim(0, 1)
        figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def plot_draws(path: Path, draws: Sequence[tuple[int, Sequence[int]]], num_layers: int, num_steps: int) -> None:
    """A map of which layers trained when.

    Args:
        draws: (step drawn at, active layers) of each draw, in order.
        num_steps: optimizer steps of the run.
    """
    figure = Figure(figsize=(9, 0.14 * num_layers + 1.5), layout="constrained")
    axes = figure.subplots()
    ends = [step for step, _ in draws[1:]] + [num_steps]
    for (start, active), end in zip(draws, ends, strict=True):
        axes.barh(list(active), end - start, left=start, height=0.9, color=BLUE, edgecolor="white", linewidth=0.5)
        axes.axvline(start, color=GREY, linewidth=0.5, zorder=0)
    axes.set_xlim(0, num_steps)
    axes.set_ylim(-0.5, num_layers - 0.5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("layer (0 is the lowest)")
    axes.set_title(f"Layers trained in each of {len(draws)} draws")
    figure.savefig(path, dpi=150)


def plot_radar(path: Path, values: Mapping[str, float], highest: float) -> None:
    """Values from 0 to ``highest`` around a circle, one direction for each name."""
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.subplots(subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * i / len(values) for i in range(len(values))]
    around = [*values.values(), *list(values.values())[:1]]
    axes.plot([*angles, *angles[:1]], around, color=BLUE, marker="o", markersize=4)
    axes.fill([*angles, *angles[:1]], around, color=BLUE, alpha=0.15)
    axes.set_xticks(angles, [f"{name}\n{value:.1f}" for name, value in values.items()])
    axes.set_ylim(0, highest)
    axes.tick_params(axis="x", pad=18)
    figure.savefig(path, dpi=150)


def plot_memory(path: Path, plans: Mapping[str, Mapping[str, int]], limit: float | None = None) -> None:
    """A bar for each plan, stacked of its categories.

    Args:
        plans: bytes by category, for each name.
        limit: GB to mark with a line.
    """
    figure = Figure(figsize=(1.5 + 1.4 * len(plans), 4.5), layout="constrained")
    axes = figure.subplots()
    bottoms = dict.fromkeys(plans, 0.0)
    categories = next(iter(plans.values()))
    for category, colour, hatch in zip(categories, PALETTE, HATCHES, strict=False):
        heights = [plan[category] / 1e9 for plan in plans.values()]
        axes.bar(
            list(plans), heights, 0.65, bottom=list(bottoms.values()), color=colour, hatch=hatch, edgecolor="white",
            linewidth=0.5, label=category,
        )  # fmt: skip
        bottoms = {name: bottoms[name] + height for name, height in zip(plans, heights, strict=True)}
    for name, total in bottoms.items():
        axes.annotate(f"{total:.2f}", (name, total), ha="center", va="bottom")
    if limit is not None:
        axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set_ylabel("memory, GB")
    axes.set_title("Planned peak memory")
    axes.margins(y=0.08)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    figure.savefig(path, dpi=150)
