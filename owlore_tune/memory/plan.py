"""Plan the memory of a run by running one training step on tensors without data.

The model's own forward and backward run under torch's ``FakeTensorMode``: each operation returns a tensor with shape,
dtype and device, but no data. A dispatch mode counts live bytes and keeps the peak. The plan works for any model, loss
and dtype that the step supports, and takes seconds for 7B weights. With many small experts it takes longer, because
each of their matrices is an operation.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchtune import training
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import LoRALinear

from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.frozen.formats import empty
from owlore_tune.frozen.linear import attach, quantizable_outside
from owlore_tune.memory.measure import resident_bytes
from owlore_tune.models.decoder import Decoder, find_layers, find_linears, init_rope, model_parts
from owlore_tune.models.hf_experts import Experts
from owlore_tune.optim import low_bits
from owlore_tune.optim.adamw import OwLoreAdamW, parameter_groups
from owlore_tune.optim.projection import OVERSAMPLING, project, times

# Replaces a full gradient in backward with a smaller one; returns None to keep it.
Reduce = Callable[[Tensor, Tensor], Tensor | None]  # (the model's parameter, its gradient without data)


# Empirical overhead of glibc fragmentation, as a share of the memory in use.
# Measured memory over a plan without it: 1.05 to 1.10 on SmolLM2, 1.04 to 1.05 on 7B weights.
HEAP_LOSS = 0.05


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes alive at the peak of a training step, by purpose."""

    weights: int  # and buffers
    moments: int  # of AdamW
    bases: int  # of projections
    gradients: int  # kept for the optimizer: low-rank, or full for weights that are not projected
    activations: int  # saved in forward for backward
    logits: int  # of the output head, with their gradients
    temporary: int  # in backward: recomputed activations, intermediate gradients
    gathered: int  # temporarily gathered sharded weights, with their gradients
    framework: int  # on a CPU: the process before weights load
    allocator: int  # on a CPU: heap fragmentation, `HEAP_LOSS` of everything else

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def on_gpu(self) -> "MemoryPlan":
        """The same step on a GPU, which counts only torch's allocations."""
        return replace(self, framework=0, allocator=0)


CATEGORIES = tuple(field.name for field in fields(MemoryPlan))


@dataclass(frozen=True)
class StepShape:
    """Settings of a training step that affect its memory."""

    batch_size: int
    seq_len: int  # tokens of the longest row
    packed: bool = False  # rows come with masks and positions
    accumulates: bool = False  # several micro-batches per step: gradients exist when the next forward begins
    checkpointing: bool = False  # activation checkpointing
    compiled: bool = False  # layers are compiled: one returns all gradients of its weights at once
    frozen_weights: str = "full"  # format of layers that do not train, see `owlore_tune.frozen.formats`
    frozen_products: str = "full"


def plan_memory(
    model: Decoder,
    loss_fn: Any,
    optimizer: OwLoreAdamW,
    shape: StepShape,
    *,
    device: torch.device,
    num_active: int | None,
    holds_all_state: bool = False,
    projects_in_backward: bool = True,
    framework: int | None = None,
    sharding: Sharding | None = None,
) -> MemoryPlan:
    """Plan an OwLore run for the draw that takes the most memory: the lowest layer plus the topmost others.

    With the lowest layer active, backward runs through the whole model. The topmost layers hold their gradients
    longest. The optimizer step works in small pieces, which take less memory than backward has freed.

    Args:
        model: a decoder of torchtune or transformers on the meta device, in the dtype of the run.
        optimizer: over the model's parameters; those outside the layers always train.
        num_active: layers that train at once; None for all.
        holds_all_state: optimizer state of inactive layers stays on ``device``.
        projects_in_backward: gradients are reduced during backward, not after it.
        framework: bytes; None for the current `framework_bytes`.
        sharding: plan for one of several devices.
    """
    layers = [set(layer.values()) for layer in model_parts(model).layers]
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    highest = len(layers) - (num_active or len(layers)) + 1
    trained = held.difference(*layers).union(layers[0], *layers[highest:])
    on_host = sharding is not None and sharding.cpu_offload
    kept = [p for p in (held if holds_all_state else trained) if optimizer.is_projected(p) or not on_host]
    states = [optimizer.meta_state(parameter) for parameter in kept]

    def reduce(parameter: Tensor, grad: Tensor) -> Tensor | None:
        if not projects_in_backward or not optimizer.is_projected(parameter):
            return None
        right, rank = optimizer.is_right(parameter), optimizer.group_of(parameter)["rank"]
        # The memory of a refresh. `range_finder` itself reads values, but fake tensors have none.
        rows = grad if right else grad.T
        dtype = torch.promote_types(grad.dtype, torch.float32)
        sketch = rows.new_empty(rows.shape[1], rank + OVERSAMPLING, dtype=dtype)
        basis = torch.linalg.qr(times(rows.T, times(rows, sketch))).Q[:, :rank].contiguous()
        return project(grad, basis, right)

    return _plan(
        model,
        device,
        framework,
        sharding,
        trained,
        moments=sum(low_bits.num_bytes(state[key]) for state in states for key in ("exp_avg", "exp_avg_sq")),
        bases=sum(low_bits.num_bytes(state["basis"]) for state in states if "basis" in state),
        **step_bytes(model, loss_fn, shape, device, trained, reduce),
    )


