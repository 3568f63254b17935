"""Batch sizes of an evaluation: as large as the free memory of a GPU allows, or fixed sizes that are fast on a CPU."""

from owlore_tune.models.decoder import Decoder, cached_values, find_layers

_SHARE = 0.5  # of the free memory; the rest is for logits, masks and fragmentation
_CPU_TOKENS, _CPU_SEQUENCES = 2_048, 8
_MOST_TOKENS = 65_536
_MOST_SEQUENCES = 256


def tokens_at_once(model: Decoder, free: int | None) -> int:
    """Positions of a forward pass without gradients.

    Args:
        free: bytes of free memory on the device, see `owlore_tune.measure.free_bytes`; None for a CPU.
    """
    if free is None:
        return _CPU_TOKENS
    return min(max(int(_SHARE * free) // _bytes_per_position(model), _CPU_TOKENS), _MOST_TOKENS)


def _bytes_per_position(model: Decoder) -> int:
    """Bytes of a forward pass without gradients for each position: activations of one layer."""
    layer = next(iter(find_layers(model)))
    width = model.tok_embeddings.weight.shape[1]
    widest = max(parameter.numel() // width for parameter in layer.parameters() if parameter.ndim == 2)
    return (8 * width + 4 * widest) * model.tok_embeddings.weight.element_size()


def sequences_at_once(model: Decoder, length: int, free: int | None) -> int:
    """Sequences that are generated together, so that their key-value caches and the first forward pass fit.

    The first pass runs all prompts at once. With grouped queries, its activations can take more than the caches.

    Args:
        length: tokens of the longest sequence, with the new ones.
        free: as for `tokens_at_once`.
    """
    if free is None:
        return _CPU_SEQUENCES
    per_token = cached_values(model) * model.tok_embeddings.weight.element_size() + _bytes_per_position(model)
    return min(max(int(_SHARE * free) // (per_token * length), 1), _MOST_SEQUENCES)
