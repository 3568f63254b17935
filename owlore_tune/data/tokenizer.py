"""One chat tokenizer for any Hugging Face model directory."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from torchtune.data import Message

from owlore_tune.errors import ConfigError
from owlore_tune.files import read_object, user_path, way_out

CHAT_TEMPLATES = ("model", "plain")
# Prompt, answer, EOS. The answer is on a new line, or after a space if the prompt ends in a colon, such as "Answer:".
# That space belongs to the answer, as it does in the tokens. `plain_prompt` is the same rule for evaluations.
_PLAIN = (
    "{% for message in messages %}{% set ends = loop.previtem and loop.previtem['content'].endswith(':') %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' if ends }}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{{ '\\n' if not message['content'].endswith(':') }}{% endif %}{% endfor %}"
)

_GENERATION = ("temperature", "top_k", "top_p", "repetition_penalty")  # of generation_config.json


def plain_prompt(prompt: str) -> tuple[str, str]:
    """Return ``prompt`` as the format ``plain`` writes it, and the text between it and the answer."""
    return (prompt, " ") if prompt.endswith(":") else (prompt + "\n", "")


class HFChatTokenizer:
    """torchtune's ``ModelTokenizer`` over ``tokenizer.json`` and the model's own Jinja chat template.

    ``tokenize_messages`` returns the tokens of transformers' ``apply_chat_template`` and a mask. Only the assistant's
    turns are unmasked, each including the special token that ends it.

    Args:
        path: a model directory with ``tokenizer.json``, ``tokenizer_config.json`` and a chat template (in the config
            or as ``chat_template.jinja``).
        max_seq_len: cut longer token lists to this length; null for no limit.
        chat_template: ``model`` for instruct models: the directory's template. ``plain`` for base models: the prompt,
            its answer and EOS, after the ids that the model's tokenizer puts before a text (most often BOS).
        enable_thinking: passed to the chat template. For data or evaluations with reasoning blocks.

    Raises:
        ValueError: if the directory lacks ``tokenizer.json``, a file cannot be read, ``max_seq_len`` is not positive,
            ``chat_template`` is unknown, a special token in the config is not in the vocabulary, or there is no EOS for
            ``plain``.
    """

    def __init__(
        self,
        path: str,
        max_seq_len: int | None = None,
        chat_template: str = "model",
        enable_thinking: bool = False,
    ) -> None:
        self.directory = directory = user_path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"tokenizer.path={path} has no tokenizer.json; {way_out(directory)}")
        if max_seq_len is not None and (type(max_seq_len) is not int or max_seq_len < 1):
            raise ValueError(f"tokenizer.max_seq_len={max_seq_len}; it must be a whole number from 1, or null")
        if chat_template not in CHAT_TEMPLATES:
            raise ValueError(f"tokenizer.chat_template={chat_template}; choose one of {', '.join(CHAT_TEMPLATES)}")
        if not isinstance(enable_thinking, bool):
            raise ValueError(f"tokenizer.enable_thinking={enable_thinking}; it must be true or false")
        self.max_seq_len = max_seq_len
        self.enable_thinking = enable_thinking
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"{file} cannot be read: {error}") from error
        self._tokenizer.no_truncation()  # the file may have that of its last use, which transformers ignores too
        self._tokenizer.no_padding()
        self._config = _read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in self._config:  # an older directory; transformers has the same rule
            older = _read_json(directory / "special_tokens_map.json")
            self._config |= {key: older[key] for key in ("bos_token", "eos_token") if key in older}
        self.special_tokens: dict[str, int] = {
            token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._pad_id()
        generation = _read_json(directory / "generation_config.json")
        if not (directory / "generation_config.json").is_file():  # as in transformers
            generation = {"eos_token_id": _read_json(directory / "config.json").get("eos_token_id")}
        self.stop_tokens = self._stop_tokens(generation)
        self.generation_config = {  # the model's defaults for generated text
            name: generation[name] for name in _GENERATION if isinstance(generation.get(name), int | float)
        }
        # Jinja source; None if there is none
        self.chat_template = _chat_template(directory, self._config) if chat_template == "model" else _PLAIN
        self.is_chat = chat_template == "model" and self.chat_template is not None
        if chat_template == "plain" and self.eos_id is None:
            raise ValueError(f"tokenizer.chat_template=plain ends answers with EOS, and {path} names none")
        self._start = self.prefix if chat_template == "plain" else []  # a model's template writes its own
        self.num_embeddings: int | None = None  # of the model, once it is known
        self._template = None if self.chat_template is None else _compile_template(self.chat_template)
        self.now = datetime.now()  # for templates that print the date; a resumed run keeps its start date

    @property
    def prefix(self) -> list[int]:
        """Ids that the model's tokenizer puts before a text by default, as in transformers: most often BOS, or none."""
        encoding = self._tokenizer.encode("a")
        added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [index for index, _ in takewhile(lambda pair: pair[1], added)]

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def largest_needed_id(self) -> int:
        """The largest id of the vocabulary without added tokens, and of BOS, EOS and padding.

        A text model's tokenizer can have more added tokens than the model, such as those for images in Gemma 3.
        """
        named = [index for index in (self.bos_id, self.eos_id, self.pad_id) if index is not None]
        return max([*self._tokenizer.get_vocab(with_added_tokens=False).values(), *named])

    def _pad_id(self) -> int:
        # Many models pad with the token that ends a turn. torchtune's generate treats every pad token in a prompt as
        # padding, so use the unknown token if there is one. In training, padding is always masked.
        candidates = [self._special_id(key) for key in ("pad_token", "unk_token")]
        usable = [index for index in candidates if index is not None and index != self.eos_id]
        return usable[0] if usable else (self.eos_id or 0)

    def _stop_tokens(self, generation_config: dict[str, Any]) -> list[int]:
        """EOS and the other tokens that end generation. Chat models often end a turn with a token other than EOS."""
        more = generation_config.get("eos_token_id") or []
        more = more if isinstance(more, list) else [more]
        if bad := [token for token in more if type(token) is not int]:
            raise ValueError(
                f"eos_token_id {bad[0]!r} is not a token id; correct it in {self.directory}, in generation_config.json "
                "or, if there is none, in config.json"
            )
        return list(dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *more]))

    def tokens_from(self, first: int) -> list[str]:
        """Added tokens with an id of at least ``first``."""
        return [token.content for index, token in self._tokenizer.get_added_tokens_decoder().items() if index >= first]

    def digest(self) -> str:
        """A digest of all that `digests` covers."""
        return _digest(json.dumps(self.digests()))

    def digests(self) -> dict[str, str]:
        """Digests of the tokenizer with its special tokens, and of the chat template."""
        special = [list(self._named_tokens().values()), self.prefix, self.pad_id, self.stop_tokens]
        return {
            "tokenizer": _digest(self._tokenizer.to_str() + json.dumps(special)),
            "chat template": _digest(f"{self.chat_template} enable_thinking={self.enable_thinking}"),
        }

    def _named_tokens(self) -> dict[str, str | None]:
        return {name: self._special_token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}

    def _special_id(self, key: str) -> int | None:
        token = self._special_token(key)
        if token is None:
            return None
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"{key} {token!r} of {self.directory} is not in the vocabulary of tokenizer.json")
        return index

    def _special_token(self, key: str) -> str | None:
        token = self._config.get(key)
        return token["content"] if isinstance(token, dict) else token

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Token ids of plain text, with BOS and EOS if requested and the model has them."""
        tokens = self._known(self._tokenizer.encode(text, add_special_tokens=False).ids)
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if add_eos and self.eos_id is not None else []
        return [*bos, *tokens, *eos]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Render the messages with the chat template.

        Raises:
            ValueError: if the model has no chat template, or the template rejects the messages.
        """
        turns = [{"role": message.role, "content": message.text_content} for message in messages]
        if self._template is None:
            raise ValueError(
                "this model has no chat template; set tokenizer.chat_template=plain, or use an instruct model"
            )
        self._template.environment.globals["strftime_now"] = self.now.strftime
        try:
            return self._template.render(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=self.enable_thinking,
                tools=None,
                documents=None,
                **{name: token for name, token in self._named_tokens().items() if token is not None},
            )
        except Exception as error:  # a template is a program and can raise anything
            raise ValueError(f"the chat template rejects these messages: {error}") from error

    def tokenize_messages(self, messages: list[Message], add_end_tokens: bool = True) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and a mask that is True for tokens without a loss.

        The loss covers only unmasked assistant messages. Conversations longer than ``max_seq_len`` are cut at the end,
        and no end token is added there.

        Args:
            add_end_tokens: False to prompt for the assistant's answer, as in generation. An empty assistant message at
                the end is then dropped.
        """
        if not add_end_tokens and messages[-1].role == "assistant" and not messages[-1].text_content:
            messages = messages[:-1]
        text = self.render(messages, add_generation_prompt=not add_end_tokens)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = self._assistant_spans(messages, text)
        tokens, mask = self._start + self._known(encoding.ids), [True] * len(self._start + encoding.ids)
        for i, (start, end) in enumerate(encoding.offsets, start=len(self._start)):
            mask[i] = not any(_is_in(text, start, end, first, last) for first, last in spans)
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def _known(self, tokens: list[int]) -> list[int]:
        if self.num_embeddings is not None and max(tokens, default=0) >= self.num_embeddings:
            token = self._tokenizer.id_to_token(max(tokens))
            raise ValueError(f"a text has the token {token!r}, for which the model has no embedding; remove it")
        return tokens

    def _assistant_spans(self, messages: list[Message], text: str) -> list[tuple[int, int]]:
        """(start, end) of the assistant's unmasked turns in the rendered text; a turn starts at its answer."""
        spans = []
        for i, message in enumerate(messages):
            if message.role != "assistant" or message.masked:
                continue
            self._check_thinking(message.text_content)
            prompt = self.render(messages[:i], add_generation_prompt=True)
            turn = self.render(messages[: i + 1])
            if not (turn.startswith(prompt) and text.startswith(turn)):
                raise ValueError(
                    "the chat template renders earlier turns or the beginning of an answer in another way than for "
                    "generation; use single-turn data or another tokenizer.chat_template, such as plain"
                )
            spans.append((len(prompt), len(prompt) + self._answer_length(turn[len(prompt) :])))
        return spans

    def _check_thinking(self, answer: str) -> None:
        """Refuse reasoning in answers if the template puts an empty block, or an instruction not to reason, before."""
        if not self.enable_thinking and "enable_thinking" in str(self.chat_template) and "<think>" in answer:
            raise ValueError(
                "the answer has a reasoning block (<think>), but the chat template is used without its thinking mode; "
                "set tokenizer.enable_thinking=true"
            )

    def _answer_length(self, answer: str) -> int:
        # Whitespace after the token that ends the turn belongs to the template's layout, not to the answer.
        stripped = answer.rstrip()
        return len(stripped) if stripped.endswith(tuple(self.special_tokens)) else len(answer)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        sample = dict(sample)
        messages = sample.pop("messages")
        if not inference and any(message.role == "user" and not message.masked for message in messages):
            raise ValueError(
                "a user's message is not masked, and only answers are trained; set dataset.train_on_input=false, or "
                "masked=True in a message transform of your own"
            )
        tokens, mask = self.tokenize_messages(messages, add_end_tokens=not inference)
        return {**sample, "tokens": tokens, "mask": mask}


