import copy
import functools
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from conftest import tiny_llama

from owlore_tune.optim.adamw import OwLoreAdamW, parameter_groups
from owlore_tune.optim.projection import range_finder
from owlore_tune.optim.rounding import noise_for, round_to

SHAPES = [(24, 16), (16, 24), (20, 20)]


def weights_and_grads(num_steps: int, dtype=torch.float32, shapes=SHAPES):
    """Return weights, and gradients per step with a decaying, drifting spectrum."""
    gen = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=gen, dtype=dtype) for s in shapes]
    steps = []
    for _ in range(num_steps):
        grads = []
        for m, n in shapes:
            decay = torch.arange(1, n + 1, dtype=dtype) ** -1.5
            grads.append(torch.randn(m, n, generator=gen, dtype=dtype) * decay + 0.1)
        steps.append(grads)
    return weights, steps


def run(optimizer, parameters, steps):
    torch.manual_seed(0)  # for stochastic rounding
    for grads in steps:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_full_rank_equals_torch_adamw(weight_decay):
    weights, steps = weights_and_grads(20)
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    run(OwLoreAdamW(ours, lr=1e-2, rank=None, weight_decay=weight_decay), ours, steps)
    run(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=weight_decay), theirs, steps)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


class GaLoreOracle:
    """GaLore's published update (arXiv 2403.03507, algorithm 2) for one weight, in NumPy float64."""

    def __init__(self, weight, lr, rank, gap, scale, betas=(0.9, 0.999), eps=1e-12):
        self.weight = weight.double().numpy().copy()
        self.options = lr, rank, gap, scale, betas, eps
        self.right = weight.shape[0] >= weight.shape[1]
        self.first = self.second = 0.0
        self.steps = 0

    def step(self, grad, basis_of_ours):
        lr, rank, gap, scale, betas, eps = self.options
        grad = grad.double().numpy()
        if self.steps % gap == 0:
            u, _, vt = np.linalg.svd(grad, full_matrices=False)
            basis = vt[:rank].T if self.right else u[:, :rank]
            # The sign of each SVD column is arbitrary, and kept moments depend on it: use our signs.
            overlap = (basis * basis_of_ours.double().numpy()).sum(0)
            np.testing.assert_allclose(np.abs(overlap), 1, atol=1e-4)
            self.basis = basis * np.sign(overlap)
        self.steps += 1
        low = grad @ self.basis if self.right else self.basis.T @ grad
        self.first = betas[0] * self.first + (1 - betas[0]) * low
        self.second = betas[1] * self.second + (1 - betas[1]) * low**2
        root = np.sqrt(self.second / (1 - betas[1] ** self.steps)) + eps
        direction = self.first / (1 - betas[0] ** self.steps) / root
        self.weight -= lr * scale * (direction @ self.basis.T if self.right else self.basis @ direction)


def test_shape_side_with_svd_equals_galore_in_numpy():
    weights, steps = weights_and_grads(50)
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = OwLoreAdamW(ours, lr=1e-3, rank=4, update_gap=20, scale=0.25, side="shape", basis="svd", eps=1e-12)
    oracles = [GaLoreOracle(w, 1e-3, 4, 20, 0.25) for w in weights]
    for grads in steps:
        run(optimizer, ours, [grads])
        for oracle, grad, parameter in zip(oracles, grads, ours, strict=True):
            oracle.step(grad, optimizer.state[parameter]["basis"])
    for parameter, oracle in zip(ours, oracles, strict=True):
        torch.testing.assert_close(parameter.double(), torch.tensor(oracle.weight), atol=1e-5, rtol=0)


