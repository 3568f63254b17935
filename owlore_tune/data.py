"""The paper's training data, from the hub or local files, and questions that lm-evaluation-harness carries."""

import importlib.resources
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow.parquet
import torch
import yaml
from datasets import load_dataset
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torchtune.data import Message
from torchtune.datasets import PackedDataset, SFTDataset
from torchtune.datasets._sft import SFTTransform
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from torchtune.utils import get_logger

log = get_logger("INFO")

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
    """Local files of ``instruction``, optional ``input``, and ``output``: the form of Commonsense170K and Alpaca.

    The user's turn is the instruction, with the input below it where there is one; the assistant's, which alone is
    trained on, is the output.

    Args:
        data_files: a path, or several: JSON lists of objects, an object a line, or Parquet.
        packed: put several samples into each row of ``tokenizer.max_seq_len`` tokens.

    Raises:
        ValueError: if a file is missing, empty or not of its format, or if a row lacks a field; it names file, row and
            field. Rows with blank text are left out, with a warning.
    """
    return _dataset(tokenizer, InstructionToMessages(), data_files=data_files, packed=packed)


def commonsense_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str = "zwhe99/commonsense_170k",
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """Commonsense170K of LLM-Adapters (arXiv 2304.01933), on which the paper trains for its 8 commonsense tasks.

    Prompt, mask and errors as for `instruction_dataset`.

    Args:
        source: of the hub, or a directory in the hub's layout.
        data_files: local files instead, such as LLM-Adapters' ``ft-training_set/commonsense_170k.json``.
        packed: put several samples into each row of ``tokenizer.max_seq_len`` tokens.
    """
    return _dataset(tokenizer, InstructionToMessages(), source=source, data_files=data_files, packed=packed)


def alpaca_gpt4_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str = "vicgalle/alpaca-gpt4",
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """Alpaca's instructions answered by GPT-4 (arXiv 2304.03277), on which the paper trains for MT-Bench.

    Prompt, mask and errors as for `instruction_dataset`.

    Args:
        source: of the hub, or a directory in the hub's layout.
        data_files: local files instead, such as ``alpaca_gpt4_data.json``.
        packed: put several samples into each row of ``tokenizer.max_seq_len`` tokens.
    """
    return _dataset(tokenizer, InstructionToMessages(), source=source, data_files=data_files, packed=packed)


def mmlu_train_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str = "cais/mmlu",
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """MMLU's auxiliary training questions (arXiv 2009.03300), on which the paper trains for MMLU.

    The user's turn is the question, the choices as ``A.`` to ``D.``, and ``Answer:``, the harness's prompt; the
    assistant's, which alone is trained on, is the letter. Errors as for `instruction_dataset`.

    Args:
        source: of the hub, or a directory in the hub's layout; its ``auxiliary_train`` split.
        data_files: local files instead, of ``question``, ``choices`` (a list) and ``answer`` (an index from 0).
        packed: put several samples into each row of ``tokenizer.max_seq_len`` tokens.
    """
    hub = dict(source=source, name="all", split="auxiliary_train")
    return _dataset(tokenizer, ChoicesToMessages(), **hub, data_files=data_files, packed=packed)


def gsm8k_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str = "openai/gsm8k",
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """GSM8K's training problems (arXiv 2110.14168).

    The user's turn is the question; the assistant's, which alone is trained on, is the worked answer as it stands,
    with its calculator annotations and the final number after ``####``. Errors as for `instruction_dataset`.

    Args:
        source: of the hub, or a directory in the hub's layout; its ``main`` configuration.
        data_files: local files instead, of ``question`` and ``answer``.
        packed: put several samples into each row of ``tokenizer.max_seq_len`` tokens.
    """
    return _dataset(tokenizer, ProblemToMessages(), source=source, name="main", data_files=data_files, packed=packed)


class RowTransform(Transform):
    """A row of a dataset as a user's and an assistant's message.

    Attributes:
        texts: the fields that must be text.
    """

    texts: tuple[str, ...] = ()

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with ``row``, if anything, naming the field."""
        bad = next((field for field in self.texts if not isinstance(row.get(field), str)), None)
        return None if bad is None else f"no text in field {bad!r}"

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        raise NotImplementedError

    def __call__(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        prompt, answer = self.prompt_and_answer(sample)
        return {
            "messages": [
                Message(role="user", content=prompt, masked=True),
                Message(role="assistant", content=answer),
            ]
        }


class InstructionToMessages(RowTransform):
    """``instruction``, optional ``input`` below it, ``output``."""

    texts = ("instruction", "output")

    def problem(self, row: Mapping[str, Any]) -> str | None:
        if not isinstance(row.get("input"), str | None):
            return f"{row['input']!r} in field 'input', which is no text"
        return super().problem(row)

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        return "\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]


class ProblemToMessages(RowTransform):
    """``question`` and ``answer``."""

    texts = ("question", "answer")

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        return row["question"], row["answer"]


class ChoicesToMessages(RowTransform):
    """``question``, ``choices`` and the index ``answer``; the answer is a letter."""

    texts = ("question",)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            return "no list of texts in field 'choices'"
        if not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(ascii_uppercase)):
            return f"{answer!r} in field 'answer', which is no index of its {len(choices)} choices"
        return super().problem(row)

    def prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[str, str]:
        choices = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"], strict=False)]
        return "\n".join([row["question"].strip(), *choices, "Answer:"]), ascii_uppercase[row["answer"]]


class RowsDataset(SFTDataset):
    """torchtune's ``SFTDataset`` over rows that are already in memory."""

    def __init__(self, rows: list[dict[str, Any]], message_transform: Transform, model_transform: Transform) -> None:
        self._data = rows
        self._prepare_sample = SFTTransform(message_transform=message_transform, model_transform=model_transform)


