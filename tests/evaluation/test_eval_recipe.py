"""The evaluation recipe and its suites on the tiny model, with documents that need no hub access."""

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from forks import run_command
from omegaconf import OmegaConf
from ranks import run_ranks
from tiny import TINY_MODEL
from torchtune.data import Message

from owlore_eval import OwLoreEvalRecipe
from owlore_evals import harness, torchtune_lm
from owlore_evals.harness import load_tasks
from owlore_evals.local_tasks import first_option, is_right, last_number
from owlore_evals.results import compare, read_scores, show_answers
from owlore_tune.config.load import load_config
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.errors import ConfigError, RunError

CHOICES = [
    (
        "Which is wet?\n\nAnswer1: fire Answer2: water Answer3: sand\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    ("Is ice cold?\n\nAnswer format: true/false", "true"),
    ("A _ barks.\n\nOption1: dog Option2: cat\n\nAnswer format: option1/option2", "option1"),
    ("To boil water\n\nSolution1: heat it Solution2: cool it\n\nAnswer format: solution1/solution2", "solution1"),
]


@pytest.fixture
def choices_file(tmp_path) -> Path:
    rows = [{"instruction": i, "input": "", "output": f"the correct answer is {a}", "answer": a} for i, a in CHOICES]
    file = tmp_path / "choices.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def make_config(tiny_dir, harness_index, tmp_path):
    """Build an eval config with the tiny model and changed fields."""

    def make(name: str, **changes) -> dict:
        config = OmegaConf.to_container(load_config(name), resolve=False)
        return config | {
            "output_dir": str(tmp_path / "run"), "model": dict(TINY_MODEL), "device": "cpu",
            "checkpointer": config["checkpointer"] | {"checkpoint_dir": str(tiny_dir), "model_type": "LLAMA2"},
        } | changes  # fmt: skip

    return make


def run(config: dict) -> dict:
    """Run the recipe and return its results file."""
    recipe = OwLoreEvalRecipe(OmegaConf.create(config))
    recipe.setup()
    recipe.evaluate()
    output = Path(config["output_dir"])
    return json.loads((output / json.loads((output / "manifest.json").read_text())["results"]).read_text())


def test_mmlu_dev_from_the_installed_harness(make_config, tmp_path, capsys):
    results = run(make_config("eval/mmlu_dev", limit=30))
    assert 0 <= results["results"]["mmlu_dev"]["acc,none"] <= 1
    assert results["averages"] == {"acc,none": results["results"]["mmlu_dev"]["acc,none"]}
    assert results["config"]["add_bos"] is False and results["config"]["batch_tokens"] == 2048
    printed = capsys.readouterr().out
    assert "|mmlu_dev|" in printed and "average acc" in printed
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["config"]["limit"] == 30 and manifest["fingerprint"] and manifest["model"]["world_size"] == 1
    assert manifest["apply_chat_template"] is True
    assert manifest["seconds"] <= float(results["total_evaluation_time_seconds"]) < 2 * manifest["seconds"] + 1
    (samples,) = (tmp_path / "run").glob("samples_mmlu_dev_*.jsonl")
    assert len(samples.read_text().splitlines()) == 30


def test_a_config_needs_only_the_directory_of_a_model(tiny_dir, make_config, harness_index, tmp_path):
    """The decoder of transformers scores as torchtune's, which `model` and `checkpointer.model_type` choose."""
    expected = run(make_config("eval/mmlu_dev", tasks=["mmlu_dev_held_out"], limit=20, max_length=256))
    changes = [f"checkpointer.checkpoint_dir={tiny_dir}", f"output_dir={tmp_path / 'other'}", "device=cpu"]
    changes += ["tasks=[mmlu_dev_held_out]", "limit=20", "max_length=256"]
    got = run(OmegaConf.to_container(load_config("eval/mmlu_dev", changes), resolve=False))
    assert got["config"]["model_library"] == "transformers" != expected["config"]["model_library"]
    assert got["results"]["mmlu_dev_held_out"] == expected["results"]["mmlu_dev_held_out"]


def test_a_builder_on_the_command_line_gets_no_path_of_the_default_model(tmp_path):
    """`model=BUILDER` changes only the component."""
    changes = ["model=torchtune.models.llama2.llama2_7b", "checkpointer.model_type=LLAMA2", "device=cpu"]
    assert OwLoreEvalRecipe(load_config("eval/mmlu", changes)).validate() == "6,738,415,616 parameters"
    missing = f"checkpointer.checkpoint_dir={tmp_path / 'none'}"
    assert "none does not exist" in OwLoreEvalRecipe(load_config("eval/mmlu", [missing, "device=cpu"])).validate()


def test_mmlu_dev_examples_are_other_questions_of_the_subject(make_config, tmp_path):
    run(make_config("eval/mmlu_dev", num_fewshot=4, limit=12, max_length=256, apply_chat_template=False))
    (samples,) = (tmp_path / "run").glob("samples_mmlu_dev_*.jsonl")
    for sample in map(json.loads, samples.read_text().splitlines()):
        context = sample["arguments"]["gen_args_0"]["arg_0"]
        assert context.count("\nAnswer:") == 5
        assert context.count(sample["doc"]["question"]) == 1
        assert context.startswith(
            f"The following are multiple choice questions (with answers) about {sample['doc']['subject']}"
        )


@pytest.mark.parametrize("task", ["mmlu_dev_held_out", "mmlu_dev_worked"])
def test_a_held_out_question_is_no_example_of_itself(task):
    (loaded,) = load_tasks([task])
    for doc in loaded.test_docs():
        context = loaded.fewshot_context(doc, num_fewshot=12)
        assert context.count(loaded.doc_to_text(doc)) == 1


def test_examples_are_turns_or_one_text(make_config, tmp_path):
    for multiturn, turns in ((True, 3), (False, 1)):
        output = tmp_path / str(multiturn)
        changes = {"num_fewshot": 2, "limit": 1, "fewshot_as_multiturn": multiturn, "output_dir": str(output)}
        run(make_config("eval/mmlu_dev", **changes))
        (samples,) = output.glob("samples_mmlu_dev_*.jsonl")
        context = json.loads(samples.read_text())["arguments"]["gen_args_0"]["arg_0"]
        assert context.count("<|user|>") == turns and context.count("\nAnswer:") == 3


def test_mmlu_dev_splits_a_question_only_at_its_choices():
    (task,) = load_tasks(["mmlu_dev"])
    docs = list(task.test_docs())
    assert len(docs) == 281 and all(len(doc["choices"]) == 4 and all(doc["choices"]) for doc in docs)
    (doc,) = [doc for doc in docs if "E(X) = 37" in doc["question"]]  # also has var(X) and var(Y)
    assert doc["question"].endswith("of the random variable X + Y?")
    assert [choice[:11] for choice in doc["choices"]] == ["E(X + Y) = "] * 3 + ["There is in"]


def test_mmlu_dev_held_out_is_what_training_leaves(make_config, tmp_path):
    from owlore_tune.data.datasets import mmlu_dev_rows

    run(make_config("eval/mmlu_dev", tasks=["mmlu_dev_held_out"]))
    (samples,) = (tmp_path / "run").glob("samples_mmlu_dev_held_out_*.jsonl")
    questions = [json.loads(line)["doc"]["question"] for line in samples.read_text().splitlines()]
    trained = "\n".join(row["instruction"] for row in mmlu_dev_rows("train"))
    assert len(questions) == 45
    assert not any(question in trained for question in questions if len(question) > 40)


@pytest.mark.parametrize("template", ["model", "plain"])
@pytest.mark.parametrize("scoring", ["loglikelihood", "generate", "last_number", None])
def test_own_tasks_continue_a_prompt_as_training_does(scoring, template, make_config, tmp_path, tiny_dir):
    """Prompt and answer are the text of a training sample. Without ``scoring``, the task is mmlu_dev_worked."""
    if scoring is None:
        changes = {"tasks": ["mmlu_dev_worked"], "limit": 2}
    else:
        instruction, answer = ("1 and 1?", "2") if scoring == "last_number" else ("Answer format: true/false", "true")
        rows = [{"instruction": text, "answer": answer} for text in (instruction, instruction + ":")]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        changes = {"tasks": [], "data_files": {"mine": str(tmp_path / "rows.json")}, "scoring": scoring}
    config = make_config("eval/mmlu_dev", **changes)
    config["model"]["max_seq_len"] = 2048
    config["tokenizer"]["chat_template"] = template
    run(config)
    (file,) = (tmp_path / "run").glob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    tokenizer = HFChatTokenizer(str(tiny_dir), chat_template=template)
    for number, sample in enumerate(samples):
        prompt = sample["doc"]["instruction"] if scoring is None else rows[number]["instruction"]
        trained = tokenizer.render([Message("user", prompt), Message("assistant", "the correct answer is true")])
        asked = sample["arguments"]["gen_args_0"]
        written = asked["arg_0"] + (asked["arg_1"] if scoring == "loglikelihood" else "")
        assert trained.startswith(written)
        assert trained[len(written) :].lstrip(" ").startswith("<|end|>" if scoring == "loglikelihood" else "the")
    assert len(samples) == 2


@pytest.mark.parametrize("scoring", ["loglikelihood", "generate"])
def test_local_choices(make_config, choices_file, tmp_path, scoring):
    data_files = {"mine": str(choices_file), "again": str(choices_file)}
    results = run(make_config("eval/local_choices", data_files=data_files, scoring=scoring))
    assert results["results"]["mine"]["acc,none"] == results["results"]["again"]["acc,none"]
    (samples,) = (tmp_path / "run").glob("samples_mine_*.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [s["doc"]["options"][s["doc"]["gold"]] for s in samples] == [answer for _, answer in CHOICES]
    if scoring == "loglikelihood":
        asked = samples[0]["arguments"]
        assert asked["gen_args_1"]["arg_0"] == f"<|user|>{CHOICES[0][0]}<|end|>\n<|assistant|>"
        assert asked["gen_args_1"]["arg_1"] == "the correct answer is answer2"
        for sample in samples:
            values = [float(pair[0]) for pair in sample["filtered_resps"]]
            assert sample["acc"] == (values.index(max(values)) == sample["doc"]["gold"])


@pytest.mark.parametrize(
    ("text", "found"),
    [("the correct answer is answer2", 1), ("answer10 or answer2", 2), ("no idea", None), ("answer1answer2", 0)],
)
def test_first_option(text, found):
    assert first_option(["answer1", "answer2", "answer10"], text) == found


def test_answers_are_kept_and_not_asked_again(make_config, monkeypatch):
    config = make_config("eval/mmlu_dev", limit=20, use_cache=True)
    first = run(config)
    calls = []
    real = torchtune_lm.score_rows
    monkeypatch.setattr(torchtune_lm, "score_rows", lambda *arguments: calls.append(1) or real(*arguments))
    assert run(config)["results"] == first["results"]
    assert not calls
    other = TINY_MODEL | {"max_seq_len": 200}  # another model, for all that is known
    for change in ({"seed": 1}, {"max_length": 200}, {"dtype": "bf16"}, {"model": other}):
        calls.clear()
        run(config | change)
        assert calls, change


def test_what_ends_an_answer_and_what_the_model_computes_are_part_of_its_id(make_config, tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "model")
    config = make_config("eval/mmlu_dev")
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "model")

    def model_id() -> str:
        recipe = OwLoreEvalRecipe(OmegaConf.create(config))
        recipe.setup()
        recipe.cleanup()
        return recipe._model_id()

    ids = [model_id(), model_id()]
    for name, change in {
        "generation_config.json": {"eos_token_id": [0, 5]},
        "tokenizer_config.json": {"eos_token": "<|user|>", "bos_token": "<|system|>"},
        "config.json": {"of_no_builder": 5},
    }.items():
        file = tmp_path / "model" / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | change))
        ids.append(model_id())
    config["add_bos"] = True
    ids.append(model_id())
    assert ids[0] == ids[1] and len(set(ids)) == 5


