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
    ("max_norm", "micro_batch", "side", "scale"),
    [(None, 4, "right", 1.0), (1e-2, 4, "right", 1.0), (1e-2, 2, "right", 1.0), (1e-2, 2, "shape", 0.5)],
)
def test_it_trains_as_with_full_gradients(moments, max_norm, micro_batch, side, scale, tokens):
    """8 steps over 3 draws, with refreshes and weight decay; exact bases, so that sketches do not matter."""
    one, other = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    options = {"rank": 8, "moments": moments, "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "side": side}
    options["scale"] = scale

    def losses(step):
        batch = tokens.roll(step, 1)
        return [
            lambda model, rows=rows: loss_of(model, rows) * len(rows) / len(batch) for rows in batch.split(micro_batch)
        ]

    sampler = LayerSampler([1.0] * 4, 2, "systematic", 0)
    train_with_full_gradients(one, sampler, losses, 8, every=3, gap=2, max_norm=max_norm, **options)
    start = weights_of(other)
    train(
        other, setup(other, basis="svd", update_gap=2, **options), tokens, 8, micro_batch, max_norm, merge=True
    )  # fmt: skip
    expected, got = weights_of(one), weights_of(other)
    for name, weight in got.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=0, msg=name)
    assert max((got[name] - start[name]).abs().max() for name in got) > 1e-3


@pytest.mark.parametrize("max_norm", [None, 1e-2])
@pytest.mark.parametrize("rank", [None, 8])
def test_four_micro_batches_of_one_equal_one_of_four(tokens, rank, max_norm):
    """Both runs share the basis of the first step, because a refresh uses the first micro-batch, which differs."""
    found = []
    for micro_batch in (4, 1):
        model = tiny_llama(dtype=torch.float64)
        parts = setup(model, rank=rank, every=100, update_gap=100, eps=1e-3)
        train(model, parts, tokens, num_steps=1)
        train(model, parts, tokens, num_steps=6, micro_batch=micro_batch, max_norm=max_norm, first=1)
        found.append(weights_of(model, parts[0]))
    for name, weight in found[0].items():  # torchtune's RMSNorm always computes in float32
        torch.testing.assert_close(weight, found[1][name], atol=1e-7, rtol=0)


def test_layers_that_never_trained_keep_their_bits_and_stay_out_of_the_optimizer(tokens):
    model = tiny_llama(num_layers=6)
    parts = layers, optimizer, schedule = setup(model, every=3)
    before, trained = weights_of(model), set()
    for step in range(8):
        train(model, parts, tokens, num_steps=1, first=step)
        trained.update(schedule.active)
    after = weights_of(model, layers)
    assert {int(name.split(".")[1]) for name in changed(before, after)} == trained and len(trained) < 6
    assert len(changed(before, after)) == 9 * len(trained)
    assert set(optimizer.state) == set(layers.trained().values())
    idle = [layer for index, layer in enumerate(layers.layers) if index not in schedule.active]
    assert all(
        weight.trained.numel() == 0 and weight.nbytes == 0 for layer in idle for weight in layer.weights.values()
    )


def test_a_merge_changes_the_weights_by_the_updates_and_an_export_nothing(tokens):
    model = tiny_llama()
    parts = layers, _, _ = setup(model, num_active=4, weight_decay=0.0)
    start = weights_of(model)
    train(model, parts, tokens, num_steps=3)
    assert not any(name.endswith("weight") for name in changed(start, weights_of(model)))
    exported = weights_of(model, layers)
    expected = {}
    for name, weight in layers.active_weights():
        factor = (weight.shape[1] / weight.shape[0]) ** 0.5 if weight.shape[1] > weight.shape[0] else 1.0
        expected[name] = start[name].double() + factor * weight.trained.detach().double() @ weight.basis.double().T
    with torch.no_grad():
        before = model(tokens)
        layers.merge()
        torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=1e-5)
    for name, weight in expected.items():
        assert torch.equal(weights_of(model)[name], exported[name])
        assert (exported[name] - weight.float()).abs().max() <= 2**-23 * weight.abs().max()


def test_layers_whose_weights_changed_are_known_until_the_next_draw(tokens):
    model = tiny_llama()
    layers, _, schedule = parts = setup(model, every=3)
    one, other = schedule.begin_step()
    assert schedule.last_moved == [] and schedule.moved() == []
    loss_of(model, tokens).backward()
    with torch.no_grad():
        next(iter(layers.layers[one].weights.values())).trained[0, 0] += 1e-3
    assert schedule.moved() == [one]
    twin = tiny_llama()
    _, _, resumed = setup(twin, every=3, seed=1)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert resumed.moved() == [one]
    train(model, parts, tokens, num_steps=3)
    assert schedule.begin_step() is not None
    assert schedule.last_moved == [one, other] and schedule.moved() == []


