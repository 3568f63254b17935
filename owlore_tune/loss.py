"""Cross-entropy that never materializes all logits and skips positions without a label."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TiedLinear

from owlore_tune.data.loader import batch_to_device, to_device
from owlore_tune.models.attention import missing
from owlore_tune.models.decoder import Decoder
from owlore_tune.models.output import takes_hidden_states


class LinearCrossEntropyLoss(nn.Module):
    """Mean cross-entropy from the last hidden states: output head and loss fused, chunk by chunk.

    Only positions with a label go through the head, ``chunk_size`` at a time. Each chunk's gradients are computed
    immediately, so at most one chunk of logits is alive, in forward and backward. A model's own forward would compute
    logits for every position. (The name and ``set_model_output`` are those of later torchtune versions.)

    Args:
        chunk_size: positions per chunk.
    """

    def __init__(self, chunk_size: int = 256) -> None:
        super().__init__()
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise ValueError(f"loss.chunk_size={chunk_size}; it must be at least 1 position")
        self.chunk_size = chunk_size
        self.ignore_index = CROSS_ENTROPY_IGNORE_IDX
        self._head: Any = None

    def set_model_output(self, model: Decoder) -> None:
        """Make ``model`` return its last hidden states after the norm. The loss applies the output head instead."""
        self._head = [model.output]  # in a list, to not register the head as a submodule
        norm = model.norm
        model.unembed = lambda hidden: norm(hidden)  # type: ignore[method-assign]

    def forward(
        self,
        hidden: Tensor,  # (b, s, d)
        labels: Tensor,  # (b, s), already shifted
        chosen: Tensor | None = None,  # (n,), indices in b · s of the positions with a label
    ) -> Tensor:  # ()
        """
        Args:
            chosen: found on the device if omitted. On a GPU, the host would wait for it.

        Raises:
            RuntimeError: if ``set_model_output`` was not called.
        """
        if self._head is None:
            raise RuntimeError("call set_model_output(model) before the first forward")
        if chosen is None:
            chosen = (labels.flatten() != self.ignore_index).nonzero().flatten()
        return self.of_rows(hidden.flatten(0, 1).index_select(0, chosen), labels.flatten().index_select(0, chosen))

    def of_rows(
        self,
        hidden: Tensor,  # (n, d)
        labels: Tensor,  # (n,), none ignored
    ) -> Tensor:  # ()
        """The loss of positions that all have a label."""
        (head,) = self._head
        grad_enabled = torch.is_grad_enabled()  # autograd disables it inside the function
        parameters = [head.tied_module.weight] if isinstance(head, TiedLinear) else list(head.parameters())
        return _ChunkedHead.apply(hidden, labels, head, self.chunk_size, grad_enabled, *parameters)


class _ChunkedHead(torch.autograd.Function):
    """Mean cross-entropy of ``head(hidden)``. Gradients are computed in forward, while the logits exist."""

    @staticmethod
    def forward(ctx, hidden, labels, head, chunk_size, grad_enabled, *parameters):  # hidden (n, d), labels (n,)
        needs = [i == 0 or parameter.requires_grad for i, parameter in enumerate((hidden, *parameters))]
        wants_grad = grad_enabled and any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        hidden_grad = torch.empty_like(hidden) if wants_grad else None
        parameter_grads = [torch.zeros_like(p) if p.requires_grad and wants_grad else None for p in parameters]
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            count = len(labels[rows])
            chunk = hidden[rows].detach()
            if added := min(missing(hidden, count), chunk_size - count):
                chunk = F.pad(chunk, (0, 0, 0, added))
            with torch.set_grad_enabled(wants_grad):
                logits = head(chunk.requires_grad_(wants_grad))
                if added:  # a slice of all rows would also cost a copy in backward
                    logits = logits[:count]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(logits, labels[rows], reduction="sum")
            total += loss.detach()
            if wants_grad:
                inputs = [x for x, need in zip((chunk, *parameters), needs, strict=True) if need]
                first, *others = torch.autograd.grad(loss, inputs)
                hidden_grad[rows] = first[:count]
                for gathered, grad in zip((g for g in parameter_grads if g is not None), others, strict=True):
                    gathered += grad
        ctx.save_for_backward(hidden_grad, *(g for g in parameter_grads if g is not None))
        ctx.has_grad = [g is not None for g in (hidden_grad, *parameter_grads)]
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad_loss):
        saved = iter(ctx.saved_tensors)
        hidden_grad, *parameter_grads = [next(saved) * (grad_loss / ctx.count) if has else None for has in ctx.has_grad]
        return hidden_grad, None, None, None, None, *parameter_grads


def shift_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Shift labels (b, s) left by one. Position i then predicts token i + 1, and logits need no slicing."""
    ignored = torch.full_like(labels[:, :1], ignore_index)
    return torch.cat([labels[:, 1:], ignored], dim=1)


def mean_loss(model: nn.Module, loss_fn: Any, batch: dict[str, Tensor], labels: Tensor, device: torch.device) -> Tensor:
    """The mean loss over the trained tokens of a micro-batch, ().

    Args:
        batch: see `owlore_tune.data.loader.batch_to_device`, in host memory.
        labels: (b, s), already shifted, in host memory.
    """
    return loss_of_outputs(loss_fn, model(**batch_to_device(batch, device)), labels)


def loss_of_outputs(loss_fn: Any, outputs: Any, labels: Tensor) -> Tensor:
    """The mean loss of a model's outputs: hidden states, chunks of logits or all logits, depending on the loss.

    Args:
        labels: (b, s), already shifted, in host memory.
    """
    device = outputs.device if torch.is_tensor(outputs) else outputs[0].device
    if isinstance(loss_fn, LinearCrossEntropyLoss):
        chosen = (labels.flatten() != loss_fn.ignore_index).nonzero().flatten()
        return loss_fn(outputs, to_device(labels, device), to_device(chosen, device))
    labels = to_device(labels, device)
    if torch.is_tensor(outputs) and not takes_hidden_states(loss_fn):
        outputs, labels = outputs.flatten(0, 1), labels.flatten()
    return loss_fn(outputs, labels)
