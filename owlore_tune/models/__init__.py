"""The parts of a decoder, and models that torchtune lacks or implements incorrectly."""

from owlore_tune.models.gemma2 import gemma2_2b
from owlore_tune.models.smollm2 import lora_smollm2_135m, smollm2_135m

__all__ = ["gemma2_2b", "lora_smollm2_135m", "smollm2_135m"]
