"""Times of single operations against the same work without this package: layers and bases.

    python benchmarks/operations.py [--output benchmarks/operations.md]

Rounds are interleaved, and times are medians. Layers: forward and backward of four layers of LLaMA-2-7B's shapes in
bfloat16, with activation checkpointing; those that train also clip and step AdamW. They have their bases, which are
measured on their own: the gradient is a product of an output's gradient and an input, whose singular values decay like
1/i, and only the SVD needs the product.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from lib.report import command, machine, parser, publish, table
from torch import Tensor
from torchtune import training
from torchtune.models.llama2 import llama2

from owlore_tune.layers import LayerSampler, ProjectedLayers, Schedule
from owlore_tune.measure import reuse_freed_memory
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.optim.bases import sketch, svd_basis, truncate
from owlore_tune.quantized.linear import quantize

NUM_LAYERS, TOKENS, RANK = 4, 512, 128
FORMATS = {"full": "full", "int8": "int8", "nf4": "full"}  # with their products
Call = Callable[[], object]


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def times(calls: dict[str, Call], rounds: int, reference: str) -> list[str]:
    """A table of the median times."""
    found = medians(calls, rounds)
    rows = [[name, f"{spent:.3f}", f"{spent / found[reference]:.2f}"] for name, spent in found.items()]
    return [*table(["", "median, s", "ratio"], rows), ""]


def layer_step(weights: str, trains: bool, embedded: Tensor) -> Call:
    """A step of new layers; those that train have their bases."""
    with training.set_default_dtype(torch.bfloat16):
        model = llama2(64, NUM_LAYERS, 32, 32, 4096, max_seq_len=TOKENS, intermediate_dim=11008)
    if weights != "full":
        for layer in find_layers(model):
            for _, linear in find_linears(layer):
                quantize(linear, weights, FORMATS[weights])
    layers = ProjectedLayers(model, rank=RANK)
    optimizer = torch.optim.AdamW(layers.parameter_groups(), lr=1e-6, weight_decay=0.0, fused=True)
    schedule = Schedule(layers, optimizer, LayerSampler([1.0] * NUM_LAYERS, NUM_LAYERS))
    training.set_activation_checkpointing(model, auto_wrap_policy={type(find_layers(model)[0])})

    def step() -> None:
        if trains:
            schedule.begin_step()
        hidden = embedded.clone().requires_grad_()  # a backward through all layers, as below others that train
        for layer in find_layers(model):
            hidden = layer(hidden)
        hidden.float().square().mean().backward()
        if trains:
            torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):  # the first makes the bases, and the second the optimizer's kernels
        step()
    return step


def layers_section() -> list[str]:
    embedded = torch.randn(1, TOKENS, 4096).bfloat16()
    steps = {
        f"{weights}, {'train' if trains else 'frozen'}": layer_step(weights, trains, embedded)
        for weights in FORMATS
        for trains in (False, True)
    }
    gc.collect()
    return [f"## {NUM_LAYERS} layers, {TOKENS} tokens, rank {RANK}", "", *times(steps, 5, "full, frozen")]


def bases_section(size: int = 2048) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, TOKENS, generator=generator)).Q for _ in range(2))
    outputs, inputs = u.T / torch.arange(1, TOKENS + 1)[:, None], v.T
    noisy = inputs + 1e-2 * torch.randn(TOKENS, size, generator=generator)

    def find(inputs: torch.Tensor = inputs, start: torch.Tensor | None = None) -> torch.Tensor:
        return next(truncate([sketch(outputs, inputs, RANK, generator=generator, start=start)], RANK)).columns

    start, grad = find(noisy), outputs.T @ inputs
    calls: dict[str, Call] = {
        "torch.linalg.svd": lambda: svd_basis(outputs.T @ inputs, RANK)[0],
        "range finder, first basis": find,
        "range finder, from the old basis": partial(find, start=start),
    }
    best = (grad @ calls["torch.linalg.svd"]()).square().sum()
    shares = [f"{name}: {(grad @ call()).square().sum() / best:.4f}" for name, call in calls.items()]
    return [
        f"## A basis of a {size} × {size} gradient, float32, rank {RANK}", "",
        *times(calls, 7, "torch.linalg.svd"),
        f"Captured energy / optimum: {', '.join(shares)}.", "",
    ]  # fmt: skip


def main() -> None:
    args = parser(__doc__).parse_args()
    reuse_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    lines = ["# Times of single operations", "", f"{machine()}. Command: {command()}.", ""]
    lines += [*layers_section(), *bases_section()]
    publish(lines[:-1], args.output)


if __name__ == "__main__":
    main()