def test_memory_that_runs_out_halves_the_batches(make_config, tiny_dir):
    """Simulate a small GPU: the model raises an out-of-memory error above 600 positions."""
    config = make_config("eval/mmlu_dev", limit=30, batch_tokens=4000)
    expected = run(config)
    recipe = OwLoreEvalRecipe(OmegaConf.create(config))
    recipe.setup()

    def refuse(module, arguments):
        if arguments[0].numel() > 600:
            raise torch.OutOfMemoryError("no more")

    recipe.lm.model.tok_embeddings.register_forward_pre_hook(refuse)
    got = recipe.suite.run_tasks(recipe.lm, "m", Path(config["output_dir"]))
    assert recipe.lm.batch_tokens <= 600
    assert got["results"]["mmlu_dev"]["acc,none"] == expected["results"]["mmlu_dev"]["acc,none"]
    recipe.lm.model.tok_embeddings.register_forward_pre_hook(lambda *_: refuse(None, [torch.empty(601)]))
    with pytest.raises(torch.OutOfMemoryError):
        recipe.suite.run_tasks(recipe.lm, "m", Path(config["output_dir"]))


THINKING = {
    "_component_": "owlore_tune.data.HFChatTokenizer", "path": "${checkpointer.checkpoint_dir}", "enable_thinking": True
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": ["mmlu"]}, "unknown key taks; did you mean tasks?"),
        ({"tokenizer": THINKING}, "tokenizer.enable_thinking=true: mmlu_dev is scored by log-likelihood"),
        ({"tasks": ["mmlu_dve"]}, "tasks: no task, group or tag named mmlu_dve; did you mean .*mmlu_dev"),
        ({"tasks": ["piqa"]}, "the data of piqa is neither named by data_root .*hf download .* baber/piqa"),
        ({"tasks": ["mmlu_dev"], "data_files": {"mmlu_dev": "CHOICES"}}, "tasks: mmlu_dev would run twice"),
        ({"tasks": ["mt_bench"], "data_files": {"mt_bench": "CHOICES"}}, "data_files.mt_bench: the task of this name"),
        ({"tasks": ["mmlu"]}, "the data of mmlu is neither .*hf download .* cais/mmlu"),
        ({"tasks": ["mmlu_continuation"]}, "the data of mmlu_continuation is neither .*hf download .* cais/mmlu"),
        ({"tasks": ["logiqa"], "data_root": "SCRIPT"}, "logiqa cannot be loaded: .*scripts .*; choose another task"),
        ({"max_length": 20, "scoring": "generate", "data_files": {"a": "CHOICES"}}, "max_gen_toks=32 leaves no room"),
        ({"judge": {"base_url": "http://x", "model": "m", "api_key_env": None, "retries": 1}, "data_dir": "/nowhere",
          "tasks": ["mt_bench"]}, r"unknown key judge\.retries"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_before_weights_load(make_config, choices_file, tmp_path, monkeypatch, changes, message):
    if "data_root" in changes:
        (tmp_path / "EleutherAI" / "logiqa").mkdir(parents=True)
        (tmp_path / "EleutherAI" / "logiqa" / "logiqa.py").touch()
        changes = changes | {"data_root": str(tmp_path)}
    if "data_files" in changes:
        changes = changes | {"data_files": {name: str(choices_file) for name in changes["data_files"]}}
    monkeypatch.setattr(OwLoreEvalRecipe, "_load_weights", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=message):
        OwLoreEvalRecipe(OmegaConf.create(make_config("eval/mmlu_dev", **changes))).setup()


def test_a_file_that_is_named_as_a_group_is_refused(choices_file, tmp_path, monkeypatch):
    """The harness has one place in the results for both."""
    shutil.copytree(harness.OWN_TASKS, tmp_path / "tasks")
    (tmp_path / "tasks" / "mine.yaml").write_text("{group: mine, task: [mmlu_dev_held_out]}")
    monkeypatch.setattr(harness, "OWN_TASKS", tmp_path / "tasks")
    with pytest.raises(ConfigError, match="tasks: mine would run twice"):
        load_tasks(["mine"], data_files={"mine": str(choices_file)})


def test_arithmetic_problems_are_right_by_their_last_number(make_config, tmp_path, monkeypatch):
    assert last_number("16 - 12 = 4 kids. The answer is 1,204.50.") == 1204.5
    assert last_number("no number") is None and not is_right("no number", 0)
    assert is_right("It was -3. The answer is -3.", -3) and not is_right("4 of 5", 4)
    rows = [{"instruction": f"{n} and 1?", "answer": f"{n + 1}.0"} for n in range(3)]
    (tmp_path / "math.json").write_text(json.dumps(rows))
    config = make_config("eval/local_math", data_files={"mine": str(tmp_path / "math.json")}, max_length=512)
    answers = iter(["It is 1.", "1 and 1 is 2. The answer is 2", "two"])
    monkeypatch.setattr(
        torchtune_lm.TorchtuneLM, "generate_until", lambda _, requests, **options: [next(answers) for _ in requests]
    )
    assert run(config)["results"]["mine"]["acc,none"] == 2 / 3
    (tmp_path / "math.json").write_text(json.dumps([rows[0] | {"answer": "two"}]))
    with pytest.raises(ConfigError, match=r"math.json: row 0: answer='two' is not a number"):
        OwLoreEvalRecipe(OmegaConf.create(config)).setup()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("evaluation", r"has results of another model \(other\); choose another directory"),
        ("training", r"output_dir=.*run holds the training of \w{8}; choose another directory"),
    ],
)
def test_the_manifest_of_another_run_is_not_written_over(kind, message, make_config, tmp_path):
    (tmp_path / "run").mkdir()
    run_json = {"kind": kind, "run_id": "0123456789abcdef0123456789abcdef", "parent": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run_json))
    (tmp_path / "run" / "manifest.json").write_text('{"fingerprint": "other"}')
    with pytest.raises(ConfigError, match=message):
        run(make_config("eval/mmlu_dev"))
    assert (tmp_path / "run" / "manifest.json").read_text() == '{"fingerprint": "other"}'


