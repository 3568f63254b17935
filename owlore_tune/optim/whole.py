"""A parameter that trains as it is, beside projected weights."""

import torch
from torch import Tensor, nn

from owlore_tune.distributed.world import local
from owlore_tune.optim.projected import compute_dtype


class WholeParameter:
    """A norm, a bias, a weight that no projection shrinks, or one outside the layers.

    A vector in 16 bits is trained as a float32 copy, because its updates are smaller than its rounding (LLaMA's norms
    are about 0.5, and bfloat16 has steps of 0.002 there). The copy keeps its value while the parameter is frozen. Its
    gradients accumulate in float32 too. Matrices in 16 bits are trained as they are: choose an optimizer that rounds
    stochastically.

    Args:
        parameter: of the model.

    Attributes:
        trained: what the optimizer gets: ``parameter``, or its copy.
        is_copied: whether it is a copy.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.is_copied = parameter.ndim == 1 and compute_dtype(parameter) != parameter.dtype
        self.trained = self._copy() if self.is_copied else parameter
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def _copy(self) -> nn.Parameter:
        return nn.Parameter(self.parameter.detach().to(compute_dtype(self.parameter)), requires_grad=False)

    def engage(self) -> None:
        """Let it train from now on."""
        self.parameter.requires_grad_(True)
        if self.is_copied:
            self._follow()
            self.trained.requires_grad_(True)
            if self._hook is None:
                self._hook = self.parameter.register_post_accumulate_grad_hook(self._take_gradient)

    @torch.no_grad()
    def _follow(self) -> None:
        """Give the copy the parameter's values where these are not the copy's, rounded: others have been loaded."""
        if self.trained.device != self.parameter.device:  # the model had no weights before
            torch.utils.swap_tensors(self.trained, self._copy())
        copy, value = local(self.trained), local(self.parameter)
        copy.copy_(torch.where(copy.to(value.dtype) == value, copy, value.to(copy.dtype)))

    @torch.no_grad()
    def load(self, value: Tensor) -> None:
        """Load a saved value of ``trained``, sharded as the parameter."""
        if self.is_copied:
            self._follow()
        self.trained.copy_(value)

    def release(self) -> None:
        """Freeze it."""
        for parameter in (self.parameter, self.trained):
            parameter.requires_grad_(False)
            parameter.grad = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _take_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            raise RuntimeError("other ProjectedLayers already train this model; load the model anew")
        grad = parameter.grad.to(self.trained.dtype)
        self.trained.grad = grad if self.trained.grad is None else self.trained.grad + grad
        parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copy to the parameter, after a step."""
        if self.is_copied:
            self.parameter.copy_(self.trained)
