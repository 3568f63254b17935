"""Check that a decoder computes what its config.json describes.

A twin is a copy of the decoder that is a few numbers wide, with random weights. Its outputs are compared with those of
transformers' own model of the same narrow config. This finds every difference in the computation, also in settings that
no list of fields names. The real weights are not needed."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.utils import get_logger

from owlore_tune.errors import ConfigError, message_of
from owlore_tune.models.output import set_output

NUM_TOKENS = 24


def some_tokens(reference: Any, most: int = NUM_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, reference.config.vocab_size, (1, min(NUM_TOKENS, most)), generator=generator)


@torch.no_grad()
def plain_difference(twin: Any, reference: Any) -> float:
    tokens = some_tokens(reference, twin.max_seq_len)
    return _distance(twin(tokens), reference(tokens).logits)


@torch.no_grad()
def packed_difference(twin: Any, reference: Any) -> float:
    """A packed row, compared with its samples on their own."""
    tokens = some_tokens(reference, twin.max_seq_len)
    samples = tokens.tensor_split((tokens.shape[1] // 2, tokens.shape[1] * 3 // 4), dim=1)
    positions = torch.cat([torch.arange(sample.shape[1]) for sample in samples])[None]
    numbers = torch.cat([torch.full_like(sample[0], number) for number, sample in enumerate(samples)])
    mask = (numbers[:, None] == numbers).tril()[None]
    expected = torch.cat([reference(sample).logits for sample in samples], dim=1)
    return _distance(twin(tokens, mask=mask, input_pos=positions), expected)


@torch.no_grad()
def far_difference(twin: Any, reference: Any, num_positions: int) -> float:
    """A row with positions up to ``num_positions``. Scaled frequencies differ little at the first positions."""
    tokens = some_tokens(reference, num_positions)
    positions = torch.linspace(0, num_positions - 1, tokens.shape[1]).long()[None]
    mask = torch.ones_like(tokens)  # without one, transformers takes the row for a packed one
    expected = reference(tokens, position_ids=positions, attention_mask=mask).logits
    return _distance(twin(tokens, input_pos=positions), expected)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()


Convert: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]
# Largest sizes of a twin, by transformers' names. Twins of torchtune's builders keep _HEADS. Rows exceed the window.
_HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, qk_rope_head_dim=16, sliding_window=8)
_SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "vocab_size": 64, "num_hidden_layers": 4, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_FARTHEST = 4096  # position
# Differences relative to the largest logit. Equal computations differ by at most 2e-5. Far positions multiply the
# rounding of an angle.
_TOLERANCE, _FAR_TOLERANCE = 1e-4, 1e-2
_SMALL, _LARGE = 1e-3, 20.0  # embeddings and logits

_ADVICE = "set the fields to those of config.json, or take all from it: owlore_tune.models.hf_decoder (config hf/any)"
_SUSPECTS = (  # fields that builders often lack
    "rope_scaling", "rope_parameters", "hidden_act", "hidden_activation", "partial_rotary_factor",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip

_accepted: set[tuple[str, str]] = set()  # configs that `check_decoder` has accepted in this process

log = get_logger("INFO")


def check_builder(
    model: TransformerDecoder, config: dict[str, Any], converter: Callable[[dict[str, Any]], Convert]
) -> None:
    """Check a model of a torchtune builder against config.json.

    If config.json has an attention window and the model has none, ``model.max_seq_len`` is lowered to the window.

    Args:
        model: on the meta device, not wrapped.
        config: content of config.json.
        converter: returns the conversion of weights to torchtune's layout for the content of a config.json.

    Raises:
        ValueError: if the model computes something else. The message names the field if it is known.
    """
    with _small_and_quiet():
        theirs = make_config(config)
        _check_fields(model, theirs)
        _respect_window(model, theirs)
        respect_rope(model, theirs)
        heads = theirs.num_attention_heads
        sizes = _SIZES | {"hidden_size": heads * math.ceil(32 / heads)}
        try:
            reference = _reference(narrow := _narrow(theirs, sizes, head_dim=_head_dim(theirs)))
            _spread(reference)
            twin = _narrow_copy(model, narrow)
            _load(twin, reference.state_dict(), converter(narrow.to_dict()))
            near = max(plain_difference(twin, reference), packed_difference(twin, reference))
            window = getattr(theirs, "sliding_window", None) or _FARTHEST
            far = far_difference(twin, reference, min(_FARTHEST, window, twin.max_seq_len))
        except ConfigError:
            raise
        except Exception as error:  # a setting that no builder of torchtune has, or a weight that a layout lacks
            raise ValueError(
                f"the model cannot be compared with config.json: {message_of(error)}; {_ADVICE}"
            ) from error
    if not (near < _TOLERANCE and far < _FAR_TOLERANCE):
        fields = {key: config[key] for key in _SUSPECTS if config.get(key) is not None}
        raise ValueError(
            "the model's builder computes something else than config.json describes: in a small copy, logits differ by "
            f"{max(near, far):.1e} of the largest; config.json has {fields}; {_ADVICE}"
        )


def check_decoder(decoder: Any, build: Callable[[Any], Any], config: Any) -> None:
    """Check a decoder of transformers, with this package's masks and positions, against transformers' own.

    Args:
        decoder: an `owlore_tune.models.HFDecoder`.
        build: makes such a decoder of a config of transformers.
        config: of the model whose outputs the decoder should have, in transformers.

    Raises:
        ValueError: if the outputs differ, or the model has no narrow twin that runs.
    """
    kind = decoder.config.model_type
    compared = (decoder.config.to_json_string(), config.to_json_string())
    if compared in _accepted:
        return
    with _small_and_quiet():
        try:
            reference, twin = _pair(config, decoder.config, build, _SIZES | _HEADS)
        except Exception:  # latent attention needs as many heads for keys as for queries
            try:
                reference, twin = _pair(config, decoder.config, build, _SIZES | _HEADS | {"num_key_value_heads": 4})
            except Exception as error:  # sizes that depend on each other in a way that is not known here
                raise ValueError(
                    f"model_type={kind} cannot be compared with transformers' own computation, so OwLore does not "
                    f"train it: {error!r}"
                ) from error
        plain, packed = plain_difference(twin, reference), packed_difference(twin, reference)
        twin.attend_by_sample()  # as on a CPU
        plain, packed = max(plain, plain_difference(twin, reference)), max(packed, packed_difference(twin, reference))
    for rows, difference in (("rows", plain), ("packed rows", packed)):
        if not difference < _TOLERANCE:
            raise ValueError(
                f"model_type={kind} has attention or positions that OwLore does not reproduce: in a small copy, logits "
                f"of {rows} differ from those of transformers by {difference:.1e} of the largest"
            )
    _accepted.add(compared)


def _pair(config: Any, own: Any, build: Callable[[Any], Any], sizes: dict[str, int]) -> tuple[Any, Any]:
    """A narrow model of transformers with ``config``, and a twin of the decoder with the config ``own``; both run."""
    reference, twin = _reference(_narrow(config, sizes)), _seeded(lambda: build(_narrow(own, sizes))).eval()
    packed_difference(twin, reference)
    return reference, twin


def make_config(fields: dict[str, Any]) -> Any:
    """The config in transformers for the ``fields`` of a config.json.

    Raises:
        ValueError: if the installed transformers does not know the model, or rejects a field.
    """
    from transformers import CONFIG_MAPPING

    if (model_type := str(fields.get("model_type"))) not in CONFIG_MAPPING:
        raise ValueError(f"model_type={model_type}: the installed transformers has no such model")
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # the configs check themselves, each in its own way
        raise ValueError(f"config.json of a {model_type} is not valid: {' '.join(str(error).split())}") from error


@contextmanager
def _small_and_quiet() -> Iterator[None]:
    """Tensors are on the CPU in float32, and transformers does not warn of ids and lengths that a narrow config has.

    Products are in float32 too, whatever precision the caller has set for them.
    """
    from transformers.utils import logging

    verbosity, precision = logging.get_verbosity(), torch.get_float32_matmul_precision()
    logging.set_verbosity_error()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.device("cpu"), training.set_default_dtype(torch.float32):
            yield
    finally:
        logging.set_verbosity(verbosity)
        torch.set_float32_matmul_precision(precision)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_fields(model: TransformerDecoder, theirs: Any) -> None:
    """Compare the settings that torchtune's modules tell, to name the one that differs."""
    rope = getattr(theirs, "rope_parameters", None) or {}
    derived = {"head_dim": _head_dim(theirs), "rope_theta": rope.get("rope_theta")}
    for layer in model.layers:
        for key, ours in _settings(model, layer).items():
            wanted = derived[key] if key in derived else getattr(theirs, key, None)
            if ours is not None and wanted is not None and not math.isclose(ours, wanted, rel_tol=1e-6):
                raise ValueError(f"the model's builder has {key}={ours}, and config.json has {wanted}; {_ADVICE}")


