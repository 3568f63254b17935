"""Arithmetic word problems from local JSON files in LLM-Adapters' format (arXiv 2304.01933).

The ``answer`` of a row is a number. Greedily decoded text is correct if its last number equals the answer.
"""

import math
import re
from pathlib import Path

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from owlore_tune.data.rows import read_rows, row_prompt
from owlore_tune.data.tokenizer import plain_prompt

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOLERANCE = 1e-3  # as in LLM-Adapters' evaluation


def local_math_task(name: str, file: Path, plain: bool = False) -> ConfigurableTask:
    """Build a harness task with metric ``acc`` from the rows of ``file``.

    Args:
        plain: ask as training with ``chat_template: plain`` does, for evaluations without a chat template.

    Raises:
        ValueError: if the file cannot be read, or a row's answer is not a number.
    """
    docs = []
    for number, row in enumerate(read_rows(file, "data_files", ["instruction"])):
        try:
            answer = float(row["answer"])
            if isinstance(row["answer"], bool) or not math.isfinite(answer):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"data_files: {file}: row {number}: answer={row.get('answer')!r} is not a number"
            ) from None
        prompt = row_prompt(file, number, row)
        docs.append({"prompt": plain_prompt(prompt)[0] if plain else prompt, "answer": answer})
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **metadata: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "fewshot_split": "test",  # the harness leaves the question itself out
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": [], "max_gen_toks": 192, "do_sample": False},
            "process_results": lambda doc, results: {"acc": is_right(results[0], doc["answer"])},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0, "file": str(file)},
        }
    )


def is_right(text: str, answer: float) -> bool:
    """Whether the last number in ``text`` is ``answer``."""
    number = last_number(text)
    return number is not None and abs(number - answer) <= TOLERANCE


def last_number(text: str) -> float | None:
    """Return the last number in ``text``, or None. Commas between thousands are allowed."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None
