import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from torchtune.training import set_activation_checkpointing

from owlore_tune.layers.active import ActiveLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.models.decoder import find_layers, model_parts
from owlore_tune.optim.adamw import OwLoreAdamW, parameter_groups


def setup(
    model, *, num_active=2, every=3, draw="systematic", seed=0, hooks=True, inactive="drop", groups=None, **optimizer
):
    optimizer = OwLoreAdamW(
        parameter_groups(model, **(groups or {})), **{"rank": 8, "lr": 1e-2, "eps": 1e-3, **optimizer}
    )
    num_layers = len(find_layers(model))
    sampler = LayerSampler([1.0] * num_layers, num_active, draw, seed)
    active = ActiveLayers(
        model, optimizer, sampler, resample_every=every, inactive_state=inactive, project_in_backward=hooks
    )
    return optimizer, active


def train(model, optimizer, active, tokens, num_steps=8, micro_batch=4, max_norm=float("inf"), first=0):
    for step in range(first, first + num_steps):
        active.maybe_redraw(step)
        batch = tokens.roll(step, 1)
        for rows in batch.split(micro_batch):
            loss = F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
            (loss * len(rows) / len(batch)).backward()
            optimizer.project_grads()
        optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_weights(a, b, atol):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def trained_pair(tokens, one: dict, other: dict, one_loop: dict, other_loop: dict, dtype=torch.float64):
    models = []
    for options, loop in ((one, one_loop), (other, other_loop)):
        model = tiny_llama(dtype=dtype)
        train(model, *setup(model, **options), tokens, **loop)
        models.append(model)
    return models


@pytest.mark.parametrize("max_norm", [float("inf"), 1e-2])
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_projecting_in_backward_equals_projecting_after_it(tokens, micro_batch, max_norm):
    loop = {"micro_batch": micro_batch, "max_norm": max_norm}
    on, off = trained_pair(tokens, {"hooks": True}, {"hooks": False}, loop, loop)
    assert_equal_weights(on, off, atol=0)


@pytest.mark.parametrize("max_norm", [float("inf"), 1e-2])
@pytest.mark.parametrize("rank", [None, 8])
def test_four_micro_batches_of_one_equal_one_of_four(tokens, rank, max_norm):
    """Both runs share the basis of the first step, because a refresh uses the first micro-batch, which differs."""
    models = []
    for micro_batch in (4, 1):
        model = tiny_llama(dtype=torch.float64)
        optimizer, active = setup(model, rank=rank, every=100, update_gap=100)
        train(model, optimizer, active, tokens, num_steps=1, micro_batch=4)
        train(model, optimizer, active, tokens, num_steps=6, micro_batch=micro_batch, max_norm=max_norm, first=1)
        models.append(model)
    assert_equal_weights(*models, atol=1e-7)  # torchtune's RMSNorm always computes in float32


def test_layers_whose_weights_changed_are_known_until_the_next_draw(tokens):
    model = tiny_llama()
    _, active = setup(model, every=3)
    one, other = active.maybe_redraw(0)
    assert active.last_moved == [] and active.moved() == []
    with torch.no_grad():
        model.layers[one].mlp.w1.weight[0, 0] += 1e-3
    assert active.moved() == [one]
    _, resumed = setup(model, every=3, seed=1)
    resumed.load_state_dict(active.state_dict())
    assert resumed.moved() == [one]
    with torch.no_grad():
        model.layers[other].sa_norm.scale[0] += 1e-3
    assert active.maybe_redraw(2) is None
    for layers in (active, resumed):
        assert layers.maybe_redraw(3) is not None
        assert layers.last_moved == [one, other] and layers.moved() == []


def test_hooks_leave_no_full_gradient_of_a_projected_weight(tokens):
    model = tiny_llama()
    optimizer, active = setup(model)
    active.maybe_redraw(0)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and optimizer.is_projected(parameter):
            assert parameter.grad is None, name
    assert {g.shape[1] for g in optimizer.step_grads().values() if g.ndim == 2} == {8}


