"""The projected form base + A Pᵀ with a stock optimizer: equal to GaLore and to `OwLoreAdamW`."""

import hashlib
import math

import pytest
import torch
from conftest import tiny_llama
from test_optim import galore_torch_adamw, weights_and_grads
from torch import nn
from torchtune import training

from owlore_tune.frozen.linear import freeze
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.models.hf import hf_decoder
from owlore_tune.optim.adamw import OwLoreAdamW
from owlore_tune.optim.projected import ProjectedWeight
from owlore_tune.optim.projection import OVERSAMPLING, product_range_finder, range_finder


def seeded(device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    return linear


def give_gradient(linear: nn.Linear, grad: torch.Tensor) -> None:
    """Run a backward pass in which the gradient of the Linear's weight is ``grad``."""
    product = linear(torch.eye(grad.shape[1], dtype=grad.dtype))
    (product * grad.T).sum().backward()


def train(weights: list[torch.Tensor], steps: list, gap: int, weight_decay: float = 0.0, **options) -> list:
    """Train with torch's AdamW, merging every ``gap`` steps. Returns the weights."""
    linears = [linear_of(weight) for weight in weights]
    rank, lr, eps = options.pop("rank"), options.pop("lr"), options.pop("eps", 1e-8)
    generators = options.pop("generators", [lambda step: seeded] * len(weights))
    step_of = [0]
    projected = [
        ProjectedWeight(linear, rank, generator=lambda device, make=make: make(step_of[0])(device), **options)
        for linear, make in zip(linears, generators, strict=True)
    ]
    optimizer = torch.optim.AdamW([p.trained for p in projected], lr=lr, eps=eps, weight_decay=weight_decay)
    for number, grads in enumerate(steps):
        step_of[0] = number
        if number % gap == 0:
            for linear, weight in zip(linears, projected, strict=True):
                weight.merge(linear.weight)
        for linear, grad in zip(linears, grads, strict=True):
            give_gradient(linear, grad)
        optimizer.step()
        optimizer.zero_grad()
        for weight in projected:
            weight.decay *= 1 - lr * weight_decay
    for linear, weight in zip(linears, projected, strict=True):
        weight.merge(linear.weight)
    return [linear.weight.detach() for linear in linears]


def train_as_today(weights: list[torch.Tensor], steps: list, gap: int, **options) -> list:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = OwLoreAdamW(parameters, update_gap=gap, **options)
    for grads in steps:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in parameters]


def test_it_equals_galore_torch():
    """20 steps with two refreshes. The weights are small, so that their own rounding in each step hides nothing."""
    weights, steps = weights_and_grads(20)
    weights = [0.01 * weight for weight in weights]
    options = dict(rank=4, scale=0.25, side="shape", basis="svd", lr=1e-2, eps=1e-12)
    ours = train(weights, steps, 8, **options)
    theirs = [nn.Parameter(weight.clone()) for weight in weights]
    group = {"params": theirs, "rank": 4, "update_proj_gap": 8, "scale": 0.25, "proj_type": "std"}
    optimizer = galore_torch_adamw()([group], lr=1e-2, eps=1e-12, no_deprecation_warning=True)
    for grads in steps:
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    for a, b, start in zip(ours, theirs, weights, strict=True):
        b = b.detach()
        largest = (b - start).abs().max().item()
        assert largest > 1e-3 and (a - b).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("side", ["right", "shape"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("basis", ["svd", "randomized"])
def test_it_equals_the_optimizer_of_full_gradients(side, weight_decay, basis):
    weights, steps = weights_and_grads(20)
    options = dict(rank=4, lr=1e-2, scale=0.5, side=side, basis=basis, weight_decay=weight_decay)

    def of_today(index):  # its random sketches
        def at(step):
            text = f"0 {index} {step} basis"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            return lambda device: torch.Generator(device).manual_seed(seed)

        return at

    ours = train(weights, steps, 8, **options, generators=[of_today(index) for index in range(len(weights))])
    theirs = train_as_today(weights, steps, 8, **options)
    for a, b, start in zip(ours, theirs, weights, strict=True):
        largest = (b - start).abs().max().item()
        assert largest > 1e-2 and (a - b).abs().max() < 1e-5 * max(1.0, largest)


def test_a_basis_without_the_gradient_is_that_of_the_gradient():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(40, size, generator=generator, dtype=torch.float64) for size in (24, 30))
    right *= torch.arange(1, 31) ** -1.0
    whole, share = range_finder(left.T @ right, 6, generator=seeded())
    basis, estimate = product_range_finder(left, right, 6, generator=seeded())
    torch.testing.assert_close(basis, whole)
    assert estimate.item() == pytest.approx(share.item(), abs=0.05)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    again, _ = product_range_finder(left, right, 6, generator=seeded(), start=basis)
    wanted, _ = range_finder(left.T @ right, 6, generator=seeded(), start=whole)
    torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize(("t", "m", "n"), [(5, 24, 30), (0, 8, 9), (40, 7, 30), (40, 30, 7)])
def test_bases_of_few_tokens_and_thin_weights(t, m, n):
    left, right = (torch.randn(t, size, generator=seeded()) for size in (m, n))
    rank = min(m, n) - 2
    basis, share = product_range_finder(left, right, rank, generator=seeded())
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)
    assert share.isnan() if t == 0 else 0 < share <= 1
    assert rank + OVERSAMPLING > 0


DECODERS = {
    "torchtune": lambda: tiny_llama(dtype=torch.float64),
    "transformers": lambda: _seeded_decoder().double(),
}


