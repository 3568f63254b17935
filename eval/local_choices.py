"""Multiple-choice tasks from local JSON files in the format of Commonsense170K (LLM-Adapters, arXiv 2304.01933).

The instruction of a row ends with its options, ``Answer format: answer1/answer2`` (or true/false, option1/…,
solution1/…, ending1/…). The field ``answer`` is one of them.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from owlore_evals.local_files import local_task
from owlore_tune.data.datasets import read_questions
from owlore_tune.data.tokenizer import plain_prompt

Doc = dict[str, Any]
SCORINGS = ("loglikelihood", "generate")
_OPTIONS = re.compile(r"Answer format: *(\S+(?:/\S+)+)")
_ANSWER = "the correct answer is {}"  # as in Commonsense170K's outputs


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
    build = partial(local_task, name, file, docs, {"scoring": scoring})
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
