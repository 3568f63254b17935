"""Functions for any dataset of samples: check it, find its longest row, compute a digest of its content."""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, OpenAIToMessages
from torchtune.datasets import ConcatDataset, PackedDataset

from owlore_tune.data.datasets import RowsDataset
from owlore_tune.data.messages import ConversationToMessages
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.errors import ConfigError

MOST_ROWS = 1000  # tokenized to find the longest row, or for a digest


def check_samples(key: str, dataset: Any, collate: Callable[[list[Any]], Any], collate_name: str) -> None:
    """Raise ValueError if training cannot use the first sample, a batch of it, or a conversation."""
    for part in getattr(dataset, "_datasets", [dataset]):
        _check_conversations(key, part)
    try:
        sample = dataset[0]
    except ValueError:
        raise
    except Exception as error:  # a dataset of torchtune or the user, on other columns than it expects
        raise ValueError(f"{key}: its first row does not fit the dataset's component: {error!r}") from error
    if not isinstance(sample, dict) or not {"tokens", "labels"} <= sample.keys():
        raise ValueError(f"{key}: its samples have no tokens and labels; use a dataset for fine-tuning")
    try:
        batch = collate([sample])
    except Exception as error:
        raise ValueError(f"collate_fn={collate_name} cannot make a batch of {key}'s samples: {error!r}") from error
    if not isinstance(batch, dict) or not {"tokens", "labels"} <= batch.keys():
        raise ValueError(f"collate_fn={collate_name} does not make batches with tokens and labels")


def _check_conversations(key: str, dataset: Any) -> None:
    """Raise ValueError if torchtune's transform of OpenAI's format would take the text of another message for one
    without text, such as a call of a tool."""
    rows = getattr(dataset, "ds", dataset)  # of a packed one
    transform = getattr(rows, "_message_transform", None)
    if isinstance(transform, OpenAIToMessages):
        check = ConversationToMessages(transform._column_map["messages"])
        for number, row in enumerate(rows._data):
            if problem := check.problem(row):
                raise ValueError(f"{key}: row {number} has {problem}")


def check_labels(key: str, dataset: Any, max_seq_len: int | None) -> None:
    """Raise ValueError if none of up to `MOST_ROWS` rows has a token to train."""
    for index in range(0, len(dataset), math.ceil(len(dataset) / MOST_ROWS)):
        if any(int(label) != CROSS_ENTROPY_IGNORE_IDX for label in read_sample(dataset, index)["labels"][1:]):
            return
    raise ValueError(
        f"{key}: no row has a token to train: every answer is cut off or masked; raise tokenizer.max_seq_len, which is "
        f"{max_seq_len}, or shorten the prompts"
    )


def fit_to_model(dataset: Any, tokenizer: Any, model: Any) -> None:
    """Make ``dataset`` raise, naming the row, when a row longer than ``model`` takes is read.

    Raises:
        ConfigError: if a row has a token for which the model has no embedding.
    """
    num_embeddings = model.tok_embeddings.weight.shape[0]
    missing = tokenizer.tokens_from(num_embeddings) if isinstance(tokenizer, HFChatTokenizer) else []
    for part in getattr(dataset, "_datasets", [dataset]):
        if isinstance(part, RowsDataset):
            part.max_tokens = model.max_seq_len
        if missing and _has_one_of(missing, part, num_embeddings):
            raise ConfigError(
                f"a row has one of the tokens {', '.join(missing)}, for which the model has no embedding; remove it"
            )


def _has_one_of(tokens: list[str], dataset: Any, first_id: int) -> bool:
    """Whether a row has one of ``tokens``, whose ids begin at ``first_id``."""
    if isinstance(dataset, PackedDataset):
        return any(int(torch.as_tensor(pack["tokens"]).max()) >= first_id for pack in dataset.packs)
    return any(token in str(row) for row in getattr(dataset, "_data", ()) for token in tokens)


def longest_row(dataset: Any, max_seq_len: int | None) -> int:
    """Tokens of the longest row.

    With more than `MOST_ROWS` rows, it is ``max_seq_len``, or without one the longest of up to `MOST_ROWS` rows.
    """
    if max_seq_len is not None and len(dataset) > MOST_ROWS:
        return max_seq_len
    step = math.ceil(len(dataset) / MOST_ROWS)
    return max(len(read_sample(dataset, index)["tokens"]) for index in range(0, len(dataset), step))


def read_sample(dataset: Any, index: int) -> dict[str, Any]:
    """The sample of a row. Raise ValueError if the row cannot be used."""
    try:
        return dataset[index]
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and isinstance(dataset, RowsDataset | ConcatDataset):
            raise  # it names the row
        raise ValueError(f"row {index} does not fit the dataset's component: {error!r}") from error


def _without_address(value: Any) -> str:
    """A text for a value that JSON does not have; for an object such as an image, without its place in memory."""
    return type(value).__qualname__ if type(value).__str__ is object.__str__ else str(value)


def dataset_digest(dataset: Any) -> str:
    """A digest of a dataset's rows, in order.

    It covers the tokens of packed rows, and the raw rows of torchtune's other datasets, so nothing is tokenized. For
    any other dataset it covers up to `MOST_ROWS` samples.
    """
    digest = hashlib.sha256(f"{type(dataset).__qualname__} {len(dataset)}".encode())
    if isinstance(dataset, PackedDataset):
        for pack in dataset.packs:
            for key in ("tokens", "labels"):
                digest.update(torch.as_tensor(pack[key]).numpy().tobytes())
    elif isinstance(dataset, ConcatDataset):
        for part in dataset._datasets:
            digest.update(dataset_digest(part).encode())
    else:
        rows = getattr(dataset, "_data", None)
        if rows is None:
            rows = [read_sample(dataset, i) for i in range(0, len(dataset), math.ceil(len(dataset) / MOST_ROWS))]
        for row in rows:
            digest.update(json.dumps(row, default=_without_address, sort_keys=True).encode())
    return digest.hexdigest()[:16]
