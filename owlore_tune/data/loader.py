"""Batches, and the order in which a run reads its rows: training micro-batches, calibration and held-out batches."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from owlore_tune.distributed.world import ALONE, World

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


Collate = Callable[[list[Any]], Batch]


class TrainingData:
    """The training rows in training order, one optimizer step at a time.

    Args:
        dataset: samples with ``tokens`` and ``labels``.
        collate: makes a batch from a list of samples.
        batch_size: rows per micro-batch on each process.
        gradient_accumulation_steps: micro-batches per optimizer step.
        shuffle: whether to shuffle the rows in each epoch.
        seed: seed of the shuffle.
        epochs: passes over the data. Rows at the end of an epoch that do not fill an optimizer step are dropped, so an
            epoch has the same number of steps on any number of processes.
        max_steps_per_epoch: an upper limit; None for no limit.
        world: processes that share the rows of each step.

    Raises:
        ValueError: if the dataset does not fill one optimizer step.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int = 1,
        max_steps_per_epoch: int | None = None,
        world: World = ALONE,
    ) -> None:
        self.dataset = dataset
        self.rows_per_step = batch_size * gradient_accumulation_steps * world.size
        self.steps_per_epoch = len(dataset) // self.rows_per_step
        if self.steps_per_epoch == 0:
            processes = f" × {world.size} processes" if world.size > 1 else ""
            raise ValueError(
                f"dataset has {len(dataset)} samples, less than one optimizer step of batch_size={batch_size} × "
                f"gradient_accumulation_steps={gradient_accumulation_steps}{processes}"
            )
        if max_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, max_steps_per_epoch)
        self.num_steps = epochs * self.steps_per_epoch
        self._accumulation = gradient_accumulation_steps
        self._world = world
        self._loader = _loader(dataset, collate, batch_size, world, shuffle=shuffle, seed=seed)
        self._step = 0  # the next step
        self._batches: Iterator[Batch] | None = None  # of the current epoch
        self._ahead: list[Batch] | Exception | None = None  # the next step's, or the error of reading them

    def seek(self, step: int) -> None:
        """Continue after ``step`` optimizer steps."""
        self._step, self._batches, self._ahead = step, None, None

    def read_ahead(self, device: torch.device) -> None:
        """Read the next optimizer step's micro-batches, if there is one, while a GPU works. Does nothing on a CPU.

        Rows that use a global random generator then advance it a step early.
        """
        if device.type != "cpu" and self._ahead is None and self._step < self.num_steps:
            try:
                self._ahead = self._next()
            except Exception as error:
                self._ahead = error  # `micro_batches` raises it

    def micro_batches(self) -> list[Batch]:
        """The micro-batches of the next optimizer step.

        Raises:
            ValueError: if a row cannot be used. Raised on all processes if it happens on one.
        """
        found, self._ahead = self._next() if self._ahead is None else self._ahead, None
        if isinstance(found, Exception):
            raise found
        self._step += 1
        return found

    def _next(self) -> list[Batch]:
        if self._batches is None:
            epoch, steps_done = divmod(self._step, self.steps_per_epoch)
            self._loader.sampler.set_epoch(epoch)
            if steps_done:
                rows = steps_done * self._accumulation * self._loader.batch_size
                self._loader.sampler.load_state_dict({StatefulDistributedSampler._YIELDED: rows})
            self._batches = iter(self._loader)
        batches = self._batches
        found = self._world.call(lambda: _read(batches, self._accumulation))
        assert found is not None and len(found) == self._accumulation
        if (self._step + 1) % self.steps_per_epoch == 0:
            self._batches = None
        return found

    def calibration_batches(self, count: int) -> Iterator[Batch]:
        """The first ``count`` batches in training order, without labels and with ``valid``, False at padding."""
        loader = self._loader
        loader.sampler.set_epoch(0)
        marked = StatefulDataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=loader.sampler,
            collate_fn=partial(collate_with_valid, loader.collate_fn),
            generator=torch.Generator(),
        )
        for batch in islice(marked, count):
            del batch["labels"]
            yield batch


class HeldOutData:
    """The held-out rows, divided over the processes of ``world``; arguments as for `TrainingData`."""

    def __init__(self, dataset: Any, collate: Collate, *, batch_size: int, seed: int = 0, world: World = ALONE) -> None:
        self.dataset = dataset
        self._world = world
        self._loader = _loader(dataset, collate, batch_size, world, shuffle=False, seed=seed)

    def __len__(self) -> int:
        """Number of batches on each process."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """All processes yield the same number of rows. The last ones can repeat rows of others, and have no labels."""
        rows_left = len(range(self._world.rank, len(self.dataset), self._world.size))
        batches = iter(self._loader)
        for _ in range(len(self)):
            read = self._world.call(lambda: _read(batches, 1))
            assert read is not None
            (batch,) = read
            batch["labels"][max(rows_left, 0) :] = CROSS_ENTROPY_IGNORE_IDX
            rows_left -= len(batch["labels"])
            yield batch


def _read(batches: Iterator[Batch], count: int) -> list[Batch]:
    try:
        return list(islice(batches, count))
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # of a dataset that is not ours
        raise ValueError(f"a row of the dataset does not fit its component: {error!r}") from error


def _loader(
    dataset: Any, collate: Collate, batch_size: int, world: World, *, shuffle: bool, seed: int
) -> StatefulDataLoader:
    sampler = StatefulDistributedSampler(dataset, num_replicas=world.size, rank=world.rank, shuffle=shuffle, seed=seed)
    return StatefulDataLoader(
        dataset=dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=shuffle,
        generator=torch.Generator(),  # else each pass over the data would advance the global generator
    )
