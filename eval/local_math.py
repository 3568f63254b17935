"""Arithmetic word problems from local JSON files in LLM-Adapters' format (arXiv 2304.01933).

The ``answer`` of a row is a number. Greedily decoded text is correct if its last number equals the answer.
"""

import math
import re
from pathlib import Path

from lm_eval.api.task import ConfigurableTask

from owlore_evals.local_files import local_task
from owlore_tune.data.datasets import read_questions
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
    return local_task(
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
