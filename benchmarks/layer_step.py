"""Time of forward and backward of layers that train against layers that are frozen, in each format of the weights.

    python benchmarks/layer_step.py [--output benchmarks/layer_step.md]

Four layers of LLaMA-2-7B's shapes in bfloat16, with activation checkpointing. A step of layers that train includes
clipping and AdamW. Their bases exist: a refresh is not in the time. Rounds are interleaved.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from report import command, machine, parser, publish
from torch import Tensor, nn
from torchtune import training
from torchtune.models.llama2 import llama2

from owlore_tune.heap import reuse_freed_memory
from owlore_tune.layers import LayerSampler, ProjectedLayers, Schedule
from owlore_tune.models.decoder import find_layers, find_linears
from owlore_tune.quantized.linear import quantize

NUM_LAYERS, TOKENS, RANK, ROUNDS = 4, 512, 128, 5
FORMATS = {"full": "full", "int8": "int8", "nf4": "full"}  # with their products


def loss_of(model: nn.Module, embedded: Tensor) -> Tensor:
    hidden = embedded.clone().requires_grad_()  # a backward through all layers, as below others that train
    for layer in find_layers(model):
        hidden = layer(hidden)
    return hidden.float().square().mean()


def step_of(weights: str, products: str, trains: bool, embedded: Tensor) -> Callable[[], None]:
    """Return a step of new layers; those that train have their bases."""
    with training.set_default_dtype(torch.bfloat16):
        model = llama2(64, NUM_LAYERS, 32, 32, 4096, max_seq_len=TOKENS, intermediate_dim=11008)
    if weights != "full":
        for layer in find_layers(model):
            for _, linear in find_linears(layer):
                quantize(linear, weights, products)
    layers = ProjectedLayers(model, rank=RANK)
    optimizer = torch.optim.AdamW(layers.parameter_groups(), lr=1e-6, weight_decay=0.0, fused=True)
    schedule = Schedule(layers, optimizer, LayerSampler([1.0] * NUM_LAYERS, NUM_LAYERS))
    training.set_activation_checkpointing(model, auto_wrap_policy={type(find_layers(model)[0])})

    def frozen() -> None:
        loss_of(model, embedded).backward()

    def trained() -> None:
        schedule.begin_step()
        loss_of(model, embedded).backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step = trained if trains else frozen
    for _ in range(2):  # the first makes the bases, and the second the optimizer's kernels
        step()
    return step


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    args = parser(__doc__).parse_args()
    reuse_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    embedded = torch.randn(1, TOKENS, 4096).bfloat16()
    cases = [(weights, trains) for weights in FORMATS for trains in (False, True)]
    steps = {case: step_of(case[0], FORMATS[case[0]], case[1], embedded) for case in cases}
    gc.collect()
    times: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case, step in steps.items():
            times[case].append(seconds(step))
    medians = {case: statistics.median(values) for case, values in times.items()}
    reference = medians["full", False]
    lines = [
        "# Time of layers that train against frozen layers",
        "",
        f"{NUM_LAYERS} layers of LLaMA-2-7B's shapes, {TOKENS} tokens, rank {RANK}, bfloat16, activation "
        f"checkpointing, {torch.get_num_threads()} threads, median of {ROUNDS} interleaved rounds; {machine()}. "
        f"Command: {command()}.",
        "",
        "| weights | products | frozen, s | all train, s | frozen, ratio | all train, ratio |",
        "|---|---|---|---|---|---|",
    ]
    for weights, products in FORMATS.items():
        frozen, trained = medians[weights, False], medians[weights, True]
        lines.append(
            f"| {weights} | {products} | {frozen:.2f} | {trained:.2f} | {frozen / reference:.2f} | "
            f"{trained / reference:.2f} |"
        )
    publish(lines, args.output)


if __name__ == "__main__":
    main()
