import json
from pathlib import Path

import pytest

from owlore_tune.data import LOOKS, instruction_dataset, longest_row, mmlu_dev_dataset
from owlore_tune.tokenizer import HFChatTokenizer

REAL = Path(__file__).parents[2] / "shared" / "data" / "commonsense"


@pytest.fixture
def tokenizer(tiny_dir):
    return HFChatTokenizer(str(tiny_dir), max_seq_len=2048)


def texts(dataset, tokenizer) -> list[str]:
    return [tokenizer.decode(sample["tokens"]) for sample in dataset]


def test_mmlu_dev_is_divided_by_seed(tokenizer):
    train, held_out = mmlu_dev_dataset(tokenizer), mmlu_dev_dataset(tokenizer, split="held_out")
    assert (len(train), len(held_out)) == (237, 45)
    assert not set(texts(train, tokenizer)) & set(texts(held_out, tokenizer))
    assert texts(train, tokenizer) == texts(mmlu_dev_dataset(tokenizer), tokenizer)
    other = mmlu_dev_dataset(tokenizer, split="held_out", seed=1)
    assert set(texts(other, tokenizer)) != set(texts(held_out, tokenizer))


def test_answers_are_what_is_trained_on(tokenizer):
    sample = mmlu_dev_dataset(tokenizer)[0]
    trained = [t for t, label in zip(sample["tokens"], sample["labels"], strict=True) if label != -100]
    answer = tokenizer.decode(trained, skip_special_tokens=False)
    assert answer.startswith("Let's think step by step.")
    assert answer.endswith("<|end|>")


def test_packed_rows_have_the_tokenizers_length(tokenizer):
    packed = mmlu_dev_dataset(tokenizer, packed=True)
    assert len(packed) < 237
    assert {len(row["tokens"]) for row in packed} == {2048}


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ("[]", "is empty"),
        ("[1", "is not JSON"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "row 1 has no text in field 'output'"),
        ('[{"instruction": "", "output": "b"}]', "row 0 has no text in field 'instruction'"),
        ("[3]", "row 0 has no text in field 'instruction'"),
    ],
)
def test_bad_files_are_refused(tokenizer, tmp_path, content, message):
    file = tmp_path / "data.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"data_files=.*data.json.*{message}"):
        instruction_dataset(tokenizer, data_files=str(file))


def test_bad_options_are_refused(tiny_dir, tokenizer):
    with pytest.raises(ValueError, match="split='test'; choose train or held_out"):
        mmlu_dev_dataset(tokenizer, split="test")
    with pytest.raises(ValueError, match="num_held_out=282; choose 1 to 281"):
        mmlu_dev_dataset(tokenizer, num_held_out=282)
    with pytest.raises(ValueError, match=r"needs tokenizer\.max_seq_len"):
        mmlu_dev_dataset(HFChatTokenizer(str(tiny_dir)), packed=True)


def test_the_longest_row_is_looked_for_where_looking_is_cheap():
    rows = [{"tokens": [0] * (1 + i % 7)} for i in range(LOOKS)]
    assert longest_row(rows, max_seq_len=512) == 7
    assert longest_row([*rows, {"tokens": [0]}], max_seq_len=512) == 512
    assert longest_row([*rows, {"tokens": [0]}], max_seq_len=None) == 7
