"""A training loop of a user with the schedule beside an optimizer."""

import torch
import torch.nn.functional as F

from owlore_tune.layers import LayerSampler, ProjectedLayers, Schedule


def setup(model, *, num_active=2, every=3, draw="systematic", seed=0, build=torch.optim.AdamW, outside=None, **options):
    """Layers, optimizer and schedule; the optimizer's options have their usual names."""
    of_schedule = {key: options.pop(key) for key in ("update_gap", "moments", "inactive_state") if key in options}
    of_layers = {key: options.pop(key) for key in ("rank", "side", "scale", "basis") if key in options}
    layers = ProjectedLayers(model, **{"rank": 8} | of_layers, **(outside or {}))
    optimizer = build(layers.parameter_groups(), **{"lr": 1e-2} | options)
    sampler = LayerSampler([1.0] * len(layers.layers), num_active, draw, seed)
    return layers, optimizer, Schedule(layers, optimizer, sampler, resample_every=every, **of_schedule)


def loss_of(model, rows):
    return F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def train(model, parts, tokens, num_steps=8, micro_batch=4, max_norm=None, first=0, merge=False):
    """The loop of a user, with accumulation and torch's clipping."""
    layers, optimizer, schedule = parts
    for step in range(first, first + num_steps):
        schedule.begin_step()
        batch = tokens.roll(step, 1)
        for rows in batch.split(micro_batch):
            (loss_of(model, rows) * len(rows) / len(batch)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p in layers.parameters() if p.grad is not None], max_norm)
        optimizer.step()
        optimizer.zero_grad()
    if merge:
        layers.merge()


def weights_of(model, layers=None) -> dict[str, torch.Tensor]:
    value_of = torch.Tensor.detach if layers is None else layers.merged
    return {name: value_of(parameter).clone() for name, parameter in model.named_parameters()}


def changed(before, after) -> set[str]:
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}