def _settings(model: TransformerDecoder, layer: Any) -> dict[str, Any]:
    attention = layer.attn
    return {
        "num_hidden_layers": len(model.layers),
        "hidden_size": model.tok_embeddings.weight.shape[1],
        "intermediate_size": layer.mlp.w1.weight.shape[0],
        "vocab_size": model.tok_embeddings.weight.shape[0],
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": getattr(layer.sa_norm, "eps", None),
        "rope_theta": getattr(attention.pos_embeddings, "base", None),
        "tie_word_embeddings": isinstance(model.output, TiedLinear),
    }


def _respect_window(model: TransformerDecoder, theirs: Any) -> None:
    """Compare the windows of attention. They are wider than a twin's rows."""
    window: Any = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * len(model.layers)
    attention: list[Any] = [layer.attn for layer in model.layers]
    ours = [getattr(a, "window", None) or getattr(a, "sliding_window_size", None) for a in attention]
    wanted = [window if kind == "sliding_attention" else None for kind in types]
    if not any(ours) and any(wanted) and 0 < window < model.max_seq_len:
        log.info(
            f"config.json has an attention window of {window} tokens, and the model's builder has none: rows and "
            f"inputs have at most {window} tokens."
        )
        model.max_seq_len = window
    elif any(ours) and ours != wanted[: len(ours)]:
        raise ValueError(f"the model's builder has attention windows {ours}, and config.json has {wanted}; {_ADVICE}")


