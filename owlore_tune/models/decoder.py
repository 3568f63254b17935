"""The parts of a decoder of torchtune or transformers: layers, embeddings, output head and final norm."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import TransformerDecoder

from owlore_tune.models.hf import HFDecoder, part_names

_WRAPPER = "_checkpoint_wrapped_module."
Decoder: TypeAlias = TransformerDecoder | HFDecoder


@dataclass(frozen=True)
class ModelParts:
    """The parameters of a decoder by part, name → parameter. Every parameter is in exactly one part.

    ``output`` is empty if the head is tied to the embeddings.
    """

    layers: list[dict[str, nn.Parameter]]
    embeddings: dict[str, nn.Parameter]
    output: dict[str, nn.Parameter]
    norm: dict[str, nn.Parameter]


class _Modules(NamedTuple):
    layers: nn.ModuleList
    embeddings: nn.Module
    output: Any  # not a module in torchtune if it is tied
    norm: nn.Module


def _find_modules(model: Any) -> _Modules:
    """
    Raises:
        TypeError: if ``model`` is not a decoder, or its parts cannot be identified.
    """
    if isinstance(model, Decoder):
        return _Modules(model.layers, model.tok_embeddings, model.output, model.norm)
    if hasattr(model, "get_output_embeddings"):
        try:
            names = part_names(model)
        except ValueError as error:
            raise TypeError(str(error)) from error
        base = getattr(model, model.base_model_prefix)
        layers, embeddings, norm = (getattr(base, names[part]) for part in ("layers", "tok_embeddings", "norm"))
        return _Modules(layers, embeddings, model.get_output_embeddings(), norm)
    raise TypeError(
        f"OwLore samples the layers of a decoder of torchtune or transformers; got {type(model).__name__}. "
        "Set model._component_ to a decoder builder, such as torchtune.models.llama2.llama2_7b."
    )


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer layers of ``model``, bottom first.

    Raises:
        TypeError: if ``model`` is not a decoder of torchtune or transformers.
    """
    return _find_modules(model).layers


def find_linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The Linears of one layer with their names inside it. Subclasses that compute something else do not count."""
    return [
        (plain_name(name), module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    ]


def hidden_states(model: Decoder, tokens: Tensor, **kwargs: Tensor | None) -> Tensor:
    """The model's forward without its output head: normalized hidden states (b, s, d) for ``tokens`` (b, s).

    Args:
        kwargs: ``mask`` and ``input_pos``, as the model's forward takes them.
    """
    if isinstance(model, HFDecoder):
        return model.hidden_states(tokens, **kwargs)
    hidden, arguments = layer_inputs(model, tokens, **kwargs)
    for layer, kwargs in zip(model.layers, arguments, strict=True):
        hidden = layer(hidden, **kwargs)
    return model.norm(hidden)


def layer_inputs(model: Decoder, tokens: Tensor, **kwargs: Tensor | None) -> tuple[Tensor, list[dict[str, Any]]]:
    """The input (b, s, d) of the first layer for ``tokens`` (b, s), and the keyword arguments of every layer.

    Args:
        kwargs: ``mask`` and ``input_pos``, as the model's forward takes them.
    """
    if isinstance(model, HFDecoder):
        return model.layer_inputs(tokens, **kwargs)
    return model.tok_embeddings(tokens), [kwargs] * len(model.layers)


def cached_values(model: Decoder) -> int:
    """Numbers per token in a key-value cache of all layers."""
    if isinstance(model, HFDecoder):
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * heads * width * len(model.layers)
    attention: list[Any] = [layer.attn for layer in model.layers]
    # torchtune's attention of Gemma 2 caches keys and values of every head.
    heads = [a.num_heads if isinstance(a, Gemma2Attention) else a.num_kv_heads for a in attention]
    return sum(2 * num * attn.head_dim for num, attn in zip(heads, attention, strict=True))


def init_rope(model: nn.Module) -> None:
    """Initialize rotary embeddings on torch's default device. Checkpoints do not contain them."""
    for module in model.modules():
        if callable(init := getattr(module, "rope_init", None)):
            init()


def plain_name(name: str) -> str:
    """A parameter's name without the prefix of activation checkpointing."""
    return name.replace(_WRAPPER, "")


def model_parts(model: nn.Module) -> ModelParts:
    """Sort the parameters of ``model`` into its parts.

    Raises:
        TypeError: if ``model`` is not a decoder of torchtune or transformers.
        ValueError: if a parameter belongs to no part.
    """
    modules = _find_modules(model)
    parts = ModelParts([{} for _ in modules.layers], {}, {}, {})
    part_of = {parameter: parts.output for parameter in getattr(modules.output, "parameters", tuple)()}
    for module, part in ((modules.embeddings, parts.embeddings), (modules.norm, parts.norm)):
        part_of |= dict.fromkeys(module.parameters(), part)  # also of a head that is tied to the embeddings
    for layer, part in zip(modules.layers, parts.layers, strict=True):
        part_of |= dict.fromkeys(layer.parameters(), part)
    for name, parameter in model.named_parameters():
        if parameter not in part_of:
            raise ValueError(f"parameter {plain_name(name)} is in no layer, embedding, output head or final norm")
        part_of[parameter][plain_name(name)] = parameter
    return parts
