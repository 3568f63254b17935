"""Which layers train, and when their bases end, in any training loop beside any optimizer (OwLore, arXiv 2405.18380).

layers = ProjectedLayers(model, rank=128)
optimizer = torch.optim.AdamW(layers.parameter_groups(), lr=3e-4)
schedule = Schedule(layers, optimizer, LayerSampler(scores, 5), resample_every=50)
for batch in batches:
    schedule.begin_step()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
layers.merge()
"""

from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.sampler import HOST, LayerSampler
from owlore_tune.optim.moments import MOMENTS, carry_moments, check_moments, check_optimizer, move_state
from owlore_tune.optim.weights import ProjectedWeight

INACTIVE_STATES = ("drop", "offload", "keep")
_with_schedule: WeakSet[Optimizer] = WeakSet()


class Schedule:
    """Draws the layers that train every K steps, and ends their bases every ``update_gap`` steps (algorithm 1).

    It follows the optimizer's steps by hooks: weight decay, which must be decoupled, acts on the full weight, moments
    are carried over to new bases, and processes that train together draw the same random numbers.

    If all layers train and their weights are quantized, their bases end in different steps, so that no step waits for
    the whole model.

    Args:
        optimizer: has `ProjectedLayers.parameter_groups`.
        sampler: draws the layers.
        resample_every: K, in optimizer steps.
        update_gap: optimizer steps between refreshes of a basis.
        moments: at a refresh, ``keep`` the moments of A (GaLore's behavior), ``project`` them onto the new basis, or
            ``reset`` them.
        inactive_state: optimizer state of inactive layers. ``drop``: a layer that returns starts with new bases and
            moments. ``keep``: it continues with its old ones; only its own steps count toward a refresh, as in the
            authors' code. ``offload``: like ``keep``, in host memory.

    Attributes:
        layers, optimizer, sampler: as given.
        drawn_at: optimizer steps before the last draw.
        last_moved: the layers of the draw before whose weights changed while they were active.
        refresh_seconds: time that the bases of the last step took.

    Raises:
        ValueError: if a value is out of range, or the optimizer lacks parameters of ``layers``, has weight decay that
            is not decoupled, or has a schedule.
    """

    def __init__(
        self,
        layers: ProjectedLayers,
        optimizer: Optimizer,
        sampler: LayerSampler,
        *,
        resample_every: int = 50,
        update_gap: int = 100,
        moments: str = "keep",
        inactive_state: str = "drop",
    ) -> None:
        for name, count in (("resample_every", resample_every), ("update_gap", update_gap)):
            if not count >= 1:
                raise ValueError(f"{name}={count}; it must be at least 1 optimizer step")
        for name, value, choices in (
            ("moments", moments, MOMENTS), ("inactive_state", inactive_state, INACTIVE_STATES),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name}={value!r}; choose one of {', '.join(choices)}")
        if (scored := len(sampler.probabilities)) != len(layers.layers):
            raise ValueError(
                f"the sampler has scores of {scored} layers, and the model has {len(layers.layers)} layers; pass "
                "the scores of this model"
            )
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if missing := sum(parameter not in known for parameter in layers.parameters()):
            raise ValueError(
                f"the optimizer lacks {missing} parameters that can train; make it from layers.parameter_groups(), "
                "not from model.parameters()"
            )
        check_optimizer(optimizer)
        if optimizer in _with_schedule:
            raise ValueError("this optimizer already has a schedule; make a new optimizer for a new schedule")
        _with_schedule.add(optimizer)
        self.layers = layers
        self.optimizer: Optimizer = optimizer
        self.sampler = sampler
        self._resample_every = resample_every
        self._update_gap = update_gap
        self._moments = moments
        self._inactive_state = inactive_state
        self._settings = {
            **layers.settings, "resample_every": resample_every, "update_gap": update_gap, "moments": moments,
            "inactive_state": inactive_state, "draw": sampler.kind,
            "probabilities": sampler.probabilities.tolist(),
        }  # fmt: skip
        self.drawn_at: int | None = None
        self.last_moved: list[int] = []
        self.refresh_seconds = 0.0
        self._is_loaded = False  # whether optimizer state of inactive layers may be on the device
        self._has_returned = False  # whether a layer came back with its bases, whose corrections no longer hold
        self._moved: set[int] = set()  # active layers known to have changed since the draw
        self._step = ExitStack()  # what ends after an optimizer step
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    @property
    def active(self) -> list[int]:
        """The layers that train, ascending."""
        return self.layers.active

    def begin_step(self) -> list[int] | None:
        """Draw new layers, or end bases, if it is time. Call it before the first forward of each step.

        Returns:
            The active layers if there was a draw, else None.

        Raises:
            OSError: if the disk of quantized layers is full or refuses.
            DivergedError: if the weights of a quantized layer are not finite.
        """
        self._accept_new_bases()  # of a step that was skipped
        self._put_idle_away()
        steps = self.layers.num_steps
        is_due = self.drawn_at is None or steps - self.drawn_at >= self._resample_every
        if is_due:
            self._draw()
        ended = [index for index in self.active if self.layers.layers[index].age >= self._update_gap]
        self._note_moved(ended)
        self.layers.merge(ended)
        if self.layers.quantized is not None:
            self.layers.quantized.read_ahead(self._merged_next(), set(filter(self.layers.lacks_basis, self.active)))
        return self.active if is_due else None

    def _merged_next(self) -> set[int]:
        """The layers that the next call merges."""
        assert self.drawn_at is not None
        ended = {index for index in self.active if self.layers.layers[index].age + 1 >= self._update_gap}
        if self.layers.num_steps + 1 - self.drawn_at < self._resample_every:
            return ended
        return ended | set(self.active).difference(self.sampler.peek())

    def _draw(self) -> None:
        drawn = self.layers.world.share(self.sampler.draw())
        leaving, entering = (sorted(set(a) - set(b)) for a, b in ((self.active, drawn), (drawn, self.active)))
        self.last_moved, self._moved = self.moved(), set()
        self.layers.merge(leaving, keep_bases=self._keeps_state)
        self.layers.activate(drawn, forget=not self._keeps_state)
        for index in leaving:
            self._put_away(index)
        for index in entering:
            self._bring_back(index)
        self.drawn_at = self.layers.num_steps

    @property
    def _keeps_state(self) -> bool:
        return self._inactive_state != "drop"

    def _put_idle_away(self) -> None:
        """After a resume, with ``offload``: torch loads the optimizer's state to the device."""
        if self._is_loaded and self._inactive_state == "offload":
            for index in set(range(len(self.layers.layers))).difference(self.active):
                self._put_away(index)
        self._is_loaded = False

    def _put_away(self, index: int) -> None:
        for parameter in self.layers.layers[index].trained().values():
            if self._inactive_state == "drop":
                self.optimizer.state.pop(parameter, None)
            elif self._inactive_state == "offload":
                move_state(self.optimizer, parameter, HOST)
        if self._inactive_state == "offload":
            for weight in self.layers.layers[index].weights.values():
                weight.move_basis(HOST)

    def _bring_back(self, index: int) -> None:
        layer = self.layers.layers[index]
        for weight in layer.weights.values():
            weight.move_basis(weight.device)
        for parameter in layer.trained().values():
            move_state(self.optimizer, parameter, parameter.device)
        is_new = not any(weight.basis is not None for weight in layer.weights.values())
        self._has_returned |= not is_new
        if is_new and self.layers.quantized is not None and self.sampler.num_active == len(self.layers.layers):
            layer.age = index * self._update_gap // len(self.layers.layers)

    def _accept_new_bases(self) -> None:
        """Carry moments over to new bases, correct quantized weights, and undo bases that a gradient did not give.

        Waits for the device if there are new bases.
        """
        new = [weight for _, weight in self.layers.active_weights() if weight.is_new]
        self.refresh_seconds = 0.0
        if new:
            are_given = torch.stack([weight.is_given for weight in new if weight.is_given is not None]).tolist()
            self.refresh_seconds = sum(weight.seconds() for weight in new)
            for weight, is_given in zip(new, are_given, strict=True):
                self._accept_basis(weight, is_given)
        if self.layers.quantized is not None and (new or self._has_returned):
            self._has_returned = False
            for index in self.active:
                weights = self.layers.layers[index].weights
                bare = {name: w for name, w in weights.items() if w.basis is not None and w.correction is None}
                self.layers.quantized.correct(index, bare)

    def end_step(self) -> None:
        """Free gradients, and settle the bases of a step without an update."""
        self.optimizer.zero_grad()
        if any(weight.is_new for _, weight in self.layers.active_weights()):
            self._accept_new_bases()

    def _accept_basis(self, weight: ProjectedWeight, is_given: bool) -> None:
        if not is_given:
            weight.give_up_basis()
            return
        if weight.turn is not None:
            carry_moments(self.optimizer, weight.trained, weight.turn, self._moments, weight.right)
        weight.turn = weight.start = None
        weight.is_new = False

    def _before_step(self) -> None:
        self._accept_new_bases()
        self._step.close()  # of a step that failed
        world, generator = self.layers.world, self.layers.generator("optimizer", HOST)
        if world.size > 1 and generator is not None:  # an optimizer may round stochastically
            self._step.enter_context(world.same_random_numbers(generator.initial_seed()))

    def _after_step(self) -> None:
        self._step.close()
        skips = getattr(self.optimizer, "found_inf", None)  # of a gradient scaler: a fused optimizer skips by itself
        if skips is not None and skips.item():
            return
        layers = self.layers
        factor_of = {
            parameter: 1 - float(group["lr"]) * group.get("weight_decay", 0.0)
            for group in self.optimizer.param_groups
            if group.get("weight_decay", 0.0)
            for parameter in group["params"]
        }
        for _, weight in layers.active_weights():
            if factor_of and weight.trained.grad is not None:
                weight.decay_by(factor_of.get(weight.trained, 1.0))
        for index in self.active:
            layers.layers[index].age += 1
        if self._moments == "project" and layers.num_steps == 0:  # and not only at the first refresh
            for _, weight in layers.active_weights():
                check_moments(self.optimizer, weight.trained)
        layers.write_back()
        layers.num_steps += 1

    def moved(self) -> list[int]:
        """The active layers whose weights have changed since the draw: those with an update that is not 0.

        A layer without projected weights counts if there was a step.
        """
        self._note_moved(self.active)
        return sorted(self._moved)

    def _note_moved(self, indices: list[int]) -> None:
        has_stepped = self.drawn_at is not None and self.layers.num_steps > self.drawn_at
        for index in indices:
            flags = [weight.has_moved() for weight in self.layers.layers[index].weights.values()]
            if torch.stack(flags).any() if flags else has_stepped:
                self._moved.add(index)

    def state_dict(self) -> dict[str, Any]:
        """The schedule and the layers, for an exact resume between two steps; see `ProjectedLayers.state_dict`.

        The optimizer's own state is not in it.
        """
        return {
            "drawn_at": self.drawn_at,
            "moved": self.moved(),
            "sampler": self.sampler.state_dict(),
            "layers": self.layers.state_dict(),
            "settings": self._all_settings(),
        }

    def _all_settings(self) -> dict[str, Any]:
        quantized = self.layers.quantized
        return self._settings | {"weights": None if quantized is None else quantized.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it after the weights, and the optimizer's state after it.

        Raises:
            ValueError: if the state is of a schedule with other settings.
        """
        self.check_settings(state_dict)
        self.sampler.load_state_dict(state_dict["sampler"])
        self.layers.load_state_dict(state_dict["layers"])
        self._moved = set(state_dict["moved"])
        self._is_loaded = self._has_returned = True
        self.drawn_at = state_dict["drawn_at"]

    def check_settings(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if a state is of a schedule with other settings."""
        own = self._all_settings()
        for name, saved in state_dict["settings"].items():
            if saved != own[name]:
                raise ValueError(f"{name}={own[name]}, and the checkpoint has {saved}; pass the same value to continue")
