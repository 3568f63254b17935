"""OwLore in a plain loop beside a stock optimizer: the same training as with `OwLoreAdamW`, in less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from test_active_layers import setup
from test_active_layers import train as train_as_today
from torchao.optim import AdamW8bit

from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.sampler import LayerSampler


def layers_of(model, num_active=2, every=3, seed=0, **options) -> ProjectedLayers:
    sampler = LayerSampler([1.0] * len(model.layers), num_active, "systematic", seed)
    return ProjectedLayers(model, sampler, rank=options.pop("rank", 8), resample_every=every, **options)


def train(model, layers, optimizer, tokens, num_steps=8, micro_batch=4, max_norm=None, first=0):
    """The loop of a user, with accumulation and torch's clipping."""
    for step in range(first, first + num_steps):
        layers.begin_step()
        batch = tokens.roll(step, 1)
        for rows in batch.split(micro_batch):
            loss = F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
            (loss * len(rows) / len(batch)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p in layers.parameters() if p.grad is not None], max_norm)
        optimizer.step()
        optimizer.zero_grad()
    layers.merge()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
@pytest.mark.parametrize(("max_norm", "micro_batch"), [(None, 4), (1e-2, 4), (1e-2, 2)])
def test_it_trains_as_the_optimizer_of_full_gradients(moments, max_norm, micro_batch, tokens):
    """8 steps over 3 draws, with refreshes and weight decay; exact bases, so that sketches do not matter."""
    one, other = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    options = {"basis": "svd", "moments": moments, "update_gap": 2}
    optimizer, active = setup(one, **options, weight_decay=0.1)
    train_as_today(one, optimizer, active, tokens, max_norm=max_norm or float("inf"), micro_batch=micro_batch)
    layers = layers_of(other, **options)
    stock = torch.optim.AdamW(layers.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    layers.attach(stock)
    start = weights_of(other)
    train(other, layers, stock, tokens, max_norm=max_norm, micro_batch=micro_batch)
    expected, got = weights_of(one), weights_of(other)
    for name, weight in got.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=0, msg=name)
    assert max((got[name] - start[name]).abs().max() for name in got) > 1e-3


def test_layers_that_never_trained_keep_their_bits_and_others_stay_out_of_the_optimizer(tokens):
    model = tiny_llama(num_layers=6)
    layers = layers_of(model)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    layers.attach(optimizer)
    before, trained = weights_of(model), set()
    for step in range(8):
        train(model, layers, optimizer, tokens, num_steps=1, first=step)
        trained.update(layers.active)
    changed = {int(name.split(".")[1]) for name, w in weights_of(model).items() if not torch.equal(w, before[name])}
    assert changed == trained and len(trained) < 6
    active = {p for i in layers.active for p in model.layers[i].parameters()} | {
        weight.trained for _, weight in layers._active_weights()
    }
    assert set(optimizer.state) <= active
    assert all(p.numel() == 0 for p in layers.parameters() if p not in active and p.ndim == 1 and not p.requires_grad
               and p not in set(model.parameters()))  # fmt: skip


@pytest.mark.parametrize("moments", ["keep", "project"])
@pytest.mark.parametrize("step", [2, 4, 6], ids=["at a refresh", "within a basis", "at a draw"])
def test_a_resumed_loop_has_the_same_bits(step, moments, tokens):
    """Saved between two steps, without a merge."""

    def begin(model):
        layers = layers_of(model, moments=moments, update_gap=2)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, weight_decay=0.1)
        layers.attach(optimizer)
        return layers, optimizer

    def steps(model, layers, optimizer, first, count):
        for number in range(first, first + count):
            layers.begin_step()
            F.cross_entropy(model(tokens.roll(number, 1)).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, broken, resumed = tiny_llama(), tiny_llama(), tiny_llama(seed=1)
    layers, optimizer = begin(whole)
    steps(whole, layers, optimizer, 0, 10)
    layers.merge()
    layers, optimizer = begin(broken)
    steps(broken, layers, optimizer, 0, step)
    saved = copy.deepcopy((broken.state_dict(), layers.state_dict(), optimizer.state_dict()))
    resumed.load_state_dict(saved[0])
    layers, optimizer = begin(resumed)
    layers.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    steps(resumed, layers, optimizer, step, 10 - step)
    layers.merge()
    assert all(torch.equal(weight, weights_of(resumed)[name]) for name, weight in weights_of(whole).items())


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.AdamW])
def test_optimizers_of_torch_lower_the_loss(build, tokens):
    model = tiny_llama()
    layers = layers_of(model, num_active=4, every=50, update_gap=4)
    optimizer = build(layers.parameters(), lr=1e-2)
    layers.attach(optimizer)

    def loss():
        with torch.no_grad():
            return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    before = loss()
    train(model, layers, optimizer, tokens, num_steps=12)
    assert loss() < before


def test_moments_in_8_bits_of_torchao(tokens, monkeypatch):
    """Its parameters must have a multiple of 256 values to be quantized; others keep their precision."""
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # needs a C++ compiler
    one, other = tiny_llama(), tiny_llama()
    for model, build in ((one, torch.optim.AdamW), (other, AdamW8bit)):
        layers = layers_of(model, moments="project", update_gap=2)
        optimizer = build(layers.parameters(), lr=1e-3, eps=1e-3)
        layers.attach(optimizer)
        train(model, layers, optimizer, tokens)
    for name, weight in weights_of(other).items():
        torch.testing.assert_close(weight, weights_of(one)[name], atol=1e-3, rtol=0, msg=name)


def test_projecting_the_moments_of_an_optimizer_without_them_is_refused(tokens):
    model = tiny_llama()
    layers = layers_of(model, moments="project", update_gap=1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-2, momentum=0.9)
    layers.attach(optimizer)
    with pytest.raises(ValueError, match="moments=project; SGD has no exp_avg and exp_avg_sq to project"):
        train(model, layers, optimizer, tokens)


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_weight_decay_that_is_not_decoupled_is_refused(build):
    layers = layers_of(tiny_llama())
    with pytest.raises(ValueError, match=f"weight_decay=0.1; {build.__name__} adds it to the gradient: set it to 0"):
        layers.attach(build(layers.parameters(), lr=1e-2, weight_decay=0.1))


def test_bad_values_are_refused():
    model = tiny_llama()
    for options, message in (({"every": 0}, "resample_every=0"), ({"update_gap": 0}, "update_gap=0")):
        with pytest.raises(ValueError, match=f"{message}; it must be at least 1 optimizer step"):
            layers_of(copy.deepcopy(model), **options)
    with pytest.raises(ValueError, match="moments='x'; choose one of keep, project, reset"):
        layers_of(model, moments="x")
