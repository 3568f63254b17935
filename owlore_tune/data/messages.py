"""Transforms of dataset rows to messages of a user and an assistant."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from torchtune.data import Message, validate_messages
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

    def is_blank(self, row: Mapping[str, Any]) -> bool:
        """Whether a valid row has a text without a visible character."""
        return not all(row[field].strip() for field in self.texts)

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


class ConversationToMessages(RowTransform):
    """Rows of ``messages``: a list of objects with a ``role`` and a text, ``content``. Answers of the assistant train.

    Args:
        field: that has the messages.
    """

    def __init__(self, field: str = "messages") -> None:
        self._field = field
        self.texts = (field,)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        messages = row.get(self._field)
        if not isinstance(messages, list):
            return f"no list in field {self._field!r}"
        for number, message in enumerate(messages):
            if problem := _problem_of(message if isinstance(message, dict) else {}):
                return f"{problem} in message {number} of field {self._field!r}"
        try:
            validate_messages(self(row)["messages"])
        except ValueError as error:
            return f"messages that do not take turns: {error}"
        return None if any(message["role"] == "assistant" for message in messages) else "no answer of an assistant"

    def is_blank(self, row: Mapping[str, Any]) -> bool:
        return not all(_text_of(message["content"]).strip() for message in row[self._field])

    def __call__(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        messages = [(message["role"], _text_of(message["content"])) for message in sample[self._field]]
        return {"messages": [Message(role=role, content=text, masked=role != "assistant") for role, text in messages]}


def _problem_of(message: Mapping[str, Any]) -> str | None:
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        return f"the role {role!r}, which is not system, user or assistant,"
    if message.get("tool_calls"):
        return "tool_calls, which cannot be trained,"
    text = _text_of(message.get("content"))
    if text is None:
        return "no text in 'content'"
    return None if is_unicode(text) else "an unpaired surrogate, which is not valid Unicode,"


def _text_of(content: Any) -> Any:
    """The text of a message, which can be in parts; None if it has another content."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts: list[Any] = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded. JSON can contain an unpaired surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
