"""What a trained SmolLM2 has learned, and what it has forgotten, from its saved weights. In float32, one row a sample.

On a CPU with AMX, products are computed from bfloat16 copies, as in training.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lib.study_runs import DEVICE, SEQ_LEN
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_sft
from tqdm import tqdm

from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.data.datasets import instruction_dataset, mmlu_dev_rows
from owlore_tune.data.loader import HeldOutData
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.distributed.world import ALONE
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.models.smollm2 import fetch, smollm2_135m
from owlore_tune.training import validation

Sample = dict[str, list[int]]  # tokens and labels


def held_out_loss(weights: Path, rows: list[dict[str, Any]]) -> float:
    """The mean loss over the tokens of the answers."""
    return _mean_loss(weights, _samples(rows))


def general_loss(weights: Path) -> float:
    """The mean loss over all tokens of 45 MMLU dev questions and their worked answers, which no run trains on."""
    tokenizer = HFChatTokenizer(str(fetch()), SEQ_LEN)
    texts = [f"{row['instruction']}\n{row['output']}" for row in mmlu_dev_rows("held_out")]
    return _mean_loss(weights, [_text(tokenizer.encode(text)[:SEQ_LEN]) for text in texts])


@torch.no_grad()
def divergence(weights: Path, rows: list[dict[str, Any]]) -> float:
    """KL(p₀ ‖ p) in nats, where p₀ is the model before training: the mean over the tokens of the prompts, which no run
    trains on."""
    models = [_model(directory) for directory in (fetch(), weights)]
    total, count = 0.0, 0
    for batch in tqdm(_data([_prompt(sample) for sample in _samples(rows)]), desc="KL", leave=False):
        tokens, is_token = batch["tokens"].to(DEVICE), batch["labels"].to(DEVICE) != CROSS_ENTROPY_IGNORE_IDX
        before, after = (F.log_softmax(model(tokens)[is_token].float(), dim=-1) for model in models)
        total += F.kl_div(after, before, reduction="sum", log_target=True).item()
        count += len(before)
    return total / count


def _samples(rows: list[dict[str, Any]]) -> list[Sample]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rows, file)
        file.flush()
        dataset = instruction_dataset(HFChatTokenizer(str(fetch()), SEQ_LEN), data_files=file.name)
    return [dataset[i] for i in range(len(dataset))]


def _text(tokens: list[int]) -> Sample:
    """A sample with a label at every token."""
    return {"tokens": tokens, "labels": tokens}


def _prompt(sample: Sample) -> Sample:
    """The tokens before the first label."""
    return _text(sample["tokens"][: [label != CROSS_ENTROPY_IGNORE_IDX for label in sample["labels"]].index(True)])


def _data(samples: list[Sample]) -> HeldOutData:
    """Batches of rows of similar lengths."""
    return HeldOutData(sorted(samples, key=lambda sample: len(sample["tokens"])), padded_collate_sft, batch_size=8)


def _model(weights: Path) -> Any:
    with torch.device("meta"):
        model = smollm2_135m()
    HFCheckpointer(str(weights), "LLAMA3_2").load_checkpoint(model, dtype=torch.float32, device=torch.device(DEVICE))
    return model.eval()


def _mean_loss(weights: Path, samples: list[Sample]) -> float:
    model, loss_fn = _model(weights), LinearCrossEntropyLoss()  # applies the head only to positions with a label
    loss_fn.set_model_output(model)
    return validation.held_out_loss(model, loss_fn, _data(samples), torch.device(DEVICE), ALONE)[0]