@pytest.mark.parametrize("rank", [None, 8])
def test_state_bytes_do_not_grow_with_the_number_of_draws(tokens, rank):
    model = tiny_llama(num_layers=8)
    optimizer, active = setup(model, rank=rank, every=1, num_active=3)
    sizes = []
    for step in range(20):
        train(model, optimizer, active, tokens, num_steps=1, first=step)
        sizes.append(optimizer.state_bytes())
    assert sizes[1] == sizes[19] > 0
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("inactive", ["drop", "offload", "keep"])
def test_state_of_a_layer_that_leaves(tokens, inactive):
    model = tiny_llama(num_layers=2)
    optimizer, active = setup(model, num_active=1, every=1, inactive=inactive)
    seen = []
    while len(set(seen)) < 2:
        train(model, optimizer, active, tokens, num_steps=1, first=len(seen))
        seen += active.active
    left = model.layers[1 - seen[-1]].mlp.w1.weight
    assert left.grad is None
    assert not left.requires_grad
    if inactive == "drop":
        assert left not in optimizer.state
        return
    old = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[left].items()}
    step = len(seen)
    while active.active == [seen[-1]]:
        active.maybe_redraw(step)
        step += 1
    for key, value in optimizer.state[left].items():
        assert torch.equal(value, old[key]) if torch.is_tensor(value) else value == old[key]
    train(model, optimizer, active, tokens, num_steps=1, first=step - 1)
    state = optimizer.state[left]
    assert torch.equal(state["basis"], old["basis"])  # refresh depends on the basis age, here 2 of 100 steps
    assert state["basis_age"] == old["basis_age"] + 1


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_since(before: dict[str, torch.Tensor], model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_only_active_layers_change(tokens):
    model = tiny_llama(num_layers=6)
    optimizer, active = setup(model, every=4)
    for first in (0, 4, 8):
        before = snapshot(model)
        train(model, optimizer, active, tokens, num_steps=4, first=first)
        changed = changed_since(before, model)
        assert {int(name.split(".")[1]) for name in changed} == set(active.active)
        assert len(changed) == 9 * len(active.active)


def test_what_is_trained_outside_the_layers(tokens):
    model = tiny_llama()
    optimizer, active = setup(model, groups={"train_embeddings": True, "train_norm": True})
    before = snapshot(model)
    train(model, optimizer, active, tokens, num_steps=1)
    outside = {name for name in changed_since(before, model) if not name.startswith("layers.")}
    assert outside == {"tok_embeddings.weight", "norm.scale"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_below_the_lowest_active_layer_is_saved_or_gets_a_backward(tokens, checkpointing):
    model = tiny_llama(num_layers=6)
    optimizer, active = setup(model, num_active=2, seed=1)
    active.maybe_redraw(0)
    lowest = min(active.active)
    assert lowest > 0
    if checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={type(model.layers[0])})
    requires_grad, backwards = [], []
    for i, layer in enumerate(find_layers(model)):
        layer.register_forward_hook(lambda m, args, out: requires_grad.append(out.requires_grad))
        layer.register_full_backward_hook(lambda m, gi, go, i=i: backwards.append(i))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert requires_grad[:6] == [i >= lowest for i in range(6)]
    assert set(backwards) == set(range(lowest, 6))


def test_checkpointed_training_equals_plain(tokens):
    plain, checkpointed = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    train(plain, *setup(plain), tokens)
    parts = setup(checkpointed)
    set_activation_checkpointing(checkpointed, auto_wrap_policy={type(checkpointed.layers[0])})
    train(checkpointed, *parts, tokens)
    assert_equal_weights(plain, checkpointed, atol=0)


@pytest.mark.parametrize("inactive", ["drop", "keep"])
def test_a_schedule_restored_mid_interval_trains_the_same_layers(tokens, inactive):
    model = tiny_llama(num_layers=6)
    optimizer, active = setup(model, every=4, inactive=inactive)
    train(model, optimizer, active, tokens, num_steps=6)
    twin = copy.deepcopy(tiny_llama(num_layers=6))
    twin.load_state_dict(model.state_dict())
    twin_optimizer, twin_active = setup(twin, every=4, seed=99, inactive=inactive)
    twin_active.load_state_dict(active.state_dict())
    twin_optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, active, tokens, num_steps=6, first=6)
    train(twin, twin_optimizer, twin_active, tokens, num_steps=6, first=6)
    assert active.active == twin_active.active
    assert_equal_weights(model, twin, atol=0)


def test_trainable_parameters_are_counted():
    model = tiny_llama()
    _, active = setup(model)
    assert active.num_trainable() == 0
    active.maybe_redraw(0)
    per_layer = sum(p.numel() for p in model.layers[0].parameters())
    assert active.num_trainable() == 2 * per_layer


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="resample_every=-1"):
        setup(tiny_llama(), every=-1)
    with pytest.raises(ValueError, match="inactive_state='lose'; choose one of drop"):
        setup(tiny_llama(), inactive="lose")


def test_a_parameter_outside_all_parts_is_an_error():
    model = tiny_llama()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight is in no layer"):
        model_parts(model)
