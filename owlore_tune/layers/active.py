"""The set of active layers, and switching between sets."""

from typing import Any, Protocol

import torch
from torch import nn

from owlore_tune.distributed.world import ALONE, World, local
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.models.decoder import model_parts
from owlore_tune.optim.adamw import INACTIVE_STATES, OwLoreAdamW


class QuantizedLayers(Protocol):
    """Layers that are quantized while they don't train, such as `owlore_tune.frozen.layers.FrozenLayers`."""

    def keep(self, indices: set[int]) -> None: ...

    def freeze(self, index: int) -> None: ...

    def thaw(self, index: int) -> None: ...


class ActiveLayers:
    """Draws the active layers every ``resample_every`` steps and freezes all others (OwLore, arXiv 2405.18380, alg. 1).

    An activated layer gets ``requires_grad`` and a hook on each projected weight, which reduces the gradient during
    backward. A deactivated layer loses its gradients; ``inactive_state`` controls its optimizer state. Parameters
    outside the layers that are not in the optimizer are frozen once, in the constructor.

    Create it after loading weights, because loading can replace parameters.

    Args:
        model: a decoder of torchtune or transformers.
        optimizer: has the parameters of all layers, see `owlore_tune.optim.adamw.parameter_groups`.
        sampler: draws the layers.
        resample_every: K, in optimizer steps.
        inactive_state: optimizer state of inactive layers. ``drop``: a layer that returns starts with new bases and
            moments. ``keep``: it continues with its old ones; only its own steps count toward a basis refresh, as in
            the authors' code. ``offload``: like ``keep``, in host memory.
        project_in_backward: reduce gradients in hooks. At most one projected weight's full gradient is then alive.
            Without it, call ``optimizer.project_grads()`` after each backward; the result is the same.
        frozen: quantizes the layers that are not active.
        world: processes that train together; all use rank 0's draw.

    Attributes:
        active: the active layers, ascending.
        drawn_at: the step of the last draw.
        last_moved: the layers of the draw before whose weights changed while they were active.
        is_changing: whether a draw is not complete. A checkpoint would then not be consistent.

    Raises:
        ValueError: if ``resample_every`` or ``inactive_state`` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OwLoreAdamW,
        sampler: LayerSampler,
        *,
        resample_every: int,
        inactive_state: str = "drop",
        project_in_backward: bool = True,
        frozen: QuantizedLayers | None = None,
        world: World = ALONE,
    ) -> None:
        if not resample_every >= 1:
            raise ValueError(f"resample_every={resample_every}; it must be at least 1 optimizer step")
        if inactive_state not in INACTIVE_STATES:
            raise ValueError(f"inactive_state={inactive_state!r}; choose one of {', '.join(INACTIVE_STATES)}")
        self._model = model
        self._optimizer = optimizer
        self._sampler = sampler
        self._resample_every = resample_every
        self._inactive_state = inactive_state
        self._project_in_backward = project_in_backward
        self._frozen = frozen
        self._world = world
        self._hooks: dict[int, list[torch.utils.hooks.RemovableHandle]] = {}
        self.active: list[int] = []
        self.drawn_at: int | None = None
        self.last_moved: list[int] = []
        self.is_changing = False
        self._hashes: list[torch.Tensor] = []  # of the weights of each active layer, when it was drawn
        self._moved: set[int] = set()  # active layers known to have changed

        self._layers = [list(layer.values()) for layer in model_parts(model).layers]
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
        for layer in self._layers:
            self._freeze(layer)

    def maybe_redraw(self, step: int) -> list[int] | None:
        """Draw new layers if ``resample_every`` steps have passed since the last draw.

        Args:
            step: optimizer steps so far.

        Returns:
            The active layers if there was a draw, else None.
        """
        if self.drawn_at is not None and step - self.drawn_at < self._resample_every:
            return None
        self.last_moved = self.moved()
        before = self._sampler.state_dict()
        layers = self._world.share(self._sampler.draw())
        try:
            if self._frozen is not None:
                self._frozen.keep(set(self.active) - set(layers))
        except BaseException:
            self._sampler.load_state_dict(before)  # nothing has changed: a checkpoint may be saved
            raise
        self.is_changing = True  # stays so after an error, since some layers may have changed
        self._set_active(layers)
        self._moved, self._hashes = set(), self._hash_weights()
        self.drawn_at, self.is_changing = step, False
        return self.active

    def moved(self) -> list[int]:
        """The active layers whose weights have changed since the draw. All processes must call this together."""
        if self._hashes:
            pairs = zip(self._hash_weights(), self._hashes, strict=True)
            changed = torch.stack([(now != then).any() for now, then in pairs]).tolist()
            here = {index for index, has_changed in zip(self.active, changed, strict=True) if has_changed}
            self._moved.update(*self._world.gather(here))
        return sorted(self._moved)

    def num_trainable(self) -> int:
        """Number of trainable parameters, in active layers and outside the layers."""
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    def _hash_weights(self) -> list[torch.Tensor]:
        """For each active layer, the hashes of this process's parts of its weights."""
        layers = [[local(weight.detach()) for weight in self._layers[index]] for index in self.active]
        return [torch.stack([_hash(part) for part in layer]) for layer in layers]

    def _set_active(self, layers: list[int]) -> None:
        for index in set(self.active) - set(layers):
            for hook in self._hooks.pop(index, []):
                hook.remove()
            self._freeze(self._layers[index])
            self._optimizer.deactivate(self._layers[index], self._inactive_state)
            if self._frozen is not None:
                self._frozen.freeze(index)
        for index in set(layers) - set(self.active):
            if self._frozen is not None:
                self._frozen.thaw(index)
            self._optimizer.activate(self._layers[index])
            for parameter in self._layers[index]:
                parameter.requires_grad_(True)
            if self._project_in_backward:
                self._hooks[index] = [
                    parameter.register_post_accumulate_grad_hook(self._optimizer.project_grad)
                    for parameter in self._layers[index]
                    if self._optimizer.is_projected(parameter)
                ]
        self.active = layers

    @staticmethod
    def _freeze(layer: list[nn.Parameter]) -> None:
        for parameter in layer:
            parameter.requires_grad_(False)
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": self.active,
            "drawn_at": self.drawn_at,
            "moved": self.moved(),
            "sampler": self._sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the schedule. Load the optimizer's state after this, because switching layers can drop state."""
        self._sampler.load_state_dict(state_dict["sampler"])
        self._set_active(list(state_dict["active"]))
        self._moved, self._hashes = set(state_dict["moved"]), self._hash_weights()
        self.drawn_at = state_dict["drawn_at"]


def _hash(part: torch.Tensor) -> torch.Tensor:
    """A hash of the values of ``part``, () int64; 0 if it has none, as a shard of a weight with few rows."""
    if part.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=part.device)
    return torch.hash_tensor(part).view(torch.int64)
