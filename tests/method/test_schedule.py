"""Which layers train, when their bases end, and what an optimizer knows about them, in a plain loop."""

import copy
from functools import partial
from io import BytesIO

import pytest
import torch
from accelerate import Accelerator
from reference import train_with_full_gradients
from schedules import changed, loss_of, setup, train, weights_of
from tiny import tiny_llama
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune.models.llama2 import llama2
from torchtune.training import set_activation_checkpointing

from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.layers.schedule import Schedule
from owlore_tune.models.decoder import find_layers, model_parts
from owlore_tune.optim.moments import carry_moments, state_bytes
from owlore_tune.optim.weights import WholeParameter


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
@pytest.mark.parametrize(
    ("max_norm", "micro_batch", "side", "scale", "rank"),
    [
        (None, 4, "right", 1.0, 8),
        (1e-2, 4, "right", 1.0, 8),
        (1e-2, 2, "right", 1.0, 8),
        (1e-2, 2, "shape", 0.5, 8),
        (1e-2, 1, "right", 1.0, None),
    ],
)
def test_it_trains_as_with_full_gradients(moments, max_norm, micro_batch, side, scale, rank, tokens):
    """8 steps over 3 draws, with refreshes and weight decay; exact bases, so that sketches do not matter."""
    one, other = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    options = {"moments": moments, "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "side": side, "scale": scale}

    def losses(step):
        batch = tokens.roll(step, 1)
        return [
            lambda model, rows=rows: loss_of(model, rows) * len(rows) / len(batch) for rows in batch.split(micro_batch)
        ]

    sampler = LayerSampler([1.0] * 4, 2, "systematic", 0)
    train_with_full_gradients(
        one, sampler, losses, 8, every=3, gap=2, max_norm=max_norm, rank=rank or 10**3, **options
    )  # fmt: skip
    start = weights_of(other)
    parts = setup(other, basis="svd", update_gap=2, rank=rank, **options)
    train(other, parts, tokens, 8, micro_batch, max_norm, merge=True)
    expected, got = weights_of(one), weights_of(other)
    for name, weight in got.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=0, msg=name)
    assert max((got[name] - start[name]).abs().max() for name in got) > 1e-3


@pytest.mark.parametrize("rank", [None, 8])
def test_layers_that_never_trained_keep_their_bits_and_state_is_of_the_layers_that_train(rank, tokens):
    """So the state does not grow with the number of draws."""
    model = tiny_llama(num_layers=8)
    parts = layers, optimizer, schedule = setup(model, rank=rank, every=2)
    before, trained, sizes = weights_of(model), set(), []
    for step in range(6):
        train(model, parts, tokens, num_steps=1, first=step)
        trained.update(schedule.active)
        sizes.append(state_bytes(optimizer) + layers.nbytes())
        assert set(optimizer.state) == set(layers.trained().values())
    moved = changed(before, weights_of(model, layers))
    assert {int(name.split(".")[1]) for name in moved} == trained and len(moved) == 9 * len(trained)
    assert 2 < len(trained) < 8
    assert len(set(sizes)) == 1 and sizes[0] > 0
    idle = [layer for index, layer in enumerate(layers.layers) if index not in schedule.active]
    assert all(
        weight.trained.numel() == 0 and weight.nbytes == 0 for layer in idle for weight in layer.weights.values()
    )


def test_a_merge_writes_what_an_export_reads(tokens):
    model = tiny_llama()
    layers, _, _ = parts = setup(model, num_active=4)
    start = weights_of(model)
    train(model, parts, tokens, num_steps=3)
    assert not any(name.endswith("weight") for name in changed(start, weights_of(model)))
    exported = weights_of(model, layers)
    with torch.no_grad():
        before = model(tokens)
        layers.merge()
        torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=1e-5)
    assert not changed(exported, weights_of(model)) and len(changed(start, exported)) == 4 * 9


def test_layers_whose_weights_changed_are_known_until_the_next_draw(tokens):
    model, twin = tiny_llama(), tiny_llama()
    layers, _, schedule = parts = setup(model, every=3)
    one, other = schedule.begin_step()
    assert schedule.last_moved == [] and schedule.moved() == []
    loss_of(model, tokens).backward()
    with torch.no_grad():
        next(iter(layers.layers[one].weights.values())).trained[0, 0] += 1e-3
    resumed = setup(twin, every=3, seed=1)[2]
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert resumed.moved() == schedule.moved() == [one]
    train(model, parts, tokens, num_steps=3)
    assert schedule.begin_step() is not None
    assert schedule.last_moved == [one, other] and schedule.moved() == []


