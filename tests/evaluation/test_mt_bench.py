"""MT-Bench against a real HTTP judge in a separate process."""

import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures.fastchat_requests import made_up_answer
from omegaconf import OmegaConf
from test_eval_recipe import make_config, run  # noqa: F401
from torchtune.models.llama2 import llama2

from owlore_eval import OwLoreEvalRecipe
from owlore_evals.jsonl import append_line, read_lines
from owlore_evals.judge import Judge, JudgeConfig, _wait, parse_rating
from owlore_evals.mt_bench import TEMPERATURES, MTBench, _digest, judge_chat, read_files
from owlore_evals.torchtune_lm import TorchtuneLM
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.errors import ConfigError, RunError

HERE = Path(__file__).parents[1]
OFFICIAL = HERE.parents[1] / "shared" / "data" / "mt_bench"
KEY = "sk-secret-0123456789"


@contextmanager
def judge_server(log: Path, *fault: str):
    """Start a judge, and yield its base_url."""
    command = [sys.executable, str(HERE / "judge_server.py"), str(log), *fault]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def lm(tiny_dir) -> TorchtuneLM:
    with torch.device("meta"):
        model = llama2(300, 4, 4, 2, 32, max_seq_len=256, intermediate_dim=48)
    HFCheckpointer(str(tiny_dir), "LLAMA2").load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    return TorchtuneLM(model, HFChatTokenizer(str(tiny_dir)))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Files in FastChat's layout: four questions in three categories."""
    root = tmp_path / "llm_judge"
    (root / "mt_bench" / "reference_answer").mkdir(parents=True)
    categories = ["writing", "writing", "math", "stem"]
    questions = [
        {"question_id": i, "category": category, "turns": [f"first {i}", f"second {i}"]}
        for i, category in enumerate(categories, start=81)
    ]
    references = [{"question_id": 83, "choices": [{"turns": ["ref one", "ref two"]}]}]
    one, two = "Grade {answer} to {question}", "Grade {answer_2} to {question_2} after {answer_1} to {question_1}"
    prompts = [
        {"name": "single-v1", "system_prompt": "You judge.", "prompt_template": one},
        {"name": "single-math-v1", "system_prompt": "", "prompt_template": one + " by {ref_answer_1}"},
        {"name": "single-v1-multi-turn", "system_prompt": "You judge.", "prompt_template": two},
        {"name": "single-math-v1-multi-turn", "system_prompt": "", "prompt_template": two + " {ref_answer_2}"},
    ]
    for name, rows in (
        ("mt_bench/question", questions), ("mt_bench/reference_answer/gpt-4", references), ("judge_prompts", prompts),
    ):  # fmt: skip
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def bench(data_dir, tmp_path, monkeypatch):
    """Returns a function that builds an MTBench of the four questions with a judge at a base_url."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def make(base_url: str, *, min_coverage: float = 0.95, **judge) -> MTBench:
        options = {"model": "gpt-4", "max_retries": 3, "longest_wait": 0.05, "timeout": 2} | judge
        return MTBench(
            str(data_dir), judge=JudgeConfig(base_url=base_url, **options), max_new_tokens=6,
            min_coverage=min_coverage,
        )  # fmt: skip

    return make


def requests_in(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_answers_judgments_and_scores(bench, lm, tmp_path):
    log = tmp_path / "log"
    with judge_server(log) as url:
        results = bench(url).run(lm, "model", tmp_path)
    requests = requests_in(log)
    assert len(requests) == 8
    for request in requests:
        assert set(request) == {"model", "messages", "n", "temperature", "max_tokens"}
        assert (request["model"], request["n"], request["temperature"], request["max_tokens"]) == ("gpt-4", 1, 0, 2048)
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in read_lines(tmp_path / "answers.jsonl")}
    prompts = {request["messages"][-1]["content"] for request in requests}
    assert f"Grade {answers[81][1]} to second 81 after {answers[81][0]} to first 81" in prompts
    assert f"Grade {answers[83][0]} to first 83 by ref one" in prompts
    assert [len(r["messages"]) for r in requests if "ref" in r["messages"][-1]["content"]] == [1, 1]
    ratings = [row["score"] for row in read_lines(tmp_path / "judgments.jsonl")]
    scores = results["results"]["mt_bench"]
    assert scores["score,none"] == pytest.approx(sum(ratings) / 8)
    assert scores["coverage,none"] == 1 and scores["missing,none"] == 0
    assert set(results["results"]) == {"mt_bench", "mt_bench_writing", "mt_bench_math", "mt_bench_stem"}
    categories = {81: "writing", 82: "writing", 83: "math", 84: "stem"}
    judgments = list(read_lines(tmp_path / "judgments.jsonl"))
    for category in ("writing", "math", "stem"):
        own = [row for row in judgments if categories[row["question_id"]] == category]
        found = results["results"][f"mt_bench_{category}"]
        assert found["score,none"] == pytest.approx(statistics.fmean(row["score"] for row in own))
    for turn in (1, 2):
        own = [row["score"] for row in judgments if row["turn"] == turn]
        assert scores[f"turn_{turn},none"] == pytest.approx(statistics.fmean(own))
    assert scores["score_stderr,none"] == pytest.approx(statistics.stdev(ratings) / 8**0.5)
    assert len(set(ratings)) > 2
    assert (tmp_path / "mt_bench.png").read_bytes().startswith(b"\x89PNG")
    assert len(results["samples"]["mt_bench"]) == 8


def test_the_second_turn_is_answered_after_the_first(bench, lm, tmp_path, monkeypatch):
    asked = []
    real = lm.generate_until
    monkeypatch.setattr(lm, "generate_until", lambda requests: asked.append(requests) or real(requests))
    bench("http://127.0.0.1:9").answer(lm, "model", tmp_path / "answers.jsonl")
    first, second, third, *_ = asked
    assert [r.args[0] for r in first] == [
        "<|user|>first 81<|end|>\n<|assistant|>",
        "<|user|>first 82<|end|>\n<|assistant|>",
    ]
    assert second[0].args[0].startswith("<|user|>first 81<|end|>\n<|assistant|>")
    assert second[0].args[0].endswith("<|user|>second 81<|end|>\n<|assistant|>")
    assert first[0].args[1] == {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.7}
    assert third[0].args[1] == {"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}


def test_a_judge_that_dies_is_asked_only_for_what_is_missing(bench, lm, tmp_path):
    log = tmp_path / "log"
    with (
        judge_server(log, "die", "3") as url,
        pytest.raises(
            # The error of the last requests depends on their progress when the judge died.
            RunError,
            match=r"37\.5% .* min_coverage=0\.95 \(\d × Client\w+Error.*run the same command again",
        ),
    ):
        bench(url, num_concurrent=1, max_retries=1).run(lm, "model", tmp_path)
    kept = (tmp_path / "answers.jsonl").read_text()
    assert len(requests_in(log)) == 3
    with judge_server(log) as url:
        results = bench(url).run(lm, "model", tmp_path)
    digests = [_digest(request) for request in requests_in(log)]
    assert len(digests) == len(set(digests)) == 8
    assert results["results"]["mt_bench"]["coverage,none"] == 1
    assert (tmp_path / "answers.jsonl").read_text() == kept
    with judge_server(log) as url:
        assert bench(url).run(lm, "model", tmp_path)["results"] == results["results"]
    assert len(requests_in(log)) == 8  # no request is repeated


@pytest.mark.parametrize("fault", ["429", "slow", "empty"])
def test_a_passing_failure_is_tried_again(bench, lm, tmp_path, fault):
    with judge_server(tmp_path / "log", fault, "1") as url:
        scores = bench(url, timeout=1).run(lm, "model", tmp_path)["results"]["mt_bench"]
    assert (scores["coverage,none"], scores["missing,none"]) == (1, 0)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "HTTP 500"), ("drip", "timeout"), ("empty", "empty or malformed answer"),
        ("html", "empty or malformed answer"), ("parts", "empty or malformed answer"),
        ("malformed", "empty or malformed answer"), ("surrogate", "empty or malformed answer"),
        ("deep", "empty or malformed answer"),
    ],
)  # fmt: skip
def test_a_failure_that_stays_is_counted_and_named(bench, lm, tmp_path, fault, reason):
    with (
        judge_server(tmp_path / "log", fault, "99") as url,
        pytest.raises(RunError, match=rf"only 0\.0% of the judgments have a rating.*8 × {reason}"),
    ):
        bench(url, timeout=1 if reason == "timeout" else 60, max_retries=2).run(lm, "model", tmp_path)
    assert read_lines(tmp_path / "judgments.jsonl") == []


def test_a_refused_key_is_not_tried_again(bench, lm, tmp_path):
    with judge_server(tmp_path / "log", "401", "1") as url, pytest.raises(RunError, match="8 × HTTP 401"):
        bench(url).run(lm, "model", tmp_path)


def test_judgments_without_a_rating_are_counted_apart_and_asked_again(bench, lm, tmp_path):
    with judge_server(tmp_path / "log", "no_rating", "2") as url:
        scores = bench(url, min_coverage=0.0).run(lm, "model", tmp_path)["results"]["mt_bench"]
    rows = read_lines(tmp_path / "judgments.jsonl")
    none = sum(row["score"] is None for row in rows)
    assert len(rows) == 8 and 0 < none < 8
    assert scores["unparsable,none"] == none and scores["coverage,none"] == 1 - none / 8
    with judge_server(tmp_path / "log") as url:
        scores = bench(url).run(lm, "model", tmp_path)["results"]["mt_bench"]
    assert scores["coverage,none"] == 1
    assert len(requests_in(tmp_path / "log")) == 8 + none


def test_another_endpoint_is_another_judge(bench, lm, tmp_path):
    """Such as a local server for a first try, which takes any name of a model."""
    with judge_server(tmp_path / "log") as url:
        bench(url).run(lm, "model", tmp_path)
        bench(url.replace("127.0.0.1", "localhost")).run(lm, "model", tmp_path)
    assert len(requests_in(tmp_path / "log")) == 16


def test_a_category_without_a_rating_has_no_score(bench, lm, tmp_path):
    with judge_server(tmp_path / "log", "500", "99") as url:
        results = bench(url, min_coverage=0.0, max_retries=1).run(lm, "model", tmp_path)["results"]
    json.dumps(results, allow_nan=False)
    assert results["mt_bench_math"] == {"alias": "mt_bench_math"}
    assert results["mt_bench"]["missing,none"] == 8 and "score,none" not in results["mt_bench"]


def test_a_question_that_changed_is_answered_and_judged_again(bench, lm, tmp_path, data_dir):
    with judge_server(tmp_path / "log") as url:
        bench(url).run(lm, "model", tmp_path)
        file = data_dir / "mt_bench" / "question.jsonl"
        file.write_text(file.read_text().replace("first 84", "another first 84"))
        bench(url).run(lm, "model", tmp_path)
    assert [row["question_id"] for row in read_lines(tmp_path / "answers.jsonl")] == [81, 82, 83, 84, 84]
    assert len(requests_in(tmp_path / "log")) == 10


def test_as_long_as_the_endpoint_asks_for_is_waited(bench, lm, tmp_path):
    with judge_server(tmp_path / "log", "retry_after", "1") as url:
        started = time.perf_counter()
        bench(url, longest_wait=5.0).run(lm, "model", tmp_path)
    assert time.perf_counter() - started >= 2  # the judge's own first wait is shorter
    failed = SimpleNamespace(exception=lambda: SimpleNamespace(headers={"Retry-After": "3"}))
    for own, longest, seconds in ((0.5, 60.0, 3.0), (9.0, 60.0, 9.0), (0.5, 2.0, 2.0)):
        assert _wait(lambda _, own=own: own, longest, SimpleNamespace(outcome=failed)) == seconds


def test_mt_bench_through_the_recipe(make_config, data_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tasks = {"tasks": ["mmlu_dev", "mt_bench"], "limit": 2, "data_dir": str(data_dir), "max_new_tokens": 6}
    with judge_server(tmp_path / "log") as url:
        results = run(make_config("eval/mt_bench", judge={"base_url": url, "model": "gpt-4"}, **tasks))["results"]
    printed = capsys.readouterr().out
    assert "mt_bench_writing" in printed and "mmlu_dev" in printed
    assert {"mmlu_dev", "mt_bench", "mt_bench_math"} <= set(results)
    assert (tmp_path / "run" / "mt_bench.png").exists()
    assert KEY not in "".join(f.read_text(errors="ignore") for f in (tmp_path / "run").rglob("*") if f.is_file())


def test_unusable_sampling_is_refused_before_weights_load(make_config, tiny_dir, data_dir, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delattr(HFCheckpointer, "load_checkpoint")
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"top_k": -1}')
    config = make_config("eval/mt_bench", max_new_tokens=6, data_dir=str(data_dir), judge=None)
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "model")
    with pytest.raises(ConfigError, match="tasks: mt_bench: generation with top_k=-1; it is out of range"):
        OwLoreEvalRecipe(OmegaConf.create(config)).setup()


def test_repeats_give_a_median_and_a_spread(bench, lm, tmp_path):
    with judge_server(tmp_path / "log", "moody") as url:
        scores = bench(url, repeats=3).run(lm, "model", tmp_path)["results"]["mt_bench"]
    rows = read_lines(tmp_path / "judgments.jsonl")
    assert len(rows) == 24
    by_answer: dict[tuple, list[float]] = {}
    by_repeat: dict[int, list[float]] = {}
    for row in rows:
        by_answer.setdefault((row["question_id"], row["turn"]), []).append(row["score"])
        by_repeat.setdefault(row["repeat"], []).append(row["score"])
    assert scores["score,none"] == pytest.approx(sum(sorted(three)[1] for three in by_answer.values()) / 8)
    means = [sum(eight) / 8 for eight in by_repeat.values()]
    assert scores["repeat_spread,none"] == pytest.approx(max(means) - min(means))


def test_the_key_reaches_no_log_and_no_file(bench, lm, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with judge_server(tmp_path / "log", "leak") as url, pytest.raises(RunError):
        bench(url).run(lm, "model", tmp_path)
    with judge_server(tmp_path / "log", "echo") as url:
        bench(url).run(lm, "model", tmp_path)
    written = "".join(file.read_text() for file in tmp_path.rglob("*.json*"))
    assert KEY not in caplog.text + written + "".join(capfd.readouterr())


def test_what_cannot_work_is_refused_with_the_way_out(data_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"judge\.api_key_env=OPENAI_API_KEY is not set .* judge\.api_key_env=null"):
        JudgeConfig(base_url="http://localhost", model="gpt-4")
    with pytest.raises(ConfigError, match=r"judge\.repeats=0; it must be above 0"):
        JudgeConfig(base_url="http://localhost", model="gpt-4", api_key_env=None, repeats=0)
    with pytest.raises(ConfigError, match=r"data_dir is not set\. .*git clone"):
        read_files(None)
    (data_dir / "judge_prompts.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"No such file .*judge_prompts\.jsonl'\. .*git clone"):
        read_files(str(data_dir))
    (data_dir / "judge_prompts.jsonl").write_text('{"name": "single-v1"}\n')
    with pytest.raises(ConfigError, match=r"does not have FastChat's format: KeyError"):
        read_files(str(data_dir))
    (data_dir / "mt_bench" / "question.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"question\.jsonl has no questions\. .*git clone"):
        read_files(str(data_dir))


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7), ("[[6.5]] out of [[10]]", 6.5), ("[8]", 8), ("[3] but [[4]]", 4), ("[[8.]] or [9]", 8),
        ("[[11]]", None), ("7", None),
    ],
)  # fmt: skip
def test_ratings(text, rating):
    assert parse_rating(text) == rating


def test_judge_requests_equal_fastchats():
    """fixtures/fastchat_requests.py recorded the requests of FastChat's published code for the same answers."""
    if not OFFICIAL.is_dir():
        pytest.skip("needs FastChat's MT-Bench files in ../shared/data/mt_bench")
    questions, prompts = read_files(str(OFFICIAL))
    judge = Judge(JudgeConfig(base_url="http://localhost", model="gpt-4", api_key_env=None), lambda number, text: None)
    expected = json.loads((HERE / "fixtures" / "fastchat_requests.json").read_text())
    got = {}
    for question in questions:
        answers = [made_up_answer(question.question_id, turn) for turn in (1, 2)]
        for turn in (1, 2):
            payload = judge.payload(judge_chat(prompts, question, answers, turn))
            got[f"{question.question_id}/{turn}"] = _digest(payload)
    assert len(got) == 160
    assert got == expected
    assert {question.category for question in questions} == set(TEMPERATURES)


