"""A score, a format and a draw of a user's module train like those of the package, without other changes."""

import importlib
import sys

import pytest

from owlore_tune.layers.sampler import DRAWS
from owlore_tune.layers.scores import SCORES
from owlore_tune.quantized.formats import FORMATS
from owlore_tune.training.plan import savings
from runs import finetune, variant

MODULE = '''
from dataclasses import dataclass

import torch

from owlore_tune.layers.sampler import Draw
from owlore_tune.layers.scores import Score
from owlore_tune.quantized.formats import ALL, QuantizedWeight


class InputSize(Score):
    """The mean norm of the inputs: a score with data."""

    name = "input_size"
    needs_inputs = True

    def of_layer(self, layer, place, norms):
        return sum(norm.mean().item() for norm in norms.values()) / len(norms)


class Highest(Draw):
    """The γ layers with the highest scores, in every draw."""

    name = "highest"

    def draw(self, generator):
        return self.scores.topk(self.num_active).indices


@dataclass(frozen=True)
class Float8Weight(QuantizedWeight):
    """A weight in float8, with a scale for each row."""

    codes: torch.Tensor  # (m, n) float8_e4m3fn
    scale: torch.Tensor  # (m, 1) float32

    name = "fp8"

    @classmethod
    def quantize(cls, weight):
        scale = weight.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-30) / 448
        return cls((weight / scale).to(torch.float8_e4m3fn), scale)

    @classmethod
    def empty(cls, shape, device):
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        return cls(codes, torch.empty(shape[0], 1, device=device))

    @property
    def shape(self):
        return self.codes.shape

    def dequantize(self, dtype, rows=ALL, columns=ALL):
        return self.codes[rows, columns].to(dtype) * self.scale[rows].to(dtype)
'''


@pytest.fixture
def extras(tmp_path, monkeypatch):
    """A module with one of each, while the test runs."""
    before = [dict(registry) for registry in (SCORES, DRAWS, FORMATS)]
    (tmp_path / "extras_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("extras_of_a_test")
    del sys.modules["extras_of_a_test"]
    for registry, kept in zip((SCORES, DRAWS, FORMATS), before, strict=True):
        registry.clear()
        registry.update(kept)


@pytest.mark.parametrize("weights", ["full", "fp8"])
def test_a_module_adds_a_score_a_draw_and_a_format(weights, extras, tiny_config):
    config = variant(
        tiny_config, "extended", owlore__score="input_size", owlore__draw="highest", owlore__weights=weights
    )
    recipe = finetune(config)
    scores = recipe.scores
    highest = sorted(sorted(range(4), key=lambda layer: -scores.scores[layer])[:2])
    assert scores.score == "input_size" and scores.data is not None and len(set(scores.scores)) == 4
    assert [draw["active"] for draw in recipe.report.records.draws] == [highest] * len(recipe.report.records.draws)
    measured = recipe.report.measure_memory()
    assert measured["weights"] == recipe.plan.weights
    assert ("owlore.weights=fp8", "owlore.products=full") in savings(recipe.settings, None)
    losses = recipe.report.records.losses
    assert losses["after"] < losses["before"]
