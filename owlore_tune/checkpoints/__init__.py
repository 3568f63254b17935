"""Weights in and out of Hugging Face's layout, and checkpoints that are complete or absent."""

from owlore_tune.checkpoints.hf import HFCheckpointer

__all__ = ["HFCheckpointer"]
