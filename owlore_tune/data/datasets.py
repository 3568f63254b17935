"""The paper's training datasets, from the hub or local files, and the MMLU dev questions of lm-evaluation-harness."""

import importlib.resources
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from datasets import load_dataset
from torchtune.datasets import PackedDataset, SFTDataset
from torchtune.datasets._sft import SFTTransform
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from torchtune.utils import get_logger

from owlore_tune.data.messages import (
    ChoicesToMessages,
    ConversationToMessages,
    InstructionToMessages,
    ProblemToMessages,
    RowTransform,
)
from owlore_tune.files import user_path

YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML does not have the fast one on every machine

log = get_logger("INFO")


def instruction_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str | None = None,
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """Rows of ``instruction``, optional ``input``, and ``output``, the format of Commonsense170K and Alpaca.

    The paper trains on ``zwhe99/commonsense_170k`` (LLM-Adapters, arXiv 2304.01933) for its 8 commonsense tasks, and on
    ``vicgalle/alpaca-gpt4`` (arXiv 2304.03277) for MT-Bench. The user's turn is the instruction, with the input below
    it if there is one. The assistant's turn is the output; the loss covers only this turn.

    Args:
        source: dataset on the hub, or a directory in the hub's layout. The ``train`` split is used.
        data_files: local files instead, one path or a list. A file is a JSON list, JSON lines or Parquet.
        packed: pack several samples into each row of ``tokenizer.max_seq_len`` tokens.

    Raises:
        ValueError: if a file is missing, empty or malformed, or if a row lacks a field. The message names file, row and
            field. Rows with blank text are skipped, with a warning.
    """
    return _dataset(tokenizer, InstructionToMessages(), packed, data_files, source)


def chat_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str | None = None,
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """Conversations in OpenAI's format: rows of ``messages``, a list of objects with ``role`` and ``content``.

    The roles are system, user and assistant, in turns. The loss covers all answers of the assistant. Arguments and
    errors are those of `instruction_dataset`. Calls of tools and contents that are not text are errors too.
    """
    return _dataset(tokenizer, ConversationToMessages(), packed, data_files, source)


def mmlu_train_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str = "cais/mmlu",
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """MMLU's auxiliary training questions (arXiv 2009.03300), the paper's training data for MMLU.

    The user's turn is the harness's prompt: the question, the choices as ``A.`` to ``D.``, and ``Answer:``. The
    assistant's turn is the letter; the loss covers only this turn. Arguments and errors are those of
    `instruction_dataset`; the split is ``auxiliary_train``. Local files have ``question``, ``choices`` (a list) and
    ``answer`` (an index from 0).
    """
    return _dataset(tokenizer, ChoicesToMessages(), packed, data_files, source, "all", "auxiliary_train")


def gsm8k_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str = "openai/gsm8k",
    data_files: str | list[str] | None = None,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """GSM8K's training problems (arXiv 2110.14168).

    The user's turn is the harness's prompt, ``Question: ...`` and ``Answer:`` on a new line. The assistant's turn is
    the unchanged worked answer, with its calculator annotations and the final number after ``####``; the loss covers
    only this turn. Arguments and errors are those of `instruction_dataset`; the configuration is ``main``. Local files
    have ``question`` and ``answer``.
    """
    return _dataset(tokenizer, ProblemToMessages(), packed, data_files, source, "main")


def mmlu_dev_dataset(
    tokenizer: ModelTokenizer,
    *,
    split: str = "train",
    num_held_out: int = 45,
    seed: int = 0,
    packed: bool = False,
) -> SFTDataset | PackedDataset:
    """The 282 MMLU dev questions with worked answers in the installed lm_eval package, split at random into training
    and held-out questions. They are its ``flan_cot_fewshot`` prompts, up to 5 for each of 57 subjects.

    Args:
        split: ``train`` or ``held_out``.
        num_held_out: number of held-out questions.
        seed: seed of the split.
        packed: pack several samples into each row of ``tokenizer.max_seq_len`` tokens.

    Raises:
        ValueError: if ``split`` is unknown or ``num_held_out`` leaves one of the splits empty.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"dataset.split={split!r}; choose train or held_out")
    rows = mmlu_dev_rows(split, num_held_out=num_held_out, seed=seed)
    places = [("dataset", number) for number in range(len(rows))]
    return _finish(RowsDataset(rows, InstructionToMessages(), tokenizer, places), packed, tokenizer)


def mmlu_dev_rows(split: str | None = None, *, num_held_out: int = 45, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of `mmlu_dev_dataset`: ``instruction``, ``output`` and ``subject``; both splits if ``split`` is None.

    Raises:
        ValueError: if ``num_held_out`` leaves one of the splits empty.
    """
    folder = importlib.resources.files("lm_eval") / "tasks" / "mmlu" / "flan_cot_fewshot"
    rows = []
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.startswith("mmlu_") and file.name.endswith(".yaml"):
            samples = yaml.load(file.read_text(), Loader=YAML)["fewshot_config"]["samples"]
            subject = file.name.removeprefix("mmlu_").removesuffix(".yaml").replace("_", " ")
            rows += [{"instruction": s["question"], "output": s["target"], "subject": subject} for s in samples]
    if split is None:
        return rows
    if not 0 < num_held_out < len(rows):
        raise ValueError(f"dataset.num_held_out={num_held_out}; choose 1 to {len(rows) - 1} of {len(rows)}")
    random.Random(seed).shuffle(rows)
    return rows[num_held_out:] if split == "train" else rows[:num_held_out]


