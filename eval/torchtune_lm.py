"""A torchtune decoder as a model of lm-evaluation-harness, without conversion."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torchtune.data import Message
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import local_kv_cache
from tqdm import tqdm

from owlore_tune.layers import hidden_states
from owlore_tune.tokenizer import HFChatTokenizer

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation)
_HEAD_POSITIONS = 512  # at a time, so that few logits are alive


@dataclass
class _Row:
    """One context with all continuations that are asked of it."""

    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)  # where each continuation's result goes

    def __len__(self) -> int:
        # The last token of a continuation predicts nothing that is asked for, so it is not part of the row.
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


class TorchtuneLM(TemplateLM):
    """Scores and generates with a torchtune ``TransformerDecoder`` for ``lm_eval.simple_evaluate``.

    Continuations of one context share one row: the context once, then each continuation, which a tree-shaped mask and
    restarted positions keep from seeing one another. The output head is applied to scored positions only. Rows are
    sorted by length, so that little is spent on padding.

    Args:
        model: with weights, on its device.
        tokenizer: of the same model.
        batch_tokens: positions per forward pass, padding included; None chooses by device (2,048 on the CPU,
            16,384 elsewhere).
        batch_size: sequences generated together.
        max_length: longest input in tokens; the model's own limit where None. Longer ones lose their beginning.
        add_bos: put BOS before every text, unless it begins with it already.
        max_gen_toks: new tokens where a task does not say.
        seed: of sampled generation.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        tokenizer: HFChatTokenizer,
        *,
        batch_tokens: int | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos: bool = False,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._model = model.eval()
        self._tokenizer = tokenizer
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self.batch_tokens = batch_tokens or (2_048 if self._device.type == "cpu" else 16_384)
        self.batch_size = batch_size
        self.max_length = min(max_length or model.max_seq_len, model.max_seq_len)
        self.add_bos = add_bos
        self.max_gen_toks = max_gen_toks
        self._generator = torch.Generator(self._device).manual_seed(seed)

    @property
    def eot_token_id(self) -> int:
        assert self._tokenizer.eos_id is not None
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return "owlore_tune.tokenizer.HFChatTokenizer"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokens = self._tokenizer.encode(string, add_bos=False, add_eos=False)
        bos_id = self._tokenizer.bos_id
        wanted = self.add_bos if add_special_tokens is None else add_special_tokens
        has_it = add_special_tokens is None and tokens[:1] == [bos_id]
        return [bos_id, *tokens] if wanted and not has_it and bos_id is not None else tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in chat_history]
        return self._tokenizer.render(messages, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = sorted(self._rows(requests), key=len, reverse=True)
        with tqdm(total=len(requests), desc="Log-likelihoods", disable=disable_tqdm) as progress:
            for batch in self._batches(rows):
                for index, result in self._score(batch):
                    results[index] = result
                    texts = requests[index][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, result)
                    progress.update()
        return results

    def _rows(self, requests: list[TokenRequest]) -> list[_Row]:
        """A row for each distinct context; one more where its continuations do not fit together.

        A context that is too long with its continuation loses its beginning.
        """
        rows: list[_Row] = []
        latest: dict[tuple[int, ...], _Row] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens is longer than {self.max_length}")
            context = context[-(self.max_length + 1 - len(continuation)) :]
            row = latest.get(tuple(context))
            if row is None or len(row) + len(continuation) - 1 > self.max_length:
                row = latest[tuple(context)] = _Row(context)
                rows.append(row)
            row.continuations.append(continuation)
            row.requests.append(index)
        return rows

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Rows of falling length in batches of at most ``batch_tokens`` positions, and at least one row."""
        remaining = iter(rows)
        for first in remaining:
            yield [first, *islice(remaining, max(0, self.batch_tokens // len(first) - 1))]

    @torch.inference_mode()
    def _score(self, rows: list[_Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(request, (log-likelihood, whether it is the greedy continuation)) of every continuation of ``rows``."""
        tokens, positions, segments = self._layout(rows)
        branched = any(len(row) > len(row.context) and len(row.continuations) > 1 for row in rows)
        mask = _tree_mask(segments) if branched else None  # without branches, plain causal attention is the same
        hidden = hidden_states(self._model, tokens, mask=mask, input_pos=positions)
        # Where each scored token is predicted from: position in the batch, and the token.
        length = tokens.shape[1]
        places, targets, counts = [], [], []
        for number, row in enumerate(rows):
            start = number * length + len(row.context)
            for continuation in row.continuations:
                places += [number * length + len(row.context) - 1, *range(start, start + len(continuation) - 1)]
                targets += continuation
                counts.append(len(continuation))
                start += len(continuation) - 1
        log_probs, greedy = self._log_probs(hidden.flatten(0, 1), places, targets)
        requests = [index for row in rows for index in row.requests]
        for index, values, hits in zip(requests, log_probs.split(counts), greedy.split(counts), strict=True):
            yield index, (values.sum().item(), bool(hits.all()))

    def _layout(self, rows: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and segments (0 the context, k its kth continuation, -1 padding), each (rows, longest)."""
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self._tokenizer.pad_id)
        positions = torch.zeros_like(tokens)
        segments = torch.full_like(tokens, -1)
        for number, row in enumerate(rows):
            end = len(row.context)
            pieces = [(row.context, 0, 0), *((c[:-1], end, k) for k, c in enumerate(row.continuations, start=1))]
            start = 0
            for piece, first, segment in pieces:
                place = slice(start, start + len(piece))
                tokens[number, place] = torch.tensor(piece, dtype=torch.long)
                positions[number, place] = torch.arange(first, first + len(piece))
                segments[number, place] = segment
                start += len(piece)
        return tokens.to(self._device), positions.to(self._device), segments.to(self._device)

    def _log_probs(self, hidden: Tensor, places: list[int], targets: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) float32 of ``targets`` predicted from ``hidden[places]``, and whether each is the
        likeliest; on the CPU."""
        unique, inverse = torch.tensor(places).unique(return_inverse=True)
        order = inverse.argsort()
        log_probs, greedy = torch.empty(len(places)), torch.empty(len(places), dtype=torch.bool)
        target = torch.tensor(targets)
        for start in range(0, len(unique), _HEAD_POSITIONS):
            chunk = unique[start : start + _HEAD_POSITIONS].to(self._device)
            logits = self._model.output(hidden[chunk]).float()
            mine = order[(inverse[order] >= start) & (inverse[order] < start + len(chunk))]
            rows, columns = (inverse[mine] - start).to(self._device), target[mine].to(self._device)
            chosen = logits[rows, columns] - logits.logsumexp(-1)[rows]
            log_probs[mine] = chosen.cpu()
            greedy[mine] = (logits.argmax(-1)[rows] == columns).cpu()
        return log_probs, greedy

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
        results: list[str] = []
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        eos = self._tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for chunk in collator.get_batched(n=self.batch_size):
                contexts, (options, *_) = zip(*chunk, strict=True)
                kwargs = normalize_gen_kwargs(options, self.max_gen_toks)
                until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
                max_new = kwargs.pop("max_gen_toks")
                if max_new >= self.max_length:
                    raise ValueError(f"max_gen_toks={max_new} leaves no room in {self.max_length} tokens for a prompt")
                prompts = [self.tok_encode(context)[-(self.max_length - max_new) :] for context in contexts]
                temperature = kwargs["temperature"] if kwargs.get("do_sample") else 0.0
                generated = self._generate(prompts, max_new, until, temperature)
                for context, tokens in zip(contexts, generated, strict=True):
                    text = postprocess_generated_text(self._tokenizer.decode(tokens), until, None)
                    results.append(text)
                    self.cache_hook.add_partial("generate_until", (context, options), text)
                    progress.update()
        return collator.get_original(results)

    @torch.inference_mode()
    def _generate(
        self, prompts: list[list[int]], max_new: int, until: list[str], temperature: float
    ) -> list[list[int]]:
        """New tokens for each prompt, up to its end token or a stop string, ``max_new`` at most."""
        longest = max(map(len, prompts))
        total = longest + max_new
        tokens = torch.full((len(prompts), longest), self._tokenizer.pad_id)
        valid = torch.zeros(len(prompts), total, dtype=torch.bool)
        for number, prompt in enumerate(prompts):
            tokens[number, longest - len(prompt) :] = torch.tensor(prompt)
            valid[number, longest - len(prompt) :] = True  # new tokens too; causality hides them until they are there
        tokens, valid = tokens.to(self._device), valid.to(self._device)
        positions = (valid[:, :longest].cumsum(1) - 1).clamp_min(0)
        causal = torch.ones(longest, total, dtype=torch.bool, device=self._device).tril()
        # Padding sees itself, since a softmax over nothing is NaN and would spread.
        itself = torch.eye(longest, total, dtype=torch.bool, device=self._device)
        mask = (causal & valid[:, None, :]) | itself
        generated: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        with local_kv_cache(
            self._model,
            batch_size=len(prompts),
            device=self._device,
            dtype=self._dtype,
            decoder_max_seq_len=total,
        ):
            for step in range(max_new):
                hidden = hidden_states(self._model, tokens, mask=mask, input_pos=positions)
                following = self._next_tokens(self._model.output(hidden[:, -1]).float(), temperature)
                for number, token in enumerate(following.tolist()):
                    if number in running:
                        generated[number].append(token)
                        if token in self._tokenizer.stop_tokens or self._has_stopped(generated[number], until):
                            running.remove(number)
                if not running or step == max_new - 1:
                    break
                tokens, positions = following[:, None], positions[:, -1:] + 1
                seen = torch.arange(total, device=self._device) <= longest + step
                mask = (valid & seen)[:, None, :]
        return generated

    def _next_tokens(self, logits: Tensor, temperature: float) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=self._generator)[:, 0]

    def _has_stopped(self, tokens: list[int], until: list[str]) -> bool:
        # A stop string spans no more tokens than it has bytes; those and the newest token are looked at.
        tail = self._tokenizer.decode(tokens[-(max(len(stop.encode()) for stop in until) + 1) :]) if until else ""
        return any(stop in tail for stop in until)


def _tree_mask(segments: Tensor) -> Tensor:  # (b, s) -> (b, s, s)
    """True where position i sees position j: the context, and what came before in its own continuation."""
    earlier = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return earlier & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
