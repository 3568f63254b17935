"""An LLM judge behind an OpenAI-compatible endpoint, built on lm-evaluation-harness's API model."""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponseError, ClientSession
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion
from omegaconf import DictConfig, OmegaConf
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from owlore_tune.config.components import check_keys
from owlore_tune.config.schema import check_type
from owlore_tune.errors import ConfigError

Chat = list[dict[str, str]]
_MALFORMED = "empty or malformed answer"
LARGEST_REPLY = 2**20  # bytes, decompressed; 2048 tokens take about 1 % of this


@dataclass(frozen=True)
class JudgeConfig:
    """The ``judge:`` block of an MT-Bench config, checked on construction.

    Raises:
        ConfigError: if a value has the wrong type or is out of range, or the API key is not in the environment.
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"  # name of the environment variable; null sends no key
    repeats: int = 1  # judgments per answer
    num_concurrent: int = 8  # concurrent requests
    timeout: int = 120  # seconds per request
    max_retries: int = 8  # attempts per request
    longest_wait: float = 60.0  # seconds between two attempts

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(f"judge.{field.name}", getattr(self, field.name), field.type)
        for key in ("repeats", "num_concurrent", "timeout", "max_retries", "longest_wait"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"judge.{key}={getattr(self, key)}; it must be above 0")
        check_url(self.base_url)
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
        return cls(**OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def check_url(base_url: Any) -> None:
    """Raise ConfigError if ``judge.base_url`` is not a URL, or contains credentials or a query.

    The message does not repeat a URL with credentials. None passes; `JudgeConfig.from_config` reports missing fields.
    """
    if base_url is None:
        return
    try:
        url = urlsplit(base_url)
        host, _ = url.hostname, url.port
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"judge.base_url is not a URL: {error}") from error
    if url.username or url.password or url.query or url.fragment:
        raise ConfigError(
            "judge.base_url contains a user name, key or query, which would be logged; use judge.api_key_env"
        )
    if url.scheme not in ("http", "https") or not host:
        raise ConfigError(f"judge.base_url={base_url}; it must begin with http:// or https:// and a host")


class Judge(LocalChatCompletion):
    """Sends judgment requests concurrently. Failed requests are retried; the final failures are counted.

    Requests have the same fields as those of FastChat's judge: model, messages, n=1, temperature=0, max_tokens=2048.

    Args:
        on_judgment: called with the index of a request and the judge's text as soon as the text arrives.
    """

    def __init__(self, config: JudgeConfig, on_judgment: Callable[[int, str], None]) -> None:
        path = "/chat/completions"
        super().__init__(
            base_url=config.base_url.rstrip("/").removesuffix(path) + path,
            model=config.model,
            num_concurrent=config.num_concurrent,
            timeout=config.timeout,
            max_retries=1,  # retries are handled below, because a failure here would abort all requests
        )
        self._key = os.environ[config.api_key_env] if config.api_key_env else ""
        self._on_judgment = on_judgment
        self._retry = retry(
            retry=retry_if_exception(_is_passing),
            stop=stop_after_attempt(config.max_retries),
            wait=partial(_wait, wait_random_exponential(multiplier=2, max=config.longest_wait), config.longest_wait),
            reraise=True,
        )
        self.failures: list[str] = []  # the reason for each failed request

    @property
    def api_key(self) -> str:
        return self._key

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def ask(self, chats: list[Chat]) -> None:
        """Judge ``chats``. Results go to ``on_judgment``, errors to ``failures``."""
        requests = [JsonChatStr(json.dumps(chat, ensure_ascii=False)) for chat in chats]
        asyncio.run(
            self.get_batched_requests(requests, cache_keys=list(range(len(chats))), generate=True, gen_kwargs={})
        )

    def _create_payload(self, messages: Chat, **kwargs: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}

    async def amodel_call(self, session, sem, messages, *, cache_keys, **kwargs) -> list[str]:  # type: ignore[override]
        payload = self._create_payload(self.create_message(messages))

        async def attempt() -> str:
            async with asyncio.timeout(self.timeout):
                text = await self._post(session, payload)
            return text.replace(self._key, "***") if self._key else text

        try:
            async with sem:  # also between attempts: others would use up what the endpoint allows in a minute
                text = await self._retry(attempt)()
        except (ClientError, TimeoutError, ValueError) as error:
            self.failures.append(_reason(error))
            return [""]
        self._on_judgment(cache_keys[0], text)
        return [text]

    async def _post(self, session: ClientSession, payload: dict[str, Any]) -> str:
        """Return the judge's text. Unlike the harness's own call, this limits the size of the reply.

        Raises:
            ValueError: if the reply is too large or malformed, or has no valid text.
            ClientError: if the endpoint rejects the request or the connection breaks.
        """
        async with session.post(self.base_url, json=payload, headers=self.header) as response:
            response.raise_for_status()
            content = bytearray()
            async for chunk in response.content.iter_chunked(2**16):
                content += chunk
                if len(content) > LARGEST_REPLY:
                    raise ValueError(f"answer of more than {LARGEST_REPLY:,} bytes")
        try:
            (text,) = self.parse_generations(outputs=json.loads(content))
            text.encode()  # a lone surrogate could not be written to a file
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(_MALFORMED) from error
        if not text.strip():
            raise ValueError(_MALFORMED)
        return text


def _wait(exponential: Callable[[RetryCallState], float], longest: float, state: RetryCallState) -> float:
    """Seconds until the next attempt: at least the endpoint's Retry-After, at most ``longest``."""
    error = state.outcome.exception() if state.outcome else None
    headers = getattr(error, "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    return min(max(exponential(state), float(asked) if asked.isdigit() else 0.0), longest)


def _is_passing(error: BaseException) -> bool:
    """Whether a retry may succeed. It cannot if the endpoint rejects the request or the key."""
    if isinstance(error, ClientResponseError):
        return error.status in (408, 409, 429) or error.status >= 500
    return isinstance(error, ClientError | TimeoutError | ValueError)


def _reason(error: Exception) -> str:
    """Return a short reason without addresses, so failures of one kind are counted together."""
    if isinstance(error, ClientResponseError):
        return f"HTTP {error.status}"
    return {"TimeoutError": "timeout", "ValueError": str(error)}.get(type(error).__name__, type(error).__name__)
