"""Mixtures of experts of transformers: outputs and gradients, scores with padding, and the memory plan."""

import pytest
import torch
from families import FAMILIES, SIZES, family_config, hf_model
from live_bytes import LiveBytes
from schedules import setup
from transformers import AutoModelForCausalLM, MixtralConfig, PhimoeConfig, Qwen3MoeConfig

from owlore_tune.layers import Outlier, layer_scores
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.memory.plan import Method, plan_memory
from owlore_tune.memory.step import StepShape
from owlore_tune.models.decoder import find_linears
from owlore_tune.models.hf_experts import Experts, split_experts
from owlore_tune.models.hf_model import HFDecoder, hf_decoder
from owlore_tune.quantized.linear import quantize
from runs import assert_weights, finetune, finetune_until, variant, weights


def model_with_experts(config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a random model of transformers, and the same with separate experts."""
    config.initializer_range = 0.3
    theirs, ours = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    split_experts(ours)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize(
    ("config", "all_used"),
    [
        (MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), True),
        (Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=80, moe_intermediate_size=24), False),
    ],
    ids=["mixtral", "more experts than tokens"],
)
def test_separate_experts_have_the_outputs_and_gradients_of_fused_ones(config, all_used):
    theirs, ours = model_with_experts(config)
    tokens = torch.arange(2, 42).view(2, 20)
    expected, got = (model(tokens, labels=tokens) for model in (theirs, ours))
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    got.loss.backward()
    fused, (gate, up, down) = theirs.model.layers[1].mlp.experts, ours.model.layers[1].mlp.experts._names
    used = []
    for index, expert in enumerate(ours.model.layers[1].mlp.experts):
        both = torch.cat([expert[gate].weight.grad, expert[up].weight.grad])
        torch.testing.assert_close(both, fused.gate_up_proj.grad[index], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(expert[down].weight.grad, fused.down_proj.grad[index], atol=1e-5, rtol=1e-4)
        used.append(bool(both.any()))
    assert all(used) == all_used


def test_padding_does_not_count_in_scores():
    _, causal = model_with_experts(FAMILIES["qwen2_moe"][-1])
    model = HFDecoder(causal)
    tokens = torch.arange(2, 26).view(2, 12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[:, 8:] = False
    plain = layer_scores(model, Outlier(2.0), [{"tokens": tokens[:, :8]}])
    assert layer_scores(model, Outlier(2.0), [{"tokens": tokens, "valid": valid}]) == plain
    assert layer_scores(model, Outlier(2.0), [{"tokens": tokens}]) != plain


def test_a_router_that_does_more_than_a_product_is_no_linear():
    """PhiMoE's router is a subclass of Linear that returns two tensors."""
    model = hf_decoder(**PhimoeConfig(**SIZES, num_local_experts=4).to_dict()).eval()
    tokens = torch.arange(2, 10)[None]
    with torch.no_grad():
        before = model(tokens)
        for layer in model.layers:
            for name, linear in find_linears(layer):
                assert "router" not in name
                quantize(linear, "int8")
        assert 0 < (model(tokens) - before).abs().max() < 0.1 * before.abs().max()


def test_an_expert_without_tokens_has_no_outliers_and_no_basis():
    """Its gradient is zero in the first step. Once tokens reach it, it is projected as any other weight."""
    _, causal = model_with_experts(FAMILIES["olmoe"][-1])
    block = causal.model.layers[0].mlp
    model = HFDecoder(causal)
    layers, optimizer, schedule = setup(model, num_active=len(model.layers), rank=4, weight_decay=0.0)
    last = layers.layers[0].weights["layers.0.mlp.experts.3.gate_proj.weight"]
    tokens = torch.arange(2, 10)[None]
    before = last.linear.weight.clone()
    for chosen in ([0, 1], [2, 3]):
        route = torch.full((8, 2), 0.5), torch.tensor(chosen).expand(8, 2)
        block.gate.forward = lambda hidden, route=route: (None, *route)
        layer_scores(model, "outlier", [{"tokens": tokens}])
        schedule.begin_step()
        model(tokens).square().mean().backward()
        assert last.is_new  # zero or not, its gradient is there for other processes
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(layers.merged(last.linear.weight), before) == (chosen == [0, 1])
        assert (last.basis is None) == (chosen == [0, 1])


def test_a_step_without_data_holds_what_a_real_one_holds():
    """The plan gives each expert the same number of tokens. The sum over experts does not depend on that."""
    fields = FAMILIES["mixtral"][-1].to_dict()
    with torch.device("meta"):
        planned_model = hf_decoder(**fields)
    model, loss_fn = hf_decoder(**fields), LinearCrossEntropyLoss()
    loss_fn.set_model_output(planned_model)
    method, shape = Method({"rank": None}, None, 8.0), StepShape(batch_size=4, seq_len=64)
    planned = plan_memory(planned_model, loss_fn, method, shape, device=torch.device("cpu"))
    model.requires_grad_(False).layers.requires_grad_(True)
    loss_fn.set_model_output(model)
    with LiveBytes(model) as real:
        tokens = torch.arange(2, 258).view(4, 64)
        loss_fn(model(tokens), tokens).backward()
    assert planned.gradients + planned.activations + planned.logits + planned.temporary == pytest.approx(
        real.most, rel=0.03
    )


@pytest.mark.parametrize("num_experts", [4, 80], ids=["all used", "more experts than tokens"])
def test_experts_that_do_not_train_compute_together(num_experts):
    """As they do one after the other, also after a change of their weights in place."""
    _, causal = model_with_experts(MixtralConfig(**SIZES, num_local_experts=num_experts, num_experts_per_tok=2))
    experts = causal.model.layers[0].mlp.experts.requires_grad_(False)
    x = torch.randn(24, SIZES["hidden_size"], requires_grad=True)
    choices, shares = torch.randint(num_experts, (24, 2)), torch.rand(24, 2)
    names = list(experts.state_dict())

    def outputs_and_gradient() -> list[torch.Tensor]:
        y = experts(x, choices, shares)
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    for _ in range(2):
        expected = outputs_and_gradient()
        experts.stack()
        torch.testing.assert_close(outputs_and_gradient(), expected, atol=1e-4, rtol=1e-5)
        experts._together = None
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    assert list(experts.state_dict()) == names


def test_the_host_does_not_wait_for_experts_that_do_not_train():
    """Tensors of the meta device have no values to read."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4))
        split_experts(causal)
        experts = causal.model.layers[0].mlp.experts.bfloat16().requires_grad_(False)
        x = torch.empty(24, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
        inputs = x, torch.zeros(24, 2, dtype=torch.long), torch.empty(24, 2, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="bincount"):
            experts(*inputs)
        experts.stack()
        experts(*inputs).sum().backward()
        experts.requires_grad_(True)
        with pytest.raises(RuntimeError, match="bincount"):
            experts(*inputs)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("rank", [8, None])
def test_a_run_whose_experts_compute_together_trains_alike_and_resumes_to_the_same_bits(
    rank, tmp_path, tiny_data, monkeypatch
):
    """As on a GPU. Weights of all experts share memory there, also when they are saved."""
    source = hf_model(FAMILIES["olmoe"][-1], tmp_path / "source")
    cfg = variant(family_config("olmoe", source, tiny_data), "apart", owlore__rank=rank)
    finetune(cfg)
    stacked = []

    def stack(model, device):
        stacked.extend(module for module in model.modules() if isinstance(module, Experts))
        for experts in stacked:
            experts.stack()

    monkeypatch.setattr("owlore_tune.run.weights.stack_experts", stack)
    together, resumed = variant(cfg, "together"), variant(cfg, "resumed")
    finetune(together)
    assert len(stacked) == 4
    finetune_until(resumed, 3)
    finetune(resumed | {"resume_from_checkpoint": True})
    assert_weights(resumed, weights(together))
    for name, weight in weights(cfg).items():
        torch.testing.assert_close(weights(together)[name], weight, atol=1e-5, rtol=0)