@pytest.mark.parametrize("inactive", ["drop", "offload", "keep"])
def test_state_of_a_layer_that_leaves(tokens, inactive):
    model = tiny_llama(num_layers=2)
    parts = layers, optimizer, schedule = setup(model, num_active=1, every=1, inactive_state=inactive)
    seen = []
    while len(set(seen)) < 2:
        train(model, parts, tokens, num_steps=1, first=len(seen))
        seen += schedule.active
    left = layers.layers[1 - seen[-1]].weights[f"layers.{1 - seen[-1]}.mlp.w1.weight"]
    assert left.trained.grad is None and not left.trained.requires_grad
    if inactive == "drop":
        assert left.trained not in optimizer.state and left.basis is None
        return
    old = {key: value.clone() for key, value in optimizer.state[left.trained].items()}
    basis, age = left.basis.clone(), layers.layers[1 - seen[-1]].age
    step = len(seen)
    while schedule.active == [seen[-1]]:
        train(model, parts, tokens, num_steps=1, first=step)
        step += 1
    assert optimizer.state[left.trained]["step"] == old["step"] + 1
    assert torch.equal(left.basis, basis)  # a refresh depends on the layer's own steps, here 2 of 100
    assert layers.layers[1 - seen[-1]].age == age + 1


def test_after_a_resume_state_of_inactive_layers_is_in_host_memory(tokens, monkeypatch):
    """Here, the device is the CPU, and the host is a device without data."""
    options = {"num_active": 1, "every": 5, "inactive_state": "offload"}
    model = tiny_llama(num_layers=3)
    _, optimizer, schedule = parts = setup(model, **options)
    train(model, parts, tokens, num_steps=8)
    assert len(optimizer.state) > 2 * len(schedule.layers.layers[0].weights)  # of two layers
    layers, resumed, other = setup(tiny_llama(num_layers=3), **options)
    other.load_state_dict(schedule.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    monkeypatch.setattr("owlore_tune.layers.schedule.HOST", torch.device("meta"))
    other.begin_step()
    for index, layer in enumerate(layers.layers):
        expected = {"cpu"} if index in layers.active else {"meta"}
        places = {resumed.state[p]["exp_avg"].device.type for p in layer.trained().values() if p in resumed.state}
        places |= {weight.basis.device.type for weight in layer.weights.values() if weight.basis is not None}
        assert places in (expected, set())


def test_what_is_trained_outside_the_layers(tokens):
    model = tiny_llama()
    layers, _, schedule = parts = setup(model, outside={"train_embeddings": True, "train_norm": True})
    projected, others = (group["params"] for group in layers.parameter_groups())
    assert len(projected) == 4 * 7 and len({*projected, *others}) == len(list(model.parameters())) - 1  # no output
    before, outside = weights_of(model), {"tok_embeddings.weight", "norm.scale"}
    train(model, parts, tokens, num_steps=1)
    assert {name for name in changed(before, weights_of(model)) if not name.startswith("layers.")} == outside
    trained = [*model.layers[0].parameters(), *model.layers[1].parameters(), *(before[name] for name in outside)]
    assert layers.num_trainable() == sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_below_the_lowest_active_layer_is_saved_or_gets_a_backward(tokens, checkpointing):
    model = tiny_llama(num_layers=6)
    layers, _, schedule = setup(model, num_active=2, seed=1)
    schedule.begin_step()
    lowest = min(schedule.active)
    assert lowest > 0
    if checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={type(model.layers[0])})
    requires_grad, backwards = [], []
    for i, layer in enumerate(find_layers(model)):
        layer.register_forward_hook(lambda m, args, out: requires_grad.append(out.requires_grad))
        layer.register_full_backward_hook(lambda m, gi, go, i=i: backwards.append(i))
    loss_of(model, tokens).backward()
    assert requires_grad[:6] == [i >= lowest for i in range(6)]
    assert set(backwards) == set(range(lowest, 6))
    assert all(linear.grad is None for name, linear in model.named_parameters() if "norm" not in name)


def assert_resumes(models, tokens, step, **settings):
    """Saved between two steps, with the updates in the saved weights. The second model goes on with the same bits, and
    so does the first one if the state is loaded after its further draws."""
    parts = [setup(model, seed=seed, **settings) for seed, model in enumerate(models)]
    first, (layers, optimizer, schedule) = models[0], parts[0]
    train(first, parts[0], tokens, num_steps=step)
    torch.save([weights_of(first, layers), schedule.state_dict(), optimizer.state_dict()], file := BytesIO())
    train(first, parts[0], tokens, num_steps=10 - step, first=step)
    expected = weights_of(first, layers)
    for model, (layers, optimizer, schedule) in zip(models[::-1], parts[::-1], strict=True):
        file.seek(0)
        for part, saved in zip((model, schedule, optimizer), torch.load(file), strict=True):
            part.load_state_dict(saved)
        train(model, (layers, optimizer, schedule), tokens, num_steps=10 - step, first=step)
        assert not changed(expected, weights_of(model, layers))


