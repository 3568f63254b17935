"""An LLM judge behind an OpenAI-compatible endpoint, and its ratings."""

import asyncio
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponseError, ClientSession, ClientTimeout, TCPConnector
from omegaconf import DictConfig, OmegaConf
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_random_exponential
from tqdm.asyncio import tqdm_asyncio

from owlore_tune.config.components import check_keys
from owlore_tune.config.schema import check_type
from owlore_tune.errors import ConfigError

Chat = list[dict[str, str]]
_MALFORMED = "empty or malformed answer"
# FastChat's patterns with a limit on digits. Without one, a long digit string takes quadratic time.
_RATINGS = (re.compile(r"\[\[(\d{1,9}\.?\d{0,9})\]\]"), re.compile(r"\[(\d{1,9}\.?\d{0,9})\]"))


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


class Judge:
    """Sends judgment requests concurrently. Failed requests are retried; the final failures are counted.

    Requests have the same fields as those of FastChat's judge: model, messages, n=1, temperature=0, max_tokens=2048.

    Args:
        on_judgment: called with the index of a request and the judge's text as soon as the text arrives.

    Attributes:
        failures: the reason for each failed request.
    """

    def __init__(self, config: JudgeConfig, on_judgment: Callable[[int, str], None]) -> None:
        path = "/chat/completions"
        self._url = config.base_url.rstrip("/").removesuffix(path) + path
        self._config = config
        self._key = os.environ[config.api_key_env] if config.api_key_env else ""
        self._on_judgment = on_judgment
        self._post_until_answered = retry(
            retry=retry_if_exception(_is_passing),
            stop=stop_after_attempt(config.max_retries),
            wait=partial(_wait, wait_random_exponential(multiplier=2, max=config.longest_wait), config.longest_wait),
            reraise=True,
        )(self._post)
        self.failures: list[str] = []

    def ask(self, chats: list[Chat]) -> None:
        """Judge ``chats``. Results go to ``on_judgment``, errors to ``failures``."""
        asyncio.run(self._ask_all(chats))

    async def _ask_all(self, chats: list[Chat]) -> None:
        places = asyncio.Semaphore(self._config.num_concurrent)
        async with ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=ClientTimeout(total=self._config.timeout),
            connector=TCPConnector(limit=self._config.num_concurrent),
            raise_for_status=True,
        ) as session:
            asked = [self._ask(session, places, number, chat) for number, chat in enumerate(chats)]
            await tqdm_asyncio.gather(*asked, desc="Judging")

    async def _ask(self, session: ClientSession, places: asyncio.Semaphore, number: int, chat: Chat) -> None:
        try:
            async with places:  # also between attempts: others would use up what the endpoint allows in a minute
                text = await self._post_until_answered(session, chat)
        except (ClientError, TimeoutError, ValueError) as error:
            self.failures.append(_reason(error))
        else:
            self._on_judgment(number, text.replace(self._key, "***") if self._key else text)

    async def _post(self, session: ClientSession, chat: Chat) -> str:
        """Return the judge's text.

        Raises:
            ValueError: if the reply is malformed, or has no valid text.
            ClientError: if the endpoint rejects the request or the connection breaks.
        """
        async with session.post(self._url, json=self.payload(chat)) as response:
            content = await response.read()
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
            text.encode()  # a lone surrogate could not be written to a file
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(_MALFORMED) from error
        if not text.strip():
            raise ValueError(_MALFORMED)
        return text

    def payload(self, chat: Chat) -> dict[str, Any]:
        """The JSON of a request."""
        return {"model": self._config.model, "messages": chat, "n": 1, "temperature": 0, "max_tokens": 2048}


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


def parse_rating(judgment: str) -> float | None:
    """Return the first [[rating]], else the first [rating]; None if there is none or it is not in 1 to 10."""
    found = next(filter(None, (pattern.search(judgment) for pattern in _RATINGS)), None)
    rating = float(found.group(1)) if found else 0.0
    return rating if 1 <= rating <= 10 else None
