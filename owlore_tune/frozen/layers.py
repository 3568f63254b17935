"""The layers of a model, quantized on the device except for those that train."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from owlore_tune.checkpoints.hf import TIED_COPY, TIED_TO, check_tied_copy
from owlore_tune.distributed.world import is_finite
from owlore_tune.errors import ConfigError, DivergedError
from owlore_tune.frozen.linear import freeze, quantizable_outside, set_value, thaw
from owlore_tune.frozen.store import OUTSIDE, LayerStore
from owlore_tune.heap import return_freed_memory
from owlore_tune.models.decoder import Decoder, find_layers, find_linears, plain_name


class FrozenLayers:
    """Quantizes layers that stop training, and brings back the full precision of those that start.

    Args:
        model: on the run's device; layers without weights are loaded by `load`.
        store: of full-precision weights.
        kind: of `owlore_tune.frozen.formats.FORMATS`.
        products: of `owlore_tune.frozen.linear.PRODUCTS`.
    """

    def __init__(self, model: Decoder, store: LayerStore, kind: str, products: str = "full") -> None:
        self._model = model
        self._layers = find_layers(model)
        self.store = store
        self._kind = kind
        self._products = products
        self._changed: set[int] = set()  # layers whose weights may differ from the store's
        if unknown := sorted(store.indices() - {OUTSIDE, *range(len(self._layers))}):
            raise ConfigError(
                f"the model has {len(self._layers)} layers, and its files have layer {unknown[0]}; check that model and"
                " checkpointer.checkpoint_dir match"
            )

    def load(self, index: int, device: torch.device) -> None:
        """Fill a layer, or OUTSIDE, from the store, in full precision."""
        modules = quantizable_outside(self._model) if index == OUTSIDE else _linears(self._layers[index])
        by_weight = {id(module.weight): module for module in modules}
        for parameter, weight in self._matched(index, self._named(index)):
            if id(parameter) in by_weight:
                thaw(by_weight[id(parameter)], weight.to(device))
            else:
                set_value(parameter, weight.to(device))

    def freeze_outside(self, *, embeddings: bool, output: bool) -> None:
        """Quantize the embeddings and the output head, if asked for, to int8; not if they share a weight."""
        for module in quantizable_outside(self._model):
            if embeddings if isinstance(module, nn.Embedding) else output:
                freeze(module, "int8")  # gradients of a head are more exact with full products

    def _matched(self, index: int, named: list[tuple[str, nn.Parameter]]) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its weight in the store.

        Raises:
            ConfigError: if the store lacks one, or has another one, or one has another shape.
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

    def keep(self, indices: Iterable[int]) -> None:
        """Write the weights of layers that have trained to the store, before they are quantized.

        Raises:
            DivergedError: if a weight is not finite.
            OSError: if the disk is full or refuses.
        """
        for index in sorted(set(indices) & self._changed):
            weights = self.weights(index)
            if bad := [name for name, weight in weights.items() if not is_finite(weight)]:
                raise DivergedError(f"weights are not finite: {bad[0]}; lower optimizer.lr")
            self.store.write(index, weights)

    def freeze(self, index: int) -> None:
        """Quantize a layer; see `keep` for one that has trained."""
        self._changed.discard(index)
        for linear in _linears(self._layers[index]):
            freeze(linear, self._kind, self._products)
        return_freed_memory(next(self._layers[index].parameters()).device)

    def thaw(self, index: int) -> None:
        """Give a layer its full-precision weights; it may train now."""
        self.load(index, next(self._layers[index].parameters()).device)
        self._changed.add(index)

    def run_whole(self, index: int, run: Callable[..., None], device: torch.device) -> None:
        """Call ``run`` while a layer is in full precision."""
        if index in self._changed:
            run()
            return
        self.load(index, device)
        run()
        self.freeze(index)

    @contextmanager
    def whole_outside(self, device: torch.device) -> Iterator[None]:
        """Have everything outside the layers in full precision during the block."""
        quantized = [module for module in quantizable_outside(self._model) if "frozen_weight" in vars(module)]
        weights = self.store.read(OUTSIDE) if quantized else {}
        names = {id(parameter): name for name, parameter in self._outside()}
        for module in quantized:
            thaw(module, weights[names[id(module.weight)]].to(device))
        try:
            yield
        finally:
            for module in quantized:
                freeze(module, "int8")

    def weights(self, index: int) -> dict[str, Tensor]:
        """The parameters of a layer, or of OUTSIDE, by torchtune's names."""
        return {name: parameter.detach() for name, parameter in self._named(index)}

    def fill_store(self) -> None:
        """Copy the model directory's layers to the store; see `LayerStore.fill`."""
        indices = (OUTSIDE, *range(len(self._layers)))
        self.store.fill({index: {name for name, _ in self._named(index)} for index in indices})

    def write_checkpoint(self, directory: Path) -> None:
        """Write the model's weights: links to the store's files, and the weights that train now."""
        active = {index: self.weights(index) for index in self._changed}
        trained = {name: parameter.detach() for name, parameter in self._outside() if parameter.requires_grad}
        if trained:
            active[OUTSIDE] = self.store.read(OUTSIDE) | trained
        self.store.write_checkpoint(directory, active)

    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        modules = [*quantizable_outside(self._model), *(linear for layer in self._layers for linear in _linears(layer))]
        frozen = [getattr(module, "frozen_weight", None) for module in modules]
        return sum(weight.nbytes for weight in frozen if weight is not None)


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [linear for _, linear in find_linears(layer)]