@pytest.mark.parametrize("rank", [None, 8])
def test_state_does_not_grow_with_the_number_of_draws(tokens, rank):
    model = tiny_llama(num_layers=8)
    parts = layers, optimizer, _ = setup(model, rank=rank, every=1, num_active=3)
    sizes = []
    for step in range(12):
        train(model, parts, tokens, num_steps=1, first=step)
        sizes.append(state_bytes(optimizer) + layers.nbytes())
    assert len(set(sizes)) == 1 and sizes[0] > 0


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
    parts = setup(model, outside={"train_embeddings": True, "train_norm": True})
    before = weights_of(model)
    train(model, parts, tokens, num_steps=1)
    outside = {name for name in changed(before, weights_of(model)) if not name.startswith("layers.")}
    assert outside == {"tok_embeddings.weight", "norm.scale"}


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


def test_checkpointed_training_equals_plain(tokens):
    plain, checkpointed = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    train(plain, setup(plain), tokens, merge=True)
    parts = setup(checkpointed)
    set_activation_checkpointing(checkpointed, auto_wrap_policy={type(checkpointed.layers[0])})
    train(checkpointed, parts, tokens, merge=True)
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "build"),
    [
        ({"moments": "project"}, torch.optim.AdamW),
        ({"inactive_state": "keep"}, torch.optim.AdamW),
        ({"inactive_state": "offload", "moments": "reset"}, torch.optim.AdamW),
        ({"rank": None}, torch.optim.AdamW),
        ({"moments": "project"}, AdamW8bit),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [2, 4, 6], ids=["at a refresh", "within a basis", "at a draw"])
def test_a_resumed_loop_has_the_same_bits(step, options, build, dtype, tokens, monkeypatch):
    """Saved between two steps, with or without the updates in the saved weights."""
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # torchao needs a C++ compiler
    settings = dict(every=3, update_gap=2, weight_decay=0.1, build=build, outside={"train_norm": True}) | options

    whole, broken, resumed = (tiny_llama(dtype=dtype, seed=seed, num_layers=6) for seed in (0, 0, 1))
    parts = setup(whole, **settings)
    train(whole, parts, tokens, num_steps=10)
    expected = weights_of(whole, parts[0])
    layers, optimizer, schedule = parts = setup(broken, **settings)
    train(broken, parts, tokens, num_steps=step)
    saved = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
    resumed.load_state_dict(weights_of(broken, layers))
    layers, optimizer, schedule = parts = setup(resumed, **settings | {"seed": 5})
    schedule.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, parts, tokens, num_steps=10 - step, first=step)
    assert not changed(expected, weights_of(resumed, layers))


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.AdamW])
def test_optimizers_of_torch_lower_the_loss(build, tokens):
    model = tiny_llama()
    parts = setup(model, num_active=4, every=50, update_gap=4, build=build)

    def loss():
        with torch.no_grad():
            return loss_of(model, tokens).item()

    before = loss()
    train(model, parts, tokens, num_steps=12)
    assert loss() < before


@pytest.mark.parametrize("moments", ["keep", "project"])
def test_moments_in_8_bits_of_torchao(moments, tokens, monkeypatch):
    """At a size from which on torchao quantizes them, also over a resume: 4096 values, in multiples of 256."""
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # needs a C++ compiler

    def trained(build, num_steps=8):
        torch.manual_seed(0)
        model = llama2(64, 2, 4, 2, 128, max_seq_len=64, intermediate_dim=256)
        parts = setup(model, rank=32, moments=moments, update_gap=2, build=build, lr=1e-3, eps=1e-3)
        train(model, parts, tokens, num_steps=num_steps)
        return model, parts

    found = [weights_of(model, parts[0]) for model, parts in (trained(torch.optim.AdamW), trained(AdamW8bit))]
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=1e-3, rtol=0, msg=name)

    broken, (layers, optimizer, schedule) = trained(AdamW8bit, num_steps=5)
    state = [value for state in optimizer.state.values() for value in state.values()]
    assert len([value for value in state if isinstance(value, OptimState8bit)]) > 8
    torch.save([weights_of(broken, layers), schedule.state_dict(), optimizer.state_dict()], file := BytesIO())
    file.seek(0)
    resumed, (layers, optimizer, schedule) = trained(AdamW8bit, num_steps=0)
    for part, saved in zip((resumed, schedule, optimizer), torch.load(file), strict=True):
        part.load_state_dict(saved)
    train(resumed, (layers, optimizer, schedule), tokens, num_steps=3, first=5)
    assert not changed(found[1], weights_of(resumed, layers))


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


@pytest.mark.parametrize("inactive", ["keep", "offload", "drop"])
def test_a_state_that_is_loaded_after_further_steps_trains_the_same(inactive, tokens):
    """Some layers were drawn for the first time after it was saved."""
    model = tiny_llama()
    parts = layers, optimizer, schedule = setup(
        model, num_active=1, every=1, rank=4, update_gap=2, inactive_state=inactive
    )
    train(model, parts, tokens, num_steps=2)
    saved = copy.deepcopy((weights_of(model, layers), schedule.state_dict(), optimizer.state_dict()))
    ends = []
    for _ in range(2):
        train(model, parts, tokens, num_steps=14, first=2)
        ends.append(weights_of(model, layers))
        model.load_state_dict(saved[0])
        schedule.load_state_dict(copy.deepcopy(saved[1]))
        optimizer.load_state_dict(copy.deepcopy(saved[2]))
    assert not changed(*ends)


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


