"""Decoders of transformers: equal to torchtune's on the same weights, in all settings, and what they refuse."""

import json

import pytest
import torch
from families import FAMILIES, HF, SIZES, family_config, hf_logits, hf_model
from near import assert_same_shares
from omegaconf import OmegaConf
from ranks import furthest, train_together
from safetensors.torch import load_file, save_file
from transformers import (
    CodeGenConfig,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteMoeConfig,
    GraniteSWAConfig,
    HrmTextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Starcoder2Config,
    T5Config,
)  # fmt: skip

from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.config.load import load_config
from owlore_tune.errors import ConfigError
from owlore_tune.layers import layer_scores
from owlore_tune.models import hf_decoder, smollm2_135m
from owlore_tune.models.attention import attend_by_sample
from owlore_tune.models.decoder import cached_values, hidden_states, layer_inputs
from owlore_tune.training.records import read_records
from runs import checkpoints, finetune, finetune_until, prepare, read_weights, save, variant, weights

OF_TRANSFORMERS = [family for family, (_, builder, *_) in FAMILIES.items() if builder == HF]

NOT_REPRODUCED = "attention or positions that OwLore does not reproduce"
EXPERTS = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")


def loaded(directory, build=None, model_type="HF"):
    with torch.device("meta"):
        model = build() if build else hf_decoder(str(directory))
    checkpointer = HFCheckpointer(str(directory), model_type)
    checkpointer.load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    return model.eval()


