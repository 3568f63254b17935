"""A model directory with random weights in LLaMA-2's real size and layout, for machines without a hub.

Weights are created, converted and written one shard at a time, so at most one shard is in memory. A few weights are
outliers, otherwise all outlier scores would be 0. The small tokenizer is trained on the questions that ship with
lm-evaluation-harness.
"""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from owlore_tune.checkpoints.hf_weights import shards
from owlore_tune.checkpoints.layouts import Convert, converters
from owlore_tune.config.components import build
from owlore_tune.data.datasets import mmlu_dev_rows
from owlore_tune.models.decoder import find_layers


def write_random(cfg: DictConfig, directory: Path) -> None:
    """Write a model directory for the model of a config of LLaMA-2. config.json comes last: it marks a complete
    one. ``directory`` may not exist."""
    with torch.device("meta"):
        model = build("model", cfg.model)
    config = hf_config(model)
    directory.mkdir(parents=True)
    write_weights(model, converters(cfg.checkpointer.model_type, config)[1], directory)
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def write_weights(model: Any, to_hf: Convert, directory: Path) -> None:
    """Write random bfloat16 weights for ``model`` (on the meta device) in shards with an index."""
    generator = torch.Generator().manual_seed(0)
    pieces = list(shards(model, 10**9))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(tqdm(pieces, desc="Writing random weights", unit="shard"), start=1):
        name = f"model-{number:05}-of-{len(pieces):05}.safetensors"
        weights = {key: random_weight(parameter, generator) for key, parameter in shard.items()}
        converted = to_hf(weights)
        save_file({k: v.contiguous() for k, v in converted.items()}, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(converted, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_weight(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Return ones for a norm, otherwise normal values with one in 1009 multiplied by 30."""
    if parameter.ndim == 1:
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    weight = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.01, generator=generator)
    weight.view(-1)[::1009] *= 30
    return weight


def hf_config(model: Any) -> dict[str, Any]:
    """The content of transformers' config.json for ``model``."""
    layer: Any = find_layers(model)[0]
    vocab_size, hidden_size = model.tok_embeddings.weight.shape
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size,
        "hidden_size": hidden_size, "intermediate_size": layer.mlp.w1.weight.shape[0],
        "num_hidden_layers": len(find_layers(model)), "num_attention_heads": layer.attn.num_heads,
        "num_key_value_heads": layer.attn.num_kv_heads, "head_dim": layer.attn.head_dim,
        "max_position_embeddings": model.max_seq_len, "rms_norm_eps": layer.sa_norm.eps,
        "rope_theta": layer.attn.pos_embeddings.base, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE tokenizer with 2000 tokens that adds BOS like LLaMA-2's, and a small chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((f"{row['instruction']} {row['output']}" for row in mmlu_dev_rows()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(named, indent=2))
