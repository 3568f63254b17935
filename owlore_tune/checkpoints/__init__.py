"""Weights from and to Hugging Face's layout, and checkpoints that are either complete or absent."""

from owlore_tune.checkpoints.checkpointer import HFCheckpointer

__all__ = ["HFCheckpointer"]