def _seeded_decoder():
    torch.manual_seed(0)
    return hf_decoder(
        model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_the_gradient_of_a_is_the_projected_gradient(kind, checkpointing, tokens):
    """In float64, with accumulation over two micro-batches: the basis comes from the first one."""
    model = DECODERS[kind]()
    if checkpointing:
        layer_types = {type(layer) for layer in find_layers(model)}
        training.set_activation_checkpointing(model, auto_wrap_policy=layer_types)
    batches = (tokens[:2], tokens[2:])
    full = {}
    for batch in batches:
        model(batch).logsumexp(-1).sum().backward()
    for index, layer in enumerate(find_layers(model)):
        for name, linear in find_linears(layer):
            full[index, name] = linear.weight.grad.clone()
    model.zero_grad()
    projected = {
        (index, name): ProjectedWeight(linear, 6, generator=seeded)
        for index, layer in enumerate(find_layers(model))
        for name, linear in find_linears(layer)
    }
    for _ in range(2):  # a step that makes the bases, and one that has them
        for batch in batches:
            model(batch).logsumexp(-1).sum().backward()
        for key, weight in projected.items():
            grad, expected = weight.trained.grad, full[key] @ weight.basis
            assert (grad - expected).abs().max() < 1e-12 * max(1.0, expected.abs().max().item()), key
            weight.trained.grad = None
    assert all(linear.weight.grad is None for layer in find_layers(model) for _, linear in find_linears(layer))


@pytest.mark.parametrize("kind", [("int8", "full"), ("int8", "int8"), ("nf4", "full")], ids=str)
def test_a_quantized_weight_stays_in_few_bits_while_it_trains(kind):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    whole = linear.weight.detach().clone()
    freeze(linear, *kind)
    weight = ProjectedWeight(linear, 8, generator=seeded)
    x = torch.randn(20, 64, requires_grad=True)
    linear(x).square().sum().backward()
    assert linear.weight.numel() == 0 and weight.basis is not None and weight.trained.grad.shape == (48, 8)
    error = whole - linear.frozen_weight.dequantize(torch.float32)
    weight.correct(error)
    inside = x @ weight.basis @ weight.basis.T  # here the weight is exact, up to the rounding of the correction
    exact = nn.functional.linear(inside, whole, linear.bias)
    tolerance = 0.02 if kind == ("int8", "int8") else 2e-3
    assert (linear(inside) - exact).norm() < tolerance * exact.norm()
    with torch.no_grad():
        weight.trained += torch.randn(48, 8)
    trained, basis = (64 / 48) ** 0.5 * weight.trained.detach().double(), weight.basis.double()
    merged = whole.clone()
    weight.merge(merged)
    torch.testing.assert_close(merged.double(), whole.double() + trained @ basis.T, atol=1e-5, rtol=0)
    assert weight.basis is None and not weight.trained.any() and weight.decay == 1.0


def test_a_merge_rounds_once_and_is_exact_on_average():
    weight = torch.ones(64, 32, dtype=torch.bfloat16)
    linear = linear_of(weight)
    projected = ProjectedWeight(linear, 4, generator=seeded)
    give_gradient(linear, torch.randn(64, 32, generator=seeded()).bfloat16())
    with torch.no_grad():
        projected.trained.normal_(std=1e-3, generator=seeded())
    expected = weight.double() + projected.trained.double() @ projected.basis.double().T
    nearest = weight.clone()
    trained, basis = projected.trained.detach().clone(), projected.basis
    projected.merge(nearest, stochastic=False)
    assert torch.equal(nearest, expected.bfloat16())
    torch.manual_seed(0)
    means = []
    for _ in range(200):
        some = weight.clone()
        with torch.no_grad():
            projected.trained.copy_(trained)
        projected.basis = basis
        projected.merge(some)
        means.append(some.double())
    assert (torch.stack(means).mean(0) - expected).abs().max() < 5 * 2**-8 / 200**0.5


def test_backward_keeps_low_inputs_and_not_whole_ones():
    linear = linear_of(torch.randn(96, 64))
    ProjectedWeight(linear, 4, generator=seeded)
    x = torch.randn(50, 64, requires_grad=True)
    for step in range(2):
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            product = linear(x)
        assert (x.untyped_storage().data_ptr() in kept) == (step == 0)  # only the step that makes the basis
        product.sum().backward()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_without_a_basis_leaves_the_weight_and_a_later_one_gives_it(value):
    linear = linear_of(torch.randn(24, 16, generator=seeded()))
    weight = ProjectedWeight(linear, 4, generator=seeded)
    give_gradient(linear, torch.full((24, 16), value))
    assert weight.basis is None
    assert (not weight.trained.grad.any()) if value == 0 else weight.trained.grad.isnan().all()
    weight.trained.grad = None
    give_gradient(linear, torch.randn(24, 16, generator=seeded()))
    assert weight.basis is not None and weight.trained.grad.isfinite().all()


def test_a_rank_that_saves_nothing_is_refused():
    with pytest.raises(ValueError, match="rank=16; it must be below the shorter side of a weight of shape .24, 16."):
        ProjectedWeight(nn.Linear(16, 24), 16, generator=seeded)


def test_a_linear_is_itself_again():
    linear = nn.Linear(16, 24)
    x = torch.randn(3, 16)
    expected = linear(x).detach()
    weight = ProjectedWeight(linear, 4, generator=seeded)
    assert torch.equal(linear(x), expected)
    linear(x).sum().backward()
    weight.merge(linear.weight)
    weight.release()
    assert torch.equal(linear(x), expected)
    freeze(linear, "int8")
    quantized = linear(x)
    weight.engage()
    assert torch.equal(linear(x), quantized)
    weight.release()
    assert torch.equal(linear(x), quantized)
