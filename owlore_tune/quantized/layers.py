"""The layers of a model with quantized weights on the device, and full-precision weights in a store."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from owlore_tune.checkpoints.hf_weights import TIED_COPY, TIED_TO, check_tied_copy
from owlore_tune.distributed.world import ALONE, World, is_finite
from owlore_tune.errors import ConfigError, DivergedError
from owlore_tune.measure import return_freed_memory
from owlore_tune.models.decoder import Decoder, find_layers, find_linears, plain_name
from owlore_tune.quantized.formats import FORMATS
from owlore_tune.quantized.linear import (
    in_full_precision,
    is_quantized,
    quantizable_outside,
    quantize,
    requantize,
    restore,
    rounding_error,
    set_value,
    weight_of,
)
from owlore_tune.quantized.store import OUTSIDE, LayerStore


class QuantizedLayers:
    """Quantizes the Linears of all layers, also of those that train in the projected form.

    Args:
        model: on the run's device; layers without weights are loaded by `load`.
        store: of full-precision weights.
        kind: of `owlore_tune.quantized.formats.FORMATS`.
        products: of that format.
        world: processes that train together; the first one writes.

    Attributes:
        store: as given.
        settings: kind and products.
    """

    def __init__(
        self, model: Decoder, store: LayerStore, kind: str, products: str = "full", world: World = ALONE
    ) -> None:
        self._model = model
        self._layers = find_layers(model)
        self.store = store
        self.settings = {"kind": kind, "products": products}
        self._world = world
        if unknown := sorted(store.indices() - {OUTSIDE, *range(len(self._layers))}):
            raise ConfigError(
                f"the model has {len(self._layers)} layers, and its files have layer {unknown[0]}; check that model and"
                " checkpointer.checkpoint_dir match"
            )

    def load(self, index: int, device: torch.device) -> None:
        """Fill a layer, or OUTSIDE, from the store, in full precision."""
        modules = quantizable_outside(self._model) if index == OUTSIDE else self._modules(index).values()
        by_weight = {id(module.weight): module for module in modules}
        for parameter, weight in self._matched(index, self._named(index)):
            if id(parameter) in by_weight:
                restore(by_weight[id(parameter)], weight.to(device))
            else:
                set_value(parameter, weight.to(device))

    def quantize(self, index: int) -> None:
        """Quantize the Linears of a layer that are in full precision."""
        for linear in self._modules(index).values():
            if not is_quantized(linear):
                quantize(linear, **self.settings)
        return_freed_memory(next(self._layers[index].parameters()).device)

    def quantize_outside(self, *, embeddings: bool, output: bool) -> None:
        """Quantize the embeddings and the output head, if asked for, to int8; not if they share a weight."""
        for module in quantizable_outside(self._model):
            if embeddings if isinstance(module, nn.Embedding) else output:
                quantize(module, "int8")  # gradients of a head are more exact with full products

    def restore(self, index: int, names: Iterable[str]) -> None:
        """Give Linears of a layer, by the names of their weights, full precision, to train as they are."""
        modules = {name: module for name, module in self._modules(index).items() if name in names}
        if any(is_quantized(module) for module in modules.values()):
            weights = self.read(index)
            for name, module in modules.items():
                restore(module, weights[name].to(self._device(index)))

    def read(self, index: int) -> dict[str, Tensor]:
        """The full-precision weights of a layer, or of OUTSIDE, in the store, by name."""
        return self.store.read(index)

    def replace(self, index: int, weights: dict[str, Tensor]) -> None:
        """Write new weights of a layer to the store, and quantize them anew.

        Raises:
            DivergedError: if a weight is not finite.
            OSError: if the disk is full or refuses. Nothing has changed then. A `BackgroundStore` raises it in a later
                call, and holds the weights.
        """
        if bad := [name for name, weight in weights.items() if not is_finite(weight)]:
            raise DivergedError(f"weights are not finite: {bad[0]}; lower optimizer.lr")
        written = self._world.call(lambda: self.store.write(index, weights), on_rank_zero=True)
        written, unwritten = self._world.share((written, self.store.unwritten()))
        assert written is not None
        if self._world.rank != 0:
            self.store.follow(index, weights, unwritten)
        self.store.use(index, written)
        for name, module in self._modules(index).items():
            if is_quantized(module):
                requantize(module, weights[name].to(self._device(index)))
        return_freed_memory(self._device(index))

    def read_ahead(self, merging: set[int], correcting: set[int]) -> None:
        """Prepare to read the layers that are merged next, and those whose bases need a correction next."""
        self.store.read_ahead(merging | correcting if FORMATS[self.settings["kind"]].rounding_matters else merging)

    def correct(self, index: int, weights: dict[str, Any]) -> None:
        """Give projected weights of a layer, by name, the correction of their rounding, if it matters.

        A also learns to undo the rounding of W₀, which is wrong for the merged weight. That of int8 is too small to
        matter, but NF4 is off by 9 % of ‖W₀‖. With its correction, a weight is exact within its basis.
        """
        modules = self._modules(index)
        wanted = {name for name in weights if weight_of(modules[name]).rounding_matters}
        if not wanted:
            return
        for name, value in self.store.tensors(index):
            if name in wanted:
                weight = weights[name]
                error = rounding_error(modules[name], value, weight.basis, weight.right)
                weight.correction = error.to(weight.basis.dtype)

    def in_full_precision(self, index: int, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Have the full-precision ``weights``, by name, in a layer during the block."""
        modules = {name: module for name, module in self._modules(index).items() if is_quantized(module)}
        return in_full_precision({module: weights[name].to(self._device(index)) for name, module in modules.items()})

    def whole_outside(self) -> AbstractContextManager[None]:
        """Have everything outside the layers in full precision during the block."""
        quantized = [module for module in quantizable_outside(self._model) if is_quantized(module)]
        weights = self.store.read(OUTSIDE) if quantized else {}
        names = {id(parameter): name for name, parameter in self._outside()}
        values = {module: weights[names[id(module.weight)]].to(module.weight.device) for module in quantized}
        return in_full_precision(values)

    def fill_store(self) -> None:
        """Copy the model directory's layers to the store; see `LayerStore.fill`."""
        indices = (OUTSIDE, *range(len(self._layers)))
        names = {index: {name for name, _ in self._named(index)} for index in indices}
        self._world.call(lambda: self.store.fill(names), on_rank_zero=True)
        self.store.files = self._world.share(self.store.files)

    def write_checkpoint(self, directory: Path, merged: Callable[[int], dict[str, Tensor]], active: list[int]) -> None:
        """Write the model's weights: links to the store's files, and the weights of layers that train.

        Args:
            merged: returns the weights of a layer with the updates so far.
            active: those layers.
        """
        trained = {name: parameter.detach() for name, parameter in self._outside() if parameter.requires_grad}
        if trained:
            active = [OUTSIDE, *active]
        self.store.write_checkpoint(
            directory, active, lambda index: self.read(OUTSIDE) | trained if index == OUTSIDE else merged(index)
        )

    def _matched(self, index: int, named: list[tuple[str, nn.Parameter]]) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its weight in the store.

        Raises:
            ConfigError: if names or shapes in the store differ from the model.
        """
        weights = self.store.read(index)
        if isinstance(self._model.output, TiedLinear) and (copy := weights.pop(TIED_COPY, None)) is not None:
            check_tied_copy(copy, weights[TIED_TO], self.store.place)
        names = {name for name, _ in named}
        if wrong := sorted(names.symmetric_difference(weights)):
            where = "the model" if wrong[0] in weights else "its files"
            raise ConfigError(f"{where} has no {wrong[0]}; check that model and checkpointer.checkpoint_dir match")
        for name, parameter in named:
            if parameter.numel() and weights[name].shape != parameter.shape:
                raise ConfigError(
                    f"the model has shape {tuple(parameter.shape)} at {name}, and its files have "
                    f"{tuple(weights[name].shape)}; check that model and checkpointer.checkpoint_dir match"
                )
        return [(parameter, weights[name]) for name, parameter in named]

    def _named(self, index: int) -> list[tuple[str, nn.Parameter]]:
        """The parameters of a layer, or of OUTSIDE, with torchtune's names."""
        if index == OUTSIDE:
            return self._outside()
        named = self._layers[index].named_parameters()
        return [(f"layers.{index}.{plain_name(name)}", parameter) for name, parameter in named]

    def _outside(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if not name.startswith("layers.")]

    def _modules(self, index: int) -> dict[str, nn.Linear]:
        """The Linears of a layer, by the names of their weights."""
        return {f"layers.{index}.{name}.weight": linear for name, linear in find_linears(self._layers[index])}

    def _device(self, index: int) -> torch.device:
        return next(self._layers[index].parameters()).device
