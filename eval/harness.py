"""Load lm-evaluation-harness tasks by name, from the hub or from local copies."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from owlore_evals.local_tasks import SCORINGS, local_choices_task, local_math_task
from owlore_tune.errors import ConfigError
from owlore_tune.files import user_path

# The harness warns of settings that are ours: num_fewshot, and metadata that no task here takes.
logging.getLogger("lm_eval.evaluator").addFilter(lambda r: not str(r.msg).startswith("Overwriting default num_fewshot"))
logging.getLogger("lm_eval.api.task").addFilter(lambda r: "Custom kwargs can be passed" not in str(r.msg))

LAST_NUMBER = "last_number"  # scoring for arithmetic problems
OWN_TASKS = Path(__file__).parent / "tasks"
LONGEST_NAME = 200  # bytes of a task's name; a date and an ending are added to it, and file names end at 255


def load_tasks(
    names: Iterable[str],
    *,
    data_root: str | None = None,
    data_files: Mapping[str, str] | None = None,
    scoring: str = "loglikelihood",
    plain_prompts: bool = False,
) -> list[Task | Group]:
    """Load tasks and groups with their documents, in the given order; ``data_files`` come last.

    Args:
        names: tasks, groups and tags of the harness, and our tasks in eval/tasks.
        data_root: directory with copies of hub datasets, for example ``DATA_ROOT/cais/mmlu`` for cais/mmlu. Missing
            datasets are loaded from the hub.
        data_files: maps task names to JSON files (see local_tasks.py).
        scoring: how ``data_files`` are scored.
        plain_prompts: for evaluations without a chat template: ask local files and mmlu_dev_worked as training with
            ``chat_template: plain`` does. The format of all other tasks is the harness's.

    Raises:
        ConfigError: if a name is unknown, a task occurs twice, or documents are not available. The message says how to
            get them.
    """
    if scoring not in (*SCORINGS, LAST_NUMBER):
        raise ConfigError(f"scoring={scoring}; choose one of {', '.join((*SCORINGS, LAST_NUMBER))}")
    names = list(names)
    manager = _task_manager(names, data_root, {"plain_prompts": True} if plain_prompts else {})
    loaded = [task for name in names for task in _load(manager, name, data_root)]
    try:
        for name, file in (data_files or {}).items():
            path = user_path(file)
            if scoring == LAST_NUMBER:
                loaded.append(local_math_task(name, path, plain_prompts))
            else:
                loaded.append(local_choices_task(name, path, scoring, plain_prompts))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for task in leaf_tasks(loaded):
        _check_name(task.task_name)
    counts = Counter(task.task_name for task in leaf_tasks(loaded))
    groups = [group for group in loaded if isinstance(group, Group)]
    counts.update(each.name for group in groups for each in (group, *group.get_all_groups()))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"tasks: {', '.join(twice)} would run twice; results have one place for each name")
    return loaded


def _check_name(name: str) -> None:
    """Raise ConfigError if ``name`` cannot be part of a file name, which the samples of a task get."""
    if "/" in name or not name.isprintable() or not 0 < len(name.encode()) <= LONGEST_NAME:
        raise ConfigError(
            f"tasks: {name[:80]!r} cannot be the name of a task: files are named after it, so it must have no / and at "
            f"most {LONGEST_NAME} bytes"
        )


def check_fewshot(tasks: Iterable[Task | Group], num_fewshot: int | None) -> None:
    """Raise ConfigError if a task has fewer examples than ``num_fewshot``."""
    if not num_fewshot:
        return
    for task in leaf_tasks(tasks):
        try:
            count = len(list(task.fewshot_docs()))
        except Exception as error:  # a task without a rule for examples
            raise ConfigError(f"num_fewshot={num_fewshot}: {task.task_name} has no examples: {error!r}") from error
        if task.config.fewshot_split in (task.config.test_split, None) and not (
            task.has_training_docs() or task.has_validation_docs()
        ):
            count -= 1  # the question itself
        if num_fewshot > count:
            raise ConfigError(f"num_fewshot={num_fewshot}; {task.task_name} has {count} examples")


def leaf_tasks(tasks: Iterable[Task | Group]) -> list[Task]:
    """Return ``tasks`` with every group replaced by its tasks."""
    return [leaf for task in tasks for leaf in (task.get_all_tasks() if isinstance(task, Group) else [task])]


def _task_manager(names: list[str], data_root: str | None, metadata: dict[str, Any]) -> TaskManager:
    own = TaskManager(include_path=str(OWN_TASKS), include_defaults=False, metadata=metadata)
    if all(name in own.task_index for name in names):
        return own  # indexing the harness's thousands of files takes seconds
    manager = TaskManager(include_path=str(OWN_TASKS), metadata=metadata)
    if data_root is None:
        return manager
    root = user_path(data_root)
    if not root.is_dir():
        raise ConfigError(f"data_root={data_root} is not a directory")
    for entry in manager.task_index.values():
        repository = (entry.cfg or {}).get("dataset_path")
        if entry.yaml_path and repository and (root / repository).is_dir():
            # The index has the config without its functions, so read the file again. Inline configs take precedence.
            try:
                config = load_yaml(entry.yaml_path, resolve_func=True)
            except ImportError:
                continue  # needs a package that is not installed; loading the task reports it
            entry.cfg = {**config, "dataset_path": str(root / repository)}
            entry.yaml_path = None
    return manager


def _load(manager: TaskManager, name: str, data_root: str | None) -> list[Task | Group]:
    if name not in manager.task_index and not Path(name).is_file():
        import difflib

        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise ConfigError(
            f"tasks: no task, group or tag named {name}" + (f"; did you mean {', '.join(near)}?" * bool(near))
        )
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise ConfigError(f"tasks: {name} needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:  # datasets found neither a local copy nor the hub
        repository = _repository(manager, name)
        where = f"under data_root={data_root}" if data_root else "named by data_root"
        raise ConfigError(
            f"tasks: the data of {name} is neither {where} nor available from the hub ({error}). With hub access, "
            f"run hf download --repo-type dataset {repository} --local-dir DIR/{repository}; then set data_root=DIR"
        ) from error
    except Exception as error:  # tasks and scripts that today's versions of the harness and datasets no longer load
        raise ConfigError(f"tasks: {name} cannot be loaded: {error!r}; choose another task") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"tasks: {task.task_name} runs code that the model writes, or needs more than text")
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _repository(manager: TaskManager, name: str) -> str:
    """Return the dataset repository of a task, or of the first task of a group or tag."""
    entry = manager.task_index.get(name)
    while entry is not None and "dataset_path" not in (entry.cfg or {}):
        config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
        children = config.get("task")
        if not isinstance(children, list):  # a tag
            children = [n for n, e in manager.task_index.items() if entry.name in e.tags]
        first = next(iter(children), None)
        while isinstance(first, dict):  # a task with other settings, or a group within the group
            first = first.get("task")
            first = next(iter(first), None) if isinstance(first, list) else first
        entry = manager.task_index.get(first)
    return entry.cfg["dataset_path"] if entry is not None and entry.cfg else "OWNER/NAME"


def averages(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the unweighted mean of each metric that all tasks report."""
    metrics = [m for m in next(iter(results.values()), {}) if "," in m and "_stderr" not in m]
    return {
        metric: sum(values[metric] for values in results.values()) / len(results)
        for metric in metrics
        if all(isinstance(values.get(metric), int | float) for values in results.values())
    }