@functools.cache  # the package without its __init__ can be found only once
def galore_torch_adamw():
    """Import galore-torch's AdamW without the package's __init__, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("galore-torch is not installed")
    package = types.ModuleType("galore_torch")
    package.__path__ = spec.submodule_search_locations
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def test_shape_side_with_svd_equals_galore_torch():
    weights, steps = weights_and_grads(50)
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    options = dict(rank=4, update_gap=20, scale=0.25, side="shape", basis="svd", eps=1e-12)
    run(OwLoreAdamW(ours, lr=1e-3, **options), ours, steps)
    group = {"params": theirs, "rank": 4, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std"}
    run(galore_torch_adamw()([group], lr=1e-3, eps=1e-12, no_deprecation_warning=True), theirs, steps)
    for a, b, start in zip(ours, theirs, weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert (a - start).abs().max() > 1e-3


def test_update_stays_in_the_span_of_the_basis():
    weights, steps = weights_and_grads(3)
    parameter = torch.nn.Parameter(weights[0].clone())
    optimizer = OwLoreAdamW([parameter], rank=4, lr=1e-2)
    run(optimizer, [parameter], [grads[:1] for grads in steps])
    basis = optimizer.state[parameter]["basis"]
    assert basis.shape == (16, 4)
    change = parameter.detach() - weights[0]
    torch.testing.assert_close(change @ basis @ basis.T, change, atol=1e-5, rtol=0)
    assert optimizer.state[parameter]["exp_avg"].shape == (24, 4)
    assert optimizer.state[parameter]["step"] == 3


def test_basis_is_refreshed_every_update_gap_steps():
    weights, steps = weights_and_grads(7)
    parameter = torch.nn.Parameter(weights[0].clone())
    optimizer = OwLoreAdamW([parameter], rank=4, update_gap=3)
    bases, refreshes = [], []
    for grads in steps:
        run(optimizer, [parameter], [grads[:1]])
        bases.append(optimizer.state[parameter]["basis"])
        refreshes += optimizer.last_refreshes
    changed = [not torch.equal(a, b) for a, b in zip(bases, bases[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]
    assert len(refreshes) == 3
    assert all(seconds > 0 and 0 < energy <= 1 for seconds, energy in refreshes)


@pytest.mark.parametrize("shape", [(64, 512), (512, 64), (128, 128)], ids=str)
def test_a_weight_moves_as_far_on_its_right_as_under_galores_rule(shape):
    """Cover wide weights such as LLaMA-3's k, v and down projections: right-side updates have fewer entries."""
    norms = {}
    for side in ("right", "shape"):
        (weight,), ((grad,),) = weights_and_grads(1, shapes=[shape])
        steps = [[grad + 1e-6 * other] for other in torch.randn(10, *shape, generator=torch.Generator().manual_seed(1))]
        parameter = torch.nn.Parameter(weight.clone())
        run(OwLoreAdamW([parameter], lr=1e-2, rank=16, side=side), [parameter], steps)
        norms[side] = torch.linalg.vector_norm(parameter.detach() - weight).item()
    assert norms["right"] == pytest.approx(norms["shape"], rel=0.1)


def test_the_energy_of_a_refresh_is_that_of_the_whole_step():
    """Of 16 noisy micro-batches, the first one makes the basis, so it lies in the basis far more than their sum."""
    gen = torch.Generator().manual_seed(0)
    common = torch.randn(96, 3, generator=gen) @ torch.randn(3, 64, generator=gen)
    grads = [common + 4 * torch.randn(96, 64, generator=gen) for _ in range(16)]
    parameter = torch.nn.Parameter(torch.zeros(96, 64))
    optimizer = OwLoreAdamW([parameter], rank=16)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.project_grads()
    optimizer.step()
    basis = optimizer.state[parameter]["basis"]
    exact, of_first = ((g @ basis).square().sum() / g.square().sum() for g in (sum(grads), grads[0]))
    ((_, told),) = optimizer.last_refreshes
    assert float(told) == pytest.approx(exact.item(), abs=0.03)
    assert abs(exact - of_first) > 0.06


def test_a_zero_gradient_makes_no_basis():
    """The next step makes it."""
    weights, steps = weights_and_grads(1)
    parameter = torch.nn.Parameter(weights[0].clone())
    optimizer = OwLoreAdamW([parameter], rank=4)
    parameter.grad = torch.zeros_like(weights[0])
    optimizer.step()
    assert optimizer.last_refreshes == [] and torch.equal(parameter, weights[0])
    optimizer.zero_grad()
    parameter.grad = steps[0][0].clone()
    optimizer.step()
    expected, _ = range_finder(steps[0][0], 4, generator=torch.Generator().manual_seed(0))
    overlap = torch.linalg.svdvals(optimizer.state[parameter]["basis"].T @ expected)
    torch.testing.assert_close(overlap, torch.ones(4), atol=0.05, rtol=0)
    assert len(optimizer.last_refreshes) == 1
    optimizer.zero_grad()
    parameter.grad = torch.zeros_like(weights[0])  # no refresh is due, so the basis stays
    optimizer.step()
    assert optimizer.state[parameter]["basis_age"] == 2


