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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torchtune.utils import get_logger

from owlore_evals.jsonl import append_line, read_lines
from owlore_evals.judge import Chat, Judge, JudgeConfig, parse_rating
from owlore_tune.errors import ConfigError, RunError
from owlore_tune.files import user_path
from owlore_tune.training.plots import plot_radar

log = get_logger("INFO")

MT_BENCH = "mt_bench"
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories in which the judge sees gpt-4's answer
_HOW_TO_GET = (
    "FastChat's files are needed: judge_prompts.jsonl, mt_bench/question.jsonl, mt_bench/reference_answer/gpt-4.jsonl. "
    "Run `git clone https://github.com/lm-sys/FastChat` and set data_dir=FastChat/fastchat/llm_judge/data; "
    "docs/evaluation.md shows an alternative"
)
_OF_CATEGORIES = ("score,none", "score_stderr,none", "turn_1,none", "turn_2,none")

Answers = dict[int, list[str]]  # both answers by question id
Judgments = dict[tuple[int, int, int], dict[str, Any]]  # rows by (question id, turn, repeat)


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
        questions, self._prompts = read_files(data_dir)
        categories = dict.fromkeys(question.category for question in questions)
        self._categories = {name: [q for q in questions if q.category == name][:limit] for name in categories}
        self._questions = [question for some in self._categories.values() for question in some]
        self._judge_config = judge
        self._repeats = range(judge.repeats if judge else 0)
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
        judgments, failures = self._judge(answers, self._judge_config, directory / "judgments.jsonl")
        scores = {MT_BENCH: self._score(self._questions, judgments)}
        for category, questions in self._categories.items():
            score = self._score(questions, judgments)
            scores[f"{MT_BENCH}_{category}"] = {metric: score[metric] for metric in score if metric in _OF_CATEGORIES}
        self._check_coverage(scores[MT_BENCH]["coverage,none"], failures, directory)
        means = {category: scores[f"{MT_BENCH}_{category}"].get("score,none") for category in self._categories}
        rated = {category: mean for category, mean in means.items() if mean is not None}
        plot_radar(directory / "mt_bench.png", rated, highest=10)
        return _as_results(scores, self._samples(answers, judgments))

    def check_saved(self, model_id: str, directory: Path) -> None:
        """Raise ConfigError if `run` cannot continue from what is in ``directory``."""
        self._saved_answers(model_id, directory / "answers.jsonl")
        if self._judge_config is not None:
            _rated(directory / "judgments.jsonl")

    def _saved_answers(self, model_id: str, file: Path) -> Answers:
        answers = {}
        digests = {question.question_id: _digest(question.turns) for question in self._questions}
        for row in _read(file, ("question_id", "question", "model_id", "max_new_tokens", "choices")):
            if (row["model_id"], row["max_new_tokens"]) != (model_id, self._max_new_tokens):
                raise ConfigError(
                    f"{file} has answers of model {row['model_id']} with max_new_tokens={row['max_new_tokens']}, but "
                    f"this run has {model_id} with {self._max_new_tokens}; choose another output_dir"
                )
            if row["question"] == digests.get(row["question_id"]):
                answers[row["question_id"]] = row["choices"][0]["turns"]
        return answers

    def answer(self, lm: LM, model_id: str, file: Path) -> Answers:
        """Return both answers by question id. Each category is saved to ``file`` before the next one starts."""
        answers = self._saved_answers(model_id, file)
        for category, questions in self._categories.items():
            asked = [question for question in questions if question.question_id not in answers]
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
                    "question_id": question.question_id, "question": _digest(question.turns), "model_id": model_id,
                    "max_new_tokens": self._max_new_tokens, "choices": [{"index": 0, "turns": done}],
                    "tstamp": time.time(),
                }  # fmt: skip
                append_line(file, row)
        return answers

    def _generate(self, lm: LM, chats: list[Chat], category: str) -> list[str]:
        temperature = TEMPERATURES.get(category, 0.7)  # FastChat's default for other categories
        options = {
            "until": [], "max_gen_toks": self._max_new_tokens, "do_sample": temperature > 0, "temperature": temperature,
        }  # fmt: skip
        prompts = [lm.apply_chat_template(chat) for chat in chats]
        return lm.generate_until(
            [Instance("generate_until", {}, (prompt, options), number) for number, prompt in enumerate(prompts)]
        )

    def _judge(self, answers: Answers, config: JudgeConfig, file: Path) -> tuple[Judgments, Counter[str]]:
        """Return judgments, and the number of failed requests by reason.

        A judgment in ``file`` is reused if the endpoint's host, the judge and the request are the same.
        """
        known = {(row["host"], row["judge"], row["request"], row["repeat"]): row for row in _rated(file)}
        host = urlsplit(config.base_url).hostname
        judgments: Judgments = {}
        missing = []
        for question, turn, repeat in product(self._questions, (1, 2), self._repeats):
            key = (question.question_id, turn, repeat)
            chat = judge_chat(self._prompts, question, answers[question.question_id], turn)
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
        try:
            judge.ask([chat for _, chat in missing])
        except OSError as error:
            raise RunError(f"{file} cannot be written: {error}; run the same command again to resume") from error
        return judgments, Counter(judge.failures)

    def _score(self, questions: list[Question], judgments: Judgments) -> dict[str, float]:
        """The mean over answers of the median over repeats, with turn means, spread and coverage; only those that are
        numbers, since JSON has no other."""
        asked = set(product((question.question_id for question in questions), (1, 2), self._repeats))
        judged = {key: row["score"] for key, row in judgments.items() if key in asked}
        by_answer: dict[tuple[int, int], list[float]] = {}
        by_repeat: dict[int, list[float]] = {}
        for (question_id, turn, repeat), score in judged.items():
            if score is not None:
                by_answer.setdefault((question_id, turn), []).append(score)
                by_repeat.setdefault(repeat, []).append(score)
        medians = {answer: statistics.median(scores) for answer, scores in by_answer.items()}
        values = {"score": list(medians.values())}
        values |= {f"turn_{turn}": [value for key, value in medians.items() if key[1] == turn] for turn in (1, 2)}
        found = {f"{name},none": statistics.fmean(some) for name, some in values.items() if some}
        if len(medians) > 1:
            found["score_stderr,none"] = statistics.stdev(medians.values()) / math.sqrt(len(medians))
        if means := [statistics.fmean(scores) for scores in by_repeat.values()]:
            found["repeat_spread,none"] = max(means) - min(means)
        unparsable = sum(score is None for score in judged.values())
        return found | {
            "coverage,none": (len(judged) - unparsable) / len(asked),
            "unparsable,none": unparsable,
            "missing,none": len(asked) - len(judged),
        }

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

    def _samples(self, answers: Answers, judgments: Judgments) -> list[dict[str, Any]]:
        """Return one sample per answer, in the format of the harness's tracker."""
        samples = []
        for question, turn in product(self._questions, (1, 2)):
            found = [judgments.get((question.question_id, turn, repeat)) for repeat in self._repeats]
            texts = answers[question.question_id]
            chat = judge_chat(self._prompts, question, texts, turn)
            samples.append(
                {
                    "doc_id": question.question_id, "doc": {"category": question.category, "turns": question.turns},
                    "turn": turn, "target": "", "arguments": [(json.dumps(chat),)], "resps": [[texts[turn - 1]]],
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


def read_files(data_dir: str | None) -> tuple[list[Question], dict[str, dict[str, str]]]:
    """Read questions with references, and the judge's prompts by name, from FastChat's files.

    Raises:
        ConfigError: if a file is missing or malformed.
    """
    if data_dir is None:
        raise ConfigError(f"data_dir is not set. {_HOW_TO_GET}")
    root = user_path(data_dir)
    names = ("mt_bench/question", "mt_bench/reference_answer/gpt-4", "judge_prompts")
    try:
        questions, references, prompts = (
            [json.loads(line) for line in (root / f"{name}.jsonl").open() if line.strip()] for name in names
        )
        reference = {row["question_id"]: row["choices"][0]["turns"] for row in references}
        by_name = {row["name"]: row for row in prompts}
        found = []
        for row in questions:
            seen = reference[row["question_id"]] if row["category"] in WITH_REFERENCE else None
            found.append(Question(row["question_id"], row["category"], row["turns"], seen))
            for texts in filter(None, (row["turns"], seen)):
                if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"question {row['question_id']} does not have two turns of text")
            for turn in (1, 2):  # check that all placeholders of the prompts can be filled
                judge_chat(by_name, found[-1], ["", ""], turn)
    except OSError as error:
        raise ConfigError(f"data_dir={data_dir}: {error}. {_HOW_TO_GET}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"data_dir={data_dir} does not have FastChat's format: {error!r}") from error
    if not found:
        raise ConfigError(f"data_dir={data_dir}: mt_bench/question.jsonl has no questions. {_HOW_TO_GET}")
    return found, by_name


def judge_chat(prompts: dict[str, dict[str, str]], question: Question, answers: list[str], turn: int) -> Chat:
    """Build the request to grade the answer of ``turn`` (1 or 2)."""
    name = ("single-math-v1" if question.reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    values = {"question": question.turns[0], "answer": answers[0]}
    numbered = {"question": question.turns, "answer": answers, "ref_answer": question.reference or []}
    for kind, texts in numbered.items():
        values |= {f"{kind}_{number}": text for number, text in enumerate(texts, start=1)}
    system = prompts[name]["system_prompt"]
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompts[name]["prompt_template"].format(**values)}]
