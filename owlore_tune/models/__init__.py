"""The parts of a decoder, models of transformers, and models that torchtune lacks or implements incorrectly."""

from owlore_tune.models.gemma2 import gemma2_2b
from owlore_tune.models.hf import hf_decoder
from owlore_tune.models.smollm2 import lora_smollm2_135m, smollm2_135m

__all__ = ["gemma2_2b", "hf_decoder", "lora_smollm2_135m", "smollm2_135m"]
