"""Small copies: a builder that computes something else than config.json describes is refused, in every setting."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import BUILDER, FAMILIES, HF, LLAMA3_ROPE, SIZES, hf_model
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import TINY_MODEL
from torchtune import config as tune_config
from transformers import (
    BitNetConfig,
    DogeConfig,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)  # fmt: skip

from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.checkpoints.layouts import converters
from owlore_tune.config.load import load_config
from owlore_tune.errors import ConfigError
from owlore_tune.models import hf_decoder, twin
from owlore_tune.models.decoder import find_linears
from owlore_tune.models.hf import check_config
from owlore_tune.models.twin import check_builder
from runs import finetune, prepare

LLAMA = LlamaConfig(**SIZES).to_dict()
LLAMA2, GEMMA2, QWEN2 = "torchtune.models.llama2.llama2", "owlore_tune.models.gemma2.gemma2", FAMILIES["qwen2_5"][1]


def built(builder: str, **fields):
    with torch.device("meta"):
        return tune_config.instantiate(OmegaConf.create({"_component_": builder, **fields}))


def check(config: dict, model, model_type: str) -> None:
    check_builder(model, config, lambda narrow: converters(model_type, narrow)[0])


@pytest.mark.parametrize("family", [family for family, (_, builder, *_) in FAMILIES.items() if builder != HF])
def test_builders_of_the_families_agree(family):
    shipped, builder, differences, config = FAMILIES[family]
    check(config.to_dict(), built(builder, **(BUILDER | differences)), load_config(shipped).checkpointer.model_type)


@pytest.fixture
def compared(monkeypatch) -> list[tuple[float, str]]:
    """The differences that comparisons find, and the precision of their products."""
    found = []

    def recorded(difference):
        def compare(*pair):
            found.append((difference(*pair), torch.get_float32_matmul_precision()))
            return found[-1][0]

        return compare

    for name in ("plain_difference", "packed_difference"):
        monkeypatch.setattr(twin, name, recorded(getattr(twin, name)))
    return found


def test_products_of_a_lower_precision_do_not_change_the_comparison(compared):
    """Processors with bfloat16 products would otherwise find differences of 1e-2."""
    torch.set_float32_matmul_precision("medium")
    try:
        check(LLAMA, built(LLAMA2, **BUILDER), "LLAMA2")
        assert [precision for _, precision in compared] == ["highest"] * 2
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = LLAMA3_ROPE | {"rope_theta": 10_000.0}
OTHER = "computes something else"
OTHER_CONFIGS = {  # fields of config.json that the LLaMA-2 builder does not have, and the message
    "scaled linearly": ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}, OTHER),
    "scaled as LLaMA 3": ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}, OTHER),
    "scaled as LLaMA 3, far": ({"rope_parameters": LLAMA3, "max_position_embeddings": 8192}, OTHER),
    "YaRN": (
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, OTHER
    ),
    "rope base": ({"rope_parameters": ROPE | {"rope_theta": 2e4}}, "has rope_theta=10000.0, and config.json has 2"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act': 'gelu'"),
    "epsilon": ({"rms_norm_eps": 1e-6}, "has rms_norm_eps=1e-05, and config.json has 1e-06"),
    "heads": ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads=4, and"),
    "heads of keys": ({"num_key_value_heads": 4}, "num_key_value_heads=2, and config.json has 4"),
    "head size": ({"head_dim": 16}, "head_dim=8, and config.json has 16"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=False, and config.json has True"),
    "biases": ({"attention_bias": True}, "cannot be compared with config.json: .*bias"),
    "biases of the MLP": ({"mlp_bias": True}, "cannot be compared with config.json: .*bias"),
    "layers": ({"num_hidden_layers": 5}, "num_hidden_layers=4, and config.json has 5"),
    "vocabulary": ({"vocab_size": 301}, "vocab_size=300, and config.json has 301"),
    "width": ({"hidden_size": 64}, "hidden_size=32, and config.json has 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_CONFIGS)
def test_a_config_that_the_builder_does_not_have_is_refused(case):
    changes, message = OTHER_CONFIGS[case]
    model = built(LLAMA2, **(BUILDER | {"max_seq_len": changes.get("max_position_embeddings", 256)}))
    with pytest.raises(ValueError, match=message):
        check(LLAMA | changes, model, "LLAMA2")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_activation": "gelu"}, {"attn_logit_softcapping": 30.0}, {"final_logit_softcapping": 20.0},
        {"query_pre_attn_scalar": 16}, {"sliding_window": 32}, {"layer_types": ["full_attention"] * 4},
    ],
    ids=str,
)  # fmt: skip
def test_what_gemma_2_adds_is_compared_too(changes):
    model = built(GEMMA2, **(BUILDER | FAMILIES["gemma2"][2]))
    with pytest.raises(ValueError, match="computes something else than config.json|has attention windows"):
        check(FAMILIES["gemma2"][-1].to_dict() | changes, model, "GEMMA2")


def test_a_builder_with_biases_that_the_model_lacks_is_refused():
    config = Qwen2Config(**SIZES).to_dict() | {"model_type": "llama", "attention_bias": False}
    with pytest.raises(ValueError, match="config.json has no layers.0.attn"):
        check(config, built(QWEN2, **(BUILDER | {"norm_eps": 1e-5, "rope_base": 10_000.0})), "LLAMA2")


@pytest.mark.parametrize(("window", "most"), [(100, 100), (None, 256)])
def test_rows_end_where_a_builder_without_windows_would_see_more(window, most):
    model = built("torchtune.models.mistral.mistral", **BUILDER)
    check(MistralConfig(**SIZES, sliding_window=window).to_dict(), model, "MISTRAL")
    assert model.max_seq_len == most


# By shipped config: the number of parameters, and of some models the fields that matter of config.json on the hub
PUBLISHED = json.loads((Path(__file__).parents[1] / "fixtures" / "published_models.json").read_text())


def shipped(name: str) -> tuple[torch.nn.Module, str]:
    """The model of a shipped config, and its ``model_type``."""
    cfg = load_config(name)
    with torch.device("meta"):
        return tune_config.instantiate(cfg.model), cfg.checkpointer.model_type


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_model_is_the_published_one(name):
    model, model_type = shipped(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]["parameters"]
    assert all(find_linears(layer) for layer in model.layers)
    config = PUBLISHED[name].get("config")
    if config and model_type == "HF":
        check_config(model, config)
        with pytest.raises(ValueError, match="model.rope_parameters=.*, and config.json has"):
            check_config(model, config | {"rope_theta": 10_000.0})
    elif config:
        check(config, model, model_type)


REAL_MISTAKES = {  # models that a builder fits in shape: (config with the builder, fields of the other model's config)
    "Qwen2.5-Math-7B": ("qwen2_5/7B_owlore", {"rope_theta": 10_000.0}),
    "Mistral-7B-v0.2": ("mistral/7B_owlore", {"rope_theta": 1_000_000.0, "sliding_window": None}),
    "Phi-3-mini-128k": (
        "phi3/mini_owlore",
        {
            "max_position_embeddings": 131_072, "sliding_window": 262_144,
            "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [4.0] * 48},
        },
    ),
    "LLaMA 3 with the builder of 3.1": ("llama3_1/8B_owlore", {"rope_scaling": None}),
}  # fmt: skip


@pytest.mark.parametrize("model", REAL_MISTAKES)
def test_models_of_the_same_shape_are_told_apart(model):
    name, changes = REAL_MISTAKES[model]
    built_model, model_type = shipped(name)
    with pytest.raises(ValueError, match="has rope_theta|computes something else than|cannot be compared"):
        check(PUBLISHED[name]["config"] | changes, built_model, model_type)


# A head of its own, and a builder that ties it


@pytest.fixture
def model_dir(tiny_dir, tmp_path) -> Path:
    return shutil.copytree(tiny_dir, tmp_path / "model")


def change_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


TIED = {"_component_": "torchtune.models.llama3_2.llama3_2", "scale_factor": 1, "rope_base": 10_000}


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_a_head_of_its_own_is_not_dropped(weights, tiny_config, model_dir):
    tiny_config["model"] = dict(TINY_MODEL) | TIED
    tiny_config["owlore"]["weights"] = weights
    tiny_config["checkpointer"] |= {"model_type": "LLAMA3_2", "checkpoint_dir": str(model_dir)}
    with pytest.raises(ConfigError, match="builder has tie_word_embeddings=True, and config.json has False"):
        prepare(tiny_config)
    change_config(model_dir, tie_word_embeddings=True)  # and the weights have another head
    with pytest.raises(ConfigError, match="has an output head that differs from the embeddings"):
        prepare(tiny_config)
    stored = load_file(model_dir / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, model_dir / "model.safetensors", metadata={"format": "pt"})
    finetune(tiny_config)


# Decoders of transformers


PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
LISTED = re.search(r"pass the comparison:(.*?)\.\n", PAGE, re.DOTALL)[1].replace("(in full precision)", "")
LISTED = re.findall(r"\w+", LISTED.replace(" and ", " "))
assert len(LISTED) == len(set(LISTED)) >= 48
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16
)  # fmt: skip
MORE_SIZES = {  # of families whose defaults do not go with small sizes
    "deepseek_v2": LATENT | dict(head_dim=8, topk_method="greedy", n_group=1, topk_group=1, num_experts_per_tok=2),
    "minicpm3": LATENT, "youtu": LATENT, "hunyuan_v1_dense": dict(head_dim=16), "ministral": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16, num_experts=4, moe_topk=2),
    "nemotron": dict(head_dim=16, num_key_value_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("family", LISTED)
def test_a_family_that_the_docs_name_computes_the_same_as_transformers(family, compared):
    sizes = dict(vocab_size=310, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0)
    with torch.device("meta"):
        hf_decoder(model_type=family, **(sizes | MORE_SIZES.get(family, {})))
    assert len(compared) >= 4 and max(difference for difference, _ in compared[-4:]) < 2e-5


def test_sizes_that_follow_from_others_are_narrowed_together():
    """In transformers' configs of these families, the width of rotary embeddings gives that of heads."""
    sizes = dict(vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
    with torch.device("meta"):
        for family in ("minicpm3", "youtu"):
            model = hf_decoder(model_type=family, **sizes, qk_rope_head_dim=32, pad_token_id=0)
            assert model.config.qk_rope_head_dim == 32


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 16, "long_factor": [4.0] * 16,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_rows_end_where_rotary_embeddings_would_depend_on_the_longest():
    """In a packed row, a sample's would depend on its neighbours."""
    sizes = SIZES | {"hidden_size": 128}
    dynamic = {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}}
    with torch.device("meta"):
        assert hf_decoder(model_type="llama", **sizes, rope_parameters=LONGROPE).max_seq_len == 64
        assert hf_decoder(model_type="internlm3", **sizes, **dynamic).max_seq_len == SIZES["max_position_embeddings"]
        static = dynamic["rope_parameters"] | {"alpha": 1000.0}  # as HunYuan has it
        hunyuan = hf_decoder(model_type="hunyuan_v1_dense", **sizes, head_dim=16, rope_parameters=static)
        assert hunyuan.max_seq_len == SIZES["max_position_embeddings"]
    model = built(LLAMA2, **(BUILDER | {"max_seq_len": 1024}))
    check(LLAMA | dynamic, model, "LLAMA2")
    assert model.max_seq_len == LLAMA["max_position_embeddings"] == 256


