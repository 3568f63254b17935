"""Log-likelihoods of many continuations in few forward passes: shared prefixes are computed once.

Continuations of one context form the branches of a tree. So do contexts with a common prefix, such as few-shot prompts
with the same examples. A row of a batch is a flattened tree. A mask hides the branches from one another, and each
branch continues the positions of its parent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torchtune.utils import get_logger

from owlore_tune.models.decoder import Decoder, find_layers, hidden_states

log = get_logger("INFO")

Result = tuple[float, bool]  # log-likelihood, whether it is the greedy continuation
_HEAD_POSITIONS = 512  # per call of the output head, to limit the memory of logits
_LEAST_SHARED = 32  # tokens of common prefix that contexts need to share a row
# Most tokens in a row of several contexts, or twice their common prefix if that is more: attention is quadratic.
_ROW_TOKENS = 2048
SHARE = 0.5  # of the free memory; the rest is for logits, masks and fragmentation
_CPU_TOKENS, _MOST_TOKENS = 2_048, 65_536


@dataclass
class Branch:
    """One context, without the common prefix of its row, and its continuations."""

    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)  # request index of each continuation

    def __len__(self) -> int:
        # The last token of a continuation is never an input, so it is not part of the row.
        return len(self.context) + sum(len(continuation) - 1 for continuation in self.continuations)


@dataclass
class Row:
    """Branches with a common prefix, which may be empty."""

    prefix: list[int]
    branches: list[Branch]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))

    @property
    def requests(self) -> list[int]:
        return [index for branch in self.branches for index in branch.requests]

    def split(self) -> "list[Row]":
        """Split into one row per branch."""
        return [Row([], [Branch(self.prefix + b.context, b.continuations, b.requests)]) for b in self.branches]


def warn_if_cut(lengths: list[int], longest: int) -> None:
    """Log how many prompts of these ``lengths`` are cut."""
    if cut := sum(length > longest for length in lengths):
        log.warning(f"{cut} of {len(lengths)} prompts have no room in {longest} tokens, and lose their beginning.")


def make_rows(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    """Group (context, continuation) requests into rows, longest first.

    Contexts are truncated on the left to fit with their continuation.

    Raises:
        ValueError: if a continuation is longer than ``max_length``.
    """
    warn_if_cut([len(context) + len(continuation) - 1 for context, continuation in requests], max_length)
    branches: list[Branch] = []
    latest: dict[tuple[int, ...], Branch] = {}
    for index, (context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens is longer than {max_length}")
        context = context[-(max_length + 1 - len(continuation)) :]
        branch = latest.get(tuple(context))
        if branch is None or len(branch) + len(continuation) - 1 > max_length:
            branch = latest[tuple(context)] = Branch(context)
            branches.append(branch)
        branch.continuations.append(continuation)
        branch.requests.append(index)
    return sorted(_share_prefixes(branches), key=len, reverse=True)


def _share_prefixes(branches: list[Branch]) -> Iterator[Row]:
    """Join contexts with a common prefix into rows. In lexicographic order, neighbors share the longest prefixes."""
    group: list[Branch] = []
    shared = 0  # tokens of the group's common prefix
    size = 0  # tokens of the group, counting the prefix once
    for branch in sorted(branches, key=lambda branch: branch.context):
        if group:
            common = _common_length(group[-1].context, branch.context, min(shared, len(branch.context) - 1))
            joined = size + (shared - common) * (len(group) - 1) + len(branch) - common
            pays = common >= _LEAST_SHARED and joined - size <= len(branch) - common // 2
            if pays and joined <= max(_ROW_TOKENS, 2 * common):
                group.append(branch)
                shared, size = common, joined
                continue
            yield _join(group, shared)
        group, shared, size = [branch], len(branch.context) - 1, len(branch)
    if group:
        yield _join(group, shared)


def _common_length(a: list[int], b: list[int], most: int) -> int:
    return next((i for i in range(most) if a[i] != b[i]), most)


def _join(group: list[Branch], shared: int) -> Row:
    if len(group) == 1:
        return Row([], group)
    cut = [Branch(branch.context[shared:], branch.continuations, branch.requests) for branch in group]
    return Row(group[0].context[:shared], cut)


def make_batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Batch rows, sorted longest first, by at most ``batch_tokens`` positions, and at least one row."""
    remaining = iter(rows)
    for first in remaining:
        yield [first, *islice(remaining, max(0, batch_tokens // len(first) - 1))]


def tokens_at_once(model: Decoder, free: int | None) -> int:
    """Positions of a forward pass without gradients.

    Args:
        free: bytes of free memory on the device, see `owlore_tune.measure.free_bytes`; None for a CPU.
    """
    if free is None:
        return _CPU_TOKENS
    return min(max(int(SHARE * free) // bytes_per_position(model), _CPU_TOKENS), _MOST_TOKENS)


def bytes_per_position(model: Decoder) -> int:
    """Bytes of a forward pass without gradients for each position: activations of one layer."""
    layer = next(iter(find_layers(model)))
    width = model.tok_embeddings.weight.shape[1]
    widest = max(parameter.numel() // width for parameter in layer.parameters() if parameter.ndim == 2)
    return (8 * width + 4 * widest) * model.tok_embeddings.weight.element_size()


@torch.inference_mode()
def score_rows(rows: list[Row], model: Decoder, pad_id: int) -> list[Result]:
    """Score all continuations of ``rows`` in one forward pass, in the order of ``Row.requests``.

    The output head is applied only to positions that predict a scored token.
    """
    device = next(model.parameters()).device
    layout = _layout(rows, pad_id)
    mask = None  # without branches, plain causal attention is equivalent
    if layout.branched:
        mask = _tree_mask(layout.branches.to(device), layout.continuations.to(device))
    hidden = hidden_states(model, layout.tokens.to(device), mask=mask, input_pos=layout.positions.to(device))
    places, targets = torch.tensor(layout.places), torch.tensor(layout.targets)
    log_probs, greedy = _log_probs(model, hidden.flatten(0, 1), places, targets)
    return [
        (values.sum().item(), bool(hits.all()))
        for values, hits in zip(log_probs.split(layout.counts), greedy.split(layout.counts), strict=True)
    ]


@dataclass
class _Layout:
    """Rows as tensors (rows, longest), and the flattened position that predicts each scored token."""

    tokens: Tensor
    positions: Tensor
    branches: Tensor  # 0 the prefix, k the kth branch, -1 padding
    continuations: Tensor  # 0 prefix and contexts, k the kth continuation of its branch
    branched: bool = False  # whether a mask is needed
    places: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # tokens of each continuation


def _layout(rows: list[Row], pad_id: int) -> _Layout:
    tokens = torch.full((len(rows), max(map(len, rows))), pad_id)
    layout = _Layout(tokens, torch.zeros_like(tokens), torch.full_like(tokens, -1), torch.zeros_like(tokens))
    for number, row in enumerate(rows):
        layout.branched |= len(row.branches) > 1
        start = _put(layout, number, 0, row.prefix, 0, 0, 0)
        for k, branch in enumerate(row.branches, start=1):
            start = _put(layout, number, start, branch.context, len(row.prefix), k, 0)
            last = number * tokens.shape[1] + start - 1  # last token of the context
            position = len(row.prefix) + len(branch.context)
            layout.branched |= len(branch.continuations) > 1 and len(branch) > len(branch.context)
            for c, continuation in enumerate(branch.continuations, start=1):
                first = number * tokens.shape[1] + start
                start = _put(layout, number, start, continuation[:-1], position, k, c)
                layout.places += [last, *range(first, first + len(continuation) - 1)]
                layout.targets += continuation
                layout.counts.append(len(continuation))
    return layout


def _put(layout: _Layout, row: int, start: int, piece: list[int], position: int, branch: int, continuation: int) -> int:
    """Write ``piece`` into ``row`` at ``start``. Returns its end."""
    place = slice(start, start + len(piece))
    layout.tokens[row, place] = torch.tensor(piece, dtype=torch.long)
    layout.positions[row, place] = torch.arange(position, position + len(piece))
    layout.branches[row, place] = branch
    layout.continuations[row, place] = continuation
    return place.stop


def _tree_mask(branches: Tensor, continuations: Tensor) -> Tensor:  # (b, s), (b, s) -> (b, s, s)
    """True if position i attends to position j: the prefix, its branch's context, and its own continuation so far."""
    length = branches.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    same_branch = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    same_continuation = (continuations[:, None, :] == 0) | (continuations[:, None, :] == continuations[:, :, None])
    return earlier & same_branch & same_continuation


def _log_probs(
    model: Decoder,
    hidden: Tensor,  # (positions, d)
    places: Tensor,  # (n,), on the CPU
    targets: Tensor,  # (n,), on the CPU
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (n,) float32 of ``targets`` given ``hidden[places]``, and whether each target is the
    most likely token. Both are on the CPU."""
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
