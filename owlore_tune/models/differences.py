"""How far the outputs of a decoder are from those of transformers' own model with the same weights."""

from typing import Any

import torch
from torch import Tensor

NUM_TOKENS = 24


def some_tokens(reference: Any, most: int = NUM_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, reference.config.vocab_size, (1, min(NUM_TOKENS, most)), generator=generator)


@torch.no_grad()
def plain_difference(twin: Any, reference: Any) -> float:
    tokens = some_tokens(reference, twin.max_seq_len)
    return _distance(twin(tokens), reference(tokens).logits)


@torch.no_grad()
def packed_difference(twin: Any, reference: Any) -> float:
    """A packed row, compared with its samples on their own."""
    tokens = some_tokens(reference, twin.max_seq_len)
    samples = tokens.tensor_split((tokens.shape[1] // 2, tokens.shape[1] * 3 // 4), dim=1)
    positions = torch.cat([torch.arange(sample.shape[1]) for sample in samples])[None]
    numbers = torch.cat([torch.full_like(sample[0], number) for number, sample in enumerate(samples)])
    mask = (numbers[:, None] == numbers).tril()[None]
    expected = torch.cat([reference(sample).logits for sample in samples], dim=1)
    return _distance(twin(tokens, mask=mask, input_pos=positions), expected)


@torch.no_grad()
def far_difference(twin: Any, reference: Any, num_positions: int) -> float:
    """A row with positions up to ``num_positions``. Scaled frequencies differ little at the first positions."""
    tokens = some_tokens(reference, num_positions)
    positions = torch.linspace(0, num_positions - 1, tokens.shape[1]).long()[None]
    mask = torch.ones_like(tokens)  # without one, transformers takes the row for a packed one
    expected = reference(tokens, position_ids=positions, attention_mask=mask).logits
    return _distance(twin(tokens, input_pos=positions), expected)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()
