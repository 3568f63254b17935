"""lm-evaluation-harness adapter for torchtune decoders, without checkpoint conversion."""

import dataclasses
import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torchtune.data import Message
from torchtune.modules.common_utils import delete_kv_caches
from tqdm import tqdm

from owlore_evals.generation import NOT_FINITE, SAMPLING, Prompts, generate, generation_options, sequences_at_once
from owlore_evals.shared_prefix import Result, Row, make_batches, make_rows, score_rows, tokens_at_once, warn_if_cut
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.distributed.launch import current_world
from owlore_tune.distributed.world import ALONE, World
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.measure import free_bytes
from owlore_tune.models.decoder import Decoder
from owlore_tune.models.hf import HFDecoder

# The other ranks wait while rank 0 loads datasets or waits for a judge.
_PATIENCE = timedelta(days=7)
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation)


class TorchtuneLM(TemplateLM):
    """Scores and generates with a decoder of torchtune or transformers for ``lm_eval.simple_evaluate``.

    Continuations of one context share one row (shared_prefix.py). Rows are sorted by length to reduce padding. The
    longest come first, so an out-of-memory error shows up early.

    Under torchrun, each rank has a model. Pass the adapter of rank 0 to the harness; the other ranks call `serve`. Only
    rank 0 talks to the harness, so results do not depend on the number of ranks: few-shot examples are drawn once, and
    there is one cache and one set of files.

    Args:
        model: the model with loaded weights, on its device.
        tokenizer: the model's tokenizer.
        batch_tokens: positions per forward pass, including padding. None starts with what fits in the memory of the
            device, see `owlore_evals.shared_prefix.tokens_at_once`. Halved on out-of-memory errors until it fits.
        batch_size: sequences per generation batch. None starts with what fits for the longest request; halved in the
            same way.
        max_length: longest input in tokens; None is the model's limit. Longer inputs are truncated on the left.
        add_bos: prepend BOS to every text that does not start with it. None follows the model's tokenizer in
            transformers.
        seed: sampling seed.

    Attributes:
        model, tokenizer: as given.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: HFChatTokenizer,
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        add_bos: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self._world = _patient_world()
        self.tokenizer = tokenizer
        parameter = next(model.parameters())
        self._dtype = parameter.dtype
        self.max_length = min(max_length or model.max_seq_len, model.max_seq_len)
        free = free_bytes(parameter.device)
        self._free = None if free is None else -self._world.largest(-free)  # the smallest of all ranks
        self.batch_tokens = batch_tokens or tokens_at_once(model, self._free)
        self.batch_size = batch_size
        self._fitting_batch_size: int | None = None  # of the last `generate_until`
        bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        self._prefix = tokenizer.prefix if add_bos is None else bos
        self._seed = seed

    def get_model_info(self) -> dict[str, Any]:
        """Return the settings that can affect a score, even if only by rounding. The harness saves them."""
        return {
            "model_library": "transformers" if isinstance(self.model, HFDecoder) else "torchtune",
            "scoring": "shared_prefix",
            "model_dtype": str(self._dtype),
            "add_bos": self.tokenizer.bos_id in self._prefix,
            "prefix": self._prefix,
            "stop_tokens": self.tokenizer.stop_tokens,
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "generation_batch_size": self.batch_size or self._fitting_batch_size,
            "generation_seed": self._seed,
            "generation_config": self.tokenizer.generation_config,
            "world_size": self._world.size,
            "tokenizer_sha": self.tokenizer.digest(),
        }

    def serve(self) -> None:
        """On ranks other than 0: process work until rank 0 calls `dismiss`."""
        while (work := self._world.share(None)) is not None:
            method, items = work
            _share(self._world, getattr(self, method), items)

    def dismiss(self) -> None:
        """On rank 0: make `serve` return on the other ranks."""
        self._world.share(None)

    def _on_all_ranks(self, method: str, items: list[Any]) -> Iterator[Any]:
        """Yield ``method(item)`` for each of ``items``, in order, computed on all ranks."""
        for start in range(0, len(items), self._world.size):
            together = items[start : start + self._world.size]
            self._world.share((method, together))
            yield from _share(self._world, getattr(self, method), together)

    @property
    def eot_token_id(self) -> int:
        assert self.tokenizer.eos_id is not None
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return "owlore_tune.data.HFChatTokenizer"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokens = self.tokenizer.encode(string, add_bos=False, add_eos=False)
        prefix = [] if add_special_tokens is False else self._prefix
        return tokens if tokens[: len(prefix)] == prefix else prefix + tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation. Without a generation prompt, the text ends with the last message, to be continued.

        If a template rejects system messages, they are left out, as in the harness's own models.
        """
        try:
            text = self._render(chat_history, add_generation_prompt)
        except ValueError:
            if all(turn["role"] != "system" for turn in chat_history):
                raise
            warnings.warn("the chat template rejects system messages, so prompts have none", stacklevel=2)
            chat_history = [turn for turn in chat_history if turn["role"] != "system"]
            text = self._render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        # As transformers: with the message's last spaces, if the template keeps them.
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())
        kept = last.lstrip()
        return text[: start + len(kept if text.startswith(kept, start) else last.strip())]

    def _render(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in chat]
        return self.tokenizer.render(messages, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Result]:
        results: list[Result] = [(0.0, False)] * len(requests)
        # A context of spaces has no tokens: they belong to the continuation. It begins as an empty one does.
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        try:
            rows = make_rows(pairs, self.max_length)
        except ValueError as error:
            raise ConfigError(f"max_length={self.max_length}: {error}; raise it") from error
        batches = list(make_batches(rows, self.batch_tokens))
        with tqdm(total=len(requests), desc="Log-likelihoods", disable=disable_tqdm) as progress:
            for batch, scored in zip(batches, self._on_all_ranks("_score", batches), strict=True):
                for index, result in zip((i for row in batch for i in row.requests), scored, strict=True):
                    if not math.isfinite(result[0]):
                        raise RunError(NOT_FINITE)
                    results[index] = result
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, result)
                    progress.update()
        return results

    def _score(self, rows: list[Row]) -> list[Result]:
        """Score all continuations of ``rows``, in batches that fit in memory."""
        results = []
        waiting = list(make_batches(rows, self.batch_tokens))[::-1]
        while waiting:
            batch = waiting.pop()
            can_split = len(batch) > 1 or len(batch[0].branches) > 1
            scored = self._if_it_fits(partial(score_rows, batch, self.model, self.tokenizer.pad_id), can_split)
            if scored is not None:
                results += scored
                continue
            half = len(batch) // 2
            parts = [batch[:half], batch[half:]] if half else [[row] for row in batch[0].split()]
            self.batch_tokens = max(len(part) * len(part[0]) for part in parts)
            waiting += reversed(parts)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._fitting_batch_size = sequences_at_once(self.model, self._longest(requests), self._free)
        batch_size = self.batch_size or self._fitting_batch_size
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        chunks = list(collator.get_batched(n=batch_size))
        asked: Counter[str] = Counter()
        batches = [self._prompts(chunk, asked) for chunk in chunks]
        think_end = "</think>" if self.tokenizer.enable_thinking else None  # the answer comes after it
        results = []
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for chunk, batch, generated in zip(chunks, batches, self._on_all_ranks("_generate", batches), strict=True):
                for (context, options), tokens in zip(chunk, generated, strict=True):
                    results.append(postprocess_generated_text(self.tokenizer.decode(tokens), batch.until, think_end))
                    self.cache_hook.add_partial("generate_until", (context, options), results[-1])
                    progress.update()
        return collator.get_original(results)

    def _longest(self, requests: list[Instance]) -> int:
        """Tokens of the longest of ``requests`` at the end of generation."""
        lengths = [
            len(self.tok_encode(context)) + self._options(options)["max_gen_toks"]
            for context, options in (request.args for request in requests)
        ]
        warn_if_cut(lengths, self.max_length)
        return min(max(lengths, default=1), self.max_length)

    def _options(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        return generation_options(gen_kwargs, self.max_length, defaults=self.tokenizer.generation_config)

    def _prompts(self, chunk: list[tuple[str, dict[str, Any]]], asked: Counter[str]) -> Prompts:
        """Tokenize a batch of (context, gen_kwargs). Long contexts are truncated on the left.

        Args:
            asked: number of earlier requests per context, updated here. Samples depend only on the seed, the context
                and this number, not on the other requests.
        """
        options = self._options(chunk[0][1])
        eos_id = self.tokenizer.eos_id
        eos = None if eos_id is None else self.tokenizer.decode([eos_id], skip_special_tokens=False)
        seeds = []
        for context, _ in chunk:
            text = f"{self._seed} {asked[context]} {context}"
            seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))
            asked[context] += 1
        return Prompts(
            tokens=[self.tok_encode(context)[-(self.max_length - options["max_gen_toks"]) :] for context, _ in chunk],
            max_new=options["max_gen_toks"],
            until=handle_stop_sequences(options.get("until"), eos=eos),
            seeds=seeds,
            **{name: options[name] for name in SAMPLING},
        )

    def _generate(self, batch: Prompts) -> list[list[int]]:
        """Generate new tokens for each prompt of ``batch``, in pieces that fit in memory."""
        generated: list[list[int]] = []
        while len(generated) < len(batch.tokens):
            part = slice(len(generated), len(generated) + (self.batch_size or len(batch.tokens)))
            piece = dataclasses.replace(batch, tokens=batch.tokens[part], seeds=batch.seeds[part])
            made = self._if_it_fits(partial(generate, piece, self.model, self.tokenizer), len(piece.tokens) > 1)
            if made is not None:
                generated += made
            else:
                self.batch_size = len(piece.tokens) // 2
        return generated

    def _if_it_fits(self, compute: Callable[[], list[Any]], can_split: bool) -> list[Any] | None:
        """The result of ``compute``, or None if it runs out of memory.

        When this returns, the tensors of a failed attempt are free. In an ``except`` block its traceback would keep
        them.

        Raises:
            torch.OutOfMemoryError: if the work cannot be split.
        """
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not can_split:
                raise
        if self.model.caches_are_setup():  # torchtune leaves them if there is no memory for all layers
            delete_kv_caches(self.model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _patient_world() -> World:
    """All processes, over gloo. They wait for each other for days."""
    return ALONE if current_world().size == 1 else World(dist.new_group(backend="gloo", timeout=_PATIENCE))


def _share(world: World, method: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Compute ``[method(item) for item in items]``, split over the ranks."""
    gathered = world.gather([method(item) for item in items[world.rank :: world.size]])
    return [gathered[number % world.size][number // world.size] for number in range(len(items))]
