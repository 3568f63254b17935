"""Parts that `owlore_tune.models.hf_model.HFDecoder` adds to a model of transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear


class Logits:
    """The changes that a causal model makes to the output of its head, such as a scale or a cap.

    They are made by the model's own forward, in a copy of it whose base and head return their input.
    """

    def __init__(self, causal: Any, head_name: str) -> None:
        self._causal = causal.__class__.__new__(causal.__class__)
        nn.Module.__init__(self._causal)
        vars(self._causal).update({k: v for k, v in vars(causal).items() if k not in ("_modules", "_parameters")})
        self._causal._modules = {causal.base_model_prefix: _PassThrough(), head_name: nn.Identity()}
        self._causal._parameters = {}

    def __call__(self, logits: Tensor) -> Tensor:
        rows = logits.reshape(1, -1, logits.shape[-1])
        return self._causal(inputs_embeds=rows, use_cache=False).logits.view_as(logits)

    def are_changed(self) -> bool:
        with torch.device("cpu"):
            sample = torch.linspace(-100, 100, 8).view(1, 8)
        return not torch.equal(self(sample), sample)


class _PassThrough(nn.Module):
    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class TiedHead(TiedLinear):
    """An output head that shares the weight of the embeddings."""

    def __init__(self, tied_module: nn.Module, logits: Logits) -> None:
        super().__init__(tied_module)
        self._logits = logits if logits.are_changed() else None

    def __call__(self, x: Tensor) -> Tensor:
        product = super().__call__(x)
        return product if self._logits is None else self._logits(product)


class Recorder(nn.Module):
    """Stands for a layer: returns its input, and records its other arguments."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)