def test_compare_puts_runs_side_by_side(tmp_path):
    for name, acc in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name / "deep").mkdir(parents=True)
        old = {"results": {"piqa": {"acc,none": 0.1, "acc_stderr,none": 0.03}}}
        (tmp_path / name / "deep" / "results_2026-01-01.json").write_text(json.dumps(old))
        piqa = {"alias": "piqa", "acc,none": acc, "acc_stderr,none": 0.03}
        new = {"results": {"piqa": piqa, "boolq": {"acc,none": 0.6}}, "averages": {"acc,none": (acc + 0.6) / 2}}
        (tmp_path / name / "deep" / "results_2026-01-02.json").write_text(json.dumps(new))
    assert read_scores(tmp_path / "a")["piqa", "acc"] == (0.5, 0.03)
    lines = compare([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert lines[0] == f"| task | metric | {tmp_path / 'a'} | {tmp_path / 'b'} | difference |"
    assert f"| piqa | acc | 0.5000 ± 0.0300 | 0.7500 ± 0.0300 | +0.2500 ± {math.hypot(0.03, 0.03):.4f} |" in lines
    assert "| boolq | acc | 0.6000 | 0.6000 | +0.0000 |" in lines
    assert lines[-1] == "| average | acc | 0.5500 | 0.6750 | +0.1250 |"


def test_compare_shows_answers_to_questions_of_all_tasks(tmp_path):
    docs = [
        {"doc": {"instruction": "one?"}, "resps": [["1"]]}, {"doc": {"question": "two?"}, "resps": [["2\u2028"]]},
        {"doc": {"prompt": "three?\n"}, "resps": [["3"]]}, {"doc": {"turns": ["a", "b"]}, "turn": 1, "resps": [["4"]]},
        {"doc": {"turns": ["a", "b"]}, "turn": 2, "resps": [["5"]]},
    ]  # fmt: skip
    (tmp_path / "samples_task_1.jsonl").write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs))
    shown = show_answers([tmp_path], 9)
    assert [line.strip() for line in shown.split("\n")] == [
        part
        for question, answer in (("one?", "1"), ("two?", "2\u2028".strip()), ("three?", "3"), ("a", "4"), ("a\nb", "5"))
        for part in ("question", *question.split("\n"), str(tmp_path), answer)
    ]