BIDIRECTIONAL = {"use_bidirectional_attention": True, "layer_types": ["full_attention"] * 4}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DogeConfig, {"rope_parameters": LONGROPE}),
        (Gemma3TextConfig, BIDIRECTIONAL | {"rope_parameters": {"full_attention": LONGROPE}}),
    ],
)
def test_longrope_hides_nothing(config, fields):
    """Its factors are cut with the heads of the copy."""
    sizes = SIZES | {"hidden_size": 128, "head_dim": 32}
    with torch.device("meta"), pytest.raises(ValueError, match="does not reproduce|cannot be compared"):
        hf_decoder(**config(**sizes, **fields).to_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        {"rope_parameters": ROPE | {"rope_theta": 2e4}},
    ],
    ids=["heads", "rope"],
)
def test_a_decoder_of_another_directory_is_refused(changes, tmp_path):
    """``model.path`` and ``checkpointer.checkpoint_dir`` differ, and all weights fit."""
    source = hf_model(LlamaConfig(**SIZES, head_dim=8), tmp_path / "source")
    described = json.loads((source / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(described | changes))
    with torch.device("meta"):
        model = hf_decoder(str(tmp_path / "other"))
    with pytest.raises(
        ConfigError, match="model.rope_parameters=|attention or positions that OwLore does not reproduce"
    ):
        HFCheckpointer(str(source), "HF").check_model(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_multiplier": 12.0, "residual_multiplier": 0.22}, "differ from those of transformers by"),
        # Outputs in evaluations do not show it.
        ({"attention_dropout": 0.1}, "model.attention_dropout=0.0, and config.json has 0.1; config hf/any takes"),
    ],
    ids=["multipliers", "dropout"],
)
def test_fields_that_were_left_out_are_compared(fields, message, tmp_path):
    source = hf_model(GraniteConfig(**SIZES, **fields), tmp_path / "source")
    with torch.device("meta"):
        model = hf_decoder(model_type="granite", **{k: v for k, v in SIZES.items() if k != "dtype"})
    with pytest.raises(ConfigError, match=message):
        HFCheckpointer(str(source), "HF").check_model(model)


