"""What an evaluation leaves: the harness's own files, a manifest beside them, and tables over several runs."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table

from owlore_tune.config import ConfigError
from owlore_tune.manifest import write_json

Scores = dict[tuple[str, str], tuple[float, float | None]]  # (task, metric) -> (value, standard error)
MANIFEST = "manifest.json"


def check_output_dir(directory: Path, fingerprint: str) -> None:
    """Raise ConfigError if ``directory`` has results of another model, which would be taken for this one's."""
    try:
        known = json.loads((directory / MANIFEST).read_text()).get("fingerprint")
    except (OSError, ValueError):
        return
    if known not in (None, fingerprint):
        raise ConfigError(f"output_dir={directory} holds results of another model ({known}); choose another directory")


def save_results(
    directory: Path,
    results: dict[str, Any],
    manifest: dict[str, Any],
    *,
    model: str,
    chat_template: str | None = None,
    fewshot_as_multiturn: bool = True,
) -> Path:
    """Write ``results_DATE.json`` and ``samples_TASK_DATE.jsonl`` through the harness's tracker, and the manifest.

    The tracker logs its failures and goes on, and it writes in place; so it writes into a directory of its own, whose
    files are moved when they are all there.

    Args:
        model: name or path of the model.
        chat_template: that was applied.

    Raises:
        OSError: if they cannot be written.
    """
    samples = results.pop("samples", None) or {}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".results") as scratch:
        tracker = EvaluationTracker(output_path=str(Path(scratch) / "results.json"))
        tracker.general_config_tracker.log_experiment_args(
            model_source="owlore_eval",
            model_args={"model": model},
            system_instruction=None,
            chat_template=chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
        )
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, task_samples in samples.items():
            tracker.save_results_samples(task, task_samples)
        written = sorted(Path(scratch).iterdir())
        if len(written) != 1 + len(samples):
            raise OSError(f"the results could not be written to {directory}; the log above says why")
        for file in written:
            os.replace(file, directory / file.name)
    name = next(file.name for file in written if file.name.startswith("results_"))
    write_json(directory / MANIFEST, {**manifest, "results": name})
    return directory / name


def print_results(results: dict[str, Any]) -> None:
    """The harness's tables, and the averages under them."""
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    for metric, value in results.get("averages", {}).items():
        print(f"average {metric.removesuffix(',none'):11} {value:.4f}")


def read_scores(run: Path) -> Scores:
    """All scores in a results file, or in the results files anywhere under a directory, newer ones first.

    Raises:
        ConfigError: if there is none.
    """
    files = [run] if run.is_file() else sorted(run.rglob("results_*.json"), key=lambda file: file.name)
    scores: Scores = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
            results = {**content["results"], "average": content.get("averages", {})}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is not a results file: {error!r}") from error
        for task, values in results.items():
            for key, value in values.items():
                metric, _, kind = key.partition(",")
                if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                    error = values.get(f"{metric}_stderr,{kind}")
                    known = isinstance(error, int | float)
                    scores[task, metric if kind == "none" else key] = (value, error if known else None)
    if not scores:
        raise ConfigError(f"{run} has no results_*.json")
    return scores


def compare(runs: list[Path]) -> str:
    """A Markdown table of all runs' scores with standard errors, and each one's difference to the first run."""
    scores = [read_scores(run) for run in runs]
    rows = sorted({key for run in scores for key in run}, key=lambda key: (key[0] == "average", key))
    names = [str(run) for run in runs]
    header = ["task", "metric", names[0]] + [column for name in names[1:] for column in (name, "difference")]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for key in rows:
        first, *others = (run.get(key) for run in scores)
        cells = [*key, _cell(first)]
        for other in others:
            cells += [_cell(other), _difference(first, other)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return ""
    value, error = score
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _difference(first: tuple[float, float | None] | None, other: tuple[float, float | None] | None) -> str:
    if first is None or other is None:
        return ""
    text = f"{other[0] - first[0]:+.4f}"
    if first[1] is None or other[1] is None:
        return text
    return f"{text} ± {math.hypot(first[1], other[1]):.4f}"  # as if the runs were independent