def respect_rope(model: Any, theirs: Any) -> None:
    """Lower ``model.max_seq_len`` to the length up to which rotary embeddings do not depend on a row's length."""
    ropes = getattr(theirs, "rope_parameters", None) or {}
    for rope in [ropes] if "rope_type" in ropes else [each for each in ropes.values() if isinstance(each, dict)]:
        kind, limit = rope.get("rope_type"), int(theirs.max_position_embeddings)
        if kind == "longrope":
            limit = int(rope.get("original_max_position_embeddings") or limit)
        if kind in {"longrope", "dynamic"} and limit < model.max_seq_len:
            log.info(
                f"Rows and inputs have at most {limit} tokens: in longer ones, rotary embeddings would depend on "
                f"the longest row (rope_type={kind})."
            )
            model.max_seq_len = limit


def _narrow(config: Any, sizes: dict[str, int], **others: int) -> Any:
    """``config`` with sizes of at most ``sizes``, and the values ``others``."""
    fields = config.to_dict()
    names = {config.attribute_map.get(key, key): size for key, size in sizes.items()}
    for name, size in names.items():
        if type(fields.get(name)) is int:
            fields[name] = min(fields[name], size)
    num_layers = fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")]
    for name, value in fields.items():
        if isinstance(value, list) and len(value) > num_layers and len(value) == config.num_hidden_layers:
            fields[name] = value[:num_layers]  # one for each layer
    _shorten_factors(fields.get("rope_parameters"), _head_dim(config), others.get("head_dim", sizes.get("head_dim")))
    fields["pad_token_id"] = None  # else one twin has a row of zeros in its embeddings, and in a tied head
    fields |= {token: 0 for token in ("bos_token_id", "eos_token_id") if fields.get(token) is not None}
    return type(config).from_dict(fields | others | {"initializer_range": 0.3})


