"""OwLore in the Trainer of transformers, and in trainers that are built on it, such as TRL's.

    layers = ProjectedLayers(model, rank=128)
    optimizer = torch.optim.AdamW(layers.parameter_groups(), lr=3e-4)
    schedule = Schedule(layers, optimizer, LayerSampler(layer_scores(model, "outlier", batches), 5), resample_every=50)
    trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[OwLoreCallback(model, schedule)], ...)

docs/trainer.md has a complete example.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.schedule import Schedule
from owlore_tune.models.decoder import find_layers, plain_name
from owlore_tune.quantized.layers import QuantizedLayers
from owlore_tune.quantized.store import LayerStore

STATE = "owlore"  # key of the schedule's state in the optimizer's
QUANTIZED = "quantized"


class OwLoreCallback(TrainerCallback):
    """Draws layers in the Trainer, saves and restores the schedule with the optimizer's state, and logs the draw.

    The Trainer's own clipping, accumulation, schedule and gradient scaler work as they are. It saves weights with the
    updates so far. The optimizer's state has what an exact resume needs beside them. Make the callback before
    the Trainer, which moves the model to its device.

    Args:
        model: that of the schedule's layers; the parameters A become parameters of it.
        schedule: with the optimizer of the Trainer.

    Raises:
        ValueError: if the model has a callback; at the start of training, if a setting would silently change the
            training; or while a state is loaded that does not go with the schedule.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile wraps it
        if hasattr(model, "owlore"):
            raise ValueError("this model already has a callback; pass that one, or load the model anew")
        self._model = model
        self._schedule = schedule
        self._layers: ProjectedLayers = schedule.layers
        self._trained: list[int] = []
        own = {*model.parameters()}
        keys = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
        self._names = [  # for each layer, names of its parameters: the model's, and those of `ProjectedLayers`
            [(keys[p], f"layers.{index}.{plain_name(name)}") for name, p in layer.named_parameters()]
            for index, layer in enumerate(find_layers(model))
        ]
        model.owlore = nn.ParameterList(p for p in self._layers.parameters() if p not in own)
        model.register_state_dict_post_hook(partial(self._merge_weights))
        model.register_load_state_dict_pre_hook(partial(self._take_weights))
        schedule.optimizer.register_state_dict_post_hook(self._add_state)
        self._load_optimizer = schedule.optimizer.load_state_dict
        # Not a hook: bitsandbytes' optimizers do not call these.
        schedule.optimizer.load_state_dict = self._load_state  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs.get("model")
        if getattr(model, "_orig_mod", model) is not self._model:
            raise ValueError(
                f"the Trainer's model is another {type(model).__name__} than the callback's, so its weights would not "
                "train, or not be saved; pass the same model to both, without adapters"
            )
        optimizer = kwargs.get("optimizer")
        found = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if found is not self._schedule.optimizer:
            raise ValueError(
                f"the Trainer's optimizer is another {type(found).__name__}; pass optimizers=(optimizer, None), with "
                "that of the schedule"
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "the Trainer has several devices, and their layers would differ; train with one, or with tune run "
                "--nproc_per_node N owlore_full_finetune"
            )
        steps = self._layers.num_steps
        if state.global_step < steps or (state.global_step > 0 and steps == 0):
            raise ValueError(
                f"the Trainer is at step {state.global_step} and the schedule at {steps}; resume from a checkpoint "
                "with an optimizer state (save_only_model=False), and load the model anew for a new run"
            )
        self._schedule.optimizer.zero_grad()  # of a step that an earlier call of `train` did not finish

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._schedule.begin_step()
        self._trained = self._schedule.active

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._layers.merge()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "grad_norm" not in logs:
            return
        history: dict[str, Any] = state.log_history[-1]  # the Trainer appends to it before it calls callbacks
        logs["active_layers"] = history["active_layers"] = self._trained

    def _merge_weights(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Make a model's ``state_dict`` that of a plain model with full-precision weights and the updates so far."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}owlore.")]:
            del state_dict[key]
        if self._layers.quantized is None:
            for name, parameter in model.named_parameters():
                if prefix + plain_name(name) in state_dict:
                    state_dict[prefix + plain_name(name)] = self._layers.merged(parameter)
            return
        for index, names in enumerate(self._names):
            weights = self._layers.merged_layer(index)
            state_dict.update({prefix + key: weights[name] for key, name in names})

    def _take_weights(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Forget the updates before a model's ``state_dict`` is loaded, and quantize its weights."""
        self._layers.forget_updates()
        for name, parameter in model.owlore.named_parameters():  # type: ignore[union-attr, operator]
            state_dict[f"{prefix}owlore.{name}"] = parameter.detach()
        if (quantized := self._layers.quantized) is None:
            return
        parameters = dict(model.named_parameters())
        for index, names in enumerate(self._names):
            weights = {name: state_dict[prefix + key] for key, name in names if prefix + key in state_dict}
            if weights:
                quantized.replace(index, quantized.read(index) | weights)
                state_dict.update({prefix + k: parameters[k].detach() for k, _ in names if not parameters[k].numel()})

    def _add_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = self._schedule.state_dict()
        if self._layers.quantized is not None:
            state[QUANTIZED] = {index: self._layers.quantized.read(index) for index in self._schedule.active}
        return {**state_dict, STATE: state}

    def _load_state(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        if STATE not in rest:
            raise ValueError("the checkpoint is of another optimizer; start a new run from its weights")
        state = tree_map_only(Tensor, Tensor.cpu, rest.pop(STATE))  # the generator's state is of the CPU
        self._schedule.check_settings(state)
        for index, weights in state.pop(QUANTIZED, {}).items():
            assert self._layers.quantized is not None  # as in the settings
            self._layers.quantized.replace(index, weights)
        self._schedule.load_state_dict(state)
        self._load_optimizer(rest)


def quantize_layers(model: nn.Module, kind: str, directory: str | Path, *, products: str = "full") -> QuantizedLayers:
    """Write the layers' weights to files, and quantize them on the device. Assign the result to ``layers.quantized``.

    Args:
        model: a decoder of transformers with loaded weights, in host memory or on a device.
        kind: ``int8`` or ``nf4``.
        directory: a new one, for the full-precision weights while the model trains.
        products: see `owlore_tune.quantized.linear.quantize`.

    Raises:
        FileExistsError: if ``directory`` exists.
    """
    place = Path(directory)
    place.mkdir(parents=True)
    store = LayerStore(_OwnNames(place), (), place, next(model.parameters()).dtype)
    quantized = QuantizedLayers(model, store, kind, products)
    for index, layer in enumerate(find_layers(model)):
        weights = {f"layers.{index}.{plain_name(name)}": p.detach() for name, p in layer.named_parameters()}
        store.use(index, store.write(index, weights))
        quantized.quantize(index)
    return quantized


class _OwnNames:
    """The layout of a store whose names are the model's."""

    def __init__(self, directory: Path) -> None:
        self.checkpoint_dir = directory

    def to_tune(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor}

    def write_tensors(self, weights: dict[str, Tensor], file: Path) -> list[str]:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
        return list(weights)
