"""The layers of a model in the projected form: what an optimizer trains in them, and their merged weights."""

import hashlib
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from owlore_tune.distributed.world import ALONE, World, full, shard_like
from owlore_tune.models.decoder import find_layers, find_linears, model_parts, plain_name
from owlore_tune.optim.bases import BASIS_KINDS, SIDES, BasisMaker
from owlore_tune.optim.weights import ProjectedWeight, WholeParameter
from owlore_tune.quantized.layers import QuantizedLayers


def check_options(rank: Any, side: str, scale: Any, basis: str) -> None:
    for name, value, choices in (("side", side, SIDES), ("basis", basis, BASIS_KINDS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r}; choose one of {', '.join(choices)}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank}; it must be an integer >= 1, or null for full rank")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale < math.inf:
        raise ValueError(f"scale={scale!r}; it must be a finite number >= 0")


def check_rank(rank: int, layers: list[dict[str, nn.Parameter]], projected: Collection[Tensor]) -> None:
    """Refuse a rank that projects nothing, and warn of one that projects only some matrices."""
    matrices = [parameter for layer in layers for parameter in layer.values() if parameter.ndim == 2]
    others = [parameter for parameter in matrices if parameter not in projected]
    if not others:
        return
    sides = sorted({min(parameter.shape) for parameter in others})
    if not projected:
        raise ValueError(
            f"rank={rank}; no weight's shorter side is above it (shorter sides: {sides}); lower it, or set rank=null"
        )
    warnings.warn(
        f"rank={rank} is not below the shorter side ({', '.join(map(str, sides))}) of {len(others)} of "
        f"{len(matrices)} weights; these are trained at full rank",
        stacklevel=3,
    )


class ProjectedLayer:
    """One layer.

    Args:
        parameters: its parameters, by names as ``layers.0.mlp.w1.weight``.
        weights: those that are projected.

    Attributes:
        others: parameters that train as they are.
        age: optimizer steps since its bases ended.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], weights: dict[str, ProjectedWeight]) -> None:
        self.weights = weights
        self.others = {name: WholeParameter(p) for name, p in parameters.items() if name not in weights}
        self.age = 0

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer trains, by the names of the model's."""
        projected = {name: weight.trained for name, weight in self.weights.items()}
        return projected | {name: other.trained for name, other in self.others.items()}

    def engage(self) -> None:
        for weight in self.weights.values():
            weight.engage()
        for other in self.others.values():
            other.engage()

    def release(self, *, forget: bool) -> None:
        for weight in self.weights.values():
            weight.release(forget=forget)
        for other in self.others.values():
            other.release()
        if forget:
            self.age = 0


