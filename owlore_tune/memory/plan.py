"""Plan the memory of a run by running training steps on tensors without data.

The model's own forward and backward run on torch's meta device: each operation returns a tensor with shape and dtype,
but no data. A GPU has larger pieces of a quantized weight in full precision at once than a tensor without data, see
`owlore_tune.quantized.formats.pieces`; the plan leaves out the difference, 0.06 GB at most in bfloat16. For experts in
NF4 it is too large, by the size of one matrix of all experts of a layer.

The layers that train are in the projected form, as in a run: one step makes their bases, and one uses them. A dispatch
mode counts live bytes and keeps the peak. The plan works for any model, loss and dtype that the step supports, and
takes seconds for 7B weights. With many small experts it takes longer, because each of their matrices is an operation.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.measure import resident_bytes
from owlore_tune.memory.step import META, PlannedStep, StepShape
from owlore_tune.models.decoder import Decoder, find_layers, find_linears, model_parts
from owlore_tune.optim.moments import carry_moments, state_bytes
from owlore_tune.optim.weights import ProjectedWeight
from owlore_tune.quantized.linear import is_quantized, quantizable_outside, weight_of

# Overhead of holes in glibc's heap, as a share of the memory in use. Between the activations that forward keeps, freed
# ones leave holes that others do not fill. Blocks that come from the system one by one would leave none, but then each
# activation causes page faults, see `owlore_tune.measure`. The share is fitted to the demo and benchmarks.
HEAP_LOSS = 0.095


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes alive at the peak of a training step, by purpose."""

    weights: int  # and buffers
    projected: int  # A of each projected weight that trains
    moments: int  # state of the optimizer
    bases: int  # of projections, and corrections of quantized weights
    gradients: int  # kept for the optimizer
    activations: int  # saved in forward for backward
    logits: int  # of the output head, with their gradients
    temporary: int  # in backward: recomputed activations, intermediate gradients
    gathered: int  # temporarily gathered sharded weights, with their gradients
    merging: int  # with quantized weights: weights in full precision at once, less the memory that a step has freed
    framework: int  # on a CPU: the process before weights load
    allocator: int  # on a CPU: heap fragmentation, `HEAP_LOSS` of everything else

    @property
    def total(self) -> int:
        return sum(vars(self).values())


CATEGORIES = tuple(field.name for field in fields(MemoryPlan))


@dataclass(frozen=True)
class Method:
    """The parameters that train, and their optimizer.

    Args:
        options: keyword arguments of `ProjectedLayers`.
        num_active: layers that train at once; None for all.
        state_per_value: bytes of the optimizer's state for each value that it trains, see `state_per_value`.
        state_per_16_bits: the same for values of 16 bits; None if they have the same state.
        holds_all_state: bases and optimizer state of inactive layers stay on the device.
    """

    options: Mapping[str, Any]
    num_active: int | None
    state_per_value: float
    state_per_16_bits: float | None = None
    holds_all_state: bool = False

    def state_of(self, parameters: Iterable[Tensor]) -> int:
        """Bytes of the optimizer's state for ``parameters``."""
        low = self.state_per_value if self.state_per_16_bits is None else self.state_per_16_bits
        return int(sum((low if p.itemsize == 2 else self.state_per_value) * p.numel() for p in parameters))


