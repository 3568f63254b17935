"""Round trip from and to Hugging Face weights for every shipped model family, at a tiny size."""

import pytest
import torch
from families import FAMILIES, family_config, hf_logits, hf_model
from torchtune import config as tune_config

from owlore_tune.config.load import load_config, packaged_configs
from owlore_tune.models.decoder import find_linears
from runs import changed_by_draw, checkpoints, finetune


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_scored_trained_exported_and_loaded_by_transformers(family, tmp_path, tiny_data):
    source = hf_model(FAMILIES[family][-1], tmp_path / "source")
    cfg = family_config(family, source, tiny_data)
    recipe = finetune(cfg)

    assert len(recipe.scores.scores) == 4 and min(recipe.scores.scores) > 0
    draws = recipe.report.records.draws
    assert len(draws) == 2 and changed_by_draw(cfg) == [(draw["active"], []) for draw in draws]
    tokens = torch.arange(2, 42)[None]
    with torch.no_grad():
        hidden = recipe.model(tokens)  # the loss applies the head
        ours = recipe.model.output(hidden)
    theirs = hf_logits(checkpoints(cfg)[-1], tokens)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (theirs - hf_logits(source, tokens)).abs().max() > 1e-3


def test_every_family_that_is_shipped_is_trained_above():
    shipped = {name.split("/")[0] for name, _ in packaged_configs()} - {"eval", "smollm2"}
    assert shipped == {config.split("/")[0] for config, *_ in FAMILIES.values()}


PUBLISHED = {  # number of parameters, computed from config.json on the hub
    "llama2/7B_owlore": 6_738_415_616, "llama2/13B_owlore": 13_015_864_320, "llama3/8B_owlore": 8_030_261_248,
    "llama3_1/8B_owlore": 8_030_261_248, "llama3_2/1B_owlore": 1_235_814_400, "llama3_2/3B_owlore": 3_212_749_824,
    "mistral/7B_owlore": 7_241_732_096, "qwen2_5/0.5B_owlore": 494_032_768, "qwen2_5/1.5B_owlore": 1_543_714_304,
    "qwen2_5/3B_owlore": 3_085_938_688, "qwen2_5/7B_owlore": 7_615_616_512, "gemma2/2B_owlore": 2_614_341_888,
    "phi3/mini_owlore": 3_821_079_552, "smollm2/135M_owlore": 134_515_008, "qwen3/0.6B_owlore": 596_049_920,
    "qwen3/1.7B_owlore": 1_720_574_976, "qwen3/4B_owlore": 4_022_468_096, "qwen3/8B_owlore": 8_190_735_360,
    "qwen3/14B_owlore": 14_768_307_200, "gemma3/1B_owlore": 999_885_952, "smollm3/3B_owlore": 3_075_098_624,
    "olmo2/7B_owlore": 7_298_617_344, "mistral_nemo/12B_owlore": 12_247_782_400, "phi4/14B_owlore": 14_659_507_200,
    "granite3/8B_owlore": 8_170_864_640, "qwen3/30B_A3B_owlore": 30_532_122_624, "olmoe/1B_7B_owlore": 6_919_161_856,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_its_published_number_of_parameters(name):
    with torch.device("meta"):
        model = tune_config.instantiate(load_config(name).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert all(find_linears(layer) for layer in model.layers)