def test_a_rating_is_read_in_linear_time():
    """Regression: a string of 40,000 digits took 47 seconds."""
    started = time.perf_counter()
    assert parse_rating("[[" + "1" * 40_000) is None
    assert parse_rating("[" * 40_000 + "1" * 40_000 + "]") is None
    assert time.perf_counter() - started < 1


def test_rows_without_a_final_line_end_are_kept(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}')
    assert read_lines(file) == [{"a": 1}, {"a": 2}]
    append_line(file, {"a": 3})
    assert read_lines(file) == [{"a": 1}, {"a": 2}, {"a": 3}]
    with file.open("a") as opened:
        opened.write('{"a": ')
    assert len(read_lines(file)) == 3 and file.read_text().endswith('{"a": 3}\n')
    append_line(file, {"a": 4})
    assert read_lines(file) == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]


def test_fastchats_own_answers_are_refused(bench, lm, tmp_path):
    row = {"question_id": 81, "answer_id": "x", "model_id": "gpt-4", "choices": [], "tstamp": 0.0}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"answers.jsonl: row 0 has no 'question', so this program did not write it"):
        bench("http://127.0.0.1:9").run(lm, "model", tmp_path)


def test_saved_answers_of_another_setting_are_refused_first(make_config, data_dir, monkeypatch):  # noqa: F811
    """The other tasks may take hours."""
    tasks = {"tasks": ["mmlu_dev", "mt_bench"], "limit": 1, "data_dir": str(data_dir), "judge": None}
    run(make_config("eval/mt_bench", max_new_tokens=4, **tasks))
    recipe = OwLoreEvalRecipe(OmegaConf.create(make_config("eval/mt_bench", max_new_tokens=5, **tasks)))
    recipe.setup()
    monkeypatch.setattr(recipe.suite, "run_tasks", lambda *_, **__: pytest.fail("tasks ran"))
    with pytest.raises(ConfigError, match=r"answers\.jsonl has answers of .* max_new_tokens=4, .*another output_dir"):
        recipe.evaluate()
    recipe.cleanup()


def test_a_judge_that_fails_does_not_lose_the_other_results(make_config, data_dir, tmp_path):  # noqa: F811
    judge = {"base_url": "http://127.0.0.1:9", "model": "gpt-4", "api_key_env": None, "max_retries": 1}
    tasks = {"tasks": ["mmlu_dev", "mt_bench"], "limit": 1, "data_dir": str(data_dir), "max_new_tokens": 4}
    with pytest.raises(RunError, match="of the judgments have a rating"):
        run(make_config("eval/mt_bench", judge=judge, **tasks))
    (results,) = (tmp_path / "run").glob("results_*.json")
    assert json.loads(results.read_text())["results"].keys() == {"mmlu_dev"}
    assert len(read_lines(tmp_path / "run" / "answers.jsonl")) == 3  # one of each category
