"""Memory plans of other methods, to compare a run with."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import LoRALinear

from owlore_tune.distributed.fsdp import Sharding
from owlore_tune.memory.plan import MemoryPlan, Method, Shared, complete, plan_memory
from owlore_tune.memory.step import PlannedStep, StepShape
from owlore_tune.models.decoder import Decoder, find_layers, find_linears, model_parts
from owlore_tune.models.output import set_output


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
        train_outside: ``train_embeddings``, ``train_output`` and ``train_norm`` of `ProjectedLayers`, for GaLore and
            LISA. Full fine-tuning trains all weights.
    """
    theirs = copy.deepcopy(model)
    their_loss = CEWithChunkedOutputLoss()
    set_output(theirs, their_loss)
    yield "full", _adamw_plan(theirs, their_loss, shape, device, framework, sharding, set(theirs.parameters()))
    adapters = _add_lora(theirs, lora_rank)
    yield f"LoRA, r={lora_rank}", _adamw_plan(theirs, their_loss, shape, device, framework, sharding, adapters)
    sides = [min(p.shape) for layer in model_parts(model).layers for p in layer.values() if p.ndim == 2]
    rank = min(rank, max(sides) - 1)
    moments = 2.0 * torch.float32.itemsize
    galore = Method({**train_outside, "rank": rank, "side": "shape"}, None, moments)
    lisa = Method({**train_outside, "rank": None}, 2, moments)
    for name, method in ((f"GaLore, r={rank}", galore), ("LISA, γ=2", lisa)):
        yield name, plan_memory(model, loss_fn, method, shape, device=device, framework=framework, sharding=sharding)


def _adamw_plan(
    model: Decoder,
    loss_fn: Any,
    shape: StepShape,
    device: torch.device,
    framework: int,
    sharding: Sharding | None,
    trained: set[Tensor],
) -> MemoryPlan:
    """A plan of AdamW on ``trained`` parameters of ``model``, with state in their dtype."""
    step = PlannedStep(model, loss_fn, shape, device, set(), fuses=False)
    wanted = [index for index, parameter in enumerate(model.parameters()) if parameter in trained]
    with step.running():
        parameters = list(step.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        some = [parameters[index].requires_grad_() for index in wanted]
        step.keep_gradients_of(some)
        step.run()
    num_bytes = sum(parameter.nbytes for parameter in trained)
    in_layers = {parameter for layer in model_parts(model).layers for parameter in layer.values()}
    gradients = sum(parameter.nbytes for parameter in trained & in_layers)
    shared = Shared(step.weight_bytes, moments=2 * num_bytes, gradients=gradients, sent=gradients)
    return complete(model, device, framework, sharding, shared, moments=2 * num_bytes, **step.bytes_at_peak())


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
