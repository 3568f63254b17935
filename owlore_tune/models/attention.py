"""Attention of each sample of a packed row on its own, and with few lengths, on a CPU; and transformers' attention with
torchtune's masks and positions.

transformers computes masks and attention with functions that are registered under a name. The name of these is
``owlore``, and ``owlore_by_sample`` for packed rows on a CPU.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torchtune.modules import MultiHeadAttention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_LENGTHS = 32  # lengths of 16-bit products on a CPU are multiples of it


def attend_by_sample(model: nn.Module) -> None:
    """Make ``model`` compute the attention of each sample of a packed row on its own.

    With a mask, torch computes the products of all pairs of tokens in a row, also those of two samples. Attention of
    other kinds, such as Gemma 2's, does not change.
    """
    if callable(by_sample := getattr(model, "attend_by_sample", None)):  # of `HFDecoder`
        by_sample()
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module._attention_call = _attention_by_sample


def _attention_by_sample(
    q: Tensor,  # (b, heads, s, head_dim)
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,  # (b, s, s) bool, causal inside each sample and false elsewhere
    dropout_p: float,
    is_causal: bool,
) -> Tensor:  # (b, heads, s, head_dim)
    attend = partial(scaled_dot_product_attention, dropout_p=dropout_p, is_causal=is_causal or mask is not None)
    if mask is not None:
        return by_sample(attend, q, k, v, sample_lengths(mask), dim=2)
    return with_few_lengths(attend, q, k, v, dim=2) if is_causal else attend(q, k, v)


def by_sample(
    attend: Attend,
    q: Tensor,  # (b, heads, s, head_dim)
    k: Tensor,
    v: Tensor,
    all_lengths: list[list[int]],
    dim: int,
) -> Tensor:
    """The outputs of causal attention for each sample of each row, joined along ``dim``, their positions."""
    rows = []
    for row, lengths in enumerate(all_lengths):
        samples = [part[row : row + 1].split(lengths, dim=2) for part in (q, k, v)]
        rows.append(torch.cat(list(map(partial(with_few_lengths, attend, dim=dim), *samples)), dim=dim))
    return torch.cat(rows)


def with_few_lengths(attend: Attend, q: Tensor, k: Tensor, v: Tensor, dim: int) -> Tensor:
    """The output of causal attention. It is computed with padding after q, k and v, which no position attends to.

    See `missing` for the reason.
    """
    length = q.shape[2]
    if not (added := missing(q, length)):
        return attend(q, k, v)
    return attend(*(pad(part, (0, 0, 0, added)) for part in (q, k, v))).narrow(dim, 0, length)


def missing(x: Tensor, length: int) -> int:
    """How much padding makes ``length`` one of few lengths, if ``x`` is a 16-bit tensor on a CPU; 0 otherwise.

    On a CPU, torch compiles 16-bit products for every length, which takes time, and keeps them while the process lives.
    The memory plan does not count them.
    """
    return -length % _LENGTHS if x.device.type == "cpu" and x.element_size() == 2 else 0


def sample_lengths(mask: Tensor) -> list[list[int]]:  # (b, s, s)
    """The lengths of each row's samples. The first token of a sample does not attend to the token before it."""
    lengths = []
    for sees_previous in mask.diagonal(-1, 1, 2).tolist():
        starts = [0, *(i for i, sees in enumerate(sees_previous, start=1) if not sees), mask.shape[1]]
        lengths.append([end - start for start, end in pairwise(starts)])
    return lengths


# (mask (b, s, t) or None, positions (b, s) or None, number of tokens in the cache) of the current forward
CURRENT: ContextVar[tuple[Tensor | None, Tensor | None, int]] = ContextVar("current")


@cache
def register_attention() -> None:
    """Register this module's attention with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("owlore", sdpa_attention_forward)
    AttentionInterface.register("owlore_by_sample", _hf_attention_by_sample)
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


def _hf_attention_by_sample(
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