def test_vectors_in_16_bits_train_in_float32(tokens):
    """A norm of 1 would not move in bfloat16: its neighbors are 0.4 % away, and the updates are 0.1 % in all."""
    model = tiny_llama(dtype=torch.bfloat16)
    parts = layers, _, _ = setup(model, num_active=4, lr=1e-4, every=20)
    train(model, parts, tokens, num_steps=10)
    copies = {name: p for name, p in layers.trained().items() if name.endswith("scale")}
    assert copies and all(p.dtype == torch.float32 and (p - 1).abs().max() > 5e-4 for p in copies.values())
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], copy.bfloat16()) for name, copy in copies.items())


def test_vectors_in_16_bits_keep_their_updates_over_many_draws(tokens):
    """In one draw, a norm learns a fortieth of the distance between two values."""
    model = tiny_llama(dtype=torch.bfloat16)
    parts = layers, _, _ = setup(model, num_active=1, lr=1e-4, every=1)
    train(model, parts, tokens, num_steps=60)
    for index, layer in enumerate(layers.layers):
        for name in (f"layers.{index}.sa_norm.scale", f"layers.{index}.mlp_norm.scale"):
            assert (layer.others[name].trained - 1).abs().max() > 5e-4, name
    with torch.no_grad():
        scale = model.layers[0].sa_norm.scale.fill_(2.0)  # other weights are loaded
    layers.activate([])
    layers.activate([0])
    assert torch.equal(layers.layers[0].others["layers.0.sa_norm.scale"].trained, scale.float())


def test_an_optimizer_of_the_models_parameters_is_refused(tokens):
    """It would train norms and nothing else, without an error."""
    model = tiny_llama()
    layers = ProjectedLayers(model, rank=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="lacks 28 parameters that can train; make it from layers.parameter_groups"):
        Schedule(layers, optimizer, LayerSampler([1.0] * 4, 2))


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


def test_an_optimizer_that_makes_its_state_before_a_has_values_is_refused():
    with pytest.raises(ValueError, match="Adagrad makes its state before A has values; use one that makes it in its"):
        setup(tiny_llama(), build=torch.optim.Adagrad)


@pytest.mark.parametrize("scored", [3, 5])
def test_scores_of_another_number_of_layers_are_refused(scored):
    """Layers without a score would never train."""
    layers = ProjectedLayers(tiny_llama(), rank=8)
    optimizer = torch.optim.AdamW(layers.parameter_groups())
    with pytest.raises(ValueError, match=f"the sampler has scores of {scored} layers, and the model has 4 layers"):
        Schedule(layers, optimizer, LayerSampler([1.0] * scored, 2))


def test_an_optimizer_that_accelerate_has_wrapped_trains_the_same(tokens):
    found = []
    for prepare in (lambda optimizer: optimizer, Accelerator(cpu=True).prepare):
        model = tiny_llama()
        layers = ProjectedLayers(model, rank=8)
        optimizer = prepare(torch.optim.AdamW(layers.parameter_groups(), lr=1e-2))
        train(model, (layers, optimizer, Schedule(layers, optimizer, LayerSampler([1.0] * 4, 2))), tokens)
        found.append(weights_of(model, layers))
    assert not changed(*found) and changed(found[0], weights_of(tiny_llama()))


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_weight_decay_that_is_not_decoupled_is_refused(build):
    message = f"weight_decay=0.1; that of {build.__name__} is not known to be decoupled: set it to 0, or use AdamW"
    with pytest.raises(ValueError, match=message):
        setup(tiny_llama(), build=build, weight_decay=0.1)


def test_trainable_parameters_are_counted():
    model = tiny_llama()
    layers, _, schedule = setup(model)
    assert layers.num_trainable() == 0
    schedule.begin_step()
    assert layers.num_trainable() == 2 * sum(p.numel() for p in model.layers[0].parameters())


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
    assert {name.split(".")[3] for name in changed(before, weights_of(model)) if "attn." in name} == {
        "k_proj",
        "v_proj",
    }


def test_parameter_groups_are_complete_and_disjoint():
    model = tiny_llama()
    layers, _, _ = setup(model, outside=dict.fromkeys(("train_embeddings", "train_output", "train_norm"), True))
    projected, others = (group["params"] for group in layers.parameter_groups())
    assert len(projected) == 4 * 7 and len({*projected, *others}) == len(list(model.parameters()))


def test_a_parameter_outside_all_parts_is_an_error():
    model = tiny_llama()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight is in no layer"):
        model_parts(model)
