"""Mixtures of experts of transformers, with a module for each expert.

transformers keeps the experts of a layer in two parameters with three dimensions. Here, every matrix of every expert is
a Linear with its name in checkpoints, so it is scored, projected, quantized and saved as any other."""

from typing import Any

import torch
from torch import Tensor, nn

# Properties of transformers' experts that `Experts` computes; see ``use_experts_implementation`` there.
_FORM = {
    "is_concatenated": True, "is_transposed": False, "has_bias": False, "has_gate": True, "has_post_expert_norm": False,
}  # fmt: skip


class Experts(nn.ModuleList):
    """The experts of one layer.

    Args:
        fused: the experts of transformers. It loses its parameters.
        gate, up, down: names of an expert's Linears.

    Attributes:
        names: of an expert's Linears, in this order.
        activation: takes the outputs of gate and up, side by side.
        together: computes all experts at once while it can; see `owlore_tune.layers.grouped`. None computes them one
            after the other.
        even_routing: for a memory plan, which has no data: the experts that train share all tokens evenly.
        tokens: (t,) long, the tokens, of the flattened batch, that the current expert gets during `forward`.
    """

    def __init__(self, fused: Any, gate: str, up: str, down: str) -> None:
        gates_ups, downs = fused.gate_up_proj.detach(), fused.down_proj.detach()
        names = (gate, up, down)
        super().__init__(
            nn.ModuleDict({name: _linear(weight) for name, weight in zip(names, (*halves, last), strict=True)})
            for halves, last in ((both.chunk(2), last) for both, last in zip(gates_ups, downs, strict=True))
        )
        del fused.gate_up_proj, fused.down_proj
        self.activation = fused._apply_gate  # (t, 2 h) → (t, h)
        self.names = names
        self.together: Any = None
        self.even_routing = False
        self.tokens: Tensor | None = None

    @torch.compiler.disable  # the number of tokens per expert changes in every step
    def forward(
        self,
        hidden_states: Tensor,  # (n, d)
        top_k_index: Tensor,  # (n, k) experts of each token
        top_k_weights: Tensor,  # (n, k)
    ) -> Tensor:  # (n, d)
        num_tokens, top_k = top_k_index.shape
        choices, order = top_k_index.flatten().sort(stable=True)
        tokens = order // top_k
        if self.together is not None and self.together.can_compute():
            outputs = self.together(hidden_states[tokens], choices)
        else:
            outputs = self._one_by_one(hidden_states[tokens], tokens, choices)
        weighted = outputs[order.argsort()].view(num_tokens, top_k, -1) * top_k_weights[..., None]
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _one_by_one(self, rows: Tensor, tokens: Tensor, choices: Tensor) -> Tensor:
        counts = self._counts(choices)
        outputs = []
        for expert, own, x in zip(self, tokens.split(counts), rows.split(counts), strict=True):
            # All processes must have a gradient for the same parameters. It is zero without tokens.
            if len(x) or (torch.is_grad_enabled() and _trains(expert)):
                self.tokens = own
                outputs.append(self._of_expert(expert, x))
        self.tokens = None
        return torch.cat(outputs)

    def _counts(self, choices: Tensor) -> list[int]:
        """The number of tokens of each expert."""
        if self.even_routing:
            used = len(self) if _trains(self) else 1  # frozen experts take as much memory as one with all tokens
            each, rest = divmod(len(choices), used)
            return [each + (index < rest) if index < used else 0 for index in range(len(self))]
        return choices.bincount(minlength=len(self)).tolist()

    def _of_expert(self, expert: Any, x: Tensor) -> Tensor:
        gate, up, down = (expert[name] for name in self.names)
        return down(self.activation(torch.cat([gate(x), up(x)], dim=-1)))


def _trains(module: nn.Module) -> bool:
    """Whether a weight trains, as it is or in the projected form."""
    return any(p.requires_grad for p in module.parameters()) or any("projected" in vars(m) for m in module.modules())


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    return linear


def split_experts(causal: Any) -> list[Any]:
    """Replace the experts in ``causal``, a model of transformers.

    Returns:
        transformers' changes of names from a checkpoint to the model, in order.

    Raises:
        ValueError: if the experts have another form than that of `Experts`, or are fused in checkpoints too, or if
            other tensors have another form in checkpoints than in the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    model_type = causal.config.model_type
    conversions = get_model_conversion_mapping(causal, add_legacy=False)
    names = _expert_names([change for change in conversions if isinstance(change, WeightConverter)])
    for change in conversions:
        if type(change) is not WeightRenaming and not (names and isinstance(change, WeightConverter)):
            raise ValueError(f"model_type={model_type} has weights in another form on disk, which OwLore cannot read")
    for path, module in list(causal.named_modules()):
        if not any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
            continue
        if names is None or any(getattr(module, key, None) != value for key, value in _FORM.items()):
            raise ValueError(
                f"model_type={model_type} has experts ({type(module).__name__}) in a form that OwLore cannot train"
            )
        causal.set_submodule(path, Experts(module, *names))
    return [change for change in conversions if type(change) is WeightRenaming]


def _expert_names(converters: list[Any]) -> tuple[str, str, str] | None:
    """The names of an expert's gate, up and down matrices in checkpoints. None if they are not separate there, or other
    weights are converted too."""
    found = {
        change.target_patterns[0].rpartition(".")[2]: [
            source.removesuffix(".weight").rpartition(".experts.*.")[2] for source in change.source_patterns
        ]
        for change in converters
    }
    names = found.pop("gate_up_proj", []) + found.pop("down_proj", [])
    is_known = not found and len(names) == 3 and all(name.isidentifier() for name in names)
    return (names[0], names[1], names[2]) if is_known else None