def _shorten_factors(ropes: Any, old: int, new: int | None) -> None:
    """Cut the factors of longrope, one for each frequency of a head of ``old`` numbers, to those of ``new``."""
    for name, value in ropes.items() if isinstance(ropes, dict) else ():
        if isinstance(value, list) and new is not None and new < old:
            ropes[name] = value[: len(value) * new // old]
        _shorten_factors(value, old, new)


def _seeded(build: Callable[[], Any]) -> Any:
    """The result of ``build``, with the same random numbers in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _reference(config: Any) -> Any:
    """A model of transformers with random weights."""
    from transformers import AutoModelForCausalLM

    def build() -> Any:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")

    return _seeded(build).eval()


@torch.no_grad()
def _spread(reference: Any) -> None:
    """Give ``reference`` weights that make differences visible.

    Small embeddings for the epsilon of norms, a different weight for each norm, and large logits for their cap.
    """
    reference.get_input_embeddings().weight.mul_(_SMALL)
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    largest = reference(some_tokens(reference)).logits.abs().max()
    reference.model.norm.weight += _LARGE / largest


def _narrow_copy(model: TransformerDecoder, narrow: Any) -> Any:
    """A copy of ``model`` with the sizes of ``narrow``, on the CPU, without weights."""
    width, hidden, vocabulary = narrow.hidden_size, narrow.intermediate_size, narrow.vocab_size
    old_width = model.tok_embeddings.weight.shape[1]
    twin: Any = copy.deepcopy(model)
    set_output(twin)
    twin.max_seq_len = min(model.max_seq_len, narrow.max_position_embeddings)
    twin.layers = twin.layers[: narrow.num_hidden_layers]
    for name, module in twin.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            rows = {"output_proj": width, "w2": width, "w1": hidden, "w3": hidden, "output": vocabulary}.get(leaf, rows)
            columns = {"output_proj": columns, "w2": hidden}.get(leaf, width)
            module.weight = _meta(rows, columns)
            module.out_features, module.in_features = rows, columns
            if module.bias is not None:
                module.bias = _meta(rows)
        elif isinstance(module, nn.Embedding):
            module.weight = _meta(vocabulary, width)
            module.num_embeddings, module.embedding_dim = vocabulary, width
        elif getattr(module, "scale", None) is not None and module.scale.shape == (old_width,):
            if leaf not in ("q_norm", "k_norm"):
                module.scale = _meta(width)
                module.normalized_shape = (width,)
        elif callable(getattr(module, "rope_init", None)):
            module.max_seq_len = min(module.max_seq_len, _FARTHEST)
    twin.to_empty(device="cpu").float()
    for module in twin.modules():
        if callable(init := getattr(module, "rope_init", None)):
            init()
    return twin.eval()


def _meta(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


def _load(twin: nn.Module, weights: dict[str, Tensor], convert: Convert) -> None:
    parameters = dict(twin.named_parameters())
    converted = {key: value for name, weight in weights.items() for key, value in convert({name: weight}).items()}
    if isinstance(twin.output, TiedLinear):
        converted.pop("output.weight", None)
    for key in sorted(parameters.keys() ^ converted.keys()):
        where = "the model's builder" if key in converted else "config.json"
        raise ConfigError(f"{where} has no {key}; {_ADVICE}")
    with torch.no_grad():
        for key, value in converted.items():
            if parameters[key].shape != value.shape:
                raise ConfigError(
                    f"{key} has another shape in the model's builder than config.json describes; {_ADVICE}"
                )
            parameters[key].copy_(value)