def test_compare_averages_no_mixture_and_takes_no_two_evaluations_for_one(tmp_path):
    for place, task, date in (("one", "piqa", 1), ("two", "boolq", 2)):
        (tmp_path / place).mkdir()
        content = {"results": {task: {"acc,none": 0.5}}, "averages": {"acc,none": 0.5}}
        (tmp_path / place / f"results_{date}.json").write_text(json.dumps(content))
    assert set(read_scores(tmp_path)) == {("piqa", "acc"), ("boolq", "acc")}
    (tmp_path / "two" / "results_3.json").write_text('{"results": {"piqa": {"acc,none": 0.6}}}')
    with pytest.raises(ConfigError, match="has two evaluations of piqa: .*one and .*two; choose one"):
        read_scores(tmp_path)
    with pytest.raises(ConfigError, match="has no results_"):
        read_scores(tmp_path / "three")
    (tmp_path / "results_bad.json").write_text("[1]")
    with pytest.raises(ConfigError, match="is not a results file"):
        read_scores(tmp_path / "results_bad.json")


@pytest.mark.parametrize("method", ["_load_weights", "_manifest"])
def test_a_signal_stops_an_evaluation_in_one_line(method, make_config, tmp_path, monkeypatch, capsys):
    """During loading, and after the last answer. Output is complete or absent."""
    import owlore_eval

    original = getattr(OwLoreEvalRecipe, method)

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(OwLoreEvalRecipe, method, interrupted)
    OmegaConf.save(OmegaConf.create(make_config("eval/mmlu_dev", limit=2)), tmp_path / "eval.yaml")
    monkeypatch.setattr(sys, "argv", ["tune", "--config", str(tmp_path / "eval.yaml")])
    with pytest.raises(SystemExit) as stop:
        owlore_eval.recipe_main()
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip().splitlines()[-1] == "SIGTERM: stopped"
    assert not list((tmp_path / "run").glob("results_*"))


