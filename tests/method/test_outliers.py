import numpy as np
import pytest
import torch
from near import assert_same_shares
from reference import outlier_scores
from tiny import tiny_llama

from owlore_tune.layers.scores import Outlier, layer_scores


@pytest.mark.parametrize("threshold", [3.0, 13.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_equal_the_definition(threshold, dtype, tokens):
    model = tiny_llama(dtype=dtype)
    batches = [{"tokens": tokens}, {"tokens": tokens.flip(0)[:, :7]}]
    scores = layer_scores(model, Outlier(threshold), batches)
    assert_same_shares(scores, outlier_scores(model, batches, threshold), model)
    assert len(set(scores)) > 1


def test_scoring_leaves_the_model_as_it_was(tokens):
    model = tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layer_scores(model, "outlier", [{"tokens": tokens}])
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_bad_calls_are_refused(tokens):
    with pytest.raises(ValueError, match="outlier_threshold=0"):
        Outlier(0)
    with pytest.raises(TypeError, match="decoder of torchtune or transformers; got Linear"):
        layer_scores(torch.nn.Linear(2, 2), "outlier", [{"tokens": tokens}])


def padded(rows, batch_size):
    """Batch ``rows`` (lists of tokens), right-padded with a token that also occurs in rows."""
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        longest = max(map(len, some))
        tokens = torch.tensor([row + [5] * (longest - len(row)) for row in some])
        yield {"tokens": tokens, "valid": torch.arange(longest) < torch.tensor([[len(row)] for row in some])}


def test_scores_do_not_depend_on_the_batch_size():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(64, (length,), generator=generator).tolist() for length in (3, 40, 7, 21, 12, 30, 5, 9)]
    model = tiny_llama(dtype=torch.float64)
    one, *others = (layer_scores(model, Outlier(3.0), padded(rows, size)) for size in (1, 2, 4, 8))
    for scores in others:
        assert_same_shares(scores, one, model)
    counted = ({"tokens": batch["tokens"]} for batch in padded(rows, 8))  # without the mask, padding counts
    assert np.abs(np.subtract(layer_scores(model, Outlier(3.0), counted), one)).max() > 1e-3


def test_what_is_not_finite_is_an_error_that_names_the_layer(tokens):
    model = tiny_llama()
    with torch.no_grad():
        model.layers[2].mlp.w1.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layer 2: its weights or input activations are not finite"):
        layer_scores(model, "outlier", [{"tokens": tokens}])
    model = tiny_llama()
    with torch.no_grad():
        model.layers[1].sa_norm.scale[0] = float("inf")  # finite weights, but non-finite activations from here on
    with pytest.raises(ValueError, match="layer 1: "):
        layer_scores(model, "outlier", [{"tokens": tokens}])
