"""Weights from and to Hugging Face's layout, and checkpoints that are either complete or absent."""

from owlore_tune.checkpoints.hf_weights import HFCheckpointer

__all__ = ["HFCheckpointer"]
