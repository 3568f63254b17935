"""Compiled layers: torch compiles each kind of layer once, and no draw compiles another."""

from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.backends.registry import register_backend
from torch._inductor import metrics

from owlore_tune.optim.rounding import noise_for, round_to
from owlore_tune.run.build import RECOMPILE_LIMIT
from owlore_tune.run.limit import plan_run
from owlore_tune.run.settings import TrainingSettings
from runs import finetune, variant

KINDS: Counter = Counter()


@register_backend(name="counting")
def counting(graph: torch.fx.GraphModule, inputs: list):
    """Counts graphs by what differs between layers: whether gradients are wanted, and of which inputs and weights."""
    wanted = tuple(value.requires_grad for value in inputs if isinstance(value, torch.Tensor))
    KINDS[torch.is_grad_enabled(), wanted] += 1
    return aot_eager(graph, inputs)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_30_draws_with_rows_of_any_length_compile_each_kind_of_layer_once(checkpointing, tiny_config, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "counting")
    torch._dynamo.reset()
    KINDS.clear()
    config = variant(
        tiny_config, "compiled", compile=True, owlore__resample_every=1, run_val_every_n_steps=2, epochs=3,
        enable_activation_checkpointing=checkpointing,
    )  # fmt: skip
    recipe = finetune(config)
    assert len({tuple(draw["active"]) for draw in recipe._report.records.draws}) == 6  # all pairs of 4 layers
    assert len(KINDS) == 6  # trained or frozen: in validation, above a layer that trains, and above none
    assert KINDS.total() == 7  # the first one anew, when a second length makes torch compile for any
    assert KINDS.total() < RECOMPILE_LIMIT


@pytest.mark.slow
def test_the_update_of_a_16_bit_weight_compiles_to_one_kernel():
    weight, change = torch.randn(64, 64).bfloat16(), torch.randn(64, 64)
    noise = noise_for(weight, True)
    expected = weight.clone()
    round_to(expected, change.clone(), noise, 0.5)
    torch._dynamo.reset()
    metrics.reset()
    torch.compile(round_to)(weight, change.clone(), noise, 0.5)
    assert metrics.generated_kernel_count == 1
    assert torch.equal(weight, expected)


def test_the_plan_holds_all_gradients_of_a_compiled_layer_at_once(tiny_config):
    def temporary(**changes) -> int:
        settings = TrainingSettings.from_config(OmegaConf.create(variant(tiny_config, "plan", batch_size=1, **changes)))
        return plan_run(settings, seq_len=2, framework=0).temporary

    weights_of_a_layer = 4 * (4 * 32 * 32 + 3 * 32 * 48)  # bytes
    more = temporary(compile=True) - temporary(compile=False)
    assert 0.5 * weights_of_a_layer < more < weights_of_a_layer