def test_results_that_cannot_be_written_whole_are_not_there(make_config, tmp_path, monkeypatch):
    """The tracker hides its errors: a full disk must not leave a truncated file."""
    import lm_eval.loggers.evaluation_tracker as tracker

    written = []

    def full_disk(value):
        written.append(value)
        if len(written) > 5:
            raise OSError("No space left on device")
        return value

    monkeypatch.setattr(tracker, "sanitize_list", full_disk)
    with pytest.raises(RunError, match="the results cannot be written to .*samples were written, not 10"):
        run(make_config("eval/mmlu_dev", limit=10))
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"run.json", ".owlore.lock"}


def test_results_that_cannot_be_written_are_printed(make_config, monkeypatch, capsys):
    def full_disk(*args, **kwargs):
        raise RunError("the results cannot be written")

    monkeypatch.setattr("owlore_eval.save_results", full_disk)
    with pytest.raises(RunError, match="the results cannot be written"):
        run(make_config("eval/mmlu_dev", limit=4))
    assert "|mmlu_dev|" in capsys.readouterr().out


def test_a_model_whose_outputs_are_nan_has_no_accuracy(make_config):
    recipe = OwLoreEvalRecipe(OmegaConf.create(make_config("eval/mmlu_dev", limit=4)))
    recipe.setup()
    with torch.no_grad():
        recipe.lm.model.layers[1].mlp.w1.weight[0, 0] = math.nan
    with pytest.raises(RunError, match="the model's outputs are not finite; are its weights damaged"):
        recipe.evaluate()


