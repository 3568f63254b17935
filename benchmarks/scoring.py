"""Time to score SmolLM2's layers, against plain forward passes on the same batches.

    python benchmarks/scoring.py [--output benchmarks/scoring.md]

8 packed batches of 2 × 512 tokens, float32, interleaved rounds.
"""

import statistics
import time

import torch
from report import command, machine, parser, publish
from torchtune.data import padded_collate_packed

from owlore_tune.checkpoints.checkpointer import HFCheckpointer
from owlore_tune.data.builders import mmlu_dev_dataset
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.layers.scores import layer_scores
from owlore_tune.models.smollm2 import fetch, smollm2_135m

ROUNDS, NUM_BATCHES = 5, 8


def main() -> None:
    args = parser(__doc__).parse_args()
    directory = str(fetch())
    with torch.device("meta"):
        model = smollm2_135m()
    checkpointer = HFCheckpointer(directory, "LLAMA3_2")
    checkpointer.load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    dataset = mmlu_dev_dataset(HFChatTokenizer(directory, max_seq_len=512), packed=True)
    batches = []
    for i in range(NUM_BATCHES):
        batch = padded_collate_packed([dataset[2 * i], dataset[2 * i + 1]])
        del batch["labels"]
        batches.append(batch)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    ratios, times = [], {"plain forward passes": [], "scores": []}
    forward()
    for _ in range(ROUNDS):
        for name, call in (
            ("plain forward passes", forward),
            ("scores", lambda: layer_scores(model, "outlier", batches)),
        ):
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
        ratios.append(times["scores"][-1] / times["plain forward passes"][-1])
    lines = [
        "# Time to score SmolLM2's layers",
        "",
        f"{NUM_BATCHES} batches of 2 × 512 tokens, float32, {ROUNDS} interleaved rounds; {machine()}. "
        f"Command: {command()}.",
        "",
        "| | median, s |",
        "|---|---|",
        *(f"| {name} | {statistics.median(values):.2f} |" for name, values in times.items()),
        f"| ratio, median of pairs | {statistics.median(ratios):.2f} |",
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