def peer_plans(
    model: Decoder,
    loss_fn: Any,
    shape: StepShape,
    *,
    device: torch.device,
    rank: int,
    framework: int,
    train_outside: Mapping[str, bool],
    lora_rank: int = 16,
    sharding: Sharding | None = None,
) -> Iterator[tuple[str, MemoryPlan]]:
    """Plans of other methods on the same model, loss and data, by name.

    Full fine-tuning and LoRA (on every Linear of the layers) are as in torchtune's recipes: AdamW state in the
    weights' dtype, and the chunked loss. GaLore (arXiv 2403.03507) projects all layers at once. LISA (arXiv 2403.17919)
    trains two layers at full rank. Both have float32 moments.

    Args:
        train_outside: ``train_embeddings``, ``train_output`` and ``train_norm`` of `parameter_groups`, for GaLore and
            LISA. Full fine-tuning trains all weights.
    """
    theirs = copy.deepcopy(model)
    vars(theirs).pop("unembed", None)  # undo `set_model_output`
    their_loss = CEWithChunkedOutputLoss()
    theirs.set_num_output_chunks(their_loss.num_output_chunks)
    yield "full", _adamw_plan(theirs, their_loss, shape, device, framework, sharding, set(theirs.parameters()))
    adapters = _add_lora(theirs, lora_rank)
    yield f"LoRA, r={lora_rank}", _adamw_plan(theirs, their_loss, shape, device, framework, sharding, adapters)
    sides = [min(p.shape) for layer in model_parts(model).layers for p in layer.values() if p.ndim == 2]
    rank = min(rank, max(sides) - 1)
    galore = OwLoreAdamW(parameter_groups(model, **train_outside), rank=rank, side="shape")
    lisa = OwLoreAdamW(parameter_groups(model, **train_outside), rank=None)
    for name, optimizer, num_active in ((f"GaLore, r={rank}", galore, None), ("LISA, γ=2", lisa, 2)):
        yield name, plan_memory(
            model, loss_fn, optimizer, shape, device=device, num_active=num_active, framework=framework,
            sharding=sharding,
        )  # fmt: skip


def framework_bytes(device: torch.device) -> int:
    """Bytes in use before weights load: on a CPU the current process, because the whole process is measured; else 0."""
    return resident_bytes() if device.type == "cpu" else 0


