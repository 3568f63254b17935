"""The parameters of a torchtune model by part: layers, embeddings, output head and final norm."""

from dataclasses import dataclass

from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

_WRAPPER = "_checkpoint_wrapped_module."


@dataclass(frozen=True)
class ModelParts:
    """The parameters of a decoder by part, name → parameter. Every parameter is in exactly one part.

    ``output`` is empty if the head is tied to the embeddings.
    """

    layers: list[dict[str, nn.Parameter]]
    embeddings: dict[str, nn.Parameter]
    output: dict[str, nn.Parameter]
    norm: dict[str, nn.Parameter]


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer layers of ``model``, bottom first.

    Raises:
        TypeError: if ``model`` is not a torchtune ``TransformerDecoder``.
    """
    if not isinstance(model, TransformerDecoder):
        raise TypeError(
            f"OwLore samples the layers of a torchtune TransformerDecoder; got {type(model).__name__}. "
            "Set model._component_ to a decoder builder, such as torchtune.models.llama2.llama2_7b."
        )
    return model.layers


def find_linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The Linears of one layer with their names inside it."""
    return [(plain_name(name), m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]


def hidden_states(model: TransformerDecoder, tokens: Tensor, **kwargs: Tensor | None) -> Tensor:
    """The model's forward without its output head: normalized hidden states (b, s, d) for ``tokens`` (b, s).

    Args:
        kwargs: ``mask`` and ``input_pos``, as the model's forward takes them.
    """
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers:
        hidden = layer(hidden, **kwargs)
    return model.norm(hidden)


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
        TypeError: if ``model`` is not a torchtune ``TransformerDecoder``.
        ValueError: if a parameter belongs to no part.
    """
    num_layers = len(find_layers(model))
    parts = ModelParts([{} for _ in range(num_layers)], {}, {}, {})
    by_prefix = {"tok_embeddings": parts.embeddings, "output": parts.output, "norm": parts.norm}
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        prefix, _, rest = name.partition(".")
        if prefix == "layers":
            parts.layers[int(rest.partition(".")[0])][name] = parameter
        elif prefix in by_prefix:
            by_prefix[prefix][name] = parameter
        else:
            raise ValueError(f"parameter {name} is in no layer, embedding, output head or final norm")
    return parts