@pytest.mark.parametrize("basis", ["randomized", "svd"])
def test_a_zero_gradient_of_the_first_micro_batch_does_not_choose_the_basis(basis):
    """Such as that of an expert without tokens. Regression: the step moved the first columns of the weight."""
    weights, steps = weights_and_grads(1)
    parameter = torch.nn.Parameter(weights[0].clone())
    optimizer = OwLoreAdamW([parameter], rank=4, basis=basis)
    for grad in (torch.zeros_like(weights[0]), steps[0][0]):
        parameter.grad = grad.clone()
        optimizer.project_grads()
    optimizer.step()
    assert torch.equal(parameter, weights[0]) and optimizer.last_refreshes == []
    optimizer.zero_grad()
    for grad in (steps[0][0], torch.zeros_like(weights[0])):
        parameter.grad = grad.clone()
        optimizer.project_grads()
    optimizer.step()
    assert len(optimizer.last_refreshes) == 1 and not torch.equal(parameter, weights[0])


def test_directions_of_eight_bit_moments_are_bounded_on_real_gradients(smollm2_dir):
    """Regression: directions exceeded 100 if 8 bits rounded the mean square to zero, but not the mean."""
    from owlore_tune.checkpoints.hf import HFCheckpointer
    from owlore_tune.data.builders import mmlu_dev_dataset
    from owlore_tune.data.tokenizer import HFChatTokenizer
    from owlore_tune.models.smollm2 import smollm2_135m

    with torch.device("meta"):
        model = smollm2_135m()
    HFCheckpointer(str(smollm2_dir), "LLAMA3_2").load_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
    trained = [p for p in model.layers[29].parameters() if p.ndim == 2]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = OwLoreAdamW(trained, lr=1e-5, rank=None, state_bits=8)
    dataset = mmlu_dev_dataset(HFChatTokenizer(str(smollm2_dir)))
    largest = 0.0
    for number in range(8):
        tokens, labels = torch.tensor([dataset[number]["tokens"]]), torch.tensor(dataset[number]["labels"])
        torch.nn.functional.cross_entropy(model(tokens)[0, :-1], labels[1:]).backward()
        before = [p.detach().clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
        moved = [(p.detach() - old).abs().max().item() / 1e-5 for p, old in zip(trained, before, strict=True)]
        largest = max(largest, *moved)
    assert largest < 4


@pytest.mark.parametrize("side", ["right", "shape"])
@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
def test_moments_at_a_refresh(moments, side):
    weights, steps = weights_and_grads(3)
    parameter = torch.nn.Parameter(weights[1].clone())  # (16, 24): `shape` projects the left side
    optimizer = OwLoreAdamW([parameter], rank=4, update_gap=2, moments=moments, side=side)
    run(optimizer, [parameter], [grads[1:2] for grads in steps[:2]])
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[parameter].items()}
    parameter.grad = steps[2][1].clone()
    optimizer.project_grads()
    optimizer._settle()
    after = optimizer.state[parameter]
    turn = before["basis"].T @ after["basis"]
    if side == "shape":
        expected_avg, expected_sq = turn.T @ before["exp_avg"], turn.square().T @ before["exp_avg_sq"]
    else:
        expected_avg, expected_sq = before["exp_avg"] @ turn, before["exp_avg_sq"] @ turn.square()
    if moments == "keep":
        expected_avg, expected_sq = before["exp_avg"], before["exp_avg_sq"]
    elif moments == "reset":
        expected_avg, expected_sq = torch.zeros_like(expected_avg), torch.zeros_like(expected_sq)
        assert after["step"] == 0
    torch.testing.assert_close(after["exp_avg"], expected_avg)
    torch.testing.assert_close(after["exp_avg_sq"], expected_sq)


