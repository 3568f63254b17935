"""The outlier score of each layer: the share of its weights that are outliers after scaling by input norms.

OWL (arXiv 2310.05175), as OwLore (arXiv 2405.18380, section 3.1) uses it: for each Linear with weight W (out, in) and
calibration inputs X (tokens, in), A_ij = |W_ij| · ‖X_:,j‖₂; then over all Linears of the layer together,
D = share of entries with A_ij > τ · mean(A).
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.distributed.fsdp import reshard
from owlore_tune.distributed.world import ALONE, World, local
from owlore_tune.models.decoder import find_layers, find_linears, plain_name
from owlore_tune.models.hf_experts import Experts

InputNorms = list[dict[str, Tensor]]  # per layer: Linear's name → (in_features,) ‖X_:,j‖₂, float64


def outlier_scores(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], threshold: float = 13.0, world: World = ALONE
) -> list[float]:
    """The share of outlier weights of each layer of ``model``.

    Args:
        model: a decoder of torchtune or transformers.
        batches: calibration inputs, keyword arguments of the model's forward (``tokens`` (b, s), and as needed
            ``mask``, ``input_pos``) on its device. The optional key ``valid`` (b, s), bool, is False for padding, which
            does not count. It is not passed to the model.
        threshold: τ, in multiples of the layer's mean; 13 as for the paper's released scores.
        world: processes with batches of their own; all get the scores over all batches.

    Returns:
        D_l of each layer, bottom first, between 0 and 1.

    Raises:
        TypeError: if ``model`` is not such a decoder.
        ValueError: if there are no batches, ``threshold`` is not positive, or weights or inputs of a layer are not
            finite.
    """
    if not threshold > 0:
        raise ValueError(f"outlier_threshold={threshold}; it must be above 0")
    layers = find_layers(model)
    norms = input_norms(model, batches, world)
    scores = []
    for i, layer in enumerate(tqdm(layers, desc="Outliers", unit="layer", leave=False, disable=world.rank > 0)):
        try:
            linears = [(linear.weight, norms[i][name]) for name, linear in find_linears(layer)]
            scores.append(outlier_share(linears, threshold))
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from error
    return scores


@torch.no_grad()
def input_norms(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], world: World = ALONE) -> InputNorms:
    """‖X_:,j‖₂ of the inputs of every Linear, over the batches of all processes, in one forward pass per batch."""
    layers = [InputSquares(layer) for layer in find_layers(model)]
    was_training = model.training
    model.eval()
    num_batches = 0
    try:
        for batch in tqdm(batches, desc="Scoring layers", unit="batch", leave=False, disable=world.rank > 0):
            inputs = dict(batch)
            valid = inputs.pop("valid", None)
            for layer in layers:
                layer.valid = valid
            model(**inputs)
            num_batches += 1
    finally:
        model.train(was_training)
        reshard(model)
        for layer in layers:
            layer.remove()
    if num_batches == 0:
        raise ValueError("no calibration batches; outlier scores need at least one")
    return [layer.norms(world) for layer in layers]


class InputSquares:
    """Sums the squared inputs of a layer's Linears over the forward passes of the layer, until `remove`.

    Attributes:
        valid: (b, s) bool, positions of the next forward pass that count; None for all.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._linears = dict(find_linears(layer))
        self._experts = _experts_by_linear(layer)
        self._squares: dict[str, Tensor] = {}
        self._positions: Tensor | None = None  # (b · s,)
        # The query, key and value projections share an input, as do gate and up. Each input is measured once.
        self._last_input: Tensor | None = None
        self._last_squares: Tensor | None = None
        self._handles = [
            linear.register_forward_pre_hook(partial(self._measure, name)) for name, linear in self._linears.items()
        ]
        self._handles.append(layer.register_forward_hook(self._forget))

    @property
    def valid(self) -> Tensor | None:
        return self._positions

    @valid.setter
    def valid(self, valid: Tensor | None) -> None:
        self._positions = None if valid is None or valid.all() else valid.flatten()

    def _measure(self, name: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0] is not self._last_input:
            x = args[0].reshape(-1, args[0].shape[-1])
            if self._positions is not None:
                experts = self._experts.get(name)
                x = x[self._positions if experts is None else self._positions[experts.tokens]]
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._last_input = args[0]
            self._last_squares = torch.linalg.vector_norm(x, dim=0, dtype=dtype).double().square()
        assert self._last_squares is not None
        known = self._squares.get(name)
        self._squares[name] = self._last_squares if known is None else known + self._last_squares

    def _forget(self, *_: object) -> None:
        self._last_input = self._last_squares = None

    def norms(self, world: World = ALONE) -> dict[str, Tensor]:
        """‖X_:,j‖₂ of each Linear by its name, (in,) float64, over all processes. 0 for an expert without tokens."""
        norms = {}
        for name, linear in self._linears.items():
            total = self._squares.get(name)
            if total is None:
                device = next(iter(self._squares.values())).device
                total = torch.zeros(linear.in_features, dtype=torch.float64, device=device)
            norms[name] = world.sum_(total.clone()).sqrt()
        return norms

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _experts_by_linear(layer: nn.Module) -> dict[str, Experts]:
    """The mixture of experts that each Linear belongs to, by its name in ``layer``."""
    found = [(plain_name(name), module) for name, module in layer.named_modules() if isinstance(module, Experts)]
    return {f"{path}.{name}": experts for path, experts in found for name, _ in find_linears(experts)}


@torch.no_grad()
def outlier_share(
    linears: list[tuple[Tensor, Tensor]],  # weight (out, in), input norms (in,)
    threshold: float,
) -> float:
    """Share of entries of A = |W| · norm above ``threshold`` times the mean of A over all ``linears``.

    Streamed: at most one Linear's A is alive at a time.

    Raises:
        ValueError: if a weight or a norm is not finite, because every comparison with the mean would then be false.
    """
    world = World.of(linears[0][0])  # processes that have rows of their own, and not copies
    num_entries = sum(weight.numel() for weight, _ in linears)
    own = [(local(weight), norm.to(weight.device)) for weight, norm in linears]
    sums = [torch.dot(weight.abs().sum(0, dtype=torch.float64), norm.double()) for weight, norm in own]
    limit = threshold * world.sum_(torch.stack(sums).sum()) / num_entries
    if not limit.isfinite():
        raise ValueError("its weights or input activations are not finite; is the checkpoint damaged?")
    counts = [(weight.abs() * norm.to(_product_dtype(weight)) > limit).sum() for weight, norm in own]
    return int(world.sum_(torch.stack(counts).sum())) / num_entries


def _product_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
