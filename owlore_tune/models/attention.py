"""Attention over packed rows on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchtune.modules import MultiHeadAttention


def skip_future_keys(model: nn.Module) -> None:
    """Make ``model`` skip the upper half of causal masks, on a CPU. The result is the same, bit for bit.

    A packed row comes with a mask that is causal inside each of its samples. torch's attention takes either a mask or
    ``is_causal``, and computes all products with a mask. Its kernel for CPUs takes both.

    Attention of other kinds, such as Gemma 2's, does not change.
    """
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module._attention_call = _causal_attention


def _causal_attention(
    q: Tensor,  # (b, heads, s, head_dim)
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,  # (b, s, s) bool, false above the diagonal
    dropout_p: float,
    is_causal: bool,
) -> Tensor:  # (b, heads, s, head_dim)
    if mask is None or dropout_p:
        mask = mask if mask is None else mask[:, None]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)
    bias = q.new_zeros(mask.shape).masked_fill_(mask.logical_not(), float("-inf"))[:, None]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, _ = flash(q, k, v, is_causal=True, attn_mask=bias)
    return output
