"""Transforms of dataset rows to a user message and an assistant message."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from torchtune.data import Message
from torchtune.modules.transforms import Transform


class RowTransform(Transform):
    """Transforms a dataset row to a user message and an assistant message.

    Attributes:
        texts: fields that must be text.
    """

    texts: tuple[str, ...] = ()

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """A description of the problem with ``row``, naming the field; None if it is valid."""
        for field in self.texts:
            if not isinstance(row.get(field), str):
                return f"no text in field {field!r}"
        for field, value in row.items():
            if isinstance(value, str) and not is_unicode(value):
                return f"an unpaired surrogate in field {field!r}, which is not valid Unicode"
        return None

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        raise NotImplementedError

    def __call__(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        prompt, answer = self.prompt_and_answer(sample)
        return {
            "messages": [
                Message(role="user", content=prompt, masked=True),
                Message(role="assistant", content=answer),
            ]
        }


class InstructionToMessages(RowTransform):
    """Rows of ``instruction``, optional ``input``, and ``output``. The input goes below the instruction."""

    texts = ("instruction", "output")

    def problem(self, row: Mapping[str, Any]) -> str | None:
        if not isinstance(row.get("input"), str | None):
            return f"{row['input']!r} in field 'input', which is not text"
        return super().problem(row)

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        return "\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]


class ProblemToMessages(RowTransform):
    """Rows of ``question`` and ``answer``."""

    texts = ("question", "answer")

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        return f"Question: {row['question']}\nAnswer:", row["answer"]


class ChoicesToMessages(RowTransform):
    """Rows of ``question``, ``choices`` and the index ``answer``. The assistant's message is a letter."""

    texts = ("question",)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            return "no list of strings in field 'choices'"
        if not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(ascii_uppercase)):
            return f"{answer!r} in field 'answer', which is not an index of its {len(choices)} choices"
        return super().problem(row)

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        choices = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"], strict=False)]
        return "\n".join([row["question"].strip(), *choices, "Answer:"]), ascii_uppercase[row["answer"]]


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded. JSON can contain an unpaired surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