def packed(lengths: list[int], vocab_size: int = 300) -> dict[str, torch.Tensor]:
    """Return two rows of random tokens with samples of ``lengths``, and their masks and positions."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    samples = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (samples[:, None] == samples).tril()
    tokens = torch.randint(vocab_size, (2, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "mask": mask.expand(2, -1, -1), "input_pos": positions.expand(2, -1)}


@pytest.mark.parametrize("rows", ["plain", "packed"])
def test_smollm2_has_the_outputs_and_scores_of_torchtunes_decoder(rows, smollm2_dir):
    theirs = loaded(smollm2_dir, smollm2_135m, "LLAMA3_2")
    ours = loaded(smollm2_dir)
    batch = packed([40, 1, 23], 49_000)
    if rows == "plain":
        batch = {"tokens": batch["tokens"]}
    with torch.no_grad():
        expected, got = theirs(**batch), ours(**batch)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        attend_by_sample(ours)
        assert (ours(**batch) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert_same_shares(*(layer_scores(model, "outlier", [batch]) for model in (ours, theirs)), theirs)


def test_16_bit_attention_on_a_cpu_is_that_of_transformers(tmp_path):
    """Rows and samples are padded there."""
    source = hf_model(LlamaConfig(**SIZES), tmp_path / "source")
    ours = loaded(source).to(torch.bfloat16)
    for batch in (packed([30, 1, 20]), {"tokens": packed([45])["tokens"]}):
        with torch.no_grad():
            ours.config._attn_implementation = "owlore"
            expected = ours(**batch).float()
            attend_by_sample(ours)
            assert (ours(**batch).float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "basis", "most"), [(None, "svd", 1e-5), (16, "svd", 1e-5), (16, "randomized", 1e-3)])
def test_smollm2_trains_as_torchtunes_decoder(rank, basis, most, smollm2_dir, tmp_path):
    """4 steps over 2 draws. A large eps keeps Adam from amplifying rounding errors.

    Exact bases are the same. torchtune orders the rows of queries and keys differently, and parameters too, so the
    random sketches of randomized bases are others.
    """
    cfg = OmegaConf.to_container(load_config("smollm2/135M_owlore"), resolve=False)
    cfg |= {
        "output_dir": str(tmp_path / "torchtune"), "dataset_val": None, "max_steps_per_epoch": 4, "batch_size": 2,
        "lr_scheduler": None, "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    cfg["checkpointer"]["checkpoint_dir"] = str(smollm2_dir)
    cfg["tokenizer"]["max_seq_len"] = 128
    cfg["owlore"] |= {"num_active_layers": 2, "resample_every": 2, "calibration_batches": 2}
    cfg["owlore"] |= {"rank": rank, "basis": basis}
    cfg["optimizer"] |= {"lr": 3e-4, "eps": 1e-3}
    other = variant(cfg, "transformers", checkpointer__model_type="HF")
    other["model"] = {"_component_": HF, "path": str(smollm2_dir)}
    one, two = finetune(cfg), finetune(other)
    assert [d["active"] for d in one.report.records.draws] == [d["active"] for d in two.report.records.draws]
    assert len(one.report.records.draws) == 2
    assert furthest(cfg, other) < most


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=None),
        MistralConfig(**SIZES, sliding_window=16),
        # Their layers do not tell their attention about the window.
        Qwen2MoeConfig(**SIZES, num_experts=4, use_sliding_window=True, max_window_layers=2, sliding_window=16),
        PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=16),
    ],
    ids=lambda config: f"{config.model_type}, window {config.sliding_window}",
)
def test_packed_rows_are_samples_on_their_own(config, tmp_path):
    """Also the layers one by one, and with samples longer than the window."""
    source = hf_model(config, tmp_path / "source")
    model = loaded(source)
    lengths = [30, 1, 20]
    batch = packed(lengths)
    expected = torch.cat([hf_logits(source, tokens) for tokens in batch["tokens"].split(lengths, dim=1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), expected, atol=2e-4, rtol=0)
        attend_by_sample(model)
        torch.testing.assert_close(model(**batch), expected, atol=2e-4, rtol=0)
        hidden, arguments = layer_inputs(model, **batch)
        for layer, of_layer in zip(model.layers, arguments, strict=True):
            hidden = layer(hidden, **of_layer)
        torch.testing.assert_close(model.norm(hidden), hidden_states(model, **batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "granite3", "qwen3_moe"])
@pytest.mark.parametrize(
    "changes",
    [
        {"owlore__weights": "int8", "owlore__products": "int8"},
        {"owlore__weights": "nf4"},
        {"enable_activation_checkpointing": False, "loss": {"_component_": "torch.nn.CrossEntropyLoss"}},
        {"loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=["int8", "nf4", "all logits", "chunked logits", "compiled"],
)
def test_other_settings_train_alike(family, changes, tmp_path, tiny_data):
    """Frozen layers stay bit for bit, and training equals that with the default settings, or is near it."""
    source = hf_model(FAMILIES[family][-1], tmp_path / "source")
    cfg = family_config(family, source, tiny_data)
    cfg["tokenizer"]["max_seq_len"] = 32
    other = variant(cfg, "other", **changes)
    recipes = finetune(cfg), finetune(other)
    quantized = "owlore__weights" in changes
    assert_same_shares(recipes[0].scores.scores, recipes[1].scores.scores, recipes[0].model)
    losses = [[step["loss"] for step in read_records(recipe.run.path / "steps.jsonl")] for recipe in recipes]
    assert losses[0] == pytest.approx(losses[1], rel=0.1 if quantized else 1e-4)
    never = set(range(4)).difference(*(draw["active"] for draw in recipes[1].report.records.draws))
    before, after = read_weights(source), weights(other)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if any(name.startswith(f"model.layers.{index}.") for index in never) or ".layers." not in name:
            assert torch.equal(weight, before[name])


@pytest.mark.slow
def test_families_resume_bit_for_bit_and_train_on_two_ranks_as_on_one(tmp_path, tiny_data):
    """On two ranks, experts compute together, as on GPUs."""
    singles, pairs = [], []
    for family in OF_TRANSFORMERS:
        source = hf_model(FAMILIES[family][-1], tmp_path / family.replace(" ", "_"))
        cfg = family_config(family, source, tiny_data)
        cfg["optimizer"] |= {"eps": 1e-3}
        if family in EXPERTS:  # one with fewer tokens than the rank has a basis with arbitrary columns
            cfg["owlore"]["rank"] = None
        broken = variant(cfg, "broken")
        finetune(cfg)
        finetune_until(broken, 3)
        finetune(broken | {"resume_from_checkpoint": True})
        resumed = weights(broken)
        assert all(torch.equal(weight, resumed[name]) for name, weight in weights(cfg).items()), family
        singles.append(cfg)
        pairs.append(variant(cfg, "pair_grouped" if family in EXPERTS else "pair", batch_size=2))
    train_together(2, *pairs)
    for one, two in zip(singles, pairs, strict=True):
        assert furthest(one, two) < 1e-6, two["output_dir"]


@pytest.mark.slow
def test_sharded_experts_in_the_projected_form_compute_together(tmp_path, tiny_data):
    source = hf_model(FAMILIES["mixtral"][-1], tmp_path / "source")
    apart = variant(family_config("mixtral", source, tiny_data), "apart", batch_size=2)
    together = variant(apart, "grouped")
    train_together(2, apart, together)
    assert 0 < furthest(apart, together) < 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "model_type=t5 has an encoder and a decoder"),
        (MambaConfig(num_hidden_layers=2), "model_type=mamba has layers that are neither full nor sliding attention"),
        (Gemma2Config(num_hidden_layers=2), "model_type=gemma2 has caps on attention logits"),
        (GraniteMoeConfig(num_hidden_layers=2), "model_type=granitemoe has experts .GraniteMoeExperts. in a form that"),
        (DeepseekV3Config(num_hidden_layers=4), "mlp.gate.e_score_correction_bias of layer 3 is in checkpoints but"),
        (HrmTextConfig(), "model_type=hrm_text has weights in another form on disk"),
        (GPT2Config(n_layer=2), "norm cannot be identified; its base model has wpe, ln_f"),
        (CodeGenConfig(n_layer=2), "model_type=codegen is no causal decoder with exchangeable attention"),
        (GPTJConfig(n_layer=2), "model_type=gptj is no causal decoder with exchangeable attention"),
        (GraniteSWAConfig(num_hidden_layers=2), "layer 0 has attention sinks"),
        (PhiConfig(num_hidden_layers=2, tie_word_embeddings=True), "PhiForCausalLM has a bias in a head that is tied"),
        (DogeConfig(num_hidden_layers=2), NOT_REPRODUCED),  # a mask of its own
        (Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True), NOT_REPRODUCED),
        (
            DeepseekV2Config(num_hidden_layers=2, q_lora_rank=64, topk_method="none of them"),
            "model_type=deepseek_v2 cannot be compared with transformers",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_cannot_be_trained_are_refused_by_name(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        hf_decoder(**config.to_dict())


def test_tensors_that_transformers_leaves_out_are_left_out(tmp_path):
    """Buffers that older versions of transformers saved, as in Pythia's files."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    source = hf_model(GPTNeoXConfig(**sizes), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    old = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)}
    old["rotary_emb.inv_freq"] = torch.ones(4)
    more = {f"gpt_neox.layers.0.attention.{name}": tensor for name, tensor in old.items()}
    save_file(weights | more, source / "model.safetensors", metadata={"format": "pt"})
    model = loaded(source)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens), hf_logits(source, tokens), atol=2e-4, rtol=0)
    assert cached_values(model) == 2 * model.config.hidden_size * len(model.layers)
    save_file(weights | {"gpt_neox.layers.0.attention.other": torch.ones(3)}, source / "model.safetensors")
    with pytest.raises(ConfigError, match="no such parameter at layers.0.attention.other"):
        loaded(source)