def step_bytes(
    model: Decoder,
    loss_fn: Any,
    shape: StepShape,
    device: torch.device,
    trained: Iterable[Tensor],
    reduce: Reduce = lambda parameter, grad: None,
) -> dict[str, int]:
    """Bytes by label at the peak of a forward and backward, without optimizer state.

    Args:
        model: on the meta device; it is not modified.
        trained: the parameters that get gradients.
        reduce: called on each gradient in backward, see `Reduce`.
    """
    trained = set(trained)
    fake = copy.deepcopy(model)
    with torch.device("cpu"):
        init_rope(fake)  # it reads its own values, so it cannot run without data
    for module in fake.modules():
        if isinstance(module, Experts):
            module.even_routing = True
    tracker = _Tracker()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        originals = _materialize(fake, model, device, shape, trained)
        if shape.checkpointing:
            training.set_activation_checkpointing(fake, auto_wrap_policy={type(layer) for layer in find_layers(fake)})
        gradients: dict[Tensor, Tensor] = {}
        together = _trained_by_layer(fake, originals, trained) if shape.compiled else {}

        def hook(parameter: Tensor) -> None:
            layer = together.get(parameter, [parameter])
            if all(other.grad is not None for other in layer):
                for other in layer:
                    keep(other)

        def keep(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            reduced = reduce(originals[parameter], grad)
            if reduced is None:
                tracker.relabel(grad, "gradients")
                return
            parameter.grad = None
            kept = gradients.setdefault(parameter, reduced)
            if kept is not reduced:
                kept.add_(reduced)
            tracker.relabel(kept, "gradients")

        for parameter, original in originals.items():
            parameter.requires_grad_(original in trained)
            if original in trained:
                parameter.register_post_accumulate_grad_hook(hook)
                if shape.accumulates:  # from the first micro-batch
                    parameter.grad = torch.empty_like(parameter)
                    keep(parameter)
        _forward_backward(fake, copy.copy(loss_fn), shape, device, tracker)
    return {label: tracker.largest[label] for label in _LABELS}


def _forward_backward(
    model: Decoder, loss_fn: Any, shape: StepShape, device: torch.device, tracker: "_Tracker"
) -> None:
    size = (shape.batch_size, shape.seq_len)
    tracker.label = "activations"
    tokens = torch.zeros(size, dtype=torch.long, device=device)
    extra: dict[str, Tensor] = {}
    if shape.packed:
        extra["mask"] = torch.ones(*size, shape.seq_len, dtype=torch.bool, device=device)
        extra["input_pos"] = torch.zeros_like(tokens)
    if hasattr(loss_fn, "set_model_output"):
        loss_fn.set_model_output(model)
        hidden = model(tokens, **extra)
        tracker.label = "logits"
        loss = loss_fn.of_rows(hidden.flatten(0, 1), tokens.flatten())
        del hidden
    else:
        outputs = model(tokens, **extra)  # logits made here count as activations
        tracker.label = "logits"
        chunked = isinstance(outputs, list)
        loss = loss_fn(outputs, tokens) if chunked else loss_fn(outputs.flatten(0, 1), tokens.flatten())
        del outputs
    tracker.label = "temporary"
    loss.backward()


def _materialize(
    fake: nn.Module, model: nn.Module, device: torch.device, shape: StepShape, trained: set[Tensor]
) -> dict[Tensor, Tensor]:
    """Give ``fake`` parameters and buffers on ``device``, without data; returns them with those of ``model``."""
    originals: dict[Tensor, Tensor] = {}
    quantized = _quantized(model, trained) if shape.frozen_weights != "full" else set()
    pairs: Any = zip(fake.modules(), model.modules(), strict=True)
    for module, source in pairs:
        is_quantized = source in quantized
        for name, parameter in source._parameters.items():
            if parameter is not None:
                size = (0,) if is_quantized and name == "weight" else parameter.shape
                made = nn.Parameter(torch.empty(size, dtype=parameter.dtype, device=device))
                module._parameters[name] = made
                originals[made] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if is_quantized:
            in_layer = isinstance(source, nn.Linear) and source is not model.output
            kind, products = (shape.frozen_weights, shape.frozen_products) if in_layer else ("int8", "full")
            attach(module, empty(source.weight.shape, kind, device), products, source.weight.dtype)
    return originals


def _quantized(model: Any, trained: set[Tensor]) -> set[nn.Module]:
    """The modules whose weights `owlore_tune.frozen.layers.FrozenLayers` quantizes."""
    found: set[nn.Module] = set()
    for layer in find_layers(model):
        if not trained.intersection(layer.parameters()):
            found.update(linear for _, linear in find_linears(layer))
    found.update(module for module in quantizable_outside(model) if module.weight not in trained)
    return found


def _trained_by_layer(
    fake: Any, originals: dict[Tensor, Tensor], trained: set[Tensor]
) -> dict[Tensor, list[nn.Parameter]]:
    """For each parameter of a layer that trains, all of them."""
    layers = ([p for p in layer.parameters() if originals[p] in trained] for layer in find_layers(fake))
    return {parameter: layer for layer in layers for parameter in layer}


def _adamw_plan(
    model: Decoder,
    loss_fn: Any,
    shape: StepShape,
    device: torch.device,
    framework: int,
    sharding: Sharding | None,
    trained: set[Tensor],
) -> MemoryPlan:
    on_host = sharding is not None and sharding.cpu_offload
    moments = 0 if on_host else 2 * sum(parameter.nbytes for parameter in trained)
    step = step_bytes(model, loss_fn, shape, device, trained)
    return _plan(model, device, framework, sharding, trained, moments=moments, bases=0, **step)


def _sharded(parts: dict[str, int], model: Decoder, sharding: Sharding, trained: set[Tensor]) -> dict[str, int]:
    """``parts`` on one of several devices: the shards, plus what FSDP2 gathers temporarily.

    FSDP2 gathers everything outside the layers from forward to backward. It gathers one layer and the prefetched next
    one, or all layers without resharding. In backward, a layer's gradients exist twice: as computed and as sent.
    Gradients outside the layers are unsharded until backward ends. Bases are never sharded.
    """
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    layers = [sum(parameter.nbytes for parameter in layer.values()) for layer in model_parts(model).layers]
    buffers = parts["weights"] - num_bytes
    outside = trained.difference(*(layer.values() for layer in model_parts(model).layers))
    whole_gradients = min(parts["gradients"], sum(parameter.nbytes for parameter in outside))
    divided = {"weights": num_bytes, "moments": parts["moments"], "gradients": parts["gradients"] - whole_gradients}
    own = {key: -(-value // sharding.world_size) for key, value in divided.items()} | {"bases": parts["bases"]}
    if sharding.cpu_offload:
        own["weights"] = 0
        if not parts["bases"]:  # else gradients are low-rank, and stay on the device with their state
            own["gradients"] = 0
    own["weights"] += buffers
    own["gradients"] += whole_gradients
    gathered_layers = 2 * max(layers) if sharding.reshard_after_forward else sum(layers)
    return parts | own | {"gathered": num_bytes - sum(layers) + gathered_layers + 2 * max(layers)}


def _plan(
    model: Decoder,
    device: torch.device,
    framework: int | None,
    sharding: Sharding | None,
    trained: set[Tensor],
    **parts: int,
) -> MemoryPlan:
    """The plan from ``parts``, with the effects of sharding and the device's overhead."""
    parts = {"gathered": 0} | parts if sharding is None else _sharded(parts, model, sharding, trained)
    framework = framework_bytes(device) if framework is None else framework
    loss = HEAP_LOSS if device.type == "cpu" else 0.0
    return MemoryPlan(**parts, framework=framework, allocator=int(loss * (framework + sum(parts.values()))))


def _add_lora(model: nn.Module, rank: int) -> set[Tensor]:
    """Add a LoRA adapter on the meta device to each Linear of the layers. Returns the adapters' parameters."""
    adapters = set()
    for layer in find_layers(model):
        for path, linear in find_linears(layer):
            parent, _, name = path.rpartition(".")
            with training.set_default_dtype(linear.weight.dtype), torch.device("meta"):
                adapter = LoRALinear(
                    linear.in_features, linear.out_features, rank, alpha=16, use_bias=linear.bias is not None
                )
            setattr(layer.get_submodule(parent), name, adapter)
            adapters |= {adapter.lora_a.weight, adapter.lora_b.weight}
    return adapters


_LABELS = ("weights", "gradients", "activations", "logits", "temporary")


class _Tracker(TorchDispatchMode):
    """Counts bytes of live tensors by the label at their creation. ``largest`` has the counts at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "weights"
        self.largest: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._labels: dict[int, str] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # the most frequent call
        outputs = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, outputs)
        return outputs

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._labels:
            return
        self._labels[storage._cdata] = self.label
        self._now[self.label] += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        if self._now.total() > self.largest.total():
            self.largest = self._now.copy()

    def _remove(self, key: int, nbytes: int) -> None:
        self._now[self._labels.pop(key)] -= nbytes

    def relabel(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        self._now[self._labels[storage._cdata]] -= storage.nbytes()
        self._now[label] += storage.nbytes()
        self._labels[storage._cdata] = label