def _is_in(text: str, start: int, end: int, first: int, last: int) -> bool:
    """Whether a token is in a turn. It may contain whitespace around the turn, as special tokens and words do."""
    inside = first <= max(start, end - 1) and start < last
    return inside and not text[start:first].strip() and not text[last:end].strip()


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Raise ConfigError if a torchtune ``tokenizer`` has token ids that the embeddings of a decoder lack."""
    num_embeddings = model.tok_embeddings.weight.shape[0]
    if isinstance(tokenizer, HFChatTokenizer):
        most, tokenizer.num_embeddings = tokenizer.largest_needed_id(), num_embeddings
    else:
        special = getattr(tokenizer, "special_tokens", None) or {}
        most = max([getattr(tokenizer, "vocab_size", 0) - 1, *special.values(), tokenizer.pad_id or 0])
    if most >= num_embeddings:
        raise ConfigError(
            f"the tokenizer has token ids up to {most}, and the model has embeddings for {num_embeddings} tokens; "
            "check that tokenizer.path and the model belong together"
        )


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    template = file.read_text() if file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not (isinstance(template, str) and template.strip()):
        raise ValueError(f"the chat template of {directory} is empty or no text; set tokenizer.chat_template=plain")
    return template


def _compile_template(source: str) -> Template:
    """Compile it with the settings and helpers that chat templates expect, as transformers does."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(source)
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from error
