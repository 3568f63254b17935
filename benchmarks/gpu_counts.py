"""Kernel launches and waits of the host of training on a GPU, counted without one.

    python benchmarks/gpu_counts.py [--output benchmarks/gpu_counts.md]

A step of LLaMA-2-7B runs on meta tensors, which have shapes and no values. Each operation that is not a view or an
allocation counts as one kernel; torch's attention and norms are one each, as on a GPU. Each value that the host reads
counts as a wait, and so does each `torch.linalg.eigh`, which reads whether it succeeded.
"""

from typing import Any

import torch
from lib.report import command, parser, publish, table
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import training
from torchtune.models.llama2 import llama2_7b

from owlore_tune.layers import ProjectedLayers
from owlore_tune.loss import LinearCrossEntropyLoss, mean_loss, shift_labels
from owlore_tune.models import fused
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.models.fused import fuse_parts
from owlore_tune.optim import bases as projection
from owlore_tune.quantized import formats
from owlore_tune.quantized.linear import attach, set_value

META = torch.device("meta")
ROWS = {  # layers that train, rank, format and products
    "OwLore, γ=5, rank 128": (5, 128, "full", "full"),
    "OwLore, γ=5, rank 128, int8": (5, 128, "int8", "int8"),
    "OwLore, γ=5, rank 128, NF4": (5, 128, "nf4", "full"),
    "OwLore, all layers, rank 128": (32, 128, "full", "full"),
    "OwLore, all layers, rank 128, int8": (32, 128, "int8", "int8"),
    "OwLore, all layers, rank 128, NF4": (32, 128, "nf4", "full"),
    "LISA, γ=2": (2, None, "full", "full"),
}
ALLOCATIONS = {"promote_types", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "detach", "alias"}


class Counts(TorchDispatchMode):
    """Counts kernels and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.waits = 0

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
        if not func.is_view and name not in ALLOCATIONS:
            self.kernels += 1
            self.waits += name == "_linalg_eigh"
        return func(*args, **kwargs)


def as_one_kernel(name: str, num_inputs: int) -> Any:
    """A function of tensors that is one kernel in forward, with a result as its first input, and one in backward."""
    inputs = ", ".join(f"Tensor x{index}" for index in range(num_inputs))
    torch.library.define(f"count::{name}", f"({inputs}) -> Tensor")
    torch.library.define(f"count::{name}_backward", f"(Tensor grad, {inputs}) -> ({inputs.replace('x', 'grad')})")
    forward, backward = (getattr(torch.ops.count, each) for each in (name, f"{name}_backward"))
    torch.library.register_fake(f"count::{name}", lambda *xs: torch.empty_like(xs[0]))
    torch.library.register_fake(f"count::{name}_backward", lambda grad, *xs: tuple(map(torch.empty_like, xs)))
    torch.library.register_autograd(
        f"count::{name}",
        lambda ctx, grad: backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return forward


def compute_as_on_a_gpu() -> None:
    """Have meta tensors take the paths of a GPU: our kernels, and torch's fused attention and norms."""
    attention, norm = as_one_kernel("attention", 3), as_one_kernel("norm", 2)
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: attention(q, k, v)
    torch.nn.functional.rms_norm = lambda x, shape, weight, eps: norm(x, weight)
    formats.has_kernels = fused.has_kernels = lambda device: device.type != "cpu"
    formats._PIECE = formats._PIECE_ON_CUDA
    projection._factor_dtype = lambda outer, inner, dtype: inner.dtype if inner.dtype == outer.dtype else dtype


def count(num_active: int, rank: int | None, weights: str, products: str) -> list[Counts]:
    """Return counts of a micro-batch without bases yet, and of one that has them."""
    with META, training.set_default_dtype(torch.bfloat16):
        model = llama2_7b()
        fuse_parts(model, torch.device("cuda"))
        layers = ProjectedLayers(model, rank=rank)
    for layer in find_layers(model):
        quantize_empty(layer, weights, products)
    loss_fn = LinearCrossEntropyLoss()
    loss_fn.set_model_output(model)
    layers.activate([0, *range(32 - num_active + 1, 32)])
    found = []
    for _ in range(2):
        with Counts() as counts:
            tokens = torch.randint(32_000, (1, 512))
            labels = shift_labels(tokens, loss_fn.ignore_index)
            mean_loss(model, loss_fn, {"tokens": tokens}, labels, META).backward()
        found.append(counts)
    return found


def quantize_empty(module: torch.nn.Module, weights: str, products: str) -> None:
    """Give the Linears of ``module`` quantized weights without values, and free their own."""
    for _, linear in find_linears(module) if weights != "full" else ():
        quantized = formats.format_of(linear.weight.shape, weights).empty(linear.weight.shape, META)
        attach(linear, quantized, products, torch.bfloat16)
        set_value(linear.weight, linear.weight.new_empty(0))


def main() -> None:
    args = parser(__doc__).parse_args()
    compute_as_on_a_gpu()
    lines = [
        "# Kernel launches and waits on a GPU, counted without one",
        "",
        "LLaMA-2-7B, bfloat16, 1 × 512 tokens. A micro-batch is its forward and backward. The head is in full "
        f"precision. Command: {command()}.",
        "",
    ]
    columns = ["run", "kernels of a micro-batch", "of one that makes the bases", "waits of a micro-batch"]
    rows = []
    for name, setting in ROWS.items():
        first, second = count(*setting)
        rows.append([name, *map(str, (second.kernels, first.kernels, second.waits, first.waits))])
    lines += table([*columns, "waits of one that makes the bases"], rows)
    publish(lines, args.output)


if __name__ == "__main__":
    main()
