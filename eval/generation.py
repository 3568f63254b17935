"""Batched generation with a key-value cache, left padding and stop strings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torchtune.modules import KVCache
from torchtune.modules.common_utils import local_kv_cache
from transformers import TopKLogitsWarper, TopPLogitsWarper

from owlore_evals.shared_prefix import SHARE, bytes_per_position
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.errors import RunError
from owlore_tune.models.decoder import Decoder, cached_values, hidden_states
from owlore_tune.models.hf import HFDecoder, key_value_cache

NOT_FINITE = "the model's outputs are not finite; are its weights damaged, or too large for this dtype?"
_CPU_SEQUENCES, _MOST_SEQUENCES = 8, 256
# The sampling of transformers' generate, unless generation_config.json or the task has other values.
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
_SHRINK_AT = 0.75  # share of rows still running; then the others leave the batch


@dataclass(frozen=True)
class Prompts:
    """One batch of prompts."""

    tokens: list[list[int]]
    max_new: int  # new tokens per prompt
    until: list[str]  # stop strings
    temperature: float  # 0 is greedy
    seeds: list[int]  # sampling seed of each prompt
    top_k: int = 0  # sample from this many most likely tokens; 0 is all
    top_p: float = 1.0  # sample from the most likely tokens with this total probability
    repetition_penalty: float = 1.0  # divides the logits of tokens that occur in the text


@torch.inference_mode()
def generate(prompts: Prompts, model: Decoder, tokenizer: HFChatTokenizer) -> list[list[int]]:
    """Return the new tokens of each prompt, including the end token or the token that completes a stop string."""
    device = next(model.parameters()).device
    tokens, valid = (part.to(device) for part in _left_padded(prompts.tokens, tokenizer.pad_id))
    positions = (valid.cumsum(1) - 1).clamp_min(0)
    longest = tokens.shape[1]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    # Padding attends to itself: a softmax over an empty row is NaN, and the NaN would spread.
    mask = (causal & valid[:, None]) | torch.eye(longest, dtype=torch.bool, device=device)
    chooser = _Chooser(prompts, tokens, valid)
    generated: list[list[int]] = [[] for _ in prompts.tokens]
    rows, finished = list(range(len(generated))), set[int]()  # prompts in the batch, and those that are done
    with _caches(model, len(rows), longest + prompts.max_new) as keep_rows:
        for _ in range(prompts.max_new):
            hidden = hidden_states(model, tokens, mask=mask, input_pos=positions)
            logits = model.output(hidden[:, -1]).float()
            if not logits.isfinite().all():
                raise RunError(NOT_FINITE)
            following = chooser(logits)
            for row, token in zip(rows, following.tolist(), strict=True):
                if row not in finished:
                    generated[row].append(token)
                    if _has_ended(generated[row], prompts, tokenizer):
                        finished.add(row)
            running = [place for place, row in enumerate(rows) if row not in finished]
            if not running:
                break
            tokens, positions = following[:, None], positions[:, -1:] + 1
            valid = F.pad(valid, (0, 1), value=True)
            if len(running) <= _SHRINK_AT * len(rows):
                rows = [rows[place] for place in running]
                tokens, positions, valid = tokens[running], positions[running], valid[running]
                keep_rows(torch.tensor(running, device=device))
                chooser.keep_rows(running)
            mask = valid[:, None]
    return generated


def sequences_at_once(model: Decoder, length: int, free: int | None) -> int:
    """Sequences that are generated together, so that their key-value caches and the first forward pass fit.

    The first pass runs all prompts at once. With grouped queries, its activations can take more than the caches.

    Args:
        length: tokens of the longest sequence, with the new ones.
        free: as for `tokens_at_once`.
    """
    if free is None:
        return _CPU_SEQUENCES
    per_token = cached_values(model) * model.tok_embeddings.weight.element_size() + bytes_per_position(model)
    return min(max(int(SHARE * free) // (per_token * length), 1), _MOST_SEQUENCES)


def generation_options(
    gen_kwargs: dict[str, Any], max_length: int, max_gen_toks: int = 256, defaults: dict[str, float] | None = None
) -> dict[str, Any]:
    """Normalize the ``gen_kwargs`` of a task like the harness does. Greedy decoding has temperature 0.

    Args:
        defaults: the model's own values of the fields of ``SAMPLING``, from its generation_config.json.

    Raises:
        ValueError: if an option is not supported, or ``max_gen_toks`` leaves no room for a prompt.
    """
    options = normalize_gen_kwargs(gen_kwargs, max_gen_toks)
    given = {key: value for key, value in options.items() if value is not None}
    if not options["do_sample"]:
        given["temperature"] = 0.0
    elif not gen_kwargs.get("temperature"):
        given.pop("temperature", None)
    options = SAMPLING | (defaults or {}) | given
    greedy = options["temperature"] == 0  # and top_k and top_p have no effect
    valid = {
        "temperature": options["temperature"] >= 0,
        "top_k": greedy or (isinstance(options["top_k"], int) and options["top_k"] >= 0),
        "top_p": greedy or 0 < options["top_p"] <= 1,
        "repetition_penalty": options["repetition_penalty"] > 0,
    }
    if wrong := [f"{name}={options[name]}" for name, is_valid in valid.items() if not is_valid]:
        raise ValueError(f"generation with {', '.join(wrong)}; it is out of range")
    neutral = {"num_beams": 1, "min_p": 0.0}
    known = {"until", "do_sample", "max_gen_toks", *SAMPLING}
    wanted = {key: value for key, value in options.items() if key not in known}
    if unknown := [f"{key}={value}" for key, value in wanted.items() if value not in (None, False, neutral.get(key))]:
        raise ValueError(f"generation with {', '.join(unknown)} is not supported")
    if options["max_gen_toks"] >= max_length:
        raise ValueError(f"max_gen_toks={options['max_gen_toks']} leaves no room in {max_length} tokens for a prompt")
    return options


@contextmanager
def _caches(model: Decoder, batch_size: int, length: int) -> Iterator[Callable[[Tensor], None]]:
    """Have key-value caches of ``length`` tokens in ``model`` during the block.

    Yields:
        a function that keeps only the rows of the given indices in all caches.
    """
    if isinstance(model, HFDecoder):
        with key_value_cache(model) as cache:
            yield cache.batch_select_indices
        return
    parameter = next(model.parameters())
    with local_kv_cache(
        model,
        batch_size=batch_size,
        device=parameter.device,
        dtype=parameter.dtype,
        decoder_max_seq_len=length,
    ):
        caches: list[Any] = [module for module in model.modules() if isinstance(module, KVCache)]
        for cache in caches:
            cache.__class__ = _Cache  # torchtune has no argument for the class of its caches

        def keep_rows(indices: Tensor) -> None:
            for cache in caches:
                cache.k_cache, cache.v_cache = cache.k_cache[indices], cache.v_cache[indices]

        yield keep_rows


class _Cache(KVCache):
    """torchtune's cache that returns only its filled slots, and does not wait for a GPU to check the length."""

    filled = 0

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:  # (b, h, s, d)
        start, self.filled = self.filled, self.filled + k_val.shape[2]
        self.k_cache[:, :, start : self.filled] = k_val
        self.v_cache[:, :, start : self.filled] = v_val
        return self.k_cache[:, :, : self.filled], self.v_cache[:, :, : self.filled]