def test_moments_are_carried_over_a_refresh_without_a_gradient():
    """A zero gradient when a refresh is due keeps the basis. The refresh of the next step starts from it."""
    weights, steps = weights_and_grads(3)
    parameter = torch.nn.Parameter(weights[1].clone())
    optimizer = OwLoreAdamW([parameter], rank=4, update_gap=1, moments="project")
    run(optimizer, [parameter], [grads[1:2] for grads in steps[:2]])
    basis = optimizer.state[parameter]["basis"].clone()
    run(optimizer, [parameter], [[torch.zeros_like(parameter)]])
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[parameter].items()}
    assert torch.equal(before["basis"], basis)
    parameter.grad = steps[2][1].clone()
    optimizer.project_grads()
    optimizer._settle()
    after = optimizer.state[parameter]
    turn = basis.T @ after["basis"]
    assert not torch.equal(after["basis"], basis)
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"] @ turn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_twin_takes_bit_equal_steps(dtype):
    weights, steps = weights_and_grads(9)
    steps = [[g.to(dtype) for g in grads] for grads in steps]
    options = dict(rank=4, update_gap=3, moments="project")
    parameters = [torch.nn.Parameter(w.to(dtype)) for w in weights]
    optimizer = OwLoreAdamW(parameters, **options)
    run(optimizer, parameters, steps[:4])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    twin = OwLoreAdamW(twins, **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, parameters, steps[4:])
    run(twin, twins, steps[4:])
    for a, b in zip(parameters, twins, strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            if torch.is_tensor(value):
                assert value.dtype == torch.float32
                assert torch.equal(value, twin.state[b][key])


def test_state_loads_with_weights_only(tmp_path):
    weights, steps = weights_and_grads(1)
    parameters = [torch.nn.Parameter(w) for w in weights]
    optimizer = OwLoreAdamW(parameters, rank=4)
    run(optimizer, parameters, steps)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert loaded["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq", "basis", "basis_age"}


def test_stochastic_rounding_moves_bfloat16_weights_where_nearest_does_not():
    grad = torch.ones(64, 32)
    means = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        optimizer = OwLoreAdamW([parameter], rank=None, lr=1e-4, stochastic_rounding=stochastic)
        run(optimizer, [parameter], [[grad.bfloat16()]] * 10)
        means[stochastic] = parameter.float().mean().item()
    assert means[False] == 1.0
    assert means[True] == pytest.approx(1 - 10 * 1e-4, abs=3e-4)


@pytest.mark.parametrize("side", ["right", "shape"])
def test_a_bfloat16_weight_follows_its_float32_twin(side, monkeypatch):
    """Also with decay, and with a weight that is written in several pieces."""
    monkeypatch.setattr("owlore_tune.optim.adamw._MOVED", {"cpu": 100})
    weights, steps = weights_and_grads(4)
    weights, steps = ([w.bfloat16() for w in weights], [[g.bfloat16() for g in grads] for grads in steps])
    whole = [torch.nn.Parameter(w.float()) for w in weights]
    half = [torch.nn.Parameter(w.clone()) for w in weights]
    options = {"lr": 0.1, "rank": 4, "side": side, "weight_decay": 0.3, "stochastic_rounding": False}
    run(OwLoreAdamW(whole, **options), whole, [[g.float() for g in grads] for grads in steps])
    run(OwLoreAdamW(half, **options), half, steps)
    for start, a, b in zip(weights, whole, half, strict=True):
        assert (a - start.float()).abs().mean() > 0.1
        torch.testing.assert_close(b.float(), a, atol=0.05, rtol=0)  # 4 roundings of at most 2**-7


def test_weight_decay_acts_on_the_whole_weight():
    parameter = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = OwLoreAdamW([parameter], rank=2, lr=0.1, weight_decay=0.5)
    run(optimizer, [parameter], [[torch.zeros(8, 6)]])
    torch.testing.assert_close(parameter.detach(), torch.full((8, 6), 0.95))


def test_clipping_scales_what_the_step_uses():
    weights, steps = weights_and_grads(1)
    parameters = [torch.nn.Parameter(w) for w in [*weights, torch.zeros(5)]]
    optimizer = OwLoreAdamW(parameters, rank=4)
    for parameter, grad in zip(parameters, [*steps[0], torch.ones(5)], strict=True):
        parameter.grad = grad
    norm = optimizer.clip_grad_norm_(float("inf"))
    expected = torch.stack([g.square().sum() for g in optimizer.step_grads().values()]).sum().sqrt()
    torch.testing.assert_close(norm, expected)
    assert all(p.grad is None for p in parameters[:3])
    optimizer.clip_grad_norm_(0.1)
    assert optimizer.clip_grad_norm_(float("inf")) == pytest.approx(0.1, rel=1e-3)
    assert OwLoreAdamW(parameters[:1], rank=4).clip_grad_norm_(1.0) == 0


def test_zero_grad_forgets_low_gradients_too():
    weights, steps = weights_and_grads(1)
    parameter = torch.nn.Parameter(weights[0].clone())
    optimizer = OwLoreAdamW([parameter], rank=4)
    parameter.grad = steps[0][0]
    optimizer.project_grads()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(parameter, weights[0])


def test_closure_is_called_with_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = OwLoreAdamW([parameter], rank=None)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert not torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0; it must be an integer >= 1, or null"),
        ({"rank": 16}, "rank=16; no weight's shorter side is above it"),
        ({"side": "left"}, "side='left'; choose one of right, shape"),
        ({"moments": "drop"}, "moments='drop'; choose one of keep, project, reset"),
        ({"basis": "qr"}, "basis='qr'; choose one of randomized, svd"),
        ({"update_gap": 0}, "update_gap=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "it must have two values, each >= 0 and < 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        OwLoreAdamW([torch.nn.Parameter(torch.zeros(24, 16))], **options)


def test_weights_too_small_for_the_rank_are_trained_whole_with_a_warning():
    parameters = [torch.nn.Parameter(torch.zeros(24, 16)), torch.nn.Parameter(torch.zeros(8, 16))]
    with pytest.warns(UserWarning, match=r"rank=8 is not below the shorter side \(8\) of 1 of 2 weights"):
        optimizer = OwLoreAdamW(parameters, rank=8)
    assert optimizer.is_projected(parameters[0])
    assert not optimizer.is_projected(parameters[1])


def test_parameter_groups_are_complete_and_disjoint():
    model = tiny_llama()
    groups = parameter_groups(model, train_embeddings=True, train_output=True, train_norm=True)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert groups[1]["rank"] is None
    (layers_only,) = parameter_groups(model)
    assert len(layers_only["params"]) == sum(name.startswith("layers") for name, _ in model.named_parameters())


def test_warm_start_needs_fewer_columns_than_it_has():
    """A start as wide as the sketch leaves no random columns, and still works."""
    grad = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    start = torch.linalg.qr(torch.randn(10, 10)).Q
    basis, _ = range_finder(grad, 9, generator=torch.Generator(), start=start)
    torch.testing.assert_close(basis.T @ basis, torch.eye(9), atol=1e-5, rtol=0)


def test_stochastic_rounding_goes_to_a_neighbor_and_is_exact_on_average():
    torch.manual_seed(0)
    lower, upper = torch.tensor([1.0, -1.0]), torch.tensor([1.0078125, -1.0078125])  # neighbors in bfloat16
    values = (lower + 0.3 * (upper - lower)).repeat(50_001)  # no multiple of 4
    weight = torch.zeros(len(values), dtype=torch.bfloat16)
    round_to(weight, values.clone(), noise_for(weight, True))
    for sign, low, high in zip((0, 1), lower, upper, strict=True):
        rounded = weight[sign::2].float()
        assert set(rounded.tolist()) == {low.item(), high.item()}
        assert (rounded == high).float().mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, 1.5, -3.0, torch.inf, -torch.inf] * 100)
    weight = torch.zeros(len(exact), dtype=torch.bfloat16)
    round_to(weight, exact.clone(), noise_for(weight, True))
    assert torch.equal(weight.float(), exact)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_weights_updated_together_are_updated_as_alone(state_bits, monkeypatch):
    """Several weights per call of AdamW, with other step counts and shapes, in batches that do not hold all."""
    monkeypatch.setattr("owlore_tune.optim.adamw._PIECE", {"cpu": 768})  # values: two or three weights
    torch.manual_seed(0)
    shapes = [(40, 24), (24, 40), (32,), (40, 24), (512,), (256,), (32, 64)]
    start = [torch.randn(shape) for shape in shapes]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(3)]

    def train(together: bool) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = OwLoreAdamW(weights, rank=8, state_bits=state_bits, lr=1e-2)
        for step, some in enumerate(grads):
            for weight, grad in zip(weights, some, strict=True):
                if step or weight is not weights[0]:  # the first one begins later
                    weight.grad = grad.clone()
            if not together:
                optimizer._alike = lambda parameters, grads: [[parameter] for parameter in parameters]
            optimizer.step()
            optimizer.zero_grad()
        return [weight.detach() for weight in weights]

    assert all(torch.equal(one, other) for one, other in zip(train(True), train(False), strict=True))
