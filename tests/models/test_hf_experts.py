"""Mixtures of experts of transformers: outputs and gradients, scores with padding, and the memory plan."""

import pytest
import torch
from families import FAMILIES, SIZES, family_config, group_on_cpu, hf_model
from live_bytes import LiveBytes
from omegaconf import OmegaConf
from schedules import setup
from transformers import AutoModelForCausalLM, MixtralConfig, PhimoeConfig, Qwen3MoeConfig

from owlore_tune.layers import Outlier, layer_scores
from owlore_tune.layers.grouped import GroupedExperts, without_empty
from owlore_tune.loss import LinearCrossEntropyLoss
from owlore_tune.memory.plan import Method, plan_memory
from owlore_tune.memory.step import StepShape
from owlore_tune.models.decoder import find_linears
from owlore_tune.models.experts import Experts, split_experts
from owlore_tune.models.hf import HFDecoder, hf_decoder
from owlore_tune.optim.bases import BasisMaker
from owlore_tune.optim.weights import ProjectedWeight
from owlore_tune.quantized.formats import format_of
from owlore_tune.quantized.linear import attach, in_full_precision, quantize, requantize, restore, set_value
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.plan import plan_run
from runs import assert_weights, finetune, finetune_until, variant, weights

META, DTYPE = torch.device("meta"), torch.bfloat16
WIDE = SIZES | dict(hidden_size=64, intermediate_size=128)  # NF4 takes multiples of 64


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
    fused, (gate, up, down) = theirs.model.layers[1].mlp.experts, ours.model.layers[1].mlp.experts.names
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
    """It has no gradient in the first step. Once tokens reach it, it is projected as any other weight."""
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
        assert last.is_new == (last.trained.grad is not None) == (chosen == [2, 3])
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


def mixtral_experts(num_experts: int, weights: str) -> Experts:
    """Frozen experts whose sizes suit all formats."""
    _, causal = model_with_experts(MixtralConfig(**WIDE, num_local_experts=num_experts, num_experts_per_tok=2))
    experts = causal.model.layers[0].mlp.experts.requires_grad_(False)
    if weights != "full":
        for _, linear in find_linears(experts):
            quantize(linear, weights)
    return experts


def routed(num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(24, 64, requires_grad=True)
    return x, torch.randint(num_experts, (24, 2)), torch.rand(24, 2)


def assert_alike_together(experts: Experts, inputs: tuple, trained: list[torch.Tensor]) -> None:
    """Outputs and gradients of experts that compute together are those of experts that compute one by one."""
    results = []
    for together in (None, GroupedExperts(experts)):
        experts.together = together
        assert together is None or together.can_compute()
        y = experts(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), [inputs[0], *trained])])
    experts.together = None
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("weights", ["full", "int8", "nf4"])
@pytest.mark.parametrize("num_experts", [4, 80], ids=["all used", "more experts than tokens"])
def test_experts_that_do_not_train_compute_together(num_experts, weights):
    """Also after a change of their weights, in place or not, and with the names of before."""
    experts = mixtral_experts(num_experts, weights)
    names = list(experts.state_dict())
    inputs = routed(num_experts)
    assert_alike_together(experts, inputs, [])
    for _, linear in find_linears(experts):
        value = torch.randn(linear.out_features, linear.in_features) * 0.3
        linear.weight.copy_(value) if weights == "full" else requantize(linear, value)
    assert_alike_together(experts, inputs, [])
    for _, linear in find_linears(experts):
        restore(linear, torch.randn(linear.out_features, linear.in_features) * 0.3)
    assert_alike_together(experts, inputs, [])
    assert list(experts.state_dict()) == names


@pytest.mark.parametrize("side", ["right", "shape"])
@pytest.mark.parametrize("weights", ["full", "nf4"])
def test_experts_in_the_projected_form_compute_together(weights, side):
    """With decay, a scale and corrections. One that has to make a basis computes on its own, as do all with it."""
    experts = mixtral_experts(4, weights)
    maker = BasisMaker()
    projected = [
        ProjectedWeight(linear, 8, generator=lambda device: None, side=side, scale=0.5, maker=maker)
        for _, linear in find_linears(experts)
    ]
    for weight in projected:
        weight.engage()
    inputs = routed(4)
    experts.together = GroupedExperts(experts)
    assert not experts.together.can_compute()
    experts(*inputs).square().sum().backward()
    for weight in projected:
        torch.nn.init.normal_(weight.trained, std=0.1)
        weight.decay_by(0.9)
        if weights == "nf4":
            weight.correction = torch.randn(weight.size) * 0.1
    assert_alike_together(experts, inputs, [weight.trained for weight in projected])
    if weights == "nf4":
        values = {weight.linear: torch.randn(weight.shape) * 0.3 for weight in projected}
        with in_full_precision(values):
            assert_alike_together(experts, inputs, [])  # as they are, without updates
            for linear, value in values.items():
                assert linear.weight.data_ptr() == value.data_ptr()  # no copies of all of them
        assert_alike_together(experts, inputs, [weight.trained for weight in projected])
    inputs[1].fill_(2)  # the others have no tokens, and zero gradients, though some GPUs write nothing there
    assert_alike_together(experts, inputs, [weight.trained for weight in projected])
    hook = experts[3]["w1"].register_forward_pre_hook(lambda *_: None)
    assert not GroupedExperts(experts).can_compute()
    hook.remove()
    assert GroupedExperts(experts).can_compute()
    projected[5].give_up_basis()
    assert not GroupedExperts(experts).can_compute()


