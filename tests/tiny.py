"""A tiny random LLaMA and its tokenizer."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtune.models.llama2 import llama2

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llama(num_layers: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, vocab_size: int = 64):
    """Build a LLaMA-2 of width 32 with random untied weights, some of them outliers."""
    torch.manual_seed(seed)
    model = llama2(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        intermediate_dim=48,
        max_seq_len=64,
    )
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.1)
                    parameter.view(-1)[:: 97 - 10 * i] *= 30
    return model.to(dtype)


def save_tokenizer(directory: Path, special: tuple[str, ...] = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")):
    """Save a byte-level BPE tokenizer with 300 entries and a chat template, in Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the quick brown fox answers questions about the lazy dog"] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": TEMPLATE}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # not the class that AutoTokenizer has for the model
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


TINY_MODEL = {
    "_component_": "torchtune.models.llama2.llama2", "vocab_size": 300, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48, "max_seq_len": 256,
}  # fmt: skip
