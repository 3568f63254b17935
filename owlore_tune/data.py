"""The paper's training data, from the hub or local files, and questions that lm-evaluation-harness carries."""

import hashlib
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
from torchtune.datasets import ConcatDataset, PackedDataset, SFTDataset
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
        for field in self.texts:
            if not isinstance(row.get(field), str):
                return f"no text in field {field!r}"
        for field, value in row.items():
            if isinstance(value, str) and not is_unicode(value):
                return f"half a surrogate pair in field {field!r}, which is no valid Unicode"
        return None

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
    """torchtune's ``SFTDataset`` over rows that are already in memory, and that knows where they come from.

    Args:
        places: of each row, such as ``dataset.data_files=train.json: row 7``.

    Raises:
        ValueError: as it is indexed, naming the row's place, if the tokenizer refuses it or it is longer than
            ``max_tokens``.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        message_transform: Transform,
        model_transform: Transform,
        places: list[tuple[str, int]] | None = None,
    ) -> None:
        self._data = rows
        self._prepare_sample = SFTTransform(message_transform=message_transform, model_transform=model_transform)
        self._places = places or [("dataset", number) for number in range(len(rows))]
        self.max_tokens: int | None = None  # that the model takes

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
    *,
    source: str | None = None,
    name: str | None = None,
    split: str = "train",
    data_files: str | list[str] | None = None,
    packed: bool,
) -> SFTDataset | PackedDataset:
    """The rows of ``data_files``, else of ``source``, once they are known to be what ``transform`` takes."""
    rows: list[dict[str, Any]] = []
    places: list[tuple[str, int]] = []
    if data_files is None and source is None:
        raise ValueError("dataset.data_files is not set; it names the files to train on")
    if isinstance(data_files, int | float | dict):
        raise ValueError(f"dataset.data_files={data_files}; it must be a file, or a list of files")
    if data_files is None:
        where = f"dataset.source={source}"
        try:
            found = load_dataset(source, name, split=split).to_list()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{where} cannot be loaded ({error}); without a hub, set dataset.data_files, or dataset.source to a "
                "copy of it"
            ) from error
        _add_good_rows(found, where, transform, rows, places)
    for file in [data_files] if isinstance(data_files, str) else data_files or ():
        where = f"dataset.data_files={file}"
        found = read_file(Path(str(file)).expanduser(), "dataset.data_files")
        _add_good_rows(found, where, transform, rows, places)
    return _finish(rows, transform, tokenizer, packed, places)


def _add_good_rows(
    found: list[Any], where: str, transform: RowTransform, rows: list[dict[str, Any]], places: list[tuple[str, int]]
) -> None:
    """Add to ``rows`` and ``places`` those of ``found`` that have no blank text."""
    num_before = len(rows)
    for number, row in enumerate(found):
        problem = transform.problem(row if isinstance(row, dict) else {})
        if problem:
            raise ValueError(f"{where}: row {number} has {problem}")
        if all(row[field].strip() for field in transform.texts):
            rows.append(row)
            places.append((where, number))
    num_good = len(rows) - num_before
    if not num_good:
        raise ValueError(f"{where} is empty")
    if blank := len(found) - num_good:
        log.warning(f"{where}: {blank} of {len(found)} rows are left out, for blank {' or '.join(transform.texts)}.")


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded: JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finish(
    rows: list[dict[str, Any]],
    transform: Transform,
    tokenizer: ModelTokenizer,
    packed: bool,
    places: list[tuple[str, int]] | None = None,
) -> SFTDataset | PackedDataset:
    dataset = RowsDataset(rows, transform, tokenizer, places)
    if not packed:
        return dataset
    if tokenizer.max_seq_len is None:
        raise ValueError("dataset.packed=true needs tokenizer.max_seq_len, the length of a packed row")
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len)


def dataset_digest(dataset: Any) -> str:
    """A digest of a dataset as it was built: of its rows, in their order.

    Packed rows are looked at as tokens and torchtune's other datasets as what they read, so that none is tokenized for
    it; of a dataset of another kind, up to `LOOKS` samples.
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
            rows = [dataset[i] for i in range(0, len(dataset), math.ceil(len(dataset) / LOOKS))]
        for row in rows:
            digest.update(json.dumps(row, default=str, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def check_samples(key: str, dataset: Any, collate: Callable[[list[Any]], Any], collate_name: str) -> None:
    """Raise ValueError if the first sample, or the batch that is made of it, is not what training takes."""
    sample = dataset[0]
    if not isinstance(sample, dict) or not {"tokens", "labels"} <= sample.keys():
        raise ValueError(f"{key}: its samples have no tokens and labels; it takes a dataset for fine-tuning")
    try:
        batch = collate([sample])
    except Exception as error:
        raise ValueError(f"collate_fn={collate_name} cannot make a batch of {key}'s samples: {error!r}") from error
    if not isinstance(batch, dict) or not {"tokens", "labels"} <= batch.keys():
        raise ValueError(f"collate_fn={collate_name} makes no batches of tokens and labels")


def refuse_longer_than(dataset: Any, max_tokens: int) -> None:
    """Have rows that are longer than the model takes refused by name as they are read."""
    for part in getattr(dataset, "_datasets", [dataset]):
        if isinstance(part, RowsDataset):
            part.max_tokens = max_tokens


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
    if not file.exists():
        raise ValueError(f"{field_name}={file} does not exist")
    if not file.is_file():
        raise ValueError(f"{field_name}={file} is not a file")
    try:
        if file.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            text = file.read_text(encoding="utf-8-sig")
            rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
    except OSError as error:
        raise ValueError(f"{field_name}={file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # pyarrow's errors are ValueErrors too
        kind = "Parquet" if file.suffix == ".parquet" else "JSON"
        raise ValueError(f"{field_name}={file} is not {kind}: {error}") from error
    if not rows:
        raise ValueError(f"{field_name}={file} is empty")
    return rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at column {error.colno}") from error
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
