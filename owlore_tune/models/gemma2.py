"""Gemma 2, with fixes for three bugs of torchtune 0.6.1.

All three change the logits. ``gemma2_2b`` swaps the two soft-cap values. It applies the final cap to the last hidden
state instead of the logits. Its weight conversion swaps the norms before and after the MLP.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models import gemma2 as torchtune_gemma2
from torchtune.models.gemma2 import _convert_weights
from torchtune.modules import TiedLinear, TransformerDecoder


class CappedTiedLinear(TiedLinear):
    """An output head tied to the embeddings, with logits capped to ±``cap``: cap · tanh(logit / cap)."""

    def __init__(self, tied_module: nn.Module, cap: float) -> None:
        super().__init__(tied_module)
        self.cap = cap

    def __call__(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().__call__(x) / self.cap)


def gemma2(
    *, hidden_capping_value: float = 50.0, final_capping_value: float = 30.0, **shape: Any
) -> TransformerDecoder:
    """``torchtune.models.gemma2.gemma2`` with the final cap on the logits.

    Args:
        hidden_capping_value: cap of the attention logits, ``attn_logit_softcapping`` in Hugging Face's config.json.
        final_capping_value: cap of the output logits, ``final_logit_softcapping`` in config.json.
        shape: torchtune's other arguments.
    """
    model = torchtune_gemma2.gemma2(
        hidden_capping_value=hidden_capping_value, final_capping_value=final_capping_value, **shape
    )
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
