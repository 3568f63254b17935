"""Tiny models of every shipped family, and their transformers configs."""

from pathlib import Path

import torch
from omegaconf import OmegaConf
from tiny import save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)  # fmt: skip

from owlore_tune.config.load import load_config
from owlore_tune.layers.grouped import GroupedExperts
from owlore_tune.models.experts import Experts

SIZES = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, pad_token_id=0, dtype="float32",
)  # fmt: skip
BUILDER = dict(
    vocab_size=300, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=32, intermediate_dim=48, max_seq_len=256
)
HF = "owlore_tune.models.hf_decoder"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# family: (shipped config, underlying builder, arguments that differ from BUILDER, transformers config)
FAMILIES = {
    "llama2": ("llama2/7B_owlore", "torchtune.models.llama2.llama2", {}, LlamaConfig(**SIZES)),
    "llama3": (
        "llama3/8B_owlore", "torchtune.models.llama3.llama3", {"rope_base": 500_000},
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    ),
    "llama3_1": (
        "llama3_1/8B_owlore", "torchtune.models.llama3_1.llama3_1", {},
        LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    ),
    "llama3_2": (
        "llama3_2/1B_owlore", "torchtune.models.llama3_2.llama3_2", {"scale_factor": 32},
        LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True),
    ),
    "mistral": ("mistral/7B_owlore", "torchtune.models.mistral.mistral", {}, MistralConfig(**SIZES)),
    "qwen2_5": (
        "qwen2_5/7B_owlore", "torchtune.models.qwen2.qwen2", {"norm_eps": 1e-5, "rope_base": 1_000_000.0},
        Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}),
    ),
    "qwen2_5 tied": (
        "qwen2_5/0.5B_owlore", "torchtune.models.qwen2.qwen2",
        {"norm_eps": 1e-5, "rope_base": 1_000_000.0, "tie_word_embeddings": True},
        Qwen2Config(
            **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, tie_word_embeddings=True
        ),
    ),
    "gemma2": (
        "gemma2/2B_owlore", "owlore_tune.models.gemma2.gemma2",
        {"norm_eps": 1e-5, "head_dim": 8, "sliding_window_size": 64, "query_pre_attn_scalar": 8},
        Gemma2Config(**SIZES, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
    ),
    "phi3": ("phi3/mini_owlore", "torchtune.models.phi3.phi3", {}, Phi3Config(**SIZES)),
    "qwen3": ("qwen3/8B_owlore", HF, {}, Qwen3Config(**SIZES, head_dim=16)),
    "qwen3 tied": ("qwen3/0.6B_owlore", HF, {}, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "gemma3": (
        "gemma3/1B_owlore", HF, {},
        Gemma3TextConfig(
            **SIZES, head_dim=8, sliding_window=16, sliding_window_pattern=2, query_pre_attn_scalar=8,
            final_logit_softcapping=5.0,
        ),
    ),
    "smollm3": (
        "smollm3/3B_owlore", HF, {}, SmolLM3Config(**SIZES, no_rope_layer_interval=2, tie_word_embeddings=True)
    ),
    "olmo2": ("olmo2/7B_owlore", HF, {}, Olmo2Config(**SIZES)),
    "mistral_nemo": ("mistral_nemo/12B_owlore", HF, {}, MistralConfig(**SIZES, head_dim=16, sliding_window=None)),
    "mistral with a window": ("hf/any", HF, {}, MistralConfig(**SIZES, sliding_window=16)),
    "qwen3_moe": (
        "qwen3/30B_A3B_owlore", HF, {},
        Qwen3MoeConfig(
            **SIZES, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1],
            norm_topk_prob=True,
        ),
    ),
    "qwen2_moe": (
        "hf/any", HF, {},
        Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=16
        ),
    ),
    "olmoe": ("olmoe/1B_7B_owlore", HF, {}, OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "mixtral": ("hf/any", HF, {}, MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "phi4": ("phi4/14B_owlore", HF, {}, Phi3Config(**SIZES)),
    "granite3": (
        "granite3/8B_owlore", HF, {},
        GraniteConfig(
            **SIZES, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=4.0,
            tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip


def hf_model(hf_config, directory: Path) -> Path:
    """Save a random model with transformers. Norms are random, and logits are large enough to test soft caps."""
    torch.manual_seed(0)
    hf_config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(hf_config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def hf_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()(tokens).logits


def family_config(family: str, source: Path, data: Path) -> dict:
    """Return the family's shipped config with the tiny model in ``source``, for 4 steps over 2 draws."""
    shipped, builder, differences, _ = FAMILIES[family]
    shape = {"path": str(source)} if builder == HF else BUILDER | differences
    cfg = OmegaConf.to_container(load_config(shipped), resolve=False)
    cfg |= {
        "output_dir": f"{source}_run", "model": {"_component_": builder, **shape},
        "tokenizer": {"_component_": "owlore_tune.data.HFChatTokenizer", "path": str(source), "max_seq_len": 64},
        "dataset": cfg["dataset"] | {"data_files": str(data)}, "batch_size": 4, "gradient_accumulation_steps": 1,
        "max_steps_per_epoch": 4, "save_every_n_steps": 2, "lr_scheduler": None, "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    cfg["checkpointer"]["checkpoint_dir"] = str(source)
    cfg["owlore"] |= {"num_active_layers": 2, "resample_every": 2, "outlier_threshold": 2.0}
    cfg["owlore"]["rank"] = 8
    return cfg


def group_on_cpu(model: torch.nn.Module, device: torch.device, *, sharded: bool = False) -> None:
    """Let experts compute together, as `owlore_tune.layers.grouped.group_experts` does on a GPU."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.together = GroupedExperts(module, sharded=sharded)
            module.together.join()
