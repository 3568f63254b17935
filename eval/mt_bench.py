"""MT-Bench (arXiv 2306.05685): 80 two-turn questions. A judge grades each answer from 1 to 10.

This follows the single-answer mode of FastChat's llm_judge: temperatures by category, prompts and reference answers
from its files, one judgment per turn. Unlike FastChat, it works with any harness model, saves answers and judgments as
they arrive, counts failed judgments, and takes no rating outside of 1 to 10.
"""

import hashlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torchtune.utils import get_logger

from owlore_evals.jsonl import append_line, read_lines
from owlore_evals.judge import Chat, Judge, JudgeConfig
from owlore_evals.mt_bench_files import Question, judge_chat, parse_rating, read_files
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.training.plots import plot_radar

log = get_logger("INFO")

MT_BENCH = "mt_bench"
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
_OF_CATEGORIES = ("score,none", "score_stderr,none", "turn_1,none", "turn_2,none")


class MTBench:
    """Answers, judgments and scores of one model, saved in ``answers.jsonl`` and ``judgments.jsonl``.

    Args:
        data_dir: FastChat's llm_judge/data.
        judge: if None, the questions are only answered.
        max_new_tokens: limit per answer.
        min_coverage: required fraction of judgments with a rating.
        limit: number of questions per category.

    Raises:
        ConfigError: if files in ``data_dir`` are missing or malformed.
    """

    def __init__(
        self,
        data_dir: str | None,
        *,
        judge: JudgeConfig | None,
        max_new_tokens: int = 1024,
        min_coverage: float = 0.95,
        limit: int | None = None,
    ) -> None:
        self._questions, self._prompts = read_files(data_dir)
        if limit is not None:
            categories = {q.category: [p for p in self._questions if p.category == q.category] for q in self._questions}
            self._questions = [question for some in categories.values() for question in some[:limit]]
        self._judge_config = judge
        self._max_new_tokens = max_new_tokens
        self._min_coverage = min_coverage

    def run(self, lm: LM, model_id: str, directory: Path) -> dict[str, Any]:
        """Answer, judge and score. Returns results and samples in the harness's format.

        Args:
            directory: for answers, judgments and the plot. Existing answers and judgments are reused.

        Raises:
            RunError: if too few judgments have a rating.
        """
        answers = self.answer(lm, model_id, directory / "answers.jsonl")
        if self._judge_config is None:
            return _as_results({MT_BENCH: {"answered,none": len(answers)}}, [])
        judgments, failures = self.judge(answers, directory / "judgments.jsonl")
        scores = self._scores(judgments)
        self._check_coverage(scores[MT_BENCH]["coverage,none"], failures, directory)
        rated = {name: values["score,none"] for name, values in scores.items() if "score,none" in values}
        categories = {name.removeprefix(f"{MT_BENCH}_"): rated[name] for name in rated if name != MT_BENCH}
        plot_radar(directory / "mt_bench.png", categories, highest=10)
        return _as_results(scores, self._samples(answers, judgments))

    def check_saved(self, model_id: str, directory: Path) -> None:
        """Raise ConfigError if `run` cannot continue from what is in ``directory``."""
        self._saved_answers(model_id, directory / "answers.jsonl")
        if self._judge_config is not None:
            _rated(directory / "judgments.jsonl")

    def _saved_answers(self, model_id: str, file: Path) -> dict[int, list[str]]:
        answers = {}
        asks = {question.question_id: _digest(question.turns) for question in self._questions}
        for row in _read(file, ("question_id", "question", "model_id", "max_new_tokens", "choices")):
            if (row["model_id"], row["max_new_tokens"]) != (model_id, self._max_new_tokens):
                raise ConfigError(
                    f"{file} has answers of model {row['model_id']} with max_new_tokens={row['max_new_tokens']}, but "
                    f"this run has {model_id} with {self._max_new_tokens}; choose another output_dir"
                )
            if row["question"] == asks.get(row["question_id"]):
                answers[row["question_id"]] = row["choices"][0]["turns"]
        return answers

    def answer(self, lm: LM, model_id: str, file: Path) -> dict[int, list[str]]:
        """Return both answers by question id. Each category is saved to ``file`` before the next one starts."""
        answers = self._saved_answers(model_id, file)
        asks = {question.question_id: _digest(question.turns) for question in self._questions}
        for category in dict.fromkeys(question.category for question in self._questions):
            asked = [q for q in self._questions if q.category == category and q.question_id not in answers]
            if not asked:
                continue
            log.info(f"Answering {len(asked)} questions: {category}")
            turns: list[list[str]] = [[] for _ in asked]
            for _ in range(2):
                chats = [_chat(q, done) for q, done in zip(asked, turns, strict=True)]
                for done, text in zip(turns, self._generate(lm, chats, category), strict=True):
                    done.append(text.strip())
            for question, done in zip(asked, turns, strict=True):
                answers[question.question_id] = done
                row = {
                    "question_id": question.question_id, "question": asks[question.question_id], "model_id": model_id,
                    "max_new_tokens": self._max_new_tokens, "choices": [{"index": 0, "turns": done}],
                    "tstamp": time.time(),
                }  # fmt: skip
                append_line(file, row)
        return {question.question_id: answers[question.question_id] for question in self._questions}

    def _generate(self, lm: LM, chats: list[Chat], category: str) -> list[str]:
        temperature = TEMPERATURES.get(category, 0.7)  # FastChat's default for other categories
        options = {
            "until": [], "max_gen_toks": self._max_new_tokens, "do_sample": temperature > 0, "temperature": temperature,
        }  # fmt: skip
        prompts = [lm.apply_chat_template(chat) for chat in chats]
        return lm.generate_until(
            [Instance("generate_until", {}, (prompt, options), number) for number, prompt in enumerate(prompts)]
        )

    def judge(
        self, answers: dict[int, list[str]], file: Path
    ) -> tuple[dict[tuple[int, int, int], dict[str, Any]], Counter[str]]:
        """Return judgments by (question id, turn, repeat), and the number of failed requests by reason.

        A judgment in ``file`` is reused if the endpoint's host, the judge and the request are the same.
        """
        config = self._judge_config
        assert config is not None
        known = {(row["host"], row["judge"], row["request"], row["repeat"]): row for row in _rated(file)}
        host = urlsplit(config.base_url).hostname
        judgments, missing = {}, []
        for question in self._questions:
            for turn in (1, 2):
                chat = judge_chat(self._prompts, question, answers[question.question_id], turn)
                for repeat in range(config.repeats):
                    key = (question.question_id, turn, repeat)
                    if row := known.get((host, config.model, _digest(chat), repeat)):
                        judgments[key] = row
                    else:
                        missing.append((key, chat))

        def keep(number: int, text: str) -> None:
            key, chat = missing[number]
            judgments[key] = {
                "question_id": key[0], "turn": key[1], "repeat": key[2], "host": host, "judge": config.model,
                "request": _digest(chat), "judgment": text, "score": parse_rating(text), "tstamp": time.time(),
            }  # fmt: skip
            append_line(file, judgments[key])

        judge = Judge(config, keep)
        if missing:
            try:
                judge.ask([chat for _, chat in missing])
            except OSError as error:
                raise RunError(f"{file} cannot be written: {error}; run the same command again to resume") from error
        return judgments, Counter(judge.failures)

    def _scores(self, judgments: dict[tuple[int, int, int], dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Compute metrics over all questions and per category."""
        categories = dict.fromkeys(question.category for question in self._questions)
        scores = {MT_BENCH: self._score(self._questions, judgments)}
        for category in categories:
            questions = [question for question in self._questions if question.category == category]
            score = self._score(questions, judgments)
            scores[f"{MT_BENCH}_{category}"] = {metric: score[metric] for metric in score if metric in _OF_CATEGORIES}
        return scores

    def _score(
        self, questions: list[Question], judgments: dict[tuple[int, int, int], dict[str, Any]]
    ) -> dict[str, float]:
        """The mean over answers of the median over repeats, with turn means, spread and coverage; only those that are
        numbers, since JSON has no other."""
        assert self._judge_config is not None
        repeats = range(self._judge_config.repeats)
        medians: dict[int, list[float]] = {1: [], 2: []}
        by_repeat: list[list[float]] = [[] for _ in repeats]
        judged = unparsable = 0
        for question in questions:
            for turn in (1, 2):
                ratings = []
                for repeat in repeats:
                    row = judgments.get((question.question_id, turn, repeat))
                    judged += row is not None
                    if row is not None and row["score"] is not None:
                        ratings.append(row["score"])
                        by_repeat[repeat].append(row["score"])
                    elif row is not None:
                        unparsable += 1
                if ratings:
                    medians[turn].append(statistics.median(ratings))
        expected = 2 * len(questions) * len(repeats)
        every = medians[1] + medians[2]
        means = [statistics.fmean(ratings) for ratings in by_repeat if ratings]
        found = {
            "score,none": _mean(every),
            "score_stderr,none": statistics.stdev(every) / math.sqrt(len(every)) if len(every) > 1 else math.nan,
            "turn_1,none": _mean(medians[1]),
            "turn_2,none": _mean(medians[2]),
            "repeat_spread,none": max(means) - min(means) if means else math.nan,
            "coverage,none": (judged - unparsable) / expected,
            "unparsable,none": unparsable,
            "missing,none": expected - judged,
        }
        return {metric: value for metric, value in found.items() if not math.isnan(value)}

    def _check_coverage(self, coverage: float, failures: Counter[str], directory: Path) -> None:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in failures.most_common())
        if failures:
            log.warning(f"{failures.total()} requests to the judge failed: {reasons}")
        if coverage < self._min_coverage:
            raise RunError(
                f"only {coverage:.1%} of the judgments have a rating, min_coverage={self._min_coverage}"
                + (f" ({reasons})" if reasons else "")
                + f"; finished judgments are in {directory}; run the same command again to get the rest, with a lower "
                "judge.num_concurrent if the endpoint limits the rate"
            )

    def _samples(
        self, answers: dict[int, list[str]], judgments: dict[tuple[int, int, int], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return one sample per answer, in the format of the harness's tracker."""
        assert self._judge_config is not None
        samples = []
        for question in self._questions:
            for turn in (1, 2):
                found = [judgments.get((question.question_id, turn, r)) for r in range(self._judge_config.repeats)]
                chat = judge_chat(self._prompts, question, answers[question.question_id], turn)
                text = answers[question.question_id][turn - 1]
                samples.append(
                    {
                        "doc_id": question.question_id, "doc": {"category": question.category, "turns": question.turns},
                        "turn": turn, "target": "", "arguments": [(json.dumps(chat),)], "resps": [[text]],
                        "filtered_resps": [row and row["judgment"] for row in found],
                        "scores": [row and row["score"] for row in found], "filter": "none", "metrics": ["score"],
                        "doc_hash": _digest(question.turns), "prompt_hash": _digest(chat), "target_hash": _digest(""),
                    }
                )  # fmt: skip
        return samples


def _chat(question: Question, answered: list[str]) -> Chat:
    """Return the conversation up to the next user turn."""
    chat = []
    for turn, text in enumerate(question.turns[: len(answered) + 1]):
        chat.append({"role": "user", "content": text})
        chat += [{"role": "assistant", "content": answer} for answer in answered[turn : turn + 1]]
    return chat


def _read(file: Path, fields: Iterable[str]) -> list[dict[str, Any]]:
    """Read a file that this module wrote.

    Raises:
        ConfigError: if it is not JSON Lines, or a row lacks one of ``fields``, for example in FastChat's own files.
    """
    try:
        rows = read_lines(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{error}; repair it or choose another output_dir") from error
    for number, row in enumerate(rows):
        if missing := [name for name in fields if not isinstance(row, dict) or name not in row]:
            raise ConfigError(
                f"{file}: row {number} has no {missing[0]!r}, so this program did not write it; choose another "
                "output_dir"
            )
    return rows


def _rated(file: Path) -> list[dict[str, Any]]:
    """Read judgments. Those without a rating are requested again, like failed ones."""
    fields = ("host", "judge", "request", "repeat", "score")
    return [row for row in _read(file, fields) if row["score"] is not None]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan


def _as_results(scores: dict[str, dict[str, float]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    better = {"score": True, "turn_1": True, "turn_2": True}
    return {
        "results": {name: {"alias": name, **values} for name, values in scores.items()},
        "group_subtasks": {MT_BENCH: [name for name in scores if name != MT_BENCH]},
        "versions": dict.fromkeys(scores, 1.0),
        "n-shot": dict.fromkeys(scores, 0),
        "higher_is_better": dict.fromkeys(scores, better),
        "samples": {MT_BENCH: samples} if samples else {},
    }
