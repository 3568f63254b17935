"""Comparisons of two computations that round differently: a count, an argmax or a decoded text may differ at a tie.

CPUs with other instructions add in another order. So a value next to a threshold, or two logits that are nearly equal,
can fall on either side.
"""

import torch

from owlore_tune.models.decoder import find_layers, find_linears

FLIPPED = 3  # entries of a layer that may be on the other side of the threshold
TIE = 2e-3  # difference of logits


def assert_same_shares(ours: list[float], theirs: list[float], model) -> None:
    """Outlier scores, which are shares of the entries of a layer's Linears."""
    sizes = [sum(linear.weight.numel() for _, linear in find_linears(layer)) for layer in find_layers(model)]
    assert len(ours) == len(theirs) == len(sizes)
    for layer, (a, b, size) in enumerate(zip(ours, theirs, sizes, strict=True)):
        assert abs(a - b) * size <= FLIPPED, f"layer {layer}: {a} and {b} differ by {abs(a - b) * size:.1f} entries"


def assert_same_choices(ours: torch.Tensor, theirs: torch.Tensor) -> None:  # (n, choices) log-likelihoods
    """The choice of the largest value, where it leads by more than `TIE`."""
    first, second = theirs.topk(2, dim=1).values.unbind(1)
    clear = first - second > TIE
    assert clear.float().mean() > 0.9
    assert torch.equal(ours.argmax(1)[clear], theirs.argmax(1)[clear])


def assert_same_greedy(ours: list[bool], theirs: list[bool], pairs: list[tuple[str, str]], harness) -> None:
    """Whether a continuation is the greedy one, unless one of its tokens is at a tie."""
    for pair, a, b in zip(pairs, ours, theirs, strict=True):
        assert a == b or _smallest_lead(harness, *pair) < TIE, pair


def assert_same_texts(ours: list[str], theirs: list[str], contexts: list[str], harness) -> None:
    """Greedy texts, which may differ from the first tie on."""
    for context, a, b in zip(contexts, ours, theirs, strict=True):
        if a != b:
            common = next(i for i in range(max(len(a), len(b))) if a[: i + 1] != b[: i + 1])
            assert _smallest_lead(harness, context, (a if len(a) > common else b)[: common + 8]) < TIE, (a, b)


@torch.no_grad()
def _smallest_lead(harness, context: str, continuation: str) -> float:
    """The smallest difference between the two largest logits at the tokens of ``continuation``."""
    start, whole = (harness.tok_encode(text) for text in (context, context + continuation))
    logits = harness.model(torch.tensor([whole])).logits[0, len(start) - 1 : -1].float()
    first, second = logits.topk(2).values.unbind(-1)
    return (first - second).min().item()