@pytest.mark.parametrize("config", [PhiConfig, CohereConfig, Starcoder2Config, GPTNeoXConfig])
def test_other_names_and_kinds_of_parts(config, tmp_path):
    """Another name of the final norm, biases, dropout modules, logits with a scale, and other names on disk."""
    dropout = {"embedding_dropout": 0.5} if config is Starcoder2Config else {}  # in the base model's own forward
    source = hf_model(config(**SIZES, **dropout), tmp_path / "source")
    model = loaded(source)
    tokens = torch.arange(2, 32)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_logits(source, tokens), atol=2e-4, rtol=0)
    save(HFCheckpointer(str(source), "HF"), model, tmp_path / "saved")
    torch.testing.assert_close(hf_logits(tmp_path / "saved", tokens), hf_logits(source, tokens))


def test_a_config_that_is_not_the_models_is_refused(tmp_path, tiny_data):
    source = hf_model(Qwen3Config(**SIZES, head_dim=8), tmp_path / "source")
    cfg = family_config("qwen3", source, tiny_data)
    described = json.loads((source / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    for fields, message in (
        (described | {"rope_parameters": rope}, r"model.rope_parameters=.*500000.0.* and config.json has .*10000.0"),
        (described | {"rms_norm_eps": None}, "model.rms_norm_eps=1e-06, and config.json has 1e-05"),
        (described | {"hidden_act": "gelu"}, "model.hidden_act=gelu, and config.json has silu"),
        (described | {"hiden_size": 32}, "hiden_size is not a field of config.json for model_type=qwen3"),
        ({"path": str(source), "hidden_size": 32}, "hidden_size is given, and path too"),
        ({"path": str(tmp_path)}, "config.json cannot be read"),
        ({"model_type": "qwen_9"}, "model_type=qwen_9: the installed transformers has no such model"),
    ):
        cfg["model"] = {"_component_": HF, **{key: value for key, value in fields.items() if value is not None}}
        with pytest.raises(ConfigError, match=message):
            prepare(cfg)
    assert not checkpoints(family_config("qwen3", source, tiny_data))
