"""Questions, prompts and ratings of MT-Bench, in the format of FastChat's files."""

import json
import re
from dataclasses import dataclass

from owlore_evals.judge import Chat
from owlore_tune.errors import ConfigError
from owlore_tune.files import user_path

WITH_REFERENCE = ("math", "reasoning", "coding")  # categories in which the judge sees gpt-4's answer
# FastChat's patterns with a limit on digits. Without one, a long digit string takes quadratic time.
_RATINGS = (re.compile(r"\[\[(\d{1,9}\.?\d{0,9})\]\]"), re.compile(r"\[(\d{1,9}\.?\d{0,9})\]"))
_HOW_TO_GET = (
    "FastChat's files are needed: judge_prompts.jsonl, mt_bench/question.jsonl, mt_bench/reference_answer/gpt-4.jsonl. "
    "Run `git clone https://github.com/lm-sys/FastChat` and set data_dir=FastChat/fastchat/llm_judge/data; "
    "docs/evaluation.md shows an alternative"
)


@dataclass(frozen=True)
class Question:
    question_id: int
    category: str
    turns: list[str]
    reference: list[str] | None  # gpt-4's answers, if the judge sees them


def read_files(data_dir: str | None) -> tuple[list[Question], dict[str, dict[str, str]]]:
    """Read questions with references, and the judge's prompts by name, from FastChat's files.

    Raises:
        ConfigError: if a file is missing or malformed.
    """
    if data_dir is None:
        raise ConfigError(f"data_dir is not set. {_HOW_TO_GET}")
    root = user_path(data_dir)
    files = [root / name for name in ("mt_bench/question.jsonl", "mt_bench/reference_answer/gpt-4.jsonl")]
    files.append(root / "judge_prompts.jsonl")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(f"data_dir={data_dir}: no {', '.join(missing)}. {_HOW_TO_GET}")
    try:
        questions, references, prompts = ([json.loads(line) for line in file.open() if line.strip()] for file in files)
        reference = {row["question_id"]: row["choices"][0]["turns"] for row in references}
        by_name = {row["name"]: row for row in prompts}
        for name in ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"):
            by_name[name]["system_prompt"], by_name[name]["prompt_template"]
        found = [
            Question(
                row["question_id"],
                row["category"],
                row["turns"],
                reference[row["question_id"]] if row["category"] in WITH_REFERENCE else None,
            )
            for row in questions
        ]
        for question in found:
            for texts in filter(None, (question.turns, question.reference)):
                if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"question {question.question_id} does not have two turns of text")
            for turn in (1, 2):  # check that all placeholders of the prompts can be filled
                judge_chat(by_name, question, ["", ""], turn)
        return found, by_name
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise ConfigError(f"data_dir={data_dir} does not have FastChat's format: {error!r}") from error


def judge_chat(prompts: dict[str, dict[str, str]], question: Question, answers: list[str], turn: int) -> Chat:
    """Build the request to grade the answer of ``turn`` (1 or 2)."""
    name = ("single-math-v1" if question.reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    if turn == 1:
        values = {"question": question.turns[0], "answer": answers[0]}
    else:
        values = {f"question_{i}": text for i, text in enumerate(question.turns[:2], start=1)}
        values |= {f"answer_{i}": text for i, text in enumerate(answers, start=1)}
    if question.reference:
        values |= {f"ref_answer_{i}": text for i, text in enumerate(question.reference[:turn], start=1)}
    system = prompts[name]["system_prompt"]
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompts[name]["prompt_template"].format(**values)}]


def parse_rating(judgment: str) -> float | None:
    """Return the first [[rating]], else the first [rating]; None if there is none or it is not in 1 to 10."""
    for pattern in _RATINGS:
        if found := pattern.search(judgment):
            rating = float(found.group(1))
            return rating if 1 <= rating <= 10 else None
    return None
