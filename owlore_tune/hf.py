"""OwLore in the Trainer of transformers, and in trainers that are built on it, such as TRL's.

    optimizer = OwLoreOptimizer(model, outlier_scores(model, batches), num_active_layers=5, resample_every=50, lr=3e-4)
    trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[OwLoreCallback(optimizer)], ...)

docs/trainer.md has a complete example.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchtune.utils import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from owlore_tune.layers.active import ActiveLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.optim.adamw import OwLoreAdamW, parameter_groups

_SCHEDULE = "active_layers"

log = get_logger("INFO")


class OwLoreOptimizer(OwLoreAdamW):
    """`OwLoreAdamW` that also draws the active layers, freezes the others, and clips gradients.

    Layers are drawn in the constructor and after every K steps. The schedule is part of the optimizer's state, so the
    Trainer saves and restores it, and a resumed run equals an unbroken one.

    Args:
        model: a decoder of transformers or torchtune with loaded weights. Without ``train_…``, its embeddings, output
            head and final norm are frozen.
        scores: one number per layer, see `owlore_tune.layers.layer_scores`.
        num_active_layers: γ.
        resample_every: K, in optimizer steps.
        max_grad_norm: the Trainer cannot clip projected gradients; set its own ``max_grad_norm`` to 0. None does not
            clip.
        draw: see `LayerSampler`.
        inactive_state: see `ActiveLayers`.
        train_embeddings: see `parameter_groups`, also for ``train_output`` and ``train_norm``.
        options: passed to `OwLoreAdamW`, such as ``lr`` and ``rank``; ``seed`` is also that of the draws.

    Attributes:
        grad_norm: the norm before clipping in the last step; see `OwLoreAdamW.clip_grad_norm_`.
        trained: the layers that were active in the last step.
        num_steps: steps so far, with those that were skipped.

    Raises:
        TypeError: if ``model`` is no decoder whose parts can be identified.
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: list[float],
        *,
        num_active_layers: int,
        resample_every: int,
        max_grad_norm: float | None = 1.0,
        draw: str = "systematic",
        inactive_state: str = "drop",
        train_embeddings: bool = False,
        train_output: bool = False,
        train_norm: bool = False,
        **options: Any,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}; it must be above 0, or None")
        groups = parameter_groups(
            model, train_embeddings=train_embeddings, train_output=train_output, train_norm=train_norm
        )
        super().__init__(groups, **options)
        sampler = LayerSampler(scores, num_active_layers, draw, options.get("seed", 0))
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._active_layers = ActiveLayers(
            model, self, sampler, resample_every=resample_every, inactive_state=inactive_state
        )
        self._settings = {
            "scores": [float(score) for score in scores], "num_active_layers": num_active_layers,
            "resample_every": resample_every, "draw": draw, "inactive_state": inactive_state,
            "rank": self.defaults["rank"], "side": self.defaults["side"], "seed": self._seed,
        }  # fmt: skip
        self.grad_norm = 0.0
        self.num_steps = 0
        self.trained: list[int] = []
        self._active_layers.maybe_redraw(0)

    @property
    def active(self) -> list[int]:
        """The active layers, ascending."""
        return self._active_layers.active

    def step(self, closure: Any = None) -> Any:
        """Clip, update the active layers, and draw new ones if K steps have passed.

        A step whose gradient is not finite is skipped, with a warning.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.grad_norm = self.clip_grad_norm_(self._max_grad_norm).item()
        if math.isfinite(self.grad_norm):
            super().step()
        else:
            log.warning(f"Step {self.num_steps}: the gradient is not finite; no update.")
        self.zero_grad()  # the Trainer only clears the model's gradients, not low-rank ones
        self.num_steps += 1
        self.trained = self.active
        self._active_layers.maybe_redraw(self.num_steps)
        return loss

    def state_dict(self) -> dict[str, Any]:
        schedule = {**self._active_layers.state_dict(), "num_steps": self.num_steps, "settings": self._settings}
        return {**super().state_dict(), _SCHEDULE: schedule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: if the state is of another optimizer, or of one with other draws or projections.
        """
        rest = dict(state_dict)
        if _SCHEDULE not in rest:
            raise ValueError("the checkpoint is of another optimizer; start a new run from its weights")
        for name, saved in rest[_SCHEDULE]["settings"].items():
            if saved != self._settings[name]:
                raise ValueError(
                    f"{name}={self._settings[name]}, and the checkpoint has {saved}; pass the same value to continue"
                )
        schedule = tree_map_only(Tensor, Tensor.cpu, rest.pop(_SCHEDULE))  # the generator's state is of the CPU
        self._active_layers.load_state_dict(schedule)  # first, because switching layers can drop state
        self.num_steps = schedule["num_steps"]
        super().load_state_dict(rest)


class OwLoreCallback(TrainerCallback):
    """Checks that the Trainer's settings go with `OwLoreOptimizer`, and logs the norm of the gradient and the draw.

    Args:
        optimizer: the Trainer's. None takes it from the Trainer, if that creates it.

    Raises:
        ValueError: at the start of training, if the Trainer has another optimizer, or a setting that would train
            something else without an error.
    """

    def __init__(self, optimizer: OwLoreOptimizer | None = None) -> None:
        self._optimizer = optimizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        found = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not isinstance(found, OwLoreOptimizer):
            raise ValueError(
                f"the Trainer's optimizer is {type(found).__name__}; pass optimizers=(OwLoreOptimizer(…), None)"
            )
        if state.global_step != found.num_steps:
            raise ValueError(
                f"the Trainer is at step {state.global_step} and OwLoreOptimizer at {found.num_steps}; resume from a "
                "checkpoint with an optimizer state (save_only_model=False), and make a new optimizer for a new run"
            )
        self._optimizer = found
        found.zero_grad()  # of a step that an earlier call of `train` did not finish
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm}; the Trainer cannot clip projected gradients: set it to 0, and "
                "max_grad_norm of OwLoreOptimizer to the limit"
            )
        if args.fp16:
            raise ValueError("fp16=True; a gradient scaler does not see projected gradients: use bf16")
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "the Trainer has several devices, and would not reduce projected gradients over them; train with one, "
                "or with tune run --nproc_per_node N owlore_full_finetune"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "grad_norm" not in logs or self._optimizer is None:
            return
        # The Trainer's norm lacks projected gradients. It appends to the history before it calls callbacks.
        for record in (logs, state.log_history[-1]):
            record |= {"grad_norm": self._optimizer.grad_norm, "active_layers": self._optimizer.trained}