def test_an_expert_without_rows_gets_no_gradient_of_what_the_memory_was():
    grad = without_empty(torch.tensor([2, 2, 5], dtype=torch.int32), torch.full((3, 4, 2), torch.nan))
    assert [part.isnan().all().item() for part in grad] == [True, False, True]
    assert not grad[1].any()


@pytest.mark.parametrize("form", ["full", "int8", "nf4", "projected"])
def test_the_host_does_not_wait_for_experts_that_compute_together(form):
    """Tensors of the meta device have no values to read."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(MixtralConfig(**WIDE, num_local_experts=4))
        split_experts(causal)
        experts = causal.model.layers[0].mlp.experts.bfloat16().requires_grad_(False)
        for _, linear in find_linears(experts):
            if form == "projected":
                weight = ProjectedWeight(linear, 8, generator=lambda device: None)
                weight.engage()
                weight.basis = torch.empty(weight.shape[1], 8, dtype=torch.bfloat16)
            elif form != "full":
                attach(linear, format_of(linear.weight.shape, form).empty(linear.weight.shape, META), "full", DTYPE)
                set_value(linear.weight, torch.empty(0, dtype=DTYPE))
        x = torch.empty(24, 64, dtype=DTYPE, requires_grad=True)
        inputs = x, torch.zeros(24, 2, dtype=torch.long), torch.empty(24, 2, dtype=DTYPE)
        with pytest.raises(RuntimeError, match="bincount"):
            experts(*inputs)
        experts.together = GroupedExperts(experts)
        experts(*inputs).sum().backward()
        assert x.grad.shape == x.shape
        experts.requires_grad_(True)
        if form == "full":
            with pytest.raises(RuntimeError, match="bincount"):
                experts(*inputs)


@pytest.mark.parametrize("changes", [{}, {"owlore__rank": None}, {"owlore__weights": "int8"}], ids=str)
def test_a_run_whose_experts_compute_together_trains_alike_and_resumes_to_the_same_bits(
    changes, tmp_path, tiny_data, monkeypatch
):
    """As on a GPU. Weights of all experts share memory there, also when they are saved."""
    source = hf_model(FAMILIES["olmoe"][-1], tmp_path / "source")
    cfg = variant(family_config("olmoe", source, tiny_data), "apart", **changes)
    apart = finetune(cfg)
    products = count_grouped_products(monkeypatch)
    together, resumed = variant(cfg, "together"), variant(cfg, "resumed")
    recipe = finetune(together)
    assert len(products) > 4 * 2 * 3  # at least those of frozen layers
    assert any(shape[-1] == 8 for shape in products) == (cfg["owlore"]["rank"] == 8)  # the update
    finetune_until(resumed, 3)
    finetune(resumed | {"resume_from_checkpoint": True})
    assert_weights(resumed, weights(together))
    for name, weight in weights(cfg).items():
        torch.testing.assert_close(weights(together)[name], weight, atol=1e-5, rtol=0)
    for when, loss in apart.report.records.losses.items():
        assert recipe.report.records.losses[when] == pytest.approx(loss, abs=1e-5)


def test_a_plan_for_a_gpu_has_experts_that_compute_together(tmp_path, tiny_data, monkeypatch):
    source = hf_model(FAMILIES["olmoe"][-1], tmp_path / "source")
    cfg = family_config("olmoe", source, tiny_data) | {"dtype": "bf16"}
    settings = TrainingSettings.from_config(OmegaConf.create(cfg))
    products, planned = count_grouped_products(monkeypatch), torch.Size([4 * 64 * 2, 32])  # two experts for each token
    plan_run(settings, 64)
    assert planned not in products
    plan_run(settings.for_gpu(), 64)
    assert planned in products


def count_grouped_products(monkeypatch) -> list:
    """Let experts of runs compute together on a CPU, and record their products from now on."""
    products, of_torch = [], torch.nn.functional.grouped_mm

    def product(x: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        products.append(x.shape)
        return of_torch(x, weights, offs=offs)

    monkeypatch.setattr("owlore_tune.training.components.group_experts", group_on_cpu)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", product)
    return products
