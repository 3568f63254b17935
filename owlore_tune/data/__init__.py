"""Datasets, the tokenizer, and the order in which a run reads its rows."""

from owlore_tune.data.datasets import (
    chat_dataset,
    gsm8k_dataset,
    instruction_dataset,
    mmlu_dev_dataset,
    mmlu_train_dataset,
)
from owlore_tune.data.tokenizer import HFChatTokenizer

__all__ = [
    "HFChatTokenizer", "chat_dataset", "gsm8k_dataset", "instruction_dataset", "mmlu_dev_dataset", "mmlu_train_dataset",
]  # fmt: skip
