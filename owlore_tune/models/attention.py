"""Attention on a CPU: over packed rows, and with few lengths."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

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
