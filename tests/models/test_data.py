import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import save_tokenizer
from tokenizers import Tokenizer

from owlore_tune.data import chat_dataset, gsm8k_dataset, instruction_dataset, mmlu_dev_dataset, mmlu_train_dataset
from owlore_tune.data.checks import MOST_ROWS, dataset_digest, longest_row
from owlore_tune.data.loader import TrainingData
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.distributed.world import World
from owlore_tune.errors import ConfigError
from runs import prepare, variant

REAL = Path(__file__).parents[3] / "shared" / "data" / "commonsense"


@pytest.fixture
def tokenizer(tiny_dir):
    return HFChatTokenizer(str(tiny_dir), max_seq_len=2048)


def texts(dataset, tokenizer) -> list[str]:
    return [tokenizer.decode(sample["tokens"]) for sample in dataset]


def tokens_and_answer(dataset, tokenizer) -> tuple[list[int], str]:
    """The tokens of the first row, and the text in it that is trained on."""
    tokens, labels = (torch.as_tensor(dataset[0][key]).tolist() for key in ("tokens", "labels"))
    return tokens, tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=False)


@pytest.fixture
def write_rows(tmp_path):
    """Write rows to a JSON file, and return its name."""

    def write(*rows: dict) -> str:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return str(tmp_path / "rows.json")

    return write


def test_mmlu_dev_is_divided_by_seed(tokenizer):
    train, held_out = mmlu_dev_dataset(tokenizer), mmlu_dev_dataset(tokenizer, split="held_out")
    assert (len(train), len(held_out)) == (237, 45)
    assert not set(texts(train, tokenizer)) & set(texts(held_out, tokenizer))
    assert texts(train, tokenizer) == texts(mmlu_dev_dataset(tokenizer), tokenizer)
    other = mmlu_dev_dataset(tokenizer, split="held_out", seed=1)
    assert set(texts(other, tokenizer)) != set(texts(held_out, tokenizer))


def test_answers_are_what_is_trained_on(tokenizer):
    _, answer = tokens_and_answer(mmlu_dev_dataset(tokenizer), tokenizer)
    assert answer.startswith("Let's think step by step.") and answer.endswith("<|end|>")


def test_packed_rows_have_the_tokenizers_length(tokenizer):
    packed = mmlu_dev_dataset(tokenizer, packed=True)
    assert len(packed) < 237 and {len(row["tokens"]) for row in packed} == {2048}


