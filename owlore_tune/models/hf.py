"""Decoders of transformers, with the attributes of torchtune's ``TransformerDecoder``.

The model's own code computes the hidden states. Masks and positions are torchtune's."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from owlore_tune.files import read_object, user_path
from owlore_tune.models.attention import CURRENT, register_attention
from owlore_tune.models.experts import split_experts
from owlore_tune.models.twin import check_decoder, make_config, respect_rope


class Logits:
    """The changes that a causal model makes to the output of its head, such as a scale or a cap.

    They are made by the model's own forward, in a copy of it whose base and head return their input.
    """

    def __init__(self, causal: Any, head_name: str) -> None:
        self._causal = causal.__class__.__new__(causal.__class__)
        nn.Module.__init__(self._causal)
        vars(self._causal).update({k: v for k, v in vars(causal).items() if k not in ("_modules", "_parameters")})
        self._causal._modules = {causal.base_model_prefix: _PassThrough(), head_name: nn.Identity()}
        self._causal._parameters = {}

    def __call__(self, logits: Tensor) -> Tensor:
        rows = logits.reshape(1, -1, logits.shape[-1])
        return self._causal(inputs_embeds=rows, use_cache=False).logits.view_as(logits)

    def are_changed(self) -> bool:
        with torch.device("cpu"):
            sample = torch.linspace(-100, 100, 8).view(1, 8)
        return not torch.equal(self(sample), sample)


class _PassThrough(nn.Module):
    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class TiedHead(TiedLinear):
    """An output head that shares the weight of the embeddings."""

    def __init__(self, tied_module: nn.Module, logits: Logits) -> None:
        super().__init__(tied_module)
        self._logits = logits if logits.are_changed() else None

    def __call__(self, x: Tensor) -> Tensor:
        product = super().__call__(x)
        return product if self._logits is None else self._logits(product)


class Recorder(nn.Module):
    """Stands for a layer: returns its input, and records its other arguments."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


