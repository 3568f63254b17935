"""Speed and agreement of evaluation on the torchtune model against lm-evaluation-harness's `--model hf`.

    python benchmarks/evaluation.py --data DIR [--rounds 3] [--output benchmarks/evaluation.md]

DIR holds ARC-Easy and ARC-Challenge in LLM-Adapters' format (test.json); their questions are converted to the format of
the harness's arc tasks. Both models have the same SmolLM2 weights in float32 and get the same requests in interleaved
rounds. HFLM runs at the batch size that is fastest on a subset of the requests. Generation is compared with
transformers' `generate`.
"""

import json
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lib.report import command, machine, parser, publish
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from owlore_evals.generation import Prompts, generate
from owlore_evals.harness import load_tasks
from owlore_evals.torchtune_lm import TorchtuneLM
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.models.decoder import Decoder
from owlore_tune.models.smollm2 import fetch, smollm2_135m

BATCH_SIZES = (1, 4, 8, 16, 32)
NEW_TOKENS, BATCH = 64, 8


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


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def score(name: str, requests: list[Instance], our_lm: TorchtuneLM, hf: HFLM, rounds: int) -> str:
    """Return a row of the table: documents per second of both, the ratio, and the difference of results."""
    documents = len({request.doc_id for request in requests})
    part = requests[: len(requests) // 8]
    batch_seconds = {}
    for hf.batch_size_per_gpu in BATCH_SIZES:
        batch_seconds[hf.batch_size_per_gpu] = seconds(lambda: hf.loglikelihood(part, disable_tqdm=True))
    best = hf.batch_size_per_gpu = min(batch_seconds, key=batch_seconds.__getitem__)
    results: dict[str, list] = {}
    times: dict[str, list[float]] = {"ours": [], "hf": []}
    for number in range(rounds):
        for who, lm in (("ours", our_lm), ("hf", hf)):
            run = lambda lm=lm, who=who: results.update({who: lm.loglikelihood(requests, disable_tqdm=True)})  # noqa: E731
            times[who].append(seconds(run))
            print(f"round {number + 1}: {name}: {who}: {documents / times[who][-1]:.2f} documents/s", flush=True)
    difference = max(abs(a - b) for (a, _), (b, _) in zip(results["ours"], results["hf"], strict=True))
    flips = sum(
        a != b for a, b in zip(choices(requests, results["ours"]), choices(requests, results["hf"]), strict=True)
    )
    rate, hf_rate = (documents / statistics.median(times[who]) for who in ("ours", "hf"))
    return (
        f"| {name} | {documents} | {rate:.2f} | {hf_rate:.2f} (batch {best}) | {rate / hf_rate:.2f} "
        f"| {difference:.1e} of {len(requests)} | {flips} |"
    )


def choices(requests: list[Instance], results: list[tuple[float, bool]]) -> list[int]:
    """Return the most likely choice of each document."""
    by_document: dict[int, list[float]] = {}
    for request, (value, _) in zip(requests, results, strict=True):
        by_document.setdefault(request.doc_id, []).append(value)
    return [values.index(max(values)) for values in by_document.values()]


def generation(prompts: list[str], our_lm: TorchtuneLM, hf: HFLM, rounds: int) -> str:
    """Return a row: new tokens per second of both. End tokens are ignored, so both generate the same number."""
    our_lm.tokenizer.stop_tokens = []
    tokens = Prompts([our_lm.tok_encode(text) for text in prompts], NEW_TOKENS, [], 0.0, [0] * BATCH)
    hf.tokenizer.padding_side = "left"
    inputs = hf.tokenizer(prompts, return_tensors="pt", padding=True)
    hf.model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": hf.tokenizer.pad_token_id}
    calls = {
        "ours": lambda: generate(tokens, our_lm.model, our_lm.tokenizer),
        "hf": lambda: hf.model.generate(**inputs, **options),
    }
    made = {who: call() for who, call in calls.items()}  # warm-up
    same = sum(a == b.tolist()[inputs["input_ids"].shape[1] :] for a, b in zip(made["ours"], made["hf"], strict=True))
    times: dict[str, list[float]] = {who: [] for who in calls}
    for number in range(rounds):
        for who, call in calls.items():
            times[who].append(seconds(call))
            rate = BATCH * NEW_TOKENS / times[who][-1]
            print(f"round {number + 1}: generation: {who}: {rate:.1f} tokens/s", flush=True)
    rate, hf_rate = (BATCH * NEW_TOKENS / statistics.median(times[who]) for who in ("ours", "hf"))
    return f"| {rate:.1f} | {hf_rate:.1f} | {rate / hf_rate:.2f} | {same} of {BATCH} |"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=3)
    args = arguments.parse_args()
    directory = fetch()
    our_lm, hf = ours(directory), theirs(directory)
    easy, challenge = (args.data / name / "test.json" for name in ("ARC-Easy", "ARC-Challenge"))
    tasks = {
        "ARC-Easy form, 0-shot": arc(easy, 120, 0),
        "ARC-Challenge form, 5-shot": arc(challenge, 32, 5),
        "MMLU dev, 5-shot, own examples": mmlu(80),
        "MMLU dev, 5-shot, shared examples": mmlu_of_one_subject(80),
    }
    rows = [score(name, requests, our_lm, hf, args.rounds) for name, requests in tasks.items()]
    prompts = [request.args[0] for request in tasks["ARC-Easy form, 0-shot"][:: 4 * 11]][:BATCH]
    lines = [
        "# Evaluation against `lm_eval --model hf`",
        "",
        f"SmolLM2-135M, float32 on the CPU, the same requests in {args.rounds} interleaved rounds; {machine()}. "
        f"Command: {command()}.",
        "",
        "| requests | documents | ours, docs/s | hf, docs/s | ratio | largest difference, nats | changed choices |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Greedy generation, batch {BATCH}, {NEW_TOKENS} new tokens each, against transformers' `generate`:",
        "",
        "| ours, tokens/s | hf, tokens/s | ratio | same text |",
        "|---|---|---|---|",
        generation(prompts, our_lm, hf, args.rounds),
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
