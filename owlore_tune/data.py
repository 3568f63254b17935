"""Datasets that need no hub: questions that lm-evaluation-harness carries, and local JSON files."""

import importlib.resources
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.data import Dataset
from torchtune.data import Message
from torchtune.datasets import PackedDataset, SFTDataset
from torchtune.datasets._sft import SFTTransform
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

LOOKS = 1000  # rows that are tokenized to find the longest


def mmlu_dev_dataset(
    tokenizer: ModelTokenizer,
    *,
    split: str = "train",
    num_held_out: int = 45,
    seed: int = 0,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """The 282 MMLU dev questions with worked answers that the installed lm_eval package carries (up to 5 of each of 57
    subjects, its ``flan_cot_fewshot`` prompts), divided at random into what is trained on and what is held out.

    Args:
        split: ``train`` or ``held_out``.
        num_held_out: questions held out.
        seed: of the division.
        packed: put several samples into each row of ``tokenizer.max_seq_len`` tokens.

    Raises:
        ValueError: if ``split`` is unknown or ``num_held_out`` leaves one of the splits empty.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"dataset.split={split!r}; choose train or held_out")
    rows = mmlu_dev_rows(split, num_held_out=num_held_out, seed=seed)
    return _finish(rows, InstructionToMessages(), tokenizer, packed)


def mmlu_dev_rows(split: str | None = None, *, num_held_out: int = 45, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of `mmlu_dev_dataset`: ``instruction``, ``output`` and ``subject``; of both splits where None.

    Raises:
        ValueError: if ``num_held_out`` leaves one of the splits empty.
    """
    folder = importlib.resources.files("lm_eval") / "tasks" / "mmlu" / "flan_cot_fewshot"
    rows = []
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.startswith("mmlu_") and file.name.endswith(".yaml"):
            samples = yaml.safe_load(file.read_text())["fewshot_config"]["samples"]
            subject = file.name.removeprefix("mmlu_").removesuffix(".yaml").replace("_", " ")
            rows += [{"instruction": s["question"], "output": s["target"], "subject": subject} for s in samples]
    if split is None:
        return rows
    if not 0 < num_held_out < len(rows):
        raise ValueError(f"dataset.num_held_out={num_held_out}; choose 1 to {len(rows) - 1} of {len(rows)}")
    random.Random(seed).shuffle(rows)
    return rows[num_held_out:] if split == "train" else rows[:num_held_out]


def instruction_dataset(
    tokenizer: ModelTokenizer,
    *,
    data_files: str | list[str],
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """Local JSON files of ``instruction``, optional ``input``, and ``output``: the form of Commonsense170K.

    The user's turn is the instruction, with the input below it where there is one; the assistant's is the output.
    Each file is a JSON list of objects, or one object a line.

    Args:
        data_files: a path, or several.
        packed: put several samples into each row of ``tokenizer.max_seq_len`` tokens.

    Raises:
        ValueError: if a file is missing, empty or not JSON, or if a row lacks a field; it names file, row and field.
    """
    files = [data_files] if isinstance(data_files, str) else list(data_files)
    rows = [row for file in files for row in read_rows(Path(file).expanduser(), "dataset.data_files")]
    return _finish(rows, InstructionToMessages(), tokenizer, packed)


class InstructionToMessages(Transform):
    """A row of ``instruction``, ``input`` and ``output`` as a user's and an assistant's message."""

    def __call__(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        prompt = "\n".join(filter(None, (sample["instruction"], sample.get("input"))))
        return {
            "messages": [
                Message(role="user", content=prompt, masked=True),
                Message(role="assistant", content=sample["output"]),
            ]
        }


class RowsDataset(SFTDataset):
    """torchtune's ``SFTDataset`` over rows that are already in memory."""

    def __init__(self, rows: list[dict[str, Any]], message_transform: Transform, model_transform: Transform) -> None:
        self._data = rows
        self._prepare_sample = SFTTransform(message_transform=message_transform, model_transform=model_transform)


def _finish(
    rows: list[dict[str, Any]], transform: Transform, tokenizer: ModelTokenizer, packed: bool
) -> SFTDataset | PackedDataset:
    dataset = RowsDataset(rows, transform, tokenizer)
    if not packed:
        return dataset
    if tokenizer.max_seq_len is None:
        raise ValueError("dataset.packed=true needs tokenizer.max_seq_len, the length of a packed row")
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len)


def longest_row(dataset: Dataset, max_seq_len: int | None) -> int:
    """Tokens of the longest row. Of more than `LOOKS` rows it is the bound, or without one the longest of so many."""
    if max_seq_len is not None and len(dataset) > LOOKS:
        return max_seq_len
    return max(len(dataset[i]["tokens"]) for i in range(0, len(dataset), math.ceil(len(dataset) / LOOKS)))


def read_rows(file: Path, field_name: str) -> list[dict[str, Any]]:
    """The rows of a file for `instruction_dataset`, which says what is refused, as ``field_name=FILE ...``."""
    if not file.is_file():
        raise ValueError(f"{field_name}={file} does not exist")
    text = file.read_text()
    if not text.strip():
        raise ValueError(f"{field_name}={file} is empty")
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.split("\n") if x.strip()]
        )
    except ValueError as error:
        raise ValueError(f"{field_name}={file} is not JSON: {error}") from error
    if not rows:
        raise ValueError(f"{field_name}={file} is empty")
    for number, row in enumerate(rows):
        for field in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"{field_name}={file}: row {number} has no text in field {field!r}")
    return rows
