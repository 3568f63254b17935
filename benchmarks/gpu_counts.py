"""Kernel launches, waits of the host and compiled graphs of training on a GPU, counted without one.

    python benchmarks/gpu_counts.py [--output benchmarks/gpu_counts.md]

A step of LLaMA-2-7B runs on meta tensors, which have shapes and no values. Each operation that is not a view or an
allocation counts as one kernel. Each value that the host reads counts as a wait. Waits inside torch's functions do not
count: a refresh has one in `torch.linalg.eigh` for each weight. Graphs are those of a small model on a CPU, in 24 draws
with validation after each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from report import command, parser, publish
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import training
from torchtune.models.llama2 import llama2, llama2_7b

import owlore_tune.optim.adamw as adamw
from owlore_tune.layers.active import ActiveLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.loss import LinearCrossEntropyLoss, mean_loss, shift_labels
from owlore_tune.optim.adamw import OwLoreAdamW, parameter_groups
from owlore_tune.run.compiled import RECOMPILE_LIMIT

META = torch.device("meta")
ROWS = {
    "OwLore, γ=5, rank 128": (5, {}),
    "OwLore, γ=5, rank 128, 8-bit moments, 16-bit bases": (5, {"state_bits": 8, "basis_bits": 16}),
    "LISA, γ=2": (2, {"rank": None}),
    "LISA, γ=2, 8-bit moments": (2, {"rank": None, "state_bits": 8}),
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias"}


class Counts(TorchDispatchMode):
    """Counts kernels and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.waits = 0
        self._has_norms = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device == META:
            self.waits += 1
            return 1.0
        if name == "_to_copy" and args[0].device == META and torch.device(kwargs.get("device", META)).type == "cpu":
            self.waits += 1
            dtype = kwargs.get("dtype", args[0].dtype)
            # Numbers are 1, and tests such as `isnan` are false.
            return torch.full(args[0].shape, dtype != torch.bool, dtype=dtype)
        if name == "linalg_vector_norm":  # on a GPU, torch computes those of all gradients together
            self.kernels += not self._has_norms
            self._has_norms = True
        elif not func.is_view and name not in ALLOCATIONS:
            self.kernels += 1
        return func(*args, **kwargs)


@contextmanager
def one_kernel_for_the_elementwise_update() -> Iterator[None]:
    """Count the compiled update as the one kernel that it compiles to (tests/test_compile.py)."""

    def fused(weight: Tensor, change: Tensor, noise: Tensor | None, decay: float = 0.0) -> None:
        weight.copy_(change)

    plain, adamw.round_to = adamw.round_to, fused
    yield
    adamw.round_to = plain


def count(num_active: int, options: dict[str, Any], *, refreshes: bool) -> dict[str, tuple[int, int]]:
    """Kernels and waits by part of the second step after a draw."""
    with META, training.set_default_dtype(torch.bfloat16):
        model = llama2_7b()
    loss_fn = LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    optimizer = OwLoreAdamW(parameter_groups(model), update_gap=1 if refreshes else 100, **options)
    optimizer._generator = lambda *args: None  # type: ignore[method-assign]  # there are none on the meta device
    ActiveLayers(model, optimizer, LayerSampler([1.0] * 32, num_active=num_active), resample_every=10).maybe_redraw(0)
    for _ in range(2):
        parts = {}
        with Counts() as micro_batch:
            tokens = torch.randint(32_000, (1, 512))
            labels = shift_labels(tokens, loss_fn.ignore_index)
            mean_loss(model, loss_fn, {"tokens": tokens}, labels, META).backward()
        parts["micro-batch"] = micro_batch
        with Counts() as step:
            optimizer.clip_grad_norm_(1.0).tolist()  # the recipe reads loss and norm together
            optimizer.step()
            optimizer.zero_grad()
        parts["optimizer step"] = step
    return {name: (counts.kernels, counts.waits) for name, counts in parts.items()}


def count_graphs(lengths: tuple[int, ...]) -> int:
    """Graphs that torch compiles for the layers of a small model."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    model = llama2(64, 4, 4, 2, 32, max_seq_len=64, intermediate_dim=48)
    optimizer = OwLoreAdamW(parameter_groups(model), rank=8)
    active = ActiveLayers(model, optimizer, LayerSampler([1.0] * 4, num_active=2), resample_every=1)
    for layer in model.layers:
        layer.compile(backend=counting)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for step in range(24):
        active.maybe_redraw(step)
        tokens = torch.randint(64, (2, lengths[step % len(lengths)]))
        model(tokens).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model(tokens)
    return len(graphs)


def main() -> None:
    args = parser(__doc__).parse_args()
    lines = [
        "# Kernel launches, waits and compiled graphs on a GPU, counted without one",
        "",
        "LLaMA-2-7B, bfloat16, 1 × 512 tokens, stochastic rounding. A micro-batch is its forward and backward with "
        "projections. An optimizer step includes the norm of the gradients, and reading it with the loss. Command: "
        f"{command()}.",
        "",
        "| run | kernels of a micro-batch | of a micro-batch with a refresh | of a step | of a step with compile=true "
        "| of such a step with a refresh | waits of a micro-batch | of a step | of a step with a refresh |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (num_active, options) in ROWS.items():
        plain, refreshed = (count(num_active, options, refreshes=wanted) for wanted in (False, True))
        with one_kernel_for_the_elementwise_update():
            compiled = count(num_active, options, refreshes=False)
        lines.append(
            f"| {name} | {plain['micro-batch'][0]} | {refreshed['micro-batch'][0]} | {plain['optimizer step'][0]} "
            f"| {compiled['optimizer step'][0]} | {refreshed['optimizer step'][0]} | {refreshed['micro-batch'][1]} "
            f"| {plain['optimizer step'][1]} | {refreshed['optimizer step'][1]} |"
        )
        print(lines[-1], flush=True)
    fixed, varying = count_graphs((16,)), count_graphs((16, 24, 9))
    lines += [
        "",
        f"Compiled graphs of the layers: {fixed} for rows of one length, {varying} for rows of varying length; torch "
        f"compiles at most {RECOMPILE_LIMIT}.",
    ]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
