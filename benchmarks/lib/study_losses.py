"""What a trained SmolLM2 has learned, and what it has forgotten, from its saved weights. In float32, one row a sample.

Products are computed from bfloat16 copies, as in training.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lib.study_runs import DEVICE, SEQ_LEN
from torch import Tensor
from tqdm import tqdm

from owlore_tune.checkpoints.checkpointer import HFCheckpointer
from owlore_tune.data.builders import instruction_dataset, mmlu_dev_rows
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.models.smollm2 import fetch, smollm2_135m

IGNORED = -100


@torch.no_grad()
def held_out_loss(weights: Path, rows: list[dict[str, Any]]) -> float:
    """The mean loss over the tokens of the answers."""
    return _mean_loss(weights, _samples(rows))


@torch.no_grad()
def general_loss(weights: Path) -> float:
    """The mean loss over all tokens of 45 MMLU dev questions and their worked answers, which no run trains on."""
    tokenizer = HFChatTokenizer(str(fetch()), SEQ_LEN)
    texts = [f"{row['instruction']}\n{row['output']}" for row in mmlu_dev_rows("held_out")]
    return _mean_loss(weights, [(ids, ids) for ids in (tokenizer.encode(text)[:SEQ_LEN] for text in texts)])


@torch.no_grad()
def divergence(weights: Path, rows: list[dict[str, Any]]) -> float:
    """KL(p₀ ‖ p) in nats, where p₀ is the model before training: the mean over the tokens of the prompts, which no run
    trains on."""
    models = [_model(directory) for directory in (fetch(), weights)]
    prompts = [tokens[: [label != IGNORED for label in labels].index(True)] for tokens, labels in _samples(rows)]
    total, count = 0.0, 0
    for tokens, labels in _batches([(ids, ids) for ids in prompts], "KL"):
        kept = labels != IGNORED
        before, after = (F.log_softmax(model(tokens)[kept].float(), dim=-1) for model in models)
        total += F.kl_div(after, before, reduction="sum", log_target=True).item()
        count += len(before)
    return total / count


def _samples(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each row."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rows, file)
        file.flush()
        dataset = instruction_dataset(HFChatTokenizer(str(fetch()), SEQ_LEN), data_files=file.name)
    return [(sample["tokens"], sample["labels"]) for sample in (dataset[i] for i in range(len(dataset)))]


def _model(weights: Path) -> Any:
    with torch.device("meta"):
        model = smollm2_135m()
    HFCheckpointer(str(weights), "LLAMA3_2").load_checkpoint(model, dtype=torch.float32, device=torch.device(DEVICE))
    return model.eval()


def _batches(
    samples: list[tuple[list[int], list[int]]], name: str, batch_size: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded tokens and labels, (b, s) each, of rows of similar lengths."""
    samples = sorted(samples, key=lambda sample: len(sample[0]))
    for start in tqdm(range(0, len(samples), batch_size), desc=name, leave=False):
        some = samples[start : start + batch_size]
        longest = len(some[-1][0])
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in some])
        labels = torch.tensor([own + [IGNORED] * (longest - len(own)) for _, own in some])
        yield tokens.to(DEVICE), labels.to(DEVICE)


def _mean_loss(weights: Path, samples: list[tuple[list[int], list[int]]]) -> float:
    model, loss_fn = _model(weights), LinearCrossEntropyLoss()  # applies the head only to positions with a label
    loss_fn.set_model_output(model)
    total, count = 0.0, 0
    for tokens, labels in _batches(samples, "Held-out loss"):
        some = int((labels[:, 1:] != IGNORED).sum())
        total += loss_fn(model(tokens)[:, :-1], labels[:, 1:]).item() * some
        count += some
    return total / count
