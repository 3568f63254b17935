"""Attention of transformers' models with torchtune's masks and positions.

transformers computes masks and attention with functions that are registered under a name. The name of these is
``owlore``, and ``owlore_by_sample`` for packed rows on a CPU.
"""

from contextvars import ContextVar
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from owlore_tune.models.attention import by_sample, sample_lengths, with_few_lengths

# (mask (b, s, t) or None, positions (b, s) or None, number of tokens in the cache) of the current forward
CURRENT: ContextVar[tuple[Tensor | None, Tensor | None, int]] = ContextVar("current")


@cache
def register_attention() -> None:
    """Register this module's attention with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("owlore", sdpa_attention_forward)
    AttentionInterface.register("owlore_by_sample", _attention_by_sample)
    for name in ("owlore", "owlore_by_sample"):
        AttentionMaskInterface.register(name, _attention_mask)


def _attention_mask(
    batch_size: int, q_length: int, *_: Any, local_size: int | None = None, device: Any = None, **__: Any
) -> Tensor | None:  # (b, 1, s, t) bool, None for causal attention without a window
    """The mask of the current forward, in a window of ``local_size`` positions."""
    mask, positions, seen = CURRENT.get()
    length = seen + q_length
    if local_size is None or length <= local_size:
        return None if mask is None else mask[:, None]
    # Keys that are in the cache have the positions of their slots, or all the same offset from them.
    keys = torch.arange(length, device=device)[None] if positions is None or seen else positions
    queries = keys[:, seen:]
    near = queries[:, :, None] - keys[:, None, :] < local_size
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, seen:]
    return (mask & near)[:, None].expand(batch_size, -1, -1, -1)


def _attention_by_sample(
    module: nn.Module,
    query: Tensor,  # (b, heads, s, head_dim)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # (b, 1, s, s)
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # → (1, s, heads, head_dim)
        return sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]

    if attention_mask is None and query.shape[2] == key.shape[2] and getattr(module, "is_causal", True):
        return with_few_lengths(attend, query, key, value, dim=1), None
    if attention_mask is None or attention_mask.shape[-1] != attention_mask.shape[-2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    all_lengths = sample_lengths(attention_mask[:, 0])
    if not _sees_starts(attention_mask[:, 0], all_lengths):  # a sample is longer than the layer's window
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return by_sample(attend, query, key, value, all_lengths, dim=1), None


def _sees_starts(mask: Tensor, all_lengths: list[list[int]]) -> bool:  # (b, s, s)
    """Whether the last token of every sample attends to the sample's first one."""
    rows = [row for row, lengths in enumerate(all_lengths) for _ in lengths]
    ends = [end for lengths in all_lengths for end in accumulate(lengths)]
    starts = [end - length for end, length in zip(ends, chain(*all_lengths), strict=True)]
    return bool(mask[rows, [end - 1 for end in ends], starts].all())
