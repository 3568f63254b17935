"""The norms of the inputs of a layer's Linears, which scores with data use."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.distributed.fsdp import reshard
from owlore_tune.distributed.world import World
from owlore_tune.models.decoder import find_layers, find_linears, plain_name
from owlore_tune.models.hf_experts import Experts

InputNorms: TypeAlias = dict[str, Tensor]  # by a Linear's name in its layer: ‖X_:,j‖₂ (in,), float64


@torch.no_grad()
def input_norms(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], world: World) -> list[InputNorms | None]:
    """The `InputNorms` of each layer over the batches of all processes, in one forward pass per batch.

    Args:
        batches: as `owlore_tune.layers.scores.layer_scores`. Without any, the norms are None.
    """
    layers = [InputSquares(layer) for layer in find_layers(model)]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    num_batches = 0
    try:
        for batch in tqdm(batches, desc="Scoring layers", unit="batch", leave=False, disable=world.rank > 0):
            inputs = dict(batch)
            valid = inputs.pop("valid", None)
            for layer in layers:
                layer.mark(valid)
            model(**inputs)
            num_batches += 1
    finally:
        for module, is_training in modes.items():
            module.training = is_training
        reshard(model)
        for layer in layers:
            layer.remove()
    return [layer.norms(world) if num_batches else None for layer in layers]


class InputSquares:
    """Sums the squared inputs of a layer's Linears over the forward passes of the layer, until `remove`."""

    def __init__(self, layer: nn.Module) -> None:
        self._linears = dict(find_linears(layer))
        self._experts = _experts_by_linear(layer)
        self._squares: dict[str, Tensor] = {}
        self._positions: Tensor | None = None  # (b · s,)
        # The query, key and value projections share an input, as do gate and up. Each input is measured once.
        self._last_input: Tensor | None = None
        self._last_squares: Tensor | None = None
        self._handles = [
            linear.register_forward_pre_hook(partial(self._measure, name)) for name, linear in self._linears.items()
        ]
        self._handles.append(layer.register_forward_hook(self._forget))

    def mark(self, valid: Tensor | None) -> None:
        """Measure only these positions of the next forward pass, (b, s) bool; None for all."""
        self._positions = None if valid is None or valid.all() else valid.flatten()

    def _measure(self, name: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0] is not self._last_input:
            x = args[0].reshape(-1, args[0].shape[-1])
            if self._positions is not None:
                experts = self._experts.get(name)
                x = x[self._positions if experts is None else self._positions[experts.tokens]]
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._last_input = args[0]
            self._last_squares = torch.linalg.vector_norm(x, dim=0, dtype=dtype).double().square()
        assert self._last_squares is not None
        known = self._squares.get(name)
        self._squares[name] = self._last_squares if known is None else known + self._last_squares

    def _forget(self, *_: object) -> None:
        self._last_input = self._last_squares = None

    def norms(self, world: World) -> InputNorms:
        """‖X_:,j‖₂ of each Linear by its name, (in,) float64, over all processes. 0 for an expert without tokens."""
        norms = {}
        for name, linear in self._linears.items():
            total = self._squares.get(name)
            if total is None:
                device = next(iter(self._squares.values())).device
                total = torch.zeros(linear.in_features, dtype=torch.float64, device=device)
            norms[name] = world.sum_(total.clone()).sqrt()
        return norms

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _experts_by_linear(layer: nn.Module) -> dict[str, Experts]:
    """The mixture of experts that each Linear belongs to, by its name in ``layer``."""
    found = [(plain_name(name), module) for name, module in layer.named_modules() if isinstance(module, Experts)]
    return {f"{path}.{name}": experts for path, experts in found for name, _ in find_linears(experts)}
