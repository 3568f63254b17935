"""Weights from and to Hugging Face's layout, and checkpoints that are either complete or absent."""

from owlore_tune.checkpoints.hf import HFCheckpointer

__all__ = ["HFCheckpointer"]