def state_per_value(
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    moments: str = "keep",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Bytes of an optimizer's state for each value that it trains, from a step of its own on a few values.

    Args:
        build: returns the optimizer over parameter groups.
        dtype: of the values.
        moments: see `owlore_tune.optim.moments.carry_moments`, which is tried too.
    """
    sample = nn.Parameter(torch.zeros(512, 128, dtype=dtype, device="cpu"))
    optimizer = build([{"params": [sample]}])
    sample.grad = torch.zeros_like(sample)
    # torchao's optimizers compile themselves, and may draw random numbers to round.
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng([]):
        optimizer.step()
    found = state_bytes(optimizer) / sample.numel()
    if dtype == torch.float32:
        carry_moments(optimizer, sample, torch.eye(128), moments, right=True)
    return found


def plan_memory(
    model: Decoder,
    loss_fn: Any,
    method: Method,
    shape: StepShape,
    *,
    device: torch.device,
    framework: int | None = None,
    sharding: Sharding | None = None,
) -> MemoryPlan:
    """Plan an OwLore run for the draw that takes the most memory: the lowest layer plus the topmost others.

    With the lowest layer active, backward runs through the whole model. The topmost layers hold their gradients
    longest. The optimizer steps when backward has freed more than a step takes.

    Args:
        model: a decoder of torchtune or transformers on the meta device, in the dtype of the run. It is not modified.
        framework: bytes; None for the current `framework_bytes`.
        sharding: plan for one of several devices that share the weights.
    """
    num_layers = len(find_layers(model))
    active = [0, *range(num_layers - (method.num_active or num_layers) + 1, num_layers)]
    quantized = _quantized(model, method, active) if shape.weights != "full" else set()
    step = PlannedStep(model, loss_fn, shape, device, quantized, sharded=sharding is not None)
    with step.running():
        with META:
            layers = ProjectedLayers(step.model, **method.options)
        step.tracker.label = "projected"
        layers.activate(active)
        trained = list(layers.trained().values())
        step.keep_gradients_of(trained)
        step.run(is_first=True)  # in which backward makes the bases
        step.tracker.label = "bases"
        for _, weight in layers.active_weights():
            weight.is_given = weight.turn = None
            if is_quantized(weight.linear) and weight_of(weight.linear).rounding_matters:
                weight.correction = torch.empty(weight.size, dtype=weight.linear.weight.dtype, device=META)
        step.run()
    whole = [other for layer in layers.layers for other in layer.others.values() if other.trained.requires_grad]
    outside = list(layers.outside.values())
    shared = Shared(
        weights=step.weight_bytes,
        moments=method.state_of(other.trained for other in (*whole, *outside)),
        gradients=sum(other.trained.nbytes for other in whole),
        sent=sum(4 * other.trained.numel() for other in whole),
    )
    idle = [layer for index, layer in enumerate(layers.layers) if index not in active and method.holds_all_state]
    of_idle = [torch.empty(weight.size, device=META) for layer in idle for weight in layer.weights.values()]
    of_idle += [other.trained for layer in idle for other in layer.others.values()]
    bases = layers.nbytes() + sum(_basis_bytes(weight) for layer in idle for weight in layer.weights.values())
    parts = step.bytes_at_peak(bases=bases)
    if shape.weights != "full":
        freed = sum(parts[label] for label in ("gradients", "activations", "logits", "temporary"))
        restored = max(sum(p.nbytes for p in layer.values()) for layer in model_parts(model).layers)
        if shape.validates and device.type == "cpu":  # on a GPU, it takes what is free
            restored += sum(module.weight.nbytes for module in quantizable_outside(model) if module in quantized)
        parts["merging"] = max(0, restored - freed)
    return complete(model, device, framework, sharding, shared, moments=method.state_of([*trained, *of_idle]), **parts)


def _basis_bytes(weight: ProjectedWeight) -> int:
    return weight.shape[1 if weight.right else 0] * weight.rank * weight.linear.weight.itemsize


def framework_bytes(device: torch.device) -> int:
    """Bytes in use before weights load: on a CPU the current process, because the whole process is measured; else 0."""
    return resident_bytes() if device.type == "cpu" else 0


def _quantized(model: Any, method: Method, active: list[int]) -> set[nn.Module]:
    """The modules whose weights are quantized: all that do not train as they are."""
    rank = method.options.get("rank")
    found: set[nn.Module] = set()
    for index, layer in enumerate(find_layers(model)):
        for _, linear in find_linears(layer):
            if index not in active or (rank is not None and rank < min(linear.in_features, linear.out_features)):
                found.add(linear)
    embeddings, output = (method.options.get(f"train_{part}") for part in ("embeddings", "output"))
    for module in quantizable_outside(model):
        if not (embeddings if isinstance(module, nn.Embedding) else output):
            found.add(module)
    return found


@dataclass(frozen=True)
class Shared:
    """Bytes that FSDP2 divides among devices: parameters of the model, and what belongs to those that train."""

    weights: int
    moments: int  # of those that train
    gradients: int  # in the layers; those outside are whole until backward ends
    sent: int  # the same gradients as they are sent, which this package does in float32


def _sharded(parts: dict[str, int], model: Decoder, sharding: Sharding, shared: Shared) -> dict[str, int]:
    """``parts`` on one of several devices: the shards, plus what FSDP2 gathers temporarily.

    FSDP2 gathers everything outside the layers from forward to backward. It gathers one layer and the prefetched next
    one, or all layers without resharding. In backward, a layer's gradients exist twice: as computed and as sent. What
    trains in the projected form is on every device.
    """
    layers = [sum(parameter.nbytes for parameter in layer.values()) for layer in model_parts(model).layers]
    divided = {"weights": shared.weights, "moments": shared.moments, "gradients": shared.gradients}
    own = {}
    for key, whole in divided.items():
        kept = 0 if sharding.cpu_offload else -(-whole // sharding.world_size)
        own[key] = max(0, parts[key] - whole) + kept
    gathered_layers = 2 * max(layers) if sharding.reshard_after_forward else sum(layers)
    of_layer = -(-(shared.gradients + shared.sent) // len(layers))
    return {"merging": 0} | parts | own | {"gathered": shared.weights - sum(layers) + gathered_layers + of_layer}


def complete(
    model: Decoder,
    device: torch.device,
    framework: int | None,
    sharding: Sharding | None,
    shared: Shared,
    **parts: int,
) -> MemoryPlan:
    """The plan from ``parts``, with the effects of sharding and the device's overhead."""
    parts = {"merging": 0, "gathered": 0} | parts if sharding is None else _sharded(parts, model, sharding, shared)
    framework = framework_bytes(device) if framework is None else framework
    loss = HEAP_LOSS if device.type == "cpu" else 0.0
    return MemoryPlan(**parts, framework=framework, allocator=int(loss * (framework + sum(parts.values()))))
