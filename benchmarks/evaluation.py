"""Speed and agreement of evaluation on the torchtune model against lm-evaluation-harness's `--model hf`.

    python benchmarks/evaluation.py --data DIR [--rounds 3] [--output benchmarks/evaluation.md]
    python benchmarks/evaluation.py --data DIR --decoder [--rounds 3] [--output benchmarks/decoders.md]

DIR holds ARC-Easy and ARC-Challenge in LLM-Adapters' format (test.json); their questions are converted to the format of
the harness's arc tasks. Both models have the same SmolLM2 weights in float32 and get the same requests in interleaved
rounds. HFLM runs at the batch size that is fastest on a subset of the requests. Generation is compared with
transformers' `generate`. --decoder compares with our own evaluation of SmolLM2 as a decoder of transformers instead.
"""

import json
import random
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib.report import command, machine, parser, publish
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from owlore_evals.generation import Prompts, generate
from owlore_evals.harness import load_tasks
from owlore_evals.torchtune_lm import TorchtuneLM
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.models import hf_decoder
from owlore_tune.models.decoder import Decoder
from owlore_tune.models.smollm2 import fetch, smollm2_135m

BATCH_SIZES = (1, 4, 8, 16, 32)
NEW_TOKENS, BATCH = 64, 8
Generate = Callable[[], list[list[int]]]


def ours(directory: Path, build: Callable[[], Decoder] = smollm2_135m, model_type: str = "LLAMA3_2") -> TorchtuneLM:
    with torch.device("meta"):
        model = build()
    HFCheckpointer(str(directory), model_type).load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    return TorchtuneLM(model, HFChatTokenizer(str(directory)))


def theirs(directory: Path) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=8, device="cpu")


def arc(file: Path, num_documents: int, num_fewshot: int) -> list[Instance]:
    """Build requests like the harness's arc tasks for the first documents, each with its own random examples."""
    documents = []
    for row in json.loads(file.read_text()):
        question, *choices = re.split(r"\s*Answer\d: ", row["instruction"].split("\n\nAnswer format")[0])
        question = question.removeprefix("Please choose the correct answer to the question: ").strip()
        documents.append((f"Question: {question}\nAnswer:", choices, int(row["answer"].removeprefix("answer")) - 1))
    asked = []
    for number, (prompt, choices, _) in enumerate(documents[:num_documents]):
        examples = random.Random(number).sample(documents[num_documents:], num_fewshot)
        shots = "".join(f"{text} {options[gold]}\n\n" for text, options, gold in examples)
        asked.append([(shots + prompt, f" {choice}") for choice in choices])
    return instances(asked)


def mmlu_of_one_subject(num_documents: int) -> list[Instance]:
    """Build requests like a stock MMLU subject: all documents have the same 5 examples."""
    (task,) = load_tasks(["mmlu_dev"])
    texts = [(task.doc_to_text(doc), "ABCD"[doc["answer"]]) for doc in task.test_docs()]
    shots = "".join(f"{text} {answer}\n\n" for text, answer in texts[:5])
    return instances([[(shots + text, f" {c}") for c in "ABCD"] for text, _ in texts[5 : 5 + num_documents]])


def mmlu(num_documents: int) -> list[Instance]:
    """Build requests of our mmlu_dev: the examples are other documents of the same subject."""
    (task,) = load_tasks(["mmlu_dev"])
    task.set_config("num_fewshot", 5)
    task.build_all_requests(limit=num_documents, rank=0, world_size=1)
    return task.instances


def instances(documents: list[list[tuple[str, str]]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, idx, (None, number, 1))
        for number, pairs in enumerate(documents)
        for idx, pair in enumerate(pairs)
    ]


