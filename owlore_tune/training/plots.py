"""Pictures of a run, in the color-blind-safe palette of Okabe and Ito. Hatches distinguish colors in gray."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from owlore_tune.errors import ConfigError
from owlore_tune.files import read_json
from owlore_tune.measure import MANIFEST
from owlore_tune.training.records import DRAWS_FILE, PICTURES, STEPS_FILE, read_records

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#BBBBBB"
PALETTE = (
    BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#000000", "#882255",
)  # fmt: skip
HATCHES = ("", "//", "", "\\\\", "", "xx", "..", "", "oo", "--")
PHASES = ("forward", "backward", "refresh", "optimizer", "redraw", "data", "other")
MOST_BARS = 120  # in the picture of step times; longer runs have several steps per bar


def plot_run(run: Path) -> list[Path]:
    """Draw all pictures of a training run into its directory. The run may still be in progress.

    Returns:
        The pictures: scores, draws, loss, memory and step times.

    Raises:
        ConfigError: if ``run`` has no manifest and scores, or a file of it has other content than a run writes.
    """
    pictures = [run / f"{name}.png" for name in PICTURES]
    try:
        manifest, known = read_json(run / MANIFEST), read_json(run / "scores.json")
        steps, draws = read_records(run / STEPS_FILE), read_records(run / DRAWS_FILE)
        last_end = draws[-1]["end"] if draws else 0
        draws += [draw for draw in manifest["draws"][-1:] if "end" not in draw and draw["step"] >= last_end]
        num_steps = max(manifest["steps"], *(step["step"] for step in steps)) if steps else manifest["steps"]
        drawn = [(draw["step"], draw.get("end", num_steps), draw["active"]) for draw in draws]
        starts = [draw["step"] for draw in draws]
        memory, limit = manifest["memory_bytes"], manifest["config"].get("device_memory_limit")
        plot_scores(pictures[0], known["scores"], known["score"], manifest["probabilities"])
        plot_draws(pictures[1], drawn, len(known["scores"]))
        plot_loss(pictures[2], steps, held_out_by_step(manifest["held_out_loss"], num_steps), starts)
        plot_memory(pictures[3], memory_bars(memory["planned"], memory["measured"]), limit)
        plot_step_times(pictures[4], steps, starts)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{run} is not the output_dir of a training run: {error!r}") from error
    return pictures


def plot_scores(path: Path, scores: Sequence[float], score: str, probabilities: Sequence[float] | None = None) -> None:
    """Draw a bar for each layer's score, and its inclusion probability on a second axis if given."""
    figure, axes = _figure(9, 3.5)
    percent = score == "outlier"
    axes.bar(range(len(scores)), [100 * s if percent else s for s in scores], color=BLUE, label="score")
    axes.set_xlabel("layer (0 is the lowest)")
    axes.set_ylabel("outlier weights, %" if percent else f"{score} score")
    axes.set_title(f"Layer scores: {score}")
    if probabilities is not None:
        right = axes.twinx()
        right.plot(range(len(scores)), probabilities, color=ORANGE, marker="o", markersize=4, label="probability")
        right.set_ylabel("probability of being active")
        right.set_ylim(0, 1.03)
        figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def plot_draws(path: Path, draws: Sequence[tuple[int, int, Sequence[int]]], num_layers: int) -> None:
    """Draw which layers train at which step.

    Args:
        draws: (step drawn at, last step, active layers) of each draw, in order.
    """
    figure, axes = _figure(9, 0.14 * num_layers + 1.5)
    for start, end, active in draws:
        axes.barh(list(active), end - start, left=start, height=0.9, color=BLUE, edgecolor="white", linewidth=0.5)
    _mark_draws(axes, [start for start, _, _ in draws])
    axes.set_xlim(0, max([1, *(end for _, end, _ in draws)]))
    axes.set_ylim(-0.5, num_layers - 0.5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("layer (0 is the lowest)")
    axes.set_title(f"Layers trained in each of {len(draws)} draws")
    figure.savefig(path, dpi=150)


def plot_loss(
    path: Path, steps: Sequence[Mapping[str, float]], held_out: Sequence[tuple[int, float]], draws: Sequence[int]
) -> None:
    """Draw the training loss of each step and the measured held-out losses, with draws marked.

    Args:
        steps: records with ``step`` and ``loss``.
        held_out: (step, loss).
        draws: the steps at which layers were drawn.
    """
    figure, axes = _figure(9, 3.8)
    _mark_draws(axes, draws, label="new layers")
    # A loss is null if it was not finite, or no token was trained.
    losses = [math.nan if step["loss"] is None else step["loss"] for step in steps]
    axes.plot([step["step"] for step in steps], losses, color=BLUE, linewidth=1.2, label="training")
    if held_out := [(step, loss) for step, loss in held_out if loss is not None]:
        axes.plot(*zip(*held_out, strict=True), color=ORANGE, marker="s", linestyle="--", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean loss per trained token, nats")
    axes.set_title("Loss")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def held_out_by_step(losses: Mapping[str, float], num_steps: int) -> list[tuple[int, float]]:
    """(step, loss) of a manifest's held-out losses, whose keys are ``before``, ``step N`` and ``after``."""
    ends = {"before": 0, "after": num_steps}
    return [(ends[when] if when in ends else int(when.split()[1]), loss) for when, loss in losses.items()]


def plot_step_times(path: Path, steps: Sequence[Mapping[str, float]], draws: Sequence[int]) -> None:
    """Draw a bar for each step's seconds, stacked by phase. In long runs a bar is the median of several steps."""
    figure, axes = _figure(9, 3.8)
    width = math.ceil(len(steps) / MOST_BARS) or 1
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    starts = [group[0]["step"] - 1 for group in groups]
    bottoms = [0.0] * len(groups)
    for phase, colour, hatch in zip(PHASES, PALETTE, HATCHES, strict=False):
        heights = [statistics.median(phase_seconds(step)[phase] for step in group) for group in groups]
        axes.bar(
            starts, heights, width, bottom=bottoms, align="edge", color=colour, hatch=hatch, edgecolor="white",
            linewidth=0.3, label=phase,
        )  # fmt: skip
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    _mark_draws(axes, draws, label="new layers")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("seconds per step")
    axes.set_title("Where the time goes" + (f", medians of {width} steps" if width > 1 else ""))
    figure.legend(loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=150)


def phase_seconds(step: Mapping[str, float]) -> dict[str, float]:
    """A step's seconds by phase. ``backward`` excludes basis refreshes; ``other`` is the unmeasured rest."""
    seconds = {phase: step.get(f"{phase}_seconds", 0.0) for phase in PHASES[:-1]}
    seconds["backward"] = max(seconds["backward"] - seconds["refresh"], 0.0)
    return seconds | {"other": max(step["step_seconds"] - sum(seconds.values()), 0.0)}


def plot_radar(path: Path, values: Mapping[str, float], highest: float) -> None:
    """Draw a radar chart of values from 0 to ``highest``."""
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


def memory_bars(planned: Mapping[str, int], measured: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """A run's planned and measured bytes, for `plot_memory`; ``uncategorized`` is the rest of the measured total."""
    known = {category: measured[category] for category in measured if category != "total"}
    rest = max(measured["total"] - sum(known.values()), 0)
    plan = {category: planned[category] for category in planned if category != "total"}
    return {
        "planned": plan | {"uncategorized": 0},
        "measured": dict.fromkeys(plan, 0) | known | {"uncategorized": rest},
    }


def plot_memory(path: Path, plans: Mapping[str, Mapping[str, int]], limit: float | None = None) -> None:
    """Draw a bar for each plan, stacked by category.

    Args:
        plans: bytes by category, for each name of a plan.
        limit: GB to mark with a line.
    """
    figure, axes = _figure(2.5 + 1.3 * len(plans), 4.5)
    bottoms = dict.fromkeys(plans, 0.0)
    categories = [c for c in next(iter(plans.values())) if any(plan[c] for plan in plans.values())]
    for i, category in enumerate(categories):
        heights = [plan[category] / 1e9 for plan in plans.values()]
        axes.bar(
            list(plans), heights, 0.65, bottom=list(bottoms.values()), color=PALETTE[i % len(PALETTE)],
            hatch=HATCHES[i % len(HATCHES)], edgecolor="white", linewidth=0.5, label=category,
        )  # fmt: skip
        bottoms = {name: bottoms[name] + height for name, height in zip(plans, heights, strict=True)}
    for name, total in bottoms.items():
        axes.annotate(f"{total:.2f}", (name, total), ha="center", va="bottom")
    if limit is not None:
        axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set_ylabel("memory, GB")
    axes.set_title("Peak memory")
    axes.margins(y=0.08)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _mark_draws(axes: Axes, draws: Sequence[int], label: str | None = None) -> None:
    """Mark draws with thin lines, unless they would be closer than the width of a line."""
    if len(draws) > 1 and min(later - earlier for earlier, later in pairwise(draws)) * 400 < draws[-1]:
        return
    for i, start in enumerate(draws):
        axes.axvline(start, color=GREY, linewidth=0.8, zorder=0, label=label if i == 0 else None)