def _left_padded(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return tokens (b, longest) and a mask (b, longest) of those that are not padding."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad_id)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for number, prompt in enumerate(prompts):
        tokens[number, longest - len(prompt) :] = torch.tensor(prompt)
        valid[number, longest - len(prompt) :] = True
    return tokens, valid


class _Chooser:
    """Chooses the next token of each row from its logits: greedily, or by the row's seed.

    A row's random numbers are drawn in advance, so that they do not depend on the other rows, and one operation then
    samples all rows.
    """

    def __init__(self, prompts: Prompts, tokens: Tensor, valid: Tensor) -> None:
        self._prompts = prompts
        generators = [torch.Generator().manual_seed(seed) for seed in prompts.seeds]
        draws = [torch.rand(prompts.max_new, generator=generator) for generator in generators]
        self._draws = torch.stack(draws, dim=1).to(tokens.device)  # (new tokens, b)
        self._num_chosen = 0
        self._text = (tokens, valid)
        self._seen: Tensor | None = None  # (b, v) bool, tokens that occur in a row, if they have a penalty
        self._warpers: list[Any] = [TopKLogitsWarper(prompts.top_k)] if prompts.top_k else []
        self._warpers += [TopPLogitsWarper(prompts.top_p)] if prompts.top_p < 1 else []

    def __call__(self, logits: Tensor) -> Tensor:  # (b, v) -> (b,)
        logits = self._penalized(logits)
        if self._prompts.temperature == 0:
            following = logits.argmax(-1)
        else:
            logits = logits / self._prompts.temperature
            for warper in self._warpers:
                logits = warper(None, logits)
            following = sample(F.softmax(logits, -1), self._draws[self._num_chosen])
            self._num_chosen += 1
        if self._seen is not None:
            self._seen.scatter_(1, following[:, None], True)
        return following

    def _penalized(self, logits: Tensor) -> Tensor:
        penalty = self._prompts.repetition_penalty
        if penalty == 1:
            return logits
        if self._seen is None:
            tokens, valid = self._text
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, text, mask in zip(self._seen, tokens, valid, strict=True):
                row[text[mask]] = True
        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def keep_rows(self, rows: list[int]) -> None:
        self._draws = self._draws[:, rows]
        if self._seen is not None:
            self._seen = self._seen[rows]


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:  # (b, v), (b,) in [0, 1) -> (b,)
    """The token of each row at which the sum of probabilities exceeds ``uniform``."""
    # In float32, rounding on a GPU can make a sum smaller than the one before, and a token of probability 0 is drawn.
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, uniform.double()[:, None] * sums[:, -1:], right=True).squeeze(1)


def _has_ended(tokens: list[int], prompts: Prompts, tokenizer: HFChatTokenizer) -> bool:
    if tokens[-1] in tokenizer.stop_tokens or len(tokens) == prompts.max_new:
        return True
    if not prompts.until:
        return False
    # A stop string spans at most as many tokens as it has bytes. Check those plus the newest token.
    most = max(len(stop.encode()) for stop in prompts.until)
    tail = tokenizer.decode(tokens[-(most + 1) :], skip_special_tokens=False)
    return any(stop in tail for stop in prompts.until)
