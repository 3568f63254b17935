"""The projected form base + A Pᵀ with a stock optimizer: equal to GaLore, with exact merges."""

import copy
import gc
import math
import pickle

import pytest
import torch
from reference import galore_torch_adamw, weights_and_grads
from tiny import tiny_llama
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtune import training

from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.models.hf import hf_decoder
from owlore_tune.optim.bases import BasisMaker, side_factor, svd_basis
from owlore_tune.optim.weights import ProjectedWeight, noise_for, round_to
from owlore_tune.quantized.linear import quantize, rounding_error


def seeded(device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    return linear


def projected_of(linear: nn.Linear, rank: int, **options) -> ProjectedWeight:
    weight = ProjectedWeight(linear, rank, **{"generator": seeded} | options)
    weight.engage()
    return weight


def merge(weight: ProjectedWeight) -> None:
    weight.merge_into(weight.linear.weight)
    weight.end_basis()


def give_gradient(linear: nn.Linear, grad: torch.Tensor) -> None:
    """Run a backward pass in which the gradient of the Linear's weight is ``grad``."""
    product = linear(torch.eye(grad.shape[1], dtype=grad.dtype))
    (product * grad.T).sum().backward()


def train(weights: list[torch.Tensor], steps: list, gap: int, weight_decay: float = 0.0, **options) -> list:
    """Train with torch's AdamW, merging every ``gap`` steps. Returns the weights."""
    rank, lr, eps = options.pop("rank"), options.pop("lr"), options.pop("eps", 1e-8)
    projected = [projected_of(linear_of(weight), rank, **options) for weight in weights]
    optimizer = torch.optim.AdamW([p.trained for p in projected], lr=lr, eps=eps, weight_decay=weight_decay)
    for number, grads in enumerate(steps):
        for weight, grad in zip(projected, grads, strict=True):
            if number and number % gap == 0:
                merge(weight)
            give_gradient(weight.linear, grad)
        optimizer.step()
        optimizer.zero_grad()
        for weight in projected:
            weight.decay_by(1 - lr * weight_decay)
    for weight in projected:
        merge(weight)
    return [weight.linear.weight.detach() for weight in projected]


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


def hf_llama():
    torch.manual_seed(0)
    return hf_decoder(
        model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("decoder", [tiny_llama, hf_llama])
def test_the_gradient_of_a_is_the_projected_gradient(decoder, checkpointing, tokens):
    """In float64, with accumulation over two micro-batches: the basis comes from the first one."""
    model = decoder().double()
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
        (index, name): projected_of(linear, 6)
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
    m, n = 1024, 1088  # more than is quantized at once
    linear = nn.Linear(n, m)
    whole = linear.weight.detach().clone()
    quantize(linear, *kind)
    weight = projected_of(linear, 8)
    x = torch.randn(20, n, requires_grad=True)
    linear(x).square().sum().backward()
    assert linear.weight.numel() == 0 and weight.basis is not None and weight.trained.grad.shape == (m, 8)
    weight.correction = rounding_error(linear, whole, weight.basis, True).bfloat16()
    inside = x @ weight.basis @ weight.basis.T  # here the weight is exact, up to the rounding of the correction
    exact = nn.functional.linear(inside, whole, linear.bias)
    tolerance = 0.02 if kind == ("int8", "int8") else 2e-3
    assert (linear(inside) - exact).norm() < tolerance * exact.norm()
    with torch.no_grad():
        weight.trained += torch.randn(m, 8)
    trained, basis = (n / m) ** 0.5 * weight.trained.detach().double(), weight.basis.double()
    merged = whole.clone()
    weight.merge_into(merged)
    weight.end_basis()
    torch.testing.assert_close(merged.double(), whole.double() + trained @ basis.T, atol=1e-5, rtol=0)
    assert weight.basis is None and not weight.trained.any() and weight.decay == 1.0


def test_a_merge_rounds_once():
    """Also a weight that is written in several pieces, with decay."""
    weight = torch.randn(2**11, 2**11 + 1, generator=seeded()).bfloat16()
    linear = linear_of(weight)
    projected = projected_of(linear, 4, side="shape")
    with torch.no_grad():
        projected.basis, projected.is_given = torch.randn(2**11, 4, generator=seeded()), torch.tensor(True)
        projected.trained.data = torch.randn(4, 2**11 + 1, generator=seeded())
    projected.decay_by(0.5)
    expected = 0.5 * weight.double() + projected.basis.double() @ projected.trained.detach().double()
    projected.merge_into(weight)
    assert (weight != expected.bfloat16()).double().mean() < 1e-4  # ties, which float32 does not tell apart
    projected.end_basis()
    assert projected.basis is None and not projected.trained.any()


class Masters:
    """Full-precision weights of layers whose Linears are not quantized here."""

    def __init__(self, weights):
        self.weights = weights

    def read(self, index):
        return {name: weight.clone() for name, weight in self.weights.items()}

    def replace(self, index, weights):
        self.weights = {name: weights[name] for name in self.weights}


@pytest.mark.parametrize("quantized", [False, True])
def test_merges_of_layers_round_at_random_and_each_time_anew(quantized):
    """Updates of a quarter of bfloat16's step: to the nearest value, none would ever change a weight. Weights and steps
    have noise of their own: with the same noise, a quarter of the values would change each time, and others never."""
    model = tiny_llama(num_layers=1, dtype=torch.bfloat16)
    layers = ProjectedLayers(model, rank=8)
    layers.activate([0])
    named, step = dict(layers.active_weights()), 2.0**-7  # bfloat16's from 1 to 2
    for weight in named.values():
        weight.linear.weight.data.fill_(1.0)
        weight.basis = torch.eye(weight.shape[1], 8, dtype=torch.bfloat16)
    if quantized:
        layers.quantized = Masters({name: weight.linear.weight.detach().clone() for name, weight in named.items()})
    after = []
    for _ in range(200):
        for weight in named.values():
            weight.trained.data.fill_(step / 4 / side_factor(weight.shape))
        layers.merge(keep_bases=True)
        layers.num_steps += 1
        merged = layers.quantized.weights if quantized else {name: w.linear.weight for name, w in named.items()}
        after.append({name: weight.detach()[:, :8].float() for name, weight in merged.items()})
    spread = 6 * step * (200 * 3 / 16) ** 0.5  # six standard deviations of 200 draws of a step with probability 1/4
    for moved in (weight - 1 for weight in after[-1].values()):
        assert (moved - 50 * step).abs().max() < spread and abs(moved.mean() - 50 * step) < spread / 10
    one, other = (after[0][f"layers.0.mlp.{name}.weight"] for name in ("w1", "w3"))
    assert one.shape == other.shape and not torch.equal(one, other)


@pytest.mark.parametrize("side", ["right", "shape"])
def test_weight_decay_leaves_the_bias(side):
    """In the output, its gradients, and the merged weight."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 16)
    weight = projected_of(linear, 8, side=side)
    x = torch.randn(6, 24, requires_grad=True)
    linear(x).square().sum().backward()
    nn.init.normal_(weight.trained)
    weight.decay_by(0.9)
    x.grad = linear.bias.grad = None
    y = linear(x)
    merged = linear.weight.detach().clone()
    weight.merge_into(merged)
    expected = torch.nn.functional.linear(x, merged, linear.bias)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), [x, linear.bias])
    for got, grad in zip(torch.autograd.grad(y.square().sum(), [x, linear.bias]), wanted, strict=True):
        torch.testing.assert_close(got, grad, atol=1e-4, rtol=1e-4)


def test_weight_decay_keeps_the_dtype_of_autocast():
    linear = nn.Linear(24, 16)
    weight = projected_of(linear, 8)
    weight.decay_by(0.9)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(6, 24)).dtype == torch.bfloat16


def test_backward_keeps_low_inputs_and_not_whole_ones():
    linear = linear_of(torch.randn(96, 64))
    projected_of(linear, 4)
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


@pytest.mark.parametrize("basis", ["randomized", "svd"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_without_a_basis_leaves_the_weight_and_a_later_one_gives_it(value, basis):
    linear = linear_of(torch.randn(24, 16, generator=seeded()))
    weight = projected_of(linear, 4, basis=basis)
    give_gradient(linear, torch.full((24, 16), value))
    assert weight.is_new and not weight.is_given
    assert (not weight.trained.grad.any()) if value == 0 else not weight.trained.grad.isfinite().all()
    merged, x = linear.weight.detach().clone(), torch.randn(3, 16, generator=seeded())
    weight.merge_into(merged)  # without a step between, as after one that a gradient scaler skips
    assert torch.equal(merged, linear.weight) and torch.equal(linear(x), x @ linear.weight.T)
    weight.give_up_basis()
    assert weight.basis is None and weight.trained.grad is None
    give_gradient(linear, torch.randn(24, 16, generator=seeded()))
    assert weight.is_given and weight.trained.grad.isfinite().all()


def test_an_expert_gets_its_basis_from_its_first_tokens():
    """Its first micro-batch has none."""
    linear = linear_of(torch.randn(24, 16, generator=seeded()))
    weight, x = projected_of(linear, 4), torch.randn(9, 16, generator=seeded(), requires_grad=True)
    linear(x[:0]).square().sum().backward()
    assert weight.basis is None and weight.trained.grad is None
    linear(x).square().sum().backward()
    assert weight.is_given and weight.trained.grad.any()


@pytest.mark.parametrize(("batch", "batches"), [(2**28, 1), (1, 3)])
@pytest.mark.parametrize("is_nested", [False, True])
def test_bases_are_made_in_batches(batch, batches, is_nested, monkeypatch):
    """Those of three Linears, the second of which is used twice, and their gradients."""
    linears = [linear_of(torch.randn(16, 16, generator=seeded())) for _ in range(3)]
    first, second, third = linears
    x = torch.randn(9, 16, generator=seeded(), requires_grad=True)

    def inner(x: torch.Tensor) -> torch.Tensor:
        return second(second(x).tanh()).tanh()

    def run_backward() -> None:
        hidden = first(x).tanh()
        hidden = checkpoint(inner, hidden, use_reentrant=True) if is_nested else inner(hidden)
        third(hidden).logsumexp(-1).sum().backward()

    run_backward()
    full, maker = [linear.weight.grad for linear in linears], BasisMaker()
    weights = [projected_of(linear, 4, maker=maker) for linear in linears]
    monkeypatch.setattr("owlore_tune.optim.bases._BATCH", batch)
    eigh, calls = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda grams: calls.append(len(grams)) or eigh(grams))
    run_backward()
    # A reentrant checkpoint has a pass of its own, so there are a batch before, in and after it.
    assert sum(calls) == 3 and len(calls) == (3 if is_nested else batches)
    for weight, grad in zip(weights, full, strict=True):
        torch.testing.assert_close(weight.trained.grad, grad @ weight.basis, atol=1e-5, rtol=1e-5)
        assert (grad @ weight.basis).norm() > 0.75 * (grad @ svd_basis(grad, 4)[0]).norm()  # second has that of one use


def test_a_pass_that_ends_with_an_error_leaves_nothing_behind():
    linear, maker = linear_of(torch.randn(16, 16, generator=seeded())), BasisMaker()
    weight = projected_of(linear, 4, maker=maker)
    x = torch.randn(9, 16, generator=seeded(), requires_grad=True)
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        linear(x).sum().backward()
    gc.collect()
    assert weight.basis is None and weight.trained.grad is None and not maker._passes
    linear(x.detach()).logsumexp(-1).sum().backward()
    assert weight.is_given


def test_a_pass_for_another_gradient_makes_no_basis():
    x = torch.randn(9, 16, generator=seeded(), requires_grad=True)
    weight = projected_of(linear_of(torch.randn(24, 16, generator=seeded())), 4)
    found = []
    weight.trained.register_post_accumulate_grad_hook(lambda a: found.append(a.grad))
    torch.autograd.grad(weight.linear(x).logsumexp(-1).sum(), x)
    weight.trained.requires_grad_(False)
    weight.linear(x).sum().backward()
    weight.trained.requires_grad_(True)
    x.grad = None
    assert weight.basis is None and weight.trained.grad is None
    with pytest.raises(RuntimeError, match="call backward"):
        torch.autograd.grad(weight.linear(x).logsumexp(-1).sum(), weight.trained)
    weight.linear(x).logsumexp(-1).sum().backward(inputs=[weight.trained])
    assert weight.is_given and weight.trained.grad.any() and x.grad is None
    assert found[-1] is weight.trained.grad


def test_linears_of_several_dtypes_have_one_maker_which_is_copied_and_pickled():
    maker = BasisMaker()
    linears = [linear_of(torch.randn(16, 16, generator=seeded(), dtype=dtype)) for dtype in (torch.float, torch.double)]
    weights = [projected_of(linear, 4, maker=maker) for linear in linears]
    x = torch.randn(9, 16, generator=seeded())
    sum(linear(x.to(linear.weight)).logsumexp(-1).sum() for linear in linears).backward()
    assert [weight.trained.grad.dtype for weight in weights] == [torch.float, torch.double]
    for copied in (copy.deepcopy(linears[0]), pickle.loads(pickle.dumps(linears[0]))):
        copied.projected.end_basis()
        copied(x).logsumexp(-1).sum().backward()
        assert copied.projected.is_given and copied.projected is not weights[0]


def test_a_linear_is_itself_again():
    linear = nn.Linear(16, 24)
    x = torch.randn(3, 16)
    expected = linear(x).detach()
    weight = projected_of(linear, 4)
    assert torch.equal(linear(x), expected)
    linear(x).sum().backward()
    merge(weight)
    weight.release()
    assert torch.equal(linear(x), expected)
    quantize(linear, "int8")
    quantized = linear(x)
    weight.engage()
    assert torch.equal(linear(x), quantized)
    weight.release()
    assert torch.equal(linear(x), quantized)


def test_stochastic_rounding_goes_to_a_neighbor_and_is_exact_on_average():
    lower, upper = torch.tensor([1.0, -1.0]), torch.tensor([1.0078125, -1.0078125])  # neighbors in bfloat16
    values = (lower + 0.3 * (upper - lower)).repeat(50_001)  # no multiple of 4
    weight = torch.zeros(len(values), dtype=torch.bfloat16)
    round_to(weight, values.clone(), noise_for(weight, seeded()))
    for sign, low, high in zip((0, 1), lower, upper, strict=True):
        rounded = weight[sign::2].float()
        assert set(rounded.tolist()) == {low.item(), high.item()}
        assert (rounded == high).float().mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, 1.5, -3.0, torch.inf, -torch.inf] * 100)
    weight = torch.zeros(len(exact), dtype=torch.bfloat16)
    round_to(weight, exact.clone(), noise_for(weight, seeded()))
    assert torch.equal(weight.float(), exact)


@pytest.mark.parametrize("side", ["right", "shape"])
def test_a_bfloat16_weight_follows_its_float32_twin(side):
    weights, steps = weights_and_grads(4)
    halves, half_steps = [w.bfloat16() for w in weights], [[g.bfloat16() for g in grads] for grads in steps]
    options = {"lr": 0.1, "rank": 4, "side": side, "weight_decay": 0.3}
    ours = train(halves, half_steps, 10, **options)
    twins = train([w.float() for w in halves], [[g.float() for g in grads] for grads in half_steps], 10, **options)
    for start, a, b in zip(halves, twins, ours, strict=True):
        assert (a - start.float()).abs().mean() > 0.1
        torch.testing.assert_close(b.float(), a, atol=0.05, rtol=0)
