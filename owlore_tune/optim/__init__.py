"""AdamW on low-rank gradients, with state in 32, 16 or 8 bits."""

from owlore_tune.optim.adamw import OwLoreAdamW, parameter_groups

__all__ = ["OwLoreAdamW", "parameter_groups"]