def generates(lm: TorchtuneLM | HFLM, prompts: list[str]) -> Generate:
    """A call that returns the new tokens of each prompt. End tokens are ignored, so that all models make as many."""
    if isinstance(lm, TorchtuneLM):
        lm.tokenizer.stop_tokens = []
        tokens = Prompts([lm.tok_encode(text) for text in prompts], NEW_TOKENS, [], 0.0, [0] * BATCH)
        return lambda: generate(tokens, lm.model, lm.tokenizer)
    lm.tokenizer.padding_side = "left"
    inputs = lm.tokenizer(prompts, return_tensors="pt", padding=True)
    lm.model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": lm.tokenizer.pad_token_id}
    return lambda: lm.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def choose_batch_size(hf: HFLM, requests: list[Instance]) -> None:
    """Set the batch size that is fastest on an eighth of the requests."""
    spent = {}
    for hf.batch_size_per_gpu in BATCH_SIZES:
        spent[hf.batch_size_per_gpu] = timed(partial(hf.loglikelihood, requests[: len(requests) // 8], True))[1]
    hf.batch_size_per_gpu = min(spent, key=spent.__getitem__)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def in_rounds(name: str, calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[list[Any], list[float]]:
    """The results of calls, and the median seconds of each in interleaved rounds."""
    results, times = {}, {who: [] for who in calls}
    for number in range(rounds):
        for who, call in calls.items():
            results[who], spent = timed(call)
            times[who].append(spent)
            print(f"round {number + 1}: {name}: {who}: {spent:.2f} s", flush=True)
    return list(results.values()), [statistics.median(spent) for spent in times.values()]


def score(name: str, requests: list[Instance], models: dict[str, LM], rounds: int) -> str:
    """A row of the table: documents per second of both models, the ratio, and the difference of results."""
    batch_size = ""
    for lm in models.values():
        if isinstance(lm, HFLM):
            choose_batch_size(lm, requests)
            batch_size = f" (batch {lm.batch_size_per_gpu})"
    calls = {who: partial(lm.loglikelihood, requests, disable_tqdm=True) for who, lm in models.items()}
    results, spent = in_rounds(name, calls, rounds)
    difference = max(abs(a - b) for (a, _), (b, _) in zip(*results, strict=True))
    chosen = [choices(requests, some) for some in results]
    flips, documents = sum(a != b for a, b in zip(*chosen, strict=True)), len(chosen[0])
    return (
        f"| {name} | {documents} | {documents / spent[0]:.2f} | {documents / spent[1]:.2f}{batch_size} "
        f"| {spent[1] / spent[0]:.2f} | {difference:.1e} of {len(requests)} | {flips} |"
    )


def choices(requests: list[Instance], results: list[tuple[float, bool]]) -> list[int]:
    """Return the most likely choice of each document."""
    by_document: dict[int, list[float]] = {}
    for request, (value, _) in zip(requests, results, strict=True):
        by_document.setdefault(request.doc_id, []).append(value)
    return [values.index(max(values)) for values in by_document.values()]


def generation(prompts: list[str], models: dict[str, LM], rounds: int) -> str:
    """A row of the table: new tokens per second of both models."""
    calls = {who: generates(lm, prompts) for who, lm in models.items()}
    in_rounds("warm-up", calls, 1)
    made, spent = in_rounds("generation", calls, rounds)
    same = sum(a == b for a, b in zip(*made, strict=True))
    rates = [f"{BATCH * NEW_TOKENS / each:.1f}" for each in spent]
    return f"| {rates[0]} | {rates[1]} | {spent[1] / spent[0]:.2f} | {same} of {BATCH} |"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--decoder", action="store_true", help="compare decoders of transformers and torchtune")
    args = arguments.parse_args()
    directory = fetch()
    if args.decoder:
        title, part = "Evaluation of a decoder of transformers", 3
        models = {"transformers' decoder": ours(directory, partial(hf_decoder, str(directory)), "HF")}
        models["torchtune's"] = ours(directory)
    else:
        title, part = "Evaluation against `lm_eval --model hf`", 1
        models = {"ours": ours(directory), "hf": theirs(directory)}
    easy, challenge = (args.data / name / "test.json" for name in ("ARC-Easy", "ARC-Challenge"))
    tasks = {
        "ARC-Easy form, 0-shot": arc(easy, 120 // part, 0),
        "ARC-Challenge form, 5-shot": arc(challenge, 32 // part, 5),
        "MMLU dev, 5-shot, own examples": mmlu(80 // part),
        "MMLU dev, 5-shot, shared examples": mmlu_of_one_subject(80 // part),
    }
    prompts = [request.args[0] for request in tasks["ARC-Easy form, 0-shot"][:: 4 * 4]][:BATCH]
    first, second = models
    lines = [
        f"# {title}",
        "",
        f"SmolLM2-135M, float32 on the CPU, the same requests in {args.rounds} interleaved rounds; {machine()}. "
        f"Command: {command()}.",
        "",
        f"| requests | documents | {first}, docs/s | {second}, docs/s | ratio | largest difference, nats "
        "| changed choices |",
        "|---|---|---|---|---|---|---|",
        *(score(name, requests, models, args.rounds) for name, requests in tasks.items()),
        "",
        f"Greedy generation, batch {BATCH}, {NEW_TOKENS} new tokens each:",
        "",
        f"| {first}, tokens/s | {second}, tokens/s | ratio | same text |",
        "|---|---|---|---|",
        generation(prompts, models, args.rounds),
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
