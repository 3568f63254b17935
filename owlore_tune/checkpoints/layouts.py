"""Conversions between Hugging Face's weight layout and that of the model, for each type of model."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torchtune.models import convert_weights
from torchtune.training.checkpointing import ModelType

from owlore_tune.models.hf import disk_names

StateDict = dict[str, Tensor]
Convert = Callable[[StateDict], StateDict]
HF = "HF"  # the model is of transformers; only the names of its parts differ
# torchtune's weight layouts of causal decoders, and the matching ``model_type`` in config.json.
ARCHITECTURES = {
    ModelType.LLAMA2: ("llama",), ModelType.LLAMA3: ("llama",), ModelType.LLAMA3_2: ("llama",),
    ModelType.MISTRAL: ("mistral",), ModelType.QWEN2: ("qwen2",), ModelType.GEMMA: ("gemma",),
    ModelType.GEMMA2: ("gemma2",), ModelType.PHI3_MINI: ("phi3",), ModelType.PHI4: ("phi3",),
}  # fmt: skip


def converters(model_type: str, config: dict[str, Any]) -> tuple[Convert, Convert]:
    """The conversions from and to Hugging Face's layout.

    Args:
        model_type: torchtune's name of the layout, such as ``LLAMA2``; ``HF`` for `owlore_tune.models.HFDecoder`.
        config: content of the model's config.json.

    Raises:
        ValueError: if ``model_type`` is unknown, not a causal decoder, or does not match ``config``; or if ``config``
            lacks a size or has inconsistent numbers of heads.
    """
    if model_type == HF:
        from_disk, to_disk = disk_names(config)
        return partial(_renamed, from_disk), partial(_renamed, to_disk)
    kind = ModelType.__members__.get(str(model_type))
    if kind not in ARCHITECTURES:
        names = ", ".join(known.name for known in ARCHITECTURES)
        raise ValueError(f"checkpointer.model_type={model_type}; choose one of the causal decoders {names}, or {HF}")
    if (found := config.get("model_type")) not in ARCHITECTURES[kind]:
        fitting = ", ".join(known.name for known, types in ARCHITECTURES.items() if found in types)
        raise ValueError(
            f"checkpointer.model_type={model_type} is for config.json's model_type {ARCHITECTURES[kind][0]}, and the "
            f"model's is {found}; choose {fitting or HF}"
        )
    try:
        heads = {
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "dim": config["hidden_size"],
            "head_dim": config.get("head_dim"),
        }
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}; is it a model of type {model_type}?") from error
    for name in ("num_heads", "num_kv_heads", "dim", "head_dim"):
        if not (heads[name] is None and name == "head_dim") and not (type(heads[name]) is int and heads[name] > 0):
            raise ValueError(f"config.json: {heads[name]!r} for {name} is not a whole number above 0")
    if heads["num_heads"] % heads["num_kv_heads"] or (heads["head_dim"] is None and heads["dim"] % heads["num_heads"]):
        raise ValueError(f"config.json: the numbers of heads are not divisible: {heads}")
    if kind in (ModelType.PHI3_MINI, ModelType.PHI4):
        from torchtune.models.phi3._convert_weights import phi3_hf_to_tune, phi3_tune_to_hf

        head_dim = heads.pop("head_dim") or heads["dim"] // heads["num_heads"]
        heads["dim"] = heads["num_heads"] * head_dim  # its conversion means the rows of the queries
        if heads["num_heads"] == heads["num_kv_heads"]:
            heads = dict.fromkeys(heads)
        return partial(phi3_hf_to_tune, **heads), phi3_tune_to_hf
    if kind == ModelType.QWEN2:
        from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf

        # Without ``tie_word_embeddings``, the first one keeps a head that a file has beside tied embeddings.
        is_tied = config.get("tie_word_embeddings", False)
        return partial(qwen2_hf_to_tune, **heads), partial(qwen2_tune_to_hf, **heads, tie_word_embeddings=is_tied)
    if kind == ModelType.GEMMA2:
        from owlore_tune.models.gemma2 import hf_to_tune, tune_to_hf

        return partial(hf_to_tune, **heads), partial(tune_to_hf, **heads)
    return partial(convert_weights.hf_to_tune, **heads), partial(convert_weights.tune_to_hf, **heads)


def _renamed(rename: Callable[[str], str | None], weights: StateDict) -> StateDict:
    return {new: weight for name, weight in weights.items() if (new := rename(name)) is not None}
