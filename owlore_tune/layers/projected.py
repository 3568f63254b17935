"""OwLore in any training loop, beside any optimizer: which layers train, and when their bases end.

layers = ProjectedLayers(model, LayerSampler(scores, 5), rank=128)
optimizer = torch.optim.AdamW(layers.parameters(), lr=3e-4)
layers.attach(optimizer)
for batch in batches:
    layers.begin_step()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
layers.merge()
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.models.decoder import find_layers, find_linears, model_parts
from owlore_tune.optim.options import MOMENTS
from owlore_tune.optim.projected import ProjectedWeight


class ProjectedLayers:
    """Draws the layers that train, and trains their Linears through low-rank projections (OwLore, arXiv 2405.18380).

    The optimizer gets a small parameter A for each Linear (see `ProjectedWeight`), and the other parameters of the
    layers, such as norms, as they are. Its gradients are ordinary, so that accumulation, clipping, gradient scalers and
    schedules work unchanged. Everything outside the layers is frozen. Weight decay must be decoupled, as in AdamW; it
    acts on the full weight.

    Args:
        model: a decoder of torchtune or transformers with loaded weights.
        sampler: draws the layers.
        rank: r. A Linear whose shorter side is not above it is trained as it is; null trains every weight so.
        resample_every: K, in optimizer steps.
        update_gap: optimizer steps between refreshes of a basis.
        moments: of A at a refresh: ``keep`` (as GaLore), ``project`` onto the new basis, or ``reset``.
        side, scale, basis: see `ProjectedWeight`.
        seed: of the bases' random sketches.

    Attributes:
        active: the layers that train, ascending.
        num_steps: optimizer steps so far.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: LayerSampler,
        *,
        rank: int | None = 128,
        resample_every: int = 50,
        update_gap: int = 100,
        moments: str = "keep",
        side: str = "right",
        scale: float = 1.0,
        basis: str = "randomized",
        seed: int = 0,
    ) -> None:
        for name, value in (("resample_every", resample_every), ("update_gap", update_gap)):
            if value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1 optimizer step")
        if moments not in MOMENTS:
            raise ValueError(f"moments={moments!r}; choose one of {', '.join(MOMENTS)}")
        self._sampler = sampler
        self._resample_every, self._update_gap, self._moments, self._seed = resample_every, update_gap, moments, seed
        self._optimizer: Optimizer | None = None
        self.active: list[int] = []
        self.num_steps = 0
        self._drawn_at: int | None = None
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        options: dict[str, Any] = {"side": side, "scale": scale, "basis": basis}
        self._weights: list[dict[str, tuple[nn.Linear, ProjectedWeight]]] = []  # projected, by layer and name
        self._others: list[list[nn.Parameter]] = []  # trained as they are
        parts = model_parts(model).layers
        for index, layer in enumerate(find_layers(model)):
            linears = {
                name: linear
                for name, linear in find_linears(layer)
                if rank is not None and rank < min(linear.in_features, linear.out_features)
            }
            self._weights.append(
                {
                    name: (linear, self._projected(index, name, linear, rank, options))
                    for name, linear in linears.items()
                }
            )
            projected = {linear.weight for linear in linears.values()}
            self._others.append([parameter for parameter in parts[index].values() if parameter not in projected])

    def _projected(
        self, index: int, name: str, linear: nn.Linear, rank: int | None, options: dict[str, Any]
    ) -> ProjectedWeight:
        assert rank is not None

        def generator(device: torch.device) -> torch.Generator:
            text = f"{self._seed} {index} {name} {self.num_steps}"
            return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))

        weight = ProjectedWeight(linear, rank, generator=generator, **options)
        weight.release()
        return weight

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that can train, for the optimizer. Those of inactive layers have no values or gradients."""
        projected = [weight.trained for layer in self._weights for _, weight in layer.values()]
        return projected + [parameter for layer in self._others for parameter in layer]

    def attach(self, optimizer: Optimizer) -> None:
        """Follow the steps of ``optimizer``, which has `parameters`.

        Raises:
            ValueError: if its weight decay is added to the gradient, which would act on A and not on the weight.
        """
        for group in optimizer.param_groups:
            is_decoupled = group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
            if group.get("weight_decay", 0.0) and not is_decoupled:
                raise ValueError(
                    f"weight_decay={group['weight_decay']}; {type(optimizer).__name__} adds it to the gradient: set it "
                    "to 0, or use AdamW"
                )
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    def begin_step(self) -> bool:
        """Draw new layers, or end bases, if it is time. Call it before the first forward of each step.

        Returns:
            Whether layers were drawn.
        """
        assert self._optimizer is not None, "call attach(optimizer) first"
        is_due = self._drawn_at is None or self.num_steps - self._drawn_at >= self._resample_every
        if is_due:
            self._activate(self._sampler.draw())
            self._drawn_at = self.num_steps
        for linear, weight in self._active_weights():
            if weight.age >= self._update_gap:
                weight.merge(linear.weight)
        return is_due

    def merge(self) -> None:
        """Add the updates so far to the weights, for example before they are saved. The next step makes new bases."""
        for linear, weight in self._active_weights():
            weight.merge(linear.weight)

    def state_dict(self) -> dict[str, Any]:
        """The schedule, and A and the basis of each weight that trains, for an exact resume between two steps.

        Save the model's weights beside it without `merge`, and the optimizer's own state.
        """
        weights = {
            index: {name: weight.state_dict() for name, (_, weight) in self._weights[index].items()}
            for index in self.active
        }
        return {
            "num_steps": self.num_steps, "drawn_at": self._drawn_at, "sampler": self._sampler.state_dict(),
            "weights": weights,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it after `attach`, and the optimizer's state after it."""
        self._activate(sorted(state_dict["weights"]))
        for index, weights in state_dict["weights"].items():
            for name, state in weights.items():
                self._weights[index][name][1].load_state_dict(state)
        self._sampler.load_state_dict(state_dict["sampler"])
        self.num_steps, self._drawn_at = state_dict["num_steps"], state_dict["drawn_at"]

    def _active_weights(self) -> Iterator[tuple[nn.Linear, ProjectedWeight]]:
        for index in self.active:
            yield from self._weights[index].values()

    def _activate(self, layers: list[int]) -> None:
        for index in set(self.active) - set(layers):
            for linear, weight in self._weights[index].values():
                weight.merge(linear.weight)
                weight.release()
            self._switch(index, False)
        for index in set(layers) - set(self.active):
            for _, weight in self._weights[index].values():
                weight.engage()
            self._switch(index, True)
        self.active = layers

    def _switch(self, index: int, trains: bool) -> None:
        assert self._optimizer is not None
        for parameter in (*(weight.trained for _, weight in self._weights[index].values()), *self._others[index]):
            parameter.requires_grad_(trains)
            parameter.grad = None
            if not trains:
                self._optimizer.state.pop(parameter, None)

    def _before_step(self) -> None:
        """Carry the moments of weights whose backward has made a new basis over to it."""
        assert self._optimizer is not None
        for _, weight in self._active_weights():
            if weight.turn is not None:
                carry_moments(self._optimizer, weight.trained, weight.turn, self._moments, weight.right)
                weight.turn = None

    def _after_step(self) -> None:
        assert self._optimizer is not None
        group_of = {parameter: group for group in self._optimizer.param_groups for parameter in group["params"]}
        for _, weight in self._active_weights():
            group = group_of[weight.trained]
            weight.decay *= 1 - float(group["lr"]) * group.get("weight_decay", 0.0)
            weight.age += weight.basis is not None
        self.num_steps += 1


def carry_moments(optimizer: Optimizer, parameter: Tensor, turn: Tensor, moments: str, right: bool) -> None:
    """Carry the optimizer's moments of A over to a new basis, in place.

    Args:
        turn: (r, r) old basisᵀ · new basis.
        moments: ``keep`` does nothing; ``reset`` drops the state; ``project`` rotates ``exp_avg`` with ``turn``, and
            ``exp_avg_sq`` with its elementwise square.
        right: whether A is (m, r), and not (r, n).

    Raises:
        ValueError: if the optimizer has no such moments to project.
    """
    if moments == "reset":
        optimizer.state.pop(parameter, None)
    if moments != "project" or not (state := optimizer.state.get(parameter)):
        return
    if not state.keys() >= {"exp_avg", "exp_avg_sq"}:
        raise ValueError(f"moments=project; {type(optimizer).__name__} has no exp_avg and exp_avg_sq to project")
    for key, matrix in (("exp_avg", turn), ("exp_avg_sq", turn.square())):
        moment = state[key] if type(state[key]) is Tensor else state[key].dequantize()
        state[key].copy_(moment @ matrix if right else matrix.T @ moment)