class ProjectedLayers:
    """The layers of a decoder, each of whose Linears trains through a low-rank projection of its gradient.

    All parameters of the model are frozen, except for those outside the layers that are asked for. `activate` lets
    layers train. The optimizer gets a small parameter A for each Linear (see `ProjectedWeight`), and the other
    parameters of the layers, such as norms, as they are. Its gradients are ordinary: accumulation, clipping, gradient
    scalers and schedules work unchanged.

    With any optimizer and ``side="shape"``, this is GaLore's projected optimizer (arXiv 2403.03507) for the layers that
    are active.

    Args:
        model: a decoder of torchtune or transformers. Its weights may be loaded later, in place.
        rank: r. A Linear whose shorter side is not above it trains as it is; None trains every weight so.
        side, scale, basis: see `ProjectedWeight`.
        seed: of the bases' random sketches, and of stochastic rounding in merges.
        train_embeddings, train_output, train_norm: also train these parts, as they are, in every step.
        world: processes that train together; all get rank 0's draws.

    Attributes:
        layers: bottom first.
        outside: what trains outside the layers, by name.
        active: the layers that train, ascending.
        quantized: full-precision weights of quantized layers; None if no layer is quantized. Set it once they exist.
        num_steps: optimizer steps so far.
        settings: how weights are projected.

    Raises:
        ValueError: if a value is out of range, ``rank`` is too large for every weight, or others train the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int | None = 128,
        side: str = "right",
        scale: float = 1.0,
        basis: str = "randomized",
        seed: int = 0,
        train_embeddings: bool = False,
        train_output: bool = False,
        train_norm: bool = False,
        world: World = ALONE,
    ) -> None:
        check_options(rank, side, scale, basis)
        self._seed = seed
        self._rank = rank
        self.settings = {"rank": rank, "side": side, "scale": scale, "basis": basis, "seed": seed}
        self._options: dict[str, Any] = {"side": side, "scale": scale, "basis": basis, "world": world}
        self._options["maker"] = BasisMaker()
        self.world = world
        self.active: list[int] = []
        self.quantized: QuantizedLayers | None = None
        self.num_steps = 0
        if hasattr(model, "owlore") or any(hasattr(module, "projected") for module in model.modules()):
            raise ValueError(
                "other ProjectedLayers train this model; merge() and activate([]) end them, or load it anew"
            )
        parts = model_parts(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.layers = [self._layer(index, layer) for index, layer in enumerate(find_layers(model))]
        wanted = ((train_embeddings, parts.embeddings), (train_output, parts.output), (train_norm, parts.norm))
        self.outside = {name: WholeParameter(p) for train, part in wanted if train for name, p in part.items()}
        self._by_parameter = {weight.linear.weight: weight for _, weight in self._all_weights()}
        if rank is not None:
            check_rank(rank, parts.layers, self._by_parameter)

    def _layer(self, index: int, layer: nn.Module) -> ProjectedLayer:
        parameters = {f"layers.{index}.{plain_name(name)}": p for name, p in layer.named_parameters()}
        rank = self._rank
        linears = {f"layers.{index}.{name}.weight": linear for name, linear in find_linears(layer)}
        weights = {
            name: ProjectedWeight(linear, rank, generator=partial(self.generator, name), **self._options)
            for name, linear in linears.items()
            if rank is not None and rank < min(linear.in_features, linear.out_features)
        }
        return ProjectedLayer(parameters, weights)

    def generator(self, name: str, device: torch.device) -> torch.Generator | None:
        """A generator for this weight and step. It needs no saved state, so a resumed run gets the same one."""
        if device.type == "meta":
            return None  # there are none
        digest = hashlib.sha256(f"{self._seed} {name} {self.num_steps}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:4]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters that can train, for an optimizer: those of projected weights, and all others.

        Those of layers that are not active have no gradients, and those of projected weights no values.
        """
        projected = [weight.trained for _, weight in self._all_weights()]
        others = [other.trained for layer in self.layers for other in layer.others.values()]
        others += [other.trained for other in self.outside.values()]
        return [{"params": params} for params in (projected, others) if params]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of `parameter_groups`, in one list."""
        return [parameter for group in self.parameter_groups() for parameter in group["params"]]

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train now, by names as ``layers.0.mlp.w1.weight`` for models of all kinds."""
        found = {name: p for index in self.active for name, p in self.layers[index].trained().items()}
        return found | {name: other.trained for name, other in self.outside.items()}

    def num_trainable(self) -> int:
        """Number of the model's weights that train now, in the active layers and outside the layers."""
        active = [self.layers[index] for index in self.active]
        projected = [weight.shape.numel() for layer in active for weight in layer.weights.values()]
        parts = (*(layer.others for layer in active), self.outside)
        return sum(projected) + sum(other.parameter.numel() for part in parts for other in part.values())

    def activate(self, indices: list[int], *, forget: bool = True) -> None:
        """Let the layers of ``indices`` train, and no others. Merge layers that leave first.

        Args:
            forget: free the bases of layers that leave.
        """
        for other in self.outside.values():
            other.engage() if indices else other.release()
        for index in set(self.active) - set(indices):
            self.layers[index].release(forget=forget)
            if self.quantized is not None:
                self.quantized.quantize(index)
        for index in sorted(set(indices) - set(self.active)):
            layer = self.layers[index]
            if self.quantized is not None:
                self.quantized.restore(index, layer.others)
            layer.engage()
        self.active = sorted(indices)

    def active_weights(self) -> Iterator[tuple[str, ProjectedWeight]]:
        """The projected weights that train, by name."""
        for index in self.active:
            yield from self.layers[index].weights.items()

    def lacks_basis(self, index: int) -> bool:
        """Whether a backward pass through a layer makes bases."""
        return index in self.active and any(weight.basis is None for weight in self.layers[index].weights.values())

    def _all_weights(self) -> Iterator[tuple[str, ProjectedWeight]]:
        for layer in self.layers:
            yield from layer.weights.items()

    def write_back(self) -> None:
        """Round what is trained as a copy to the model's parameters, after a step."""
        for part in (*(self.layers[index].others for index in self.active), self.outside):
            for other in part.values():
                other.write_back()

    @torch.no_grad()
    def merge(self, indices: Iterable[int] | None = None, *, keep_bases: bool = False) -> None:
        """Add the updates of active layers to their weights, and end their bases. The next backward makes new ones.

        Args:
            indices: of the layers; all active ones if omitted.
            keep_bases: go on with the bases, as if the layers had just begun with them.

        Raises:
            DivergedError: if a quantized layer's weights are not finite. None has then changed.
            OSError: if the disk of quantized layers is full or refuses. Later layers have then not changed.
        """
        for index in self.active if indices is None else sorted(indices):
            layer = self.layers[index]
            if self.quantized is not None:
                merged = self.world.call(partial(self.merged_layer, index, stochastic=True))  # all have read it
                assert merged is not None
                self.quantized.replace(index, merged)
                del merged  # or it would exist beside the next layer's
            for name, weight in layer.weights.items():
                parameter = weight.linear.weight
                if self.quantized is None:
                    weight.merge_into(parameter, self.generator(name, parameter.device))
                weight.restart() if keep_bases else weight.end_basis()
            if not keep_bases:
                layer.age = 0

    def forget_updates(self) -> None:
        """Begin anew with other weights, which are loaded next."""
        for index in self.active:
            for weight in self.layers[index].weights.values():
                weight.end_basis()
            self.layers[index].age = 0

    def merged(self, parameter: Tensor) -> Tensor:
        """The value of a parameter of the model with the updates so far, for an export. It is a copy if it has some."""
        weight = self._by_parameter.get(parameter)
        value = parameter.detach()
        if weight is not None and weight.trained.numel():
            value = value.clone()
            weight.merge_into(value)
        return value

    @torch.no_grad()
    def merged_layer(self, index: int, *, stochastic: bool = False) -> dict[str, Tensor]:
        """The full-precision weights of a quantized layer with the updates so far, by name, on the layer's device.

        Weights without updates may still be in host memory.
        """
        assert self.quantized is not None
        weights = self.quantized.read(index)
        if index not in self.active:
            return weights
        for name, weight in self.layers[index].weights.items():
            weights[name] = weights[name].to(weight.device, non_blocking=True)
            weight.merge_into(weights[name], self.generator(name, weight.device) if stochastic else None)
        return weights | {name: other.parameter.detach() for name, other in self.layers[index].others.items()}

    def nbytes(self) -> int:
        """Bytes of bases and corrections."""
        return sum(weight.nbytes for _, weight in self._all_weights())

    def state_dict(self) -> dict[str, Any]:
        """A, bases and, unless they are quantized, W₀ of the layers that train, for an exact resume between two steps.

        Weights that FSDP2 shards are gathered; the first process gets them.
        """
        base = {name: self._gathered(weight.linear.weight) for name, weight in self.active_weights()}
        return {
            "active": self.active,
            "num_steps": self.num_steps,
            "ages": [layer.age for layer in self.layers],
            "weights": {
                name: weight.state_dict()
                for name, weight in self._all_weights()
                if weight.trained.numel() or weight.nbytes
            },
            "others": {name: self._gathered(other.trained) for name, other in self._not_in_weights().items()},
            "base": base if self.quantized is None else {},
        }  # fmt: skip

    def _gathered(self, parameter: Tensor) -> Tensor:
        value = full(parameter.detach())
        if not isinstance(parameter, DTensor):
            return value
        return value.cpu() if self.world.rank == 0 else value.new_empty(0)

    def _not_in_weights(self) -> dict[str, WholeParameter]:
        """Parameters that train as they are and are not in the weights, which are loaded before the state, by name.

        These are float32 copies, also of layers that have trained before, and, with quantized weights, all of active
        layers, whose full-precision weights are older.
        """
        found = {name: other for name, other in self._others() if other.is_copied and not other.trained.is_meta}
        for index in () if self.quantized is None else self.active:
            found |= self.layers[index].others
        return found

    def _others(self) -> Iterator[tuple[str, WholeParameter]]:
        for part in (*(layer.others for layer in self.layers), self.outside):
            yield from part.items()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it after the weights. The optimizer's state comes after it."""
        self.activate([])
        for _, weight in self._all_weights():
            weight.forget()  # what it has from steps after the checkpoint
        self.activate(list(state_dict["active"]))
        self.num_steps = state_dict["num_steps"]
        for layer, age in zip(self.layers, state_dict["ages"], strict=True):
            layer.age = age
        weights = dict(self._all_weights())
        for name, base in state_dict["base"].items():
            parameter = weights[name].linear.weight
            parameter.copy_(shard_like(base.to(parameter.dtype), parameter))
        for name, state in state_dict["weights"].items():
            weights[name].load_state_dict(state)
        others = dict(self._others())
        for name, value in state_dict["others"].items():
            others[name].load(shard_like(value, others[name].parameter))
        self.write_back()
