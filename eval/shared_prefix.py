"""Log-likelihoods of several continuations of one context in one row: the context is read once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from owlore_tune.layers import hidden_states

Result = tuple[float, bool]  # log-likelihood, whether it is the greedy continuation
_HEAD_POSITIONS = 512  # at a time, so that few logits are alive


@dataclass
class Row:
    """One context with all continuations that are asked of it."""

    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)  # where each continuation's result goes

    def __len__(self) -> int:
        # The last token of a continuation predicts nothing that is asked for, so it is not part of the row.
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


def make_rows(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    """A row for each distinct context of (context, continuation), longest first; one more where they do not fit.

    A context that is too long with its continuation loses its beginning.

    Raises:
        ValueError: if a continuation alone is longer than ``max_length``.
    """
    rows: list[Row] = []
    latest: dict[tuple[int, ...], Row] = {}
    for index, (context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens is longer than {max_length}")
        context = context[-(max_length + 1 - len(continuation)) :]
        row = latest.get(tuple(context))
        if row is None or len(row) + len(continuation) - 1 > max_length:
            row = latest[tuple(context)] = Row(context)
            rows.append(row)
        row.continuations.append(continuation)
        row.requests.append(index)
    return sorted(rows, key=len, reverse=True)


def make_batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of falling length in batches of at most ``batch_tokens`` positions, and at least one row."""
    remaining = iter(rows)
    for first in remaining:
        yield [first, *islice(remaining, max(0, batch_tokens // len(first) - 1))]


@torch.inference_mode()
def score_rows(rows: list[Row], model: TransformerDecoder, pad_id: int) -> list[Result]:
    """The result of each continuation of each row, in order, from one forward pass.

    A tree-shaped mask and restarted positions keep the continuations from seeing one another; the output head is
    applied to the positions that predict a scored token.
    """
    device = next(model.parameters()).device
    tokens, positions, segments = (part.to(device) for part in _layout(rows, pad_id))
    branched = any(len(row) > len(row.context) and len(row.continuations) > 1 for row in rows)
    mask = _tree_mask(segments) if branched else None  # without branches, plain causal attention is the same
    hidden = hidden_states(model, tokens, mask=mask, input_pos=positions)
    # Where each scored token is predicted from: position in the batch, and the token.
    length = tokens.shape[1]
    places, targets, counts = [], [], []
    for number, row in enumerate(rows):
        start = number * length + len(row.context)
        for continuation in row.continuations:
            places += [number * length + len(row.context) - 1, *range(start, start + len(continuation) - 1)]
            targets += continuation
            counts.append(len(continuation))
            start += len(continuation) - 1
    log_probs, greedy = _log_probs(model, hidden.flatten(0, 1), torch.tensor(places), torch.tensor(targets))
    return [
        (values.sum().item(), bool(hits.all()))
        for values, hits in zip(log_probs.split(counts), greedy.split(counts), strict=True)
    ]


def _layout(rows: list[Row], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and segments (0 the context, k its kth continuation, -1 padding), each (rows, longest)."""
    tokens = torch.full((len(rows), max(map(len, rows))), pad_id)
    positions = torch.zeros_like(tokens)
    segments = torch.full_like(tokens, -1)
    for number, row in enumerate(rows):
        end = len(row.context)
        pieces = [(row.context, 0, 0), *((c[:-1], end, k) for k, c in enumerate(row.continuations, start=1))]
        start = 0
        for piece, first, segment in pieces:
            place = slice(start, start + len(piece))
            tokens[number, place] = torch.tensor(piece, dtype=torch.long)
            positions[number, place] = torch.arange(first, first + len(piece))
            segments[number, place] = segment
            start += len(piece)
    return tokens, positions, segments


def _tree_mask(segments: Tensor) -> Tensor:  # (b, s) -> (b, s, s)
    """True where position i sees position j: the context, and what came before in its own continuation."""
    earlier = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return earlier & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))


def _log_probs(
    model: TransformerDecoder,
    hidden: Tensor,  # (positions, d)
    places: Tensor,  # (n,), on the CPU
    targets: Tensor,  # (n,), on the CPU
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n,) float32 of ``targets`` predicted from ``hidden[places]``, and whether each is the
    likeliest; on the CPU."""
    unique, inverse = places.unique(return_inverse=True)
    order = inverse.argsort()
    log_probs, greedy = torch.empty(len(places)), torch.empty(len(places), dtype=torch.bool)
    for start in range(0, len(unique), _HEAD_POSITIONS):
        chunk = unique[start : start + _HEAD_POSITIONS].to(hidden.device)
        logits = model.output(hidden[chunk]).float()
        mine = order[(inverse[order] >= start) & (inverse[order] < start + len(chunk))]
        rows, columns = (inverse[mine] - start).to(hidden.device), targets[mine].to(hidden.device)
        log_probs[mine] = (logits[rows, columns] - logits.logsumexp(-1)[rows]).cpu()
        greedy[mine] = (logits.argmax(-1)[rows] == columns).cpu()
    return log_probs, greedy
