"""Output of an evaluation: the harness's files, a manifest, and tables that compare runs."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from textwrap import indent
from typing import Any

from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table

from owlore_tune.errors import ConfigError, RunError
from owlore_tune.files import is_number, partial_name, read_json, write_json
from owlore_tune.measure import MANIFEST

Scores = dict[tuple[str, str], tuple[float, float | None]]  # (task, metric) -> (value, standard error)


def check_output_dir(directory: Path, fingerprint: str) -> None:
    """Raise ConfigError if ``directory`` has results of another model."""
    try:
        manifest = read_json(directory / MANIFEST)
    except ValueError:
        return
    known = manifest.get("fingerprint") if isinstance(manifest, dict) else None
    if known not in (None, fingerprint):
        raise ConfigError(f"output_dir={directory} has results of another model ({known}); choose another directory")


def save_results(
    directory: Path,
    results: dict[str, Any],
    manifest: dict[str, Any],
    *,
    run_id: str,
    model: str,
    chat_template: str | None = None,
    fewshot_as_multiturn: bool = True,
) -> Path:
    """Write ``results_DATE.json`` and ``samples_TASK_DATE.jsonl`` with the harness's tracker, and the manifest.

    The tracker writes in place, and only logs its errors. Therefore it writes to a temporary directory, and the files
    are moved once all of them are complete.

    Args:
        manifest: what the manifest contains; ``seconds`` is the duration of the evaluation.
        run_id: of the evaluation.
        model: name or path of the model.
        chat_template: the applied chat template.

    Raises:
        RunError: if the files cannot be written. Existing files are left unchanged.
    """
    samples = results.pop("samples", None) or {}
    tracker = EvaluationTracker()
    tracker.general_config_tracker.log_experiment_args(
        model_source="owlore_eval",
        model_args={"model": model},
        system_instruction=None,
        chat_template=chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
    )
    tracker.general_config_tracker.start_time = time.perf_counter() - manifest["seconds"]
    try:
        scratch = directory / partial_name("results", run_id)
        scratch.mkdir()
        try:
            tracker.output_path = str(scratch / "results.json")
            tracker.save_results_aggregated(results=results, samples=samples)
            for task, task_samples in samples.items():
                tracker.save_results_samples(task, task_samples)
            file = _move_checked(scratch, directory, samples)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        write_json(directory / MANIFEST, {**manifest, "results": file.name}, run_id)
    except (OSError, ValueError) as error:
        raise RunError(f"the results cannot be written to {directory}: {error}; the log above may say more") from error
    return file


def _move_checked(source: Path, target: Path, samples: dict[str, list]) -> Path:
    """Check that the tracker's files are complete and move them, the results file last. Returns its new path."""
    (results,) = source.glob("results_*.json")
    json.loads(results.read_text())
    files = sorted(source.glob("samples_*.jsonl"))
    lines = sum(file.read_bytes().count(b"\n") for file in files)
    if lines != sum(map(len, samples.values())):
        raise OSError(f"{lines} samples were written, not {sum(map(len, samples.values()))}")
    for file in [*files, results]:
        os.replace(file, target / file.name)
    return target / results.name


def print_results(results: dict[str, Any]) -> None:
    """Print the harness's tables and the averages."""
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    for metric, value in results.get("averages", {}).items():
        print(f"average {metric.removesuffix(',none'):11} {value:.4f}")


def read_scores(run: Path) -> Scores:
    """Read the scores of a results file, or the newest scores of each task anywhere under a directory.

    Averages are taken from the newest file, if it has all tasks.

    Raises:
        ConfigError: if there are no results, or if two evaluations under the directory share a task.
    """
    files = [run] if run.is_file() else sorted(run.rglob("results_*.json"), key=lambda file: file.name)
    scores: Scores = {}
    places: dict[str, Path] = {}
    newest: dict[str, Any] = {"results": {}}
    averages: Scores = {}
    for file in files:
        try:
            newest = read_json(file)
            found = _scores(newest["results"]) | _scores({"average": newest.get("averages") or {}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is not a results file: {error!r}") from error
        for task in newest["results"]:
            if places.setdefault(task, file.parent) != file.parent:
                raise ConfigError(f"{run} has two evaluations of {task}: {places[task]} and {file.parent}; choose one")
        scores |= {key: value for key, value in found.items() if key[0] != "average"}
        averages = {key: value for key, value in found.items() if key[0] == "average"}
    if not scores:
        raise ConfigError(f"{run} has no results_*.json")
    if newest["results"].keys() == places.keys():
        scores |= averages
    return scores


def _scores(results: dict[str, dict[str, Any]]) -> Scores:
    """Return scores by task and metric. A filter other than ``none`` stays in the metric's name."""
    scores: Scores = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                if not is_number(value):
                    raise ValueError(f"{str(value)[:40]} for {key} of {task} is no score")
                error = values.get(f"{metric}_stderr,{kind}")
                known = is_number(error)
                scores[task, metric if kind == "none" else key] = (value, error if known else None)
    return scores


def compare(runs: list[Path]) -> str:
    """Return a Markdown table of scores with standard errors and differences to the first run."""
    scores = [read_scores(run) for run in runs]
    rows = sorted({key for run in scores for key in run}, key=lambda key: (key[0] == "average", key))
    names = [str(run) for run in runs]
    header = ["task", "metric", names[0]] + [column for name in names[1:] for column in (name, "difference")]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for key in rows:
        first, *others = (run.get(key) for run in scores)
        cells = [*key, format_score(first)]
        for other in others:
            cells += [format_score(other), _difference(first, other)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show_answers(runs: list[Path], count: int) -> str:
    """Return the first ``count`` questions that all runs answered with text, with each run's answer.

    Raises:
        ConfigError: if the runs share no such question, or samples cannot be read.
    """
    answers = [_read_answers(run) for run in runs]
    shared = [question for question in answers[0] if all(question in others for others in answers)]
    if not shared:
        raise ConfigError(f"{', '.join(map(str, runs))} have no generated answers to the same question")
    parts = []
    for question in shared[:count]:
        parts += [f"question\n{indent(question, '    ')}"]
        parts += [f"{run}\n{indent(found[question], '    ')}" for run, found in zip(runs, answers, strict=True)]
    return "\n".join(parts)


def _read_answers(run: Path) -> dict[str, str]:
    """Return a run's generated answers by question, from the newest file of each task."""
    answers: dict[str, str] = {}
    for file in sorted(run.rglob("samples_*.jsonl"), key=lambda file: file.name):
        try:
            for line in filter(None, file.read_text().split("\n")):  # splitlines() also splits at U+2028
                row = json.loads(line)
                response = row["resps"][0][0]
                if isinstance(response, str):
                    answers[_question(row)] = response
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ConfigError(f"{file} is not a samples file: {error!r}") from error
    return answers


def _question(row: dict[str, Any]) -> str:
    """Return the question of a sample. Its name in the document depends on the task."""
    doc = row["doc"]
    if "turns" in doc:  # MT-Bench
        return "\n".join(doc["turns"][: row["turn"]])
    return str(doc.get("instruction") or doc.get("question") or doc.get("prompt") or json.dumps(doc)).strip()


def format_score(score: tuple[float, float | None] | None) -> str:
    """Format as ``value ± standard error``; unknown parts are left out."""
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
    return f"{text} ± {math.hypot(first[1], other[1]):.4f}"  # assumes independent runs
