import math

import pytest
import torch

from owlore_tune.layers.sampler import DRAWS, LayerSampler, inclusion_probabilities

SCORES = [0.2, 0.05, 0.1, 0.0, 0.3, 0.15, 0.64, 0.07]


def test_probabilities_are_the_share_of_the_score():
    probabilities = inclusion_probabilities([1, 2, 3, 4], 2)
    assert probabilities == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=1e-15)


def test_probabilities_above_one_are_capped_and_the_rest_shared_out():
    probabilities = inclusion_probabilities([10, 1, 1, 2], 2)
    assert probabilities == pytest.approx([1, 0.25, 0.25, 0.5], abs=1e-15)
    # Capping the first layer pushes another one over 1.
    assert inclusion_probabilities([10, 4, 0.5, 0.5], 3) == pytest.approx([1, 1, 0.5, 0.5], abs=1e-15)


@pytest.mark.parametrize("num_active", range(1, 8))
def test_probabilities_sum_to_the_number_of_active_layers(num_active):
    probabilities = inclusion_probabilities(SCORES, num_active)
    assert math.fsum(probabilities) == pytest.approx(num_active, abs=1e-12)
    assert all(0 <= p <= 1 for p in probabilities)
    assert probabilities[3] == 0


@pytest.mark.parametrize(
    ("scores", "num_active", "message"),
    [
        ([1, math.nan, 1], 1, "score of layer 1 is nan"),
        ([1, -1, 1], 1, "score of layer 1 is -1"),
        ([1, math.inf], 1, "score of layer 1 is inf"),
        ([1, 1, 1], 4, "num_active_layers=4; the model has 3 layers"),
        ([1, 1, 1], 0, "num_active_layers=0"),
        ([1, 0, 0], 2, "only 1 layers have a score above 0"),
    ],
)
def test_impossible_probabilities_are_refused(scores, num_active, message):
    with pytest.raises(ValueError, match=message):
        inclusion_probabilities(scores, num_active)


@pytest.mark.parametrize("draw", ["systematic", "bernoulli"])
@pytest.mark.parametrize("num_active", [1, 2, 5])
def test_inclusion_frequencies_over_20000_draws(draw, num_active):
    num_draws = 20_000
    probabilities = inclusion_probabilities(SCORES, num_active)
    sampler = LayerSampler(SCORES, num_active, draw, seed=3)
    assert sampler.probabilities.tolist() == probabilities
    counts = torch.zeros(len(SCORES))
    for _ in range(num_draws):
        drawn = sampler.draw()
        assert drawn, "an empty set was drawn"
        if draw == "systematic":
            assert len(drawn) == num_active
        counts[drawn] += 1
    for p, frequency in zip(probabilities, (counts / num_draws).tolist(), strict=True):
        assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / num_draws)


def test_systematic_draws_bring_every_pair_together():
    sampler = LayerSampler([1] * 6, 2, seed=0)
    pairs = {tuple(sampler.draw()) for _ in range(500)}
    assert len(pairs) == 15


def test_sequential_draws_without_replacement():
    """Proportional to the scores, also if an inclusion probability would be capped."""
    sampler = LayerSampler([10, 1, 1, 2], 2, "sequential", seed=1)
    draws = [sampler.draw() for _ in range(5000)]
    assert all(len(set(drawn)) == 2 for drawn in draws)
    # Drawn first: 10/14. Drawn second: 1/14 · 10/13 twice, 2/14 · 10/12.
    expected = 10 / 14 + 2 * (1 / 14) * (10 / 13) + (2 / 14) * (10 / 12)
    frequency = sum(0 in drawn for drawn in draws) / 5000
    assert abs(frequency - expected) <= 4 * math.sqrt(expected * (1 - expected) / 5000)
    sampler = LayerSampler(SCORES, 3, "sequential")
    assert all(3 not in sampler.draw() for _ in range(200))


@pytest.mark.parametrize("draw", DRAWS)
def test_a_restored_sampler_continues_the_schedule_whatever_else_is_random(draw):
    sampler = LayerSampler(SCORES, 3, draw, seed=7)
    for _ in range(5):
        sampler.draw()
    state = sampler.state_dict()
    expected = [sampler.draw() for _ in range(20)]
    torch.manual_seed(123)
    twin = LayerSampler(SCORES, 3, draw, seed=99)
    twin.load_state_dict(state)
    torch.rand(10)
    for drawn in expected:
        assert twin.peek() == twin.peek() == drawn == twin.draw()


def test_unknown_draw_is_refused():
    with pytest.raises(ValueError, match="draw='sistematic'; choose one of systematic"):
        LayerSampler([1, 1], 1, "sistematic")


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_do_not_depend_on_the_default_device(draw):
    expected = LayerSampler(SCORES, 3, draw).draw()
    with torch.device("meta"):
        assert LayerSampler(SCORES, 3, draw).draw() == expected
