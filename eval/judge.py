"""A judge behind any OpenAI-compatible endpoint, as a model of lm-evaluation-harness."""

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

from owlore_tune.config import check_keys, check_type
from owlore_tune.errors import ConfigError

Chat = list[dict[str, str]]
_MALFORMED = "empty or malformed answer"
LARGEST_REPLY = 2**20  # bytes, unpacked; 2048 tokens take a hundredth of that


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
    """Raise ConfigError if ``judge.base_url`` is no address, or holds what must not be logged; it is not repeated then.

    None passes; a missing field is told by `JudgeConfig.from_config`.
    """
    if base_url is None:
        return
    try:
        url = urlsplit(base_url)
        host, _ = url.hostname, url.port
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"judge.base_url is not an address: {error}") from error
    if url.username or url.password or url.query or url.fragment:
        raise ConfigError("judge.base_url holds a name, key or query, which would be logged; use judge.api_key_env")
    if url.scheme not in ("http", "https") or not host:
        raise ConfigError(f"judge.base_url={base_url}; it must begin with http:// or https:// and a host")


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
        asyncio.run(
            self.get_batched_requests(requests, cache_keys=list(range(len(chats))), generate=True, gen_kwargs={})
        )

    def _create_payload(self, messages: Chat, **kwargs: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}

    async def amodel_call(self, session, sem, messages, *, cache_keys, **kwargs) -> list[str]:  # type: ignore[override]
        payload = self._create_payload(self.create_message(messages))

        async def attempt() -> str:
            async with sem, asyncio.timeout(self.timeout):
                text = await self._post(session, payload)
            return text.replace(self._key, "***") if self._key else text

        try:
            text = await self._retry(attempt)()
        except (ClientError, TimeoutError, ValueError) as error:
            self.failures.append(_reason(error))
            return [""]
        self._on_judgment(cache_keys[0], text)
        return [text]

    async def _post(self, session: ClientSession, payload: dict[str, Any]) -> str:
        """The judge's text. The harness's own call would read a reply of any size.

        Raises:
            ValueError: if the reply is too large, is not JSON of the right form, or has no text that can be kept.
            ClientError: if the endpoint refuses or breaks off.
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
            text.encode()  # half a surrogate pair could not be kept in a file
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(_MALFORMED) from error
        if not text.strip():
            raise ValueError(_MALFORMED)
        return text


def _wait(exponential: Callable[[RetryCallState], float], longest: float, state: RetryCallState) -> float:
    """Seconds to the next attempt: as long as the endpoint asks for, but no longer than ``longest``."""
    error = state.outcome.exception() if state.outcome else None
    headers = getattr(error, "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    return min(max(exponential(state), float(asked) if asked.isdigit() else 0.0), longest)


def _is_passing(error: BaseException) -> bool:
    """Whether a later attempt may succeed: not where the endpoint refuses the request or the key itself."""
    if isinstance(error, ClientResponseError):
        return error.status in (408, 409, 429) or error.status >= 500
    return isinstance(error, ClientError | TimeoutError | ValueError)


def _reason(error: Exception) -> str:
    """In a few words and without addresses, so that failures of one kind count as one."""
    if isinstance(error, ClientResponseError):
        return f"HTTP {error.status}"
    return {"TimeoutError": "timeout", "ValueError": str(error)}.get(type(error).__name__, type(error).__name__)
