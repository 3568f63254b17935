"""Evaluation speed of SmolLM2 as a decoder of transformers against the same model as a decoder of torchtune.

    python benchmarks/decoders.py --data DIR [--rounds 3] [--output benchmarks/decoders.md]

DIR is that of evaluation.py. Both decoders have the same weights in float32, and get the same requests in interleaved
rounds from the same harness model.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from evaluation import BATCH, NEW_TOKENS, arc, choices, mmlu, mmlu_of_one_subject, ours, seconds
from lib.report import command, machine, parser, publish

from owlore_evals.generation import Prompts, generate
from owlore_tune.models import hf_decoder
from owlore_tune.models.smollm2 import fetch


def interleaved(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each call."""
    times = [[seconds(call) for call in calls] for _ in range(rounds)]
    return [statistics.median(of_call) for of_call in zip(*times, strict=True)]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=3)
    args = arguments.parse_args()
    directory = fetch()
    models = [ours(directory, partial(hf_decoder, str(directory)), "HF"), ours(directory)]
    tasks = {
        "ARC-Easy form, 0-shot": arc(args.data / "ARC-Easy" / "test.json", 40, 0),
        "ARC-Challenge form, 5-shot": arc(args.data / "ARC-Challenge" / "test.json", 8, 5),
        "MMLU dev, 5-shot, own examples": mmlu(10),
        "MMLU dev, 5-shot, shared examples": mmlu_of_one_subject(30),
    }
    rows = []
    for name, requests in tasks.items():
        calls = [lambda lm=lm, some=requests: lm.loglikelihood(some, disable_tqdm=True) for lm in models]
        chosen = [choices(requests, call()) for call in calls]
        flips = sum(a != b for a, b in zip(*chosen, strict=True))
        rates = [len(chosen[0]) / spent for spent in interleaved(calls, args.rounds)]
        rows.append(
            f"| {name} | {len(chosen[0])} | {rates[0]:.2f} | {rates[1]:.2f} | {rates[0] / rates[1]:.2f} | {flips} |"
        )
    prompts = [request.args[0] for request in tasks["ARC-Easy form, 0-shot"][:: 4 * 4]][:BATCH]
    calls = []
    for lm in models:
        lm.tokenizer.stop_tokens = []  # all generate the same number
        tokens = Prompts([lm.tok_encode(text) for text in prompts], NEW_TOKENS, [], 0.0, [0] * BATCH)
        calls.append(lambda lm=lm, tokens=tokens: generate(tokens, lm.model, lm.tokenizer))
    same = sum(a == b for a, b in zip(*(call() for call in calls), strict=True))
    rates = [BATCH * NEW_TOKENS / spent for spent in interleaved(calls, args.rounds)]
    lines = [
        "# Evaluation of a decoder of transformers",
        "",
        f"SmolLM2-135M, float32 on the CPU, the same requests in {args.rounds} interleaved rounds; {machine()}. "
        f"Command: {command()}.",
        "",
        "| requests | documents | transformers' decoder, docs/s | torchtune's, docs/s | ratio | changed choices |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Greedy generation, batch {BATCH}, {NEW_TOKENS} new tokens each:",
        "",
        "| transformers' decoder, tokens/s | torchtune's, tokens/s | ratio | same text |",
        "|---|---|---|---|",
        f"| {rates[0]:.1f} | {rates[1]:.1f} | {rates[0] / rates[1]:.2f} | {same} of {BATCH} |",
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
