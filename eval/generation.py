"""Batched generation with a key-value cache, left padding and stop strings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.modules import KVCache
from torchtune.modules.common_utils import local_kv_cache

from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.models.decoder import Decoder, hidden_states
from owlore_tune.models.hf import HFDecoder, key_value_cache


@dataclass(frozen=True)
class Prompts:
    """One batch of prompts."""

    tokens: list[list[int]]
    max_new: int  # new tokens per prompt
    until: list[str]  # stop strings
    temperature: float  # 0 is greedy
    seeds: list[int]  # sampling seed of each prompt
    cache_new: int = 0  # cache slots for new tokens, if another rank needs more than max_new


@torch.inference_mode()
def generate(
    prompts: Prompts,
    model: Decoder,
    tokenizer: HFChatTokenizer,
    any_rank: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Return the new tokens of each prompt, including the end token or the token that completes a stop string.

    Args:
        any_rank: returns whether a flag is true on any rank. All ranks decode until every rank is done.
    """
    parameter = next(model.parameters())
    longest = max(map(len, prompts.tokens))
    total = longest + max(prompts.max_new, prompts.cache_new)
    tokens, valid = (part.to(parameter.device) for part in _left_padded(prompts.tokens, total, tokenizer.pad_id))
    positions = (valid[:, :longest].cumsum(1) - 1).clamp_min(0)
    causal = torch.ones(longest, total, dtype=torch.bool, device=tokens.device).tril()
    # Padding attends to itself: a softmax over an empty row is NaN, and the NaN would spread.
    itself = torch.eye(longest, total, dtype=torch.bool, device=tokens.device)
    mask = (causal & valid[:, None, :]) | itself
    generators = [torch.Generator(tokens.device).manual_seed(seed) for seed in prompts.seeds]
    generated: list[list[int]] = [[] for _ in prompts.tokens]
    running = set(range(len(generated)))
    with _caches(model, len(generated), total):
        for seen in range(longest, total + 1):
            hidden = hidden_states(model, tokens, mask=mask, input_pos=positions)
            following = _next_tokens(model.output(hidden[:, -1]).float(), prompts.temperature, generators)
            for number, token in enumerate(following.tolist()):
                if number in running:
                    generated[number].append(token)
                    stopped = token in tokenizer.stop_tokens or _has_stopped(
                        generated[number], prompts.until, tokenizer
                    )
                    if stopped or len(generated[number]) == prompts.max_new:
                        running.remove(number)
            if not any_rank(bool(running)):
                break
            tokens, positions = following[:, None], positions[:, -1:] + 1
            mask = (valid & (torch.arange(total, device=tokens.device) <= seen))[:, None, :]
    return generated


@contextmanager
def _caches(model: Decoder, batch_size: int, length: int) -> Iterator[None]:
    """Have key-value caches of ``length`` tokens in ``model`` during the block."""
    if isinstance(model, HFDecoder):
        with key_value_cache(model):
            yield
        return
    parameter = next(model.parameters())
    with local_kv_cache(
        model,
        batch_size=batch_size,
        device=parameter.device,
        dtype=parameter.dtype,
        decoder_max_seq_len=length,
    ):
        for module in model.modules():
            if isinstance(module, KVCache):
                module.__class__ = _Cache  # torchtune has no argument for the class of its caches
        yield


class _Cache(KVCache):
    """torchtune's cache without its check of the length, which waits for a GPU in every layer and step."""

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:  # (b, h, s, d)
        positions = self.cache_pos[: k_val.shape[2]]
        self.k_cache.index_copy_(2, positions, k_val)
        self.v_cache.index_copy_(2, positions, v_val)
        self.cache_pos.add_(k_val.shape[2])
        return self.k_cache, self.v_cache


def _left_padded(prompts: list[list[int]], total: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return tokens (b, longest) and a mask (b, total) of the cache slots that hold a token, now or later."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad_id)
    valid = torch.zeros(len(prompts), total, dtype=torch.bool)
    for number, prompt in enumerate(prompts):
        tokens[number, longest - len(prompt) :] = torch.tensor(prompt)
        valid[number, longest - len(prompt) :] = True
    return tokens, valid


def _next_tokens(logits: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:  # (b, v) -> (b,)
    if temperature == 0:
        return logits.argmax(-1)
    rows = F.softmax(logits / temperature, -1)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(rows, generators, strict=True)])


def _has_stopped(tokens: list[int], until: list[str], tokenizer: HFChatTokenizer) -> bool:
    # A stop string spans at most as many tokens as it has bytes. Check those plus the newest token.
    if not until:
        return False
    tail = tokenizer.decode(tokens[-(max(len(stop.encode()) for stop in until) + 1) :], skip_special_tokens=False)
    return any(stop in tail for stop in until)