class RowsDataset(SFTDataset):
    """torchtune's ``SFTDataset`` over rows in memory. Its errors name the source and number of a row.

    Args:
        places: source and number of each row, such as ``("dataset.data_files=train.json", 7)``.

    Raises:
        ValueError: on indexing, if the tokenizer rejects the row or it is longer than ``max_tokens``.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        message_transform: Transform,
        model_transform: Transform,
        places: list[tuple[str, int]],
    ) -> None:
        self._data = rows
        self._prepare_sample = SFTTransform(message_transform=message_transform, model_transform=model_transform)
        self._places = places
        self.max_tokens: int | None = None  # limit of the model

    def __getitem__(self, index: int) -> dict[str, Any]:
        where, number = self._places[index]
        try:
            sample = super().__getitem__(index)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: row {number}: {error}") from error
        if self.max_tokens is not None and len(sample["tokens"]) > self.max_tokens:
            raise ValueError(
                f"{where}: row {number} has {len(sample['tokens'])} tokens, and the model takes {self.max_tokens}; "
                "set tokenizer.max_seq_len"
            )
        return sample


def _dataset(
    tokenizer: ModelTokenizer,
    transform: RowTransform,
    packed: bool,
    data_files: str | list[str] | None,
    source: str | None,
    name: str | None = None,
    split: str = "train",
) -> SFTDataset | PackedDataset:
    """The rows of ``data_files``, else of ``source``, checked by ``transform``, without those that have blank text."""
    if data_files is None and source is None:
        raise ValueError("dataset.data_files is not set; it names the files to train on")
    if not isinstance(source, str | None):
        raise ValueError(f"dataset.source={source}; it must be the name of a dataset, or a directory")
    if isinstance(data_files, int | float | dict):
        raise ValueError(f"dataset.data_files={data_files}; it must be a file, or a list of files")
    rows: list[dict[str, Any]] = []
    places: list[tuple[str, int]] = []
    for where, found in _sources(data_files, source, name, split):
        good = []
        for number, row in enumerate(found):
            if problem := transform.problem(row if isinstance(row, dict) else {}):
                raise ValueError(f"{where}: row {number} has {problem}")
            if not transform.is_blank(row):
                good.append(number)
        if not good:
            raise ValueError(f"{where} is empty")
        if blank := len(found) - len(good):
            log.warning(f"{where}: skipped {blank} of {len(found)} rows with blank {' or '.join(transform.texts)}.")
        rows += [found[number] for number in good]
        places += [(where, number) for number in good]
    return _finish(RowsDataset(rows, transform, tokenizer, places), packed, tokenizer)


def _sources(
    data_files: str | list[str] | None, source: str | None, name: str | None, split: str
) -> Iterator[tuple[str, list[Any]]]:
    """The rows of each file, or of the hub's dataset, and where they are from."""
    if data_files is not None:
        for file in [data_files] if isinstance(data_files, str) else data_files:
            yield f"dataset.data_files={file}", read_file(user_path(file), "dataset.data_files")
        return
    try:
        found = load_dataset(source, name, split=split).to_list()
    except Exception as error:  # of datasets, pyarrow, pandas or the hub's client
        raise ValueError(
            f"dataset.source={source} cannot be loaded ({error}); without a hub, set dataset.data_files, or "
            "dataset.source to a copy of it"
        ) from error
    yield f"dataset.source={source}", found


def _finish(dataset: RowsDataset, packed: bool, tokenizer: ModelTokenizer) -> SFTDataset | PackedDataset:
    if packed and tokenizer.max_seq_len is None:
        raise ValueError("dataset.packed=true needs tokenizer.max_seq_len, the length of a packed row")
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len) if packed else dataset


def read_file(file: Path, field_name: str) -> list[Any]:
    """The rows of a JSON, JSON-lines or Parquet file.

    Raises:
        ValueError: as ``field_name=FILE ...``, if it is missing, empty or malformed.
    """
    if not file.is_file():
        raise ValueError(f"{field_name}={file} {'is not a file' if file.exists() else 'does not exist'}")
    kind = "Parquet" if file.suffix == ".parquet" else "JSON"
    try:
        if kind == "Parquet":
            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            text = file.read_text(encoding="utf-8-sig")
            rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
    except OSError as error:
        raise ValueError(f"{field_name}={file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # pyarrow's errors are ValueErrors too
        raise ValueError(f"{field_name}={file} is not {kind}: {error}") from error
    if not rows:
        raise ValueError(f"{field_name}={file} is empty")
    return rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number}: {error.msg} at column {error.colno}; a file is a JSON list, or one object per line"
            ) from error
    return rows


def read_questions(file: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Number and content of each row of an evaluation's file, and its prompt: the instruction, and below it the input.

    Raises:
        ValueError: as ``data_files=FILE ...``, naming row and field, if an instruction is missing or an input no text.
    """
    for number, row in enumerate(read_file(file, "data_files")):
        place = f"data_files={file}: row {number} has"
        instruction = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"{place} no text in field 'instruction'")
        if not isinstance(row.get("input"), str | None):
            raise ValueError(f"{place} {row['input']!r} in field 'input', which is not text")
        yield number, row, "\n".join(filter(None, (instruction, row.get("input"))))
