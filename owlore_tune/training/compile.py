"""Compile the layers of a model, each kind of layer once."""

import os
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtune import training

from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.models.decoder import Decoder, find_layers
from owlore_tune.models.output import takes_hidden_states

RECOMPILE_LIMIT = 32  # graphs that all compiled layers share


def compile_parts(loss_fn: Any, model: Decoder, layers: ProjectedLayers) -> Any:
    """Compile ``model``, layer by layer, in place; returns the loss, compiled if possible.

    All layers share their graphs. There is one for each kind of layer and pass: trained or frozen, with or without a
    gradient to its input, and without any gradients in validation. A draw compiles nothing once each kind exists. A
    layer whose bases are not made yet runs as it is, because its backward makes them.
    """
    # Kinds times row lengths (one, then any) times batch sizes can exceed torch's limit of 8. Beyond the limit, layers
    # would run uncompiled without an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    backend = os.environ.get("TORCH_COMPILE_BACKEND", "inductor")  # as torchtune's parts
    for index, layer in enumerate(find_layers(model)):
        inner: nn.Module = getattr(layer, "_checkpoint_wrapped_module", layer)
        inner.forward = partial(  # type: ignore[method-assign]
            _compiled_or_not, inner.forward, torch.compile(inner.forward, backend=backend), layers, index
        )
    # A loss that takes the model's head computes gradients inside forward.
    return loss_fn if takes_hidden_states(loss_fn) else training.compile_loss(loss_fn)


def _compiled_or_not(
    plain_forward: Any, compiled: Any, layers: ProjectedLayers, index: int, *args: Any, **kwargs: Any
) -> Any:
    forward = plain_forward if layers.lacks_basis(index) else compiled
    return forward(*args, **kwargs)
