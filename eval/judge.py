"""A judge behind any OpenAI-compatible endpoint, as a model of lm-evaluation-harness."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponseError, ContentTypeError
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion
from omegaconf import DictConfig
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from owlore_tune.config import ConfigError, check_keys, check_type, plain

Chat = list[dict[str, str]]
_MALFORMED = "empty or malformed answer"


@dataclass(frozen=True)
class JudgeConfig:
    """The ``judge:`` block of an MT-Bench config, checked on construction.

    Raises:
        ConfigError: if a value has the wrong type or is out of its range, or the key is not in the environment.
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"  # name of the environment variable; null sends no key
    repeats: int = 1  # judgments of each answer
    num_concurrent: int = 8  # requests
    timeout: int = 120  # seconds, of one request
    max_retries: int = 8  # attempts at one request
    longest_wait: float = 60.0  # seconds, between two attempts

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(f"judge.{field.name}", getattr(self, field.name), field.type)
        for key in ("repeats", "num_concurrent", "timeout", "max_retries", "longest_wait"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"judge.{key}={getattr(self, key)}; it must be above 0")
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"judge.base_url={self.base_url}; it must begin with http:// or https:// and a host")
        if url.username or url.query:
            raise ConfigError("judge.base_url holds a name or a query, which would be logged; use judge.api_key_env")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ConfigError(
                f"judge.api_key_env={self.api_key_env} is not set in the environment; export it, or set "
                "judge.api_key_env=null for an endpoint without keys"
            )

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "JudgeConfig":
        check_keys(cfg, [field.name for field in fields(cls)], "judge")
        if missing := [key for key in ("base_url", "model") if cfg.get(key) is None]:
            raise ConfigError(f"missing in the config: {', '.join(f'judge.{key}' for key in missing)}")
        return cls(**plain(cfg))


class Judge(LocalChatCompletion):
    """Asks for judgments, several at once. A request that fails is tried again; if it goes on failing, it is counted.

    Sent are the fields that FastChat's judge sends: model, messages, n=1, temperature=0, max_tokens=2048.

    Args:
        on_judgment: called with the number of a request and the judge's text as soon as that is there.
    """

    def __init__(self, config: JudgeConfig, on_judgment: Callable[[int, str], None]) -> None:
        path = "/chat/completions"
        super().__init__(
            base_url=config.base_url.rstrip("/").removesuffix(path) + path,
            model=config.model,
            num_concurrent=config.num_concurrent,
            timeout=config.timeout,
            max_retries=1,  # ours are around each call, so that one failure does not end them all
        )
        self._key = os.environ[config.api_key_env] if config.api_key_env else ""
        self._on_judgment = on_judgment
        self._retry = retry(
            retry=retry_if_exception(_is_passing),
            stop=stop_after_attempt(config.max_retries),
            wait=partial(_wait, wait_random_exponential(multiplier=2, max=config.longest_wait), config.longest_wait),
            reraise=True,
        )
        self.failures: list[str] = []  # why, of each request that was given up

    @property
    def api_key(self) -> str:
        return self._key

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def ask(self, chats: list[Chat]) -> None:
        """Judge all of ``chats``; what comes of it goes to ``on_judgment`` and ``failures``."""
        requests = [JsonChatStr(json.dumps(chat, ensure_ascii=False)) for chat in chats]
        loggers = [
            logging.getLogger(name) for name in ("lm_eval.models.api_models", "lm_eval.models.openai_completions")
        ]
        for logger in loggers:  # an endpoint may send the key back in an error, which the harness logs
            logger.addFilter(self._redact)
        try:
            asyncio.run(
                self.get_batched_requests(requests, cache_keys=list(range(len(chats))), generate=True, gen_kwargs={})
            )
        finally:
            for logger in loggers:
                logger.removeFilter(self._redact)

    def _create_payload(self, messages: Chat, **kwargs: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}

    async def amodel_call(self, session, sem, messages, *, cache_keys, **kwargs) -> list[str]:  # type: ignore[override]
        async def attempt() -> str:
            try:
                (text,) = await LocalChatCompletion.amodel_call(self, session, sem, messages, **kwargs)
            except (AttributeError, TypeError) as error:  # JSON of another form than the harness reads
                raise ValueError(_MALFORMED) from error
            if not isinstance(text, str) or not text.strip():
                raise ValueError(_MALFORMED)
            return text.replace(self._key, "***") if self._key else text

        try:
            text = await self._retry(attempt)()
        except (ClientError, TimeoutError, ValueError) as error:
            self.failures.append(_reason(error))
            return [""]
        self._on_judgment(cache_keys[0], text)
        return [text]

    def _redact(self, record: logging.LogRecord) -> bool:
        if self._key:
            record.msg, record.args = record.getMessage().replace(self._key, "***"), ()
        return True


def _wait(exponential: Callable[[RetryCallState], float], longest: float, state: RetryCallState) -> float:
    """Seconds to the next attempt: as long as the endpoint asks for, but no longer than ``longest``."""
    error = state.outcome.exception() if state.outcome else None
    headers = getattr(error, "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    return min(max(exponential(state), float(asked) if asked.isdigit() else 0.0), longest)


def _is_passing(error: BaseException) -> bool:
    """Whether a later attempt may succeed: not where the endpoint refuses the request or the key itself."""
    if isinstance(error, ClientResponseError) and not isinstance(error, ContentTypeError):
        return error.status in (408, 409, 429) or error.status >= 500
    return isinstance(error, ClientError | TimeoutError | ValueError)


def _reason(error: Exception) -> str:
    """In a few words and without addresses, so that failures of one kind count as one."""
    if isinstance(error, ClientResponseError) and not isinstance(error, ContentTypeError):
        return f"HTTP {error.status}"
    return {"TimeoutError": "timeout", "ValueError": str(error)}.get(type(error).__name__, type(error).__name__)