@pytest.mark.parametrize(
    ("options", "dtype", "step"),
    [
        ({"moments": "project"}, torch.float32, 2),  # at a refresh
        ({"moments": "project"}, torch.bfloat16, 4),  # within a basis
        ({"inactive_state": "keep"}, torch.bfloat16, 6),  # at a draw
        ({"inactive_state": "keep", "num_active": 1, "every": 1}, torch.float32, 2),
        ({"inactive_state": "offload", "moments": "reset"}, torch.float32, 4),
        ({"rank": None}, torch.bfloat16, 4),
    ],
    ids=str,
)
def test_a_resumed_loop_has_the_same_bits(options, dtype, step, tokens):
    settings = dict(every=3, update_gap=2, weight_decay=0.1, outside={"train_norm": True}) | options
    assert_resumes([tiny_llama(dtype=dtype, seed=seed, num_layers=6) for seed in (0, 1)], tokens, step, **settings)


@pytest.mark.parametrize("moments", ["keep", "project"])
@torch.compiler.set_stance("force_eager")  # torchao's optimizers compile themselves, which needs a C++ compiler
def test_moments_in_8_bits_of_torchao(moments, tokens):
    """At a size from which on torchao quantizes them, also over a resume: 4096 values, in multiples of 256."""
    found, settings = [], dict(rank=32, moments=moments, update_gap=2, lr=1e-3, eps=1e-3)

    def model():
        torch.manual_seed(0)
        return llama2(64, 2, 4, 2, 128, max_seq_len=64, intermediate_dim=256)

    for build in (torch.optim.AdamW, AdamW8bit):
        layers, optimizer, _ = parts = setup(trained := model(), build=build, **settings)
        train(trained, parts, tokens)
        found.append(weights_of(trained, layers))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=1e-3, rtol=0, msg=name)
    state = [value for state in optimizer.state.values() for value in state.values()]
    assert len([value for value in state if isinstance(value, OptimState8bit)]) > 8
    assert_resumes([model(), model()], tokens, 5, build=AdamW8bit, **settings)


