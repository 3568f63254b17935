import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_llama

from owlore_tune.layers.scores import SCORES, LayerScores, Outlier, Reverse, Uniform, layer_scores
from owlore_tune.models.decoder import find_linears


def test_scores_by_place_and_others_are_usable(tokens):
    model = tiny_llama()
    found = {score: layer_scores(model, score, [{"tokens": tokens}]) for score in SCORES}
    assert [found[name] for name in ("uniform", "increase", "decrease")] == [[1] * 4, [1, 2, 3, 4], [4, 3, 2, 1]]
    assert all(len(values) == 4 and all(math.isfinite(v) and v >= 0 for v in values) for values in found.values())


def test_reverse_turns_the_outlier_scores_over(tokens):
    model = tiny_llama()
    outlier = layer_scores(model, Outlier(5), [{"tokens": tokens}])
    reverse = layer_scores(model, Reverse(5), [{"tokens": tokens}])
    assert reverse == [max(outlier) - share for share in outlier]
    assert min(reverse) == 0


def test_weight_norm_is_the_norm_of_all_linears():
    model = tiny_llama()
    for layer, score in zip(model.layers, layer_scores(model, "weight_norm"), strict=True):
        flat = np.concatenate([m.weight.detach().double().numpy().ravel() for _, m in find_linears(layer)])
        assert score == pytest.approx(np.linalg.norm(flat), rel=1e-12)


def test_heavy_tail_tells_a_heavy_spectrum_from_a_flat_one():
    model = tiny_llama(num_layers=2)
    with torch.no_grad():
        for decay, layer in zip((0.1, 2.0), model.layers, strict=True):
            for _, linear in find_linears(layer):
                u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
                linear.weight.copy_(u * torch.arange(1, len(s) + 1) ** -decay @ v)
    flat, heavy = layer_scores(model, "heavy_tail")
    # For λ_i = i^-2a, the mean of ln(λ_i / λ_k+1) over i ≤ k is 2a (ln(k+1) - ln(k!)/k).
    sides = [min(m.weight.shape) for _, m in find_linears(model.layers[0])]
    unit = np.mean([2 * (math.log(n // 2 + 1) - math.lgamma(n // 2 + 1) / (n // 2)) for n in sides])
    assert flat == pytest.approx(0.1 * unit, rel=1e-3)
    assert heavy == pytest.approx(2.0 * unit, rel=1e-2)


def test_heavy_tail_leaves_out_a_weight_with_one_row():
    """Such as the gate of a shared expert: a single eigenvalue has no tail."""
    model = tiny_llama(num_layers=2)
    before = layer_scores(model, "heavy_tail")
    for layer in model.layers:
        layer.gate = torch.nn.Linear(32, 1)
    assert layer_scores(model, "heavy_tail") == before


def test_scoring_leaves_each_module_in_its_mode(tokens):
    model = tiny_llama().train()
    model.layers[1].eval()
    layer_scores(model, "outlier", [{"tokens": tokens}])
    assert [layer.training for layer in model.layers] == [True, False, True, True]


def test_unknown_score_and_missing_batches_are_refused():
    with pytest.raises(ValueError, match="score='outliers'; choose one of outlier"):
        layer_scores(tiny_llama(), "outliers")
    with pytest.raises(ValueError, match="no calibration batches; score='outlier' needs at least one"):
        layer_scores(tiny_llama(), "outlier")


def saved(path, **changes) -> str:
    scores = LayerScores(
        scores=[0.1, 0.2], score="outlier", fingerprint="abc", options={"threshold": 13.0}, data={"batches": 8}
    )
    scores.save(path)
    if changes:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(path)


def test_a_score_file_comes_back_as_it_was(tmp_path):
    path = saved(tmp_path / "scores.json")
    loaded = LayerScores.load(path, num_layers=2, fingerprint="abc", score=Outlier())
    assert loaded.scores == [0.1, 0.2]
    assert loaded.options == {"threshold": 13.0}
    assert loaded.data == {"batches": 8}
    assert set(loaded.versions) == {"owlore-tune", "torchtune", "torch"}


@pytest.mark.parametrize(
    ("changes", "num_layers", "fingerprint", "message"),
    [
        ({}, 3, "abc", "for a model with 2 layers; this one has 3"),
        ({}, 2, "xyz", r"made for other weights \(abc, these are xyz\)"),
        ({"scores": [0.1, math.nan]}, 2, "abc", "score of layer 1 is nan"),
        ({"scores": [0.1, -1]}, 2, "abc", "score of layer 1 is -1"),
        ({"surprise": 1}, 2, "abc", "cannot be read"),
    ],
)
def test_an_unfit_score_file_is_refused(tmp_path, changes, num_layers, fingerprint, message):
    path = saved(tmp_path / "scores.json", **changes)
    with pytest.raises(ValueError, match=message):
        LayerScores.load(path, num_layers=num_layers, fingerprint=fingerprint, score=Outlier())


@pytest.mark.parametrize("asked", [Reverse(), Uniform(), Outlier(10.0)], ids=lambda score: score.name)
def test_a_file_of_another_score_or_threshold_is_refused(tmp_path, asked):
    path = saved(tmp_path / "scores.json")
    message = f"holds outlier scores with {{'threshold': 13.0}}, the config asks for {asked.name}"
    with pytest.raises(ValueError, match=message):
        LayerScores.load(path, num_layers=2, fingerprint="abc", score=asked)
