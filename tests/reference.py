"""Outlier scores by their definition, and OwLore on full gradients, as published, for comparisons."""

import functools
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from owlore_tune.models.decoder import find_layers, find_linears, model_parts
from owlore_tune.optim.bases import side_factor, svd_basis

SHAPES = [(24, 16), (16, 24), (20, 20)]


def weights_and_grads(num_steps: int, dtype=torch.float32, shapes=SHAPES):
    """Weights, and gradients of each step with a decaying, drifting spectrum."""
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


@functools.cache  # the package without its __init__ can be found only once
def galore_torch_adamw():
    """galore-torch's AdamW without the package's __init__, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("galore-torch is not installed")
    package = types.ModuleType("galore_torch")
    package.__path__ = spec.submodule_search_locations
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


class FullGradients:
    """AdamW on projections of full gradients (GaLore, arXiv 2403.03507, algorithm 2), with decoupled weight decay.

    Bases are exact, from the first micro-batch of a step.
    """

    def __init__(self, *, rank, gap, lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.0, scale=1.0, side="right",
                 moments="keep"):  # fmt: skip
        self.rank, self.gap, self.lr, self.betas, self.eps = rank, gap, lr, betas, eps
        self.weight_decay, self.scale, self.side, self.moments = weight_decay, scale, side, moments
        self.state: dict[nn.Parameter, dict] = {}

    def is_projected(self, weight: Tensor) -> bool:
        return weight.ndim == 2 and self.rank < min(weight.shape)

    def low_gradient(self, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
        """The sum of the projected gradients of the micro-batches; a basis that is due comes from the first."""
        if not self.is_projected(weight):
            return sum(grads)
        state = self.state.setdefault(weight, {"age": self.gap})
        right = self.side == "right" or weight.shape[0] >= weight.shape[1]
        if state["age"] >= self.gap:
            new, _ = svd_basis(grads[0], self.rank, right)
            if "exp_avg" in state and self.moments == "project":
                turn = state["basis"].T @ new
                for key, matrix in (("exp_avg", turn), ("exp_avg_sq", turn.square())):
                    state[key] = state[key] @ matrix if right else matrix.T @ state[key]
            elif self.moments == "reset":
                state.pop("exp_avg", None)
            state |= {"basis": new, "age": 0}
        return sum(grad @ state["basis"] if right else state["basis"].T @ grad for grad in grads)

    @torch.no_grad()
    def update(self, weight: nn.Parameter, low: Tensor) -> None:
        state = self.state.setdefault(weight, {})
        if "exp_avg" not in state:
            state |= {"exp_avg": torch.zeros_like(low), "exp_avg_sq": torch.zeros_like(low), "step": 0}
        state["step"] += 1
        one, two = self.betas
        state["exp_avg"] = one * state["exp_avg"] + (1 - one) * low
        state["exp_avg_sq"] = two * state["exp_avg_sq"] + (1 - two) * low**2
        mean, square = state["exp_avg"] / (1 - one ** state["step"]), state["exp_avg_sq"] / (1 - two ** state["step"])
        direction = mean / (square.sqrt() + self.eps)
        weight.mul_(1 - self.lr * self.weight_decay)
        if not self.is_projected(weight):
            weight.sub_(self.lr * direction)
            return
        state["age"] += 1
        right = self.side == "right" or weight.shape[0] >= weight.shape[1]
        change = direction @ state["basis"].T if right else state["basis"] @ direction
        weight.sub_(self.lr * self.scale * (side_factor(weight.shape) if right else 1.0) * change)


def train_with_full_gradients(model, sampler, batches_of, num_steps, *, every, max_norm=None, **options) -> None:
    """Train layers that ``sampler`` draws, with the micro-batches ``batches_of(step)`` of (share, loss) functions."""
    method = FullGradients(**options)
    parts, active = model_parts(model).layers, []
    matrices = {linear.weight for layer in find_layers(model) for _, linear in find_linears(layer)}
    for step in range(num_steps):
        if step % every == 0:
            drawn = sampler.draw()
            for index in set(active) - set(drawn):
                for parameter in parts[index].values():
                    method.state.pop(parameter, None)
            active = drawn
        trained = [parameter for index in active for parameter in parts[index].values()]
        grads: dict[nn.Parameter, list[Tensor]] = {parameter: [] for parameter in trained}
        for loss in batches_of(step):
            found = torch.autograd.grad(loss(model), trained)
            for parameter, grad in zip(trained, found, strict=True):
                grads[parameter].append(grad)
        low = {parameter: method.low_gradient(parameter, some) for parameter, some in grads.items()}
        assert {parameter for parameter in trained if parameter.ndim == 2} <= matrices
        if max_norm is not None:
            norm = torch.stack([value.square().sum() for value in low.values()]).sum().sqrt()
            low = {p: value * (max_norm / (norm + 1e-6)).clamp(max=1) for p, value in low.items()}
        for parameter, value in low.items():
            method.update(parameter, value)


def outlier_scores(model, batches, threshold):
    """In NumPy float64: the full matrix A of a layer, its mean, and the fraction above threshold."""
    inputs = {}
    handles = []
    for i, layer in enumerate(model.layers):
        for name, linear in find_linears(layer):

            def keep(module, args, key=(i, name)):
                inputs.setdefault(key, []).append(args[0].detach().double().numpy().reshape(-1, args[0].shape[-1]))

            handles.append(linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    scores = []
    for i, layer in enumerate(model.layers):
        entries = []
        for name, linear in find_linears(layer):
            norms = np.sqrt((np.concatenate(inputs[i, name]) ** 2).sum(0))
            entries.append((np.abs(linear.weight.detach().double().numpy()) * norms).ravel())
        entries = np.concatenate(entries)
        scores.append((entries > threshold * entries.mean()).mean())
    return scores