def test_nan_after_the_first_token_of_an_answer_is_found_too(make_config):
    recipe = OwLoreEvalRecipe(OmegaConf.create(make_config("eval/mmlu_dev", limit=1, tasks=["mmlu_dev_worked"])))
    recipe.setup()
    hidden = []

    def spoil(module, arguments, output):
        hidden.append(1)
        return output if len(hidden) == 1 else output * math.nan

    recipe.lm.model.norm.register_forward_hook(spoil)
    with pytest.raises(RunError, match="the model's outputs are not finite"):
        recipe.evaluate()


@pytest.mark.parametrize("scoring", ["loglikelihood", "last_number"])
def test_examples_of_local_files_are_other_rows(scoring, make_config, tmp_path):
    """Regression: a question could be one of its own examples, with its answer."""
    rows = [{"instruction": f"Q{i}? Answer format: 1/2", "answer": "1"} for i in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = make_config(
        "eval/mmlu_dev", tasks=[], data_files={"mine": str(tmp_path / "rows.json")}, scoring=scoring, num_fewshot=5,
        apply_chat_template=False,
    )  # fmt: skip
    run(config)
    (samples,) = (tmp_path / "run").glob("samples_mine_*")
    for line in samples.read_text().splitlines():
        asked = json.loads(line)["arguments"]["gen_args_0"]["arg_0"]
        assert sorted(re.findall(r"Q(\d)", asked)) == list("012345")
    with pytest.raises(ConfigError, match="num_fewshot=6; mine has 5 examples"):
        OwLoreEvalRecipe(OmegaConf.create(config | {"num_fewshot": 6, "output_dir": str(tmp_path / "six")})).setup()


ROW = {"instruction": "Which? Answer format: a/b", "answer": "a"}
BAD_ROWS = {
    "a number for a math answer is NaN": ("last_number", {"answer": math.nan}, "answer=nan is not a number"),
    "it is true": ("last_number", {"answer": True}, "answer=True is not a number"),
    "it is huge": ("last_number", {"answer": 10**400}, "is not a number"),
    "the answer is no option": ("loglikelihood", {"answer": "c"}, "row 0: answer='c'; its options are"),
    "an option occurs twice": ("loglikelihood", {"instruction": "Answer format: a/b/a"}, "has an option twice: "),
    "the input is a number": ("loglikelihood", {"input": 5}, "row 0 has 5 in field 'input', which is not text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_wrong_row_is_told(case, make_config, tmp_path):
    scoring, changes, message = BAD_ROWS[case]
    (tmp_path / "rows.json").write_text(json.dumps([ROW | changes]))
    config = make_config("eval/mmlu_dev", tasks=[], data_files={"mine": str(tmp_path / "rows.json")}, scoring=scoring)
    with pytest.raises(ConfigError, match=re.escape(message)):
        OwLoreEvalRecipe(OmegaConf.create(config)).setup()


@pytest.mark.slow
def test_two_ranks_give_the_results_of_one(make_config, choices_file, tmp_path):
    """Log-likelihoods and generation with few-shot examples under torchrun; each rank processes half."""
    values, texts = [], []
    for ranks in (1, 2):
        output = tmp_path / f"ranks_{ranks}"
        data_files = {"mine": str(choices_file)}
        for scoring in ("loglikelihood", "generate"):
            config = make_config("eval/mmlu_dev", num_fewshot=1, limit=25, data_files=data_files, scoring=scoring)
            config |= {"output_dir": str(output / scoring), "batch_size": 2, "batch_tokens": 700, "max_length": 256}
            file = tmp_path / "config.yaml"
            OmegaConf.save(OmegaConf.create(config), file)
            launch = ["--nproc_per_node", "2"] if ranks == 2 else []
            run_command("tune", "run", *launch, "owlore_eval", "--config", str(file), cwd=tmp_path)
        (samples,) = (output / "loglikelihood").glob("samples_mmlu_dev_*")
        rows = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
        values.append(torch.tensor([[float(pair[0]) for pair in row] for row in rows]))
        (samples,) = (output / "generate").glob("samples_mine_*")
        texts.append([json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()])
    assert len(values[0]) == 25
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)
    assert texts[0] == texts[1]
    assert json.loads((tmp_path / "ranks_2" / "generate" / "manifest.json").read_text())["model"]["world_size"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_the_others(tiny_dir, tmp_path, rank):
    done = run_ranks(2, "serve", tiny_dir, rank, "broken", tmp_path / "answers")
    assert all(code > 0 for code in done.codes), done  # all by themselves
    assert "broken on purpose" in done.output


def test_a_rank_without_memory_generates_in_smaller_batches(tiny_dir, tmp_path):
    answers = []
    for rank in (1, 7):  # there is no rank 7
        done = run_ranks(2, "serve", tiny_dir, rank, "small", tmp_path / "answers")
        assert not any(done.codes), done.output[-3000:]
        answers.append(json.loads((tmp_path / "answers").read_text()))
    assert answers[0] == answers[1] and len(answers[0]) == 9
