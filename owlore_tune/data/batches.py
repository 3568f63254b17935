"""Batches: made from samples, and brought to a device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

Batch = dict[str, Tensor]


def collate_packed(samples: list[dict[str, Tensor]]) -> Batch:
    """A batch of packed rows, with positions, and with the number of each token's sample in its row, (b, s) int32.

    torchtune's ``padded_collate_packed`` makes masks, which are s times as large and are copied to a device. With a
    GPU in the machine they are for flex attention, which a run on the CPU and the attention of Gemma 2 cannot use.
    """
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "input_pos")}
    batch["sample_number"] = numbers = torch.stack([_numbers(sample["seq_lens"]) for sample in samples])
    is_first = numbers.diff(dim=1, prepend=numbers[:, :1]) > 0  # which the sample before it cannot predict
    return batch | {"labels": batch["labels"].masked_fill(is_first, CROSS_ENTROPY_IGNORE_IDX)}


def _numbers(seq_lens: Any) -> Tensor:  # (number of samples,) → (s,)
    lengths = torch.as_tensor(seq_lens)
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)


def collate_with_valid(collate: Callable[[list[dict[str, Any]]], Batch], samples: list[dict[str, Any]]) -> Batch:
    """The batch of ``collate``, with ``valid`` (b, s) bool: False at the padding at a row's end."""
    batch = collate(samples)
    lengths = torch.tensor([_num_tokens(sample) for sample in samples])
    batch["valid"] = torch.arange(batch["tokens"].shape[1]) < lengths[:, None]
    return batch


def _num_tokens(sample: Mapping[str, Any]) -> int:
    """Number of tokens of a row without its padding."""
    num_tokens = len(sample["tokens"])
    if "seq_lens" in sample:  # packed: padding is the last sequence, and its positions continue the one before
        last = int(sample["seq_lens"][-1])
        start = num_tokens - last
        if start > 0 and sample["input_pos"][start] != 0:
            return start
    return num_tokens


def batch_to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """``batch`` on ``device``. The numbers of its samples become a mask (b, s, s) bool, causal inside each sample."""
    moved = {key: to_device(value, device) for key, value in batch.items()}
    if (numbers := moved.pop("sample_number", None)) is not None:
        moved["mask"] = (numbers[:, :, None] == numbers[:, None, :]).tril_()
    return moved


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory on ``device``. The host does not wait for a copy to a GPU."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
