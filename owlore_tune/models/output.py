"""The output of a decoder: logits, chunks of logits, or hidden states, as its loss takes them."""

from typing import Any


def takes_hidden_states(loss_fn: Any) -> bool:
    """Whether a loss applies the output head itself, as `owlore_tune.loss.LinearCrossEntropyLoss`."""
    return hasattr(loss_fn, "set_model_output")


def set_output(model: Any, loss_fn: Any = None) -> None:
    """Make the forward of ``model`` return the input of ``loss_fn``; all logits (b, s, v) without a loss.

    ``set_model_output`` of a loss replaces ``model.unembed``, and nothing else does.
    """
    vars(model).pop("unembed", None)
    model.set_num_output_chunks(0 if takes_hidden_states(loss_fn) else getattr(loss_fn, "num_output_chunks", 0))
    if takes_hidden_states(loss_fn):
        loss_fn.set_model_output(model)
