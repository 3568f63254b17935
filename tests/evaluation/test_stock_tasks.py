"""The harness tasks of the paper's suites, with small copies of their datasets in hub layout."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from omegaconf import OmegaConf
from test_eval_recipe import make_config, run  # noqa: F401
from tiny import TINY_MODEL

from owlore_tune.config.load import load_config

MMLU = 57
LETTERS = ["A", "B", "C", "D"]
CHOICES = Sequence({"text": Value("string"), "label": Value("string")})


def arc(i: int) -> dict:
    choices = {"text": ["heat", "cold", "salt", "dark"], "label": LETTERS}
    return {"id": f"q{i}", "question": f"What melts ice number {i}?", "choices": choices, "answerKey": LETTERS[i % 4]}


def openbookqa(i: int) -> dict:
    row = arc(i)
    return {"id": row["id"], "question_stem": row["question"], "choices": row["choices"], "answerKey": row["answerKey"]}


def boolq(i: int) -> dict:
    return {"question": f"is water number {i} wet", "passage": f"Water {i} is wet.", "idx": i, "label": i % 2}


def piqa(i: int) -> dict:
    return {"goal": f"Boil water {i}", "sol1": "Heat it.", "sol2": "Cool it.", "label": i % 2}


def social_iqa(i: int) -> dict:
    answers = {f"answer{letter}": text for letter, text in zip("ABC", ("happy", "sad", "tired"), strict=True)}
    return {"context": f"Kim won race {i}.", "question": "How does Kim feel?", **answers, "label": str(1 + i % 3)}


def hellaswag(i: int) -> dict:
    return {
        "ind": i, "activity_label": "Cooking", "ctx_a": f"A man stirs pot {i}.", "ctx_b": "then he",
        "ctx": f"A man stirs pot {i}. then he", "endings": ["tastes it.", "flies.", "sings a pot.", "melts."],
        "source_id": "x", "split": "val", "split_type": "indomain", "label": str(i % 4),
    }  # fmt: skip


def winogrande(i: int) -> dict:
    sentence = f"The trophy {i} did not fit the case because the _ was too big."
    return {"sentence": sentence, "option1": "trophy", "option2": "case", "answer": str(1 + i % 2)}


def gsm8k(i: int) -> dict:
    return {"question": f"What is {i} plus {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}


def mmlu(i: int) -> dict:
    return {"question": f"Pick {i}.", "subject": "x", "choices": ["one", "two", "three", "four"], "answer": i % 4}


LABEL = {"label": ClassLabel(names=["0", "1"])}
# repository -> (config, row, splits, features that cannot be inferred from the row)
DATASETS = {
    "allenai/ai2_arc": [("ARC-Easy", arc, {"choices": CHOICES}), ("ARC-Challenge", arc, {"choices": CHOICES})],
    "allenai/openbookqa": [("main", openbookqa, {"choices": CHOICES})],
    "aps/super_glue": [("boolq", boolq, {"label": ClassLabel(names=["False", "True"])})],
    "baber/piqa": [("default", piqa, LABEL)],
    "lighteval/siqa": [("default", social_iqa, {})],
    "Rowan/hellaswag": [("default", hellaswag, {})],
    "allenai/winogrande": [("winogrande_xl", winogrande, {})],
    "openai/gsm8k": [("main", gsm8k, {})],
}


def write_copy(root: Path, repository: str, configs: list[tuple]) -> None:
    """Write a dataset repository: Parquet files, and a README with their configurations."""
    described = []
    for name, row, features in configs:
        files = []
        for split in ("train", "validation", "test", "dev"):
            rows = Dataset.from_list([row(i) for i in range(8)])
            rows = rows.cast(Features({**rows.features, **features}))
            file = Path(name) / f"{split}-00000-of-00001.parquet"
            (root / repository / name).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(root / repository / file)
            files.append({"split": split, "path": str(file)})
        described.append({"config_name": name, "data_files": files})
    (root / repository / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': described})}---\n")


@pytest.fixture(scope="module")
def data_root(harness_index, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for repository, configs in DATASETS.items():
        write_copy(root, repository, configs)
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    subjects = {
        entry.cfg["dataset_name"] for name, entry in index.items()
        if name.startswith("mmlu_") and (entry.cfg or {}).get("dataset_path") == "cais/mmlu"
        and entry.yaml_path.parent.name == "default"
    }  # fmt: skip
    assert len(subjects) == MMLU
    write_copy(
        root, "cais/mmlu", [(subject, mmlu, {"answer": ClassLabel(names=LETTERS)}) for subject in sorted(subjects)]
    )
    return root


def test_the_commonsense_suite_runs_on_local_copies(make_config, data_root, tmp_path, capsys):  # noqa: F811
    results = run(make_config("eval/commonsense", data_root=str(data_root), limit=3))
    names = OmegaConf.to_container(load_config("eval/commonsense"))["tasks"]
    assert len(names) == 8 and list(results["averages"]) == ["acc,none"]
    accuracies = [results["results"][name]["acc,none"] for name in names]
    assert results["averages"]["acc,none"] == pytest.approx(sum(accuracies) / 8)
    assert {name: results["n-shot"][name] for name in names} == dict.fromkeys(names, 5)
    assert "average acc" in capsys.readouterr().out
    (samples,) = (tmp_path / "run").glob("samples_arc_easy_*")
    context = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert context.count("Question: What melts ice") == 6  # with 5 examples


def test_the_mmlu_suite_has_57_subjects_and_5_examples(make_config, data_root, tmp_path):  # noqa: F811
    results = run(make_config("eval/mmlu", data_root=str(data_root), limit=1))
    subjects = [name for name in results["configs"] if name.startswith("mmlu_")]
    assert len(subjects) == MMLU
    assert set(results["n-shot"][name] for name in subjects) == {5}
    assert results["averages"] == {"acc,none": results["results"]["mmlu"]["acc,none"]}
    (samples,) = (tmp_path / "run").glob("samples_mmlu_anatomy_*")
    assert json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"].count("Answer:") == 6


def test_the_gsm8k_suite_has_5_examples(make_config, data_root, tmp_path):  # noqa: F811
    results = run(
        make_config("eval/gsm8k", data_root=str(data_root), limit=2, model=TINY_MODEL | {"max_seq_len": 1024})
    )
    assert results["n-shot"]["gsm8k"] == 5
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(results["averages"])
