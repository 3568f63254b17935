"""Documents and few-shot examples of the mmlu_dev tasks."""

import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import FirstNSampler

from owlore_tune.data.datasets import mmlu_dev_rows
from owlore_tune.data.tokenizer import plain_prompt

Doc = dict[str, Any]


def dataset(**metadata: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(_docs(mmlu_dev_rows()))}


def held_out_dataset(plain_prompts: bool = False, **metadata: Any) -> dict[str, Dataset]:
    """
    Args:
        plain_prompts: write the field ``prompt`` as training with ``chat_template: plain`` does.
    """
    docs = _docs(mmlu_dev_rows("held_out"))
    for doc in docs:
        doc["prompt"] = plain_prompt(doc["instruction"])[0] if plain_prompts else doc["instruction"]
    return {"test": Dataset.from_list(docs)}


def _docs(rows: list[dict[str, Any]]) -> list[Doc]:
    docs = []
    for row in rows:
        question, *parts = re.split(r"\s*\(([A-E])\) ", row["instruction"])
        choices, answer = parts[1::2], "ABCD".find(re.findall(r"answer is \(([A-Z])\)", row["output"])[-1])
        if answer >= 0:  # one dev question has the answer E
            docs.append(
                {
                    "subject": row["subject"],
                    "instruction": row["instruction"],
                    "question": question,
                    "choices": choices[:4],
                    "answer": answer,
                }
            )
    return docs


class SameSubjectSampler(FirstNSampler):
    """The first other documents of the same subject, then of other subjects: a subject has only 5 documents."""

    def sample(self, n: int, eval_doc: Doc | None = None, df: Any = None, **kwargs: Any) -> Sequence[Doc]:
        pool = self.df if eval_doc is None else self.rm_eval_doc(eval_doc, self.df)
        if eval_doc is not None:
            pool = sorted(pool, key=lambda doc: doc["subject"] != eval_doc["subject"])  # stable
        return pool[:n]