def test_a_builder_that_differs_in_one_layer_is_refused():
    model = built(LLAMA2, **BUILDER)
    model.layers[3].mlp_norm.eps = model.layers[3].sa_norm.eps = 1e-2
    with pytest.raises(ValueError, match="builder has rms_norm_eps=0.01, and config.json has 1e-05"):
        check(LLAMA, model, "LLAMA2")


@pytest.mark.parametrize("family", ["falcon_h1", "nemotron_h", "gemma3n", "gemma4_assistant"])
def test_families_that_transformers_itself_does_not_build_end_in_no_traceback(family):
    with torch.device("meta"), pytest.raises(ValueError, match=f"{family}|gemma3n_text"):
        hf_decoder(model_type=family)


# Weights that are not in full precision


def test_a_quantized_model_is_refused_by_name(model_dir, tmp_path):
    change_config(model_dir, quantization_config={"quant_method": "bitnet"})
    for model_type in ("LLAMA2", "HF"):
        with pytest.raises(ValueError, match=r"quantization_config \(bitnet\), and quantized weights"):
            HFCheckpointer(str(model_dir), model_type)
    hf_model(BitNetConfig(**SIZES), tmp_path / "bitnet")
    HFCheckpointer(str(tmp_path / "bitnet"), "HF")  # one in full precision is an ordinary model


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_of_another_type_are_refused(dtype, kind, model_dir):
    file = model_dir / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.mlp.up_proj.weight"] = stored["model.layers.1.mlp.up_proj.weight"].to(dtype)
    if kind == "bin":
        file.unlink()
        torch.save(stored, model_dir / "pytorch_model.bin")
    else:
        save_file(stored, file)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight in .* has the type .*; it is no weight in full"):
        HFCheckpointer(str(model_dir), "LLAMA2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.ones(2)}}, "has a dict at state_dict, not a tensor; convert it first"),
        ({"a": torch.eye(2).to_sparse()}, "has a tensor without plain values at a; convert it first"),
        ([torch.ones(2)], "has a list, not a dict of tensors; convert it first"),
    ],
    ids=["nested", "sparse", "list"],
)
def test_content_of_a_pytorch_file_that_is_no_tensor_is_refused(content, message, model_dir):
    (model_dir / "model.safetensors").unlink()
    torch.save(content, model_dir / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        HFCheckpointer(str(model_dir), "LLAMA2")


def test_two_complete_sets_of_weights_are_refused(model_dir):
    stored = load_file(model_dir / "model.safetensors")
    save_file(stored, model_dir / "other.safetensors")
    both = r"is in model.safetensors and in other.safetensors .* such as \[model.safetensors\]"
    with pytest.raises(ValueError, match=both):
        HFCheckpointer(str(model_dir), "LLAMA2")
    HFCheckpointer(str(model_dir), "LLAMA2", ["model.safetensors"])
    index = {"weight_map": dict.fromkeys(stored, "other.safetensors")}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has model.safetensors, and an index that names other files; choose with"):
        HFCheckpointer(str(model_dir), "LLAMA2")