def test_a_fused_step_that_a_gradient_scaler_skips_changes_nothing(tokens):
    """The scaler calls it, and the optimizer itself skips."""
    model = tiny_llama()
    build = partial(torch.optim.AdamW, fused=True)
    layers, optimizer, schedule = setup(model, build=build, weight_decay=0.5, lr=0.1)
    scaler, found = torch.amp.GradScaler("cpu"), []
    for factor in (1.0, torch.inf, 1.0):
        schedule.begin_step()
        scaler.scale(loss_of(model, tokens) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append((weights_of(model, layers), layers.num_steps))
    assert not changed(found[0][0], found[1][0]) and len(changed(found[1][0], found[2][0])) > 7
    assert [num_steps for _, num_steps in found] == [1, 1, 2]


def test_gradients_of_vectors_in_16_bits_accumulate_in_float32():
    parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    whole = WholeParameter(parameter)
    whole.engage()
    first, second = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for grad in (first, second):
        (parameter * grad).sum().backward()
    assert torch.equal(whole.trained.grad, first.float() + second.float()) and parameter.grad is None
    assert not torch.equal(whole.trained.grad, (first + second).float())


def test_a_second_schedule_of_an_optimizer_and_second_layers_of_a_model_are_refused(tokens):
    model = tiny_llama(dtype=torch.bfloat16)
    layers, optimizer, schedule = parts = setup(model, outside={"train_norm": True})
    with pytest.raises(ValueError, match="this optimizer already has a schedule; make a new optimizer"):
        Schedule(layers, optimizer, schedule.sampler)
    train(model, parts, tokens, num_steps=1, merge=True)
    with pytest.raises(
        ValueError, match=r"other ProjectedLayers train this model; merge\(\) and activate.* load it anew"
    ):
        setup(model)
    layers.activate([])
    train(model, setup(model, outside={"train_norm": True}), tokens, num_steps=1)
    model = tiny_llama(dtype=torch.bfloat16)
    train(model, setup(model, rank=None), tokens, num_steps=1)
    with pytest.raises(RuntimeError, match="other ProjectedLayers already train this model; load the model anew"):
        train(model, setup(model, rank=None), tokens, num_steps=8)


def test_vectors_in_16_bits_train_in_float32_over_many_draws(tokens):
    """A norm of 1 would not move in bfloat16: in one draw, it learns a fortieth of the distance to its neighbor."""
    model = tiny_llama(dtype=torch.bfloat16)
    parts = layers, _, _ = setup(model, num_active=1, lr=1e-4, every=1)
    train(model, parts, tokens, num_steps=60)
    parameters = dict(model.named_parameters())
    for name, whole in [others for layer in layers.layers for others in layer.others.items()]:
        assert whole.trained.dtype == torch.float32 and (whole.trained - 1).abs().max() > 5e-4, name
        assert torch.equal(parameters[name], whole.trained.bfloat16())
    with torch.no_grad():
        scale = model.layers[0].sa_norm.scale.fill_(2.0)  # other weights are loaded
    layers.activate([])
    layers.activate([0])
    assert torch.equal(layers.layers[0].others["layers.0.sa_norm.scale"].trained, scale.float())


@pytest.mark.parametrize(
    ("parameters", "num_scores", "message"),
    [
        ("model's", 4, "lacks 28 parameters that can train; make it from layers.parameter_groups"),  # all but norms
        ("layers'", 3, "the sampler has scores of 3 layers, and the model has 4 layers"),
        ("layers'", 5, "the sampler has scores of 5 layers, and the model has 4 layers"),
    ],
)
def test_an_optimizer_or_a_sampler_of_something_else_is_refused(parameters, num_scores, message):
    """It would leave out parameters or layers without an error."""
    model = tiny_llama()
    layers = ProjectedLayers(model, rank=8)
    optimizer = torch.optim.AdamW(model.parameters() if parameters == "model's" else layers.parameter_groups())
    with pytest.raises(ValueError, match=message):
        Schedule(layers, optimizer, LayerSampler([1.0] * num_scores, 2))


def test_projecting_the_moments_of_an_optimizer_without_them_is_refused(tokens):
    model = tiny_llama()
    parts = setup(model, moments="project", build=torch.optim.SGD, momentum=0.9)
    with pytest.raises(ValueError, match="moments=project; SGD has no exp_avg and exp_avg_sq to project"):
        train(model, parts, tokens, num_steps=1)  # and not at the first refresh


def test_the_largest_second_moment_of_amsgrad_is_projected_too():
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = torch.optim.Adam([parameter], amsgrad=True)
    parameter.grad = torch.randn(6, 4)
    optimizer.step()
    turn, expected = torch.eye(4).roll(1, 0), optimizer.state[parameter]["max_exp_avg_sq"].roll(-1, 1)
    carry_moments(optimizer, parameter, turn, "project", right=True)
    assert torch.equal(optimizer.state[parameter]["max_exp_avg_sq"], expected)


def test_an_optimizer_that_accelerate_has_wrapped_trains_the_same(tokens):
    found = []
    for prepare in (lambda optimizer: optimizer, Accelerator(cpu=True).prepare):
        model = tiny_llama()
        layers = ProjectedLayers(model, rank=8)
        optimizer = prepare(torch.optim.AdamW(layers.parameter_groups(), lr=1e-2))
        train(model, (layers, optimizer, Schedule(layers, optimizer, LayerSampler([1.0] * 4, 2))), tokens)
        found.append(weights_of(model, layers))
    assert not changed(*found) and changed(found[0], weights_of(tiny_llama()))


COUPLED = "weight_decay=0.1; that of {} is not known to be decoupled: set it to 0, or use AdamW"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0; it must be an integer >= 1, or null"),
        ({"rank": 32}, "rank=32; no weight's shorter side is above it"),
        ({"side": "left"}, "side='left'; choose one of right, shape"),
        ({"scale": -1.0}, "scale=-1.0; it must be a finite number >= 0"),
        ({"moments": "drop"}, "moments='drop'; choose one of keep, project, reset"),
        ({"basis": "qr"}, "basis='qr'; choose one of randomized, svd"),
        ({"update_gap": 0}, "update_gap=0; it must be at least 1 optimizer step"),
        ({"every": -1}, "resample_every=-1; it must be at least 1 optimizer step"),
        ({"inactive_state": "lose"}, "inactive_state='lose'; choose one of drop"),
        ({"build": torch.optim.SGD, "weight_decay": 0.1}, COUPLED.format("SGD")),
        ({"build": torch.optim.Adam, "weight_decay": 0.1}, COUPLED.format("Adam")),
        ({"build": torch.optim.Adagrad}, "Adagrad makes its state before A has values; use one that makes it in its"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        setup(tiny_llama(), **options)


def test_weights_too_small_for_the_rank_are_trained_whole_with_a_warning(tokens):
    model = tiny_llama()
    with pytest.warns(UserWarning, match=r"rank=16 is not below the shorter side \(16\) of 8 of 28 weights"):
        parts = setup(model, rank=16)
    before = weights_of(model)
    train(model, parts, tokens, num_steps=1)
    small = {name.split(".")[3] for name in changed(before, weights_of(model)) if "attn." in name}
    assert small == {"k_proj", "v_proj"}


def test_a_parameter_outside_all_parts_is_an_error():
    model = tiny_llama()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight is in no layer"):
        model_parts(model)
