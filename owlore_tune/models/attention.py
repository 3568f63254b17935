"""Attention over packed rows on a CPU."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchtune.modules import MultiHeadAttention


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
    if mask is None:
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
    attend = partial(scaled_dot_product_attention, dropout_p=dropout_p, is_causal=True)
    return by_sample(attend, q, k, v, sample_lengths(mask), dim=2)


def by_sample(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,  # (b, heads, s, head_dim)
    k: Tensor,
    v: Tensor,
    all_lengths: list[list[int]],
    dim: int,
) -> Tensor:
    """The outputs of ``attend`` for each sample of each row, joined along ``dim``, their dimension of positions."""
    rows = []
    for row, lengths in enumerate(all_lengths):
        samples = [part[row : row + 1].split(lengths, dim=2) for part in (q, k, v)]
        rows.append(torch.cat(list(map(attend, *samples)), dim=dim))
    return torch.cat(rows)


def sample_lengths(mask: Tensor) -> list[list[int]]:  # (b, s, s)
    """The lengths of each row's samples. The first token of a sample does not attend to the token before it."""
    lengths = []
    for sees_previous in mask.diagonal(-1, 1, 2).tolist():
        starts = [0, *(i for i, sees in enumerate(sees_previous, start=1) if not sees), mask.shape[1]]
        lengths.append([end - start for start, end in pairwise(starts)])
    return lengths
