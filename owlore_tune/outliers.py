"""The outlier score of each layer: the share of its weights that stand out once inputs are taken into account.

OWL (arXiv 2310.05175), as OwLore (arXiv 2405.18380, section 3.1) uses it: for each Linear with weight W (out, in) and
calibration inputs X (tokens, in), A_ij = |W_ij| · ‖X_:,j‖₂; then over all Linears of the layer together,
D = share of entries with A_ij > τ · mean(A).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from owlore_tune.layers import find_layers, find_linears
from owlore_tune.world import ALONE, World, local, reshard

InputNorms = list[
    dict[str, Tensor]
]  # per layer: Linear's name → (in_features,) ‖X_:,j‖₂, float32 or the model's float64


def outlier_scores(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], threshold: float = 13.0, world: World = ALONE
) -> list[float]:
    """The share of outlier weights of each layer of ``model``.

    Args:
        model: a torchtune ``TransformerDecoder``.
        batches: calibration inputs, keyword arguments of the model's forward (``tokens`` (b, s), and as needed
            ``mask``, ``input_pos``) on its device. Every position counts, padding too: prefer packed batches.
        threshold: τ, in multiples of the layer's mean; 13 is what the paper's released scores were made with.
        world: processes that have parts of the weights and batches of their own; all get the score of all batches.

    Returns:
        D_l of each layer, bottom first, between 0 and 1.

    Raises:
        TypeError: if ``model`` is not a ``TransformerDecoder``.
        ValueError: if there are no batches, or ``threshold`` is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"outlier_threshold={threshold}; it must be above 0")
    layers = find_layers(model)
    norms = input_norms(model, batches, world)
    return [
        outlier_share([(linear.weight, norms[i][name]) for name, linear in find_linears(layer)], threshold, world)
        for i, layer in enumerate(tqdm(layers, desc="Outliers", unit="layer", leave=False))
    ]


@torch.no_grad()
def input_norms(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], world: World = ALONE) -> InputNorms:
    """‖X_:,j‖₂ of the inputs of every Linear, from one forward pass of each batch, over all processes together."""
    layers = find_layers(model)
    squares: InputNorms = [{} for _ in layers]
    handles = [
        hook
        for layer, layer_squares in zip(layers, squares, strict=True)
        for hook in _count_squares(layer, layer_squares)
    ]
    was_training = model.training
    model.eval()
    num_batches = 0
    try:
        for batch in tqdm(batches, desc="Scoring layers", unit="batch", leave=False):
            model(**batch)
            num_batches += 1
    finally:
        model.train(was_training)
        reshard(model)
        for handle in handles:
            handle.remove()
    if num_batches == 0:
        raise ValueError("no calibration batches; outlier scores need at least one")
    return [{name: world.sum_(total.clone()).sqrt() for name, total in layer.items()} for layer in squares]


def _count_squares(layer: nn.Module, squares: dict[str, Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    # The query, key and value projections read one tensor, and so do gate and up: each is measured once.
    last: dict[str, Tensor | None] = {"input": None, "squares": None}

    def measure(name: str):
        def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0] is not last["input"]:
                x = args[0].reshape(-1, args[0].shape[-1])
                dtype = torch.promote_types(x.dtype, torch.float32)
                last["input"] = args[0]
                last["squares"] = torch.linalg.vector_norm(x, dim=0, dtype=dtype).square()
            assert last["squares"] is not None
            squares[name] = squares[name] + last["squares"] if name in squares else last["squares"]

        return hook

    def forget(*_: object) -> None:
        last.update(input=None, squares=None)

    handles = [linear.register_forward_pre_hook(measure(name)) for name, linear in find_linears(layer)]
    return [*handles, layer.register_forward_hook(forget)]


@torch.no_grad()
def outlier_share(
    linears: list[tuple[Tensor, Tensor]],  # weight (out, in), input norms (in,)
    threshold: float,
    world: World = ALONE,
) -> float:
    """Share of entries of A = |W| · norm above ``threshold`` times the mean of A over all ``linears`` together.

    Streamed: at most one Linear's A is alive at a time.
    """
    num_entries = sum(weight.numel() for weight, _ in linears)
    own = [(local(weight), norm.to(weight.device)) for weight, norm in linears]
    sums = [torch.dot(weight.abs().sum(0, dtype=torch.float64), norm.double()) for weight, norm in own]
    limit = threshold * world.sum_(torch.stack(sums).sum()) / num_entries
    counts = [(weight.abs() * norm > limit).sum() for weight, norm in own]
    return int(world.sum_(torch.stack(counts).sum())) / num_entries
