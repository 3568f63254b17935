"""Gemma 2, with fixes for four bugs of torchtune 0.6.1.

All four change the logits. ``gemma2_2b`` swaps the two soft-cap values. It applies the final cap to the last hidden
state instead of the logits. Its weight conversion swaps the norms before and after the MLP. Its attention window counts
rows and columns of the mask, which are positions only if one plain sequence is processed as a whole.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models import gemma2 as torchtune_gemma2
from torchtune.models.gemma2 import _convert_weights
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import TiedLinear, TransformerDecoder


class CappedTiedLinear(TiedLinear):
    """An output head tied to the embeddings, with logits capped to ±``cap``: cap · tanh(logit / cap)."""

    def __init__(self, tied_module: nn.Module, cap: float) -> None:
        super().__init__(tied_module)
        self.cap = cap

    def __call__(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().__call__(x) / self.cap)


class WindowedAttention(Gemma2Attention):
    """torchtune's attention with a window of ``window`` positions, also in a cache or a tree of sequences."""

    window: int

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: queries, (b, s, d).
            y: keys and values, (b, s, d); None for those of the cache.
            mask: (b, s, t) bool, t the number of keys; None for causal attention.
            input_pos: position of each token, (b, s).
        """
        length = x.shape[1]
        if mask is None:
            mask = torch.ones(1, length, length, dtype=torch.bool, device=x.device).tril()
        if input_pos is not None and mask.shape[-1] == length:
            keys = queries = input_pos
        else:  # a cache has its tokens in order, and the last one that a query attends to is its own
            keys = torch.arange(mask.shape[-1], device=x.device)
            queries = (mask * keys).amax(-1)
        distance = queries[..., :, None] - keys[..., None, :]
        return super().forward(x, y, mask=mask & (distance < self.window), input_pos=input_pos)


def gemma2(
    *, hidden_capping_value: float = 50.0, final_capping_value: float = 30.0, **shape: Any
) -> TransformerDecoder:
    """``torchtune.models.gemma2.gemma2`` with the final cap on the logits, and windows by position.

    Args:
        hidden_capping_value: cap of the attention logits, ``attn_logit_softcapping`` in Hugging Face's config.json.
        final_capping_value: cap of the output logits, ``final_logit_softcapping`` in config.json.
        shape: torchtune's other arguments.
    """
    model = torchtune_gemma2.gemma2(
        hidden_capping_value=hidden_capping_value, final_capping_value=final_capping_value, **shape
    )
    for layer in model.layers:
        attention: Any = layer.attn
        if attention.sliding_window_size is not None:
            attention.__class__ = WindowedAttention  # torchtune has no argument for it
            attention.window, attention.sliding_window_size = attention.sliding_window_size, None
    model.norm.logit_capping = nn.Identity()
    model.output = CappedTiedLinear(model.tok_embeddings, final_capping_value)
    return model


def gemma2_2b() -> TransformerDecoder:
    """Gemma 2 2B: 26 layers, 2.6 billion parameters, embeddings and output head tied."""
    return gemma2(
        vocab_size=256_000, num_layers=26, num_heads=8, head_dim=256, num_kv_heads=4, embed_dim=2304,
        intermediate_dim=9216, max_seq_len=8192, sliding_window_size=4096, query_pre_attn_scalar=256,
    )  # fmt: skip


def hf_to_tune(state_dict: dict[str, Tensor], **heads: int | None) -> dict[str, Tensor]:
    """torchtune's conversion from Hugging Face's layout, with the MLP norms in the right places."""
    return _swap_mlp_norms(_convert_weights.gemma2_hf_to_tune(state_dict, **heads))


def tune_to_hf(state_dict: dict[str, Tensor], **heads: int | None) -> dict[str, Tensor]:
    """The inverse of `hf_to_tune`."""
    return _convert_weights.gemma2_tune_to_hf(_swap_mlp_norms(state_dict), **heads)


def _swap_mlp_norms(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    other = {"mlp_norm": "mlp_scale", "mlp_scale": "mlp_norm"}
    return {".".join(other.get(part, part) for part in name.split(".")): value for name, value in state_dict.items()}