Rename = Callable[[str], str]
# Fields that a config of transformers does not declare. It takes all but the last for a model without rope_parameters
# and layer_types; some models read the last if it is there.
_OTHER_FIELDS = {
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "head_dim",
    "partial_rotary_factor",
}
# Fields with a default that change what a model computes, and not the shapes of its weights.
_BEHAVIOUR = (
    "rope_parameters", "layer_types", "no_rope_layers", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias",
    "rms_norm_eps", "sliding_window", "num_experts_per_tok", "norm_topk_prob", "topk_method", "n_group", "topk_group",
    "scoring_func", "routed_scaling_factor", "router_jitter_noise", "input_jitter_noise", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout",
)  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class HFDecoder(nn.Module):
    """A causal language model of transformers, as a torchtune decoder.

    Args:
        causal: the model, for example from ``AutoModelForCausalLM.from_config``.

    Attributes:
        layers: the transformer layers, bottom first.
        tok_embeddings: token ids (b, s) → (b, s, d).
        norm: the final norm, (b, s, d) → (b, s, d).
        output: the output head, (…, d) → logits (…, v). Caps and scales of logits are part of it.
        config: the model's config in transformers.
        fields: names of the fields of ``config`` that were given.
        max_seq_len: most tokens of a row.
        cache: keys and values of earlier tokens; None computes all tokens anew.

    Raises:
        ValueError: if a part cannot be identified, or if it works in a way that this class does not support.
    """

    def __init__(self, causal: Any) -> None:
        super().__init__()
        names = part_names(causal)
        base = getattr(causal, causal.base_model_prefix)
        self.config = causal.config
        self.fields: tuple[str, ...] = ()
        self.max_seq_len = int(self.config.max_position_embeddings)
        self.cache: Any = None
        self.num_output_chunks = 0
        self.layers = getattr(base, names["layers"])
        self.tok_embeddings = getattr(base, names["tok_embeddings"])
        self.norm = getattr(base, names["norm"])
        for name, child in base.named_children():
            if name not in names.values():  # rotary embeddings and the like, without parameters
                self.add_module(name, child)
        logits = Logits(causal, names["output"])
        if self.config.tie_word_embeddings:
            if causal.get_output_embeddings().bias is not None:
                raise ValueError(f"{type(causal).__name__} has a bias in a head that is tied to the embeddings")
            self.output: Any = TiedHead(self.tok_embeddings, logits)
        else:
            self.output = causal.get_output_embeddings()
            if logits.are_changed():
                self.output.register_forward_hook(lambda head, args, out: logits(out))
        setattr(base, names["norm"], nn.Identity())
        self._base = [base]  # in a list, to not register its modules twice
        self._layers_name = names["layers"]

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Any:
        """Logits (b, s, v) for ``tokens`` (b, s), or what ``unembed`` makes of the last hidden states.

        Args:
            mask: (b, s, t), bool, True where a token attends. None for causal attention.
            input_pos: (b, s), positions. None counts from 0.
        """
        return self.unembed(self._decode(tokens, mask, input_pos))

    def train(self, mode: bool = True) -> "HFDecoder":
        self._base[0].training = mode  # it may have dropout of its own; the modules below are this module's
        return super().train(mode)

    def unembed(self, hidden: Tensor) -> Any:
        hidden = self.norm(hidden)
        if self.num_output_chunks > 0:
            return [self.output(chunk) for chunk in hidden.tensor_split(self.num_output_chunks, dim=1)]
        return self.output(hidden).float()

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Return logits in chunks of positions, as torchtune's decoder does for its chunked losses."""
        self.num_output_chunks = num_output_chunks

    def hidden_states(self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        return self.norm(self._decode(tokens, mask, input_pos))

    def layer_inputs(
        self, tokens: Tensor, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The input (b, s, d) of the first layer, and the keyword arguments of every layer."""
        (base,) = self._base
        recorders = nn.ModuleList(Recorder(layer) for layer in self.layers)
        base._modules[self._layers_name] = recorders
        try:
            hidden = self._decode(tokens, mask, input_pos)
        finally:
            base._modules[self._layers_name] = self.layers
        return hidden, [recorder.arguments for recorder in recorders]  # type: ignore[misc]

    def attend_by_sample(self) -> None:
        """Compute the attention of each sample of a packed row on its own; see `owlore_tune.models.attention`."""
        self.config._attn_implementation = "owlore_by_sample"

    def rope_init(self) -> None:
        """Initialize buffers on torch's default device. Checkpoints do not contain them."""
        (base,) = self._base
        for parameter in self.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then leaves it alone
        for module in self.modules():
            buffers = dict(module.named_buffers(recurse=False))
            for name, buffer in buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device=torch.get_default_device())
            if buffers:
                base._init_weights(module)

    def caches_are_setup(self) -> bool:
        return self.cache is not None

    def _decode(self, tokens: Tensor, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        (base,) = self._base
        seen = 0 if self.cache is None else self.cache.get_seq_length()
        current = CURRENT.set((mask, input_pos, seen))
        try:
            return base(
                input_ids=tokens,
                # transformers passes it to our mask function, which does not read it. Without one, transformers would
                # read the positions to detect packed rows, and wait for a GPU.
                attention_mask=torch.ones_like(tokens, dtype=torch.bool),
                position_ids=input_pos,
                past_key_values=self.cache,
                use_cache=False,
            ).last_hidden_state
        finally:
            CURRENT.reset(current)


def hf_decoder(path: str | None = None, **fields: Any) -> HFDecoder:
    """Build a model of transformers on the default device, with random weights. No code of ``path`` is run.

    Args:
        path: model directory, whose config.json describes the model.
        fields: fields of config.json, for a model without a directory. ``model_type`` is one of them.

    Raises:
        ValueError: if transformers has no such causal decoder or no such field, or parts cannot be identified.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if path is not None and fields:
        raise ValueError(f"{next(iter(fields))} is given, and path too, whose config.json describes the model")
    given = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in fields.items()}
    fields = given if path is None else _read_config(path)
    config = make_config(fields)
    model_type = config.model_type
    try:
        declared = type(config)().to_dict().keys()
    except Exception:  # one that has no defaults
        declared = config.to_dict().keys()
    known = declared | type(config).attribute_map.keys() | _OTHER_FIELDS
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{unknown[0]} is not a field of config.json for model_type={model_type}")
    for reason, is_true in {
        "an encoder and a decoder": getattr(config, "is_encoder_decoder", False),
        "caps on attention logits": getattr(config, "attn_logit_softcapping", None) is not None,
        "layers that are neither full nor sliding attention": not _LAYER_TYPES.issuperset(
            getattr(config, "layer_types", None) or ()
        ),
    }.items():
        if is_true:
            raise ValueError(f"model_type={model_type} has {reason}, which OwLore cannot train")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or not kind._supports_attention_backend:  # it would not read the masks in the form that they have
        raise ValueError(f"model_type={model_type} is no causal decoder with exchangeable attention; OwLore needs one")
    register_attention()
    try:
        model = _of_config(config)
    except ValueError:
        raise
    except Exception as error:  # configs and models of transformers raise errors of all kinds
        raise ValueError(f"model_type={model_type} is not a decoder in a form that OwLore knows: {error!r}") from error
    check_decoder(model, _of_config, config)
    respect_rope(model, config)
    model.fields = tuple(given)
    return model


def _of_config(config: Any) -> HFDecoder:
    return HFDecoder(_make_causal(config, dtype=torch.get_default_dtype(), attn_implementation="owlore")[0])


def _make_causal(config: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    """A causal language model of transformers, with separate experts, and the renamings of `split_experts`."""
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_config(config, **kwargs)
    return causal, split_experts(causal)


def _read_config(path: str) -> dict[str, Any]:
    file = user_path(path) / "config.json"
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; download the model first") from error


def part_names(causal: Any) -> dict[str, str]:
    """The names of layers, embeddings and final norm in the base model of ``causal``, and of its output head.

    Raises:
        ValueError: if a part cannot be identified.
    """
    kind = type(causal).__name__
    base = getattr(causal, causal.base_model_prefix, None)
    head, embeddings = causal.get_output_embeddings(), causal.get_input_embeddings()
    if base is None or not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
        raise ValueError(f"{kind} is not a causal decoder with token embeddings and a Linear as output head")
    found: dict[str, list[str]] = {"layers": [], "tok_embeddings": [], "norm": []}
    for name, child in base.named_children():
        if child is embeddings:
            found["tok_embeddings"].append(name)
        elif isinstance(child, nn.ModuleList) and len(child) == causal.config.num_hidden_layers:
            found["layers"].append(name)
        elif next(child.parameters(), None) is not None:
            found["norm"].append(name)
    for part, names in found.items():
        if len(names) != 1:
            raise ValueError(f"{kind}: {part} cannot be identified; its base model has {', '.join(names) or 'none'}")
    for index, layer in enumerate(getattr(base, found["layers"][0])):
        if not any(isinstance(module, nn.Linear) for module in layer.modules()):
            raise ValueError(f"{kind}: layer {index} has no Linear to train")
        if any(name.endswith("sinks") for name, _ in layer.named_parameters()):
            raise ValueError(f"{kind}: layer {index} has attention sinks, which OwLore cannot train")
        named = dict(layer.named_parameters())
        if bad := [name for name, parameter in named.items() if parameter.ndim > 2]:
            raise ValueError(
                f"{kind}: {bad[0]} of layer {index} is neither a matrix nor a vector; the recipe, not the Trainer, "
                "trains mixtures of experts"
            )
        if bad := sorted(layer.state_dict().keys() - named.keys()):
            raise ValueError(f"{kind}: {bad[0]} of layer {index} is in checkpoints but is no parameter")
    known = {*base.parameters(), *head.parameters()}
    if other := [name for name, parameter in causal.named_parameters() if parameter not in known]:
        raise ValueError(f"{kind}: {other[0]} is in no layer, embedding, output head or final norm")
    (output,) = [name for name, module in causal.named_modules() if module is head]
    return {part: names[0] for part, names in found.items()} | {"output": output}


def check_config(model: HFDecoder, config: dict[str, Any]) -> None:
    """Raise ValueError if a field of ``model`` that matters differs in ``config``, the content of config.json."""
    theirs = make_config(config)
    for key in ("model_type", *model.fields, *_BEHAVIOUR):
        if key.endswith("_token_id") or not hasattr(model.config, key) or not hasattr(theirs, key):
            continue  # changes no logits, or the model's class does not declare it
        ours, found = getattr(model.config, key), getattr(theirs, key)
        if ours != found:
            raise ValueError(
                f"model.{key}={ours}, and config.json has {found}; config hf/any takes all from config.json"
            )
    check_decoder(model, _of_config, theirs)  # finds what no list of fields names


def disk_names(config: dict[str, Any]) -> tuple[Callable[[str], str | None], Rename]:
    """Functions from a parameter's name in a checkpoint of transformers to its name in `HFDecoder`, and back.

    The first one returns None for tensors that transformers leaves out, such as buffers that older versions saved.

    Args:
        config: content of config.json.

    Raises:
        ValueError: as `hf_decoder`.
    """
    with torch.device("meta"):
        causal, changes = _make_causal(make_config(config))
    prefix = causal.base_model_prefix
    theirs = {part: name if part == "output" else f"{prefix}.{name}" for part, name in part_names(causal).items()}
    ours = {name: part for part, name in theirs.items()}
    left_out = [*(causal._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    parameters = {name for name, _ in causal.named_parameters()}
    changes_back = [change.reverse_transform() for change in reversed(changes)]

    def from_disk(name: str) -> str | None:
        if name not in parameters and any(re.search(pattern, name) for pattern in left_out):
            return None
        for change in changes:
            name, _ = change.rename_source_key(name)
        return _renamed_part(name, ours)

    def to_disk(name: str) -> str:
        name = _renamed_part(name, theirs)
        for change in changes_back:
            name, _ = change.rename_source_key(name)
        return name

    return from_disk, to_disk


def _renamed_part(name: str, names: dict[str, str]) -> str:
    """``name`` with another name for the part at its beginning."""
    part = next((part for part in names if name.startswith(f"{part}.")), None)
    return name if part is None else names[part] + name[len(part) :]


@contextmanager
def key_value_cache(model: HFDecoder) -> Iterator[Any]:
    """Keep keys and values of all tokens that ``model`` gets during the block, in the yielded ``DynamicCache``."""
    from transformers import DynamicCache

    model.cache = DynamicCache()
    try:
        yield model.cache
    finally:
        model.cache = None