def _dataset(
    tokenizer: ModelTokenizer,
    transform: RowTransform,
    *,
    source: str | None = None,
    name: str | None = None,
    split: str = "train",
    data_files: str | list[str] | None = None,
    packed: bool,
) -> SFTDataset | PackedDataset:
    """The rows of ``data_files``, else of ``source``, once they are known to be what ``transform`` takes."""
    rows = []
    if data_files is None:
        assert source is not None
        where = f"dataset.source={source}"
        try:
            found = load_dataset(source, name, split=split).to_list()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{where} cannot be loaded ({error}); without a hub, set dataset.data_files, or dataset.source to a "
                "copy of it"
            ) from error
        rows += _good_rows(found, where, transform)
    for file in [data_files] if isinstance(data_files, str) else data_files or ():
        where = f"dataset.data_files={file}"
        rows += _good_rows(read_file(Path(file).expanduser(), "dataset.data_files"), where, transform)
    return _finish(rows, transform, tokenizer, packed)


def _good_rows(rows: list[Any], where: str, transform: RowTransform) -> list[dict[str, Any]]:
    """``rows`` without those that have blank text."""
    for number, row in enumerate(rows):
        problem = transform.problem(row if isinstance(row, dict) else {})
        if problem:
            raise ValueError(f"{where}: row {number} has {problem}")
    good = [row for row in rows if all(row[field].strip() for field in transform.texts)]
    if not good:
        raise ValueError(f"{where} is empty")
    if blank := len(rows) - len(good):
        log.warning(f"{where}: {blank} of {len(rows)} rows are left out, for blank {' or '.join(transform.texts)}.")
    return good


def _finish(
    rows: list[dict[str, Any]], transform: Transform, tokenizer: ModelTokenizer, packed: bool
) -> SFTDataset | PackedDataset:
    dataset = RowsDataset(rows, transform, tokenizer)
    if not packed:
        return dataset
    if tokenizer.max_seq_len is None:
        raise ValueError("dataset.packed=true needs tokenizer.max_seq_len, the length of a packed row")
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len)


def dataset_nodes(node: DictConfig | ListConfig) -> list[DictConfig]:
    """The datasets of a config's ``dataset``, which is one of them or a list."""
    return list(node) if isinstance(node, ListConfig) else [node]


def is_packed(node: DictConfig | ListConfig) -> bool:
    """Whether a config's ``dataset`` fills its rows; it is the same for all of a list."""
    return dataset_nodes(node)[0].get("packed", False)


def collate_with_valid(
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]], samples: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """The batch of ``collate``, with ``valid`` (b, s) bool: False where a row is padded at its end."""
    batch = collate(samples)
    lengths = torch.tensor([_num_tokens(sample) for sample in samples])
    batch["valid"] = torch.arange(batch["tokens"].shape[1]) < lengths[:, None]
    return batch


def _num_tokens(sample: Mapping[str, Any]) -> int:
    """Tokens of a row without its padding."""
    num_tokens = len(sample["tokens"])
    if "seq_lens" in sample:  # packed: padding is the last sequence, and its positions go on from the one before
        last = int(sample["seq_lens"][-1])
        start = num_tokens - last
        if start > 0 and sample["input_pos"][start] != 0:
            return start
    return num_tokens


def longest_row(dataset: Any, max_seq_len: int | None) -> int:
    """Tokens of the longest row. Of more than `LOOKS` rows it is the bound, or without one the longest of so many."""
    if max_seq_len is not None and len(dataset) > LOOKS:
        return max_seq_len
    return max(len(dataset[i]["tokens"]) for i in range(0, len(dataset), math.ceil(len(dataset) / LOOKS)))


def read_file(file: Path, field_name: str) -> list[Any]:
    """The rows of a JSON, JSON-lines or Parquet file.

    Raises:
        ValueError: as ``field_name=FILE ...``, if it is missing, empty or not of its format.
    """
    if not file.is_file():
        raise ValueError(f"{field_name}={file} does not exist")
    try:
        if file.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            text = file.read_text()
            is_list = text.lstrip().startswith("[")
            rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:  # which pyarrow's errors are too
        kind = "Parquet" if file.suffix == ".parquet" else "JSON"
        raise ValueError(f"{field_name}={file} is not {kind}: {error}") from error
    if not rows:
        raise ValueError(f"{field_name}={file} is empty")
    return rows


def read_rows(file: Path, field_name: str) -> list[dict[str, Any]]:
    """The rows of a file of ``instruction`` and ``output``, neither of them blank.

    Raises:
        ValueError: as ``field_name=FILE ...``, naming row and field.
    """
    rows = read_file(file, field_name)
    for number, row in enumerate(rows):
        for field in InstructionToMessages.texts:
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"{field_name}={file}: row {number} has no text in field {field!r}")
    return rows
