"""MT-Bench (arXiv 2306.05685): 80 two-turn questions. A judge grades each answer from 1 to 10.

This follows the single-answer mode of FastChat's llm_judge: temperatures by category, prompts and reference answers
from its files, one judgment per turn. Unlike FastChat, it works with any harness model, saves answers and judgments as
they arrive, and counts failed judgments.
"""

import hashlib
import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torchtune.utils import get_logger

from owlore_evals.jsonl import append_line, read_lines
from owlore_evals.judge import Chat, Judge, JudgeConfig
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.paths import user_path
from owlore_tune.run.plots import plot_radar

log = get_logger("INFO")

MT_BENCH = "mt_bench"
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories in which the judge sees gpt-4's answer
_OF_CATEGORIES = ("score,none", "score_stderr,none", "turn_1,none", "turn_2,none")
# FastChat's patterns with a limit on digits. Without one, a long digit string takes quadratic time.
_RATINGS = (re.compile(r"\[\[(\d{1,9}\.?\d{0,9})\]\]"), re.compile(r"\[(\d{1,9}\.?\d{0,9})\]"))
_HOW_TO_GET = (
    "FastChat's files are needed: judge_prompts.jsonl, mt_bench/question.jsonl, mt_bench/reference_answer/gpt-4.jsonl. "
    "Run `git clone https://github.com/lm-sys/FastChat` and set data_dir=FastChat/fastchat/llm_judge/data; "
    "docs/evaluation.md shows an alternative"
)


@dataclass(frozen=True)
class Question:
    question_id: int
    category: str
    turns: list[str]
    reference: list[str] | None  # gpt-4's answers, if the judge sees them


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
        categories = {
            name.removeprefix(f"{MT_BENCH}_"): s["score,none"] for name, s in scores.items() if name != MT_BENCH
        }
        plot_radar(directory / "mt_bench.png", categories, highest=10)
        return _as_results(scores, self._samples(answers, judgments))

    def answer(self, lm: LM, model_id: str, file: Path) -> dict[int, list[str]]:
        """Return both answers by question id. Each category is saved to ``file`` before the next one starts."""
        answers: dict[int, list[str]] = {}
        asks = {question.question_id: _digest(question.turns) for question in self._questions}
        for row in _read(file, ("question_id", "question", "model_id", "max_new_tokens", "choices")):
            if (row["model_id"], row["max_new_tokens"]) != (model_id, self._max_new_tokens):
                raise ConfigError(
                    f"{file} has answers of model {row['model_id']} with max_new_tokens={row['max_new_tokens']}, but "
                    f"this run has {model_id} with {self._max_new_tokens}; choose another output_dir"
                )
            if row["question"] == asks.get(row["question_id"]):
                answers[row["question_id"]] = row["choices"][0]["turns"]
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

        A judgment in ``file`` is reused if the judge and the request are the same.
        """
        config = self._judge_config
        assert config is not None
        # Judgments without a rating are requested again, like failed ones.
        rated = [row for row in _read(file, ("judge", "request", "repeat", "score")) if row["score"] is not None]
        known = {(row["judge"], row["request"], row["repeat"]): row for row in rated}
        judgments, missing = {}, []
        for question in self._questions:
            for turn in (1, 2):
                chat = judge_chat(self._prompts, question, answers[question.question_id], turn)
                for repeat in range(config.repeats):
                    key = (question.question_id, turn, repeat)
                    if row := known.get((config.model, _digest(chat), repeat)):
                        judgments[key] = row
                    else:
                        missing.append((key, chat))

        def keep(number: int, text: str) -> None:
            key, chat = missing[number]
            judgments[key] = {
                "question_id": key[0], "turn": key[1], "repeat": key[2], "judge": config.model,
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
        """Compute the mean over answers of the median over repeats, with turn means, spread and coverage."""
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
        return {
            "score,none": _mean(every),
            "score_stderr,none": statistics.stdev(every) / math.sqrt(len(every)) if len(every) > 1 else math.nan,
            "turn_1,none": _mean(medians[1]),
            "turn_2,none": _mean(medians[2]),
            "repeat_spread,none": max(means) - min(means) if means else math.nan,
            "coverage,none": (judged - unparsable) / expected,
            "unparsable,none": unparsable,
            "missing,none": expected - judged,
        }

    def _check_coverage(self, coverage: float, failures: Counter[str], directory: Path) -> None:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in failures.most_common())
        if failures:
            log.warning(f"{failures.total()} requests to the judge failed: {reasons}")
        if coverage < self._min_coverage:
            raise RunError(
                f"only {coverage:.1%} of the judgments have a rating, min_coverage={self._min_coverage}"
                + (f" ({reasons})" if reasons else "")
                + f"; finished judgments are in {directory}; run the same command again to get the rest"
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


def read_files(data_dir: str | None) -> tuple[list[Question], dict[str, dict[str, str]]]:
    """Read questions with references, and the judge's prompts by name, from FastChat's files.

    Raises:
        ConfigError: if a file is missing or malformed.
    """
    if data_dir is None:
        raise ConfigError(f"data_dir is not set. {_HOW_TO_GET}")
    root = user_path(data_dir)
    files = [root / name for name in ("mt_bench/question.jsonl", "mt_bench/reference_answer/gpt-4.jsonl")]
    files.append(root / "judge_prompts.jsonl")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(f"data_dir={data_dir}: no {', '.join(missing)}. {_HOW_TO_GET}")
    try:
        questions, references, prompts = ([json.loads(line) for line in file.open() if line.strip()] for file in files)
        reference = {row["question_id"]: row["choices"][0]["turns"] for row in references}
        by_name = {row["name"]: row for row in prompts}
        for name in ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"):
            by_name[name]["system_prompt"], by_name[name]["prompt_template"]
        found = [
            Question(
                row["question_id"],
                row["category"],
                row["turns"],
                reference[row["question_id"]] if row["category"] in WITH_REFERENCE else None,
            )
            for row in questions
        ]
        for question in found:
            for texts in filter(None, (question.turns, question.reference)):
                if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"question {question.question_id} does not have two turns of text")
            for turn in (1, 2):  # check that all placeholders of the prompts can be filled
                judge_chat(by_name, question, ["", ""], turn)
        return found, by_name
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise ConfigError(f"data_dir={data_dir} does not have FastChat's format: {error!r}") from error


def judge_chat(prompts: dict[str, dict[str, str]], question: Question, answers: list[str], turn: int) -> Chat:
    """Build the request to grade the answer of ``turn`` (1 or 2)."""
    name = ("single-math-v1" if question.reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    if turn == 1:
        values = {"question": question.turns[0], "answer": answers[0]}
    else:
        values = {f"question_{i}": text for i, text in enumerate(question.turns[:2], start=1)}
        values |= {f"answer_{i}": text for i, text in enumerate(answers, start=1)}
    if question.reference:
        values |= {f"ref_answer_{i}": text for i, text in enumerate(question.reference[:turn], start=1)}
    system = prompts[name]["system_prompt"]
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompts[name]["prompt_template"].format(**values)}]


def parse_rating(judgment: str) -> float | None:
    """Return the first [[rating]], else the first [rating]; None if there is none or it is not in 1 to 10."""
    for pattern in _RATINGS:
        if found := pattern.search(judgment):
            rating = float(found.group(1))
            return rating if 1 <= rating <= 10 else None
    return None


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
