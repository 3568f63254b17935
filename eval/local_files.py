"""Harness tasks from local files."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask


def local_task(
    name: str, file: Path, docs: list[dict[str, Any]], metadata: dict[str, Any] | None = None, **config: Any
) -> ConfigurableTask:
    """A task with metric ``acc`` over ``docs`` of ``file``, which have a ``prompt``.

    Args:
        metadata: what else its results depend on.
        config: the rest of the harness's config.
    """
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "fewshot_split": "test",  # the harness leaves the question itself out
            "doc_to_text": "{{prompt}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0, "file": str(file)} | (metadata or {}),
            **config,
        }
    )
