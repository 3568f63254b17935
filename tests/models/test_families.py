"""Round trip from and to Hugging Face weights for every shipped model family, at a tiny size."""

import pytest
import torch
from families import FAMILIES, family_config, hf_logits, hf_model

from owlore_tune.config.load import packaged_configs
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