def test_instruction_files(tokenizer, tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "answer": "x"},
        {"instruction": "Hi", "output": "ho"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    dataset = instruction_dataset(tokenizer, data_files=[str(tmp_path / "list.json"), str(tmp_path / "lines.jsonl")])
    assert len(dataset) == 4
    assert texts(dataset, tokenizer)[0] == texts(dataset, tokenizer)[2] == "Add.\n1 and 2\n3\n"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs Commonsense170K files in ../shared/data/commonsense")
@pytest.mark.parametrize("task", ["ARC-Easy", "ARC-Challenge", "boolq", "openbookqa"])
def test_real_commonsense_files(tokenizer, task):
    dataset = instruction_dataset(tokenizer, data_files=str(REAL / task / "train.json"))
    assert len(dataset) > 1000
    assert "the correct answer is" in texts([dataset[0]], tokenizer)[0]


def test_blank_rows_are_left_out_and_counted(tokenizer, write_rows, caplog):
    file = write_rows({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""})
    assert len(instruction_dataset(tokenizer, data_files=file)) == 1
    assert "skipped 1 of 2 rows with blank instruction or output" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
def test_all_answers_of_a_conversation_are_trained(packed, tokenizer, write_rows, caplog):
    file = write_rows(CHAT, {"messages": [turn("user", "a"), turn("assistant", " ")]})
    dataset = chat_dataset(tokenizer, data_files=file, packed=packed)
    assert len(dataset) == 1 and "skipped 1 of 2 rows with blank messages" in caplog.text
    tokens, answer = tokens_and_answer(dataset, tokenizer)
    assert answer == "3<|end|>7<|end|>"
    assert [tokenizer.decode(tokens).count(text) for text in ("Be brief.", "1 + 2?", "And 3 + 4?")] == [1, 1, 1]


INSTRUCTION = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CHOICE = {"question": " Which? ", "subject": "logic", "choices": ["this", "that", "both", "none"], "answer": 2}
PROBLEM = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


CHAT = {
    "messages": [
        turn("system", "Be brief."), turn("user", "1 + 2?"), turn("assistant", "3"),
        turn("user", [{"type": "text", "text": "And "}, {"type": "text", "text": "3 + 4?"}]), turn("assistant", "7"),
    ]
}  # fmt: skip
# The paper's training sets: builder, a row, its file on the hub, prompt text, and answer text.
TRAININGS = {
    "Commonsense170K and Alpaca-GPT4": (instruction_dataset, INSTRUCTION, "data/train", "Add.\n1 and 2", "3"),
    "MMLU": (
        mmlu_train_dataset, CHOICE, "all/auxiliary_train", "Which?\nA. this\nB. that\nC. both\nD. none\nAnswer:", "C"
    ),
    "GSM8K": (gsm8k_dataset, PROBLEM, "main/train", "Question: How many?\nAnswer:", PROBLEM["answer"]),
}  # fmt: skip


def hub_layout(directory: Path, place: str, rows: list[dict]) -> Path:
    """Write a dataset in hub layout: Parquet files, with their configurations in the dataset card."""
    folder, split = place.split("/")
    file = directory / folder / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(file)
    name = "default" if folder == "data" else folder
    (directory / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {folder}/{split}-*\n---\n"
    )
    return file


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_papers_trainings(training, packed, tokenizer, tmp_path, write_rows):
    """A hub copy, a Parquet file and JSON give the same samples. Only the answer is trained on."""
    builder, row, place, prompt, answer = TRAININGS[training]
    parquet = hub_layout(tmp_path / "copy", place, [row] * 3)
    times = 3 if packed else 1
    for place in (
        {"source": str(tmp_path / "copy")}, {"data_files": str(parquet)}, {"data_files": [write_rows(row, row, row)]}
    ):  # fmt: skip
        dataset = builder(tokenizer, **place, packed=packed)
        assert len(dataset) == 3 / times
        tokens, trained = tokens_and_answer(dataset, tokenizer)
        assert trained == f"{answer}<|end|>" * times
        assert tokenizer.decode(tokens).count(prompt) == times


@pytest.mark.parametrize(
    ("builder", "change", "message"),
    [
        (mmlu_train_dataset, {"choices": "this or that"}, "row 1 has no list of strings in field 'choices'"),
        (mmlu_train_dataset, {"answer": 4}, "row 1 has 4 in field 'answer', which is not an index of its 4 choices"),
        (mmlu_train_dataset, {"question": None}, "row 1 has no text in field 'question'"),
        (gsm8k_dataset, {"answer": 4}, "row 1 has no text in field 'answer'"),
        (instruction_dataset, {"output": None}, "row 1 has no text in field 'output'"),
        (instruction_dataset, {"input": 5}, "row 1 has 5 in field 'input', which is not text"),
        (chat_dataset, {"messages": "Hi"}, "row 1 has no list in field 'messages'"),
        (chat_dataset, {"messages": [5]}, "row 1 has the role None, which is not system, user or assistant"),
        (chat_dataset, {"messages": [turn("tool", "5")]}, "row 1 has the role 'tool', which is not system, user or"),
        (chat_dataset, {"messages": [turn("user", None)]}, "row 1 has no text in 'content' in message 0 of field 'mes"),
        (chat_dataset, {"messages": [turn("user", [{"type": "image"}])]}, "row 1 has no text in 'content' in message"),
        (chat_dataset, {"messages": [turn("user", "\ud800")]}, "row 1 has an unpaired surrogate"),
        (
            chat_dataset, {"messages": [turn("user", "a"), turn("assistant", "") | {"tool_calls": [{"id": "1"}]}]},
            "row 1 has tool_calls, which cannot be trained, in message 1",
        ),
        (chat_dataset, {"messages": [turn("user", "a")] * 2}, "row 1 has messages that do not take turns: Two consec"),
        (chat_dataset, {"messages": [turn("system", "a"), turn("user", "b")]}, "row 1 has no answer of an assistant"),
    ],
)  # fmt: skip
def test_rows_of_another_schema_are_refused(builder, change, message, tokenizer, write_rows):
    rows = {mmlu_train_dataset: CHOICE, gsm8k_dataset: PROBLEM, instruction_dataset: INSTRUCTION, chat_dataset: CHAT}
    row = rows[builder]
    with pytest.raises(ValueError, match=f"data_files=.*rows.json: {message}"):
        builder(tokenizer, data_files=write_rows(row, row | change))


def test_without_a_hub_the_way_out_is_named(tokenizer):
    with pytest.raises(ValueError, match="source=zwhe99/commonsense_170k cannot be loaded .*set dataset.data_files"):
        instruction_dataset(tokenizer, source="zwhe99/commonsense_170k")


def test_a_file_that_is_no_parquet_is_refused(tokenizer, tmp_path):
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"rows\.parquet is not Parquet"):
        gsm8k_dataset(tokenizer, data_files=str(tmp_path / "rows.parquet"))


