"""Harness tasks from local JSON files in LLM-Adapters' formats (arXiv 2304.01933), with metric ``acc``.

Multiple choice, as in Commonsense170K: the instruction of a row ends with its options, ``Answer format:
answer1/answer2`` (or true/false, option1/…, solution1/…, ending1/…). The field ``answer`` is one of them.

Arithmetic word problems: the ``answer`` of a row is a number. Greedily decoded text is correct if its last number
equals the answer.
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from owlore_tune.data.datasets import read_questions
from owlore_tune.data.tokenizer import plain_prompt

Doc = dict[str, Any]
SCORINGS = ("loglikelihood", "generate")
_OPTIONS = re.compile(r"Answer format: *(\S+(?:/\S+)+)")
_ANSWER = "the correct answer is {}"  # as in Commonsense170K's outputs
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOLERANCE = 1e-3  # as in LLM-Adapters' evaluation


def local_choices_task(name: str, file: Path, scoring: str, plain: bool = False) -> ConfigurableTask:
    """Build a harness task with metric ``acc`` from the rows of ``file``.

    Args:
        scoring: ``loglikelihood`` takes the option with the most likely sentence. ``generate`` takes the first option
            in at most 32 greedily decoded tokens, as in LLM-Adapters' evaluation; text without an option is wrong.
        plain: ask as training with ``chat_template: plain`` does, for evaluations without a chat template.

    Raises:
        ValueError: if the file cannot be read, or a row has no options or an answer that is not one of them.
    """
    docs = [
        _doc(f"data_files: {file}: row {number}", row, prompt, plain) for number, row, prompt in read_questions(file)
    ]
    build = partial(_local_task, name, file, docs, {"scoring": scoring})
    if scoring == "loglikelihood":
        return build(output_type="multiple_choice", doc_to_choice="sentences", doc_to_target="gold")
    return build(
        output_type="generate_until",
        doc_to_target="{{options[gold]}}",
        generation_kwargs={"until": [], "max_gen_toks": 32, "do_sample": False},
        process_results=lambda doc, results: {"acc": first_option(doc["options"], results[0]) == doc["gold"]},
    )


def first_option(options: list[str], text: str) -> int | None:
    """Return the index of the option that occurs first in ``text``, or None."""
    found = re.search("|".join(map(re.escape, sorted(options, key=len, reverse=True))), text)
    return options.index(found.group()) if found else None


def _doc(place: str, row: dict[str, Any], prompt: str, plain: bool) -> Doc:
    listed = _OPTIONS.search(row["instruction"])
    options = listed.group(1).split("/") if listed else []
    if len(options) < 2:
        raise ValueError(f"{place} has no 'Answer format: OPTION/OPTION' in its instruction")
    if len(set(options)) < len(options):
        raise ValueError(f"{place} has an option twice: {options}")
    if row.get("answer") not in options:
        raise ValueError(f"{place}: answer={row.get('answer')!r}; its options are {options}")
    prompt, between = plain_prompt(prompt) if plain else (prompt, "")
    sentences = [between + _ANSWER.format(option) for option in options]
    return {"prompt": prompt, "options": options, "sentences": sentences, "gold": options.index(row["answer"])}


def local_math_task(name: str, file: Path, plain: bool = False) -> ConfigurableTask:
    """Build a harness task with metric ``acc`` from the rows of ``file``.

    Args:
        plain: ask as training with ``chat_template: plain`` does, for evaluations without a chat template.

    Raises:
        ValueError: if the file cannot be read, or a row's answer is not a number.
    """
    docs = []
    for number, row, prompt in read_questions(file):
        try:
            answer = float(row["answer"])
            if isinstance(row["answer"], bool) or not math.isfinite(answer):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"data_files: {file}: row {number}: answer={row.get('answer')!r} is not a number"
            ) from None
        docs.append({"prompt": plain_prompt(prompt)[0] if plain else prompt, "answer": answer})
    return _local_task(
        name,
        file,
        docs,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [], "max_gen_toks": 192, "do_sample": False},
        process_results=lambda doc, results: {"acc": is_right(results[0], doc["answer"])},
    )


def is_right(text: str, answer: float) -> bool:
    """Whether the last number in ``text`` is ``answer``."""
    number = last_number(text)
    return number is not None and abs(number - answer) <= TOLERANCE


def last_number(text: str) -> float | None:
    """Return the last number in ``text``, or None. Commas between thousands are allowed."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def _local_task(
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