def test_the_longest_row_is_looked_for_where_looking_is_cheap():
    rows = [{"tokens": [0] * (1 + i % 7)} for i in range(MOST_ROWS)]
    assert longest_row(rows, max_seq_len=512) == 7
    assert longest_row([*rows, {"tokens": [0]}], max_seq_len=512) == 512
    assert longest_row([*rows, {"tokens": [0]}], max_seq_len=None) == 7


GPU = torch.device("cuda")


def data_of(num_rows: int, **options) -> tuple[TrainingData, list[list[int]]]:
    """Steps of two rows that are their own tokens, and what has been read. Row 7 cannot be used."""
    read = []

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        read.append(rows)
        if 7 in rows:
            raise KeyError("tokens")
        return {"tokens": torch.tensor(rows)}

    return TrainingData(list(range(num_rows)), collate, batch_size=2, **options), read


def test_reading_ahead_changes_no_step():
    plain, expected = data_of(6, epochs=2)
    for _ in range(6):
        plain.read_ahead(torch.device("cpu"))
        plain.micro_batches()
    assert expected[:3] != expected[3:]  # shuffled anew
    ahead, read = data_of(6, epochs=2)
    for step in range(6):
        for _ in range(2):  # the second time has no effect
            ahead.read_ahead(GPU)
            assert read == expected[: step + 1]
        assert ahead.micro_batches()[0]["tokens"].tolist() == expected[step]
    ahead.read_ahead(GPU)
    assert read == expected  # there is no next step
    for step in (1, 4):
        ahead.seek(step)
        assert ahead.micro_batches()[0]["tokens"].tolist() == expected[step]
        ahead.read_ahead(GPU)


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_without_an_embedding_is_refused_before_weights_load(packed, tiny_config, tmp_path, write_rows):
    save_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<|image|>"])  # the model has embeddings for 300 tokens
    tokenizer.save(str(file))
    config = variant(tiny_config, "more tokens", tokenizer__path=str(tmp_path / "tokenizer"), batch_size=1)
    prepare(config).cleanup()
    file = write_rows(*({"instruction": text, "output": "yes"} for text in ("is it so?", "and <|image|>?")))
    config["tokenizer"] = config["tokenizer"] | {"max_seq_len": 24}
    config["dataset"] = config["dataset"] | {"data_files": file, "packed": packed}
    with pytest.raises(ConfigError, match="a row has one of the tokens <.image.>, for which the model has no embeddi"):
        prepare(variant(config, "refused"))


def test_a_row_that_does_not_fit_is_named_while_memory_is_planned(tiny_config, write_rows):
    file = write_rows({"input": "a b", "output": "c"}, {"input": "a b", "output": None})
    dataset = {"_component_": "torchtune.datasets.instruct_dataset", "source": "json", "split": "train"}
    with pytest.raises(ConfigError, match="row 1 does not fit the dataset's component: TypeError"):
        prepare(tiny_config | {"batch_size": 1, "dataset": dataset | {"data_files": file}})


def test_torchtunes_conversations_without_a_text_are_refused(tiny_config, write_rows):
    """Its transform takes the text of the message before."""
    call = turn("assistant", None) | {"tool_calls": [{"id": "1", "type": "function"}]}
    dataset = {
        "_component_": "torchtune.datasets.chat_dataset", "source": "json", "conversation_column": "messages",
        "conversation_style": "openai", "data_files": write_rows(CHAT, {"messages": [turn("user", "Weather?"), call]}),
        "split": "train",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="dataset: row 1 has tool_calls, which cannot be trained, in message 1"):
        prepare(tiny_config | {"batch_size": 1, "dataset": dataset})


def test_a_digest_has_no_place_in_memory():
    class Picture:
        def __repr__(self) -> str:
            return f"<Picture at {id(self)}>"

    first, second, other = ([{"text": text, "picture": Picture()}] for text in "aab")
    assert dataset_digest(first) == dataset_digest(second) != dataset_digest(other)


def test_a_row_that_cannot_be_read_ends_its_own_step():
    data, _ = data_of(8, shuffle=False)
    for step in range(3):
        data.read_ahead(GPU)
        assert data.micro_batches()[0]["tokens"].tolist() == [2 * step, 2 * step + 1]
    data.read_ahead(GPU)  # rows 6 and 7
    with pytest.raises(ValueError, match="a row of the dataset does not fit its component: KeyError"):
        data.micro_batches()


class LostWorld(World):
    def gather(self, value):
        raise RuntimeError("connection reset")
